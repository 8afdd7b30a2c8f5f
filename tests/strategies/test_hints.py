"""What is known of a program's sends changes how often faults come, and nothing else."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.control import current_build_context
from hypothesis.internal.conjecture.data import ConjectureData

from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.strategies import (
    delay_tables,
    fault_plans,
    fault_tables,
    hints,
    message_faults,
    retryable_subsets,
)
from rpcprops.strategies._weighted import Weighted
from tests._draws import QUIET, draws, smallest

CALL, SCRIPT = MessageType.PYTHON_CALL, MessageType.SCRIPT_CALL
FORK, DELETE = MessageType.RREF_FORK_REQUEST, MessageType.RREF_USER_DELETE
HINTS = (
    hints.Hint(),
    hints.Hint({1: frozenset({CALL})}),
    hints.Hint({0: frozenset({SCRIPT}), 2: frozenset({FORK, DELETE})}),
)
STRATEGIES: tuple[st.SearchStrategy[Any], ...] = (
    fault_tables(),
    fault_tables(messages=tuple(MessageType), max_fail_sends=25, max_delay=60),
    fault_plans(world_size=3),
    fault_plans(world_size=3, tables=fault_tables(max_delay=0.004), max_faulty_ranks=2),
    delay_tables(max_size=3),
    retryable_subsets(),
    message_faults(world_size=3),
)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_choices_mean_the_same_under_every_hint(strategy: st.SearchStrategy[Any]) -> None:
    """The choices of an example, replayed under another hint or none, give the same value."""
    recorded: list[tuple[Any, tuple[Any, ...]]] = []

    @settings(QUIET, max_examples=30)
    @given(strategy)
    def record(value: Any) -> None:
        recorded.append((value, tuple(current_build_context().data.choices)))

    for hint in HINTS:
        with hints.known(hint):
            record()
    assert len(recorded) > 50
    for value, choices in recorded:
        for hint in HINTS:
            with hints.known(hint):
                data = ConjectureData.for_choices(choices)
                assert data.draw(strategy) == value
                assert data.misaligned_at is None
                assert data.choices == choices


@pytest.mark.parametrize("hint", HINTS[1:])
@pytest.mark.parametrize(
    ("holds", "least"),
    [
        (lambda p: p.faulty_ranks(3), FaultPlan(by_rank={0: FaultTable(list(MessageType)[:1], 1)})),
        (
            lambda p: p.table(1).messages_to_delay.get(CALL, 0) > 1,
            FaultPlan(by_rank={1: FaultTable(messages_to_delay={CALL: 1.001})}),
        ),
        (
            lambda p: FORK in p.table(2).failing and p.table(2).num_fail_sends > 2,
            FaultPlan(by_rank={2: FaultTable([FORK], 3)}),
        ),
    ],
)
def test_a_plan_shrinks_to_the_same_under_a_hint(
    hint: hints.Hint, holds: Callable[[FaultPlan], Any], least: FaultPlan
) -> None:
    """The smallest plan does not depend on what is known of the program."""
    with hints.known(hint):
        assert smallest(fault_plans(world_size=3), holds, 1) == [least]


def _late(strategy: st.SearchStrategy[FaultPlan], message: MessageType, rank: int) -> int:
    """How many of 300 plans delay that type at that rank by more than a second."""
    plans = [plan for start in range(3) for plan in draws(strategy, 100, start)]
    return sum(plan.table(rank).messages_to_delay.get(message, 0) > 1 for plan in plans)


def test_a_long_delay_of_a_usual_type_is_not_rare() -> None:
    """Without a hint a call is late by more than a second, at one rank, in 1 plan of 50 or more."""
    assert _late(fault_plans(world_size=2), CALL, 1) > 6


@pytest.mark.parametrize(("message", "rank"), [(CALL, 1), (SCRIPT, 2)])
def test_what_is_sent_is_delayed_most(message: MessageType, rank: int) -> None:
    """A plan in ten delays the one type that is sent, at its rank, by more than a second."""
    with hints.known(hints.Hint({rank: frozenset({message})})):
        assert _late(fault_plans(world_size=3), message, rank) > 30


def test_delays_are_of_every_scale() -> None:
    """Of the delays, a tenth or more is in each of four scales, and the longest are the most."""
    late = [
        delay
        for start in range(3)
        for table in draws(fault_tables(), 400, start)
        for delay in table.messages_to_delay.values()
    ]
    scales = [0.0, 0.02, 0.2, 1.0, 2.0]
    shares = [
        sum(low < delay <= high for delay in late) / len(late)
        for low, high in itertools.pairwise(scales)
    ]
    assert min(shares) > 0.08, shares
    assert shares[-1] > 0.3, shares


def test_every_number_comes_whatever_it_weighs() -> None:
    """A weight makes a number frequent, and leaves none out."""
    found = draws(st.tuples(Weighted(0, 4, {3: 1.0}), st.integers()), 400)
    counts = [sum(value == number for value, _ in found) for number in range(5)]
    assert min(counts) >= 1
    assert counts[3] > 200, counts


def test_more_numbers_than_hypothesis_weighs_are_weighed() -> None:
    """Of a thousand numbers the heavy ones come often, and the others equally often."""
    weights = {0: 500.0, 999: 500.0} | dict.fromkeys(range(1, 999), 1.0)
    # Next to another argument: alone, Hypothesis never repeats a draw.
    found = [
        number for number, _ in draws(st.tuples(Weighted(0, 999, weights), st.integers()), 1000)
    ]
    assert found.count(0) > 100
    assert found.count(999) > 100
    assert sum(0 < number < 500 for number in found) > 120
    assert sum(500 <= number < 999 for number in found) > 120


def test_plans_for_the_largest_world() -> None:
    """Plans are drawn for as many ranks as there may be, with faults at low and at high ranks."""
    faulty = [rank for plan in draws(fault_plans(world_size=1024), 100) for rank in plan.by_rank]
    assert min(faulty) < 256
    assert max(faulty) >= 768


def test_a_hint_is_asked_for_by_the_simplest_plan_too() -> None:
    """Whoever draws faults asks for the hint, also where the first draw is no fault at all."""
    for strategy in STRATEGIES:
        hint = hints.Hint()
        with hints.known(hint):
            ConjectureData.for_choices((0,) * 20).draw(strategy)
        assert hint.asked


USER_TEST = """
from torch.distributed import rpc
from hypothesis import given, settings

from rpcprops import strategies


def work():
    return rpc.rpc_sync("worker0", sum, args=([1, 1],))


@settings(max_examples=40)
@given(faults=strategies.fault_plans(world_size=2))
def test_work(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        assert cluster.on(1).call(work) == 2
        assert faults.table(1).messages_to_delay.get("PYTHON_CALL", 0) <= 0.5
"""
FOUND = "FaultPlan(by_rank={1: FaultTable(messages_to_delay={'PYTHON_CALL': 0.501})})"


@pytest.mark.nightly
def test_what_a_hint_has_found_is_found_again_elsewhere(tmp_path: Path) -> None:
    """The database, a replay, xdist's workers and shards show the failure that a run reported."""
    (tmp_path / "test_user.py").write_text(USER_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout

    # Not with --hypothesis-seed: under it, Hypothesis neither reads nor writes the database.
    first = run("pytest", "-q")
    assert FOUND in first
    (line,) = [line for line in first.splitlines() if line.startswith("replay ")]
    again = run("pytest", "-q", "--hypothesis-show-statistics")
    assert FOUND in again
    assert "during reuse phase" in again
    assert "generate phase" not in again
    assert "in 3 of 3 runs" in run("rpcprops", "replay", line.split()[-1], "--no-needed")
    assert FOUND in run("pytest", "-q", "-n", "2")
    assert FOUND in run("pytest", "-q", "--rpc-shards", "2")
