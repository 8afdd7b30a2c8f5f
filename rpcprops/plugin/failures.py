"""Failures of tests: confirms them at slower rates, and describes the one that is reported.

A failure under a fast clock counts only once real time has shown it: the example runs again, by
what Hypothesis chose for it. :mod:`rpcprops.plugin.smallest` chooses which example is reported.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from rpcprops._files import Unwritten
from rpcprops.confirmation import OWN_CODE_SLACK, Confirmation, Sight, confirm, is_decided
from rpcprops.errors import BrokenPromise, HarnessError, first_line_of, text_of
from rpcprops.faults import FaultPlan
from rpcprops.oracle import account, judge
from rpcprops.outcomes import Outcome, Violation
from rpcprops.plugin.drawn import EXPLICIT, FAILURES, NOT_THE_TESTS, is_rejected
from rpcprops.plugin.records import Failing, ItemRecord, Recorded
from rpcprops.plugin.session import Session
from rpcprops.plugin.shards import without_shard
from rpcprops.report import artefact as artefacts

#: The most lines of one kind in the description of a cluster.
_MOST_OF_A_KIND = 6


@dataclass(frozen=True)
class Again:
    """One more run of an example: the exception, if any, and what its clusters showed."""

    error: BaseException | None
    recorded: Recorded


def run_again(session: Session, failing: Failing, rate: float | None) -> Again:
    """Run the body of an example once more, in fresh ranks; at `rate`, or else its own rates.

    Raises:
        HarnessError: the run failed because of a bug of ours, and shows nothing of the example.
        MachineCannot: the same, because of a limit of this machine.
    """
    error: BaseException | None = None
    recorded: Recorded = []
    session.server.override_rate, session.server.only_fresh = rate, True
    session.in_flight.again()
    try:
        failing.body()
    except FAILURES as raised:
        if isinstance(raised, NOT_THE_TESTS):
            raise
        error = raised
    except BaseException as raised:
        # It drew more than the first time, so it is another example, which shows nothing.
        if not is_rejected(raised):
            raise
    finally:
        session.server.override_rate, session.server.only_fresh = None, False
        error, recorded = session.ended(error)
    if isinstance(error, NOT_THE_TESTS):
        raise error
    return Again(error, recorded)


def counts(session: Session, record: ItemRecord, failing: Failing) -> bool:
    """Whether a failure counts: a new kind must repeat in real time, others at the fast rate.

    While the record is strict, all must repeat in real time. One of used ranks must repeat in fresh
    ones first, at its own rate.
    """
    kind = type(failing.error)
    if not failing.recorded:
        return True  # no rank was there, so no clock either
    if failing.ran_before and not isinstance(run_again(session, failing, None).error, kind):
        record.doubt_used(failing)
        return False
    if record.strict_until is not None:
        return confirmation(session, failing, rates=(1.0,)).is_confirmed
    if kind in record.confirmed:
        return isinstance(run_again(session, failing, rate=None).error, kind)
    said = confirmation(session, failing)
    if said.is_confirmed:
        record.confirmed.add(kind)
        record.first_ones.append(failing)
    else:
        line = f"{kind.__name__}: {first_line_of(failing.error)}"
        record.doubt(line, is_undecided=said.is_undecided)
    return said.is_confirmed


def confirmation(
    session: Session, failing: Failing, rates: Sequence[float] | None = None
) -> Confirmation:
    """What slower rates show of a failing example."""
    kind = type(failing.error)

    def run(rate: float) -> Sight:
        began = time.monotonic()
        again = run_again(session, failing, rate)
        shows = isinstance(again.error, kind)
        if rate == 1.0:
            failing.real.append(shows)
            failing.real_seconds = max(failing.real_seconds, time.monotonic() - began)
        if again.error is None or not shows:
            return Sight(False)
        # A failure of the test's own code counts in real time, however late the ranks were: any
        # run without us would report it too.
        is_own = rate == 1.0 and not isinstance(again.error, BrokenPromise)
        return Sight(True, is_own or in_time(again.error, again.recorded))

    first = Sight(True, in_time(failing.error, failing.recorded))
    return confirm(failing.fastest, first, run, rates=rates, raises_cannot=True)


def in_time(error: BaseException, recorded: Recorded) -> bool:
    """Whether the ranks were scheduled early enough for a failure to prove something."""
    promise = type(error).__name__
    if isinstance(error, BrokenPromise):
        broken = [
            (violation, outcome)
            for plan, outcome in recorded
            for violation in judge(None, plan, outcome)
            if violation.promise == promise
        ]
        # The others were held after everything had come to rest: more time would not help.
        return not broken or any(is_decided(*one) for one in broken)
    own = Violation(promise, text_of(error), timing_sensitive=True, slack=OWN_CODE_SLACK)
    return all(is_decided(own, outcome) for _, outcome in recorded)


def failure_lines(
    item: pytest.Item, error: BaseException, record: ItemRecord, session: Session
) -> list[str]:
    """The description of a test's smallest failing example; its artefact is written first."""
    from rpcprops.report.text import replay_line

    smallest = record.smallest
    if smallest is None:
        return []
    lines = _described(smallest, record.left_out, "\n".join([text_of(error), *_notes(error)]))
    lines += record.needs
    if record.repeats:
        lines.append(f"repeats  {', '.join(record.repeats)}")
    if session.options.replay is not None:
        return lines  # the artefact exists already, and contains more than this run shows
    version, blob = smallest.reproduction or ("", "")
    if blob and not blob.startswith(EXPLICIT):
        lines.append(f"redraw   @reproduce_failure({version!r}, {blob})")
    artefact = artefacts.Artefact(
        kind="pytest",
        subject=without_shard(item.nodeid),
        promise=type(smallest.error).__name__,
        head=(
            f"broken   {type(error).__name__}: {first_line_of(error)}",
            *_notes_of_ranks(error, smallest),
            *lines,
        ),
        plans=tuple(plan for plan, _ in smallest.recorded),
        outcomes=tuple(outcome for _, outcome in smallest.recorded),
        clock_rate=smallest.fastest if smallest.recorded else session.server.rate,
        transport=session.options.transport,
        repeats=tuple(record.repeats),
        reproduction=smallest.reproduction,
        rootdir=str(item.config.rootpath),
        chosen_agent=session.server.agent,
    )
    path = artefacts.write_or_say(artefact, item.config.rootpath / artefacts.DIRECTORY)
    if not isinstance(path, Unwritten):
        lines.append("details  each rank's log, stacks and counters are in the file below")
    return [*lines, f"replay   {replay_line(path)}"]


def _described(failing: Failing, left_out: int, said: str) -> list[str]:
    """The clusters of a failing example in words, without what its error has `said` already.

    Only its last cluster is shown, and others that broke a promise, because the report must fit
    on a screen. `left_out` clusters were not recorded.
    """
    from rpcprops.report import text

    all_of_them = list(enumerate(failing.recorded, left_out + 1))
    total = left_out + len(failing.recorded)
    shown = [one for one in all_of_them[:-1] if judge(None, *one[1])][:1] + all_of_them[-1:]
    lines: list[str] = []
    if total > 1:
        numbers = " and ".join(str(number) for number, _ in shown)
        lines.append(f"clusters {total} in this example; shown: {numbers}")
    for number, (plan, outcome) in shown:
        if len(shown) > 1:
            lines.append(f"cluster  {number} of {total}")
        lines += text.describe_plan(plan, outcome.world_size, outcome.armed)
        lines += _cut(_fired(plan, outcome), "more that fired")
        violations = [one for one in judge(None, plan, outcome) if str(one) not in said]
        lines += _cut(text.describe_violations(violations), "more")
        lines += text.describe_where(outcome, said)
    return lines


def _fired(plan: FaultPlan, outcome: Outcome) -> list[str]:
    """The faults of a cluster that fired, in words."""
    from rpcprops.report import text

    try:
        return text.describe_faults(account(None, plan, outcome))
    except HarnessError as own:
        return [f"fired    not known: {first_line_of(own)}"]


def _cut(lines: list[str], rest: str) -> list[str]:
    """At most a few of `lines`; `rest` names those that are left out."""
    if len(lines) <= _MOST_OF_A_KIND:
        return lines
    more = len(lines) - _MOST_OF_A_KIND + 1
    return [*lines[: _MOST_OF_A_KIND - 1], f"         … and {more} {rest}"]


def _notes_of_ranks(error: BaseException, failing: Failing) -> list[str]:
    """The lines of the notes that begin with the name of a rank: who holds, waits or died where."""
    names = tuple(f"{rank.name} " for _, outcome in failing.recorded for rank in outcome.ranks)
    return [
        f"         {line}"
        for note in _notes(error)
        if note.startswith(names)
        for line in note.splitlines()
    ]


def _notes(error: BaseException) -> list[str]:
    """The notes of an exception; its own code may have put anything there."""
    notes = getattr(error, "__notes__", ())
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
