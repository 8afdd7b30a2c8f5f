"""``rpcprops hunt``: drawn programs with and without faults, as many as are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from rpcprops import agents
from rpcprops._files import check_output
from rpcprops._given import shown
from rpcprops.cluster.options import parse_clock
from rpcprops.commands import stop
from rpcprops.commands.live import compiling, live, out, plain
from rpcprops.commands.shared import (
    HOLDS,
    VIOLATED,
    Clock,
    Reuse,
    agent_option,
    check_injects,
    check_json,
    check_reuse,
    interruptible,
    running,
    say_died,
    say_torch,
    write_json,
)
from rpcprops.errors import UsageError

if TYPE_CHECKING:
    from rpcprops._hunt import Batch, Hunt, Order, Wanted
    from rpcprops._hunt_jobs import Ranks, Ready
    from rpcprops._hunts import Met
    from rpcprops.commands.live import Line
    from rpcprops.runner import Runner

_DEFAULT = Path(".rpcprops") / "hunt.jsonl"
#: The columns of a terminal in which the table of several hunts has room.
_WIDE = 100
#: The most draws for each run: Hypothesis gives up where it must draw many more.
_MOST_CANDIDATES = 50
#: The most processes of one hunt.
_MOST_JOBS = 256


def hunt(  # noqa: PLR0913 - the options
    files: Annotated[
        list[Path] | None, typer.Argument(help="With --show: the files of hunts.")
    ] = None,
    *,
    examples: Annotated[
        int,
        typer.Option(
            "--examples", "-n", min=1, help="How many different examples the file has at the end."
        ),
    ] = 10_000,
    file: Annotated[
        Path,
        typer.Option(
            "--file", help="The file of the hunt. If it exists, the hunt goes on from there."
        ),
    ] = _DEFAULT,
    batch: Annotated[
        int, typer.Option(min=1, help="How many examples are drawn before the file is written.")
    ] = 400,
    without_faults: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="The share of examples without a fault, from 0 to 1: many bugs need none.",
        ),
    ] = 0.5,
    candidates: Annotated[
        int,
        typer.Option(
            min=1,
            max=_MOST_CANDIDATES,
            help="Of so many drawn examples the one is run that has most of what was seldom run "
            "before: options of steps, and steps and faults that meet. 1 runs all.",
        ),
    ] = 8,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="A number that decides which programs and faults are drawn. Without it, that of "
            "the file, or 0.",
        ),
    ] = None,
    known: Annotated[
        bool,
        typer.Option(
            "--known",
            help="Also draw what meets findings that this torch is known to have. Other hunts "
            "avoid most of it, because it hides what is new.",
        ),
    ] = False,
    jobs: Annotated[
        str,
        typer.Option(
            "--jobs",
            "-j",
            help="Processes that draw and run batches at once, or auto: one for each processor.",
        ),
    ] = "1",
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Run nothing; print how soon the hunts in FILES met each finding."
        ),
    ] = False,
    clock: Clock = "auto",
    agent: Annotated[
        str | None,
        agent_option(
            "Unless given, the first. With wire, faults of single messages are drawn too; "
            "tensorpipe needs --without-faults 1. A file holds a hunt with one agent."
        ),
    ] = None,
    reuse: Reuse = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file as JSON.")
    ] = None,
) -> None:
    """Hunt for what torch gets wrong: drawn programs, faults within and beyond the retry budget.

    Half of the examples have no fault, unless --without-faults says otherwise. The transports take
    turns. What was run is kept in a file, batch by batch. The next hunt goes on from there, and
    draws a batch that was interrupted again. What a known finding explains
    (docs/findings.md), and what is accepted because it is documented (docs/faults.md), is counted
    and named.

    --show FILE FILE … runs nothing: it prints in how many of these hunts each known finding was
    met, and after how many seconds and examples.
    """
    from rpcprops._hunt import Hunt, Wanted, summary
    from rpcprops._hunt_jobs import Ranks

    if show or files:
        _show_several(files or [], json_file, show=show)
        return
    many = _jobs(jobs)
    _check_file(file)
    check_json(json_file)
    kept = Hunt.read(file, seed, known=known)
    kept.check_agent(agents.default_name() if agent is None else agents.named(agent).name)
    if without_faults < 1:
        check_injects(agent, "a part of this hunt has some", "Add --without-faults 1. ")
    wanted = Wanted(examples, batch, without_faults, candidates)

    def ended() -> None:
        stop.ending()
        write_json(json_file, summary(kept))
        _show(kept)
        if kept.unwritten is not None:
            out.print(f"[bold red]{plain(kept.unwritten)}[/bold red]")

    if many == 1:
        with running(clock, agent, reuse=reuse) as runner:
            say_torch(runner)
            _say_known(kept)
            try:
                _go_on(kept, runner, wanted)
            finally:
                ended()
    else:
        with interruptible():
            parse_clock(clock)
            name = agents.default_name() if agent is None else agent
            check_reuse(name, reuse=reuse)
            # Built once, and not by each process.
            agents.named(name).prepare(compiling)
            _say_known(kept)
            try:
                ranks = Ranks(clock, agent, reuse is not False)
                _go_on_at_once(kept, many, ranks, wanted)
            finally:
                ended()
    raise typer.Exit(VIOLATED if kept.failures else HOLDS)


def _check_file(file: Path) -> None:
    """Check, before anything runs, that the file of the hunt can be written.

    Raises:
        UsageError: it cannot be written; the message says what to do.
    """
    if file != _DEFAULT:
        check_output("--file", file, grows=True)
    elif file.parent.is_dir():
        check_output("without --file,", file, grows=True)
    elif file.parent.exists():
        msg = f"{str(file.parent)!r} is no folder; move it away, or name a file with --file."
        raise UsageError(msg)
    else:
        check_output("without --file,", file.parent)  # it will be made there


def _jobs(text: str) -> int:
    """The number of processes that ``--jobs`` names.

    Raises:
        UsageError: it names none.
    """
    if text == "auto":
        return min(_MOST_JOBS, len(os.sched_getaffinity(0)))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= _MOST_JOBS:
        msg = f"--jobs {shown(text)} must be a number from 1 to {_MOST_JOBS}, or auto."
        raise UsageError(msg)
    return int(text[:9])


def _say_known(known: Hunt) -> None:
    say_died()
    if known.batches:
        out.print(f"{known.examples} examples are known from {plain(known.path)}")


def _go_on(known: Hunt, runner: Runner, wanted: Wanted) -> None:
    """Draw and run what is wanted; print the result of each batch."""
    from rpcprops._hunt import go_on

    with live("hunt", wanted.examples, known.examples) as line, _Kept(known) as kept:

        def on_example(so_far: Batch) -> None:
            kept.under_way = len(so_far.cases)
            note = f"{so_far.property}, {so_far.transport}, seed {so_far.seed}"
            line.update(known.examples + len(so_far.cases), note)

        go_on(
            known,
            runner,
            wanted,
            on_example=on_example,
            on_batch=lambda done: _say_batch(kept, done, line),
            on_failing=lambda what: line.update(note=what),
        )


class _Kept(AbstractContextManager["_Kept"]):
    """Says, if the hunt is interrupted, what it does not keep.

    Attributes:
        hunt: the batches that are in the file.
        under_way: how many examples of other batches have been run.
    """

    def __init__(self, hunt: Hunt) -> None:
        self.hunt = hunt
        self.under_way = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from rpcprops.report.text import counted

        if kind is not None and issubclass(kind, KeyboardInterrupt):
            out.print(
                f"{counted(self.under_way, 'example')} of the batch under way will be drawn again: "
                f"only whole batches are kept (--batch). The same command goes on from "
                f"{counted(self.hunt.examples, 'example')}."
            )


def _go_on_at_once(known: Hunt, jobs: int, ranks: Ranks, wanted: Wanted) -> None:
    """As :func:`_go_on`, by several processes."""
    from rpcprops._hunt_jobs import Team

    with live("hunt", wanted.examples, known.examples) as line, _Kept(known) as kept:

        def on_ready(ready: Ready) -> None:
            out.print(f"torch {ready.torch_version}, {plain(ready.clock_note)}")

        def on_example(under_way: int, order: Order) -> None:
            kept.under_way = under_way
            line.update(known.examples + under_way, f"{jobs} jobs, {order}")

        def on_problem(problem: str) -> None:
            out.print(f"[yellow]{plain(problem)}[/yellow]")

        Team(
            known,
            jobs,
            ranks,
            on_ready=on_ready,
            on_example=on_example,
            on_batch=lambda done: _say_batch(kept, done, line),
            on_problem=on_problem,
            on_ending=stop.ending,
        ).go_on(wanted)


def _say_batch(kept: _Kept, done: Batch, line: Line) -> None:
    """Print what a batch found."""
    from rpcprops.report.text import replay_line

    known, kept.under_way = kept.hunt, 0
    line.update(known.examples)
    if done.failure:
        promise, path = done.failure
        out.print(f"[bold red]violated[/bold red]  {plain(promise)}")
        out.print(f"    replay   {plain(replay_line(path))}")
    for doubt in done.unconfirmed:
        out.print(f"[yellow]unconfirmed[/yellow] {plain(doubt)}")
    if known.unwritten is not None:
        problem = f"{known.unwritten}; the next batch tries again"
        out.print(f"[bold red]{plain(problem)}[/bold red]")


def _show_several(files: Sequence[Path], json_file: Path | None, *, show: bool) -> None:
    """Print how soon several hunts met each finding.

    Raises:
        UsageError: a file holds no hunt, or the hunts do not belong together.
    """
    from rpcprops._hunts import joined

    if not show or not files:
        told = ", ".join(map(str, files)) or "no file"
        msg = f"--show and files of hunts belong together ({told}); write --show FILE FILE …"
        raise UsageError(msg)
    check_json(json_file)
    data = joined(files)
    write_json(json_file, data.as_json())
    # A narrow terminal gets fewer columns, and no torn words.
    shown = ("finding", "met in", "seconds", "examples")[: 4 if out.width >= _WIDE else 2]
    table = Table(title=plain(data.title), title_justify="left")
    for column in shown:
        justify: Literal["left", "right"] = "left" if column == "finding" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for one in data.findings:
        table.add_row(*map(plain, _row(one, len(data.hunts))[: len(shown)]))
    out.print(table)
    for line in data.notes:
        out.print(plain(line))


def _row(one: Met, hunts: int) -> tuple[str, str, str, str]:
    name = one.name if one.is_known else f"new: {one.name}"
    if not one.met:
        return name, f"none of {hunts}", "", ""
    return name, f"{one.met} of {hunts}", str(one.seconds), str(one.examples)


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
    # Properties of programs under faults draw plans without a fault, too.
    table.add_row("  their plan is empty", str(data["examples_without_faults"]))
    table.add_row("  their plan has faults", str(data["examples_with_faults"]))
    table.add_row("by property, over either transport", "")
    for name, count in data["examples_by_property"].items():
        table.add_row(f"  {plain(name)}", str(count))
    table.add_row("faults fired", str(data["faults_fired"]))
    for name, count in data["known_findings_met"].items():
        table.add_row(f"known: {plain(name)}", f"in {counted(count, 'example')}")
    for one in data["accepted"]:
        said = f"{counted(one['times'], 'time')}, in {counted(one['examples'], 'example')}"
        table.add_row(f"accepted: {one['kind']}", said)
    table.add_row("runs in ranks used before", str(data["runs_in_used_ranks"]))
    table.add_row("unexplained failures", str(len(data["failures"])))
    table.add_row("unconfirmed", str(len(data["unconfirmed"])))
    table.add_row("seconds of hunting", str(data["seconds"]))
    for one in data["found"]:
        sort = "known" if one["known"] else "new"
        said = f"{one['seconds']}, {counted(one['examples'], 'example')}"
        table.add_row(f"  until {sort}: {plain(one['name'])}", said)
    return table
