"""The plugin's options, and what it makes of a user's own Hypothesis settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests._wire import needs_wire

MakeProject = Callable[..., Any]

SMALL = """
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import FaultTable


def test_rate(rpc_cluster):
    with rpc_cluster(world_size=1) as cluster:
        print("rate", cluster.rate, "transport", cluster.transport)


@settings(max_examples=9, database=None)
@given(number=st.integers(0, 10**9))
def test_drawn(rpc_cluster, number):
    with open("drawn.txt", "a") as file:
        print(number, file=file)
    with rpc_cluster(world_size=2, faults=FaultTable(["RREF_USER_DELETE"], 1)):
        pass
"""

SHARD_FAILS = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bug


@pytest.mark.parametrize("kind", ["a", "b"])
@settings(max_examples=4, database=None)
@given(number=st.integers(0, 1))
def test_fails(rpc_cluster, number, kind):
    with rpc_cluster(world_size=1):
        pass
    assert bug.FIXED or kind == "b"


def test_plain(rpc_cluster):
    with rpc_cluster(world_size=1):
        pass
"""


@pytest.fixture(scope="module")
def real(make_project: MakeProject) -> Any:
    """A run in real time and over shared memory; the project has a profile of its own."""
    project = make_project(test_small=SMALL, test_profiles=PROFILES)
    chosen = ["test_small.py::test_rate", "test_profiles.py"]
    return project.pytest("--rpc-clock=real", "--rpc-transport=shm", "-s", *chosen)


def test_real_clock_and_shared_memory(real: Any) -> None:
    """--rpc-clock=real and --rpc-transport=shm show in the header and in clusters."""
    result = real
    assert result.code == 0, result.out
    assert "rpcprops: clock real time, as asked for; transport shm" in result.lines
    assert "rate 1.0 transport shm" in result.out


@pytest.fixture(scope="module")
def without_xdist(make_project: MakeProject) -> tuple[Any, dict[str, Any]]:
    """A run at a rate of its own and in shards without pytest-xdist, and its report."""
    project = make_project(test_small=SMALL)
    found: tuple[Any, dict[str, Any]] = project.report(
        "--rpc-clock=20", "-s", "-p", "no:xdist", "--rpc-shards=3"
    )
    return found


def test_clock_by_rate(without_xdist: tuple[Any, dict[str, Any]]) -> None:
    """--rpc-clock=20 is the rate of clusters that name none."""
    result, _ = without_xdist
    assert result.code == 0, result.out
    assert any(line.startswith("rpcprops: clock 20 ") for line in result.lines)
    assert "rate 20.0 transport tcp" in result.out


AGENT = """
def test_default(rpc_cluster):
    with rpc_cluster(world_size=1) as cluster:
        pass
    assert cluster.outcome.agent == ""


def test_own_choice(rpc_cluster):
    with rpc_cluster(world_size=1, agent="tensorpipe") as cluster:
        pass
    assert cluster.outcome.agent == "TENSORPIPE"
"""


@needs_wire
def test_agent(make_project: MakeProject) -> None:
    """--rpc-agent=wire is the agent of clusters that name none, also where one is replayed."""
    project = make_project(test_agent=AGENT)
    result = project.pytest("--rpc-agent=wire")
    assert result.code == 1, result.out
    assert any(line.endswith("; transport tcp; agent WIRE") for line in result.lines)
    assert "1 failed, 1 passed" in result.lines[-1]
    (artefact,) = re.findall(r"rpcprops replay (\S+)", result.out)
    replayed = project.command("rpcprops", "replay", artefact, "--times=1", "--no-needed")
    assert "reproduced" in replayed.out
    faulty = "--agent=faulty_tensorpipe"
    other = project.command("rpcprops", "replay", artefact, "--times=1", "--no-needed", faulty)
    assert "fixed" in other.out


BAD = {
    "--rpc-agent=wires": "--rpc-agent: there is no agent 'wires'. The agents are",
    "--rpc-clock=quick": "--rpc-clock: clock='quick' must be 'auto', 'real', or a rate",
    "--rpc-clock=0.5": "--rpc-clock: clock=0.5 must be",
    "--rpc-clock=nan": "--rpc-clock: clock=nan must be",
    "--rpc-shards=0": "--rpc-shards=0 must be 1 or more",
    "--rpc-transport=udp": "invalid choice: 'udp'",
    "--rpc-replay=nothing.json": "nothing.json: No such file",
    "--rpc-upstream --rpc-upstream-faults=sampled --rpc-upstream-agent=tensorpipe": (
        "--rpc-upstream-agent=TENSORPIPE injects no faults, and --rpc-upstream-faults=sampled asks"
    ),
}
#: Runs pytest once for each option, in one process: most of what a run takes is to import it.
EACH = """
import sys

import pytest

sys.stderr = sys.stdout
for option in sys.argv[1:]:
    print("code", int(pytest.main([*option.split(), "-k", "rate"])), end="\\n\\0")
"""


@pytest.fixture(scope="module")
def refused(make_project: MakeProject) -> dict[str, str]:
    """What pytest prints for each bad option, and as its last line its exit code."""
    ended = make_project(test_small=SMALL, each=EACH).command("each", *BAD)
    assert ended.code == 0, ended.out + ended.err
    return dict(zip(BAD, ended.out.split("\0"), strict=False))


@pytest.mark.parametrize("option", BAD)
def test_bad_options(refused: dict[str, str], option: str) -> None:
    """A bad option is a usage error of one line, with exit code 4, before any test runs."""
    said = refused[option]
    assert said.splitlines()[-1] == "code 4", said
    assert BAD[option] in said
    assert "Traceback" not in said
    assert "passed" not in said


def test_shards_draw_different_examples(make_project: MakeProject) -> None:
    """--rpc-shards 3 -n 2 makes three items that draw different examples, a third each."""
    project = make_project(test_small=SMALL)
    result, report = project.report("--rpc-shards=3", "-n", "2")
    assert result.code == 0, result.out
    names = [f"test_drawn[shard{n}]" for n in (1, 2, 3)]
    assert set(report) == {"test_rate", *names}
    assert [report[name]["examples"] for name in names] == [3, 3, 3]
    drawn = (project.folder / "drawn.txt").read_text(encoding="utf-8").split()
    # Each shard starts with the simplest example; beyond it they differ.
    assert len(drawn) == 9
    assert len(set(drawn)) >= 6


def test_xdist_is_not_needed(without_xdist: tuple[Any, dict[str, Any]]) -> None:
    """Tests run, and are sharded, where pytest-xdist is not loaded."""
    result, report = without_xdist
    assert result.code == 0, result.out
    assert sum(test["examples"] for name, test in report.items() if "drawn" in name) == 9


@pytest.mark.nightly
def test_failure_of_a_shard_is_replayed(make_project: MakeProject) -> None:
    """The replay line of a failing shard is its test's, and runs without shards."""
    project = make_project(test_shards=SHARD_FAILS, bug="FIXED = False")
    result = project.pytest("--rpc-shards=2")
    assert result.code == 1, result.out
    assert "2 failed, 3 passed" in result.out
    paths = {
        line.split("rpcprops replay ")[1] for line in result.lines if line.startswith("replay  ")
    }
    (path,) = paths
    artefact = json.loads((project.folder / path).read_text(encoding="utf-8"))
    assert artefact["subject"] == "test_shards.py::test_fails[a]"
    again = project.command("rpcprops", "replay", path)
    assert again.code == 1, again.out + again.err
    assert "reproduced: AssertionError in 3 of 3 runs" in again.out
    # A test that draws something else now is neither: the artefact does not fit it.
    other = SHARD_FAILS.replace("st.integers(0, 1)", "st.tuples(*[st.integers()] * 9)")
    project.write(test_shards=other)
    changed = project.command("rpcprops", "replay", path)
    assert changed.code == 2, changed.out + changed.err
    assert "reproduced" not in changed.out


PROFILES = """
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

settings.register_profile("mine", max_examples=7, deadline=12345, derandomize=True)
settings.load_profile("mine")


def current(test):
    return test._hypothesis_internal_use_settings


@given(number=st.integers())
def test_plain(number):
    assert hypothesis.settings.default.max_examples == 7


@settings(deadline=4321, phases=[Phase.generate])
@given(number=st.integers())
def test_own_settings(rpc_cluster, number):
    now = current(test_own_settings)
    assert now.deadline.total_seconds() == 4.321
    assert now.phases == (Phase.generate,)
    assert now.max_examples == 7
    assert now.derandomize
    assert HealthCheck.too_slow not in now.suppress_health_check


@given(number=st.integers())
def test_profile(rpc_cluster, number):
    now = current(test_profile)
    assert now.deadline is None
    assert now.max_examples == 7
    assert now.derandomize


def test_nothing_changes():
    assert settings.get_current_profile_name() == "mine"
    assert settings.default.deadline.total_seconds() == 12.345
    names = {"rpcprops-dev", "rpcprops-ci", "rpcprops-nightly", "rpcprops-debug"}
    for name in names:
        assert settings.get_profile(name).deadline is None
    assert current(test_own_settings).deadline.total_seconds() == 4.321
"""


def test_own_profiles_are_untouched(real: Any) -> None:
    """A user's profile and settings hold; only a deadline that nobody set is taken away."""
    assert real.code == 0, real.out
    assert "5 passed" in real.lines[-1]


def test_nothing_starts_when_nothing_is_used(make_project: MakeProject) -> None:
    """A project without our fixture gets the header line, no server, no torch and no summary."""
    code = """
    import sys

    import psutil


    def test_nothing():
        assert "torch" not in sys.modules
        assert not psutil.Process().children()
    """
    result = make_project(test_nothing=code).pytest()
    assert result.code == 0, result.out
    assert [line for line in result.lines if "rpcprops" in line and "clock" not in line] in (
        [],
        [line for line in result.lines if line.startswith("plugins:")],
    )
