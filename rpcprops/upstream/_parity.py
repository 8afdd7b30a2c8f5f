"""What PyTorch's own harness says of each test: recorded for a version of torch, compared here.

The records were made by ``rpcprops upstream --harness``. A difference has a cause, written down
next to the record, or it is a defect of ours.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from rpcprops.upstream._examine import UpstreamResult

Agreement = Literal["same", "differs", "not_recorded"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A test in PyTorch's own harness.

    Attributes:
        seconds: real seconds.
        processor_seconds: of the four processes and more that the harness started.
        cause: why ours says another thing, where it does.
    """

    verdict: str
    reason: str
    seconds: float
    processor_seconds: float
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Parity:
    """The verdict of ours against the recorded one."""

    agreement: Agreement
    recorded: Recorded | None = None


@functools.cache
def records(torch_version: str) -> Mapping[str, Recorded]:
    """By ``Suite::test``; empty where no record was made for this torch."""
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


def parity_of(result: UpstreamResult, torch_version: str) -> Parity:
    """How the verdict without faults compares with the recorded one."""
    recorded = records(torch_version).get(result.test.id)
    if recorded is None:
        return Parity("not_recorded")
    same = recorded.verdict == result.verdict
    return Parity("same" if same else "differs", recorded)


def merged(lines: Iterable[str]) -> list[dict[str, object]]:
    """The rows of a record file that grew in pieces; of a test that is there twice, the last."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[row["class"], row["name"]] = row
        except (ValueError, KeyError, TypeError):
            # The last line of a run that was killed.
            continue
    return list(rows.values())
