"""The command line: ``rpcprops check``, ``replay``, ``sweep``, ``hunt``, ``upstream`` and the rest.

Exit codes: 0 every promise holds (or fails as documented), 1 one does not, 2 misuse, 3 this machine
cannot, 128 and its number where a signal ended the command (130 for Ctrl-C).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.table import Table

from rpcprops._files import check_output
from rpcprops.commands import _stop
from rpcprops.commands._check import check
from rpcprops.commands._hunt import hunt
from rpcprops.commands._replay import replay
from rpcprops.commands._shared import (
    CANNOT,
    HOLDS,
    INTERRUPTED,
    MISUSE,
    VIOLATED,
    Clock,
    err,
    out,
    plain,
    running,
    write_json,
)
from rpcprops.commands._sweep import sweep
from rpcprops.commands._upstream import upstream
from rpcprops.errors import MachineCannot, UsageError

app = typer.Typer(
    name="rpcprops",
    help="Property tests for torch.distributed.rpc under sampled faults, on real ranks.",
    epilog="Exit codes: 0 holds, 1 violated, 2 misuse, 3 this machine cannot, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(check)
app.command()(replay)
app.command()(sweep)
app.command()(hunt)
app.command()(upstream)


@app.command()
def doctor(*, clock: Clock = "auto") -> None:
    """Say what this machine can do: torch, the faulty agent, the clock, transports."""
    from rpcprops import clock as clocks
    from rpcprops.faults import FaultPlan, FaultTable
    from rpcprops.oracle import judge
    from rpcprops.properties._programs import create_and_drop
    from rpcprops.report._artefact import versions

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    table.add_row("C compiler", "found" if compiler else "none (needed only to build the clock)")
    problem = clocks.library_problem()
    state = "works" if not problem else "damaged" if clocks.library_path() else "not built"
    table.add_row("clock library", state)
    healthy = True
    with running(clock) as runner:
        unasked = runner.server.clock_problem
        # Why is a long line, which a table would fold: it is printed below.
        note = "real time, though it was not asked for" if unasked else runner.server.clock_note
        table.add_row("clock", note.removeprefix("clock: "))
        program = create_and_drop()
        plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 1))
        for transport in ("tcp", "shm"):
            began = time.monotonic()
            outcome = runner.run(program, plan, transport=cast("Any", transport))
            found = judge(program, plan, outcome)
            seconds = time.monotonic() - began
            said = f"one injected failure fired and was retried, {seconds:.2f} s"
            table.add_row(transport, str(found[0]) if found else said)
            healthy = healthy and not found
        out.print(table)
    raise typer.Exit(HOLDS if healthy else VIOLATED)


@app.command()
def bench(
    *,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each kind.")] = 7,
    harness: Annotated[
        int, typer.Option(min=0, help="Runs of PyTorch's own harness (15 s and more each).")
    ] = 3,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also with world size, failing sends and length.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also the curve of rates, idle and loaded.")
    ] = False,
    clock: Clock = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file as JSON.")
    ] = None,
) -> None:
    """Measure what an example costs, against PyTorch's own harness and two bare floors."""
    from rpcprops.bench import Bench
    from rpcprops.report._artefact import versions

    if json_file is not None:
        check_output("--json", json_file)
    with running(clock) as runner:
        out.print(f"torch {runner.server.torch_version}, {plain(runner.server.clock_note)}")
        report: dict[str, Any] = {"versions": versions(), "rate": runner.server.rate}
        try:
            with (
                err.status("measuring") as status,
                Bench(runner, repeats, status.update) as bench,
            ):
                report["comparison"] = bench.comparison(harness)
                _print_samples("four ranks, all four types failing three times", report)
                if growth:
                    report["growth"] = bench.growth()
                    for name, rows in report["growth"].items():
                        out.print(_rows_table(f"growth with {name.replace('_', ' ')}", name, rows))
                if curve:
                    report["curve"] = bench.curve()
                    out.print(_rows_table("the curve of rates", "rate", report["curve"]))
        finally:
            _stop.ending()
            if json_file is not None:
                write_json(json_file, report)


def _print_samples(title: str, report: dict[str, Any]) -> None:
    comparison = report["comparison"]
    out.print(_rows_table(title, "name", comparison["samples"]))
    for name, ratio in comparison["ratios"].items():
        out.print(f"{name}: {ratio:g} times")


def _rows_table(title: str, key: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = ["machine"] if "machine" in rows[0] else []
    columns += [key.replace("_", " "), "seconds", "a second", "processor", "late", "wrong"]
    floors = ("floor", "prepared_floor") if "floor" in rows[0] else ()
    for floor in floors:
        columns += [floor.replace("_", " "), "ours is"]
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        cells = [str(row["machine"])] if "machine" in row else []
        cells += [
            f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]),
            _spread_text(row["seconds"]),
            f"{row['examples_per_second']:.2f}",
            _spread_text(row["processor_seconds"]),
            f"{row['late_seconds'] * 1000:.1f} ms",
            str(row["wrong_verdicts"]),
        ]
        for floor in floors:
            cells += [
                f"{row[floor]['seconds']['median']:.3f}",
                f"{row[f'against_{floor}']:.2f} times",
            ]
        table.add_row(*cells)
    return table


def _spread_text(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['least']:.2f}-{spread['greatest']:.2f})"


def main() -> NoReturn:
    """Entry point of the ``rpcprops`` command."""
    with _stop.listening():
        code = _run()
        stopped = _stop.exit_code()
        if stopped is not None:
            code = stopped
            with contextlib.suppress(OSError):
                err.print(_stop.reason())
    sys.exit(code)


def _run() -> Any:
    """Run the command; its exit code."""
    try:
        app()
    except SystemExit as left:
        return left.code
    except KeyboardInterrupt:
        _stop.ending()
        return INTERRUPTED
    except UsageError as error:
        return _complain(error, MISUSE)
    except MachineCannot as error:
        return _complain(error, CANNOT)
    except Exception as error:
        # After a SIGHUP there is no terminal to print to.
        if _stop.exit_code() is None or not isinstance(error, OSError):
            err.print_exception()
            err.print("[bold red]rpcprops is at fault[/bold red]; please report the lines above.")
        # Not 1: that would say that a promise was broken.
        return CANNOT
    return HOLDS


def _complain(error: Exception, code: int) -> int:
    err.print(f"[bold red]rpcprops:[/bold red] {plain(error)}")
    return code
