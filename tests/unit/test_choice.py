"""Which of the drawn cases a hunt runs. No process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops.programs import Call, Count, Drop, End, Fetch, Program, Remote, Share, Train
from rpcprops.properties import Case
from rpcprops.properties._choice import Choice, traits_of
from rpcprops.strategies import programs_under_faults
from tests._draws import draws

PLAIN = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Cases as a hunt draws them."""
    return tuple(Case(*pair) for pair in draws(programs_under_faults(max_world_size=4), 600))


def taken(candidates: int) -> list[Case]:
    choice = Choice(candidates)
    return [case for case in drawn() if choice.takes(case)]


def test_one_of_so_many_is_taken() -> None:
    """With a single candidate all cases are taken, and with eight about every eighth."""
    assert taken(1) == list(drawn())
    assert 600 / 12 < len(taken(8)) < 600 / 4


def test_the_same_cases_give_the_same_choice() -> None:
    """So a batch that was interrupted is drawn again as it was."""
    assert taken(8) == taken(8)


def test_what_is_taken_has_more_traits() -> None:
    """As many cases as they come have far fewer different traits."""

    def traits(cases: Sequence[Case]) -> int:
        return len(set().union(*map(traits_of, cases)))

    chosen = taken(8)
    # The first draws are the simplest ones, so compare with the last.
    assert traits(chosen) > 1.3 * traits(drawn()[-len(chosen) :])


def test_a_case_that_was_taken_is_common() -> None:
    """The same steps again have nothing new, so something else is taken next."""
    choice = Choice(2)
    assert choice.takes(Case(PLAIN))
    assert not choice.takes(Case(PLAIN))
    assert choice.takes(Case(Program(2, (Call(0, 1, flavour="script", raises=True),))))


@pytest.mark.parametrize(
    "change",
    [
        lambda: Case(Program(2, (Remote(0, 1, "a", timeout=3.0), *PLAIN.steps[1:]))),
        lambda: Case(Program(2, (Remote(0, 1, "a", flavour="script"), *PLAIN.steps[1:]))),
        lambda: Case(Program(2, (Remote(0, 0, "a"), *PLAIN.steps[1:]))),
        lambda: Case(Program(2, (*PLAIN.steps[:2], Share(0, "a", 1, "b"), Drop(0, "a")))),
        lambda: Case(Program(2, (*PLAIN.steps[:2], Remote(0, 1, "b", right="a"), PLAIN.steps[2]))),
        lambda: Case(Program(2, PLAIN.steps, end=End("twice"))),
        lambda: Case(Program(2, PLAIN.steps, num_worker_threads=2)),
        lambda: Case(Program(2, PLAIN.steps, rpc_timeout=300.0)),
        lambda: Case(PLAIN, FaultPlan(by_rank={0: FaultTable(("RREF_USER_DELETE",), 1)})),
        lambda: Case(PLAIN, FaultPlan(others=(MessageFault(0, "lose", "RREF_USER_DELETE"),))),
    ],
    ids=[
        *(
            "timeout",
            "flavour",
            "itself",
            "a further step",
            "an RRef as argument",
            "end",
            "threads",
            "default",
            "fault",
        ),
        "message fault",
    ],
)
def test_each_of_these_is_a_trait(change: Callable[[], Case]) -> None:
    """A case with that difference has something that the other one lacks."""
    assert traits_of(change()) - traits_of(Case(PLAIN))


@pytest.mark.parametrize(
    "change",
    [
        {"options": ("default_lr",)},
        {"options": ("default_lr", "momentum")},
        {"left_out": ((1, 0),)},
        {"owners": (1, 1)},
        {"owners": (0, 1)},
        {"owners": (1,)},
    ],
)
def test_what_a_step_lists_is_a_trait(change: dict[str, Any]) -> None:
    """Each option by its name; of ranks, whether one comes twice or is its own; else that some are.

    Which numbers they are makes nothing rare.
    """

    def traits(**fields: Any) -> set[Hashable]:
        given = {"owners": (1, 2), **fields}
        return traits_of(Case(Program(3, (Train(0, "x", **given),))))

    assert traits(**change) != traits()
    assert traits(left_out=((0, 1),)) == traits(left_out=((1, 0),))
    assert traits(owners=(2, 1)) == traits()
    assert traits(value=(3.0, 4.0)) == traits()


def test_what_meets_at_one_rref_counts_more() -> None:
    """Fewer new traits are rarer than more, if they are of steps that use one RRef."""
    meets = Program(2, (Remote(0, 1, "a"), Share(0, "a", 1, "b"), Fetch(1, "b"), Drop(0, "a")))
    calls = (
        Remote(0, 1, "a", flavour="script"),
        Call(0, 0, wait="later", out="f0", flavour="script", raises=True),
        Call(0, 0, flavour="builtin"),
        Count(0, 1),
    )
    apart = Program(2, calls)
    assert len(traits_of(Case(apart))) > len(traits_of(Case(meets)))
    choice = Choice(2)
    assert choice.takes(Case(meets))
    assert not choice.takes(Case(apart))


def test_the_messages_that_change_places_are_a_trait() -> None:
    """A message that waits for a delete, and one that waits for a call, are two sorts of case."""

    def held(until: str, n: int) -> set[Hashable]:
        last = NthMessage(0, until, n=n)
        hold = MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=1.0, until=last)
        return traits_of(Case(PLAIN, FaultPlan(others=(hold,))))

    assert held("RREF_USER_DELETE", 1) - held("PYTHON_CALL", 1)
    assert held("RREF_USER_DELETE", 1) == held("RREF_USER_DELETE", 2)


def test_names_and_numbers_are_no_traits() -> None:
    """Other names, other values and other ranks make nothing rare."""
    other = Program(3, (Remote(2, 0, "q", left=(3.0,), right=(5.0,)), Fetch(2, "q"), Drop(2, "q")))
    assert traits_of(Case(other)) == traits_of(Case(PLAIN))
