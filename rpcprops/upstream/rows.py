"""The verdicts of PyTorch's own harness, recorded for each version of torch, and the comparison.

The records were made by ``rpcprops upstream --harness``. Each difference either has a cause, which
is written next to the record, or is a bug of ours.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from rpcprops._files import GrowingFile, write_whole
from rpcprops.upstream._examine import UpstreamResult

#: The first characters of a row of PyTorch's harness.
_BEGINS = b'{"class": "'

Agreement = Literal["same", "differs", "not_recorded", "not_run"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A test in PyTorch's own harness.

    Attributes:
        seconds: real seconds.
        processor_seconds: processor time of the four or more processes that the harness started.
        cause: why our verdict differs, if it does.
    """

    verdict: str
    reason: str
    seconds: float
    processor_seconds: float
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Parity:
    """Our verdict compared with the recorded one; "not_run" if the test was left out here."""

    agreement: Agreement
    recorded: Recorded | None = None


@functools.cache
def records(torch_version: str) -> Mapping[str, Recorded]:
    """The records by ``Suite::test``; empty if there is no record for this torch."""
    version = torch_version.partition("+")[0]
    file = resources.files("rpcprops.upstream").joinpath("parity", f"torch-{version}.json")
    if not file.is_file():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    causes = data["causes"]
    return {
        f"{row['class']}::{row['name']}": Recorded(
            row["verdict"],
            row["reason"],
            row["seconds"],
            row["processor_seconds"],
            causes.get(f"{row['class']}::{row['name']}", ""),
        )
        for row in data["tests"]
    }


def main() -> None:
    """``python -m rpcprops.upstream.rows FILE``: put FILE's rows into the record of their torch.

    Existing causes for that torch stay, and so do rows of tests that are not in FILE.

    Raises:
        SystemExit: the rows are of more than one torch, or there are none.
    """
    rows = read_rows(rows_file(Path(sys.argv[1])))
    versions = {str(row.pop("torch")).partition("+")[0] for row in rows}
    if len(versions) != 1:
        sys.exit(f"{sys.argv[1]}: rows of torch {sorted(versions)}; a record is of one version")
    path = Path(__file__).with_name("parity") / f"torch-{versions.pop()}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    causes = before.get("causes", {})
    path.parent.mkdir(exist_ok=True)
    for row in rows:
        # Do not publish where things are installed.
        row["reason"] = re.sub(r'"/[^"]*/(?:site-packages|python3[.]\d+)/', '"', row["reason"])
    measured = {(row["class"], row["name"]) for row in rows}
    rows += [row for row in before.get("tests", []) if (row["class"], row["name"]) not in measured]
    rows.sort(key=lambda row: (row["class"], row["name"]))
    body = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"causes": {json.dumps(causes, indent=1)},\n"tests": [\n{body}\n]}}\n'
    write_whole(path, text)


def parity_of(result: UpstreamResult, torch_version: str) -> Parity:
    """How the verdict without faults compares with the recorded one."""
    recorded = records(torch_version).get(result.test.id)
    if recorded is None:
        return Parity("not_recorded")
    if result.verdict == "not_applicable":
        return Parity("not_run", recorded)
    same = recorded.verdict == result.verdict
    return Parity("same" if same else "differs", recorded)


def rows_file(path: Path) -> GrowingFile:
    """The file to which ``--harness`` adds a row whenever a test has ended."""
    return GrowingFile(path, "row of PyTorch's harness", _BEGINS, "name another --harness")


def _row(line: bytes) -> tuple[tuple[str, str], dict[str, Any]] | None:
    """The row in a line, and its test; None for an incomplete line of a killed run."""
    try:
        row = json.loads(line)
        if not isinstance(row["verdict"], str):
            msg = "its verdict is no text"
            raise TypeError(msg)
        return (str(row["class"]), str(row["name"])), row
    except (ValueError, KeyError, TypeError, RecursionError):
        if line.startswith(_BEGINS[: len(line)]):
            return None
        raise


def read_rows(file: GrowingFile) -> list[dict[str, Any]]:
    """The rows of a record file, to which runs were added; of several rows of a test, the last.

    Raises:
        UsageError: a line is neither a row nor an incomplete row (which a killed run leaves).
    """
    return list(dict(filter(None, file.read(_row))).values())


if __name__ == "__main__":
    main()
