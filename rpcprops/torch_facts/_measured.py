"""Makes a column of the matrix from the reports of the commands, and the tables of the matrix."""

from __future__ import annotations

import datetime
import fcntl
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rpcprops.errors import UsageError
from rpcprops.torch_facts._matrix import (
    Column,
    FindingCell,
    HuntCell,
    PropertyCell,
    UpstreamCell,
    read,
    write,
)

#: The files in a folder of reports: ``--json`` of ``check`` (one file or more), ``hunt`` and
#: ``upstream``.
CHECKS, HUNT, UPSTREAM = "check*.json", "hunt.json", "upstream.json"
#: The marks around the tables in docs/findings.md.
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def column_of(folder: Path, day: datetime.date | None = None) -> Column:
    """The column that the reports in `folder` make; all must be of one version of torch.

    Raises:
        UsageError: a report is missing or damaged, or they are of more than one version.
    """
    checks = [_load(path) for path in sorted(folder.glob(CHECKS))]
    hunt = _load(folder / HUNT) if (folder / HUNT).exists() else None
    upstream = _load(folder / UPSTREAM) if (folder / UPSTREAM).exists() else None
    try:
        builds = {r["versions"]["torch"] for r in (*checks, hunt, upstream) if r is not None}
        if not builds:
            msg = f"{folder}: no report ({CHECKS}, {HUNT} or {UPSTREAM})."
            raise UsageError(msg)
        if len(builds) != 1:
            msg = f"{folder}: reports of torch {', '.join(sorted(builds))}; a column is of one."
            raise UsageError(msg)
        (build,) = builds
        rows = [row for report in checks for row in report["properties"]]
        return Column(
            torch=build.partition("+")[0],
            build=build,
            measured=(day or datetime.date.today()).isoformat(),
            python=platform.python_version(),
            rate=checks[0]["rate"] if checks else 0.0,
            properties={r["name"]: _property(r) for r in rows if r["status"] is None},
            findings={r["name"]: _finding(r) for r in rows if r["status"] is not None},
            hunt=None if hunt is None else _hunt(hunt),
            upstream=None if upstream is None else _upstream(upstream),
        )
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{folder}: a report lacks {error}; make it with this version of rpcprops."
        raise UsageError(msg) from None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        msg = f"{path}: no report: {error}."
        raise UsageError(msg) from None


def _property(row: Mapping[str, Any]) -> PropertyCell:
    return PropertyCell(row["verdict"], row["examples"], row["faults_fired"])


def _finding(row: Mapping[str, Any]) -> FindingCell:
    fast = [tries for tries in row["tries"] if tries["rate"] != 1.0]
    real = [tries for tries in row["tries"] if tries["rate"] == 1.0]
    return FindingCell(
        row["verdict"],
        sum(tries["tried"] for tries in fast),
        sum(tries["seen"] for tries in fast),
        sum(tries["tried"] for tries in real),
        sum(tries["seen"] for tries in real),
    )


def _hunt(report: Mapping[str, Any]) -> HuntCell:
    return HuntCell(
        report["examples"],
        report["faults_fired"],
        len(report["failures"]),
        len(report["unconfirmed"]),
        report["known_findings_met"],
        {one["kind"]: one["examples"] for one in report["accepted"]},
    )


def _upstream(report: Mapping[str, Any]) -> UpstreamCell:
    tests = report["tests"]

    def named(chosen: Callable[[Any], bool]) -> tuple[str, ...]:
        return tuple(f"{test['class']}::{test['name']}" for test in tests if chosen(test))

    recorded = [test for test in tests if test["parity"]["agreement"] != "not_recorded"]
    return UpstreamCell(
        report["summary"]["passed"],
        report["summary"]["skipped"],
        report["summary"]["not_applicable"],
        named(lambda test: test["verdict"] == "failed"),
        named(lambda test: test["parity"]["agreement"] == "differs"),
        len(recorded),
    )


def add(file: Path, column: Column) -> None:
    """Put a column into a matrix file; it replaces an older one of its version.

    What the new one did not measure (a hunt, the suites) is kept from the older one.
    """
    with _locked(file):
        before = read(file)
        old = next((one for one in before if one.torch == column.torch), None)
        if old is not None:
            column = replace(
                column,
                rate=column.rate or old.rate,
                properties={**old.properties, **column.properties},
                findings={**old.findings, **column.findings},
                hunt=column.hunt or old.hunt,
                upstream=column.upstream or old.upstream,
            )
        write(file, [*before, column])


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock the file, because two versions may be measured at the same time."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


def tables(columns: Sequence[Column], kept_in: Mapping[str, str]) -> str:
    """The matrix as Markdown: findings, properties, hunts and suites by version, and the days.

    Args:
        kept_in: the findings that some releases do not have, with what says which.
    """
    head = ["", *(column.torch for column in columns)]
    names = dict.fromkeys(name for column in columns for name in column.findings)
    findings = [
        [f"`{name}`", *(_finding_text(one, name, kept_in) for one in columns)] for name in names
    ]
    names = dict.fromkeys(name for column in columns for name in column.properties)
    properties = [
        [f"`{name}`", *(_verdict_text(one.properties.get(name)) for one in columns)]
        for name in names
    ]
    hunts = [
        ["examples", *(_of(one.hunt, lambda hunt: hunt.examples) for one in columns)],
        ["faults fired", *(_of(one.hunt, lambda hunt: hunt.faults_fired) for one in columns)],
        ["unexplained", *(_of(one.hunt, lambda hunt: hunt.failures) for one in columns)],
        ["unconfirmed", *(_of(one.hunt, lambda hunt: hunt.unconfirmed) for one in columns)],
    ]
    suites = [
        ["passed", *(_of(one.upstream, lambda cell: cell.passed) for one in columns)],
        ["failed", *(_of(one.upstream, lambda cell: len(cell.failed)) for one in columns)],
        ["skipped", *(_of(one.upstream, lambda cell: cell.skipped) for one in columns)],
        ["recorded", *(_of(one.upstream, lambda cell: cell.recorded or "") for one in columns)],
        ["other verdict", *(_of(one.upstream, _differing) for one in columns)],
    ]
    days = [["measured", *(column.measured for column in columns)]]
    parts = [
        (
            "Findings: in how many tries the case showed it, fast and in real time",
            findings,
        ),
        ("Properties", properties),
        ("A hunt of drawn programs", hunts),
        ("PyTorch's own RPC tests on ranks of ours", suites),
        ("When", days),
    ]
    return "\n\n".join(f"**{title}**\n\n{_markdown(head, rows)}" for title, rows in parts)


def _finding_text(column: Column, name: str, kept_in: Mapping[str, str]) -> str:
    cell = column.findings.get(name)
    if cell is None:
        return "–"
    if cell.verdict == "holds" and name in kept_in:
        return kept_in[name]
    shown = [f"{cell.seen}/{cell.tried}"] if cell.tried else []
    shown += [f"{cell.seen_real}/{cell.tried_real}"] if cell.tried_real else []
    text = ", ".join(shown)
    return text if cell.verdict == "known" else f"{cell.verdict.replace('_', ' ')} ({text})"


def _verdict_text(cell: PropertyCell | None) -> str:
    return "–" if cell is None else cell.verdict


def _of(cell: Any, figure: Callable[[Any], Any]) -> str:
    return "–" if cell is None else str(figure(cell))


def _differing(cell: UpstreamCell) -> Any:
    return len(cell.differs) if cell.recorded else ""


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_into(text: str, made: str) -> str:
    """A document with the tables between its two marks.

    Raises:
        UsageError: the document lacks a mark.
    """
    if BEGIN not in text or END not in text:
        msg = f"the document lacks {BEGIN!r} or {END!r}."
        raise UsageError(msg)
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"
