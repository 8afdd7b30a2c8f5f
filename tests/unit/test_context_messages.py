"""The calls and gradients that a program sends in contexts, predicted and compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import (
    FaultPlan,
    FaultTable,
    MessageAction,
    MessageFault,
    MessageType,
    WireMessageType,
)
from rpcprops.oracle import judge, predict
from rpcprops.outcomes import Counters, Outcome, SentMessage
from rpcprops.programs import (
    Call,
    Context,
    FailTwice,
    Graph,
    Linear,
    Module,
    Optimize,
    Outlast,
    Program,
    Settle,
    Step,
    Train,
)
from rpcprops.strategies import programs
from tests._draws import draws
from tests.seeded._ideal import ideal

#: How many messages go from the first rank to the second one.
_Numbers = dict[tuple[int, int], int]
_CLEANUPS_LOST = FaultPlan(by_rank={0: FaultTable([MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ], 42)})


def sent(
    *steps: Step, size: int = 3, faults: FaultPlan | MessageFault | None = None
) -> tuple[_Numbers, _Numbers, set[tuple[int, int, str]]]:
    """The calls and the gradients of a program, and what there may be more of."""
    plan, timeout = FaultPlan(), None
    if isinstance(faults, FaultPlan):
        plan = faults
    elif faults:
        plan, timeout = FaultPlan(others=(faults,)), 65.0
    said = predict(Program(size, steps, rpc_timeout=timeout), plan)
    calls, gradients = (
        {(rank, to): n for (rank, to, message), n in said.wire_sends.items() if message is kind}
        for kind in (WireMessageType.FORWARD_AUTOGRAD_REQ, WireMessageType.BACKWARD_AUTOGRAD_REQ)
    )
    return calls, gradients, {(rank, to, message[:3]) for rank, to, message in said.wire_more}


_THERE_AND_BACK = {(0, 1): 1, (1, 0): 1}


@pytest.mark.parametrize(
    ("fields", "calls", "gradients"),
    [
        ({"path": ()}, {}, {}),
        ({}, {(0, 1): 1}, _THERE_AND_BACK),
        ({"backward": False}, {(0, 1): 1}, {}),
        ({"raises": True}, {(0, 1): 1}, _THERE_AND_BACK),
        ({"retain": True}, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        # It is created and fetched.
        ({"rrefs": True}, {(0, 1): 2}, _THERE_AND_BACK),
        # A rank fetches nothing from itself, and gets no gradient for that.
        ({"path": (0,), "rrefs": True}, {(0, 0): 1}, {(0, 0): 1}),
        ({"path": (0,)}, {(0, 0): 1}, {(0, 0): 2}),
        ({"path": (1, 2)}, {(0, 1): 1, (0, 2): 1}, {**_THERE_AND_BACK, (0, 2): 1, (2, 0): 1}),
        (
            {"path": (1, 2), "nested": True},
            {(0, 1): 1, (1, 2): 1},
            {**_THERE_AND_BACK, (1, 2): 1, (2, 1): 1},
        ),
        # An operator's tensor requires a gradient, so its call is one of the context's.
        ({"flavour": "builtin"}, {(0, 1): 1}, _THERE_AND_BACK),
        ({"flavour": "script", "wait": "async"}, {(0, 1): 1}, _THERE_AND_BACK),
        ({"flavour": "script", "rrefs": True}, {(0, 1): 2}, _THERE_AND_BACK),
        # The owner of the loss is called twice, and gets no gradient.
        ({"root": 0}, {(0, 1): 1}, _THERE_AND_BACK),
        ({"path": (), "root": 1}, {(0, 1): 2}, {(1, 0): 1}),
        (
            {"path": (1, 2), "root": 1},
            {(0, 1): 3, (0, 2): 1},
            {(0, 1): 1, (1, 0): 2, (0, 2): 1, (2, 0): 1},
        ),
        # Of nested calls only the first one creates an RRef.
        (
            {"path": (1, 2, 1), "nested": True, "rrefs": True},
            {(0, 1): 2, (1, 2): 1, (2, 1): 1},
            {**_THERE_AND_BACK, (1, 2): 2, (2, 1): 2},
        ),
    ],
)
def test_a_context_calls_its_path_and_gets_gradients(
    fields: dict[str, Any], calls: _Numbers, gradients: _Numbers
) -> None:
    """One call for each hop, one more to fetch, and a gradient for what went and what came."""
    assert sent(Context(0, "x", **{"path": (1,), **fields})) == (calls, gradients, set())


def test_a_pass_that_raises_sends_gradients_as_far_as_it_comes() -> None:
    """The rank that raises sends none; where it takes part twice, more may come or not."""
    first = Context(0, "x", (1, 2), breaks=1)
    assert sent(first)[1:] == ({(0, 2): 1, (2, 0): 1, (0, 1): 1}, set())
    assert sent(replace(first, breaks=2, retain=True))[1:] == ({(0, 2): 1}, set())
    nested = replace(first, nested=True)
    assert sent(nested)[1:] == ({(0, 1): 1, (1, 2): 1, (2, 1): 1}, set())
    assert sent(replace(nested, breaks=2))[1:] == ({(0, 1): 1, (1, 2): 1}, set())
    more = {(0, 1, "BAC"), (1, 0, "BAC")}
    assert sent(Context(0, "x", (1, 1), breaks=1)) == ({(0, 1): 2}, {}, more)


@pytest.mark.parametrize(
    ("fault", "nested", "calls", "more"),
    [
        # What fails or is lost was sent.
        (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", to=2), False, {(0, 1): 1, (0, 2): 1}, ()),
        (MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ"), False, {(0, 1): 1}, ()),
        (MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP"), False, {(0, 1): 1}, ()),
        (MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ"), True, {(0, 1): 1}, ()),
        # It was executed, and only its answer is lost.
        (MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP"), True, {(0, 1): 1, (1, 2): 1}, ()),
        (
            MessageFault(0, "delay", "FORWARD_AUTOGRAD_REQ", delay=75.0),
            True,
            {(0, 1): 1},
            [(1, 2, "FOR")],
        ),
    ],
)
def test_a_call_that_is_lost_is_the_last_one(
    fault: MessageFault, nested: bool, calls: _Numbers, more: Any
) -> None:
    """It counts itself, nothing follows, and there is no backward pass."""
    step = Context(0, "x", (1, 2), nested=nested)
    assert sent(step, Settle(), faults=fault) == (calls, {}, set(more))


@pytest.mark.parametrize(
    ("fault", "gradients", "more"),
    [
        (MessageFault(0, "fail", "BACKWARD_AUTOGRAD_REQ", to=1), {(0, 1): 1}, ()),
        (MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1), {(0, 1): 1}, ()),
        # It was executed, and its rank sends the next one.
        (MessageFault(1, "lose", "BACKWARD_AUTOGRAD_RESP", to=0), _THERE_AND_BACK, ()),
        (
            MessageFault(0, "delay", "BACKWARD_AUTOGRAD_REQ", to=1, delay=75.0),
            {(0, 1): 1},
            [(1, 0, "BAC")],
        ),
        (
            MessageFault(0, "fail", "BACKWARD_AUTOGRAD_REQ", to=1, n=2),
            {(0, 1): 2, (1, 0): 1},
            (),
        ),
    ],
)
def test_a_gradient_that_is_lost_ends_the_passes(
    fault: MessageFault, gradients: _Numbers, more: Any
) -> None:
    """It counts itself; after a pass that raises there is no second one."""
    step = Context(0, "x", (1,), retain=True)
    assert sent(step, Settle(), faults=fault) == ({(0, 1): 1}, gradients, set(more))


@pytest.mark.parametrize(
    ("how", "rank", "calls", "gradients"),
    [
        ("sync", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("async", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("sync", 0, {(0, 0): 1}, {(0, 0): 4}),
        ("remote", 1, {(0, 1): 2}, {(0, 1): 2, (1, 0): 2}),
        ("remote", 0, {(0, 0): 1}, {(0, 0): 2}),
        # It is created, asked for its type, and called; its own rank knows the type.
        ("proxy", 1, {(0, 1): 3}, {(0, 1): 2, (1, 0): 2}),
        ("proxy", 0, {(0, 0): 2}, {(0, 0): 4}),
        # It is created, asked for its type, called for an RRef, and that is fetched.
        ("proxy remote", 1, {(0, 1): 4}, {(0, 1): 2, (1, 0): 2}),
        ("proxy remote", 0, {(0, 0): 2}, {(0, 0): 2}),
        ("proxy async", 0, {(0, 0): 2}, {(0, 0): 4}),
        # Its RRef is created, asked for its type, and used once without a gradient, before that.
        ("proxy again", 1, {(0, 1): 4}, {(0, 1): 2, (1, 0): 2}),
        ("proxy again", 0, {(0, 0): 3}, {(0, 0): 4}),
        ("proxy again async", 1, {(0, 1): 4}, {(0, 1): 2, (1, 0): 2}),
        ("proxy again remote", 1, {(0, 1): 5}, {(0, 1): 2, (1, 0): 2}),
        ("proxy again remote", 0, {(0, 0): 3}, {(0, 0): 2}),
        # All of that comes before the context.
        ("proxy before", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("proxy before async", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("proxy before async", 0, {(0, 0): 1}, {(0, 0): 4}),
        ("proxy before remote", 1, {(0, 1): 2}, {(0, 1): 2, (1, 0): 2}),
        ("async then", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("async done", 0, {(0, 0): 1}, {(0, 0): 4}),
        ("async wait_all", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("async collect_all", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("info", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("script", 1, {(0, 1): 1}, {(0, 1): 2, (1, 0): 2}),
        ("script remote", 1, {(0, 1): 2}, {(0, 1): 2, (1, 0): 2}),
        (
            "relay",
            1,
            {(0, 1): 1, (1, 2): 1},
            {(0, 1): 2, (1, 0): 2, (1, 2): 2, (2, 1): 2},
        ),
    ],
)
def test_a_graph_calls_for_each_operation(
    how: Any, rank: int, calls: _Numbers, gradients: _Numbers
) -> None:
    """Each way to reach a rank has its calls, and two passes send twice the gradients."""
    graph = Graph(0, "x", ((0, "plain"),), (("add", (0, 0), rank, how),), ((1,), (1,)))
    assert sent(graph) == (calls, gradients, set())
    fixed = replace(graph, inputs=((0, "fixed"),), backwards=())
    assert sent(fixed) == (calls, {}, set())
    beside = sent(replace(graph, beside=True))
    assert beside[:2] == (
        {k: 2 * n for k, n in calls.items()},
        {k: 2 * n for k, n in gradients.items()},
    )


@pytest.mark.parametrize(
    ("through", "calls"), [("call", 2), ("future", 2), ("remote", 3), ("proxy", 5)]
)
def test_a_call_that_outlasts_its_context_is_made_in_some_way(through: Any, calls: int) -> None:
    """Besides its own messages there is at least one question whether its function has begun."""
    step = Outlast(0, 1, "x", by="timeout", through=through)
    assert sent(step, Settle()) == ({(0, 1): calls}, {}, {(0, 1, "FOR")})
    said = predict(Program(2, (step, Settle())), FaultPlan())
    deletes = [s for s in said.sends if s.message is MessageType.RREF_USER_DELETE]
    assert len(deletes) == (through in ("remote", "proxy"))
    accepts = [s for s in said.sends if s.message is MessageType.RREF_CHILD_ACCEPT]
    assert len(accepts) == 3 * (through == "proxy")


def test_operators_are_called_in_contexts_as_they_can_be() -> None:
    """An operator without a gradient would be called outside, and some have no operator."""
    graph = Graph(0, "x", ((0, "fixed"),), (("add", (0, 0), 1, "builtin"),))
    with pytest.raises(UsageError, match="require no gradient"):
        Program(2, (graph,))
    sent(replace(graph, operations=(("add", (0, 0), 1, "script"),)))
    hooked = replace(graph, inputs=((0, "plain"),), operations=(("hook", (0,), 1, "script"),))
    with pytest.raises(UsageError, match="computes no 'hook'"):
        Program(2, (hooked,))
    for fields in ({"nested": True}, {"breaks": 1}):
        with pytest.raises(UsageError, match="need flavour 'python'"):
            Program(2, (Context(0, "x", (1,), flavour="script", **fields),))
    with pytest.raises(UsageError, match="take one of them"):
        Program(2, (Context(0, "x", (1,), rrefs=True, wait="async"),))
    with pytest.raises(UsageError, match="needs flavour 'python'"):
        Program(2, (Context(0, "x", (1,), flavour="builtin", seconds=1.0),))
    with pytest.raises(UsageError, match="needs by='timeout'"):
        Program(2, (Outlast(0, 1, "x", through="remote"),))


def test_only_python_functions_note_that_they_run() -> None:
    """An operator, and a TorchScript function, take no name of a call."""
    flavours: dict[Any, int] = {"python": 1, "builtin": 0, "script": 0}
    for flavour, times in flavours.items():
        said = predict(Program(2, (Context(0, "x", (1,), flavour=flavour),)), FaultPlan())
        assert said.calls[1].get("step0", 0) == times


def test_slow_functions_count_against_the_default_timeout() -> None:
    """A path takes as long as all its functions; a program whose timeout may come is refused."""
    step = Context(0, "x", (1, 2, 1), seconds=20.0)
    predict(Program(3, (step,), rpc_timeout=130.0), FaultPlan())
    with pytest.raises(UsageError, match="may take 60 s"):
        predict(Program(3, (step,), rpc_timeout=115.0), FaultPlan())


def test_a_graph_makes_and_fetches_leaves_and_enters_contexts() -> None:
    """A leaf is made, fetched if it is used, and asked for its gradient."""
    leaves: Any = ((1, "plain"), (1, "fixed"), (2, "plain"))
    graph = Graph(0, "x", leaves, (("add", (0, 1), 0, ""),), ((3,),), inside=2)
    assert sent(graph) == ({(0, 1): 6, (0, 2): 3}, {(0, 1): 1}, set())
    assert sent(replace(graph, inside=0))[0] == {(0, 1): 6, (0, 2): 2}


def test_what_trains_fetches_and_steps() -> None:
    """Each round fetches each far parameter, sends its gradient back, and steps at each owner."""
    assert sent(Optimize(0, "x", (0, 1))) == ({(0, 0): 1, (0, 1): 2}, {(0, 1): 1}, set())
    assert sent(Train(0, "x", (2,), rounds=3)) == ({(0, 2): 6}, {(0, 2): 3}, set())
    # An owner of two fetches both, and what is not in the loss is not fetched.
    several = Train(0, "x", (2, 1, 2), rounds=2, left_out=((0, 0), (1, 1)))
    assert sent(several) == ({(0, 1): 3, (0, 2): 5}, {(0, 1): 1, (0, 2): 3}, set())
    assert sent(replace(several, left_out=(), refused="lr")) == ({}, {}, set())
    assert sent(Linear(0, "x", 1)) == ({(0, 1): 4}, _THERE_AND_BACK, set())
    assert sent(Linear(0, "x", 1, by="proxy"))[0] == {(0, 1): 5}
    assert sent(Linear(0, "x", 0, by="proxy")) == ({(0, 0): 4}, {(0, 0): 2}, set())
    # One parameter, and an input that gets no gradient.
    assert sent(Linear(0, "x", 1, layer="sparse")) == ({(0, 1): 3}, {(0, 1): 1}, set())
    # It enters no context.
    assert sent(Module(0, 1)) == ({}, {}, set())


@pytest.mark.parametrize(
    ("step", "error", "calls"),
    [
        (Context(0, "x", (1, 2), late=0), "timeout", {(0, 1): 2}),
        (Context(0, "x", (1, 2), late=1), "timeout", {(0, 1): 1, (0, 2): 2}),
        (Context(0, "x", (1, 2, 1), late=0, nested=True), "timeout", {(0, 1): 2}),
        (Context(0, "x", (1, 2, 1), late=1, nested=True), "remote", {(0, 1): 1, (1, 2): 2}),
    ],
)
def test_a_call_that_times_out_is_the_last_one(
    step: Context, error: str, calls: dict[tuple[int, int], int]
) -> None:
    """Its error leaves the block, through functions that wait for it; all ranks are cleaned up."""
    said = predict(Program(3, (step,)), FaultPlan())
    assert [one.error for one in said.steps] == [error]
    request = WireMessageType.FORWARD_AUTOGRAD_REQ
    assert said.wire_sends == {(*pair, request): times for pair, times in calls.items()}
    assert said.graded == ({(0, 1): 1} if step.late == 1 and not step.nested else {})
    (pair,) = (pair for pair, times in calls.items() if times == 2)
    assert said.more_errors == {(*pair, request)}
    late = step.path[step.late or 0]
    assert said.calls[late] == {"step0/late": 1, "step0/slept": 1}
    told = {(one.rank, one.to) for one in said.sends if one.message.startswith("CLEANUP")}
    # A rank notes its caller only where it has answered with a gradient.
    back = {(1, 0)} if step.late == 1 and not step.nested else set[tuple[int, int]]()
    assert told == {*calls} | back
    assert said.contexts_left == (range(1),) * 3
    assert said.counters == (Counters(),) * 3
    with pytest.raises(UsageError, match="may end before its answer"):
        predict(Program(3, (step,), settles=False), FaultPlan())


def test_the_timeout_of_the_calls_of_a_context() -> None:
    """It must not come, unless a message is lost or late; those of other ranks do not have it."""
    step = Context(0, "x", (1, 2), timeout=65.0)
    plain = predict(Program(3, (replace(step, timeout=None),)), FaultPlan())
    assert predict(Program(3, (step,)), FaultPlan()) == plain
    with pytest.raises(UsageError, match=r"may take 10 s .* its timeout may end it"):
        predict(Program(3, (replace(step, seconds=10.0),)), FaultPlan())
    cases: tuple[tuple[MessageAction, str, float], ...] = (
        ("lose", "FORWARD_AUTOGRAD_REQ", 0.0),
        ("lose", "FORWARD_AUTOGRAD_RESP", 0.0),
        ("delay", "FORWARD_AUTOGRAD_RESP", 75.0),
    )
    for action, kind, delay in cases:
        rank = 0 if kind.endswith("REQ") else 1
        fault = MessageFault(rank, action, kind, delay=delay)
        for form in (step, replace(step, rrefs=True)):
            number = 2 if form.rrefs else 1
            one = replace(fault, n=number if rank == 0 else 1)
            said = predict(Program(3, (form,)), FaultPlan(others=(one,)))
            assert [one.error for one in said.steps] == ["timeout"]
        nested = Program(3, (replace(step, path=(1, 2), nested=True),))
        other = replace(fault, rank=1 if rank == 0 else 2)
        with pytest.raises(UsageError, match="has no timeout"):
            predict(nested, FaultPlan(others=(other,)))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"late": 2}, "must be the number of a hop"),
        ({"late": -1}, "must be the number of a hop"),
        ({"late": 0, "rrefs": True}, "an error that leaves the block"),
        ({"late": 0, "flavour": "script"}, "an error that leaves the block"),
        ({"late": 0, "breaks": 1}, "an error that leaves the block"),
        ({"late": 0, "root": 1}, "an error that leaves the block"),
        ({"late": 0, "profiled": True}, "an error that leaves the block"),
    ],
)
def test_no_other_call_of_a_context_times_out(given: dict[str, Any], why: str) -> None:
    """What would not leave the block by an error, or is made in another way, is refused."""
    with pytest.raises(UsageError, match=why):
        Program(3, (Context(0, "x", (1, 2), **given),))


def test_a_call_that_times_out_beside_message_faults() -> None:
    """What is late does not matter to it; what is lost might be one of its own calls."""
    program = Program(3, (Context(0, "x", (1, 2), late=1), Call(0, 1)))
    for kind, delay in (("FORWARD_AUTOGRAD_REQ", 30.0), ("FORWARD_AUTOGRAD_RESP", 2.0)):
        fault = MessageFault(0, "delay", kind, which="every", delay=delay)
        assert predict(program, FaultPlan(others=(fault,))).steps[0].error == "timeout"
    assert (
        predict(program, FaultPlan(others=(MessageFault(0, "fail", "PYTHON_CALL"),))).steps[1].error
        == "injected"
    )
    # A plain answer, too: that of the call that asks whether the function has begun is one.
    for kind in ("FORWARD_AUTOGRAD_RESP", "PYTHON_RET"):
        lost = MessageFault(2, "lose", kind)
        with pytest.raises(UsageError, match="and others may be disturbed"):
            predict(replace(program, rpc_timeout=300.0), FaultPlan(others=(lost,)))
    elsewhere = MessageFault(0, "lose", "PYTHON_RET")
    assert predict(program, FaultPlan(others=(elsewhere,))).steps[0].error == "timeout"


def test_calls_that_time_out_in_contexts_are_drawn() -> None:
    """By one of each length of path, by each rank of it; and timeouts that do not come."""
    drawn = [
        leaf
        for program in draws(programs(max_world_size=3, kinds=("context", "settle")), 250)
        for leaf in program.leaves
        if isinstance(leaf, Context)
    ]
    late = [leaf for leaf in drawn if leaf.late is not None]
    assert {(leaf.nested, leaf.late == 0) for leaf in late} == {
        (nested, first) for nested in (False, True) for first in (False, True)
    }
    assert {leaf.wait for leaf in late} == {"sync", "async"}
    timed = [leaf for leaf in drawn if leaf.timeout is not None]
    assert {(leaf.nested, leaf.rrefs, leaf.late is None) for leaf in timed} >= {
        (False, False, True),
        (False, False, False),
        (True, False, True),
        (False, True, True),
    }


def test_calls_that_outlast_their_context() -> None:
    """It asks whether the function has begun, once or more; a function calls on in the context."""
    asks = (0, 1, "FOR")
    assert sent(Outlast(0, 1, "x", "argument", seconds=40.0)) == ({(0, 1): 1}, {}, set())
    assert sent(Outlast(0, 1, "x")) == ({(0, 1): 2}, {}, {asks})
    calling = Outlast(0, 1, "x", "call", then=2)
    assert sent(calling) == ({(0, 1): 2}, {}, {asks})
    assert sent(calling, faults=_CLEANUPS_LOST) == ({(0, 1): 2, (1, 2): 1}, {}, {asks})
    in_vain = replace(calling, by="timeout")
    assert sent(in_vain, Settle()) == ({(0, 1): 2}, {}, {asks, (1, 2, "FOR")})


def test_a_pass_that_fails_at_two_ranks() -> None:
    """The first error may come before the second gradient is sent."""
    more = {(0, 1, "BAC"), (0, 2, "BAC")}
    assert sent(FailTwice(0, 1, 2, "x")) == ({(0, 1): 1, (0, 2): 1}, {}, more)


def test_a_failed_step_enters_no_context() -> None:
    """Where its parameter cannot be made, an optimizer sends nothing in a context."""
    plan = FaultPlan(by_rank={0: FaultTable([MessageType.PYTHON_REMOTE_CALL], 1)})
    assert sent(Optimize(0, "x", (1,)), faults=plan) == ({}, {}, set())


def recorded(program: Program, *less: int, more: tuple[str, ...] = ()) -> list[str]:
    """What is said of a run with the promised messages, without some and with more from 0 to 1."""
    said = predict(program, FaultPlan())
    kinds = [(send.rank, send.to, str(send.message)) for send in said.sends]
    kinds += [(1, 0, "PYTHON_CALL"), (0, 1, "PYTHON_CALL")]
    kinds += [kind for kind, times in sorted(said.wire_sends.items()) for _ in range(times)]
    kinds = [kind for number, kind in enumerate(kinds) if number not in less]
    kinds += [(0, 1, message) for message in more]
    messages = tuple(
        SentMessage(0.0, rank, to or 0, number, message, is_request=True, first_id=number)
        for number, (rank, to, message) in enumerate(kinds)
    )
    outcome: Outcome = replace(ideal(program, FaultPlan()), messages=messages)
    return [violation.message for violation in judge(program, FaultPlan(), outcome)]


def test_a_message_more_or_less_is_named() -> None:
    """Both types are compared for each two ranks, with the words that other messages get."""
    program = Program(2, (Context(0, "x", (1,)),))
    words = "from rank 0 to rank 1, and 1 was promised"
    assert recorded(program) == []
    for message in ("BACKWARD_AUTOGRAD_REQ", "FORWARD_AUTOGRAD_REQ"):
        assert recorded(program, more=(message,)) == [f"the record shows 2 {message} {words}"]
    # The two cleanups and the two calls of the shutdown come first.
    assert recorded(program, 4) == [f"the record shows 0 BACKWARD_AUTOGRAD_REQ {words}"]
    assert recorded(program, 5) == [f"the record shows 0 FORWARD_AUTOGRAD_REQ {words}"]


def test_of_some_messages_only_the_fewest_are_known() -> None:
    """More of them are accepted, fewer are not, and no other type is compared less."""
    program = Program(2, (Outlast(0, 1, "x"),))
    assert recorded(program, more=("FORWARD_AUTOGRAD_REQ",) * 3) == []
    assert recorded(program, 3) == [
        "the record shows 1 FORWARD_AUTOGRAD_REQ from rank 0 to rank 1, and 2 were promised"
    ]
    assert recorded(program, more=("BACKWARD_AUTOGRAD_REQ", "PYTHON_CALL")) == [
        "the record shows 1 BACKWARD_AUTOGRAD_REQ from rank 0 to rank 1, and none were promised",
        "the record shows 2 PYTHON_CALL from rank 0 to rank 1, and 1 was promised",
    ]
