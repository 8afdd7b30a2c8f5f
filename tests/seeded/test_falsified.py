"""Falsified worlds: every seeded defect is reported as what it is, where it is, and as no more."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator

import pytest

from rpcprops import errors
from rpcprops.oracle import _chosen, judge, predict
from rpcprops.profiles import NIGHTLY, current
from tests.seeded._corpus import World, corpus
from tests.seeded._falsified import DEFECTS, Defect, Place
from tests.seeded._ideal import place

#: Of the places in one world where a defect can be, the first so many are tried: each night all of
#: them, else one in each world, by turns.
_PLACES = 3
#: In how many different programs each defect is planted, at the least.
_PROGRAMS = 10
#: Each night a defect is planted in all worlds, else in one of so many, and in another part of them
#: if these have too few programs for it. Each world meets its share of the defects.
_PARTS = 3


@pytest.fixture(scope="module", autouse=True)
def _all_remembered() -> Iterator[None]:
    """Predictions of all worlds are remembered: they are more than `predict` itself remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chosen, "predict", functools.cache(predict))
        yield


def reported(number: int, world: World, found: Defect) -> Iterator[tuple[list[Place], list[Place]]]:
    """For some places of a defect in the world of that number, what must be said and is said."""
    tried = list(itertools.islice(found(world), _PLACES))
    if tried and current() != NIGHTLY:
        tried = [tried[number % len(tried)]]
    for wrong, expected in tried:
        yield expected, [place(said) for said in judge(world.program, world.plan, wrong)]


@pytest.mark.usefixtures("seeded_defect")
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_reported_as_what_it_is(name: str) -> None:
    """In each world in which it is planted, the judge names its promise, rank and step, exactly."""
    programs = set()
    first = list(DEFECTS).index(name)
    worlds = list(enumerate(corpus()))
    for part in range(_PARTS):
        for number, world in worlds[(first + part) % _PARTS :: _PARTS]:
            for expected, said in reported(number, world, DEFECTS[name]):
                assert said == expected, (world.program, world.plan)
                programs.add(world.program)
        if len(programs) >= _PROGRAMS and current() != NIGHTLY:
            break
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
