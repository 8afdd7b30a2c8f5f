"""Graphs of autograd: which are refused, and what the oracle computes for one."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault, MessageType, WireMessageType
from rpcprops.oracle import predict
from rpcprops.programs import Drop, Fetch, Graph, Program, Refused, Settle
from rpcprops.steps.graphs import How
from rpcprops.strategies import programs
from tests._draws import draws

LEAF: Any = ((0, "plain"),)
CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ


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
        ({"late": (1, "remote")}, "makes an RRef; give it a name by out=NAME"),
        ({"late": (1, "sync"), "out": "a"}, "out='a' names an RRef that is late; it needs late="),
        ({"late": (2, "sync")}, "late=2 is no rank of a world of 2"),
        (
            {"late": (1, "script")},
            r"late=\(1, 'script'\) .* must be tuple\[int, Literal\['sync', 'async', 'remote', "
            r"'proxy', 'proxy async', 'proxy remote', 'id', 'info'\]\] \| None",
        ),
        ({"late": (1, "sync"), "late_timeout": 0.5}, "late_timeout=0.5 must lie in 1 to 900"),
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


@pytest.mark.parametrize("how", ["async then", "async done"])
def test_what_a_callback_computes_is_a_part_of_the_graph(how: Any) -> None:
    """It negates the product, and so the gradient on its way back: -2 * 2x, and once more."""
    operations: Any = (("mul", (0, 0), 1, how), ("inplace", (1,), 1, how))
    graph = Graph(0, "x", LEAF, operations, ((1, 2),), (3.0,))
    value = predict(Program(2, (graph,)), FaultPlan()).steps[0].value
    assert value["results"] == [[-9.0], [17.0]]
    assert value["gradients"] == value["alone"] == [[-6.0 + 12.0]]


@pytest.mark.parametrize("how", ["proxy", "proxy again", "proxy before"])
def test_an_rref_is_asked_for_its_type_once(how: Any) -> None:
    """Two operations take an RRef each, or share one that has been used, also before a context."""
    operations: Any = (("add", (0, 0), 1, how), ("mul", (1, 0), 1, how))
    graph = Graph(0, "x", LEAF, operations, ((2,),), (3.0,), beside=True)
    said = predict(Program(2, (graph,)), FaultPlan())
    assert said.steps[0].value["beside"] == [[12.0]]
    sent = [(send.rank, send.message) for send in said.sends]
    accepts, deletes = MessageType.RREF_CHILD_ACCEPT, MessageType.RREF_USER_DELETE
    numbers = [sent.count((0, MessageType.PYTHON_CALL)), sent.count((1, accepts))]
    shared = {"proxy": [0, 8, 4], "proxy again": [0, 8, 2], "proxy before": [2, 6, 1]}
    assert [*numbers, sent.count((0, deletes))] == shared[how]
    assert sent.count((0, MessageType.PYTHON_REMOTE_CALL)) == (how == "proxy before")
    assert all(held.owners == held.forks == 0 for held in said.counters)


def test_a_proxy_that_was_used_is_called_in_its_context_by_rpc_async_as_well() -> None:
    """Only the first asynchronous call is made in a callback, outside of the context."""
    for how, met in (("", True), (" again", False), (" before", False)):
        first: Any = ("add", (0, 0), 1, f"proxy{how} async")
        said = predict(Program(2, (Graph(0, "x", LEAF, (first,), ((1,),)),)), FaultPlan())
        assert ("async-proxy-leaves-context" in said.known_bugs) is met


@pytest.mark.parametrize(
    ("message", "error"), [("PYTHON_CALL", "injected"), ("PYTHON_REMOTE_CALL", "creation")]
)
def test_a_proxy_that_fails_before_its_context_leaves_none(message: Any, error: str) -> None:
    """The step has that error, its function runs nowhere, and nobody knows the context."""
    first: Any = ("hook", (0,), 1, "proxy before")
    steps = (Graph(0, "x", LEAF, (first,), ((1,),)), Settle(), Refused(0, "x"))
    said = predict(Program(2, steps), FaultPlan(FaultTable([message], 1)))
    assert [step.error for step in said.steps] == [error, "", "missing"]
    assert said.calls == ({}, {})
    assert not said.wire_sends


def test_every_way_to_compute_in_a_context_is_drawn() -> None:
    """But for the one by which torch leaves the context."""
    found = draws(programs(kinds=("graph",), max_world_size=2, plan=FaultPlan()), 1000)
    graphs = [leaf for program in found for leaf in program.leaves if isinstance(leaf, Graph)]
    hows = {how for graph in graphs for _, _, _, how in graph.operations}
    assert hows == {*get_args(How)} - {"proxy async"}


#: How a call is made that times out, and how many requests it takes in the context.
WAYS: Any = (
    ("sync", 2),
    ("async", 2),
    ("id", 2),
    ("info", 2),
    ("proxy", 5),
    ("proxy async", 5),
)


@pytest.mark.parametrize(("how", "requests"), WAYS)
def test_a_call_that_times_out_is_no_part_of_the_pass(how: Any, requests: int) -> None:
    """Its rank is cleaned up with the others, and answers without a gradient."""
    operations: Any = (("mul", (0, 0), 2, "sync"),)
    graph = Graph(0, "x", LEAF, operations, ((1,),), (3.0,), late=(1, how))
    said = predict(Program(3, (graph, Settle())), FaultPlan())
    value = said.steps[0].value
    assert (value["gradients"], value["late"]) == ([[6.0]], True)
    assert said.calls == ({}, {"step0/late": 1, "step0/slept": 1}, {"step0": 1})
    cleanups = {(s.rank, s.to) for s in said.sends if s.message == CLEANUP}
    assert cleanups == {(0, 1), (0, 2), (2, 0)}
    assert said.wire_sends[0, 1, WireMessageType.FORWARD_AUTOGRAD_REQ] == requests
    assert (0, 1, WireMessageType.BACKWARD_AUTOGRAD_REQ) not in said.wire_sends
    assert said.known_bugs == frozenset()
    assert all(held.owners == held.contexts == 0 for held in said.counters)


@pytest.mark.parametrize("how", ["remote", "proxy remote"])
def test_an_rref_whose_creation_timed_out_in_a_context_outlives_it(how: Any) -> None:
    """Its owner holds it, its user cannot use it, and a drop after a settle ends it."""
    graph = Graph(0, "x", LEAF, late=(1, how), out="a")
    program = Program(2, (graph, Settle(), Fetch(0, "a"), Drop(0, "a"), Settle()))
    said = predict(program, FaultPlan())
    assert [step.error for step in said.steps] == ["", "", "creation", "", ""]
    held = [said.steps[settle].counters for settle in (1, 4)]
    assert [(one[1].owners, one[1].forks) for one in held] == [(1, 1), (0, 0)]
    early = predict(Program(2, (graph, Drop(0, "a"), Settle())), FaultPlan())
    assert {one.finding for one in early.met} == {"timed-out-remote-dropped"}


@pytest.mark.parametrize(
    ("more", "plan", "words"),
    [
        ({"num_worker_threads": 5}, FaultPlan(), "a timeout needs a free thread"),
        ({"rpc_timeout": 70.0}, FaultPlan(), "which the default rpc_timeout=70 may end"),
        ({"settles": False}, FaultPlan(), "may end before its answer"),
        (
            {},
            FaultPlan(others=(MessageFault(0, "delay", "RREF_USER_DELETE", delay=1.0),)),
            "under faults of single messages",
        ),
    ],
)
def test_a_call_that_may_end_otherwise_is_refused(
    more: dict[str, Any], plan: FaultPlan, words: str
) -> None:
    """Where the timeout may come late, or something else may, nothing is predicted."""
    graph = Graph(0, "x", LEAF, late=(1, "sync"))
    with pytest.raises(UsageError, match=words):
        predict(Program(2, (graph,), **more), plan)


def test_every_way_to_time_out_in_a_context_is_drawn() -> None:
    """At other ranks and at the own one, where the creation of an RRef meets a finding."""
    found = draws(programs(kinds=("graph", "settle"), max_world_size=2, plan=FaultPlan()), 2000)
    late = [
        (leaf.late[1], leaf.late[0] == leaf.at)
        for program in found
        for leaf in program.leaves
        if isinstance(leaf, Graph) and leaf.late is not None
    ]
    made = {"remote", "proxy remote"}
    assert {how for how, _ in late} == {*made, *(how for how, _ in WAYS)}
    assert {own for how, own in late if how not in made} == {True, False}
    assert not any(own for how, own in late if how in made)
