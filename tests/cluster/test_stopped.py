"""Commands that are stopped or killed: nothing of theirs runs three seconds later."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rpcprops import _guard
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Violation
from rpcprops.programs import Pause, Program
from rpcprops.report.artefact import Artefact, write

#: Real seconds that are promised.
STOP_SECONDS = 3.0
#: Real seconds: far above what a start takes, so that a hang fails instead of staying.
START_SECONDS = 60.0
MARK = "RPCPROPS_TEST_MARK"
#: A process with a child in a session of its own, both of which would run for minutes.
TREE = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
subprocess.Popen(sleep, start_new_session=True)
print("started", flush=True)
try:
    time.sleep(300)
finally:
    time.sleep(0.3)
    os.makedirs(os.path.join(sys.argv[1], "late"))
"""
NAPS = """
import time


def test_naps(rpc_cluster):
    with rpc_cluster(world_size=2, clock="real") as cluster:
        cluster.on(0).call(time.sleep, 100)
"""


class Marked:
    """Every process with a mark in its environment, which children inherit."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = os.environ | {MARK: self.mark, "PYTHONDONTWRITEBYTECODE": "1"}

    def processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get(MARK) == self.mark
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def has(self, word: str) -> bool:
        """Whether one of them was started with a command line that holds this."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if word in " ".join(process.cmdline()):
                    return True
        return False

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while len(self.processes()) < count:
            assert time.monotonic() < deadline, self.processes()
            time.sleep(0.2)

    def gone_after(self, seconds: float) -> list[psutil.Process]:
        """What is still there that many real seconds from now."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > deadline:
                return left
            time.sleep(0.05)
        return []


@pytest.fixture
def marked() -> Iterator[Marked]:
    """A mark; whatever carries it at the end is killed."""
    it = Marked()
    yield it
    for process in it.processes():
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_who_runs_a_guarded_command(
    marked: Marked, tmp_path: Path, number: signal.Signals
) -> None:
    """Not the command, not what it started in a session of its own, and not its folder.

    Nor what the command writes there while it has a second to end.
    """
    code = (
        "import sys; from rpcprops import _guard\n"
        "with _guard.scratch('scratch-') as folder:\n"
        f"    _guard.run([sys.executable, '-c', {TREE!r}, folder])"
    )
    environment = marked.environment | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        assert process.wait(timeout=STOP_SECONDS) == -number
        assert marked.gone_after(STOP_SECONDS) == []
    assert list(tmp_path.iterdir()) == []


def test_no_folder_outlives_a_replay_between_its_runs(marked: Marked, tmp_path: Path) -> None:
    """A replay that is killed while no pytest of its runs leaves no folder either."""
    (tmp_path / "tmp").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from rpcprops import _guard, _users_test\n"
        "from rpcprops.report.artefact import Artefact\n"
        "_guard.run = lambda *_, **__: (print('started', flush=True), time.sleep(300))\n"
        f"made = Artefact('pytest', 'test_it.py::test_it', 'RankDied', rootdir={str(tmp_path)!r})\n"
        "_users_test.replay_test(Path('x.json'), made, times=1, clock=None)"
    )
    (tmp_path / "test_it.py").touch()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=marked.environment | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        process.kill()
        process.wait()
        assert marked.gone_after(STOP_SECONDS) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_guarded_command_is_as_any_other(tmp_path: Path) -> None:
    """Its exit code, signal, output and time limit are the command's, and a SIGTERM reaches it."""
    code = "import os, sys; print(os.getcwd()); sys.exit(7)"
    done = _guard.run(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (7, f"{tmp_path}\n")
    killed = _guard.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.returncode == -signal.SIGKILL
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(300)"]
    with _guard.guarded(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=STOP_SECONDS) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        _guard.run([sys.executable, "-c", "import time; time.sleep(300)"], timeout=0.2)


def test_a_command_that_is_to_stop_may_clean_up(tmp_path: Path) -> None:
    """It gets a SIGINT, as by Ctrl-C, and a second for what it has to do then."""
    sign = tmp_path / "sign"
    code = (
        "import time\nfrom pathlib import Path\ntry:\n    print(flush=True); time.sleep(300)\n"
        f"finally:\n    Path({str(sign)!r}).touch()"
    )
    command = [sys.executable, "-c", code]
    with _guard.guarded(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
    assert sign.exists()


def _replay(marked: Marked, folder: Path, path: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "rpcprops", "replay", str(path), "--clock", "real", *options],
        cwd=folder,
        env=marked.environment | {"TMPDIR": str(folder / "tmp"), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_replayed_test_stops_with_its_replay(
    marked: Marked, tmp_path: Path, number: signal.Signals
) -> None:
    """pytest, its server, its ranks and the temporary folder are gone; TERM is 143 and said."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(NAPS, encoding="utf-8")
    artefact = Artefact("pytest", "test_it.py::test_naps", "RankDied", rootdir=str(tmp_path))
    path = write(artefact, tmp_path)
    with _replay(marked, tmp_path, path) as process:
        # The replay, what keeps its folder, its guard, pytest, the server, a server with the
        # test's module, a rank.
        marked.wait_for(7)
        process.send_signal(number)
        _, err = process.communicate(timeout=STOP_SECONDS)
        assert marked.gone_after(STOP_SECONDS) == []
    assert process.returncode == (143 if number == signal.SIGTERM else -9), err
    assert list((tmp_path / "tmp").iterdir()) == []
    if number == signal.SIGTERM:
        assert err.splitlines()[-1] == "ended by SIGTERM"
        assert "Traceback" not in err


def test_a_script_that_is_tried_stops_with_its_replay(marked: Marked, tmp_path: Path) -> None:
    """A SIGHUP in the middle of it is exit code 129, and leaves neither process nor folder."""
    artefact = Artefact(
        "program",
        "naps",
        "CallLeak",
        program=Program(2, (Pause(0, 100.0),)),
        plans=(FaultPlan(FaultTable(["RREF_USER_DELETE"], 1)),),
        violations=(Violation("CallLeak", "planted"),),
    )
    path = write(artefact, tmp_path)
    with _replay(marked, tmp_path, path, "--script") as process:
        # The replay, its guard, the script, and what it starts its ranks with.
        marked.wait_for(4)
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=STOP_SECONDS)
        assert marked.gone_after(STOP_SECONDS) == []
    assert process.returncode == 129, err
    assert err.splitlines()[-1] == "ended by SIGHUP"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_kill_while_the_server_starts_ends_it(marked: Marked, tmp_path: Path) -> None:
    """A server that imports torch does not see its socket close: the kernel ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rpcprops", "doctor", "--clock", "real"],
        cwd=tmp_path,
        env=marked.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Not the short-lived one that tries the clock library.
        deadline = time.monotonic() + START_SECONDS
        while not marked.has("cluster._server"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    # Its own import of torch takes longer.
    assert marked.gone_after(0.5) == []
