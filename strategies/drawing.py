"""Draws steps one at a time, each of a kind that may follow the earlier ones.

Every choice is a number from 0 up, and 0 is the simplest. All steps take equally many numbers. The
first says which kind the step is, and 0 means no step. Hypothesis lowers one number at a time, and
deletes at most five in a row. So it can delete or simplify any step, and the others stay the same.
For the same reason a kind that cannot come next is replaced by another one, not left out of the
choice, and a step names what it uses by how long ago that was made.

What the steps before and the plan change is how often a number comes, by weights, and not what it
means: after a timeout, the kinds that use a handle come more often, and the handles of that RRef.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from hypothesis import reject
from hypothesis import strategies as st

from rpcprops._given import argument, shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY, Fault, FaultPlan, MessageType, retry_wait
from rpcprops.programs import (
    ENOUGH_THREADS,
    MAX_WORKER_THREADS,
    HandleInfo,
    Scope,
)
from rpcprops.programs.threads import busy_seconds, needed_threads, patient_threads
from rpcprops.steps import STEP_TYPES, Leaf, Parallel, Step
from rpcprops.steps.base import AGAIN, CLEARLY_IN_TIME, Sort
from rpcprops.strategies._checks import first_items
from rpcprops.strategies._often import weight_of
from rpcprops.strategies._weighted import Below, Shared, Unused, Weighted
from rpcprops.torch_facts import TorchFacts, installed

T = TypeVar("T")

PARALLEL = Parallel.op
_BY_DEFAULT = [cls for cls in STEP_TYPES.values() if cls.order is not None]
#: Every kind of step that is drawn by default except `parallel`, roughly the simplest first. A kind
#: that needs another one before it comes later.
KINDS: tuple[str, ...] = tuple(
    cls.op for cls in sorted(_BY_DEFAULT, key=lambda cls: cls.order or 0)
)


def _comes_first(kinds: Iterable[str]) -> tuple[str, ...]:
    return tuple(kind for kind in kinds if STEP_TYPES[kind].comes_first)


#: The kinds that need no earlier step.
FIRST_KINDS = _comes_first(KINDS)


def checked_kinds(value: object, *, parallel: bool = False) -> tuple[str, ...]:
    """The kinds of step in `value` (None: all that are drawn by default), simplest first.

    Args:
        parallel: whether `parallel` is a valid kind too.

    Raises:
        UsageError: it is no collection of kinds, or none of them can come first.
    """
    if value is None:
        return (*KINDS, PARALLEL) if parallel else KINDS
    others = (kind for kind in STEP_TYPES if kind not in KINDS and kind != PARALLEL)
    kinds = (*KINDS, *others, *((PARALLEL,) if parallel else ()))
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
    if not _comes_first(found):
        msg = (
            f"{argument('kinds', value)} must name a step that can come first; add one of "
            f"{', '.join(_comes_first(kinds))}."
        )
        raise UsageError(msg)
    return found


#: Virtual seconds by which a timeout that must not expire exceeds all waits that faults cause; and
#: virtual seconds that the retries of a fork request take.
_IN_TIME = 600
_RETRIES = retry_wait(MessageType.RREF_FORK_REQUEST.max_retries)
_MOST_AT_ONCE = 6
#: How many branches each rank may have in a parallel step.
_THREADS = (1, 2, 1, 2, 3)
#: Which share of the steps of such branches is at the rank of the first one.
_TOGETHER = 0.6
#: Virtual seconds that called functions sleep, and the seldom ones, which are minutes.
_SECONDS = (0.5, 2.0)
_MINUTES = (130.0,)
#: The virtual seconds of a function that a timeout, a quarter of that, ends in any program: enough
#: that a busy machine handles the timeout first.
_LATE = 12.0
#: The most such functions between two settles: each takes a thread of its rank's agent.
_MOST_SLOW = 3
#: The most uses of RRefs whose creation times out: each doubles what a program may show.
_MOST_UNCERTAIN = 3
#: The most virtual seconds that those of one program sleep together.
_MOST_SECONDS = 500.0
#: Kinds of step that send nothing but calls, and wait for them.
_CALLS = frozenset(
    {"call", "count", "chain", "recurse", "reach", "gather", "after", "own", "local", "pause"}
)
#: More virtual seconds than a call waits for a free thread where there are few.
_LONGEST_QUEUE = 30_000.0
#: The default timeouts that a program may have, in virtual seconds. torch's own is 60, and short
#: ones let the whole program run at a slow rate. The first is for programs without faults: it is
#: shorter than what a shutdown waits for where messages are lost.
TIMEOUTS = (65.0, 300.0, 1000.0)
#: How often a call is drawn that the default timeout ends, for one that a longer timeout lets end.
_ENDED = 20
#: How many default timeouts a function sleeps that is to exceed one.
_OUTLASTS = 1.45
#: The most virtual seconds for which a pause waits for a handle.
_LONGEST_PAUSE = 200.0
#: How many of the longest delay a step may wait for.
_MOST_DELAYS = 8
#: Virtual seconds for which a call must wait so that a timeout half as long surely ends it.
_ENOUGH_TO_MISS = 1.0
#: How many numbers a step takes: its kind, and its arguments; and the further ones that choose a
#: fault at which the step is aimed.
_WIDTH = 8
_AIM_WIDTH = 3
#: About which part of the steps of any kind uses a handle.
_WITH_HANDLE = 0.25
#: The messages at which a step may be aimed.
_AIMED = tuple(sorted(MessageType))


@functools.lru_cache(maxsize=512)
def below(number: int) -> st.SearchStrategy[int]:
    """An int from 0 to `number` - 1. Cached: making a strategy takes longer than drawing."""
    return Below(number)


@functools.lru_cache(maxsize=512)
def _shared(number: int, shares: tuple[tuple[int, float], ...]) -> st.SearchStrategy[int]:
    """An int from 0 to `number` - 1, some of them with a share of all draws."""
    found: defaultdict[int, float] = defaultdict(float)
    for value, share in shares:
        found[value] += share
    return Shared(number, {value: share for value, share in found.items() if share})


@functools.lru_cache(maxsize=512)
def _weighed(weights: tuple[float, ...]) -> st.SearchStrategy[int]:
    """An int below so many, each as often as its weight says."""
    number, least, total = len(weights), min(weights), sum(weights)
    shares = {one: (weight - least) / total for one, weight in enumerate(weights)}
    return Shared(number, {one: share for one, share in shares.items() if share})


@functools.lru_cache(maxsize=1024)
def _weights_of(name: str, options: tuple[Hashable, ...]) -> tuple[float, ...]:
    return tuple(weight_of(name, option) for option in options)


@functools.lru_cache(maxsize=512)
def _targeted(number: int, targets: tuple[int, ...]) -> st.SearchStrategy[int]:
    return Weighted(0, number - 1, dict.fromkeys(targets, 1.0)) if targets else below(number)


@functools.lru_cache(maxsize=64)
def _unused(number: int) -> st.SearchStrategy[int]:
    return Unused(number)


def letters(number: int) -> str:
    """The name of a handle: a, b, …, z, aa, ab, …"""
    name = chr(ord("a") + number % 26)
    return name if number < 26 else letters(number // 26 - 1) + name


_NAMED: dict[Sort, Callable[[int], str]] = {
    "handle": letters,
    "future": "f{}".format,
    "context": "x{}".format,
}


#: A branch that is being drawn: its rank, and which of the branches at that rank it is.
_BranchId: TypeAlias = tuple[int, int]


#: Kinds of step after which torch sends nothing but deletes by itself, if each value was fetched.
_DELETING = frozenset({"remote", "fetch", "drop"})


class _Names(Counter[Sort]):
    """How many things of each sort have been named."""

    def next(self, sort: Sort) -> str:
        """The next name for a thing of that sort."""
        self[sort] += 1
        return _NAMED[sort](self[sort] - 1)


@dataclass
class _Block:
    """A parallel step that is being drawn: what each branch uses, so that branches do not interact.

    Attributes:
        left: how many steps are still to come.
        threads: how many branches each rank may have.
        thread: which of them the next step goes into.
        began: how many names had been given before it.
        leaves: the steps so far, each with its thread.
        maker: the branch that made a thing, by the thing's name.
        users: the branches that use an RRef, by its number.
        changer: the branch that changes an RRef's value.
        fetcher: the branch that lets a called function fetch an RRef.
        counter: the branch that uses the counter of a rank.
    """

    left: int
    threads: int
    before: Scope
    began: _Names
    thread: int = 0
    leaves: list[tuple[int, Leaf]] = field(default_factory=list)
    maker: dict[str, _BranchId] = field(default_factory=dict)
    users: defaultdict[int, set[_BranchId]] = field(default_factory=lambda: defaultdict(set))
    changer: dict[int, _BranchId] = field(default_factory=dict)
    fetcher: dict[int, _BranchId] = field(default_factory=dict)
    counter: dict[int, _BranchId] = field(default_factory=dict)

    def branch(self, rank: int) -> _BranchId:
        """The branch into which the next step goes if it is at that rank."""
        return rank, self.thread

    def is_seen(self, name: str, handle: HandleInfo) -> bool:
        """Whether the branch of the handle's rank may use the handle."""
        own = self.branch(handle.home)
        if name not in self.before.handles and self.maker.get(name) != own:
            return False
        if any(rank == own[0] and thread != own[1] for rank, thread in self.users[handle.rref]):
            return False
        return self.changer.get(handle.rref, own) == own

    def note(self, leaf: Leaf, scope: Scope) -> None:
        """Record what `leaf` does that another branch could notice; `scope` is that before it."""
        touched = scope.touched(leaf)
        own = self.branch(leaf.at)
        for rref in touched.used:
            self.users[rref].add(own)
        self.changer |= dict.fromkeys(touched.changed, own)
        self.fetcher |= dict.fromkeys(touched.fetched_there, own)
        self.counter |= dict.fromkeys(touched.counted_at, own)
        self.maker |= {name: own for _, name in leaf.made}


class Draw(Protocol):
    """``draw`` of a composite strategy, or of ``data()``."""

    def __call__(self, strategy: st.SearchStrategy[int], /) -> int:
        """Draw a number from the strategy."""
        ...


class StepDrawer:
    """Draws the steps of a program, one after the other.

    Each kind of step draws itself, by the methods under "What steps are drawn with", and records
    here what later steps must respect.

    Args:
        draw: draws from a strategy; may be set again before each step.
        kinds: the kinds of step to draw, with or without `parallel`.
        off: kinds that this program avoids if it can.
        plan: steps are preferred whose messages it can affect, and timeouts are clearly longer or
            clearly shorter than its delays. None: the program must be valid for any plan.
        settles: whether a settle follows the last step.
        facts: what is known of the torch that is to run it, by default of the installed one. Some
            of its findings (docs/findings.md) are avoided; each place that does so names them.
        minutes: whether called functions may sleep for minutes (virtual).
        gives_up: whether timeouts may end before the functions that they are for.
        rpc_timeout: the default timeout that the program shall have, in virtual seconds.
        threads: the threads that each rank shall have.
        goes_on: whether most steps go on with the RRef of the step before, so that several steps
            meet at one RRef.
        slow: whether called functions sleep more often.

    Attributes:
        steps: the steps so far. Those of a parallel step are added once it has ended.
        count: how many steps that a rank runs (and settles) were drawn so far.
        on: the kinds that are drawn.
        ended: contexts that have ended, and whether a settle came after that.
        uncreated: handles whose creation timed out, until a settle. Uses of them may fail or not,
            so there are few; drops of them meet timed-out-remote-dropped.
        failed_at: the ranks that have had such a creation. A second one meets second-failed-remote.
        unmade: handles at an owner that perhaps has not made the value yet. If such a handle is
            sent on and that fork is deleted first, torch forgets the value, and the handle never
            gets it (early-owner-fork). Empty for a torch without that finding.
        unseen: handles of RRefs that another rank than their owner made, and whose arrival no rank
            has noticed.
        sent: handles of RRefs whose functions were sent an RRef.
        fetching: futures of calls whose functions fetch an RRef of another rank, until a settle; ""
            stands for such calls that a timeout ends.
        given_up: handles of RRefs for which a fetch leaves only after its timeout, until a settle:
            a delete would overtake it (fetch-after-delete).
        may_hold_errors: whether the value of some RRef may be an error. A call through it that does
            not wait meets failed-async-proxy.
        waiting: one more than the number of values whose making waits for another handle.
        making: handles of RRefs whose slow function may still run. If their owner gets a handle
            meanwhile and another fork is deleted, it forgets the value (early-owner-fork).
        coming: handles whose sharing may time out, and which come all the same: a pause can wait
            for them, and then they are used while that call is under way.
        early: those of `making` whose owner has got a handle, so that no fork may be deleted.
        thinned: those of them of which a fork was deleted, so that no handle may go to the owner.
        uncertain: handles that were shared from one in `uncreated`, and perhaps never came.
        waited: handles of RRefs whose value was waited for, if nothing was uncertain.
        unclear: handles of RRefs of which nobody can tell whether their value has been changed.
        read: handles of RRefs whose value a function may still read for which nobody has waited,
            until a settle.
        counted_late: ranks to which a call that counts may still be under way, until a settle.
        slow_functions: how many slow functions were started since the last settle.
        has_plan: whether the program is drawn for a plan.
        has_run_out: whether the last step needs more threads than the ranks have.
        rpc_timeout: the default timeout of the program: as given, or a longer one, so that it comes
            only where a step says so. None if delays of the plan may be too long for any.
        threads: the threads that each rank shall have. Where there are few, no timeout comes: that
            needs a free thread, and what a call waits for one is only known to be below a bound.
        lasting: handles whose value may take longer to make than the default timeout, until a
            settle.
        may_keep: whether, by a known finding, a call may be kept for ever (failed-backward-
            revisits-rank) or an RRef (unpicklable-after-rref, late-answer-keeps-rref). A shutdown
            would wait for it, so the ranks shut RPC down at the end only, and settle before that.
        rejoined: whether RPC was initialised again. After that an RRef stays for ever on a torch
            with rref-lifetime-after-reinit, and only its owner can send it on one with
            rref-sent-after-reinit, so none is made there.
        may_rejoin: whether the ranks can hold nothing, so that they may leave and come back.
        gathered_apart: whether some ranks have shut down gracefully, and others have not. No
            graceful shutdown may follow on a torch with gathering-count-kept.
        ends_at_once: whether the program ends by a shutdown that waits for nobody.
    """

    def __init__(  # noqa: PLR0913, PLR0915 - what a program is drawn for
        self,
        draw: Draw,
        world_size: int,
        *,
        kinds: Sequence[str] = (*KINDS, PARALLEL),
        off: Iterable[str] = (),
        plan: FaultPlan | None = None,
        settles: bool = True,
        facts: TorchFacts | None = None,
        minutes: bool = False,
        gives_up: bool = True,
        rpc_timeout: float | None = None,
        threads: int | None = None,
        goes_on: bool = False,
        slow: bool = False,
        ends_at_once: bool = False,
    ) -> None:
        self.facts = facts or installed()
        self.draw: Draw = draw
        self.ranks = tuple(range(world_size))
        self.kinds = tuple(kinds)
        # One kind that can always come next stays, as a replacement for the others.
        self._choices, first = _choices(self.kinds)
        self.on = frozenset(kinds) - frozenset(off) | {first[0]}
        self._first_on = tuple(kind for kind in first if kind in self.on)
        self._drawn = 0
        self._latest: Step | None = None
        #: The number of the RRef that the last steps used.
        self._rref: int | None = None
        self._slow = slow or not settles
        self._width = _WIDTH if plan is None else _WIDTH + _AIM_WIDTH
        self.scope = Scope(world_size)
        self.steps: list[Step] = []
        self.count = 0
        self._block: _Block | None = None
        self._names = _Names()
        self.ended: dict[str, bool] = {}
        self._turn = 0
        self._made: dict[str, int] = {}  # names, and the turn in which each was given
        self._plan = plan or FaultPlan()
        tables = [self._plan.table(rank) for rank in self.ranks]
        #: What fails at each rank, and how often; and what is late, by how many milliseconds.
        self._failing = [(frozenset(t.failing), t.num_fail_sends) for t in tables]
        self._delaying = [t.delaying for t in tables]
        self.settles = settles
        self.uncreated: set[str] = set()
        self._uses_of_uncreated = 0
        self.failed_at: set[int] = set()
        self.unmade: set[str] = set()
        self.unseen: set[str] = set()
        self.sent: set[str] = set()
        self.fetching: set[str] = set()
        self.given_up: set[str] = set()
        lost = [message for message in MessageType if not message.is_retryable]
        self.may_hold_errors = any(self.may_fail(rank, lost) for rank in self.ranks)
        self.waiting = 1
        self.making: set[str] = set()
        self.coming: set[str] = set()
        self.early: set[str] = set()
        self.thinned: set[str] = set()
        self.uncertain: set[str] = set()
        self.waited: set[str] = set()
        self.unclear: set[str] = set()
        self.read: set[str] = set()
        self.counted_late: set[int] = set()
        self.slow_functions = 0
        self.has_plan = plan is not None
        self.has_run_out = False
        self.may_keep = False
        self.rejoined = False
        self.may_rejoin = True
        self.gathered_apart = False
        self.ends_at_once = ends_at_once
        self._lengths = _SECONDS + _MINUTES * minutes
        self._slow_seconds = 0.0
        self._slow_in_time = 0.0
        self._gives_up = settles and gives_up
        faults = [plan.faults_at(rank) if plan else () for rank in self.ranks]
        self._targets = {
            _AIMED.index(message) * world_size + rank: (rank, message)
            for rank, at in enumerate(faults)
            for message in sorted({m for f in at for m in f.targets})
        }
        #: Which share of the steps are aimed at a fault, and which go on with an RRef.
        parts = ((2 + goes_on) * bool(self._targets), 2 * goes_on)
        self._shares = (parts[0] / (1 + sum(parts)), parts[1] / (1 + sum(parts)))
        self._aim = _targeted(len(_AIMED) * world_size, tuple(self._targets))
        self._of_rref = 0.0
        self._may_announce_late = plan is None or any(
            self.may_fail(rank, (MessageType.RREF_FORK_REQUEST,)) for rank in self.ranks
        )
        self._longest = MAX_DELAY if plan is None else _longest_delay(itertools.chain(*faults))
        self.lasting: set[str] = set()
        self.threads = threads
        self.rpc_timeout: float | None = None
        if self.has_few_threads and self._longest:
            # A thread is busy during each delay, so nearly any default timeout may come.
            rpc_timeout = None
        if rpc_timeout is not None:
            able = TIMEOUTS if self.undisturbed else TIMEOUTS[1:]
            fits = (x for x in able if x >= rpc_timeout and self._waits() <= x)
            self.rpc_timeout = next(fits, None)
        #: For each rank: the others; and the ranks that it may call, others first, then itself.
        self.others, self.peers = _ranks(world_size)

    @property
    def has_few_threads(self) -> bool:
        """Whether a message may have to wait for a free thread of its rank."""
        return self.threads is not None and self.threads < ENOUGH_THREADS

    @property
    def rests(self) -> bool:
        """Whether torch sends nothing by itself after the steps so far."""
        before = itertools.takewhile(lambda step: step.op != "settle", reversed(self.steps))
        return not self.in_parallel and all(map(self._leaves_nothing, before))

    @property
    def may_take_real_time(self) -> bool:
        """Whether the next step may take seconds of real time, which a fast clock makes an hour.

        Nothing may be under way meanwhile, and no timeout and no delay may come.
        """
        quiet = self.rests and not self.scope.futures
        return quiet and self.undisturbed and self.rpc_timeout is None

    @property
    def may_make_more(self) -> bool:
        """Whether a step may make RRefs that no other step uses, or larger values.

        Nobody fetches these RRefs, so a program must settle before its shutdown.
        """
        alone = not (self.in_parallel or self.has_few_threads)
        return alone and self.settles and self.undisturbed and self.rpc_timeout is None

    @property
    def only_calls(self) -> bool:
        """Whether the steps so far are calls that leave nothing behind, and settles."""
        return all(step.op == "settle" or self._leaves_nothing(step) for step in self.steps)

    @property
    def only_deletes(self) -> bool:
        """Whether torch may still send nothing but deletes again, of values that are all made.

        Not after a timeout of a step, however long ago: what a later use of its handle sends may
        depend on which came first, and then the oracle knows no counts.
        """
        leaves = [leaf for step in self.steps for leaf in step.leaves]
        before = [*itertools.takewhile(lambda step: step.op != "settle", reversed(self.steps))]
        fetched = {step.used[0] for step in before if step.op == "fetch"}
        return (
            not (self.in_parallel or self.loses or self._longest or self.has_few_threads)
            and all(step.op in _DELETING or self._leaves_nothing(step) for step in before)
            and all(getattr(leaf, "timeout", None) is None for leaf in leaves)
            and not any(step.lasts or step.raises_there for step in before)
            and all(name in fetched for step in before for _, name in step.made)
            and not any(step.used for step in before if step.op == "remote")
        )

    def _leaves_nothing(self, step: Step) -> bool:
        """Whether torch sends nothing by itself after a step, and no function goes on."""
        is_call = step.op in _CALLS and getattr(step, "how", "") != "remote"
        # A proxy is of an RRef, whose delete may still be under way.
        is_call &= getattr(step, "of", "") not in ("proxy", "mixed")
        ends = getattr(step, "timeout", None) is not None or step.lasts > self.limit(None)
        return is_call and not ends and not step.used

    @property
    def default_timeout(self) -> float | None:
        """The default timeout of a program of the steps so far.

        None where threads are few and a message may have to wait too long for one.
        """
        if self.has_few_threads:
            leaves = [leaf for step in self.steps for leaf in step.leaves]
            # A message waits for all that keeps a thread busy, and then its own function runs.
            own = max((leaf.lasts for leaf in leaves), default=0.0)
            if self._waits(sum(map(busy_seconds, leaves)) + own) > self.limit(None):
                return None
        return self.rpc_timeout

    @property
    def threads_of_ranks(self) -> int | None:
        """The threads that the ranks of the program get: as chosen, or as many as its steps need.

        Steps of which nobody has counted how many they need may need more than a program may have.
        """
        timed = self.default_timeout is not None
        has_bug = self.facts.has_bug("timeout-needs-thread")
        least = patient_threads(len(self.ranks), self.steps, timed=timed) if has_bug else 0
        if least > ENOUGH_THREADS:
            # So many are asked for, and then those that do not wait for a given time count as well.
            others = needed_threads(len(self.ranks), self.steps, timed=timed, also_patient=False)
            least = max(least, others)
        if least > MAX_WORKER_THREADS:
            reject()
        if self.threads is not None:
            # A default timeout ends the calls whose functions would wait in vain.
            patient = has_bug or timed
            needed = needed_threads(len(self.ranks), self.steps, timed=timed, also_patient=patient)
            if self.has_run_out:
                return self.threads
            if needed <= MAX_WORKER_THREADS:
                return max(needed, self.threads)
        return least if least > ENOUGH_THREADS else None

    def add(self, *, room: int = _MOST_AT_ONCE, must: bool = False) -> None:
        """Draw the next step, or none, or the start of a parallel step.

        Args:
            room: how many more steps fit in; a parallel step needs two.
            must: whether a step must be drawn.
        """
        if self._block is not None:
            # Always one number. At one rank, 0 is the next thread, so that steps of two ranks can
            # become steps of two threads with the same numbers.
            number = self.pick(range(self._block.threads))
            following = len(self._block.leaves) if len(self.ranks) == 1 else 0
            self._block.thread = (number + following) % self._block.threads
        self._drawn = 0
        self._turn += 1
        number = self._first_number()
        if number or must:
            step = self._any(max(0, number - 1), room)
            if step is not None:
                self._take(step)
        if self._drawn < self._width:
            self.draw(_unused(self._width - self._drawn))

    @property
    def overtakes(self) -> bool:
        """Whether torch's shutdown may overtake the steps so far, if no settle follows them.

        On a torch with these findings, shutdown does not wait for a creation whose delete will be
        retried, and it deletes what a function still uses. It waits for what is kept for ever.
        """
        if self.may_keep:
            return True
        has_bug = self.facts.has_bug
        deletes = (MessageType.RREF_USER_DELETE,)
        failing = any(self.may_fail(rank, deletes) for rank in self.ranks)
        if self.unseen and failing and has_bug("shutdown-overtakes-creation"):
            return True
        fetching = self.unseen & self.sent or self.fetching & {"", *self.scope.futures}
        return bool(fetching) and has_bug("shutdown-deletes-argument")

    @property
    def may_make_rrefs(self) -> bool:
        """Whether the next step may make an RRef."""
        reinit = ("rref-lifetime-after-reinit", "rref-sent-after-reinit")
        return not (self.rejoined and any(map(self.facts.has_bug, reinit)))

    @property
    def takes_minutes(self) -> bool:
        """Whether a step may take minutes."""
        return self._lengths != _SECONDS

    def may_gather(self, *, apart: bool) -> bool:
        """Whether ranks that come back may shut down gracefully; `apart`: some of them only."""
        if not self.facts.has_bug("gathering-count-kept"):
            return True
        return self.ends_at_once if apart else not self.gathered_apart

    @property
    def goes_on_without_rrefs(self) -> bool:
        """Whether steps that make no RRef can always come next, also in threads of a branch."""
        kinds = [STEP_TYPES[kind] for kind in _comes_first(self.kinds) if kind in self.on]
        return any(cls.after_rejoin and cls.in_branch and cls.in_thread for cls in kinds)

    @property
    def loses(self) -> bool:
        """Whether the plan may lose a message: more often than torch sends it again."""
        return any(number > m.max_retries for failing, number in self._failing for m in failing)

    @property
    def undisturbed(self) -> bool:
        """Whether the program is drawn for a plan that has no fault."""
        return self.has_plan and not self._plan.faults(len(self.ranks))

    def may_run_out(self, room: int) -> bool:
        """Whether a last step may follow that needs more threads than the ranks have.

        Args:
            room: how many more steps fit in; a settle comes before it.
        """
        kinds = {"recurse", "settle"} <= self.on and self.scope.members is None
        able = self.settles and kinds and room > 1 and self.has_few_threads
        rests = self.default_timeout is None and not self.rejoined and not self.in_parallel
        return able and rests and self.facts.has_bug("timeout-needs-thread")

    def run_out(self) -> None:
        """Draw such a step, or none: nothing but a settle may follow it."""
        number = self.threads_of_ranks
        recurse: Any = STEP_TYPES["recurse"]
        if number is None or not self.pick((False, True, True, True)):
            return
        step = recurse.draw_beyond(self, number)
        if step is not None:
            self._take(STEP_TYPES["settle"]())
            self._take(step)
            self.threads = number
            self.has_run_out = True

    def add_kind(self, kind: str) -> bool:
        """Draw the next step, of that kind; returns whether there can be one."""
        self._turn += 1
        step = self._of(kind)
        if step is not None:
            self._take(step)
        return step is not None

    def add_parallel(self) -> None:
        """Draw the next steps, which run at the same time if they are at several ranks."""
        self.start_parallel()
        while self._block is not None:
            self.add(must=True)

    def may(self, kind: str) -> bool:
        """Whether a step of that kind can come next."""
        return STEP_TYPES[kind].may_come(self)

    def close(self) -> None:
        """End a parallel step that is being drawn with the steps that it has."""
        block, self._block = self._block, None
        if block is None:
            return
        self._latest = None
        self._rref = None
        found: dict[_BranchId, list[Leaf]] = {}
        for thread, leaf in block.leaves:
            found.setdefault((leaf.at, thread), []).append(leaf)
        branches = [tuple(found[branch]) for branch in sorted(found)]
        if len(branches) < 2:
            self.steps += [leaf for _, leaf in block.leaves]
            return
        new = _new_names(itertools.chain(*branches), block.began)
        step = Parallel(tuple(tuple(x.renamed(new) for x in branch) for branch in branches))
        block.before.add(step)
        self.scope = block.before
        self.ended = {new.get(name, name): settled for name, settled in self.ended.items()}
        mine = (self.uncreated, self.unmade, self.unseen, self.sent, self.making, self.lasting)
        given = (self.given_up, self.fetching, self.coming)
        late = (self.early, self.thinned, self.uncertain, self.waited, self.unclear, self.read)
        for names in (*mine, *given, *late):
            renamed = {new.get(name, name) for name in names}
            names.clear()
            names |= renamed
        self._made = {new.get(name, name): turn for name, turn in self._made.items()}
        self.steps.append(step)

    def start_parallel(self, most: int = _MOST_AT_ONCE) -> None:
        """Let the next steps, two to `most`, run at the same time if they are at several ranks."""
        self._latest = None
        left = 2 + self.pick(range(min(most, _MOST_AT_ONCE) - 1))
        may_thread = any(STEP_TYPES[kind].in_thread for kind in self._first_on)
        threads = self.pick(_THREADS if may_thread else _THREADS[:1])
        if len(self.ranks) == 1:
            threads = max(threads, 2)
        self._block = _Block(left, threads, self.scope.copy(), _Names(self._names))

    # Which kind.

    def _first_number(self) -> int:
        """The first number of a step: 0 for none, one for each choice of a kind, and one to aim.

        A number means the same after any steps and under any plan. These change only how often it
        comes.
        """
        aimed, on = self._shares
        if self._just_ended:
            # What a failure has left behind shows in what comes next.
            aimed, on = aimed / 2, (1 + on) / 2
        number = len(self._choices)
        shares: tuple[tuple[int, float], ...] = ((1 + number, aimed),) if aimed else ()
        going_on = self._going_on() if on else ()
        if going_on:
            shares += tuple((1 + index, on * share) for index, share in going_on)
        self._of_rref = on / (on + _WITH_HANDLE * (1 - aimed - on)) if going_on else 0.0
        rest = 1 - sum(share for _, share in shares)
        shares += tuple((1 + index, rest * share) for index, share in _more_often(self.kinds))
        return self._number(_shared(2 + number, shares))

    def _going_on(self) -> tuple[tuple[int, float], ...]:
        """The choices that go on with an RRef, or that make the first one, each with its share.

        After a timeout they are those that can use the RRef which it left behind.
        """
        if not self.scope.handles:
            return _going_on(self.kinds, self.on, "", "makers")
        latest = self._latest
        but = "settle" if self._block or self.has_just_settled else ""
        again, times = latest.leads_to(self) if latest else ("", 0)
        if not self._just_ended:
            # A pause goes on with nothing but an RRef that is under way.
            on = self.on if self.coming_handles() else self.on - {"pause"}
            return _going_on(self.kinds, on, but, again, times)
        handles = self.scope.handles
        of_rref = {name for name, handle in handles.items() if handle.rref == self._rref}
        able = (kind for kind in self.on if STEP_TYPES[kind].goes_on_with(self, of_rref))
        return _going_on(self.kinds, frozenset(able), but, again, 3 * AGAIN)

    def _any(self, index: int, room: int) -> Step | None:
        if not self.has_plan:
            # Nothing to aim at: that number means the first kind, and takes no second one.
            index %= len(self._choices)
        elif index == len(self._choices):
            step, index = self._aimed()
            if step is not None:
                return step
        else:
            # A step that is aimed has its target here, and the way to send that. So one that is not
            # may take its place, with the same arguments.
            self._number(_unused(2))
            self._drawn += 1
        kind = self._choices[index]
        if kind in self.on:
            if kind == PARALLEL and self.may_branch(room):
                self.start_parallel(room)
                return None
            step = self._of(kind) or STEP_TYPES[kind].instead(self)
            if step is not None and self.fits(type(step)):
                return step
        # Replace downwards: the number can then be lowered to that of the replacement, so the
        # result does not depend on which kinds are off, and Hypothesis can switch all of them on.
        # A run of kinds that are off is replaced by as many below it, not by one of them alone.
        index = self.kinds.index(kind)
        lower = [kind for kind in self.kinds[: index + 1] if kind in self.on]
        higher = [kind for kind in self.kinds[index + 1 :] if kind in self.on]
        start = 0
        if lower:
            gap = index - self.kinds.index(lower[-1])
            start = -max(gap, 1) % len(lower)
        return self._first_of((*lower[start::-1], *lower[start + 1 :], *higher))

    def _first_of(self, kinds: Sequence[str]) -> Step:
        """A step of the first of these kinds that can come next."""
        for _ in range(self._block.threads if self._block else 1):
            for kind in kinds:
                if (step := self._of(kind)) is not None:
                    return step
            if self._block:
                # Other branches may use what this one may not, such as the counter of a rank.
                self._block.thread = (self._block.thread + 1) % self._block.threads
        msg = f"none of {self.kinds!r} can come next"
        raise AssertionError(msg)

    def _of(self, kind: str) -> Step | None:
        """A step of that kind; None if none can come next, and then nothing was drawn."""
        cls = STEP_TYPES[kind]
        return cls.draw(self) if self.fits(cls) else None

    def fits(self, cls: type[Step]) -> bool:
        """Whether a step of that class may stand where the next step goes."""
        if not (self.may_make_rrefs or cls.after_rejoin or cls is Parallel):
            return False
        if self._block is None:
            return cls is not Parallel
        return cls.in_branch and (cls.in_thread or self._block.threads == 1)

    def _aimed(self) -> tuple[Step | None, int]:
        """A step that makes some rank send a message that the plan fails or delays there.

        If that needs a handle and there is none, it is a step that makes the handle. If there is no
        such step, it is the number of a choice of a kind.
        """
        number = self._number(self._aim)
        choices = len(self._choices)
        if not self._targets:
            self._number(_unused(1))
            return None, number % choices
        rank, message = self._target(number)
        ways = [
            way
            for cls in _aimable(tuple(STEP_TYPES.values()))
            for kind, way in cls.ways(self, rank, message)
            if kind in self.kinds and self.fits(STEP_TYPES[kind])
        ]
        self._of_rref = 0.0
        return (self.pick(ways)(), 0) if ways else (None, self.pick(range(choices)))

    @property
    def has_just_settled(self) -> bool:
        """Whether the last step was a settle."""
        return self._latest is not None and self._latest.op == "settle"

    @property
    def _just_ended(self) -> bool:
        """Whether a short timeout was drawn for what the last step did with a handle."""
        timeout = getattr(self._latest, "timeout", None)
        return timeout is not None and timeout < _IN_TIME and self._rref is not None

    def _target(self, number: int) -> tuple[int, MessageType]:
        """A rank, and a message that the plan fails or delays there, by a number.

        It means the same in every plan, so the step stays what it is while others are taken out of
        the plan. If the plan has no such target, it is one of the same message at another rank, or
        else of another message.
        """
        size = len(self.ranks)

        def distance(other: int) -> tuple[int, int]:
            return (number // size - other // size) % len(_AIMED), other

        return self._targets[
            number if number in self._targets else min(self._targets, key=distance)
        ]

    def _take(self, step: Step) -> None:
        self.count += 1
        if self._block is None:
            self.scope.add(step)
            self.steps.append(step)
        else:
            self._block.note(step, self.scope)
            self.scope.add(step)
            self._block.leaves.append((self._block.thread, step))
            self._block.left -= 1
        for _, name in step.made:
            self._made[name] = self._turn
        self._note_rref(step)
        self._latest = step
        step.drawn(self)
        if self._block is not None and not self._block.left:
            self.close()

    def _note_rref(self, step: Step) -> None:
        """Note the RRef that a step has made or used last."""
        handles = self.scope.handles
        made = (name for sort, name in step.made if sort == "handle")
        for name in (*step.used, *made):
            if name in handles:
                self._rref = handles[name].rref

    # What steps are drawn with.

    def _number(self, strategy: st.SearchStrategy[int]) -> int:
        self._drawn += 1
        return self.draw(strategy)

    def pick(self, options: Sequence[T], weights: tuple[float, ...] = ()) -> T:
        """One of `options`; the first is the simplest.

        Args:
            weights: how often each of them comes; none if all come alike.
        """
        # Always one number, even for one option: Hypothesis does not record a choice of one.
        weighs = len(options) > 1 and weights
        number = self._number(_weighed(weights) if weighs else below(max(2, len(options))))
        return options[number] if number < len(options) else options[0]

    def option(self, name: str, options: Sequence[T]) -> T:
        """One of `options` of a field, as often as `strategies/_often.py` says.

        Args:
            name: the kind of the step and the field, such as "train.optimizer".
        """
        return self.pick(options, _weights_of(name, tuple(options)))

    def recall(self, names: Sequence[str]) -> str:
        """One of `names`, drawn by how many turns ago it was given, so turns can be deleted."""
        return self._recalled(names, self._number(self._turns(names)))

    def _turns(self, names: Sequence[str]) -> st.SearchStrategy[int]:
        """How many turns ago; mostly when a handle of the RRef of the last steps was made."""
        if self._of_rref:
            handles = self.scope.handles
            of_rref = [x for x in names if x in handles and handles[x].rref == self._rref]
            if of_rref and len(names) > 1:
                latest = self._latest.used if self._latest is not None else ()
                # The handle of the last step more often than others of its RRef.
                times: Counter[int] = Counter()
                for name in of_rref:
                    times[self._turn - 1 - self._made[name]] += 4 if name in latest else 1
                share = self._of_rref / times.total()
                shares = tuple((ago, share * number) for ago, number in sorted(times.items()))
                return _shared(max(2, self._turn), shares)
        return below(max(2, self._turn))

    def recall_or_none(self, names: Sequence[str]) -> str | None:
        """One of `names`, or mostly none; always none if there are no names."""
        ago = self.pick((None, None, *range(self._turn if names else 0)))
        return None if ago is None else self._recalled(names, ago)

    def _recalled(self, names: Sequence[str], ago: int) -> str:
        last_first = sorted(names, key=self._made.__getitem__, reverse=True)
        turn = self._turn - 1 - ago
        return next((name for name in last_first if self._made[name] <= turn), last_first[0])

    def rank(self) -> int:
        """A rank; in a branch beside which its rank may have others, mostly that of the first."""
        block = self._block
        if block is None or block.threads < 2 or not block.leaves:
            return self.pick(self.ranks)
        number = self._number(
            _shared(max(2, len(self.ranks)), ((block.leaves[0][1].at, _TOGETHER),))
        )
        return self.ranks[number % len(self.ranks)]

    def peer(self, at: int) -> int:
        """A rank that `at` calls: other ranks first, then itself."""
        return self.pick(self.peers[at])

    def name(self, sort: Sort) -> str:
        """A name for what a step makes."""
        return self._names.next(sort)

    @property
    def in_parallel(self) -> bool:
        """Whether the next step goes into a branch of a parallel one."""
        return self._block is not None

    @property
    def in_threads(self) -> bool:
        """Whether the next step goes into a branch beside which its rank may have another one."""
        return self._block is not None and self._block.threads > 1

    def _branch(self, rank: int) -> _BranchId:
        return self._block.branch(rank) if self._block else (rank, 0)

    def futures(self) -> list[str]:
        """The futures that may be waited for now."""
        maker = self._block.maker if self._block else {}
        return [
            name
            for name, rank in self.scope.futures.items()
            if maker.get(name, self._branch(rank)) == self._branch(rank)
        ]

    def may_branch(self, room: int = _MOST_AT_ONCE) -> bool:
        """Whether a parallel step can come next, if there is room for `room` steps."""
        return (
            self._block is None
            and room > 1
            and any(
                STEP_TYPES[kind].in_branch and (len(self.ranks) > 1 or STEP_TYPES[kind].in_thread)
                for kind in self._first_on
            )
        )

    def handles(self, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
        """The handles that may be used now."""
        out = self.uncreated | self.unclear if self.unclear else self.uncreated
        return [name for name in self._held(fits) if name not in out]

    def unconfirmed(self) -> list[str]:
        """The handles that do not say that they are confirmed, on a torch without unconfirmed-user.

        Their owner had sent them itself before a settle: no message confirms them. None of a torch
        that has that finding, for which no case is drawn that meets it.
        """
        if self.facts.has_bug("unconfirmed-user"):
            return []
        settled: set[str] = set()
        made: dict[str, int | None] = {}
        for step in self.steps:
            if step.op == "settle":
                settled.update(made)
            elif name := getattr(step, "out", ""):
                made[name] = getattr(step, "at", None)
        handles = self.scope.handles
        users = self.handles(lambda handle: handle.home != handle.owner)
        return [name for name in users if name in settled and made[name] == handles[name].owner]

    def droppable(self, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
        """The handles that may be dropped now."""
        is_lost = self.facts.has_bug("timed-out-remote-dropped")
        lost = self.uncreated - self.waited if is_lost else set[str]()
        if self.facts.has_bug("fetch-after-delete"):
            lost |= self.given_up
        return [name for name in self._held(fits) if name not in lost | self.early]

    def _held(self, fits: Callable[[HandleInfo], bool]) -> list[str]:
        return [name for name in self._seen(fits) if name not in self.lasting]

    def _seen(self, fits: Callable[[HandleInfo], bool]) -> list[str]:
        block = self._block
        return [
            name
            for name, handle in self.scope.handles.items()
            if not handle.late and fits(handle) and (block is None or block.is_seen(name, handle))
        ]

    def sendable(self, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
        """The handles that a message may carry now."""
        return [name for name in self.shareable(fits) if not self._is_making(name)]

    def shareable(self, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
        """The handles that a message may carry now to some rank: see :meth:`may_go`."""
        return [
            name
            for name in self.handles(fits)
            if name not in self.unmade and any(self.may_go(name, to) for to in self.ranks)
        ]

    def may_go(self, name: str, to: int) -> bool:
        """Whether a message may carry that handle to that rank now."""
        if not self._is_making(name) or self.scope.handles[name].owner != to:
            return True
        return self._may_come_early(name) and self.settles

    def _may_come_early(self, name: str) -> bool:
        """Whether its owner may get a handle whose value is still being made.

        No fork of it may be deleted meanwhile, in another branch or by a delete under way.
        """
        return not self.in_parallel and name not in self.thinned

    def note_late_creation(self, name: str, rank: int) -> None:
        """Note that a creation of `rank` times out, whose handle has that name."""
        self.uncreated.add(name)
        self.failed_at.add(rank)
        self.may_hold_errors = True

    def note_deleted(self, name: str) -> None:
        """Note that a fork of an RRef was deleted, perhaps before its value was made.

        The delete may still be under way when a handle comes to the owner.
        """
        if name in self.making:
            self.thinned |= self.making

    def note_coming(self, name: str, sender: int) -> None:
        """Note that a handle comes, from `sender`, perhaps after its call has timed out.

        Not where that message may be lost, nor where what comes with it may take long.
        """
        is_sent = not (self.loses or self.may_fail(sender, [MessageType.PYTHON_CALL]))
        if self.has_plan and is_sent and self.seconds_to_come() <= _LONGEST_PAUSE:
            self.coming.add(name)

    def coming_handles(self) -> list[str]:
        """Those of `coming` for which a pause can wait now."""
        if self.seconds_to_come() > _LONGEST_PAUSE:
            return []
        block, handles = self._block, self.scope.handles
        return [
            name
            for name, handle in handles.items()
            if name in self.coming
            and handle.late
            and (block is None or block.is_seen(name, handle))
        ]

    def seconds_to_come(self) -> float:
        """Virtual seconds within which a handle surely comes that has been sent."""
        waits = (5 * self._longest + _RETRIES) * self.waiting
        return float(math.ceil(waits)) + CLEARLY_IN_TIME

    def note_unread(self, name: str) -> None:
        """Note that the answer that brings a handle comes too late, so no later step has it."""
        del self.scope.handles[name]
        self.may_keep = True

    def note_read(self, name: str) -> None:
        """Note that a function reads the value of a handle's RRef, for which nobody waits yet."""
        self.read |= self.same_rref(name)

    def note_fetching(self, future: str, *, ends: bool) -> None:
        """Note that the function of a call fetches an RRef; perhaps nobody waits for it.

        Args:
            future: its name, "" if the call is waited for at once.
            ends: whether a timeout ends it.
        """
        if ends or future:
            self.fetching.add("" if ends else future)

    def is_early(self, name: str) -> bool:
        """Whether a handle is at its owner, which is perhaps still making the value."""
        handle = self.scope.handles[name]
        return handle.home == handle.owner and self._is_making(name)

    def callable_through(self) -> list[str]:
        """The handles through which a call may go now; it waits for the value."""
        return [
            name
            for name in self.shareable()
            if not self._is_making(name) or self._may_come_early(name)
        ]

    def doubtful(self, *, calls: bool = False) -> list[str]:
        """Handles whose creation timed out, which a message may carry if torch has not noticed.

        With `calls` it is a call through the handle. That sends either nothing or two messages, so
        the plan must leave these alone.
        """
        few = self._uses_of_uncreated < _MOST_UNCERTAIN
        if not (few and self.settles) or self.in_parallel or self.rpc_timeout is not None:
            return []
        names = self.uncreated - self.unmade - self.lasting - (self.thinned if calls else set())
        return [
            name
            for name in self._seen(lambda h: h.home != h.owner)
            if name in names and not (calls and self._is_struck(name))
        ]

    def doubtful_there(self, at: int, to: int) -> list[str]:
        """Those of them at `at` that a function at `to` may fetch, if torch lets the call be made.

        The owner gives the value once it is made, which is after the timeout.
        """
        here = [name for name in self.doubtful() if self.scope.handles[name].home == at]
        return [n for n in here if n not in self.early and self.scope.handles[n].owner != to]

    def _is_struck(self, name: str) -> bool:
        """Whether the plan strikes the question for the type of a handle's value."""
        handle = self.scope.handles[name]
        sent = (
            (handle.home, MessageType.PYTHON_CALL),
            (handle.owner, MessageType.RREF_CHILD_ACCEPT),
        )
        return any(
            self.may_fail(rank, [message]) or self.delay_milliseconds(rank, message)
            for rank, message in sent
        )

    def receiver(self, name: str) -> int:
        """A rank that the rank of a handle may send it to."""
        peers = self.peers[self.scope.handles[name].home]
        return self.pick([rank for rank in peers if self.may_go(name, rank)])

    def same_rref(self, name: str) -> set[str]:
        """The handles of the same RRef, with that handle."""
        handles = self.scope.handles
        return {other for other, held in handles.items() if held.rref == handles[name].rref}

    def _is_making(self, name: str) -> bool:
        return name in self.making and self.facts.has_bug("early-owner-fork")

    def changeable(self, fits: Callable[[HandleInfo], bool] = lambda _: True) -> list[str]:
        """The handles whose value a message may change now.

        No other branch uses it, and no function still reads it for which nobody has waited.
        """
        block = self._block
        names = self.sendable(
            lambda h: (
                (block is None or block.users.get(h.rref, set()) <= {block.branch(h.home)})
                and fits(h)
            )
        )
        return [name for name in names if name not in self.read]

    def fetchable_there(self, at: int, to: int | None = None) -> list[str]:
        """The handles of `at` that a called function may fetch: each in one branch only.

        With `to`, the rank where that function runs, also some whose value is still being made.
        """
        own = self._branch(at)
        fetcher = self._block.fetcher if self._block else {}
        names = self.shareable(lambda h: h.home == at and fetcher.get(h.rref, own) == own)
        return [
            name
            for name in names
            if name not in self.early
            and (
                not self._is_making(name)
                or (to is not None and to != self.scope.handles[name].owner)
            )
        ]

    def countable(self, at: int) -> list[int]:
        """The ranks whose counter a step at `at` may use: in a parallel step, one per branch."""
        branch = self._branch(at)
        counter = self._block.counter if self._block else {}
        peers = [rank for rank in self.peers[at] if rank not in self.counted_late]
        own = [rank for rank in peers if counter.get(rank) == branch]
        return own or [rank for rank in peers if rank not in counter]

    def timeout(
        self, at: int, message: MessageType, *, late: bool = True, also: float | None = None
    ) -> float | None:
        """A timeout: None, clearly more than any delay, or clearly less than the message's.

        Or it is `also`, if that is given.
        """
        return self.pick(self._timeouts(at, message, late=late, also=also))

    def timing(
        self,
        at: int,
        message: MessageType,
        *,
        late: bool = True,
        slow: bool = True,
        slow_late: bool = True,
        waits: float = 0.0,
    ) -> tuple[float | None, float]:
        """A timeout as :meth:`timeout`, and how long the called function sleeps (virtual seconds).

        Args:
            late: whether the timeout may be too short for a delay of the message.
            slow: whether the function may sleep.
            slow_late: whether the timeout may be too short for that.
            waits: how long the function waits before it begins, as :meth:`announces` says.
        """
        quick = [(timeout, 0.0) for timeout in self._timeouts(at, message, late=late)]
        if waits and slow_late and self.may_end_late():
            # Longer than the function, and shorter than what torch must try again before that.
            quick += [(math.floor(500 * waits) / 1000, 0.0)] * 2
        if not slow or self.slow_functions >= _MOST_SLOW:
            return self.pick(quick)
        left = _MOST_SECONDS - self._slow_seconds
        slow_late = slow_late and not self.has_few_threads
        lengths = [seconds for seconds in self._lengths if seconds <= left]
        limits: tuple[float | None, ...] = (None,)
        if not self.has_few_threads:
            limits = (None, self.in_time(max(lengths, default=0.0)))
        forms = [(t, seconds) for seconds in lengths for t in limits if self.may_take(seconds)]
        if slow_late and self._gives_up:
            if self.rpc_timeout is not None:
                long = _OUTLASTS * self.rpc_timeout
                # A program has one of them at most, because each takes a second to run.
                some = (*(None,) * _ENDED, self.in_time(long))
                forms += [(timeout, long) for timeout in some if long <= left]
            longer = (*(_LATE,) * 3, *self._lengths[len(_SECONDS) :])
            forms += [(seconds / 4, seconds) for seconds in longer if seconds <= left]
        timeout, seconds = self.pick((*quick * (1 if self._slow else 3), *forms))
        self._slow_seconds += seconds
        if seconds < min(self.limit(timeout), self.limit(None)):
            self._slow_in_time += seconds
        self.slow_functions += seconds > 0
        return timeout, seconds

    def with_sleep(self, options: Sequence[T], times: int) -> tuple[T, float]:
        """One of `options`, and how long each of so many called functions sleeps (virtual seconds).

        Somebody waits for them, perhaps for one after the other.
        """
        left = _MOST_SECONDS - self._slow_seconds
        lengths = [
            seconds
            for seconds in _SECONDS
            if times and seconds * times <= left and self.may_take(seconds * times)
        ]
        if self.has_few_threads or self.slow_functions >= _MOST_SLOW:
            lengths = []
        quick = (0.0,) * (1 if self._slow else 3)
        forms = [(one, seconds) for seconds in (*quick, *lengths) for one in options]
        one, seconds = self.pick(forms)
        self._slow_seconds += seconds * times
        self._slow_in_time += seconds * times
        return one, seconds

    def ends(
        self, at: int, message: MessageType, timeout: float | None, seconds: float = 0.0
    ) -> bool:
        """Whether a timeout ends a call whose function sleeps for so long (virtual seconds)."""
        delay = self.delay_milliseconds(at, message) / 1000
        return self.limit(timeout) < delay + seconds

    def announces(self, name: object, to: int) -> float:
        """Virtual seconds for which a function at `to` waits whose argument is a handle, at least.

        It begins when the owner has answered the fork request of the RRef, which torch tries again.
        Nothing for a value, and where that takes too little to have a timeout in between.
        """
        handle = self.scope.handles.get(name) if isinstance(name, str) else None
        if handle is None or handle.owner in (handle.home, to):
            return 0.0
        request = MessageType.RREF_FORK_REQUEST
        failing, times = self._failing[to]
        if request in failing and times > request.max_retries:
            return 0.0
        waits = retry_wait(times) if request in failing else 0.0
        waits += self.delay_milliseconds(to, request) / 1000
        return waits if waits >= _ENOUGH_TO_MISS else 0.0

    def limit(self, timeout: float | None) -> float:
        """The timeout of a message for which a step names `timeout`."""
        return (self.rpc_timeout or math.inf) if timeout is None else timeout

    def _waits(self, more: float = 0.0, values: int = 0) -> float:
        """Virtual seconds that a default timeout must have at the least to never come.

        Args:
            more: what a further function sleeps.
            values: how many further values wait for another handle.
        """
        retries = _RETRIES if self._may_announce_late else 0.0
        waits = (_MOST_DELAYS * self._longest + retries) * (self.waiting + values)
        return waits + self._slow_in_time + more + CLEARLY_IN_TIME

    def may_wait(self) -> bool:
        """Whether the making of a further value may wait for another handle."""
        return self._waits(values=1) <= self.limit(None)

    def may_take(self, seconds: float) -> bool:
        """Whether a step may take so long (virtual seconds), and no default timeout comes."""
        return self._waits(seconds) <= self.limit(None)

    def may_leave(self) -> bool:
        """Whether one more function may go on after its caller has given up, until a settle."""
        return self.slow_functions < _MOST_SLOW

    def may_end_late(self) -> bool:
        """Whether a timeout may end before the function that it is for."""
        return self._gives_up and not self.has_few_threads and self.may_leave()

    def unsure(self) -> list[str]:
        """Handles of which a fetch is predicted, and hardly any other use.

        Their creation times out, or the last step began to make a value that outlasts the default
        timeout.
        """
        made = () if self._latest is None else [name for _, name in self._latest.made]
        may_fail = self._uses_of_uncreated < _MOST_UNCERTAIN
        return [
            name
            for name in self._seen(lambda _: True)
            if (name in made if name in self.lasting else name in self.uncreated)
            and (may_fail or name not in self.uncreated)
        ]

    def note_uncertain(self, name: str) -> None:
        """Note a use of a handle that fails only if torch has marked it by then."""
        self._uses_of_uncreated += name in self.uncreated

    def late_for(self, name: str) -> float | None:
        """A timeout too short for the value of a handle, if the last step began to make it."""
        latest = self._latest
        if not self._gives_up or latest is None or ("handle", name) not in latest.made:
            return None
        return latest.lasts / 4 if latest.lasts in _MINUTES else None

    def _timeouts(
        self, at: int, message: MessageType, *, late: bool, also: float | None = None
    ) -> tuple[float | None, ...]:
        delay = self.delay_milliseconds(at, message)
        if self.has_few_threads:
            return (None,)
        in_time = self.in_time()
        if also is not None:
            return (None, also, in_time)
        if late and delay >= 500:
            short = delay // 2 / 1000
            return (None, short, short, in_time)
        return (None, None, None, in_time)

    def in_time(self, more: float = 0.0) -> float:
        """A timeout that no call exceeds, even if its function sleeps for `more`.

        Besides its own delay, a call may wait for the retries of a fork request, and for the
        delays of that request, its accept, a fetch and a delete. The same holds for its argument,
        which may also be made by slow functions. Where threads are few, it may wait for all that
        keeps one busy.
        """
        if self.has_few_threads:
            return _LONGEST_QUEUE
        waits = (5 * self._longest + _RETRIES) * self.waiting
        return float(math.ceil(waits + self._slow_seconds + more) + _IN_TIME)

    def delay_milliseconds(self, at: int, message: MessageType) -> int:
        """Whole milliseconds by which the plan delays such a message of `at`."""
        return self._delaying[at].get(message, 0)

    def delays_for(self, milliseconds: int) -> bool:
        """Whether the plan delays some message by just so many milliseconds."""
        return any(milliseconds in late.values() for late in self._delaying)

    def may_fail(self, at: int, messages: Iterable[MessageType]) -> bool:
        """Whether the plan fails one of these messages at `at`."""
        return not self._failing[at][0].isdisjoint(messages)


def _longest_delay(faults: Iterable[Fault]) -> float:
    return max((fault.seconds for fault in faults if fault.blocks_sender), default=0.0)


@functools.lru_cache(maxsize=64)
def _choices(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the first number of a step chooses from, and the kinds among it that may come first."""
    return kinds, _comes_first(kinds)


@functools.lru_cache(maxsize=64)
def _more_often(kinds: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
    """The indices of kinds that are to come often, and which part of the unshared draws each has.

    By weights, and not by further numbers: of two numbers for one kind, Hypothesis may end at the
    higher one, and then it does not find that of the kind that takes its place.
    """
    times = Counter(_as_often(kinds, "often"))
    total = 2 + len(kinds) + times.total()
    return tuple((kinds.index(kind), number / total) for kind, number in times.items())


@functools.lru_cache(maxsize=64)
def _ranks(
    world_size: int,
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """For each rank: the others; and all ranks, the first other one first, then itself."""
    ranks = range(world_size)
    others = tuple(tuple(other for other in ranks if other != rank) for rank in ranks)
    return others, tuple((*o[:1], rank, *o[1:]) for rank, o in enumerate(others))


@functools.lru_cache(maxsize=4096)
def _going_on(
    kinds: tuple[str, ...], on: frozenset[str], but: str, again: str, times: int = 0
) -> tuple[tuple[int, float], ...]:
    """The indices of kinds that go on with an RRef, or that make one, each with its share.

    Args:
        on: the kinds that are drawn.
        but: a kind that does not go on now.
        again: a kind that comes more often, because the step before is one; or "makers".
        times: how many times as often as the rest that is.
    """
    often: dict[str, float]
    if again == "makers":
        # The first kind is always on, and the others seldom.
        often = {kind: 1.0 + (kind != kinds[0]) for kind in _makers(kinds)}
    else:
        often = {kind: float(STEP_TYPES[kind].goes_on) for kind in kinds if kind != but}
    most = sum(often.values())
    often = {kind: number for kind, number in often.items() if number and kind in on}
    if again in often:
        often[again] += times * sum(often.values()) / most
    total = sum(often.values())
    return tuple((kinds.index(kind), number / total) for kind, number in often.items())


def _as_often(kinds: tuple[str, ...], number: str) -> tuple[str, ...]:
    """The kinds, each so many times as an attribute of its class says."""
    times = {kind: int(getattr(STEP_TYPES[kind], number)) for kind in kinds}
    return tuple(
        kind for time in range(max(times.values())) for kind in kinds if times[kind] > time
    )


@functools.lru_cache(maxsize=64)
def _makers(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds that make a handle, and need none."""
    return tuple(filter(makes_handle, _comes_first(kinds)))


def makes_handle(kind: str) -> bool:
    """Whether a step of that kind may make a handle."""
    cls = STEP_TYPES[kind]
    return "out" in cls.__dataclass_fields__ and cls.makes.get("out") == "handle"


@functools.lru_cache(maxsize=8)
def _aimable(kinds: tuple[type[Step], ...]) -> list[type[Step]]:
    """The kinds that may make a rank send a given message, in the order in which to try them."""
    able = [cls for cls in kinds if cls.ways.__func__ is not Step.ways.__func__]  # type: ignore[attr-defined]
    return sorted(able, key=_aim_order)


def _aim_order(cls: type[Step]) -> tuple[int, float]:
    return cls.aim_order, math.inf if cls.order is None else cls.order


def _new_names(leaves: Iterable[Leaf], began: _Names) -> dict[str, str]:
    """New names for what `leaves` make, in the order of the leaves."""
    names = _Names(began)
    return {name: names.next(sort) for leaf in leaves for sort, name in leaf.made}
