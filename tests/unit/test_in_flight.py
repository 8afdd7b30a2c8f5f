"""The file of the example under way: what it costs, and who is dead."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.properties import _programs
from rpcprops.report import artefact as artefacts
from rpcprops.report.in_flight import (
    DIRECTORY,
    FOREIGN_SECONDS,
    InFlight,
    collect,
    describe_died,
)


def _cluster(**changes: Any) -> Any:
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 2), {1: FaultTable()})
    made: dict[str, Any] = {
        "plan": plan,
        "program": None,
        "world_size": 3,
        "rate": 400.0,
        "transport": "tcp",
    }
    made["options"] = SimpleNamespace(agent="WIRE")
    return SimpleNamespace(**{**made, "init": True, "may_reuse": False, **changes})


def _dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_an_example_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    """Writing down a program of a dozen steps takes under a millisecond of processor time."""
    in_flight = InFlight(tmp_path)
    in_flight.begin("planted")
    cluster = _cluster()
    cluster.program = _programs.handle_as_argument()
    took: list[float] = []
    for _ in range(200):
        began = time.thread_time()
        in_flight(cluster)
        took.append(time.thread_time() - began)
    assert statistics.median(took) < 1e-3


def test_what_is_written_is_an_artefact(tmp_path: Path) -> None:
    """Each cluster of an example is added to one artefact; the next example begins anew."""
    in_flight = InFlight(tmp_path, "pytest", "TENSORPIPE")
    in_flight.begin("test_x.py::test_y")
    in_flight.example(lambda: ("6.1", "b'AA=='"))
    in_flight(_cluster())
    in_flight(_cluster())
    artefact = artefacts.read(in_flight.path)
    assert artefact.underway
    assert artefact.plans == (_cluster().plan,) * 2
    assert artefact.sizes == (3, 3)
    assert artefact.reproduction == ("6.1", "b'AA=='")
    assert artefact.fault_names == ("0:RREF_USER_DELETE", "2:RREF_USER_DELETE")
    assert not artefact.may_be_used
    # Not that of the clusters, which may name one themselves.
    assert artefact.agent == "TENSORPIPE"
    in_flight.again()
    in_flight(_cluster(may_reuse=True))
    artefact = artefacts.read(in_flight.path)
    assert len(artefact.plans) == 1
    assert artefact.may_be_used
    in_flight.clear()
    assert not list((tmp_path / DIRECTORY).iterdir())


def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    """Where there can be no file, there is none, and nothing is raised."""
    (tmp_path / ".rpcprops").write_text("a file")
    in_flight = InFlight(tmp_path)
    in_flight.begin("planted")
    cluster = _cluster()
    cluster.program = _programs.create_and_drop()
    in_flight(cluster)
    in_flight.clear()
    assert collect(tmp_path) == []


def test_a_full_disk_leaves_no_file_of_another_example(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """An example that could not be written down is not taken for the one before it."""
    in_flight = InFlight(tmp_path, "pytest")
    in_flight.begin("test_x.py::test_y")
    in_flight(_cluster())
    with full_disk():
        in_flight(_cluster())
    assert not list((tmp_path / DIRECTORY).iterdir())
    in_flight.begin("test_x.py::test_z")
    in_flight(_cluster())
    assert artefacts.read(in_flight.path).subject == "test_x.py::test_z"
    in_flight.clear()


def test_a_folder_that_went_is_made_again(tmp_path: Path) -> None:
    """Whoever removes the folder while tests run costs no more than the test that runs."""
    in_flight = InFlight(tmp_path, "pytest")
    in_flight.begin("test_x.py::test_y")
    in_flight(_cluster())
    shutil.rmtree(tmp_path / ".rpcprops")
    in_flight(_cluster())
    in_flight.clear()
    in_flight.begin("test_x.py::test_z")
    in_flight(_cluster())
    assert in_flight.path.exists()
    in_flight.clear()


def test_what_cannot_be_removed_ends_nothing(tmp_path: Path) -> None:
    """A leftover that cannot be removed stays; the others are found all the same."""
    folder = tmp_path / DIRECTORY
    (folder / "999999999-1.writing").mkdir(parents=True)
    in_flight = InFlight(tmp_path, "pytest")
    in_flight.begin("test_x.py::test_y")
    in_flight(_cluster())
    in_flight.path.rename(folder / f"{_dead_pid()}-77.json")
    in_flight.path.mkdir()
    in_flight.clear()
    (folder.parent / "failures").touch()  # nothing can be moved there
    (died,) = collect(tmp_path)
    assert died.subject == "test_x.py::test_y"
    assert artefacts.read(died.path).underway


def test_other_namespaces_are_not_taken_for_dead(tmp_path: Path) -> None:
    """A process of another container or machine may live, whatever its number is here.

    After a day without another example it is taken for dead.
    """
    in_flight = InFlight(tmp_path, "pytest")
    in_flight.begin("test_x.py::test_y")
    in_flight(_cluster())
    pid, started, _ = in_flight.path.stem.split("-")
    foreign = [
        in_flight.path.with_name(f"{number}-{started}-0123456789ab{suffix}")
        for number in (pid, _dead_pid())
        for suffix in (".json", ".writing")
    ]
    for path in foreign:
        shutil.copy(in_flight.path, path)
    assert collect(tmp_path) == []
    assert all(path.exists() for path in foreign)
    old = time.time() - FOREIGN_SECONDS - 60
    for path in [*foreign, in_flight.path]:
        os.utime(path, (old, old))
    assert [died.subject for died in collect(tmp_path)] == ["test_x.py::test_y"] * 2
    # Of its own namespace it is seen to live, however old the file.
    assert list((tmp_path / DIRECTORY).iterdir()) == [in_flight.path]
    in_flight.clear()


def test_a_file_of_another_pid_namespace_is_named_so(tmp_path: Path) -> None:
    """Two processes of one machine that have numbers of their own write two kinds of names."""
    code = "from pathlib import Path; from rpcprops.report import in_flight as u; print(u._here())"
    command = [sys.executable, "-c", code]
    here = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert InFlight(tmp_path).path.stem.endswith(f"-{here.strip()}")
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", *command]
    there = subprocess.run(apart, capture_output=True, text=True, timeout=30, check=False)
    if there.returncode:
        pytest.skip(f"this machine makes no PID namespaces: {there.stderr.strip()}")
    assert there.stdout.strip() != here.strip()


def test_files_of_the_living_stay(tmp_path: Path) -> None:
    """What a live process has under way stays; a dead one's, or a reused number's, moves."""
    folder = tmp_path / DIRECTORY
    in_flight = InFlight(tmp_path, "pytest")
    in_flight.begin("test_x.py::test_y")
    in_flight(_cluster())
    text = in_flight.path.read_bytes()
    (folder / f"{_dead_pid()}-77.json").write_bytes(text.replace(b"test_y", b"test_z"))
    (folder / f"{os.getpid()}-1.json").write_bytes(text.replace(b"test_y", b"test_w"))
    line = describe_died(tmp_path)
    assert line.startswith("an earlier run died during test_x.py::test_")
    assert "rpcprops replay " in line
    assert line.endswith(f"(and 1 more in {tmp_path / artefacts.DIRECTORY})")
    assert list(folder.iterdir()) == [in_flight.path]
    assert describe_died(tmp_path) == ""
    in_flight.clear()
