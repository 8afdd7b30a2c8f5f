"""Records of a test's run: its examples, their clusters, the faults that fired, its failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

from rpcprops.errors import HarnessError, MachineCannot, first_line_of
from rpcprops.faults import FaultPlan
from rpcprops.oracle import account, fired_by_type
from rpcprops.outcomes import Outcome

#: Words for a failure that slower rates did not show, and for one whose ranks were too late.
NOT_SHOWN = "not confirmed in real time"
UNDECIDED = "undecided, the machine was too loaded"
#: Words for a failure that fresh ranks did not show.
IN_USE = "undecided, seen only in used ranks (reuse=True)"
#: A rate that leaves honest work twenty times as long as the usual one.
_SLOWER = 20.0
#: The report property that holds the line about a file that could not be written.
UNWRITTEN = "rpcprops-unwritten"
#: The plans and outcomes of clusters, in the order in which the clusters ended.
Recorded = list[tuple[FaultPlan, Outcome]]


@dataclass
class Failing:
    """A failing example: how to run it again, and what it raised.

    Attributes:
        choices: what Hypothesis chose for it; None if it chose nothing.
        reproduction: the same for an artefact: Hypothesis's version, and a blob.
        real: for each run of it in real time, whether it failed in the same way.
        real_seconds: how long the longest of these runs took.
    """

    body: Callable[[], Any]
    error: BaseException
    recorded: Recorded
    choices: tuple[Any, ...] | None = None
    reproduction: tuple[str, str] | None = None
    real: list[bool] = field(default_factory=list)
    real_seconds: float = 0.0

    @property
    def fastest(self) -> float:
        """The rate of its fastest cluster."""
        return max((outcome.clock_rate for _, outcome in self.recorded), default=1.0)

    @property
    def ran_before(self) -> int:
        """How many clusters the ranks of one of its own had run before; 0 if all were fresh."""
        return max((outcome.ran_before for _, outcome in self.recorded), default=0)


@dataclass
class ItemRecord:
    """The record of a test's run.

    Attributes:
        clusters: all clusters that ended, with those that confirmed a failure or repeated it.
        fired: the faults that fired in them.
        armed: examples with a fault to inject.
        confirmed: kinds of failure that real time has shown.
        fastest: the rate of the fastest cluster.
        clock_note: a sentence about the rate, if the code's timeouts have decided it; else empty.
        replayed: for a replay, the exception type of each run, empty for a run that passed.
        differs: for a replay, why the test no longer draws the example; else empty.
        unconfirmed: failures that slower rates, down to real time, did not show again.
        undecided: such failures whose ranks had been too late to prove anything.
        in_use: failures in used ranks that fresh ones did not show.
        refuted: failing examples that slower runs did not show: they count as passing.
        not_the_tests: examples with an error that is not one of the code under test.
        is_rare: whether the smallest failing example did not fail in each run.
        needs: lines that say which faults the smallest failing example needs.
        strict_until: while it is not None, each failing example must show in real time; after that
            time (of ``time.monotonic()``) no new example is run.
        left_out: clusters that are counted but not kept, because one example had too many.
        is_watched: whether the plugin watches its examples, which takes ``rpc_cluster``; else they
            are only counted.
        drawn: whether Hypothesis has drawn them.
    """

    examples: int = 0
    clusters: int = 0
    armed: int = 0
    fastest: float = 0.0
    clock_note: str = ""
    fired: Counter[str] = field(default_factory=Counter)
    confirmed: set[type[BaseException]] = field(default_factory=set)
    first_ones: list[Failing] = field(default_factory=list)
    failing: dict[Any, Failing] = field(default_factory=dict)
    unconfirmed: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    refuted: set[Any] = field(default_factory=set)
    not_the_tests: dict[Any, HarnessError | MachineCannot] = field(default_factory=dict)
    strict_until: float | None = None
    smallest: Failing | None = None
    repeats: list[str] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    is_rare: bool = False
    needs: list[str] = field(default_factory=list)
    differs: str = ""
    left_out: int = 0
    armed_left_out: bool = False
    is_watched: bool = True
    drawn: bool = False

    def count(self, recorded: Recorded) -> None:
        """Count an example, if its clusters had a fault to inject."""
        self.armed += self.armed_left_out or any(is_armed(*one) for one in recorded)
        self.armed_left_out = False

    def leave_out(self, plan: FaultPlan, outcome: Outcome) -> None:
        """Do not keep a cluster of the current example."""
        self.left_out += 1
        self.armed_left_out |= is_armed(plan, outcome)

    def count_cluster(self, plan: FaultPlan, outcome: Outcome) -> None:
        """Count a cluster that has ended, also one that only repeats an example."""
        self.clusters += 1
        self.fastest = max(self.fastest, outcome.clock_rate)
        self.fired.update(fired_by_type(account(None, plan, outcome)))

    def doubt(self, line: str, *, is_undecided: bool) -> None:
        """Record the line about a failure that slower rates did not show."""
        (self.undecided if is_undecided else self.unconfirmed).append(line)

    def doubt_used(self, failing: Failing) -> None:
        """Record that fresh ranks did not show a failure of used ones."""
        count = failing.ran_before
        said = f"{type(failing.error).__name__}: {first_line_of(failing.error)}"
        self.in_use.append(f"{said} (after {count} cluster{'s' * (count > 1)})")

    @property
    def remedy(self) -> str:
        """What to do about failures that are undecided."""
        clock = f"{_SLOWER:g}" if self.fastest > _SLOWER else "real"
        option = repr(clock) if clock == "real" else clock
        place = f"rpc_cluster(..., clock={option})"
        if not self.is_watched:
            place = f"clock = {option} in the class of the machine"
        return f"a slower clock helps: --rpc-clock={clock}, or {place}"


def summary_lines(summary: dict[str, Any]) -> Generator[str, None, None]:
    """One line for each kind of failure of a test that does not count, and one about its clock."""
    for words, lines, remedy in (
        (NOT_SHOWN, summary["unconfirmed"], ""),
        (UNDECIDED, summary["undecided"], f"; {summary['remedy']}"),
        (IN_USE, summary.get("in_used_ranks", ()), "; docs/testing.md says what stays in ranks"),
    ):
        if lines:
            more = f" (and {len(lines) - 1} more like it)" if len(lines) > 1 else ""
            yield f"{words}: {summary['nodeid']}: {lines[0]}{more}{remedy}"
    if summary["clock"]:
        yield f"{summary['nodeid']}: {summary['clock']}"


#: The key under which a test's item has its record until it is reported.
ITEM = pytest.StashKey[ItemRecord]()


def is_armed(plan: FaultPlan, outcome: Outcome) -> bool:
    """Whether the run had a fault whose firing it could show."""
    return any(
        fault.seen(rank) is not None
        for rank in outcome.ranks
        for one in (plan, *(armed.plan for armed in outcome.armed))
        for fault in one.faults_at(rank.rank)
    )
