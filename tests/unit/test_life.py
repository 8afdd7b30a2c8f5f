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
    Fetch,
    Own,
    Profile,
    Program,
    Rejoin,
    Remote,
    Settle,
    Step,
)
from rpcprops.steps.life import BETWEEN
from rpcprops.strategies import programs
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
        ((Rejoin(0, first=(0, 0)),), "names a rank twice"),
        ((Rejoin(0, first=(2,)),), "first=2 is no rank of a world of 2"),
        ((Own(0, "a"), Rejoin(0)), "'a' would not outlive a Rejoin"),
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
        ((Call(0, 1), Rejoin(0)), FaultPlan(), "put a Settle before"),
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


def test_an_rref_after_it_meets_the_finding() -> None:
    """Whoever writes an RRef behind a Rejoin is told that torch will leak it."""
    steps = (Rejoin(0), Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a"))
    predicted = predict(Program(2, steps), FaultPlan(), FACTS)
    assert "rref-lifetime-after-reinit" in predicted.known_bugs


def test_drawn_ranks_come_back_and_make_no_rref_then() -> None:
    """A drawer takes the step where nothing is held, and then only kinds that torch can do."""
    drawn = draws(programs(kinds=KINDS, plan=FaultPlan(), max_steps=8), 600, 1)
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
    for program in drawn:
        predict(program, FaultPlan(), FACTS)


def test_it_is_not_drawn_for_unknown_plans() -> None:
    """Without a plan, or under one that loses messages, no ranks come back: they could hang."""
    lossy = FaultPlan(FaultTable([PYTHON_CALL], 1))
    for drawn in (programs(kinds=KINDS), programs(kinds=KINDS, plan=lossy)):
        assert not any(
            isinstance(leaf, Rejoin) for program in draws(drawn, 60) for leaf in program.leaves
        )
