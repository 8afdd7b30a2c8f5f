"""The report of PyTorch's suites: one row of data for each test, one table for each class."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rpcprops._files import write_whole
from rpcprops.report.artefact import versions
from rpcprops.upstream._examine import UnderFaults, UpstreamResult
from rpcprops.upstream.data import UpstreamTest
from rpcprops.upstream.rows import parity_of

Row = dict[str, Any]
#: In fewer columns the tables would lose their numbers.
_LEAST_WIDTH = 100
_VERDICTS = ("passed", "failed", "skipped", "not_applicable")
_FAULTS_VERDICTS = ("holds", "violated", "vacuous", "undecided")


def row_of(result: UpstreamResult, torch_version: str, failure: Sequence[str]) -> Row:
    """A test's row in the JSON report. Seconds are real; `rate` is virtual for each real second."""
    parity = parity_of(result, torch_version)
    recorded = parity.recorded
    return {
        "name": result.test.name,
        "class": result.test.suite,
        "agent": result.test.agent,
        "asks_for": result.test.asks_for,
        "verdict": result.verdict,
        "reason": result.reason,
        "rate": result.rate,
        "failed_at_rates": list(result.slower),
        "real_time_because": result.test.real_time,
        "seconds": round(result.seconds, 3),
        "processor_seconds": round(result.processor_seconds, 3),
        "parity": {
            "agreement": parity.agreement,
            "harness_verdict": recorded.verdict if recorded else None,
            "harness_seconds": recorded.seconds if recorded else None,
            "cause": recorded.cause if recorded else "",
        },
        "no_faults_because": result.test.no_faults,
        "no_delays_because": result.test.no_delays,
        "under_faults": _faults_row(result.under_faults),
        "failure": list(failure),
    }


def _faults_row(under: UnderFaults | None) -> Row | None:
    if under is None:
        return None
    examination = under.examination
    failure = examination.failure if examination else None
    return {
        "verdict": under.verdict,
        "tables": under.tables,
        "faults_fired": under.faults_fired,
        "seconds": round(under.seconds, 3),
        "sent": [str(message) for message in under.sent],
        "plan": repr(failure.case.plan) if failure else "",
        "unconfirmed": list(examination.unconfirmed) if examination else [],
    }


def lost_row(nodeid: str, reason: str) -> Row:
    """The row of a test without a result: its process, or its fork server, has died."""
    suite, _, name = nodeid.rpartition("::")
    test = UpstreamTest(suite.rpartition("::")[2], name, "generic", 0)
    return row_of(UpstreamResult(test, "failed", reason), "", reason.splitlines())


def write_report(path: Path, rows: Iterable[Row], agent: str | None = None) -> None:
    """Write all rows as JSON, with the versions and the sums.

    Args:
        agent: the agent that was asked for; None if each suite ran the one it is written for.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = sorted(rows, key=lambda row: (row["class"], row["name"]))
    data = {
        "versions": versions(),
        "agent": agent,
        "summary": _sums(ordered),
        "tests": ordered,
    }
    write_whole(path, json.dumps(data, indent=1) + "\n")


def _sums(rows: Sequence[Row]) -> Row:
    under = [row["under_faults"] for row in rows if row["under_faults"]]
    return {
        **{verdict: _count(rows, "verdict", verdict) for verdict in _VERDICTS},
        "tables": sum(one["tables"] for one in under),
        "faults_fired": sum(one["faults_fired"] for one in under),
        "under_faults": dict(Counter(one["verdict"] for one in under)),
        "left_out": _left_out(rows),
        "parity": dict(Counter(row["parity"]["agreement"] for row in rows)),
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "processor_seconds": round(sum(row["processor_seconds"] for row in rows), 3),
    }


def summary_lines(rows: Sequence[Row], width: int) -> list[str]:
    """The table of classes, and a line for each test that differs, fails or is excluded."""
    printed = io.StringIO()
    console = Console(file=printed, width=max(width, _LEAST_WIDTH), highlight=False)
    for table in _tables(rows):
        console.print(table)
    for line in _remarks(rows):
        console.print(line, markup=False, soft_wrap=True)
    return printed.getvalue().rstrip().splitlines()


def _tables(rows: Sequence[Row]) -> list[Table]:
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["class"], []).append(row)
    plain = ("tests", "passed", "failed", "skipped", "n/a", "as harness", "seconds")
    tables = [_table("PyTorch's RPC suites, without faults", plain, by_class, _plain_cells)]
    if any(row["under_faults"] for row in rows):
        sampled = ("tables", "fired", "hold", "violated", "vacuous", "undecided", "seconds")
        tables.append(_table("under sampled faults", sampled, by_class, _faults_cells))
    return tables


def _table(
    title: str,
    columns: Sequence[str],
    by_class: Mapping[str, Sequence[Row]],
    cells: Callable[[Sequence[Row]], list[str] | None],
) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("class", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    everything = [row for group in by_class.values() for row in group]
    for name, group in by_class.items():
        drawn = cells(group)
        if drawn is not None:
            table.add_row(name, *drawn)
    table.add_row("all", *(cells(everything) or []))
    return table


def _plain_cells(rows: Sequence[Row]) -> list[str]:
    parities = [row["parity"] for row in rows]
    same = _count(parities, "agreement", "same")
    compared = same + _count(parities, "agreement", "differs")
    return [
        str(len(rows)),
        *(_number(_count(rows, "verdict", one)) for one in _VERDICTS),
        f"{same}/{compared}" if compared else "",
        f"{sum(row['seconds'] for row in rows):.1f}",
    ]


def _faults_cells(rows: Sequence[Row]) -> list[str] | None:
    drawn = [row["under_faults"] for row in rows if row["under_faults"]]
    if not drawn:
        return None
    return [
        str(sum(one["tables"] for one in drawn)),
        str(sum(one["faults_fired"] for one in drawn)),
        *(_number(_count(drawn, "verdict", one)) for one in _FAULTS_VERDICTS),
        f"{sum(one['seconds'] for one in drawn):.1f}",
    ]


def _number(count: int) -> str:
    """The number as text; empty for zero."""
    return str(count) if count else ""


def _remarks(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        name = f"{row['class']}::{row['name']}"
        parity, under = row["parity"], row["under_faults"]
        if parity["agreement"] == "differs":
            cause = parity["cause"] or "no cause is written down"
            lines.append(
                f"differs: {name}: {row['verdict']} here, {parity['harness_verdict']} in "
                f"PyTorch's harness: {cause}"
            )
        if under and under["verdict"] == "undecided":
            lines.append(f"undecided: {name}: {'; '.join(under['unconfirmed'])}")
    left_out = _left_out(rows)
    for reason, names in left_out.items():
        lines.append(f"left out: {names[0] if len(names) == 1 else _tests(len(names))}: {reason}")
    if left_out:
        lines.append(f"left out in all: {_tests(sum(map(len, left_out.values())))}")
    real = Counter(
        row["real_time_because"]
        for row in rows
        if row["real_time_because"] and row["verdict"] != "not_applicable"
    )
    lines += [f"in real time: {_tests(count)}: {why}" for why, count in real.items()]
    slower = [row for row in rows if row["failed_at_rates"] and row["verdict"] != "failed"]
    for row in slower:
        rates = ", ".join(f"{rate:g}" for rate in row["failed_at_rates"])
        lines.append(
            f"slower: {row['class']}::{row['name']} failed at rate {rates}, and "
            f"{row['verdict']} at {row['rate']:g}"
        )
    drawn = [row["under_faults"] for row in rows if row["under_faults"]]
    if drawn:
        silent = sum(one["verdict"] == "vacuous" and not one["tables"] for one in drawn)
        if silent:
            lines.append(f"no faults to strike: {_tests(silent)}: no type is sent that may fail")
        why = Counter(row["no_faults_because"] for row in rows if row["no_faults_because"])
        lines += [f"not under faults: {_tests(count)}: {reason}" for reason, count in why.items()]
        prompt = sum(bool(row["under_faults"] and row["no_delays_because"]) for row in rows)
        if prompt:
            lines.append(f"no delays: {_tests(prompt)}: the test, or a helper, sets a timeout")
    return lines


def _left_out(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The tests that were not run, by the reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] == "not_applicable":
            found.setdefault(row["reason"], []).append(f"{row['class']}::{row['name']}")
    return found


def _tests(count: int) -> str:
    return f"{count} test" + "s" * (count != 1)


def _count(rows: Iterable[Mapping[str, Any]], key: str, value: str) -> int:
    return sum(row[key] == value for row in rows)
