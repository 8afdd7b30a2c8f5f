"""What the plugin reports of tests that fail, and that it fails no others: one run, many looks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

CODE = """
import time

import pytest
from hypothesis import HealthCheck, assume, event, given, note, settings, target
from hypothesis import strategies as st

from rpcprops import FaultTable

import bug

TABLES = [FaultTable(), FaultTable(["RREF_USER_DELETE"], 1)]
few = settings(max_examples=6)


def make_and_drop():
    # Imported in the ranks alone, which have it already: in this process it takes two seconds.
    import torch
    import torch.distributed.rpc as rpc

    rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)).to_here()


def busy():
    began = time.monotonic()
    sum(range(3_000_000))
    return time.monotonic() - began


def used(rpc_cluster, faults, fn=make_and_drop, **options):
    with rpc_cluster(world_size=2, faults=faults, **options) as cluster:
        return cluster.on(0).call(fn)


@few
@given(faults=st.sampled_from(TABLES))
def test_fails(rpc_cluster, faults):
    used(rpc_cluster, faults)
    assert bug.FIXED or not faults.failing, "planted"


@few
@given(faults=st.sampled_from(TABLES))
def test_pytest_fail(rpc_cluster, faults):
    used(rpc_cluster, faults)
    if faults.failing:
        pytest.fail("planted")


@few
@given(faults=st.sampled_from(TABLES))
def test_does_not_raise(rpc_cluster, faults):
    with pytest.raises(KeyError):
        used(rpc_cluster, faults)


@few
@given(faults=st.sampled_from(TABLES))
def test_talks_to_hypothesis(rpc_cluster, faults):
    used(rpc_cluster, faults)
    note("noted")
    event("happened")
    target(float(faults.num_fail_sends), label="sends")
    assert not faults.failing, "planted"


@few
@given(data=st.data())
def test_draws_inside(rpc_cluster, data):
    faults = data.draw(st.sampled_from(TABLES))
    used(rpc_cluster, faults)
    assert not faults.failing, "planted"


def test_plain(rpc_cluster):
    used(rpc_cluster, FaultTable(["RREF_USER_DELETE"], 2))
    assert False, "planted"


@few
@given(number=st.integers(0, 3))
def test_fast_only(rpc_cluster, number):
    # Honest work of a few hundredths of a second is seconds on a fast clock.
    assert used(rpc_cluster, None, busy) < 1.2


@few
@given(faults=st.just(FaultTable(["RREF_CHILD_ACCEPT"], 3)))
def test_vacuous(rpc_cluster, faults):
    used(rpc_cluster, faults)


@few
@given(number=st.integers(0, 9))
def test_skips(rpc_cluster, number):
    used(rpc_cluster, None)
    pytest.skip("not today")


@few
@given(number=st.integers(0, 9))
def test_assumes(rpc_cluster, number):
    used(rpc_cluster, None)
    assume(number % 2 == 0)
    assert number % 2 == 0


@settings(max_examples=2)
@given(number=st.integers(0, 9))
def test_slow_example(rpc_cluster, number):
    used(rpc_cluster, None, lambda: time.sleep(0.4), clock="real")


@few
@given(faults=st.just(FaultTable(["RREF_USER_DELETE", "RREF_FORK_REQUEST"], 1)))
def test_needs_one(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(make_and_drop)
        cluster.settle()
        assert not cluster.outcome.ranks[0].failed_sends, "planted"


@few
@given(faults=st.just(FaultTable(["RREF_USER_DELETE"], 1)))
def test_needs_none(rpc_cluster, faults):
    used(rpc_cluster, faults)
    assert bug.FIXED, "planted"


def take_time():
    import torch.distributed.rpc as rpc

    began = time.monotonic()
    rpc.rpc_sync("worker1", sum, args=([1],))
    for _ in range(10**6):  # far more than a second under the fast clock, and nearly none without
        pass
    assert time.monotonic() - began < 0.9, "planted"


@few
@given(faults=st.just(FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})))
def test_reads_the_clock(rpc_cluster, faults):
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(take_time)


def talk():
    for number in range(100):
        print("a line of theirs", number)
    raise KeyError("planted")


def test_talks(rpc_cluster):
    faults = FaultTable(["RREF_USER_DELETE"], 3)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(1).call(print, "a passing cluster's")
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(make_and_drop)
        cluster.settle()
        cluster.on(1).call(talk)


def sleep_for_ever():
    time.sleep(1e9)


def wait_for_the_other():
    import torch.distributed.rpc as rpc

    rpc.rpc_sync("worker1", sleep_for_ever)


def test_hangs(rpc_cluster):
    with rpc_cluster(world_size=2, deadline=0.5) as cluster:
        cluster.on(0).call(wait_for_the_other)


def test_usage(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        cluster.on(7).call(busy)


class TestClass:
    @few
    @given(faults=st.sampled_from(TABLES))
    def test_method(self, rpc_cluster, faults):
        used(rpc_cluster, faults)

    @pytest.mark.parametrize("count", [1, 2])
    def test_plain_method(self, rpc_cluster, count):
        used(rpc_cluster, FaultTable(["RREF_USER_DELETE"], count))


@pytest.mark.parametrize("count", [1, 2])
@few
@given(number=st.integers(0, 1))
def test_parametrized(rpc_cluster, count, number):
    used(rpc_cluster, FaultTable(["RREF_USER_DELETE"], count))


@given(number=st.integers())
def test_without_us(number):
    assert number == number


def test_refused(rpc_cluster):
    with pytest.raises(ValueError, match="world_size=0"):
        rpc_cluster(world_size=0)
"""

FAILING = {
    "test_fails",
    "test_pytest_fail",
    "test_does_not_raise",
    "test_talks_to_hypothesis",
    "test_draws_inside",
    "test_plain",
    "test_needs_one",
    "test_needs_none",
    "test_reads_the_clock",
    "test_talks",
    "test_hangs",
    "test_usage",
}
DRAWN = [
    "test_does_not_raise",
    "test_draws_inside",
    "test_fails",
    "test_pytest_fail",
    "test_talks_to_hypothesis",
]
PASSING = {
    "test_fast_only",
    "test_vacuous",
    "test_assumes",
    "test_slow_example",
    "TestClass::test_method",
    "TestClass::test_plain_method[1]",
    "TestClass::test_plain_method[2]",
    "test_parametrized[1]",
    "test_parametrized[2]",
    "test_refused",
}

MakeProject = Callable[..., Any]


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> tuple[Any, Any, dict[str, Any]]:
    """The project, its run, and the report file of that run."""
    project = make_project(test_user=CODE, bug="FIXED = False")
    result, report = project.report()
    return project, result, report


def test_outcomes(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """Under the user's default profile exactly the tests with a planted fault fail."""
    _, result, report = ran
    outcomes = {name: test["outcome"] for name, test in report.items()}
    assert {name for name, outcome in outcomes.items() if outcome == "failed"} == FAILING
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} == PASSING
    assert {name for name, outcome in outcomes.items() if outcome == "skipped"} == {"test_skips"}
    assert result.code == 1
    assert f"{len(FAILING)} failed, {len(PASSING) + 1} passed, 1 skipped" in result.lines[-1]


def test_header(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """The header has one line of ours: the clock and the transport."""
    lines = [line for line in ran[1].lines if line.startswith("rpcprops: clock")]
    assert len(lines) == 1
    assert lines[0].endswith("; transport tcp")


def test_no_complaints_of_hypothesis(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """Neither a health check nor a deadline nor flakiness is complained about, nor any warning."""
    for word in ("HealthCheck", "DeadlineExceeded", "Flaky", "InvalidArgument"):
        assert word not in ran[1].out
    assert "warnings summary" not in ran[1].out


@pytest.mark.parametrize("test", DRAWN)
def test_failures_are_explained(ran: tuple[Any, Any, dict[str, Any]], test: str) -> None:
    """A failure shows table, ranks, what fired, how often it repeats, redraw and replay lines."""
    section = ran[1].section(test)
    ours = section[section.index("- rpcprops -") :].splitlines()
    heads = [line.split()[0] for line in ours[1:] if line and not line.startswith(" ")]
    expected = ["faults", "fired", "repeats", "redraw", "replay"]
    assert [head for head in heads if head in expected] == expected
    text = "\n".join(ours)
    assert re.search(r"^repeats  3 of 3 at rate \d+(, 1 of 1 at rate 1)?$", text, re.MULTILINE)
    assert re.search(r"^redraw   @reproduce_failure\('[\d.]+', b'.*'\)$", text, re.MULTILINE)
    assert re.search(r"^replay   rpcprops replay \.rpcprops/failures/.*json$", text, re.MULTILINE)
    if test != "test_does_not_raise":
        table = "FaultTable(messages_to_fail=('RREF_USER_DELETE',), num_fail_sends=1)"
        assert f"faults   FaultPlan(default={table})" in text
        assert "faults at every rank of 2" in text
        assert "fired    rank 0: failure RREF_USER_DELETE: 1 fired" in text
    else:
        assert "no rank is faulty: it fails without any fault" in text


def test_plain_failures_are_explained(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """A failing test without Hypothesis shows its table and what fired."""
    section = ran[1].section("test_plain")
    assert "num_fail_sends=2" in section
    assert "failure RREF_USER_DELETE: 2 fired" in section


def test_a_fault_that_a_failure_does_not_need_is_not_blamed(
    ran: tuple[Any, Any, dict[str, Any]],
) -> None:
    """Each fault is left out once: those that the failure needs are told from the others."""
    lines = ran[1].section("test_needs_one").splitlines()
    (needs,) = (n for n, line in enumerate(lines) if line.startswith("needs"))
    said = [line.removeprefix("needs").split(":")[0].strip() for line in lines[needs : needs + 2]]
    # On a busy machine the runs may end at their bound of time, and then the report says so.
    if not any(line.strip().startswith(("not known", "needs    not known")) for line in lines):
        assert said == ["RREF_USER_DELETE", "not RREF_FORK_REQUEST"]
    assert "not RREF_USER_DELETE" not in said
    assert "RREF_FORK_REQUEST" not in said
    none = ran[1].section("test_needs_none")
    assert "needs    no fault: it fails without any fault too (one run)" in none
    # Under the fast clock alone it fails without the delay too, in real time it does not.
    clocked = ran[1].section("test_reads_the_clock")
    assert "needs    delay:PYTHON_CALL: without it, it passes (one run)" in clocked


def test_what_ranks_print_is_shown_as_captured_output(
    ran: tuple[Any, Any, dict[str, Any]],
) -> None:
    """The last lines of the failing cluster are shown, without torch's log, and no other's."""
    section = ran[1].section("test_talks")
    captured = section.split("Captured stdout/stderr rank worker1")[1].split("- rpcprops -")[0]
    assert "a line of theirs 99" in captured
    assert "(88 lines before these: see the log in the artefact)" in captured
    assert "a passing cluster's" not in captured
    assert "Send try" not in section


@pytest.mark.nightly
def test_output_is_streamed_with_s(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """With -s each line that a rank prints comes at once, after the name of the rank."""
    result = ran[0].pytest("-s", "-k", "test_talks")
    streamed = [line for line in result.lines if line.startswith("[worker1] a line of theirs")]
    assert [line.split()[-1] for line in streamed] == [str(number) for number in range(100)]
    assert "[worker1] a passing cluster's" in result.lines
    assert not any(line.startswith("[worker") and "Send try" in line for line in result.lines)


def test_a_report_is_a_screen_of_the_users_code(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """A hang names rank, line and function of the user's code, and no frame of ours or torch's."""
    section = ran[1].section("test_hangs")
    assert re.search(
        r"worker0 is at test_user\.py:\d+ in wait_for_the_other: rpc\.rpc_sync", section
    )
    assert "worker1 runs a call for another rank, at test_user.py:" in section
    for name in ("test_hangs", "test_talks", "test_needs_one"):
        lines = ran[1].section(name).splitlines()
        assert len(lines) <= 45, name
        for words in ("rank_process.py", "_server.py", "site-packages/torch", "<string>"):
            assert not any(words in line for line in lines), (name, words)
        assert any(line.startswith("details  each rank's log") for line in lines)


def test_a_misuse_is_raised_plainly(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """A UsageError is no failure of the code under test: no section of ours, nothing to replay."""
    section = ran[1].section("test_usage")
    assert "UsageError: rank=7 is no rank of a world of 2." in section
    assert "- rpcprops -" not in section
    assert "rpcprops replay" not in section
    # It ends at the user's line.
    assert not re.search(r"rpcprops/\w+/\w+\.py", section)
    assert re.search(r"^test_user\.py:\d+: UsageError$", section, re.MULTILINE)


def test_user_code_is_shown(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """The traceback of a failure shows the user's lines, and none of ours or of Hypothesis."""
    section = ran[1].section("test_fails")
    assert "planted" in section
    assert re.search("(Falsifying example|Failing test case): test_fails", section)
    assert "pytest_plugin.py" not in section
    for name in DRAWN:
        section = ran[1].section(name)
        for words in ("rpcprops/plugin/", "hypothesis/core.py", "label='rpcprops"):
            assert words not in section, (name, words)
    assert "(label='sends')" in ran[1].section("test_talks_to_hypothesis")


def test_fast_clock_only_is_no_failure(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """What only the fast clock shows passes, and is named as not confirmed, or as undecided."""
    _, result, report = ran
    # Whether the ranks were late is the machine's business.
    called = {
        "not confirmed in real time": report["test_fast_only"]["unconfirmed"],
        "undecided, the machine was too loaded": report["test_fast_only"]["undecided"],
    }
    assert any(called.values())
    for words, found in called.items():
        lines = [line for line in result.lines if words in line]
        assert len(lines) == bool(found)
        assert all("::test_fast_only: AssertionError" in line for line in lines)


def test_vacuous_is_said(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """A test in which no injected fault fired passes with a note; others have none."""
    _, result, report = ran
    lines = [line for line in result.lines if line.startswith("rpcprops: vacuous")]
    assert lines == [
        "rpcprops: vacuous: no injected fault fired in test_user.py::test_vacuous (1 example)"
    ]
    assert report["test_vacuous"]["armed"] == 1
    assert report["test_vacuous"]["faults_fired"] == 0


def test_report_counts(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """The report counts examples, clusters and fired faults, of tests that use us only."""
    report = ran[2]
    method = report["TestClass::test_plain_method[2]"]
    assert (method["examples"], method["clusters"], method["armed"]) == (1, 1, 1)
    assert method["fired_by_type"] == {"failure RREF_USER_DELETE": 2}
    assert method["seconds"] > 0
    drawn = report["test_parametrized[1]"]
    assert drawn["examples"] == drawn["clusters"] == 2
    assert report["test_slow_example"]["examples"] == 2
    assert "test_without_us" not in report


@pytest.mark.nightly
def test_replay_says_reproduced_and_fixed(ran: tuple[Any, Any, dict[str, Any]]) -> None:
    """`rpcprops replay` of a test's failure exits 1 while the bug is there, and 0 after."""
    project, result, _ = ran
    line = next(
        line for line in result.section("test_fails").splitlines() if line.startswith("replay")
    )
    path = line.split("rpcprops replay ")[1]
    artefact = json.loads((project.folder / path).read_text(encoding="utf-8"))
    assert artefact["subject"] == "test_user.py::test_fails"
    assert artefact["promise"] == "AssertionError"
    again = project.command("rpcprops", "replay", path)
    assert again.code == 1, again.out + again.err
    assert "reproduced: AssertionError in 3 of 3 runs" in again.out
    assert "hypothesis/core.py" not in again.out
    project.write(bug="FIXED = True")
    try:
        fixed = project.command("rpcprops", "replay", path)
    finally:
        project.write(bug="FIXED = False")
    assert fixed.code == 0, fixed.out + fixed.err
    assert "fixed: AssertionError in 0 of 3 runs" in fixed.out
