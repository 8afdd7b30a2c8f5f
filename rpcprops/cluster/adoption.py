"""In a rank: takes over the program's own ``init_rpc`` and ``rpc.shutdown`` (``init="adopt"``).

The program may have imported the two functions before this rank was forked, under any name. So
the functions themselves get other code; what torch's code was remains as a copy. Both wait until
the test process lets them go on. It answers when all ranks have come to the same call, as torch
does in a static group: ``TensorPipeAgent`` waits for all names (tensorpipe_agent.cpp:
``prepareNames``), and a graceful shutdown for all ranks (api.py: ``_wait_all_workers``). Meanwhile
the agent serves calls in threads of its own.
"""

from __future__ import annotations

import inspect
import numbers
import os
import queue
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops._given import shown
from rpcprops.agents import faulty_tensorpipe, tensorpipe
from rpcprops.cluster import _functions
from rpcprops.cluster._spec import Asked, RpcNews
from rpcprops.torch_facts import symbols

#: What torchrun tells each process (torch.distributed.elastic, ``run.py``), for programs that read
#: it. The address is only used by stores of the program's own: RPC meets in a store of ours.
_LAUNCHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class Adoption:
    """The program's use of RPC in this rank.

    Args:
        send: sends news to the test process.
        join: calls torch's ``init_rpc`` (the first argument) with what the program asked for, as
            the rank that it asked to be.
        last_look: what this rank shows after RPC was shut down.
    """

    def __init__(
        self,
        send: Callable[[RpcNews], None],
        join: Callable[[Callable[..., None], Asked], None],
        last_look: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.answers: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_over = False
        self._send = send
        self._join = join
        self._last_look = last_look
        self._signatures = [inspect.signature(one) for one in (rpc.init_rpc, rpc.shutdown)]
        self._asked = Asked()

    def install(self, rank: int, world_size: int) -> None:
        """Take the two functions over, and set what a launcher sets in the environment."""
        global _adoption
        _adoption = self
        self._torchs_init_rpc = _replace_code(rpc.init_rpc, _init_rpc)
        self._torchs_shutdown = _replace_code(rpc.shutdown, _shutdown)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in own.items()})
        for name, value in _LAUNCHER.items():
            os.environ.setdefault(name, value)

    def init_rpc(self, *args: Any, **kwargs: Any) -> None:
        """What the program calls as ``init_rpc``.

        Raises:
            RuntimeError: RPC is initialised in this process, as torch raises.
        """
        given = self._signatures[0].bind(*args, **kwargs)
        given.apply_defaults()
        if symbols.is_agent_set():
            name = self._asked.name
            msg = (
                f"RPC is already initialized in this process, as {name!r}: init_rpc("
                f"{shown(given.arguments['name'])}) needs rpc.shutdown() before it."
            )
            raise RuntimeError(msg)
        self._asked = _asked(**given.arguments)
        self._wait_for_others("init", self._asked)
        try:
            self._join(self._torchs_init_rpc, self._asked)
        except BaseException as error:
            # The other ranks wait in torch's own init_rpc, for ever.
            self._send(RpcNews("not joined", _functions.dump_error(error, self._asked.rank)[1]))
            raise
        self._send(RpcNews("joined"))

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """What the program calls as ``rpc.shutdown``."""
        if self.is_over or not symbols.is_agent_set():
            return self._torchs_shutdown(*args, **kwargs)
        given = self._signatures[1].bind(*args, **kwargs)
        given.apply_defaults()
        self._wait_for_others("shutdown", bool(given.arguments["graceful"]))
        error = b""
        try:
            return self._torchs_shutdown(*args, **kwargs)
        except BaseException as raised:
            _, error = _functions.dump_error(raised, self._asked.rank)
            raise
        finally:
            self._send(RpcNews("left", (error, self._last_look())))

    def _wait_for_others(self, call: str, what: object) -> None:
        self._send(RpcNews(call, what))
        self.answers.get()


_adoption: Adoption | None = None


def adopted() -> Adoption:
    """The adoption of this process, once it is installed."""
    assert _adoption is not None
    return _adoption


# Their code runs with the globals of torch's modules, so that all they need is imported in them.


def _init_rpc(*args: Any, **kwargs: Any) -> None:
    from rpcprops.cluster.adoption import adopted

    return adopted().init_rpc(*args, **kwargs)


def _shutdown(*args: Any, **kwargs: Any) -> None:
    from rpcprops.cluster.adoption import adopted

    return adopted().shutdown(*args, **kwargs)


def _replace_code(function: Any, by: Any) -> Callable[..., None]:
    """Give a function other code; the function as it was, as a copy."""
    torchs = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    torchs.__kwdefaults__ = function.__kwdefaults__
    # The interpreter wants as many free variables as before, and no default without a parameter.
    function.__code__ = by.__code__.replace(co_freevars=function.__code__.co_freevars)
    function.__defaults__ = function.__kwdefaults__ = None
    return torchs


def _asked(
    name: Any,
    backend: Any = None,
    rank: Any = -1,
    world_size: Any = None,
    rpc_backend_options: Any = None,
    **others: Any,
) -> Asked:
    """What a program asks of ``init_rpc``, and why it cannot have it here."""
    call = f"init_rpc({shown(name)}, rank={shown(rank)}, world_size={shown(world_size)})"
    why = _refusal(name, backend, rank, world_size, rpc_backend_options)
    if others:
        why = f"rpcprops does not know the argument {shown(next(iter(others)))}"
    if why:
        return Asked(refused=f"{call} cannot run here: {why}.")
    # TensorPipeRpcBackendOptions has torch's defaults, of this version.
    options = rpc_backend_options or rpc.TensorPipeRpcBackendOptions()
    return Asked(name, int(rank), int(world_size), options.num_worker_threads, options.rpc_timeout)


def _refusal(name: Any, backend: Any, rank: Any, world_size: Any, options: Any) -> str:
    if not isinstance(name, str) or not name:
        return "the name must be a string"
    if not world_size:
        return (
            "without a world_size torch makes a dynamic group, which its faulty agent has not "
            "(faulty_agent_backend_registry.py makes no group membership). Pass world_size"
        )
    if not isinstance(world_size, numbers.Integral):
        return "world_size must be an int"
    if not isinstance(rank, numbers.Integral) or rank < 0:
        return "rank must be an int from 0 on (cluster.each_rank passes it to the function)"
    return _refused_backend(backend) or _refused_options(options)


def _refused_backend(backend: Any) -> str:
    # Registering an agent makes torch's enum anew: members of the old one are other objects.
    chosen = tensorpipe.NAME if backend is None else getattr(backend, "name", None)
    if chosen == faulty_tensorpipe.NAME:
        return (
            f"backend={shown(backend)} brings faults of its own; leave it out and give the faults "
            f"to the cluster: rpc_cluster(..., faults=...)"
        )
    if chosen != tensorpipe.NAME:
        return (
            f"backend={shown(backend)} is not adopted, only BackendType.{tensorpipe.NAME} is; "
            f"leave backend out, or use init=False and rpcprops.fixture.for_this_rank()"
        )
    return ""


def _refused_options(options: Any) -> str:
    if options is None:
        return ""
    if not isinstance(options, rpc.TensorPipeRpcBackendOptions):
        return (
            f"rpc_backend_options={shown(options)} must be TensorPipeRpcBackendOptions; the faults "
            f"are the cluster's: rpc_cluster(..., faults=...)"
        )
    cpu = torch.device("cpu")
    maps = {to: m for to, m in options.device_maps.items() if {*m, *m.values()} - {cpu}}
    if maps or options.devices:
        return (
            f"its options name devices (device_maps={shown(maps)}, devices="
            f"{shown(options.devices)}), and torch's faulty agent maps none; run the program "
            f"without them"
        )
    return ""
