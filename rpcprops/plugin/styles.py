"""Tests that are not called as plain functions: of unittest, pytest-asyncio, anyio.

Such plugins replace the body of a Hypothesis test shortly before they call it: the new body runs
an event loop. What we watch must be that body, because an example ends when its loop does.

unittest catches what a test raises, and tells its result object, which is the item of pytest.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rpcprops.plugin.drawn import FAILURES

_BEFORE_CALL = pytest.StashKey[Callable[[], None]]()
#: Whether pytest itself calls the function of the test.
_IS_PLAIN = pytest.StashKey[bool]()


def before_call(item: pytest.Item, install: Callable[[], None]) -> None:
    """Have `install` called right before the function of the test, after other plugins."""
    item.stash[_IS_PLAIN] = is_plain(item)
    if _is_unittest(item):
        # Its function is called by unittest, without a hook.
        install()
    else:
        item.stash[_BEFORE_CALL] = install


def about_to_call(item: pytest.Item) -> None:
    """Call what :func:`before_call` was given for this test, once."""
    install = item.stash.get(_BEFORE_CALL, None)
    if install is not None:
        del item.stash[_BEFORE_CALL]
        install()


def run(
    item: pytest.Item, on_failure: Callable[[BaseException], BaseException]
) -> Generator[None, None, None]:
    """Run a test around the `yield`; if it fails, raise what `on_failure` returns.

    For a test of unittest that is before its ``tearDown``, so that its examples can run again.
    """
    try:
        if not _is_unittest(item):
            return (yield)
        with _told_by_unittest(item, on_failure) as told:
            yield
    except FAILURES as error:
        failed = error
    else:
        if told:
            # pytest reports what unittest has told the item, so this changes no report.
            raise told[0]
        return
    # Not in the `except`: an exception of another search would then name this one.
    raise on_failure(failed)


@contextmanager
def _told_by_unittest(
    item: Any, on_failure: Callable[[BaseException], BaseException]
) -> Iterator[list[BaseException]]:
    """Call `on_failure` with the first failure that unittest tells an item; all are listed."""
    told: list[BaseException] = []

    def telling(method: Callable[..., Any]) -> Callable[..., Any]:
        def tell(testcase: Any, raised: Any) -> Any:
            error = raised[1]
            if isinstance(error, FAILURES):
                if not told:
                    error = on_failure(error)
                    raised = (type(error), error, error.__traceback__)
                told.append(error)
            return method(testcase, raised)

        return tell

    names = ("addError", "addFailure")
    try:
        for name in names:
            setattr(item, name, telling(getattr(item, name)))
        yield told
    finally:
        for name in names:
            vars(item).pop(name, None)


def can_run_again(item: pytest.Item) -> bool:
    """Whether the item's ``runtest`` may be called a second time, inside its first call.

    unittest would run its setUp and tearDown again, and other plugins would wrap the body again.
    """
    return item.stash.get(_IS_PLAIN, False)


def is_plain(item: pytest.Item) -> bool:
    """Whether pytest itself calls the function of the test; ask before other plugins change it."""
    function = getattr(item, "obj", None)
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return (
        isinstance(item, pytest.Function)
        and not _is_unittest(item)
        and not inspect.iscoroutinefunction(inner)
    )


def _is_unittest(item: pytest.Item) -> bool:
    unittest: Any = sys.modules.get("_pytest.unittest")
    return unittest is not None and isinstance(item, unittest.TestCaseFunction)
