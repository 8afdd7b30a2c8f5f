"""``rpcprops upstream`` and ``pytest --rpc-upstream``, as users run them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.programs import Program
from rpcprops.report.artefact import Artefact, read, write
from tests._commands import Commands

RPCPROPS = [sys.executable, "-m", "rpcprops"]
#: Real seconds, far above what a command takes here.
LIMIT = 150


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def upstream(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, *RPCPROPS, "upstream", *arguments)


def test_no_xdist_is_said_where_it_is_needed(tmp_path: Path) -> None:
    """Without pytest-xdist -n 2 names what to install, and pytest starts all the same."""
    # What is None there cannot be imported, and is found nowhere.
    without = "import sys; sys.modules['xdist'] = None; "
    command = f"{without}from rpcprops.cli import main; main()"
    refused = run(tmp_path, sys.executable, "-c", command, "upstream", "-n", "2")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "-n 2 needs pytest-xdist, which is not installed" in refused.stderr
    start = f"{without}from rpcprops.commands.upstream import _pytest; _pytest(['--markers'])"
    # Where -p names the plugins.
    started = run(tmp_path, sys.executable, "-c", start, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert started.stderr == ""
    assert "@pytest.mark.parametrize" in started.stdout


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param((), id="alone"),
        # test_workers_that_die.py and others run xdist in every run.
        pytest.param(("-n", "2"), id="side by side", marks=pytest.mark.nightly),
    ],
)
def test_selected_tests_run_and_are_reported(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """In one process or in two; the terminal, the JSON and the XML say the same."""
    report, xml = tmp_path / "report.json", tmp_path / "report.xml"
    # What the folder configures is meant for its own tests.
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n", encoding="utf-8")
    chosen = "RpcTest and (test_add_with_id or key_names) or CudaRemoteModuleTest"
    written = ["--json", str(report), "--junit", str(xml)]
    done = upstream(tmp_path, *workers, "-k", chosen, *written)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PyTorch's RPC suites, without faults" in done.stdout
    # That the plugin is there before pytest is nothing to warn of.
    assert "warning" not in done.stdout
    tests = json.loads(report.read_text(encoding="utf-8"))["tests"]
    verdicts = {(test["class"], test["verdict"]) for test in tests}
    assert verdicts == {
        ("RpcTest", "passed"),
        ("RpcTest", "skipped"),
        ("CudaRemoteModuleTest", "not_applicable"),
    }
    cases = ElementTree.parse(xml).getroot().iter("testcase")
    assert {(case.get("classname"), case.get("name")) for case in cases} == {
        (f"upstream.{test['class']}", test["name"]) for test in tests
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--faults", "some"], "--faults 'some'"),
        (["--clock", "fast"], "clock='fast'"),
        (["--agent", "none"], "there is no agent 'none'. The agents are"),
        (["--json", "no/such/folder/x.json"], "no/such/folder"),
        (["--json", "."], "is a folder"),
        (["--harness", "rows.jsonl", "--list"], "--harness goes with -k alone"),
    ],
)
def test_misuse_is_told_in_a_line(
    refusing: Commands, tmp_path: Path, arguments: list[str], words: str
) -> None:
    """What cannot be is refused with exit code 2, the value, and no traceback."""
    ended = refusing.run(tmp_path, "upstream", *arguments)
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.nightly
def test_nothing_selected_is_misuse(tmp_path: Path) -> None:
    """An expression that no test matches is exit code 2, as a misspelt one should be."""
    done = upstream(tmp_path, "-k", "no_such_test")
    assert done.returncode == 2
    assert "563 deselected" in done.stdout


@pytest.mark.nightly
def test_the_pytest_entry_collects_the_suites_alone(tmp_path: Path) -> None:
    """``pytest --rpc-upstream`` lists PyTorch's tests, and not those of the folder."""
    (tmp_path / "test_own.py").write_text("def test_of_this_folder(): pass\n", encoding="utf-8")
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    chosen = ["-k", "ParameterServer or of_this_folder"]
    done = run(tmp_path, *pytest_, "--rpc-upstream", "--collect-only", "-q", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "upstream::ParameterServerTest::test_batch_updating_parameter_server" in done.stdout
    assert "of_this_folder" not in done.stdout


def under_way(folder: Path) -> Artefact:
    """The file of the test that runs, which is removed when that ends: then the next is read."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with contextlib.suppress(UsageError, StopIteration):
            return read(next((folder / ".rpcprops" / "underway").glob("*.json")))
        time.sleep(0.001)
    pytest.fail("no test is under way")


def test_an_interrupted_run_reports_what_it_has(tmp_path: Path) -> None:
    """Ctrl-C ends the run with exit code 130, the report of what had run, and no process left.

    Until then the file of the test that runs is on disk, and names it as PyTorch's: after a SIGKILL
    it would stay there, and replay.
    """
    report = tmp_path / "report.json"
    process = subprocess.Popen(
        [*RPCPROPS, "upstream", "-k", "RpcTest", "--json", str(report)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("collected"):
            assert process.poll() is None
        while process.stdout.read(1) != ".":
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        artefact = under_way(tmp_path)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(timeout=LIMIT) == 130, said
    finally:
        process.kill()
        process.communicate()
    assert artefact.kind == "upstream"
    assert artefact.subject.startswith("RpcTest::test_")
    assert artefact.underway
    assert json.loads(report.read_text(encoding="utf-8"))["tests"]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


# tests/cluster/test_servers.py kills servers, and test_suites.py has a crash that fails one test.
@pytest.mark.nightly
def test_a_lost_fork_server_costs_one_test(tmp_path: Path) -> None:
    """A fork server that is killed fails the test whose ranks have joined; the next test runs."""
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent(
            """
            import contextlib

            import psutil

            begun = []

            def pytest_runtest_setup(item):
                server = item.plugin.ranks.server
                begin = server.on_start

                def kill_once_it_has_started(cluster):
                    server.on_start = begin
                    begun.append(cluster)
                    run = cluster.run_to_exit

                    def kill_and_run(*args, **kwargs):
                        for child in psutil.Process().children(recursive=True):
                            # One may end with another that was killed before it.
                            with contextlib.suppress(psutil.NoSuchProcess):
                                child.kill()
                        return run(*args, **kwargs)

                    cluster.run_to_exit = kill_and_run

                if not begun:
                    server.on_start = kill_once_it_has_started
            """
        ),
        encoding="utf-8",
    )
    report = tmp_path / "report.json"
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rpc-upstream"]
    ids = ["upstream::RpcTest::test_add", "upstream::RpcTest::test_add_with_id"]
    done = run(tmp_path, *pytest_, f"--rpc-upstream-report={report}", *ids)
    assert done.returncode == 1, done.stdout + done.stderr
    tests = json.loads(report.read_text(encoding="utf-8"))["tests"]
    assert {(test["name"], test["verdict"]) for test in tests} == {
        ("test_add", "failed"),
        ("test_add_with_id", "passed"),
    }
    assert "fork server" in next(test["reason"] for test in tests if test["name"] == "test_add")


def test_a_failure_replays(tmp_path: Path) -> None:
    """The file of a failing test of PyTorch's runs that test again, under its faults."""
    artefact = Artefact(
        kind="upstream",
        subject="RpcTest::test_rref_forward_chain",
        promise="RankDied",
        program=Program(4, ()),
        plans=(FaultPlan(FaultTable(["RREF_FORK_REQUEST"], 6)),),
        transport="shm",
    )
    path = write(artefact, tmp_path)
    done = run(tmp_path, *RPCPROPS, "replay", str(path), "--times", "2", "--no-needed")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "reproduced: RankDied in 2 of 2 runs at rate 50" in done.stdout


@pytest.mark.nightly
def test_pytorchs_own_harness_is_recorded_in_pieces(tmp_path: Path) -> None:
    """A second run leaves out what the file has, and adds the rest."""
    file = tmp_path / "rows.jsonl"
    first = upstream(tmp_path, "--harness", str(file), "-k", "RpcTest and test_add_with_id")
    assert first.returncode == 0, first.stdout + first.stderr
    chosen = "JitRpcTest and add_done or add_with_id"
    again = upstream(tmp_path, "--harness", str(file), "-k", chosen)
    assert "2 tests, of which 1 are in" in again.stdout
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["name"], row["verdict"]) for row in rows] == [
        ("test_add_with_id", "passed"),
        ("test_add_done_callback", "passed"),
    ]
