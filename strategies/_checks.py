"""Checks the arguments of strategies at the call, so that errors point at the caller's line."""

from __future__ import annotations

from collections.abc import Set

from rpcprops._given import argument, items
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, message_type
from rpcprops.torch_facts import TorchFacts, installed

#: More items than any argument may have: an endless iterable is abandoned there.
_MAX_ITEMS = 10_000


def first_items(name: str, value: object, must_be: str) -> list[object]:
    """The items of `value`, up to a number that is more than any argument may have.

    Raises:
        UsageError: it is no collection.
    """
    return items(name, value, _MAX_ITEMS, must_be)


def whole_number(
    value: object, name: str, *, least: int, most: int | None = None, remedy: str
) -> int:
    """`value` as an int from `least` to `most`.

    Raises:
        UsageError: it has another type (a bool is no number here), or is out of range.
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
        UsageError: it is no collection, or contains something that is no message type.
    """
    must_be = f"a collection of message types; write {name}=('RREF_USER_DELETE',) for a single one"
    given = first_items(name, value, must_be)
    try:
        kinds = [message_type(item) for item in given]
    except UsageError as error:
        msg = f"{argument(name, value)}: {error}"
        raise UsageError(msg) from None
    if isinstance(value, Set):
        # A set's order changes from process to process, and would change what a seed draws.
        kinds.sort()
    return tuple(dict.fromkeys(kinds))


def checked_facts(value: object) -> TorchFacts:
    """`value` as the facts of a torch; those of the installed one if it is None.

    Raises:
        UsageError: it is neither.
    """
    if value is None:
        return installed()
    if not isinstance(value, TorchFacts):
        msg = f"{argument('facts', value)} must be TorchFacts, or None for the installed torch."
        raise UsageError(msg)
    return value
