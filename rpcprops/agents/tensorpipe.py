"""torch's plain agent: what users run, and PyTorch's own tests of its options."""

from __future__ import annotations

from typing import Any

from rpcprops.agents._agent import Agent
from rpcprops.faults import FaultTable

#: The name of its backend.
NAME = "TENSORPIPE"


class TensorPipe(Agent):
    """``TensorPipeAgent``: injects no faults."""

    name = NAME

    def options(self, table: FaultTable, **others: Any) -> Any:
        """``TensorPipeRpcBackendOptions``, with the transports that PyTorch's own tests use."""
        from rpcprops.torch_facts import symbols

        return super().options(table, _transports=symbols.tp_transports(), **others)

    def undo_registrations(self) -> None:
        """Let ``init_rpc`` accept members of ``rpc.BackendType`` again.

        Registering an agent replaces the enum, but ``rpc.BackendType`` stays the old one, and
        ``init_rpc`` then accepts none of its members. Afterwards other agents are unknown.
        """
        from torch.distributed import rpc

        registry: Any = rpc.backend_registry
        registry.BackendType = rpc.BackendType
