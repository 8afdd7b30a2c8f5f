"""Scripts and tests that replay writes, run: they show what they say, and nothing else."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import find

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import FINDINGS
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Drop, Fetch, Own, Program, Remote, Share
from rpcprops.properties import PROPERTIES, observe
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import Artefact, write
from rpcprops.report.script import script_of
from rpcprops.runner import Runner

SECONDS = 500
#: Findings that no script shows every time: they depend on which of two threads comes first.
_BY_CHANCE = {"early-owner-fork", "shutdown-deletes-argument"}
#: One that shows in so few runs that none is waited for.
_SELDOM = {"fetch-after-delete"}
PROGRAM = Program(
    2,
    (
        Remote(0, 1, "a"),
        Fetch(0, "a"),
        Call(0, 1, raises=True),
        Own(1, "mine", (4.0,)),
        Share(1, "mine", 0, "b"),
        Fetch(0, "b"),
        Drop(0, "a"),
        Drop(0, "b"),
        Drop(1, "mine"),
    ),
)
PLAN = FaultPlan(FaultTable(["RREF_USER_DELETE"], 1))


def _python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def _run(folder: Path, text: str) -> tuple[int, str]:
    (folder / "script.py").write_text(text, encoding="utf-8")
    done = _python(folder, "script.py")
    return done.returncode, done.stdout + done.stderr


def _planted(promise: str) -> Artefact:
    return Artefact(
        "program",
        "planted",
        promise,
        program=PROGRAM,
        plans=(PLAN,),
        violations=(Violation(promise, "planted"),),
    )


@pytest.mark.nightly
def test_a_script_of_what_holds_says_so(tmp_path: Path) -> None:
    """Where torch keeps its promise a script exits 0; with a wrong expectation in it, 1."""
    text = script_of(_planted("WrongValue")).text
    code, said = _run(tmp_path, text)
    assert (code, "the failure does not show" in said) == (0, True), said
    code, said = _run(tmp_path, text.replace("gives=[4.0]", "gives=[5.0]"))
    assert code == 1, said
    assert "the failure shows: step5 gave [4.0], and had to give [5.0]" in said


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("promise", "old", "new", "code"),
    [
        ("MissingError", "gives=[3.0]", 'raises="timeout"', 1),
        ("UnexpectedError", "(?i:On WorkerInfo|raised on purpose|RaisedOnPurpose)", "planted", 1),
        ("WrongValue", "(?i:On WorkerInfo|raised on purpose|RaisedOnPurpose)", "planted", 2),
        ("NotRunOnce", '"step0": 1', '"step0": 2', 1),
        ("NotRunOnce", "", "", 0),
        ("RRefLeak", "settle({})", 'settle({0: {"num_forks": 1}})', 1),
        ("RankDied", "return drop(", "os.kill(os.getpid(), 9)\n    return drop(", 1),
        ("RankDied", "", "", 0),
        ("RankHung", "return drop(", "time.sleep(1000)\n    return drop(", 1),
        ("UngracefulShutdown", "", "", 0),
        (
            "UngracefulShutdown",
            'what == "shutdown":\n        rpc',
            'what == "shutdown":\n        1 / 0',
            1,
        ),
        ("CallLeak", "import torch\n", "import torch_is_not_there\n", 2),
        ("CallLeak", "", "", 0),
    ],
)
def test_each_check_finds_what_it_is_for(
    tmp_path: Path, promise: str, old: str, new: str, code: int
) -> None:
    """A script with a planted fault of its kind exits 1, of another kind 2, and 0 without."""
    text = script_of(_planted(promise)).text
    assert old in text
    ended, said = _run(tmp_path, text.replace(old, new, 1))
    assert ended == code, said


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(FINDINGS.keys() - _SELDOM))
def test_known_findings_show_in_plain_torch(
    rpc_cluster: ClusterFactory, tmp_path: Path, name: str
) -> None:
    """What stock torch is known to get wrong shows in a script, where it shows in every run."""
    artefact = _finding(rpc_cluster, name)
    if artefact.promise == "ErrorInLog":
        with pytest.raises(UsageError, match="only a line in the log of a rank shows it"):
            script_of(artefact)
        return
    code, said = _run(tmp_path, script_of(artefact).text)
    assert code in ((0, 1) if name in _BY_CHANCE else (1,)), said


def _finding(rpc_cluster: ClusterFactory, name: str) -> Artefact:
    """The artefact of a known finding, as it shows here."""
    runner = Runner(rpc_cluster.server)
    case = find(PROPERTIES[name].cases(), lambda _: True)
    seen = observe(runner, case, anew=True)
    for _ in range(20):
        if seen.violations:
            break
        seen = observe(runner, case, anew=True)
    promise = seen.violations[0].promise
    return Artefact(
        case.kind,
        name,
        promise,
        program=case.program,
        plans=(case.plan,),
        outcomes=(seen.outcome,),
        violations=seen.violations,
    )


def test_replay_writes_a_script_and_a_test(rpc_cluster: ClusterFactory, tmp_path: Path) -> None:
    """Both lie next to the artefact, were run, and say so; other files are not replaced."""
    path = write(_finding(rpc_cluster, "readable-injected-error"), tmp_path)
    done = _python(tmp_path, "-m", "rpcprops", "replay", path.name, "--script", "--times", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "the script shows the failure in 1 of 1 runs",
        f"wrote {path.with_suffix('.py').name}",
    ]
    text = path.with_suffix(".py").read_text(encoding="utf-8")
    doc = " ".join(str(ast.get_docstring(ast.parse(text))).split())
    assert "It showed the failure in 1 of 1 runs when it was made." in doc
    mine = tmp_path / "mine.py"
    mine.write_text("# mine\n", encoding="utf-8")
    done = _python(
        tmp_path, "-m", "rpcprops", "replay", path.name, "--as-test", "--output", "mine.py"
    )
    assert done.returncode == 2
    assert "mine.py is there, and not made by replay" in done.stderr
    done = _python(tmp_path, "-m", "rpcprops", "replay", path.name, "--as-test")
    assert done.returncode == 1, done.stdout + done.stderr
    (test,) = tmp_path.glob("test_*.py")
    assert f"wrote {test.name}" in done.stdout
    ran = _python(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))
    assert ran.returncode == 1
    assert "recorded UnclearError" in ran.stdout


@pytest.mark.nightly  # test_replay.py leaves out faults in every run
def test_a_script_without_the_fault_that_it_needs_shows_nothing(
    rpc_cluster: ClusterFactory, tmp_path: Path
) -> None:
    """Such a replay ends with 0, and the script that was there, which is ours, is replaced."""
    path = write(_finding(rpc_cluster, "readable-injected-error"), tmp_path)
    words = ["-m", "rpcprops", "replay", path.name, "--script", "--times", "1"]
    assert _python(tmp_path, *words).returncode == 1
    done = _python(tmp_path, *words, "--without-fault", "0:PYTHON_RREF_FETCH_CALL")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"replaces {path.with_suffix('.py').name}" in done.stdout
