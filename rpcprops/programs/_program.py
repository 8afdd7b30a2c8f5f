"""A program: steps over so many ranks, refused when made if they cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rpcprops.errors import UsageError
from rpcprops.programs._scope import Scope
from rpcprops.programs._steps import Leaf, Parallel, Step

MAX_WORLD_SIZE = 16


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over `world_size` ranks. The last step is followed by a settle and a graceful shutdown,
    unless `settles` is false: then shutdown comes straight after the last step, and must itself
    clean up what is left.

    Raises:
        UsageError: a step names a rank outside the world, or a handle or context that does not
            exist (any more) at its rank.
    """

    world_size: int
    steps: tuple[Step, ...] = ()
    name: str = ""
    settles: bool = True

    def __post_init__(self) -> None:
        check_world_size(self.world_size)
        object.__setattr__(self, "steps", tuple(self.steps))
        scope = Scope(self.world_size)
        for index, step in enumerate(self.steps):
            try:
                scope.add(step)
            except UsageError as error:
                msg = f"step {index}, {step!r}: {error}"
                raise UsageError(msg) from None

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every step that a rank runs, in order, those of parallel branches one after the other.

        Outcomes and violations count steps by their place here.
        """
        found: list[Leaf] = []
        for step in self.steps:
            if isinstance(step, Parallel):
                for branch in step.branches:
                    found += branch
            else:
                found.append(step)
        return tuple(found)

    @property
    def numbered(self) -> tuple[tuple[int, Step], ...]:
        """Each step with the number of its first leaf."""
        found: list[tuple[int, Step]] = []
        number = 0
        for step in self.steps:
            found.append((number, step))
            number += sum(map(len, step.branches)) if isinstance(step, Parallel) else 1
        return tuple(found)

    def without(self, index: int) -> Program:
        """This program less one of its `leaves`, and less whatever cannot be without it."""
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


def check_world_size(world_size: object) -> int:
    """`world_size` if it is an int in 1 to 16.

    Raises:
        UsageError: it is not.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        msg = f"world_size={world_size!r} (type {type(world_size).__name__}) must be an int."
        raise UsageError(msg)
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        msg = f"world_size={world_size!r} must lie in 1 to {MAX_WORLD_SIZE}."
        raise UsageError(msg)
    return world_size
