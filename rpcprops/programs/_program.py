"""A program: steps over a number of ranks, checked when it is made."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, cast, get_type_hints

import msgspec

from rpcprops._given import argument, items, shown
from rpcprops.errors import UsageError
from rpcprops.programs._end import USUAL, End
from rpcprops.programs.scope import Scope, check_timeout
from rpcprops.steps import STEP_TYPES, Leaf, Parallel, Step
from rpcprops.steps.base import rank_name

MAX_WORLD_SIZE = 16
#: Far more than anybody runs: an endless program is refused before it fills the memory.
_MAX_STEPS = 100_000
#: torch's own number.
MAX_WORKER_THREADS = 16
#: Virtual seconds; the most that a cluster accepts.
_LONGEST_TIMEOUT = 1e6


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over `world_size` ranks. The last step is followed by a settle and a graceful shutdown,
    unless `settles` is false: then shutdown comes straight after the last step, and must itself
    clean up what is left.

    `end` says how each rank shuts RPC down, if not by a plain graceful shutdown. After one that
    waits for nobody ("at once") and comes without a settle before it, what is still under way is
    known within bounds (``oracle/_hasty.py``).

    `rpc_timeout` is the default timeout of all that its ranks send, in virtual seconds (torch's own
    is 60); None is a day, which nothing meets. It applies once the ranks have joined.

    `num_worker_threads` is how many threads the agent of each rank has (torch's own number is 16);
    None is as many as a cluster gives, which is 8. What a step needs says
    :mod:`rpcprops.programs.threads`.

    Raises:
        UsageError: a step names a rank outside the world, or a handle or context that does not
            exist (any more) at its rank; or an argument, also of a step, has a wrong type.
    """

    world_size: int
    steps: tuple[Step, ...] = ()
    name: str = ""
    settles: bool = True
    rpc_timeout: float | None = None
    num_worker_threads: int | None = None
    end: End = USUAL

    def __post_init__(self) -> None:
        check_world_size(self.world_size)
        object.__setattr__(self, "steps", _checked_steps(self.steps))
        for name, kind in (("name", str), ("settles", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                msg = f"{argument(name, value)} must be a {kind.__name__}."
                raise UsageError(msg)
        check_timeout("rpc_timeout", self.rpc_timeout)
        if self.rpc_timeout is not None and self.rpc_timeout > _LONGEST_TIMEOUT:
            msg = f"rpc_timeout={shown(self.rpc_timeout)} must be at most {_LONGEST_TIMEOUT:g}."
            raise UsageError(msg)
        _check_threads(self.num_worker_threads)
        self._check_end()
        scope = Scope(self.world_size)
        for index, step in enumerate(self.steps):
            try:
                _check_step(step)
                scope.add(step)
            except UsageError as error:
                msg = f"step {index}, {shown(step)}: {error}"
                raise UsageError(msg) from None
        if self.settles and scope.members is not None:
            msg = (
                "settles=True, but not all ranks are members of the dynamic group at the end; "
                "write settles=False."
            )
            raise UsageError(msg)
        if scope.members is not None and self.end != USUAL:
            msg = f"end={self.end!r}: a dynamic group ends by Member steps; leave it out."
            raise UsageError(msg)

    def _check_end(self) -> None:
        """Raises:
        UsageError: the program cannot end in that way.
        """
        end: object = self.end
        if not isinstance(end, End):
            msg = f"{argument('end', end)} must be an End, such as End('at once')."
            raise UsageError(msg)
        if len(end.waits) > self.world_size:
            msg = f"end={end!r}: there are {self.world_size} ranks, and {len(end.waits)} waits."
            raise UsageError(msg)
        if end.timeout is not None and self.num_worker_threads is not None and not self.settles:
            msg = (
                f"end={end!r} needs settles=True or num_worker_threads=None: functions that go on "
                f"may leave shutdown's own calls no thread before their timeout."
            )
            raise UsageError(msg)
        if self.ends_hastily and self._why_not_hasty:
            msg = f"end={end!r} needs settles=True: {self._why_not_hasty}."
            raise UsageError(msg)

    @property
    def ends_hastily(self) -> bool:
        """Whether its ranks shut RPC down at once while something may be under way."""
        return self.end.how == "at once" and not self.settles

    @property
    def _why_not_hasty(self) -> str:
        """Why nothing is predicted of ranks that shut down at once while calls are under way."""
        if self.founds_group:
            return "who of a dynamic group has left by then is not predicted"
        if self.num_worker_threads is not None:
            return (
                "a shutdown that finds no free thread never ends "
                "(tensorpipe_agent.cpp: TensorPipeAgent::markFutureWithError)"
            )
        return ""

    @property
    def founds_group(self) -> bool:
        """Whether its ranks begin without RPC, and join a dynamic group (see ``Member``)."""
        return bool(self.steps) and self.steps[0].outside_group

    @property
    def gathers(self) -> bool:
        """Whether its ranks meet at a graceful shutdown, by calls to the first rank and back.

        In a static world ``shutdown`` calls ``_wait_all_workers``
        (``torch/distributed/rpc/api.py``).
        """
        return self.end.how != "at once" and not self.founds_group

    def names(self, world_size: int) -> tuple[str, ...]:
        """The names of the ranks of a world, in which the program has the first ranks."""
        dashed = {leaf.at for leaf in self.leaves if getattr(leaf, "dash", False)}
        return tuple(rank_name(rank, dash=rank in dashed) for rank in range(world_size))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every step that a rank runs, in order, those of parallel branches one after the other.

        Outcomes and violations number steps by their place here.
        """
        return tuple(leaf for step in self.steps for leaf in step.leaves)

    @property
    def lasts(self) -> float:
        """Virtual seconds that its steps take at most without any fault, one after the other."""
        return sum(leaf.lasts for leaf in self.leaves)

    @property
    def numbered(self) -> tuple[tuple[int, Step], ...]:
        """Each step with the number of its first leaf."""
        found: list[tuple[int, Step]] = []
        number = 0
        for step in self.steps:
            found.append((number, step))
            number += len(step.leaves)
        return tuple(found)

    def without(self, index: int) -> Program:
        """This program without one of its `leaves`, and without all steps that need that one.

        Raises:
            UsageError: `index` is no int.
        """
        given: object = index
        if isinstance(given, bool) or not isinstance(given, int):
            msg = f"{argument('index', index)} must be an int: the place of a step in leaves."
            raise UsageError(msg)
        number = -1
        scope = Scope(self.world_size)
        kept: list[Step] = []
        for step in self.steps:
            if not isinstance(step, Parallel):
                number += 1
                if number != index and scope.accepts(step):
                    kept.append(step)
                continue
            branches: list[tuple[Leaf, ...]] = []
            for branch in step.branches:
                rest: list[Leaf] = []
                for leaf in branch:
                    number += 1
                    if number != index and scope.fits(Parallel((*branches, (*rest, leaf)))):
                        rest.append(leaf)
                if rest:
                    branches.append(tuple(rest))
            if branches and scope.accepts(Parallel(tuple(branches))):
                kept.append(Parallel(tuple(branches)))
        return replace(self, steps=tuple(kept))

    def __repr__(self) -> str:
        rest: list[str] = []
        if self.name:
            rest.append(f"name={self.name!r}")
        if not self.settles:
            rest.append("settles=False")
        if self.rpc_timeout is not None:
            rest.append(f"rpc_timeout={self.rpc_timeout!r}")
        if self.num_worker_threads is not None:
            rest.append(f"num_worker_threads={self.num_worker_threads!r}")
        if self.end != USUAL:
            rest.append(f"end={self.end!r}")
        if not self.steps:
            return f"Program({', '.join([str(self.world_size), *rest])})"
        lines = [f"{self.world_size},", "("]
        for step in self.steps:
            lines += [f"    {line}" for line in _step_lines(step)]
        lines += ["),", *(f"{item}," for item in rest)]
        return "\n".join(["Program(", *(f"    {line}" for line in lines), ")"])


def _step_lines(step: Step) -> list[str]:
    if not isinstance(step, Parallel):
        return [f"{step!r},"]
    lines = ["Parallel(("]
    for branch in step.branches:
        lines += ["    (", *(f"        {leaf!r}," for leaf in branch), "    ),"]
    return [*lines, ")),"]


def _check_threads(number: object) -> None:
    """Raises:
    UsageError: it is neither None nor an int in 1 to 16.
    """
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int):
        msg = f"{argument('num_worker_threads', number)} must be an int, or None."
        raise UsageError(msg)
    if not 1 <= number <= MAX_WORKER_THREADS:
        msg = f"num_worker_threads={shown(number)} must lie in 1 to {MAX_WORKER_THREADS}."
        raise UsageError(msg)


def _checked_steps(steps: object) -> tuple[Any, ...]:
    must_be = f"a tuple of at most {_MAX_STEPS} steps, such as (Remote(0, 1, 'a'), Fetch(0, 'a'))"
    found = tuple(items("steps", steps, _MAX_STEPS + 1, must_be))
    if len(found) > _MAX_STEPS:
        msg = f"{argument('steps', steps)} must be {must_be}."
        raise UsageError(msg)
    return found


def _check_step(step: object) -> None:
    """Raises:
    UsageError: it is no step, or one of its arguments has a wrong type.
    """
    if type(step) not in STEP_TYPES.values():
        msg = (
            f"{type(step).__name__} is no kind of step; use "
            f"{', '.join(cls.__name__ for cls in STEP_TYPES.values())}."
        )
        raise UsageError(msg)
    step = cast("Step", step)
    if isinstance(step, Parallel):
        branches: object = step.branches
        if not isinstance(branches, tuple) or not all(isinstance(b, tuple) for b in branches):
            msg = f"branches={shown(branches)} must be a tuple of tuples of steps."
            raise UsageError(msg)
        for leaf in step.leaves:
            _check_step(leaf)
        return
    for name, kind in _argument_types(step.op).items():
        value = getattr(step, name)
        try:
            msgspec.convert(value, kind)
            # msgspec accepts a list for a tuple, also in one. We do not, for programs are hashable.
            hash(value)
            is_right = not isinstance(value, frozenset)
        except (msgspec.ValidationError, OverflowError, UnicodeError, TypeError):
            is_right = False
        if not is_right:
            msg = f"{argument(name, value)} must be {_words(kind)}."
            raise UsageError(msg)


@functools.cache
def _argument_types(op: str) -> dict[str, Any]:
    """The types of a step's arguments, except those that :class:`Scope` checks."""
    cls = STEP_TYPES[op]
    hints = get_type_hints(cls)
    checked = ("at", "to", "via", "then", "timeout")
    return {item.name: hints[item.name] for item in fields(cls) if item.name not in checked}


def _words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def check_world_size(world_size: object) -> int:
    """`world_size` if it is an int in 1 to 16.

    Raises:
        UsageError: it is not.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        msg = f"{argument('world_size', world_size)} must be an int."
        raise UsageError(msg)
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        msg = f"world_size={shown(world_size)} must lie in 1 to {MAX_WORLD_SIZE}."
        raise UsageError(msg)
    return world_size
