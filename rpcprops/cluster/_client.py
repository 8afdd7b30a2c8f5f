"""The test process's end of the fork server: starts it, and makes clusters."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from rpcprops import clock as clocks
from rpcprops._given import argument, is_one_of, items, shown
from rpcprops.cluster import _finder, _limits, _network, _watcher, _wire
from rpcprops.cluster._cluster import Cluster
from rpcprops.cluster._logs import RankLog
from rpcprops.cluster._peer import Peer
from rpcprops.cluster._spec import (
    PROBE_SAYS,
    ClockChoice,
    Hello,
    Leaks,
    Network,
    Transport,
    check_transport,
)
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
#: Real seconds in which the watcher has killed all that is below it, and has left.
_END_SECONDS = _watcher.KILL_SECONDS + 1.0
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
    if is_one_of(clock, ("auto", "real")):
        return cast("ClockChoice", clock)
    if isinstance(clock, bool) or not isinstance(clock, int | float) or not 1 <= clock <= 1000:
        msg = (
            f"clock={shown(clock)} must be 'auto', 'real', or a rate from 1 to 1000 (virtual "
            "seconds "
            f"for each real second)."
        )
        raise UsageError(msg)
    return "real" if clock == 1 else float(clock)


def parse_clock(text: str) -> ClockChoice:
    """The clock that an option names.

    Raises:
        UsageError: it is none.
    """
    try:
        rate = float(text)
    except ValueError:
        return check_clock(text)
    return check_clock(rate)


def check_network(network: object) -> Network:
    """`network` if it is "auto", "private" or "host".

    Raises:
        UsageError: it is not.
    """
    if is_one_of(network, ("auto", "private", "host")):
        return cast("Network", network)
    msg = f"network={shown(network)} must be 'auto', 'private' or 'host'."
    raise UsageError(msg)


def shared_network(problem: str) -> str:
    """The line that says that ranks share the machine's network because of `problem`."""
    return (
        f"network: shared with this machine, so that any local user can connect to the ranks, and "
        f"run code in them (SECURITY.md): {' '.join(problem.split())}"
    )


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
        network: the network of the ranks of a world: "auto" (one of their own, which nobody else
            can reach, where this machine allows that; else the machine's), "private" (one of their
            own, or no cluster), or "host" (the machine's: for code that talks to services there).

    Attributes:
        rate: the rate that clusters run at unless they name one.
        clock_note: one line about the clock: its rate, or why it is real time and what to do.
        network_problem: a line where ranks share the machine's network though nobody asked for it;
            else empty, and empty before :meth:`start`.
        clock_problem: that line where clusters run in real time though nobody asked for it; else
            empty, and empty before :meth:`start`.

    Raises:
        UsageError: `clock` or `network` is none of these.
        MachineCannot: a rate was asked for by number and this machine cannot give it, or torch
            cannot be imported.
    """

    def __init__(self, clock: ClockChoice = "auto", network: Network = "auto") -> None:
        self.clock = check_clock(clock)
        self.network: Network = check_network(network)
        self._networks = _network.Maker()
        self.rate = 1.0
        self.clock_note = ""
        self.clock_problem = ""
        self._library_problem = ""
        self.torch_version = ""
        #: The watcher, which is the parent of the fork server.
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it; a fork of that one must not end it
        self._root: Peer | None = None
        self._in_use = False
        self._last_death = ""
        self._modules: dict[_finder.ModuleMap, tuple[Peer, _finder.ModuleMap | None]] = {}
        self._numbers = itertools.count(1)
        self._verified: set[float] = {1.0}
        self._log: RankLog | None = None
        #: Set for the examples of a confirmation, to run what names no clock at this rate.
        self.override_rate: float | None = None
        #: Called with each cluster before its ranks are forked.
        self.on_start: Callable[[Cluster], None] | None = None
        #: Called with the plan and the outcome of each cluster that has ended, if it was started.
        self.on_end: Callable[[FaultPlan, Outcome], None] | None = None
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
        self._start()
        self._in_use = True

    def _start(self) -> None:
        try:
            self._start_server()
        except BaseException:
            # Also when interrupted: nobody leaves a with block that was not entered.
            self._stop()
            raise

    def _start_server(self) -> None:
        # What lacks for a world of one rank lacks for all.
        _limits.check(1, "tcp", 1)
        environ = dict(os.environ)
        self.rate = 1.0
        self.clock_problem = ""
        # A library that cannot be loaded may kill the server, so it is tried on another program.
        self._library_problem = clocks.library_problem()
        if self._library_problem and self.clock not in ("auto", "real"):
            msg = f"clock={self.clock!r} cannot be had: {self._library_problem}"
            raise MachineCannot(msg)
        if not self._library_problem:
            # In real time too: the library also sees delays and lateness.
            environ = clocks.preload_environment(environ)
        if self.network != "host":
            self._networks.start()
        self._spawn(environ)
        if self.network != "host":
            with contextlib.suppress(OSError):
                # The next cluster tries again.
                self._networks.try_out()
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
                raise
            self._fall_back(str(error))
            return
        self.rate = rate
        self.clock_note = f"clock: {rate:g} virtual seconds for each real second (measured)"

    def _fall_back(self, problem: str) -> None:
        """Stay in real time, and say why in one line."""
        self.clock_note = self.clock_problem = unasked_real_time(problem)

    def _spawn(self, environ: dict[str, str]) -> None:
        self._popen(environ)
        hello = self._wait_for_server()
        self.torch_version = hello.torch_version
        if hello.unsafe:
            msg = f"importing torch {hello.unsafe} in the fork server, so forking is unsafe."
            raise MachineCannot(msg)

    def _popen(self, environ: dict[str, str]) -> None:
        """Start the watcher, which forks the server before anything heavy is imported."""
        package_home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        try:
            ours, theirs = socket.socketpair()
            self._root = Peer.on(ours)
            with theirs:
                self._log = RankLog("rpcprops-server")
                code = (
                    f"import sys; sys.path.append({package_home!r})\n"
                    f"names = {{'__name__': 'watcher'}}; path = {_watcher.__file__!r}\n"
                    f"exec(compile(open(path, 'rb').read(), path, 'exec'), names)\n"
                    f"names['main']({theirs.fileno()}, {os.getpid()}); del names, path\n"
                    f"from rpcprops.cluster import _limits; _limits.raise_soft_limits()\n"
                    f"from rpcprops.cluster._server import main; main({theirs.fileno()})"
                )
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", code],
                    bufsize=0,
                    env=server_environment(environ),
                    # Held open for as long as the server is wanted.
                    stdin=subprocess.PIPE,
                    stdout=self._log.fd,
                    stderr=self._log.fd,
                    pass_fds=[theirs.fileno()],
                    # A Ctrl-C at the terminal is for the test process, which then closes us.
                    start_new_session=True,
                )
        except OSError as error:
            msg = f"the fork server could not be started: {_limits.explain(error)}"
            raise MachineCannot(msg) from error
        self._owner = os.getpid()

    def _wait_for_server(self) -> Hello:
        assert self._root is not None
        hello = self._root.wait_hello(_SERVER_START_SECONDS)
        if hello is not None:
            return hello
        text = self._log.text() if self._log else ""
        if self._root.reader.closed:
            end = self._describe_end()
        else:
            end = f"it was not ready after {_SERVER_START_SECONDS:g} s"
        last = text.strip().splitlines()[-1:] or ["it printed nothing"]
        msg = f"the fork server did not start: {last[0]} ({end})\n{text}"
        raise MachineCannot(msg)

    def close(self) -> None:
        """Stop the server and everything that it forked; may be called again."""
        self._in_use = False
        self._stop()

    def _stop(self) -> None:
        for peer, _ in self._modules.values():
            peer.close()
        self._modules.clear()
        if self._root is not None:
            self._root.close()
            self._root = None
        self._verified = {1.0}
        if self._process is not None:
            self._end_watcher(self._process)
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._networks.close()

    @property
    def network_problem(self) -> str:
        """A line where ranks share the machine's network though nobody asked for it."""
        if self.network != "auto" or not self._networks.problem:
            return ""
        return shared_network(self._networks.problem)

    @contextlib.contextmanager
    def new_network(self, choice: Network) -> Iterator[list[int]]:
        """Descriptors of the network of one more world, closed at the end; none for the machine's.

        Raises:
            MachineCannot: there is no such network here.
        """
        try:
            descriptors = [] if choice == "host" else self._networks.take()
        except OSError as error:
            msg = f"the network of a world could not be had: {_limits.explain(error)}"
            raise MachineCannot(msg) from error
        if not descriptors:
            self._check_machine_network(choice)
        try:
            yield descriptors
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _check_machine_network(self, choice: Network) -> None:
        if choice == "private":
            msg = (
                f"network='private' cannot be had: {self._networks.problem}. network='auto' takes "
                f"the machine's, which local users can connect to."
            )
            raise MachineCannot(msg)
        if not _network.loopback_is_up():
            msg = (
                "the loopback interface, over which the ranks talk, is not there or is down; "
                "`ip link set lo up` brings it up."
            )
            raise MachineCannot(msg)

    def _end_watcher(self, process: subprocess.Popen[bytes]) -> None:
        """Have the watcher kill all that is below it, and wait until it has."""
        assert process.stdin is not None
        if os.getpid() != self._owner:
            process.stdin.close()
            return
        with contextlib.suppress(OSError), process.stdin:
            # Closing it is not enough where a fork of this process holds it as well.
            process.stdin.write(b"\n")
        try:
            process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=_END_SECONDS)

    def _verify(self, rate: float) -> None:
        """Measure the rate in a child of the server, once for each rate.

        Raises:
            MachineCannot: the child's clock does not run at that rate.
        """
        if rate in self._verified:
            return
        root = self._started()
        written = self._log.size() if self._log else 0
        with self._ask_root(("probe", rate)) as ours:
            try:
                clocks.observe(ours.fileno(), rate)
            except (clocks.ClockError, clocks.ClockUnavailable) as error:
                if root.is_gone():
                    raise self.died() from error
                said = self._log.text_from(written).splitlines() if self._log else []
                own = [line for line in said if line.startswith(PROBE_SAYS)]
                raise MachineCannot("; ".join([str(error), *own])) from error
        self._verified.add(rate)

    def _ask_root(self, message: tuple[Any, ...]) -> socket.socket:
        """Send the root server a message, with one end of a new socket; the other end of that."""
        root = self._started()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                _wire.send(root.sock, message, [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise self.died() from error
        return ours

    def _started(self) -> Peer:
        if self._root is None:
            msg = "the ClusterServer is not running; use it in a with block, or call start()."
            raise UsageError(msg)
        if self._root.is_gone():
            raise self.died()
        return self._root

    def _replace_if_dead(self) -> None:
        """Start another server where the last one has died, and measure rates of the clock anew."""
        if not self._in_use or (self._root is not None and not self._root.is_gone()):
            return
        self._note_deaths()
        self._stop()
        self._start()

    def is_gone(self) -> bool:
        """Whether the fork server, which was started, has died."""
        return self._root is not None and self._root.is_gone()

    def replace_if_dead(self, rate: float) -> None:
        """Start another server where this one has died, and see to it that it has that rate.

        Raises:
            MachineCannot: its clock does not run at that rate.
        """
        self._replace_if_dead()
        self._chosen_rate(rate)

    def died(self) -> HarnessError:
        """The error that says which server has died, how, and what the fork server wrote last."""
        self._note_deaths()
        return HarnessError(self._last_death or "the fork server has died.")

    def _note_deaths(self) -> None:
        """Let go of servers that have died, and keep how for the clusters that still use them."""
        dead = {
            modules: peer
            for modules, (peer, _) in self._modules.items()
            if peer is not self._root and peer.is_gone()
        }
        for modules, peer in dead.items():
            end = self._describe_end_of(peer)
            del self._modules[modules]
            peer.close()
            if end:
                names = ", ".join(modules.first)
                self._note_death(f"the fork server has died that imports {names}: {end}.")
        if self._root is not None and self._root.is_gone():
            self._note_death(f"the fork server has died: {self._describe_end()}.")

    def _note_death(self, what: str) -> None:
        text = self._log.text() if self._log else ""
        self._last_death = f"{what} The next cluster gets another.\n{text}".rstrip()

    def _describe_end(self) -> str:
        """How the fork server ended, as its watcher tells."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        if code < 0:
            return f"its parent, which watches it, was {_describe_code(code)}"
        return _describe_code(_watcher.KILLED - code if code > _watcher.KILLED else code)

    def _describe_end_of(self, peer: Peer) -> str:
        """How a module server ended, as the root tells, which reaps it; empty if that died too."""
        deadline = time.monotonic() + _END_SECONDS
        (pid,) = peer.forked.get(0, [0])
        while self._root is not None:
            gone = self._root.is_gone()
            if pid in self._root.ended:
                status, _ = self._root.ended.pop(pid)
                return _describe_code(os.waitstatus_to_exitcode(status))
            if gone:
                return ""
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        return "it closed its socket"

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
        self._note_deaths()
        self._close_idle_module_servers()
        peer = Peer.on(self._ask_root(("modules", modules)))
        try:
            return self._take_module_server(peer, modules)
        except BaseException:
            peer.close()
            raise

    def _take_module_server(
        self, peer: Peer, modules: _finder.ModuleMap
    ) -> tuple[Peer, _finder.ModuleMap | None, str]:
        """As :meth:`peer_for`, once the server of the modules was asked for."""
        hello = peer.wait_hello(_SERVER_START_SECONDS)
        names = ", ".join(modules.first)
        if 0 in peer.refused:
            msg = f"could not fork the process that imports {names} for the ranks: "
            raise MachineCannot(msg + peer.refused[0])
        if hello is None and not peer.reader.closed:
            msg = f"importing {names} for the ranks took more than {_SERVER_START_SECONDS:g} s."
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
                f"under its own name, outside pytest:\n{hello.error}"
            )
            raise UsageError(msg)
        if hello.unsafe:
            peer.close()
            note = (
                f"importing {names} {hello.unsafe}, which no fork survives, so each rank imports "
                f"it anew (slower); move that into a function."
            )
            warnings.warn(f"rpcprops: {note}", stacklevel=5)
            root = self._started()
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
                msg = f"clock={shown(clock)} cannot be had: {self._library_problem}"
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
        network: Network | None = None,
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
            network: overrides the server's for this cluster.

        Raises:
            UsageError: an argument is out of its range; the message says which.
            MachineCannot: the clock's rate, or the network, cannot be had here.
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
            network=network,
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
        network: Network | None = None,
    ) -> Cluster:
        """As :meth:`cluster`, for code in the module of that name, which the ranks import first.

        Args:
            also: modules that they import besides.
        """
        check_world_size(world_size)
        self._replace_if_dead()
        plan = FaultPlan.of(faults)
        plan.check(world_size)
        check_transport(transport)
        if not is_one_of(leaks, ("raise", "allow")):
            msg = f"leaks={shown(leaks)} must be 'raise' or 'allow'."
            raise UsageError(msg)
        for name, value, top in (
            ("rpc_timeout", rpc_timeout, 1e6),
            ("num_worker_threads", num_worker_threads, 1024),
            ("deadline", deadline, 86_400.0),
        ):
            kinds = int if name == "num_worker_threads" else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= top:
                kind = "an int" if kinds is int else "a number"
                msg = f"{name}={shown(value)} must be {kind} above 0 and at most {top:g}."
                raise UsageError(msg)
        given: object = init
        if not isinstance(given, bool):
            msg = f"init={shown(init)} must be True or False."
            raise UsageError(msg)
        _limits.check(world_size, transport, num_worker_threads)
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
            network=self.network if network is None else check_network(network),
            first=[module, *also],
        )


def _describe_code(code: int) -> str:
    """How a process ended, by its exit code, which is negative for a signal."""
    if code >= 0:
        return f"exit code {code}"
    number = -code
    words = f"killed by {signal.Signals(number).name if number in set(signal.Signals) else number}"
    if number == signal.SIGKILL:
        words += (
            " (if nobody sent that: the kernel does when memory runs out, see dmesg or the memory "
            "limit of the container)"
        )
    return words


def _check_names(names: Sequence[str] | None, world_size: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"worker{rank}" for rank in range(world_size))
    must_be = f"{world_size} different names, one for each rank"
    given: tuple[Any, ...] = tuple(items("names", names, MAX_WORLD_SIZE + 1, must_be))
    for name in given:
        if not isinstance(name, str) or not name or len(name) >= 128:
            msg = f"names={shown(names)}: {shown(name)} must be a string of 1 to 127 characters."
            raise UsageError(msg)
        if not all(c.isascii() and (c.isalnum() or c in "_:-") for c in name):
            msg = (
                f"the name {shown(name)} may hold letters, digits, and any of _ : - only "
                "(torch's rule)."
            )
            raise UsageError(msg)
    if len(given) != world_size or len(set(given)) != world_size:
        msg = f"{argument('names', names)} must be {must_be}."
        raise UsageError(msg)
    return cast("tuple[str, ...]", given)
