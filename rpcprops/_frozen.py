"""An immutable mapping with an order and a hash, for data that Hypothesis and JSON both handle."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@functools.total_ordering
class FrozenMap(Mapping[K, V]):
    """A mapping that never changes, iterates in the order of its keys, and prints as a dict.

    Two maps are equal when they hold the same items; they compare as their sorted items do.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        given: Mapping[Any, V] = {} if items is None else items
        self._items: dict[K, V] = {key: given[key] for key in sorted(given)}

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __lt__(self, other: FrozenMap[K, V]) -> bool:
        return tuple(self._items.items()) < tuple(other._items.items())

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[FrozenMap[K, V]], tuple[dict[K, V]]]:
        return FrozenMap, (dict(self._items),)
