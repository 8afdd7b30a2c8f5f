"""What exists at each point of a program: the one place that knows which step may follow.

Validation walks a program with it, and so do the strategies, which then draw only what may follow.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, fields, replace

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY
from rpcprops.programs._steps import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Parallel,
    Pause,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Wait,
)


@dataclass(frozen=True, slots=True)
class HandleInfo:
    """A handle that is alive.

    Attributes:
        home: the rank where it lives.
        rref: a number that all handles of one RRef share.
        owner: the rank that owns its value.
        typed: whether TorchScript knows the type of its value.
        size: how many numbers the value holds.
        late: shared under a timeout, so that it may not have arrived before the next settle.
    """

    home: int
    rref: int
    owner: int
    typed: bool
    size: int
    late: bool = False


@dataclass
class _Touched:
    """What a branch of a parallel step does that others could notice."""

    changed: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)
    fetched_there: set[int] = field(default_factory=set)
    counters: set[int] = field(default_factory=set)


class Scope:
    """The handles, futures and contexts that exist after the steps that were added so far."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.handles: dict[str, HandleInfo] = {}
        self.futures: dict[str, int] = {}
        self.contexts: set[str] = set()
        #: Those of them whose id a step gives, so that it can be asked for.
        self.ids: set[str] = set()
        #: Those of them that a settle has followed.
        self.settled: set[str] = set()
        self.taken: set[str] = set()
        self.gone: set[str] = set()
        self.waited: set[str] = set()
        self._rrefs = 0

    def copy(self) -> Scope:
        """A scope of its own with the same in it."""
        other = Scope(self.world_size)
        other.handles = dict(self.handles)
        other.futures = dict(self.futures)
        other.contexts = set(self.contexts)
        other.ids = set(self.ids)
        other.settled = set(self.settled)
        other.taken = set(self.taken)
        other.gone = set(self.gone)
        other.waited = set(self.waited)
        other._rrefs = self._rrefs
        return other

    def fits(self, step: Step) -> bool:
        """Whether `step` may come next."""
        return self.copy().accepts(step)

    def accepts(self, step: Step) -> bool:
        """Add `step` if it may come next; whether it did."""
        try:
            self.add(step)
        except UsageError:
            return False
        return True

    def add(self, step: Step) -> None:
        """Take `step` as the next one.

        Raises:
            UsageError: it cannot follow; the message says why. The scope is as before.
        """
        if isinstance(step, Parallel):
            self._parallel(step)
        else:
            self._leaf(step)

    def _parallel(self, step: Parallel) -> None:
        ranks: list[int] = []
        touched: list[_Touched] = []
        trial = self.copy()
        for branch in step.branches:
            if not branch:
                msg = "a branch of Parallel is empty; give it steps, or leave it out."
                raise UsageError(msg)
            own = self.copy()
            # Branches number what they make apart, or they would seem to meet there.
            own._rrefs = trial._rrefs
            rank = getattr(branch[0], "at", -1)
            for leaf in branch:
                if isinstance(leaf, Parallel | Settle | Refused):
                    msg = f"{type(leaf).__name__} cannot stand in a branch of Parallel."
                    raise UsageError(msg)
                if leaf.at != rank:
                    msg = (
                        f"{shown(leaf)} is at rank {leaf.at} in a branch of rank {rank}; one "
                        "rank each."
                    )
                    raise UsageError(msg)
            if rank in ranks:
                msg = f"two branches of Parallel are at rank {rank}; give each a rank of its own."
                raise UsageError(msg)
            ranks.append(rank)
            touched.append(own._touched(branch))
            for leaf in branch:
                trial._leaf(leaf)
        for one, other in itertools.permutations(touched, 2):
            if one.changed & other.used or one.fetched_there & other.fetched_there:
                msg = "two branches of Parallel meet at one RRef; use it in one of them only."
                raise UsageError(msg)
            if one.counters & other.counters:
                msg = "two branches of Parallel count at one rank; count in one of them only."
                raise UsageError(msg)
        self.__dict__.update(trial.__dict__)

    def _touched(self, branch: tuple[Leaf, ...]) -> _Touched:
        """Walk a branch by itself (which refuses what other branches make)."""
        found = _Touched()
        for leaf in branch:
            name = getattr(leaf, "handle", None)
            argument = getattr(leaf, "right", None)
            for handle in (name, argument):
                if isinstance(handle, str) and handle in self.handles:
                    found.used.add(self.handles[handle].rref)
            if isinstance(leaf, Bump) and leaf.handle in self.handles:
                found.changed.add(self.handles[leaf.handle].rref)
            if isinstance(argument, str) and argument in self.handles:
                found.fetched_there.add(self.handles[argument].rref)
            if isinstance(leaf, Count):
                found.counters.add(leaf.to)
            self._leaf(leaf)
        return found

    def _leaf(self, step: Leaf) -> None:
        for item in fields(step):
            if item.name in ("at", "to", "via", "then"):
                self._rank(item.name, getattr(step, item.name))
        _check_timeout(getattr(step, "timeout", None))
        match step:
            case Remote() | Nest():
                self._arguments(step)
                self._python_only(step)
                owner, typed = step.to, step.flavour != "python"
                self._new(step.out, step.at, owner, typed=typed, size=len(step.left))
            case Own():
                self._new(step.out, step.at, step.at, typed=True, size=len(step.value))
            case Share():
                shared = self.alive(step.at, step.handle)
                self._name(step.out)
                late = step.timeout is not None
                self.handles[step.out] = replace(shared, home=step.to, late=late)
            case Fetch():
                self.alive(step.at, step.handle)
            case Local():
                owner = self.alive(step.at, step.handle).owner
                if owner != step.at:
                    msg = (
                        f"handle {shown(step.handle)} is owned by rank {owner}; only its owner "
                        "has the "
                        f"local value. Use Fetch here."
                    )
                    raise UsageError(msg)
            case Call():
                self._call(step)
            case Wait():
                self._wait(step)
            case Through():
                self._through(step)
            case Bump():
                if not self.alive(step.at, step.handle).typed:
                    msg = (
                        f"handle {shown(step.handle)} was made by a Python function, so "
                        "TorchScript "
                        f"does not know its type; make it with flavour='builtin' or 'script'."
                    )
                    raise UsageError(msg)
            case Drop():
                self.alive(step.at, step.handle)
                del self.handles[step.handle]
                self.gone.add(step.handle)
            case Context():
                self._context(step)
            case Optimize():
                self._optimize(step)
            case Refused():
                if step.context not in self.contexts:
                    msg = (
                        f"there is no context {shown(step.context)} before this step; make it "
                        "first."
                    )
                    raise UsageError(msg)
                if step.context not in self.ids:
                    msg = (
                        f"the context {shown(step.context)} is an optimizer's, which gives no "
                        "id; use "
                        f"that of a Context."
                    )
                    raise UsageError(msg)
                if step.context not in self.settled:
                    msg = (
                        f"the context {shown(step.context)} may not be gone yet; put a Settle "
                        "before."
                    )
                    raise UsageError(msg)
            case Chain():
                _check_sizes(step.left, step.right, len(step.right))
            case Pause():
                if not 0 <= step.seconds <= MAX_DELAY:
                    msg = f"seconds={shown(step.seconds)} must lie in 0 to {MAX_DELAY:g} (virtual)."
                    raise UsageError(msg)
            case Settle():
                self.settled |= self.contexts
                for name, handle in self.handles.items():
                    self.handles[name] = replace(handle, late=False)
            case Count() | Module():
                pass

    def _call(self, step: Call) -> None:
        self._arguments(step)
        self._python_only(step)
        if (step.wait == "later") != bool(step.out):
            msg = (
                f"wait={shown(step.wait)} and out={shown(step.out)}: wait='later' needs a "
                "name, others none."
            )
            raise UsageError(msg)
        if step.out:
            self._name(step.out)
            self.futures[step.out] = step.at

    def _wait(self, step: Wait) -> None:
        if step.future in self.waited:
            msg = f"the future {shown(step.future)} was waited for before; wait once."
            raise UsageError(msg)
        if step.future not in self.futures:
            msg = f"there is no future {shown(step.future)} before this step; make it first."
            raise UsageError(msg)
        if self.futures[step.future] != step.at:
            msg = (
                f"the future {shown(step.future)} is at rank {self.futures[step.future]}, not "
                f"{step.at}."
            )
            raise UsageError(msg)
        del self.futures[step.future]
        self.waited.add(step.future)

    def _through(self, step: Through) -> None:
        handle = self.alive(step.at, step.handle)
        if (step.how == "remote") != bool(step.out):
            msg = (
                f"how={shown(step.how)} and out={shown(step.out)}: how='remote' needs a name, "
                "others none."
            )
            raise UsageError(msg)
        if step.out and step.timeout is not None:
            msg = "a timeout of how='remote' is not modelled; use how='sync' or 'async'."
            raise UsageError(msg)
        if step.out:
            self._new(step.out, step.at, handle.owner, typed=False, size=handle.size)

    def _context(self, step: Context) -> None:
        for rank in step.path:
            self._rank("path", rank)
        if step.retain and not step.backward:
            msg = "retain=True runs backward twice, so it needs backward=True."
            raise UsageError(msg)
        if step.breaks is not None and (step.breaks not in step.path or not step.backward):
            msg = (
                f"breaks={shown(step.breaks)} must be a rank of path={shown(step.path)}, with "
                "backward=True."
            )
            raise UsageError(msg)
        self._new_context(step.name)
        self.ids.add(step.name)

    def _optimize(self, step: Optimize) -> None:
        for rank in step.owners:
            self._rank("owners", rank)
        if not step.owners or len(set(step.owners)) != len(step.owners):
            msg = f"owners={shown(step.owners)} must be ranks, at least one, each once."
            raise UsageError(msg)
        self._new_context(step.name)

    def _new_context(self, name: str) -> None:
        if name in self.contexts:
            msg = f"the context name {shown(name)} is taken; names are used once."
            raise UsageError(msg)
        self.contexts.add(name)

    def _rank(self, name: str, rank: object) -> None:
        size = self.world_size
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < size:
            msg = f"{name}={shown(rank)} is no rank of a world of {size} (0 to {size - 1})."
            raise UsageError(msg)

    def _name(self, name: str) -> None:
        if name in self.taken:
            msg = f"the handle name {shown(name)} is taken; names are used once."
            raise UsageError(msg)
        self.taken.add(name)

    def _new(self, name: str, home: int, owner: int, *, typed: bool, size: int) -> None:
        self._name(name)
        self.handles[name] = HandleInfo(home, self._rrefs, owner, typed, size)
        self._rrefs += 1

    def alive(self, at: int, name: str) -> HandleInfo:
        """The handle of that name at rank `at`.

        Raises:
            UsageError: there is none.
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
        if handle.late:
            msg = (
                f"handle {shown(name)} was shared under a timeout; put a Settle before its "
                "first use."
            )
            raise UsageError(msg)
        return handle

    def _python_only(self, step: Remote | Call | Nest) -> None:
        allowed = ("python", "script") if isinstance(step, Call) else ("python",)
        if getattr(step, "raises", False) and step.flavour not in allowed:
            listed = " or ".join(map(repr, allowed))
            msg = f"raises=True needs flavour {listed}, not {shown(step.flavour)}."
            raise UsageError(msg)

    def _arguments(self, step: Remote | Call | Nest) -> None:
        size = len(step.right)
        if isinstance(step.right, str):
            size = self.alive(step.at, step.right).size
            if step.flavour != "python":
                msg = (
                    f"only a Python function takes a handle as an argument, "
                    f"not a {step.flavour} one."
                )
                raise UsageError(msg)
        _check_sizes(step.left, step.right, size)


def _check_sizes(left: tuple[float, ...], right: object, size: int) -> None:
    if len(left) != size:
        msg = (
            f"left={shown(left)} and right={shown(right)} hold {len(left)} and {size} "
            f"numbers; give both the same length."
        )
        raise UsageError(msg)


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:  # type: ignore[operator]
        msg = (
            f"timeout={shown(timeout)} must be a positive, finite number of virtual seconds, "
            "or None "
            f"for the cluster's."
        )
        raise UsageError(msg)
