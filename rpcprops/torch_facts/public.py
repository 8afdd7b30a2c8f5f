"""The public names of torch's RPC, and why a drawn program does not use some of them.

The names come from torch itself: :func:`public_names` imports it. Everything else here is data.
docs/coverage.md shows all of it (``python -m rpcprops._coverage``).
"""

from __future__ import annotations

import enum
import fnmatch
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: The packages whose public names count, and modules of them that people import from. An object
#: that two of them have belongs to the first.
PACKAGES = (
    "torch.distributed.rpc",
    "torch.distributed.rpc.functions",
    "torch.distributed.rpc.backend_registry",
    "torch.distributed.autograd",
    "torch.distributed.optim",
    "torch.distributed.nn",
    "torch.futures",
)
#: The classes whose public members count as names too.
CLASSES = (
    "torch.distributed.rpc.RRef",
    "torch.distributed.rpc.WorkerInfo",
    "torch.distributed.rpc.BackendType",
    "torch.distributed.rpc.TensorPipeRpcBackendOptions",
    "torch.distributed.autograd.DistAutogradContext",
    "torch.distributed.optim.DistributedOptimizer",
    "torch.distributed.nn.RemoteModule",
    "torch.futures.Future",
)
#: The members that an object gets when it is made, and that its class lacks.
MADE = (
    # nn/api/remote_module.py, `_install_generated_methods`.
    "torch.distributed.nn.RemoteModule.forward",
    "torch.distributed.nn.RemoteModule.forward_async",
)
#: Modules whose objects belong to a package above, although they name another home.
_HOMES = ("torch._C._distributed_rpc", "torch._C._distributed_autograd")
#: A package whose public modules are names of their own (the functional optimizers are such).
_WITH_MODULES = "torch.distributed.optim"


@dataclass(frozen=True, slots=True)
class PublicNames:
    """The public names of an imported torch.

    Attributes:
        version: of that torch.
        names: every name, as people write it, in the order of :data:`PACKAGES`.
        aliases: other dotted names of the same objects, each with the name above.
    """

    version: str
    names: tuple[str, ...]
    aliases: Mapping[str, str]

    def named(self, dotted: str) -> str | None:
        """The public name of what code calls `dotted`, None if it is no public name."""
        return dotted if dotted in self.names else self.aliases.get(dotted)


def public_names(also: Iterable[str] = ()) -> PublicNames:
    """The public names of the torch that this Python imports; it takes seconds.

    Args:
        also: dotted names that code uses, which may be aliases of public names.
    """
    found: dict[str, Any] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        known = {id(value) for value in found.values()}
        for name, value in _of_module(module):
            if id(value) not in known:
                found[f"{package}.{name}"] = value
    names = list(found)
    for cls in CLASSES:
        members = [f"{cls}.{name}" for name in _of_class(found[cls])]
        names += sorted({*members, *(name for name in MADE if name.startswith(f"{cls}."))})
    by_object = {id(value): name for name, value in found.items()}
    for name in names:
        # A function of a class counts where code takes it from the class.
        owner, _, member = name.rpartition(".")
        function = getattr(found[owner], member, None) if owner in CLASSES else None
        if inspect.isfunction(function):
            by_object.setdefault(id(function), name)
    aliases = {
        dotted: by_object[id(value)]
        for dotted in also
        if dotted not in names and id(value := _found_at(dotted)) in by_object
    }
    return PublicNames(importlib.import_module("torch").__version__, tuple(names), aliases)


def _of_module(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The public names that a module defines, and those that it lists in ``__all__``."""
    listed = getattr(module, "__all__", ())
    for name in sorted(vars(module)):
        value = getattr(module, name)
        if name.startswith("_") or isinstance(value, typing.TypeVar):
            continue
        if isinstance(value, types.ModuleType):
            if module.__name__ == _WITH_MODULES and value.__name__ == f"{_WITH_MODULES}.{name}":
                yield name, value
            continue
        home = getattr(value, "__module__", None) or ""
        if name in listed or f"{home}.".startswith(tuple(f"{p}." for p in (*PACKAGES, *_HOMES))):
            yield name, value


def _of_class(cls: type) -> list[str]:
    """The public members of a class, but not those that torch.nn.Module gives to every module."""
    if issubclass(cls, enum.Enum):
        return [member.name for member in cls]
    module = importlib.import_module("torch.nn").Module
    bases = [base for base in inspect.getmro(cls) if base not in inspect.getmro(module)]
    members = {name for base in bases for name in vars(base)}
    return sorted(name for name in members if not name.startswith("_"))


def _found_at(dotted: str) -> Any:
    """What a dotted name of torch leads to; None if it leads nowhere."""
    parts = dotted.split(".")
    value: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                importlib.import_module(".".join(parts[:number]))
            except ImportError:
                return None
        value = getattr(value, part, None)
    return value


#: The names, or patterns of names, that the harness uses around each program, with how it uses
#: them. A test looks for each in its source.
HARNESS: Mapping[str, str] = {
    "torch.distributed.rpc.init_rpc": "In every example, at each rank. Checked: it returns, and "
    "within its time; otherwise the example is a RankHung, a RankDied or an UnexpectedError.",
    "torch.distributed.rpc.shutdown": "In every example, at each rank, in one of four ways. "
    "Checked: it returns in bounded time, raises nothing, reports no leak but a predicted one, "
    "leaves all counters at 0, and the rank exits with 0.",
    "torch.distributed.rpc.TensorPipeRpcBackendOptions": "Where a program of the user's calls "
    'init_rpc itself (`init="adopt"`): its options are read, and the agent gets them with faults.',
    "torch.distributed.rpc.TensorPipeRpcBackendOptions.init_method": "In every example: the ranks "
    "meet through it. Checked: they do.",
    "torch.distributed.rpc.TensorPipeRpcBackendOptions.num_worker_threads": "In every example, as "
    "the program or the cluster says. The threads that steps need are counted.",
    "torch.distributed.rpc.TensorPipeRpcBackendOptions.rpc_timeout": "In every example, a virtual "
    "day unless the program or the cluster has another. What that of a program ends is predicted.",
    "torch.distributed.rpc.BackendType": "In every example: it names the agent.",
    "torch.distributed.rpc.BackendType.*": "In the examples of the agent of that name (`agent=` of "
    "a cluster).",
    "torch.distributed.rpc.backend_registry.construct_rpc_backend_options": "In every example "
    "under the faulty agent: it makes that agent's options.",
}

#: The members of RemoteModule that it refuses.
_REFUSED = (
    *("add_module", "apply", "bfloat16", "buffers", "children", "cpu", "cuda", "double"),
    *("extra_repr", "float", "half", "ipu", "load_state_dict", "modules", "named_buffers"),
    *("named_children", "named_modules", "named_parameters", "parameters"),
    *("register_backward_hook", "register_buffer", "register_forward_hook"),
    *("register_forward_pre_hook", "register_parameter", "requires_grad_", "share_memory"),
    *("state_dict", "to", "type", "xpu", "zero_grad"),
)
#: Of a member of a class whose name other objects have too: of which names the function that has
#: it in its source must use one as well, so that it counts.
NEEDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        [f"torch.distributed.rpc.WorkerInfo.{name}" for name in ("id", "name")],
        ("torch.distributed.rpc.get_worker_info", "torch.distributed.rpc.RRef.owner"),
    ),
    "torch.distributed.optim.DistributedOptimizer.step": (
        "torch.distributed.optim.DistributedOptimizer",
    ),
    "torch.futures.Future.value": ("torch.futures.Future", "torch.distributed.rpc.rpc_async"),
}
#: The same where the text of what has the attribute tells: a regular expression.
RECEIVERS: Mapping[str, str] = {
    # Tensors and modules have these too.
    **{
        f"torch.distributed.nn.RemoteModule.{name}": r"(?i)remote"
        for name in (*_REFUSED, "train", "eval")
    },
    "torch.distributed.rpc.RRef.backward": r"(?i)rref|handle",
    "torch.futures.Future.wait": r"^(?!.*(?i:event|barrier|condition))",
    "torch.futures.Future.value": r"(?i)fut|result|done",
    "torch.distributed.rpc.WorkerInfo.id": r"(?i)info|worker|owner",
    "torch.distributed.rpc.WorkerInfo.name": r"(?i)info|worker|owner",
}
#: A class whose members count only in a function that uses the class itself.
NEEDS_ITS_CLASS = "torch.distributed.nn.RemoteModule"

#: The requests that the faulty agent neither fails nor delays; each with the name of torch by which
#: a step makes ranks send it.
UNCOUNTED_REQUESTS: Mapping[str, str] = {
    # autograd/utils.cpp, `getMessageWithAutograd`: messages inside a context are wrapped in it.
    "FORWARD_AUTOGRAD_REQ": "torch.distributed.autograd.context",
    # autograd/functions/recvrpc_backward.cpp, `RecvRpcBackward::apply`.
    "BACKWARD_AUTOGRAD_REQ": "torch.distributed.autograd.backward",
    # rpc/py_rref.cpp, `PyRRef::backward` at a user.
    "RREF_BACKWARD_REQ": "torch.distributed.rpc.RRef.backward",
    # autograd/utils.cpp, `sendMessageWithAutograd`: calls while the legacy profiler is on.
    "RUN_WITH_PROFILING_REQ": "torch.autograd.profiler_legacy.profile",
}

_CUDA = "It is for CUDA devices, and ranks here have none."
_ON_ITS_OWN = "It acts in one process and sends nothing by RPC."
_COLLECTIVE = "It is a collective of torch.distributed (a process group), and sends nothing by RPC."
_EXTENDS = "It is for those who write another RPC backend, not for programs that use RPC."
_INSIDE = "It is part of torch's own RPC code, and its documentation does not mention it."
_UNSUPPORTED = (
    "A RemoteModule raises ValueError at once (remote_module.py), before anything is sent. Module "
    "draws that it does."
)
_AGENT = "An agent is made by init_rpc, which every example calls; programs do not touch it."
_JIT_OPTIMIZER = (
    "It is the form of a local optimizer that DistributedOptimizer compiles by TorchScript; it "
    "sends nothing itself."
)
_RPC = "torch.distributed.rpc."
_OPTIM = "torch.distributed.optim."
_NN = "torch.distributed.nn."
_MODULE = f"{_NN}RemoteModule."

#: The names, or patterns of names, that no drawn program is to use, each with the reason.
OUT_OF_SCOPE: Mapping[str, str] = {
    f"{_RPC}AllGatherStates": _INSIDE,
    f"{_RPC}method_factory": _INSIDE,
    f"{_RPC}new_method": _INSIDE,
    f"{_RPC}PyRRef": "It is the C++ class below RRef, of which programs use the subclass.",
    f"{_RPC}RpcAgent": _AGENT,
    f"{_RPC}TensorPipeAgent": _AGENT,
    f"{_RPC}RpcBackendOptions": "It is the base class of TensorPipeRpcBackendOptions.",
    f"{_RPC}RemoteProfilerManager": _INSIDE,
    f"{_RPC}WorkerInfo": "Its documentation says that it is not meant to be constructed: programs "
    "get one from get_worker_info or RRef.owner, and use its members.",
    f"{_RPC}enable_gil_profiling": "It measures waits for Python's lock, and sends nothing.",
    f"{_RPC}is_available": "It says whether torch was built with RPC, and sends nothing.",
    f"{_RPC}TensorPipeRpcBackendOptions.device_maps": _CUDA,
    f"{_RPC}TensorPipeRpcBackendOptions.devices": _CUDA,
    f"{_RPC}TensorPipeRpcBackendOptions.set_device_map": _CUDA,
    f"{_RPC}TensorPipeRpcBackendOptions.set_devices": _CUDA,
    f"{_RPC}backend_registry.BackendValue": _EXTENDS,
    f"{_RPC}backend_registry.backend_registered": _EXTENDS,
    f"{_RPC}backend_registry.init_backend": _EXTENDS,
    f"{_RPC}backend_registry.register_backend": _EXTENDS,
    "torch.distributed.autograd.is_available": "It says whether torch was built with it, and "
    "sends nothing.",
    "torch.distributed.autograd.DistAutogradContext": "It is what `context` holds; it has no "
    "public method in Python.",
    f"{_OPTIM}PostLocalSGDOptimizer": _COLLECTIVE,
    f"{_OPTIM}post_localSGD_optimizer": _COLLECTIVE,
    f"{_OPTIM}ZeroRedundancyOptimizer": _COLLECTIVE,
    f"{_OPTIM}zero_redundancy_optimizer": _COLLECTIVE,
    f"{_OPTIM}named_optimizer": _ON_ITS_OWN,
    f"{_OPTIM}apply_optimizer_in_backward": _ON_ITS_OWN,
    f"{_OPTIM}as_functional_optim": _JIT_OPTIMIZER,
    f"{_OPTIM}functional_*": _JIT_OPTIMIZER,
    f"{_OPTIM}utils": _JIT_OPTIMIZER,
    f"{_OPTIM}optimizer": "It is the module of DistributedOptimizer.",
    **{
        f"{_NN}{name}": _COLLECTIVE
        for name in (
            "all_gather",
            "all_reduce",
            "all_to_all",
            "all_to_all_single",
            "broadcast",
            "gather",
            "reduce",
            "reduce_scatter",
            "scatter",
        )
    },
    **{f"{_MODULE}{name}": _UNSUPPORTED for name in _REFUSED},
}

#: The names that a drawn program should use and that no kind of step uses yet. When one does, the
#: page says so by itself, and the name can be taken out of here.
NOT_YET: tuple[str, ...] = ()


def reason_against(name: str) -> str | None:
    """Why no drawn program is to use a name; None if programs should use it."""
    return None if name in NOT_YET else _said(OUT_OF_SCOPE, name)


def use_of_harness(name: str) -> str | None:
    """How the harness uses a name; None if it does not."""
    return _said(HARNESS, name)


def _said(table: Mapping[str, str], name: str) -> str | None:
    """What a table of patterns says of a name."""
    fitting = (says for pattern, says in table.items() if fnmatch.fnmatchcase(name, pattern))
    return next(fitting, None)
