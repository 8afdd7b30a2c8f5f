"""What the plugin uses of Hypothesis and its internals. They are imported on first use."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from rpcprops.errors import HarnessError, MachineCannot, UsageError
from rpcprops.oracle import account, fired_by_type
from rpcprops.plugin.records import Recorded

#: Exceptions by which a test fails. pytest.fail() and pytest.raises() raise no Exception.
FAILURES = (Exception, pytest.fail.Exception)
#: Errors that are not failures of the code under test: they are not confirmed, shrunk or written.
NOT_THE_TESTS = (HarnessError, MachineCannot)


def function_of(item: pytest.Item) -> Any:
    """The function of a test, unbound if it is a method."""
    function = getattr(item, "obj", None)
    return getattr(function, "__func__", function)


def is_drawn(function: Any) -> bool:
    """Whether Hypothesis draws the examples of a test."""
    return bool(getattr(function, "is_hypothesis_test", False))


def outcome_of(
    inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, BaseException | None]:
    """What the body of a test returned, and the exception by which it failed."""
    __tracebackhide__ = True
    try:
        return inner(*args, **kwargs), None
    except FAILURES as raised:
        if not _is_failure(raised):
            raise
        return None, raised


def _is_failure(error: BaseException) -> bool:
    """Whether an exception means that the test failed, and does not steer Hypothesis or pytest."""
    from hypothesis.errors import Frozen, StopTest, UnsatisfiedAssumption

    return not isinstance(
        error, StopTest | UnsatisfiedAssumption | Frozen | pytest.skip.Exception | UsageError
    )


def draws_inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a test draws inside its body, so that we cannot run an example again."""
    from hypothesis.strategies import DataObject

    return any(isinstance(value, DataObject) for value in (*args, *kwargs.values()))


def example_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A key that is equal for equal examples."""
    from hypothesis.control import current_build_context, currently_in_test_context

    if currently_in_test_context():
        choices = getattr(current_build_context().data, "choices", None)
        if choices is not None:
            return tuple(repr(choice) for choice in choices)
    return repr((args, sorted(kwargs.items(), key=lambda item: item[0])))


def blob_so_far() -> tuple[str, str] | None:
    """Hypothesis's version, and the blob of what it has drawn for this example so far."""
    try:
        import hypothesis
        from hypothesis.control import current_build_context
        from hypothesis.core import encode_failure

        choices = current_build_context().data.choices
        return hypothesis.__version__, repr(encode_failure(choices))
    except Exception:
        # Hypothesis failed to make a blob. The example can run without one.
        return None


def tell_hypothesis(recorded: Recorded) -> None:
    """Tell Hypothesis which faults fired: for its statistics, and as a target to maximise."""
    import hypothesis
    from hypothesis.control import currently_in_test_context

    if not recorded or not currently_in_test_context():
        return
    fired: Counter[str] = Counter()
    for plan, outcome in recorded:
        fired.update(fired_by_type(account(None, plan, outcome)))
    for name in sorted(fired):
        hypothesis.event(f"fired {name}")
    hypothesis.target(float(fired.total()), label="rpcprops: faults fired")


@functools.cache
def example_runner() -> Callable[[Callable[[], None]], None]:
    """Runs a body in a Hypothesis test of its own; call this outside of any other such test.

    A body may use ``note`` and ``event``, which need a test, and ``target``, which accepts each
    label only once in an example.
    """
    import hypothesis
    from hypothesis import strategies as st

    bodies: list[Callable[[], None]] = []
    no_health_checks: Any = list(hypothesis.HealthCheck)

    @hypothesis.settings(
        max_examples=1,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=no_health_checks,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(st.none())
    def once(_: None) -> None:
        bodies[-1]()

    def run(body: Callable[[], None]) -> None:
        bodies.append(body)
        try:
            once()
        finally:
            bodies.pop()

    return run
