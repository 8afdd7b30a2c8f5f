"""Waits for answers of ranks, and finds which rank is to blame when an answer does not come.

A rank may have died, before its time or before it joined the world. It may be silent, or hang in
its own call or in a call for another rank. Waiting and blaming belong together: who waits must
notice a death, and who reports a hang first asks all ranks for a look.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

import psutil

from rpcprops import errors
from rpcprops.cluster import _functions, _limits, stacks
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._found import Found, shorter_timeout
from rpcprops.cluster._phases import Phase, Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import A_DAY
from rpcprops.errors import MachineCannot, text_of
from rpcprops.torch_facts import installed

#: Real seconds to wait for the news that a rank has died, after a call in another rank failed
#: because its connection was lost.
_DEATH_SECONDS = 1.0
#: Real seconds to wait for the exit of a rank after a result that ends the run.
_LAST_DEATH_SECONDS = 0.3
#: Real seconds within which a server reports the exit of a rank whose channel has closed.
_EXIT_SECONDS = 5.0
#: How a rank is described that does not even answer a look, and the real seconds that a running
#: rank needs at most for that answer once another has hung.
_SILENT = "does not answer the control channel"
LOOK_SECONDS = 2.0
#: Real seconds that faulthandler needs at most to write all stacks, from the signal on.
_STACK_SECONDS = 0.3
#: Real seconds to wait for the answers of ranks that are asked where they are.
_WHERE_SECONDS = 1.0
#: The same for what holds the handles that leaked.
_HELD_SECONDS = 3.0


def _names(channels: Sequence[Channel]) -> str:
    return ", ".join(channel.name for channel in channels)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Diagnosis:
    """Finds what is wrong with the ranks of one world, and keeps it in `found`.

    Args:
        joins: whether we make the ranks join the world, and so must report why one did not.
        rpc_timeout: the timeout of calls that name none, in virtual seconds; None if the user's
            code chooses it.
    """

    def __init__(
        self,
        ranks: Ranks,
        phases: Phases,
        deadlines: Deadlines,
        *,
        joins: bool,
        rpc_timeout: float | None,
    ) -> None:
        self.found = Found(ranks.channels)
        self._rpc_timeout = rpc_timeout
        self._ranks = ranks
        self._phases = phases
        self._deadlines = deadlines
        self._joins = joins

    # Waiting.

    def look(self, phase: Phase | None = None, wait: float | None = None) -> bool:
        """Read what every rank holds; False when one does not answer (see :meth:`gather`)."""
        number = self._ranks.send_to_all("look")
        own = phase or Phase("run", self._deadlines.look)
        answers = self.gather(own, number, _SILENT, wait)
        if answers is None:
            return False
        for channel, (_, seen) in zip(self._ranks.channels, answers, strict=True):
            channel.note_look(seen)
        return True

    def gather(
        self, phase: Phase, number: int, complaint: str, wait: float | None = None
    ) -> list[tuple[str, Any]] | None:
        """The answers of all ranks to one number.

        None when a rank died or hung (that is recorded), or when it has shut down and exited, or
        `wait` real seconds passed (which is not).
        """
        until = None if wait is None else time.monotonic() + wait
        while True:
            missing = self._ranks.without_answer(number)
            if not missing:
                return [c.answers.pop(number) for c in self._ranks.channels]
            if self.dead(phase):
                return None
            self._read_to_end(missing)
            missing = self._ranks.without_answer(number)
            if any(channel.has_left for channel in missing):
                return None
            if not missing:
                continue
            if phase.left() <= 0:
                if complaint == _SILENT:
                    self._note_silent(missing)
                self.hung(phase, missing, complaint)
                return None
            if until is not None and time.monotonic() > until:
                self._note_silent(missing)
                for channel in self._ranks.channels:
                    channel.give_up(number)
                return None
            self._ranks.pump(min(phase.left(), 0.5))

    def _read_to_end(self, channels: Sequence[Channel]) -> None:
        """Read what ranks have sent before they exited: the server may report that exit first."""
        until = time.monotonic() + _EXIT_SECONDS
        while any(c.exited_by_itself and not c.reader.closed for c in channels):
            if time.monotonic() > until:
                return
            self._ranks.pump(0.2)

    def _note_silent(self, missing: Sequence[Channel]) -> None:
        for channel in self._ranks.channels:
            channel.silent = channel in missing

    def wait_until_joined(self) -> None:
        """Wait until each rank has joined the world, or has said why it cannot.

        Raises:
            MachineCannot: a rank met a limit of this machine.
        """
        with self._phases.open("start", self._deadlines.start) as phase:
            answers = self.gather(phase, 0, "did not join the world") or []
            for channel, (kind, payload) in zip(self._ranks.channels, answers, strict=False):
                if kind == "error":
                    phase.fail("a rank did not join the world")
                    self._did_not_join(channel, payload)

    # Ranks that do not join.

    def _did_not_join(self, channel: Channel, payload: bytes) -> None:
        """Record why a rank did not join the world.

        Raises:
            MachineCannot: the rank met a limit of this machine.
        """
        error = _functions.load_error(payload, channel.rank)
        if isinstance(error, MachineCannot):
            raise error
        message = f"joining the world raised {type(error).__name__}: {text_of(error)}"
        self._blame_machine(channel, message)
        self.found.add("UnexpectedError", message, channel.rank)

    def _blame_machine(self, channel: Channel, message: str) -> None:
        """Raise MachineCannot if a rank that did not join the world names a machine limit."""
        lacks = _limits.scarcity(f"{message}\n{channel.log.text()}") if self._joins else ""
        if lacks:
            msg = (
                f"{channel.name} could not join a world of {len(self._ranks.channels)}, for the "
                f"machine has not enough of something ({lacks}; see `ulimit -a`, and the limits of "
                f"the container): {message}"
            )
            raise MachineCannot(msg)

    # Ranks that die.

    def dead(self, phase: Phase) -> bool:
        """Whether a rank has died; if so, that is recorded. One that has shut down has not."""
        self._ranks.must_be_connected()
        self._wait_for_exits()
        dead = [c for c in self._ranks.channels if c.status is not None and not c.has_left]
        if not dead:
            return False
        if phase.name == "start":
            for channel in dead:
                kind, payload = channel.answers.get(0, ("", b""))
                if kind == "error":
                    self._did_not_join(channel, payload)
                else:
                    self._blame_machine(channel, channel.outcome().describe_end())
        if not self.found:
            self._find_deaths(phase, dead)
        phase.fail("a rank died", tuple(c.rank for c in dead))
        return True

    def _wait_for_exits(self) -> None:
        """Wait for the exits of ranks whose channels are closed: the server reports them later.

        Raises:
            HarnessError, UsageError: such a rank still lives.
        """
        closed = [c for c in self._ranks.channels if c.reader.closed and c.status is None]
        if not closed:
            return
        deadline = time.monotonic() + _EXIT_SECONDS
        while any(c.status is None for c in closed) and time.monotonic() < deadline:
            self._ranks.pump(0.2)
            self._ranks.must_be_connected()
        for channel in closed:
            if channel.status is None and _lives(channel.pid):
                channel.broken = "it has closed, and its process lives on"
        self._ranks.must_be_connected()

    def _find_deaths(self, phase: Phase, dead: Sequence[Channel]) -> None:
        for channel in dead:
            ended = channel.outcome().describe_end()
            message = f"{channel.name} died during {phase.name}: {ended}"
            self.found.add("RankDied", message, channel.rank)

    def blame_death(self, error: BaseException) -> None:
        """Raise what killed a rank, if one has died: the error of another rank came from that."""
        __tracebackhide__ = True
        # The channel of a dead rank closes at about the time when its peers lose their connections.
        is_lost = installed().texts.lost_connection in text_of(error)
        deadline = time.monotonic() + (_DEATH_SECONDS if is_lost else 0)
        self._ranks.pump(0.0)
        while not any(c.lost for c in self._ranks.channels) and time.monotonic() < deadline:
            self._ranks.pump(0.05)
        if self._phases.over or not any(c.lost for c in self._ranks.channels):
            return
        with self._phases.open("run", self._deadlines.look) as phase:
            self.dead(phase)
        try:
            self.found.raise_first()
        except errors.BrokenPromise as found:
            raise found from error

    def bad_exits(self, phase: Phase, finished: Container[int], number: int) -> bool:
        """Record each rank that a signal ended, or that ended without that answer or `finished`."""
        dead = [
            c
            for c in self._ranks.channels
            if c.status is not None
            and (not c.exited_by_itself or (c.rank not in finished and c.has_left_without(number)))
        ]
        if dead:
            self._find_deaths(phase, dead)
            phase.fail("a rank died", tuple(c.rank for c in dead))
        return bool(dead)

    def wait_for_bad_exits(self, phase: Phase, finished: Container[int], number: int) -> None:
        """Wait for the death of a rank that a result may be about, and record it."""
        deadline = time.monotonic() + _LAST_DEATH_SECONDS
        while time.monotonic() < deadline and not self.bad_exits(phase, finished, number):
            self._ranks.pump(0.05)

    # Ranks that hang.

    def find_remedy(self) -> None:
        """Find what a user can do about a rank that waits, if a fault lost what it waits for."""
        if self._rpc_timeout is not None and self._rpc_timeout >= A_DAY:
            self.found.remedy = shorter_timeout(self._ranks.messages(), self._rpc_timeout)

    def hung(self, phase: Phase, who: Sequence[Channel], complaint: str) -> None:
        """Record a hang, with the stacks of all ranks and the ranks that may have caused it."""
        passed = phase.passed()
        channels = self._ranks.channels
        busy: list[Channel] = []
        # Before a rank has joined, and after it has left, it cannot answer a look.
        if phase.name != "start" and not any(c.silent or c.lost for c in channels):
            if self.look(Phase("run", 2 * LOOK_SECONDS), LOOK_SECONDS):
                busy = [c for c in channels if c not in who and c.runs_calls]
            elif self.found:
                ranks = [v.rank for v in self.found.violations if v.rank is not None]
                phase.fail("a rank died", tuple(ranks))
                return
        # This comes last, because it may end a rank: see there.
        self._take_stacks(phase)
        silent = [c for c in channels if c.silent]
        message = f"{_names(who)} {complaint}"
        if silent and complaint != _SILENT:
            message = f"{_names(silent)} {_SILENT}; {message}"
        absent = self._absent(phase)
        if absent:
            # The others wait in C++ inside init_rpc, where they may not answer a look either.
            waiting = [c for c in channels if c not in absent and c.counters is None]
            silent, who = [], absent
            message = f"{_names(absent)} did not join the world"
            if waiting:
                message += f"; {_names(waiting)} waits for that in init_rpc"
        if busy:
            message += f"; {_names(busy)} runs a call for another rank"
        message += f" (phase {phase.name}, after {passed:.1f} real s)"
        self.found.involved = [*silent, *who, *busy, *(c for c in channels if c.silent)]
        # A rank that waits for a silent rank is not the cause of the hang.
        blamed = silent or who
        self.found.add("RankHung", message, blamed[0].rank, timing_sensitive=True)
        self.find_remedy()
        phase.hang(message, tuple(c.rank for c in blamed))

    def ask_where(self, channels: Sequence[Channel]) -> None:
        """Have ranks say where each of their threads is; one that does not answer says nothing.

        Their control threads answer, so that nothing is written to their logs.
        """
        for channel, stack in self._ask(channels, "where", _WHERE_SECONDS):
            channel.stack = stack

    def ask_what_holds(self) -> None:
        """Have ranks say which handles of RRefs and which contexts they hold, and what holds them.

        Those whose code is a program do not note it.
        """
        if self._ranks.runs_users_code:
            for channel, held in self._ask(self._ranks.channels, "held", _HELD_SECONDS):
                channel.held = tuple(held)

    def _ask(
        self, channels: Sequence[Channel], what: str, seconds: float
    ) -> Iterator[tuple[Channel, Any]]:
        """The answers of the control threads of those ranks that give one in time."""
        if not channels or self._ranks.peer is None:
            return
        asked = [(channel, self._ranks.send(channel, what)) for channel in channels]
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(n not in c.answers for c, n in asked if not c.lost):
            self._ranks.pump(0.05)
        for channel, number in asked:
            if number in channel.answers:
                yield channel, channel.answers.pop(number)[1]
            else:
                channel.give_up(number)

    def _absent(self, phase: Phase) -> list[Channel]:
        """The ranks for which others wait in ``init_rpc``, which is a barrier of all ranks."""
        outside = [c for c in self._ranks.channels if c.counters is None]
        joining = [c for c in outside if stacks.runs(c.stack, "init_rpc")]
        absent = [c for c in outside if c not in joining and c.stack]
        return absent if joining or phase.name == "start" else []

    def _take_stacks(self, phase: Phase) -> None:
        """Have all ranks say where each of their threads is: by a signal if they cannot answer.

        At the signal, faulthandler reads the frames of threads that go on. If one of them runs
        Python, it may follow a frame that is no more (``traceback.c``: ``dump_frame``), and the
        rank dies of SIGSEGV. In a rank that cannot answer, one thread keeps the GIL.
        """
        alive = self._ranks.alive()
        if self._ranks.peer is None or not alive:
            return
        for channel in alive:
            channel.stack = ""
        if phase.name != "start":
            self.ask_where([channel for channel in alive if not channel.silent])
        left = [channel for channel in alive if not channel.stack]
        if not left:
            return
        marks = {c.rank: c.log.mark() for c in left}
        self._ranks.ask_for_stacks(left)
        self._ranks.pump(0.0)
        time.sleep(_STACK_SECONDS)
        for channel in left:
            channel.stack = channel.log.text_from(marks[channel.rank])
