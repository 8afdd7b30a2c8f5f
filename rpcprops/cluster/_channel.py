"""One rank as the test process sees it: messages to it, its answers, and how it ended."""

from __future__ import annotations

import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rpcprops.clock.sends import Sends, Struck
from rpcprops.cluster import _wire, stacks
from rpcprops.cluster._spec import RpcNews
from rpcprops.cluster.logs import RankLog
from rpcprops.errors import HarnessError, UsageError
from rpcprops.outcomes import Counters, RaisedError, RankOutcome
from rpcprops.torch_facts import installed

#: The most lines of a log that a note shows.
_NOTED_LINES = 8
#: Real seconds that a send waits for a rank that reads nothing. What is left goes out later, while
#: an answer is awaited. A rank that reads resumes within milliseconds.
_SEND_PATIENCE = 0.2


def _is_of_torch(line: str) -> bool:
    return re.match(installed().texts.log_line, line) is not None


@dataclass
class Channel:
    """One rank, as the test process sees it."""

    rank: int
    name: str
    sock: socket.socket
    log: RankLog
    pid: int = 0
    answers: dict[int, tuple[str, Any]] = field(default_factory=dict)
    #: Numbers whose answers nobody waits for any more.
    given_up: set[int] = field(default_factory=set)
    status: int | None = None
    processor_seconds: float = 0.0
    #: What its earlier programs took, if it is used again.
    processor_before: float = 0.0
    killed: bool = False
    counters: Counters | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    delayed_sends: Mapping[int, int] | None = None
    sends: Sends | None = None
    #: What the faults of each part of the run have done, by the number of the part.
    struck: Mapping[int, Struck] = field(default_factory=dict)
    late_seconds: float = 0.0
    shortest_timeout: float | None = None
    stack: str = ""
    #: What holds the handles of RRefs and the contexts that leaked, in words.
    held: tuple[str, ...] = ()
    shutdown_error: RaisedError | None = None
    counters_after_shutdown: Counters | None = None
    #: Of a rank with a ledger: how many messages had been sent in its world before the last look,
    #: and what its agent did then besides holding RRefs.
    sent: int | None = None
    busy: tuple[str, ...] = ()
    #: Whether this rank did not answer the last look in time.
    silent: bool = False
    #: The number of the request to shut down and exit, once it was sent.
    exit_number: int | None = None
    #: Whether a function of the user's was sent to this rank.
    ran_users_code: bool = False
    #: The numbers of calls of the user's that have not been answered.
    open_calls: set[int] = field(default_factory=set)
    #: The last that was read of what the rank says of the program's own use of RPC; and the rest.
    rpc: RpcNews = field(default_factory=RpcNews)
    rpc_news: deque[RpcNews] = field(default_factory=deque)
    #: Why this rank can be sent nothing more although it may still live; empty while it can.
    broken: str = ""

    def __post_init__(self) -> None:
        self.sock.setblocking(False)
        self.reader = _wire.Reader(self.sock)
        self.writer = _wire.Writer(self.sock)

    @property
    def is_silent_and_empty(self) -> bool:
        """Whether nothing is on its way, in either direction, so that it can be used again."""
        waits = self.answers or self.given_up or self.open_calls or self.reader.buffer
        return not (self.lost or self.broken or waits or self.writer.is_waiting)

    @property
    def lost(self) -> bool:
        return self.reader.closed or self.status is not None

    @property
    def exited_by_itself(self) -> bool:
        """Whether it has exited, and by itself."""
        return self.status is not None and not os.WIFSIGNALED(self.status)

    def send(self, message: tuple[Any, ...], seconds: float) -> None:
        """Send a message. Wait for the rank to read it, for `seconds` real seconds at most.

        What is left goes out when the cluster reads its channels and the rank reads again.
        """
        self.send_packed(_wire.pack(message), seconds)

    def send_packed(self, packed: bytes, seconds: float) -> None:
        """As :meth:`send`, for a message that was packed once for several ranks."""
        self.writer.put_packed(packed)
        self.writer.flush()
        deadline = time.monotonic() + seconds
        while self.writer.is_waiting and not self.reader.closed:
            left = min(_SEND_PATIENCE, deadline - time.monotonic())
            if left <= 0 or not self.events(left):
                break

    def events(self, seconds: float) -> int:
        """Wait until this rank sends or reads something, and handle that; the `poll` events, or 0.

        Its answers are read too, because a rank that is blocked in an answer may read nothing.
        """
        poller = select.poll()
        poller.register(self.sock, self.awaited_events())
        happened = 0
        for _, happened in poller.poll(seconds * 1000):
            self.handle(happened)
        return happened

    def awaited_events(self) -> int:
        """The events of the socket that `poll` must wait for."""
        return select.POLLIN | (select.POLLOUT if self.writer.is_waiting else 0)

    def handle(self, happened: int) -> None:
        """Read or write, as the events of `poll` allow."""
        if happened & ~select.POLLOUT:
            self.read()
        if happened & select.POLLOUT:
            self.writer.flush()

    def read(self) -> None:
        """Take in the answers that have arrived."""
        self.reader.fill()
        try:
            for number, kind, payload in self.reader.messages():
                if kind == "broken":
                    self.broken = payload
                elif kind == "rpc":
                    self.rpc_news.append(payload)
                elif number in self.given_up:
                    self.given_up.remove(number)
                else:
                    self.open_calls.discard(number)
                    self.answers[number] = (kind, payload)
        except Exception as error:
            self.broken = f"what came from it is no message: {error!r}"
            self.reader.closed = True

    def give_up(self, number: int) -> None:
        """Drop the answer of that number, now or when it arrives."""
        if self.answers.pop(number, None) is None:
            self.given_up.add(number)

    def has_left_without(self, number: int) -> bool:
        """Whether that answer will never come: the rank is gone, and all that it sent was read."""
        return self.reader.closed and number not in self.answers

    @property
    def has_left(self) -> bool:
        """Whether it exited as it was asked to: by itself, after its shutdown ended or raised."""
        asked = self.exit_number
        return self.exited_by_itself and asked is not None and not self.has_left_without(asked)

    def must_work(self) -> None:
        """Raise if nothing can be sent to this rank any more; the message says why.

        Raises:
            UsageError: the user's own code ran in the rank, and may have caused this.
            HarnessError: no such code ran, so it is a bug of ours.
        """
        if not self.broken:
            return
        msg = f"the control channel of {self.name} is broken: {self.broken.rstrip()}"
        if not self.ran_users_code:
            raise HarnessError(msg)
        msg += (
            "\nA function that was called there has probably read, written or closed a descriptor "
            "that it had not opened, or changed what all code of the process needs (sys.modules, a "
            "trace function). If none has, rpcprops is at fault: please report it with this "
            "message."
        )
        raise UsageError(msg)

    def note_look(self, seen: dict[str, Any]) -> None:
        self.silent = False
        if seen["counters"] is not None:
            self.counters = seen["counters"]
        self.calls = seen["calls"]
        self.sent, self.busy = seen["sent"], tuple(seen["busy"])
        self.note_sends(seen["sends"], seen["struck"])
        self.shortest_timeout = seen["timeout"]
        self.delayed_sends = seen["delays"]
        self.late_seconds = max(self.late_seconds, seen["late"])

    def note_sends(self, counted: Sends | None, struck: Mapping[int, Struck]) -> None:
        """Record what the agent of this rank has sent so far."""
        self.sends = counted
        self.struck = struck

    @property
    def runs_calls(self) -> bool:
        """Whether this rank was running a call for another rank at the last look."""
        return self.counters is not None and self.counters.server_calls > 0

    def notes(self, lines: int = _NOTED_LINES) -> list[str]:
        """Notes that explain how this rank ended: where it was, and the last lines of its log.

        Its whole stacks and its whole log are in the outcome.
        """
        text = self.log.text()
        notes: list[str] = []
        if self.held:
            has = [
                line if line.startswith(" ") else f"{self.name} has {line}" for line in self.held
            ]
            notes.append("\n".join(has))
        at = stacks.where(self.name, self.stack or (text if self.lost else ""))
        if self.stack and not at:
            at = [f"{self.name} runs no code of yours"]
        if at:
            notes.append("\n".join(at))
        of_stack = set(self.stack.splitlines())
        wrote = [line for line in text.splitlines() if line.strip() and line not in of_stack]
        # What torch logs at INFO is the same in every run, and long.
        told = [line for line in wrote if not line.startswith("[I") or not _is_of_torch(line)]
        last = stacks.without_ours(stacks.without_stacks(told))[-lines:] if lines else []
        if last:
            notes.append("\n".join([f"last lines of {self.name}:", *last]))
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
            sent=self.sends and self.sends.sent,
            failed_by_type=self.sends and self.sends.failed,
            delayed_by_type=self.sends and self.sends.delayed,
            calls=dict(self.calls),
            shutdown_error=self.shutdown_error,
            log=text,
            stack=self.stack,
            processor_seconds=self.processor_seconds,
            late_seconds=self.late_seconds,
            shortest_timeout=self.shortest_timeout,
            counters_after_shutdown=self.counters_after_shutdown,
        )
