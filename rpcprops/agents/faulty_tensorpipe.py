"""torch's own faulty agent, which ranks run by default."""

from __future__ import annotations

from typing import Any

from rpcprops.agents._agent import Agent
from rpcprops.faults import FaultTable, MessageType

#: The name of its backend.
NAME = "FAULTY_TENSORPIPE"


class FaultyTensorPipe(Agent):
    """``FaultyTensorPipeAgent``: fails sends by a count for each payload, and delays by type.

    It knows the ten names of ``FaultyTensorPipeAgent::messageStringToType``
    (testing/faulty_tensorpipe_agent.cpp), which are those of :class:`rpcprops.MessageType`.
    """

    name = NAME
    can_fail = can_delay = tuple(MessageType)
    module = "torch.distributed.rpc._testing"

    def arguments(self, table: FaultTable) -> dict[str, Any]:
        """Three arguments of ``FaultyTensorPipeRpcBackendOptions``."""
        self.check(table)
        return {
            "num_fail_sends": table.num_fail_sends,
            "messages_to_fail": [str(m) for m in table.messages_to_fail],
            "messages_to_delay": {str(m): d for m, d in table.messages_to_delay.items()},
        }

    def make_known(self) -> None:
        """Do what importing ``torch.distributed.rpc._testing`` does."""
        from rpcprops.torch_facts import symbols

        _ = symbols.faulty_agent
