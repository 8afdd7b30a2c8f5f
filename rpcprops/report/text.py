"""Failures and faults in words, for terminals and logs."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from rpcprops._files import COULD_NOT, Unwritten, shown
from rpcprops._kinds import kind_of
from rpcprops.cluster import stacks
from rpcprops.faults import FaultPlan
from rpcprops.oracle import DOCUMENTED, FaultCount
from rpcprops.outcomes import ArmedFaults, Outcome, Violation
from rpcprops.programs import End
from rpcprops.properties import Case, Failure
from rpcprops.report.artefact import Artefact, Earlier

#: The most programs that a failure of a used world names.
_MOST_BEFORE = 5
#: The columns and the most lines of code that is only an example.
_WIDTH = 100
_MOST_LINES_OF_CODE = 3


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where that is due."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def describe_plan(plan: FaultPlan, world_size: int, armed: Sequence[ArmedFaults] = ()) -> list[str]:
    """The plan as Python and the ranks to which it applies; then what was armed for a part."""
    if armed and not plan.faulty_ranks(world_size):
        return describe_armed(armed)
    return [*_describe_plan(plan, world_size), *describe_armed(armed)]


def describe_armed(armed: Sequence[ArmedFaults]) -> list[str]:
    """The faults that were armed for a part of the run, and when that began and ended."""
    lines: list[str] = []
    for part, one in enumerate(armed, 1):
        ends = "its end" if one.ends is None else f"{one.ends:.4g}"
        when = f"from {one.begins:.4g} to {ends} virtual s after the start"
        lines += [f"faults   armed for part {part} of the run, {when}:", f"         {one.plan!r}"]
    return lines


def _describe_plan(plan: FaultPlan, world_size: int) -> list[str]:
    ranks = plan.faulty_ranks(world_size)
    if not ranks:
        where = "no rank is faulty: it fails without any fault"
    elif len(ranks) == world_size:
        where = f"faults at every rank of {world_size}"
    else:
        noun = "ranks" if len(ranks) > 1 else "rank"
        where = f"faults at {noun} {', '.join(map(str, ranks))} of {world_size}"
    return [f"faults   {plan!r}", f"         {where}"]


def describe_faults(counts: Sequence[FaultCount]) -> list[str]:
    """Which faults fired where, one line each."""
    lines: list[str] = []
    for count in counts:
        if not count.fired and not count.eligible:
            continue
        what = count.message or "types not told apart"
        seen = "not visible here" if count.fired is None else f"{count.fired} fired"
        # The model does not know of all messages that a fault of single messages may be for.
        could = count.eligible
        able = "" if could is None or could < (count.fired or 0) else f" of {could} that could"
        part = f", part {count.part}" if count.part else ""
        lines.append(f"         rank {count.rank}{part}: {count.kind} {what}: {seen}{able}")
    return ["fired    " + lines[0].strip(), *lines[1:]] if lines else ["fired    nothing"]


def describe_violations(violations: Iterable[Violation]) -> list[str]:
    """The violations, one sentence each."""
    return [f"broken   {violation}" for violation in violations]


def describe_case(case: Case) -> str:
    """A case as Python, on one line."""
    program = case.program
    steps = ", ".join(map(repr, program.steps))
    rest = "" if program.settles else ", settles=False"
    if program.rpc_timeout is not None:
        rest += f", rpc_timeout={program.rpc_timeout!r}"
    if program.num_worker_threads is not None:
        rest += f", num_worker_threads={program.num_worker_threads!r}"
    if program.end != End():
        rest += f", end={program.end!r}"
    return f"Program({program.world_size}, ({steps},){rest}) under {case.plan!r}"


def describe_accepted(kind: str, examples: int, of: int, case: str) -> list[str]:
    """A documented effect: in how many examples it was seen, what it is, and one of them.

    With what torch's documentation says of it, if it does. A long example is shortened.
    """
    documented = DOCUMENTED[kind]
    note = "; a user would call it a defect of torch" if documented.is_defect else ""
    return [
        f"accepted {kind}, in {examples} of {of} examples{note}",
        f"         {documented.sentence}",
        *([f"         torch: {documented.allowed_by}"] if documented.quote else []),
        *_shortened(f"         such as {case}", " " * 17),
    ]


def _shortened(line: str, indent: str) -> list[str]:
    """Code in a few lines of an ordinary terminal."""
    return textwrap.wrap(
        line,
        _WIDTH,
        subsequent_indent=indent,
        max_lines=_MOST_LINES_OF_CODE,
        placeholder=" … (--json FILE has the whole of it)",
        break_long_words=False,
        break_on_hyphens=False,
    )


def describe_end(outcome: Outcome) -> list[str]:
    """Ranks that did not exit as they should, the stacks of a hang, and a record that is full."""
    lines: list[str] = []
    for rank in outcome.ranks:
        if rank.signal or rank.exit_code:
            lines.append(f"ended    {rank.name}: {rank.describe_end()}")
        if rank.stack:
            lines.append(f"stack    {rank.name}:")
            lines += [f"         {line}" for line in rank.stack.strip().splitlines()]
    if outcome.messages_dropped:
        lines.append(f"messages {outcome.describe_dropped()}")
    return lines


def describe_where(outcome: Outcome, said: str = "") -> list[str]:
    """How ranks ended that did not exit well, and where in the user's code they were.

    Args:
        said: the text of the error that is shown next to these lines, and need not be repeated.
    """
    lines: list[str] = []
    for rank in outcome.ranks:
        end = rank.describe_end()
        if (rank.signal or rank.exit_code) and end not in said:
            lines.append(f"ended    {rank.name}: {end}")
        at = [line for line in stacks.where(rank.name, rank.stack) if line.strip() not in said]
        if at:
            lines += [f"at       {at[0]}", *(f"         {line}" for line in at[1:])]
    return lines


def describe_logs(outcome: Outcome) -> list[str]:
    """What each rank wrote."""
    lines: list[str] = []
    for rank in outcome.ranks:
        lines.append(f"log      {rank.name}:")
        lines += [f"         {line}" for line in rank.log.splitlines()]
    return lines


def replay_line(artefact: Path | Unwritten | str) -> str:
    """The command that runs an artefact again, or a line that says why there is none.

    Args:
        artefact: what :func:`rpcprops.report.artefact.write_or_say` returned, or its text.
    """
    if str(artefact).startswith(COULD_NOT):
        return str(artefact)
    return f"rpcprops replay {shlex.quote(str(shown(Path(str(artefact)))))}"


def failure_lines(failure: Failure, path: Path | Unwritten | str | None) -> list[str]:
    """All that a reader must know about a property's failure."""
    case = failure.case
    kind = kind_of(case.kind)
    lines = [
        *kind.foreword,
        *describe_violations(failure.violations),
        *describe_plan(case.plan, case.program.world_size),
        *kind.describe(failure.property, case.program),
        *describe_faults(failure.faults),
        *describe_end(failure.outcome),
        *_describe_before(failure),
        f"repeats  {', '.join(map(str, failure.repeats)) or 'not tried'}",
    ]
    lines += [f"redraw   {line}" for line in failure.reproduction]
    if path is not None:
        lines.append(f"replay   {replay_line(path)}")
    return lines


def artefact_of(failure: Failure) -> Artefact:
    """The artefact of a property's failure."""
    case = failure.case
    return Artefact(
        kind=case.kind,
        subject=failure.property,
        promise=failure.promise,
        head=tuple(failure_lines(failure, None)),
        program=case.program,
        plans=(case.plan,),
        outcomes=(failure.outcome,),
        violations=failure.violations,
        clock_rate=failure.outcome.clock_rate,
        transport=failure.outcome.transport,
        repeats=tuple(map(str, failure.repeats)),
        after=tuple(Earlier(program, plan) for program, plan in failure.after),
    )


def _describe_before(failure: Failure) -> list[str]:
    """Which programs had run in its world; nothing if fresh ranks have shown the failure."""
    if not failure.after:
        return []
    number = len(failure.after)
    lines = [f"world    only ranks that had run {counted(number, 'program')} before showed it"]
    for place, (program, plan) in enumerate(failure.after[-_MOST_BEFORE:], 1):
        which = number - min(number, _MOST_BEFORE) + place
        lines.append(f"         {which}: {describe_case(Case(program, plan))}")
    if number > _MOST_BEFORE:
        lines.insert(1, f"         the last {_MOST_BEFORE} of them; the artefact has all:")
    return lines
