"""The code that runs in a rank: it sets the clock, joins the world and obeys the control channel.

The main thread runs the calls in order; branches of a program beside its own have threads of their
own. A second thread reads the channel and answers looks at
the counters by itself, so that a look neither waits for a call nor sends an RPC.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

from rpcprops import clock, fixture
from rpcprops.agents import wire
from rpcprops.cluster import (
    _anew,
    _functions,
    _handles,
    _injection,
    _tracing,
    _wire,
    finder,
    interpreter,
    namespaces,
    stacks,
)
from rpcprops.cluster._spec import Asked, RpcNews, WorldSpec
from rpcprops.cluster._timeouts import Timeouts
from rpcprops.cluster.adoption import Adoption
from rpcprops.cluster.options import A_DAY
from rpcprops.errors import MachineCannot
from rpcprops.faults import FaultPlan, agent_faults
from rpcprops.outcomes import Counters
from rpcprops.programs import End
from rpcprops.steps.in_rank import ends, state
from rpcprops.torch_facts import CounterKeys, installed, symbols

#: Without room for its 1 MiB probe segment, TensorPipe leaves its shared-memory transport out.
_NO_SHARED_MEMORY = 512 << 10

#: More than an agent of sixteen ranks opens, and below the usual limit of 1024.
_DESCRIPTORS = 1000

#: How often a rank looks whether it is at rest before it answers, and whether all messages of its
#: world have come to their ends; and real seconds in between.
_REST_LOOKS, _END_LOOKS = 20, 5
_REST_SECONDS = 0.0002

EXIT_CHANNEL_LOST = 70
EXIT_START_FAILED = 71
EXIT_SHUTDOWN_FAILED = 72
EXIT_CONTROL_FAILED = 73


def prepare() -> None:
    """Do what does not depend on the world. A pre-forked rank does it early, and again later."""
    os.setpgid(0, 0)
    widen_descriptor_table()
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)


def main(spec: WorldSpec, rank: int, descriptors: Sequence[int]) -> NoReturn:
    """The life of a rank; never returns.

    Args:
        descriptors: the rank's control channel, its log, the store, those of its network, and that
            of the ledger.
    """
    code = EXIT_START_FAILED
    try:
        control_fd, log_fd, store_fd, *shared = descriptors
        control = socket.socket(fileno=control_fd)
        prepare()
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        code = _Rank(spec, rank, control, store_fd, shared).run()
    except BaseException:
        _print_traceback()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _print_traceback() -> None:
    """Print the traceback, if the user's code has left a stream to print to."""
    with contextlib.suppress(Exception):
        traceback.print_exc()


class _Rank:
    def __init__(
        self,
        spec: WorldSpec,
        rank: int,
        control: socket.socket,
        store_fd: int,
        shared: list[int],
    ) -> None:
        self.spec = spec
        self.rank = rank
        # A user's socket.setdefaulttimeout must not apply here: a rank waits without end.
        control.setblocking(True)
        self.control = control
        self.pid = os.getpid()
        self.networks, self.ledgers = shared[: spec.networks], shared[spec.networks :]
        self.reader = _wire.Reader(control)
        self.sending = threading.Lock()
        self.work: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        #: What the further threads are to run, by number.
        self.threads: dict[int, queue.SimpleQueue[tuple[Any, ...]]] = {}
        self.interrupts = _Interrupts()
        self.injection = _injection.of_agent(spec.agent)
        self.timeouts = Timeouts()
        self.keys = CounterKeys()
        self.store = f"file:///proc/self/fd/{store_fd}"
        self.adoption: Adoption | None = None
        self.delays = sorted(set(spec.plan.table(rank).delaying.values()))
        #: The delays before the shutdown by message type, and by length, once it has begun.
        self.delayed_before: tuple[dict[str, int], dict[int, int] | None] | None = None
        #: What this rank was when it had joined, if it may stay for another program.
        self.newness: _anew.Newness | None = None
        self.fixture = fixture.RankFixture(
            rank=rank,
            name=spec.names[rank],
            world_size=len(spec.names),
            init_method=self.store,
            table=spec.plan.table(rank),
            # A program's own applies once the ranks have joined: the store waits as long as this
            # (rpc/__init__.py: init_rpc).
            rpc_timeout=spec.rpc_timeout if spec.runs_users_code else A_DAY,
            num_worker_threads=spec.num_worker_threads,
            agent_name=spec.agent,
        )
        self.fixture.further_options = self.further_options(rank)

    def further_options(self, rank: int) -> dict[str, Any]:
        """The options that only an agent with a ledger has."""
        if not self.ledgers:
            return {}
        faults = agent_faults(self.spec.plan, rank)
        return {"ledger_fd": self.ledgers[0], "message_faults": faults, "number": rank}

    def run(self) -> int:
        if clock.loaded():
            clock.set_rate(self.spec.rate, origin_ns=self.spec.origin_ns)
        _functions.enter_rank(self.rank, own_network=bool(self.networks))
        fixture.set_this_rank(self.fixture)
        _tracing.trace_requests()
        # A program must not see an error that it sees nowhere else: torch's own setting is True.
        symbols.ignore_rref_leaks(self.spec.ignore_leaks or self.spec.init == "adopt")
        if self.spec.runs_users_code:
            # A program's timeouts are predicted, and right at any rate.
            self.timeouts.watch()
        try:
            self.begin()
        except BaseException as error:
            self.answer(0, *_functions.dump_error(error, self.rank))
            return EXIT_START_FAILED
        if clock.loaded():
            self.watch_delays()
            clock.reset_lateness()
        if self.spec.may_stay:
            self.newness = _anew.Newness()
        if not self.spec.runs_users_code:
            # A look collects garbage, and need not go through what is older than the first step.
            gc.collect()
            gc.freeze()
        self.answer(0, "ok", b"")
        threading.Thread(target=self.listen, name="rpcprops-control", daemon=True).start()
        return self.serve()

    def begin(self) -> None:
        """Import the user's modules, and join the world, or leave that to the user's code."""
        if self.networks:
            _enter_network(self.networks)
        if self.spec.import_in_ranks is not None:
            finder.install(self.spec.import_in_ranks)
            finder.import_first(self.spec.import_in_ranks)
        if self.spec.runs_users_code:
            _handles.watch()
        self.keys = self.fixture.facts.counters
        if not self.spec.shutdown_faults and not _injection.problem():
            self.injection.take_over()
        state.meets_at.append((self.rank, self.store))
        state.starts_in.append(lambda: only_transport(self.spec.transport))
        if self.ledgers:
            state.joins_by.append(self.joins_by)
        if self.spec.init == "adopt":
            self.adopt()
        else:
            self.enter_faults()
        if self.spec.init is True:
            self.init_rpc()
            state.init_again.append(lambda _, **given: self.init_rpc(**given))
        elif self.spec.init is False and self.spec.transport == "tcp":
            # The user's own init_rpc comes at a time that we do not know.
            _limit_file_size()

    def init_rpc(self, **given: Any) -> None:
        """Initialise RPC as the world says, but for what is given in its place."""
        one = self.fixture
        if given:
            one = fixture.RankFixture(
                rank=given.get("rank", self.rank),
                name=given.get("name", one.name),
                world_size=given.get("world_size", one.world_size),
                init_method=given.get("init_method", self.store),
                table=one.fault_table,
                rpc_timeout=given.get("rpc_timeout", self.spec.rpc_timeout),
                num_worker_threads=one.num_worker_threads,
                agent_name=one.agent_name,
            )
            one.further_options = self.further_options(self.rank)
        with only_transport(self.spec.transport):
            one.init_rpc()
        if not self.spec.runs_users_code:
            symbols.set_rpc_timeout(self.spec.rpc_timeout)

    def joins_by(self, url: str) -> dict[str, Any]:
        """What ``init_rpc`` is given to join a dynamic group by an agent that has a ledger."""
        one = self.fixture
        options = one.agent.options(
            one.fault_table,
            init_method=url,
            num_worker_threads=one.num_worker_threads,
            rpc_timeout=A_DAY,
            **self.further_options(self.rank),
        )
        return {"backend": one.rpc_backend, "rpc_backend_options": options}

    def enter_faults(self) -> None:
        for fault in self.spec.plan.faults_at(self.rank):
            fault.enter_rank()

    def watch_delays(self) -> None:
        if clock.loaded():
            clock.watch_sleeps([ms * 1_000_000 for ms in self.delays])

    def adopt(self) -> None:
        """Take over the program's own use of RPC."""

        def last_look() -> dict[str, Any]:
            return {**self.look(), "after": Counters(**_held_by_process(self.keys))}

        def send(news: RpcNews) -> None:
            self.answer(0, "rpc", news)

        self.adoption = Adoption(send, self.join, last_look)
        self.adoption.install(self.rank, len(self.spec.names))

    def join(self, torchs_init_rpc: Callable[..., None], asked: Asked) -> None:
        """Join the world as the program asks to, with the faults of the rank that it names."""
        self.rank = asked.rank
        _functions.enter_rank(self.rank, own_network=bool(self.networks))
        table = self.spec.plan.table(self.rank)
        self.delays = sorted(set(table.delaying.values()))
        self.fixture = fixture.RankFixture(
            rank=asked.rank,
            name=asked.name,
            world_size=asked.world_size,
            init_method=self.store,
            table=table,
            # The store waits as long (rpc/__init__.py: init_rpc). With the program's own timeout, a
            # fast clock would give the ranks milliseconds to find each other.
            rpc_timeout=self.spec.rpc_timeout,
            num_worker_threads=asked.num_worker_threads,
            agent_name=self.spec.agent,
        )
        self.fixture.further_options = self.further_options(asked.rank)
        fixture.set_this_rank(self.fixture)
        self.enter_faults()
        with only_transport(self.spec.transport):
            torchs_init_rpc(
                asked.name,
                backend=self.fixture.rpc_backend,
                rank=asked.rank,
                world_size=asked.world_size,
                rpc_backend_options=self.fixture.rpc_backend_options,
            )
        symbols.set_rpc_timeout(self.virtual_timeout(asked.rpc_timeout))
        self.watch_delays()

    def virtual_timeout(self, timeout: float) -> float:
        """The timeout of a program's calls, in virtual seconds, given its own.

        Sixty seconds are 0.15 real seconds at rate 400, and a program that trains works for
        longer. If no fault alone can last that long, only such work could exceed them, so they get
        half of the cluster's deadline on top: a call without an answer still times out before the
        cluster calls it a hang.
        """
        plan, size = self.spec.plan, len(self.spec.names)
        longest = max((f.seconds for r in range(size) for f in plan.faults_at(r)), default=0.0)
        if timeout == 0 or self.spec.rate == 1 or longest >= timeout:
            return timeout
        return timeout + self.spec.rate * self.spec.deadline / 2

    def answer(self, number: int, kind: str, payload: Any) -> None:
        if os.getpid() != self.pid:
            # A child that a call forked has returned here. Only the rank sends the answer.
            os._exit(0)
        # This blocks while the test process does not read, and then looks wait too; but the test
        # process reads as long as it waits for a look.
        with self.sending:
            _wire.send(self.control, (number, kind, payload))

    def listen(self) -> None:
        """The control thread."""
        try:
            while True:
                message = self.reader.receive()
                if message[0] == "look":
                    self.answer(message[1], "ok", self.look())
                elif message[0] == "held":
                    self.answer(message[1], "ok", _handles.held_here())
                elif message[0] == "where":
                    self.answer(message[1], "ok", stacks.stacks_here())
                elif message[0] in ("arm", "disarm"):
                    self.answer(message[1], "ok", self.change_faults(*message))
                elif message[0] == "idle":
                    # Its world is kept: nothing comes before it begins with another program.
                    self.rest_threads(True)
                elif message[0] == "rpc":
                    assert self.adoption is not None
                    self.adoption.answers.put(None)
                else:
                    self.work.put(message)
        except (EOFError, OSError):
            # The test process is gone: nobody reads an answer.
            os._exit(EXIT_CHANNEL_LOST)
        except BaseException:
            _print_traceback()
            # Messages cannot be read any more, or a look failed; sends still work.
            with contextlib.suppress(OSError):
                self.answer(0, "broken", traceback.format_exc())
            os._exit(EXIT_CONTROL_FAILED)

    def change_faults(self, kind: str, number: int, part: int, plan: FaultPlan) -> Any:
        """Arm or disarm the faults of a part of the run; why they do not act here, and counts."""
        if kind == "arm":
            lacking = self.injection.arm(part, plan.table(self.rank))
        else:
            lacking = self.injection.disarm(part)
        return lacking, self.injection.counts(), self.injection.struck()

    def serve(self) -> int:
        """The main thread: calls in order, until told to exit."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.interrupts.handle)
        does: dict[str, Callable[..., None]] = {
            "call": self.call,
            "steps": self.steps,
            "release": _functions.release,
            "meet": self.meet,
            "rest": self.rest,
            "begin": self.begin_again,
        }
        while True:
            message = self.work.get()
            kind = message[0]
            if kind == "last":
                return self.last(*message[1:])
            if kind == "exit":
                return self.leave(*message[1:])
            does[kind](*message[1:])
            # A message that stays in a local would keep its arguments alive.
            del message

    def call(self, number: int, blob: bytes, keep: int) -> None:
        self.answer(number, *self.result_of(blob, keep))

    def last(self, number: int, blob: bytes) -> int:
        """Run a call after which this rank ends, whatever RPC still does; the exit code."""
        kind, payload = self.result_of(blob)
        try:
            seen = self.look()
        except Exception:
            # Whatever state the call left the agent in, its result counts.
            seen = None
        self.answer(number, kind, (payload, seen))
        return 0

    def result_of(self, blob: bytes, keep: int = 0) -> tuple[str, bytes]:
        """Run a call: "ok" or "error", and what it returned or raised."""
        try:
            with self.interrupts.let_through():
                result = _functions.run_call(blob)
            if keep:
                _functions.keep(keep, result)
                return "ok", _functions.dumps(None)
            return _functions.dump_result(result, self.rank)
        except BaseException as error:
            dumped = _functions.dump_error(error, self.rank)
            traceback.clear_frames(error.__traceback__)
            return dumped

    def steps(
        self, first: int, steps: Sequence[tuple[int, Any]], contexts: dict[str, int], thread: int
    ) -> None:
        """Run numbered steps one after another, and answer each; none after one that raises."""
        if not thread:
            self.run_steps(first, steps, contexts)
            return
        if thread not in self.threads:
            work = self.threads[thread] = queue.SimpleQueue()
            name = f"rpcprops-branch-{thread}"
            threading.Thread(target=self.serve_branch, args=(work,), name=name, daemon=True).start()
        self.threads[thread].put((first, steps, contexts))

    def serve_branch(self, work: queue.SimpleQueue[tuple[Any, ...]]) -> None:
        """A further thread: steps in order, until the rank exits."""
        while True:
            self.run_steps(*work.get())

    def run_steps(
        self, first: int, steps: Sequence[tuple[int, Any]], contexts: dict[str, int]
    ) -> None:
        for number, (index, step) in enumerate(steps, first):
            outcome = interpreter.run_step(index, step, self.spec.names, contexts)
            self.answer(number, "ok", outcome)
            if outcome.error is not None:
                break

    def leave(self, number: int, end: End | None) -> int:
        """Shut RPC down in a way if asked to; answer with the error and a look; the exit code."""
        code, blob = 0, b""
        if self.adoption is not None:
            self.adoption.is_over = True
        if end is not None:
            self.begin_to_leave()
            if end.ignores_leaks:
                symbols.ignore_rref_leaks(True)
            try:
                ends.end_rank(end.how, end.wait_of(self.rank))
            except BaseException as error:
                code = EXIT_SHUTDOWN_FAILED
                _, blob = _functions.dump_error(error, self.rank)
                _print_traceback()
        seen = self.look()
        if end is not None:
            seen["after"] = Counters(**_held_by_process(self.keys))
        self.answer(number, "ok", (blob, seen))
        return code

    def begin_to_leave(self) -> None:
        """Tell the agent that the shutdown begins, if faults act on what that sends.

        Of the delays from here on none is predicted, so this rank goes on to say what it had
        counted before, also where the shutdown hangs. The record of messages may have more: the
        agent marks what it is given after the count is read.
        """
        if self.spec.shutdown_faults:
            counted = self.injection.counts()
            self.delayed_before = (counted.delayed if counted else {}, self.held_up())
            self.injection.leave()

    # A world that is used again.

    def meet(self, number: int) -> None:
        """Begin to leave as :meth:`leave` does, but stay able to go on; then as :meth:`rest`."""
        self.begin_to_leave()
        try:
            symbols.meet_at_end()
        except BaseException as error:
            self.answer(number, *_functions.dump_error(error, self.rank))
            return
        self.rest(number, again=False)

    def rest(self, number: int, again: bool) -> None:
        """Drop what the program keeps here; answer with a last look, and with what is left.

        Args:
            again: whether nothing was left a moment ago; then only what is under way is looked for.
        """
        _anew.forget()
        _functions.release_all()
        gc.collect()
        agent = symbols.current_agent()
        for number_of_look in range(_REST_LOOKS):
            waits = number_of_look < _END_LOOKS and not wire.has_ended_in(self.ledgers[0])
            if not waits and not _anew.busy_parts(agent.state()):
                break
            time.sleep(_REST_SECONDS * self.spec.rate)
        # What is seen below is true as long as this number stays the same.
        sent = wire.count_in(self.ledgers[0])
        seen = self.seen()
        seen["sent"] = sent
        seen["after"] = Counters(**_held_by_process(self.keys))
        seen["busy"] = _anew.busy_parts(agent.state())
        assert self.newness is not None
        seen["differs"] = "" if again else self.newness.difference()
        seen["processor"] = _processor_seconds()
        sys.stdout.flush()
        sys.stderr.flush()
        self.answer(number, "ok", seen)

    def begin_again(self, number: int, plan: FaultPlan) -> None:
        """Begin with another program, under its faults, and count all from the beginning."""
        self.rest_threads(False)
        table = plan.table(self.rank)
        self.spec = replace(self.spec, plan=plan)
        self.delays = sorted(set(table.delaying.values()))
        self.delayed_before = None
        self.fixture.fault_table = table
        self.fixture.further_options = self.further_options(self.rank)
        given = self.fixture.agent.arguments(table)
        symbols.current_agent().rearm(
            given["messages_to_fail"],
            given["num_fail_sends"],
            given["messages_to_delay"],
            agent_faults(plan, self.rank),
        )
        assert self.newness is not None
        self.newness.begin()
        self.timeouts.begin_again()
        if clock.loaded():
            self.watch_delays()
            clock.reset_lateness()
        self.answer(number, "ok", (time.monotonic_ns(), _processor_seconds()))

    @staticmethod
    def rest_threads(on: bool) -> None:
        """Let the threads of this rank that look for work without end sleep, or go on."""
        if clock.loaded():
            clock.rest(on)

    def look(self) -> dict[str, Any]:
        """What this rank holds now, after a garbage collection.

        In a program with a ledger, also how many messages had been sent in its world before this
        look, and what the agent does besides holding RRefs.
        """
        knows = bool(self.ledgers) and not self.spec.runs_users_code
        sent = wire.count_in(self.ledgers[0]) if knows else None
        gc.collect()
        busy: list[str] = []
        if knows:
            try:
                agent = symbols.current_agent()
            except RuntimeError:
                # None runs, or another thread has just shut it down.
                sent = None
            else:
                # A program may initialise RPC with an agent of torch's, which has no ledger.
                state = getattr(agent, "state", None)
                busy = [] if state is None else _anew.moving_parts(state())
                sent = None if state is None else sent
        return {**self.seen(), "sent": sent, "busy": busy}

    def seen(self) -> dict[str, Any]:
        """As :meth:`look`, where garbage was collected a moment ago."""
        counted, delays = self.injection.counts(), self.held_up()
        if self.delayed_before is not None:
            delayed, delays = self.delayed_before
            counted = counted and counted._replace(delayed=delayed)
        return {
            "counters": read_counters(self.keys),
            "calls": dict(state.ran),
            "sends": counted,
            "struck": self.injection.struck(),
            "timeout": self.timeouts.look(),
            "late": clock.lateness().maximum if clock.loaded() else 0.0,
            "delays": delays,
        }

    def held_up(self) -> dict[int, int] | None:
        """The sends that were held up by the table, by milliseconds; None if nothing counts it."""
        if not clock.loaded():
            return None
        return dict(zip(self.delays, clock.sleep_counts(), strict=False))


class _Interrupts:
    """SIGINT in a rank: a KeyboardInterrupt in the user's code, and nowhere else.

    A signal between two calls waits for the next call. In our code it would cut an answer off
    and end the rank.
    """

    def __init__(self) -> None:
        self.passing = False
        self.waiting = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Do what Python's own handler does, now or later."""
        if self.passing:
            raise KeyboardInterrupt
        self.waiting = True

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Let interrupts through while user code runs."""
        try:
            self.passing = True
            if self.waiting:
                self.waiting, self.passing = False, False
                raise KeyboardInterrupt
            yield
        finally:
            self.passing = False


def _enter_network(descriptors: list[int]) -> None:
    try:
        namespaces.enter(descriptors)
    except OSError as error:
        msg = (
            f"a rank could not enter the network of its world: {error.strerror}. Has a module that "
            f"ranks import changed the user of its process? network='host' does without."
        )
        raise MachineCannot(msg) from error


def read_counters(keys: CounterKeys | None = None) -> Counters | None:
    """The counters of this process, None when no agent runs here.

    Args:
        keys: torch's names for them; those of the installed torch unless given.
    """
    if not symbols.is_agent_set():
        return None
    keys = keys or installed().counters
    try:
        agent = symbols.current_agent().get_debug_info()
    except RuntimeError:
        # Another thread has just shut it down.
        if symbols.is_agent_set():
            raise
        return None
    return Counters(**_held_by_process(keys), **_counted(keys.agent, agent))


def _held_by_process(keys: CounterKeys) -> dict[str, int]:
    """What torch counts for the process, both while an agent runs and after it was shut down."""
    return {
        **_counted(keys.rrefs, symbols.rref_debug_info()),
        **_counted(keys.autograd, symbols.autograd_debug_info()),
    }


def _counted(keys: Mapping[str, str], info: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(info[key]) for name, key in keys.items()}


def _processor_seconds() -> float:
    """Processor time of this process so far, in real seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def widen_descriptor_table() -> None:
    """Make room for every descriptor now, while this process has one thread.

    When the table of a process with threads grows, the kernel waits for an RCU grace period (6 to
    30 ms, measured in `socket` and `accept4`). An agent opens a hundred descriptors.
    """
    with contextlib.suppress(OSError):
        os.close(os.dup2(0, _DESCRIPTORS, inheritable=False))


@contextlib.contextmanager
def only_transport(name: str) -> Iterator[None]:
    """TensorPipe probes its transports when the agent starts, so the limit is set only then."""
    if name != "tcp":
        yield
        return
    before = _limit_file_size()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _limit_file_size() -> tuple[int, int]:
    if threading.current_thread() is threading.main_thread():
        # Other threads may not; the first init_rpc, which was in this one, has done it.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_NO_SHARED_MEMORY, hard))
    return soft, hard
