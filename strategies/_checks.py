"""Checks of what strategies are called with: made at the call, where the caller's line is shown."""

from __future__ import annotations

from collections.abc import Set

from rpcprops._given import argument, items
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, message_type

#: Where an iterable without an end is let go: above all that any argument may name.
_MAX_ITEMS = 10_000


def first_items(name: str, value: object, must_be: str) -> list[object]:
    """What `value` holds, up to a number that is above all that any argument may name.

    Raises:
        UsageError: it is no collection.
    """
    return items(name, value, _MAX_ITEMS, must_be)


def whole_number(
    value: object, name: str, *, least: int, most: int | None = None, remedy: str
) -> int:
    """`value` as an int from `least` to `most`.

    Raises:
        UsageError: it is another type (a bool is no number here), or it lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{argument(name, value)} must be an int; {remedy}."
        raise UsageError(msg)
    if value < least or (most is not None and value > most):
        span = f"from {least} up" if most is None else f"in {least} to {most}"
        msg = f"{argument(name, value)} must be {span}; {remedy}."
        raise UsageError(msg)
    return int(value)


def distinct_types(value: object, name: str) -> tuple[MessageType, ...]:
    """The message types in `value`, each once, in the order given (a set's are sorted).

    Raises:
        UsageError: it is no collection, or holds what is no message type.
    """
    must_be = f"a collection of message types; write {name}=('RREF_USER_DELETE',) for a single one"
    given = first_items(name, value, must_be)
    try:
        kinds = [message_type(item) for item in given]
    except UsageError as error:
        msg = f"{argument(name, value)}: {error}"
        raise UsageError(msg) from None
    if isinstance(value, Set):
        # A set's own order changes from process to process, and with it what a seed draws.
        kinds.sort()
    return tuple(dict.fromkeys(kinds))
