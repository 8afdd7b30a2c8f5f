"""Steps about the life of RPC in a rank: what they refuse, and what the oracle says of them."""

from __future__ import annotations

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import (
    Call,
    Context,
    Drop,
    End,
    Fetch,
    Own,
    Profile,
    Program,
    Rejoin,
    Remote,
    Settle,
    Step,
    Through,
)
from rpcprops.steps.life import AMID, BETWEEN, Amid, Failing, Leaving
from rpcprops.strategies import programs
from rpcprops.strategies.drawing import StepDrawer
from rpcprops.torch_facts import facts_of
from tests._draws import draws

FACTS = facts_of("2.13.0")
PYTHON_CALL = MessageType.PYTHON_CALL
#: Kinds with RRefs and without, so that a drawer could take either after a Rejoin.
KINDS = ("rejoin", "settle", "call", "own", "remote", "drop", "context", "profile")


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Profile(0, 1, "nested"),), "need a rank that is called from there"),
        ((Profile(0, 1, beyond=1),), "need a rank that is called from there"),
        ((Profile(0, 1, "nested", 7),), "beyond=7 is no rank of a world of 2"),
        ((Profile(0, 1, "nested", 0, "builtin"),), "needs flavour 'python', not 'builtin'"),
        ((Profile(0, 1, "late", raises=True),), "raises=True needs form 'sync' or 'async'"),
        ((Profile(0, 1, flavour="builtin", raises=True),), "raises=True needs flavour"),
        ((Profile(0, 1, right=(1.0, 2.0)),), "give both the same length"),
        ((Profile(0, 1, times=0),), "times=0 must lie in 1 to 100"),
        ((Profile(0, 1, times=101),), "times=101 must lie in 1 to 100"),
        ((Profile(0, 1, "late", times=2),), "times=2 and unpicklable=False need form"),
        ((Profile(0, 1, raises=True, unpicklable=True),), "unpicklable=True need form"),
        ((Profile(0, 1, rests=True),), "rests=True needs form 'remote'"),
        ((Context(0, "x", (1,), rrefs=True, profiled=True),), "profiled=True is about calls"),
        ((Rejoin(0, "at once", alone=1, profiled=True),), "give one of them"),
        ((Rejoin(0, first=(0, 0)),), "names a rank twice"),
        ((Rejoin(0, first=(2,)),), "first=2 is no rank of a world of 2"),
        ((Own(0, "a"), Rejoin(0)), "'a' would not outlive a Rejoin"),
        ((Rejoin(0, amid="serving"),), "need alone=RANK"),
        ((Rejoin(0, work=("sync",)),), "need alone=RANK"),
        ((Rejoin(0, alone=2),), "alone=2 is no rank of a world of 2"),
        ((Rejoin(0, alone=0),), "must be another rank than at"),
        ((Rejoin(0, alone=1),), "the first rank would wait for rank 1"),
        (
            (Rejoin(0, "at once", alone=1, amid="owning", between="group"),),
            "would report the RRef as well",
        ),
        ((Call(0, 1, wait="later", out="f"), Rejoin(0)), "'f' would not outlive a Rejoin"),
    ],
)
def test_a_program_refuses_what_torch_cannot_do(steps: tuple[Step, ...], message: str) -> None:
    """A step that cannot be is refused when its program is made, and the message says why."""
    with pytest.raises(UsageError, match=message):
        Program(2, steps)


def test_one_rank_alone_cannot_fail_to_join() -> None:
    """A world of one rank has no other whose name or number could be in its way."""
    with pytest.raises(UsageError, match="failing='same name' needs two ranks"):
        Program(1, (Rejoin(0, failing="same name"),))


@pytest.mark.parametrize(
    ("steps", "plan", "message"),
    [
        ((Rejoin(0),), FaultPlan(FaultTable([PYTHON_CALL], 1)), "the plan fails PYTHON_CALL"),
        (
            (Rejoin(0),),
            FaultPlan(FaultTable(messages_to_delay={PYTHON_CALL: 0.01})),
            "sleeps 10 ms",
        ),
        ((Call(0, 1), Rejoin(0, "at once")), FaultPlan(), "put a Settle before"),
        ((Call(0, 1), Rejoin(0, alone=1, how="timeout")), FaultPlan(), "put a Settle before"),
        ((Context(0, "x", (1,)), Rejoin(0)), FaultPlan(), "put a Settle before"),
        (
            (Call(0, 1), Rejoin(0)),
            FaultPlan(FaultTable(messages_to_delay={PYTHON_CALL: 0.5})),
            "put a Settle before",
        ),
        (
            (Context(0, "x", (1,)), Settle(), Rejoin(0)),
            FaultPlan(FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 21)),
            "hold something",
        ),
    ],
)
def test_ranks_come_back_only_from_rest(
    steps: tuple[Step, ...], plan: FaultPlan, message: str
) -> None:
    """Under a plan with which the ranks could hang or leak there, the prediction is refused."""
    with pytest.raises(UsageError, match=message):
        predict(Program(2, steps), plan, FACTS)


def test_a_profiled_call_travels_in_another_message() -> None:
    """Its message is not one that the agent fails; that of the fetch behind a remote one is."""
    program = Program(2, (Profile(0, 1), Profile(0, 1, "remote"), Profile(0, 1, raises=True)))
    predicted = predict(program, FaultPlan(FaultTable([PYTHON_CALL], 1)), FACTS)
    assert [send.message for send in predicted.sends] == [
        MessageType.PYTHON_RREF_FETCH_CALL,
        MessageType.RREF_USER_DELETE,
    ]
    assert predicted.calls == ({}, {"step0": 1, "step1": 1, "step2": 1})
    assert [step.error for step in predicted.steps] == ["", "", "remote"]


def test_the_first_profiled_request_of_a_rank_has_no_excuse() -> None:
    """Each must show what ran; torch may lose that of later ones, and a new agent has new threads.

    One that tells nothing of what ran there cannot meet it.
    """
    steps = (Profile(0, 1), Profile(2, 1), Settle(), Rejoin(0), Profile(0, 1, "nested", 2))
    late = (Profile(1, 2, "late"), Profile(1, 2), Profile(0, 0, times=2))
    predicted = predict(Program(3, (*steps, *late)), FaultPlan(), FACTS)
    told = [step.value["there"] for step in predicted.steps if isinstance(step.value, dict)]
    assert told == [True, True, True, None, True, True]
    assert {(one.finding, one.rank, one.step) for one in predicted.met} == {
        ("profiled-events-lost", 2, 1),
        ("profiled-events-lost", 1, 6),
        ("profiled-events-lost", 0, 7),
    }


def test_coming_back_sends_what_shutdown_sends() -> None:
    """Three ranks: two calls tell the others and two ask them; a graceful shutdown adds four."""
    for how, calls in (("graceful", 8), ("timeout", 8), ("at once", 4)):
        predicted = predict(Program(3, (Rejoin(1, how),)), FaultPlan(), FACTS)  # type: ignore[arg-type]
        assert [send.message for send in predicted.sends] == [PYTHON_CALL] * calls


def test_each_rank_says_what_it_met() -> None:
    """Every call outside and every init that must fail is one more class of error, at each rank."""
    step = Rejoin(0, outside=("shutdown", "remote"), failing="bad name")
    (shown,) = predict(Program(2, (step,)), FaultPlan(), FACTS).steps
    error = "RuntimeError"
    assert shown.value == [["", error, error, "0 0", error, ""]] * 2


def test_each_rank_is_a_member_of_a_group_between_two_worlds() -> None:
    """It sees all members and the sum of a call, also after an init that had to fail."""
    for between in BETWEEN[1:]:
        step = Rejoin(0, failing="bad name", between=between)
        (shown,) = predict(Program(2, (step,)), FaultPlan(), FACTS).steps
        assert shown.value == [["", "0 0", "RuntimeError", "members 0 1, sum 3.0", ""]] * 2
    step = Rejoin(1, failing="running", between="group")
    (shown,) = predict(Program(2, (step,)), FaultPlan(), FACTS).steps
    group = "members 0 1, sum 3.0"
    assert shown.value == [["", "0 0", "", group, ""], ["", "0 0", "RuntimeError", group, ""]]


def test_one_rank_is_refused_an_init_while_rpc_runs() -> None:
    """The others make no such call, and all ranks come back."""
    (shown,) = predict(Program(3, (Rejoin(1, failing="running"),)), FaultPlan(), FACTS).steps
    others = ["", "0 0", "", ""]
    assert shown.value == [others, ["", "0 0", "RuntimeError", ""], others]


def test_what_calls_a_rank_that_is_gone_must_fail() -> None:
    """The others give each other sums, and each attempt but to ask for a name fails."""
    step = Rejoin(1, "at once", alone=0, amid="serving", work=("sync", "info"))
    predicted = predict(Program(3, (step,)), FaultPlan(), FACTS)
    (shown,) = predicted.steps
    worked = ["3.0 3.0", "RuntimeError", ""]
    assert shown.value == [
        ["", "0 0", ""],
        ["", "0 0", "", *worked, "RuntimeError"],
        ["", "0 0", "", *worked],
    ]
    assert predicted.calls == ({"step0/held": 1}, {"step0/work": 2}, {"step0/work": 2})


def test_a_rank_that_left_amid_a_context_keeps_it() -> None:
    """Nobody tells it that the context is over; and how often the other tries to is open."""
    step = Rejoin(1, "at once", alone=0, amid="backward")
    predicted = predict(Program(2, (step,)), FaultPlan(), FACTS)
    assert predicted.steps[0].value[0] == ["", "0 1", ""]
    assert [held.contexts for held in predicted.counters] == [1, 0]
    assert predicted.failed_sends() == (range(1), range(22))
    plan = FaultPlan(FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 1))
    with pytest.raises(UsageError, match="nobody can tell how often"):
        predict(Program(2, (step,)), plan, FACTS)


@pytest.mark.parametrize(("alone", "how"), [(0, "graceful"), (0, "timeout"), (1, "timeout")])
def test_ranks_that_met_differently_often_hang_when_they_next_meet(
    alone: int, how: Leaving
) -> None:
    """That is a finding, at the end of the program or when they leave once more."""
    apart = Rejoin(1 - alone, how, alone=alone)
    finding = "gathering-count-kept"
    for steps in ((apart,), (apart, Settle(), Rejoin(0, "at once"))):
        assert predict(Program(2, steps), FaultPlan(), FACTS).known_bugs == {finding}
        at_once = Program(2, steps, end=End("at once"))
        assert not predict(at_once, FaultPlan(), FACTS).known_bugs
    for way in ("graceful", "timeout"):
        steps = (apart, Settle(), Rejoin(0, way))
        twice = predict(Program(2, steps, end=End("at once")), FaultPlan(), FACTS)
        assert (*twice.known_bugs, *twice.stuck) == (finding, 2)


@pytest.mark.parametrize("failing", ["one no store", "one too few", "one too many"])
def test_an_init_may_go_wrong_at_one_rank_alone(failing: Failing) -> None:
    """Whether it fails at the others, or whether at all, depends on what goes wrong."""
    (shown,) = predict(Program(3, (Rejoin(1, failing=failing),)), FaultPlan(), FACTS).steps
    wanted = {
        "one no store": ["", "RuntimeError", ""],
        "one too few": [None] * 3,
        "one too many": ["RuntimeError"] * 3,
    }
    assert [texts[2] for texts in shown.value] == wanted[failing]


def test_what_nobody_predicts_of_an_init_is_no_other_error() -> None:
    """It may work, or raise an error of torch's, and nothing else."""
    step = Rejoin(0, failing="one too few")
    (shown,) = predict(Program(2, (step,)), FaultPlan(), FACTS).steps
    for seen, number in (("", 0), ("RuntimeError", 0), ("TypeError", 1)):
        value = [["", "0 0", seen, ""], ["", "0 0", "", ""]]
        assert len(step.judge(shown.value, value)) == number
    assert len(step.judge(shown.value, "nothing")) == 1


def test_a_graceful_shutdown_waits_for_deletes_that_are_tried_again() -> None:
    """So ranks that dropped what they held may leave at once, and come back with nothing."""
    steps = (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a"), Rejoin(0))
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 3))
    predicted = predict(Program(2, steps), plan, FACTS)
    assert predicted.steps[-1].value == [["", "0 0", ""]] * 2
    assert predicted.retried == (3, 0)
    early = (Remote(0, 1, "a"), Drop(0, "a"), Rejoin(0))
    with pytest.raises(UsageError, match="put a Settle before"):
        predict(Program(2, early), plan, FACTS)


def test_what_is_profiled_travels_in_another_message() -> None:
    """The calls of a context and of a shutdown; each is to have one event by its name."""
    context = Context(0, "x", (1, 2), profiled=True)
    program = Program(3, (context, Settle(), Rejoin(1, profiled=True)))
    predicted = predict(program, FaultPlan(), FACTS)
    sent = predicted.wire_sends
    assert {str(kind) for _, _, kind in sent} == {"BACKWARD_AUTOGRAD_REQ", "RUN_WITH_PROFILING_REQ"}
    profiled = {(at, to): times for (at, to, kind), times in sent.items() if kind.startswith("RUN")}
    assert profiled == {(0, 1): 2, (0, 2): 2, (1, 0): 1, (2, 0): 1}
    calls = [(send.rank, send.to) for send in predicted.sends if send.message == PYTHON_CALL]
    assert calls == [(1, 0), (1, 2), (1, 0), (1, 2)]
    first, _, last = predicted.steps
    assert first.value["profiled"] == 2
    assert [texts[-1] for texts in last.value] == ["2 profiled", "1 profiled", "1 profiled"]


def test_an_rref_after_it_meets_the_finding() -> None:
    """Whoever writes an RRef behind a Rejoin is told that torch will leak it."""
    steps = (Rejoin(0), Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a"))
    predicted = predict(Program(2, steps), FaultPlan(), FACTS)
    assert "rref-lifetime-after-reinit" in predicted.known_bugs


def test_drawn_ranks_come_back_and_make_no_rref_then() -> None:
    """A drawer takes the step where nothing is held, and then only kinds that torch can do."""
    drawn = draws(programs(kinds=KINDS, plan=FaultPlan(), max_steps=8), 3000, 1)
    after = [
        step
        for program in drawn
        for index, step in enumerate(program.steps)
        if any(isinstance(before, Rejoin) for before in program.steps[:index])
        for step in step.leaves
    ]
    assert sum(isinstance(leaf, Rejoin) for program in drawn for leaf in program.leaves) > 20
    assert {type(step) for step in after} <= {Rejoin, Settle, Call, Profile}
    assert any(isinstance(step, Call) for step in after)
    alone = [
        x for one in drawn for x in one.leaves if isinstance(x, Rejoin) and x.alone is not None
    ]
    assert {(x.amid, x.how) for x in alone} >= {(amid, "at once") for amid in AMID[:4]}
    mended = programs(
        kinds=("rejoin", "call", "settle"), plan=FaultPlan(), facts=FACTS.as_if_mended()
    )
    found = (program for start in range(4) for program in draws(mended, 150, start))
    leaves = [leaf for program in found for leaf in program.leaves]
    ways = {(x.how, x.alone == 0) for x in leaves if isinstance(x, Rejoin) and x.alone is not None}
    assert ways >= {("timeout", True), ("timeout", False)}
    for program in drawn:
        assert "gathering-count-kept" not in predict(program, FaultPlan(), FACTS).known_bugs


def test_rrefs_follow_it_under_faults_on_a_torch_that_can_do_that() -> None:
    """Also where the plan fails what announces them; stock torch is told what it cannot do."""
    plan = FaultPlan(FaultTable(["RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT"], 2))
    kinds = ("remote", "share", "rejoin", "call", "settle")
    for facts, may in ((FACTS.as_if_mended(), True), (FACTS, False)):
        drawer = StepDrawer(lambda _: 0, 2, kinds=kinds, plan=plan, facts=facts)
        assert drawer.add_kind("rejoin")
        assert (drawer.add_kind("remote") and drawer.add_kind("share")) is may
        met = predict(Program(2, tuple(drawer.steps)), plan, FACTS).known_bugs
        assert ("rref-sent-after-reinit" in met) is may


def test_each_thing_that_a_rank_leaves_amid_is_drawn() -> None:
    """With RRefs only between static worlds, and where none of its messages is lost for good."""
    alone = programs(kinds=("rejoin", "call"), plan=FaultPlan(), min_world_size=2, max_steps=1)
    leaves = [leaf for program in draws(alone, 1500) for leaf in program.leaves]
    found = [leaf for leaf in leaves if isinstance(leaf, Rejoin) and leaf.alone is not None]
    assert {leaf.amid for leaf in found} == {*AMID}


@pytest.mark.parametrize(("amid", "owner"), [("owning", 2), ("using", 0)])
def test_an_rref_of_a_rank_that_leaves_alone_stays(amid: Amid, owner: int) -> None:
    """Its owner reports it in each shutdown; a lost creation or fetch leaves the rest open."""
    steps = (Rejoin(0, "at once", alone=2, amid=amid), Settle())
    program = Program(3, steps, end=End("at once"))
    predicted = predict(program, FaultPlan(), FACTS)
    assert predicted.leaking == {owner}
    for counters in (predicted.counters, predicted.steps[1].counters):
        assert [(one.owners, one.forks) for one in counters] == [
            (int(rank == owner),) * 2 for rank in range(3)
        ]
    assert [texts[:2] for texts in predicted.steps[0].value] == [
        ["RuntimeError", "1 0"] if rank == owner else ["", "0 0"] for rank in range(3)
    ]
    deletes = [x for x in (*predicted.sends, *predicted.last_sends) if x.message.is_retryable]
    assert deletes == []
    for message in ("PYTHON_REMOTE_CALL", "PYTHON_RREF_FETCH_CALL"):
        losing = FaultPlan(FaultTable([message], 1))
        if amid == "owning":
            with pytest.raises(UsageError, match="nobody can tell what is left"):
                predict(program, losing, FACTS)
        else:
            assert predict(program, losing, FACTS).leaking == {owner}


def test_it_is_not_drawn_for_unknown_plans() -> None:
    """Without a plan, or under one that loses calls of Python, no ranks come back: they could hang.

    Under one that loses others they do where only calls come before.
    """
    lossy = FaultPlan(FaultTable([PYTHON_CALL], 1))
    for drawn in (programs(kinds=KINDS), programs(kinds=KINDS, plan=lossy)):
        assert not any(
            isinstance(leaf, Rejoin) for program in draws(drawn, 60) for leaf in program.leaves
        )
    losing = FaultPlan(FaultTable(["SCRIPT_CALL"], 1))
    coming = programs(kinds=("call", "rejoin", "settle"), plan=losing)
    found = [program for start in range(4) for program in draws(coming, 60, start)]
    assert any(isinstance(leaf, Rejoin) for program in found for leaf in program.leaves)
    for program in found:
        predict(program, losing, FACTS)


def test_ranks_that_still_delete_are_drawn() -> None:
    """They leave gracefully, and only once each value was fetched."""
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 2))
    kinds = ("remote", "fetch", "drop", "rejoin", "call", "settle")
    for fetches in (True, False):
        drawer = StepDrawer(lambda _: 0, 2, kinds=kinds, plan=plan, facts=FACTS)
        for kind in ("remote", *["fetch"] * fetches, "drop"):
            assert drawer.add_kind(kind)
        assert drawer.only_deletes is fetches
    drawer = StepDrawer(lambda _: 0, 2, kinds=(*kinds, "profile"), plan=plan, facts=FACTS)
    assert all(map(drawer.add_kind, ("remote", "fetch", "drop", "rejoin")))
    *_, before, last = drawer.steps
    assert isinstance(before, Drop)
    assert isinstance(last, Rejoin)
    assert (last.how, last.alone) == ("graceful", None)
    predict(Program(2, tuple(drawer.steps)), plan, FACTS)


def test_ranks_do_not_leave_while_they_delete_where_a_step_has_ended_by_its_timeout() -> None:
    """The oracle refuses that, also after a Settle: it does not know what the use has sent."""
    late = Remote(0, 1, "a", timeout=3.0, seconds=12.0)
    used = (late, Through(0, "a"), Settle(), Drop(0, "a"))
    with pytest.raises(UsageError, match="may not be at rest"):
        predict(Program(2, (*used, Rejoin(0))), FaultPlan(), FACTS)
    drawer = StepDrawer(lambda _: 0, 2, kinds=KINDS, plan=FaultPlan(), facts=FACTS)
    drawer.steps += used
    assert not drawer.only_deletes
    assert predict(Program(2, (*used, Settle(), Rejoin(0))), FaultPlan(), FACTS)
