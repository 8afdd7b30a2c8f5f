"""A message that torch tries again, though it was executed: on real ranks, under the agent WIRE."""

from __future__ import annotations

import pytest

from rpcprops import FaultPlan, MessageFault
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.outcomes import SentMessage
from rpcprops.programs import Context, Drop, Program, Remote, Settle, Share
from rpcprops.properties import Case, observe
from rpcprops.properties._messages import TIMEOUT, TOO_LATE
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests._wire import needs_wire

pytestmark = needs_wire

SHARES = Program(
    3,
    (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Settle(), Drop(0, "a"), Drop(2, "b"), Settle()),
    rpc_timeout=TIMEOUT,
)
CLEANS = Program(2, (Context(0, "c", (1,)), Settle()), rpc_timeout=TIMEOUT)


@pytest.mark.parametrize(
    ("program", "fault", "request_type"),
    [
        (SHARES, MessageFault(0, "lose", "RREF_ACK", to=2), "RREF_CHILD_ACCEPT"),
        (SHARES, MessageFault(1, "lose", "RREF_ACK", to=0), "RREF_USER_DELETE"),
        (SHARES, MessageFault(0, "delay", "RREF_ACK", to=2, delay=TOO_LATE), "RREF_CHILD_ACCEPT"),
        (
            SHARES,
            MessageFault(0, "delay", "RREF_USER_DELETE", to=1, delay=TOO_LATE),
            "RREF_USER_DELETE",
        ),
        (
            CLEANS,
            MessageFault(1, "lose", "CLEANUP_AUTOGRAD_CONTEXT_RESP", to=0),
            "CLEANUP_AUTOGRAD_CONTEXT_REQ",
        ),
    ],
    ids=["accept", "delete", "late accept", "late delete", "cleanup"],
)
def test_it_is_tried_again_and_nothing_changes(
    rpc_cluster: ClusterFactory, program: Program, fault: MessageFault, request_type: str
) -> None:
    """Its receiver processes the first try and a further one, and the run is as it must be."""
    case = Case(program, FaultPlan(others=(fault,)))
    seen = observe(Runner(rpc_cluster.server), case, anew=True, agent=WIRE, reuse=False)
    assert seen.violations == ()
    messages = seen.outcome.messages
    (struck,) = [one for one in messages if one.done]
    first = _request_of(struck, messages)
    tries = [one for one in messages if one.is_request and one.first_id == first.id]
    assert (first.type, first.became) == (request_type, "timed_out")
    assert sum(one.processed for one in tries) >= 2


def _request_of(sent: SentMessage, messages: tuple[SentMessage, ...]) -> SentMessage:
    (request,) = [one for one in messages if one.is_request and one.id == sent.id]
    return request
