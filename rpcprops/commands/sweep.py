"""``rpcprops sweep``: a program under every retryable table, as a map."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich import box
from rich.table import Table

from rpcprops.commands import stop
from rpcprops.commands.live import out, plain
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
from rpcprops.commands.sweeping import follow
from rpcprops.errors import UsageError

if TYPE_CHECKING:
    from rpcprops._sweep import Cell, Ranks, Record, State
    from rpcprops.programs import Program

#: The columns of a terminal in which a map has room; in others its columns have short names.
_WIDE = 90
_SHORT = {
    "CLEANUP_AUTOGRAD_CONTEXT_REQ": "cleanup",
    "RREF_CHILD_ACCEPT": "accept",
    "RREF_FORK_REQUEST": "fork",
    "RREF_USER_DELETE": "delete",
}


def sweep(  # noqa: PLR0913 - one argument for each option
    program: Annotated[
        str | None,
        typer.Argument(
            help="A shipped program (--list), a JSON file (an artefact or a program), or "
            "path/to/file.py:NAME.",
        ),
    ] = None,
    *,
    ranks: Annotated[
        str,
        typer.Option(
            help="Which ranks get the table: all, each (one at a time), or pairs (two at a time)."
        ),
    ] = "all",
    points: Annotated[
        bool,
        typer.Option(
            "--points", help="Try each message with each fault instead, with the agent wire."
        ),
    ] = False,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="As --points, and then every two of these faults at once."),
    ] = False,
    clock: Clock = "auto",
    agent: Annotated[
        str | None,
        agent_option(
            "Unless given, the first. --points and --pairs need wire, and take it by themselves. "
            "tensorpipe cannot be swept."
        ),
    ] = None,
    reuse: Reuse = None,
    transport: Transport = "tcp",
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Run everything again, and keep nothing of the last sweep."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the map to this file as JSON.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the shipped programs and leave.")
    ] = False,
) -> None:
    """Run a program under all 76 retryable tables, and show what held and what fired.

    The results are kept in .rpcprops/sweeps, so an interrupted sweep goes on where it was. Where
    the program met a known finding (docs/findings.md), the map names it.

    That takes about half a minute for a small program on an idle machine. With --ranks each or
    pairs there are 75 tables for each rank or pair. --points takes minutes, because what is lost is
    noticed only by a timeout, and a rank that waits without end is run again more slowly. --pairs
    takes far longer: 80 points make 3000 pairs.

    With --points, a run without faults shows which messages there are. Each of them fails, is late,
    is held, comes twice and is lost, one at a time. Those of the shutdown are among them, and the
    map marks them (shutdown): such are the calls to the first rank and back, by which all ranks
    meet there. What the oracle does not predict is run all the same: no rank may die, and none may
    wait for longer than torch's timeouts explain. A message that was not tried with a fault makes
    the sweep fail. A response cannot fail or come twice, and the last message cannot be held until
    another one has passed.

    Its map says for each message and each fault: held (all that is predicted came), the name of a
    known finding, documented (torch documents what came), overdue (held, but nothing could pass
    meanwhile), ran (nothing is predicted, and torch's own promises were kept), waits (a rank
    waited for what has no timeout), violated, undecided, or not tried.
    """
    from rpcprops._sweep import State, Sweep, cells, find_program
    from rpcprops.report.in_flight import watched

    if list_only:
        _list()
        return
    if program is None:
        msg = "sweep needs a PROGRAM; --list names the shipped ones."
        raise UsageError(msg)
    if ranks not in ("all", "each", "pairs"):
        msg = f"--ranks {ranks!r} must be 'all', 'each' or 'pairs'."
        raise UsageError(msg)
    if ranks != "all" and (points or pairs):
        msg = f"--ranks {ranks} is for tables; leave it out with --points and --pairs."
        raise UsageError(msg)
    check_transport(transport)
    check_json(json_file)
    check_injects(agent, "a sweep is of faults")
    chosen = find_program(program)
    if points or pairs:
        _points(
            chosen,
            chosen.name or program,
            agent=agent,
            clock=clock,
            reuse=reuse,
            pairs=pairs,
            transport=transport,
            restart=restart,
            json_file=json_file,
        )
    places = cells(chosen.world_size, cast("Ranks", ranks))
    with running(clock, agent, reuse=reuse) as runner, watched(runner.server) as in_flight:
        say_torch(runner)
        say_died()
        state = State(
            chosen,
            torch_version=runner.server.torch_version,
            rate=runner.server.rate,
            transport=transport,
            agent="" if agent is None else runner.server.agent,
            root=Path(),
            restart=restart,
        )
        known = sum(state.has(cell) for cell in places)
        if known:
            out.print(f"{known} of {len(places)} are known from {plain(state.path)}")
        in_flight.begin(f"sweep-{chosen.name or 'program'}")
        name = chosen.name or program
        try:
            results = Sweep(chosen, runner, state, transport=transport).run(places)
            follow(name, results, known=known, total=len(places), good=("holds", "known"))
        finally:
            # Report after an interrupt too: what was found is not lost.
            stop.ending()
            report = _report(name, state, places, runner.server.clock_note)
            write_json(json_file, report)
            _show(state, places, report)
            kept = state.unwritten or f"kept in {state.path}"
            out.print(plain(kept))
    raise typer.Exit(HOLDS if report["verdict"] in ("holds", "known") else VIOLATED)


def _points(
    chosen: Program,
    name: str,
    *,
    agent: str | None,
    clock: str,
    reuse: bool | None,
    **options: Any,
) -> NoReturn:
    """Sweep the points of a program, and leave."""
    from rpcprops.agents.wire import NAME
    from rpcprops.commands.sweep_points import sweep_points
    from rpcprops.report.in_flight import watched

    if agent is not None and agent.upper() != NAME:
        msg = f"--agent {agent!r} cannot act on single messages; leave it out, or write wire."
        raise UsageError(msg)
    with running(clock, NAME, reuse=reuse) as runner, watched(runner.server) as in_flight:
        say_torch(runner)
        say_died()
        in_flight.begin(f"sweep-{name}")
        holds = sweep_points(chosen, runner, name=name, **options)
    raise typer.Exit(HOLDS if holds else VIOLATED)


def _list() -> None:
    """Print the shipped programs."""
    from rpcprops.properties import shipped_programs

    for name, shipped in shipped_programs().items():
        size, count = shipped.world_size, len(shipped.leaves)
        out.print(f"[bold]{plain(name)}[/bold]  {size} ranks, {count} steps")


def _report(name: str, state: State, places: tuple[Cell, ...], clock_note: str) -> dict[str, Any]:
    from rpcprops._json import to_json
    from rpcprops.report.artefact import versions

    seen = [(cell, state.records.get(cell.plan)) for cell in places]
    records = [record for _, record in seen if record is not None]
    counts = {
        verdict: sum(record.verdict == verdict for record in records)
        for verdict in ("holds", "known", "violated", "undecided")
    }
    fired = sum(record.fired for record in records)
    if counts["violated"]:
        verdict = "violated"
    elif counts["undecided"]:
        verdict = "undecided"
    elif len(records) < len(places):
        verdict = "unfinished"
    elif counts["known"]:
        verdict = "known"
    else:
        verdict = "holds" if fired else "vacuous"
    return {
        "versions": versions(),
        "clock": clock_note,
        "program": name,
        "verdict": verdict,
        "tables": len(places),
        **counts,
        "accepted": _accepted(records),
        "findings": dict(sorted(Counter(f for r in records for f in r.findings).items())),
        "faults_fired": fired,
        "in_used_ranks": sum(record.used for record in records),
        "kept_in": str(state.path),
        "cases": [
            {"ranks": list(cell.ranks) or "all", **to_json(record)}
            for cell, record in seen
            if record is not None
        ],
    }


def _accepted(records: list[Record]) -> list[dict[str, Any]]:
    """The documented effects that some tables showed, each with its sentence and one plan."""
    from rpcprops._json import to_json
    from rpcprops.oracle import DOCUMENTED, accepted_json

    counts = Counter(kind for record in records for kind in record.accepted)
    return [
        accepted_json(kind, count, to_json(next(r.plan for r in records if kind in r.accepted)))
        for kind, count in sorted(counts.items())
        if kind in DOCUMENTED
    ]


def _show(state: State, places: tuple[Cell, ...], report: dict[str, Any]) -> None:
    """Print the maps of a sweep, and a summary."""
    for table in _maps(state, places):
        out.print(table)
    colour = COLOURS.get(report["verdict"], "yellow")
    out.print(f"[{colour}]{report['verdict']}[/{colour}] {plain(_summary(report))}")
    for line in _accepted_lines(state, places, report):
        out.print(plain(line))


def _accepted_lines(state: State, places: tuple[Cell, ...], report: dict[str, Any]) -> list[str]:
    from rpcprops.report.text import describe_accepted

    plans = [cell.plan for cell in places if cell.plan in state.records]
    lines: list[str] = []
    for one in report["accepted"]:
        plan = next(p for p in plans if one["kind"] in state.records[p].accepted)
        lines += describe_accepted(one["kind"], one["examples"], len(plans), repr(plan))
    return lines


def _summary(report: dict[str, Any]) -> str:
    text = f"{report['holds']} of {report['tables']} held, {report['faults_fired']} faults fired"
    for verdict in ("violated", "undecided"):
        if report[verdict]:
            text += f", {report[verdict]} {verdict}"
    for name, count in report["findings"].items():
        text += f", {count} met the known finding {name}"
    return text


def _maps(state: State, places: tuple[Cell, ...]) -> list[Table]:
    """One table for each group of faulty ranks: subsets of types by how often each type fails."""
    empty, *rest = places
    groups: dict[tuple[int, ...], dict[tuple[Any, int], Cell]] = {}
    for cell in rest:
        key = (cell.table.messages_to_fail, cell.table.num_fail_sends)
        groups.setdefault(cell.ranks, {})[key] = cell
    tables: list[Table] = []
    is_narrow = out.width < _WIDE
    numbers = _numbered_findings(state, places)
    for ranks, group in groups.items():
        who = f"rank {' and '.join(map(str, ranks))} faulty" if ranks else "all ranks faulty"
        title = f"{who}; without any fault: {_cell_text(state, empty, numbers)}"
        table = Table(
            title=title,
            title_justify="left",
            caption="\n".join([*_legend(is_narrow=is_narrow), *_known_lines(numbers)]),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=not is_narrow,
            padding=(0, 0) if is_narrow else (0, 1),
        )
        for name in _SHORT.values():
            table.add_column(name[:1] if is_narrow else name, justify="center", no_wrap=True)
        counts = sorted({count for _, count in group})
        for count in counts:
            title = str(count) if is_narrow else f"fails {count}"
            table.add_column(title, justify="right", no_wrap=not is_narrow)
        for subset in dict.fromkeys(types for types, _ in group):
            marks = ["x" if name in subset else "" for name in _SHORT]
            found = [_cell_text(state, group[subset, count], numbers) for count in counts]
            table.add_row(*marks, *found)
        tables.append(table)
    return tables


def _legend(*, is_narrow: bool) -> list[str]:
    """What the short names of a narrow map stand for."""
    if not is_narrow:
        return []
    types = ", ".join(f"{name[0]} {name}" for name in _SHORT.values())
    return [f"x: this type fails, as often as the column says ({types})"]


def _known_lines(numbers: dict[str, int]) -> list[str]:
    return [f"known {number}: {plain(name)}" for name, number in numbers.items()]


def _numbered_findings(state: State, places: tuple[Cell, ...]) -> dict[str, int]:
    """Numbers for the known findings that were met, to fit the narrow cells of a map."""
    records = [state.records[cell.plan] for cell in places if cell.plan in state.records]
    names = sorted({name for record in records for name in record.findings})
    return {name: number for number, name in enumerate(names, 1)}


def _cell_text(state: State, cell: Cell, numbers: dict[str, int]) -> str:
    record = state.records.get(cell.plan)
    if record is None:
        return "-"
    if record.verdict == "holds":
        return f"[green]held[/green] {record.fired}"
    shown = [plain(record.promise)] if record.promise else []
    shown += [f"known {numbers[name]}" for name in record.findings]
    return f"[{COLOURS[record.verdict]}]{', '.join(shown)}[/] {record.fired}"
