"""Steps that train: distributed optimizers, and remote modules."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, WireMessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Counters, Violation
from rpcprops.steps.arguments import TENSORS, check_seconds
from rpcprops.steps.base import OwnerOf, Sort, Step, StepFails, Value, Way, is_close, remote_message
from rpcprops.steps.in_rank.constants import REFUSED_METHODS, RETURNS_ITSELF, keywords
from rpcprops.steps.optimizers import (
    CHECKED,
    LACKING,
    OPTIMIZERS,
    OPTIONS,
    ORDINARY,
    REFUSALS,
    UNCOMPILED,
    Optimizer,
    are_options,
    combinations,
    computed,
    differs_by_place,
    has_other_rate,
    is_uncompiled,
    rprop,
)
from rpcprops.steps.rrefs import ask_type

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer
    from rpcprops.torch_facts import TorchFacts

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
        if not self.owners:
            msg = f"owners={shown(self.owners)} must be ranks, at least one."
            raise UsageError(msg)
        scope.new_context(self.name)

    @property
    def lasts(self) -> float:
        return self.seconds * len(self.owners)

    def _optimized(
        self,
        model: Model,
        call: str,
        ends: Sequence[Sequence[float]],
        uses: Sequence[Sequence[int]],
        *,
        raises: bool = False,
    ) -> list[list[float]]:
        """The messages of a whole step; the parameters that `at` reads at the end, as in `ends`.

        Args:
            uses: for each step of the optimizer, the numbers of the parameters in its loss.
            raises: whether each owner raises in the first of them, which ends the step.

        Raises:
            StepFails: they do.
        """
        made: list[Handle] = []
        try:
            parameters = self._parameters(model, call, made)
            optimizers = self._optimizers(model, parameters, made)
            for number, used in enumerate(uses):
                for optimizer in optimizers:
                    # It steps in a context, so only the messages of its handle are counted.
                    model.drop(model.give(optimizer, self.at, optimizer.rref.owner))
                known: dict[int, set[int]] = {self.at: set(self.owners)}
                for owner in dict.fromkeys(self.owners):
                    # The parameters are fetched, unless they are here, and their gradients go back.
                    # Then optimizer.py: DistributedOptimizer.step calls each owner, this rank too.
                    far = sum(self.owners[one] == owner != self.at for one in used)
                    # An owner whose answers need no gradient does not get to know this rank
                    # (autograd/utils.cpp: getMessageWithAutograd, addKnownWorkerId).
                    known.setdefault(owner, set()).update([self.at] * (far > 0))
                    model.in_contexts.call(self.at, owner, 1 + far, graded=far)
                    model.in_contexts.gradient(self.at, owner, far)
                model.release(f"{self.name} {number}" if number else self.name, self.at, known)
                if raises:
                    # optimizer.py: _script_local_optimizer_step, which TorchScript runs.
                    for owner in dict.fromkeys(self.owners):
                        request = WireMessageType.FORWARD_AUTOGRAD_REQ
                        model.answers.error(self.at, owner, request)
                    raise StepFails(error="remote")
            for parameter, end in zip(parameters, ends, strict=True):
                parameter.rref.value = list(end)
            return [model.value(parameter, self.at) for parameter in parameters]
        finally:
            for handle in made:
                model.drop(handle)

    def _constructed(self, model: Model, call: str, *, is_made: bool) -> None:
        """The messages of a step that makes an optimizer and nothing else.

        Args:
            is_made: whether the owners answer with it; else the constructor raises there.
        """
        made: list[Handle] = []
        try:
            parameters = self._parameters(model, call, made)
            self._optimizers(model, parameters, made, are_made=is_made)
            for parameter in parameters:
                # The constructor asks for the values (optimizer.py: _ScriptLocalOptimizer).
                parameter.rref.is_made()
        finally:
            for handle in made:
                model.drop(handle)

    def _parameters(self, model: Model, call: str, made: list[Handle]) -> tuple[Handle, ...]:
        """The parameters that each owner is asked to make; they are added to `made`, too."""
        for owner in self.owners:
            handle, _ = model.remote(self.at, owner, typed=False)
            handle.rref.takes = self.seconds
            handle.rref.slow |= self.seconds > 0
            made.append(handle)
            if not handle.broken:
                model.calls[owner][call] += 1
        return tuple(made)

    def _optimizers(
        self,
        model: Model,
        parameters: Sequence[Handle],
        made: list[Handle],
        *,
        are_made: bool = True,
    ) -> list[Handle]:
        """The constructor asks all owners, and raises afterwards if one of them has failed.

        ``torch/distributed/optim/optimizer.py``: DistributedOptimizer.__init__, _wait_for_all.
        """
        found: list[Handle] = []
        failure: StepFails | None = None
        for owner in dict.fromkeys(self.owners):
            first, *more = self._of(owner, parameters)
            if first.broken:
                if first.second:
                    self._meet_calls(model, parameters)
                raise StepFails(first.broken)
            if any(one.broken for one in more):
                msg = (
                    f"{self!r}: only some of the parameters of a rank are lost. What torch then "
                    f"keeps of the others, which are pickled before, is not predicted."
                )
                raise UsageError(msg)
            try:
                model.ask(self.at, owner, MessageType.PYTHON_CALL, first, *more)
            except StepFails as failed:
                failure = failed
                continue
            if not are_made:
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
        for owner in dict.fromkeys(self.owners):
            number = sum(bool(one.broken) for one in self._of(owner, parameters))
            if not number:
                continue
            model.findings.sends_otherwise(bug, self.at, owner, MessageType.PYTHON_CALL)
            match lost, owner == self.at:
                case True, True:
                    model.findings.keeps_perhaps(bug, owner, Counters(owners=number, forks=number))
                case True, False:
                    for _ in range(number):
                        model.findings.keeps_user(bug, self.at, owner)
                case False, True:
                    calls = Counters(server_calls=1, client_calls=1)
                    model.findings.keeps_perhaps(bug, owner, calls)
                case _:
                    model.findings.keeps_perhaps(bug, self.at, Counters(client_calls=1))
                    model.findings.keeps_perhaps(
                        bug, owner, Counters(owners=number, server_calls=1)
                    )

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The optimizer of each owner asks for its parameters, one after the other."""
        return tuple(dict.fromkeys(self.owners))

    @staticmethod
    def _of(owner: int, parameters: Sequence[Handle]) -> list[Handle]:
        """The parameters of one owner, which its optimizer gets together."""
        return [one for one in parameters if one.rref.owner == owner]


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

    def enter(self, scope: Scope) -> None:
        if len(set(self.owners)) != len(self.owners):
            msg = f"owners={shown(self.owners)} must be ranks, each once."
            raise UsageError(msg)
        _Optimizing.enter(self, scope)

    def predict(self, model: Model, call: str) -> StepPrediction:
        halved = [[0.5 * x for x in self.value]] * len(self.owners)
        return model.shows(self._optimized(model, call, halved, [range(len(self.owners))]))

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


_ROUNDS = (2, 1, 3)
#: What a value says that is as a finding makes it, by the finding.
_FLAWS = {
    "functional-default-rate": "as with the default rate of the functional optimizer",
    "adagrad-wrong-parameter": "as with gradients of other parameters",
    "stale-gradients": "as with gradients of earlier contexts",
    "optimizer-options-by-place": "as with other options than those that were given by place",
}
_UNCHECKED = "unchecked-optimizer-options"
_AFTER_REINIT = "rref-sent-after-reinit"
#: What a step shows whose refused value was accepted.
_MADE = {"parameters": None}


@dataclass(frozen=True, slots=True, repr=False)
class Train(_Optimizing):
    """`rounds` steps of a ``DistributedOptimizer`` with one parameter at each owner.

    Each step has a context of its own. Parameter number n starts as `value` plus n, and the loss
    is the sum of all squares. The step's value has the parameters after that, and those after as
    many steps of the local optimizer in one process. torch says that DistributedOptimizer "applies
    the given optimizer locally for each parameter", and promises no digits. Both compute the same
    formulas in float64, perhaps in another order, so they must agree to 1e-12 of a parameter.

    Where torch is known to compute something else, the rank computes that as well, and the value
    says so. It explains a finding, and is no prediction.

    Args:
        name: names the first context.
        owners: the owner of each parameter; a rank may own several.
        optimizer: a class of ``torch.optim``.
        seconds: virtual seconds for which each function sleeps that makes a parameter.
        options: what it is given besides the rate 0.25, names in :data:`OPTIONS` in that order.
        left_out: which parameter is not in the loss of which step, as pairs of the number of the
            step and that of the parameter.
        refused: a value that the local optimizer refuses, a name in :data:`REFUSALS`. Then nothing
            is trained.
        placed: whether it is given by place what the local optimizer takes by place; "default_lr"
            is no option then.
    """

    op: ClassVar[str] = "train"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 61
    often: ClassVar[int] = 2  # because it has more options than any other kind
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    name: str
    owners: tuple[int, ...]
    optimizer: Optimizer = "SGD"
    rounds: int = 2
    value: Value = (1.0, 2.0)
    seconds: float = 0.0
    options: tuple[str, ...] = ()
    left_out: tuple[tuple[int, int], ...] = ()
    refused: str = ""
    placed: bool = False

    def enter(self, scope: Scope) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            msg = f"rounds={shown(self.rounds)} must lie in 1 to {_MOST_ROUNDS}."
            raise UsageError(msg)
        if not are_options(self.optimizer, self.options):
            msg = (
                f"options={shown(self.options)} are none of {self.optimizer}; use some of "
                f"{', '.join(OPTIONS[self.optimizer])}, in that order, and not both dampening and "
                f"nesterov, or foreach and fused, or leave them out."
            )
            raise UsageError(msg)
        if self.placed and (self.refused or "default_lr" in self.options):
            msg = "placed=True needs an optimizer that is given a rate, and refuses nothing."
            raise UsageError(msg)
        self._check_left_out()
        known = REFUSALS[self.optimizer]
        if self.refused not in ("", *known) or (self.refused and (self.options or self.left_out)):
            msg = (
                f"refused={shown(self.refused)} must be one of {', '.join(known)} for "
                f"{self.optimizer}, with no options and nothing left out; or leave it out."
            )
            raise UsageError(msg)
        _Optimizing.enter(self, scope)

    def _check_left_out(self) -> None:
        every = [*itertools.product(range(self.rounds), range(len(self.owners)))]
        if [one for one in every if one in self.left_out] != [*self.left_out]:
            msg = (
                f"left_out={shown(self.left_out)} must be pairs of the number of a step and that "
                f"of a parameter, in order, each once."
            )
            raise UsageError(msg)
        if not all(self._uses):
            msg = f"left_out={shown(self.left_out)} must leave a parameter in each loss."
            raise UsageError(msg)

    @property
    def _uses(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(one for one in range(len(self.owners)) if (step, one) not in self.left_out)
            for step in range(self.rounds)
        )

    @property
    def raises_there(self) -> bool:
        return bool(self.refused) or self._raises(compiled=True)

    def predict(self, model: Model, call: str) -> StepPrediction:
        if self.refused:
            return self._refuse(model, call)
        starts = [[x + number for x in self.value] for number in range(len(self.owners))]
        ends = self._computed(starts)
        raises = self._raises(compiled=model.facts.compiles_optimizers)
        self._optimized(model, call, ends or starts, self._uses, raises=raises)
        for name in self.flaws(compiled=model.facts.compiles_optimizers):
            model.findings.meets_here(name, self.at, _says(name, model))
        if ends is None:
            return model.shows({"parameters": None})
        self._meet_rounding(model, starts, ends)
        return model.shows({"parameters": ends, "alone": ends})

    def _refuse(self, model: Model, call: str) -> StepPrediction:
        """The constructor of each owner's optimizer raises (torch/optim/sgd.py and so on).

        An optimizer that checks nothing is made all the same, and dropped.
        """
        checks = self.optimizer in CHECKED or self.refused in ("unknown", *LACKING)
        is_made = not checks and model.facts.has_bug(_UNCHECKED)
        self._constructed(model, call, is_made=is_made)
        for owner in self.owners if model.rejoined else ():
            # The error of an owner that got no RRef may hide that of one which refused the value.
            model.findings.logs(_AFTER_REINIT, owner, "(TypeError|ValueError): ")
        if not checks:
            says = re.escape(f"got the value {_MADE!r}")
            model.findings.meets_here(_UNCHECKED, self.at, f"{says}$")
        raise StepFails(error="remote")

    def _computed(self, starts: Sequence[Sequence[float]]) -> list[list[float]] | None:
        """The parameters at the end, if there is a formula."""
        given = keywords(self.options)
        found = [
            [computed(self.optimizer, x, self._uses_of(number), given) for x in start]
            for number, start in enumerate(starts)
        ]
        ends = [[x for x in row if x is not None] for row in found]
        return ends if ends == found else None

    def _uses_of(self, number: int) -> tuple[bool, ...]:
        """For each step, whether a parameter is in its loss."""
        return tuple(number in used for used in self._uses)

    def flaws(self, *, compiled: bool) -> list[str]:
        """The findings that change the parameters, or end the step instead.

        Args:
            compiled: whether torch compiles the optimizer as TorchScript.

        In Python, Adagrad needs as many gradients as parameters: ``zip(..., strict=True)`` in
        ``torch/optim/adagrad.py``, _single_tensor_adagrad. TorchScript knows no ``strict``.
        """
        found: list[str] = []
        if self._raises(compiled=compiled):
            return found
        if self.placed and differs_by_place(self.optimizer, self.options):
            found.append("optimizer-options-by-place")
        if has_other_rate(self.optimizer, self.options):
            found.append("functional-default-rate")
        shifts = self._shifts if compiled else bool(self.left_out)
        if self.optimizer == "Adagrad" and shifts:
            found.append("adagrad-wrong-parameter")
        if self.optimizer in ORDINARY and self._goes_stale:
            found.append("stale-gradients")
        return found

    def _raises(self, *, compiled: bool) -> bool:
        """Whether each owner raises in a step of the optimizer.

        Args:
            compiled: whether torch compiles the optimizer as TorchScript.
        """
        return compiled and is_uncompiled(self.optimizer, self.options, placed=self.placed)

    @property
    def _goes_stale(self) -> bool:
        """Whether a parameter is left out after a step that used it."""
        return any(one in used for step, one in self.left_out for used in self._uses[:step])

    @property
    def _shifts(self) -> bool:
        """Whether a parameter is left out before one of its owner's that is not."""
        return any(
            self.owners[one] == self.owners[other]
            for step, one in self.left_out
            for other in self._uses[step]
            if other > one
        )

    def _meet_rounding(
        self, model: Model, starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
    ) -> None:
        """Note the finding if a rounded factor changes a parameter."""
        if self.optimizer != "Rprop":
            return
        given = keywords(self.options)
        rounded = [
            [rprop(x, self._uses_of(number), given, rounded=True) for x in start]
            for number, start in enumerate(starts)
        ]
        if not is_close(rounded, ends):
            says = re.escape(f"got {rounded!r}, and {ends!r} alone")
            model.findings.meets_here("rounded-rprop-factor", self.at, f"{says}$")

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        parameters, alone = seen.get("parameters"), seen.get("alone")
        wanted = expected["parameters"]
        if wanted is None and _is_table(alone, len(self.owners), len(self.value)):
            wanted = alone
        if is_close(parameters, wanted) and is_close(alone, wanted):
            return []
        message = f"expected the parameters {wanted!r}, got {parameters!r}, and {alone!r} alone"
        otherwise = seen.get("otherwise")
        if otherwise is not None and is_close(parameters, otherwise) and is_close(alone, wanted):
            # Adagrad gets here only where it is compiled, and foreach and fused where not.
            flaws = self.flaws(compiled=True) or self.flaws(compiled=False)
            message += "".join(f", {_FLAWS[name]}" for name in flaws)
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
        if drawer.pick((False, True)) and not drawer.may_fail(at, (remote_message(typed=False),)):
            owners = (*owners, drawer.pick(owners))
        optimizer: Optimizer = drawer.option("train.optimizer", OPTIMIZERS)
        rounds = drawer.pick(_ROUNDS)
        value, seconds = drawer.with_sleep(TENSORS, _slow_makers(drawer, at, owners))
        found = cls(at, drawer.name("context"), owners, optimizer, rounds, value, seconds)
        refused = drawer.pick(_refusals(optimizer, unchecked=drawer.facts.has_bug(_UNCHECKED)))
        if refused:
            return replace(found, refused=refused)
        has_bug, compiled = drawer.facts.has_bug, drawer.facts.compiles_optimizers
        rounded, other_rate = has_bug("rounded-rprop-factor"), has_bug("functional-default-rate")
        known = _combinations(optimizer, rounded=rounded, other_rate=other_rate)
        options = drawer.option("train.options", known)
        placed = drawer.pick((False, False, "default_lr" not in options))
        found = replace(found, options=options, placed=placed)
        for other in ({"placed": False}, {"options": ()}):
            if any(has_bug(name) for name in found.flaws(compiled=compiled)):
                found = replace(found, **other)
        if not set(found.options).isdisjoint(UNCOMPILED):
            # What those that are not compiled make of a parameter that is left out is not known.
            return found
        left_out = drawer.option("train.left_out", _left_out(rounds, len(owners)))
        lacking = replace(found, left_out=left_out)
        is_met = any(has_bug(name) for name in lacking.flaws(compiled=compiled))
        return found if is_met else lacking

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_optimize(cls, drawer, rank, message)


@functools.cache
def _combinations(
    optimizer: Optimizer, *, rounded: bool, other_rate: bool
) -> tuple[tuple[str, ...], ...]:
    """The options that are drawn.

    Args:
        rounded: whether Rprop rounds its factor, if it is given none.
        other_rate: whether some take another rate if they are given none.
    """
    found = (*combinations(optimizer),)
    if other_rate:
        found = tuple(options for options in found if not has_other_rate(optimizer, options))
    if optimizer == "Rprop" and rounded:
        return tuple(options for options in found if "etas" in options)
    return found


@functools.cache
def _refusals(optimizer: Optimizer, *, unchecked: bool) -> tuple[str, ...]:
    """The refused values that are drawn, one step in some; "" for none.

    Args:
        unchecked: whether torch lets some of them pass.
    """
    known = REFUSALS[optimizer]
    if optimizer not in CHECKED and unchecked:
        known = tuple(one for one in known if one in ("unknown", *LACKING))
    return (*[""] * 5 * len(known), *known)


@functools.cache
def _left_out(rounds: int, number: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What is left out where there are so many parameters: nothing in every second case."""
    single = [((step, one),) for step in range(rounds) for one in range(number)]
    always = [tuple((step, one) for step in range(rounds)) for one in range(number)]
    found = [*single, *always] if number > 1 else []
    return (*[()] * max(1, len(found)), *found)


def _says(name: str, model: Model) -> str:
    """What the message says where that finding shows, as a regular expression."""
    if name == "adagrad-wrong-parameter" and not model.facts.compiles_optimizers:
        return f"got ValueError: .*{re.escape(model.facts.texts.remote)}"
    return f"{re.escape(_FLAWS[name])}(,|$)"


def _is_table(value: object, rows: int, columns: int) -> bool:
    """Whether it is so many lists of so many numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) == rows
        and all(isinstance(row, list | tuple) and len(row) == columns for row in value)
        and all(isinstance(number, float) for row in value for number in row)
    )


def _agree(seen: Any, wanted: Any, keys: Iterable[str]) -> bool:
    """Whether two layers have shown the same of each part."""
    both = isinstance(seen, dict) and isinstance(wanted, dict)
    return both and all(is_close(seen.get(key), wanted.get(key)) for key in keys)


#: The methods that are drawn, with none in every second case.
_METHODS = ("",) * len(REFUSED_METHODS) + (*REFUSED_METHODS,)
#: How a RemoteModule is put into a mode before it is used: see :class:`Module`.
Mode: TypeAlias = Literal["", "eval", "train", "train(False)", "parent", "returned"]
#: How many calls of the module that takes.
_MODES: Mapping[str, int] = {"": 0, "eval": 1, "train": 2} | dict.fromkeys(
    ("train(False)", "parent", "returned"), 1
)
_DROPS_MODE = "remote-module-drops-mode"
_COPIES = "remote-module-mode-copies"
_NOT_CALLABLE = "rebuilt-module-not-callable"


@dataclass(frozen=True, slots=True, repr=False)
class Module(Step):
    """A ``RemoteModule`` at `to` that maps x to ``2 * x + 1``, and is given `value`.

    Its forward sleeps for `seconds` (virtual).

    torch says of a RemoteModule that it "behaves like a regular nn.Module except that the forward
    method is executed on the remote node", that it "can be shared across processors using RPC
    framework", and that one "can also be initialized given a module RRef" (``remote_module.py``:
    docstrings of _RemoteModule.__init__ and init_from_module_rref). It also says that no methods
    but ``forward`` and ``forward_async`` are supported "for now". Most of the others it refuses
    (_raise_not_supported). ``train(mode)`` and ``eval()`` it has, and passes them on to the module
    at the owner. So they must do what those of a module do.

    Args:
        mode: in evaluation mode the module maps x to ``2 * x - 1``. It is put into that by its
            ``eval()``, by ``train(False)``, or by the ``eval()`` of a "parent", a module that has
            it as a submodule. With "train" it is put back into the other mode by ``train()``. With
            "returned", ``eval()`` must return the module itself.
        again: it is the module that ``init_from_module_rref`` makes of its RRef that is used.
        refused: a method of a module that it must refuse before; "" for none.
        called: the module itself is called, and not its ``forward``.
        sent: after that it is sent to `to`, and used there once more in the same way.
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
    refused: str = ""
    called: bool = False
    sent: bool = False

    def enter(self, scope: Scope) -> None:
        if self.refused not in ("", *REFUSED_METHODS):
            msg = (
                f"refused={shown(self.refused)} is no method that a RemoteModule refuses; use one "
                f"of {', '.join(REFUSED_METHODS)}, or leave it out."
            )
            raise UsageError(msg)
        check_seconds(self.seconds)

    @property
    def times(self) -> int:
        """How often the module is used."""
        return 2 if self.sent else 1

    @property
    def lasts(self) -> float:
        return self.seconds * self.times

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """Functions ask at `to` for a value that was made there, and one waits for another one."""
        return (self.to,) * self.times

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch/distributed/nn/api/remote_module.py: RemoteModule.__init__ makes the module by
        # rpc.remote; each call sends the module's RRef to the owner (_remote_forward). train() and
        # eval() call it through a proxy of the RRef, and init_from_module_rref sends nothing.
        handle, _ = model.remote(self.at, self.to, typed=False)
        self._meet(model)
        try:
            if self.mode:
                model.creations.use(handle)
                ask_type(model, handle, self.at, "", UNLIMITED_SLACK)
            for _ in range(1 + _MODES[self.mode]):
                model.ask(self.at, self.to, MessageType.PYTHON_CALL, handle)
            handle.rref.made = True
            if self.sent:
                self._use_there(model, handle)
            return model.shows(self._computed(trains=self.mode in ("", "train")))
        finally:
            model.drop(handle)

    def _use_there(self, model: Model, handle: Handle) -> None:
        """Send the module, whose RRef goes with it (_remote_module_reducer), and use it there."""
        there = model.call(self.at, self.to, MessageType.PYTHON_CALL, handle=handle)
        assert there is not None
        try:
            model.ask(self.to, self.to, MessageType.PYTHON_CALL, there)
        except StepFails as failed:
            # The function at `to` raises it.
            raise StepFails("remote" if failed.error == "injected" else failed.error) from failed
        finally:
            model.drop(there)

    def _computed(self, *, trains: bool) -> list[float]:
        more = 1.0 if trains else -1.0
        return [2.0 * x + more for x in self.value] * self.times

    @property
    def wrong(self) -> tuple[str, ...]:
        """The findings by which torch does it wrong, in the order in which they would show.

        ``eval()`` and ``train()`` return what they get from the owner, a copy of the module. A mode
        that ``train()`` is given is dropped, and the ``eval()`` of a module is ``train(False)`` of
        each submodule (``torch/nn/modules/module.py``: Module.eval, Module.train). A module that
        torch has made without ``Module.__init__`` cannot be called.
        """
        found: list[str] = []
        if self.mode == "returned":
            found.append(_COPIES)
        if self.called and (self.again or self.sent):
            found.append(_NOT_CALLABLE)
        if self.mode in ("train(False)", "parent"):
            found.append(_DROPS_MODE)
        return tuple(found)

    def _meet(self, model: Model) -> None:
        """Note the finding that shows first, and then nothing else does: the last gives a value."""
        says = {
            _COPIES: re.escape(f"got RuntimeError: {RETURNS_ITSELF}"),
            _NOT_CALLABLE: re.escape(f"got AttributeError: {model.facts.texts.without_hooks}"),
            _DROPS_MODE: re.escape(f", got {self._computed(trains=True)}") + "$",
        }
        for finding in self.wrong:
            if model.facts.has_bug(finding):
                model.findings.meets_here(finding, self.at, says[finding])
                return

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Module:
        at = drawer.rank()
        to = drawer.peer(at)
        form = drawer.pick(_forms(drawer.facts))
        value, seconds = drawer.with_sleep(TENSORS, form.times)
        refused = drawer.pick(_METHODS)
        return replace(form, at=at, to=to, value=value, seconds=seconds, refused=refused)


#: How many times more often a remote module is drawn that meets no finding on any torch.
_ORDINARY = 3


@functools.cache
def _forms(facts: TorchFacts) -> tuple[Module, ...]:
    """Uses of a remote module that this torch does right, and that meet one finding at most."""
    ways = itertools.product(get_args(Mode), *((False, True),) * 3)
    forms = [Module(0, 0, mode=m, again=a, called=c, sent=s) for m, a, c, s in ways]
    found = [one for one in forms if not one.wrong] * _ORDINARY
    found += [one for one in forms if len(one.wrong) == 1 and not facts.has_bug(one.wrong[0])]
    return tuple(found)


#: How the input gets into the module: by its forward or forward_async, by a call of the module, or
#: by a proxy of its RRef.
By: TypeAlias = Literal["forward", "async", "proxy", "call"]
_BYS: tuple[By, ...] = get_args(By)
#: The layers that a remote module may be; see :class:`Linear`.
LayerKind: TypeAlias = Literal[
    "linear", "dropout", "norm", "embedding", "sparse", "keywords", "device", "hooked"
]
LAYERS: tuple[LayerKind, ...] = get_args(LayerKind)
_OUTPUTS = 2
_TABLES = ("embedding", "sparse")
_TWO_INPUTS = ("keywords", "device")
_SKIPS_HOOKS = "remote-module-skips-hooks"
_TAKES_NAMES = "remote-module-takes-names"
_WITHOUT_HOOKS = "as without hooks"


@dataclass(frozen=True, slots=True, repr=False)
class Linear(Step):
    """A ``RemoteModule`` at `to` that is a layer, and backward through it in a context.

    Output i of two of a linear layer is the sum over j of ``(i + j + 1) * value[j]``, plus i. The
    loss is the sum of the outputs' squares. The step's value has the outputs, the gradients of the
    inputs and of the parameters, and the buffers; and those that the same layer gives in one
    process. torch says that a RemoteModule "behaves like a regular nn.Module except that the
    forward method is executed on the remote node" (``remote_module.py``), and promises no digits.
    Both compute the same formulas in float64, so they must agree to 1e-12.

    Args:
        name: names the context for :class:`Refused`.
        by: ``forward``, ``forward_async``, a call of the module, or ``forward`` through
            ``get_module_rref()``.
        seconds: virtual seconds for which the layer's forward sleeps.
        layer: "linear"; "dropout", a linear layer and a dropout in evaluation mode; "norm", a batch
            norm in training mode, whose buffers change; "embedding", and "sparse" with sparse
            gradients, where `value` gives numbers of rows; "keywords", a linear layer of two inputs
            with keywords, and "device" with one more that has the name of a parameter of torch's;
            "hooked", a linear layer with a hook before and one after its forward.
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
    layer: LayerKind = "linear"

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def _parameters(self) -> int:
        return 1 if self.layer in _TABLES else 2

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """One function after the other asks at `to` for a value that was made there."""
        return (self.to,)

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
            for _ in range(self._parameters):
                local = model.owned(self.to, typed=False)
                made.append(model.give(local, self.to, self.at))
            # In the context: a forward, which sends the module's RRef (_remote_forward), a proxy
            # that first asks for its type (rref_proxy.py: _invoke_rpc), each parameter's RRef, and
            # the module's RRef again to ask for its buffers.
            times = 2 if self.by == "proxy" and self.at != self.to else 1
            for handle in (*[module] * times, *made[1:], module):
                model.drop(model.give(handle, self.at, self.to))
            # The gradient of the outputs goes there, and that of the inputs comes back, if they are
            # no numbers of rows.
            model.in_contexts.call(self.at, self.to, times + len(made), graded=1)
            model.in_contexts.gradient(self.at, self.to)
            model.in_contexts.gradient(self.to, self.at, int(self.layer not in _TABLES))
            known: dict[int, set[int]] = {self.at: {self.to}}
            known.setdefault(self.to, set()).add(self.at)
            model.release(self.name, self.at, known)
            if self.has_hooks:
                model.findings.meets_here(_SKIPS_HOOKS, self.at, f"{_WITHOUT_HOOKS}$")
            if self.takes_name:
                says = f"got TypeError: .*{re.escape(model.facts.texts.remote)}"
                model.findings.meets_here(_TAKES_NAMES, self.at, says)
            return model.shows(self._computed())
        finally:
            for handle in made:
                model.drop(handle)

    @property
    def has_hooks(self) -> bool:
        """Whether hooks must run: a proxy is asked for the forward itself."""
        return self.layer == "hooked" and self.by != "proxy"

    @property
    def takes_name(self) -> bool:
        """Whether torch passes the keyword on beside a parameter of that name."""
        return self.layer == "device" and self.by != "proxy"

    def _computed(self) -> dict[str, Any]:
        """What it must show; nothing is computed here for most layers."""
        if self.layer not in ("linear", "dropout"):
            return {"alone": None}
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
        found = {"outputs": outputs, "gradients": gradients, "state": []}
        return {**found, "alone": found}

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        alone, wanted = seen.get("alone"), expected["alone"]
        if wanted is None and self._is_whole(alone):
            wanted = alone
        if wanted is None:
            return [Violation("WrongValue", f"alone: expected outputs, got {alone!r}")]
        promises = {"outputs": "WrongValue", "gradients": "WrongGradient", "state": "WrongValue"}
        says = ""
        if self.has_hooks and _agree(seen, seen.get("otherwise"), promises):
            says = f", {_WITHOUT_HOOKS}"
        found = [
            Violation(promise, f"{key}: expected {wanted[key]!r}, got {seen.get(key)!r}{says}")
            for key, promise in promises.items()
            if not is_close(seen.get(key), wanted[key])
        ]
        if not _agree(alone, wanted, promises):
            found.append(Violation("WrongValue", f"alone: expected {wanted!r}, got {alone!r}"))
        return found

    def _is_whole(self, alone: Any) -> bool:
        """Whether the layer of one process has shown something of each part."""
        if not isinstance(alone, dict) or set(alone) != {"outputs", "gradients", "state"}:
            return False
        inputs = 0 if self.layer in _TABLES else 2 if self.layer in _TWO_INPUTS else 1
        parts = [len(alone["gradients"]), len(alone["state"])]
        rows = [alone["outputs"], *alone["gradients"], *alone["state"]]
        return parts == [inputs + self._parameters, 3 * (self.layer == "norm")] and all(rows)

    @classmethod
    def draw(
        cls, drawer: StepDrawer, *, at: int | None = None, first: Sequence[int] = ()
    ) -> Linear:
        at = drawer.rank() if at is None else at
        to = drawer.pick(first or drawer.peers[at])
        value, seconds = drawer.with_sleep(TENSORS, 1)
        found = cls(at, drawer.name("context"), to, value, drawer.pick(_BYS), seconds)
        found = replace(found, layer=drawer.pick(LAYERS))
        skips = found.has_hooks and drawer.facts.has_bug(_SKIPS_HOOKS)
        takes = found.takes_name and drawer.facts.has_bug(_TAKES_NAMES)
        return replace(found, by="proxy") if skips or takes else found

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
