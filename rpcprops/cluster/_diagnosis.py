"""Waits for what ranks must answer, and finds who is to blame where an answer does not come.

A rank may have died, before its time or instead of joining the world; it may be silent; or it hangs
in what it was asked for, or in a call for another rank. Waiting and blaming are one idea: who waits
must notice a death, and who blames a rank for a hang first asks all of them for a look.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import Any

import psutil

from rpcprops import errors
from rpcprops.cluster import _functions, _limits
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._found import Found
from rpcprops.cluster._phases import Phase, Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.errors import MachineCannot, text_of
from rpcprops.torch_facts import installed

#: Real seconds in which the death of a rank is known, after a call in another has failed because
#: its connection was lost.
_DEATH_SECONDS = 1.0
#: Grace for a rank's exit to arrive after a decisive result: real seconds.
_LAST_DEATH_SECONDS = 0.3
#: Real seconds in which a server tells of the exit of a rank whose channel has closed.
_EXIT_SECONDS = 5.0
#: What is said of a rank that does not even answer a look, and the real seconds that one which runs
#: needs at most for that, once another has hung.
_SILENT = "does not answer the control channel"
LOOK_SECONDS = 2.0
#: Real seconds in which faulthandler has written all stacks, from the signal handler.
_STACK_SECONDS = 0.3


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
        joins: whether ranks join the world by themselves, so that we are to say why they did not.
    """

    def __init__(self, ranks: Ranks, phases: Phases, deadlines: Deadlines, *, joins: bool) -> None:
        self.found = Found(ranks.channels)
        self._ranks = ranks
        self._phases = phases
        self._deadlines = deadlines
        self._joins = joins

    # Waiting.

    def look(self, phase: Phase | None = None, wait: float | None = None) -> bool:
        """Take in what every rank holds; False when one does not answer (see :meth:`gather`)."""
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

        None when a rank died or hung (which is then found), or when `wait` real seconds passed
        (which is not).
        """
        until = None if wait is None else time.monotonic() + wait
        while True:
            missing = self._ranks.without_answer(number)
            if not missing:
                return [c.answers.pop(number) for c in self._ranks.channels]
            if self.dead(phase, number):
                return None
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
        """Keep why a rank did not join the world, as found.

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
        """Raise MachineCannot if a rank that did not join the world says that something lacked."""
        lacks = _limits.scarcity(f"{message}\n{channel.log.text()}") if self._joins else ""
        if lacks:
            msg = (
                f"{channel.name} could not join a world of {len(self._ranks.channels)}, for the "
                f"machine has not enough of something ({lacks}; see `ulimit -a`, and the limits of "
                f"the container): {message}"
            )
            raise MachineCannot(msg)

    # Ranks that die.

    def dead(self, phase: Phase, awaited: int) -> bool:
        """Whether a rank has died before its time, or before that answer; that is then found."""
        self._ranks.must_be_connected()
        self._wait_for_exits()
        dead = [c for c in self._ranks.channels if c.status is not None]
        if phase.name == "shutdown":
            # Here ranks leave by themselves, once they have answered.
            dead = [c for c in dead if not c.exited_by_itself or c.has_left_without(awaited)]
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
        """Wait for the exits of ranks whose channels have closed: the server tells a moment later.

        Raises:
            HarnessError, UsageError: such a rank lives on.
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
        """Raise what killed a rank, if one has died: the error of another follows from that."""
        __tracebackhide__ = True
        # The channel of a dead rank closes about when its peers see their connections to it end.
        is_lost = installed().texts.lost_connection in text_of(error)
        deadline = time.monotonic() + (_DEATH_SECONDS if is_lost else 0)
        self._ranks.pump(0.0)
        while not any(c.lost for c in self._ranks.channels) and time.monotonic() < deadline:
            self._ranks.pump(0.05)
        if self._phases.over or not any(c.lost for c in self._ranks.channels):
            return
        with self._phases.open("run", self._deadlines.look) as phase:
            self.dead(phase, 0)
        try:
            self.found.raise_first()
        except errors.BrokenPromise as found:
            raise found from error

    def bad_exits(self, phase: Phase, finished: Container[int], number: int) -> bool:
        """Find every rank that has ended by a signal, or without that answer and not `finished`."""
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
        """Find a rank whose death a result may tell of: it is known about when that is."""
        deadline = time.monotonic() + _LAST_DEATH_SECONDS
        while time.monotonic() < deadline and not self.bad_exits(phase, finished, number):
            self._ranks.pump(0.05)

    # Ranks that hang.

    def hung(self, phase: Phase, who: Sequence[Channel], complaint: str) -> None:
        """Keep a hang as found, with the stacks of all ranks, and with whom it may come from."""
        passed = phase.passed()
        channels = self._ranks.channels
        busy: list[Channel] = []
        # Before a rank has joined, and once it has left, nothing in it answers a look.
        if phase.name != "start" and not any(c.silent or c.lost for c in channels):
            if self.look(Phase("run", 2 * LOOK_SECONDS), LOOK_SECONDS):
                busy = [c for c in channels if c not in who and c.runs_calls]
            elif self.found:
                ranks = [v.rank for v in self.found.violations if v.rank is not None]
                phase.fail("a rank died", tuple(ranks))
                return
        # Last, as it ends a rank that has no handler for it any more.
        self._take_stacks()
        silent = [c for c in channels if c.silent]
        message = f"{_names(who)} {complaint}"
        if silent and complaint != _SILENT:
            message = f"{_names(silent)} {_SILENT}; {message}"
        if busy:
            message += f"; {_names(busy)} runs a call for another rank"
        message += f" (phase {phase.name}, after {passed:.1f} real s)"
        self.found.involved = [*silent, *who, *busy]
        # Whoever waits for a rank that is silent is not the one that hangs.
        blamed = silent or who
        self.found.add("RankHung", message, blamed[0].rank, timing_sensitive=True)
        phase.hang(message, tuple(c.rank for c in blamed))

    def _take_stacks(self) -> None:
        alive = self._ranks.alive()
        if self._ranks.peer is None or not alive:
            return
        marks = {c.rank: c.log.mark() for c in alive}
        self._ranks.ask_for_stacks()
        self._ranks.pump(0.0)
        time.sleep(_STACK_SECONDS)
        for channel in alive:
            channel.stack = channel.log.text_from(marks[channel.rank])
