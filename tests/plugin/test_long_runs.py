"""What the plugin keeps: no more with each test, and nothing from one run of pytest to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import gc

import pytest

import rpcprops
from rpcprops import FaultTable, programs
from rpcprops.outcomes import Outcome

PROGRAM = programs.Program(1, ())


def kept():
    gc.collect()
    return sum(isinstance(thing, Outcome) for thing in gc.get_objects())


def test_first(rpc_cluster):
    with rpc_cluster(world_size=1):
        pass


def test_many_without_the_fixture():
    runner = rpcprops.runner.default_runner()
    before = kept()
    for _ in range(5):
        runner.run_anew(PROGRAM)
    assert kept() == before


def test_many_with_the_fixture(rpc_cluster, monkeypatch):
    from rpcprops.plugin import session

    monkeypatch.setattr(session, "MOST_KEPT", 4)
    before = kept()
    for _ in range(10):
        with rpc_cluster(world_size=1, faults=FaultTable(["RREF_USER_DELETE"], 1)):
            pass
    assert kept() - before <= 4
    pytest.fail("to be reported")


class Mute(Exception):
    def __str__(self):
        raise KeyError("planted")


def raise_mute():
    raise Mute


def test_without_a_text(rpc_cluster):
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(raise_mute)


def test_without_a_text_here(rpc_cluster):
    with rpc_cluster(world_size=1):
        pass
    raise Mute
"""

TWICE = """
import sys

import pytest

codes = [pytest.main(sys.argv[1:]) for _ in range(2)]
print("codes", *map(int, codes))
"""

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> tuple[Any, dict[str, Any]]:
    """A run of the project, and its report."""
    result, report = make_project(test_user=CODE).report()
    assert result.code == 1, result.out
    return result, report


def test_what_clusters_showed_is_kept_while_it_is_wanted(ran: tuple[Any, dict[str, Any]]) -> None:
    """Neither run() after a test of rpc_cluster nor a loop in one keeps ever more outcomes."""
    result, report = ran
    assert report["test_first"]["clusters"] == 1
    assert report["test_many_without_the_fixture"]["clusters"] == 5
    assert "FAILED test_user.py::test_many_without_the_fixture" not in result.out
    many = report["test_many_with_the_fixture"]
    # What was not kept is counted all the same.
    assert many["clusters"] == 10
    assert many["armed"] == 1
    section = result.section("test_many_with_the_fixture")
    assert "Failed: to be reported" in section
    assert "clusters 10 in this example; shown: 10" in section
    assert section.count("faults   ") == 1


def test_an_exception_without_a_text_is_reported(ran: tuple[Any, dict[str, Any]]) -> None:
    """Raised in a rank or here, it fails its test as itself, with replay line and artefact."""
    result, _ = ran
    assert "INTERNALERROR" not in result.out
    for name in ("test_without_a_text", "test_without_a_text_here"):
        section = result.section(name)
        assert "Mute" in section
        assert "replay   rpcprops replay .rpcprops/failures/" in section


def test_two_runs_of_one_process_are_apart(make_project: MakeProject) -> None:
    """pytest.main twice: the second report and summary are of the second run alone."""
    project = make_project(test_user=CODE, twice=TWICE)
    result = project.command("twice", "--rpc-report=report.json", "-k", "first")
    assert "codes 0 0" in result.lines
    said = "rpcprops: 1 cluster in 1 test, 0 injected faults fired"
    assert [line for line in result.lines if "injected faults" in line] == [said] * 2
    assert (project.folder / "report.json").read_text(encoding="utf-8").count('"nodeid"') == 1
