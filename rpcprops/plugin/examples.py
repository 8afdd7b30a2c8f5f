"""Runs a test that uses ``rpc_cluster``, and watches each example that Hypothesis draws.

If the waits of ranks ended so late that the machine may have caused a failure, the failure proves
nothing. Slower rates then decide, and a failure that they do not show is undecided.

An error of rpcprops itself, or of the machine, is not a failure of the code under test: the test
fails with that error at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from rpcprops import profiles
from rpcprops.plugin.drawn import (
    FAILURES,
    NOT_THE_TESTS,
    blob_so_far,
    draws_inside,
    example_key,
    example_runner,
    function_of,
    is_drawn,
    outcome_of,
    tell_hypothesis,
)
from rpcprops.plugin.failures import choose_smallest, counts
from rpcprops.plugin.records import Failing, ItemRecord, Recorded
from rpcprops.plugin.session import Session
from rpcprops.plugin.shards import seed_of, shard_of, share_key

#: Makes the body that Hypothesis runs for each example from the body of the test.
Watch = Callable[[Callable[..., Any], Session, ItemRecord], Callable[..., Any]]


def watched(inner: Callable[..., Any], session: Session, record: ItemRecord) -> Any:
    """Runs an example, records what it showed, and raises its failure only once that counts."""

    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        is_open = draws_inside(args, kwargs)
        _is_in_flight(session, is_open)
        key = example_key(args, kwargs)
        known = record.failing.get(key)
        result, error = outcome_of(inner, args, kwargs)
        recorded = session.take_recorded()
        show_logs(recorded)
        if known is None:
            record.count(recorded)
            record.examples += 1
        if key in record.not_the_tests:
            # It failed here before: the result of an example must not change.
            raise record.not_the_tests[key]
        if isinstance(error, NOT_THE_TESTS):
            if not is_open:
                record.not_the_tests[key] = error
            raise error
        if error is None:
            if known is not None:
                # It failed before: the result of an example must not change.
                raise known.error
            tell_hypothesis(recorded)
            return result
        if recorded:
            body = functools.partial(inner, *args, **kwargs)
            failing = Failing(body, error, recorded, is_open)
            if known is None and not _counts(session, record, key, failing):
                return None
            # Ordered by when each last failed: Hypothesis runs the smallest example last.
            record.failing.pop(key, None)
            record.failing[key] = failing
        raise error

    return example


def _counts(session: Session, record: ItemRecord, key: Any, failing: Failing) -> bool:
    """Whether a failure counts; if that is undecided, it is recorded as the example's result."""
    __tracebackhide__ = True
    try:
        return counts(session, record, failing)
    except NOT_THE_TESTS as own:
        record.not_the_tests[key] = own
        raise


def _is_in_flight(session: Session, is_open: bool) -> None:
    """Write down the next example; if it draws inside its body, what it has drawn when asked."""
    if is_open:
        session.in_flight.example(blob_so_far)
    else:
        blob = blob_so_far()
        session.in_flight.example(lambda: blob)


def call(
    item: pytest.Item, session: Session, record: ItemRecord, watch: Watch = watched
) -> Generator[None, None, None]:
    """Run a test around the `yield`; if it fails, choose the example that is reported."""
    function = function_of(item)
    if not is_drawn(function):
        return (yield from _call_plain(session, record))
    with _prepared(item, function, session, record, watch):
        try:
            return (yield)
        except FAILURES as error:
            if not record.replayed and not isinstance(error, NOT_THE_TESTS):
                choose_smallest(session, record)
            raise


def _call_plain(session: Session, record: ItemRecord) -> Generator[None, None, None]:
    """As :func:`call`, for a test without Hypothesis: the test is its only example."""
    record.examples = 1
    try:
        return (yield)
    except FAILURES as error:
        recorded = session.take_recorded()
        record.count(recorded)
        if not isinstance(error, NOT_THE_TESTS):
            record.smallest = Failing(lambda: None, error, recorded)
        raise
    finally:
        record.count(session.take_recorded())


@contextmanager
def _prepared(
    item: pytest.Item, function: Any, session: Session, record: ItemRecord, watch: Watch
) -> Generator[None, None, None]:
    """While a Hypothesis test runs, change its settings, and give it a body that we can rerun."""
    example_runner()
    handle = function.hypothesis
    inner = handle.inner_test
    settings = getattr(function, "_hypothesis_internal_use_settings", None)
    seed = getattr(function, "_hypothesis_internal_use_seed", None)
    ours = _settings(settings)
    if shard_of(item) is not None:
        share_key(item, inner)
        ours, is_seeded = _of_a_shard(item, ours, seed, session.options.shards.count)
        if is_seeded:
            function._hypothesis_internal_use_seed = seed_of(item, seed)
    function._hypothesis_internal_use_settings = ours
    handle.inner_test = watch(inner, session, record)
    try:
        yield
    finally:
        handle.inner_test = inner
        function._hypothesis_internal_use_settings = settings
        function._hypothesis_internal_use_seed = seed


def _settings(given: Any) -> Any:
    """Suitable settings for a test."""
    import hypothesis

    default: Any = hypothesis.settings.default
    ours = given or default
    # Only one failure, so that its notes and its artefact are of the same example.
    changes: dict[str, Any] = {"print_blob": True, "report_multiple_bugs": False}
    if ours.phases == default.phases:
        # It traces lines of this process, but the failing code runs in others: slow and useless.
        changes["phases"] = [phase for phase in ours.phases if phase.name != "explain"]
    if ours.deadline == default.deadline:
        changes["deadline"] = None
    return hypothesis.settings(ours, **changes)


def _of_a_shard(item: pytest.Item, ours: Any, seed: Any, shards: int) -> tuple[Any, bool]:
    """The settings for one shard of a test, and whether it needs a seed of its own.

    It does where Hypothesis draws the same examples each time: all shards would draw these.
    """
    import hypothesis

    forced = item.config.getoption("--hypothesis-seed", None)
    is_seeded = ours.derandomize or seed is not None or forced is not None
    changes: dict[str, Any] = {"max_examples": max(1, -(-ours.max_examples // shards))}
    if is_seeded:
        changes["derandomize"] = False
    return hypothesis.settings(ours, **changes), is_seeded


def show_logs(recorded: Recorded) -> None:
    """Under the debug profile, print what each rank wrote (shown with -s, or on failure)."""
    if profiles.current() != profiles.DEBUG:
        return
    from rpcprops.report.text import describe_logs, describe_plan

    for plan, outcome in recorded:
        print("\n".join([*describe_plan(plan, outcome.world_size), *describe_logs(outcome)]))
