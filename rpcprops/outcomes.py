"""What a run showed, as data: the outcome that the oracle judges and that an artefact keeps.

Nothing here imports torch. Times are virtual seconds unless a name says real.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import msgspec

from rpcprops._frozen import FrozenMap, pickled_by_fields
from rpcprops.faults import FaultPlan

#: Finite, because JSON has no infinity; longer than any run.
UNLIMITED_SLACK = 1e9

#: The agent of ours (:mod:`rpcprops.agents.wire`). Its ranks have a record of all messages, even if
#: it is empty.
WIRE = "WIRE"

PhaseName = Literal["start", "run", "settle", "shutdown"]
PhaseVerdict = Literal["ok", "failed", "hung"]
#: The most virtual seconds for each real second that ranks may have.
MAX_CLOCK_RATE = 2000


@pickled_by_fields
@dataclass(frozen=True, slots=True, order=True)
class Counters:
    """What a rank still holds, as torch's own debug info counts it.

    Sources: ``_rref_context_get_debug_info`` (owners, forks, pending users and futures),
    ``dist_autograd._get_debug_info`` (contexts, backward passes) and the agent's
    ``get_debug_info`` (calls that it serves or awaits).
    """

    owners: int = 0
    forks: int = 0
    pending_users: int = 0
    pending_futures: int = 0
    contexts: int = 0
    backward_passes: int = 0
    server_calls: int = 0
    server_async_calls: int = 0
    client_calls: int = 0

    @property
    def is_zero(self) -> bool:
        """Whether nothing at all is held."""
        return self == Counters()

    @property
    def is_idle(self) -> bool:
        """Whether no message is on its way (what is held may stay)."""
        return not (
            self.pending_users
            or self.pending_futures
            or self.backward_passes
            or self.server_calls
            or self.server_async_calls
            or self.client_calls
        )

    def describe(self) -> str:
        """The counters that are not zero, in words: ``1 owner, 2 forks``."""
        words: list[str] = []
        for item in fields(self):
            count = getattr(self, item.name)
            if count:
                name = item.name.replace("_", " ")
                if count == 1:
                    name = name.removesuffix("es") if name.endswith("passes") else name[:-1]
                words.append(f"{count} {name}")
        return ", ".join(words) or "nothing"


@dataclass(frozen=True, slots=True)
class RaisedError:
    """An exception as a rank raised it."""

    type: str
    message: str
    traceback: str = ""

    def first_line(self) -> str:
        """Type and the first line of the message."""
        lines = self.message.strip().splitlines()
        return f"{self.type}: {lines[0] if lines else ''}"


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step of a program gave: a value, an error, or neither when it never ended.

    Attributes:
        value: JSON data (tensors as nested lists of floats).
        seconds: virtual seconds that it took, on the clock of its rank.
        counters: for a settle step, what each rank held at its end.
    """

    index: int
    value: Any = None
    error: RaisedError | None = None
    seconds: float = 0.0
    counters: tuple[Counters, ...] = ()
    ended: bool = True


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """What one rank showed.

    Attributes:
        exit_code: what it exited with, None when it died by a signal or never left by itself.
        signal: the signal that killed it, 0 when none did. Our own kills are not counted here.
        killed: whether rpcprops killed it, because it hung or because the verdict was known.
        counters: the last ones seen.
        failed_sends: how many ``Send try N failed`` lines torch logged: the failing sends of
            retryable messages, without their types.
        delayed_sends: sends that were held up, by whole virtual milliseconds of the delay, as the
            clock library saw them; None where it was not loaded.
        sent: sends that were tried, by torch's name of the message type, those of shutdown too but
            not those that faults are kept away from; a send that torch tries again counts again.
            None where the preload library could not count, or the rank died before it could say.
        failed_by_type: those of `sent` that the agent failed on purpose.
        delayed_by_type: those of `sent` that the agent held up; of a program, before the shutdown.
        calls: how often each user-visible call ran here, by the name of the call.
        log: the last part of what it wrote to stdout and stderr.
        stack: the Python stacks of its threads, when a phase hung.
        processor_seconds: user and system time, in real seconds.
        late_seconds: the longest that a timed wait returned after its deadline, in real seconds.
        counters_after_shutdown: what torch still counts once ``rpc.shutdown()`` has returned:
            RRefs, contexts and backward passes (the agent is gone). None where it was not called.
        shortest_timeout: the shortest timeout that code has passed to torch, that of its options
            included, in virtual seconds; None where no look has seen one.
    """

    rank: int
    name: str
    exit_code: int | None = None
    signal: int = 0
    killed: bool = False
    counters: Counters | None = None
    failed_sends: int = 0
    delayed_sends: Mapping[int, int] | None = None
    sent: Mapping[str, int] | None = None
    failed_by_type: Mapping[str, int] | None = None
    delayed_by_type: Mapping[str, int] | None = None
    calls: Mapping[str, int] = field(default_factory=FrozenMap[str, int])
    shutdown_error: RaisedError | None = None
    log: str = ""
    stack: str = ""
    processor_seconds: float = 0.0
    late_seconds: float = 0.0
    counters_after_shutdown: Counters | None = None
    shortest_timeout: float | None = None

    def describe_end(self) -> str:
        """How it ended, in words."""
        if self.signal:
            try:
                return f"killed by {signals.Signals(self.signal).name}"
            except ValueError:
                return f"killed by signal {self.signal}"
        if self.killed:
            return "killed by rpcprops"
        if self.exit_code is None:
            return "still running"
        return f"exit code {self.exit_code}"


@dataclass(frozen=True, slots=True)
class PhaseOutcome:
    """How one phase of a cluster went.

    Attributes:
        deadline: the real seconds that it was given.
        detail: what failed, or who hung, in a sentence.
    """

    name: PhaseName
    verdict: PhaseVerdict = "ok"
    virtual_seconds: float = 0.0
    real_seconds: float = 0.0
    deadline: float = 0.0
    detail: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ArmedFaults:
    """Faults that a test armed for a part of a run, by ``with cluster.faults(plan)``.

    Attributes:
        begins: virtual seconds from the start of the cluster until they were armed.
        ends: the same until they acted no more; None if that never came.
        failed: by rank, how many sends of each message type they failed.
        delayed: the same for the sends that they held up.
    """

    plan: FaultPlan
    begins: float
    ends: float | None = None
    failed: tuple[Mapping[str, int], ...] = ()
    delayed: tuple[Mapping[str, int], ...] = ()

    def of(self, rank: RankOutcome) -> RankOutcome:
        """What a rank showed of these faults alone."""
        at = rank.rank
        return replace(
            rank,
            failed_by_type=self.failed[at] if at < len(self.failed) else {},
            delayed_by_type=self.delayed[at] if at < len(self.delayed) else {},
        )


#: What became of a message; "" is not known: the rank ended, or was killed, before that.
MessageEnd = Literal["", "written", "answered", "failed", "timed_out", "lost"]


@dataclass(frozen=True, slots=True)
class SentMessage:
    """One message that a rank's agent was given to send, and what was done to it.

    Messages of one sender stand in the order in which its agent counted them: the nth that matches
    a fault is the nth in this order. A retry of torch's is a message of its own.

    Attributes:
        seconds: when the agent was given it, in virtual seconds from the start of the world.
        sender: the number of its rank in the cluster, whatever rank the rank gives ``init_rpc``.
        receiver: the same.
        id: a request and its response share it, and no other messages of the world have it.
        type: torch's name (``message.h``), such as ``RREF_ACK``.
        size: bytes of its payload and its tensors.
        retry: which retry of torch's it is; 0 for the first try and for what is never retried.
        fault: the number, from 0, of the message fault of its rank that acted on it; None if none
            acted.
        done: the action of that fault; empty if none acted.
        became: for a request "answered" (also with an EXCEPTION), "failed" (its sender was given an
            error that is no timeout), "timed_out" or "lost" (its sender was told nothing up to the
            end); for a response "written", "failed" or "lost".
        first_id: the `id` of the first try, if it is a retry; else its own.
        real_seconds: as `seconds`, in real seconds.
        failed_by_table: whether a fault table failed it.
        delayed_by_table: whether a fault table held it up.
        written: when it had been written, as `seconds`; None if it never was.
        ended: when its request had ended, as `seconds`; None if that was not seen.
        processed: how often its receiver began to process it; 0 for a response.
        marks: what else was seen: "arrived"; "raised" (a request whose answer is an exception);
            "swallowed" (a second response to a request that came twice, which is not written);
            "overdue" (held for as long as the fault allows, and then sent); "discarded" (delayed or
            held when its agent was shut down); "spared" (of the handshake of a shutdown, which
            faults are kept away from and do not count); "leaving" (of the shutdown of a program, or
            of a cluster with ``shutdown_faults=True``: its delays are neither predicted nor
            counted).
        table_part: of what a fault table failed or held up, which table that was: 0 that of the
            cluster's plan, n the n-th of those that were armed for a part of the run. None in a
            record that does not say.
        table_delay: virtual seconds by which a fault table held it up; None if none did.
    """

    seconds: float
    sender: int
    receiver: int
    id: int
    type: str
    is_request: bool
    size: int = 0
    retry: int = 0
    fault: int | None = None
    done: Literal["", "fail", "lose", "delay", "hold", "duplicate"] = ""
    became: MessageEnd = ""
    first_id: int = -1
    real_seconds: float = 0.0
    failed_by_table: bool = False
    delayed_by_table: bool = False
    written: float | None = None
    ended: float | None = None
    processed: int = 0
    marks: tuple[str, ...] = ()
    table_part: int | None = None
    table_delay: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run showed: phases, ranks, and the steps of the program if there was one.

    Attributes:
        armed: the faults that were armed for a part of the run, in that order.
        agent: the RPC agent of the ranks; empty if it is torch's faulty one.
        messages: every message that ranks sent, if their agent records them (``agent="wire"``).
        messages_dropped: how many further messages the ledger had no room for.
        ran_before: how many programs or clusters its ranks had run before; 0 if they were fresh.
    """

    world_size: int
    clock_rate: float = 1.0
    transport: str = "tcp"
    torch_version: str = ""
    phases: tuple[PhaseOutcome, ...] = ()
    ranks: tuple[RankOutcome, ...] = ()
    steps: tuple[StepOutcome, ...] = ()
    armed: tuple[ArmedFaults, ...] = ()
    agent: str = ""
    messages: tuple[SentMessage, ...] = ()
    messages_dropped: int = 0
    ran_before: int = 0

    def __str__(self) -> str:
        """What a reader wants to know first, in a few lines; `repr` is all of it, as Python."""
        lines = [
            f"outcome of {self.world_size} rank{'s' if self.world_size > 1 else ''} "
            f"(torch {self.torch_version}, {self.transport}, clock rate {self.clock_rate:g})"
        ]
        for phase in self.phases:
            how = f"{phase.verdict} after" if phase.verdict != "ok" else "took"
            detail = f": {phase.detail}" if phase.detail else ""
            lines.append(f"  {phase.name} {how} {phase.real_seconds:.2f} real s{detail}")
        failed = [step for step in self.steps if step.error is not None or not step.ended]
        if self.steps:
            lines.append(f"  {len(self.steps) - len(failed)} of {len(self.steps)} steps returned")
        for step in failed[:3]:
            said = "did not end" if step.error is None else f"raised {step.error.first_line()}"
            lines.append(f"  step {step.index} {said}")
        for rank in self.ranks:
            sends = f", {rank.failed_sends} sends failed" if rank.failed_sends else ""
            after = rank.counters_after_shutdown
            held, last = (rank.counters, "last held") if after is None else (after, "holds")
            holds = f", {last} {held.describe()}" if held is not None and not held.is_zero else ""
            lines.append(f"  {rank.name}: {rank.describe_end()}{sends}{holds}")
        if self.messages_dropped:
            lines.append(f"  {self.describe_dropped()}")
        return "\n".join(lines)

    def describe_dropped(self) -> str:
        """That the record of messages is not whole; empty if it is."""
        if not self.messages_dropped:
            return ""
        return f"the record of {len(self.messages)} messages is full: {self.messages_dropped} more"

    def phase(self, name: PhaseName) -> PhaseOutcome | None:
        """The last phase of that name, None when it was never reached."""
        return next((p for p in reversed(self.phases) if p.name == name), None)

    @property
    def is_recorded(self) -> bool:
        """Whether `messages` holds all that ranks sent, which may be nothing."""
        has_record = bool(self.messages) or self.agent == WIRE
        return has_record and not self.messages_dropped

    @property
    def real_seconds(self) -> float:
        """Real seconds of all phases."""
        return sum(p.real_seconds for p in self.phases)


class Violation(msgspec.Struct, frozen=True, rename={"timing_sensitive": "needs_time"}):
    """A promise that did not hold.

    Attributes:
        promise: name of the exception class in :mod:`rpcprops.errors` that stands for the promise.
        message: what was expected and what was seen, in a sentence.
        rank: where it was seen, None when it concerns the whole world.
        step: the step that showed it, None when it is no step's.
        timing_sensitive: whether a machine too slow for the clock could show the same (in JSON:
            `needs_time`).
        slack: virtual seconds by which waits may end late before the verdict means nothing.
    """

    promise: str
    message: str
    rank: int | None = None
    step: int | None = None
    timing_sensitive: bool = False
    slack: float = UNLIMITED_SLACK

    def __str__(self) -> str:
        where = [] if self.step is None else [f"step {self.step}"]
        if self.rank is not None:
            where.append(f"rank {self.rank}")
        place = f" ({', '.join(where)})" if where else ""
        return f"{self.promise}{place}: {self.message}"
