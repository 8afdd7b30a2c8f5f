"""What rpcprops uses of torch that torch does not promise: each symbol, and what it is for.

Nothing here is imported before it is used: ``from rpcprops.torch_facts.symbols import dist_init``
imports that one, and torch with it. Where a torch has it no more, that raises
:class:`rpcprops.MachineCannot`, which names it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpcprops import profiles
from rpcprops.errors import MachineCannot
from rpcprops.torch_facts._versions import VERSIONS

if TYPE_CHECKING:
    from torch._C._distributed_c10d import FileStore
    from torch.testing._internal.common_distributed import MultiProcessTestCase
    from torch.testing._internal.dist_utils import dist_init
    from torch.testing._internal.distributed.rpc.faulty_rpc_agent_test_fixture import (
        FaultyRpcAgentTestFixture,
    )
    from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture

#: Besides all the names of :data:`SYMBOLS`, of which these have types.
__all__ = [
    "SYMBOLS",
    "TESTING",
    "FaultyRpcAgentTestFixture",
    "FileStore",
    "MultiProcessTestCase",
    "RpcAgentTestFixture",
    "Symbol",
    "around_faulty_agents",
    "around_handshakes",
    "dist_init",
    "folders_of_modules",
    "ignore_rref_leaks",
    "join_dynamic_group",
    "lacking_hooks",
    "meet_at_end",
    "rpc_statics",
    "set_rng_seed",
    "watch_contexts",
    "watch_rrefs",
]


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something of torch's.

    Attributes:
        module: where it is.
        name: in that module; empty for the module itself.
        purpose: what rpcprops cannot do without it.
    """

    module: str
    name: str
    purpose: str


#: Where torch keeps what its own tests are made of.
TESTING = "torch.testing._internal"

_RPC = "torch._C._distributed_rpc"
_AUTOGRAD = "torch._C._distributed_autograd"
_LOOK = "see what a rank still holds"
_TIMEOUTS = "see the timeouts that code passes"
_CONTEXTS = "run the contexts of a program"
_WARM = "do in the fork server what ranks would do for the first time"
_SUITES = "run PyTorch's own RPC tests in ranks"
_HARNESS = "compare with PyTorch's own test harness"

#: Every such symbol, by the name under which it is imported from here.
SYMBOLS: Mapping[str, Symbol] = {
    # Counters.
    "rref_debug_info": Symbol(_RPC, "_rref_context_get_debug_info", _LOOK),
    "autograd_debug_info": Symbol(_AUTOGRAD, "_get_debug_info", _LOOK),
    "is_agent_set": Symbol(_RPC, "_is_current_rpc_agent_set", _LOOK),
    "current_agent": Symbol(_RPC, "_get_current_rpc_agent", _LOOK),
    "set_rpc_timeout": Symbol(_RPC, "_set_rpc_timeout", "set the timeout of a program"),
    # Timeouts.
    "rpc_api": Symbol("torch.distributed.rpc.api", "", _TIMEOUTS),
    "PyRRef": Symbol(_RPC, "PyRRef", _TIMEOUTS),
    # Contexts. torch.distributed.autograd has them as well, and takes long to import.
    "backward": Symbol(_AUTOGRAD, "backward", _CONTEXTS),
    "get_gradients": Symbol(_AUTOGRAD, "get_gradients", _CONTEXTS),
    "retrieve_context": Symbol(_AUTOGRAD, "_retrieve_context", _CONTEXTS),
    # The life of an agent.
    "faulty_agent": Symbol(
        "torch.distributed.rpc._testing", "", "have the agent that injects faults"
    ),
    "rpc_internal": Symbol("torch.distributed.rpc.internal", "", _WARM),
    "init_rpc_states": Symbol(
        "torch.distributed.rpc.api", "_init_rpc_states", "start an agent of its own"
    ),
    "rref_proxy": Symbol("torch.distributed.rpc.rref_proxy", "", _WARM),
    # Our fixture is one of theirs.
    "RpcAgentTestFixture": Symbol(
        f"{TESTING}.distributed.rpc.rpc_agent_test_fixture",
        "RpcAgentTestFixture",
        "make the options of an agent",
    ),
    # PyTorch's own suites.
    "common_utils": Symbol(f"{TESTING}.common_utils", "", _SUITES),
    "rpc_utils": Symbol(f"{TESTING}.distributed.rpc_utils", "", _SUITES),
    "TEST_SKIPS": Symbol(f"{TESTING}.common_distributed", "TEST_SKIPS", _SUITES),
    "tp_transports": Symbol(f"{TESTING}.common_distributed", "tp_transports", _SUITES),
    # PyTorch's own harness.
    "FileStore": Symbol("torch._C._distributed_c10d", "FileStore", _HARNESS),
    "MultiProcessTestCase": Symbol(
        f"{TESTING}.common_distributed", "MultiProcessTestCase", _HARNESS
    ),
    "dist_init": Symbol(f"{TESTING}.dist_utils", "dist_init", _HARNESS),
    "FaultyRpcAgentTestFixture": Symbol(
        f"{TESTING}.distributed.rpc.faulty_rpc_agent_test_fixture",
        "FaultyRpcAgentTestFixture",
        _HARNESS,
    ),
}


def __getattr__(name: str) -> Any:
    if name not in SYMBOLS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    found = _load(SYMBOLS[name])
    globals()[name] = found
    return found


def _load(symbol: Symbol) -> Any:
    # torch.testing registers Hypothesis profiles of its own (`dev` among them) and loads one.
    is_testing = symbol.module.startswith("torch.testing.")
    try:
        with profiles.kept() if is_testing else contextlib.nullcontext():
            module = importlib.import_module(symbol.module)
        return getattr(module, symbol.name) if symbol.name else module
    except AttributeError as error:
        raise _lacks(symbol) from error
    except ModuleNotFoundError as error:
        # What torch itself needs and lacks is no symbol of torch's.
        if not f"{symbol.module}.".startswith(f"{error.name}."):
            raise
        raise _lacks(symbol) from error


def _lacks(symbol: Symbol) -> MachineCannot:
    version = getattr(sys.modules.get("torch"), "__version__", None)
    what = f"{symbol.module}.{symbol.name}" if symbol.name else symbol.module
    return MachineCannot(
        f"torch {version} has no {what}, without which rpcprops cannot {symbol.purpose}; it has "
        f"been seen in torch {VERSIONS[0]} to {VERSIONS[-1]}: install one of these."
        if version
        else f"there is no torch here, so rpcprops cannot {symbol.purpose}; install torch."
    )


def ignore_rref_leaks(ignore: bool) -> None:
    """Set whether ``rpc.shutdown()`` of this process only warns of RRefs that are left.

    Raises:
        MachineCannot: this torch has no such switch.
    """
    from torch.distributed.rpc import api

    switch = "_ignore_rref_leak"
    if not hasattr(api, switch):
        raise _lacks(Symbol(api.__name__, switch, "choose what a leak at shutdown does"))
    setattr(api, switch, ignore)


_DYNAMIC = "let an agent of its own join a dynamic group"


def join_dynamic_group(store: Any, name: str, start: Callable[[], Any]) -> Any:
    """Join as the plain agent does (``backend_registry.py: _tensorpipe_init_backend_handler``).

    One member at a time holds the group's token. It starts its agent, and tells all members.

    Args:
        start: starts the agent, and returns it.

    Raises:
        MachineCannot: this torch has no such functions.
    """
    registry = "torch.distributed.rpc.backend_registry"
    holding_token = _load(Symbol(registry, "_group_membership_management", _DYNAMIC))
    tell_members = _load(Symbol(registry, "_set_devices_and_reverse_device_map", _DYNAMIC))
    with holding_token(store, name, True):
        agent = start()
        try:
            tell_members(agent)
        except Exception:
            __getattr__("rpc_api").shutdown()
            raise
        return agent


_PARTS = "let ranks meet at the end of a program and live on"


def meet_at_end() -> None:
    """What ``rpc.shutdown()`` does first (``api.py: shutdown``), after which RPC still works.

    All ranks meet, users of RRefs are deleted, and owners wait for that. What follows there is
    ``agent.join``, which waits until no rank has a call, and the end of the agent.

    Raises:
        MachineCannot: this torch has no such functions.
        RuntimeError: the ranks could not meet.
    """
    api = __getattr__("rpc_api")
    _load(Symbol(api.__name__, "_wait_all_workers", _PARTS))(api.DEFAULT_SHUTDOWN_TIMEOUT)
    _load(Symbol(api.__name__, "_delete_all_user_and_unforked_owner_rrefs", _PARTS))()


def rpc_statics() -> tuple[Any, ...]:
    """What torch keeps in this process and a program could change, to be compared with later.

    Of ``torch.distributed.rpc``: who is in the world, what a leak at shutdown does, meetings of
    ranks that have not ended, the default timeout, how often RPC was initialised, the pickler. Of
    torch: whether the profiler runs, whether gradients are recorded, the default dtype.
    """
    import torch
    from torch.distributed import rpc

    api = __getattr__("rpc_api")
    names = ("_ALL_WORKER_NAMES", "_ignore_rref_leak", "_default_pickler")
    return (
        *(getattr(api, name, None) for name in names),
        len(getattr(api, "_all_gather_sequence_id_to_states", ())),
        api.get_rpc_timeout(),
        repr(getattr(rpc, "_init_counter", None)),
        torch.autograd._profiler_enabled(),  # type: ignore[attr-defined]  # noqa: SLF001
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


#: What ``rpc.shutdown`` calls to let all ranks meet (``api.py: shutdown``), and the class of the
#: faulty agent in its package (``faulty_agent_backend_registry.py``). torch looks both up each time
#: that it uses them.
_HANDSHAKE = Symbol(
    "torch.distributed.rpc.api", "_wait_all_workers", "keep faults away from a shutdown's handshake"
)
_FAULTY_AGENT = Symbol(
    "torch.distributed.rpc._testing", "FaultyTensorPipeAgent", "arm faults while ranks run"
)


def lacking_hooks() -> str:
    """What this torch lacks for the two functions below, in a sentence; empty if nothing."""
    try:
        _load(_HANDSHAKE)
        _load(_FAULTY_AGENT)
    except MachineCannot as error:
        return str(error).rstrip(".")
    return ""


def around_handshakes(context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Have ``rpc.shutdown()`` of this process let all ranks meet inside such a context.

    Raises:
        MachineCannot: this torch has no such function.
    """
    inner = _load(_HANDSHAKE)

    @functools.wraps(inner)
    def meet(*args: Any, **kwargs: Any) -> Any:
        with context():
            return inner(*args, **kwargs)

    _put(_HANDSHAKE, meet)


def around_faulty_agents(make: Callable[[Callable[[], Any], Any], Any]) -> None:
    """Have each faulty agent of this process made by ``make(construct, options)``.

    `construct` makes the agent as torch would, from `options` as they are then.

    Raises:
        MachineCannot: this torch has no such class.
    """
    inner = _load(_FAULTY_AGENT)

    @functools.wraps(inner, updated=())
    def agent(*args: Any) -> Any:
        # The registry passes the options fifth, and no argument by its name.
        return make(lambda: inner(*args), args[4])

    _put(_FAULTY_AGENT, agent)


def _put(symbol: Symbol, value: Any) -> None:
    setattr(importlib.import_module(symbol.module), symbol.name, value)


def watch_rrefs(
    made: Callable[[Any, str], None], read: Callable[[Any, tuple[Any, ...]], None]
) -> None:
    """Have `made` called with each handle of an RRef that this process makes, and how it came.

    A handle is made by ``rpc.remote`` (``api.py: remote`` calls one of three functions of C++), by
    ``rpc.RRef``, or from a message (``internal.py: _InternalRPCPickler``). `read` is called at the
    end of each message, with the function and the arguments if it is a call, else with None. Where
    a torch lacks one of these names, nothing is told of its handles.

    What users import from torch stays the same object, and messages stay the same bytes: only names
    that torch looks up at each call are replaced.
    """
    from torch.distributed.rpc import api, internal

    for kind in ("builtin", "python_udf", "torchscript"):
        _after(api, f"_invoke_remote_{kind}", lambda rref: made(rref, "rpc.remote"))
    pickler: Any = getattr(internal, "_InternalRPCPickler", None)
    for name in ("_py_rref_receiver", "_rref_receiver"):
        # A class method, so that it is pickled as torch's own is.
        receive = getattr(getattr(pickler, name, None), "__func__", None)
        if receive is not None:
            setattr(pickler, name, classmethod(_passing(receive, lambda rref: made(rref, ""))))
    _after(internal, "deserialize", _teller(getattr(internal, "PythonUDF", ()), read))
    _watch_rref_class(getattr(api, "RRef", None), made)


def _after(module: Any, name: str, tell: Callable[[Any], None]) -> None:
    """Have `tell` called with each value that a function of a module returns."""
    function = getattr(module, name, None)
    if function is not None:
        setattr(module, name, _passing(function, tell))


def _passing(function: Any, tell: Callable[[Any], None]) -> Any:
    @functools.wraps(function)
    def passing(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        tell(value)
        return value

    return passing


def _teller(call: Any, read: Callable[[Any, tuple[Any, ...]], None]) -> Callable[[Any], None]:
    def tell(message: Any) -> None:
        if call and isinstance(message, call):
            read(message.func, message.args)
        else:
            read(None, ())

    return tell


def _watch_rref_class(cls: Any, made: Callable[[Any, str], None]) -> None:
    if cls is None:
        return
    initialise = cls.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        initialise(self, *args, **kwargs)
        made(self, "rpc.RRef")

    cls.__init__ = __init__


def watch_contexts(made: Callable[[int], None], released: Callable[[int], None]) -> None:
    """Have functions called with the id of each context that this process makes and releases.

    ``torch/distributed/autograd/__init__.py`` takes both functions of C++ when it is imported.
    """
    for place in (_AUTOGRAD, "torch.distributed.autograd"):
        module = sys.modules.get(place)
        new, release = (
            getattr(module, name, None) for name in ("_new_context", "_release_context")
        )
        if new is None or release is None:
            continue

        def tell(context: Any) -> None:
            made(context._context_id())  # noqa: SLF001

        def releasing(context_id: int, release: Any = release) -> None:
            release(context_id)
            released(context_id)

        setattr(module, "_new_context", _passing(new, tell))  # noqa: B010
        setattr(module, "_release_context", functools.wraps(release)(releasing))  # noqa: B010


def set_rng_seed() -> None:
    """Seed as PyTorch's harness does before each test.

    Before torch 2.10 the seed has no default.
    """
    utils = __getattr__("common_utils")
    utils.set_rng_seed(utils.SEED)


def folders_of_modules() -> list[str]:
    """Where torch before 2.10 writes the modules that RemoteModule makes; it appends it itself.

    Empty where torch has not done that in this process.
    """
    module = sys.modules.get("torch.distributed.nn.jit.instantiator")
    folder = getattr(module, "INSTANTIATED_TEMPLATE_DIR_PATH", None)
    return [folder] if isinstance(folder, str) else []
