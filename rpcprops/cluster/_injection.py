"""In a rank: which sends of its faulty agent fail or come late, and which are never touched.

Where the code of a cluster is the user's, the preload library decides that (:mod:`rpcprops.clock`):
by the table of the agent's options, and by those that ``Cluster.faults`` has armed. It leaves the
handshake of ``rpc.shutdown()`` alone. Where the code is a program with a prediction, or a test of
PyTorch's, torch's agent decides alone, as in a world without us.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rpcprops import clock
from rpcprops.agents.wire import NAME, library
from rpcprops.clock import sends
from rpcprops.faults import FaultTable
from rpcprops.torch_facts import symbols

#: What ``_all_gather`` (torch's api.py) sends in the handshake, with rpc_sync and rpc_async.
_HANDSHAKE = "PYTHON_CALL"


@functools.cache
def problem() -> str:
    """Why the library cannot decide here, with the remedy; empty if it can.

    Call it once torch has been imported. A process that is forked later has the same answer.
    """
    if not clock.loaded():
        what = "is not built" if clock.library_path() is None else "cannot be loaded"
        return (
            f"the preload library {what} (`rpcprops doctor` says more); install a C compiler and "
            "reinstall rpcprops"
        )
    return sends.problem() or symbols.lacking_hooks()


class Injection:
    """The tables that are armed in this rank."""

    def __init__(self) -> None:
        self._takes_over = False
        self._of_agent = 0
        #: The number of each part's table in the library, by the number of the part.
        self._parts: dict[int, int] = {}
        #: Agents are made in the main thread, and parts begin and end in the control thread.
        self._changing = threading.Lock()

    def take_over(self) -> None:
        """Let the library decide for every agent that is made from now on.

        Raises:
            MachineCannot: this torch lacks what that needs.
        """
        symbols.around_faulty_agents(self._make_agent)
        symbols.around_handshakes(lambda: sends.spared(_HANDSHAKE))
        self._takes_over = True

    def _make_agent(self, construct: Callable[[], Any], options: Any) -> Any:
        """Make an agent that fails whatever it is told to, and arm the table of its options."""
        count = options.num_fail_sends
        try:
            # The agent copies its options, which stay what the user made them.
            options.num_fail_sends = sends.UNLIMITED
            agent = construct()
        finally:
            options.num_fail_sends = count
        with self._changing:
            # A new agent counts payloads from 0 (failMessageCountMap_ is its member).
            if self._of_agent:
                sends.disarm(self._of_agent)
            sends.decide()
            self._of_agent = sends.arm(
                options.messages_to_fail, count, dict(options.messages_to_delay)
            )
        return agent

    def arm(self, part: int, table: FaultTable) -> str:
        """Begin a part of the run; why that cannot act here, or an empty string."""
        with self._changing:
            if part not in self._parts:
                delays = {str(m): seconds for m, seconds in table.messages_to_delay.items()}
                names = map(str, table.messages_to_fail)
                self._parts[part] = sends.arm(names, table.num_fail_sends, delays)
        return self.lacking()

    def disarm(self, part: int) -> str:
        """End a part of the run; why it could not act here, or an empty string."""
        with self._changing:
            if part in self._parts:
                sends.disarm(self._parts[part])
        return self.lacking()

    def leave(self) -> None:
        """Called before a shutdown of whose own messages the delays are not predicted."""

    def lacking(self) -> str:
        """Which agent runs here, if it is none that injects faults for us; else empty."""
        if not symbols.is_agent_set() or (self._takes_over and self._of_agent):
            return ""
        return type(symbols.current_agent()).__name__

    def struck(self) -> dict[int, sends.Struck]:
        """What each part has failed and delayed so far."""
        with self._changing:
            return {part: sends.struck(number) for part, number in self._parts.items()}

    def counts(self) -> sends.Sends | None:
        """What this rank has sent so far; None if that is not counted."""
        return sends.counts()


class WireInjection(Injection):
    """As its base, where the agent WIRE has the tables and counts itself."""

    def take_over(self) -> None:
        """Keep faults away from the handshake of a shutdown."""
        symbols.around_handshakes(self._spared)

    @staticmethod
    @contextlib.contextmanager
    def _spared() -> Iterator[None]:
        library().spare(_HANDSHAKE)
        try:
            yield
        finally:
            library().spare("")

    def arm(self, part: int, table: FaultTable) -> str:
        """As in the base."""
        with self._changing:
            if part not in self._parts:
                delays = {str(m): seconds for m, seconds in table.messages_to_delay.items()}
                names = [str(message) for message in table.messages_to_fail]
                # The record of messages calls the table of the agent's own options 0.
                self._parts[part] = library().arm(names, table.num_fail_sends, delays, part + 1)
        return self.lacking()

    def disarm(self, part: int) -> str:
        """As in the base."""
        with self._changing:
            if part in self._parts:
                library().disarm(self._parts[part])
        return self.lacking()

    def leave(self) -> None:
        """Have the record say of each message from now on that it is of the shutdown."""
        if symbols.is_agent_set() and not self.lacking():
            symbols.current_agent().leave()

    def lacking(self) -> str:
        """As in the base."""
        if not symbols.is_agent_set():
            return ""
        agent = symbols.current_agent()
        return "" if isinstance(agent, library().WireAgent) else type(agent).__name__

    def struck(self) -> dict[int, sends.Struck]:
        """As in the base."""
        with self._changing:
            return {
                part: sends.Struck(*_columns(library().counts_of(number))[1:])
                for part, number in self._parts.items()
            }

    def counts(self) -> sends.Sends | None:
        """As in the base."""
        return sends.Sends(*_columns(library().counts()))


def of_agent(name: str) -> Injection:
    """What arms and counts faults in a rank that runs this agent."""
    return WireInjection() if name == NAME else Injection()


def _columns(rows: Mapping[str, tuple[int, int, int]]) -> tuple[dict[str, int], ...]:
    """Three columns by message type: sent, failed and delayed; without zeros."""
    return tuple({name: row[i] for name, row in rows.items() if row[i]} for i in range(3))
