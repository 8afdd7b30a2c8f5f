"""The agent WIRE as the rest of the package knows it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from rpcprops.agents._agent import Progress, usual_progress
from rpcprops.agents.faulty_tensorpipe import FaultyTensorPipe
from rpcprops.agents.wire import build
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import MESSAGE_ACTIONS, FaultTable
from rpcprops.outcomes import WIRE

#: The name of its backend.
NAME = WIRE


class Wire(FaultyTensorPipe):
    """``WireAgent`` (``_agent.cpp``): torch's TensorPipe agent with a ledger and message faults.

    A fault table means under it what it means under torch's faulty agent: the same sends fail, with
    the same errors, and the same sends are late.
    """

    name = NAME
    module = ""
    can_act = MESSAGE_ACTIONS
    has_ledger = True

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile the agent, if that was not done before."""
        build.built(progress=progress or usual_progress())

    def arguments(self, table: FaultTable) -> dict[str, Any]:
        """Six arguments of ``WireRpcBackendOptions``; three are replaced in a rank."""
        own = {"message_faults": [], "ledger_fd": -1, "number": -1}
        return {**super().arguments(table), **own}

    def make_known(self) -> None:
        """Load the library, which must be compiled, and register the backend.

        Raises:
            MachineCannot: it is not compiled, or this torch cannot load it.
        """
        from torch.distributed.rpc import backend_registry

        registry: Any = backend_registry
        if not registry.backend_registered(NAME):
            library()
            registry.register_backend(NAME, _construct_options, _init_backend)

    def options(self, table: FaultTable, **others: Any) -> Any:
        """``WireRpcBackendOptions``.

        Args:
            table: the faults of this rank.
            others: as for every agent; and `ledger_fd`, the descriptor of the world's ledger,
                `number`, by which it names this process whatever rank ``init_rpc`` is given, and
                `message_faults`, a list of dicts (see :func:`check_message_faults`).
        """
        from torch.distributed.rpc import backend_registry

        registry: Any = backend_registry
        check_message_faults(others.get("message_faults", ()))
        given = {**self.arguments(table), **others}
        return registry.construct_rpc_backend_options(self.backend(), **given)


def library() -> Any:
    """The extension module; loads it when it is first asked for.

    Raises:
        MachineCannot: it is not compiled, or this torch cannot load it.
    """
    if build.MODULE in sys.modules:
        return sys.modules[build.MODULE]
    import torch.distributed.rpc  # noqa: F401  (the library names classes of it)

    path = build.library_path()
    if not path.is_file():
        msg = f"the agent WIRE is not compiled ({path} is missing); run `rpcprops agent build`."
        raise MachineCannot(msg)
    spec = importlib.util.spec_from_file_location(build.MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        msg = f"the agent WIRE cannot be loaded: {error}; run `rpcprops agent build --force`."
        raise MachineCannot(msg) from error
    sys.modules[build.MODULE] = module
    return module


def check_message_faults(faults: Sequence[dict[str, Any]]) -> None:
    """Refuse what the agent cannot do.

    Each fault is a dict: `to` (a rank, or -1 for all), `type` (torch's name, or "" for all), `way`
    ("request", "response", or "" for both), `which` ("every", "first" or "nth"), `n` (the first n
    or the nth, from 1, of the messages of this rank that match, each retry being a message),
    `action` ("fail", "lose", "delay", "hold" or "duplicate"), `seconds` (virtual; how long it is
    late, or held at most), and `until`: None, or for "hold" a dict with `at` (the sender), `to`,
    `type`, `way` and `n`, which names the message that must have passed.

    Raises:
        UsageError: only responses could fail or be delivered twice.
    """
    for fault in faults:
        if fault["action"] in ("fail", "duplicate") and fault["way"] == "response":
            msg = (
                f"{fault!r} is for a response, which cannot fail or come twice: torch tells nobody "
                f"that a response was not written, and aborts on a second one. Lose it (action="
                f"'lose'), or name requests (way='request')."
            )
            raise UsageError(msg)


def _construct_options(
    rpc_timeout: float, init_method: str, num_worker_threads: int = 16, **given: Any
) -> Any:
    names = ("messages_to_fail", "messages_to_delay", "num_fail_sends")
    faults = {name: given[name] for name in (*names, "message_faults", "ledger_fd", "number")}
    return library().WireRpcBackendOptions(
        num_worker_threads=num_worker_threads,
        rpc_timeout=rpc_timeout,
        init_method=init_method,
        **faults,
    )


def _init_backend(
    store: Any, name: str, rank: int, world_size: int | None, rpc_backend_options: Any
) -> Any:
    from rpcprops.torch_facts import symbols

    module = library()
    if not isinstance(rpc_backend_options, module.WireRpcBackendOptions):
        msg = f"rpc_backend_options={rpc_backend_options!r} must be WireRpcBackendOptions."
        raise TypeError(msg)

    def start() -> Any:
        agent = module.WireAgent(store, name, rank, world_size or None, rpc_backend_options)
        symbols.init_rpc_states(agent)
        return agent

    return start() if world_size else symbols.join_dynamic_group(store, name, start)
