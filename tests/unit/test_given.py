"""What a caller gave, shown in messages and read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rpcprops import FaultPlan, FaultTable
from rpcprops._given import argument, is_one_of, items, shown
from rpcprops.errors import UsageError


class Unshown:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error

    def __iter__(self) -> Iterator[Any]:
        raise ArithmeticError


@pytest.mark.parametrize("error", [ValueError, SystemExit, RecursionError])
def test_a_repr_that_raises(error: type[BaseException]) -> None:
    """A value whose repr raises, or exits, is named by its class, and the message is made."""
    assert "Unshown" in shown(Unshown(error))
    with pytest.raises(UsageError, match=r"num_fail_sends=.*Unshown.*\(type Unshown\)"):
        FaultTable(["RREF_USER_DELETE"], Unshown(error))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    ["x" * 1_000_000, [0] * 1_000_000, {n: n for n in range(100_000)}, 10**5000, [10**5000]],
    ids=["text", "list", "dict", "int", "list of an int"],
)
def test_a_long_value_is_shown_shortly(value: object) -> None:
    """No value makes a message long, and no int is too long to be shown."""
    assert len(shown(value)) < 1000
    with pytest.raises(UsageError, match=r"^faults="):
        FaultPlan.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [5, "x", (1.0, "a"), {"b": 1}, 10**400, None, FaultTable()], ids=type
)
def test_other_values_are_shown_in_full(value: object) -> None:
    """What is short is shown by its repr, with its type after it."""
    assert shown(value) == repr(value)
    assert argument("a", value) == f"a={value!r} (type {type(value).__name__})"


@pytest.mark.parametrize("value", [None, 5, "text", b"x", np.array(1), Unshown(ValueError)])
def test_what_has_no_items_is_refused(value: object) -> None:
    """No iterable, text, and an iterable that raises are refused with the name of the argument."""
    with pytest.raises(UsageError, match=r"^a=.*must be a list\.$"):
        items("a", value, 3, "a list")
    assert items("a", iter(range(10)), 3, "a list") == [0, 1, 2]


def test_words_are_compared_with_words_only() -> None:
    """An array, which compares with each of its items, is no word."""
    assert is_one_of(np.str_("tcp"), ("tcp", "shm"))
    assert not is_one_of(np.array(["tcp", "shm"]), ("tcp", "shm"))
