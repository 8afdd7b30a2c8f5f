"""Says which faults a failing example needs, by running it without each of them once.

Hypothesis draws simpler faults only as far as its strategy can, and a failure of the user's own
may be there without any. A run that fails under a fast clock counts only once real time has shown
it, as any failure: a fast clock alone may make code fail that reads the clock. This is a hint,
bounded in time: `rpcprops replay` runs each case more than once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.oracle import account
from rpcprops.plugin.failures import confirmation, in_time, run_again
from rpcprops.plugin.records import Failing, ItemRecord
from rpcprops.plugin.session import Session

#: Real seconds that all these runs may take together; and the same for a test that has failed under
#: the fast clock where it did not in real time, because each of these runs may need real time too.
_MOST_SECONDS = 5.0
_MOST_REAL_SECONDS = 20.0


def needed_faults(session: Session, record: ItemRecord) -> list[str]:
    """Lines about the faults of the smallest failing example; none if it has no faults.

    First it runs without any fault. If it passes then, it runs without the faults of each message
    type in turn, at all ranks. No run starts that may end after the time that all may take.
    """
    failing = record.smallest
    names = _names(failing) if failing is not None else []
    if failing is None or not names:
        return []
    most = _MOST_REAL_SECONDS if record.refuted else _MOST_SECONDS
    lines = [_untried(record, failing, most)]
    if not lines[0]:
        lines = _tried(session, failing, names, most)
    return [f"{'needs' if not number else '':9}{line}" for number, line in enumerate(lines)]


def _untried(record: ItemRecord, failing: Failing, most: float) -> str:
    """Why no run can tell anything, or why none is needed; empty if neither is so."""
    try:
        counts = [count for one in failing.recorded for count in account(None, *one)]
    except HarnessError:
        return "not known: rpcprops cannot tell which faults have fired"
    if all(count.fired == 0 for count in counts):
        return "no fault: none has fired"
    if record.is_rare:
        return "not known: it does not fail each time, so one run that passes proves nothing"
    estimate = _seconds(failing)
    return f"not tried: one run of this example takes {estimate:.0f} real s" * (estimate > most)


def _tried(session: Session, failing: Failing, names: Sequence[str], most: float) -> list[str]:
    until = time.monotonic() + most
    kinds = list(dict.fromkeys(map(_kind_of, names)))
    fails = _fails_without(session, failing, names, until)
    if fails:
        return ["no fault: it fails without any fault too (one run)"]
    if fails is None:
        return [f"not known: a run in real time takes {failing.real_seconds:.0f} s"]
    if len(kinds) == 1:
        return [f"{kinds[0]}: without it, it passes (one run)"]
    answers: dict[bool | None, list[str]] = {False: [], True: [], None: []}
    for kind in kinds:
        dropped = [name for name in names if _kind_of(name) == kind]
        is_late = time.monotonic() + _seconds(failing) > until
        answer = None if is_late else _fails_without(session, failing, dropped, until)
        answers[answer].append(kind)
    needed, not_needed, unknown = (", ".join(answers[answer]) for answer in (False, True, None))
    lines = [f"{needed}: without it, it passes (one run each)"] if needed else []
    if not_needed:
        lines.append(f"not {not_needed}: it fails without it too (one run each)")
    if unknown:
        lines.append(f"not known after {most:g} s: {unknown}")
    return lines


def _seconds(failing: Failing) -> float:
    """The real seconds that an example took."""
    return sum(outcome.real_seconds for _, outcome in failing.recorded)


def _names(failing: Failing) -> list[str]:
    """The names of the faults of all clusters of an example."""
    found = [
        name for plan, outcome in failing.recorded for name in plan.fault_names(outcome.world_size)
    ]
    return list(dict.fromkeys(found))


def _kind_of(name: str) -> str:
    """A fault's name without its rank, such as ``delay:PYTHON_CALL``."""
    return name.partition(":")[2]


def _fails_without(
    session: Session, failing: Failing, names: Sequence[str], until: float
) -> bool | None:
    """Whether one run without some faults fails in the same way, with ranks that are in time.

    None if only a run in real time can tell, which may not end before `until`.
    """
    session.left_out = tuple(names)
    try:
        again = run_again(session, failing, rate=None)
        error = again.error
        if not isinstance(error, type(failing.error)) or not in_time(error, again.recorded):
            return False
        if failing.fastest == 1.0:
            return True
        if time.monotonic() + failing.real_seconds > until:
            return None
        fast = Failing(failing.body, error, again.recorded)
        return confirmation(session, fast, rates=(1.0,)).is_confirmed
    except (HarnessError, MachineCannot):
        return False
    finally:
        session.left_out = ()
