"""Runs an artefact again: whether it still fails, and which of its faults that needs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rpcprops._kinds import Again, Kind, kind_of
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.report.artefact import Artefact, read
from rpcprops.runner import RunAfter, Runner

Answer = Literal["reproduced", "changed", "fixed", "fails", "holds", "not repeated"]


@dataclass(frozen=True)
class Replay:
    """What the runs of a replay showed.

    Attributes:
        seen: the promises that each run broke (for a test: the type of its exception).
        without: the faults that were left out, by name.
        clock_problem: why pytest's ranks ran in real time though nobody asked for it; else empty.
        not_repeated: for a failure of a used world, why each further run was none: the programs
            before it did not all run in one world.
    """

    artefact: Artefact
    seen: tuple[tuple[str, ...], ...]
    rate: float = 1.0
    without: tuple[str, ...] = ()
    clock_problem: str = ""
    not_repeated: tuple[str, ...] = ()

    @property
    def times(self) -> int:
        """How many runs there were."""
        return len(self.seen)

    @property
    def failed(self) -> int:
        """How many runs broke the same promise (any promise, if the artefact records none)."""
        if self.artefact.underway:
            return sum(bool(broken) for broken in self.seen)
        return sum(self.artefact.promise in broken for broken in self.seen)

    @property
    def changed(self) -> tuple[str, ...]:
        """The promises that were broken in runs that broke only others."""
        if self.artefact.underway:
            return ()
        return tuple(b[0] for b in self.seen if b and self.artefact.promise not in b)

    @property
    def answer(self) -> Answer:
        """Whether some run broke the same promise, only other promises, or none.

        An artefact of an in-flight example records no promise that could be broken again.
        """
        if self.artefact.underway:
            return "fails" if self.failed else "holds"
        if not self.seen and self.not_repeated:
            return "not repeated"
        if self.failed:
            return "reproduced"
        return "changed" if self.changed else "fixed"

    def __str__(self) -> str:
        where = f" at rate {self.rate:g}"
        if self.without:
            where += f", without {', '.join(self.without)}"
        if self.artefact.underway:
            kinds = Counter(broken[0] for broken in self.seen if broken)
            what = ", ".join(f"{name} in {count}" for name, count in kinds.items()) or "no failure"
            return f"{self.answer}: {what} of {self.times} runs{where}"
        # Nobody has mended what does not show because a fault was left out.
        word = "not shown" if self.without and self.answer == "fixed" else self.answer
        text = f"{word}: {self.artefact.promise} in {self.failed} of {self.times} runs{where}"
        if self.artefact.after:
            text += f", each after {len(self.artefact.after)} other programs in one world"
        for why, count in Counter(self.not_repeated).items():
            text += f"; no such world in {count} more, because of {why}"
        for name, count in Counter(self.changed).items():
            text += f"; {name} instead in {count}"
        return text


@dataclass(frozen=True)
class Need:
    """Whether a failure needs a fault: how often it showed in `times` runs without it.

    There are no such runs if the oracle cannot predict the program without the fault.
    """

    name: str
    failed: int
    times: int

    @property
    def is_needed(self) -> bool:
        """Whether the failure never showed without the fault."""
        return not self.failed

    def __str__(self) -> str:
        if not self.times:
            return f"{self.name}: needed (nobody can tell what is right without it)"
        word = "needed" if self.is_needed else "not needed"
        return f"{self.name}: {word} (fails in {self.failed} of {self.times} without it)"


def check_faults(artefact: Artefact, names: Sequence[str]) -> tuple[str, ...]:
    """`names` if the artefact has faults of all those names.

    Raises:
        UsageError: it does not; the message lists the faults that it has.
    """
    known = artefact.fault_names
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none (it fails without any)"
            msg = f"the artefact has no fault {name!r}; it has: {listed}."
            raise UsageError(msg)
    return tuple(dict.fromkeys(names))


def needed(
    artefact: Artefact,
    run: Callable[[Sequence[str]], Replay],
    without: Sequence[str] = (),
    on_need: Callable[[Need], None] | None = None,
    *,
    seconds: float = math.inf,
) -> tuple[Need, ...]:
    """Leave out each fault in turn, on top of `without`; finally all unneeded ones at once.

    Args:
        run: runs the artefact without the faults of some names.
        on_need: called with each answer when it is known; the unneeded faults together come last,
            their names joined by " and ".
        seconds: real seconds after which no other fault is tried.
    """
    found: list[Need] = []
    end = time.monotonic() + seconds

    def tell(names: Sequence[str]) -> None:
        try:
            result = run((*without, *names))
            need = Need(" and ".join(names), result.failed, result.times)
        except UsageError:
            # A creation may then time out or not, so there is no prediction.
            need = Need(" and ".join(names), 0, 0)
        found.append(need)
        if on_need is not None:
            on_need(need)

    for name in artefact.fault_names:
        if name not in without and time.monotonic() < end:
            tell([name])
    spare = [need.name for need in found if not need.is_needed]
    if len(spare) > 1 and time.monotonic() < end:
        tell(spare)
    return tuple(found)


def replay_program(
    artefact: Artefact,
    runner: Runner,
    *,
    times: int,
    without: Sequence[str] = (),
    on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    **options: Any,
) -> Replay:
    """Run the program of an artefact `times` times.

    Args:
        without: names of faults to leave out.
        on_run: called after each run with its number and the promises that it broke.
        options: `clock`, as for :func:`rpcprops.run`.

    Raises:
        UsageError: the artefact is of a test, not of a program, or does not have those faults.
    """
    if artefact.program is None:
        msg = f"the artefact is of the test {artefact.subject}, which pytest replays."
        raise UsageError(msg)
    dropped = check_faults(artefact, without)
    plan = artefact.plans[0].without(dropped, artefact.program.world_size)
    observe = kind_of(artefact.kind).observer(runner, artefact, plan)
    options.setdefault("transport", artefact.transport)
    options.setdefault("agent", artefact.agent)
    result = Replay(artefact, (), without=dropped)
    for number in range(times):
        if artefact.after:
            ran = _run_after(artefact, runner, plan, **options)
            violations, outcome = ran.violations, ran.outcome
            if ran.why_not:
                result = replace(result, not_repeated=(*result.not_repeated, ran.why_not))
                continue
        else:
            observed = observe(anew=True, **options)
            violations, outcome = observed.violations, observed.outcome
        promises = tuple(dict.fromkeys(v.promise for v in violations))
        result = replace(result, seen=(*result.seen, promises), rate=outcome.clock_rate)
        if on_run is not None:
            on_run(number, promises)
    return result


def _run_after(artefact: Artefact, runner: Runner, plan: FaultPlan, **options: Any) -> RunAfter:
    """Run the program of an artefact in a world that runs those first that it had run then."""
    assert artefact.program is not None
    before = tuple((one.program, one.plan) for one in artefact.after)
    size = artefact.sizes[0]
    return runner.run_after(before, artefact.program, plan, world_size=size, **options)


class OfRanks(Kind):
    """A kind that our ranks run, and run again."""

    def replay(
        self,
        artefact: Artefact,
        again: Again,
        without: Sequence[str] = (),
        on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    ) -> Replay:
        """Run it again in fresh ranks, with the chosen clock."""
        runner = again.runner()
        return replay_program(
            artefact,
            runner,
            times=again.times,
            without=without,
            on_run=on_run,
            agent=runner.server.agent,
        )


__all__ = [
    "Need",
    "OfRanks",
    "Replay",
    "check_faults",
    "needed",
    "read",
    "replay_program",
]
