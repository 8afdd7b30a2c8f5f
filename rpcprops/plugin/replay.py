"""Runs the one example of a failure artefact again, for ``rpcprops replay``."""

from __future__ import annotations

import ast
import functools
import json
import shlex
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from rpcprops._files import Unwritten, write_whole
from rpcprops._printable import printable
from rpcprops.errors import UsageError, text_of
from rpcprops.plugin.drawn import (
    EXPLICIT,
    FAILURES,
    NOT_THE_TESTS,
    Drawn,
    function_of,
    is_drawn,
    outcome_of,
)
from rpcprops.plugin.examples import call, show_logs, watched
from rpcprops.plugin.failures import run_again
from rpcprops.plugin.records import UNWRITTEN, Failing, ItemRecord, Recorded
from rpcprops.plugin.session import MOST_KEPT, Session
from rpcprops.report import artefact as artefacts

_ARTEFACT = pytest.StashKey[artefacts.Artefact]()


def choose(items: list[pytest.Item], path: Path) -> None:
    """Make the test of an artefact run only the example of the artefact.

    Raises:
        UsageError: (pytest's) the file is no artefact, or its test or its example is not there.
    """
    try:
        artefact = artefacts.read(path)
    except UsageError as error:
        raise pytest.UsageError(printable(error)) from None
    found = [item for item in items if item.nodeid == artefact.subject]
    if not found:
        msg = f"the test of the artefact, {artefact.subject}, is not among those collected."
        raise pytest.UsageError(printable(msg))
    for item in found:
        item.stash[_ARTEFACT] = artefact
        if artefact.reproduction is not None:
            _reproduce(function_of(item), *artefact.reproduction)
        elif is_drawn(function_of(item)):
            msg = "the artefact does not say which example failed"
            raise pytest.UsageError(printable(search_anew(artefact, msg)))


def search_anew(artefact: artefacts.Artefact, why: str) -> str:
    """A sentence that offers a search, because the example cannot be replayed."""
    return f"{why}. To search for a failing example anew: pytest {shlex.quote(artefact.subject)}"


def _reproduce(function: Any, version: str, blob: str) -> None:
    import hypothesis

    if not is_drawn(function):
        return  # said when the test runs
    if version != hypothesis.__version__:
        msg = (
            f"the example was drawn by hypothesis {version}, and this is "
            f"{hypothesis.__version__}; install that version to replay it."
        )
        raise pytest.UsageError(msg)
    if blob.startswith(EXPLICIT):
        settings = getattr(function, "_hypothesis_internal_use_settings", None)
        function._hypothesis_internal_use_settings = hypothesis.settings(
            settings or hypothesis.settings.default, phases=[hypothesis.Phase.explicit]
        )
        return
    try:
        data = ast.literal_eval(blob)
    except (ValueError, SyntaxError):
        data = None
    if not isinstance(data, bytes):
        msg = "the artefact's reproduction blob is damaged."
        raise pytest.UsageError(msg)
    hypothesis.reproduce_failure(version, data)(function)


def call_again(
    item: pytest.Item, session: Session, record: ItemRecord
) -> Generator[None, None, None]:
    """Run the test of an artefact around the `yield`, and write down what its runs raised.

    If the test draws differently now, that is written down instead, and ends the run of pytest.
    """
    artefact = item.stash[_ARTEFACT]
    if artefact.reproduction is not None and not is_drawn(function_of(item)):
        record.differs = "Hypothesis draws nothing for it any more"
    watch = functools.partial(_repeated, artefact) if artefact.reproduction else watched
    try:
        yield from call(item, session, record, watch)
        if not record.replayed:
            record.replayed.append("")
    except FAILURES as error:
        if _is_fixed(error, record):
            record.replayed = record.replayed or [""]
        elif not record.differs:
            record.replayed = record.replayed or [type(error).__name__]
            raise
    finally:
        _answer(item, session, record)
        if record.differs:
            pytest.exit(f"rpcprops: the test draws differently now: {record.differs}", 4)


def _is_fixed(error: BaseException, record: ItemRecord) -> bool:
    """Whether a replayed example passes now; notes if it cannot be drawn any more."""
    from hypothesis.errors import DidNotReproduce

    if not isinstance(error, DidNotReproduce):
        return False
    is_fixed = "completed successfully" in text_of(error)
    if not is_fixed and not record.differs:
        record.differs = text_of(error)
    return is_fixed


def _answer(item: pytest.Item, session: Session, record: ItemRecord) -> None:
    """Write what the runs raised to the file that the options name."""
    path = session.options.replay_answer
    if path is None or not (record.replayed or record.differs):
        return
    data = {
        "raised": record.replayed,
        "differs": record.differs,
        "rate": record.fastest or session.server.rate,
        "clock_problem": session.server.clock_problem,
    }
    try:
        write_whole(path, json.dumps(data) + "\n")
    except OSError as error:
        item.user_properties.append((UNWRITTEN, str(Unwritten.because(error, path))))


def _repeated(
    artefact: artefacts.Artefact, inner: Callable[..., Any], session: Session, record: ItemRecord
) -> Any:
    """Runs the one example of an artefact as often as the options say, without confirming."""

    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        drawn = Drawn(inner, args, kwargs)
        if drawn.is_explicit and drawn.reproduction() != artefact.reproduction:
            return None
        result, error = outcome_of(inner, args, kwargs)
        error, recorded = session.ended(error)
        show_logs(recorded)
        record.count(recorded)
        record.examples += 1
        if isinstance(error, NOT_THE_TESTS):
            raise error
        record.differs = _difference(artefact, session, drawn, recorded, passes=error is None)
        if record.differs:
            return result
        failing = Failing(drawn.body(), error or AssertionError(), recorded)
        seen = [error]
        times = session.options.replay_times
        seen += [run_again(session, failing, rate=None).error for _ in range(times - 1)]
        record.replayed = [type(raised).__name__ if raised else "" for raised in seen]
        errors = [raised for raised in seen if raised is not None]
        record.repeats.append(f"{len(errors)} of {len(seen)} at rate {failing.fastest:g}")
        if not errors:
            return result
        failing.error = errors[0]
        record.smallest = failing
        raise errors[0]

    return example


def _difference(
    artefact: artefacts.Artefact,
    session: Session,
    drawn: Drawn,
    recorded: Recorded,
    *,
    passes: bool,
) -> str:
    """Why what was drawn is not the example of the artefact; empty if it is."""
    differs = drawn.differs(artefact.reproduction, passes=passes)
    if differs or not artefact.plans or not recorded or len(recorded) == MOST_KEPT:
        return differs
    plan, outcome = recorded[0]
    expected = artefact.plans[0].without(session.options.without_fault, outcome.world_size)
    if plan == expected:
        return ""
    return f"its first cluster has the faults {plan!r}, and the artefact has {expected!r}"
