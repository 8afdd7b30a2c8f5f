"""An error of the caller's inside an example of Hypothesis's: it ends the test at once."""

from __future__ import annotations

from hypothesis.errors import FailedHealthCheck

from rpcprops.errors import UsageError


class _Misuse(UsageError, FailedHealthCheck):
    """A :class:`UsageError` that Hypothesis raises as it is, and for which it tries nothing else.

    It does so with a failed health check (``_execute_once_for_engine`` in hypothesis/core.py),
    which also says that a test is set up wrongly.
    """


# Readers and `except` clauses know it by this name.
_Misuse.__name__ = _Misuse.__qualname__ = UsageError.__name__
_Misuse.__module__ = UsageError.__module__


def at_once(error: UsageError) -> UsageError:
    """The same error, as one for which Hypothesis draws no further example, and shrinks nothing.

    It has the traceback and the notes of `error`; raise it ``from error.__cause__``.
    """
    if isinstance(error, _Misuse):
        return error
    made = _Misuse(*error.args).with_traceback(error.__traceback__)
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    return made
