"""Runs a test that uses ``rpc_cluster``, and watches each example that Hypothesis draws.

If the waits of ranks ended so late that the machine may have caused a failure, the failure proves
nothing. Slower rates then decide, and a failure that they do not show is undecided.

An error of rpcprops itself, or of the machine, is not a failure of the code under test: the test
fails with that error at once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from rpcprops import profiles
from rpcprops.errors import first_line_of
from rpcprops.plugin import styles
from rpcprops.plugin.drawn import (
    FAILURES,
    NOT_THE_TESTS,
    Drawn,
    function_of,
    is_drawn,
    outcome_of,
    starting_from,
    tell_hypothesis,
)
from rpcprops.plugin.failures import counts, run_again
from rpcprops.plugin.needed import needed_faults
from rpcprops.plugin.records import Failing, ItemRecord, Recorded
from rpcprops.plugin.session import Session
from rpcprops.plugin.shards import seed_of, shard_of, share_key
from rpcprops.plugin.smallest import choose

#: Makes the body that Hypothesis runs for each example from the body of the test.
Watch = Callable[[Callable[..., Any], Session, ItemRecord], Callable[..., Any]]


def watched(inner: Callable[..., Any], session: Session, record: ItemRecord) -> Any:
    """Runs an example, records what it showed, and raises its failure only once that counts."""

    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        drawn = Drawn(inner, args, kwargs)
        session.in_flight.example(drawn.reproduction)
        if _was_refuted(record, drawn):
            return None
        result, error = outcome_of(inner, args, kwargs)
        error, recorded = session.ended(error)
        show_logs(recorded)
        if session.limits.learn(recorded) and error is not None:
            # Its clock was too fast for its own timeouts, so that run shows nothing.
            again = run_again(session, Failing(drawn.body(), error, recorded), rate=None)
            error, recorded = again.error, again.recorded
        failure = _failure(session, record, drawn, error, recorded)
        if failure is not None:
            raise failure
        if error is None:
            tell_hypothesis(recorded)
        return result

    return example


def _failure(
    session: Session,
    record: ItemRecord,
    drawn: Drawn,
    error: BaseException | None,
    recorded: Recorded,
) -> BaseException | None:
    """What an example that has run must raise; None if it passes, or its failure does not count.

    The result of an example must not change: Hypothesis would call the test flaky.
    """
    __tracebackhide__ = True
    # A test that draws inside its body has drawn all by now.
    key = drawn.key
    known = record.failing.get(key)
    if known is None:
        record.count(recorded)
        record.examples += 1
    if key in record.not_the_tests:
        return record.not_the_tests[key]
    if isinstance(error, NOT_THE_TESTS):
        record.not_the_tests[key] = error
        return error
    if known is not None:
        if error is not None and type(error) is type(known.error):
            known.error, known.recorded = error, recorded
    elif error is None:
        return None
    else:
        choices = None if drawn.is_explicit else drawn.choices
        known = Failing(drawn.body(), error, recorded, choices, drawn.reproduction())
        if not _counts(session, record, key, known):
            record.refuted.add(key)
            if record.strict_until is None:
                session.limits.slow_down()
            return None
    # Ordered by when each last failed: Hypothesis runs the smallest example last.
    record.failing.pop(key, None)
    record.failing[key] = known
    return known.error


def _was_refuted(record: ItemRecord, drawn: Drawn) -> bool:
    """Whether an example that is about to run has failed before and counts as passing.

    Raises:
        BaseException: it has failed before, and counts.
        StopTest: (Hypothesis's) there is no time left for a new example.
    """
    __tracebackhide__ = True
    if drawn.is_final:
        return False  # it runs once more, so that its notes are printed
    known = record.failing.get(drawn.key)
    if known is not None:
        raise known.error
    if drawn.key in record.refuted:
        return True
    if record.strict_until is not None and time.monotonic() > record.strict_until:
        drawn.give_up()
    return False


def _counts(session: Session, record: ItemRecord, key: Any, failing: Failing) -> bool:
    """Whether a failure counts; if that is undecided, it is recorded as the example's result."""
    __tracebackhide__ = True
    try:
        return counts(session, record, failing)
    except NOT_THE_TESTS as own:
        record.not_the_tests[key] = own
        raise


def call(
    item: pytest.Item, session: Session, record: ItemRecord, watch: Watch = watched
) -> Generator[None, None, None]:
    """Run a test around the `yield`; if it fails, choose the example that is reported."""
    session.limits.begin(item.nodeid)
    try:
        if not is_drawn(function_of(item)):
            return (yield from _call_plain(item, session, record))
        return (yield from _call_drawn(item, session, record, watch))
    finally:
        record.clock_note = record.clock_note or session.limits.take_note()
        session.limits.end()


def _call_drawn(
    item: pytest.Item, session: Session, record: ItemRecord, watch: Watch
) -> Generator[None, None, None]:
    """As :func:`call`, for a test whose examples Hypothesis draws."""
    function = function_of(item)

    def on_failure(error: BaseException) -> BaseException:
        if record.replayed or isinstance(error, NOT_THE_TESTS):
            return error
        shown = choose(session, record, error, lambda start: _search(item, function, start))
        record.needs = needed_faults(session, record)
        return shown

    with _prepared(item, function, session, record, watch):
        return (yield from styles.run(item, on_failure))


def _search(item: Any, function: Any, start: Failing) -> BaseException | None:
    """Let Hypothesis shrink from an example that failed; what it raises."""
    import hypothesis
    from hypothesis import core

    if not styles.can_run_again(item):
        return None
    key = "_hypothesis_internal_database_key"
    settings = function._hypothesis_internal_use_settings
    phases = [phase for phase in settings.phases if phase is hypothesis.Phase.shrink]
    is_keyed = hasattr(function, key)
    if not is_keyed and vars(core)["global_force_seed"] is not None:
        # With --hypothesis-seed, Hypothesis asks no database unless it has a key.
        setattr(function, key, b"rpcprops")
    if function._hypothesis_internal_use_seed is None:
        function._hypothesis_internal_use_seed = 0  # where Hypothesis is derandomized, so is this
    function._hypothesis_internal_use_settings = hypothesis.settings(
        settings,
        derandomize=False,
        database=starting_from(start.choices or (), settings.database),
        phases=[hypothesis.Phase.reuse, *phases],
    )
    try:
        item.runtest()
    except NOT_THE_TESTS:
        raise
    except FAILURES as error:
        return error
    finally:
        function._hypothesis_internal_use_settings = settings
        if not is_keyed and hasattr(function, key):
            delattr(function, key)
    return None


def _call_plain(
    item: pytest.Item, session: Session, record: ItemRecord
) -> Generator[None, None, None]:
    """As :func:`call`, for a test without Hypothesis: the test is its only example.

    What fails in used ranks runs again in fresh ones, if pytest itself calls the test. If it passes
    there, the test has passed.
    """
    record.examples = 1
    may_run_again = styles.is_plain(item)

    def on_failure(error: BaseException) -> BaseException:
        _, recorded = session.ended(error)
        record.count(recorded)
        if session.limits.learn(recorded):
            record.clock_note = session.limits.advice()
        if not isinstance(error, NOT_THE_TESTS):
            record.smallest = Failing(lambda: None, error, recorded)
        return error

    own: BaseException | None = None
    again: BaseException | None = None
    try:
        yield from styles.run(item, on_failure)
    except FAILURES:
        known = record.smallest
        if known is None or not known.ran_before or not may_run_again:
            raise
        again = _in_fresh_ranks(item, session, record, known)
    finally:
        own, recorded = session.ended(None)
        session.limits.learn(recorded)
        record.count(recorded)
    for error in (again, own):
        if error is not None:
            raise error


def _in_fresh_ranks(
    item: pytest.Item, session: Session, record: ItemRecord, known: Failing
) -> BaseException | None:
    """What a test that has failed in used ranks raises in fresh ones; None if it passes there.

    Its fixtures are not set up again. So where it fails in another way, what it raised first is
    what counts.
    """
    fresh = run_again(session, Failing(item.runtest, known.error, known.recorded), rate=None)
    if fresh.error is None:
        record.smallest = None
        record.doubt_used(known)
    elif isinstance(fresh.error, type(known.error)):
        record.smallest = Failing(lambda: None, fresh.error, fresh.recorded)
        return fresh.error
    else:
        said = f"{type(fresh.error).__name__}: {first_line_of(fresh.error)}"
        known.error.add_note(f"Run again in fresh ranks, it raised {said}")
        return known.error
    return None


@contextmanager
def _prepared(
    item: pytest.Item, function: Any, session: Session, record: ItemRecord, watch: Watch
) -> Generator[None, None, None]:
    """While a Hypothesis test runs, change its settings, and give it a body that we can rerun."""
    handle = function.hypothesis
    inner = handle.inner_test
    settings = getattr(function, "_hypothesis_internal_use_settings", None)
    seed = getattr(function, "_hypothesis_internal_use_seed", None)
    ours = suitable(settings)
    if shard_of(item) is not None:
        share_key(item, inner)
        ours, is_seeded = _of_a_shard(item, ours, seed, session.options.shards.count)
        if is_seeded:
            function._hypothesis_internal_use_seed = seed_of(item, seed)
    function._hypothesis_internal_use_settings = ours

    def install() -> None:
        handle.inner_test = watch(handle.inner_test, session, record)

    styles.before_call(item, install)
    try:
        yield
    finally:
        handle.inner_test = inner
        function._hypothesis_internal_use_settings = settings
        function._hypothesis_internal_use_seed = seed


def suitable(given: Any) -> Any:
    """The settings of a test, suited to examples that start ranks."""
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
        lines = describe_plan(plan, outcome.world_size, outcome.armed)
        print("\n".join([*lines, *describe_logs(outcome)]))
