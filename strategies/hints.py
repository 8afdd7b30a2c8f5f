"""What a test was seen to send, for the strategies of faults: they then draw those faults more.

A hint changes how likely a choice is, and never what it means. Each choice among types, ranks and
delays is one integer, drawn by Hypothesis with weights; the integer alone decides what is drawn.
So a blob, an entry of the example database, another shard and the shrinker all give the same value
whatever hint is known there, or none. What a seed draws does depend on the hint, so a hint says
which types a rank sends and not how often, which may differ from run to run.

A hint must stay the same while Hypothesis runs one test, because Hypothesis refuses a strategy
whose weights change (``FlakyStrategyDefinition``). So it is made before, from one run of the
simplest example, and set around the whole test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from rpcprops.faults import MessageType


class Hint:
    """Which message types each rank sends.

    Attributes:
        sends: the types by rank; empty where nothing is known.
        asked: whether a strategy has used this hint since it was set.
    """

    def __init__(self, sends: Mapping[int, frozenset[MessageType]] | None = None) -> None:
        self.sends = {rank: kinds for rank, kinds in (sends or {}).items() if kinds}
        self.asked = False


_HINT: ContextVar[Hint | None] = ContextVar("rpcprops_hint", default=None)
_RANK: ContextVar[int | None] = ContextVar("rpcprops_hint_rank", default=None)


@contextlib.contextmanager
def known(hint: Hint) -> Iterator[Hint]:
    """In the block, strategies draw by this hint."""
    token = _HINT.set(hint)
    try:
        yield hint
    finally:
        _HINT.reset(token)


@contextlib.contextmanager
def at_rank(rank: int) -> Iterator[None]:
    """In the block, faults are drawn for that rank."""
    token = _RANK.set(rank)
    try:
        yield
    finally:
        _RANK.reset(token)


def _sends() -> Mapping[int, frozenset[MessageType]]:
    hint = _HINT.get()
    if hint is None:
        return {}
    hint.asked = True
    return hint.sends


def sent_types() -> frozenset[MessageType]:
    """The types that the rank sends for which faults are drawn, or any rank; empty if unknown."""
    sends = _sends()
    rank = _RANK.get()
    if rank is not None:
        return sends.get(rank, frozenset())
    return frozenset().union(*sends.values())


def types_by_rank(world_size: int) -> tuple[int, ...]:
    """How many types each rank sends; all zeros if unknown."""
    sends = _sends()
    return tuple(len(sends.get(rank, ())) for rank in range(world_size))
