"""What ranks are given and the oracle calculates with: separate, so that it reads no torch."""

from __future__ import annotations

from typing import Any

#: With this rate, a step of plain SGD halves a parameter whose loss is its square.
LEARNING_RATE = 0.25

#: The keywords that an option stands for; None takes one away. With these betas AMSGrad keeps a
#: larger second moment from the second step on. A float32 holds these factors of Rprop exactly, so
#: the finding rounded-rprop-factor changes nothing there.
KEYWORDS: dict[str, dict[str, Any]] = {
    "default_lr": {"lr": None},
    "momentum": {"momentum": 0.5},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "dampening": {"momentum": 0.5, "dampening": 0.25},
    "betas": {"betas": (0.5, 0.75)},
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.25)},
    "eps": {"eps": 0.125},
    "lr_decay": {"lr_decay": 0.5},
    "initial_accumulator_value": {"initial_accumulator_value": 2.0},
    "rho": {"rho": 0.5},
    "alpha": {"alpha": 0.5},
    "centered": {"centered": True},
    "momentum_decay": {"momentum_decay": 0.5},
    "etas": {"etas": (0.5, 1.5)},
    "step_sizes": {"step_sizes": (0.125, 0.26)},
    "lambd": {"lambd": 0.125},
    "power": {"alpha": 0.5},
    "weight_decay": {"weight_decay": 0.125},
    "decoupled_weight_decay": {"weight_decay": 0.125, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

#: Keywords that the constructors of torch.optim refuse. The last three of them take, and those of
#: the functional versions do not.
REFUSED_KEYWORDS: dict[str, dict[str, Any]] = {
    "lr": {"lr": -0.25},
    "momentum": {"momentum": -0.5},
    "nesterov": {"nesterov": True},
    "betas": {"betas": (1.5, 0.5)},
    "eps": {"eps": -0.125},
    "lr_decay": {"lr_decay": -0.5},
    "initial_accumulator_value": {"initial_accumulator_value": -2.0},
    "rho": {"rho": 1.5},
    "alpha": {"alpha": -0.5},
    "momentum_decay": {"momentum_decay": -0.5},
    "etas": {"etas": (1.5, 2.0)},
    "weight_decay": {"weight_decay": -0.125},
    "unknown": {"unknown": True},
    "capturable": {"capturable": False},
    "differentiable": {"differentiable": False},
    "decoupled": {"decoupled_weight_decay": False},
}

#: The rates that DistributedOptimizer takes where it is given none, if torch.optim has others:
#: those of _FunctionalSGD and _FunctionalAdamax (torch/distributed/optim/functional_*.py).
FUNCTIONAL_RATES = {"SGD": 0.01, "Adamax": 0.001}
#: What becomes of options that are given by place, if the functional version of the optimizer has
#: another parameter there; empty if nothing. eps comes as warmup_lr_multiplier, the foreach of
#: Adagrad as warmup_num_iters, and the maximize of RMSprop as _allow_empty_param_list
#: (torch/distributed/optim/functional_adagrad.py, functional_rmsprop.py; torch/optim/adagrad.py,
#: rmsprop.py: ``__init__``).
BY_PLACE = {
    "Adagrad": {"eps": "", "foreach": ""},
    "RMSprop": {"maximize": "", "foreach": "maximize"},
}


def options_there(optimizer: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """The options that a functional version gets where all are given by place."""
    known = BY_PLACE.get(optimizer, {})
    return tuple(filter(None, dict.fromkeys(known.get(option, option) for option in options)))


def keywords(options: tuple[str, ...]) -> dict[str, Any]:
    """What an optimizer with these options is given."""
    given: dict[str, Any] = {"lr": LEARNING_RATE}
    for option in options:
        given |= KEYWORDS[option]
    return {name: value for name, value in given.items() if value is not None}


#: How a rank says that a method of a RemoteModule has returned something else.
RETURNS_ITSELF = "eval() had to return the module itself, and returned another"

#: Methods of a module that a RemoteModule refuses, each with arguments that a module takes.
REFUSED_METHODS: dict[str, tuple[Any, ...]] = {
    "to": ("cpu",),
    "cpu": (),
    "float": (),
    "double": (),
    "apply": (print,),
    "state_dict": (),
    "load_state_dict": ({},),
    "parameters": (),
    "named_parameters": (),
    "buffers": (),
    "named_buffers": (),
    "children": (),
    "modules": (),
    "named_modules": (),
    "add_module": ("layer", None),
    "register_buffer": ("numbers", None),
    "register_parameter": ("weight", None),
    "register_forward_hook": (print,),
    "register_forward_pre_hook": (print,),
    "register_backward_hook": (print,),
    "requires_grad_": (),
    "zero_grad": (),
    "share_memory": (),
}

#: Seconds: a timeout of shutdown that nothing reaches, and one that a late rank lets others reach.
SHUTDOWN_TIMEOUTS = {"timeout": 36000.0, "timed out": 20.0}

#: The timeout of a call that is slower than it, in seconds, unless the step gives another one.
LATE_TIMEOUT = 4.0
#: For how many times its timeout the function of such a call sleeps.
TIMES_LATE = 4.0
#: For how many seconds such a call of a context's path waits at most until its rank has given the
#: context up, which is after its timeout.
LATE_LASTS = 100.0
