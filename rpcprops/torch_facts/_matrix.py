"""The matrix: what each version of torch showed, one column for each, in one committed file."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from rpcprops.errors import UsageError
from rpcprops.torch_facts._versions import release

#: The committed file.
FILE = Path(__file__).with_name("matrix.json")
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PropertyCell:
    """A property on a version: its verdict, as in ``rpcprops check``."""

    verdict: str
    examples: int = 0
    faults_fired: int = 0


@dataclass(frozen=True, slots=True)
class FindingCell:
    """The smallest case of a finding on a version.

    Attributes:
        tried: how often it ran under the fast clock.
        seen: how many of these runs showed it.
        tried_real: how often it ran in real time.
        seen_real: how many of these runs showed it.
    """

    verdict: str
    tried: int = 0
    seen: int = 0
    tried_real: int = 0
    seen_real: int = 0


@dataclass(frozen=True, slots=True)
class HuntCell:
    """A hunt on a version.

    Attributes:
        failures: failures that nothing explains, confirmed in real time.
        unconfirmed: failures that real time did not show again.
        findings: examples that met each known finding.
        accepted: examples that showed each documented effect.
    """

    examples: int = 0
    faults_fired: int = 0
    failures: int = 0
    unconfirmed: int = 0
    findings: Mapping[str, int] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UpstreamCell:
    """PyTorch's own RPC tests of a version, on ranks of ours.

    Attributes:
        failed: the ids of the tests that failed.
        differs: tests whose verdict differs from the recorded one of PyTorch's own harness.
        recorded: how many tests have a record of PyTorch's own harness.
    """

    passed: int = 0
    skipped: int = 0
    not_applicable: int = 0
    failed: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """One version of torch.

    Attributes:
        torch: the version, without a local part: ``2.13.0``.
        build: as torch itself names it: ``2.13.0+cpu``.
        measured: the day, as ``YYYY-MM-DD``.
        rate: virtual seconds for each real one, under the fast clock; 0 before that was measured.
    """

    torch: str
    build: str
    measured: str
    python: str
    rate: float
    properties: Mapping[str, PropertyCell] = field(default_factory=dict)
    findings: Mapping[str, FindingCell] = field(default_factory=dict)
    hunt: HuntCell | None = None
    upstream: UpstreamCell | None = None


@dataclass(frozen=True, slots=True)
class _File:
    format: int
    columns: tuple[Column, ...]


def read(file: Path) -> tuple[Column, ...]:
    """The columns of a matrix file, the oldest version first; none if there is no file.

    Raises:
        UsageError: the file is no matrix.
    """
    if not file.exists():
        return ()
    try:
        data = msgspec.json.decode(file.read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError) as error:
        msg = f"{file}: no matrix of torch versions: {error}."
        raise UsageError(msg) from None
    if data.format != _FORMAT:
        msg = f"{file}: a matrix of format {data.format}, and this reads format {_FORMAT}."
        raise UsageError(msg)
    return data.columns


def write(file: Path, found: Iterable[Column]) -> None:
    """Write a matrix: the oldest version first, one column for each; the last one given counts."""
    by_version = {column.torch: column for column in found}
    ordered = sorted(by_version.values(), key=lambda column: _numbers(column.torch))
    data = msgspec.json.encode(_File(_FORMAT, tuple(ordered)))
    text = msgspec.json.format(data, indent=1).decode() + "\n"
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


@functools.cache
def columns() -> tuple[Column, ...]:
    """The committed matrix."""
    return read(FILE)


def seen_on(finding: str) -> Sequence[tuple[int, int]]:
    """The releases of torch on which a finding was seen, in the committed matrix."""
    return tuple(
        release(column.torch)
        for column in columns()
        if finding in column.findings and column.findings[finding].verdict == "known"
    )
