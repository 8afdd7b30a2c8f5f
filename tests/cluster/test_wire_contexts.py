"""Calls and gradients inside contexts: what real ranks send is what the oracle says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, MessageFault, WireMessageType
from rpcprops.oracle import Prediction, judge, predict_for, set_apart
from rpcprops.outcomes import Outcome
from rpcprops.programs import (
    Context,
    FailTwice,
    Fetch,
    Graph,
    Linear,
    Module,
    Optimize,
    Outlast,
    Parallel,
    Program,
    Settle,
    Train,
)
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests._wire import needs_wire

pytestmark = needs_wire

_TYPES = (WireMessageType.FORWARD_AUTOGRAD_REQ, WireMessageType.BACKWARD_AUTOGRAD_REQ)
_OPERATIONS: Any = (
    ("add", (0, 1), 1, "sync"),
    ("mul", (3, 2), 2, "async"),
    ("hook", (4,), 1, "remote"),
    ("inplace", (5,), 0, "remote"),
    ("custom", (6,), 2, "proxy"),
    ("add", (7, 7), 0, "proxy"),
    ("add", (8, 8), 2, "relay"),
    ("add", (2, 2), 1, "relay"),
)
#: They give ten results in all, as those above.
_USED: Any = (
    ("mul", (0, 1), 1, "proxy before"),
    ("add", (3, 2), 1, "proxy before async"),
    ("hook", (4,), 2, "proxy again remote"),
    ("inplace", (5,), 2, "proxy again async"),
    ("custom", (6,), 0, "proxy before async"),
    ("add", (7, 0), 0, "proxy again"),
    ("add", (8, 1), 2, "proxy before remote"),
)
_FUTURES: Any = (
    ("mul", (0, 1), 1, "async then"),
    ("add", (3, 2), 2, "async done"),
    ("add", (0, 4), 0, "async wait_all"),
    ("hook", (4,), 1, "async wait_all"),
    ("mul", (5, 6), 2, "async collect_all"),
    ("custom", (4,), 1, "async collect_all"),
    ("add", (7, 8), 0, ""),
)
_LEAVES: Any = ((0, "plain"), (1, "hooked"), (2, "fixed"))
_GRAPH = Graph(0, "x", _LEAVES, _OPERATIONS, ((9,), (9,)), inside=1)

#: Each kind of step in each of its forms. Those of one program that run apart send between ranks
#: of their own, or by different types.
PROGRAMS = {
    "paths": (Context(0, "x", (1, 0, 2)), Context(1, "y", (0,), backward=False, raises=True)),
    "nested": (Context(0, "x", (1, 2, 1), nested=True, retain=True),),
    "by RRefs": (Context(0, "x", (1, 0, 2), rrefs=True),),
    "nested by RRefs": (Context(0, "x", (0, 1, 2), nested=True, rrefs=True),),
    "raises": (Context(0, "x", (1, 2), breaks=1),),
    "raises nested": (Context(0, "x", (2, 1), breaks=2, nested=True, retain=True),),
    "at the same time": (Parallel(((Context(0, "x", (1,)),), (Context(1, "y", (2,)),))),),
    "graph": (_GRAPH,),
    "used proxies": (replace(_GRAPH, operations=_USED, inside=None),),
    "used proxies beside": (replace(_GRAPH, operations=_USED, beside=True),),
    "futures": (replace(_GRAPH, operations=_FUTURES),),
    "graphs beside": (replace(_GRAPH, beside=True, backwards=((9,),), inside=0),),
    "graph without backward": (replace(_GRAPH, backwards=(), inside=None),),
    "optimizers": (Optimize(0, "x", (0, 1, 2)), Train(1, "y", (0, 1), rounds=3)),
    "in TorchScript": (Train(0, "x", (1, 2), "Adam"), Module(0, 1)),
    "layers": (Linear(0, "x", 1), Linear(1, "y", 0, by="proxy"), Linear(2, "z", 2, by="proxy")),
    "outlasting": (Outlast(0, 1, "x"), Outlast(0, 2, "y", "call", then=1), Settle()),
    "late": (
        replace(_GRAPH, inside=None, backwards=((9,),), late=(2, "proxy async")),
        Graph(1, "y", ((1, "plain"),), late=(0, "proxy remote"), out="a"),
        Settle(),
        Fetch(1, "a"),
    ),
    "fails twice": (FailTwice(0, 1, 2, "x", seconds=8.0),),
}


def numbers(outcome: Outcome) -> Counter[tuple[int, int, WireMessageType]]:
    """How many calls and gradients were recorded, by sender, receiver and type."""
    return Counter(
        (sent.sender, sent.receiver, WireMessageType(sent.type))
        for sent in outcome.messages
        if sent.is_request and sent.type in _TYPES
    )


def seen_as_promised(program: Program, plan: FaultPlan, outcome: Outcome) -> Prediction:
    """Check that the record has what the prediction says, and that no promise is broken."""
    said = predict_for(program, plan, outcome)
    seen = numbers(outcome)
    for kind in {*seen, *said.wire_sends}:
        wanted = said.wire_sends.get(kind, 0)
        assert seen[kind] == wanted or (kind in said.wire_more and seen[kind] > wanted), kind
    assert set_apart(program, said.met, outcome, judge(program, plan, outcome))[1] == ()
    return said


@pytest.mark.parametrize("name", PROGRAMS)
def test_real_ranks_send_what_is_promised(rpc_cluster: ClusterFactory, name: str) -> None:
    """Each kind of step, in each form, sends exactly so many calls and gradients."""
    program = Program(3, PROGRAMS[name])
    outcome = Runner(rpc_cluster.server).run_anew(program, FaultPlan(), agent="wire")
    assert seen_as_promised(program, FaultPlan(), outcome).wire_sends


@pytest.mark.parametrize(
    ("fault", "nested"),
    [
        (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", to=2), False),
        (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", to=1), True),
        (MessageFault(2, "fail", "BACKWARD_AUTOGRAD_REQ", to=0), False),
        (MessageFault(1, "fail", "BACKWARD_AUTOGRAD_REQ", to=2), True),
    ],
)
def test_real_ranks_send_what_is_promised_under_a_fault(
    rpc_cluster: ClusterFactory, fault: MessageFault, nested: bool
) -> None:
    """A call or a gradient that fails counts, and nothing comes after it."""
    plan = FaultPlan(others=(fault,))
    program = Program(3, (Context(0, "x", (1, 2), nested=nested, retain=True),))
    outcome = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire")
    assert any(sent.done for sent in outcome.messages)
    said = seen_as_promised(program, plan, outcome)
    assert sum(said.wire_sends.values()) < 10


def test_one_more_or_one_less_in_the_record_of_real_ranks_is_reported(
    rpc_cluster: ClusterFactory,
) -> None:
    """Of the true record nothing is said; each call and each gradient is missed."""
    program = Program(2, (Context(0, "x", (1,)),))
    outcome = Runner(rpc_cluster.server).run_anew(program, FaultPlan(), agent="wire")
    assert judge(program, FaultPlan(), outcome) == ()
    planted = [sent for sent in outcome.messages if sent.is_request and sent.type in _TYPES]
    assert len(planted) == 3
    for sent in planted:
        pair = [one for one in outcome.messages if one.id == sent.id]
        rest = tuple(one for one in outcome.messages if one not in pair)
        again = tuple(
            replace(one, id=1 << 30, first_id=1 << 30 if one.is_request else -1) for one in pair
        )
        for number, messages in ((0, rest), (2, (*outcome.messages, *again))):
            (said,) = judge(program, FaultPlan(), replace(outcome, messages=messages))
            assert (said.promise, said.rank) == ("MessagesDiffer", sent.sender)
            assert said.message == (
                f"the record shows {number} {sent.type} from rank {sent.sender} to rank "
                f"{sent.receiver}, and 1 was promised"
            )
