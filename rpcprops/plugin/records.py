"""What was seen while a test ran: its examples, their clusters, the faults that fired, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.faults import FaultPlan
from rpcprops.oracle import account, fired_by_type
from rpcprops.outcomes import Outcome

#: What a failure is called that slower rates did not show, and where the ranks had been too late.
NOT_SHOWN = "not confirmed in real time"
UNDECIDED = "undecided, the machine was too loaded"
#: The name under which a report carries the line about a file that could not be written.
UNWRITTEN = "rpcprops-unwritten"
#: What clusters ran under, and what they showed, in the order in which they ended.
Recorded = list[tuple[FaultPlan, Outcome]]


@dataclass
class Failing:
    """A failing example: how to run it again, and what it raised."""

    body: Callable[[], Any]
    error: BaseException
    recorded: Recorded
    draws_inside: bool = False

    @property
    def fastest(self) -> float:
        """The rate of its fastest cluster."""
        return max((outcome.clock_rate for _, outcome in self.recorded), default=1.0)


@dataclass
class ItemRecord:
    """What was seen while a test ran.

    Attributes:
        armed: examples that were given a fault to inject.
        confirmed: kinds of failure that real time has shown.
        replayed: for a replay, the type of what each run raised, empty where it held.
        unconfirmed: failures that slower rates, down to real time, did not show again.
        undecided: the same, where the ranks had been too late for the failure to mean anything.
        not_the_tests: examples that met an error which is none of the code under test.
        left_out: clusters that are counted, but were too many for one example to be kept.
    """

    examples: int = 0
    clusters: int = 0
    armed: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    confirmed: set[type[BaseException]] = field(default_factory=set)
    first_ones: list[Failing] = field(default_factory=list)
    failing: dict[Any, Failing] = field(default_factory=dict)
    unconfirmed: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    not_the_tests: dict[Any, HarnessError | MachineCannot] = field(default_factory=dict)
    smallest: Failing | None = None
    is_last: bool = True
    repeats: list[str] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    left_out: int = 0
    armed_left_out: bool = False

    def count(self, recorded: Recorded) -> None:
        """Count what an example's clusters showed."""
        self.armed += self.armed_left_out or any(_is_armed(*one) for one in recorded)
        self.armed_left_out = False
        for plan, outcome in recorded:
            self._count(plan, outcome)

    def leave_out(self, plan: FaultPlan, outcome: Outcome) -> None:
        """Count a cluster of the example that runs, and keep it no longer."""
        self.left_out += 1
        self.armed_left_out |= _is_armed(plan, outcome)
        self._count(plan, outcome)

    def _count(self, plan: FaultPlan, outcome: Outcome) -> None:
        self.clusters += 1
        self.fired.update(fired_by_type(account(None, plan, outcome)))

    def doubt(self, line: str, *, is_undecided: bool) -> None:
        """Keep the line about a failure that slower rates did not show."""
        (self.undecided if is_undecided else self.unconfirmed).append(line)


#: Where the item of a test has its record, until it is told.
ITEM = pytest.StashKey[ItemRecord]()


def _is_armed(plan: FaultPlan, outcome: Outcome) -> bool:
    """Whether a fault was asked for whose firing can be seen."""
    return any(
        fault.seen(rank) is not None
        for rank in outcome.ranks
        for fault in plan.faults_at(rank.rank)
    )
