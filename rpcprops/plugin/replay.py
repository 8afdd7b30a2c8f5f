"""Runs the one example of a failure artefact again, for ``rpcprops replay``."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from rpcprops._files import Unwritten, write_whole
from rpcprops._printable import printable
from rpcprops.errors import UsageError, text_of
from rpcprops.plugin.drawn import FAILURES, NOT_THE_TESTS, draws_inside, function_of, outcome_of
from rpcprops.plugin.examples import call, show_logs, watched
from rpcprops.plugin.failures import run_again
from rpcprops.plugin.records import UNWRITTEN, Failing, ItemRecord
from rpcprops.plugin.session import Session
from rpcprops.report import artefact as artefacts


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
        if artefact.reproduction is not None:
            _reproduce(item, *artefact.reproduction)


def _reproduce(item: pytest.Item, version: str, blob: str) -> None:
    import hypothesis

    if version != hypothesis.__version__:
        msg = (
            f"the example was drawn by hypothesis {version}, and this is "
            f"{hypothesis.__version__}; install that version to replay it."
        )
        raise pytest.UsageError(msg)
    try:
        data = ast.literal_eval(blob)
    except (ValueError, SyntaxError):
        data = None
    if not isinstance(data, bytes):
        msg = "the artefact's reproduction blob is damaged."
        raise pytest.UsageError(msg)
    hypothesis.reproduce_failure(version, data)(function_of(item))


def call_again(
    item: pytest.Item, session: Session, record: ItemRecord
) -> Generator[None, None, None]:
    """Run the test of an artefact around the `yield`, and write down what its runs raised."""
    repeats_one = getattr(function_of(item), "_hypothesis_internal_use_reproduce_failure", None)
    watch = watched if repeats_one is None else _repeated
    try:
        yield from call(item, session, record, watch)
        if not record.replayed:
            record.replayed.append("")
    except FAILURES as error:
        is_fixed = _is_fixed(error)
        if not record.replayed:
            record.replayed.append("" if is_fixed else type(error).__name__)
        if not is_fixed:
            raise
    finally:
        _answer(item, session, record)


def _is_fixed(error: BaseException) -> bool:
    """Whether a replayed example passes now; ends the run if it can no longer be drawn."""
    from hypothesis.errors import DidNotReproduce

    if not isinstance(error, DidNotReproduce):
        return False
    if "completed successfully" in text_of(error):
        return True
    pytest.exit(f"rpcprops: the test has changed, its example cannot be drawn: {text_of(error)}", 4)


def _answer(item: pytest.Item, session: Session, record: ItemRecord) -> None:
    """Write what the runs raised to the file that the options name."""
    path = session.options.replay_answer
    if path is None or not record.replayed:
        return
    data = {
        "raised": record.replayed,
        "rate": session.server.rate,
        "clock_problem": session.server.clock_problem,
    }
    try:
        write_whole(path, json.dumps(data) + "\n")
    except OSError as error:
        item.user_properties.append((UNWRITTEN, str(Unwritten.because(error, path))))


def _repeated(inner: Callable[..., Any], session: Session, record: ItemRecord) -> Any:
    """Runs the one example of an artefact as often as the options say, without confirming."""

    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        result, error = outcome_of(inner, args, kwargs)
        recorded = session.take_recorded()
        show_logs(recorded)
        record.count(recorded)
        record.examples += 1
        if isinstance(error, NOT_THE_TESTS):
            raise error
        body = functools.partial(inner, *args, **kwargs)
        failing = Failing(body, error or AssertionError(), recorded)
        seen = [error]
        if not draws_inside(args, kwargs):
            times = session.options.replay_times
            seen += [run_again(session, failing, rate=None).error for _ in range(times - 1)]
        record.replayed = [type(raised).__name__ if raised else "" for raised in seen]
        errors = [raised for raised in seen if raised is not None]
        rate = recorded[0][1].clock_rate if recorded else 1.0
        record.repeats.append(f"{len(errors)} of {len(seen)} at rate {rate:g}")
        if not errors:
            return result
        failing.error = errors[0]
        record.smallest = failing
        raise errors[0]

    return example
