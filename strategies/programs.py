"""Strategies for programs: what the ranks do, alone or together with their fault plan.

Nothing here runs anything. Every drawn program is valid, and names are given in the order in which
the program makes things: handles are a, b, …, futures f0, f1, …, contexts x0, x1, …. Values are
small whole numbers, so float64 arithmetic on them is exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import strategies as st

from rpcprops._given import argument
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.programs import MAX_WORKER_THREADS, MAX_WORLD_SIZE, End, Program, Shutdown
from rpcprops.steps import STEP_TYPES
from rpcprops.strategies._checks import checked_facts, whole_number
from rpcprops.strategies._weighted import Below, Weighted
from rpcprops.strategies.drawing import (
    PARALLEL,
    TIMEOUTS,
    StepDrawer,
    checked_kinds,
    makes_handle,
)
from rpcprops.strategies.faults import fault_plans
from rpcprops.strategies.late import Late, waits_of
from rpcprops.torch_facts import TorchFacts

_MAX_WORLD_SIZE = 8
_MAX_STEPS = 16
_MOST_STEPS = 64
#: In one of so many programs called functions may sleep for minutes, which takes long to run.
_FEW = 20
#: The default timeouts of programs. Most have none, because the clock is slower for the others.
_DEFAULTS = (*(None,) * 6, TIMEOUTS[1], TIMEOUTS[0])
#: The threads of programs' ranks, small numbers more often. A program that needs more gets those.
_THREADS = (*(None,) * 60, *(1,) * 10, *(2,) * 3, *(3, 3), *range(4, MAX_WORKER_THREADS + 1))
#: How programs end, and who comes late. Most end as usual, for that is how what they hold is given
#: back.
_USUALLY: tuple[Shutdown, Late] = ("graceful", "")
_ENDS: tuple[tuple[Shutdown, Late], ...] = (
    *(_USUALLY,) * 5,
    ("graceful", "one"),
    ("twice", ""),
    ("at once", ""),
    ("timeout", ""),
    ("timed out", "one"),
    ("graceful", "others"),
    ("at once", "one"),
    ("timed out", "others"),
    ("graceful", "some"),
    ("at once", "some"),
    ("timed out", "some"),
)


#: How often a program has a single rank, compared with any other number of ranks: there is little
#: that it can do.
_ALONE = 0.3


def _end(
    how: Shutdown,
    waits: tuple[float, ...],
    world_size: int,
    plan: FaultPlan | None,
    *,
    free: bool,
    ignores_leaks: bool,
) -> End:
    """An end of a program of so many ranks.

    Args:
        free: whether the threads of all ranks are certainly free for what a shutdown must do.
        ignores_leaks: whether owners do so, if they shut down at once.
    """
    if how == "at once" and not free:
        how = "graceful"
    if not (free and _is_in_time(End(how, waits), world_size, plan)):
        how = "timeout" if how == "timed out" else how
    return End(how, waits, ignores_leaks=ignores_leaks and how == "at once")


def _is_in_time(end: End, world_size: int, plan: FaultPlan | None) -> bool:
    """Whether the plan lets all that a shutdown does come in time."""
    if plan is None:
        return end.timeout is None
    call, delete = (
        max(plan.table(rank).messages_to_delay.get(one, 0.0) for rank in range(world_size))
        for one in (MessageType.PYTHON_CALL, MessageType.RREF_USER_DELETE)
    )
    return end.is_in_time(call, delete, _MAX_STEPS)


def programs(  # noqa: PLR0913 - what a program is drawn for
    *,
    min_world_size: int = 1,
    max_world_size: int = _MAX_WORLD_SIZE,
    min_steps: int = 1,
    max_steps: int = _MAX_STEPS,
    kinds: Iterable[str] | None = None,
    branches: bool = True,
    settles: bool | None = None,
    plan: FaultPlan | FaultTable | None = None,
    facts: TorchFacts | None = None,
) -> st.SearchStrategy[Program]:
    """A program: steps of many kinds over some ranks; each step may follow the earlier ones.

    Each draw omits some kinds of step, so that the others come often enough to interact.

    Shrinks to fewer steps, to fewer and lower ranks, to steps that run one after another, and to
    the kinds of step and arguments that are easiest to understand.

    Args:
        min_world_size: the fewest ranks. A plan that names higher ranks raises it.
        max_world_size: the most ranks.
        min_steps: the fewest steps; steps in branches are counted one by one.
        max_steps: the most steps, counted in the same way.
        kinds: the kinds of step to draw, by their ``op``, such as ``("remote", "fetch")`` (None:
            all). At least one must need no earlier step; a fetch, for example, needs a handle.
        branches: whether steps may run at once, as the branches of a Parallel.
        settles: whether the program settles before it shuts down (None: either).
        plan: the faults that the program is for. It then prefers steps whose messages these can
            affect. Its timeouts are shorter than a delay, or than a called function sleeps, by at
            least 0.25 s, or longer by at least 600 s (virtual). FaultPlan(): for a run without
            faults. None: the same, whatever the plan delays; so its timeouts are long, of some
            hours, and it has no default timeout.
        facts: what is known of the torch that is to run it (None: that of the installed one). What
            meets its findings (docs/findings.md) is seldom drawn, or never.

    Raises:
        UsageError: a number is no int within its bounds, or the minimum is above the maximum;
            `kinds` is no collection of names of steps, or none of them can come first; `branches`
            is no bool, or `settles` neither that nor None; `plan` is no plan, or names ranks that
            `max_world_size` excludes; `facts` is no TorchFacts.
    """
    least, most = _world_sizes(min_world_size, max_world_size)
    faults = _plan(plan)
    if faults is not None and faults.by_rank:
        needed = max(faults.by_rank) + 1
        if needed > most:
            msg = (
                f"{argument('max_world_size', max_world_size)} must be at least {needed}, for the "
                f"plan names rank {needed - 1}; raise it, or take the rank out of by_rank."
            )
            raise UsageError(msg)
        least = max(least, needed)
    draw_program = _program_drawer(min_steps, max_steps, kinds, branches, settles, facts)
    return _programs(least, most, faults, draw_program)


def programs_under_faults(  # noqa: PLR0913 - those of fault_plans and of programs
    *,
    min_world_size: int = 1,
    max_world_size: int = _MAX_WORLD_SIZE,
    tables: st.SearchStrategy[FaultTable] | None = None,
    max_faulty_ranks: int | None = None,
    min_steps: int = 1,
    max_steps: int = _MAX_STEPS,
    kinds: Iterable[str] | None = None,
    branches: bool = True,
    settles: bool | None = None,
    facts: TorchFacts | None = None,
) -> st.SearchStrategy[tuple[Program, FaultPlan]]:
    """A plan, and a program drawn for it: the two arguments of :func:`rpcprops.run`.

    Shrinks both together, to fewer ranks, faults and steps, as :func:`fault_plans` and
    :func:`programs` do, which get the arguments.

    Args:
        min_world_size: the fewest ranks.
        max_world_size: the most ranks.
        tables: what each faulty rank's table is drawn from (None: :func:`fault_tables`).
        max_faulty_ranks: the most ranks with faults in a draw (None: all).
        min_steps: the fewest steps.
        max_steps: the most steps.
        kinds: the kinds of step to draw, by their ``op`` (None: all).
        branches: whether steps may run at the same time.
        settles: whether the program settles before it shuts down (None: either).
        facts: what is known of the torch that is to run it (None: that of the installed one). What
            meets its findings (docs/findings.md) is seldom drawn, or never.

    Raises:
        UsageError: as :func:`fault_plans` and :func:`programs` say.
    """
    least, most = _world_sizes(min_world_size, max_world_size)
    plans = [
        fault_plans(world_size=size, tables=tables, max_faulty_ranks=max_faulty_ranks)
        for size in range(least, most + 1)
    ]
    draw_program = _program_drawer(min_steps, max_steps, kinds, branches, settles, facts)
    return _programs_under_faults(least, plans, draw_program)


def _world_sizes(min_world_size: object, max_world_size: object) -> tuple[int, int]:
    remedy = f"a program runs on 1 to {MAX_WORLD_SIZE} ranks"
    bounds: dict[str, Any] = {"least": 1, "most": MAX_WORLD_SIZE, "remedy": remedy}
    least = whole_number(min_world_size, "min_world_size", **bounds)
    most = whole_number(max_world_size, "max_world_size", **bounds)
    _ordered("world_size", least, most)
    return least, most


def _plan(value: object) -> FaultPlan | None:
    if value is None or isinstance(value, FaultPlan):
        return value
    if isinstance(value, FaultTable):
        return FaultPlan(default=value)
    msg = (
        f"{argument('plan', value)} must be a FaultPlan, a FaultTable for every rank, or None; "
        "write "
        f"programs_under_faults(...) to draw the plan as well."
    )
    raise UsageError(msg)


def _ordered(name: str, least: int, most: int) -> None:
    if least > most:
        msg = (
            f"{argument(f'min_{name}', least)} must not be above max_{name}={most!r}; lower it, or "
            f"raise max_{name}."
        )
        raise UsageError(msg)


#: The first `order` of the further kinds; each ten of them is a family.
_FURTHER = 30


def _groups(kinds: Iterable[str]) -> list[list[str]]:
    """The kinds that are on or off together: a further family, or one other kind."""
    groups: dict[int | str, list[str]] = {}
    for kind in kinds:
        order = STEP_TYPES[kind].order or 0
        groups.setdefault(int(order // 10) if order >= _FURTHER else kind, []).append(kind)
    return list(groups.values())


def _of_rrefs(kinds: Iterable[str]) -> bool:
    """Whether one of these kinds makes an RRef, or goes on with one."""
    return any(STEP_TYPES[kind].goes_on or makes_handle(kind) for kind in kinds)


_DrawProgram = Callable[[st.DrawFn, int, FaultPlan | None], Program]


def _program_drawer(
    min_steps: object,
    max_steps: object,
    kinds: object,
    branches: object,
    settles: object,
    facts: object,
) -> _DrawProgram:
    """Check the arguments; returns a function that draws a program for a number of ranks."""
    remedy = f"a program drawn has up to {_MOST_STEPS} steps; write a longer one yourself"
    least = whole_number(min_steps, "min_steps", least=0, most=_MOST_STEPS, remedy=remedy)
    most = whole_number(max_steps, "max_steps", least=0, most=_MOST_STEPS, remedy=remedy)
    _ordered("steps", least, most)
    drawn = checked_kinds(kinds)
    for name, value in (("branches", branches), ("settles", settles)):
        if not isinstance(value, bool) and not (name == "settles" and value is None):
            also = ", or None for either" if name == "settles" else ""
            msg = f"{argument(name, value)} must be a bool; write True or False{also}."
            raise UsageError(msg)
    known = checked_facts(facts)
    groups = _groups(drawn)
    if branches:
        drawn = (*drawn, PARALLEL)
    # Bytes, for of the numbers below a large one Hypothesis mostly draws small ones, whose high
    # bits are 0. They hold two bits for each group, then 8, 15, two, 16 and two bits.
    many = 7 + len(groups) // 4
    bits = st.binary(min_size=many, max_size=many)
    others = sum(1 << bit for bit, group in enumerate(groups) if not _of_rrefs(group))
    settled_or_not = (True, True, True, False) if settles is None else (bool(settles),)
    # One number for all, as below.
    forms = list(itertools.product(_ENDS, _DEFAULTS, settled_or_not))

    def draw_program(draw: st.DrawFn, world_size: int, plan: FaultPlan | None) -> Program:
        # One choice, because each further one that all programs take makes shrinking harder.
        number = int.from_bytes(draw(bits), "little")
        (how, late), rpc_timeout, settled = forms[draw(_forms(len(forms)))]
        more = number >> 2 * len(groups)
        # Half of the groups are off, and a quarter of those that make or use RRefs: what meets at
        # one RRef needs several of these.
        some = number & (number >> len(groups) | others)
        threads = _THREADS[(more >> 8) % (1 << 15) % len(_THREADS)]
        waits = waits_of(late, more >> 25 & 0xFFFF, world_size)
        # Ranks that shut down at once while calls are under way need threads that are free.
        hasty = how == "at once" and not settled and threads is None
        steps = StepDrawer(
            draw,
            world_size,
            kinds=drawn,
            off=[kind for bit, group in enumerate(groups) if some >> bit & 1 for kind in group],
            plan=plan,
            # What is under way at such an end is known as little as before a settle.
            settles=settled or (hasty and settles is None),
            facts=known,
            # Not where a default timeout makes the rate slow, nor where only the shutdown, which
            # waits for 100 s, comes after them.
            minutes=settled and rpc_timeout is None and more % (1 << 8) % _FEW == _FEW - 1,
            rpc_timeout=rpc_timeout,
            threads=threads,
            goes_on=bool(more >> 23 & 1),
            slow=bool(more >> 24 & 1) or hasty,
            ends_at_once=how == "at once" and (settled or (hasty and settles is None)),
        )
        # Drawn last, so that only steps follow it; Hypothesis then also tries to keep other steps
        # than the first ones.
        size = least + draw(_sizes(most - least))
        maybe, surely = (_NextStep(steps, most, must=must) for must in (False, True))
        for left in range(size, 0, -1):
            draw(surely if steps.count + left <= least else maybe)
        while steps.count < least:
            # The start of a parallel step is not itself a step.
            draw(surely)
        steps.close()
        if steps.may_run_out(most - steps.count):
            steps.run_out()
        threads = steps.threads_of_ranks
        free = threads is None and steps.scope.members is None
        if settles is None and not settled and not (how == "at once" and free):
            settled = how == "at once" or steps.overtakes
        return Program(
            world_size,
            tuple(steps.steps),
            settles=settled,
            rpc_timeout=steps.default_timeout,
            num_worker_threads=threads,
            end=_end(
                how,
                waits,
                world_size,
                plan,
                free=settled or free,
                ignores_leaks=more >> 41 & 3 == 3,
            ),
        )

    return draw_program


# Each of these has a class of its own, for Hypothesis copies what it drew for one strategy into the
# place of another of the same class. So a program would often have as many steps as a fault is
# drawn late by, which is mostly 0, or as few ranks.


class _Size(Weighted):
    """How many steps more than the fewest."""


class _World(Weighted):
    """How many ranks more than the fewest."""


class _Form(Below):
    """How a program ends, its default timeout, and whether it settles."""


@functools.lru_cache(maxsize=64)
def _sizes(most: int) -> st.SearchStrategy[int]:
    """A number up to `most`, larger ones more often: many bugs need several steps."""
    return _Size(0, most, {size: 1.0 + size for size in range(most + 1)})


@functools.lru_cache(maxsize=64)
def _worlds(least: int, number: int) -> st.SearchStrategy[int]:
    """How many more ranks than `least`, below `number`."""
    alone = {0: _ALONE} if least == 1 else {}
    return _World(0, number - 1, dict.fromkeys(range(number), 1.0) | alone)


@functools.lru_cache(maxsize=8)
def _forms(number: int) -> st.SearchStrategy[int]:
    return _Form(number)


class _NextStep(st.SearchStrategy[None]):
    """Draws the next step of a program.

    A strategy for each step, so that Hypothesis knows where each step begins and ends. Of the
    numbers in it, it need not know that: each is drawn alone, and that takes time.
    """

    def __init__(self, steps: StepDrawer, most: int, *, must: bool) -> None:
        super().__init__()
        self._steps = steps
        self._most = most
        self._must = must

    def __repr__(self) -> str:
        return "a step"

    def do_draw(self, data: Any) -> None:
        """Draw it."""
        self._steps.draw = lambda strategy: strategy.do_draw(data)
        self._steps.add(room=self._most - self._steps.count, must=self._must)


@st.composite
def _programs(
    draw: st.DrawFn, least: int, most: int, plan: FaultPlan | None, draw_program: _DrawProgram
) -> Program:
    return draw_program(draw, least + draw(_worlds(least, most - least + 1)), plan)


@st.composite
def _programs_under_faults(
    draw: st.DrawFn,
    least: int,
    plans: list[st.SearchStrategy[FaultPlan]],
    draw_program: _DrawProgram,
) -> tuple[Program, FaultPlan]:
    extra = draw(_worlds(least, len(plans)))
    plan = draw(plans[extra])
    return draw_program(draw, least + extra, plan), plan
