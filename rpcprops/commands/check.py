"""``rpcprops check``: the shipped properties against the installed torch."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rpcprops import agents
from rpcprops._kinds import kind_of
from rpcprops.commands import stop
from rpcprops.commands.live import Line, compiling, live, out, plain
from rpcprops.commands.shared import (
    COLOURS,
    HOLDS,
    VIOLATED,
    Clock,
    Reuse,
    Transport,
    agent_option,
    check_injects,
    check_json,
    check_transport,
    running,
    say_died,
    say_torch,
    write_json,
)
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.runner import Runner

if TYPE_CHECKING:
    from rpcprops._files import Unwritten
    from rpcprops.properties import Examination, Observation, Property


def check(  # noqa: PLR0913 - one argument for each option
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Properties to check (--list names them); without them, all but the slow ones."
        ),
    ] = None,
    *,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            "-n",
            min=1,
            help="Examples for each property; without it, as the profile says.",
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="dev, ci, nightly or debug: how many examples, how much is said.")
    ] = "dev",
    seed: Annotated[
        int | None, typer.Option(help="A number: the same one draws the same examples.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Make what is accepted because torch documents it (docs/faults.md) a failure.",
        ),
    ] = False,
    clock: Clock = "auto",
    agent: Annotated[
        str | None,
        agent_option(
            "Unless given, the first, and wire for what needs it. With another one, what that "
            "agent cannot do is not run."
        ),
    ] = None,
    reuse: Reuse = None,
    transport: Transport = "tcp",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the verdicts to this file as JSON.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the properties and leave.")
    ] = False,
) -> None:
    """Check the shipped properties against the installed torch, under sampled fault tables.

    The smallest case of each known finding of stock torch (docs/findings.md) is tried until it
    shows.
    """
    from rpcprops.commands.database import Database
    from rpcprops.profiles import PROFILES
    from rpcprops.properties import PROPERTIES
    from rpcprops.report.in_flight import watched
    from rpcprops.report.text import counted

    if list_only:
        _list()
        return
    chosen = [_pick("property", name, PROPERTIES) for name in names or []]
    chosen = chosen or [prop for prop in PROPERTIES.values() if not prop.only_named]
    settings = _pick("profile", f"rpcprops-{profile}", PROFILES)
    count = examples or settings["max_examples"]
    check_transport(transport)
    check_json(json_file)
    if not any(prop.agent or not prop.injects for prop in chosen):
        others = [prop.name for prop in PROPERTIES.values() if not prop.injects]
        what = "these properties need them"
        check_injects(agent, what, f"Others do not, such as {' and '.join(others[:2])}. ")
    unwritten: list[Unwritten] = []
    database = Database(Path(".rpcprops") / "examples", unwritten.append)
    done: list[Examination] = []
    with (
        running(clock, agent, reuse=reuse) as runner,
        watched(runner.server) as in_flight,
        live("check") as line,
    ):
        say_torch(runner)
        say_died()
        _prepare_holding(chosen, agent)
        try:
            for prop in chosen:
                in_flight.begin(prop.name)
                done.append(
                    _examine(
                        prop,
                        runner,
                        line,
                        talks=profile == "debug",
                        max_examples=count,
                        seed=seed,
                        database=database,
                        strict=strict,
                        by_chance=_is_left_to_chance(agent),
                        can_inject=agents.named(runner.server.agent).can_inject,
                        transport=transport,
                    )
                )
                _say(done[-1])
                line.begin("check")
        finally:
            # Report after an interrupt too: what was found is not lost.
            stop.ending()
            write_json(json_file, _report(done, runner))
            if line.what in PROPERTIES:
                out.print(f"[yellow]unfinished[/yellow] {plain(line)}")
            if done:
                out.print(_verdict_table(done))
            for kind, (times, number) in _accepted_in_all(done).items():
                said = f"{kind}: {counted(times, 'time')}, in {counted(number, 'example')}"
                out.print(f"accepted  {plain(said)}")
            for problem in unwritten:
                out.print(f"[yellow]{plain(problem)}[/yellow]")
    raise typer.Exit(HOLDS if all(result.is_good() for result in done) else VIOLATED)


def _is_left_to_chance(agent: str | None) -> bool:
    """Whether an agent is named that holds no messages."""
    from rpcprops.agents.wire import NAME

    return agent is not None and agents.named(agent).name != NAME


def _prepare_holding(chosen: list[Property], agent: str | None) -> None:
    """Compile the agent that some properties and findings need, unless another agent is named."""
    from rpcprops.agents.wire import NAME
    from rpcprops.properties import held_case

    if agent is not None or not any(p.agent or held_case(p.name, 0, 1.0) for p in chosen):
        return
    # Without it these findings are left to chance, and properties that need it say so.
    with contextlib.suppress(MachineCannot):
        agents.named(NAME).prepare(compiling)


def _list() -> None:
    """Print the properties, and the promise of each."""
    from rpcprops.properties import PROPERTIES

    for prop in PROPERTIES.values():
        note = "(takes minutes: only when named) " if prop.only_named else ""
        out.print(f"[bold]{prop.name}[/bold]  {note}{plain(prop.promise)}")


def _examine(
    prop: Property,
    runner: Runner,
    line: Line,
    *,
    talks: bool,
    max_examples: int,
    **options: Any,
) -> Examination:
    """Check one property, which `line` shows; with `talks`, print each example.

    Args:
        options: for `examine`.
    """
    from rpcprops.properties import examine

    line.begin(prop.name, prop.examples_of(max_examples))

    def on_example(so_far: Examination, seen: Observation) -> None:
        note = f"{so_far.faults_fired} faults fired"
        line.update(so_far.examples, note)
        if talks:
            for text in _example_lines(so_far.property.name, seen):
                out.print(f"    {plain(text)}")

    return examine(
        prop,
        runner,
        max_examples=max_examples,
        on_example=on_example,
        on_failing=lambda what: line.update(note=what),
        **options,
    )


def _example_lines(name: str, seen: Observation) -> Iterator[str]:
    """Lines about an example, and what it showed."""
    from rpcprops.report.text import describe_faults, describe_logs, describe_plan

    case = seen.case
    yield from describe_plan(case.plan, seen.outcome.world_size)
    yield from kind_of(case.kind).describe(name, case.program)
    yield from describe_faults(seen.faults)
    yield from describe_logs(seen.outcome)


def _say(result: Examination) -> None:
    """Print a verdict, and further remarks on it."""
    out.print(_verdict_line(result))
    for line in _details(result):
        out.print(f"    {line}")


def _pick(kind: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        names = [key.removeprefix("rpcprops-") for key in known]
        name = name.removeprefix("rpcprops-")
        close = difflib.get_close_matches(name, names, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(names)}."
        msg = f"there is no {kind} {name!r}; {hint}"
        raise UsageError(msg)
    return known[name]


def _words(verdict: str) -> str:
    """A verdict as it is printed: ``not_seen`` becomes "not seen"."""
    return verdict.replace("_", " ")


def _verdict_line(result: Examination) -> str:
    colour = COLOURS[result.verdict]
    if result.status is not None:
        first, *others = result.tries
        tried = [f"{first.failed} of {first.times} tries at rate {first.rate:g}", *map(str, others)]
        said = f"seen in {', '.join(tried)}"
    else:
        said = (
            f"{result.examples:4} examples, {result.compared:2} in real time as well, "
            f"{result.faults_fired:5} faults fired"
        )
    return (
        f"[{colour}]{_words(result.verdict):9}[/{colour}] {result.property.name:27} "
        f"{said}, {result.seconds:6.1f} s"
    )


def _details(result: Examination) -> list[str]:
    """Further remarks on a verdict, with rich's markup."""
    from rpcprops.report.artefact import write_or_say
    from rpcprops.report.text import (
        artefact_of,
        describe_accepted,
        describe_case,
        describe_violations,
        failure_lines,
        replay_line,
    )

    lines: list[str] = []
    finding = result.property.finding
    if result.failure is not None:
        path = write_or_say(artefact_of(result.failure))
        if result.verdict == "known":
            lines += describe_violations(result.failure.violations)
            lines.append(f"replay   {replay_line(path)}")
        else:
            lines += failure_lines(result.failure, path)
    if result.verdict == "known" and finding is not None:
        lines += [f"because  {finding.why}", f"source   {finding.source}"]
    agent = f"{result.agent} makes one message come after another" if result.agent else ""
    lines += [
        f"{word}{said}"
        for word, said in (
            ("agent    ", agent),
            ("examples ", _why_fewer(result)),
            ("reason   ", result.reason),
        )
        if said
    ]
    for name, count in sorted(result.explained.items()):
        if finding is None:
            lines.append(f"known    {name}, met in {count} of {result.examples} examples")
    for one in result.accepted.values():
        case = describe_case(one.case)
        lines += describe_accepted(one.kind, one.examples, result.examples, case)
    shown = [plain(line) for line in lines]
    for doubt in result.doubts:
        word = "failed once" if doubt.once else "unconfirmed"
        shown.append(f"[yellow]{word}[/yellow] {plain(doubt.line)}")
        if doubt.failure is not None:
            path = write_or_say(artefact_of(doubt.failure))
            shown.append(f"replay   {plain(replay_line(path))}")
    return shown


def _why_fewer(result: Examination) -> str:
    """Why there are fewer examples than were asked for, if each one takes long."""
    costs = result.property.costs
    if costs == 1 or not result.examples:
        return ""
    return f"one for each {costs} that were asked for, because each waits for a timeout"


_NUMBERS = ("examples", "compared", "faults fired", "accepted", "seconds")
#: The columns of a terminal in which all of them have room.
_WIDE = 100


def _verdict_table(done: list[Examination]) -> Table:
    table = Table(title="properties", title_justify="left")
    for column in ("property", "verdict"):
        table.add_column(column, no_wrap=True)
    # A narrow terminal gets fewer columns, and no torn words.
    shown = _NUMBERS if out.width >= _WIDE else _NUMBERS[:1]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for result in done:
        colour = COLOURS[result.verdict]
        numbers = (
            str(result.examples),
            str(result.compared),
            str(result.faults_fired),
            str(sum(one.examples for one in result.accepted.values())),
            f"{result.seconds:.1f}",
        )
        verdict = f"[{colour}]{_words(result.verdict)}[/{colour}]"
        table.add_row(result.property.name, verdict, *numbers[: len(shown)])
    return table


def _accepted_in_all(done: list[Examination]) -> dict[str, tuple[int, int]]:
    """For each documented effect: how often it came, and in how many examples."""
    total: dict[str, tuple[int, int]] = {}
    for result in done:
        for kind, one in result.accepted.items():
            times, examples = total.get(kind, (0, 0))
            total[kind] = (times + one.times, examples + one.examples)
    return dict(sorted(total.items()))


def _report(done: list[Examination], runner: Runner) -> dict[str, Any]:
    from rpcprops._json import to_json
    from rpcprops.oracle import accepted_json
    from rpcprops.report.artefact import versions

    return {
        "versions": versions(),
        "clock": runner.server.clock_note,
        "rate": runner.server.rate,
        "worlds": dict(sorted(runner.worlds.items())),
        "accepted": {
            kind: {"times": times, "examples": examples}
            for kind, (times, examples) in _accepted_in_all(done).items()
        },
        "properties": [
            {
                "name": result.property.name,
                "promise": result.property.promise,
                "verdict": result.verdict,
                "examples": result.examples,
                "executions": result.executions,
                "compared": result.compared,
                "faults_fired": result.faults_fired,
                "fired_by_type": dict(result.fired_by_type),
                "seconds": round(result.seconds, 3),
                "violations": [to_json(v) for v in result.failure.violations]
                if result.failure
                else [],
                "unconfirmed": list(result.unconfirmed),
                "failed_once": list(result.failed_once),
                "reruns": result.reruns,
                "reason": result.reason,
                "status": result.status,
                "agent": result.agent,
                "tries": [
                    {"rate": tries.rate, "seen": tries.failed, "tried": tries.times}
                    for tries in result.tries
                ],
                "known_findings_met": dict(sorted(result.explained.items())),
                "accepted": [
                    accepted_json(
                        one.kind,
                        one.examples,
                        {"program": to_json(one.case.program), "plan": to_json(one.case.plan)},
                        one.times,
                    )
                    for one in result.accepted.values()
                ],
            }
            for result in done
        ],
    }
