"""Steps that train: a distributed optimizer, and a remote module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.steps.arguments import TENSORS
from rpcprops.steps.base import Sort, Step, StepFails, Value, Way

if TYPE_CHECKING:
    from rpcprops.oracle.model import Handle, Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

_MOST_OWNERS = 3


@dataclass(frozen=True, slots=True, repr=False)
class Optimize(Step):
    """One step of a ``DistributedOptimizer`` (SGD, rate 0.25) on a parameter at each of `owners`.

    The loss is the sum of squares, so each element of `value` is halved. The step's value is a list
    of the owners' parameters after that, read at their owners. `name` names the context.
    """

    op: ClassVar[str] = "optimize"
    order: ClassVar[float | None] = 17
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    at: int
    name: str
    owners: tuple[int, ...]
    value: Value = (1.0, 2.0)

    def enter(self, scope: Scope) -> None:
        for rank in self.owners:
            scope.check_rank("owners", rank)
        if not self.owners or len(set(self.owners)) != len(self.owners):
            msg = f"owners={shown(self.owners)} must be ranks, at least one, each once."
            raise UsageError(msg)
        scope.new_context(self.name)

    def predict(self, model: Model, call: str) -> StepPrediction:
        made: list[Handle] = []
        try:
            for owner in self.owners:
                handle, _ = model.remote(self.at, owner, typed=False)
                made.append(handle)
                if not handle.broken:
                    handle.rref.value = list(self.value)
                    model.calls[owner][call] += 1
            parameters = tuple(made)
            optimizers = self._optimizers(model, parameters, made)
            for optimizer in optimizers:
                # The step runs in a context, so only the messages of its handle are counted.
                model.drop(model.give(optimizer, self.at, optimizer.rref.owner))
            known: dict[int, set[int]] = {self.at: set(self.owners)}
            for owner in self.owners:
                known.setdefault(owner, set()).add(self.at)
            model.release(self.name, self.at, known)
            for parameter in parameters:
                parameter.rref.value = [0.5 * x for x in self.value]
            return model.shows([model.value(parameter, self.at) for parameter in parameters])
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
                raise StepFails(parameter.broken)
            try:
                model.ask(self.at, owner, MessageType.PYTHON_CALL, parameter)
            except StepFails as failed:
                failure = failed
                continue
            local = model.created(owner, owner, typed=False)
            optimizer = model.give(local, owner, self.at)
            made.append(optimizer)
            found.append(optimizer)
        if failure:
            raise failure
        return found

    @classmethod
    def draw(
        cls, drawer: StepDrawer, *, at: int | None = None, first: Sequence[int] = ()
    ) -> Optimize:
        at = drawer.rank() if at is None else at
        owners = [drawer.pick(first or drawer.peers[at])]
        for _ in range(_MOST_OWNERS - 1):
            others = [rank for rank in drawer.peers[at] if rank not in owners]
            owner = drawer.pick((None, None, *others))
            if owner is not None:
                owners.append(owner)
        return cls(at, drawer.name("context"), tuple(owners), drawer.pick(TENSORS))

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        others = drawer.others[rank]
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not others:
            return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank, first=others))]


@dataclass(frozen=True, slots=True, repr=False)
class Module(Step):
    """A ``RemoteModule`` at `to` that maps x to ``2 * x + 1``; called once with `value`."""

    op: ClassVar[str] = "module"
    order: ClassVar[float | None] = 16
    at: int
    to: int
    value: Value = (1.0, 2.0)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # torch/distributed/nn/api/remote_module.py: RemoteModule.__init__ makes the module by
        # rpc.remote; each call sends the module's RRef to the owner (_remote_forward).
        handle, _ = model.remote(self.at, self.to, typed=False)
        try:
            model.ask(self.at, self.to, MessageType.PYTHON_CALL, handle)
            handle.rref.made = True
            return model.shows([2.0 * x + 1.0 for x in self.value])
        finally:
            model.drop(handle)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Module:
        at = drawer.rank()
        return cls(at, drawer.peer(at), drawer.pick(TENSORS))
