"""What a strategy draws and shrinks to, the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from random import Random, SystemRandom
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st

from rpcprops.profiles import NIGHTLY, current

T = TypeVar("T")

QUIET = settings(
    max_examples=100,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def seed_of_this_run() -> int:
    """A seed for what a test decides by chance: another one each night, else always the same."""
    return SystemRandom().randrange(10**6) if current() == NIGHTLY else 0


def draws(strategy: st.SearchStrategy[T], number: int, start: int = 0) -> list[T]:
    """The examples of one seeded run."""
    found: list[T] = []

    @seed(start)
    @settings(QUIET, max_examples=number, derandomize=False)
    @given(strategy)
    def run(value: T) -> None:
        found.append(value)

    run()
    return found


def smallest(strategy: st.SearchStrategy[T], holds: Callable[[T], Any], seeds: int) -> list[T]:
    """What Hypothesis shrinks to, from the first example of each of so many seeds."""
    bounded = settings(
        QUIET, max_examples=5000, derandomize=False, phases=[Phase.generate, Phase.shrink]
    )
    return [
        find(strategy, lambda value: bool(holds(value)), settings=bounded, random=Random(start))
        for start in range(seeds)
    ]
