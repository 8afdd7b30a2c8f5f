"""The classes of errors: what torch's texts are taken for, and what is expected of a step."""

from __future__ import annotations

import pytest

from rpcprops.oracle import ErrorClass, error_class, is_expected
from rpcprops.outcomes import RaisedError

#: Texts as real ranks raised them, less what follows.
TEXTS: list[tuple[ErrorClass, str, str]] = [
    (
        "timeout",
        "RuntimeError",
        "RPC ran for more than set timeout (200 ms)",
    ),
    ("injected", "RuntimeError", "RPCErr:2:Send attempt failed intentionally for \x80\x02"),
    ("injected", "UnicodeDecodeError", r"Send attempt failed intentionally for \x80\x02"),
    ("creation", "RuntimeError", "RRef creation via rpc.remote() timed out, and it is possible"),
    ("remote", "RaisedOnPurposeError", "On WorkerInfo(id=1, name=worker1):\nstep0"),
    (
        "remote",
        "RuntimeError",
        "The TorchScript interpreter failed: raised on purpose",
    ),
    (
        "remote",
        "RuntimeError",
        "On WorkerInfo(id=2, name=worker2):\nSend attempt failed intentionally for step1",
    ),
    ("remote", "RuntimeError", "On WorkerInfo(id=2, name=worker2):\nRPC ran for more than 2 ms"),
    ("missing", "MissingHandleError", "a"),
    ("unknown", "RuntimeError", "EOF: end of file"),
    ("unknown", "ValueError", ""),
]


@pytest.mark.parametrize(("kind", "type_", "text"), TEXTS)
def test_a_text_is_of_one_class(kind: ErrorClass, type_: str, text: str) -> None:
    """An error that quotes another rank's is a remote one, whatever it quotes."""
    assert error_class(RaisedError(type_, text)) == kind


def test_no_error_is_a_class_of_its_own() -> None:
    """A step that raised nothing is expected where nothing was."""
    assert error_class(None) == ""
    assert is_expected("", None)
    assert not is_expected("timeout", None)


@pytest.mark.parametrize("expected", ["timeout", "injected", "creation", "remote", "missing"])
def test_an_error_is_expected_where_it_is_of_the_class(expected: ErrorClass) -> None:
    """Each class is accepted for itself and for no other, nor where none was to come."""
    for kind, type_, text in TEXTS:
        seen = RaisedError(type_, text)
        assert is_expected(expected, seen) == (kind == expected)
        assert not is_expected("", seen)


def test_where_either_may_come_any_known_class_will_do() -> None:
    """A value or a timeout, but not an error that nobody knows."""
    assert is_expected("unknown", None)
    for kind, type_, text in TEXTS:
        assert is_expected("unknown", RaisedError(type_, text)) == (kind != "unknown")
