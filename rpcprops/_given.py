"""Values that a caller gave, whatever they are: shown in messages, and read."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from rpcprops.errors import UsageError

#: Bits of the largest int that is written out.
_MAX_BITS = 1400


class _Short(reprlib.Repr):
    """A repr of bounded length, which takes bounded time for what Python itself defines."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 6
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20
        self.maxarray = self.maxdeque = 20
        self.maxstring = self.maxother = 400

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an int of more than 4300 digits.
        return repr(x) if x.bit_length() <= _MAX_BITS else f"<an int of {x.bit_length()} bits>"


_short = _Short()


def shown(value: object) -> str:
    """The repr of `value` as messages show it: cut where it is long, and why there is none."""
    try:
        return _short.repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        name = type(value).__name__
        return f"<no repr: {name}.__repr__ raised {type(error).__name__}>"


def argument(name: str, value: object) -> str:
    """`value` as messages about it begin: ``name=repr (type ...)``."""
    return f"{name}={shown(value)} (type {type(value).__name__})"


def items(name: str, value: object, most: int, must_be: str) -> list[Any]:
    """The first items of an iterable, `most` of them: it may have no end.

    Raises:
        UsageError: it is no iterable, or text, or it raises instead of giving its items.
    """
    problem: Exception | None = None
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        try:
            return list(itertools.islice(value, most))
        except Exception as error:
            problem = error
    msg = f"{argument(name, value)} must be {must_be}."
    raise UsageError(msg) from problem


def is_one_of(value: object, words: Sequence[str]) -> bool:
    """Whether `value` is one of these words; what cannot be compared is none."""
    return isinstance(value, str) and value in words


def counted(name: str, value: object, most: int) -> int:
    """`value` as an int from 0 to `most`.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        msg = f"{argument(name, value)} must be an int from 0 to {most}."
        raise UsageError(msg)
    return value
