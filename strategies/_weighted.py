"""Whole numbers that come by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis.strategies import SearchStrategy

#: The part of all draws that has no weight, so that each number comes.
_UNWEIGHTED = 0.1
#: Hypothesis takes no more weights for one integer.
_MOST = 255


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
