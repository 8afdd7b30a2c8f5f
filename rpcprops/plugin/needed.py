"""Says which faults a failing example needs, by running it without each of them once.

Hypothesis draws simpler faults only as far as its strategy can, and a failure of the user's own
may be there without any. This is a hint, at the rate of the example and bounded in time: `rpcprops
replay` runs each case more than once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.plugin.failures import in_time, run_again
from rpcprops.plugin.records import Failing, ItemRecord
from rpcprops.plugin.session import Session

#: Real seconds that all these runs may take together.
_MOST_SECONDS = 5.0


def needed_faults(session: Session, record: ItemRecord) -> list[str]:
    """Lines about the faults of the smallest failing example; none if it has no faults.

    First it runs without any fault. If it passes then, it runs without the faults of each message
    type in turn, at all ranks. No run starts that may end after `_MOST_SECONDS` real seconds.
    """
    failing = record.smallest
    if failing is None or failing.draws_inside:
        return []
    names = _names(failing)
    if not names:
        return []
    until = time.monotonic() + _MOST_SECONDS
    estimate = sum(outcome.real_seconds for _, outcome in failing.recorded)
    if estimate > _MOST_SECONDS:
        return [f"needs    not tried: one run of this example takes {estimate:.0f} real s"]
    if _fails_without(session, failing, names):
        return ["needs    no fault: it fails without any fault too (one run)"]
    kinds = list(dict.fromkeys(map(_kind_of, names)))
    if len(kinds) == 1:
        return [f"needs    {kinds[0]}: without it, it passes (one run)"]
    needed, not_needed, untried = list[str](), list[str](), list[str]()
    for kind in kinds:
        if time.monotonic() + estimate > until:
            untried.append(kind)
            continue
        fails = _fails_without(session, failing, [n for n in names if _kind_of(n) == kind])
        (not_needed if fails else needed).append(kind)
    lines = [f"{', '.join(needed)}: without it, it passes (one run each)"] if needed else []
    if not_needed:
        lines.append(f"not {', '.join(not_needed)}: it fails without it too (one run each)")
    if untried:
        lines.append(f"not tried, after {_MOST_SECONDS:g} s: {', '.join(untried)}")
    return [f"{'needs' if not number else '':9}{line}" for number, line in enumerate(lines)]


def _names(failing: Failing) -> list[str]:
    """The names of the faults of all clusters of an example."""
    found = [
        name for plan, outcome in failing.recorded for name in plan.fault_names(outcome.world_size)
    ]
    return list(dict.fromkeys(found))


def _kind_of(name: str) -> str:
    """A fault's name without its rank, such as ``delay:PYTHON_CALL``."""
    return name.partition(":")[2]


def _fails_without(session: Session, failing: Failing, names: Sequence[str]) -> bool:
    """Whether one run without some faults fails in the same way, with ranks that are in time."""
    session.left_out = tuple(names)
    try:
        again = run_again(session, failing, rate=None)
    except (HarnessError, MachineCannot):
        return False
    finally:
        session.left_out = ()
    error = again.error
    return isinstance(error, type(failing.error)) and in_time(error, again.recorded)
