"""What PyTorch's suites came to, in words and as data; and the records of its own harness."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpcprops import agents
from rpcprops.errors import UsageError
from rpcprops.upstream import _report, rows
from rpcprops.upstream._examine import UnderFaults, UpstreamResult
from rpcprops.upstream._ranks import why_not
from rpcprops.upstream.data import UpstreamTest

RECORDED = "2.13.0"
TEST = UpstreamTest("RpcTest", "test_add", "generic", 4)
PASSED = UpstreamResult(TEST, "passed", rate=50.0, seconds=0.25, processor_seconds=0.5)


def row(result: UpstreamResult, **changes: Any) -> dict[str, Any]:
    return _report.row_of(result, RECORDED, []) | changes


def text(*rows: dict[str, Any]) -> str:
    return "\n".join(_report.summary_lines(rows, width=80))


def test_the_record_holds_every_test() -> None:
    """Of torch 2.13.0 all 464 tests are recorded, with a verdict and the time that they took."""
    records = rows.records(RECORDED + "+cpu")
    assert len(records) == 464
    assert {one.verdict for one in records.values()} <= {"passed", "failed", "skipped"}
    ran = [one for one in records.values() if one.verdict != "skipped"]
    assert all(one.seconds > 0 and one.processor_seconds > 0 for one in ran)


def test_another_torch_has_no_record() -> None:
    """Nothing is said of a torch whose suites nobody ran."""
    assert rows.records("1.0.0") == {}
    assert rows.parity_of(PASSED, "1.0.0").agreement == "not_recorded"


def test_a_verdict_is_compared_with_the_record() -> None:
    """The same verdict agrees, another differs."""
    assert rows.parity_of(PASSED, RECORDED).agreement == "same"
    failed = replace(PASSED, verdict="failed")
    assert rows.parity_of(failed, RECORDED).agreement == "differs"


def test_what_is_left_out_is_counted_with_its_reason(tmp_path: Path) -> None:
    """Left-out tests are no difference; the summary and the data name or count them by reason."""
    other = replace(TEST, name="test_b", asks_for="TENSORPIPE", not_applicable="asks for it")
    cuda = [
        UpstreamTest("CudaRpcTest", f"test_{n}", "cuda", 0, not_applicable="no GPU") for n in "xy"
    ]
    left_out = [
        row(UpstreamResult(test, "not_applicable", test.not_applicable)) for test in (other, *cuda)
    ]
    assert [one["parity"]["agreement"] for one in left_out] == ["not_recorded"] * 3
    known = replace(other, name=TEST.name)
    parity = rows.parity_of(UpstreamResult(known, "not_applicable", "asks for it"), RECORDED)
    assert parity.agreement == "not_run"
    printed = text(row(PASSED), *left_out)
    assert "left out: RpcTest::test_b: asks for it" in printed
    assert "left out: 2 tests: no GPU" in printed
    assert "left out in all: 3 tests" in printed
    path = tmp_path / "report.json"
    _report.write_report(path, [row(PASSED), *left_out], "WIRE")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["agent"] == "WIRE"
    assert data["summary"]["left_out"] == {
        "asks for it": ["RpcTest::test_b"],
        "no GPU": ["CudaRpcTest::test_x", "CudaRpcTest::test_y"],
    }


@pytest.mark.parametrize(
    ("agent", "test", "words"),
    [
        ("wire", replace(TEST, asks_for="TENSORPIPE", asks_because="x names y"), "x names y"),
        ("wire", replace(TEST, asks_for="WIRE"), ""),
        ("wire", replace(TEST, agent="faulty"), ""),
        ("tensorpipe", replace(TEST, asks_for="TENSORPIPE"), ""),
        ("tensorpipe", replace(TEST, agent="faulty"), "TENSORPIPE injects no faults"),
        # The default: each suite runs the agent for which it is written.
        ("faulty_tensorpipe", replace(TEST, asks_for="TENSORPIPE", asks_because="x"), ""),
    ],
)
def test_an_agent_runs_all_that_do_not_ask_for_another(
    agent: str, test: UpstreamTest, words: str
) -> None:
    """A test is left out where it names another agent, or needs faults that the agent has not."""
    said = why_not(test, agents.named(agent))
    assert words in said
    assert bool(words) == bool(said)


def test_pieces_of_a_record_are_put_together(tmp_path: Path) -> None:
    """A test that is there twice counts once, the last; a line that was cut off is left out."""
    first = {"class": "A", "name": "t", "verdict": "failed"}
    last = {"class": "A", "name": "t", "verdict": "passed"}
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(first), '{"class": "B", "na', json.dumps(last), '{"class": "A", "na']
    file.write_text("\n".join(lines), encoding="utf-8")
    assert rows.read_rows(rows.rows_file(file)) == [last]


@pytest.mark.parametrize(
    "text",
    ["my notes", "my notes\n", '{"class": "A"}\nnotes\n', '{"class": "A", "name": "t"}\n[]\n'],
)
def test_a_file_of_other_things_is_no_record(tmp_path: Path, text: str) -> None:
    """Rows are not added to a file that holds something else, with its last line ended or not."""
    file = tmp_path / "notes.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"notes\.txt, line \d: no row of PyTorch's harness; name"):
        rows.read_rows(rows.rows_file(file))
    assert file.read_text(encoding="utf-8") == text


def test_the_report_has_a_row_for_each_test(tmp_path: Path) -> None:
    """The file holds the tests in order, and sums that add up."""
    skipped = replace(PASSED, test=replace(TEST, name="test_a"), verdict="skipped", reason="no GPU")
    path = tmp_path / "report.json"
    _report.write_report(path, [row(PASSED), row(skipped)])
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [test["name"] for test in data["tests"]] == ["test_a", "test_add"]
    assert data["summary"]["passed"] == data["summary"]["skipped"] == 1
    assert data["summary"]["seconds"] == 0.5


def test_the_table_counts_by_class() -> None:
    """Each class has a line, and all have one more."""
    other = replace(PASSED, test=replace(TEST, suite="JitRpcTest", name="test_rref_is_owner"))
    lines = text(row(PASSED), row(other)).splitlines()
    assert [line.split()[:2] for line in lines if line[:3] in ("Rpc", "Jit", "all")] == [
        ["RpcTest", "1"],
        ["JitRpcTest", "1"],
        ["all", "2"],
    ]


def test_differences_are_named_with_their_causes() -> None:
    """A verdict that differs stands below the table, and so does a missing cause."""
    parity = {"agreement": "differs", "harness_verdict": "failed", "cause": "", "x": 0}
    printed = text(row(PASSED, parity=parity))
    assert "differs: RpcTest::test_add: passed here, failed in PyTorch's harness" in printed
    assert "no cause is written down" in printed


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("vacuous", "no faults to strike: 1 test:"), ("undecided", "undecided: RpcTest::test_add")],
)
def test_what_faults_showed_is_told(verdict: Any, words: str) -> None:
    """Tests that nothing can strike are counted, and what could not be decided is named."""
    assert words in text(row(replace(PASSED, under_faults=UnderFaults(verdict, (), 0, 0, 1.0))))


def test_a_slower_clock_is_told() -> None:
    """That a test passed at a slower rate only is said with the rates."""
    printed = text(row(replace(PASSED, rate=5.0, slower=(50.0,))))
    assert "slower: RpcTest::test_add failed at rate 50, and passed at 5" in printed
