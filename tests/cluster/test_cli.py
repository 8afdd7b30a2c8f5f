"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rpcprops.oracle import DOCUMENTED
from rpcprops.properties import PROPERTIES
from tests._commands import Commands, Ended

#: Real seconds: far above what a command takes, so that a hang fails instead of staying.
COMMAND_SECONDS = 100
COMMAND = [sys.executable, "-m", "rpcprops"]
KEYS = {
    "name",
    "promise",
    "verdict",
    "examples",
    "executions",
    "compared",
    "faults_fired",
    "fired_by_type",
    "seconds",
    "violations",
    "unconfirmed",
    "status",
    "tries",
    "known_findings_met",
    "accepted",
}


Rpcprops = Callable[..., Ended]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "160", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def rpcprops(tmp_path: Path, environment: dict[str, str]) -> Rpcprops:
    """Runs the rpcprops command in an empty folder."""

    def run(*arguments: str) -> Ended:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["versions"]["torch"]
    assert data["clock"].startswith("clock: ")
    verdicts: list[dict[str, Any]] = data["properties"]
    for verdict in verdicts:
        assert set(verdict) >= KEYS
        known = ("holds", "known", "not_seen", "violated", "vacuous", "undecided")
        assert verdict["verdict"] in known
    return verdicts


def test_check(rpcprops: Rpcprops, tmp_path: Path) -> None:
    """`check` of two properties exits 0, prints a verdict of each, and writes them as JSON."""
    names = ["rref-values", "timeout-holds"]
    file = tmp_path / "out.json"
    ended = rpcprops("check", *names, "-n", "8", "--seed", "1", "--json", str(file))
    assert ended.code == 0, ended.out + ended.err
    verdicts = read_verdicts(file)
    assert [verdict["name"] for verdict in verdicts] == names
    for verdict in verdicts:
        assert verdict["verdict"] == "holds"
        assert 1 <= verdict["examples"] <= 8
        assert verdict["faults_fired"] == sum(verdict["fired_by_type"].values()) > 0
        assert verdict["seconds"] > 0
        assert 0 <= verdict["compared"] <= verdict["examples"]
        assert f"{verdict['compared']:2} in real time as well" in ended.out
        assert verdict["violations"] == verdict["unconfirmed"] == []
        assert f"holds     {verdict['name']}" in ended.out
    assert "Traceback" not in ended.err


def test_a_table_in_a_pipe_is_never_cut(
    tmp_path: Path, environment: dict[str, str], rpcprops: Rpcprops
) -> None:
    """Whatever width the terminal is said to have, a pipe gets every name in full."""
    environment["COLUMNS"] = "40"
    name = "rref-lifetime-after-reinit"
    ended = rpcprops("check", name, "--json", "out.json")
    assert ended.code == 0, ended.out + ended.err
    table = [line for line in ended.out.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in table] == [name]
    assert "…" not in ended.out
    (row,) = read_verdicts(tmp_path / "out.json")
    assert row["verdict"] == "known"
    assert [tries["rate"] for tries in row["tries"]] == [400.0, 1.0]
    assert all(1 <= tries["seen"] <= tries["tried"] for tries in row["tries"])


def test_what_is_accepted_is_told_and_strict_fails_on_it(
    rpcprops: Rpcprops, tmp_path: Path
) -> None:
    """The same draws: counted with a sentence and an example, and a failure under --strict."""
    words = ["check", "drawn-beyond-budget", "-n", "8", "--seed", "3", "--json", "out.json"]
    ended = rpcprops(*words)
    assert ended.code == 0, ended.out + ended.err
    assert "    accepted leak-at-owner, in " in ended.out
    assert DOCUMENTED["leak-at-owner"].sentence in ended.out
    assert "         such as Program(" in ended.out
    (said,) = [
        line for line in ended.out.splitlines() if line.startswith("accepted  leak-at-owner")
    ]
    total = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["accepted"]
    times, examples = (total["leak-at-owner"][name] for name in ("times", "examples"))
    assert times >= examples >= 1
    assert said.startswith(f"accepted  leak-at-owner: {times} time")
    strict = rpcprops(*words, "--strict")
    assert strict.code == 1
    assert "reason   strict: documented effects are failures (" in strict.out


def test_unknown_property(refusing: Commands, tmp_path: Path) -> None:
    """An unknown property exits 2 with one line that helps, and starts nothing."""
    began = time.monotonic()
    ended = refusing.run(tmp_path, "check", "rref-values", "rref-valeus")
    assert ended.code == 2
    assert "there is no property 'rref-valeus'; did you mean rref-values" in ended.err
    ended = refusing.run(tmp_path, "check", "zzzz")
    assert ended.code == 2
    assert all(name in ended.err for name in PROPERTIES)
    assert len(ended.err.strip().splitlines()) == 1
    assert "Traceback" not in ended.out + ended.err
    assert time.monotonic() - began < 20


def test_list(refusing: Commands, tmp_path: Path) -> None:
    """`check --list` names every property with its promise, one a line, and exits 0."""
    ended = refusing.run(tmp_path, "check", "--list")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines] == list(PROPERTIES)
    for line, shipped in zip(lines, PROPERTIES.values(), strict=True):
        assert line.endswith(shipped.promise)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--profile", "weekly"], "there is no profile 'weekly'; there are: dev, ci"),
        (["check", "--transport", "udp"], "--transport 'udp' must be 'tcp' or 'shm'"),
        (["check", "--clock", "quick"], "clock='quick' must be 'auto', 'real', or a rate"),
        (["check", "--clock", "0.5"], "clock=0.5 must be"),
        (["check", "-n", "0"], "Invalid value for '--examples' / '-n'"),
        (["check", "-n", "many"], "Invalid value for '--examples' / '-n'"),
        (["doctor", "--clock", "nan"], "clock=nan must be"),
        (["replay", "nothing.json"], "nothing.json: No such file or directory."),
        (["replay"], "Missing argument"),
        (["check", "--json", "."], "--json '.': it is a folder; name a file in it."),
        (["sweep", "create_and_fetch[python]", "--json", "no/x.json"], "make it first, or name"),
        (["bench", "--json", "/dev/zero"], "--json '/dev/zero': it is no regular file"),
        (["hunt", "--json", "/proc/x.json"], "--json '/proc/x.json': no file can be made"),
        (["hunt", "--file", "no/hunt.jsonl"], "--file 'no/hunt.jsonl': there is no folder"),
        (["hunt", "--file", "/dev/zero"], "--file '/dev/zero': it is no regular file"),
        (["hunt", "--file", "notes.txt"], "notes.txt, line 1: no batch of a hunt"),
        (["hunt", "--jobs", "none"], "--jobs 'none' must be a number from 1 to 256, or auto"),
        (["hunt", "--show"], "--show and files of hunts belong together (no file)"),
        (["hunt", "--show", "no.jsonl"], "no.jsonl: there is no such file"),
        (["upstream", "--junit", "/dev/zero"], "--junit '/dev/zero': it is no regular file"),
        (["upstream", "--harness", "notes.txt"], "notes.txt, line 1: no row of PyTorch's"),
        (["sing"], "sing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse(refusing: Commands, tmp_path: Path, arguments: list[str], words: str) -> None:
    """Every misuse exits 2 and names the value, without a traceback, and costs nobody a file."""
    (tmp_path / "notes.txt").write_text("my notes", encoding="utf-8")
    ended = refusing.run(tmp_path, *arguments)
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "my notes"
    assert ended.code == 2, ended.out + ended.err
    assert words in ended.err
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json {",
        "{}",
        "[1, 2]",
        '{"what": "rpcprops failure", "format": 999}',
        '{"what": "rpcprops failure", "format": 1, "kind": "program"}',
        '{"what": "rpcprops failure", "format": 1, "kind": "program", "subject": 3}',
        "[" * 100_000,
        "\x00\x01",
    ],
    ids=["empty", "text", "object", "list", "newer", "bare", "types", "deep", "bytes"],
)
def test_damaged_artefacts(refusing: Commands, tmp_path: Path, text: str) -> None:
    """`replay` of a damaged file exits 2 and says so in one line."""
    file = tmp_path / "damaged.json"
    file.write_text(text, encoding="utf-8")
    ended = refusing.run(tmp_path, "replay", "damaged.json")
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert "damaged.json" in ended.err
    assert not ended.out


def test_doctor(rpcprops: Rpcprops, tmp_path: Path, environment: dict[str, str]) -> None:
    """`doctor` exits 0, names versions and clock, has tried both transports, and writes nothing.

    Also where the user makes errors of warnings: nothing of ours gives one.
    """
    environment["PYTHONWARNINGS"] = "error"
    ended = rpcprops("doctor")
    assert ended.code == 0, ended.out + ended.err
    for word in ("python", "torch", "rpcprops", "hypothesis", "agent WIRE", "clock", "tcp", "shm"):
        assert any(line.startswith(word) for line in ended.out.splitlines()), word
    assert ended.out.count("one injected failure fired and was retried") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", "check", "replay", "doctor"])
def test_help(rpcprops: Rpcprops, command: str) -> None:
    """`--help` of each command exits 0, says what it does, and imports no torch to do so."""
    began = time.monotonic()
    ended = rpcprops(*command.split(), "--help")
    assert ended.code == 0
    assert "Usage:" in ended.out
    assert len(ended.out.splitlines()) > 5
    assert "Exit codes: 0 " in ended.out
    assert "2 misuse; 3 this machine cannot;" in " ".join(ended.out.split())
    assert not command or f"Example: rpcprops {command}" in ended.out
    assert "…" not in ended.out
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGINT, "interrupted"),
        # tests/unit/test_stop.py has both signals in every run.
        pytest.param(signal.SIGTERM, "ended by SIGTERM", marks=pytest.mark.nightly),
    ],
)
def test_interrupted_check(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals, word: str
) -> None:
    """Ctrl-C and SIGTERM end a `check` in order: it says and writes what it has, and who ended it.

    `timeout` and terminals send a signal twice.
    """
    file = tmp_path / "out.json"
    with subprocess.Popen(
        [*COMMAND, "check", "timeout-holds", "rref-values", "-n", "4000", "--json", str(file)],
        cwd=tmp_path,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            # Its first line comes when the server runs.
            assert process.stdout.readline().startswith("torch ")
            time.sleep(0.7)
            below = psutil.Process(process.pid).children(recursive=True)
            assert below
            process.send_signal(number)
            process.send_signal(number)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 128 + number, out + err
    assert word in err
    assert "Traceback" not in out + err
    assert "unfinished timeout-holds: " in out
    read_verdicts(file)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


def test_interrupted_start(tmp_path: Path, environment: dict[str, str]) -> None:
    """A `check` that is interrupted while its server starts exits 130 too, not as a violation."""
    with subprocess.Popen(
        [*COMMAND, "check", "rref-values"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 30
            below: list[psutil.Process] = []
            # One look: the first child only tries something out, and has ended at the next.
            while not below and time.monotonic() < deadline:
                time.sleep(0.01)
                below = psutil.Process(process.pid).children(recursive=True)
            assert below
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
