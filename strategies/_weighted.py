"""Whole numbers: below a bound, several at once, and by weight.

These are strategies of our own, because those of Hypothesis do more for each draw: they are made
anew, validated and unwrapped, which takes longer than the draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis.strategies import SearchStrategy

#: The part of all draws that has no weight, so that each number comes.
_UNWEIGHTED = 0.1
#: Hypothesis takes no more weights for one integer.
_MOST = 255


class Below(SearchStrategy[int]):
    """A whole number from 0 to `number` - 1; shrinks to 0."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._most = number - 1

    def __repr__(self) -> str:
        return f"below({self._most + 1})"

    def do_draw(self, data: Any) -> int:
        """Draw one."""
        return int(data.draw_integer(0, self._most))


class Unused(SearchStrategy[int]):
    """So many numbers that nothing depends on, each as ``Below(2)`` draws it; gives their count."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def __repr__(self) -> str:
        return f"unused({self._number})"

    def do_draw(self, data: Any) -> int:
        """Draw all of them."""
        for _ in range(self._number):
            data.draw_integer(0, 1)
        return self._number


class Shared(SearchStrategy[int]):
    """A whole number from 0 to `number` - 1, some of them with a share of all draws; shrinks to 0.

    Args:
        shares: by number, which part of all draws it is, apart from the rest. That rest, of which
            there must be one, is spread over all numbers.
    """

    def __init__(self, number: int, shares: Mapping[int, float]) -> None:
        super().__init__()
        self._most = number - 1
        self._weights = dict(shares) or None

    def __repr__(self) -> str:
        return f"shared({self._most + 1})"

    def do_draw(self, data: Any) -> int:
        """Draw one."""
        return int(data.draw_integer(0, self._most, weights=self._weights))


class Weighted(SearchStrategy[int]):
    """A whole number from `least` to `most`; shrinks to `least`.

    Hypothesis has no public strategy with weights, but its own strategies draw integers like this.
    Weights only change what is generated: a choice that is replayed is taken as it is.

    Args:
        weights: positive numbers, by what they weigh; the rest comes as often as any other. Of
            more than 255, the lightest come as often as the heaviest of them.
    """

    def __init__(self, least: int, most: int, weights: Mapping[int, float]) -> None:
        super().__init__()
        self._bounds = (least, most)
        total = sum(weights.values())
        ranked = sorted(weights.values(), reverse=True)
        common = ranked[_MOST] if len(ranked) > _MOST else 0.0
        self._weights = {
            value: (1 - _UNWEIGHTED) * (weight - common) / total
            for value, weight in weights.items()
            if weight > common
        } or None

    def __repr__(self) -> str:
        least, most = self._bounds
        return f"weighted({least}, {most})"

    def do_draw(self, data: Any) -> int:
        """Draw one."""
        least, most = self._bounds
        return int(data.draw_integer(least, most, weights=self._weights))
