"""The phases of a cluster: what it does now, how long that may take, and how each one ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rpcprops.errors import UsageError
from rpcprops.outcomes import PhaseName, PhaseOutcome, PhaseVerdict


@dataclass
class Phase:
    """One phase that is in progress."""

    name: PhaseName
    seconds: float
    began: float = field(default_factory=time.monotonic)
    verdict: PhaseVerdict = "ok"
    detail: str = ""
    ranks: tuple[int, ...] = ()

    def passed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return max(0.0, self.seconds - self.passed())

    def fail(self, detail: str, ranks: tuple[int, ...] = ()) -> None:
        self.verdict, self.detail, self.ranks = "failed", detail, ranks

    def hang(self, detail: str, ranks: tuple[int, ...]) -> None:
        self.verdict, self.detail, self.ranks = "hung", detail, ranks

    def outcome(self, rate: float) -> PhaseOutcome:
        passed = self.passed()
        return PhaseOutcome(
            self.name, self.verdict, passed * rate, passed, self.seconds, self.detail, self.ranks
        )


class Phases:
    """The phases of one cluster, in order.

    Attributes:
        outcomes: how each phase went that has ended.
        over: whether the cluster has ended; no phase starts after that.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.outcomes: list[PhaseOutcome] = []
        self.over = False

    @contextlib.contextmanager
    def open(self, name: PhaseName, seconds: float) -> Iterator[Phase]:
        """A phase that lasts as long as the block; a series of one name makes one outcome."""
        if self.over:
            msg = "the cluster is over; make another with server.cluster(...)."
            raise UsageError(msg)
        phase = Phase(name, seconds)
        try:
            yield phase
        finally:
            outcome = phase.outcome(self.rate)
            if self.outcomes and self.outcomes[-1].name == name and outcome.verdict == "ok":
                last = self.outcomes.pop()
                outcome = replace(
                    last,
                    virtual_seconds=last.virtual_seconds + outcome.virtual_seconds,
                    real_seconds=last.real_seconds + outcome.real_seconds,
                )
            self.outcomes.append(outcome)
