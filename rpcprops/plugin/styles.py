"""Tests that are not called as plain functions: of unittest, pytest-asyncio, anyio.

Such plugins replace the body of a Hypothesis test shortly before they call it: the new body runs
an event loop. What we watch must be that body, because an example ends when its loop does.

unittest catches what a test raises, and tells its result object, which is the item of pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rpcprops.plugin.drawn import FAILURES

_BEFORE_CALL = pytest.StashKey[Callable[[], None]]()


def before_call(item: pytest.Item, install: Callable[[], None]) -> None:
    """Have `install` called right before the function of the test, after other plugins."""
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


@contextmanager
def failing(item: pytest.Item, on_failure: Callable[[BaseException], None]) -> Iterator[None]:
    """Call `on_failure` when the test in this block fails; the block raises the failure.

    For a test of unittest that is before its ``tearDown``, so that its examples can run again.
    """
    try:
        if not _is_unittest(item):
            yield
            return
        with _told_by_unittest(item, on_failure) as told:
            yield
    except FAILURES as error:
        on_failure(error)
        raise
    if told:
        # pytest reports what unittest has told the item, so this changes no report.
        raise told[0]


@contextmanager
def _told_by_unittest(
    item: Any, on_failure: Callable[[BaseException], None]
) -> Iterator[list[BaseException]]:
    """Call `on_failure` with the first failure that unittest tells an item; all are listed."""
    told: list[BaseException] = []

    def telling(method: Callable[..., Any]) -> Callable[..., Any]:
        def tell(testcase: Any, raised: Any) -> Any:
            error = raised[1]
            if isinstance(error, FAILURES):
                told.append(error)
                if len(told) == 1:
                    on_failure(error)
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


def _is_unittest(item: pytest.Item) -> bool:
    unittest: Any = sys.modules.get("_pytest.unittest")
    return unittest is not None and isinstance(item, unittest.TestCaseFunction)
