"""A folder or file that cannot be written costs that file: no report, no verdict, no exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=2, database=None)
@given(number=st.integers(0, 1))
def test_fails(rpc_cluster, number):
    with rpc_cluster(world_size=1):
        pass
    assert not "its own message"


def test_plain(rpc_cluster):
    with rpc_cluster(world_size=1):
        pass
    os.chdir("/")
    if os.environ.get("IN_THE_WAY"):
        Path(os.environ["IN_THE_WAY"]).mkdir()
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def project(make_project: MakeProject) -> Any:
    """A project in which a file is in the way of our folder."""
    made = make_project(test_own=CODE)
    (made.folder / ".rpcprops").write_text("in the way")
    return made


def _check_failure(result: Any) -> None:
    """The run has the failure with its own message, and a line in the place of its replay."""
    assert result.code == 1, result.out + result.err
    assert "1 failed, 1 passed" in result.out
    assert "INTERNALERROR" not in result.out + result.err
    section = result.section("test_fails")
    assert "its own message" in section
    (line,) = [line for line in section.splitlines() if line.startswith("replay   ")]
    assert line.startswith("replay   could not be written: .rpcprops/failures/test_own-py--")
    assert line.endswith(": Not a directory")


def test_a_failure_is_reported_without_any_file(project: Any) -> None:
    """Neither the artefact nor, at the end, --rpc-report can be written: two lines say so."""
    file = project.folder / "report.json"
    project.environment["IN_THE_WAY"] = str(file)
    result = project.pytest("--rpc-report=report.json")
    del project.environment["IN_THE_WAY"]
    _check_failure(result)
    assert "rpcprops: could not be written: report.json: Is a directory" in result.lines
    assert "Traceback" not in result.out + result.err


def test_a_failure_in_a_worker_is_reported_without_its_artefact(project: Any) -> None:
    """The same in a worker of xdist's; the report, which can be written, is where it was asked."""
    # A test leaves the folder that the path was relative to.
    result = project.pytest("-n", "1", "--rpc-report=second.json")
    _check_failure(result)
    data = json.loads((project.folder / "second.json").read_text(encoding="utf-8"))
    assert [test["outcome"] for test in data["tests"]] == ["failed", "passed"]


@pytest.mark.nightly  # what it writes with is what the failures above could not be written with
def test_check_goes_on_without_its_folder(project: Any) -> None:
    """`check` of a known finding and of a property: verdicts and exit code as ever, and a line."""
    names = ["timeout-holds", "failed-async-proxy", "--json", "verdicts.json"]
    result = project.command("rpcprops", "check", "-n", "2", *names)
    assert result.code == 0, result.out + result.err
    data = json.loads((project.folder / "verdicts.json").read_text(encoding="utf-8"))
    assert [one["verdict"] for one in data["properties"]] == ["holds", "known"]
    assert "replay   could not be written: .rpcprops/failures/" in result.out
    assert "at fault" not in result.out + result.err


@pytest.mark.nightly
def test_hunt_goes_on_without_its_folder(project: Any) -> None:
    """`hunt` whose own file cannot be written runs to its end, and says so."""
    result = project.command("rpcprops", "hunt", "-n", "3", "--batch", "3")
    assert result.code == 0, result.out + result.err
    assert "could not be written: .rpcprops/hunt.jsonl: " in result.out
    assert "at fault" not in result.out + result.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none/report.json", "there is no folder"),
        ("pipe", "it is no regular file (a pipe, a device or a socket)"),
    ],
)
def test_a_report_that_cannot_be_is_refused_at_once(project: Any, name: str, words: str) -> None:
    """--rpc-report on what is no file is a usage error of one line, before any test."""
    if not (project.folder / "pipe").exists():
        os.mkfifo(project.folder / "pipe")
    result = project.pytest(f"--rpc-report={name}")
    assert result.code == 4, result.out + result.err
    assert f"--rpc-report={name!r} cannot be written: {words}" in result.err
    assert "Traceback" not in result.out + result.err
