"""How long what a program waits for may take, and which timeout comes first.

All times are in virtual seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType, delay_milliseconds, retry_wait
from rpcprops.oracle._messages import UNHEARD, Disturbances, timeout_may_come
from rpcprops.oracle._now import Now
from rpcprops.oracle._own_deletes import OwnDeletes
from rpcprops.oracle.prediction import ErrorClass, Send
from rpcprops.outcomes import UNLIMITED_SLACK
from rpcprops.programs.threads import ENOUGH_THREADS, Threads
from rpcprops.steps import Leaf
from rpcprops.steps.base import CLEARLY_IN_TIME, CLEARLY_LATE

#: More messages than a step sends.
_MOST_OF_A_STEP = 100


@dataclass
class Times:
    """Timeouts, and all that makes messages wait: delays, retries and threads that are busy.

    Attributes:
        sends: the messages so far.
        rpc_timeout: the default timeout; None if there is none.
        threads: the threads of the ranks; None if there are enough for every step.
    """

    world_size: int
    plan: FaultPlan
    disturbed: Disturbances
    own_deletes: OwnDeletes
    now: Now
    sends: Sequence[Send]
    rpc_timeout: float | None
    threads: Threads | None

    def delay(self, rank: int, message: MessageType) -> float:
        """Virtual seconds by which the plan delays such a message of `rank`."""
        delay = self.plan.table(rank).messages_to_delay.get(message, 0.0)
        return delay_milliseconds(delay) / 1000

    def limit(self, timeout: float | None) -> float | None:
        """The timeout of a message for which a step names `timeout`; None if nothing ends it."""
        return self.rpc_timeout if timeout is None else timeout

    def timed(
        self,
        at: int,
        message: MessageType,
        timeout: float | None,
        surely: float = 0.0,
        perhaps: float = 0.0,
    ) -> tuple[ErrorClass, float]:
        """Whether a message of `at` misses its timeout: "", "timeout" or "unknown"; the slack.

        Besides the message's delay, its answer waits for `surely`, and for up to `perhaps` more.
        Without a timeout the program's applies.
        """
        self.now.is_timed = True
        timeout = self.limit(timeout)
        if timeout is None:
            return "", UNLIMITED_SLACK
        slack = timeout - self.delay(at, message) - surely
        if self.disturbed and self.now.step is not None:
            if self.own_deletes.hold(at, message, timeout):
                return "timeout", UNLIMITED_SLACK
            if self.now.fate in UNHEARD:
                # The timeout comes, whatever else may be late: see Model._struck.
                return "", UNLIMITED_SLACK
            late = timeout - slack + perhaps + self.disturbed.seconds
            # Where the timeout comes first anyhow, what is late only makes that clearer.
            may_come = slack > -CLEARLY_LATE and late + CLEARLY_IN_TIME > timeout
            if self.disturbed.seconds and may_come:
                raise timeout_may_come(self.now.step, late)
        if slack <= -CLEARLY_LATE:
            return ("timeout" if self._has_thread(at) else "unknown"), -slack
        slack -= perhaps + self.queues()
        return "" if slack >= CLEARLY_IN_TIME else "unknown", abs(slack)

    def callee_waits(self, at: int, since: int) -> tuple[float, float]:
        """Virtual seconds that a call waits at `at` for the messages that were sent there `since`.

        Returns: the time that it certainly waits, and the time that it may wait on top: accepts and
        deletes are sent by the thread that answers, or by another.
        """
        surely = perhaps = 0.0
        for send in self.sends[since:]:
            if send.rank != at:
                continue
            delay = self.delay(at, send.message) if send.delivered else 0.0
            if send.message is MessageType.RREF_FORK_REQUEST:
                surely += retry_wait(min(send.failures, send.message.max_retries)) + delay
            elif send.message.endswith("_FETCH_CALL"):
                surely += delay
            elif send.message.startswith("RREF_"):
                perhaps += delay
        return surely, perhaps

    def check_in_time(self, step: Leaf, waits: float) -> None:
        """Check that the default timeout does not come where a step waits so long (virtual s).

        Raises:
            UsageError: it may come.
        """
        waits += self.disturbed.seconds + self.queues()
        if self.rpc_timeout is not None and waits + CLEARLY_IN_TIME > self.rpc_timeout:
            msg = (
                f"{step!r}: under this plan some of its messages may take {waits:g} s (virtual), "
                f"which the default rpc_timeout={self.rpc_timeout:g} may end, and what then comes "
                f"is not modelled; let it be {CLEARLY_IN_TIME:g} s above that, or None."
            )
            raise UsageError(msg)

    def check_default(self, step: Leaf, before: int, takes: float) -> None:
        """Check that the default timeout comes for no message about which the step says nothing.

        Args:
            before: how many messages there were before the step.
            takes: how long the values of its handles may still take.

        Raises:
            UsageError: it may come.
        """
        if self.rpc_timeout is None or len(self.sends) == before:
            return
        own, *others = self.sends[before:]
        longest = max((self.lasts(send) for send in others), default=0.0)
        if self.now.is_timed:
            nested = [s for s in others if (s.rank, s.message) != (own.rank, own.message)]
            if not nested:
                return
            waits = max((self.lasts(send) for send in nested), default=0.0)
            if any(send.message.endswith("_FETCH_CALL") for send in nested):
                waits += takes
        else:
            # One may wait for all of those that are not only announcements.
            asked = [s for s in (own, *others) if self.holds_up(s)]
            # A delete is answered at once, whatever still runs for its value
            # (request_callback_no_python.cpp: RequestCallbackNoPython::processRRefUserDelete).
            runs = step.lasts + takes if own.delivered and asked else 0.0
            waits = max(sum(map(self.lasts, asked)) + runs, longest)
        self.check_in_time(step, waits)

    def lasts(self, send: Send) -> float:
        """Virtual seconds that a message takes by the faults of the plan."""
        waits = retry_wait(min(send.failures, send.message.max_retries))
        return (waits if self.holds_up(send) else 0.0) + self.delay(send.rank, send.message)

    @staticmethod
    def holds_up(send: Send) -> bool:
        """Whether something waits for its answer: nothing does for deletes and the like."""
        return not send.message.is_retryable or send.message is MessageType.RREF_FORK_REQUEST

    @property
    def threads_of_ranks(self) -> int:
        """How many threads the agent of each rank has."""
        return ENOUGH_THREADS if self.threads is None else self.threads.number

    def _has_thread(self, rank: int) -> bool:
        """Whether a thread of `rank` is surely free to hand a timeout over.

        ``tensorpipe_agent.cpp``: ``TensorPipeAgent::markFutureWithError``.
        """
        threads = self.threads
        if threads is None or not threads.are_few:
            return True
        busy = threads.sleeping.get(rank, 0)
        return not self._delays and threads.left(self.now.number, rank) > busy

    def queues(self) -> float:
        """Virtual seconds that a message may wait for a free thread, if there are few.

        A thread is busy while a function sleeps, and while a message that it sends is delayed.
        """
        threads = self.threads
        if threads is None or not threads.are_few:
            return 0.0
        if not self._delays:
            return threads.lasts
        # What runs at the same time is not known yet.
        others = threads.beside[self.now.number] * _MOST_OF_A_STEP
        delays = sum(self.delay(send.rank, send.message) for send in self.sends[self.now.settled :])
        return threads.lasts + delays + others * max(self._delays)

    @functools.cached_property
    def _delays(self) -> tuple[float, ...]:
        """The delays of the plan, in virtual seconds."""
        faults = (f for rank in range(self.world_size) for f in self.plan.faults_at(rank))
        return tuple(fault.seconds for fault in faults if fault.blocks_sender and fault.seconds)
