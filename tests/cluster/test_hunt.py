"""A hunt on real ranks, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rpcprops._hunt import Hunt

#: Real seconds: far above what these hunts take.
HUNT_SECONDS = 100
FILE = Path(".rpcprops") / "hunt.jsonl"


def hunt(folder: Path, examples: int, *options: str) -> None:
    """Hunt in `folder` until its file has so many examples."""
    command = [sys.executable, "-m", "rpcprops", "hunt", "--batch", "2", "--json", "hunt.json"]
    command += ["-n", str(examples), *options]
    ran = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HUNT_SECONDS,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_hunt_goes_on_where_its_file_stops(tmp_path: Path) -> None:
    """The second, by two processes, runs what is missing, and keeps what the first has run."""
    hunt(tmp_path, 1)
    (done,) = Hunt.read(tmp_path / FILE).batches
    hunt(tmp_path, len(done.cases) + 1, "--jobs", "2")
    batches = Hunt.read(tmp_path / FILE).batches
    assert batches[0] == done
    assert len({(b.property, b.seed, b.transport) for b in batches}) == len(batches) >= 2
    summary = json.loads((tmp_path / "hunt.json").read_text(encoding="utf-8"))
    assert summary["examples"] > len(done.cases)
    assert summary["failures"] == []
