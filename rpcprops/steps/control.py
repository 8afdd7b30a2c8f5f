"""Steps that call nothing: they pause, settle, or contain steps that run at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY
from rpcprops.steps.base import AGAIN, CLEARLY_IN_TIME, Leaf, Step, waits_nowhere

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope, Touched
    from rpcprops.strategies.drawing import StepDrawer

_PAUSES = (1.0, 0.25, 3.0)


@dataclass(frozen=True, slots=True, repr=False)
class Pause(Step):
    """Let `seconds` (virtual) pass at a rank; or wait until its `handle` has come, for so long.

    A handle that was shared under a timeout may come when nobody waits for its share any more: the
    message is late, or the function that got it has not ended. It is the same RRef then as after a
    settle. The function that keeps it has started, and that is after its owner has confirmed it
    (``request_callback_no_python.cpp``: RequestCallbackNoPython::processMessage, which waits for
    ``rref_context.cpp``: RRefContext::waitForThreadLocalPendingRRefs). While the function runs, it
    holds the RRef, and the rank that has sent it keeps its own fork: its child is accepted once the
    function has ended (RRefContext::finishForkRequest calls delPendingUser first, which runs the
    function; only then it sends RREF_CHILD_ACCEPT).
    """

    op: ClassVar[str] = "pause"
    waits_at = waits_nowhere
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 18
    goes_on: ClassVar[int] = 1
    at: int
    seconds: float = 1.0
    handle: str = ""

    def enter(self, scope: Scope) -> None:
        if not 0 <= self.seconds <= MAX_DELAY:
            msg = f"seconds={shown(self.seconds)} must lie in 0 to {MAX_DELAY:g} (virtual)."
            raise UsageError(msg)
        if self.handle:
            awaited = scope.alive(self.at, self.handle, may_be_late=True)
            scope.handles[self.handle] = replace(awaited, late=False)

    @property
    def used(self) -> tuple[str, ...]:
        return (self.handle,) if self.handle else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        takes = model.has_come(self.handle) if self.handle else 0.0
        if takes and takes + CLEARLY_IN_TIME > self.seconds:
            msg = (
                f"{self!r}: under this plan its handle may take {takes:g} s (virtual) to come, "
                f"from when it was sent on (RRefContext::waitForThreadLocalPendingRRefs); let "
                f"seconds be {CLEARLY_IN_TIME:g} s above that."
            )
            raise UsageError(msg)
        return model.shows()

    @property
    def lasts(self) -> float:
        return self.seconds

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Pause:
        coming = drawer.coming_handles()
        # Mostly one that comes, if there is one: it is under way for the next steps only.
        names = drawer.pick(([], coming, coming, coming)) if coming else coming
        if names:
            handle = drawer.recall(names)
            home = drawer.scope.handles[handle].home
            return cls(home, drawer.seconds_to_come(), handle)
        return cls(drawer.rank(), drawer.pick(_PAUSES))

    @classmethod
    def goes_on_with(cls, drawer: StepDrawer, names: Set[str]) -> bool:
        return not names.isdisjoint(drawer.coming_handles())

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        # The first use of what has come, whatever it is.
        return "", 0

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.coming.discard(self.handle)


@dataclass(frozen=True, slots=True, repr=False)
class Settle(Step):
    """Wait until every rank holds exactly what the living handles require.

    No rank runs it: the driver of the ranks knows its class, and brings all ranks to rest.
    """

    op: ClassVar[str] = "settle"
    waits_at = waits_nowhere
    after_rejoin: ClassVar[bool] = True
    runs: ClassVar[str] = ""
    order: ClassVar[float | None] = 14
    goes_on: ClassVar[int] = 2
    in_branch: ClassVar[bool] = False

    def enter(self, scope: Scope) -> None:
        if scope.members is not None:
            msg = "a Settle waits for all ranks of a static world; use Member(at, 'look')."
            raise UsageError(msg)
        scope.settled |= scope.contexts
        for name, handle in scope.handles.items():
            scope.handles[name] = replace(handle, late=False)

    def predict(self, model: Model, call: str) -> StepPrediction:
        return model.settle()

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Settle:
        return cls()

    @classmethod
    def goes_on_with(cls, drawer: StepDrawer, names: Set[str]) -> bool:
        return True

    def leads_to(self, drawer: StepDrawer) -> tuple[str, int]:
        # What a handle promises of the past, it promises after a settle only.
        return "ask", (10 if drawer.unconfirmed() else 3) * AGAIN

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended = dict.fromkeys(drawer.ended, True)
        for names in (
            drawer.uncreated,
            drawer.unmade,
            drawer.unseen,
            drawer.fetching,
            drawer.given_up,
            drawer.making,
            drawer.coming,
            drawer.lasting,
            drawer.early,
            drawer.thinned,
            drawer.uncertain,
            drawer.waited,
            drawer.read,
        ):
            names.clear()
        drawer.counted_late.clear()
        drawer.slow_functions = 0


@dataclass(frozen=True, slots=True, repr=False)
class Parallel(Step):
    """Branches that run at the same time. The steps of one branch run in order at one rank.

    Branches must not interact: no branch uses what another one makes. A counter, an RRef whose
    value a branch changes, and an RRef that a called function fetches belong to one branch.

    Several branches at one rank run in threads of that rank, which use different RRefs there and
    send no messages with equal payloads.

    It is the only step that contains others, so programs, their JSON and the drawer know its class,
    and split and rebuild it.
    """

    op: ClassVar[str] = "parallel"
    #: It holds several steps, of which each kind has a chance to be drawn.
    often: ClassVar[int] = 1
    runs: ClassVar[str] = ""
    comes_first: ClassVar[bool] = False
    in_branch: ClassVar[bool] = False
    branches: tuple[tuple[Leaf, ...], ...]

    def __post_init__(self) -> None:
        given: Any = self.branches
        if all(isinstance(part, list | tuple) for part in (given, *_parts(given))):
            given = tuple(tuple(branch) for branch in given)
        # The program refuses anything but a tuple of tuples, as it checks every argument.
        object.__setattr__(self, "branches", given)

    @property
    def at_once(self) -> tuple[tuple[Leaf, ...], ...]:
        return self.branches

    def enter(self, scope: Scope) -> None:
        touched: list[Touched] = []
        trial = scope.copy()
        for branch in self.branches:
            if not branch:
                msg = "a branch of Parallel is empty; give it steps, or leave it out."
                raise UsageError(msg)
            rank = getattr(branch[0], "at", -1)
            for leaf in branch:
                _check_place(leaf, rank)
            # In a scope of its own, which refuses what other branches make. Each branch numbers
            # what it makes separately; otherwise branches would seem to interact there.
            alone = scope.copy()
            alone.rrefs = trial.rrefs
            touched.append(alone.walk(branch))
            trial.walk(branch)
        for (one, branch), (other, beside) in itertools.permutations(
            zip(touched, self.branches, strict=True), 2
        ):
            if branch[0].at == beside[0].at:
                _check_threads(branch, beside, one.used & other.used)
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


def _check_threads(branch: tuple[Leaf, ...], beside: tuple[Leaf, ...], shared: set[int]) -> None:
    """Check that two branches at one rank may run in threads; `shared` are RRefs of both."""
    at = branch[0].at
    for leaf in branch:
        if not leaf.in_thread:
            msg = (
                f"{type(leaf).__name__} cannot stand in one of two branches of Parallel at rank "
                f"{at}; give it a rank of its own."
            )
            raise UsageError(msg)
    if shared:
        msg = f"two branches of Parallel use one RRef at rank {at}; use it in one of them only."
        raise UsageError(msg)
    names = [{name for leaf in one for name in leaf.alike} for one in (branch, beside)]
    if names[0] & names[1]:
        msg = (
            f"two branches of Parallel at rank {at} send messages with equal payloads (calls of "
            f"one function that TorchScript knows); send them from one of them only."
        )
        raise UsageError(msg)


def _check_place(leaf: Leaf, rank: int) -> None:
    if not leaf.in_branch:
        msg = f"{type(leaf).__name__} cannot stand in a branch of Parallel."
        raise UsageError(msg)
    if leaf.at != rank:
        msg = f"{shown(leaf)} is at rank {leaf.at} in a branch of rank {rank}; one rank each."
        raise UsageError(msg)


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()
