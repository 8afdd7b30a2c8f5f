"""What exists at each point of a program, so that each step can say whether it may come next.

Validation walks a program with a scope. Strategies do so too, to draw only steps that may follow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.steps import Step
from rpcprops.steps.timeouts import LONGEST, is_too_long, is_too_short


@dataclass(frozen=True, slots=True)
class HandleInfo:
    """A handle that is alive.

    Attributes:
        home: the rank that has it.
        rref: a number that all handles of one RRef share.
        owner: the rank that owns its value.
        typed: whether TorchScript knows the type of its value.
        size: how many numbers the value holds.
        late: whether it was shared with a timeout, so that it may arrive only by the next settle,
            or while a pause waits for it.
    """

    home: int
    rref: int
    owner: int
    typed: bool
    size: int
    late: bool = False


@dataclass
class Touched:
    """The effects of steps that other steps, running at the same time, could notice.

    Attributes:
        used: the numbers of the RRefs that they use.
        changed: the numbers of the RRefs whose value they change.
        fetched_there: the numbers of the RRefs that a function which they call fetches.
        counted_at: the ranks whose counters they use.
    """

    used: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    fetched_there: set[int] = field(default_factory=set)
    counted_at: set[int] = field(default_factory=set)


class Scope:
    """The handles, futures and contexts that exist after the steps added so far."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.handles: dict[str, HandleInfo] = {}
        self.futures: dict[str, int] = {}
        self.contexts: set[str] = set()
        #: The contexts whose id a step returns, so that a later step can ask for it.
        self.ids: set[str] = set()
        #: The contexts after which a settle has come.
        self.settled: set[str] = set()
        self.taken: set[str] = set()
        self.gone: set[str] = set()
        self.waited: set[str] = set()
        #: How many RRefs have been made so far, which is the number of the next one.
        self.rrefs = 0
        #: The members of the dynamic group; None if the ranks are a static world.
        self.members: frozenset[int] | None = None
        #: Ranks whose name has a dash, and others, once they have joined a dynamic group.
        self.dashed: dict[int, bool] = {}
        #: Ranks that have called ``init_rpc`` with another rank, and cannot with their own.
        self.foreign: frozenset[int] = frozenset()
        #: Whether a step has been added.
        self.begun = False

    def copy(self) -> Scope:
        """An independent scope with the same content."""
        other = Scope(self.world_size)
        other.handles = dict(self.handles)
        other.futures = dict(self.futures)
        other.contexts = set(self.contexts)
        other.ids = set(self.ids)
        other.settled = set(self.settled)
        other.taken = set(self.taken)
        other.gone = set(self.gone)
        other.waited = set(self.waited)
        other.rrefs = self.rrefs
        other.members = self.members
        other.dashed = dict(self.dashed)
        other.foreign = self.foreign
        other.begun = self.begun
        return other

    def become(self, other: Scope) -> None:
        """Take over the content of `other`, which must not be used any more."""
        self.__dict__.update(other.__dict__)

    def fits(self, step: Step) -> bool:
        """Whether `step` may come next."""
        return self.copy().accepts(step)

    def accepts(self, step: Step) -> bool:
        """Add `step` if it may come next; returns whether it was added."""
        try:
            self.add(step)
        except UsageError:
            return False
        return True

    def add(self, step: Step) -> None:
        """Add `step` as the next one.

        Raises:
            UsageError: it cannot follow; the message says why, and the scope is unchanged.
        """
        kind: Any = type(step)
        for name in _ranks_of(kind):
            self.check_rank(name, getattr(step, name), any_rank=step.outside_group)
        check_timeout("timeout", getattr(step, "timeout", None), any_number=step.any_timeout)
        step.enter(self)
        self.begun = True

    def walk(self, steps: Iterable[Step]) -> Touched:
        """Add `steps` one after the other; returns their effects that others could notice.

        Raises:
            UsageError: one of them cannot follow; those before it were added.
        """
        found = Touched()
        for step in steps:
            touched = self.touched(step)
            self.add(step)
            found.used |= touched.used
            found.changed |= touched.changed
            found.fetched_there |= touched.fetched_there
            found.counted_at |= touched.counted_at
        return found

    def touched(self, step: Step) -> Touched:
        """The effects of `step`, as the next one, that other steps could notice."""
        return Touched(
            self._numbers(step.used),
            self._numbers(step.changed),
            self._numbers(step.fetched_there),
            set(step.counted_at),
        )

    def _numbers(self, handles: Iterable[str]) -> set[int]:
        return {self.handles[name].rref for name in handles if name in self.handles}

    # What steps ask for and make.

    def check_rank(self, name: str, rank: object, *, any_rank: bool = False) -> None:
        """Raises:
        UsageError: `rank`, the argument `name` of a step, is no rank of this world; or, without
            `any_rank`, no member of the dynamic group.
        """
        size = self.world_size
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < size:
            msg = f"{name}={shown(rank)} is no rank of a world of {size} (0 to {size - 1})."
            raise UsageError(msg)
        if not any_rank and self.members is not None and rank not in self.members:
            msg = f"{name}={rank} is no member of the group; let it join first: Member({rank})."
            raise UsageError(msg)

    def take_name(self, name: str) -> None:
        """Give a handle or a future its name.

        Raises:
            UsageError: something else has or had that name.
        """
        if name in self.taken:
            msg = f"the handle name {shown(name)} is taken; names are used once."
            raise UsageError(msg)
        self.taken.add(name)

    def new_handle(self, name: str, home: int, owner: int, *, typed: bool, size: int) -> None:
        """Add the first handle of a new RRef; see :class:`HandleInfo`.

        Raises:
            UsageError: the name is taken.
        """
        self.take_name(name)
        self.handles[name] = HandleInfo(home, self.rrefs, owner, typed, size)
        self.rrefs += 1

    def new_context(self, name: str) -> None:
        """Add a context.

        Raises:
            UsageError: the name is taken.
        """
        if name in self.contexts:
            msg = f"the context name {shown(name)} is taken; names are used once."
            raise UsageError(msg)
        self.contexts.add(name)

    def alive(self, at: int, name: str, *, may_be_late: bool = False) -> HandleInfo:
        """The handle of that name at rank `at`, which must have come, unless it `may_be_late`.

        Raises:
            UsageError: there is no such handle.
        """
        if name in self.gone:
            msg = f"handle {shown(name)} was dropped before; drop it after its last use."
            raise UsageError(msg)
        if name not in self.handles:
            msg = f"there is no handle {shown(name)} before this step; make it first."
            raise UsageError(msg)
        handle = self.handles[name]
        if handle.home != at:
            msg = f"handle {shown(name)} lives at rank {handle.home}, not at {at}; share it first."
            raise UsageError(msg)
        if handle.late and not may_be_late:
            msg = (
                f"handle {shown(name)} was shared under a timeout; put a Settle before its first "
                f"use, or a Pause with handle={shown(name)}, which waits for it."
            )
            raise UsageError(msg)
        return handle


@functools.cache
def _ranks_of(kind: type[Step]) -> tuple[str, ...]:
    """The fields of a kind of step that name a rank."""
    names = (item.name for item in fields(kind))
    return tuple(name for name in names if name in ("at", "to", "via", "then"))


def check_timeout(name: str, timeout: object, *, any_number: bool = False) -> None:
    """Check a timeout, which may also be one that torch cannot count if that is said.

    Raises:
        UsageError: `timeout`, the argument `name`, is neither None nor such a number.
    """
    if timeout is None:
        return
    if (
        not isinstance(timeout, int | float)
        or isinstance(timeout, bool)
        or not 0 < timeout < math.inf
    ):
        msg = (
            f"{name}={shown(timeout)} must be a positive, finite number of virtual seconds, or "
            f"None for the cluster's."
        )
        raise UsageError(msg)
    if not any_number and (is_too_long(timeout) or is_too_short(timeout)):
        msg = (
            f"{name}={shown(timeout)} must be {LONGEST:.0f} s at the most and a millisecond at the "
            f"least, for torch counts milliseconds in an int; Reach takes others."
        )
        raise UsageError(msg)
