"""Hunts by several processes at once: each has its own server, and draws different batches.

The process that hunts starts this file so many times, as *workers*. It writes one order after the
other to the standard input of each, and reads what comes back, as lines of JSON. Only this process
writes the file of the hunt. A guard (:mod:`rpcprops._guard`) sees to it that no worker outlives
this process, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import msgspec

from rpcprops import _guard
from rpcprops._hunt import Batch, Hunt, Order, Wanted, run_order
from rpcprops.cluster import ClusterServer
from rpcprops.cluster.options import parse_clock
from rpcprops.errors import HarnessError, MachineCannot, UsageError
from rpcprops.report.in_flight import collect, died_line
from rpcprops.runner import Runner

#: So many workers may die while they have the same order.
_MOST_DEATHS = 3
#: Real seconds that all workers have to end by themselves.
_END_SECONDS = 3.0
_BLOCK = 1 << 16


class Ranks(msgspec.Struct, frozen=True):
    """What the workers' ranks are: clock and agent as for ``rpcprops hunt``; and whether they are
    used again, where their agent can be.
    """

    clock: str = "auto"
    agent: str | None = None
    reuse: bool = False


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """A worker has its server; the values are those of :class:`ClusterServer`."""

    torch_version: str
    agent: str
    clock_note: str
    network_problem: str


class Ran(msgspec.Struct, tag="ran", frozen=True):
    """A worker has run so many examples of its order."""

    examples: int


class Done(msgspec.Struct, tag="done", frozen=True):
    """A worker has run an order; and why its ranks ran in real time unasked, if they did."""

    batch: Batch
    clock_problem: str


class Stopped(msgspec.Struct, tag="stopped", frozen=True):
    """A worker cannot go on: the class of the error, and its message."""

    error: str
    message: str


Message: TypeAlias = Ready | Ran | Done | Stopped

_ERRORS: dict[str, type[Exception]] = {
    cls.__name__: cls for cls in (UsageError, MachineCannot, HarnessError)
}


@dataclass
class _Worker:
    """A worker as the process that hunts sees it.

    Attributes:
        order: what it draws from at the moment.
        began: the real seconds of hunting at which it began to.
        examples: how many examples it has run since.
        text: what it has written of a line that is not whole yet.
    """

    number: int
    process: subprocess.Popen[bytes]
    is_ready: bool = False
    order: Order | None = None
    began: float = 0.0
    examples: int = 0
    text: bytes = b""

    def give(self, order: Order, began: float) -> None:
        """Let it run an order."""
        self.order, self.began, self.examples = order, began, 0
        assert self.process.stdin is not None
        # If it has died, the end of its output says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")

    def messages(self) -> list[Message] | None:
        """What it has written since; None if it has ended."""
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), _BLOCK)
        if not read:
            return None
        *lines, self.text = (self.text + read).split(b"\n")
        return [msgspec.json.decode(line, type=Message) for line in lines]

    def how_it_ended(self) -> str:
        """In words, once its output has ended."""
        code = self.process.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


@dataclass
class Team:
    """The workers of a hunt.

    Args:
        jobs: how many workers there are at once.
        ranks: what their ranks are.

    Attributes:
        on_ready: called once with what the first worker says of its server.
        on_example: called after each example, with how many are under way and an order.
        on_batch: called after each batch, when it is in the file.
        on_ending: called when it begins to end the workers, which takes some seconds.
        on_problem: called with a line about a worker that has died, or about the clock.
    """

    hunt: Hunt
    jobs: int
    ranks: Ranks = field(default_factory=Ranks)
    on_ready: Callable[[Ready], None] = lambda _: None
    on_example: Callable[[int, Order], None] = lambda *_: None
    on_batch: Callable[[Batch], None] = lambda _: None
    on_problem: Callable[[str], None] = lambda _: None
    on_ending: Callable[[], None] = lambda: None
    _workers: dict[int, _Worker] = field(default_factory=dict)
    _again: deque[Order] = field(default_factory=deque)
    _deaths: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _selector: selectors.BaseSelector = field(init=False)
    _is_hunting: bool = False
    _now: Callable[[], float] = lambda: 0.0

    def go_on(self, wanted: Wanted) -> None:
        """As :func:`rpcprops._hunt.go_on`.

        An order during which a worker dies is given to another one.

        Raises:
            UsageError: the hunt is of another torch, or of another agent.
            MachineCannot: a worker cannot run ranks, or several died with the same order.
        """
        if not self._has_work(wanted):
            return
        with contextlib.ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            try:
                for number in range(1, 1 + self.jobs):
                    self._start(number, stack)
                while self._has_work(wanted):
                    for worker in self._idle():
                        order = self._next_order(wanted)
                        if order is not None:
                            worker.give(order, self._now())
                    for key, _ in self._selector.select():
                        self._hear(key.data, stack)
            finally:
                # At the same time, and before the guards of the stack end one after the other.
                self._end_all()

    def _hear(self, worker: _Worker, stack: contextlib.ExitStack) -> None:
        """Act on what a worker has written, or on its end."""
        messages = worker.messages()
        if messages is None:
            assert worker.process.stdout is not None
            self._selector.unregister(worker.process.stdout)
            self._bury(worker)
            self._start(worker.number, stack)
        for message in messages or []:
            self._take(worker, message)

    def _next_order(self, wanted: Wanted) -> Order | None:
        """What a worker does next: first what another one has not ended."""
        if self._again:
            return self._again.popleft()
        return self.hunt.order(
            wanted,
            under_way=[w.order for w in self._workers.values() if w.order is not None],
            jobs=self.jobs,
        )

    def _start(self, number: int, stack: contextlib.ExitStack) -> None:
        """Start a worker, which ends with the stack at the latest."""
        worker = _Worker(number, stack.enter_context(_started(self.ranks)))
        self._workers[number] = worker
        assert worker.process.stdout is not None
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _has_work(self, wanted: Wanted) -> bool:
        under_way = any(worker.order is not None for worker in self._workers.values())
        return under_way or bool(self._again) or self.hunt.examples < wanted.examples

    def _idle(self) -> list[_Worker]:
        return [w for w in self._workers.values() if w.is_ready and w.order is None]

    def _take(self, worker: _Worker, message: Message) -> None:
        """Act on what a worker says."""
        match message:
            case Ready():
                self.hunt.draw_for(message.torch_version, message.agent)
                worker.is_ready = True
                if not self._is_hunting:
                    # To start the workers is no hunting.
                    self._is_hunting = True
                    self._now = self.hunt.clock()
                    self.on_ready(message)
                self._tell(message.network_problem)
            case Ran():
                worker.examples = message.examples
                assert worker.order is not None
                self.on_example(sum(w.examples for w in self._workers.values()), worker.order)
            case Done():
                batch = message.batch
                batch.began, worker.order, worker.examples = worker.began, None, 0
                self.hunt.append(batch)
                self.on_batch(batch)
                self._tell(message.clock_problem)
            case Stopped():
                raise _ERRORS[message.error](message.message)

    def _tell(self, problem: str) -> None:
        """Say something once."""
        if problem and problem not in self._told:
            self._told.add(problem)
            self.on_problem(problem)

    def _bury(self, worker: _Worker) -> None:
        """Name a worker that has died, and keep its order for another one."""
        order = worker.order
        doing = "before it was ready" if order is None else f"during {order}"
        said = f"worker {worker.number} ended {worker.how_it_ended()} {doing}"
        key = ("", worker.number, "") if order is None else order.key
        self._deaths[key] = self._deaths.get(key, 0) + 1
        if self._deaths[key] >= _MOST_DEATHS:
            msg = (
                f"{said}, and {_MOST_DEATHS} workers ended so; run fewer --jobs if memory was "
                "short, or the same with --jobs 1 to see why."
            )
            raise MachineCannot(msg)
        if order is not None:
            self._again.append(order)
            said += "; another one has its draws now"
        self.on_problem(said)
        left = died_line(collect(Path.cwd()), f"worker {worker.number}")
        if left:
            self.on_problem(left)

    def _end_all(self) -> None:
        """End all workers at the same time."""
        self.on_ending()
        for worker in self._workers.values():
            # The guard hands the signal on to the worker.
            worker.process.terminate()
        end = time.monotonic() + _END_SECONDS
        for worker in self._workers.values():
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                # The kernel then kills the worker, and what it has started ends without it.
                worker.process.kill()


@contextlib.contextmanager
def _started(ranks: Ranks) -> Iterator[subprocess.Popen[bytes]]:
    """A worker, until the block is left."""
    options = msgspec.json.encode(ranks).decode()
    with _guard.guarded(
        [sys.executable, "-m", "rpcprops._hunt_jobs", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        # A Ctrl-C is for the process that hunts, which ends its workers.
        start_new_session=True,
    ) as process:
        yield process


def _work(ranks: Ranks, orders: IO[bytes], said: IO[bytes]) -> None:
    """In a worker: run orders until there are no more."""

    def say(message: Message) -> None:
        said.write(msgspec.json.encode(message) + b"\n")

    clock = parse_clock(ranks.clock)
    server = ClusterServer(clock=clock, agent=ranks.agent, reuse=ranks.reuse)
    try:
        server.start()
        runner = Runner(server)
        say(Ready(server.torch_version, server.agent, server.clock_note, server.network_problem))
        for line in iter(orders.readline, b""):
            order = msgspec.json.decode(line, type=Order)
            batch = run_order(order, runner, lambda batch: say(Ran(len(batch.cases))))
            say(Done(batch, server.clock_problem))
    except (UsageError, MachineCannot) as error:
        say(Stopped(type(error).__name__, str(error)))
    except Exception:
        say(Stopped(HarnessError.__name__, traceback.format_exc()))
    finally:
        server.close()


def main(arguments: list[Any]) -> None:
    """A worker: its options as JSON."""
    ranks = msgspec.json.decode(arguments[0], type=Ranks)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What ranks or libraries print goes to stderr, and nobody else reads the orders.
    orders, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # The process that hunts has gone, or wants no more.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _work(ranks, orders, said)


if __name__ == "__main__":
    main(sys.argv[1:])
