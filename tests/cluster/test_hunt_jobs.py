"""A hunt by two processes on real ranks, as a user runs it: one that dies, and an interrupt."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpcprops._hunt import Hunt

pytestmark = pytest.mark.nightly
#: Real seconds: far above what these hunts take.
HUNT_SECONDS = 200
FILE = Path(".rpcprops") / "hunt.jsonl"


def command(*options: str) -> list[str]:
    """A hunt by two processes."""
    return [sys.executable, "-m", "rpcprops", "hunt", "--jobs", "2", *options]


def below(folder: Path) -> dict[int, str]:
    """The processes that run in a folder: their numbers, and their commands."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cwd").readlink() == folder:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has ended, or is not ours
    return found


def workers(folder: Path) -> list[int]:
    """The workers of the hunt that runs in a folder."""
    return [
        pid
        for pid, said in below(folder).items()
        if "-m rpcprops._hunt_jobs" in said and "_guard.py" not in said
    ]


def until(holds: Callable[[], object]) -> None:
    """Wait for something; it fails if it takes too long."""
    end = time.monotonic() + HUNT_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_processes_hunt_in_one_file(tmp_path: Path) -> None:
    """Two workers draw different batches, and the process that started them keeps what they run."""
    ran = subprocess.run(
        command("-n", "3", "--batch", "2", "--seed", "5"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HUNT_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    hunt = Hunt.read(tmp_path / FILE)
    assert hunt.seed == 5
    assert hunt.examples >= 3
    keys = [(b.property, b.seed, b.transport) for b in hunt.batches]
    assert len(set(keys)) == len(keys) >= 2
    assert min(seed for _, seed, _ in keys) == 5_000_000
    assert not below(tmp_path)


def test_a_worker_that_dies_is_named_and_loses_nothing(tmp_path: Path) -> None:
    """Its draws are run by another one; and a SIGTERM ends all before the command has ended."""
    with (
        (tmp_path / "out.txt").open("w") as out,
        subprocess.Popen(
            command("-n", "100000", "--batch", "5"), cwd=tmp_path, stdout=out, stderr=out
        ) as process,
    ):
        until((tmp_path / FILE).exists)
        os.kill(workers(tmp_path)[0], signal.SIGKILL)

        def said() -> str:
            return (tmp_path / "out.txt").read_text()

        until(lambda: "another one has its draws now" in said())
        (died,) = re.findall(
            r"worker \d ended by SIGKILL during (.*), (tcp|shm), seed (\d+)", said()
        )
        name, transport, seed = died

        def is_drawn() -> bool:
            batches = Hunt.read(tmp_path / FILE).batches
            return (name, int(seed), transport) in {
                (b.property, b.seed, b.transport) for b in batches
            }

        until(is_drawn)
        until(lambda: len(workers(tmp_path)) == 2)
        before = len(Hunt.read(tmp_path / FILE).batches)
        process.terminate()
        assert process.wait(HUNT_SECONDS) == 128 + signal.SIGTERM
    assert not below(tmp_path)
    assert len(Hunt.read(tmp_path / FILE).batches) >= before
    assert not list((tmp_path / ".rpcprops" / "underway").glob("*"))


def test_nothing_outlives_a_hunt_that_is_killed(tmp_path: Path) -> None:
    """After a SIGKILL of the process that hunts, its workers and their ranks end by themselves."""
    with subprocess.Popen(
        command("-n", "100000", "--batch", "5"), cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: len(workers(tmp_path)) == 2)
        until(lambda: len(below(tmp_path)) > 8)
        process.kill()
    until(lambda: not below(tmp_path))
