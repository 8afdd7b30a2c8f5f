"""What is known of the optimizers of ``torch.optim`` that drawn programs train with, as data."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from rpcprops.steps.in_rank.constants import FUNCTIONAL_RATES, options_there

#: Optimizers of ``torch.optim``. For all but the last three torch has a functional version, which
#: DistributedOptimizer uses instead (torch/distributed/optim/utils.py: functional_optim_map).
Optimizer: TypeAlias = Literal[
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adadelta",
    "RMSprop",
    "Adamax",
    "Rprop",
    "NAdam",
    "RAdam",
    "ASGD",
]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
#: Those that DistributedOptimizer uses as they are.
ORDINARY: tuple[Optimizer, ...] = ("NAdam", "RAdam", "ASGD")
#: Those whose functional version refuses the same values (functional_adam.py, functional_adamw.py
#: and functional_adamax.py in torch/distributed/optim). The others check none.
CHECKED: tuple[Optimizer, ...] = ("Adam", "AdamW", "Adamax", *ORDINARY)

#: Options that a functional version takes, and of which its step raises where torch compiles it
#: ("torch.jit.script not supported with foreach optimizers"; torch/optim/sgd.py: sgd, and so on).
UNCOMPILED = ("foreach", "fused")

#: The options that an optimizer may be given. Both that of ``torch.optim`` and its functional
#: version take them (torch/distributed/optim/functional_*.py).
OPTIONS: Mapping[Optimizer, tuple[str, ...]] = {
    "SGD": (
        *("default_lr", "momentum", "nesterov", "dampening", "weight_decay", "maximize"),
        *UNCOMPILED,
    ),
    "Adagrad": (
        *("default_lr", "lr_decay", "initial_accumulator_value", "eps", "weight_decay"),
        *("maximize", *UNCOMPILED),
    ),
    **dict.fromkeys(
        ("Adam", "AdamW"),
        (*("default_lr", "betas", "amsgrad", "eps", "weight_decay", "maximize"), *UNCOMPILED),
    ),
    "Adadelta": ("default_lr", "rho", "eps", "weight_decay", "maximize", "foreach"),
    "RMSprop": (
        *("default_lr", "momentum", "alpha", "eps", "centered", "weight_decay"),
        *("maximize", "foreach"),
    ),
    "Adamax": ("default_lr", "betas", "eps", "weight_decay", "maximize", "foreach"),
    "Rprop": ("default_lr", "etas", "step_sizes", "maximize", "foreach"),
    "NAdam": (
        *("default_lr", "betas", "eps", "momentum_decay", "weight_decay"),
        *("decoupled_weight_decay", "maximize", "foreach"),
    ),
    "RAdam": (
        *("default_lr", "betas", "weight_decay", "decoupled_weight_decay", "maximize"),
        "foreach",
    ),
    "ASGD": ("default_lr", "lambd", "power", "weight_decay", "maximize", "foreach"),
}

#: Keywords that no functional version has. Most optimizers of ``torch.optim`` have the first two,
#: and Adam has the third.
LACKING = ("capturable", "differentiable", "decoupled")

#: The values that the constructor of ``torch.optim`` refuses: it raises a ValueError, or of a
#: keyword that it does not have a TypeError (torch/optim/sgd.py and so on: ``__init__``). Those of
#: :data:`LACKING` the constructor of the functional version refuses, which lacks the keyword.
REFUSALS: Mapping[Optimizer, tuple[str, ...]] = {
    "SGD": ("lr", "momentum", "nesterov", "weight_decay", "unknown", *LACKING[:2]),
    "Adagrad": (
        *("lr", "lr_decay", "initial_accumulator_value", "eps", "weight_decay", "unknown"),
        *LACKING[:2],
    ),
    "Adam": ("lr", "betas", "eps", "weight_decay", "unknown", *LACKING),
    "AdamW": ("lr", "betas", "eps", "weight_decay", "unknown", *LACKING[:2]),
    "Adadelta": ("lr", "rho", "eps", "weight_decay", "unknown", *LACKING[:2]),
    "RMSprop": ("lr", "momentum", "alpha", "eps", "weight_decay", "unknown", *LACKING[:2]),
    "Adamax": ("lr", "betas", "eps", "weight_decay", "unknown", *LACKING[:2]),
    "Rprop": ("lr", "etas", "unknown", *LACKING[:2]),
    "NAdam": ("lr", "betas", "eps", "momentum_decay", "weight_decay", "unknown"),
    "RAdam": ("lr", "betas", "eps", "weight_decay", "unknown"),
    "ASGD": ("lr", "weight_decay", "unknown"),
}

#: Options that no optimizer takes together: a momentum of Nesterov's is refused with dampening, and
#: there is one implementation at a time.
_APART = ({"nesterov", "dampening"}, {"foreach", "fused"})
#: The rates of the optimizers of which the oracle knows the formula, where they are given none.
_DEFAULT_RATES = {"SGD": 0.001, "Rprop": 0.01}
#: The factors of Rprop's step sizes, and the limits of these (torch/optim/rprop.py).
_ETAS = (0.5, 1.2)
_STEP_SIZES = (1e-6, 50.0)


def are_options(optimizer: Optimizer, options: Sequence[str]) -> bool:
    """Whether it takes these options together; they must be in the order of :data:`OPTIONS`."""
    known = OPTIONS[optimizer]
    in_order = tuple(option for option in known if option in options)
    return in_order == tuple(options) and not any(set(options) >= apart for apart in _APART)


def combinations(optimizer: Optimizer, most: int = 2) -> Iterator[tuple[str, ...]]:
    """No option, each single one, and so on."""
    for number in range(most + 1):
        for options in itertools.combinations(OPTIONS[optimizer], number):
            if are_options(optimizer, options):
                yield options


def is_uncompiled(optimizer: Optimizer, options: Sequence[str], *, placed: bool) -> bool:
    """Whether its functional version raises in each step where it is compiled.

    Args:
        placed: whether the options are given by place.
    """
    there = options_there(optimizer, tuple(options)) if placed else options
    return optimizer not in ORDINARY and not set(there).isdisjoint(UNCOMPILED)


def differs_by_place(optimizer: Optimizer, options: Sequence[str]) -> bool:
    """Whether its functional version computes something else if these are given by place."""
    there = {*options_there(optimizer, tuple(options))}
    return there - {*UNCOMPILED} != {*options} - {*UNCOMPILED}


def has_other_rate(optimizer: Optimizer, options: Sequence[str]) -> bool:
    """Whether it is given no rate, and its functional version has another one by default."""
    return "default_lr" in options and optimizer in FUNCTIONAL_RATES


def computed(
    optimizer: Optimizer, value: float, uses: Sequence[bool], options: Mapping[str, Any]
) -> float | None:
    """A parameter whose loss is its square after some steps; None if no formula is known here.

    Args:
        uses: for each step, whether it has a gradient; else the optimizer passes it over.
        options: the keywords that the optimizer is given.
    """
    if optimizer == "SGD":
        return _sgd(value, uses, options)
    return rprop(value, uses, options) if optimizer == "Rprop" else None


def _sgd(value: float, uses: Sequence[bool], options: Mapping[str, Any]) -> float:
    """As in ``torch/optim/sgd.py``: _single_tensor_sgd."""
    rate = options.get("lr", _DEFAULT_RATES["SGD"])
    momentum = options.get("momentum", 0.0)
    kept: float | None = None
    for _ in filter(None, uses):
        slope = _slope(value, options) + options.get("weight_decay", 0.0) * value
        if momentum:
            damped = (1.0 - options.get("dampening", 0.0)) * slope
            kept = slope if kept is None else momentum * kept + damped
            slope = slope + momentum * kept if options.get("nesterov") else kept
        value -= rate * slope
    return value


def rprop(
    value: float, uses: Sequence[bool], options: Mapping[str, Any], *, rounded: bool = False
) -> float:
    """As in ``torch/optim/rprop.py``: _single_tensor_rprop.

    Args:
        rounded: whether a float32 holds the factor by which a step size grows.
    """
    grows = options.get("etas", _ETAS)[1]
    least, most = options.get("step_sizes", _STEP_SIZES)
    if rounded:
        grows = struct.unpack("f", struct.pack("f", grows))[0]
    previous, size = 0.0, options.get("lr", _DEFAULT_RATES["Rprop"])
    for _ in filter(None, uses):
        slope = _slope(value, options)
        turn = slope * previous
        size *= grows if turn > 0 else _ETAS[0] if turn < 0 else 1.0
        size = min(max(size, least), most)
        if turn < 0:
            slope = 0.0
        if slope:
            value -= math.copysign(size, slope)
        previous = slope
    return value


def _slope(value: float, options: Mapping[str, Any]) -> float:
    return -2.0 * value if options.get("maximize") else 2.0 * value
