"""Falsified worlds: every seeded defect is reported as what it is, where it is, and as no more."""

from __future__ import annotations

import inspect

import pytest

from rpcprops import errors
from rpcprops.oracle import judge
from tests.seeded._corpus import World, corpus
from tests.seeded._falsified import DEFECTS, Defect, Place
from tests.seeded._ideal import place

#: Of the places in one world where a defect can be, the first so many are tried.
_PLACES = 3
#: In how many different programs each defect is planted, at the least.
_PROGRAMS = 10


def reported(world: World, found: Defect) -> list[tuple[list[Place], list[Place]]]:
    """For some places of a defect in a world, what must be said and what is said."""
    seen: list[tuple[list[Place], list[Place]]] = []
    for wrong, expected in found(world):
        said = [place(violation) for violation in judge(world.program, world.plan, wrong)]
        seen.append((expected, said))
        if len(seen) == _PLACES:
            break
    return seen


@pytest.mark.usefixtures("seeded_defect")
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_reported_as_what_it_is(name: str) -> None:
    """In every world in which it can be, the judge names its promise, rank and step, exactly."""
    programs = set()
    for world in corpus():
        for expected, said in reported(world, DEFECTS[name]):
            assert said == expected, (world.program, world.plan)
            programs.add(world.program)
    assert len(programs) >= _PROGRAMS


def test_every_promise_is_broken_by_a_defect() -> None:
    """No promise goes untested, and the defects are more than the 25 that the score needs."""
    promises = {
        name
        for name, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, errors.BrokenPromise) and value is not errors.BrokenPromise
    }
    # That one is no promise of a program's: a rank says it of a test of PyTorch's.
    promises.remove("UpstreamTestFails")
    broken: set[str] = set()
    for world in corpus():
        for found in DEFECTS.values():
            for _, expected in found(world):
                broken |= {promise for promise, _, _ in expected}
        if broken == promises:
            break
    assert broken == promises
    assert len(DEFECTS) > 25
