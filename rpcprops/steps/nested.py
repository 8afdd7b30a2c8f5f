"""A step whose functions make calls of their own under a timeout, and show how these end.

``predict`` tells the model what ``torch/csrc/distributed/rpc/tensorpipe_agent.cpp`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import Violation
from rpcprops.steps.arguments import PAIRS, check_arguments, check_seconds, sum_of
from rpcprops.steps.base import (
    CLEARLY_IN_TIME,
    CLEARLY_LATE,
    OwnerOf,
    Sort,
    Step,
    StepFails,
    Value,
    Way,
)

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

_MOST_CALLS = 4
#: The longest wait, in virtual seconds.
_LONGEST = 1e6
#: Virtual seconds beyond its timeout for which a call is waited for.
_PATIENCE = 600.0
#: Where threads are few: a timeout, and how long a call is waited for.
_WITHIN_FEW = (300.0, 600.0)
#: What a call shows that its timeout ended, and one that neither that nor an answer has ended.
_TIMEOUT, _NOTHING = "timeout", "nothing"
#: What torch may not keep, and the finding.
_SAYS = "neither an answer nor its timeout ended "
_FINDING = "timeout-needs-thread"


@dataclass(frozen=True, slots=True, repr=False)
class Onward(Step):
    """`at` calls `to` so many times at once; each function there calls `then`, under a timeout.

    That inner call asks for ``left + right``, whose function sleeps for `seconds` (virtual) first.
    The function at `to` waits by a callback (``Future.add_done_callback``) for the end of its call,
    and for `patience` virtual seconds at most. The value has for each call its sum, or "timeout".

    torch's documentation of ``rpc_async`` says of `timeout` that a call that does not complete in
    time raises an exception. All ends of calls need a thread of the agent
    (TensorPipeAgent::markFutureAsComplete, markFutureWithError). So where all threads of `to` run
    these functions, no call ends while they wait (timeout-needs-thread).
    """

    op: ClassVar[str] = "onward"
    in_thread: ClassVar[bool] = True
    is_patient: ClassVar[bool] = True
    after_rejoin: ClassVar[bool] = True
    order: ClassVar[float | None] = 55
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    to: int
    then: int
    calls: int = 1
    left: Value = (1.0,)
    right: Value = (2.0,)
    within: float = 600.0
    seconds: float = 0.0
    patience: float = 1200.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        check_seconds(self.seconds)
        if not 1 <= self.calls <= _MOST_CALLS:
            msg = f"calls={shown(self.calls)} must lie in 1 to {_MOST_CALLS}."
            raise UsageError(msg)
        for name in ("within", "patience"):
            value = getattr(self, name)
            if not 0 < value <= _LONGEST:
                msg = f"{name}={shown(value)} must lie in 0 to {_LONGEST:g}, and not be 0."
                raise UsageError(msg)
        if self.patience <= self.within:
            msg = (
                f"patience={shown(self.patience)} must be above within={shown(self.within)}, the "
                f"timeout of the calls."
            )
            raise UsageError(msg)
        if self.seconds and self.then == self.to:
            msg = (
                f"seconds={shown(self.seconds)} needs another rank than to={shown(self.to)} as "
                f"then: a function that sleeps keeps a thread of its rank busy."
            )
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """Each function waits for its own call."""
        return (self.to,) * int(self.calls)

    @property
    def in_vain(self) -> float:
        """Virtual seconds for which it waits where no call ends: in one thread, one by one."""
        return self.calls * self.patience

    def predict(self, model: Model, call: str) -> StepPrediction:
        ended = self._in_time(model)
        names = [f"{call}/{number}" for number in range(self.calls)]
        for name in _sent(model, self.at, self.to, names, "injected"):
            model.calls[self.to][name] += 1
        for name in _sent(model, self.to, self.then, [f"{x}/then" for x in names], "remote"):
            model.calls[self.then][name] += 1
            if not ended:
                model.abandoned_calls[self.then].add(name)
        threads = model.times.threads
        if threads is not None and threads.left(len(model.steps), self.to) < 1:
            # Also calls for which there was no thread at first: when one has waited in vain, its
            # thread takes what came next (c10/core/thread_pool.cpp: ThreadPool::main_loop).
            says = f"{_SAYS}[1-{self.calls}] of {self.calls} calls in {self.patience:g} s$"
            model.findings.meets_here(_FINDING, self.at, says)
        if ended is None:
            return model.shows(None, "unknown")
        value = sum_of(self.left, self.right) if ended else _TIMEOUT
        return model.shows([value] * self.calls)

    def _in_time(self, model: Model) -> bool | None:
        """Whether the inner calls are answered in time; None if nobody can tell."""
        takes = self.seconds + model.times.delay(self.to, MessageType.PYTHON_CALL)
        if takes >= self.within + CLEARLY_LATE:
            return False
        # Where threads are few, a call waits for those before it.
        takes += model.times.queues()
        return True if takes + CLEARLY_IN_TIME <= self.within else None

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if seen == expected or not isinstance(seen, list | tuple):
            return Step.judge(self, expected, seen)
        if _NOTHING in seen:
            message = f"{_SAYS}{seen.count(_NOTHING)} of {self.calls} calls in {self.patience:g} s"
            return [_late("MissingError", message, self.patience - self.within)]
        if expected is None:
            return []
        message = f"expected {expected!r}, got {seen!r}"
        if len(seen) != len(expected) or (_TIMEOUT in expected) == (_TIMEOUT in seen):
            return [Violation("WrongValue", message)]
        promise = "MissingError" if _TIMEOUT in expected else "UnexpectedError"
        return [_late(promise, message, abs(self.within - self.seconds))]

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, to: int | None = None) -> Onward:
        if to is None:
            at = drawer.rank() if at is None else at
            to = drawer.peer(at)
        else:
            at = drawer.peer(to)
        then = drawer.peer(to)
        calls = drawer.pick((1,) if drawer.in_parallel else range(1, _MOST_CALLS + 1))
        left, right = drawer.pick(PAIRS)
        slow = then != to and (calls == 1 or not drawer.slow_functions)
        message = MessageType.PYTHON_CALL
        within, seconds = drawer.timing(to, message, slow=slow, slow_late=drawer.settles)
        drawer.slow_functions += (calls - 1) * (seconds > 0)
        if not drawer.may_take(seconds):
            # The default timeout would end the calls of `at`.
            within, seconds = None, 0.0
        if within is None:
            within = drawer.in_time(seconds)
        patience = within + _PATIENCE
        if drawer.has_few_threads and not drawer.facts.has_bug(_FINDING):
            # Too few threads may be drawn, and a torch that has it after all then waits so long.
            within, patience = _WITHIN_FEW
        return cls(at, to, then, calls, left, right, within, seconds, patience)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.PYTHON_CALL:
            return []
        return [
            (cls.op, lambda: cls.draw(drawer, at=rank)),
            (cls.op, lambda: cls.draw(drawer, to=rank)),
        ]


def _sent(model: Model, at: int, to: int, names: list[str], error: ErrorClass) -> list[str]:
    """Call `to` once for each name; the names.

    Raises:
        StepFails: the calls are lost. One table fails all of them or none.
    """
    lost = 0
    for name in names:
        try:
            model.call(at, to, MessageType.PYTHON_CALL, name)
        except StepFails:
            lost += 1
    if lost:
        raise StepFails(error)
    return names


def _late(promise: str, message: str, slack: float) -> Violation:
    """A violation that ranks which are late by `slack` (virtual seconds) could show as well."""
    return Violation(promise, message, timing_sensitive=True, slack=slack)
