"""Draws steps one at a time, each of a kind that may follow those before it.

Every choice is a number from 0 up, and 0 is the simplest. All steps take equally many numbers, the
first of which says what it is, and 0 is no step: Hypothesis, which lowers one number at a time and
cuts out runs of up to five only, can so take out any step, or make a simpler one of it, and the
rest stays what it was. For the same reason a kind that cannot come next is replaced by another one,
not left out of the choice, and what a step uses is told by how long ago it was made.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeAlias, TypeVar

from hypothesis import strategies as st

from rpcprops._given import argument, shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY, FaultPlan, MessageType, retry_wait
from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Flavour,
    HandleInfo,
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
    Scope,
    Settle,
    Share,
    Step,
    Through,
    Value,
    Wait,
)
from rpcprops.strategies._checks import first_items

T = TypeVar("T")
#: A kind of step, and what draws one.
_Way: TypeAlias = tuple[str, Callable[[], Step | None]]

PARALLEL = Parallel.op
#: Every kind of step but `parallel`, roughly the simplest first. What needs something before it
#: comes after what makes that.
KINDS: tuple[str, ...] = tuple(
    cls.op
    for cls in (
        *(Remote, Fetch, Share, Own, Drop, Local, Call, Wait, Through, Bump, Count, Nest, Chain),
        *(Context, Settle, Refused, Module, Optimize, Pause),
    )
)
_NEEDY = (Fetch, Share, Drop, Local, Wait, Through, Bump, Refused)
#: Those that need nothing before them.
FIRST_KINDS: tuple[str, ...] = tuple(
    kind for kind in KINDS if kind not in [cls.op for cls in _NEEDY]
)
#: Those that may stand in a branch of a parallel step.
_BRANCH_KINDS = frozenset(KINDS) - {Settle.op, Refused.op}


def checked_kinds(value: object, *, parallel: bool = False) -> tuple[str, ...]:
    """The kinds of step in `value` (None: all), the simplest first.

    Args:
        parallel: whether steps that run at once are a kind as well.

    Raises:
        UsageError: it is no collection of them, or none can come first.
    """
    kinds = (*KINDS, PARALLEL) if parallel else KINDS
    if value is None:
        return kinds
    must_be = (
        "a collection of names of steps; write kinds=('remote',) for a single one, or None for all"
    )
    given = list(map(shown, first_items("kinds", value, must_be)))
    if isinstance(value, Set):
        given.sort()
    for kind in given:
        if kind == repr(PARALLEL) and not parallel:
            msg = (
                f"{argument('kinds', value)} must name what the branches hold, not {kind}; write "
                f"branches=True for steps that run at once."
            )
            raise UsageError(msg)
        if kind not in map(repr, kinds):
            msg = (
                f"{argument('kinds', value)} names {kind}, which is no step; use "
                f"{', '.join(kinds)}."
            )
            raise UsageError(msg)
    found = tuple(kind for kind in kinds if repr(kind) in given)
    if not set(found) & set(FIRST_KINDS):
        msg = (
            f"{argument('kinds', value)} must name a step that can come first; add one of "
            f"{', '.join(FIRST_KINDS)}."
        )
        raise UsageError(msg)
    return found


# What wants a handle, what makes one, and what is drawn twice as often as the rest: what RRefs live
# and die by, and a wait, which seldom finds a future.
_HANDLE_KINDS = (Fetch.op, Share.op, Drop.op, Local.op, Through.op, Bump.op)
_MAKERS = (Remote.op, Own.op, Nest.op)
_OFTEN = (Fetch.op, Share.op, Drop.op, Wait.op)

# Small whole numbers, so that sums and products are exact; what a step has by default comes first.
_PAIRS: tuple[tuple[Value, Value], ...] = (
    ((1.0,), (2.0,)),
    ((0.0,), (0.0,)),
    ((3.0,), (-1.0,)),
    ((1.0, 2.0), (3.0, 4.0)),
    ((0.0, -2.0, 5.0), (1.0, 0.0, -1.0)),
)
_ADDED: dict[int, tuple[Value, ...]] = {
    1: ((1.0,), (0.0,), (-2.0,)),
    2: ((1.0, 2.0), (0.0, -1.0)),
    3: ((1.0, 2.0, 3.0), (0.0, -2.0, 1.0)),
}
_OWNED: tuple[Value, ...] = ((1.0,), (0.0,), (-2.0,), (1.0, 2.0), (3.0, 0.0, -1.0))
_TENSORS: tuple[Value, ...] = ((1.0, 2.0), (1.0,), (0.0,), (3.0, -1.0), (2.0, 0.0, -2.0))
_ADDENDS = (1.0, 0.0, -2.0, 3.0)
_PAUSES = (1.0, 0.25, 3.0)
_FLAVOURS: tuple[Flavour, ...] = ("python", "builtin", "script")
_TYPED = _FLAVOURS[1:]
#: Virtual seconds by which a timeout that must not come clears all that faults make it wait for,
#: and what the retries of a fork request take.
_IN_TIME = 600
_RETRIES = retry_wait(MessageType.RREF_FORK_REQUEST.max_retries)
_LONGEST_PATH = 5
_MOST_OWNERS = 3
_MOST_AT_ONCE = 6


#: What a call may be: how it is waited for, and whether it raises.
_CALLS: tuple[dict[str, Any], ...] = tuple(
    {**wait, **raises}
    for raises in ({}, {"raises": True})
    for wait in ({}, {"wait": "async"}, {"wait": "later"})
)
_QUIET_CALLS = _CALLS[:3]
_LATER_CALLS = _CALLS[2::3]
#: What a remote may be: its flavour, and whether it raises.
_REMOTES: tuple[dict[str, Any], ...] = (
    {},
    {"flavour": "builtin"},
    {"flavour": "script"},
    {"raises": True},
)
#: What a context may be: how it walks its path, and how it ends.
_WALKS: tuple[dict[str, Any], ...] = (
    {},
    {"nested": True},
    {"rrefs": True},
    {"nested": True, "rrefs": True},
)
_ENDS: tuple[dict[str, Any], ...] = (
    {},
    {"raises": True},
    {"backward": False},
    {"retain": True},
    {"raises": True, "backward": False},
    {"raises": True, "retain": True},
)
#: How many numbers a step takes: what it is, and its arguments; and those more that say at what
#: fault it is aimed.
_WIDTH = 8
_AIM_WIDTH = 3


@functools.lru_cache(maxsize=512)
def below(number: int) -> st.SearchStrategy[int]:
    """An int from 0 to `number` - 1. Kept, since making a strategy takes longer than drawing."""
    return st.integers(0, number - 1)


def letters(number: int) -> str:
    """The name of a handle: a, b, …, z, aa, ab, …"""
    name = chr(ord("a") + number % 26)
    return name if number < 26 else letters(number // 26 - 1) + name


@dataclass
class _Names:
    """How many of each have been named."""

    handles: int = 0
    futures: int = 0
    contexts: int = 0


@dataclass
class _Block:
    """The steps of a parallel step that is being drawn, and where its branches must not meet.

    Attributes:
        left: how many steps are still to come.
        began: how many names had been given before it.
        maker: the rank whose branch made a handle.
        users: the ranks whose branches use an RRef, by its number.
        changer: the rank whose branch changes its value.
        fetcher: the rank whose branch has it fetched in a called function.
        counter: the rank whose branch counts at a rank.
    """

    left: int
    before: Scope
    began: _Names
    leaves: list[Leaf] = field(default_factory=list)
    maker: dict[str, int] = field(default_factory=dict)
    users: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    changer: dict[int, int] = field(default_factory=dict)
    fetcher: dict[int, int] = field(default_factory=dict)
    counter: dict[int, int] = field(default_factory=dict)

    def is_seen(self, name: str, handle: HandleInfo) -> bool:
        """Whether the branch of the rank where a handle lives may use it."""
        if name not in self.before.handles and self.maker.get(name) != handle.home:
            return False
        return self.changer.get(handle.rref, handle.home) == handle.home

    def note(self, leaf: Leaf, scope: Scope) -> None:
        """Keep what `leaf` does that another branch could notice; `scope` is as before it."""
        at: int = leaf.at  # type: ignore[union-attr]
        for name in (getattr(leaf, "handle", None), getattr(leaf, "right", None)):
            if isinstance(name, str):
                self.users[scope.handles[name].rref].add(at)
        if isinstance(leaf, Bump):
            self.changer[scope.handles[leaf.handle].rref] = at
        if isinstance(leaf, Remote | Call) and isinstance(leaf.right, str):
            self.fetcher[scope.handles[leaf.right].rref] = at
        if isinstance(leaf, Count):
            self.counter[leaf.to] = at


class Draw(Protocol):
    """``draw`` of a composite strategy, or of ``data()``."""

    def __call__(self, strategy: st.SearchStrategy[int], /) -> int: ...


class StepDrawer:
    """Draws the steps of a program, one after the other.

    Args:
        draw: draws from a strategy; may be set again before each step.
        kinds: which kinds of step to draw, `parallel` among them or not.
        off: kinds that this program goes without, where it can.
        plan: prefers steps whose messages it can strike, and gives timeouts that are clearly
            longer or clearly shorter than its delays. None: any plan may come.
        settles: whether a settle follows the last step.

    Attributes:
        steps: what was drawn so far. Those of a parallel step come once it has ended.
        count: how many steps that a rank runs (and settles) were drawn so far.
    """

    def __init__(
        self,
        draw: Draw,
        world_size: int,
        *,
        kinds: Sequence[str] = (*KINDS, PARALLEL),
        off: Iterable[str] = (),
        plan: FaultPlan | None = None,
        settles: bool = True,
    ) -> None:
        self.draw: Draw = draw
        self.ranks = tuple(range(world_size))
        self.kinds = tuple(kinds)
        # One that can always come next stays, for the others to be replaced by.
        first = next(kind for kind in self.kinds if kind in FIRST_KINDS)
        self.on = frozenset(kinds) - frozenset(off) | {first}
        # At the end, so that each kind has a number that is the same in every program.
        self._choices = (*self.kinds, *(kind for kind in _OFTEN if kind in kinds))
        self._drawn = 0
        self._width = _WIDTH if plan is None else _WIDTH + _AIM_WIDTH
        self.scope = Scope(world_size)
        self.steps: list[Step] = []
        self.count = 0
        self._block: _Block | None = None
        self._names = _Names()
        self._ended: dict[str, bool] = {}  # contexts, and whether a settle came after
        self._turn = 0
        self._made: dict[str, int] = {}  # names, and the turn in which each was given
        self._plan = plan or FaultPlan()
        self._settles = settles
        # Handles whose creation timed out, until a settle; and the ranks that have had one.
        self._uncreated: set[str] = set()
        self._failed_at: set[int] = set()
        # Handles at their owner, which perhaps has not made the value yet. When such a one is sent
        # on and that fork is deleted first, torch forgets the value, and the handle never has it.
        self._unmade: set[str] = set()
        # RRefs made by others than their owner, of which nobody has seen that they arrived.
        self._unseen: set[str] = set()
        # RRefs whose functions were sent an RRef.
        self._sent: set[str] = set()
        self._targets = tuple(
            (rank, message)
            for rank in self.ranks
            for message in sorted({m for f in self._plan.faults_at(rank) for m in f.targets})
        )
        self._longest = MAX_DELAY if plan is None else _longest_delay(plan, self.ranks)
        self._waiting = 1  # one more than there are values whose making waits for another handle
        others = [tuple(r for r in self.ranks if r != rank) for rank in self.ranks]
        #: For each rank: one of the others first, itself, the rest.
        self._peers = [(*o[:1], rank, *o[1:]) for rank, o in enumerate(others)]
        self._others = others
        self._by_kind: dict[str, Callable[[], Step | None]] = {
            kind: getattr(self, f"_{kind}") for kind in KINDS
        }

    def add(self, *, room: int = _MOST_AT_ONCE, must: bool = False) -> None:
        """Draw the next step, or none, or the start of a parallel step.

        Args:
            room: how many steps there is room for; a parallel step needs two.
            must: whether it must be a step.
        """
        self._drawn = 0
        self._turn += 1
        number = self.pick(range(1 + len(self._choices) * (3 if self._targets else 1)))
        if number or must:
            step = self._any(max(0, number - 1), room)
            if step is not None:
                self._take(step)
        while self._drawn < self._width:
            self.pick((0,))

    @property
    def overtakes(self) -> bool:
        """Whether torch's shutdown may overtake the steps drawn, should no settle follow them.

        It does not wait for a creation whose delete is to be tried again, and deletes what a
        function still uses (known findings).
        """
        tables = (self._plan.table(rank) for rank in self.ranks)
        failing = any(MessageType.RREF_USER_DELETE in table.failing for table in tables)
        return bool(self._unseen) and (failing or bool(self._unseen & self._sent))

    def add_kind(self, kind: str) -> bool:
        """Draw the next step, of that kind; whether there can be one."""
        self._turn += 1
        step = self._of(kind)
        if step is not None:
            self._take(step)
        return step is not None

    def add_parallel(self) -> None:
        """Draw the next steps, to run at once where they are at several ranks."""
        self.start_parallel()
        while self._block is not None:
            self.add(must=True)

    def may(self, kind: str) -> bool:
        """Whether a step of that kind can come next."""
        match kind:
            case Fetch.op | Drop.op:
                return bool(self._handles())
            case Share.op | Through.op:
                return bool(self._sendable())
            case Local.op:
                return bool(self._handles(_is_own))
            case Bump.op:
                return bool(self._bumpable())
            case Wait.op:
                return bool(self.scope.futures)
            case Refused.op:
                return any(self._ended.values())
            case Parallel.op:
                return self._may_branch(_MOST_AT_ONCE)
        return True

    def close(self) -> None:
        """End a parallel step that is under way with what it has."""
        block, self._block = self._block, None
        if block is None:
            return
        branches = [
            tuple(leaf for leaf in block.leaves if leaf.at == rank)  # type: ignore[union-attr]
            for rank in self.ranks
        ]
        branches = [branch for branch in branches if branch]
        if len(branches) < 2:
            self.steps += block.leaves
            return
        new = _new_names(itertools.chain(*branches), block.began)
        step = Parallel(tuple(tuple(_renamed(x, new) for x in branch) for branch in branches))
        block.before.add(step)
        self.scope = block.before
        self._ended = {new.get(name, name): settled for name, settled in self._ended.items()}
        self._uncreated = {new.get(name, name) for name in self._uncreated}
        self._unmade = {new.get(name, name) for name in self._unmade}
        self._unseen = {new.get(name, name) for name in self._unseen}
        self._sent = {new.get(name, name) for name in self._sent}
        self._made = {new.get(name, name): turn for name, turn in self._made.items()}
        self.steps.append(step)

    def start_parallel(self, most: int = _MOST_AT_ONCE) -> None:
        """Let the next steps, two to `most`, run at once where they are at several ranks."""
        left = 2 + self.pick(range(min(most, _MOST_AT_ONCE) - 1))
        self._block = _Block(left, self.scope.copy(), replace(self._names))

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`; the first is the simplest."""
        # One number each time, even where there is no choice, of which Hypothesis records none.
        self._drawn += 1
        number = self.draw(below(max(2, len(options))))
        return options[number] if number < len(options) else options[0]

    def _recall(self, names: Sequence[str]) -> str:
        """One of `names`, by how many turns ago it was given, so that turns between may go."""
        return self._recalled(names, self.pick(range(self._turn)))

    def _recalled(self, names: Sequence[str], ago: int) -> str:
        last_first = sorted(names, key=self._made.__getitem__, reverse=True)
        turn = self._turn - 1 - ago
        return next((name for name in last_first if self._made[name] <= turn), last_first[0])

    # Which kind.

    def _any(self, index: int, room: int) -> Step | None:
        number = len(self._choices)
        if index >= number:
            step = self._aimed()
            if step is not None:
                return step
            index %= number
        kind = self._choices[index]
        if kind in self.on:
            if kind == PARALLEL and self._may_branch(room):
                self.start_parallel(room)
                return None
            step = self._of(kind) or self._instead_of(kind)
            if step is not None:
                return step
        # Downwards: the number can then be lowered to that of the kind that it became, so nothing
        # hangs on which kinds are off, and Hypothesis can switch them all on.
        index = self.kinds.index(kind)
        for kind in (*self.kinds[index::-1], *self.kinds[index:]):
            if kind in self.on and (step := self._of(kind)) is not None:
                return step
        msg = f"none of {self.kinds!r} can come next"
        raise AssertionError(msg)

    def _may_branch(self, room: int) -> bool:
        return (
            self._block is None
            and len(self.ranks) > 1
            and room > 1
            and any(kind in FIRST_KINDS and kind in _BRANCH_KINDS for kind in self.kinds)
        )

    def _of(self, kind: str) -> Step | None:
        """A step of that kind; None when none can come next, and then nothing was drawn."""
        if kind == PARALLEL or (self._block is not None and kind not in _BRANCH_KINDS):
            return None
        return self._by_kind[kind]()

    def _instead_of(self, kind: str) -> Step | None:
        """What must come before a step of that kind."""
        if kind == Wait.op and Call.op in self.on:
            return self._call(later=True)
        if kind == Refused.op and self._block is None:
            missing = Settle.op if self._ended else Context.op
            return self._of(missing) if missing in self.on else None
        if kind == Bump.op and Remote.op in self.on:
            return self._remote(flavours=_TYPED)
        if kind == Local.op and Own.op in self.on:
            return self._own()
        if kind in _HANDLE_KINDS:
            return next((self._by_kind[maker]() for maker in _MAKERS if maker in self.on), None)
        return None

    def _take(self, step: Step) -> None:
        self.count += 1
        if self._block is None:
            self.scope.add(step)
            self.steps.append(step)
        else:
            leaf: Any = step
            self._block.note(leaf, self.scope)
            self.scope.add(leaf)
            self._block.leaves.append(leaf)
            self._block.maker[getattr(leaf, "out", "")] = leaf.at
            self._block.left -= 1
        for name in (getattr(step, "out", ""), getattr(step, "name", "")):
            if name:
                self._made[name] = self._turn
        if isinstance(step, Settle):
            self._ended = dict.fromkeys(self._ended, True)
            self._uncreated.clear()
            self._unmade.clear()
            self._unseen.clear()
        elif isinstance(step, Fetch | Local):
            self._unmade.discard(step.handle)
            self._unseen.discard(step.handle)
        elif isinstance(step, Share | Nest):
            arrived = self.scope.handles[step.out]
            source = step.at if isinstance(step, Share) else step.via
            if arrived.home == arrived.owner != source:
                self._unmade.add(step.out)
        if isinstance(step, Remote | Nest):
            self._unseen.add(step.out)
        if isinstance(step, Remote) and isinstance(step.right, str):
            self._sent.add(step.out)
        if isinstance(step, Context):
            self._ended[step.name] = False
        if self._block is not None and not self._block.left:
            self.close()

    # Parts of steps.

    def _rank(self) -> int:
        return self.pick(self.ranks)

    def _peer(self, at: int) -> int:
        return self.pick(self._peers[at])

    def _handle(self) -> str:
        name = letters(self._names.handles)
        self._names.handles += 1
        return name

    def _future(self) -> str:
        self._names.futures += 1
        return f"f{self._names.futures - 1}"

    def _context_name(self) -> str:
        self._names.contexts += 1
        return f"x{self._names.contexts - 1}"

    def _sendable(self, fits: Callable[[HandleInfo], bool] | None = None) -> list[str]:
        """The handles that a message may carry now."""
        return [name for name in self._handles(fits) if name not in self._unmade]

    def _handles(self, fits: Callable[[HandleInfo], bool] | None = None) -> list[str]:
        """The handles that may be used now."""
        block = self._block
        return [
            name
            for name, handle in self.scope.handles.items()
            if not handle.late
            and name not in self._uncreated
            and (fits is None or fits(handle))
            and (block is None or block.is_seen(name, handle))
        ]

    def _fetched_at_target(self, at: int) -> list[str]:
        block = self._block
        return self._sendable(
            lambda h: h.home == at and (block is None or block.fetcher.get(h.rref, at) == at)
        )

    def _arguments(self, at: int, flavour: Flavour) -> tuple[Value, Value | str]:
        names = self._fetched_at_target(at) if flavour == "python" else []
        ago = self.pick((None, None, *range(self._turn if names else 0)))
        if ago is None:
            return self.pick(_PAIRS)
        right = self._recalled(names, ago)
        return self.pick(_ADDED[self.scope.handles[right].size]), right

    def _timeout(self, at: int, message: MessageType, *, late: bool = True) -> float | None:
        """None, clearly more than any delay, or clearly less than that of the message."""
        delay = self._plan.table(at).delaying.get(message, 0)
        # Beyond its own delay, a call may wait for the retries of a fork request, and for the
        # delays of that, its accept, a fetch and a delete; so may what its argument waits for.
        in_time = float(math.ceil((5 * self._longest + _RETRIES) * self._waiting) + _IN_TIME)
        if late and delay >= 500:
            return self.pick((None, delay // 2 / 1000, in_time))
        return self.pick((None, None, None, in_time))

    # Steps, each None where there can be none now.

    def _remote(
        self,
        *,
        at: int | None = None,
        to: Sequence[int] = (),
        flavours: Sequence[Flavour] = _FLAVOURS,
    ) -> Remote:
        at = self._rank() if at is None else at
        target = self.pick(to or self._peers[at])
        form = self.pick([x for x in _REMOTES if x.get("flavour", "python") in flavours])
        flavour: Flavour = form.get("flavour", "python")
        left, right = self._arguments(at, flavour)
        python = flavour == "python"
        message = MessageType.PYTHON_REMOTE_CALL if python else MessageType.SCRIPT_REMOTE_CALL
        timeout = self._timeout(at, message, late=self._may_time_out(at))
        out = self._handle()
        self._waiting += isinstance(right, str)
        if timeout is not None and timeout * 1000 < self._plan.table(at).delaying.get(message, 0):
            self._uncreated.add(out)
            self._failed_at.add(at)
        return Remote(at, target, out, left, right, timeout=timeout, **form)

    def _may_time_out(self, at: int) -> bool:
        """Whether a creation may time out: once at a rank, for torch mistakes the second one."""
        failing = self._plan.table(at).failing
        remote = (MessageType.PYTHON_REMOTE_CALL, MessageType.SCRIPT_REMOTE_CALL)
        return self._settles and at not in self._failed_at and not set(remote) & set(failing)

    def _own(self) -> Own:
        return Own(self._rank(), self._handle(), self.pick(_OWNED))

    def _call(
        self,
        *,
        at: int | None = None,
        flavours: Sequence[Flavour] = _FLAVOURS,
        later: bool = False,
    ) -> Call:
        at = self._rank() if at is None else at
        to = self._peer(at)
        flavour = self.pick(flavours)
        forms = _LATER_CALLS if later else _CALLS
        form = self.pick([x for x in forms if x in _QUIET_CALLS or flavour != "builtin"])
        left, right = self._arguments(at, flavour)
        message = MessageType.PYTHON_CALL if flavour == "python" else MessageType.SCRIPT_CALL
        timeout = self._timeout(at, message)
        out = self._future() if form.get("wait") == "later" else ""
        return Call(at, to, left, right, flavour, timeout=timeout, out=out, **form)

    def _fetch(self, names: Sequence[str] = ()) -> Fetch | None:
        names = names or self._handles()
        if not names:
            return None
        name = self._recall(names)
        handle = self.scope.handles[name]
        message = (
            MessageType.SCRIPT_RREF_FETCH_CALL
            if handle.typed
            else MessageType.PYTHON_RREF_FETCH_CALL
        )
        timeout = self._timeout(handle.home, message, late=handle.home != handle.owner)
        return Fetch(handle.home, name, timeout)

    def _share(self, names: Sequence[str] = (), to: int | None = None) -> Share | None:
        names = names or self._sendable()
        if not names:
            return None
        name = self._recall(names)
        at = self.scope.handles[name].home
        to = self._peer(at) if to is None else to
        inside: Any = self.pick(("", "", "list", "dict"))
        timeout = self._timeout(at, MessageType.PYTHON_CALL)
        return Share(at, name, to, self._handle(), inside, timeout)

    def _drop(self, names: Sequence[str] = ()) -> Drop | None:
        names = names or self._handles()
        if not names:
            return None
        name = self._recall(names)
        return Drop(self.scope.handles[name].home, name, self.pick(("del", "scope")))

    def _local(self) -> Local | None:
        names = self._handles(_is_own)
        if not names:
            return None
        name = self._recall(names)
        return Local(self.scope.handles[name].home, name)

    def _settle(self) -> Settle:
        return Settle()

    def _through(self) -> Through | None:
        names = self._sendable()
        if not names:
            return None
        name = self._recall(names)
        form: Any = self.pick(("sync", "async", "remote"))
        addend = self.pick(_ADDENDS)
        out = self._handle() if form == "remote" else ""
        self._waiting += form == "remote"
        return Through(self.scope.handles[name].home, name, form, addend, out)

    def _bumpable(self, fits: Callable[[HandleInfo], bool] | None = None) -> list[str]:
        users = self._block.users if self._block else {}
        return self._sendable(
            lambda h: h.typed and users.get(h.rref, set()) <= {h.home} and (not fits or fits(h))
        )

    def _bump(self, names: Sequence[str] = ()) -> Bump | None:
        names = names or self._bumpable()
        if not names:
            return None
        name = self._recall(names)
        return Bump(self.scope.handles[name].home, name)

    def _countable(self, at: int) -> list[int]:
        """The ranks whose counter a step at `at` may use: in a parallel step, one a branch."""
        counter = self._block.counter if self._block else {}
        own = [rank for rank in self._peers[at] if counter.get(rank) == at]
        return own or [rank for rank in self._peers[at] if rank not in counter]

    def _count(self, at: int | None = None) -> Count | None:
        ranks = self.ranks if at is None else (at,)
        able = [rank for rank in ranks if self._countable(rank)]
        if not able:
            return None
        at = self.pick(able)
        return Count(at, self.pick(self._countable(at)))

    def _nest(
        self,
        *,
        at: Sequence[int] = (),
        via: Sequence[int] = (),
        to: Callable[[int], bool] = lambda _: True,
        flavours: Sequence[Flavour] = _FLAVOURS,
    ) -> Nest:
        caller = self.pick(at or self.ranks)
        middle = self.pick(via or self._peers[caller])
        target = self.pick([rank for rank in self._peers[middle] if to(rank)])
        flavour = self.pick(flavours)
        return Nest(caller, middle, target, self._handle(), *self.pick(_PAIRS), flavour)

    def _chain(self, at: int | None = None) -> Chain:
        at = self._rank() if at is None else at
        to = self._peer(at)
        return Chain(at, to, self._peer(to), *self.pick(_PAIRS))

    def _wait(self) -> Wait | None:
        futures = list(self.scope.futures)
        if not futures:
            return None
        future = self._recall(futures)
        return Wait(self.scope.futures[future], future)

    def _context(self, *, at: int | None = None, first: Sequence[int] = ()) -> Context:
        at = self._rank() if at is None else at
        path = [self.pick(first)] if first else []
        length = self.pick(range(_LONGEST_PATH + 1 - len(path)))
        path += self._hops(path[-1] if path else at, length)
        form = {**self.pick(_WALKS), **self.pick(_ENDS)}
        value = self.pick(_TENSORS)
        # Mostly nobody breaks; and where a rank is passed twice, torch may then crash.
        once = len({at, *path}) > len(path)
        able = path if once and form.get("backward", True) else []
        breaks = self.pick((*(None,) * (1 + 3 * len(path)), *able))
        if breaks is not None:
            form["breaks"] = breaks
        return Context(at, self._context_name(), tuple(path), value, **form)

    def _hops(self, start: int, length: int) -> list[int]:
        """So many ranks, each another than the one before it."""
        width = len(self.ranks) - 1
        number = self.pick(range(max(1, width**length)))
        hops: list[int] = []
        for _ in range(length if width else 0):
            number, index = divmod(number, width)
            start = self._others[start][index]
            hops.append(start)
        return hops

    def _refused(self) -> Refused | None:
        ended = [name for name, settled in self._ended.items() if settled]
        if not ended:
            return None
        context = self._recall(ended)
        return Refused(self._rank(), context)

    def _module(self) -> Module:
        at = self._rank()
        return Module(at, self._peer(at), self.pick(_TENSORS))

    def _optimize(self, *, at: int | None = None, first: Sequence[int] = ()) -> Optimize:
        at = self._rank() if at is None else at
        owners = [self.pick(first or self._peers[at])]
        for _ in range(_MOST_OWNERS - 1):
            others = [rank for rank in self._peers[at] if rank not in owners]
            owner = self.pick((None, None, *others))
            if owner is not None:
                owners.append(owner)
        return Optimize(at, self._context_name(), tuple(owners), self.pick(_TENSORS))

    def _pause(self) -> Pause:
        return Pause(self._rank(), self.pick(_PAUSES))

    # Steps that send a message which the plan strikes.

    def _aimed(self) -> Step | None:
        """A step that has some rank send a message that the plan fails or delays there.

        Where a handle is wanted for it and there is none, a step that makes the handle.
        """
        rank, message = self.pick(self._targets)
        ways = [way for kind, way in self._ways(rank, message) if kind in self.kinds]
        return self.pick(ways)() if ways else None

    def _ways(self, rank: int, message: MessageType) -> list[_Way]:
        others = self._others[rank]
        python = message.name.startswith("PYTHON")
        flavours: tuple[Flavour, ...] = ("python",) if python else _TYPED
        make = (Remote.op, lambda: self._remote(at=rank, to=others))
        match message:
            case MessageType.PYTHON_CALL:
                here = self._sendable(lambda h: h.home == rank)
                return [
                    (Call.op, lambda: self._call(at=rank, flavours=flavours)),
                    *([(Share.op, lambda: self._share(here))] if here else []),
                    (Nest.op, lambda: self._nest(at=(rank,))),
                ]
            case MessageType.SCRIPT_CALL:
                typed = self._bumpable(lambda h: h.home == rank)
                return [
                    (Call.op, lambda: self._call(at=rank, flavours=flavours)),
                    *([(Bump.op, lambda: self._bump(typed))] if typed else []),
                ]
            case MessageType.PYTHON_REMOTE_CALL | MessageType.SCRIPT_REMOTE_CALL:
                return [
                    (Remote.op, lambda: self._remote(at=rank, flavours=flavours)),
                    (Nest.op, lambda: self._nest(via=(rank,), flavours=flavours)),
                ]
        if not others:
            return []
        match message:
            case MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
                return [
                    (Context.op, lambda: self._context(at=rank, first=others)),
                    (Context.op, lambda: self._context(at=self.pick(others), first=(rank,))),
                    (Optimize.op, lambda: self._optimize(at=rank, first=others)),
                ]
            case MessageType.RREF_CHILD_ACCEPT:
                users = self._handles(lambda h: h.home != h.owner)
                bumpable = self._bumpable(lambda h: h.owner == rank != h.home)
                return [
                    (Share.op, lambda: self._share(users, rank)) if users else make,
                    *([(Bump.op, lambda: self._bump(bumpable))] if bumpable else []),
                ]
            case MessageType.RREF_FORK_REQUEST:
                users = self._handles(lambda h: h.home != h.owner != rank)
                found: list[_Way] = [
                    (Share.op, lambda: self._share(users, rank)) if users else make
                ]
                if len(self.ranks) > 2:
                    # The handle that comes back is a user's, from a user.
                    nest = (
                        Nest.op,
                        lambda: self._nest(at=(rank,), via=others[:1], to=self._is_third(rank)),
                    )
                    found.append(nest)
                return found
            case MessageType.RREF_USER_DELETE:
                users = self._handles(lambda h: h.home == rank != h.owner)
                return [
                    (Drop.op, lambda: self._drop(users)) if users else make,
                    (Nest.op, lambda: self._nest(via=(rank,), to=lambda to: to != rank)),
                ]
            case _:
                users = self._handles(lambda h: h.home == rank != h.owner and h.typed != python)
                if users:
                    return [(Fetch.op, lambda: self._fetch(users))]
                return [
                    (Remote.op, lambda: self._remote(at=rank, to=others, flavours=flavours)),
                ]

    def _is_third(self, rank: int) -> Callable[[int], bool]:
        via = self._others[rank][0]
        return lambda to: to not in (rank, via)


def _is_own(handle: HandleInfo) -> bool:
    return handle.home == handle.owner


def _longest_delay(plan: FaultPlan, ranks: Iterable[int]) -> float:
    faults = (fault for rank in ranks for fault in plan.faults_at(rank))
    return max((fault.seconds for fault in faults if fault.blocks_sender), default=0.0)


def _new_names(leaves: Iterable[Leaf], began: _Names) -> dict[str, str]:
    """Names in the order in which `leaves` stand, for those that they make."""
    new: dict[str, str] = {}
    names = replace(began)
    for leaf in leaves:
        match leaf:
            case Call() if leaf.out:
                new[leaf.out] = f"f{names.futures}"
                names.futures += 1
            case Context() | Optimize():
                new[leaf.name] = f"x{names.contexts}"
                names.contexts += 1
            case _:
                out = getattr(leaf, "out", "")
                if out:
                    new[out] = letters(names.handles)
                    names.handles += 1
    return new


def _renamed(leaf: Leaf, new: dict[str, str]) -> Leaf:
    changed: dict[str, Any] = {
        item.name: new[value]
        for item in fields(leaf)
        if item.name in ("out", "handle", "right", "future", "name")
        and isinstance(value := getattr(leaf, item.name), str)
        and new.get(value, value) != value
    }
    return replace(leaf, **changed) if changed else leaf
