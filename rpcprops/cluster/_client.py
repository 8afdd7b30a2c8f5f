"""The test process's end: starts the fork server, makes clusters, and drives them.

No thread runs here. Whoever waits for an answer reads what has arrived on every channel of the
cluster, so answers may come in any order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import socket
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from rpcprops import clock as clocks
from rpcprops import errors
from rpcprops.cluster import _finder, _functions, _wire
from rpcprops.cluster._deadlines import Deadlines
from rpcprops.cluster._logs import RankLog
from rpcprops.cluster._spec import Hello, WorldSpec
from rpcprops.errors import HarnessError, MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle._worlds import shutdown_violations, unsettled
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseName,
    PhaseOutcome,
    PhaseVerdict,
    RaisedError,
    RankOutcome,
    StepOutcome,
    Violation,
)
from rpcprops.programs import Leaf, Program, Settle, check_world_size

P = ParamSpec("P")
R = TypeVar("R")

Transport = Literal["tcp", "shm"]
Leaks = Literal["raise", "allow"]
ClockChoice = Literal["auto", "real"] | float

#: Virtual seconds for each real one when `clock="auto"` (docs/clock.md has the curve behind it).
DEFAULT_RATE = 400.0
#: Virtual seconds before an RPC that names no timeout fails: far away at any rate.
DEFAULT_RPC_TIMEOUT = 86_400.0
DEFAULT_WORKER_THREADS = 8
#: Real seconds that a phase may take beyond what its faults account for.
DEFAULT_DEADLINE = 30.0
_SERVER_START_SECONDS = 120.0
_NOTED_LINES = 30
#: What TensorPipe says of a peer that is gone, and the real seconds in which its death is known.
_LOST_CONNECTION = re.compile(r"EOF|[Cc]onnection (reset|closed)|[Pp]ipe (closed|broken)|ECONN")
_DEATH_SECONDS = 1.0
#: A settle that is out of time tells what is held, instead of waiting for one more look.
_LAST_LOOK_SECONDS = 1.0
#: Module servers kept for the next cluster of the same test module.
_MODULE_SERVERS = 8


def server_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with what a process that imports torch to fork ranks needs."""
    return {
        **environ,
        # A thread of numpy's OpenBLAS, or of an OpenMP pool, would not survive the fork.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # RPC executes pickled code: listen on loopback only.
        "TP_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        # "Send try N failed" is the one sign of an injected failure, and an INFO line.
        "TORCH_CPP_LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }


def check_clock(clock: object) -> ClockChoice:
    """`clock` if it is "auto", "real" or a rate.

    Raises:
        UsageError: it is not.
    """
    if clock in ("auto", "real"):
        return cast("ClockChoice", clock)
    if isinstance(clock, bool) or not isinstance(clock, int | float) or not 1 <= clock <= 1000:
        msg = (
            f"clock={clock!r} must be 'auto', 'real', or a rate from 1 to 1000 (virtual seconds "
            f"for each real second)."
        )
        raise UsageError(msg)
    return "real" if clock == 1 else float(clock)


@dataclass
class _Peer:
    """A server process of ours, and what has come from it."""

    sock: socket.socket
    reader: _wire.Reader
    clusters: int = 0
    hello: Hello | None = None
    forked: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def on(cls, sock: socket.socket) -> _Peer:
        return cls(sock, _wire.Reader(sock))

    def read(self) -> None:
        """Take in what has arrived; a server that is gone shows in ``reader.closed``."""
        self.reader.fill()
        for message in self.reader.messages():
            if message[0] == "hello":
                self.hello = message[1]
            elif message[0] == "forked":
                self.forked[message[1]] = message[2]
            elif message[0] == "ended":
                self.ended[message[1]] = (message[2], message[3])

    def close(self) -> None:
        """Let the server go: it kills what it forked, and leaves."""
        self.sock.close()
        self.reader.closed = True

    def is_gone(self) -> bool:
        """Whether the server has died; takes in what it said before."""
        while not self.reader.closed and self._readable(0.0):
            self.read()
        return self.reader.closed

    def wait_hello(self, seconds: float) -> Hello | None:
        deadline = time.monotonic() + seconds
        while self.hello is None and not self.reader.closed:
            left = deadline - time.monotonic()
            if left <= 0 or not self._readable(left):
                break
            self.read()
        return self.hello

    def _readable(self, seconds: float) -> bool:
        # Not select(): it cannot name a descriptor above 1023.
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(seconds * 1000))


class ClusterServer:
    """The fork server of a test process: imports torch once and makes clusters in milliseconds.

    ::

        table = FaultTable(["RREF_USER_DELETE"], num_fail_sends=3)
        with ClusterServer() as server:
            with server.cluster(world_size=2, faults=table) as cluster:
                cluster.on(0).call(my_function)

    Args:
        clock: "auto" (fast, where the clock library was built and proves its rate; else real),
            "real", or a rate: virtual seconds for each real second.

    Attributes:
        rate: the rate that clusters run at unless they name one.
        clock_note: one line about the clock: its rate, or why it is real time and what to do.

    Raises:
        UsageError: `clock` is none of these.
        MachineCannot: a rate was asked for by number and this machine cannot give it, or torch
            cannot be imported.
    """

    def __init__(self, clock: ClockChoice = "auto") -> None:
        self.clock = check_clock(clock)
        self.rate = 1.0
        self.clock_note = ""
        self.torch_version = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._root: _Peer | None = None
        self._modules: dict[_finder.ModuleMap, tuple[_Peer, _finder.ModuleMap | None]] = {}
        self._numbers = itertools.count(1)
        self._verified: set[float] = {1.0}
        self._log: RankLog | None = None
        #: Set for the examples of a confirmation, to run what names no clock at this rate.
        self.override_rate: float | None = None
        #: Where each cluster that ends is recorded, for the report of a failure; None records none.
        self.recorded: list[tuple[FaultPlan, Outcome]] | None = None
        #: Called with each cluster before its ranks are forked.
        self.on_start: Callable[[Cluster], None] | None = None

    def __enter__(self) -> ClusterServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server process, once; it imports torch (1 to 3 real seconds)."""
        if self._root is not None:
            return
        environ = dict(os.environ)
        # In real time too: the library also sees delays and lateness.
        library = clocks.library_path()
        problem = ""
        try:
            environ = clocks.preload_environment(environ)
        except clocks.ClockUnavailable as error:
            problem = str(error)
            library = None
        if problem and self.clock not in ("auto", "real"):
            msg = f"clock={self.clock!r} cannot be had: {problem}"
            raise MachineCannot(msg)
        self._spawn(environ)
        if self.clock == "real":
            self.clock_note = "clock: real time, as asked for"
            return
        if library is None:
            self.clock_note = f"clock: real time. {problem}"
            return
        rate = DEFAULT_RATE if self.clock == "auto" else float(self.clock)
        try:
            self._verify(rate)
        except MachineCannot as error:
            if self.clock != "auto":
                self.close()
                raise
            self.clock_note = f"clock: real time. {error}"
            return
        self.rate = rate
        self.clock_note = f"clock: {rate:g} virtual seconds for each real second (measured)"

    def _spawn(self, environ: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._log = RankLog("rpcprops-server")
        package_home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = (
            f"import sys; sys.path.append({package_home!r})\n"
            f"from rpcprops.cluster._server import main; main({theirs.fileno()})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=server_environment(environ),
            stdin=subprocess.DEVNULL,
            stdout=self._log.fd,
            stderr=self._log.fd,
            pass_fds=[theirs.fileno()],
            # A Ctrl-C at the terminal is for the test process, which then closes us.
            start_new_session=True,
        )
        theirs.close()
        self._root = _Peer.on(ours)
        hello = self._root.wait_hello(_SERVER_START_SECONDS)
        if hello is None:
            text = self._log.text()
            self.close()
            last = text.strip().splitlines()[-1:] or ["it printed nothing"]
            msg = f"the fork server did not start: {last[0]}\n{text}"
            raise MachineCannot(msg)
        self.torch_version = hello.torch_version
        if hello.unsafe:
            self.close()
            msg = f"importing torch {hello.unsafe} in the fork server, so forking is unsafe."
            raise MachineCannot(msg)

    def close(self) -> None:
        """Stop the server and everything that it forked; may be called again."""
        for peer, _ in self._modules.values():
            peer.close()
        self._modules.clear()
        if self._root is not None:
            self._root.close()
            self._root = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(timeout=5)
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _verify(self, rate: float) -> None:
        """Measure the rate in a child of the server, once for each rate.

        Raises:
            MachineCannot: the child's clock does not run at that rate.
        """
        if rate in self._verified:
            return
        root = self._started()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                _wire.send(root.sock, ("probe", rate), [theirs.fileno()])
            try:
                clocks.observe(ours.fileno(), rate)
            except (clocks.ClockError, clocks.ClockUnavailable) as error:
                raise MachineCannot(str(error)) from error
        self._verified.add(rate)

    def _started(self) -> _Peer:
        if self._root is None:
            msg = "the ClusterServer is not running; use it in a with block, or call start()."
            raise UsageError(msg)
        if self._root.is_gone():
            raise self.died()
        return self._root

    def died(self) -> HarnessError:
        """The error that says that the server died, with what it wrote last."""
        text = self._log.text() if self._log else ""
        return HarnessError(f"the fork server has died, or was killed.\n{text}".rstrip())

    def peer_for(self, first: Sequence[str]) -> tuple[_Peer, _finder.ModuleMap | None, str]:
        """The server that forks ranks with these modules, what ranks must import, and why."""
        root = self._started()
        modules = _finder.describe_modules(first)
        if not modules.first:
            # Nothing of the user's to import: ranks still find what they are sent by name.
            return root, modules, ""
        for known, (peer, in_ranks) in self._modules.items():
            if known.covers(modules) and not peer.is_gone():
                return peer, in_ranks, ""
        self._close_idle_module_servers()
        ours, theirs = socket.socketpair()
        with theirs:
            _wire.send(root.sock, ("modules", modules), [theirs.fileno()])
        peer = _Peer.on(ours)
        hello = peer.wait_hello(_SERVER_START_SECONDS)
        names = ", ".join(modules.first)
        if hello is None:
            ours.close()
            msg = f"the process that imports {names} for the ranks has died."
            raise HarnessError(msg)
        if hello.error:
            ours.close()
            msg = (
                f"importing {names} for the ranks failed. Ranks import the module of the test "
                f"under its own name, outside pytest:\n{hello.error}"
            )
            raise UsageError(msg)
        if hello.unsafe:
            ours.close()
            note = (
                f"importing {names} {hello.unsafe}, which no fork survives, so each rank imports "
                f"it anew (slower); move that into a function."
            )
            warnings.warn(f"rpcprops: {note}", stacklevel=4)
            self._modules[modules] = (root, modules)
            return root, modules, note
        self._modules[modules] = (peer, None)
        return peer, None, ""

    def _close_idle_module_servers(self) -> None:
        idle = [key for key, (peer, _) in self._modules.items() if not peer.clusters]
        for key in idle[: max(0, len(self._modules) - _MODULE_SERVERS + 1)]:
            peer, _ = self._modules.pop(key)
            if peer is not self._root:
                peer.close()

    def rate_of(self, clock: ClockChoice | None) -> float:
        """The rate that a cluster with this choice of clock runs at.

        Raises:
            MachineCannot: a rate was named that this machine cannot give.
        """
        chosen = self._chosen_rate(clock)
        return chosen if self.override_rate is None else min(chosen, self.override_rate)

    def _chosen_rate(self, clock: ClockChoice | None) -> float:
        if clock is None:
            return self.rate
        choice = check_clock(clock)
        if choice == "real":
            return 1.0
        if choice == "auto":
            return self.rate
        rate = float(choice)
        if rate != 1.0:
            if clocks.library_path() is None:
                msg = f"clock={clock!r} cannot be had. {self.clock_note}"
                raise MachineCannot(msg)
            self._verify(rate)
        return rate

    def cluster(
        self,
        *,
        world_size: int,
        faults: FaultTable | FaultPlan | None = None,
        names: Sequence[str] | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT,
        num_worker_threads: int = DEFAULT_WORKER_THREADS,
        leaks: Leaks = "raise",
        init: bool = True,
        deadline: float = DEFAULT_DEADLINE,
    ) -> Cluster:
        """A cluster of fresh ranks, for one example; enter it to start them.

        Args:
            world_size: number of ranks, 1 to 16.
            faults: a table for every rank, or a plan.
            names: the ranks' names, "worker0", "worker1", … unless given.
            clock: overrides the server's for this cluster.
            transport: "tcp" on loopback, or "shm", shared memory as between processes of one host.
            rpc_timeout: virtual seconds before a call that names no timeout fails.
            num_worker_threads: threads of each agent.
            leaks: "raise" reports what does not drain; "allow" is for code that holds RRefs until
                it exits.
            init: False leaves ``init_rpc`` to the user's code (see ``rpcprops.fixture``).
            deadline: real seconds that a phase may take beyond what its faults account for.

        Raises:
            UsageError: an argument is out of its range; the message says which.
            MachineCannot: the clock's rate cannot be had here.
        """
        return self.make_cluster(
            sys._getframe(1).f_globals.get("__name__", ""),
            world_size=world_size,
            faults=faults,
            names=names,
            clock=clock,
            transport=transport,
            rpc_timeout=rpc_timeout,
            num_worker_threads=num_worker_threads,
            leaks=leaks,
            init=init,
            deadline=deadline,
        )

    def make_cluster(
        self,
        module: str,
        *,
        world_size: int,
        faults: FaultTable | FaultPlan | None = None,
        names: Sequence[str] | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT,
        num_worker_threads: int = DEFAULT_WORKER_THREADS,
        leaks: Leaks = "raise",
        init: bool = True,
        deadline: float = DEFAULT_DEADLINE,
    ) -> Cluster:
        """As :meth:`cluster`, for code in the module of that name, which the ranks import first."""
        check_world_size(world_size)
        plan = FaultPlan.of(faults)
        plan.check(world_size)
        if transport not in ("tcp", "shm"):
            msg = f"transport={transport!r} must be 'tcp' or 'shm'."
            raise UsageError(msg)
        if leaks not in ("raise", "allow"):
            msg = f"leaks={leaks!r} must be 'raise' or 'allow'."
            raise UsageError(msg)
        for name, value, top in (
            ("rpc_timeout", rpc_timeout, 1e6),
            ("num_worker_threads", num_worker_threads, 1024),
            ("deadline", deadline, 86_400.0),
        ):
            kinds = int if name == "num_worker_threads" else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= top:
                kind = "an int" if kinds is int else "a number"
                msg = f"{name}={value!r} must be {kind} above 0 and at most {top:g}."
                raise UsageError(msg)
        given: object = init
        if not isinstance(given, bool):
            msg = f"init={init!r} must be True or False."
            raise UsageError(msg)
        return Cluster(
            self,
            names=_check_names(names, world_size),
            plan=plan,
            rate=self.rate_of(clock),
            transport=transport,
            rpc_timeout=float(rpc_timeout),
            num_worker_threads=num_worker_threads,
            leaks=leaks,
            init=init,
            deadline=float(deadline),
            first=[module],
        )


def _check_names(names: Sequence[str] | None, world_size: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"worker{rank}" for rank in range(world_size))
    given: Any = names
    if isinstance(given, str) or not isinstance(given, Iterable):
        msg = f"names={names!r} must be {world_size} different names, one for each rank."
        raise UsageError(msg)
    given = tuple(given)
    for name in given:
        if not isinstance(name, str) or not name or len(name) >= 128:
            msg = f"names={names!r}: {name!r} must be a string of 1 to 127 characters."
            raise UsageError(msg)
        if not all(c.isascii() and (c.isalnum() or c in "_:-") for c in name):
            msg = (
                f"the name {name!r} may hold letters, digits, and any of _ : - only (torch's rule)."
            )
            raise UsageError(msg)
    if len(given) != world_size or len(set(given)) != world_size:
        msg = f"names={names!r} must be {world_size} different names, one for each rank."
        raise UsageError(msg)
    return cast("tuple[str, ...]", given)


def _check_expected(expect: Sequence[Counters] | None, world_size: int) -> tuple[Counters, ...]:
    given: Any = (Counters(),) * world_size if expect is None else expect
    if (
        not isinstance(given, Sequence)
        or len(given) != world_size
        or not all(isinstance(counters, Counters) for counters in given)
    ):
        msg = f"expect={expect!r} must be {world_size} Counters, one for each rank."
        raise UsageError(msg)
    return tuple(given)


class RankFuture(Generic[R]):
    """What a call in a rank will give."""

    def __init__(self, channel: _Channel, number: int) -> None:
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
            Exception: what the function raised in the rank.
        """
        __tracebackhide__ = True
        if not self.done():
            self._answer = self._channel.cluster._answer(self._channel, self._number)
        kind, payload = cast("tuple[str, bytes]", self._answer)
        if kind == "error":
            error = _functions.load_error(payload, self._channel.rank)
            self._channel.cluster._blame_death(error)
            raise error
        return cast("R", _functions.loads(payload))


@dataclass
class _Channel:
    """One rank, as the test process sees it."""

    cluster: Cluster
    rank: int
    name: str
    sock: socket.socket
    reader: _wire.Reader
    log: RankLog
    pid: int = 0
    answers: dict[int, tuple[str, Any]] = field(default_factory=dict)
    status: int | None = None
    processor_seconds: float = 0.0
    killed: bool = False
    counters: Counters | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    delayed_sends: Mapping[int, int] | None = None
    late_seconds: float = 0.0
    stack: str = ""
    shutdown_error: RaisedError | None = None
    #: Whether this rank did not answer the last look in time.
    silent: bool = False

    @property
    def lost(self) -> bool:
        return self.reader.closed or self.status is not None

    def send(self, message: tuple[Any, ...]) -> None:
        with contextlib.suppress(OSError):
            # A rank that is gone shows when its answer is awaited.
            _wire.send(self.sock, message)

    def has_left_without(self, number: int) -> bool:
        """Whether that answer will never come; all that was sent has been read."""
        return self.reader.closed and number not in self.answers

    def note_look(self, seen: dict[str, Any]) -> None:
        self.silent = False
        if seen["counters"] is not None:
            self.counters = seen["counters"]
        self.calls = seen["calls"]
        self.delayed_sends = seen["delays"]
        self.late_seconds = max(self.late_seconds, seen["late"])

    def notes(self) -> list[str]:
        """What helps to understand this rank's end: its stacks, and what it wrote last."""
        notes: list[str] = []
        if self.stack:
            notes.append(f"stacks of {self.name}:\n{self.stack.rstrip()}")
        lines = [line for line in self.log.text().splitlines() if line not in self.stack]
        if lines:
            last = "\n".join(lines[-_NOTED_LINES:])
            notes.append(f"last lines of {self.name}:\n{last}")
        return notes

    def outcome(self) -> RankOutcome:
        text = self.log.text()
        code, number = None, 0
        if self.status is not None:
            if os.WIFSIGNALED(self.status):
                number = 0 if self.killed else os.WTERMSIG(self.status)
            else:
                code = os.WEXITSTATUS(self.status)
        return RankOutcome(
            rank=self.rank,
            name=self.name,
            exit_code=code,
            signal=number,
            killed=self.killed,
            counters=self.counters,
            failed_sends=self.log.failed_sends(),
            delayed_sends=self.delayed_sends,
            calls=dict(self.calls),
            shutdown_error=self.shutdown_error,
            log=text,
            stack=self.stack,
            processor_seconds=self.processor_seconds,
            late_seconds=self.late_seconds,
        )


class RankProxy:
    """One rank of a running cluster (:meth:`Cluster.on`)."""

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self._cluster = cluster
        self.rank = rank

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self._cluster!r}>"

    @overload
    def call(
        self, fn: Callable[..., Any], *args: Any, keep: Literal[True], **kwargs: Any
    ) -> Any: ...
    @overload
    def call(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...
    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(*args, **kwargs)`` in this rank's main thread and return what it returns.

        Calls to one rank run one after the other. `fn` may be a closure. With ``keep=True`` the
        value stays in the rank, and the handle that comes back stands for it in later calls there
        (an RRef must stay: it has no meaning outside its rank).

        Raises:
            Exception: what `fn` raised, with the rank's traceback as its cause.
            RankDied, RankHung: the rank did not live, or did not answer.
        """
        __tracebackhide__ = True
        if not kwargs.pop("keep", False):
            return self.submit(fn, *args, **kwargs).result()
        number = next(self._cluster._numbers)
        self._cluster._submit(self.rank, fn, args, kwargs, keep=number).result()
        kept = _functions.KeptValue(self.rank, number)
        weakref.finalize(kept, self._cluster._release, self.rank, number)
        return kept

    def submit(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> RankFuture[R]:
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
        first: Sequence[str],
    ) -> None:
        self.server = server
        self.names = names
        self.plan = plan
        self.rate = rate
        self.transport = transport
        self.leaks = leaks
        self.init = init
        self.program: Program | None = None
        self.deadlines = Deadlines.of(plan, len(names), rate, deadline)
        self._rpc_timeout = rpc_timeout
        self._num_worker_threads = num_worker_threads
        self._first = first
        self._peer: _Peer | None = None
        self._channels: list[_Channel] = []
        self._numbers = itertools.count(1)
        self._phases: list[PhaseOutcome] = []
        self._found: list[Violation] = []
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
        if self._peer is not None or self._over:
            msg = "a cluster runs once; make another with server.cluster(...)."
            raise UsageError(msg)
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
        if self.init and self.leaks == "raise" and not self._found:
            self.settle_to(None)
        if not self._found:
            self.shutdown()

    def start(self) -> None:
        """Fork the ranks and wait until each has joined the world."""
        if self._peer is not None:
            msg = "a cluster runs once; make another with server.cluster(...)."
            raise UsageError(msg)
        if self.server.on_start is not None:
            self.server.on_start(self)
        peer, in_ranks, _ = self.server.peer_for(self._first)
        self._peer = peer
        peer.clusters += 1
        spec = WorldSpec(
            names=self.names,
            plan=self.plan,
            rate=self.rate,
            transport=self.transport,
            rpc_timeout=self._rpc_timeout,
            num_worker_threads=self._num_worker_threads,
            ignore_leaks=self.leaks == "allow",
            init=self.init,
            import_in_ranks=in_ranks,
        )
        with self._phase("start", self.deadlines.start) as phase:
            number = next(self.server._numbers)
            store = os.memfd_create("rpcprops-store")
            theirs: list[socket.socket] = []
            for rank, name in enumerate(self.names):
                ours, other = socket.socketpair()
                theirs.append(other)
                # A rank that has stopped must not stop us: what it does not take in time is lost.
                ours.settimeout(self.deadlines.look)
                log = RankLog(f"rpcprops-{name}")
                self._channels.append(_Channel(self, rank, name, ours, _wire.Reader(ours), log))
            try:
                _wire.send(
                    peer.sock,
                    ("fork", number, spec),
                    [store, *(s.fileno() for s in theirs), *(c.log.fd for c in self._channels)],
                )
            except OSError:
                raise self.server.died() from None
            finally:
                os.close(store)
                for sock in theirs:
                    sock.close()
            while number not in peer.forked:
                if peer.reader.closed:
                    raise self.server.died()
                self._pump(phase.left())
                if phase.left() <= 0:
                    msg = f"the fork server did not fork {self.world_size} ranks in time."
                    raise HarnessError(msg)
            for channel, pid in zip(self._channels, peer.forked.pop(number), strict=True):
                channel.pid = pid
            self._gather(phase, 0, "did not join the world")

    def kill(self) -> None:
        """Kill every rank that still lives, and let go of everything."""
        if self._over:
            return
        alive = [c for c in self._channels if c.status is None and c.pid]
        if alive and self._peer is not None:
            for channel in alive:
                channel.killed = True
            with contextlib.suppress(OSError):
                _wire.send(self._peer.sock, ("kill", [c.pid for c in alive]))
            deadline = time.monotonic() + 10
            while any(c.status is None for c in alive) and time.monotonic() < deadline:
                if self._peer.reader.closed:
                    break
                self._pump(0.2)
        with contextlib.suppress(OSError, HarnessError):
            self._pump(0.0)
        self._over = True
        if self._peer is not None:
            self._peer.clusters -= 1
        self._outcome = self._make_outcome()
        for channel in self._channels:
            channel.sock.close()
            channel.log.close()
        if self._channels and self.server.recorded is not None:
            self.server.recorded.append((self.plan, self._outcome))

    # What users do with it.

    def on(self, rank: int | str) -> RankProxy:
        """The rank of that number, or of that name.

        Raises:
            UsageError: there is none.
        """
        number: object = self.names.index(str(rank)) if rank in set(self.names) else rank
        if isinstance(number, bool) or not isinstance(number, int):
            msg = f"rank={rank!r} must be an int from 0 to {self.world_size - 1}, or a rank's name."
            raise UsageError(msg)
        if not 0 <= number < self.world_size:
            msg = f"rank={rank!r} is no rank of a world of {self.world_size}."
            raise UsageError(msg)
        return RankProxy(self, number)

    def each(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> list[R]:
        """Run ``fn(*args, **kwargs)`` in every rank at once; the results, by rank.

        Raises:
            Exception: what the lowest rank that raised did raise.
        """
        futures = [self._submit(rank, fn, args, kwargs) for rank in range(self.world_size)]
        return [future.result() for future in futures]

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
    def has_found(self) -> bool:
        """Whether something was found wrong so far."""
        return bool(self._found)

    def look(self) -> None:
        """Take in what each rank holds, for the outcome; who cannot answer is found."""
        with self._phase("run", self.deadlines.look) as phase:
            self._look(phase)

    def settle_to(
        self, expect: Sequence[Counters] | None, failures: Sequence[int] | None = None
    ) -> tuple[Counters, ...]:
        """As :meth:`settle`, but keeps what it finds instead of raising it.

        `failures` is how many sends must have failed by then at each rank, where that is known:
        cleanup retries have no counter, and shutdown does not wait for them.
        """
        wanted = _check_expected(expect, self.world_size)
        with self._phase("settle", self.deadlines.settle) as phase:
            held: tuple[Counters, ...] = ()
            since, wait = time.monotonic(), 0.0005
            matched = 0
            while True:
                if self._look(phase) is None:
                    return tuple(c.counters or Counters() for c in self._channels)
                now = tuple(c.counters or Counters() for c in self._channels)
                if now != held:
                    held, since = now, time.monotonic()
                matched = matched + 1 if held == wanted else 0
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
                    idle = all(h.is_idle for h in held)
                    stuck = quiet > (patience if idle else self.deadlines.stalled + patience)
                    if stuck or phase.left() < _LAST_LOOK_SECONDS:
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

    def run_step(self, index: int, step: Leaf, contexts: Mapping[str, int]) -> StepOutcome:
        """Run one step of a program, at its own rank."""
        return self.run_branches([[(index, step)]], contexts)[0]

    def run_branches(
        self,
        branches: Sequence[Sequence[tuple[int, Leaf]]],
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool] = lambda _: True,
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
            self._channel_of(step).send(("step", number, index, step, dict(contexts)))

        with self._phase("run", self.deadlines.run) as phase:
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
                if dead or (self._look(phase, wait=2.0) is None and self._found):
                    break
                moved = tuple(
                    (c.counters, tuple(c.calls.items()), c.log.size()) for c in self._channels
                )
                if moved != before:
                    before, since = moved, time.monotonic()
                patience = self.deadlines.stalled + getattr(step, "seconds", 0.0) / self.rate
                if time.monotonic() - since > patience or phase.left() <= 0:
                    complaint = f"step {index}, {step!r}, does not end"
                    silent = [c for c in self._channels if c.silent]
                    if silent:
                        # Whoever waits for these is not the one that hangs.
                        complaint = f"does not answer the control channel; {complaint}"
                    self._hung(phase, silent or [self._channel_of(step)], complaint)
                    break
        done += [StepOutcome(branch[0][0], ended=False) for branch in awaited.values()]
        return sorted(done, key=lambda outcome: outcome.index)

    def _channel_of(self, step: Leaf) -> _Channel:
        if isinstance(step, Settle):
            msg = "a Settle is no rank's step; call settle_to."
            raise HarnessError(msg)
        return self._channels[step.at]

    def _take_steps(
        self, awaited: dict[int, list[tuple[int, Leaf]]], phase: _Phase
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
                channel.send(("exit", number, self.init))
            answers = self._gather(phase, number, "does not shut down")
            if answers is None:
                return
            self._ask_for_spares()
            for channel, (_, (blob, seen)) in zip(self._channels, answers, strict=True):
                # Of what was held up and counted, shutdown's own messages are no part.
                channel.calls = seen["calls"]
                channel.late_seconds = max(channel.late_seconds, seen["late"])
                if blob:
                    error = _functions.load_error(blob, channel.rank)
                    channel.shutdown_error = RaisedError(type(error).__name__, str(error))
            while any(c.status is None for c in self._channels):
                self._pump(min(phase.left(), 0.5))
                self._must_have_server()
                if phase.left() <= 0:
                    self._hung(
                        phase, [c for c in self._channels if c.status is None], "does not exit"
                    )
                    return
            self._found += shutdown_violations(
                [c.outcome() for c in self._channels], leaks_allowed=self.leaks == "allow"
            )

    def _ask_for_spares(self) -> None:
        """Let the server fork ranks for the next world, as these ranks have only to exit."""
        if self._peer is not None:
            with contextlib.suppress(OSError):
                _wire.send(self._peer.sock, ("spares", self.world_size))

    @contextlib.contextmanager
    def _phase(self, name: PhaseName, seconds: float) -> Iterator[_Phase]:
        if self._over:
            msg = "the cluster is over; make another with server.cluster(...)."
            raise UsageError(msg)
        phase = _Phase(name, seconds)
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
            channel.send(("call", number, blob, keep))
        return RankFuture(channel, number)

    def _must_run(self) -> None:
        if self._over or not self._channels:
            msg = "the cluster is not running; calls belong inside its with block."
            raise UsageError(msg)

    def _release(self, rank: int, number: int) -> None:
        if not self._over:
            self._channels[rank].send(("release", number))

    def _answer(self, channel: _Channel, number: int) -> tuple[str, Any]:
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

    def _look(self, phase: _Phase | None = None, wait: float | None = None) -> list[Any] | None:
        """Ask every rank what it holds; None when one cannot answer (which is then found)."""
        number = next(self._numbers)
        for channel in self._channels:
            channel.send(("look", number))
        own = phase or _Phase("run", self.deadlines.look)
        answers = self._gather(own, number, "does not answer the control channel", wait)
        if answers is not None:
            for channel, (_, seen) in zip(self._channels, answers, strict=True):
                channel.note_look(seen)
        return answers

    def _gather(
        self, phase: _Phase, number: int, complaint: str, wait: float | None = None
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
                self._hung(phase, missing, complaint)
                return None
            if until is not None and time.monotonic() > until:
                for channel in missing:
                    channel.silent = True
                return None
            self._pump(min(phase.left(), 0.5))

    def _answers(self, phase: _Phase, number: int) -> list[tuple[str, Any]] | None:
        answers = [c.answers.pop(number) for c in self._channels]
        if phase.name != "start":
            return answers
        failed = [
            c for c, (kind, _) in zip(self._channels, answers, strict=True) if kind == "error"
        ]
        for channel in failed:
            error = _functions.load_error(answers[channel.rank][1], channel.rank)
            self._found.append(
                Violation("UnexpectedError", f"joining the world raised {error!r}", channel.rank)
            )
        if failed:
            phase.fail("a rank did not join the world")
        return answers

    def _pump(self, seconds: float) -> None:
        """Take in what has arrived, waiting at most that long for something to."""
        peer = self._peer
        if peer is None or self._over:
            return
        poller = select.poll()
        by_fd: dict[int, _Channel] = {}
        if not peer.reader.closed:
            poller.register(peer.sock, select.POLLIN)
        for channel in self._channels:
            if not channel.reader.closed:
                by_fd[channel.sock.fileno()] = channel
                poller.register(channel.sock, select.POLLIN)
        for fd, _ in poller.poll(max(0.0, seconds) * 1000):
            if fd in by_fd:
                channel = by_fd[fd]
                channel.reader.fill()
                for number, kind, payload in channel.reader.messages():
                    channel.answers[number] = (kind, payload)
            else:
                peer.read()
        for channel in self._channels:
            if channel.status is None and channel.pid in peer.ended:
                channel.status, channel.processor_seconds = peer.ended.pop(channel.pid)

    def _must_have_server(self) -> None:
        if self._peer is None or self._peer.reader.closed:
            raise self.server.died()

    def _dead(self, phase: _Phase, awaited: int) -> bool:
        """Whether a rank has died before its time, or before that answer; that is then found."""
        self._must_have_server()
        closed = [c for c in self._channels if c.reader.closed and c.status is None]
        if closed:
            # Its exit is reported by the server, a moment later.
            deadline = time.monotonic() + 5
            while any(c.status is None for c in closed) and time.monotonic() < deadline:
                self._pump(0.2)
                self._must_have_server()
        dead = [c for c in self._channels if c.status is not None]
        if phase.name == "shutdown":
            # Here ranks leave by themselves, once they have answered.
            dead = [c for c in dead if not _left_cleanly(c) or c.has_left_without(awaited)]
        if not dead:
            return False
        if phase.name == "start":
            for channel in dead:
                kind, payload = channel.answers.get(0, ("", b""))
                if kind == "error":
                    error = _functions.load_error(payload, channel.rank)
                    self._found.append(
                        Violation("UnexpectedError", f"joining raised {error!r}", channel.rank)
                    )
        if not self._found:
            for channel in dead:
                ended = channel.outcome().describe_end()
                message = f"{channel.name} died during {phase.name}: {ended}"
                self._found.append(Violation("RankDied", message, channel.rank))
        phase.fail("a rank died", tuple(c.rank for c in dead))
        return True

    def _hung(self, phase: _Phase, who: Sequence[_Channel], complaint: str) -> None:
        """Keep a hang as found, with the stacks of all ranks."""
        self._take_stacks()
        names = ", ".join(c.name for c in who)
        message = f"{names} {complaint} (phase {phase.name}, after {phase.passed():.1f} real s)"
        self._found.append(Violation("RankHung", message, who[0].rank, needs_time=True))
        phase.hang(message, tuple(c.rank for c in who))

    def _blame_death(self, error: BaseException) -> None:
        """Raise what killed a rank, if one has died: the error of another follows from that."""
        __tracebackhide__ = True
        # The channel of a dead rank closes about when its peers see their connections to it end.
        deadline = time.monotonic() + (_DEATH_SECONDS if _LOST_CONNECTION.search(str(error)) else 0)
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
        sizes = {c.rank: c.log.size() for c in alive}
        with contextlib.suppress(OSError):
            _wire.send(self._peer.sock, ("stacks", [c.pid for c in alive]))
        # faulthandler writes from the signal handler, in well under this.
        self._pump(0.0)
        time.sleep(0.3)
        for channel in alive:
            channel.stack = channel.log.text_from(sizes[channel.rank])

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
        for violation in self._found[:3]:
            if violation.rank is not None:
                for note in self._channels[violation.rank].notes():
                    error.add_note(note)
        raise error


@dataclass
class _Phase:
    """One phase under way."""

    name: PhaseName
    seconds: float
    began: float = field(default_factory=time.monotonic)
    verdict: PhaseVerdict = "ok"
    detail: str = ""
    ranks: tuple[int, ...] = ()

    def passed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return max(0.0, self.seconds - self.passed())

    def fail(self, detail: str, ranks: tuple[int, ...] = ()) -> None:
        self.verdict, self.detail, self.ranks = "failed", detail, ranks

    def hang(self, detail: str, ranks: tuple[int, ...]) -> None:
        self.verdict, self.detail, self.ranks = "hung", detail, ranks

    def outcome(self, rate: float) -> PhaseOutcome:
        passed = self.passed()
        return PhaseOutcome(
            self.name, self.verdict, passed * rate, passed, self.seconds, self.detail, self.ranks
        )


def _left_cleanly(channel: _Channel) -> bool:
    return channel.status is not None and not os.WIFSIGNALED(channel.status)
