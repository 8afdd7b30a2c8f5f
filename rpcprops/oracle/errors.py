"""Finds the class of an error by its text: torch has no exception classes for most errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rpcprops.oracle.prediction import ErrorClass
from rpcprops.outcomes import RaisedError
from rpcprops.torch_facts import NEWEST, TorchFacts


def patterns(facts: TorchFacts) -> Mapping[ErrorClass, str]:
    """A regular expression for the text of each class of error, in the order to try them.

    A remote error comes first: it quotes the error that was raised at the callee.
    """
    texts = facts.texts
    return {
        # Errors that our own functions raise (steps/in_rank) match it too.
        "remote": (
            f"(?i:{_plain(texts.remote)}|{_plain(texts.uncompiled)}|raised on purpose|"
            "RaisedOnPurpose)"
        ),
        "creation": _plain(texts.creation),
        "injected": _plain(texts.injected),
        # A refused keyword may be named so.
        "timeout": (
            f"(?i:{_plain(texts.timeout)}|(?<!{_plain(texts.proxy_keyword)}'){texts.timed_out})"
        ),
    }


def _plain(text: str) -> str:
    """A regular expression for `text` that stays readable in a script: ``[.]``, no backslash."""
    return re.sub(r"[.*+?(){}|$]", r"[\g<0>]", re.sub(r"[\\^\[\]]", r"\\\g<0>", text))


def error_class(error: RaisedError | None, facts: TorchFacts = NEWEST) -> ErrorClass:
    """The class of an error: "" for no error, "unknown" for one that matches no class."""
    if error is None:
        return ""
    if error.type == "MissingHandleError":
        return "missing"
    for name, text in patterns(facts).items():
        if re.search(text, error.message):
            return name
    return "unknown"


def is_expected(expected: ErrorClass, seen: RaisedError | None, facts: TorchFacts = NEWEST) -> bool:
    """Whether a step that had to end with `expected` may have ended as in `seen`."""
    if expected == "unknown":
        return error_class(seen, facts) != "unknown"
    return error_class(seen, facts) == expected


#: The name of each class in messages.
WORDS: dict[ErrorClass, str] = {
    "": "no error",
    "timeout": "torch's timeout",
    "injected": "the injected failure",
    "remote": "what the function raised",
    "creation": "that the RRef was never created",
    "missing": "that the handle never came",
    "unknown": "a timeout or a value",
}
