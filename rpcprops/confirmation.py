"""Whether a failure under a fast clock is one: what slower rates, down to real time, show of it.

A fast clock multiplies honest work too, and a busy machine is late. So a failure counts once the
slowest rate has shown it, by ranks that were in time. Everything that confirms failures asks
:func:`confirm`: properties, tests of ``rpc_cluster``, state machines, sweeps, PyTorch's own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rpcprops.errors import MachineCannot
from rpcprops.outcomes import Outcome, Violation

#: Virtual seconds by which the waits of ranks may end late before a failure of code that the model
#: does not know means nothing: nobody knows how much time it needs. On an idle machine it is one or
#: two at most.
OWN_CODE_SLACK = 4.0


def confirmation_rates(rate: float) -> tuple[float, ...]:
    """The rates below `rate` at which a failure must show as well: a tenth of it, then 1."""
    tenth = rate / 10
    return (tenth, 1.0) if tenth > 1.0 else (1.0,) if rate > 1.0 else ()


def is_decided(violation: Violation, outcome: Outcome) -> bool:
    """Whether the ranks were scheduled in time enough for `violation` to mean what it says.

    A wait that ends `late_seconds` (real) after its deadline is that many times the rate late in
    virtual seconds; where this reaches the slack that the verdict allows, the machine may have
    caused what was seen.
    """
    late = max((rank.late_seconds for rank in outcome.ranks), default=0.0)
    return late * outcome.clock_rate < violation.slack


@dataclass(frozen=True, slots=True)
class Sight:
    """What one run shows of a failure.

    Attributes:
        shows: whether it fails in the same way.
        in_time: whether its ranks were in time enough for that to mean something.
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
    """What slower rates made of a failure.

    Attributes:
        kind: "confirmed": the last run shows it, in time. Of a failure that a run in time showed
            and a slower one did not, "unconfirmed", or "failed once" where it did not come again
            at its own rate either. The others are undecided: "too late" where the last run shows
            it, but its ranks were late; "meant nothing" where all that showed it were late, and
            the last does not; "not had" where the machine could not give the last rate.
        rate: that of the last run.
        runs: the rates that were asked, and whether each showed it.
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
    """Ask slower rates about a failure that `first` shows at `rate`.

    A run that failed while its ranks were late says nothing, neither for nor against: slower rates
    are asked on. A rate that a busy machine cannot give is passed over; real time it can.

    Args:
        run: runs the same once more, at the rate that it is given. What it raises is raised, but
            MachineCannot: such a run shows nothing of the failure, and is none without it.
        rates: what to ask, in this order; unless given the :func:`confirmation_rates` below `rate`,
            and for a failure in real time that once more.
        passing_decides: whether a slower run that does not fail ends it, where nothing but late
            runs has failed. Right where each run is judged whole, so that this one is an example
            that holds.
        raises_cannot: whether MachineCannot is raised too, at any rate. Right where it may come
            from the caller's own code, which no other rate would change.
        more_runs: how often to run at `rate` again what a slower run does not show, to tell whether
            it "failed once". Right where a busy machine can seem to break the promise.
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
