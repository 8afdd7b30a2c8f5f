"""torch's plain agent: what users run, and PyTorch's own suites about its options."""

from __future__ import annotations

from typing import Any

from rpcprops.agents._agent import Agent
from rpcprops.faults import FaultTable

#: Its backend.
NAME = "TENSORPIPE"


class TensorPipe(Agent):
    """``TensorPipeAgent``: injects no faults."""

    name = NAME

    def options(self, table: FaultTable, **others: Any) -> Any:
        """``TensorPipeRpcBackendOptions``, with the transports that PyTorch's own tests take."""
        from rpcprops.torch_facts import symbols

        return super().options(table, _transports=symbols.tp_transports(), **others)

    def undo_registrations(self) -> None:
        """Let ``init_rpc`` take members of ``rpc.BackendType`` again.

        To register an agent makes the enum anew, which ``rpc.BackendType`` does not follow: from
        then on ``init_rpc`` takes no member of that. Other agents are unknown afterwards.
        """
        from torch.distributed import rpc

        registry: Any = rpc.backend_registry
        registry.BackendType = rpc.BackendType
