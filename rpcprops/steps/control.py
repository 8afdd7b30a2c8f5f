"""Steps that call nothing: they let time pass, wait for rest, or hold steps that run at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY
from rpcprops.steps.base import Leaf, Step

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope, Touched
    from rpcprops.strategies.drawing import StepDrawer

_PAUSES = (1.0, 0.25, 3.0)


@dataclass(frozen=True, slots=True, repr=False)
class Pause(Step):
    """Let `seconds` (virtual) pass at a rank."""

    op: ClassVar[str] = "pause"
    order: ClassVar[float | None] = 18
    at: int
    seconds: float = 1.0

    def enter(self, scope: Scope) -> None:
        if not 0 <= self.seconds <= MAX_DELAY:
            msg = f"seconds={shown(self.seconds)} must lie in 0 to {MAX_DELAY:g} (virtual)."
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        return model.shows()

    @property
    def lasts(self) -> float:
        return self.seconds

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Pause:
        return cls(drawer.rank(), drawer.pick(_PAUSES))


@dataclass(frozen=True, slots=True, repr=False)
class Settle(Step):
    """Wait until every rank holds exactly what the handles that are alive account for.

    No rank runs it: who drives the ranks knows it by its class, and brings all of them to rest.
    """

    op: ClassVar[str] = "settle"
    runs: ClassVar[str] = ""
    order: ClassVar[float | None] = 14
    in_branch: ClassVar[bool] = False

    def enter(self, scope: Scope) -> None:
        scope.settled |= scope.contexts
        for name, handle in scope.handles.items():
            scope.handles[name] = replace(handle, late=False)

    def predict(self, model: Model, call: str) -> StepPrediction:
        return model.settle()

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Settle:
        return cls()

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended = dict.fromkeys(drawer.ended, True)
        drawer.uncreated.clear()
        drawer.unmade.clear()
        drawer.unseen.clear()


@dataclass(frozen=True, slots=True, repr=False)
class Parallel(Step):
    """Branches that run at once, the steps of each in order and all at one rank of its own.

    Branches must not meet: what one makes the others cannot use; a counter, an RRef whose value a
    branch changes, and an RRef that a called function fetches belong to one branch.

    It is the one step that holds others, so a program, its JSON and what draws know it by its
    class, and take it apart and put it together.
    """

    op: ClassVar[str] = "parallel"
    runs: ClassVar[str] = ""
    comes_first: ClassVar[bool] = False
    in_branch: ClassVar[bool] = False
    branches: tuple[tuple[Leaf, ...], ...]

    def __post_init__(self) -> None:
        given: Any = self.branches
        if all(isinstance(part, list | tuple) for part in (given, *_parts(given))):
            given = tuple(tuple(branch) for branch in given)
        # What is no tuple of tuples is refused by the program, as every argument is.
        object.__setattr__(self, "branches", given)

    @property
    def at_once(self) -> tuple[tuple[Leaf, ...], ...]:
        return self.branches

    def enter(self, scope: Scope) -> None:
        ranks: list[int] = []
        touched: list[Touched] = []
        trial = scope.copy()
        for branch in self.branches:
            if not branch:
                msg = "a branch of Parallel is empty; give it steps, or leave it out."
                raise UsageError(msg)
            rank = getattr(branch[0], "at", -1)
            for leaf in branch:
                _check_place(leaf, rank)
            if rank in ranks:
                msg = f"two branches of Parallel are at rank {rank}; give each a rank of its own."
                raise UsageError(msg)
            ranks.append(rank)
            # By itself, which refuses what other branches make. Branches number what they make
            # apart, or they would seem to meet there.
            alone = scope.copy()
            alone.rrefs = trial.rrefs
            touched.append(alone.walk(branch))
            trial.walk(branch)
        for one, other in itertools.permutations(touched, 2):
            if one.changed & other.used or one.fetched_there & other.fetched_there:
                msg = "two branches of Parallel meet at one RRef; use it in one of them only."
                raise UsageError(msg)
            if one.counted_at & other.counted_at:
                msg = "two branches of Parallel count at one rank; count in one of them only."
                raise UsageError(msg)
        scope.become(trial)

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return drawer.may_branch()


def _check_place(leaf: Leaf, rank: int) -> None:
    if not leaf.in_branch:
        msg = f"{type(leaf).__name__} cannot stand in a branch of Parallel."
        raise UsageError(msg)
    if leaf.at != rank:
        msg = f"{shown(leaf)} is at rank {leaf.at} in a branch of rank {rank}; one rank each."
        raise UsageError(msg)


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()
