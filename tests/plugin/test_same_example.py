"""The traceback, the report, the artefact and the replay of a failure are of one example."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bounds import LOW, TOP

few = settings(max_examples=15, derandomize=True, database=None)
chance = random.SystemRandom()


def nothing():
    return None


def rate_of(rpc_cluster):
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(nothing)
        return cluster.rate


@few
@given(number=st.integers(0, TOP))
def test_smaller_ones_fail_fast_only(rpc_cluster, number):
    rate = rate_of(rpc_cluster)
    assert not (number >= 60 or (number >= LOW and rate > 1)), "planted"


@few
@given(data=st.data())
def test_inside(rpc_cluster, data):
    rate = rate_of(rpc_cluster)
    number = data.draw(st.integers(0, TOP))
    assert not (number >= 60 or (number >= LOW and rate > 1)), "planted"


@example(number=1)
@example(number=70)
@few
@given(number=st.integers(0, 3))
def test_explicit(rpc_cluster, number):
    rate_of(rpc_cluster)
    assert number < 60, "planted"


@few
@given(number=st.integers(0, TOP))
def test_sometimes(rpc_cluster, number):
    rate_of(rpc_cluster)
    assert number < LOW or chance.random() < 0.3, "planted"
"""
BOUNDS = "LOW = 10; TOP = 100"

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> tuple[Any, Any, dict[str, Any]]:
    """The project, a run of the two cheap tests, and the artefact of each of them."""
    return run_of(make_project, "inside or explicit")


def run_of(make_project: MakeProject, tests: str) -> tuple[Any, Any, dict[str, Any]]:
    """The project, a run of these tests, and the artefact of each failing test."""
    project = make_project(test_user=CODE, bounds=BOUNDS)
    result = project.pytest("-k", tests)
    return project, result, artefacts_of(project)


def artefacts_of(project: Any) -> dict[str, Any]:
    """The content of each artefact, and its path, by the name of its test."""
    found: dict[str, Any] = {}
    for path in (project.folder / ".rpcprops" / "failures").glob("*.json"):
        data = json.loads(path.read_bytes())
        found[data["subject"].split("::")[1]] = data | {"path": str(path)}
    return found


def test_the_smallest_in_real_time_is_the_one_shown(
    ran: tuple[Any, Any, dict[str, Any]],
) -> None:
    """Where smaller examples fail under the fast clock only, pytest shows the smallest real one.

    That it draws inside its body makes no difference.
    """
    _, result, artefacts = ran
    section = result.section("test_inside")
    assert "Draw 1: 60" in section
    is_of_one_example(section, artefacts["test_inside"])
    # It takes real time, so pytest says what it does before it ends.
    (said,) = (n for n, line in enumerate(result.lines) if "shrinking in real time, for up" in line)
    assert said < next(n for n, line in enumerate(result.lines) if "= FAILURES =" in line)


def is_of_one_example(section: str, artefact: dict[str, Any]) -> None:
    """Check that all that pytest prints of a failure, and its artefact, are of one example."""
    assert section.count("Failing test case:") == 1
    assert "During handling of the above exception" not in section
    # If the machine was too busy for the fast clock, real time alone has confirmed it.
    repeats = r"^repeats  3 of 3 at rate (1|\d+, 1 of 1 at rate 1)$"
    assert re.search(repeats, section, re.MULTILINE)
    blobs = set(re.findall(r"@reproduce_failure\('[\d.]+', (b'[^']*')\)", section))
    assert blobs == {artefact["reproduction"][1]}


def test_an_explicit_example_is_named_by_the_artefact(
    ran: tuple[Any, Any, dict[str, Any]],
) -> None:
    """The artefact of an explicit example says which of them it was."""
    _, result, artefacts = ran
    assert "number=70," in result.section("test_explicit")
    assert artefacts["test_explicit"]["reproduction"][1] == "@example 0"


@pytest.mark.nightly
def test_a_test_that_draws_differently_is_no_replay(
    ran: tuple[Any, Any, dict[str, Any]],
) -> None:
    """If the choices no longer fit, replay says so, exits 2, and says how to search anew."""
    project, _, artefacts = ran
    project.write(bounds="LOW = 10; TOP = 20")
    try:
        ended = project.command("rpcprops", "replay", artefacts["test_inside"]["path"])
    finally:
        project.write(bounds=BOUNDS)
    assert ended.code == 2, ended.out + ended.err
    assert "the test draws differently now" in ended.err
    assert "anew: pytest test_user.py::test_inside" in ended.err


@pytest.mark.nightly
def test_a_replay_runs_that_example_at_its_rate(make_project: MakeProject) -> None:
    """Each run of a replay is of the example that was reported, and at the rate of that test."""
    test = "test_smaller_ones_fail_fast_only"
    project, result, artefacts = run_of(make_project, "smaller")
    assert "number=60," in result.section(test)
    is_of_one_example(result.section(test), artefacts[test])
    ended = project.command("rpcprops", "replay", artefacts[test]["path"])
    assert ended.code == 1, ended.out + ended.err
    rate = artefacts[test]["clock_rate"]
    assert f"reproduced: AssertionError in 3 of 3 runs at rate {rate:g}" in ended.out
    assert "number=60," in ended.out


@pytest.mark.nightly
def test_explicit_examples_are_replayed_alone(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """Of several explicit examples, a replay runs the one that failed, and draws none."""
    project, _, artefacts = ran
    ended = project.command("rpcprops", "replay", artefacts["test_explicit"]["path"])
    assert ended.code == 1, ended.out + ended.err
    assert "reproduced: AssertionError in 3 of 3 runs" in ended.out
    assert "rpcprops: 3 clusters in 1 test" in ended.out


@pytest.mark.nightly
def test_what_fails_only_sometimes_has_one_example_too(make_project: MakeProject) -> None:
    """A failure that shows in seven of ten runs is reported by an example that real time showed."""
    project = make_project(test_user=CODE, bounds=BOUNDS)
    result = project.pytest("-k", "sometimes")
    assert result.code == 1
    section = result.section("test_sometimes")
    assert re.search(r"^repeats  .*[1-9] of \d at rate 1", section, re.MULTILINE)
    blob = artefacts_of(project)["test_sometimes"]["reproduction"][1]
    assert set(re.findall(r"@reproduce_failure\('[\d.]+', (b'[^']*')\)", section)) == {blob}
