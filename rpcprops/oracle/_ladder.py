"""When a fast clock may be believed: the rates at which a failure is run again, and the slack."""

from __future__ import annotations

from rpcprops.outcomes import Outcome, Violation

#: Virtual seconds by which the waits of ranks may end late before a failure of code that the model
#: does not know means nothing: nobody knows how much time it needs. On an idle machine it is one or
#: two at most.
OWN_CODE_SLACK = 4.0


def rungs(rate: float) -> tuple[float, ...]:
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
