"""Graphs of autograd: which are refused, and what the oracle computes for one."""

from __future__ import annotations

from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import Graph, Program

LEAF: Any = ((0, "plain"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": ()}, "must hold one leaf or more"),
        ({"operations": (("add", (0,), 0, ""),)}, "must take 2 of the numbers from 0 to 0"),
        ({"operations": (("hook", (1,), 0, ""),)}, "must take 1 of the numbers from 0 to 0"),
        ({"operations": (("hook", (0,), 1, ""),)}, "say how it gets there"),
        ({"backwards": ((0,),)}, "must name results of operations"),
        (
            {
                "operations": (("add", (0, 0), 1, "sync"), ("hook", (0,), 0, "")),
                "backwards": ((2,),),
            },
            "does not reach 1, which was sent",
        ),
    ],
)
def test_what_torch_cannot_run_is_refused(fields: dict[str, Any], message: str) -> None:
    """A graph is refused whose backward torch would never end, or that names what is not there."""
    with pytest.raises(UsageError, match=message):
        Program(2, (Graph(0, "x", **{"inputs": LEAF, **fields}),))


def test_gradients_follow_the_rules_of_calculus() -> None:
    """x * x at another rank, a doubling hook, and two passes: the gradient is 2 * 2 * 2x."""
    operations: Any = (("mul", (0, 0), 1, "sync"), ("hook", (1,), 1, "relay"))
    graph = Graph(0, "x", LEAF, operations, ((2,), (2,)), (3.0,))
    predicted = predict(Program(3, (graph,)), FaultPlan())
    value = predicted.steps[0].value
    assert value["gradients"] == value["alone"] == [[24.0]]
    assert value["hooks"] == 2
    assert predicted.calls == ({}, {"step0": 2}, {"step0": 1, "step0/hook": 2})


def test_a_rank_that_answers_without_a_gradient_cleans_up_nobody_else() -> None:
    """Only who sent something that requires a gradient, or called, sends the cleanup on."""
    operations: Any = (("add", (1, 1), 1, "sync"), ("add", (0, 0), 2, "sync"))
    graph = Graph(0, "x", ((0, "plain"), (0, "fixed")), operations, ((3,),))
    sends = predict(Program(3, (graph,)), FaultPlan()).sends
    cleanup = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
    assert [(s.rank, s.message) for s in sends] == [(0, cleanup), (0, cleanup), (2, cleanup)]
