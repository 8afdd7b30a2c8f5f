"""``rpcprops bench``: what an example costs, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rpcprops import agents
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.commands import stop
from rpcprops.commands.live import compiling, live, out, plain
from rpcprops.commands.shared import Clock, check_json, running, say_torch, write_json


def bench(
    *,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each kind.")] = 7,
    harness: Annotated[
        int, typer.Option(min=0, help="Runs of PyTorch's own harness (15 s and more each).")
    ] = 3,
    growth: Annotated[
        bool,
        typer.Option(
            "--growth", help="Also how the cost grows with ranks, failing sends and steps."
        ),
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="Also the cost at each clock rate, on an idle and on a busy machine."
        ),
    ] = False,
    ledger: Annotated[
        bool,
        typer.Option(
            "--ledger", help="Also what recording all messages (agent wire) adds to an example."
        ),
    ] = False,
    clock: Clock = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file as JSON.")
    ] = None,
) -> None:
    """Measure what an example costs, against PyTorch's own harness and against two floors.

    A floor is as many ranks that fork, join, shut down and exit, and do nothing else: without the
    preparations that make our own cheaper, and with them.
    """
    from rpcprops._bench import WORLD_SIZES, Bench, growth_with_ranks
    from rpcprops.report.artefact import versions

    check_json(json_file)
    if ledger:
        # Without a compiler, all that is measured before would be lost.
        agents.named(WIRE).prepare(compiling)
    with running(clock) as runner:
        say_torch(runner)
        report: dict[str, Any] = {"versions": versions(), "rate": runner.server.rate}
        try:
            with (
                live("measuring") as line,
                Bench(runner, repeats, line.begin) as bench,
            ):
                report["comparison"] = bench.comparison(harness)
                headline = report["comparison"].pop("headline")
                spreads = {name: one["spread"] for name, one in headline.items()}
                report["ratios"] = {name: one["median"] for name, one in spreads.items()}
                report["ratio_spreads"] = spreads
                report["ratios_of"] = {name: one["of"] for name, one in headline.items()}
                _print_samples("four ranks, all four types failing three times", report)
                if growth:
                    report["growth"] = bench.growth()
                    ranks = growth_with_ranks(report["growth"]["world_size"])
                    report["growth_with_ranks"] = ranks
                    out.print(
                        f"from {WORLD_SIZES[0]} to {WORLD_SIZES[-1]} ranks: "
                        + ", ".join(f"{k.replace('_', ' ')} {v:g} times" for k, v in ranks.items())
                    )
                    for name, rows in report["growth"].items():
                        out.print(_rows_table(f"growth with {name.replace('_', ' ')}", name, rows))
                if ledger:
                    report["ledger"] = bench.ledger()
                    for row in report["ledger"]:
                        out.print(_ledger_line(row))
                if curve:
                    report["curve"] = bench.curve()
                    out.print(_rows_table("the curve of rates", "rate", report["curve"]))
        finally:
            stop.ending()
            write_json(json_file, report)


def _print_samples(title: str, report: dict[str, Any]) -> None:
    comparison = report["comparison"]
    out.print(_rows_table(title, "name", comparison["samples"]))
    for name, ratio in comparison["ratios"].items():
        out.print(f"{name}: {ratio:g} times")
    for name, spread in report["ratio_spreads"].items():
        said = f"{spread['median']:.1f} times ({spread['least']:.1f} to {spread['greatest']:.1f})"
        one, other = report["ratios_of"][name]
        out.print(f"{plain(one)} against {plain(other)} (ratios.{name}): {said}")
    for sample in comparison["samples"]:
        if "fault_seconds_per_second" in sample:
            seconds = sample["fault_seconds_per_second"]
            out.print(f"virtual fault seconds for each real second, {sample['name']}: {seconds:g}")


def _ledger_line(row: dict[str, Any]) -> str:
    return (
        f"with the ledger, {plain(row['program'])}: {_spread_text(row['ratio'])} times the "
        f"seconds, {_spread_text(row['processor_ratio'])} times the processor time, "
        f"{row['pairs']} pairs"
    )


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
