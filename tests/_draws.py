"""What a strategy draws and shrinks to, the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")

QUIET = settings(
    max_examples=100,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


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
