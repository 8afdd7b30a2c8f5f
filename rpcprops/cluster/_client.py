"""The test process's end of the fork server: starts it, and makes clusters."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from rpcprops import clock as clocks
from rpcprops.cluster import _finder, _wire
from rpcprops.cluster._cluster import Cluster
from rpcprops.cluster._logs import RankLog
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._spec import PROBE_SAYS, ClockChoice, Leaks, Transport, check_transport
from rpcprops.errors import HarnessError, MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Outcome
from rpcprops.programs import MAX_WORLD_SIZE, check_world_size

#: Virtual seconds for each real one when `clock="auto"` (docs/clock.md has the curve behind it).
DEFAULT_RATE = 400.0
#: Virtual seconds before an RPC that names no timeout fails: far away at any rate.
DEFAULT_RPC_TIMEOUT = 86_400.0
DEFAULT_WORKER_THREADS = 8
#: Real seconds that a phase may take beyond what its faults account for.
DEFAULT_DEADLINE = 30.0
_SERVER_START_SECONDS = 120.0
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


def unasked_real_time(problem: str) -> str:
    """The line that says that ranks run in real time because of `problem`."""
    return f"clock: real time, though it was not asked for: {' '.join(problem.split())}"


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
        clock_problem: that line where clusters run in real time though nobody asked for it; else
            empty, and empty before :meth:`start`.

    Raises:
        UsageError: `clock` is none of these.
        MachineCannot: a rate was asked for by number and this machine cannot give it, or torch
            cannot be imported.
    """

    def __init__(self, clock: ClockChoice = "auto") -> None:
        self.clock = check_clock(clock)
        self.rate = 1.0
        self.clock_note = ""
        self.clock_problem = ""
        self._library_problem = ""
        self.torch_version = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._root: Peer | None = None
        self._modules: dict[_finder.ModuleMap, tuple[Peer, _finder.ModuleMap | None]] = {}
        self._numbers = itertools.count(1)
        self._verified: set[float] = {1.0}
        self._log: RankLog | None = None
        #: Set for the examples of a confirmation, to run what names no clock at this rate.
        self.override_rate: float | None = None
        #: Where each cluster that ends is recorded, for the report of a failure; None records none.
        self.recorded: list[tuple[FaultPlan, Outcome]] | None = None
        #: Called with each cluster before its ranks are forked.
        self.on_start: Callable[[Cluster], None] | None = None
        #: Called with each failure of a state machine that slower rates did not show, and whether
        #: it is undecided (ranks were too late for it to mean anything); None warns of it instead.
        self.on_unconfirmed: Callable[[str, bool], None] | None = None

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
        self.clock_problem = ""
        # A library that cannot be loaded may kill the server, so it is tried on another program.
        self._library_problem = clocks.library_problem()
        if self._library_problem and self.clock not in ("auto", "real"):
            msg = f"clock={self.clock!r} cannot be had: {self._library_problem}"
            raise MachineCannot(msg)
        if not self._library_problem:
            # In real time too: the library also sees delays and lateness.
            environ = clocks.preload_environment(environ)
        self._spawn(environ)
        if self.clock == "real":
            self.clock_note = "clock: real time, as asked for"
            return
        if self._library_problem:
            self._fall_back(self._library_problem)
            return
        rate = DEFAULT_RATE if self.clock == "auto" else float(self.clock)
        try:
            self._verify(rate)
        except MachineCannot as error:
            if self.clock != "auto":
                self.close()
                raise
            self._fall_back(str(error))
            return
        self.rate = rate
        self.clock_note = f"clock: {rate:g} virtual seconds for each real second (measured)"

    def _fall_back(self, problem: str) -> None:
        """Stay in real time, and say why in one line."""
        self.clock_note = self.clock_problem = unasked_real_time(problem)

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
        self._root = Peer.on(ours)
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
        written = self._log.size() if self._log else 0
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                _wire.send(root.sock, ("probe", rate), [theirs.fileno()])
            try:
                clocks.observe(ours.fileno(), rate)
            except (clocks.ClockError, clocks.ClockUnavailable) as error:
                if root.is_gone():
                    raise self.died() from error
                said = self._log.text_from(written).splitlines() if self._log else []
                own = [line for line in said if line.startswith(PROBE_SAYS)]
                raise MachineCannot("; ".join([str(error), *own])) from error
        self._verified.add(rate)

    def _started(self) -> Peer:
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

    def peer_for(self, first: Sequence[str]) -> tuple[Peer, _finder.ModuleMap | None, str]:
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
        peer = Peer.on(ours)
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
            if self._library_problem:
                msg = f"clock={clock!r} cannot be had: {self._library_problem}"
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
        also: Sequence[str] = (),
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
        """As :meth:`cluster`, for code in the module of that name, which the ranks import first.

        Args:
            also: modules that they import besides.
        """
        check_world_size(world_size)
        plan = FaultPlan.of(faults)
        plan.check(world_size)
        check_transport(transport)
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
            first=[module, *also],
        )


def _check_names(names: Sequence[str] | None, world_size: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"worker{rank}" for rank in range(world_size))
    given: Any = names
    if isinstance(given, str) or not isinstance(given, Iterable):
        msg = f"names={names!r} must be {world_size} different names, one for each rank."
        raise UsageError(msg)
    given = tuple(itertools.islice(given, MAX_WORLD_SIZE + 1))
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
