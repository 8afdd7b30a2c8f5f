"""The ranks of one world: forks them, reads what they and their server send, kills them.

No thread runs here. Any wait reads what has arrived from every rank, so answers may come in any
order. Other modules decide whether what happens is right.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from dataclasses import replace

from rpcprops import agents
from rpcprops.agents.wire import Ledger
from rpcprops.cluster import _wire
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._kept import KeptWorld, Member
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._phases import Phase, Phases
from rpcprops.cluster._spec import WorldSpec
from rpcprops.cluster.finder import TRAINING
from rpcprops.cluster.logs import RankLog
from rpcprops.cluster.options import WorldOptions
from rpcprops.cluster.servers import Servers
from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Counters, SentMessage
from rpcprops.programs import Program

#: How many bytes of a log are read before the channels are looked at again.
_LOG_PIECE = 32 << 20
#: A log that has grown by `_LOUD` bytes is read again after the first number of real seconds here,
#: another log after the second.
_LOUD = 1 << 20
_LOUD_SECONDS = 0.02
_QUIET_SECONDS = 0.1
#: Real seconds that a server needs at most to kill the ranks of a world.
_KILL_SECONDS = 10.0
#: Real seconds between two glances at a ledger.
_LEDGER_SECONDS = 0.0002
_NO_FAULTS = FaultPlan()
#: Real seconds within which the ranks of a kept world begin with another program.
_RESUME_SECONDS = 5.0


class Ranks:
    """The ranks of one world.

    Attributes:
        channels: one for each rank, in order, from the fork on; they stay when the ranks are gone.
        peer: the server that forks the ranks; None before that, and after they were let go.
        runs_users_code: see :class:`WorldSpec`.
        ledger: the messages of this world, if its agent writes them down.
        origin_ns: the real instant at which the world began, or was taken for this program.
        kept: the kept world that these ranks are of; None for new ranks.
        released: kept values whose handles are gone, by rank and number; sent with the next
            message.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        send_seconds: float,
        on_output: Callable[[str], Callable[[bytes], None]] | None = None,
    ) -> None:
        self.channels: list[Channel] = []
        self.peer: Peer | None = None
        self.runs_users_code = False
        self.ledger: Ledger | None = None
        self.origin_ns = 0
        self.kept: KeptWorld | None = None
        self.released: deque[tuple[int, int]] = deque()
        self._servers = servers
        self._send_seconds = send_seconds
        self._on_output = on_output
        self._world = 0  # the server's number for this world, once the server was asked for one
        self._numbers: Iterator[int] = itertools.count(1)
        #: What the clocks of the ranks showed at `origin_ns`, if that is not the same.
        self._virtual_ns: int | None = None

    # Their life.

    def fork(
        self,
        options: WorldOptions,
        first: Sequence[str],
        phases: Phases,
        seconds: float,
        *,
        runs_users_code: bool,
        may_stay: bool = False,
    ) -> None:
        """Have the ranks forked. They import the modules `first` and then join their world.

        Args:
            runs_users_code, may_stay: see :class:`WorldSpec`.

        Raises:
            HarnessError: the server has died, or does not fork them in time.
            MachineCannot: a rank cannot be forked.
        """
        self.runs_users_code = runs_users_code
        agent = agents.named(options.agent)
        agent.prepare()
        self.peer, in_ranks = self._servers.peer_for(first)
        self.peer.clusters += 1
        with phases.open("start", seconds) as phase:
            with (
                self._open_channels(options.names, with_ledger=agent.has_ledger) as theirs,
                self._servers.new_network(options.network) as networks,
            ):
                self.origin_ns = time.monotonic_ns()
                ledgers = [] if self.ledger is None else [self.ledger.fd]
                spec = WorldSpec(
                    **vars(options),
                    origin_ns=self.origin_ns,
                    networks=len(networks),
                    ledgers=len(ledgers),
                    import_in_ranks=in_ranks,
                    runs_users_code=runs_users_code,
                    may_stay=may_stay,
                )
                self._world = self._servers.next_world()
                logs = [channel.log.fd for channel in self.channels]
                descriptors = [*theirs, *logs, *networks, *ledgers]
                try:
                    _wire.send(self.peer.sock, ("fork", self._world, spec), descriptors)
                except OSError:
                    raise self._servers.died() from None
            self._wait_until_forked(self.peer, phase)

    # Their life in a kept world.

    @staticmethod
    def key_of(options: WorldOptions, first: Sequence[str]) -> Hashable:
        """What two programs must have in common, to run in one world after each other.

        All modules of our own steps but one are in every rank.
        """
        own = {name for name in first if name == TRAINING or not name.startswith("rpcprops.")}
        return frozenset(own), replace(options, plan=_NO_FAULTS)

    def resume(
        self, options: WorldOptions, first: Sequence[str], phases: Phases, *, runs_users_code: bool
    ) -> bool:
        """Take a kept world for one more program; whether there is one whose ranks answer."""
        self.runs_users_code = runs_users_code
        kept = self._servers.kept.take(self.key_of(options, first))
        if kept is None:
            return False
        self.kept, self.peer, self.ledger = kept, kept.peer, kept.ledger
        self._world, self._numbers = kept.number, kept.asked
        with phases.open("start", _RESUME_SECONDS) as phase:
            for rank, member in enumerate(kept.members):
                log = RankLog(member.name, fd=member.log)
                log.on_piece = self._on_output(member.name) if self._on_output else None
                channel = Channel(rank, member.name, member.sock, log, pid=member.pid)
                self.channels.append(channel)
            self.ledger.clear()
            number = self.send_to_all("begin", options.plan)
            while self.without_answer(number) and phase.left() > 0:
                if self.peer.reader.closed or any(channel.lost for channel in self.channels):
                    break
                self.pump(phase.left())
            if self.without_answer(number):
                self.kill()
                self.forget()
                return False
            for channel in self.channels:
                _, (now, processor) = channel.answers.pop(number)
                channel.processor_before = processor
                self._virtual_ns = now if self._virtual_ns is None else min(now, self._virtual_ns)
            self.origin_ns = time.monotonic_ns()
        return True

    def keep(self, options: WorldOptions, first: Sequence[str], ran: Program | None) -> None:
        """Let the servers keep this world for the next program. Its ranks must be as they were.

        Args:
            ran: the program that ran in it; None if it was a user's code.
        """
        assert self.peer is not None
        assert self.ledger is not None
        kept = self.kept or KeptWorld(
            self.key_of(options, first),
            self.peer,
            self._world,
            tuple(Member(c.pid, c.name, c.sock, c.log.fd) for c in self.channels),
            self.ledger,
            self._numbers,
        )
        if ran is not None:
            kept.ran.append((ran, options.plan))
        kept.programs += 1
        self.send_to_all("idle")
        for channel in self.channels:
            channel.log.close(keep_open=True)
        self.peer = self.ledger = None
        self._servers.kept.put(kept)

    @property
    def are_silent(self) -> bool:
        """Whether nothing is on its way between this process and them."""
        return all(channel.is_silent_and_empty for channel in self.channels)

    def messages(self) -> tuple[SentMessage, ...]:
        """The messages that the ranks have sent for this program."""
        if self.ledger is None:
            return ()
        return self.ledger.messages(self.origin_ns, self._virtual_ns)

    @property
    def messages_given(self) -> int:
        """How many messages the ledger shows so far; 0 where there is none."""
        return 0 if self.ledger is None else self.ledger.count

    @property
    def know_of_no_retry(self) -> bool:
        """Whether the ledger shows that torch sends no message again; without one nobody knows."""
        return self.ledger is not None and not self.ledger.may_send_again()

    @property
    def awaits_message(self) -> bool:
        """Whether the ledger shows a message that a fault delays or holds and that has to come."""
        return self.ledger is not None and self.ledger.may_come_late()

    @property
    def were_at_rest(self) -> bool:
        """Whether the last look at each rank saw what nothing can change any more.

        Since the first of those looks no message was sent, in any rank. At each look the agent did
        nothing that could send one or change what the rank holds, and waited for none. It counts a
        request that it has sent until the callbacks of the response have run
        (``tensorpipe_agent.cpp: TensorPipeAgent::markFutureAsComplete``), so no message was on its
        way but those that :meth:`Ledger.leaves_nothing` excludes. A user's own threads could still
        do something: then nobody knows.
        """
        ledger = self.ledger
        return (
            ledger is not None
            and not self.runs_users_code
            and not any(channel.busy or channel.sent is None for channel in self.channels)
            and ledger.leaves_nothing()
            and all(channel.sent == ledger.count for channel in self.channels)
        )

    def wait_for_retries(self, seconds: float) -> None:
        """Wait while the ledger shows that torch may send a message again, for so long at most."""
        until = time.monotonic() + seconds
        while self.ledger is not None and time.monotonic() < until:
            changes = self.ledger.changes
            if not self.ledger.may_send_again():
                return
            while self.ledger.changes == changes and time.monotonic() < until:
                time.sleep(_LEDGER_SECONDS)

    @contextlib.contextmanager
    def _open_channels(self, names: Sequence[str], *, with_ledger: bool) -> Iterator[list[int]]:
        """Make a channel for each rank; yields the descriptors of the store and the ranks' ends.

        Raises:
            MachineCannot: this process has no descriptors left for them.
        """
        with contextlib.ExitStack() as stack:
            try:
                theirs = [os.memfd_create("rpcprops-store")]
                stack.callback(os.close, theirs[0])
                if with_ledger:
                    self.ledger = Ledger()  # `let_go` closes it
                for rank, name in enumerate(names):
                    ours, other = socket.socketpair()
                    stack.callback(other.close)
                    theirs.append(other.fileno())
                    # Once a channel exists, `let_go` closes it.
                    with contextlib.ExitStack() as unfinished:
                        unfinished.callback(ours.close)
                        # A timeout that the user set by socket.setdefaulttimeout must not apply.
                        other.setblocking(True)
                        log = RankLog(f"rpcprops-{name}")
                        log.on_piece = self._on_output(name) if self._on_output else None
                        self.channels.append(Channel(rank, name, ours, log))
                        unfinished.pop_all()
            except OSError as error:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                msg = (
                    f"a cluster of {len(names)} ranks needs {3 * len(names) + 1} file "
                    f"descriptors in this process, which may have {limit}: {error}. Raise that "
                    f"limit (ulimit -n 4096), or close files that are not needed."
                )
                raise MachineCannot(msg) from error
            yield theirs

    def _wait_until_forked(self, peer: Peer, phase: Phase) -> None:
        while not self._take_pids():
            if self._world in peer.refused:
                why = peer.refused.pop(self._world)
                self._world = 0  # The server has killed whatever it had forked of this world.
                raise MachineCannot(why)
            if peer.reader.closed:
                raise self._servers.died()
            self.pump(phase.left())
            if phase.left() <= 0:
                msg = f"the fork server did not fork {len(self.channels)} ranks in time."
                raise HarnessError(msg)

    def _take_pids(self) -> bool:
        """Whether the ranks are forked. If so, they now have their process numbers."""
        if self.peer is not None and self._world in self.peer.forked:
            for channel, pid in zip(self.channels, self.peer.forked.pop(self._world), strict=True):
                channel.pid = pid
        return all(channel.pid for channel in self.channels)

    def ask_for_preforked(self) -> None:
        """Let the server pre-fork ranks for the next world: these ranks only have to exit now."""
        if self.peer is not None:
            with contextlib.suppress(OSError):
                _wire.send(self.peer.sock, ("preforked", len(self.channels)))

    def ask_for_stacks(self, channels: Sequence[Channel]) -> None:
        """Have ranks write their stacks into their logs; one without a handler for that ends."""
        if self.peer is not None:
            with contextlib.suppress(OSError):
                _wire.send(self.peer.sock, ("stacks", [c.pid for c in channels]))

    def kill(self) -> None:
        """Kill every rank that still lives, and read what they said before."""
        alive = self.alive()
        if alive and self.peer is not None and self._world:
            for channel in alive:
                channel.killed = True
            # Kill by the world's number: a slow server first forks the world, then kills it.
            with contextlib.suppress(OSError):
                _wire.send(self.peer.sock, ("kill", self._world))
            deadline = time.monotonic() + _KILL_SECONDS
            while any(c.status is None for c in alive) and time.monotonic() < deadline:
                if self.peer.reader.closed or self._world in self.peer.refused:
                    break
                self.pump(0.2)
                self._take_pids()
        with contextlib.suppress(OSError, HarnessError):
            self.pump(0.0)

    def let_go(self) -> None:
        """Close what connects this process with the ranks."""
        if self.peer is not None:
            self.peer.clusters -= 1
            self.peer = None
        for channel in self.channels:
            channel.sock.close()
            channel.log.close()
        if self.ledger is not None:
            self.ledger.close()
            self.ledger = None

    def forget(self) -> None:
        """Let the ranks go, and return to the state before :meth:`fork`."""
        self.let_go()
        self.channels.clear()
        self._world = 0
        self._numbers = itertools.count(1)
        self._virtual_ns = self.kept = None

    def has_lost_server(self) -> bool:
        """Whether a server above the ranks has died."""
        return self._servers.root.is_gone or (self.peer is not None and self.peer.is_gone())

    # What goes out and comes in.

    def send(self, channel: Channel, kind: str, *rest: object) -> int:
        """Send one rank a message; return the number that its answer will have."""
        self._send_releases()
        number = next(self._numbers)
        channel.send((kind, number, *rest), self._send_seconds)
        return number

    def send_many(self, channel: Channel, kind: str, what: Sized, *rest: object) -> range:
        """As :meth:`send`, where each thing of `what` has an answer; return their numbers."""
        self._send_releases()
        first = next(self._numbers)
        numbers = range(first, first + len(what))
        for _ in numbers[1:]:
            next(self._numbers)
        channel.send((kind, first, what, *rest), self._send_seconds)
        return numbers

    def send_to_all(self, kind: str, *rest: object) -> int:
        """As :meth:`send`, to every rank; all their answers have the same number."""
        self._send_releases()
        number = next(self._numbers)
        packed = _wire.pack((kind, number, *rest))
        for channel in self.channels:
            channel.send_packed(packed, self._send_seconds)
        return number

    def _send_releases(self) -> None:
        """Let the ranks drop the values whose handles are gone in this process."""
        while self.released:
            rank, number = self.released.popleft()
            self.channels[rank].writer.put(("release", number))

    def pump(self, seconds: float) -> None:
        """Read what has arrived; wait at most `seconds` real seconds for something to arrive."""
        peer = self.peer
        if peer is None:
            return
        self._send_releases()
        # Logs are read while ranks write them, so that the logs of loud ranks do not pile up.
        taken = max([channel.log.take(_LOG_PIECE) for channel in self.channels], default=0)
        if taken >= _LOG_PIECE:
            seconds = 0.0
        seconds = min(seconds, _LOUD_SECONDS if taken >= _LOUD else _QUIET_SECONDS)
        poller = select.poll()
        by_fd: dict[int, Channel] = {}
        if not peer.reader.closed:
            poller.register(peer.sock, select.POLLIN)
        for channel in self.channels:
            if not channel.reader.closed:
                by_fd[channel.sock.fileno()] = channel
                poller.register(channel.sock, channel.awaited_events())
        for fd, happened in poller.poll(max(0.0, seconds) * 1000):
            if fd in by_fd:
                by_fd[fd].handle(happened)
            else:
                peer.read()
        for channel in self.channels:
            if channel.status is None and channel.pid in peer.ended:
                channel.status, seconds = peer.ended.pop(channel.pid)
                channel.processor_seconds = seconds - channel.processor_before

    def must_be_connected(self) -> None:
        """Raise if nothing can be sent to the ranks any more; the message says why."""
        if self.peer is None or self.peer.reader.closed:
            raise self._servers.died()
        for channel in self.channels:
            channel.must_work()

    # What they are.

    def alive(self) -> list[Channel]:
        """The channels of the ranks that have not ended."""
        return [channel for channel in self.channels if channel.status is None]

    def without_answer(self, number: int) -> list[Channel]:
        """The channels of the ranks that have not sent that answer."""
        return [channel for channel in self.channels if number not in channel.answers]

    def counters(self) -> tuple[Counters, ...]:
        """What each rank held at the last look; zeros before init_rpc."""
        return tuple(channel.counters or Counters() for channel in self.channels)
