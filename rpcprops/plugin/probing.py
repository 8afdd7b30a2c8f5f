"""Runs the simplest example of a test before the test, so that draws know what its ranks send.

Hypothesis starts with the same example. If it has passed here, its result is used there, so it
costs no time. Failures are left to the test.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rpcprops.faults import MessageType
from rpcprops.plugin import styles
from rpcprops.plugin.drawn import FAILURES, Drawn, function_of, is_drawn
from rpcprops.plugin.records import Recorded
from rpcprops.plugin.session import Session
from rpcprops.strategies import hints

_NAMES = frozenset(map(str, MessageType))


@contextmanager
def hinted(item: pytest.Item, session: Session) -> Iterator[None]:
    """In the block, the strategies for faults prefer what the simplest example sent."""
    function = function_of(item)
    repeats_one = getattr(function, "_hypothesis_internal_use_reproduce_failure", None)
    is_ours = is_drawn(function) and styles.is_plain(item)
    if not is_ours or repeats_one is not None or session.options.replay is not None:
        # What an example is does not depend on the hint.
        yield
        return
    handle = function.hypothesis
    first = _First(handle.inner_test, session)
    try:
        _run_once(item, function, first)
        handle.inner_test = first.not_again()
        with hints.known(hints.Hint(_sends(first.recorded))):
            yield
    finally:
        handle.inner_test = first.inner


def _run_once(item: Any, function: Any, first: _First) -> None:
    """Have Hypothesis draw the simplest example of a test, and run it."""
    import hypothesis

    settings = getattr(function, "_hypothesis_internal_use_settings", None)
    no_health_checks: Any = list(hypothesis.HealthCheck)
    function.hypothesis.inner_test = first.probe()
    function._hypothesis_internal_use_settings = hypothesis.settings(
        settings or hypothesis.settings.default,
        max_examples=1,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=no_health_checks,
        verbosity=hypothesis.Verbosity.quiet,
    )
    names = item._fixtureinfo.argnames  # noqa: SLF001 - as pytest itself calls a test
    try:
        with hints.known(first.hint):
            item.obj(**{name: item.funcargs[name] for name in names})
    except FAILURES:
        pass  # the test raises it again
    finally:
        function._hypothesis_internal_use_settings = settings


class _First:
    """The simplest example of a test.

    Attributes:
        inner: the body of the test.
        hint: shows whether its strategies ask what is sent.
        recorded: what its clusters showed.
    """

    def __init__(self, inner: Callable[..., Any], session: Session) -> None:
        self.inner = inner
        self.hint = hints.Hint()
        self.recorded: Recorded = []
        self._session = session
        self._ran = False
        self._key: object = None
        self._result: Any = None

    def probe(self) -> Callable[..., Any]:
        """A body that runs once, and only if something is drawn that a hint is for."""

        @functools.wraps(self.inner)
        def probe(*args: Any, **kwargs: Any) -> Any:
            is_open = _draws_inside(args, kwargs)
            if not self._ran and (is_open or self.hint.asked):
                self._probe(is_open, args, kwargs)

        return probe

    def _probe(self, is_open: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from hypothesis.errors import Frozen, StopTest, UnsatisfiedAssumption

        session = self._session
        session.take_recorded()
        session.in_flight.example(Drawn(self.inner, args, kwargs).reproduction)
        key = _choices()
        try:
            self._result = self.inner(*args, **kwargs)
            # A test that draws in its body has not drawn all of its example before.
            self._key = None if is_open else key
        except (Frozen, StopTest, UnsatisfiedAssumption):
            raise  # Hypothesis looks for another example
        except FAILURES:
            pass
        finally:
            self.recorded = session.take_recorded()
        self._ran = True

    def not_again(self) -> Callable[..., Any]:
        """The body of the test, which does not run the example again if it has passed."""

        @functools.wraps(self.inner)
        def body(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            on_end = self._session.server.on_end
            if self._key is None or self._key != _choices() or on_end is None:
                return self.inner(*args, **kwargs)
            self._key = None
            for plan, outcome in self.recorded:
                on_end(plan, outcome)
            return self._result

        return body


def _draws_inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the test draws inside its body, so that its strategies have not been asked yet."""
    from hypothesis.strategies import DataObject

    return any(isinstance(value, DataObject) for value in (*args, *kwargs.values()))


def _choices() -> object:
    from hypothesis.control import current_build_context, currently_in_test_context

    if not currently_in_test_context():
        return None
    # 0, False and 0.0 are equal, but not the same choice.
    return tuple(map(repr, current_build_context().data.choices))


def _sends(recorded: Recorded) -> dict[int, frozenset[MessageType]]:
    """The types of fault that each rank could meet, by what it sent."""
    found: defaultdict[int, set[MessageType]] = defaultdict(set)
    for _, outcome in recorded:
        for rank in outcome.ranks:
            found[rank.rank].update(map(MessageType, _NAMES.intersection(rank.sent or ())))
    return {rank: frozenset(kinds) for rank, kinds in found.items()}
