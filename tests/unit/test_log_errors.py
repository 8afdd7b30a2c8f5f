"""What is found in a rank's log, and which of it a program accounts for."""

from __future__ import annotations

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import FINDINGS, judge, predict
from rpcprops.oracle._findings import can_cause
from rpcprops.oracle._log_errors import log_errors
from rpcprops.outcomes import RaisedError, Violation
from rpcprops.programs import Call, Drop, Fetch, Program, Remote
from tests.seeded._falsified import ASSERTION, TRACEBACK
from tests.seeded._ideal import OWNER_WAITED, USER_WAITED, ideal, with_rank

QUIET = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
RAISING = Program(2, (Call(0, 1, raises=True),))
#: What torch prints at the rank where a function raised (``internal.py``: ``_run_function``).
RAISED = """On WorkerInfo(id=1, name=worker1):
RaisedOnPurposeError('step0')
Traceback (most recent call last):
  File "internal.py", line 207, in _run_function
    result = python_udf.func(*python_udf.args, **python_udf.kwargs)
rpcprops.steps.in_rank.sums.RaisedOnPurposeError: step0
"""
LOST = """Traceback (most recent call last):
  File "internal.py", line 207, in _run_function
RuntimeError: RPCErr:2:Send attempt failed intentionally for x
"""
INFO = "[I1124 rpc_agent.cpp:217] Send try 1 failed"


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("", []),
        (INFO, []),
        (ASSERTION, ["assertion"]),
        (f"{INFO}\n{OWNER_WAITED}\n{USER_WAITED}", ["owners", "users"]),
        ("terminate called after throwing an instance of 'c10::Error'", ["terminate"]),
        ("a line that says: terminate called", []),
        (TRACEBACK, ["traceback"]),
        (f"{RAISED}\n{TRACEBACK}", ["traceback", "traceback"]),
        ("Traceback (most recent call last):\n  File", ["traceback"]),
    ],
)
def test_what_is_looked_for(log: str, found: list[str]) -> None:
    """Each of the kinds, wherever it stands, in the order of the log."""
    assert [error.kind for error in log_errors(log)] == found


@pytest.mark.parametrize(
    "between",
    [
        "The above exception was the direct cause of the following exception:",
        "During handling of the above exception, another exception occurred:",
        "",
    ],
)
def test_of_chained_exceptions_the_last_one_counts(between: str) -> None:
    """The others were caught: ``internal.py`` tries to make the class of the original exception."""
    caught = "Traceback (most recent call last):\n  File x\nTypeError: 5 arguments\n"
    found = [error.line for error in log_errors(f"{caught}\n{between}\n\n{TRACEBACK}")]
    assert found[-1] == "ZeroDivisionError: division by zero"
    assert len(found) == (1 if between else 2)


def test_a_traceback_is_told_by_its_end() -> None:
    """The line that names the exception, also where the log is cut before it."""
    assert [error.line for error in log_errors(TRACEBACK)] == [
        "ZeroDivisionError: division by zero"
    ]
    cut = "Traceback (most recent call last):\n  File x"
    assert [error.line for error in log_errors(cut)] == ["the log ends in it"]


def violations(program: Program, plan: FaultPlan, log: str, rank: int = 1) -> list[str]:
    outcome = with_rank(ideal(program, plan), rank, log=log)
    return [violation.promise for violation in judge(program, plan, outcome)]


def test_what_a_function_raises_on_purpose_is_expected_where_it_is_called() -> None:
    """The same lines in the log of a program without such a function are a violation."""
    assert violations(RAISING, FaultPlan(), RAISED) == []
    assert violations(QUIET, FaultPlan(), RAISED) == ["ErrorInLog"]


def test_an_injected_failure_in_a_log_needs_a_lost_message() -> None:
    """It is expected where the prediction has one, and a violation where nothing is lost."""
    lossy = FaultPlan(by_rank={0: FaultTable(["PYTHON_CALL"], 1)})
    assert violations(Program(2, (Call(0, 1),)), lossy, LOST) == []
    assert violations(QUIET, FaultPlan(), LOST) == ["ErrorInLog"]


def test_one_line_that_a_rank_repeats_is_one_violation() -> None:
    """A message that comes a hundred times says no more than once."""
    assert violations(QUIET, FaultPlan(), "\n".join([ASSERTION] * 100)) == ["ErrorInLog"]


def test_a_wait_of_100_seconds_is_expected_where_a_message_is_lost_for_good() -> None:
    """And nowhere else: a shutdown that waits so long without a reason is a violation."""
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 6))
    assert OWNER_WAITED in ideal(QUIET, plan).ranks[1].log
    assert judge(QUIET, plan, ideal(QUIET, plan)) == ()
    assert violations(QUIET, FaultPlan(), OWNER_WAITED) == ["ErrorInLog"]
    assert violations(QUIET, FaultPlan(), USER_WAITED, rank=0) == ["ErrorInLog"]


def test_what_a_shutdown_raised_is_not_told_twice() -> None:
    """The rank prints the traceback of its own shutdown; the error is judged by itself."""
    error = RaisedError("RuntimeError", "EOF: end of file")
    log = 'Traceback (most recent call last):\n  File "x"\nRuntimeError: EOF: end of file'
    outcome = with_rank(ideal(QUIET, FaultPlan()), 1, log=log, shutdown_error=error, exit_code=72)
    promises = [violation.promise for violation in judge(QUIET, FaultPlan(), outcome)]
    assert promises == ["UngracefulShutdown"]


def test_a_death_hides_no_internal_assertion() -> None:
    """Of a run that a death cuts short, what other ranks wrote of it is no violation."""
    outcome = with_rank(ideal(QUIET, FaultPlan()), 0, signal=6, exit_code=None)
    told = with_rank(outcome, 1, log=TRACEBACK)
    assert [v.promise for v in judge(QUIET, FaultPlan(), told)] == ["RankDied"]
    told = with_rank(outcome, 1, log=f"{OWNER_WAITED}\n{USER_WAITED}")
    assert [v.promise for v in judge(QUIET, FaultPlan(), told)] == ["RankDied"]
    told = with_rank(outcome, 1, log=ASSERTION)
    assert [v.promise for v in judge(QUIET, FaultPlan(), told)] == ["RankDied", "ErrorInLog"]


def test_the_assertion_of_the_known_finding_is_set_apart() -> None:
    """Only that one: another assertion in such a program is a failure."""
    late = FaultPlan(FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0}))
    program = Program(1, (Remote(0, 0, "a", timeout=0.5),))
    assert predict(program, late).known_bugs == {"late-remote-to-self"}
    finding = FINDINGS["late-remote-to-self"]
    assert can_cause(finding, Violation("ErrorInLog", f"worker0 wrote: {ASSERTION}", 0))
    other = ASSERTION.replace("rref_context.cpp", "container.cpp")
    assert not can_cause(finding, Violation("ErrorInLog", f"worker0 wrote: {other}", 0))
    assert not can_cause(finding, Violation("RRefLeak", ASSERTION, 0))


def test_a_shutdown_that_says_nothing_hides_no_traceback() -> None:
    """An error without a text accounts for no line of the log."""
    error = RaisedError("KeyboardInterrupt", "")
    outcome = with_rank(
        ideal(QUIET, FaultPlan()), 1, log=TRACEBACK, shutdown_error=error, exit_code=72
    )
    promises = [violation.promise for violation in judge(QUIET, FaultPlan(), outcome)]
    assert promises == ["UngracefulShutdown", "ErrorInLog"]
