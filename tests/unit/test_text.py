"""What people read of a failure: all that is needed to understand it, and Python to rebuild it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from rpcprops import outcomes
from rpcprops import programs as language
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import FaultCount
from rpcprops.outcomes import (
    ArmedFaults,
    Counters,
    Outcome,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    SentMessage,
    StepOutcome,
    Violation,
)
from rpcprops.programs import STEP_TYPES, Program
from rpcprops.properties import Case, Failure, Repeats
from rpcprops.properties import _programs as shipped
from rpcprops.report import artefact as artefacts
from rpcprops.report.text import (
    artefact_of,
    describe_end,
    describe_faults,
    describe_plan,
    failure_lines,
    replay_line,
)

NAMES = {
    "FaultPlan": FaultPlan,
    "FaultTable": FaultTable,
    **{
        name: getattr(language, name)
        for name in ("Program", *(c.__name__ for c in STEP_TYPES.values()))
    },
}
TABLE = FaultTable(["RREF_USER_DELETE"], 3, {"PYTHON_CALL": 1.5})
FAILURE = Failure(
    property="rref-lifetime",
    promise="RRefLeak",
    case=Case(shipped.fork_user_to_user(), FaultPlan(by_rank={2: TABLE})),
    violations=(
        Violation(
            "RRefLeak", "worker1 holds 1 owner, 1 fork; expected nothing", 1, timing_sensitive=True
        ),
        Violation("WrongValue", "expected [3.0], got [4.0]", 2, 5),
    ),
    outcome=Outcome(
        3,
        clock_rate=100.0,
        ranks=(
            RankOutcome(0, "worker0", exit_code=0),
            RankOutcome(1, "worker1", signal=11),
            RankOutcome(2, "worker2", killed=True, stack="Thread 0x1:\n  File a.py, line 3\n"),
        ),
    ),
    faults=(
        FaultCount(2, "failure", "RREF_USER_DELETE", 3, 3),
        FaultCount(2, "delay", "PYTHON_CALL", 1, None),
        FaultCount(0, "failure", "", None, 2, "unattributed"),
        FaultCount(1, "delay", "SCRIPT_CALL", 0, 0),
    ),
    repeats=(Repeats(100.0, 3, 3), Repeats(1.0, 1, 1)),
    reproduction=("@reproduce_failure('6.1', b'AAA=')",),
)


def part(lines: list[str], name: str) -> list[str]:
    """The text of one part: the line that begins with its name, and those indented below it."""
    (start,) = (n for n, line in enumerate(lines) if line.startswith(f"{name} "))
    below = lines[start + 1 :]
    end = next((n for n, line in enumerate(below) if line[:1] != " "), len(below))
    return [line[9:] for line in [lines[start], *below[:end]]]


def test_the_faults_are_printed_as_python() -> None:
    """The plan's line is Python that makes the plan again; the next says at which ranks it is."""
    text, where = part(failure_lines(FAILURE, None), "faults")
    assert eval(text, NAMES) == FAILURE.case.plan
    assert where == "faults at rank 2 of 3"


@pytest.mark.parametrize(
    ("plan", "where"),
    [
        (FaultPlan(), "no rank is faulty: it fails without any fault"),
        (FaultPlan(TABLE), "faults at every rank of 3"),
        (FaultPlan(by_rank={0: TABLE}), "faults at rank 0 of 3"),
        (FaultPlan(TABLE, {1: FaultTable()}), "faults at ranks 0, 2 of 3"),
    ],
)
def test_it_is_said_which_ranks_are_faulty(plan: FaultPlan, where: str) -> None:
    """None, one, some and every rank each have their own words."""
    text, below = describe_plan(plan, 3)
    assert eval(text[9:], NAMES) == plan
    assert below.strip() == where


def test_the_program_is_printed_as_python() -> None:
    """The program's lines are Python that makes the program again, step by step."""
    text = part(failure_lines(FAILURE, None), "program")
    assert eval("\n".join(text), NAMES) == FAILURE.case.program
    assert len(text) > len(FAILURE.case.program.steps)


def test_a_program_without_steps_is_printed_as_python() -> None:
    """The shortest program takes one line, and that line makes it again."""
    failure = dataclasses.replace(FAILURE, case=Case(Program(2, name="none")))
    assert eval("\n".join(part(failure_lines(failure, None), "program")), NAMES) == Program(
        2, name="none"
    )


def test_every_broken_promise_is_a_sentence_at_the_top() -> None:
    """Promise, step, rank and sentence of each violation come first, in their order."""
    assert failure_lines(FAILURE, None)[:2] == [
        "broken   RRefLeak (rank 1): worker1 holds 1 owner, 1 fork; expected nothing",
        "broken   WrongValue (step 5, rank 2): expected [3.0], got [4.0]",
    ]


def test_the_faults_that_fired_are_counted() -> None:
    """Fired, unseen and unattributed faults each say so; those that could not fire are left out."""
    assert part(failure_lines(FAILURE, None), "fired") == [
        "rank 2: failure RREF_USER_DELETE: 3 fired of 3 that could",
        "rank 2: delay PYTHON_CALL: not visible here of 1 that could",
        "rank 0: failure types not told apart: 2 fired",
    ]


@pytest.mark.parametrize("counts", [(), (FaultCount(0, "failure", "RREF_USER_DELETE", 0, 0),)])
def test_that_nothing_fired_is_said(counts: tuple[FaultCount, ...]) -> None:
    """A failure without any fault says so instead of saying nothing."""
    assert describe_faults(counts) == ["fired    nothing"]


def test_ranks_that_did_not_leave_well_are_named() -> None:
    """Signals and exit codes are told, with the stacks of a hang; a rank that left well is not."""
    lines = describe_end(FAILURE.outcome)
    assert lines[0] == "ended    worker1: killed by SIGSEGV"
    assert lines[1] == "stack    worker2:"
    assert [line.strip() for line in lines[2:]] == ["Thread 0x1:", "File a.py, line 3"]
    bad = Outcome(1, ranks=(RankOutcome(0, "worker0", exit_code=3),))
    assert describe_end(bad) == ["ended    worker0: exit code 3"]


def test_a_record_that_is_full_is_said() -> None:
    """Messages for which there was no room are counted in a report, and in a printed outcome."""
    sent = SentMessage(0.0, 0, 1, 7, "PYTHON_CALL", is_request=True)
    whole = Outcome(1, messages=(sent,))
    assert describe_end(whole) == []
    assert "record" not in str(whole)
    full = Outcome(1, messages=(sent,), messages_dropped=5)
    said = "the record of 1 messages is full: 5 more"
    assert describe_end(full) == [f"messages {said}"]
    assert str(full).splitlines()[-1] == f"  {said}"


def test_an_outcome_is_a_few_lines_to_print_and_python_to_keep() -> None:
    """`print` shows phases, failed steps and how each rank ended; `repr` still rebuilds it all."""
    outcome = Outcome(
        2,
        clock_rate=400.0,
        torch_version="2.13.0",
        phases=(PhaseOutcome("settle", "failed", 9.0, 0.25, 30.0, "the ranks did not settle"),),
        steps=(
            StepOutcome(0, 1.0),
            StepOutcome(1, error=RaisedError("ValueError", "no\nmore")),
            StepOutcome(2, ended=False),
        ),
        ranks=(
            RankOutcome(0, "worker0", exit_code=0, failed_sends=2, log="long\n" * 1000),
            RankOutcome(1, "worker1", signal=11, counters=Counters(owners=1)),
        ),
    )
    assert str(outcome).splitlines() == [
        "outcome of 2 ranks (torch 2.13.0, tcp, clock rate 400)",
        "  settle failed after 0.25 real s: the ranks did not settle",
        "  1 of 3 steps returned",
        "  step 1 raised ValueError: no",
        "  step 2 did not end",
        "  worker0: exit code 0, 2 sends failed",
        "  worker1: killed by SIGSEGV, last held 1 owner",
    ]
    assert eval(repr(outcome), dict(vars(outcomes))) == outcome


def test_how_often_it_repeats_is_told() -> None:
    """Each rate has its own count, and a failure that was not tried again says so."""
    lines = failure_lines(FAILURE, None)
    assert "repeats  3 of 3 at rate 100, 1 of 1 at rate 1" in lines
    untried = failure_lines(dataclasses.replace(FAILURE, repeats=()), None)
    assert "repeats  not tried" in untried


def test_hypothesis_own_line_is_kept() -> None:
    """The line that draws the example again is there for who works with Hypothesis alone."""
    assert "redraw   @reproduce_failure('6.1', b'AAA=')" in failure_lines(FAILURE, None)


def test_the_last_line_is_the_one_to_run() -> None:
    """With an artefact the report ends with its replay line, and without one has none."""
    path = Path("failures/rref-lifetime-0123456789.json")
    lines = failure_lines(FAILURE, path)
    assert lines[-1] == f"replay   rpcprops replay {path}"
    assert not any(line.startswith("replay") for line in failure_lines(FAILURE, None))


@pytest.mark.parametrize(
    "name",
    [
        "plain.json",
        "a b.json",
        "it's.json",
        'say "x".json',
        "a&b;c.json",
        "$HOME.json",
        "a\\b",
        "(1)",
    ],
)
def test_a_shell_reads_the_replay_line_as_it_is_meant(name: str) -> None:
    """A path is quoted where a shell would otherwise take it apart, and only there."""
    path = Path("some dir" if " " in name else "dir") / name
    line = replay_line(path)
    assert shlex.split(line) == ["rpcprops", "replay", str(path)]
    assert ("'" in line) == (name != "plain.json")


def test_a_case_of_reinitialised_ranks_says_so_first() -> None:
    """What ran before the program is part of the failure, so it stands above everything."""
    case = dataclasses.replace(FAILURE.case, kind="reinit")
    lines = failure_lines(dataclasses.replace(FAILURE, case=case), None)
    assert lines[0].startswith("case     in ranks that have shut RPC down once")


def test_the_artefact_of_a_failure_holds_all_of_it(tmp_path: Path) -> None:
    """What is written of a failure, and read back, is its case, its outcome and its words."""
    artefact = artefacts.read(artefacts.write(artefact_of(FAILURE), tmp_path))
    assert artefact.kind == "program"
    assert (artefact.program, artefact.plans) == (FAILURE.case.program, (FAILURE.case.plan,))
    assert (artefact.subject, artefact.promise) == (FAILURE.property, FAILURE.promise)
    assert artefact.outcomes == (FAILURE.outcome,)
    assert artefact.violations == FAILURE.violations
    assert artefact.head == tuple(failure_lines(FAILURE, None))
    assert (artefact.clock_rate, artefact.transport) == (100.0, "tcp")
    assert artefact.repeats == ("3 of 3 at rate 100", "1 of 1 at rate 1")


@pytest.mark.parametrize(
    ("counters", "words"),
    [
        (Counters(), "nothing"),
        (Counters(owners=1, forks=2), "1 owner, 2 forks"),
        (Counters(backward_passes=1, contexts=1), "1 context, 1 backward pass"),
        (Counters(backward_passes=2), "2 backward passes"),
        (
            Counters(pending_users=1, pending_futures=1, server_async_calls=1, client_calls=3),
            "1 pending user, 1 pending future, 1 server async call, 3 client calls",
        ),
    ],
)
def test_counters_are_told_in_words(counters: Counters, words: str) -> None:
    """Only what is not zero is told, in the singular where there is one."""
    assert counters.describe() == words
    assert counters.is_zero == (words == "nothing")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exit_code": 0}, "exit code 0"),
        ({"exit_code": 3}, "exit code 3"),
        ({"signal": 9}, "killed by SIGKILL"),
        ({"signal": 250}, "killed by signal 250"),
        ({"killed": True}, "killed by rpcprops"),
        ({}, "still running"),
    ],
)
def test_the_end_of_a_rank_is_told_in_words(changes: dict[str, Any], words: str) -> None:
    """An exit, a signal (known or not), our own kill and no end at all read differently."""
    rank = dataclasses.replace(RankOutcome(0, "worker0"), **changes)
    assert rank.describe_end() == words


def test_what_was_armed_for_a_part_of_the_run_is_named() -> None:
    """When it began and ended, its plan as Python, and what it did, apart from the cluster's."""
    armed = (ArmedFaults(FaultPlan(TABLE), 1.25, 200.0), ArmedFaults(FaultPlan(TABLE), 300.0))
    lines = describe_plan(FaultPlan(), 2, armed)
    assert lines[0] == (
        "faults   armed for part 1 of the run, from 1.25 to 200 virtual s after the start:"
    )
    assert eval(lines[1], NAMES) == FaultPlan(TABLE)
    assert "part 2 of the run, from 300 to its end" in lines[2]
    assert describe_plan(FaultPlan(TABLE), 2, armed)[0] == f"faults   {FaultPlan(TABLE)!r}"
    fired = describe_faults([FaultCount(0, "failure", "PYTHON_CALL", None, 4, part=1)])
    assert fired == ["fired    rank 0, part 1: failure PYTHON_CALL: 4 fired"]
