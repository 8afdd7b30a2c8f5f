"""`rpcprops sweep`, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests._commands import Commands
from tests._wire import needs_wire

SECONDS = 100
COMMAND = [sys.executable, "-m", "rpcprops", "sweep"]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _sweep(
    folder: Path, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_an_interrupted_sweep_goes_on(tmp_path: Path, environment: dict[str, str]) -> None:
    """Ctrl-C keeps what was run; the next sweep runs the rest of the 76 tables, and all hold."""
    with subprocess.Popen(
        [*COMMAND, "create_and_fetch[python]"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        lines = 0
        while lines < 4 and process.poll() is None and time.monotonic() < deadline:
            files = list(tmp_path.glob(".rpcprops/sweeps/*.jsonl"))
            lines = sum(len(file.read_text().splitlines()) for file in files)
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "unfinished" in out
    assert "Traceback" not in out + err
    file = tmp_path / "map.json"
    done = _sweep(tmp_path, environment, "create_and_fetch[python]", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if " are known from " in line]
    known = int(line.split()[0])
    assert 3 <= known < 76
    assert "76 of 76 held" in done.stdout
    data = json.loads(file.read_text(encoding="utf-8"))
    assert (data["verdict"], data["holds"], len(data["cases"])) == ("holds", 76, 76)
    # One delete for each table that fails deletes: 8 sets of types, 1 to 5 times each.
    assert data["faults_fired"] == 8 * (1 + 2 + 3 + 4 + 5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "there is no shipped program 'nothing'"),
        ([], "sweep needs a PROGRAM"),
        (["just_dropped", "--ranks", "some"], "--ranks 'some' must be 'all', 'each' or 'pairs'"),
        (["just_dropped", "--transport", "udp"], "--transport 'udp' must be"),
        (["just_dropped", "--points", "--agent", "tensorpipe"], "injects no faults"),
    ],
)
def test_misuse(tmp_path: Path, refusing: Commands, words: list[str], said: str) -> None:
    """Every misuse exits 2 with one line."""
    ended = refusing.run(tmp_path, "sweep", *words)
    assert ended.code == 2, ended.out + ended.err
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_list(tmp_path: Path, environment: dict[str, str]) -> None:
    """`sweep --list` names the shipped programs."""
    done = _sweep(tmp_path, environment, "--list")
    assert done.returncode == 0
    assert "fork_user_to_user  3 ranks, 7 steps" in done.stdout.splitlines()


@pytest.mark.nightly
@needs_wire
@pytest.mark.parametrize("program", ["create_and_fetch[python]", "fork_user_to_user"])
def test_every_message_of_a_program_with_every_fault(
    tmp_path: Path, environment: dict[str, str], program: str
) -> None:
    """Each row of the map was run, none is a failure, and most of them are as predicted."""
    file = tmp_path / "map.json"
    done = subprocess.run(
        [*COMMAND, program, "--points", "--json", str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text(encoding="utf-8"))
    verdicts = [row["verdict"] for row in data["points"]]
    assert set(verdicts) <= {"holds", "known", "documented", "overdue", "ran", "waits"}
    assert verdicts.count("holds") * 2 > len(verdicts)
    assert data["run"]["predicted"] + data["run"]["unpredicted"] == len(verdicts)
    assert data["run"]["unpredicted"] == sum(not row["predicted"] for row in data["points"])
