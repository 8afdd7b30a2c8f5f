"""Steps that train: distributed optimizers, and remote modules."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Counters, Violation
from rpcprops.steps.arguments import TENSORS, check_seconds
from rpcprops.steps.base import Sort, Step, StepFails, Value, Way, is_close, remote_message
from rpcprops.steps.in_rank.constants import KEYWORDS
from rpcprops.steps.rrefs import ask_type

if TYPE_CHECKING:
    from rpcprops.oracle.model import Handle, Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

_MOST_OWNERS = 3
_MOST_ROUNDS = 9


class _Optimizing(Step):
    """A step that optimizes one parameter at each of `owners`, in one context after the other."""

    __slots__ = ()

    name: str
    owners: tuple[int, ...]
    #: Virtual seconds for which the function sleeps that makes a parameter.
    seconds: float

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        check_seconds(self.lasts)
        for rank in self.owners:
            scope.check_rank("owners", rank)
        if not self.owners or len(set(self.owners)) != len(self.owners):
            msg = f"owners={shown(self.owners)} must be ranks, at least one, each once."
            raise UsageError(msg)
        scope.new_context(self.name)

    @property
    def lasts(self) -> float:
        return self.seconds * len(self.owners)

    def _optimized(
        self, model: Model, call: str, ends: Sequence[Sequence[float]], rounds: int
    ) -> list[list[float]]:
        """The messages of a whole step; the parameters that `at` reads at the end, as in `ends`."""
        made: list[Handle] = []
        try:
            for owner in self.owners:
                handle, _ = model.remote(self.at, owner, typed=False)
                handle.rref.takes = self.seconds
                handle.rref.slow |= self.seconds > 0
                made.append(handle)
                if not handle.broken:
                    model.calls[owner][call] += 1
            parameters = tuple(made)
            optimizers = self._optimizers(model, parameters, made)
            for number in range(rounds):
                for optimizer in optimizers:
                    # It steps in a context, so only the messages of its handle are counted.
                    model.drop(model.give(optimizer, self.at, optimizer.rref.owner))
                known: dict[int, set[int]] = {self.at: set(self.owners)}
                for owner in self.owners:
                    known.setdefault(owner, set()).add(self.at)
                    # The parameter is fetched, unless it is here, and its gradient goes back. Then
                    # optimizer.py: DistributedOptimizer.step calls each owner, this rank too.
                    is_far = owner != self.at
                    model.in_contexts.call(self.at, owner, 1 + is_far, graded=int(is_far))
                    model.in_contexts.gradient(self.at, owner, int(is_far))
                model.release(f"{self.name} {number}" if number else self.name, self.at, known)
            for parameter, end in zip(parameters, ends, strict=True):
                parameter.rref.value = list(end)
            return [model.value(parameter, self.at) for parameter in parameters]
        finally:
            for handle in made:
                model.drop(handle)

    def _optimizers(
        self, model: Model, parameters: Sequence[Handle], made: list[Handle]
    ) -> list[Handle]:
        """The constructor asks all owners, and raises afterwards if one of them has failed.

        ``torch/distributed/optim/optimizer.py``: DistributedOptimizer.__init__, _wait_for_all.
        """
        found: list[Handle] = []
        failure: StepFails | None = None
        for parameter in parameters:
            owner = parameter.rref.owner
            if parameter.broken:
                if parameter.second:
                    self._meet_calls(model, parameters)
                raise StepFails(parameter.broken)
            try:
                model.ask(self.at, owner, MessageType.PYTHON_CALL, parameter)
            except StepFails as failed:
                failure = failed
                continue
            local = model.owned(owner, typed=False)
            optimizer = model.give(local, owner, self.at)
            made.append(optimizer)
            found.append(optimizer)
        if failure:
            raise failure
        return found

    def _meet_calls(self, model: Model, parameters: Sequence[Handle]) -> None:
        """Note the calls that may stay where a torch does not know which creations have failed.

        The constructor then asks owners whose parameter was never made, and they wait for it
        (rref_context.cpp: RRefContext::getOrCreateOwnerRRef; OwnerRRef::getValue). It ends with the
        first parameter that was marked, which cannot be sent (RRefContext::prepareChildFork). If
        the request is lost, only the fork in it stays.
        """
        bug = "second-failed-remote"
        lost = MessageType.PYTHON_CALL in model.plan.table(self.at).failing
        for owner in (parameter.rref.owner for parameter in parameters if parameter.broken):
            model.sends_otherwise(bug, self.at, owner, MessageType.PYTHON_CALL)
            match lost, owner == self.at:
                case True, True:
                    model.keeps_perhaps(bug, owner, Counters(owners=1, forks=1))
                case True, False:
                    model.keeps_user(bug, self.at, owner)
                case False, True:
                    model.keeps_perhaps(bug, owner, Counters(server_calls=1, client_calls=1))
                case _:
                    model.keeps_perhaps(bug, self.at, Counters(client_calls=1))
                    model.keeps_perhaps(bug, owner, Counters(owners=1, server_calls=1))


def _owners(drawer: StepDrawer, at: int, first: Sequence[int], *, several: bool) -> tuple[int, ...]:
    """One to three owners; the first is in `first`, if any are. `several`: two, if there can be.

    Of several parameters, a torch with second-failed-remote takes the one whose creation is lost
    for a good one, and its owner never answers. The error of another one then ends the step, and
    that call stays. So there is one where creations may be lost.
    """
    owners = [drawer.pick(first or drawer.peers[at])]
    is_lost = drawer.may_fail(at, (remote_message(typed=False),))
    if is_lost and drawer.facts.has_bug("second-failed-remote"):
        return tuple(owners)
    for number in range(1, _MOST_OWNERS):
        others = [rank for rank in drawer.peers[at] if rank not in owners]
        must = several and number == 1 and others
        owner = drawer.pick(others if must else (None, None, *others))
        if owner is not None:
            owners.append(owner)
    return tuple(owners)


def _slow_makers(drawer: StepDrawer, at: int, owners: Sequence[int]) -> int:
    """How many functions that make parameters may sleep: none where some may have been lost.

    The step then ends with the error of one, while others still sleep.
    """
    sent = (remote_message(typed=False), MessageType.PYTHON_CALL)
    return 0 if drawer.may_fail(at, sent) or not drawer.settles else len(owners)


def _ways_to_optimize(cls: Any, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
    """The ways to draw a step of that class that makes `rank` send such a message."""
    if message is MessageType.PYTHON_REMOTE_CALL:
        # Several creations by one step, if there are ranks enough.
        return [(cls.op, lambda: cls.draw(drawer, at=rank, several=True))]
    others = drawer.others[rank]
    if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not others:
        return []
    return [(cls.op, lambda: cls.draw(drawer, at=rank, first=others))]


@dataclass(frozen=True, slots=True, repr=False)
class Optimize(_Optimizing):
    """One step of a ``DistributedOptimizer`` (SGD, rate 0.25) on a parameter at each of `owners`.

    The loss is the sum of squares, so each element of `value` is halved. The step's value is a list
    of the owners' parameters after that, read at their owners. `name` names the context. Each
    function that makes a parameter sleeps for `seconds` (virtual).
    """

    op: ClassVar[str] = "optimize"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 17
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    at: int
    name: str
    owners: tuple[int, ...]
    value: Value = (1.0, 2.0)
    seconds: float = 0.0

    def predict(self, model: Model, call: str) -> StepPrediction:
        halved = [[0.5 * x for x in self.value]] * len(self.owners)
        return model.shows(self._optimized(model, call, halved, 1))

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: int | None = None,
        first: Sequence[int] = (),
        several: bool = False,
    ) -> Optimize:
        at = drawer.rank() if at is None else at
        owners = _owners(drawer, at, first, several=several)
        value, seconds = drawer.with_sleep(TENSORS, _slow_makers(drawer, at, owners))
        return cls(at, drawer.name("context"), owners, value, seconds)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_optimize(cls, drawer, rank, message)


#: Optimizers of ``torch.optim``. For all but NAdam torch has a version in TorchScript, which
#: DistributedOptimizer uses instead (torch/distributed/optim/utils.py: functional_optim_map).
Optimizer: TypeAlias = Literal[
    "SGD", "Adagrad", "Adam", "AdamW", "Adadelta", "RMSprop", "Adamax", "NAdam", "Rprop"
]
_OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
_ROUNDS = (2, 1, 3)
_RATE = 0.25
#: The factors of Rprop's step sizes, and the limits of these (torch/optim/rprop.py).
_SHRINKS, _GROWS = 0.5, 1.2
_STEP_SIZES = (1e-6, 50.0)

#: The options that an optimizer may be given besides its rate, one at a time. Both that of
#: ``torch.optim`` and its version in TorchScript take them (distributed/optim/functional_*.py).
OPTIONS: Mapping[Optimizer, tuple[str, ...]] = {
    "SGD": ("momentum", "nesterov", "dampening", "weight_decay", "maximize"),
    "Adagrad": ("lr_decay", "initial_accumulator_value", "weight_decay", "maximize"),
    "Adam": ("betas", "amsgrad", "weight_decay", "maximize"),
    "AdamW": ("betas", "amsgrad", "weight_decay", "maximize"),
    "Adadelta": ("rho", "weight_decay", "maximize"),
    "RMSprop": ("momentum", "alpha", "centered", "weight_decay", "maximize"),
    "Adamax": ("betas", "weight_decay", "maximize"),
    "NAdam": ("betas", "momentum_decay", "weight_decay"),
    "Rprop": ("etas", "maximize"),
}


def _sgd(value: float, rounds: int, options: Mapping[str, Any]) -> float:
    """A parameter after some steps of SGD, where the loss is its square (torch/optim/sgd.py)."""
    momentum, kept = options.get("momentum", 0.0), 0.0
    for number in range(rounds):
        slope = -2.0 * value if options.get("maximize") else 2.0 * value
        slope += options.get("weight_decay", 0.0) * value
        if momentum:
            damped = (1.0 - options.get("dampening", 0.0)) * slope
            kept = momentum * kept + damped if number else slope
            slope = slope + momentum * kept if options.get("nesterov") else kept
        value -= _RATE * slope
    return value


def _rprop(value: float, rounds: int, *, grows: float, upwards: bool = False) -> float:
    """A parameter after some steps of Rprop, where the loss is its square; or what maximizes it."""
    previous, size = 0.0, _RATE
    for _ in range(rounds):
        slope = -2.0 * value if upwards else 2.0 * value
        turn = slope * previous
        size *= grows if turn > 0 else _SHRINKS if turn < 0 else 1.0
        size = min(max(size, _STEP_SIZES[0]), _STEP_SIZES[1])
        if turn < 0:
            slope = 0.0
        if slope:
            value -= math.copysign(size, slope)
        previous = slope
    return value


def _as_float32(number: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded


@dataclass(frozen=True, slots=True, repr=False)
class Train(_Optimizing):
    """`rounds` steps of a ``DistributedOptimizer`` (rate 0.25) with one parameter at each owner.

    Each step has a context of its own. Parameter number n starts as `value` plus n, and the loss
    is the sum of all squares. The step's value has the parameters after that, and those after as
    many steps of the local optimizer in one process. torch says that DistributedOptimizer "applies
    the given optimizer locally for each parameter", and promises no digits. Both compute the same
    formulas in float64, perhaps in another order, so they must agree to 1e-12 of a parameter.

    Args:
        name: names the first context.
        optimizer: a class of ``torch.optim``.
        option: what it is given besides its rate, a name in :data:`OPTIONS`; "" for nothing.
        seconds: virtual seconds for which each function sleeps that makes a parameter.
    """

    op: ClassVar[str] = "train"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 61
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    name: str
    owners: tuple[int, ...]
    optimizer: Optimizer = "SGD"
    rounds: int = 2
    value: Value = (1.0, 2.0)
    seconds: float = 0.0
    option: str = ""

    def enter(self, scope: Scope) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            msg = f"rounds={shown(self.rounds)} must lie in 1 to {_MOST_ROUNDS}."
            raise UsageError(msg)
        known = OPTIONS[self.optimizer]
        if self.option not in ("", *known):
            msg = (
                f"option={shown(self.option)} is none of {self.optimizer}; use one of "
                f"{', '.join(known)}, or leave it out."
            )
            raise UsageError(msg)
        _Optimizing.enter(self, scope)

    def predict(self, model: Model, call: str) -> StepPrediction:
        starts = [[x + number for x in self.value] for number in range(len(self.owners))]
        self._optimized(model, call, starts, self.rounds)
        if self.optimizer == "Rprop":
            ends = self._rprop(starts, self._grows)
            self._meet_rounding(model, starts, ends)
            return model.shows({"parameters": ends, "alone": ends})
        if self.optimizer != "SGD":
            return model.shows({"parameters": None})
        ends = [[_sgd(x, self.rounds, self._options) for x in start] for start in starts]
        return model.shows({"parameters": ends, "alone": ends})

    @property
    def _options(self) -> Mapping[str, Any]:
        return KEYWORDS.get(self.option, {})

    @property
    def _grows(self) -> float:
        grows: float = self._options.get("etas", (_SHRINKS, _GROWS))[1]
        return grows

    def _rprop(self, starts: Sequence[Sequence[float]], grows: float) -> list[list[float]]:
        upwards = "maximize" in self._options
        return [
            [_rprop(x, self.rounds, grows=grows, upwards=upwards) for x in start]
            for start in starts
        ]

    def _meet_rounding(
        self, model: Model, starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
    ) -> None:
        """Note the finding if a rounded factor changes a parameter."""
        rounded = self._rprop(starts, _as_float32(self._grows))
        if not is_close(rounded, ends):
            says = re.escape(f"got {rounded!r}, and {ends!r} alone")
            model.meets_here("rounded-rprop-factor", self.at, f"{says}$")

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        parameters, alone = seen.get("parameters"), seen.get("alone")
        wanted = expected["parameters"]
        if wanted is None and _is_table(alone, len(self.owners), len(self.value)):
            wanted = alone
        if is_close(parameters, wanted) and is_close(alone, wanted):
            return []
        message = f"expected the parameters {wanted!r}, got {parameters!r}, and {alone!r} alone"
        return [Violation("WrongValue", message)]

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: int | None = None,
        first: Sequence[int] = (),
        several: bool = False,
    ) -> Train:
        at = drawer.rank() if at is None else at
        owners = _owners(drawer, at, first, several=several)
        rounds_factor = drawer.facts.has_bug("rounded-rprop-factor")
        # What torch once got wrong comes more often where it has been mended.
        often: tuple[Optimizer, ...] = () if rounds_factor else ("Rprop", "Rprop", "Rprop")
        optimizer: Optimizer = drawer.pick([*_OPTIMIZERS, *often])
        rounds = drawer.pick(_ROUNDS)
        value, seconds = drawer.with_sleep(TENSORS, _slow_makers(drawer, at, owners))
        options = ("", *OPTIONS[optimizer])
        if optimizer == "Rprop" and rounds_factor:
            options = ("etas",)
        option = drawer.pick(options)
        name = drawer.name("context")
        return cls(at, name, owners, optimizer, rounds, value, seconds, option)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_optimize(cls, drawer, rank, message)


def _is_table(value: object, rows: int, columns: int) -> bool:
    """Whether it is so many lists of so many numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == rows
        and all(isinstance(row, list | tuple) and len(row) == columns for row in value)
        and all(isinstance(number, float) for row in value for number in row)
    )


#: The modes into which a RemoteModule is put before it is called, one after the other.
Mode: TypeAlias = Literal["", "eval", "train"]


@dataclass(frozen=True, slots=True, repr=False)
class Module(Step):
    """A ``RemoteModule`` at `to` that maps x to ``2 * x + 1``; called once with `value`.

    Its forward sleeps for `seconds` (virtual).
    In evaluation mode it maps x to ``2 * x - 1``. With `mode` "eval" it is put into that by its
    ``eval()`` first, and with "train" also back into the other one by ``train()``. With `again` it
    is the module that ``init_from_module_rref`` makes of its RRef that is called.

    torch's documentation promises ``forward`` and ``forward_async`` only. Of the other methods of a
    module a RemoteModule refuses most, and passes these two on to the module at the owner
    (``remote_module.py``: train, eval; a mode that train() is given is dropped, so none is given).
    """

    op: ClassVar[str] = "module"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 16
    at: int
    to: int
    value: Value = (1.0, 2.0)
    seconds: float = 0.0
    mode: Mode = ""
    again: bool = False

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)

    @property
    def lasts(self) -> float:
        return self.seconds

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch/distributed/nn/api/remote_module.py: RemoteModule.__init__ makes the module by
        # rpc.remote; each call sends the module's RRef to the owner (_remote_forward). train() and
        # eval() call it through a proxy of the RRef, and init_from_module_rref sends nothing.
        handle, _ = model.remote(self.at, self.to, typed=False)
        calls = 1 + {"": 0, "eval": 1, "train": 2}[self.mode]
        try:
            if self.mode:
                model.use(handle)
                ask_type(model, handle, self.at, "", UNLIMITED_SLACK)
            for _ in range(calls):
                model.ask(self.at, self.to, MessageType.PYTHON_CALL, handle)
            handle.rref.made = True
            more = -1.0 if self.mode == "eval" else 1.0
            return model.shows([2.0 * x + more for x in self.value])
        finally:
            model.drop(handle)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Module:
        at = drawer.rank()
        to = drawer.peer(at)
        mode, again = drawer.pick([*itertools.product(get_args(Mode), (False, True))])
        return cls(at, to, *drawer.with_sleep(TENSORS, 1), mode, again)


#: How the input gets into the module: by its forward, or its forward_async, or a proxy of its RRef.
By: TypeAlias = Literal["forward", "async", "proxy"]
_BYS: tuple[By, ...] = get_args(By)
_OUTPUTS = 2


@dataclass(frozen=True, slots=True, repr=False)
class Linear(Step):
    """A ``RemoteModule`` at `to` that is a linear layer, and backward through it in a context.

    Output i of two is the sum over j of ``(i + j + 1) * value[j]``, plus i. The loss is the sum of
    the outputs' squares. The step's value has the outputs, and the gradients of the input, the
    weights (row by row) and the bias, and those that the same layer gives in one process.

    Args:
        name: names the context for :class:`Refused`.
        by: ``forward``, ``forward_async``, or ``forward`` through ``get_module_rref()``.
        seconds: virtual seconds for which the layer's forward sleeps.
    """

    op: ClassVar[str] = "linear"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 62
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    name: str
    to: int
    value: Value = (1.0, 2.0)
    by: By = "forward"
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    @property
    def lasts(self) -> float:
        return self.seconds

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch/distributed/nn/api/remote_module.py: RemoteModule.__init__ makes the module by
        # rpc.remote, and remote_parameters calls a function that answers with an RRef of each.
        module, _ = model.remote(self.at, self.to, typed=False)
        made = [module]
        # Until it has asked for the parameters, there is no context.
        model.missing_contexts.add(self.name)
        try:
            model.ask(self.at, self.to, MessageType.PYTHON_CALL, module)
            model.missing_contexts.discard(self.name)
            module.rref.made = True
            for _ in ("weight", "bias"):
                local = model.owned(self.to, typed=False)
                made.append(model.give(local, self.to, self.at))
            # In the context: a forward, which sends the module's RRef (_remote_forward), a proxy
            # that first asks for its type (rref_proxy.py: _invoke_rpc), and each parameter's RRef.
            times = 2 if self.by == "proxy" and self.at != self.to else 1
            for handle in (*[module] * times, *made[1:]):
                model.drop(model.give(handle, self.at, self.to))
            # The gradient of the outputs goes there, and that of the input comes back.
            model.in_contexts.call(self.at, self.to, times + len(made[1:]), graded=1)
            model.in_contexts.gradient(self.at, self.to)
            model.in_contexts.gradient(self.to, self.at)
            known: dict[int, set[int]] = {self.at: {self.to}}
            known.setdefault(self.to, set()).add(self.at)
            model.release(self.name, self.at, known)
            return model.shows(self._computed())
        finally:
            for handle in made:
                model.drop(handle)

    def _computed(self) -> dict[str, Any]:
        weights = [
            [float(row + column + 1) for column in range(len(self.value))]
            for row in range(_OUTPUTS)
        ]
        outputs = [
            sum(w * x for w, x in zip(row, self.value, strict=True)) + number
            for number, row in enumerate(weights)
        ]
        slopes = [2.0 * y for y in outputs]
        gradients = [
            [
                sum(s * w for s, w in zip(slopes, column, strict=True))
                for column in zip(*weights, strict=True)
            ],
            [s * x for s in slopes for x in self.value],
            slopes,
        ]
        return {"outputs": outputs, "gradients": gradients, "alone": gradients}

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        promises = {"outputs": "WrongValue", "gradients": "WrongGradient", "alone": "WrongValue"}
        return [
            Violation(promise, f"{key}: expected {expected[key]!r}, got {seen.get(key)!r}")
            for key, promise in promises.items()
            if not is_close(seen.get(key), expected[key])
        ]

    @classmethod
    def draw(
        cls, drawer: StepDrawer, *, at: int | None = None, first: Sequence[int] = ()
    ) -> Linear:
        at = drawer.rank() if at is None else at
        to = drawer.pick(first or drawer.peers[at])
        value, seconds = drawer.with_sleep(TENSORS, 1)
        return cls(at, drawer.name("context"), to, value, drawer.pick(_BYS), seconds)

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
