"""Tells by its text what kind of error a rank raised: torch has no classes for most of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rpcprops.oracle._prediction import ErrorClass
from rpcprops.outcomes import RaisedError

#: What the error of each class says, as a regular expression, in the order in which they are
#: tried: a remote error quotes the error that was raised there.
TEXTS: Mapping[ErrorClass, str] = {
    "remote": "(?i:on WorkerInfo|raised on purpose|RaisedOnPurpose)",
    "creation": "RRef creation via rpc[.]remote",
    "injected": "Send attempt failed intentionally",
    "timeout": "(?i:RPC ran for more than|timed? ?out)",
}


def error_class(error: RaisedError | None) -> ErrorClass:
    """The class of an error, "" for none, "unknown" for one that is none of these."""
    if error is None:
        return ""
    if error.type == "MissingHandleError":
        return "missing"
    for name, text in TEXTS.items():
        if re.search(text, error.message):
            return name
    return "unknown"


def is_expected(expected: ErrorClass, seen: RaisedError | None) -> bool:
    """Whether a step that had to end with `expected` may end as `seen` shows."""
    if expected == "unknown":
        return error_class(seen) != "unknown"
    return error_class(seen) == expected


#: What each class is called in a message.
WORDS: dict[ErrorClass, str] = {
    "": "no error",
    "timeout": "torch's timeout",
    "injected": "the injected failure",
    "remote": "what the function raised",
    "creation": "that the RRef was never created",
    "missing": "that the handle never came",
    "unknown": "a timeout or a value",
}
