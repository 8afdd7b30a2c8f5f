"""Decides whether a failure under a fast clock counts, by runs at slower rates and in real time.

A fast clock also multiplies the time that the real work takes, and a busy machine is late. So a
failure counts only once the slowest rate has shown it, with ranks that were in time. All code that
confirms failures calls :func:`confirm`: properties, `rpc_cluster`, state machines, sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rpcprops.errors import MachineCannot
from rpcprops.outcomes import Outcome, Violation

#: Virtual seconds by which waits of ranks may end late before a failure proves nothing, for code
#: that the model does not know: nobody knows how much time it needs. On an idle machine the
#: lateness is at most one or two.
OWN_CODE_SLACK = 4.0


def confirmation_rates(rate: float) -> tuple[float, ...]:
    """The rates below `rate` at which a failure must show too: a tenth of it, then 1."""
    tenth = rate / 10
    return (tenth, 1.0) if tenth > 1.0 else (1.0,) if rate > 1.0 else ()


def is_decided(violation: Violation, outcome: Outcome) -> bool:
    """Whether the ranks were in time, so that `violation` proves something.

    A wait that ends `late_seconds` (real) after its deadline is late by that times the rate in
    virtual seconds. If that reaches the slack of the violation, the machine may have caused what
    was seen.
    """
    late = max((rank.late_seconds for rank in outcome.ranks), default=0.0)
    return late * outcome.clock_rate < violation.slack


@dataclass(frozen=True, slots=True)
class Sight:
    """Whether one run shows a failure.

    Attributes:
        shows: whether it fails in the same way.
        in_time: whether its ranks were in time, so that the run proves something.
    """

    shows: bool
    in_time: bool = True

    @classmethod
    def of(cls, outcome: Outcome, broken: Iterable[Violation]) -> Self:
        """What a run shows whose violations of the promise in question are `broken`."""
        decided = [is_decided(violation, outcome) for violation in broken]
        return cls(bool(decided), any(decided))


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What the slower runs say of a failure.

    Attributes:
        kind: "confirmed": the last run shows it, in time. If a run in time showed it and a slower
            run did not: "unconfirmed", or "failed once" if it did not come again at its own rate
            either. The other kinds are undecided: "too late": the last run shows it, but its ranks
            were late. "meant nothing": the last run does not show it, and all that did were late.
            "not had": the machine could not give the last rate.
        rate: the rate of the last run.
        runs: the rates that were run, and whether each showed it.
        cannot: for "not had", the error that says why.
    """

    kind: Literal["confirmed", "unconfirmed", "failed once", "too late", "meant nothing", "not had"]
    rate: float
    runs: tuple[tuple[float, bool], ...] = ()
    cannot: MachineCannot | None = None

    @property
    def is_confirmed(self) -> bool:
        """Whether the failure counts."""
        return self.kind == "confirmed"

    @property
    def is_undecided(self) -> bool:
        """Whether the machine was too loaded to tell."""
        return self.kind in ("too late", "meant nothing", "not had")


def confirm(
    rate: float,
    first: Sight,
    run: Callable[[float], Sight],
    *,
    rates: Sequence[float] | None = None,
    passing_decides: bool = False,
    raises_cannot: bool = False,
    more_runs: int = 0,
) -> Confirmation:
    """Run a failure that `first` shows at `rate` again at slower rates.

    A run that failed while its ranks were late proves nothing either way, so the next slower rate
    is run. A rate that a busy machine cannot give is skipped; real time is always possible.

    Args:
        run: runs the same once more at the given rate. What it raises is raised, except
            MachineCannot: such a run shows nothing of the failure, and does not count.
        rates: the rates to run, in this order; by default the :func:`confirmation_rates` below
            `rate`, or rate 1 once more for a failure in real time.
        passing_decides: whether a slower run that does not fail ends the confirmation, if only
            late runs have failed. Right if each run is judged as a whole, so that this run is an
            example that holds.
        raises_cannot: whether MachineCannot is raised too, at any rate. Right if it may come from
            the caller's own code, because no other rate would change that.
        more_runs: how often to repeat at `rate` what a slower run does not show, to see whether it
            "failed once". Right if a busy machine can cause something that looks like a violation.
    """
    believed, last, at = first.in_time, first, rate
    runs: list[tuple[float, bool]] = []
    cannot: MachineCannot | None = None
    for at in (confirmation_rates(rate) or (1.0,)) if rates is None else rates:
        try:
            last, cannot = run(at), None
        except MachineCannot as error:
            if raises_cannot:
                raise
            cannot = error
            continue
        runs.append((at, last.shows))
        believed = believed or (last.shows and last.in_time)
        if not last.shows and (believed or passing_decides):
            break
    if cannot is not None:
        return Confirmation("not had", at, tuple(runs), cannot)
    if last.shows:
        return Confirmation("confirmed" if last.in_time else "too late", at, tuple(runs))
    if not believed:
        return Confirmation("meant nothing", at, tuple(runs))
    is_once = more_runs > 0 and not any(run(rate).shows for _ in range(more_runs))
    return Confirmation("failed once" if is_once else "unconfirmed", at, tuple(runs))
