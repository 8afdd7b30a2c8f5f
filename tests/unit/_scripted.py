"""A function that a script can hold, and functions that none can."""

from __future__ import annotations

from itertools import repeat as again

import hypothesis

from rpcprops.errors import text_of as said
from rpcprops.steps.in_rank.state import note_call

#: A table of this module.
FACTOR = {"two": 2.0}


def doubled(value: float) -> float:
    """Twice a number."""
    return FACTOR["two"] * value


def toy(call: str, world: tuple[str, ...], *, seconds: float, handle: str) -> list[float]:
    """Give a number for each of two ranks, whatever the world and the handle."""
    note_call(call)
    return [doubled(part) for part in again(seconds, 2)]


def uses_an_alias() -> str:
    """Needs a function of ours under another name."""
    return said(ValueError("x"))


def uses_a_module() -> str:
    """Needs a module that is neither torch's nor the standard library's."""
    return str(hypothesis.__version__)


def imports_inside() -> str:
    """Imports a function of ours where no script looks for it."""
    from rpcprops.errors import text_of

    return text_of(ValueError("x"))


def uses_what_is_nowhere() -> str:
    """Needs what its module does not have."""
    return str(nowhere)  # type: ignore[name-defined]  # noqa: F821  # pyright: ignore


def handle_of() -> None:
    """Has the name of a function of ours."""
