"""The file of the example under way: what it costs, and who is dead."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.properties import _programs
from rpcprops.report import _artefact as artefacts
from rpcprops.report._underway import DIRECTORY, Underway, collect, describe_died


def _cluster(**changes: Any) -> Any:
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 2), {1: FaultTable()})
    made = {"plan": plan, "program": None, "world_size": 3, "rate": 400.0, "transport": "tcp"}
    return SimpleNamespace(**made, init=True, **changes)


def _dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_an_example_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    """Writing down a program of a dozen steps takes under a millisecond, as a rule."""
    underway = Underway(tmp_path)
    underway.begin("planted")
    cluster = _cluster()
    cluster.program = _programs.handle_as_argument()
    took: list[float] = []
    for _ in range(200):
        began = time.perf_counter()
        underway(cluster)
        took.append(time.perf_counter() - began)
    assert statistics.median(took) < 1e-3


def test_what_is_written_is_an_artefact(tmp_path: Path) -> None:
    """Each cluster of an example is added to one artefact; the next example begins anew."""
    underway = Underway(tmp_path, "pytest")
    underway.begin("test_x.py::test_y")
    underway.example(lambda: ("6.1", "b'AA=='"))
    underway(_cluster())
    underway(_cluster())
    artefact = artefacts.read(underway.path)
    assert artefact.underway
    assert artefact.plans == (_cluster().plan,) * 2
    assert artefact.sizes == (3, 3)
    assert artefact.reproduction == ("6.1", "b'AA=='")
    assert artefact.fault_names == ("0:RREF_USER_DELETE", "2:RREF_USER_DELETE")
    underway.again()
    underway(_cluster())
    assert len(artefacts.read(underway.path).plans) == 1
    underway.clear()
    assert not list((tmp_path / DIRECTORY).iterdir())


def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    """Where there can be no file, there is none, and nothing is raised."""
    (tmp_path / ".rpcprops").write_text("a file")
    underway = Underway(tmp_path)
    underway.begin("planted")
    cluster = _cluster()
    cluster.program = _programs.create_and_drop()
    underway(cluster)
    underway.clear()
    assert collect(tmp_path) == []


def test_files_of_the_living_stay(tmp_path: Path) -> None:
    """What a live process has under way stays; a dead one's, or a reused number's, moves."""
    folder = tmp_path / DIRECTORY
    underway = Underway(tmp_path, "pytest")
    underway.begin("test_x.py::test_y")
    underway(_cluster())
    text = underway.path.read_bytes()
    (folder / f"{_dead_pid()}-77.json").write_bytes(text.replace(b"test_y", b"test_z"))
    (folder / f"{os.getpid()}-1.json").write_bytes(text.replace(b"test_y", b"test_w"))
    line = describe_died(tmp_path)
    assert line.startswith("an earlier run died during test_x.py::test_")
    assert "rpcprops replay " in line
    assert line.endswith(f"(and 1 more in {tmp_path / artefacts.DIRECTORY})")
    assert list(folder.iterdir()) == [underway.path]
    assert describe_died(tmp_path) == ""
    underway.clear()
