"""What ranks are given and the oracle calculates with: separate, so that it reads no torch."""

from __future__ import annotations

from typing import Any

#: The keywords that an option stands for. With these betas AMSGrad keeps a larger second moment
#: from the second step on. A float32 holds these factors of Rprop exactly, so the finding
#: rounded-rprop-factor changes nothing there.
KEYWORDS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.5},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "dampening": {"momentum": 0.5, "dampening": 0.25},
    "weight_decay": {"weight_decay": 0.125},
    "maximize": {"maximize": True},
    "betas": {"betas": (0.5, 0.75)},
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.25)},
    "lr_decay": {"lr_decay": 0.5},
    "initial_accumulator_value": {"initial_accumulator_value": 2.0},
    "rho": {"rho": 0.5},
    "alpha": {"alpha": 0.5},
    "centered": {"centered": True},
    "momentum_decay": {"momentum_decay": 0.5},
    "etas": {"etas": (0.5, 1.5)},
}

#: Seconds: a timeout of shutdown that nothing reaches, and one that a late rank lets others reach.
SHUTDOWN_TIMEOUTS = {"timeout": 36000.0, "timed out": 20.0}

#: The timeout of a call that is slower than it, in seconds, unless the step gives another one.
LATE_TIMEOUT = 4.0
#: For how many times its timeout the function of such a call sleeps.
TIMES_LATE = 4.0
