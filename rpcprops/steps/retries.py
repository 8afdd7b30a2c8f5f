"""Steps whose messages torch itself must try again, without any fault of the plan.

Each `predict` tells the model what these files of torch do: ``torch/csrc/distributed/rpc/
rpc_agent.cpp``, ``rref_context.cpp``, ``tensorpipe_agent.cpp`` and ``tensorpipe_utils.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, retry_wait
from rpcprops.steps.base import Sort, Step, Value
from rpcprops.steps.control import Settle

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

#: Virtual seconds that it takes until the second try of a message has come, with some to spare.
_SECOND_TRY = 1.0 + retry_wait(1)
_VALUES: tuple[Value, ...] = ((1.0,), (0.0, -2.0), (3.0,))


@dataclass(frozen=True, slots=True, repr=False)
class Retry(Step):
    """`at` sends an RRef of `via` to `to`, which must tell `via` of it a second time.

    `via` makes the value ``value + 1``. Then all threads of its agent are busy until two fork
    requests have come: the first one times out at `to`, whose default timeout is short while it
    reads the RRef. Torch counts and logs that as a failed send. The second one must do what the
    first could not, for torch says of its internal messages that they are idempotent and tried
    again (docs/source/rpc/rref.md, Assumptions). `to` then fetches the value, which is that of the
    step. `timeout` (virtual seconds) is that of the call of `to`.

    The ranks must be at rest, because `to` has another default timeout for a moment.
    """

    op: ClassVar[str] = "retry"
    often: ClassVar[int] = 3  # because the ranks are seldom at rest
    in_branch: ClassVar[bool] = False
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    via: int
    to: int
    value: Value = (1.0,)
    timeout: float | None = 120.0

    def enter(self, scope: Scope) -> None:
        if self.via in (self.at, self.to):
            msg = f"via={self.via} owns the RRef, so neither at nor to may be it."
            raise UsageError(msg)
        if not self.value:
            msg = "value=() must hold a number."
            raise UsageError(msg)
        if self.timeout is None or self.timeout <= _SECOND_TRY:
            msg = f"timeout={shown(self.timeout)} must be above {_SECOND_TRY:g} (virtual seconds)."
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        self._check(model)
        handle, _ = model.remote(self.at, self.via, typed=True)
        handle.rref.value = [x + 1.0 for x in self.value]
        model.value(handle, self.at)
        model.call(self.at, self.via, MessageType.PYTHON_CALL, call)
        for number in range(model.times.threads_of_ranks - 1):
            # One thread runs the function that keeps the others busy.
            model.call(self.via, self.via, MessageType.PYTHON_CALL, f"{call}/hold{number}")
        model.call(self.via, self.at, MessageType.PYTHON_CALL, f"{call}/busy")
        there = model.call(self.at, self.to, MessageType.PYTHON_CALL, f"{call}/use", handle)
        assert there is not None
        model.timed_out_once(self.to, MessageType.RREF_FORK_REQUEST)
        model.calls[self.to][call] += 1
        value = model.value(there, self.to)
        model.drop(there)
        model.drop(handle)
        # tensorpipe_utils.cpp: tensorpipeSerialize moves the payload out of the message that
        # rpc_agent.cpp: RpcAgent::sendWithRetries keeps for the next try.
        says = "^expected no error, got RuntimeError"
        model.findings.meets_here("retried-without-payload", self.at, says)
        return model.shows(value, slack=self._slack(model))

    def _check(self, model: Model) -> None:
        """Check that the ranks rest, and that the plan leaves it open nowhere what comes when."""
        if model.now.settled != len(model.sends):
            msg = f"{self!r}: the ranks may not be at rest; put a Settle() before it."
            raise UsageError(msg)
        tables = [model.plan.table(rank) for rank in range(model.world_size)]
        request, call = MessageType.RREF_FORK_REQUEST, MessageType.PYTHON_CALL
        struck = {*tables[self.to].failing, *tables[self.to].delaying}
        lost = any(not message.is_retryable for table in tables for message in table.failing)
        if model.plan.others or lost or request in struck or call in tables[self.via].delaying:
            msg = (
                f"{self!r}: the plan loses a call, or delays what keeps the owner busy, or strikes "
                f"a fork request, and then nobody can tell which try of it is the second."
            )
            raise UsageError(msg)
        if self._slack(model) <= 0:
            msg = f"{self!r}: the delays of the plan may take as long as its timeout."
            raise UsageError(msg)

    def _slack(self, model: Model) -> float:
        """Virtual seconds between what the call takes at most and its timeout."""
        fetch = MessageType.SCRIPT_RREF_FETCH_CALL
        delay = model.times.delay
        delays = delay(self.at, MessageType.PYTHON_CALL) + delay(self.to, fetch)
        accepts = delay(self.to, MessageType.RREF_CHILD_ACCEPT)
        return (self.timeout or 0.0) - _SECOND_TRY - delays - accepts

    @property
    def lasts(self) -> float:
        return _SECOND_TRY + (self.timeout or 0.0)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Retry | None:
        rests = not drawer.steps or isinstance(drawer.steps[-1], Settle)
        if not rests or not drawer.undisturbed or drawer.facts.has_bug("retried-without-payload"):
            return None
        at = drawer.rank()
        if not drawer.others[at]:
            return None
        via = drawer.pick(drawer.others[at])
        to = drawer.pick([rank for rank in drawer.ranks if rank != via])
        step = cls(at, via, to, drawer.pick(_VALUES))
        return step if drawer.may_take(step.lasts) else None

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        return Settle.draw(drawer) if Settle.op in drawer.on and not drawer.in_parallel else None
