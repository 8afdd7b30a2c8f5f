"""The members of a dynamic group, as torch documents them and as stock torch has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rpcprops.steps.base import rank_name


class Owned(Protocol):
    """An RRef, as far as it matters here: its owner, and the forks that the owner knows."""

    owner: int
    forks: set[str]


@dataclass(slots=True)
class Group:
    """The state of a dynamic group.

    Attributes:
        inits: how often each rank has called ``init_rpc``.
        joined: each member, with the number by which torch tells its group from others: how often
            it had called ``init_rpc`` before (0 on a torch that does not count that).
        stuck: such numbers under which a join was refused.
        kept: the forks that members held when they left, each with its RRef.
        dashed: ranks whose name has a dash.
        gone: members that have left without telling the others.
        told: how often a rank has called another one, or itself, to join or to leave; not inside a
            profiler, where this is another message.
    """

    inits: Counter[int] = field(default_factory=Counter)
    joined: dict[int, int] = field(default_factory=dict)
    stuck: set[int] = field(default_factory=set)
    kept: list[tuple[Owned, str]] = field(default_factory=list)
    dashed: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    told: Counter[tuple[int, int]] = field(default_factory=Counter)

    def name_of(self, rank: int) -> str:
        """The name of a rank."""
        return rank_name(rank, dash=rank in self.dashed)

    @property
    def members(self) -> list[int]:
        """The members, in order."""
        return sorted(self.joined)

    def known_to(self, rank: int) -> list[int]:
        """The members that a member finds in stock torch: those with its number."""
        return [one for one in self.members if self.joined[one] == self.joined[rank]]

    def called_to_join(self, rank: int) -> list[int]:
        """A new member asks the others for their devices, and then tells all, itself included.

        ``backend_registry.py``: _set_devices_and_reverse_device_map.
        """
        return [one for one in self.known_to(rank) for _ in range(1 + (one != rank))]

    def called_to_leave(self, rank: int) -> list[int]:
        """A member that leaves tells the others (``api.py``: shutdown)."""
        return [one for one in self.known_to(rank) if one != rank]

    def with_kept(self, rank: int, rrefs: Sequence[Owned]) -> list[int]:
        """How many values and forks a rank holds if no leaving member has deleted any."""
        held = [0, 0]
        for rref in rrefs:
            forks = rref.forks | {fork for of, fork in self.kept if of is rref}
            if rref.owner == rank and forks:
                held[0] += 1
                held[1] += len(forks)
        return held
