"""``rpcprops hunt``: drawn programs with and without faults, as many as are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rpcprops._files import check_output
from rpcprops.commands import stop
from rpcprops.commands.live import live, out, plain
from rpcprops.commands.shared import (
    HOLDS,
    VIOLATED,
    Agent,
    Clock,
    Reuse,
    check_json,
    running,
    say_died,
    say_torch,
    write_json,
)

if TYPE_CHECKING:
    from rpcprops._hunt import Batch, Hunt
    from rpcprops.properties import Observation
    from rpcprops.runner import Runner

_DEFAULT = Path(".rpcprops") / "hunt.jsonl"


def hunt(
    *,
    examples: Annotated[
        int,
        typer.Option(
            "--examples", "-n", min=1, help="Different examples that the file is to have."
        ),
    ] = 10_000,
    file: Annotated[
        Path, typer.Option("--file", help="Where the hunt is kept, and gone on with.")
    ] = _DEFAULT,
    batch: Annotated[int, typer.Option(min=1, help="Draws between two writes.")] = 400,
    without_faults: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="The share of the examples that have no fault: many bugs need none.",
        ),
    ] = 0.5,
    clock: Clock = "auto",
    agent: Agent = None,
    reuse: Reuse = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file as JSON.")
    ] = None,
) -> None:
    """Hunt for what torch gets wrong: drawn programs, faults within and beyond the retry budget.

    Half of the examples have no fault, unless --without-faults says otherwise. Both transports in
    turn. What was run is kept in a file, so a hunt that is interrupted goes on
    where it was. What a known finding explains (docs/findings.md), and what is accepted because it
    is documented (docs/faults.md), is counted and named. The exit code is 1 when the file holds a
    failure that real time has confirmed.
    """
    from rpcprops._hunt import Hunt, summary

    if file != _DEFAULT:
        check_output("--file", file, grows=True)
    check_json(json_file)
    known = Hunt.read(file)
    with running(clock, agent, reuse=reuse) as runner:
        say_torch(runner)
        say_died()
        if known.batches:
            out.print(f"{known.examples} examples are known from {plain(file)}")
        try:
            _go_on(known, runner, examples, batch, without_faults)
        finally:
            stop.ending()
            write_json(json_file, summary(known))
            _show(known)
            if known.unwritten is not None:
                out.print(f"[bold red]{plain(known.unwritten)}[/bold red]")
    raise typer.Exit(VIOLATED if known.failures else HOLDS)


def _go_on(known: Hunt, runner: Runner, examples: int, batch: int, share: float) -> None:
    """Draw and run up to `examples` in all; print the result of each batch."""
    from rpcprops._hunt import go_on
    from rpcprops.report.text import replay_line

    with live("hunt", examples, known.examples) as line:

        def on_example(so_far: Batch, _: Observation) -> None:
            note = f"{so_far.property}, {so_far.transport}, seed {so_far.seed}"
            line.update(known.examples + len(so_far.cases), note)

        def on_batch(done: Batch) -> None:
            if done.failure:
                promise, path = done.failure
                out.print(f"[bold red]violated[/bold red]  {plain(promise)}")
                out.print(f"    replay   {plain(replay_line(path))}")
            for doubt in done.unconfirmed:
                out.print(f"[yellow]unconfirmed[/yellow] {plain(doubt)}")
            if known.unwritten is not None:
                problem = f"{known.unwritten}; the next batch tries again"
                out.print(f"[bold red]{plain(problem)}[/bold red]")

        go_on(
            known,
            runner,
            examples=examples,
            batch_size=batch,
            share_without_faults=share,
            on_example=on_example,
            on_batch=on_batch,
        )


def _show(hunt: Hunt) -> None:
    """Print the result of a hunt."""
    out.print(_table(hunt))
    for line in _accepted_lines(hunt):
        out.print(plain(line))


def _accepted_lines(hunt: Hunt) -> list[str]:
    """The documented effects that the hunt met, each with its sentence and an example."""
    from rpcprops._hunt import summary
    from rpcprops.report.text import describe_accepted

    data = summary(hunt)
    lines: list[str] = []
    for one in data["accepted"]:
        lines += describe_accepted(one["kind"], one["examples"], data["examples"], one["example"])
    return lines


def _table(hunt: Hunt) -> Table:
    from rpcprops._hunt import summary
    from rpcprops.report.text import counted

    data = summary(hunt)
    table = Table(title=f"hunt, {plain(hunt.path)}", title_justify="left", show_header=False)
    table.add_row("different examples", str(data["examples"]))
    table.add_row("  without faults", str(data["examples_without_faults"]))
    table.add_row("  with faults", str(data["examples_with_faults"]))
    table.add_row("by property", "")
    for name, count in data["examples_by_property"].items():
        table.add_row(f"  {plain(name)}", str(count))
    table.add_row("faults fired", str(data["faults_fired"]))
    for name, count in data["known_findings_met"].items():
        table.add_row(f"known: {plain(name)}", str(count))
    for one in data["accepted"]:
        said = f"{counted(one['times'], 'time')}, in {counted(one['examples'], 'example')}"
        table.add_row(f"accepted: {one['kind']}", said)
    table.add_row("unexplained failures", str(len(data["failures"])))
    table.add_row("unconfirmed", str(len(data["unconfirmed"])))
    table.add_row("seconds of hunting", str(data["seconds"]))
    for one in data["found"]:
        sort = "known" if one["known"] else "new"
        table.add_row(f"  until {sort}: {plain(one['name'])}", str(one["seconds"]))
    return table
