"""The matrix of torch versions: what makes a column, what is kept, and what the tables show."""

from __future__ import annotations

import datetime
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.oracle import FINDINGS
from rpcprops.properties import PROPERTIES
from rpcprops.torch_facts import Column, FindingCell, HuntCell, columns, release, seen_on
from rpcprops.torch_facts.__main__ import DOCUMENT, kept_in
from rpcprops.torch_facts._matrix import read
from rpcprops.torch_facts._measured import add, column_of, put_into, tables

ROOT = Path(__file__).parents[2]
DAY = datetime.date(2030, 1, 2)


def reports(folder: Path, build: str = "2.99.1+cu999", **parts: Any) -> Path:
    """A folder with reports of each command, as the commands write them."""
    versions = {"versions": {"torch": build}}
    check = {
        **versions,
        "rate": 400.0,
        "properties": [
            {"name": "p", "verdict": "holds", "examples": 9, "faults_fired": 4, "status": None},
            {
                "name": "f",
                "verdict": "known",
                "status": "unlisted",
                "tries": [
                    {"rate": 400.0, "seen": 1, "tried": 3},
                    {"rate": 1.0, "seen": 1, "tried": 2},
                ],
            },
        ],
    }
    hunt = {
        **versions,
        "examples": 300,
        "faults_fired": 7,
        "failures": [["WrongValue", "x.json"]],
        "unconfirmed": [],
        "known_findings_met": {"f": 3},
        "accepted": [{"kind": "leak-at-owner", "examples": 5}],
    }
    upstream = {
        **versions,
        "summary": {"passed": 1, "skipped": 0, "not_applicable": 2},
        "tests": [
            {"class": "C", "name": "a", "verdict": "passed", "parity": {"agreement": "same"}},
            {"class": "C", "name": "b", "verdict": "failed", "parity": {"agreement": "differs"}},
        ],
    }
    folder.mkdir(exist_ok=True)
    for name, data in {"check": check, "hunt": hunt, "upstream": upstream, **parts}.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("2.5.1", (2, 5)),
        ("2.15.0a0+git1234", (2, 15)),
        ("3.0.0.dev20300101", (3, 0)),
        ("main", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_the_release_of_a_version(version: str, expected: tuple[int, int]) -> None:
    """Builds, nightlies and local versions belong to a release."""
    assert release(version) == expected


def test_the_reports_of_a_version_make_a_column(tmp_path: Path) -> None:
    """Verdicts, tries, hunt and suites, with the build and the day."""
    column = column_of(reports(tmp_path / "one"), DAY)
    assert (column.torch, column.build, column.measured) == ("2.99.1", "2.99.1+cu999", "2030-01-02")
    assert list(column.properties) == ["p"]
    assert column.findings["f"] == FindingCell("known", 3, 1, 2, 1)
    assert column.hunt == HuntCell(300, 7, 1, 0, {"f": 3}, {"leak-at-owner": 5})
    assert column.upstream is not None
    assert (column.upstream.passed, column.upstream.failed) == (1, ("C::b",))
    assert (column.upstream.differs, column.upstream.recorded) == (("C::b",), 2)


def test_reports_of_two_versions_are_refused(tmp_path: Path) -> None:
    """The message names both, and a folder without a report of check is refused too."""
    folder = reports(tmp_path / "one", other={})
    (folder / "check-slow.json").write_text(
        json.dumps({"versions": {"torch": "2.5.1"}, "rate": 400.0, "properties": []})
    )
    with pytest.raises(UsageError, match=r"reports of torch 2\.5\.1, 2\.99\.1\+cu999"):
        column_of(folder)
    with pytest.raises(UsageError, match=r"no report \(check\*\.json, hunt\.json or upstream"):
        column_of(tmp_path)
    with pytest.raises(UsageError, match="a report lacks"):
        column_of(
            reports(tmp_path / "two", check={"versions": {"torch": "2.99.1+cu999"}, "rate": 1.0})
        )


def test_a_part_that_is_measured_again_leaves_the_others(tmp_path: Path) -> None:
    """A column takes the place of that of its version; what it lacks stays as it was."""
    file = tmp_path / "matrix.json"
    add(file, column_of(reports(tmp_path / "one"), DAY))
    add(file, Column("2.99.1", "2.99.1", "2031-01-01", "3.12", 400.0))
    add(file, Column("2.10.0", "2.10.0", "2031-01-01", "3.12", 400.0))
    add(file, Column("2.9.1", "2.9.1", "2031-01-01", "3.12", 400.0))
    found = read(file)
    assert [column.torch for column in found] == ["2.9.1", "2.10.0", "2.99.1"]
    assert found[2].measured == "2031-01-01"
    assert list(found[2].findings) == ["f"]
    assert found[2].hunt is not None
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["matrix.json"]


def test_a_file_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    """With its name, and what is wrong."""
    file = tmp_path / "matrix.json"
    for text, said in (("{}", "no matrix"), ('{"format": 9, "columns": []}', "format 9")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=said):
            read(file)
    assert read(tmp_path / "none.json") == ()


def test_the_tables_say_what_was_tried_and_what_was_mended() -> None:
    """Not seen, mended and not measured are told apart."""
    found = [
        Column("2.1", "2.1", "d1", "", 400.0, findings={"f": FindingCell("known", 3, 1, 2, 1)}),
        Column("2.2", "2.2", "d2", "", 400.0, findings={"f": FindingCell("not_seen", 20, 0, 15)}),
        Column("2.3", "2.3", "d3", "", 400.0, findings={"f": FindingCell("holds", 20, 0, 15)}),
        Column("2.4", "2.4", "d4", "", 400.0),
    ]
    made = tables(found, {"f": "fixed in 2.3"})
    row = next(line for line in made.splitlines() if line.startswith("| `f`"))
    assert row == "| `f` | 1/3, 1/2 | not seen (0/20, 0/15) | fixed in 2.3 | – |"
    assert "| measured | d1 | d2 | d3 | d4 |" in made


def test_the_document_shows_the_committed_matrix() -> None:
    """docs/findings.md is what `python -m rpcprops.torch_facts` makes of the file."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == put_into(text, tables(columns(), kept_in()))
    with pytest.raises(UsageError, match="lacks"):
        put_into("no marks", "")


def test_the_matrix_is_of_what_ships() -> None:
    """It has a column for the version that CI runs on, and every property and finding in it."""
    by_version = {column.torch: column for column in columns()}
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition("torch==")[2]
    column = by_version[pinned.split()[0]]
    assert {*column.properties, *column.findings} == set(PROPERTIES)
    assert set(column.findings) == set(FINDINGS)
    for name in FINDINGS:
        assert seen_on(name)


def test_the_oldest_version_of_the_matrix_is_the_one_that_is_asked_for() -> None:
    """What the package says that it needs has been measured."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (needed,) = [one for one in data["project"]["dependencies"] if one.startswith("torch>=")]
    oldest = columns()[0]
    assert release(needed.removeprefix("torch>=")) == release(oldest.torch)


def test_no_version_breaks_what_is_promised() -> None:
    """In the committed matrix nothing is violated, and no hunt has an unexplained failure."""
    for column in columns():
        verdicts = [cell.verdict for cell in column.properties.values()]
        verdicts += [cell.verdict for cell in column.findings.values()]
        assert set(verdicts) <= {"holds", "known", "not_seen"}, column.torch
        assert column.hunt is None or column.hunt.failures == 0, column.torch
