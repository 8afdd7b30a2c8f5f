"""Real time that nobody asked for: one line in the header and one in the summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpcprops import clock as clocks

pytestmark = pytest.mark.skipif(clocks.library_path() is None, reason="no clock library")

MakeProject = Callable[..., Any]

UNASKED = "clock: real time, though it was not asked for: "

TESTS = """
import rpcprops


def test_rate(rpc_cluster):
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.rate == 1.0


def test_run():
    assert rpcprops.run(rpcprops.Program(1, ())).clock_rate == 1.0
"""

#: The library that is preloaded is one that was never written to the end.
EMPTY = """
from pathlib import Path

from rpcprops import clock

library = Path(__file__).with_name("_preload.so")
library.touch()
clock.library_path = lambda: library
"""

#: The process that lets its clock be measured refuses its rate, and ends.
PROBE_DIES = """
from rpcprops.cluster import _wire

send = _wire.send


def wrong_rate(sock, message, descriptors=()):
    send(sock, ("probe", -1.0) if message[0] == "probe" else message, descriptors)


_wire.send = wrong_rate
"""


LONG = pytest.mark.nightly


def ours(lines: list[str]) -> list[str]:
    """The lines that tell of the clock."""
    return [line for line in lines if line.startswith("rpcprops: clock")]


def test_a_library_that_does_not_load(make_project: MakeProject) -> None:
    """The header and the summary have a line each, with what the dynamic linker says."""
    result = make_project(test_it=TESTS, conftest=EMPTY).pytest()
    assert result.code == 0, result.out
    header, summary = ours(result.lines)
    assert header == f"{summary.replace('clock: ', 'clock ', 1)}; transport tcp"
    assert summary.startswith(f"rpcprops: {UNASKED}")
    assert "cannot be preloaded (file too short)" in summary
    assert "reinstall rpcprops with a C compiler" in summary


def test_a_rate_that_cannot_be_had(make_project: MakeProject) -> None:
    """Asked for by number, the header says that it cannot be had, and the tests fail with that."""
    project = make_project(test_it=TESTS, conftest=EMPTY)
    result = project.pytest("--rpc-clock=40", "-k", "test_rate")
    assert result.code == 1
    (header,) = ours(result.lines)
    assert header.startswith("rpcprops: clock 40 cannot be had: ")
    assert "file too short" in header
    assert "rpc_cluster: clock=40.0 cannot be had: " in result.out


def test_a_probe_that_dies_in_workers(make_project: MakeProject) -> None:
    """What only workers measure is in the controller's summary, once for all of them."""
    project = make_project(test_it=TESTS, conftest=PROBE_DIES)
    result = project.pytest("-n", "2", "--dist=each")
    assert result.code == 0, result.out
    header, summary = ours(result.lines)
    assert header == (
        "rpcprops: clock auto (the rate is measured when the first cluster starts); transport tcp"
    )
    assert summary.startswith(f"rpcprops: {UNASKED}the dilated process ended")


@LONG  # tests/cluster/test_clock_fallback.py has the same of a server
def test_real_time_that_was_asked_for(make_project: MakeProject) -> None:
    """Who asks for real time reads so in the header, and nothing in the summary."""
    result = make_project(test_it=TESTS, conftest=EMPTY).pytest("--rpc-clock=real", "-k", "run")
    assert result.code == 0, result.out
    assert ours(result.lines) == ["rpcprops: clock real time, as asked for; transport tcp"]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("check", "timeout-holds", "-n", "1"), id="check"),
        pytest.param(("upstream", "-k", "test_add_with_id"), id="upstream", marks=LONG),
        pytest.param(("doctor",), id="doctor", marks=LONG),
    ],
)
def test_commands_say_it_first_and_last(
    make_project: MakeProject, arguments: tuple[str, ...]
) -> None:
    """A command tells of real time in its header, and again once all else is said."""
    project = make_project(start=EMPTY + "from rpcprops.cli import main\nmain()\n")
    result = project.command("start", *arguments)
    assert result.code == 0, result.out + result.err
    said = [n for n, line in enumerate(result.lines) if "though it was not asked for" in line]
    assert len(said) == 2
    # What doctor prints is one table, whose cells are narrow.
    assert arguments == ("doctor",) or "file too short" in result.lines[said[0]]
    assert f"{UNASKED}the clock library does not load: " in result.lines[said[1]]
    assert "file too short" in result.lines[said[1]]


@LONG  # test_commands_say_it_first_and_last shows it of `check`
def test_a_replayed_test_says_it_first_and_last(make_project: MakeProject) -> None:
    """`replay` of a test runs pytest, and tells itself what that found of the clock."""
    fails = TESTS.replace("== 1.0\n\n\ndef test_run", "== 2.0\n\n\ndef test_run")
    project = make_project(
        test_it=fails, conftest=EMPTY, start=EMPTY + "from rpcprops.cli import main\nmain()\n"
    )
    assert project.pytest("-k", "test_rate").code == 1
    (artefact,) = Path(project.folder, ".rpcprops", "failures").glob("*.json")
    result = project.command("start", "replay", str(artefact), "--times", "1")
    said = [line for line in result.lines if line.startswith(UNASKED)]
    assert len(said) == 2
    assert result.lines[-1] == said[1]
