"""Members of a dynamic group: what a program refuses, and what the oracle says of them."""

from __future__ import annotations

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.programs import (
    Ask,
    Call,
    Drop,
    End,
    Fetch,
    Local,
    Member,
    Own,
    Program,
    Rejoin,
    Remote,
    Settle,
    Share,
    Step,
)
from rpcprops.steps.groups import DOES, OUTSIDE, REFUSALS
from rpcprops.strategies import group_programs
from rpcprops.torch_facts import TorchFacts, facts_of
from tests._draws import draws

FACTS = facts_of("2.13.0")
#: A torch that has no known bug.
MENDED = TorchFacts("2.99.0").as_if_mended()
TWO = (Member(0), Member(1))
HELD = (*TWO, Remote(1, 0, "a"), Fetch(1, "a"))


def group(*steps: Step, world_size: int = 3) -> Program:
    return Program(world_size, steps, settles=False)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Call(0, 1), Member(0)), "founded by the first step"),
        ((Member(0, "leave"),), "rank 0 is no member"),
        ((Member(0, "look"),), "rank 0 is no member"),
        ((*TWO, Member(1)), "rank 1 is a member"),
        ((*TWO, Member(1, "refused")), "rank 1 is a member"),
        ((Member(3),), "at=3 is no rank of a world of 3"),
        ((*TWO, Call(0, 2)), "to=2 is no member of the group"),
        ((*TWO, Call(2, 0)), "at=2 is no member of the group"),
        ((*TWO, Member(1, "leave"), Call(0, 1)), "to=1 is no member of the group"),
        ((*TWO, Settle()), "a Settle waits for all ranks"),
        ((*TWO, Rejoin(0)), "come back one by one"),
        ((*HELD, Member(0, "leave")), "'a' is a handle of a value of rank 0"),
        ((*HELD, Member(1, "leave"), Member(1), Fetch(1, "a")), "'a' was dropped before"),
        ((*TWO, Call(0, 1, wait="later", out="f"), Member(1, "leave")), "wait for 'f'"),
        ((*HELD, Member(1, "leave at once")), "'a' is at rank 1, which leaves at once"),
        ((Member(0), Member(1, "refused", dash=True)), "dash=True needs does='join'"),
        ((Member(0), Member(1, why="taken name")), "why='taken name' needs does='refused'"),
        ((Member(0), Member(1, "refused", why="taken name")), "taken=None: it is a member"),
        ((Member(0), Member(1, "refused", taken=0)), "taken=0: it is a member"),
        ((Member(0), Member(1, "refused", why="taken rank", taken=2)), "taken=2 is no member"),
        ((Member(0, "refused", why="static"),), "a group that has members"),
        (
            (Member(0), Member(1, "refused", why="static"), Member(1)),
            "called init_rpc with another",
        ),
        ((*TWO, Member(1, "leave"), Member(1, dash=True)), "joined under another name"),
        ((*TWO, Member(1, "outside")), "rank 1 is a member"),
        ((Member(0, what="remote"),), "what='remote' needs does='outside'"),
        ((Member(0), Member(0, "look", profiled=True)), "profiled=True needs one of"),
        ((Member(0, "outside", profiled=True),), "profiled=True needs one of"),
    ],
)
def test_a_program_refuses_what_a_group_cannot_do(steps: tuple[Step, ...], message: str) -> None:
    """Only members take part, and who leaves leaves no value behind that others use."""
    with pytest.raises(UsageError, match=message):
        group(*steps)


def test_a_group_neither_settles_nor_ends_as_a_world() -> None:
    """Ranks outside it have no agent; the message says what to write."""
    with pytest.raises(UsageError, match="write settles=False"):
        Program(2, TWO)
    with pytest.raises(UsageError, match="ends by Member steps"):
        Program(2, TWO, settles=False, end=End("twice"))


@pytest.mark.parametrize(
    ("steps", "plan", "message"),
    [
        (TWO, FaultPlan(FaultTable(["RREF_USER_DELETE"], 1)), "must have no faults"),
        ((*TWO, Own(1, "o"), Local(1, "o"), Drop(1, "o"), Member(1, "leave")), FaultPlan(), "owns"),
        ((Member(0), Member(1, "refused"), Member(2)), FaultPlan(), "lets nobody join any more"),
        ((*TWO, Remote(1, 0, "a")), FaultPlan(), "put a Fetch after each Remote"),
        ((*TWO, Member(1, "leave at once"), Member(2)), FaultPlan(), "rank 1 has left at once"),
        ((*TWO, Member(1, "leave at once"), Member(0, "leave")), FaultPlan(), "does not say"),
        (
            (*TWO, Member(1, "leave"), Member(1, "refused", why="taken rank", taken=0)),
            FaultPlan(),
            "with its own rank before",
        ),
        (
            (*TWO, Member(1, "leave"), Member(1, "refused", why="taken name", taken=0)),
            FaultPlan(),
            "looks for other members",
        ),
    ],
)
def test_what_is_not_known_is_not_predicted(
    steps: tuple[Step, ...], plan: FaultPlan, message: str
) -> None:
    """The faulty agent has no groups, and some waits have no end: predict says so."""
    with pytest.raises(UsageError, match=message):
        predict(group(*steps), plan, FACTS)


def test_members_are_those_that_have_joined_and_not_left() -> None:
    """Each join, and each look, shows all of them, in the order of their ranks."""
    steps = (Member(2), Member(0), Member(1), Member(0, "leave"), Member(2, "look"))
    shown = [step.value for step in predict(group(*steps), FaultPlan(), FACTS).steps]
    assert shown == [
        {"members": [2]},
        {"members": [0, 2]},
        {"members": [0, 1, 2]},
        {},
        {"members": [1, 2], "held": [0, 0]},
    ]


def test_who_leaves_at_once_is_expected_neither_to_be_known_nor_to_be_forgotten() -> None:
    """The others know each other; a delete of the one that is gone may have been lost."""
    (*_, shown) = predict(
        group(*TWO, Member(2), Member(2, "leave at once"), Member(0, "look")), FaultPlan(), FACTS
    ).steps
    assert shown.value == {"knows 0": True, "knows 1": True, "held": [0, 0]}
    steps = (*HELD, Drop(1, "a"), Member(1, "leave at once"), Member(0, "look"))
    assert predict(group(*steps), FaultPlan(), FACTS).steps[-1].value == {"knows 0": True}


def test_who_has_not_joined_or_has_left_is_refused_by_every_call() -> None:
    """Also a rank that cannot join any more; it calls nobody and is no member after that."""
    outside = tuple(Member(1, "outside", what=what) for what in OUTSIDE)
    steps = (*outside, *TWO, Member(1, "leave"), *outside, Member(0, "look"))
    predicted = predict(group(*steps), FaultPlan(), MENDED)
    shown = [step.value for step in predicted.steps]
    refused = [{"refused": "RuntimeError"}] * len(outside)
    assert shown[: len(outside)] == refused
    assert shown[-1 - len(outside) : -1] == refused
    assert shown[-1] == {"members": [0], "held": [0, 0]}
    foreign = (Member(0), Member(1, "refused", why="static"), Member(1, "outside"))
    assert predict(group(*foreign), FaultPlan(), FACTS).steps[-1].value == refused[0]


def test_what_the_members_are_told_inside_a_profiler() -> None:
    """Who joins asks each other one and tells all; each such call travels in another message."""
    joins = Member(2, profiled=True)
    predicted = predict(group(*TWO, joins, Member(0, "leave", profiled=True)), FaultPlan(), FACTS)
    assert [step.value.get("profiled") for step in predicted.steps] == [None, None, 5, 2]
    wanted = {(2, 0): 2, (2, 1): 2, (2, 2): 1, (0, 1): 1, (0, 2): 1}
    sent = {(at, to): times for (at, to, _), times in predicted.wire_sends.items()}
    assert sent == wanted
    assert predicted.told == {(0, 0): 1, (1, 0): 2, (1, 1): 1}


def test_a_refusal_that_takes_no_token_leaves_the_group_open() -> None:
    """An init with a world size is refused before it would take the token."""
    steps = (Member(0), Member(1, "refused", why="static"), Member(2), Member(0, "leave"))
    predicted = predict(group(*steps), FaultPlan(), FACTS)
    assert predicted.met == frozenset()
    assert predicted.steps[2].value == {"members": [0, 2]}


def test_a_dash_is_part_of_the_name_in_the_whole_program() -> None:
    """Other steps call the rank by that name; ranks beyond the program have the usual ones."""
    program = group(Member(0), Member(1, dash=True), Own(1, "a"), Share(1, "a", 0, "b"))
    assert program.names(4) == ("worker0", "worker1-x", "worker2", "worker3")
    asked = Program(3, (*program.steps, Ask(0, "b", "owner_name")), settles=False)
    assert predict(asked, FaultPlan(), FACTS).steps[-1].value == ["worker1-x"]


def test_the_last_member_may_have_a_dash() -> None:
    """Nobody reads its name; a member that joins later does, and so does one that takes a name."""
    last = (Member(0), Member(1, dash=True), Member(1, "leave"), Member(2))
    assert predict(group(*last), FaultPlan(), FACTS).met == frozenset()
    for step in (Member(2), Member(2, "refused", why="taken name", taken=0)):
        met = predict(group(*last[:2], step), FaultPlan(), FACTS).known_bugs
        assert met == {"dash-in-member-name"}
    assert predict(group(*last[:2], Member(2)), FaultPlan(), MENDED).met == frozenset()


def test_names_with_a_dash_are_drawn_for_a_torch_that_has_mended_them() -> None:
    """And only for one: elsewhere nobody could join after such a member."""
    refusals: set[str] = set()
    for facts in (MENDED, FACTS):
        drawn = draws(group_programs(facts=facts), 120)
        steps = [step for program in drawn for step in program.steps if isinstance(step, Member)]
        assert any(step.dash for step in steps) == (facts is MENDED)
        assert {step.does for step in steps} == set(DOES)
        refusals |= {step.why for step in steps}
        for program in drawn:
            assert predict(program, FaultPlan(), facts).met == frozenset()
    assert refusals == set(REFUSALS)


def test_what_a_member_holds_is_known_until_another_member_drops() -> None:
    """A delete of a member may be on its way; who has left has waited for its deletes."""
    look = Member(0, "look")
    steps = (*HELD, Share(0, "b", 1, "c"), look, Member(1, "leave"), look)
    program = group(Member(0), Own(0, "b"), Member(1), *steps[2:])
    predicted = predict(program, FaultPlan(), FACTS)
    looks = [step.value["held"] for step in predicted.steps if "held" in (step.value or {})]
    assert looks == [[2, 2], [0, 0]]
    dropped = predict(group(*HELD, Drop(1, "a"), look), FaultPlan(), FACTS)
    assert dropped.steps[-1].value == {"members": [0, 1]}
    making = predict(group(*TWO, Remote(1, 0, "a"), look, Fetch(1, "a")), FaultPlan(), FACTS)
    assert making.steps[3].value == {"members": [0, 1]}


@pytest.mark.parametrize(
    "steps",
    [
        (*HELD, Drop(1, "a"), Member(1, "leave"), Member(0, "look")),
        (*TWO, Call(1, 0), Member(1, "leave"), Member(0, "look")),
        (Member(0), Member(1, "refused"), Member(0, "look")),
        (*TWO, Member(1, "leave"), Member(0, "leave"), Member(1)),
    ],
)
def test_what_is_next_to_a_finding_does_not_meet_it(steps: tuple[Step, ...]) -> None:
    """A program that torch does right has no excuse."""
    assert predict(group(*steps), FaultPlan(), FACTS).known_bugs == set()


def test_a_torch_without_the_bugs_meets_none() -> None:
    """Who comes back finds the others; after a refusal others join and leave."""
    steps = (Member(0), Member(1, "refused"), Member(1), Member(1, "leave"), Member(1), Member(2))
    predicted = predict(group(*steps, Member(0, "leave")), FaultPlan(), MENDED)
    assert predicted.met == frozenset()
    assert predicted.steps[5].value == {"members": [0, 1, 2]}
