"""Which passing cases are run in real time as well, and what that may cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpcprops.faults import FaultPlan, FaultTable, MessageFault
from rpcprops.oracle import FaultCount, predict
from rpcprops.outcomes import Outcome
from rpcprops.programs import Fetch, Onward, Program, Remote
from rpcprops.properties import Case, Observation
from rpcprops.properties import _programs as p
from rpcprops.properties._sample import (
    ALL_SECONDS,
    CASE_SECONDS,
    EVERY,
    MOST,
    Sample,
    real_waits,
)
from rpcprops.torch_facts import facts_of

CHEAP = FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 0.01})
DEAR = FaultTable(["RREF_USER_DELETE"], 5)


def passed(table: FaultTable = CHEAP, *, fired: int = 1) -> Observation:
    """A case that passed under this table."""
    faults = (FaultCount(0, "delay", "PYTHON_REMOTE_CALL", 1, fired),)
    return Observation(Case(p.create_and_drop(), FaultPlan(table)), Outcome(2), (), faults)


@pytest.mark.parametrize(
    ("case", "seconds"),
    [
        (Case(p.create_and_drop()), 0.0),
        (Case(p.create_and_drop(), FaultPlan(DEAR)), 9.125),
        (Case(p.create_and_drop(), FaultPlan(by_rank={1: DEAR})), 0.0),
        (Case(p.create_and_drop(), FaultPlan(CHEAP)), 0.01),
        # One call, and the gathering at shutdown.
        (
            Case(
                p.timed_call("python", 99.0),
                FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1})}),
            ),
            3.0,
        ),
        # A context's cleanup, and two settles that wait for its last try, which has no counter.
        (
            Case(
                p.context_over(2, (1,)),
                FaultPlan(by_rank={0: FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 1)}),
            ),
            3.04,
        ),
        # What is still held is dropped by shutdown.
        (Case(p.unsettled_exit(), FaultPlan(by_rank={2: FaultTable(["RREF_USER_DELETE"], 2)})), 2),
    ],
)
def test_waits_are_predicted(case: Case, seconds: float) -> None:
    """The waits of a case in real time are those of retries, delays, settle and shutdown."""
    assert real_waits(case) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (MessageFault(1, "delay", "REMOTE_RET", delay=30.0), 30.0),
        (MessageFault(0, "delay", "RREF_USER_DELETE", to=1, delay=30.0), 30.0),
        (MessageFault(0, "lose", "PYTHON_RREF_FETCH_CALL", to=1), 65.0),
        (MessageFault(0, "duplicate", "RREF_USER_DELETE"), 0.0),
    ],
)
def test_a_message_fault_may_take_its_time(fault: MessageFault, seconds: float) -> None:
    """Also one of an answer or for one receiver; what is lost takes as long as its timeout."""
    program = replace(p.create_and_drop(), rpc_timeout=65.0 if fault.action == "lose" else None)
    assert real_waits(Case(program, FaultPlan(others=(fault,)))) == seconds


def test_the_first_and_then_one_in_so_many() -> None:
    """Of cheap cases the first is taken, and then every so many."""
    sample = Sample(needs_faults=True)
    taken = [number for number in range(3 * EVERY) if sample.takes(passed())]
    assert taken == [0, EVERY, 2 * EVERY]


def test_cases_without_faults_are_left_out() -> None:
    """A case in which nothing fired is taken only where the property needs no faults."""
    assert not Sample(needs_faults=True).takes(passed(fired=0))
    assert Sample(needs_faults=False).takes(passed(fired=0))


def test_dear_cases_give_way_to_the_next() -> None:
    """A case that waits too long is not taken; the next cheap one is, in its place."""
    sample = Sample(needs_faults=True)
    assert [sample.takes(passed(table)) for table in (DEAR, DEAR, CHEAP)] == [False, False, True]


def test_the_sample_is_bounded() -> None:
    """Number and predicted seconds of what is taken stay within their bounds."""
    second = FaultTable(["RREF_USER_DELETE"], 1)
    short = Sample(needs_faults=True)
    assert sum(short.takes(passed(second)) for _ in range(100)) == 2
    assert short.spent <= ALL_SECONDS
    endless = Sample(needs_faults=True)
    assert sum(endless.takes(passed()) for _ in range(20 * EVERY * MOST)) == MOST


def test_what_took_longer_than_predicted_counts() -> None:
    """A case that took all seconds in real time is the last one for a while."""
    sample = Sample(needs_faults=True)
    assert sample.takes(passed())
    sample.took(ALL_SECONDS + 1)
    assert not any(sample.takes(passed()) for _ in range(3 * EVERY))
    none, second = Sample(needs_faults=True, seconds=0.0), FaultTable(["RREF_USER_DELETE"], 1)
    assert not any(none.takes(passed(second)) for _ in range(10))


def test_a_case_that_may_hang_is_left_out() -> None:
    """A rank that hangs by a known finding is given all of its time, so it is no cheap case."""
    steps = (Remote(0, 1, "a", timeout=0.5), Remote(0, 1, "b", timeout=0.5), Fetch(0, "a"))
    late = FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0})
    case = Case(Program(2, steps), FaultPlan(by_rank={0: late}))
    facts = facts_of("2.13.0")
    assert "second-failed-remote" in predict(case.program, case.plan, facts).known_bugs
    assert real_waits(case, facts) > 10 * CASE_SECONDS


def test_a_case_that_waits_in_vain_is_no_cheap_one() -> None:
    """Where no thread is free for a timeout, a step waits as long as it can, also in real time."""
    for threads, waits in ((2, True), (8, False)):
        program = Program(1, (Onward(0, 0, 0, 2, patience=1200.0),), num_worker_threads=threads)
        assert (real_waits(Case(program, FaultPlan())) >= 1200.0) is waits


def test_calls_that_wait_in_vain_in_one_thread_wait_one_after_the_other() -> None:
    """A slow clock must leave time for all of them, and a real one too."""
    program = Program(2, (Onward(0, 1, 1, 3, within=300.0, patience=600.0),), num_worker_threads=1)
    case = Case(program, FaultPlan())
    assert 1800.0 <= real_waits(case, facts_of("2.13.0")) < 2000.0
