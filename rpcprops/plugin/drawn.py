"""What the plugin uses of Hypothesis and its internals. They are imported on first use."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import pytest

from rpcprops.errors import HarnessError, MachineCannot, UsageError
from rpcprops.oracle import account, fired_by_type
from rpcprops.plugin.records import Recorded

#: Exceptions by which a test fails. pytest.fail() and pytest.raises() raise no Exception.
FAILURES = (Exception, pytest.fail.Exception)
#: The label of what we have Hypothesis maximise.
TARGET = "rpcprops: faults fired"
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
    """What the body of a test returned, and the exception by which it failed.

    Raises:
        UsageError: it was used wrongly. Hypothesis then ends the test.
    """
    __tracebackhide__ = True
    try:
        return inner(*args, **kwargs), None
    except UsageError as misuse:
        from rpcprops._misuse import at_once

        raise at_once(misuse) from misuse.__cause__
    except FAILURES as raised:
        if not _is_failure(raised):
            raise
        return None, raised


def _is_failure(error: BaseException) -> bool:
    """Whether an exception means that the test failed, and does not steer Hypothesis or pytest."""
    return not (is_rejected(error) or isinstance(error, pytest.skip.Exception))


#: Stands for the choices of an example that ``@example`` gives: Hypothesis draws nothing for it.
EXPLICIT = "@example"


class Drawn:
    """The example that Hypothesis runs now: what it chose for it, and how to run it again.

    Attributes:
        is_final: whether this is the run that Hypothesis reports.
    """

    def __init__(
        self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        from hypothesis.control import current_build_context

        context = current_build_context()
        self.is_final = context.is_final
        self._data: Any = context.data
        self._wrapped: Any = context.wrapped_test
        self._inner = inner
        self._args = args
        self._kwargs = kwargs
        self._explicit = _number_of_explicit(self._wrapped, kwargs) if not self.choices else None

    @property
    def choices(self) -> tuple[Any, ...]:
        """What Hypothesis has chosen so far; a test that draws inside its body adds to it."""
        return tuple(self._data.choices)

    @property
    def key(self) -> Any:
        """A key that is equal for equal examples."""
        if self._explicit is not None:
            return EXPLICIT, self._explicit
        return tuple(repr(choice) for choice in self.choices)

    @property
    def is_explicit(self) -> bool:
        """Whether ``@example`` gives it."""
        return self._explicit is not None

    def differs(self, reproduction: tuple[str, str] | None, *, passes: bool) -> str:
        """Why these are not the choices of a blob that was replayed; empty if they are.

        Args:
            passes: whether the test has passed, so that it has drawn all that it draws.
        """
        if self.is_explicit or reproduction is None:
            return ""
        if self._data.misaligned_at is not None:
            return f"its draw number {self._data.misaligned_at[0] + 1} is of another kind"
        from hypothesis.core import decode_failure

        known = len(decode_failure(ast.literal_eval(reproduction[1])))
        now = len(self.choices)
        if passes and now < known:
            return f"it draws {now} values, and {known} were drawn for the example"
        return ""

    def reproduction(self) -> tuple[str, str] | None:
        """Hypothesis's version, and the blob of its choices so far (or the number of
        its ``@example``).
        """
        try:
            import hypothesis
            from hypothesis.core import encode_failure

            if self.is_explicit:
                blob = f"{EXPLICIT} {self._explicit}"
            else:
                blob = repr(encode_failure(self.choices))
        except Exception:
            # Hypothesis failed to make a blob. The example can run without one.
            return None
        return hypothesis.__version__, blob

    def body(self) -> Callable[[], Any]:
        """Runs it again: draws by the choices so far, and calls the test with what that gives."""
        return functools.partial(self._run, None if self.is_explicit else self.choices)

    def _run(self, choices: tuple[Any, ...] | None) -> Any:
        from hypothesis.control import BuildContext
        from hypothesis.internal.conjecture.data import ConjectureData
        from hypothesis.internal.entropy import deterministic_PRNG

        data: Any = ConjectureData.for_choices(choices or ())
        data.hypothesis_runner = self._data.hypothesis_runner
        with deterministic_PRNG(), BuildContext(data, wrapped_test=self._wrapped) as context:
            drawn: dict[str, Any] = {}
            if choices is not None:
                given = self._wrapped.hypothesis._given_kwargs
                drawn, _ = context.prep_args_kwargs_from_strategies(given)
            return self._inner(*self._args, **{**self._kwargs, **drawn})

    def give_up(self) -> NoReturn:
        """Tell Hypothesis that this example cannot be run.

        Raises:
            StopTest: (Hypothesis's) always.
        """
        self._data.mark_overrun()
        msg = "Hypothesis has gone on after the end of an example"
        raise HarnessError(msg)


def _number_of_explicit(wrapped: Any, kwargs: dict[str, Any]) -> int | None:
    """The number of the ``@example`` that has just these arguments; None if there is none."""
    names = list(wrapped.hypothesis._given_kwargs)
    explicit: Any = getattr(wrapped, "hypothesis_explicit_examples", ())
    for number, example in enumerate(explicit):
        given = example.kwargs or dict(zip(names[-len(example.args) :], example.args, strict=False))
        if all(kwargs.get(name) is value for name, value in given.items()):
            return number
    return None


def is_rejected(error: BaseException) -> bool:
    """Whether an exception says that an example cannot be run, by its choices or its assume()."""
    from hypothesis.errors import Frozen, StopTest, UnsatisfiedAssumption

    return isinstance(error, StopTest | UnsatisfiedAssumption | Frozen)


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
    hypothesis.target(float(fired.total()), label=TARGET)


def starting_from(choices: tuple[Any, ...], theirs: Any) -> Any:
    """A Hypothesis database that holds one example, and keeps what is found in `theirs`.

    It is found under the secondary key, because Hypothesis does not shrink what it finds under the
    primary one (``ConjectureRunner._run``).
    """
    from hypothesis.database import ExampleDatabase, choices_to_bytes

    class Starting(ExampleDatabase):
        def fetch(self, key: bytes) -> Iterable[bytes]:
            return [choices_to_bytes(choices)] if key.endswith(b".secondary") else []

        def save(self, key: bytes, value: bytes) -> None:
            if theirs is not None:
                theirs.save(key, value)

        def delete(self, key: bytes, value: bytes) -> None:
            if theirs is not None:
                theirs.delete(key, value)

    return Starting()
