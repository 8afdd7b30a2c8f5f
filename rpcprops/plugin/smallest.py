"""Chooses the failing example of a Hypothesis test that is reported: pytest shows just this one.

While Hypothesis shrinks, a failing example need only fail twice under the fast clock, because real
time is slow. So the smallest example is run in real time when Hypothesis has ended. If that does
not show it, Hypothesis starts again from the smallest one that real time has shown, and now each
failing example must show in real time before Hypothesis is told of it. This second search ends
after :data:`STRICT_SECONDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rpcprops.plugin.failures import confirmation, run_again
from rpcprops.plugin.records import UNDECIDED, Failing, ItemRecord
from rpcprops.plugin.session import Session

#: Real seconds after which a search in real time runs no new example.
STRICT_SECONDS = 60.0
#: How many of the smallest failing examples are tried in real time.
_TRIED = 3
#: How often the reported example is rerun at its own rate, to see how often it fails again.
_REPEATS = 3


def choose(
    session: Session,
    record: ItemRecord,
    error: BaseException,
    search: Callable[[Failing], BaseException | None],
) -> BaseException:
    """Choose the example that is reported; the exception that pytest must show.

    Args:
        error: what Hypothesis has raised.
        search: lets Hypothesis shrink again from an example, and gives what it raises.
    """
    if not record.failing:
        return error
    chosen = _shown_in_real_time(session, record)
    if chosen is None:
        record.smallest = _last(record)
        return error
    if chosen.error is not error:
        is_ours = any(failing.error is error for failing in record.failing.values())
        found = search_strictly(session, record, chosen, search)
        last = _last(record)
        if found is not None and last.error is found:
            chosen, error = last, found
        elif is_ours:
            error = chosen.error
        # Otherwise Hypothesis complains of the test itself, for example that it is flaky.
    record.smallest = chosen
    record.repeats[:0] = _repeats(session, record, chosen)
    return error


def _last(record: ItemRecord) -> Failing:
    """The example that failed last. Hypothesis runs the smallest one last."""
    return list(record.failing.values())[-1]


def _shown_in_real_time(session: Session, record: ItemRecord) -> Failing | None:
    """The smallest failing example that real time shows; None if it shows none of those tried."""
    loaded = False
    for failing in list(reversed(record.failing.values()))[:_TRIED]:
        if failing.fastest == 1.0 or any(failing.real):
            return failing
        said = confirmation(session, failing, rates=(1.0,))
        if said.is_confirmed:
            return failing
        loaded |= said.is_undecided
    if record.first_ones:
        # The first failure of each kind was shown in real time when it was found.
        return record.first_ones[-1]
    record.repeats.append(UNDECIDED if loaded else "not in real time")
    return None


def search_strictly(
    session: Session,
    record: ItemRecord,
    chosen: Failing,
    search: Callable[[Failing], BaseException | None],
) -> BaseException | None:
    """Let Hypothesis shrink from `chosen` while all failing examples must show in real time."""
    if chosen.choices is None:
        return None
    for key, failing in list(record.failing.items()):
        if failing is not chosen and not any(failing.real):
            del record.failing[key]
            if failing.real:
                record.refuted.add(key)
    session.say(
        "the smallest example that the fast clock has shown passes in real time: shrinking in real "
        f"time, for up to {STRICT_SECONDS:g} s"
    )
    record.strict_until = time.monotonic() + STRICT_SECONDS
    try:
        return search(chosen)
    finally:
        if time.monotonic() > record.strict_until:
            record.repeats.append(
                f"shrunk for {STRICT_SECONDS:g} s in real time, so a smaller example may fail too"
            )
        record.strict_until = None


def _repeats(session: Session, record: ItemRecord, failing: Failing) -> list[str]:
    """How often a failing example fails again at its own rate and in real time, in words."""
    kind = type(failing.error)
    again = [run_again(session, failing, None) for _ in range(_REPEATS)]
    failed = sum(isinstance(one.error, kind) for one in again)
    record.is_rare = failed < _REPEATS or not all(failing.real)
    words = [f"{failed} of {_REPEATS} at rate {failing.fastest:g}"]
    if failing.fastest != 1.0 and failing.real:
        words.append(f"{sum(failing.real)} of {len(failing.real)} at rate 1")
    return words
