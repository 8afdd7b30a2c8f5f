"""Tells by its text what kind of error a rank raised: torch has no classes for most of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rpcprops.oracle.prediction import ErrorClass
from rpcprops.outcomes import RaisedError
from rpcprops.torch_facts import NEWEST, TorchFacts


def patterns(facts: TorchFacts) -> Mapping[ErrorClass, str]:
    """What the error of each class says, as a regular expression, in the order to try them.

    A remote error comes first: it quotes the error that was raised there.
    """
    texts = facts.texts
    return {
        # What our own functions raise (steps/in_rank) tells it as well.
        "remote": f"(?i:{_plain(texts.remote)}|raised on purpose|RaisedOnPurpose)",
        "creation": _plain(texts.creation),
        "injected": _plain(texts.injected),
        "timeout": f"(?i:{_plain(texts.timeout)}|{texts.timed_out})",
    }


def _plain(text: str) -> str:
    """A regular expression for `text` that stays readable in a script: ``[.]``, no backslash."""
    return re.sub(r"[.*+?(){}|$]", r"[\g<0>]", re.sub(r"[\\^\[\]]", r"\\\g<0>", text))


def error_class(error: RaisedError | None, facts: TorchFacts = NEWEST) -> ErrorClass:
    """The class of an error, "" for none, "unknown" for one that is none of these."""
    if error is None:
        return ""
    if error.type == "MissingHandleError":
        return "missing"
    for name, text in patterns(facts).items():
        if re.search(text, error.message):
            return name
    return "unknown"


def is_expected(expected: ErrorClass, seen: RaisedError | None, facts: TorchFacts = NEWEST) -> bool:
    """Whether a step that had to end with `expected` may end as `seen` shows."""
    if expected == "unknown":
        return error_class(seen, facts) != "unknown"
    return error_class(seen, facts) == expected


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
