"""Distributed autograd over a graph of operations, each at a rank and reached in its own way.

A pass that does not reach what was sent is a step of its own, because torch's never ends.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY, MessageType, WireMessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Violation
from rpcprops.steps.arguments import TENSORS, check_seconds
from rpcprops.steps.base import (
    CLEARLY_IN_TIME,
    OwnerOf,
    Sort,
    Step,
    StepFails,
    Value,
    Way,
    is_close,
)
from rpcprops.steps.in_rank.constants import LATE_TIMEOUT, TIMES_LATE
from rpcprops.steps.rrefs import ask_type, creation_ends_late, may_time_out

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

#: What an operation computes. ``inplace`` changes the tensor that it got (to 2x + 1); ``custom`` is
#: a ``torch.autograd.Function`` (2x) with a backward of its own (times 5); ``hook`` copies, and the
#: hook of the copy doubles the gradient.
What: TypeAlias = Literal["add", "mul", "inplace", "custom", "hook"]
#: How an operation gets to its rank: "" computes it at the rank of the step, ``remote`` fetches an
#: RRef, ``proxy`` calls a method through an RRef (by ``rpc_sync``, if nothing else is named), and
#: ``relay`` lets an ``async_execution`` function ask the rank after that one (after the last comes
#: the first). ``id`` and ``info`` name the rank by its id and its ``WorkerInfo``. ``builtin`` calls
#: torch's operator itself, and ``script`` a TorchScript function, by ``rpc_sync`` or as is named.
#:
#: All ``proxy again`` of a rank share one RRef, which is made in the context and used there before
#: the first of them; all ``proxy before`` share one that is made and used before the context.
#: ``async then`` negates the result in a callback of its future, and ``async done`` does that in an
#: ``add_done_callback``, which completes a future of the step's own. ``async wait_all`` and ``async
#: collect_all`` wait for all their futures so far by that function of ``torch.futures``.
How: TypeAlias = Literal[
    "",
    "sync",
    "async",
    "remote",
    "proxy",
    "relay",
    "id",
    "info",
    "builtin",
    "script",
    "builtin async",
    "script async",
    "builtin remote",
    "script remote",
    "proxy async",
    "proxy remote",
    "proxy again",
    "proxy again async",
    "proxy again remote",
    "proxy before",
    "proxy before async",
    "proxy before remote",
    "async then",
    "async done",
    "async wait_all",
    "async collect_all",
]
#: A leaf that requires a gradient, one with a hook that doubles its gradient too, or one that
#: requires none.
Leafage: TypeAlias = Literal["plain", "hooked", "fixed"]
#: What, the numbers of the results that it takes (leaves come first), the rank, how.
Operation: TypeAlias = tuple[What, tuple[int, ...], int, How]

_WHATS: tuple[What, ...] = get_args(What)
_HOWS: tuple[How, ...] = get_args(How)
_SORTS: tuple[Leafage, ...] = get_args(Leafage)
#: How a call may be made that is slower than its timeout: Python functions alone sleep.
LateHow: TypeAlias = Literal[
    "sync", "async", "remote", "proxy", "proxy async", "proxy remote", "id", "info"
]
_LATE_HOWS: tuple[LateHow, ...] = get_args(LateHow)
#: What a step with such a call takes, in virtual seconds.
_LATE_TAKES = (TIMES_LATE + 1.0) * LATE_TIMEOUT
#: What builtin operators and TorchScript functions compute.
_COMPUTE: dict[str, tuple[What, ...]] = {
    "builtin": ("add", "mul"),
    "script": ("add", "mul", "inplace"),
}
#: The finding that the first asynchronous call through a user's RRef is made outside the context.
_OUTSIDE = "async-proxy-leaves-context"
#: The finding that of a rank's creations that fail, torch marks the first one only.
_UNMARKED = "second-failed-remote"
_OF_CONTEXTS = (
    WireMessageType.FORWARD_AUTOGRAD_REQ,
    WireMessageType.BACKWARD_AUTOGRAD_REQ,
)
_OPERANDS: dict[What, int] = {"add": 2, "mul": 2, "inplace": 1, "custom": 1, "hook": 1}
#: What each of the one operand's numbers is multiplied by in backward.
_SLOPES: dict[What, float] = {"inplace": 2.0, "custom": 5.0, "hook": 1.0}
#: The most leaves that a result is a product of. What is drawn stays below 2**53, so float64 holds
#: each sum and product exactly, in whatever order gradients are added up.
_HIGHEST_DEGREE = 6
_MOST_LEAVES = 3
#: An operation that is drawn takes two of the last so many results.
_LAST = 4


@dataclass(frozen=True, slots=True)
class _Tape:
    """What a graph computes, by the rules of calculus.

    Attributes:
        values: the numbers of each leaf and result.
        needs: whether each requires a gradient.
        degrees: of how many leaves each is a product, at the most.
    """

    values: list[list[float]] = field(default_factory=list)
    needs: list[bool] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, value: Value, leaves: Sequence[tuple[int, Leafage]]) -> Self:
        """Leaf number n is `value` plus n."""
        tape = cls()
        for number, (_, sort) in enumerate(leaves):
            tape.add([x + number for x in value], needs=sort != "fixed", degree=1)
        return tape

    def add(self, values: list[float], *, needs: bool, degree: int) -> None:
        self.values.append(values)
        self.needs.append(needs)
        self.degrees.append(degree)

    def operate(self, what: What, operands: Sequence[int], how: How = "") -> None:
        """Add the result of an operation."""
        x, y = self.values[operands[0]], self.values[operands[-1]]
        match what:
            case "add":
                values = [a + b for a, b in zip(x, y, strict=True)]
            case "mul":
                values = [a * b for a, b in zip(x, y, strict=True)]
            case "inplace":
                values = [2.0 * a + 1.0 for a in x]
            case "custom":
                values = [2.0 * a for a in x]
            case "hook":
                values = list(x)
        if _negates(how):
            values = [-a for a in values]
        degrees = [self.degrees[number] for number in operands]
        degree = sum(degrees) if what == "mul" else max(degrees)
        needs = any(self.needs[number] for number in operands)
        self.add(values, needs=needs, degree=degree)


@functools.lru_cache(maxsize=64)
def _tape(
    value: Value, inputs: tuple[tuple[int, Leafage], ...], operations: tuple[Operation, ...]
) -> _Tape:
    """What a graph computes. Cached, because a drawn graph is entered several times."""
    tape = _Tape.of(value, inputs)
    for what, operands, _, how in operations:
        tape.operate(what, operands, how)
    return tape


@dataclass(frozen=True, slots=True, repr=False)
class Graph(Step):
    """A ``dist_autograd.context()`` at `at` that computes a graph, and the same in one process.

    Leaf number n is `value` plus n, at its home: a leaf of another rank is made there by
    ``rpc.remote``, and fetched when it is first used. The operations follow in order. The step's
    value has their results, the gradients of the leaves, and the gradients that the same graph
    gives in one process of plain torch, which the rank computes as well.

    Args:
        name: names the context for :class:`Refused`.
        inputs: the leaves: the home of each, and its sort.
        operations: see :data:`Operation`.
        backwards: for each backward pass, the results whose sums are its roots; all but the last
            retain the graph. Each pass must reach everything that was sent and requires a gradient.
        beside: a second thread computes the same at the same time, from the same leaves of `at`, in
            a context of its own, whose gradients must be the same and no more.
        inside: a rank that tries to enter another context inside this one, which must raise.
        seconds: virtual seconds for which each Python function sleeps that an operation calls.
        late: a rank, and how it is called with `value` besides the operations, in such a way that
            the timeout of the call comes first: `late_timeout` virtual seconds, of which its
            function sleeps four times as many. ``remote`` and ``proxy remote`` give the timeout to
            the creation of an RRef, whose use in the context must then raise, and which stays as
            the handle `out`. A ``proxy`` has been used before, so that it knows its type.

    A call that times out ends at its caller alone. The other rank has the context by then, and is
    cleaned up with the others. What is sent requires no gradient: torch's engine would wait for a
    gradient of it for ever (:class:`Unreached` shows that). So it is no part of a pass, and its
    answer, which may come after the context, belongs to none (``autograd/utils.cpp``:
    addSendRpcBackward is called for tensors that require a gradient only; getMessageWithAutograd
    hands on an answer without one).
    """

    op: ClassVar[str] = "graph"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 60
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context", "out": "handle"}
    gives: ClassVar[type] = dict
    at: int
    name: str
    inputs: tuple[tuple[int, Leafage], ...]
    operations: tuple[Operation, ...] = ()
    backwards: tuple[tuple[int, ...], ...] = ()
    value: Value = (1.0, 2.0)
    beside: bool = False
    inside: int | None = None
    seconds: float = 0.0
    late: tuple[int, LateHow] | None = None
    late_timeout: float = LATE_TIMEOUT
    out: str = ""

    def enter(self, scope: Scope) -> None:
        if not self.inputs:
            msg = "inputs=() must hold one leaf or more."
            raise UsageError(msg)
        for home, _ in self.inputs:
            scope.check_rank("inputs", home)
        for number, (what, operands, rank, how) in enumerate(self.operations, len(self.inputs)):
            scope.check_rank("operations", rank)
            if len(operands) != _OPERANDS[what] or not all(0 <= n < number for n in operands):
                msg = (
                    f"operations: number {number}, {shown(what)} of {shown(operands)}, must take "
                    f"{_OPERANDS[what]} of the numbers from 0 to {number - 1}."
                )
                raise UsageError(msg)
            if not how and rank != self.at:
                msg = f"operations: number {number} is at rank {rank}; say how it gets there."
                raise UsageError(msg)
            if what not in _able(how):
                msg = f"operations: number {number}: {shown(how)} computes no {shown(what)}."
                raise UsageError(msg)
        if self.inside is not None:
            scope.check_rank("inside", self.inside)
        self._check_late(scope)
        check_seconds(self.lasts)
        self._check_tape(self._tape())
        scope.new_context(self.name)
        scope.ids.add(self.name)
        if self.late is not None and self.out:
            scope.new_handle(self.out, self.at, self.late[0], typed=False, size=len(self.value))

    def _check_tape(self, tape: _Tape) -> None:
        """Raises:
        UsageError: torch cannot compute that, or not exactly.
        """
        self._check_builtins(tape)
        if max(tape.degrees) > _HIGHEST_DEGREE:
            msg = f"operations: a product of more than {_HIGHEST_DEGREE} leaves may not be exact."
            raise UsageError(msg)
        for roots in self.backwards:
            self._check_pass(roots, tape)

    def _check_late(self, scope: Scope) -> None:
        """Raises:
        UsageError: no call can time out in that way.
        """
        makes = self.late is not None and self.late[1].endswith("remote")
        if makes and not self.out:
            msg = f"late={shown(self.late)} makes an RRef; give it a name by out=NAME."
            raise UsageError(msg)
        if self.out and not makes:
            msg = (
                f"out={shown(self.out)} names an RRef that is late; it needs late=(RANK, 'remote')."
            )
            raise UsageError(msg)
        if self.late is None:
            if self.late_timeout != LATE_TIMEOUT:
                msg = f"late_timeout={shown(self.late_timeout)} needs late=(RANK, HOW)."
                raise UsageError(msg)
            return
        scope.check_rank("late", self.late[0])
        if not 1.0 <= self.late_timeout <= MAX_DELAY / TIMES_LATE:
            msg = (
                f"late_timeout={shown(self.late_timeout)} must lie in 1 to "
                f"{MAX_DELAY / TIMES_LATE:g} (virtual seconds)."
            )
            raise UsageError(msg)

    def _check_builtins(self, tape: _Tape) -> None:
        """Raises:
        UsageError: a builtin operator is called with tensors that require no gradient.
        """
        # python_functions.cpp: pyRpcBuiltin and pyRemoteBuiltin do not force what they send into
        # the context, as the other calls do, so that message is none of the context's.
        for number, (_, _, _, how) in enumerate(self.operations, len(self.inputs)):
            if how.startswith("builtin") and not tape.needs[number]:
                msg = (
                    f"operations: number {number} calls a builtin operator with tensors that "
                    f"require no gradient, which torch does outside of the context; take 'script'."
                )
                raise UsageError(msg)

    @property
    def lasts(self) -> float:
        late = 0.0 if self.late is None else (TIMES_LATE + 1.0) * self.late_timeout
        return late + self.seconds * sum(_is_python(how) for _, _, _, how in self.operations)

    def _check_pass(self, roots: tuple[int, ...], tape: _Tape) -> None:
        """Raises:
        UsageError: torch cannot run backward from these roots.
        """
        # engine/dist_engine.cpp: DistEngine::validateRootsAndRetrieveEdges.
        numbers = range(len(self.inputs), len(tape.needs))
        if not roots or not all(root in numbers and tape.needs[root] for root in roots):
            msg = (
                f"backwards: {shown(roots)} must name results of operations, at least one, that "
                f"require a gradient."
            )
            raise UsageError(msg)
        # torch's notes, "Distributed Autograd Design", FAST mode algorithm: "The key assumption of
        # this algorithm is that each send function has a dependency of 1 when we run a backward
        # pass." Where a gradient never comes back for something that was sent, backward waits for
        # ever: that limit is documented, so such a graph is refused here.
        missed = sorted(self._sent(tape) - self._reached(roots, tape))
        if missed:
            msg = (
                f"backwards: {shown(roots)} does not reach {missed[0]}, which was sent, and torch "
                f"would wait for its gradient for ever; add a root. Unreached shows that."
            )
            raise UsageError(msg)

    def _tape(self) -> _Tape:
        return _tape(self.value, self.inputs, self.operations)

    def _sent(self, tape: _Tape) -> set[int]:
        """The leaves and results that came from another rank, or a call, and require a gradient."""
        first = len(self.inputs)
        found: set[int] = set()
        for number, (_, operands, _, how) in enumerate(self.operations, first):
            found |= {n for n in operands if n < first and self.inputs[n][0] != self.at}
            if how:
                found.add(number)
        return {number for number in found if tape.needs[number]}

    def _reached(self, roots: Sequence[int], tape: _Tape, ends: Container[int] = ()) -> set[int]:
        """What a backward pass from these roots computes a gradient of; it ends at `ends`."""
        found = set(roots)
        for number in reversed(range(len(self.inputs), len(tape.needs))):
            if number in found and number not in ends:
                _, operands, _, _ = self.operations[number - len(self.inputs)]
                found |= {n for n in operands if tape.needs[n]}
        return found

    def _gradients_of(self, numbers: Iterable[int], world_size: int) -> Iterator[tuple[int, int]]:
        """From which rank to which the gradients of these leaves and results are sent."""
        for number in numbers:
            if number < len(self.inputs):
                home, _ = self.inputs[number]
                if home != self.at:
                    yield self.at, home
                continue
            _, _, rank, how = self.operations[number - len(self.inputs)]
            if how:
                yield from ((self.at, rank), (rank, self.at))
            if how == "relay":
                then = (rank + 1) % world_size
                yield from ((rank, then), (then, rank))

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The homes of leaves give their gradients, and a proxy its method, one after the other.

        A function that is late sleeps, and another one waits for that.
        """
        homes = [home for home, _ in self.inputs if home != self.at]
        proxies = [rank for _, _, rank, how in self.operations if how.startswith("proxy")]
        late = () if self.late is None else (self.late[0],) * 2
        return [*sorted({*homes, *proxies}) * (2 if self.beside else 1), *late]

    def predict(self, model: Model, call: str) -> StepPrediction:
        tape = self._tape()
        model.times.check_in_time(self, self.lasts)
        before = self._make_before(model)
        hooks, gradients = self._backward(tape, model, call)
        expected: dict[str, Any] = {
            "results": tape.values[len(self.inputs) :],
            "gradients": gradients,
            "alone": gradients,
            "hooks": hooks,
        }
        if self.beside:
            expected["beside"] = gradients
            self._in_context(tape, model, call, f"{self.name}, beside", before)
            self._backward(tape, model, call)
        self._meet_outside(model, tape, call)
        if self.inside is not None:
            expected["refused"] = True
        if self.late is not None:
            expected["late"] = True
            self._give_up(model, call, *self.late)
        self._in_context(tape, model, call, self.name, before)
        for handle in before.values():
            model.drop(handle)
        return model.shows(expected)

    def _make_before(self, model: Model) -> dict[int, Handle]:
        """Make an RRef at each rank that has a ``proxy before``, and use it.

        From then on the RRef knows the type of its value, or has a future of it that is complete
        (``py_rref.cpp``: PyRRef::getRRefType keeps it; ``rref_proxy.py``: _invoke_rpc waits for it
        in ``rpc_sync``). So an asynchronous call is made at once as well, by the thread that asks
        for it, and in the context (``torch/futures/__init__.py``: Future.then calls a callback
        inline where the future is complete).

        Raises:
            StepFails: a message of that is lost, and there is no context.
        """
        made: dict[int, Handle] = {}
        ranks = [rank for _, _, rank, how in self.operations if how.startswith("proxy before")]
        model.missing_contexts.add(self.name)
        try:
            for rank in dict.fromkeys(ranks):
                made[rank], _ = model.remote(self.at, rank, typed=False)
                model.creations.use(made[rank])
                ask_type(model, made[rank], self.at, "", UNLIMITED_SLACK)
                made[rank].rref.made = True
                model.ask(self.at, rank, MessageType.PYTHON_CALL, made[rank])
        except StepFails:
            for handle in made.values():
                model.drop(handle)
            raise
        model.missing_contexts.discard(self.name)
        return made

    def _give_up(self, model: Model, call: str, rank: int, how: How) -> None:
        """Make the call that is slower than its timeout.

        ``tensorpipe_agent.cpp``: TensorPipeAgent::pollTimeoutRpcs gives its future the error, and
        an answer that comes later is dropped. A call in a context has the timeout that its caller
        names, as another one (``autograd/utils.cpp``: sendMessageWithAutograd; ``rref_proxy.py``:
        _invoke_rpc). In the context `at` then waits until the function has begun, and for the use
        of an RRef until it has slept: by one call more.
        """
        _note_late(model, self, call, rank)
        is_far = rank != self.at
        used = how.startswith("proxy")
        # Made, asked for its type, and used once before: see _count.
        model.in_contexts.call(self.at, rank, 1 + (2 + is_far) * used, graded=0)
        if used:
            self._remote(model, rank, sent=2 + is_far)
        if not self.out:
            return
        handle = model.created(self.at, rank, typed=False)
        model.handles[self.out] = handle
        handle.rref.value = [2.0 * x for x in self.value]
        # That the owner has the value is known only after a settle: its function notes that it has
        # slept, and only then torch gets the value (request_callback_impl.cpp:
        # RequestCallbackImpl::processPythonRemoteCall).
        handle.rref.takes = TIMES_LATE * self.late_timeout
        handle.rref.slow = True
        creation_ends_late(model, handle, _slack(self.late_timeout), self.late_timeout)
        # torch has marked the RRef by the time of its use: long before its function has slept.
        model.creations.mark(handle)
        if handle.second:
            # It is never marked, so the fetch gives the value that has been made by then.
            says = "^a call that takes longer had to time out "
            model.findings.meets_here(_UNMARKED, self.at, says, breaks=("MissingError",))
            model.findings.sends_otherwise(_UNMARKED, self.at, rank, _OF_CONTEXTS[0])

    def _meet_outside(self, model: Model, tape: _Tape, call: str) -> None:
        """Note what a torch does wrong whose asynchronous proxies leave the context.

        The call is a plain one, so its answer has no gradient. A pass may then miss what was sent,
        and waits for that for ever (dist_engine.cpp: DistEngine::computeDependencies), or until the
        default timeout of the gradient that it has sent there (recvrpc_backward.cpp:
        RecvRpcBackward::apply). Without a gradient no hook runs.
        """
        outside = {
            number: rank
            for number, (_, _, rank, how) in enumerate(self.operations, len(self.inputs))
            if how == "proxy async" and rank != self.at
        }
        if not outside:
            return
        model.findings.meets_here(_OUTSIDE, self.at)
        sent = self._sent(tape) - {*outside}
        waits = any(sent - self._reached(roots, tape, {*outside}) for roots in self.backwards)
        errors = self._errors_outside(model, outside)
        ends = [model.facts.texts.timeout] if waits and model.times.limit(None) is not None else []
        for text in (*errors, *ends):
            says = f"^expected no error, got .*{re.escape(text)}"
            model.findings.meets_here(_OUTSIDE, self.at, says, breaks=("UnexpectedError",))
        for rank in outside.values():
            for message in (MessageType.PYTHON_CALL, *_OF_CONTEXTS):
                model.findings.sends_otherwise(_OUTSIDE, self.at, rank, message)
            # An answer that holds no gradient does not make its sender know the caller.
            for answer in (_OF_CONTEXTS[1], MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ):
                model.findings.sends_otherwise(_OUTSIDE, rank, self.at, answer)
        if waits:
            model.findings.never_ends(_OUTSIDE)
        silent: Counter[int | None] = Counter()
        for roots in self.backwards:
            kept = self._reached(roots, tape, {*outside}) - {*outside}
            lost = self._reached(roots, tape) - (set() if errors or waits else kept)
            self._send_nothing(model, lost)
            silent.update(self._hooked_at(number, model.world_size) for number in lost)
        for place, times in silent.items():
            if place is not None:
                model.findings.runs_less(_OUTSIDE, place, f"{call}/hook", times * (1 + self.beside))

    def _send_nothing(self, model: Model, lost: Iterable[int]) -> None:
        """Note that no gradient of these leaves and results may be sent."""
        for rank, to in self._gradients_of(lost, model.world_size):
            model.findings.sends_otherwise(_OUTSIDE, rank, to, _OF_CONTEXTS[1])

    def _errors_outside(self, model: Model, outside: Container[int]) -> list[str]:
        """The texts of the errors that such a call may raise, and one in the context would not.

        It is a message of another type, which the plan may strike. What comes outside of the
        context is a leaf there, which autograd lets nobody change.
        """
        texts, message = model.facts.texts, MessageType.PYTHON_CALL
        acts = {getattr(f, "action", "") for f in model.plan.others if message in f.targets}
        fails = message in model.plan.table(self.at).failing or "fail" in acts
        limit = math.inf if (given := model.times.limit(None)) is None else given
        delay = model.times.delay(self.at, message)
        ends = delay + CLEARLY_IN_TIME > limit or acts - {"fail", "twice"}
        changes = any(
            what == "inplace" and number in outside
            for number, (what, *_) in enumerate(self.operations, len(self.inputs))
        )
        return [
            *([texts.injected] if fails else ()),
            *([texts.timeout] if ends else ()),
            *([texts.remote] if changes else ()),
        ]

    def _backward(
        self, tape: _Tape, model: Model, call: str
    ) -> tuple[int, list[list[float] | None]]:
        """How often hooks run, and the gradient of each leaf, None if no pass reaches it.

        A hook runs once in a pass, with the whole gradient: the engine counts on how many edges
        each node waits over all of a rank's sends and roots (engine/dist_engine.cpp:
        DistEngine::computeDependencies).
        """
        total: list[list[float] | None] = [None] * len(self.inputs)
        hooks = 0
        for roots in self.backwards:
            slopes: dict[int, list[float]] = {}
            for root in roots:
                _increase(slopes, root, [1.0] * len(self.value))
            for number in reversed(range(len(tape.values))):
                if number not in slopes:
                    continue
                rank = self._hooked_at(number, model.world_size)
                if rank is not None:
                    slopes[number] = [2.0 * x for x in slopes[number]]
                    model.calls[rank][f"{call}/hook"] += 1
                    hooks += 1
                if number >= len(self.inputs):
                    self._pass_on(number, slopes, tape)
            for number in range(len(self.inputs)):
                if number in slopes:
                    before = total[number] or [0.0] * len(self.value)
                    total[number] = [a + b for a, b in zip(before, slopes[number], strict=True)]
        return hooks, total

    def _hooked_at(self, number: int, world_size: int) -> int | None:
        """The rank where a hook of that leaf or result runs."""
        if number < len(self.inputs):
            home, sort = self.inputs[number]
            return home if sort == "hooked" else None
        what, _, rank, how = self.operations[number - len(self.inputs)]
        if what != "hook":
            return None
        return (rank + 1) % world_size if how == "relay" else rank

    def _pass_on(self, number: int, slopes: dict[int, list[float]], tape: _Tape) -> None:
        """Pass the gradient of a result on to what it was computed from."""
        what, operands, _, how = self.operations[number - len(self.inputs)]
        slope = slopes[number]
        for operand, other in zip(operands, reversed(operands), strict=True):
            if not tape.needs[operand]:
                continue
            factors = [_SLOPES.get(what, 1.0)] * len(slope)
            if what == "mul":
                factors = tape.values[other]
            if _negates(how):
                factors = [-a for a in factors]
            _increase(slopes, operand, [a * b for a, b in zip(slope, factors, strict=True)])

    def _in_context(
        self, tape: _Tape, model: Model, call: str, name: str, before: Mapping[int, Handle]
    ) -> None:
        """The messages and calls of one context. `before` has the RRefs from before it, by rank.

        Every call travels as FORWARD_AUTOGRAD_REQ, which the agent neither fails nor delays. So
        does an answer that holds a tensor that requires a gradient; of another answer, the context
        knows nothing (autograd/utils.cpp: getMessageWithAutograd, addKnownWorkerId).
        """
        known = _Known({self.at: set()})
        fetched = {n for _, operands, _, _ in self.operations for n in operands}
        messages = model.in_contexts
        passes = len(self.backwards)
        for number, (home, _) in enumerate(self.inputs):
            if home != self.at:
                needs = number in fetched and tape.needs[number]
                known.call(self.at, home, needs=needs)
                # Its owner is asked for the gradient, with the RRef.
                self._remote(model, home, sent=1)
                # It is created, fetched if it is used, and asked for the gradient.
                messages.call(self.at, home, 3 if number in fetched else 2, graded=int(needs))
                messages.gradient(self.at, home, passes * needs)
        for (_, _, rank, how), needs in zip(
            self.operations, tape.needs[len(self.inputs) :], strict=True
        ):
            if how:
                known.call(self.at, rank, needs=needs)
                # A builtin operator, and a TorchScript function, do not note that they run.
                model.calls[rank][call] += _is_python(how)
                self._count(model, rank, how, passes, needs=needs)
            if how == "relay":
                then = (rank + 1) % model.world_size
                known.call(rank, then, needs=needs)
                model.calls[then][call] += 1
            if how.endswith("remote"):
                self._remote(model, rank)
        self._go_through(model, before)
        if self.inside is not None and self.inside != self.at and name == self.name:
            known.call(self.at, self.inside, needs=False)
            messages.call(self.at, self.inside, graded=0)
        if self.late is not None and name == self.name:
            known.call(self.at, self.late[0], needs=False)
        model.release(name, self.at, known)

    def _go_through(self, model: Model, before: Mapping[int, Handle]) -> None:
        """What becomes of the RRefs by which the proxies of one context call.

        ``torch/distributed/rpc/rref_proxy.py``: _invoke_rpc sends the RRef to its owner with each
        call, and once more if it is another rank's, whose type of value is asked for first.
        """
        again: Counter[int] = Counter()
        for _, _, rank, how in self.operations:
            if how.startswith("proxy before"):
                model.drop(model.give(before[rank], self.at, rank))
            elif how.startswith("proxy again"):
                again[rank] += 1
            elif how.startswith("proxy"):
                self._remote(model, rank, sent=1 + (rank != self.at))
        for rank, used in again.items():
            is_far = rank != self.at
            self._remote(model, rank, sent=is_far + 1 + used)
            # It is created, asked for its type, and used by a call whose answer is no tensor.
            model.in_contexts.call(self.at, rank, 2 + is_far, graded=0)

    def _count(self, model: Model, rank: int, how: How, passes: int, *, needs: bool) -> None:
        """Count the messages of one operation, through which so many passes go.

        See ``oracle/_contexts.py``: a gradient goes there for what came back, and back for what was
        sent there. The value of an RRef of its own comes to a rank without a message
        (``rpc/py_rref.cpp``: ``PyRRef::toHere``), and it knows its type.
        """
        messages = model.in_contexts
        passes *= needs
        is_far = rank != self.at
        comes = is_far or not how.endswith("remote")
        # rref_proxy.py: _invoke_rpc asks for the type, then calls. A proxy that was used before
        # knows the type.
        is_first = how in ("proxy", "proxy async", "proxy remote")
        calls = (1 + is_far) * is_first + 1 + is_far * how.endswith("remote")
        messages.call(self.at, rank, calls, graded=int(comes and needs))
        messages.gradient(self.at, rank, passes * comes)
        messages.gradient(rank, self.at, passes)
        if how == "relay":
            then = (rank + 1) % model.world_size
            messages.call(rank, then, graded=int(needs))
            messages.gradient(rank, then, passes)
            messages.gradient(then, rank, passes)

    def _remote(self, model: Model, rank: int, sent: int = 0) -> None:
        """An ``rpc.remote`` whose value is used; its RRef goes to its owner so often, and ends."""
        made = model.created(self.at, rank, typed=False)
        made.rref.made = True
        for _ in range(sent):
            model.drop(model.give(made, self.at, rank))
        model.drop(made)

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []

        def check(promise: str, key: str, words: str) -> None:
            if key in expected and not is_close(seen.get(key), expected[key]):
                message = f"{words}: expected {expected[key]!r}, got {seen.get(key)!r}"
                found.append(Violation(promise, message))

        check("WrongValue", "results", "the results")
        check("WrongGradient", "gradients", "the gradients")
        check("WrongGradient", "beside", "the gradients of the context in the second thread")
        check("WrongValue", "alone", "the gradients in one process")
        check("WrongValue", "hooks", "how often hooks run in one process")
        if bool(seen.get("refused")) != (self.inside is not None):
            message = f"a context inside this one had to be refused at rank {self.inside}"
            found.append(Violation("MissingError", message))
        if bool(seen.get("late")) != (self.late is not None):
            found.append(_not_late(self.late_timeout))
        return found

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, first: Sequence[int] = ()) -> Graph:
        at = drawer.rank() if at is None else at
        leaves = _leaves(drawer, at)
        tape = _Tape.of((0.0,), leaves)
        operations: list[Operation] = []
        if first:
            operations.append(("add", (0, 0), drawer.pick(first), "sync"))
            tape.operate("add", (0, 0))
        for _ in range(2 if first else 3):
            _operate(drawer, at, tape, operations)
        forms, number = len(_PASSES), drawer.pick(range(len(_PASSES) * (2 + len(drawer.ranks))))
        called = sum(_is_python(how) for _, _, _, how in operations)
        # By one number, so that a program shrinks as easily as without a late call.
        options = [(late, value) for late in _lates(drawer, at) for value in TENSORS]
        (late, value), seconds = drawer.with_sleep(options, called)
        drawer.slow_functions += late is not None
        extra = number // forms
        drawn = cls(
            at,
            drawer.name("context"),
            leaves,
            tuple(operations),
            value=value,
            beside=extra == 1,
            inside=drawer.peers[at][extra - 2] if extra > 1 else None,
            seconds=seconds,
            late=late,
            out=drawer.name("handle") if late is not None and late[1].endswith("remote") else "",
        )
        return drawn._with(_PASSES[number % forms], tape)

    def _with(self, passes: _Passes, tape: _Tape) -> Graph:
        """The same graph with backward passes."""
        used = {n for _, operands, _, _ in self.operations for n in operands}
        numbers = range(len(self.inputs), len(tape.needs))
        ends = [n for n in numbers if n not in used and tape.needs[n]]
        few = list(ends)
        for end in ends if passes in ("few", "parts") else ():
            rest = [n for n in few if n != end]
            if rest and self._sent(tape) <= self._reached(rest, tape):
                few = rest
        chosen: dict[_Passes, tuple[list[int], ...]] = {
            "once": (ends,),
            "none": (),
            "twice": (ends, ends),
            "few": (few,),
            "parts": (few, ends),
        }
        return replace(self, backwards=tuple(tuple(p) for p in chosen[passes] if p))

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        others = drawer.others[rank]
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not others:
            return []
        return [
            (cls.op, lambda: cls.draw(drawer, at=rank, first=others)),
            (cls.op, lambda: cls.draw(drawer, at=drawer.pick(others), first=(rank,))),
        ]

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended[self.name] = False
        if self.out:
            drawer.note_late_creation(self.out, self.at)
            drawer.unseen.add(self.out)
            if self.late is not None and self.late[0] != self.at:
                drawer.making.add(self.out)


def _lates(drawer: StepDrawer, at: int) -> list[tuple[int, LateHow] | None]:
    """The calls that may time out in a graph, and None, far more often."""
    if not drawer.may_end_late() or not drawer.may_take(_LATE_TAKES):
        return [None]
    able = [
        (rank, how)
        for how in _LATE_HOWS
        for rank in drawer.peers[at]
        if how.startswith("proxy") <= drawer.may_make_rrefs
        and (not how.endswith("remote") or may_time_out(drawer, at, rank))
    ]
    return [*(None,) * max(1, 3 * len(able)), *able]


@dataclass(frozen=True, slots=True, repr=False)
class Unreached(Step):
    """A backward pass in a ``dist_autograd.context()`` at `at` that does not reach what was sent.

    `to` doubles a leaf of `at`, and nothing uses the result. The loss is the sum of the leaf's
    squares. Torch's documentation says that its only algorithm assumes a gradient for everything
    that was sent ("Distributed Autograd Design", FAST mode algorithm). So the pass never ends: the
    engine waits for each send function of the context (engine/dist_engine.cpp:
    DistEngine::computeDependencies adds one to outstanding_tasks_ for each). The pass runs in a
    thread that is left alone after `seconds` (virtual). The block then ends, the context is cleaned
    up, and the pass stays: only DistEngine::cleanupBackwardPass, which comes after it, takes it
    from the passes that torch counts.

    With ``by="timeout"`` the loss misses the result because the call ended by its timeout, four
    times as fast as its function. The send function has been in the context since the call was sent
    (autograd/utils.cpp: getMessageWithAutograd adds it by addSendRpcBackward), and no error of the
    call takes it out. So whoever goes on after a timeout cannot run backward in that context.
    """

    op: ClassVar[str] = "unreached"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 63
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    documented: ClassVar[str] = "backward-waits"
    at: int
    to: int
    name: str
    value: Value = (1.0, 2.0)
    seconds: float = 4.0
    by: Literal["unused", "timeout"] = "unused"

    def enter(self, scope: Scope) -> None:
        if not 0.0 < self.seconds <= MAX_DELAY:
            msg = f"seconds={shown(self.seconds)} must lie above 0, up to {MAX_DELAY:g} (virtual)."
            raise UsageError(msg)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    @property
    def lasts(self) -> float:
        late = _LATE_TAKES if self.by == "timeout" else 0.0
        return self.seconds + late

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """As a function of a graph that is late."""
        return (self.to,) * 2 if self.by == "timeout" else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.in_contexts.call(self.at, self.to, graded=int(self.by == "unused"))
        model.endless_passes[self.at] += 1
        known: dict[int, set[int]] = {self.at: {self.to}}
        known.setdefault(self.to, set())
        expected: dict[str, Any] = {"loss": sum(x * x for x in self.value), "ended": False}
        if self.by == "timeout":
            model.times.check_in_time(self, self.lasts)
            _note_late(model, self, call, self.to)
            expected["late"] = True
        else:
            model.calls[self.to][call] += 1
            # The answer of the late call requires no gradient.
            known[self.to].add(self.at)
        model.release(self.name, self.at, known)
        return model.shows(expected)

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        shown_parts = {key: value for key, value in seen.items() if key != "id"}
        if shown_parts == expected:
            return []
        if shown_parts.get("late") != expected.get("late"):
            return [_not_late(LATE_TIMEOUT)]
        return [Violation("WrongValue", f"expected {expected!r}, got {shown_parts!r}")]

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, to: int | None = None) -> Unreached:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at) if to is None else to
        ways: list[Any] = ["unused"] * 2
        if drawer.may_end_late() and drawer.may_take(_LATE_TAKES):
            ways.append("timeout")
        by, value = drawer.pick([(by, value) for by in ways for value in TENSORS])
        drawer.slow_functions += by == "timeout"
        return cls(at, to, drawer.name("context"), value, by=by)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not drawer.others[rank]:
            return []
        return [
            (cls.op, lambda: cls.draw(drawer, at=rank, to=drawer.pick(drawer.others[rank]))),
            (cls.op, lambda: cls.draw(drawer, at=drawer.pick(drawer.others[rank]), to=rank)),
        ]

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended[self.name] = False


def _slack(timeout: float) -> float:
    """Virtual seconds by which the timeout of a late call comes before its answer."""
    return (TIMES_LATE - 1.0) * timeout


def _not_late(timeout: float) -> Violation:
    """The call of a context that is slower than its timeout gave its value."""
    message = f"a call that takes longer had to time out after {timeout:g} s, and did not"
    return Violation("MissingError", message, timing_sensitive=True, slack=_slack(timeout))


def _note_late(model: Model, step: Graph | Unreached, call: str, rank: int) -> None:
    """Note what a late call runs at a rank, and the call by which its caller waits for that."""
    model.check_gives_up(step)
    for name in (f"{call}/late", f"{call}/slept"):
        model.calls[rank][name] += 1
        model.abandoned_calls[rank].add(name)
    model.unread = True
    model.in_contexts.call(step.at, rank, graded=0)


class _Known(dict[int, set[int]]):
    """The ranks to which each rank sent something inside a context."""

    def call(self, caller: int, rank: int, *, needs: bool) -> None:
        """A call, whose answer holds a tensor that requires a gradient if it `needs` one."""
        self.setdefault(caller, set()).add(rank)
        self.setdefault(rank, set())
        if needs:
            self[rank].add(caller)


#: From which results backward runs: from all that nothing else uses, from none, from them twice, or
#: from as few of them as reach what was sent, alone or first.
_Passes: TypeAlias = Literal["once", "none", "twice", "few", "parts"]
_PASSES: tuple[_Passes, ...] = get_args(_Passes)


def _is_python(how: How) -> bool:
    """Whether an operation is done by a Python function that was called for it."""
    return bool(how) and not how.startswith(("builtin", "script"))


def _negates(how: How) -> bool:
    """Whether a callback of the future negates the result.

    That is a part of the graph, wherever the callback runs. torch gives an answer its recv function
    before it completes the future, by the id of the context that is in the message
    (``python_functions.cpp``: toPyObjInternal; ``autograd/utils.cpp``: addRecvRpcBackward), and
    completes it in the caller's state of autograd (toPyJitFuture, by wrapPropagateTLSState). The
    documentation of ``Future.then`` promises its value. But the context belongs to the thread of
    the caller alone (``autograd/context/container.cpp``: current_context_id_), so a callback may be
    outside of it, and nothing is promised of calls that it makes. It makes none.
    """
    return how in ("async then", "async done")


def _able(how: How) -> tuple[What, ...]:
    """What can be computed in that way."""
    return _COMPUTE.get(how.partition(" ")[0], _WHATS)


def _increase(slopes: dict[int, list[float]], number: int, by: list[float]) -> None:
    before = slopes.get(number, [0.0] * len(by))
    slopes[number] = [a + b for a, b in zip(before, by, strict=True)]


def _leaves(drawer: StepDrawer, at: int) -> tuple[tuple[int, Leafage], ...]:
    """One to three leaves, the first of which requires a gradient."""
    homes = (at, *drawer.others[at])
    first: list[tuple[int, Leafage]] = [(home, sort) for home in homes for sort in _SORTS[:2]]
    more = [None, *((home, sort) for home in homes for sort in _SORTS)]
    number = drawer.pick(range(len(first) * len(more) ** (_MOST_LEAVES - 1)))
    number, index = divmod(number, len(first))
    found: list[tuple[int, Leafage]] = [first[index]]
    for _ in range(_MOST_LEAVES - 1):
        number, index = divmod(number, len(more))
        leaf = more[index]
        if leaf is not None:
            found.append(leaf)
    return tuple(found)


def _operate(drawer: StepDrawer, at: int, tape: _Tape, operations: list[Operation]) -> None:
    """Draw two operations, or one, or none, by one number."""
    ranks = drawer.peers[at]
    sizes = (len(_HOWS), len(ranks), len(_WHATS), _LAST, _LAST)
    each = 1 + math.prod(sizes)
    for number in divmod(drawer.pick(range(each * each)), each)[::-1]:
        if not number:
            continue
        rest = number - 1
        indices: list[int] = []
        for size in sizes:
            rest, index = divmod(rest, size)
            indices.append(index)
        how, what = _HOWS[indices[0]], _WHATS[indices[2]]
        last = len(tape.needs) - 1
        operands = tuple(max(0, last - ago) for ago in indices[3:])[: _OPERANDS[what]]
        degree = sum(tape.degrees[n] for n in operands)
        if what == "mul" and degree > _HIGHEST_DEGREE:
            what = "add"
        how = _way(drawer, how, what, needs=any(tape.needs[n] for n in operands))
        operations.append((what, operands, ranks[indices[1]] if how else at, how))
        tape.operate(what, operands, how)


def _way(drawer: StepDrawer, how: How, what: What, *, needs: bool) -> How:
    """That way, or the simplest of its sort in which torch can do the operation in the context."""
    if how == "proxy async" and drawer.facts.has_bug(_OUTSIDE):
        return "proxy remote"
    if what not in _able(how):
        return "sync"
    return "sync" if how.startswith("builtin") and not needs else how
