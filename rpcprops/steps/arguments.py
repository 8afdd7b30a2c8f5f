"""The sum that a called function computes: of two values, or of a value and a handle's value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY
from rpcprops.steps.base import Argument, Flavour, Value

if TYPE_CHECKING:
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

FLAVOURS: tuple[Flavour, ...] = ("python", "builtin", "script")
#: Flavours whose result has a type that TorchScript knows.
TYPED = FLAVOURS[1:]

# Small whole numbers, so that sums and products are exact; a step's default comes first.
PAIRS: tuple[tuple[Value, Value], ...] = (
    ((1.0,), (2.0,)),
    ((0.0,), (0.0,)),
    ((3.0,), (-1.0,)),
    ((1.0, 2.0), (3.0, 4.0)),
    ((0.0, -2.0, 5.0), (1.0, 0.0, -1.0)),
)
_ADDED: dict[int, tuple[Value, ...]] = {
    1: ((1.0,), (0.0,), (-2.0,)),
    2: ((1.0, 2.0), (0.0, -1.0)),
    3: ((1.0, 2.0, 3.0), (0.0, -2.0, 1.0)),
}
#: The values for training steps.
TENSORS: tuple[Value, ...] = ((1.0, 2.0), (1.0,), (0.0,), (3.0, -1.0), (2.0, 0.0, -2.0))


def sum_of(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """``left + right``, element by element."""
    return [a + b for a, b in zip(left, right, strict=True)]


def check_arguments(
    scope: Scope, at: int, left: Value, right: Argument, flavour: Flavour = "python"
) -> None:
    """Raises:
    UsageError: `right` is a handle that is not at `at`, or that such a function cannot take; or
        the two lengths differ.
    """
    size = len(right)
    if isinstance(right, str):
        size = scope.alive(at, right).size
        if flavour != "python":
            msg = f"only a Python function takes a handle as an argument, not a {flavour} one."
            raise UsageError(msg)
    if len(left) != size:
        msg = (
            f"left={shown(left)} and right={shown(right)} hold {len(left)} and {size} "
            f"numbers; give both the same length."
        )
        raise UsageError(msg)


def check_raises(flavour: Flavour, allowed: tuple[Flavour, ...]) -> None:
    """Raises:
    UsageError: a function of this flavour cannot raise in this step.
    """
    if flavour not in allowed:
        listed = " or ".join(map(repr, allowed))
        msg = f"raises=True needs flavour {listed}, not {shown(flavour)}."
        raise UsageError(msg)


def check_seconds(seconds: float, flavour: Flavour = "python") -> None:
    """Raises:
    UsageError: a function of this flavour cannot sleep that long (virtual seconds).
    """
    if not 0 <= seconds <= MAX_DELAY:
        msg = f"seconds={shown(seconds)} must lie in 0 to {MAX_DELAY:g} (virtual)."
        raise UsageError(msg)
    if seconds and flavour != "python":
        msg = f"seconds={shown(seconds)} needs flavour 'python', not {shown(flavour)}."
        raise UsageError(msg)


def draw_arguments(
    drawer: StepDrawer,
    at: int,
    flavour: Flavour,
    to: int | None = None,
    also: Sequence[str] = (),
) -> tuple[Value, Any]:
    """Two values of the same length; the second may be a handle of `at`, which `to` fetches.

    `also` are further handles that it may be.
    """
    takes = flavour == "python" and drawer.may_wait()
    names = [*drawer.fetchable_there(at, to), *also] if takes else []
    right = drawer.recall_or_none(names)
    if right is None:
        return drawer.pick(PAIRS)
    return drawer.pick(_ADDED[drawer.scope.handles[right].size]), right
