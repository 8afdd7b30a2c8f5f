"""Module servers: children of the fork server that have imported the modules of a test.

There is one for each set of modules. It forks the ranks of the clusters that need that set.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from rpcprops.cluster import finder, stacks
from rpcprops.cluster._peer import Peer
from rpcprops.cluster.fork_server import START_SECONDS, ForkServer
from rpcprops.errors import HarnessError, MachineCannot, UsageError

#: How many module servers are kept for later clusters of the same test module.
_MOST = 8


class ModuleServers:
    """The module servers of one fork server."""

    def __init__(self, root: ForkServer) -> None:
        self._root = root
        self._known: dict[finder.ModuleMap, tuple[Peer, finder.ModuleMap | None]] = {}

    @property
    def peers(self) -> list[Peer]:
        """Their sockets."""
        return [peer for peer, in_ranks in self._known.values() if in_ranks is None]

    def peer_for(self, first: Sequence[str]) -> tuple[Peer, finder.ModuleMap | None]:
        """The server that forks ranks with these modules, and what ranks import by themselves."""
        root = self._root.peer()
        modules = finder.describe_modules(first)
        if not modules.first:
            # There are no user modules to import. Ranks still find functions that are sent by name.
            return root, modules
        for known, (peer, in_ranks) in self._known.items():
            if known.covers(modules) and not peer.is_gone():
                return peer, in_ranks
        self._note_deaths()
        self._close_idle()
        peer = Peer.on(self._root.ask(("modules", modules)))
        try:
            return self._take(peer, modules)
        except BaseException:
            peer.close()
            raise

    def _take(self, peer: Peer, modules: finder.ModuleMap) -> tuple[Peer, finder.ModuleMap | None]:
        """As :meth:`peer_for`, once the module server has been asked for."""
        hello = peer.wait_hello(START_SECONDS)
        names = ", ".join(modules.first)
        if 0 in peer.refused:
            msg = f"could not fork the process that imports {names} for the ranks: "
            raise MachineCannot(msg + peer.refused[0])
        if hello is None and not peer.reader.closed:
            msg = f"importing {names} for the ranks took more than {START_SECONDS:g} s."
            raise UsageError(msg)
        if hello is None:
            end = self._describe_end_of(peer)
            if not end:
                raise self.died()
            msg = f"the process that imports {names} for the ranks has died: {end}."
            raise HarnessError(msg)
        if hello.error:
            msg = (
                f"importing {names} for the ranks failed. Ranks import the module of the test "
                f"under its own name, outside pytest:\n"
                f"{stacks.short_traceback(hello.error)}"
            )
            raise UsageError(msg)
        in_ranks = None
        if hello.unsafe:
            peer.close()
            note = (
                f"importing {names} {hello.unsafe}, which no fork survives, so each rank imports "
                f"it anew (slower); move that into a function."
            )
            warnings.warn(f"rpcprops: {note}", stacklevel=6)
            peer, in_ranks = self._root.peer(), modules
        self._known[modules] = (peer, in_ranks)
        return peer, in_ranks

    def died(self) -> HarnessError:
        """The error that says which server died and how, and what the fork server wrote last."""
        self._note_deaths()
        return self._root.died()

    def _note_deaths(self) -> None:
        """Drop servers that have died, and keep how they died for clusters that still use them."""
        dead = {
            modules: peer
            for modules, (peer, in_ranks) in self._known.items()
            if in_ranks is None and peer.is_gone()
        }
        for modules, peer in dead.items():
            end = self._describe_end_of(peer)
            del self._known[modules]
            peer.close()
            if end:
                names = ", ".join(modules.first)
                self._root.note_death(f"the fork server has died that imports {names}: {end}.")

    def _describe_end_of(self, peer: Peer) -> str:
        (pid,) = peer.forked.get(0, [0])
        return self._root.end_of_child(pid)

    def _close_idle(self) -> None:
        idle = [key for key, (peer, _) in self._known.items() if not peer.clusters]
        for key in idle[: max(0, len(self._known) - _MOST + 1)]:
            peer, in_ranks = self._known.pop(key)
            if in_ranks is None:
                peer.close()

    def close(self) -> None:
        """Let all module servers go."""
        for peer in self.peers:
            peer.close()
        self._known.clear()
