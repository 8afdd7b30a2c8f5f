"""The exceptions: whose fault each one is, and one class for each promise."""

from __future__ import annotations

import inspect
import pickle

import pytest

from rpcprops import errors
from rpcprops.outcomes import Violation
from rpcprops.properties import PROPERTIES
from rpcprops.properties._engine import broken_promise

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if value.__module__ == errors.__name__
]
PROMISES = [
    value
    for value in CLASSES
    if issubclass(value, errors.BrokenPromise) and value is not errors.BrokenPromise
]


def test_the_promises_are_these() -> None:
    """Each promise that the judge knows has a class, and there is no class without a promise."""
    assert {promise.__name__ for promise in PROMISES} == {
        "CallLeak",
        "ContextLeak",
        "ErrorInLog",
        "FaultsDiffer",
        "MessagesDiffer",
        "MissingError",
        "NotRunOnce",
        "OwnerGone",
        "RRefLeak",
        "RankDied",
        "RankHung",
        "UnclearError",
        "UnexpectedError",
        "UngracefulShutdown",
        "UpstreamTestFails",
        "WrongGradient",
        "WrongValue",
    }


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_is_apart_from_every_other(promise: type[Exception]) -> None:
    """No promise is a kind of another, so that Hypothesis shrinks each by itself."""
    assert promise.__bases__ == (errors.BrokenPromise,)
    assert not any(issubclass(promise, other) for other in PROMISES if other is not promise)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_exception_says_what_it_stands_for(kind: type[Exception]) -> None:
    """Each class has a docstring of its own that is a sentence."""
    assert kind.__doc__
    assert kind.__doc__ != getattr(kind.__base__, "__doc__", None)
    assert kind.__doc__.strip().endswith((".", ")."))


def test_a_broken_promise_fails_a_test_like_an_assertion() -> None:
    """pytest and Hypothesis treat it as a failed assertion, not as an error of the harness."""
    assert issubclass(errors.BrokenPromise, AssertionError)
    for other in (errors.UsageError, errors.MachineCannot, errors.HarnessError):
        assert not issubclass(other, AssertionError)


def test_misuse_is_a_value_error() -> None:
    """Who expects Python's own ValueError for a bad argument gets it."""
    assert issubclass(errors.UsageError, ValueError)


def test_all_but_a_ranks_traceback_have_one_base() -> None:
    """One except clause catches everything that is rpcprops's own."""
    for kind in CLASSES:
        own = kind is not errors.RemoteTraceback
        assert issubclass(kind, errors.RpcPropsError) == own


@pytest.mark.parametrize("promise", PROMISES)
def test_a_violation_becomes_the_exception_of_its_promise(promise: type[Exception]) -> None:
    """The first violation chooses the class, and the message has a line for each."""
    violations = (Violation(promise.__name__, "first", 1, 2), Violation("WrongValue", "second"))
    error = broken_promise(violations)
    assert type(error) is promise
    assert str(error) == f"{promise.__name__} (step 2, rank 1): first\nWrongValue: second"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_exception_crosses_processes(kind: type[Exception]) -> None:
    """An exception that is raised in a rank, or in a worker of xdist, arrives as itself."""
    error = kind(1, "text") if kind is errors.RemoteTraceback else kind("text")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_a_ranks_traceback_says_where_it_is_from() -> None:
    """The text of a remote traceback is headed by its rank."""
    assert str(errors.RemoteTraceback(3, "Traceback …")) == "in rank 3:\nTraceback …"


def test_what_a_property_is_known_to_break_is_a_promise() -> None:
    """A documented failure names a promise that exists."""
    known = [item.finding.promise for item in PROPERTIES.values() if item.finding is not None]
    assert known
    assert set(known) <= {promise.__name__ for promise in PROMISES}


class Mute(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise KeyError(self)


def test_there_is_a_text_of_every_exception() -> None:
    """An exception whose own code cannot make its text has one that says so."""
    assert errors.text_of(ValueError("one\ntwo")) == "one\ntwo"
    assert errors.first_line_of(ValueError("one\ntwo")) == "one"
    assert errors.first_line_of(ValueError()) == ""
    of_a_rank = RuntimeError("AssertionError: On WorkerInfo(id=0):\nValueError(2)\nTraceback:")
    assert errors.first_line_of(of_a_rank) == "AssertionError: On WorkerInfo(id=0): ValueError(2)"
    assert errors.text_of(Mute()) == "<no text: Mute.__str__ raised KeyError>"
