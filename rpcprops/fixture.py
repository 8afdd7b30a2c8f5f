"""The fixture that turns fault tables into the options of an agent.

:class:`FaultyRpcAgentTestFixture` is a drop-in for the class of the same name in
``torch.testing._internal.distributed.rpc.faulty_rpc_agent_test_fixture``: the same members, the
same defaults, mixed into PyTorch's own test classes in the same way. What it is made of is the one
way into the agent: the ranks of a cluster also get their options from it. The agent itself is one
of :mod:`rpcprops.agents`: torch's faulty one, unless a world names another.

Importing this module imports torch. PyTorch's test modules, which take half a second more, are
imported where somebody asks for :class:`FaultyRpcAgentTestFixture`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rpcprops._rank_fixture import (
    DEFAULT_FAULT_TABLE,
    FaultyAgentOptions,
    RankFixture,
    for_this_rank,
    set_this_rank,
)

if TYPE_CHECKING:
    from rpcprops._torch_fixture import FaultyRpcAgentTestFixture

__all__ = [
    "DEFAULT_FAULT_TABLE",
    "FaultyAgentOptions",
    "FaultyRpcAgentTestFixture",
    "RankFixture",
    "for_this_rank",
    "set_this_rank",
]


def __getattr__(name: str) -> Any:
    if name != "FaultyRpcAgentTestFixture":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from rpcprops._torch_fixture import FaultyRpcAgentTestFixture

    return FaultyRpcAgentTestFixture
