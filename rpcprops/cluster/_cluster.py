"""A cluster: starts the ranks of one world, drives them, lets them settle, shuts them down.

No thread runs here. Whoever waits for an answer reads what has arrived on every channel of the
cluster, so answers may come in any order.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import resource
import select
import socket
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

import psutil

from rpcprops import errors
from rpcprops._given import argument, shown
from rpcprops.cluster import _functions, _limits, _wire
from rpcprops.cluster._channel import Channel, Phase, left_cleanly
from rpcprops.cluster._deadlines import Deadlines
from rpcprops.cluster._logs import RankLog
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._spec import Leaks, Network, WorldSpec
from rpcprops.errors import HarnessError, MachineCannot, UsageError, text_of
from rpcprops.faults import FaultPlan
from rpcprops.oracle._worlds import shutdown_violations, unsettled
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseName,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    StepOutcome,
    Violation,
)
from rpcprops.programs import Leaf, Program, Settle
from rpcprops.torch_facts import installed

if TYPE_CHECKING:
    from rpcprops.cluster._client import ClusterServer

P = ParamSpec("P")
R = TypeVar("R")

#: How each error of TensorPipe's ends, that of a peer that is gone among them, and the real seconds
#: in which the death of the peer is known.
_LOST_CONNECTION = installed().texts.lost_connection
_DEATH_SECONDS = 1.0
#: The same for a result that says that the run is over, which may tell of anything.
_LAST_DEATH_SECONDS = 0.3
#: A settle that is out of time tells what is held, instead of waiting for one more look.
_LAST_LOOK_SECONDS = 1.0
#: What is said of a rank that does not even answer a look, and the real seconds that one which runs
#: needs at most for that, once another has hung.
_SILENT = "does not answer the control channel"
_HANG_LOOK_SECONDS = 2.0
#: How much of a log is read before the channels are looked at again.
_LOG_PIECE = 32 << 20
#: A log that has grown by so much is read again after so many real seconds, another one later.
_LOUD = 1 << 20
_LOUD_SECONDS = 0.02
_QUIET_SECONDS = 0.1


def _check_expected(expect: Sequence[Counters] | None, world_size: int) -> tuple[Counters, ...]:
    given: Any = (Counters(),) * world_size if expect is None else expect
    if (
        not isinstance(given, Sequence)
        or len(given) != world_size
        or not all(isinstance(counters, Counters) for counters in given)
    ):
        msg = f"expect={shown(expect)} must be {world_size} Counters, one for each rank."
        raise UsageError(msg)
    return tuple(given)


def _check_keep(fn: object, keep: object) -> None:
    """Raises:
    UsageError: it is no bool, or could as well be meant for `fn`.
    """
    if not isinstance(keep, bool):
        msg = (
            f"{argument('keep', keep)} must be True or False: it says whether "
            f"the value stays in the rank. To pass a keep to the function, call "
            f"functools.partial(fn, keep=...)."
        )
        raise UsageError(msg)
    if isinstance(fn, functools.partial) and "keep" in fn.keywords:
        return
    try:
        parameter = inspect.signature(cast("Callable[..., Any]", fn)).parameters.get("keep")
    except (TypeError, ValueError):
        return  # no function, which is told later, or a builtin that does not say
    if parameter is not None and parameter.kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    ):
        msg = (
            f"keep={shown(keep)} is ambiguous: {getattr(fn, '__qualname__', fn)!r} has a parameter "
            f"keep, and so has call, where it says whether the value stays in the rank. Call "
            f"functools.partial(fn, keep=...) to pass one to the function."
        )
        raise UsageError(msg)


def _lacks(ran: Sequence[Mapping[str, int]], calls: Sequence[Mapping[str, int]]) -> bool:
    """Whether some call has not run as often as it must."""
    return any(
        seen.get(call, 0) < times
        for seen, wanted in zip(ran, calls, strict=False)
        for call, times in wanted.items()
    )


def _note_shutdown(channel: Channel, error: bytes, seen: Mapping[str, Any]) -> None:
    """Take in what a rank answered when it had shut RPC down."""
    # Of what was held up and counted, shutdown's own messages are no part.
    channel.calls = seen["calls"]
    channel.late_seconds = max(channel.late_seconds, seen["late"])
    channel.counters_after_shutdown = seen.get("after")
    if error:
        raised = _functions.load_error(error, channel.rank)
        channel.shutdown_error = RaisedError(type(raised).__name__, text_of(raised))


def _names(channels: Sequence[Channel]) -> str:
    return ", ".join(channel.name for channel in channels)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _broken_channel(channel: Channel) -> HarnessError | UsageError:
    """The user's own code in a rank can do anything to it; without such code it is our fault."""
    msg = f"the control channel of {channel.name} is broken: {channel.broken.rstrip()}"
    if not channel.ran_users_code:
        return HarnessError(msg)
    msg += (
        "\nA function that was called there has probably read, written or closed a descriptor that "
        "it had not opened, or changed what all code of the process needs (sys.modules, a trace "
        "function). If none has, rpcprops is at fault: please report it with this message."
    )
    return UsageError(msg)


class RankFuture(Generic[R]):
    """What a call in a rank will give."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._answer: tuple[str, Any] | None = None

    def done(self) -> bool:
        """Whether the answer has arrived (looks, and does not wait)."""
        if self._answer is None:
            self._channel.cluster._pump(0.0)
            self._answer = self._channel.answers.pop(self._number, None)
        return self._answer is not None

    def result(self) -> R:
        """The value, waiting for it.

        Raises:
            RankDied, RankHung: the rank did not live, or did not answer, to give one.
            RemoteError: the function raised what would end this process (SystemExit, say), or what
                cannot be pickled.
            Exception: what else the function raised in the rank.
        """
        __tracebackhide__ = True
        if not self.done():
            self._answer = self._channel.cluster._answer(self._channel, self._number)
        kind, payload = cast("tuple[str, bytes]", self._answer)
        if kind == "error":
            error = _functions.load_error(payload, self._channel.rank)
            self._channel.cluster._blame_death(error)
            raise error
        return cast("R", _functions.load_result(payload, self._channel.rank))


class RankProxy:
    """One rank of a running cluster (:meth:`Cluster.on`)."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self._cluster = cluster
        self.rank = rank

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self._cluster!r}>"

    @overload
    def call(
        self, fn: Callable[..., Any], /, *args: Any, keep: Literal[True], **kwargs: Any
    ) -> Any: ...
    @overload
    def call(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(*args, **kwargs)`` in this rank's main thread and return what it returns.

        Calls to one rank run one after the other. `fn` may be a closure. With ``keep=True`` the
        value stays in the rank, and the handle that comes back stands for it in later calls there
        (an RRef must stay: it has no meaning outside its rank). A function that has a `keep` of
        its own gets it by ``functools.partial(fn, keep=...)``.

        Raises:
            Exception: what `fn` raised, with the rank's traceback as its cause.
            RemoteError: `fn` raised what would end this process (SystemExit, say), or what cannot
                be pickled.
            RankDied, RankHung: the rank did not live, or did not answer.
        """
        __tracebackhide__ = True
        if "keep" in kwargs:
            _check_keep(fn, kwargs["keep"])
        if not kwargs.pop("keep", False):
            return self.submit(fn, *args, **kwargs).result()
        number = next(self._cluster._numbers)
        self._cluster._submit(self.rank, fn, args, kwargs, keep=number).result()
        kept = _functions.KeptValue(self.rank, number)
        # Garbage may be collected at any moment and in any thread, even in the middle of a send:
        # the release only waits here, and goes out with the cluster's next message.
        released = weakref.finalize(kept, self._cluster._released.append, (self.rank, number))
        released.atexit = False
        return kept

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> RankFuture[R]:
        """As :meth:`call`, but return a future at once."""
        return self._cluster._submit(self.rank, fn, args, kwargs)


class Cluster:
    """A world of ranks for one example; made by :meth:`ClusterServer.cluster`.

    Leaving the ``with`` block settles the ranks (unless leaks are allowed), shuts them down
    gracefully, and raises what was found. If the block raises, the ranks are killed.

    Attributes:
        outcome: what was seen, once the block has been left.
        program: what runs in it, where that is a program.
    """

    def __init__(
        self,
        server: ClusterServer,
        *,
        names: tuple[str, ...],
        plan: FaultPlan,
        rate: float,
        transport: str,
        rpc_timeout: float,
        num_worker_threads: int,
        leaks: Leaks,
        init: bool,
        deadline: float,
        network: Network,
        first: Sequence[str],
    ) -> None:
        self.server = server
        self.network: Network = network
        self.names = names
        self.plan = plan
        self.rate = rate
        self.transport = transport
        self.leaks = leaks
        self.init = init
        self.program: Program | None = None
        self._runs_to_exit = False
        self._asked_for_spares = False
        self.deadlines = Deadlines.of(plan, len(names), rate, deadline)
        self._rpc_timeout = rpc_timeout
        self._num_worker_threads = num_worker_threads
        self._first = first
        self._peer: Peer | None = None
        self._world = 0  # its number at the server, once that was asked for it
        self._channels: list[Channel] = []
        #: Values that nobody holds any more, by rank and number.
        self._released: deque[tuple[int, int]] = deque()
        self._numbers = itertools.count(1)
        self._phases: list[PhaseOutcome] = []
        self._found: list[Violation] = []
        #: The ranks that a hang may come from, those that wait for them among them.
        self._involved: list[Channel] = []
        self._log_sizes: tuple[int, ...] = ()
        self._logs_changed = 0.0
        self._over = False
        self._outcome: Outcome | None = None

    def __repr__(self) -> str:
        return f"<cluster of {self.world_size}, {self.plan!r}>"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.names)

    @property
    def outcome(self) -> Outcome:
        """What was seen: complete once the ``with`` block has been left, else so far."""
        return self._outcome or self._make_outcome()

    # Life.

    def __enter__(self) -> Cluster:
        self._must_be_new()
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        if self._found:
            self.kill()
            self._raise_found()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        try:
            if error is None and not self._found:
                self.finish()
            elif not isinstance(error, KeyboardInterrupt | SystemExit) and not self._found:
                # Whether the error means anything depends on how late the ranks were.
                with contextlib.suppress(errors.HarnessError):
                    self._look(wait=0.2)
        finally:
            self.kill()
        if error is None:
            self._raise_found()

    def finish(self) -> None:
        """Settle (unless leaks are allowed), then shut down; what is wrong is kept, not raised."""
        if self._runs_to_exit:
            return
        if self.init and self.leaks == "raise" and not self._found:
            self.settle_to(None)
        if not self._found:
            self.shutdown()

    def start(self) -> None:
        """Fork the ranks and wait until each has joined the world."""
        self._must_be_new()
        if self.server.on_start is not None:
            self.server.on_start(self)
        try:
            self._fork_and_join()
        except HarnessError:
            if not self._has_lost_server():
                raise
            # It died before a call was sent, maybe before this cluster was made: the socket of a
            # process that was killed closes some milliseconds later. Its ranks die with it.
            self._let_go_of_channels()
            self.server.replace_if_dead(self.rate)
            self._fork_and_join()

    def _fork_and_join(self) -> None:
        self._fork()
        with self._phase("start", self.deadlines.start) as phase:
            self._gather(phase, 0, "did not join the world")

    def _must_be_new(self) -> None:
        if self._peer is not None or self._over:
            msg = "a cluster runs once; make another with server.cluster(...)."
            raise UsageError(msg)

    def _fork(self) -> None:
        """Have the ranks forked.

        Raises:
            HarnessError: the server has died, or does not do it in time.
            MachineCannot: a rank cannot be forked.
        """
        peer, in_ranks, _ = self.server.peer_for(self._first)
        self._peer = peer
        peer.clusters += 1
        with self._phase("start", self.deadlines.start) as phase:
            number = next(self.server._numbers)
            with (
                self._open_channels() as theirs,
                self.server.new_network(self.network) as networks,
            ):
                spec = WorldSpec(
                    names=self.names,
                    plan=self.plan,
                    rate=self.rate,
                    origin_ns=time.monotonic_ns(),
                    transport=self.transport,
                    rpc_timeout=self._rpc_timeout,
                    num_worker_threads=self._num_worker_threads,
                    ignore_leaks=self.leaks == "allow",
                    init=self.init,
                    networks=len(networks),
                    import_in_ranks=in_ranks,
                )
                self._world = number
                try:
                    _wire.send(
                        peer.sock,
                        ("fork", number, spec),
                        [*theirs, *(c.log.fd for c in self._channels), *networks],
                    )
                except OSError:
                    raise self.server.died() from None
            while not self._take_pids():
                if number in peer.refused:
                    self._world = 0  # The server has killed what there was of it.
                    raise MachineCannot(peer.refused.pop(number))
                if peer.reader.closed:
                    raise self.server.died()
                self._pump(phase.left())
                if phase.left() <= 0:
                    msg = f"the fork server did not fork {self.world_size} ranks in time."
                    raise HarnessError(msg)

    def _has_lost_server(self) -> bool:
        return self.server.is_gone() or (self._peer is not None and self._peer.is_gone())

    def _let_go_of_channels(self) -> None:
        """As before :meth:`start`."""
        if self._peer is not None:
            self._peer.clusters -= 1
            self._peer = None
        self._world = 0
        for channel in self._channels:
            channel.sock.close()
            channel.log.close()
        self._channels.clear()

    @contextlib.contextmanager
    def _open_channels(self) -> Iterator[list[int]]:
        """Make a channel for each rank; the descriptors of the store and of the ranks' ends.

        Raises:
            MachineCannot: this process has no descriptors left for them.
        """
        with contextlib.ExitStack() as stack:
            try:
                theirs = [os.memfd_create("rpcprops-store")]
                stack.callback(os.close, theirs[0])
                for rank, name in enumerate(self.names):
                    ours, other = socket.socketpair()
                    stack.callback(other.close)
                    theirs.append(other.fileno())
                    # Once it is a channel, `kill` closes it.
                    with contextlib.ExitStack() as unfinished:
                        unfinished.callback(ours.close)
                        # What a user sets by socket.setdefaulttimeout is not for these.
                        other.setblocking(True)
                        log = RankLog(f"rpcprops-{name}")
                        self._channels.append(Channel(self, rank, name, ours, log))
                        unfinished.pop_all()
            except OSError as error:
                self.kill()
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                msg = (
                    f"a cluster of {self.world_size} ranks needs {3 * self.world_size + 1} file "
                    f"descriptors in this process, which may have {limit}: {error}. Raise that "
                    f"limit (ulimit -n 4096), or close files that are not needed."
                )
                raise MachineCannot(msg) from error
            yield theirs

    def _take_pids(self) -> bool:
        """Whether the ranks are forked; they then have their process numbers."""
        if self._peer is not None and self._world in self._peer.forked:
            for channel, pid in zip(
                self._channels, self._peer.forked.pop(self._world), strict=True
            ):
                channel.pid = pid
        return all(channel.pid for channel in self._channels)

    def kill(self) -> None:
        """Kill every rank that still lives, and let go of everything."""
        if self._over:
            return
        alive = [c for c in self._channels if c.status is None]
        if alive and self._peer is not None and self._world:
            for channel in alive:
                channel.killed = True
            # By its number: a server that was slow forks it first, and then kills it.
            with contextlib.suppress(OSError):
                _wire.send(self._peer.sock, ("kill", self._world))
            deadline = time.monotonic() + 10
            while any(c.status is None for c in alive) and time.monotonic() < deadline:
                if self._peer.reader.closed or self._world in self._peer.refused:
                    break
                self._pump(0.2)
                self._take_pids()
        with contextlib.suppress(OSError, HarnessError):
            self._pump(0.0)
        self._over = True
        if self._peer is not None:
            self._peer.clusters -= 1
        self._outcome = self._make_outcome()
        for channel in self._channels:
            channel.sock.close()
            channel.log.close()
        if self._channels and self.server.on_end is not None:
            self.server.on_end(self.plan, self._outcome)

    # What users do with it.

    def on(self, rank: int | str) -> RankProxy:
        """The rank of that number, or of that name.

        Raises:
            UsageError: there is none.
        """
        number: object = rank
        if isinstance(rank, str) and rank in self.names:
            number = self.names.index(rank)
        if isinstance(number, bool) or not isinstance(number, int):
            msg = (
                f"rank={shown(rank)} must be an int from 0 to {self.world_size - 1}, or a "
                "rank's name."
            )
            raise UsageError(msg)
        if not 0 <= number < self.world_size:
            msg = f"rank={shown(rank)} is no rank of a world of {self.world_size}."
            raise UsageError(msg)
        return RankProxy(self, number)

    def each(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Run ``fn(*args, **kwargs)`` in every rank at once; the results, by rank.

        Raises:
            Exception: what the lowest rank that raised did raise.
        """
        futures = [self._submit(rank, fn, args, kwargs) for rank in range(self.world_size)]
        return [future.result() for future in futures]

    def run_to_exit(
        self, fn: Callable[..., R], *args: Any, is_last: Callable[[R], bool]
    ) -> dict[int, R]:
        """Run ``fn(*args)`` in every rank as the last thing that it does; the results, by rank.

        A rank exits when its call has returned, whatever the others still do, as a process of its
        own would. What goes wrong (a rank that dies or does not end) is kept, and raised when the
        block is left.

        Args:
            is_last: whether a result makes those of other ranks pointless; the others are killed
                when the block is left, and the results lack them.
        """
        self._must_run()
        given: object = is_last
        if not callable(given):
            msg = f"{argument('is_last', is_last)} must be a function."
            raise UsageError(msg)
        number = next(self._numbers)
        blob = _functions.dump_call(fn, args, {})
        results: dict[int, R] = {}
        with self._phase("run", self.deadlines.run) as phase:
            self._runs_to_exit = True
            for channel in self._channels:
                self._send(channel, ("last", number, blob))
            while True:
                self._pump(min(phase.left(), 0.5))
                self._must_be_connected()
                for channel in self._channels:
                    if number not in channel.answers:
                        continue
                    kind, (payload, seen) = channel.answers.pop(number)
                    if seen is not None:
                        channel.note_look(seen)
                    if kind == "error":
                        raise _functions.load_error(payload, channel.rank)
                    result = _functions.load_result(payload, channel.rank)
                    results[channel.rank] = cast("R", result)
                    if is_last(results[channel.rank]):
                        self._look_for_deaths(phase, results, number)
                        return results
                if len(results) == self.world_size and not self._asked_for_spares:
                    self._ask_for_spares()
                if all(
                    c.status is not None and (c.rank in results or c.has_left_without(number))
                    for c in self._channels
                ):
                    self._blame_exits(phase, results, number)
                    return results
                if any(c.lost and c.rank not in results for c in self._channels):
                    # Its exit is reported by the server, a moment later; then it is found.
                    self._pump(0.2)
                    if self._blame_exits(phase, results, number):
                        return results
                if phase.left() <= 0:
                    alive = [c for c in self._channels if c.status is None]
                    self._hung(phase, alive or self._channels, "does not end")
                    return results

    def _look_for_deaths(self, phase: Phase, results: Mapping[int, Any], number: int) -> None:
        """Find a rank whose death a result may tell of: it is known about when that is."""
        deadline = time.monotonic() + _LAST_DEATH_SECONDS
        while time.monotonic() < deadline and not self._blame_exits(phase, results, number):
            self._pump(0.05)

    def _blame_exits(self, phase: Phase, results: Mapping[int, Any], number: int) -> bool:
        """Find every rank that has ended without its result, or by a signal."""
        dead = [
            c
            for c in self._channels
            if c.status is not None
            and (not left_cleanly(c) or (c.rank not in results and c.has_left_without(number)))
        ]
        for channel in dead:
            message = f"{channel.name} died during run: {channel.outcome().describe_end()}"
            self._found.append(Violation("RankDied", message, channel.rank))
        if dead:
            phase.fail("a rank died", tuple(c.rank for c in dead))
        return bool(dead)

    def snapshot(self) -> tuple[Counters, ...]:
        """What each rank holds now, after a garbage collection in each; zeros before init_rpc.

        Raises:
            RankDied, RankHung: a rank cannot answer.
        """
        self._must_run()
        looked = self._look()
        if looked is None:
            self._raise_found()
        return tuple(c.counters or Counters() for c in self._channels)

    def settle(self, *, expect: Sequence[Counters] | None = None) -> tuple[Counters, ...]:
        """Wait until every rank holds exactly what is expected, and return it.

        Args:
            expect: counters by rank; None expects nothing to be held anywhere.

        Raises:
            RRefLeak, ContextLeak, CallLeak, OwnerGone: a rank holds something else and no message
                is under way that could change it; the message says who holds what.
            RankDied, RankHung: a rank cannot answer.
        """
        __tracebackhide__ = True
        self._must_run()
        counters = self.settle_to(expect)
        self._raise_found()
        return counters

    # What is underneath.

    @property
    def is_over(self) -> bool:
        """Whether the ranks have been let go."""
        return self._over

    @property
    def has_found(self) -> bool:
        """Whether something was found wrong so far."""
        return bool(self._found)

    def look(self) -> None:
        """Take in what each rank holds, for the outcome; who cannot answer is found."""
        with self._phase("run", self.deadlines.look) as phase:
            self._look(phase)

    def settle_to(
        self,
        expect: Sequence[Counters] | None,
        failures: Sequence[int] | None = None,
        calls: Sequence[Mapping[str, int]] = (),
    ) -> tuple[Counters, ...]:
        """As :meth:`settle`, but keeps what it finds instead of raising it.

        `failures` is how many sends must have failed by then at each rank, where that is known:
        cleanup retries have no counter, and shutdown does not wait for them.

        `calls` is how often each call must have run at each rank, where that is known. A caller
        that has given a call up counts it no longer, and who is to run it does not count it before
        it has arrived; shutdown drops it. A call that does not come is for :func:`judge` to tell.
        """
        wanted = _check_expected(expect, self.world_size)
        with self._phase("settle", self.deadlines.settle) as phase:
            held: tuple[Counters, ...] = ()
            ran: list[Mapping[str, int]] = []
            since, wait = time.monotonic(), 0.0005
            matched = 0
            while True:
                if self._look(phase) is None:
                    return tuple(c.counters or Counters() for c in self._channels)
                now = tuple(c.counters or Counters() for c in self._channels)
                if now != held or ran != [c.calls for c in self._channels]:
                    held, ran = now, [c.calls for c in self._channels]
                    since = time.monotonic()
                awaited = _lacks(ran, calls)
                matched = matched + 1 if held == wanted and not awaited else 0
                quiet = time.monotonic() - since
                if matched >= 2 and self._retries_ended(failures, quiet):
                    break
                if matched:
                    time.sleep(wait)
                else:
                    contexts = any(
                        h.contexts > w.contexts for h, w in zip(held, wanted, strict=True)
                    )
                    patience = self.deadlines.quiet_cleanup if contexts else self.deadlines.quiet
                    if awaited:
                        patience = max(patience, self.deadlines.unseen)
                    idle = all(h.is_idle for h in held)
                    stuck = quiet > (patience if idle else self.deadlines.stalled + patience)
                    if stuck or phase.left() < _LAST_LOOK_SECONDS:
                        if held != wanted:
                            self._found += unsettled(held, wanted, self.names)
                            phase.fail("the ranks did not settle")
                        break
                    time.sleep(wait)
                    wait = min(wait * 1.5, 0.02)
            return held

    def _retries_ended(self, failures: Sequence[int] | None, quiet: float) -> bool:
        """Whether no retry of a context cleanup can still be waiting."""
        if self.deadlines.quiet_cleanup == self.deadlines.quiet:
            return True
        if failures is not None:
            if not any(failures):
                return True
            seen = [channel.log.failed_sends() for channel in self._channels]
            if all(now >= then for now, then in zip(seen, failures, strict=True)):
                # The last failed send is followed by one more, which must be through.
                return self._logs_quiet() > self.deadlines.last_cleanup
            return quiet > self.deadlines.quiet_cleanup
        return self._logs_quiet() > self.deadlines.between_cleanups

    def _logs_quiet(self) -> float:
        """Real seconds since a rank was seen to have written something."""
        sizes = tuple(channel.log.size() for channel in self._channels)
        if sizes != self._log_sizes:
            self._log_sizes, self._logs_changed = sizes, time.monotonic()
        return time.monotonic() - self._logs_changed

    def run_branches(
        self,
        branches: Sequence[Sequence[tuple[int, Leaf]]],
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool],
    ) -> list[StepOutcome]:
        """Run branches of numbered steps at once, each at a rank of its own.

        A branch ends early after a step of which `goes_on` is false. A hang is found when nothing
        has moved for long enough; its steps have then not ended.
        """
        done: list[StepOutcome] = []
        awaited: dict[int, list[tuple[int, Leaf]]] = {}

        def send_first(branch: list[tuple[int, Leaf]]) -> None:
            number = next(self._numbers)
            awaited[number] = branch
            index, step = branch[0]
            message = ("step", number, index, step, dict(contexts))
            self._send(self._channel_of(step), message)

        pause = max(
            sum(getattr(step, "seconds", 0.0) for _, step in branch) / self.rate
            for branch in branches
        )
        with self._phase("run", self.deadlines.run + pause) as phase:
            for branch in branches:
                send_first(list(branch))
            before: object = None
            since = time.monotonic()
            while awaited:
                arrived = self._take_steps(awaited, phase)
                for branch, outcome in arrived:
                    done.append(outcome)
                    if branch[1:] and goes_on(outcome):
                        send_first(branch[1:])
                if arrived:
                    since = time.monotonic()
                    continue
                number, (first, *_) = next(iter(awaited.items()))
                index, step = first
                dead = self._dead(phase, number)
                if dead or (self._look(phase, _HANG_LOOK_SECONDS) is None and self._found):
                    break
                moved = tuple(
                    (c.counters, tuple(c.calls.items()), c.log.size()) for c in self._channels
                )
                if moved != before:
                    before, since = moved, time.monotonic()
                stalled = time.monotonic() - since > self.deadlines.stalled + pause
                if stalled or phase.left() <= 0:
                    complaint = f"does not end step {index}, {step!r}"
                    self._hung(phase, [self._channel_of(step)], complaint)
                    break
        done += [StepOutcome(branch[0][0], ended=False) for branch in awaited.values()]
        return sorted(done, key=lambda outcome: outcome.index)

    def _channel_of(self, step: Leaf) -> Channel:
        if isinstance(step, Settle):
            msg = "a Settle is no rank's step; call settle_to."
            raise HarnessError(msg)
        return self._channels[step.at]

    def _take_steps(
        self, awaited: dict[int, list[tuple[int, Leaf]]], phase: Phase
    ) -> list[tuple[list[tuple[int, Leaf]], StepOutcome]]:
        """Wait a little; the branches whose first step has ended, and how, taken from `awaited`."""
        self._pump(min(phase.left(), 0.25))
        arrived: list[tuple[list[tuple[int, Leaf]], StepOutcome]] = []
        for number, branch in list(awaited.items()):
            answers = self._channel_of(branch[0][1]).answers
            if number in answers:
                arrived.append((awaited.pop(number), answers.pop(number)[1]))
        return arrived

    def shutdown(self) -> None:
        """Graceful shutdown of all ranks, then their exit; what is wrong is kept, not raised."""
        with self._phase("shutdown", self.deadlines.shutdown) as phase:
            number = next(self._numbers)
            for channel in self._channels:
                self._send(channel, ("exit", number, self.init))
            answers = self._gather(phase, number, "does not shut down")
            if answers is None:
                # The others wait for ever for a rank whose shutdown has raised.
                left = [c for c in self._channels if number in c.answers]
                for channel in left:
                    _note_shutdown(channel, *channel.answers.pop(number)[1])
                raised = [c.outcome() for c in left if c.shutdown_error is not None]
                self._found[:0] = self._shutdown_violations(raised)
                return
            self._ask_for_spares()
            for channel, (_, answer) in zip(self._channels, answers, strict=True):
                _note_shutdown(channel, *answer)
            while any(c.status is None for c in self._channels):
                self._pump(min(phase.left(), 0.5))
                self._must_be_connected()
                if phase.left() <= 0:
                    self._hung(
                        phase, [c for c in self._channels if c.status is None], "does not exit"
                    )
                    return
            self._found += self._shutdown_violations([c.outcome() for c in self._channels])

    def _shutdown_violations(self, ranks: Sequence[RankOutcome]) -> list[Violation]:
        allowed = self.leaks == "allow"
        return shutdown_violations(ranks, leaks_allowed=allowed, rate=self.rate)

    def _ask_for_spares(self) -> None:
        """Let the server fork ranks for the next world, as these ranks have only to exit."""
        self._asked_for_spares = True
        if self._peer is not None:
            with contextlib.suppress(OSError):
                _wire.send(self._peer.sock, ("spares", self.world_size))

    @contextlib.contextmanager
    def _phase(self, name: PhaseName, seconds: float) -> Iterator[Phase]:
        if self._over:
            msg = "the cluster is over; make another with server.cluster(...)."
            raise UsageError(msg)
        phase = Phase(name, seconds)
        try:
            yield phase
        finally:
            outcome = phase.outcome(self.rate)
            if self._phases and self._phases[-1].name == name and outcome.verdict == "ok":
                # Many calls make one phase.
                last = self._phases.pop()
                outcome = replace(
                    last,
                    virtual_seconds=last.virtual_seconds + outcome.virtual_seconds,
                    real_seconds=last.real_seconds + outcome.real_seconds,
                )
            self._phases.append(outcome)

    def _submit(
        self,
        rank: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: int = 0,
    ) -> RankFuture[Any]:
        self._must_run()
        blob = _functions.dump_call(fn, args, kwargs)
        number = next(self._numbers)
        channel = self._channels[rank]
        # The phase is there even if the answer comes while something else is awaited.
        with self._phase("run", self.deadlines.run):
            channel.ran_users_code = True
            self._send(channel, ("call", number, blob, keep))
        return RankFuture(channel, number)

    def _must_run(self) -> None:
        if self._over or not self._channels:
            msg = "the cluster is not running; calls belong inside its with block."
            raise UsageError(msg)
        if self._runs_to_exit:
            msg = "the ranks have run to their exit; make another cluster for more calls."
            raise UsageError(msg)

    def _send(self, channel: Channel, message: tuple[Any, ...]) -> None:
        self._send_releases()
        channel.send(message, self.deadlines.look)

    def _send_releases(self) -> None:
        """Let the ranks drop the values that nobody holds here any more."""
        while self._released:
            rank, number = self._released.popleft()
            self._channels[rank].writer.put(("release", number))

    def _answer(self, channel: Channel, number: int) -> tuple[str, Any]:
        __tracebackhide__ = True
        if number not in channel.answers:
            with self._phase("run", self.deadlines.run) as phase:
                while number not in channel.answers:
                    self._pump(min(phase.left(), 1.0))
                    if number in channel.answers:
                        break
                    if self._dead(phase, number):
                        break
                    if phase.left() <= 0:
                        self._hung(phase, [channel], "does not answer a call")
                        break
            if number not in channel.answers:
                self._raise_found()
        return channel.answers.pop(number)

    def _look(self, phase: Phase | None = None, wait: float | None = None) -> list[Any] | None:
        """Ask every rank what it holds; None when one cannot answer (which is then found)."""
        number = next(self._numbers)
        for channel in self._channels:
            self._send(channel, ("look", number))
        own = phase or Phase("run", self.deadlines.look)
        answers = self._gather(own, number, _SILENT, wait)
        if answers is not None:
            for channel, (_, seen) in zip(self._channels, answers, strict=True):
                channel.note_look(seen)
        return answers

    def _gather(
        self, phase: Phase, number: int, complaint: str, wait: float | None = None
    ) -> list[tuple[str, Any]] | None:
        """The answers of all ranks to one number.

        None when a rank died or hung (which is then found), or when `wait` real seconds passed
        (which is not).
        """
        until = None if wait is None else time.monotonic() + wait
        while True:
            missing = [c for c in self._channels if number not in c.answers]
            if not missing:
                return self._answers(phase, number)
            if self._dead(phase, number):
                return None
            if phase.left() <= 0:
                if complaint == _SILENT:
                    self._note_silent(missing)
                self._hung(phase, missing, complaint)
                return None
            if until is not None and time.monotonic() > until:
                self._note_silent(missing)
                for channel in self._channels:
                    channel.give_up(number)
                return None
            self._pump(min(phase.left(), 0.5))

    def _note_silent(self, missing: Sequence[Channel]) -> None:
        for channel in self._channels:
            channel.silent = channel in missing

    def _answers(self, phase: Phase, number: int) -> list[tuple[str, Any]] | None:
        answers = [c.answers.pop(number) for c in self._channels]
        if phase.name != "start":
            return answers
        for channel, (kind, payload) in zip(self._channels, answers, strict=True):
            if kind == "error":
                phase.fail("a rank did not join the world")
                self._did_not_join(channel, payload)
        return answers

    def _did_not_join(self, channel: Channel, payload: bytes) -> None:
        """Keep why a rank did not join the world, as found.

        Raises:
            MachineCannot: the rank met a limit of this machine.
        """
        error = _functions.load_error(payload, channel.rank)
        if isinstance(error, MachineCannot):
            raise error
        message = f"joining the world raised {type(error).__name__}: {text_of(error)}"
        self._blame_machine(channel, message)
        self._found.append(Violation("UnexpectedError", message, channel.rank))

    def _blame_machine(self, channel: Channel, message: str) -> None:
        """Raise MachineCannot if a rank that did not join the world says that something lacked."""
        lacks = _limits.scarcity(f"{message}\n{channel.log.text()}") if self.init else ""
        if lacks:
            msg = (
                f"{channel.name} could not join a world of {self.world_size}, for the machine has "
                f"not enough of something ({lacks}; see `ulimit -a`, and the limits of the "
                f"container): {message}"
            )
            raise MachineCannot(msg)

    def _pump(self, seconds: float) -> None:
        """Take in what has arrived, waiting at most that long for something to."""
        peer = self._peer
        if peer is None or self._over:
            return
        self._send_releases()
        # Logs are read while ranks write them, so that those of loud ranks do not pile up.
        taken = max([channel.log.take(_LOG_PIECE) for channel in self._channels], default=0)
        if taken >= _LOG_PIECE:
            seconds = 0.0
        seconds = min(seconds, _LOUD_SECONDS if taken >= _LOUD else _QUIET_SECONDS)
        poller = select.poll()
        by_fd: dict[int, Channel] = {}
        if not peer.reader.closed:
            poller.register(peer.sock, select.POLLIN)
        for channel in self._channels:
            if not channel.reader.closed:
                by_fd[channel.sock.fileno()] = channel
                poller.register(channel.sock, channel.awaited_events())
        for fd, happened in poller.poll(max(0.0, seconds) * 1000):
            if fd in by_fd:
                by_fd[fd].handle(happened)
            else:
                peer.read()
        for channel in self._channels:
            if channel.status is None and channel.pid in peer.ended:
                channel.status, channel.processor_seconds = peer.ended.pop(channel.pid)

    def _must_be_connected(self) -> None:
        if self._peer is None or self._peer.reader.closed:
            raise self.server.died()
        for channel in self._channels:
            if channel.broken:
                raise _broken_channel(channel)

    def _dead(self, phase: Phase, awaited: int) -> bool:
        """Whether a rank has died before its time, or before that answer; that is then found."""
        self._must_be_connected()
        closed = [c for c in self._channels if c.reader.closed and c.status is None]
        if closed:
            # Its exit is reported by the server, a moment later.
            deadline = time.monotonic() + 5
            while any(c.status is None for c in closed) and time.monotonic() < deadline:
                self._pump(0.2)
                self._must_be_connected()
            for channel in closed:
                if channel.status is None and _lives(channel.pid):
                    channel.broken = "it has closed, and its process lives on"
            self._must_be_connected()
        dead = [c for c in self._channels if c.status is not None]
        if phase.name == "shutdown":
            # Here ranks leave by themselves, once they have answered.
            dead = [c for c in dead if not left_cleanly(c) or c.has_left_without(awaited)]
        if not dead:
            return False
        if phase.name == "start":
            for channel in dead:
                kind, payload = channel.answers.get(0, ("", b""))
                if kind == "error":
                    self._did_not_join(channel, payload)
                else:
                    self._blame_machine(channel, channel.outcome().describe_end())
        if not self._found:
            for channel in dead:
                ended = channel.outcome().describe_end()
                message = f"{channel.name} died during {phase.name}: {ended}"
                self._found.append(Violation("RankDied", message, channel.rank))
        phase.fail("a rank died", tuple(c.rank for c in dead))
        return True

    def _hung(self, phase: Phase, who: Sequence[Channel], complaint: str) -> None:
        """Keep a hang as found, with the stacks of all ranks, and with whom it may come from."""
        passed = phase.passed()
        busy: list[Channel] = []
        # Before a rank has joined, and once it has left, nothing in it answers a look.
        if phase.name != "start" and not any(c.silent or c.lost for c in self._channels):
            own = Phase("run", 2 * _HANG_LOOK_SECONDS)
            if self._look(own, _HANG_LOOK_SECONDS) is not None:
                busy = [c for c in self._channels if c not in who and c.runs_calls]
            elif self._found:
                phase.fail("a rank died", tuple(v.rank for v in self._found if v.rank is not None))
                return
        # Last, as it ends a rank that has no handler for it any more.
        self._take_stacks()
        silent = [c for c in self._channels if c.silent]
        message = f"{_names(who)} {complaint}"
        if silent and complaint != _SILENT:
            message = f"{_names(silent)} {_SILENT}; {message}"
        if busy:
            message += f"; {_names(busy)} runs a call for another rank"
        message += f" (phase {phase.name}, after {passed:.1f} real s)"
        self._involved = [*silent, *who, *busy]
        # Whoever waits for a rank that is silent is not the one that hangs.
        blamed = silent or who
        self._found.append(Violation("RankHung", message, blamed[0].rank, needs_time=True))
        phase.hang(message, tuple(c.rank for c in blamed))

    def _blame_death(self, error: BaseException) -> None:
        """Raise what killed a rank, if one has died: the error of another follows from that."""
        __tracebackhide__ = True
        # The channel of a dead rank closes about when its peers see their connections to it end.
        is_lost = _LOST_CONNECTION in text_of(error)
        deadline = time.monotonic() + (_DEATH_SECONDS if is_lost else 0)
        self._pump(0.0)
        while not any(c.lost for c in self._channels) and time.monotonic() < deadline:
            self._pump(0.05)
        if self._over or not any(c.lost for c in self._channels):
            return
        with self._phase("run", self.deadlines.look) as phase:
            self._dead(phase, 0)
        try:
            self._raise_found()
        except errors.BrokenPromise as found:
            raise found from error

    def _take_stacks(self) -> None:
        alive = [c for c in self._channels if c.status is None]
        if self._peer is None or not alive:
            return
        marks = {c.rank: c.log.mark() for c in alive}
        with contextlib.suppress(OSError):
            _wire.send(self._peer.sock, ("stacks", [c.pid for c in alive]))
        # faulthandler writes from the signal handler, in well under this.
        self._pump(0.0)
        time.sleep(0.3)
        for channel in alive:
            channel.stack = channel.log.text_from(marks[channel.rank])

    def _make_outcome(self) -> Outcome:
        return Outcome(
            world_size=self.world_size,
            clock_rate=self.rate,
            transport=self.transport,
            torch_version=self.server.torch_version,
            phases=tuple(self._phases),
            ranks=tuple(c.outcome() for c in self._channels),
        )

    def _raise_found(self) -> None:
        __tracebackhide__ = True
        if not self._found:
            return
        first = self._found[0]
        kind = getattr(errors, first.promise)
        lines = [str(violation) for violation in self._found]
        error = kind("\n".join(lines))
        blamed = [self._channels[v.rank] for v in self._found[:3] if v.rank is not None]
        others = [channel for channel in self._involved if channel not in blamed]
        for note in itertools.chain(
            *(channel.notes() for channel in blamed),
            *(channel.notes(lines=0) for channel in others[:2]),
        ):
            error.add_note(note)
        raise error
