"""Worlds that a program has left as it found them, kept for the next program.

Only :mod:`rpcprops.cluster._staying` puts a world here, once it has proved that. The servers own
the worlds, and end them when they end themselves.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from rpcprops.agents.wire import Ledger
from rpcprops.cluster import _wire
from rpcprops.cluster._peer import Peer
from rpcprops.faults import FaultPlan
from rpcprops.programs import Program

#: The most worlds that are kept, and the most ranks of all of them.
MOST_WORLDS = 4
MOST_RANKS = 16
#: How many programs run in one world. What grows a little with each of them stays small.
MOST_PROGRAMS = 200


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a kept world, and what connects this process with it.

    Attributes:
        log: the memory file that is its stdout and stderr.
    """

    pid: int
    name: str
    sock: socket.socket
    log: int


@dataclass
class KeptWorld:
    """A world that waits for its next program.

    Attributes:
        key: what a program must want, to run here.
        number: the number that its server knows it by.
        asked: the numbers of what its ranks are asked go on from here.
        ran: the programs that ran here, with their plans, the oldest first.
        programs: how many ran here; each cluster of a user is one.
    """

    key: Hashable
    peer: Peer
    number: int
    members: tuple[Member, ...]
    ledger: Ledger
    asked: Iterator[int]
    ran: list[tuple[Program, FaultPlan]] = field(default_factory=list)
    programs: int = 0

    def lives(self) -> bool:
        """Whether its server lives, and no rank has ended."""
        return not self.peer.is_gone() and not any(
            member.pid in self.peer.ended for member in self.members
        )

    def end(self) -> None:
        """Have its ranks killed, and close what connects this process with them."""
        with contextlib.suppress(OSError):
            _wire.send(self.peer.sock, ("kill", self.number))
        self.peer.clusters -= 1
        for member in self.members:
            member.sock.close()
            os.close(member.log)
        self.ledger.close()


class KeptWorlds:
    """The kept worlds of one fork server: few, and the one that was not used longest ends first."""

    def __init__(self) -> None:
        self._worlds: OrderedDict[Hashable, KeptWorld] = OrderedDict()

    def __len__(self) -> int:
        return len(self._worlds)

    def take(self, key: Hashable) -> KeptWorld | None:
        """The world for that key, which is kept no longer; None if there is none that lives."""
        world = self._worlds.pop(key, None)
        if world is not None and not world.lives():
            world.end()
            return None
        return world

    def put(self, world: KeptWorld) -> None:
        """Keep a world; another one may have to end."""
        if world.programs >= MOST_PROGRAMS:
            world.end()
            return
        before = self._worlds.pop(world.key, None)
        if before is not None:
            before.end()
        self._worlds[world.key] = world
        while len(self._worlds) > 1 and (
            len(self._worlds) > MOST_WORLDS
            or sum(len(one.members) for one in self._worlds.values()) > MOST_RANKS
        ):
            _, oldest = self._worlds.popitem(last=False)
            oldest.end()

    def close(self) -> None:
        """End all of them."""
        while self._worlds:
            self._worlds.popitem()[1].end()
