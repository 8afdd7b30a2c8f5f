"""Bugs of users' own programs that only faults show: the default draws find each of them."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.pytest_plugin import ClusterFactory


@dataclass(frozen=True)
class Bug:
    """A planted bug.

    Attributes:
        name: the module in ``bugs/`` that has it, and the test that a user would write.
        shown_by: a plan under which it shows.
        error: a part of what the test then raises.
    """

    name: str
    shown_by: FaultPlan
    error: str


def _late(rank: int, message: str, seconds: float) -> FaultPlan:
    return FaultPlan(by_rank={rank: FaultTable(messages_to_delay={message: seconds})})


def _failing(rank: int, message: str, times: int) -> FaultPlan:
    return FaultPlan(by_rank={rank: FaultTable([message], times)})


BUGS = (
    Bug("gradient_twice", _late(1, "PYTHON_CALL", 1.5), "AssertionError"),
    Bug("stale_policy", _late(1, "PYTHON_RREF_FETCH_CALL", 1.5), "AssertionError"),
    Bug("observers_kept", _failing(2, "RREF_FORK_REQUEST", 4), "RRefLeak"),
    Bug("read_before_update", _late(1, "PYTHON_REMOTE_CALL", 1.5), "AssertionError"),
    Bug("server_full", _failing(1, "RREF_USER_DELETE", 3), "the server is full"),
    Bug("push_lost", _failing(1, "PYTHON_REMOTE_CALL", 1), "AssertionError"),
    Bug("barrier_opens_early", _late(1, "PYTHON_CALL", 1.8), "AssertionError"),
    Bug("context_left", _failing(2, "RREF_FORK_REQUEST", 5), "ContextLeak"),
    Bug("scripted_stage", _late(0, "SCRIPT_CALL", 1.5), "timeout"),
)


@pytest.mark.nightly
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_shows_under_its_fault_alone(rpc_cluster: ClusterFactory, bug: Bug) -> None:
    """Without faults the user's test passes; under the fault it fails as the bug makes it."""
    module = importlib.import_module(f"tests.planted.bugs.{bug.name}")
    (test,) = [value for name, value in vars(module).items() if name.startswith("test_")]
    body: Any = test.hypothesis.inner_test
    for _ in range(3):
        body(rpc_cluster, FaultPlan())
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each bug raises what it raises
        body(rpc_cluster, bug.shown_by)
    assert bug.error in f"{type(caught.value).__name__}: {caught.value}"


SEEDS = 10
#: Real seconds for the nine tests with one seed, on a loaded machine.
SECONDS = 900
CONFTEST = """
from hypothesis import Phase, settings

# How a failure shrinks is not what is measured.
phases = [Phase.explicit, Phase.generate]
settings.register_profile("planted", max_examples=100, database=None, phases=phases)
settings.load_profile("planted")
"""


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int | None]]:
    """How many examples each bug took with each seed; None where 100 did not find it."""
    folder = tmp_path_factory.mktemp("planted")
    for bug in BUGS:
        source = Path(__file__).parent / "bugs" / f"{bug.name}.py"
        shutil.copy(source, folder / f"test_{bug.name}.py")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    found: dict[str, list[int | None]] = {bug.name: [] for bug in BUGS}
    for seed in range(SEEDS):
        report = folder / f"seed{seed}.json"
        subprocess.run(
            [sys.executable, "-m", "pytest", f"--hypothesis-seed={seed}", f"--rpc-report={report}"],
            cwd=folder,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        for test in json.loads(report.read_text())["tests"]:
            name = test["nodeid"].partition(".py")[0].removeprefix("test_")
            found[name].append(test["examples"] if test["outcome"] == "failed" else None)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_default_draws_find_it(bug: Bug, examples: dict[str, list[int | None]]) -> None:
    """A bug is found within 100 examples with nine of ten seeds, or with all."""
    assert len(examples[bug.name]) == SEEDS
    assert examples[bug.name].count(None) <= 1, examples[bug.name]
