"""What is accepted because it is documented: each kind has its sentence, and is counted."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from rpcprops.commands.check import _accepted_in_all
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import DOCUMENTED, accepted, judge, predict
from rpcprops.outcomes import Counters, Outcome, RaisedError
from rpcprops.programs import (
    Call,
    Context,
    Drop,
    Fetch,
    Own,
    Profile,
    Program,
    Recurse,
    Remote,
    Settle,
    Share,
    Unreached,
)
from rpcprops.properties import PROPERTIES, Case, Examination, Observation
from rpcprops.report.text import describe_accepted
from rpcprops.torch_facts import NEWEST
from tests.seeded._ideal import CONTEXT_LEAK, ERRORS, OWNER_WAITED, ideal, with_rank, with_step

FAULTS = Path(__file__).parents[2] / "docs" / "faults.md"
CLEANUP, DELETE = "CLEANUP_AUTOGRAD_CONTEXT_REQ", "RREF_USER_DELETE"
#: The function of `a` takes 3 s, so its creation times out while it is used.
SLOW = Program(
    2, (Own(0, "o"), Remote(0, 1, "a", right="o", timeout=1.0), Fetch(0, "a"), Fetch(0, "a"))
)
FETCH_LATE = FaultPlan(by_rank={1: FaultTable(messages_to_delay={"SCRIPT_RREF_FETCH_CALL": 3.0})})


def kinds(program: Program, plan: FaultPlan, outcome: Outcome) -> list[tuple[str, int | None]]:
    """What is accepted, with its rank; nothing of it may be a violation."""
    assert judge(program, plan, outcome) == ()
    return [(one.kind, one.rank) for one in accepted(program, plan, outcome)]


@pytest.mark.parametrize("kind", DOCUMENTED)
def test_the_documentation_says_each_sentence(kind: str) -> None:
    """docs/faults.md has each kind with its sentence, and says which ones users call defects."""
    text = " ".join(FAULTS.read_text(encoding="utf-8").split())
    head = f"* `{kind}`. {DOCUMENTED[kind].sentence}"
    assert head in text
    rest = text.partition(head)[2].partition(" * `")[0].partition(" ## ")[0]
    assert ("A user of torch would call this a defect" in rest) == DOCUMENTED[kind].is_defect


@pytest.mark.parametrize("kind", DOCUMENTED)
def test_what_allows_it_is_quoted_with_its_place(kind: str) -> None:
    """docs/faults.md has torch's words; where they are in the installed torch, they are there."""
    documented = DOCUMENTED[kind]
    text = " ".join(FAULTS.read_text(encoding="utf-8").split())
    rest = text.partition(f"* `{kind}`.")[2].partition(" * `")[0].partition(" ## ")[0]
    if not documented.quote:
        assert rest.endswith("torch's documentation says nothing of it.")
        return
    assert rest.endswith(f"torch: {documented.allowed_by}.")
    place, _, function = documented.place.partition(", ")
    if place.startswith("docs/"):
        # That part of torch's documentation is not in its wheel.
        return
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / place).read_text(encoding="utf-8")
    found = [node for node in ast.parse(source).body if getattr(node, "name", "") == function]
    (node,) = [one for one in found if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    assert documented.quote in " ".join((ast.get_docstring(node) or "").split())


def test_nothing_is_accepted_where_nothing_is_lost() -> None:
    """A program within the retry budget shows no such effect."""
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable([DELETE], 5))
    assert kinds(program, plan, ideal(program, plan)) == []


def test_a_lost_delete_is_counted_at_the_owner() -> None:
    """The owner reports its leak and waits 100 s for it; both are counted."""
    program = Program(2, (Remote(0, 1, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable([DELETE], 6))
    outcome = ideal(program, plan)
    assert OWNER_WAITED in outcome.ranks[1].log
    assert kinds(program, plan, outcome) == [("leak-at-owner", 1), ("shutdown-waits", 1)]


def test_a_lost_accept_makes_shutdown_wait_and_the_owner_leak_by_chance() -> None:
    """Who sent the RRef waits for the accept; whether the owner reports a leak is open."""
    program = Program(3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(2, "b")))
    plan = FaultPlan(by_rank={2: FaultTable(["RREF_CHILD_ACCEPT"], 6)})
    outcome = ideal(program, plan)
    quiet = kinds(program, plan, outcome)
    assert ("shutdown-waits", 0) in quiet
    assert ("leak-by-chance", 1) not in quiet
    leaked = with_rank(outcome, 1, log="Leaking RRef 1 with fork Id 1")
    assert ("leak-by-chance", 1) in kinds(program, plan, leaked)


def test_a_context_whose_cleanup_is_lost_is_counted() -> None:
    """At the rank that keeps it, after the settle and after the shutdown."""
    program = Program(2, (Context(0, "x", (1,)),))
    plan = FaultPlan(by_rank={0: FaultTable([CLEANUP], 21)})
    outcome = ideal(program, plan)
    assert outcome.ranks[1].counters_after_shutdown == Counters(contexts=1)
    assert kinds(program, plan, outcome) == [("context-kept", 1)]


def test_a_pass_that_waits_for_what_never_comes_is_counted() -> None:
    """In each step that shows one; and torch counts it among the passes that run, to the end."""
    program = Program(2, (Unreached(0, 1, "x"), Unreached(0, 0, "y"), Call(0, 1)))
    outcome = ideal(program, FaultPlan())
    assert outcome.ranks[0].counters_after_shutdown == Counters(backward_passes=2)
    assert kinds(program, FaultPlan(), outcome) == [("backward-waits", None)] * 2
    assert [one.step for one in accepted(program, FaultPlan(), outcome)] == [0, 1]
    other = with_step(outcome, 0, value={**outcome.steps[0].value, "ended": True})
    assert [one.step for one in accepted(program, FaultPlan(), other)] == [1]
    ended = with_rank(outcome, 0, counters_after_shutdown=Counters(backward_passes=1))
    assert [one.promise for one in judge(program, FaultPlan(), ended)] == ["ContextLeak"]


@pytest.mark.parametrize(
    ("held", "log", "found"),
    [(1, "", [("context-left-by-shutdown", 1)]), (0, "", [])],
)
def test_a_context_that_shutdown_leaves_is_counted(
    held: int, log: str, found: list[tuple[str, int | None]]
) -> None:
    """Where its cleanup was still being tried again, it may stay or not."""
    program = Program(2, (Context(0, "x", (1,)),), settles=False)
    plan = FaultPlan(by_rank={0: FaultTable([CLEANUP], 3)})
    outcome = with_rank(ideal(program, plan), 0, log="")
    outcome = with_rank(outcome, 1, counters_after_shutdown=Counters(contexts=held))
    assert kinds(program, plan, outcome) == found
    told = with_rank(outcome, 0, log=CONTEXT_LEAK)
    assert kinds(program, plan, told) == [("context-left-by-shutdown", 0), *found]


def test_a_context_that_stays_for_no_reason_is_a_violation() -> None:
    """Where no cleanup failed, what is held after an unsettled shutdown is a leak."""
    program = Program(2, (Context(0, "x", (1,)),), settles=False)
    outcome = ideal(program, FaultPlan())
    outcome = with_rank(outcome, 1, counters_after_shutdown=Counters(contexts=1))
    (violation,) = judge(program, FaultPlan(), outcome)
    assert (violation.promise, violation.rank) == ("ContextLeak", 1)


def test_a_shutdown_that_cannot_be_graceful_is_counted_once() -> None:
    """It is no rank's: a fault of PYTHON_CALL breaks the calls of shutdown."""
    program = Program(2, (Call(0, 1, flavour="builtin"),))
    plan = FaultPlan(FaultTable(["PYTHON_CALL"], 1))
    assert kinds(program, plan, ideal(program, plan)) == [("no-graceful-shutdown", None)]


def test_ranks_whose_threads_all_wait_are_ended_without_a_shutdown() -> None:
    """No fault is needed, and it is counted under a name of its own."""
    program = Program(2, (Recurse(0, (1, 0), timeout=3.0),), num_worker_threads=1)
    plan = FaultPlan()
    assert kinds(program, plan, ideal(program, plan)) == [("no-thread-left", None)]


def test_a_run_may_follow_either_of_two_predictions() -> None:
    """The value, and then the error; or the error at once. Nothing else."""
    prediction = predict(SLOW, FETCH_LATE)
    shown = [[step.error for step in p.steps] for p in (prediction, *prediction.alternatives)]
    assert shown == [["", "", "", "creation"], ["", "", "creation", "creation"]]
    used = ideal(SLOW, FETCH_LATE)
    assert kinds(SLOW, FETCH_LATE, used) == [
        ("timed-out-rref-used", None),
        ("last-deletes-not-judged", 0),
    ]
    marked = with_step(used, 2, value=None, error=ERRORS["creation"])
    # It never asked for the value, so one message fewer was held up, and none is predicted.
    held_up = prediction.alternatives[0].delays(FETCH_LATE)
    assert held_up == prediction.delays(FETCH_LATE)
    assert kinds(SLOW, FETCH_LATE, marked) == [("last-deletes-not-judged", 0)]
    twice = with_step(used, 3, value=[2.0], error=None)
    (violation,) = judge(SLOW, FETCH_LATE, twice)
    assert (violation.promise, violation.step) == ("MissingError", 3)


def test_what_a_finding_changes_later_does_not_change_which_one_a_run_follows() -> None:
    """No prediction has the error of the finding, so the steps before it decide."""
    profile = Profile(0, 1, unpicklable=True)
    program = Program(2, (Remote(0, 1, "a", timeout=3.0, seconds=12.0), Fetch(0, "a"), profile))
    says = NEWEST.texts.profiler_key
    for marked in (False, True):
        outcome = ideal(program, FaultPlan())
        if marked:
            outcome = with_step(outcome, 1, value=None, error=ERRORS["creation"])
        outcome = with_step(outcome, 2, value=None, error=RaisedError("RuntimeError", says))
        (violation,) = judge(program, FaultPlan(), outcome)
        assert (violation.promise, violation.step) == ("UnexpectedError", 2)


def test_a_settle_leaves_one_prediction() -> None:
    """A settle waits for the timeout, so a use after it must raise."""
    program = dataclasses.replace(SLOW, steps=(*SLOW.steps[:2], Settle(), Fetch(0, "a")))
    prediction = predict(program, FETCH_LATE)
    assert not prediction.alternatives
    assert prediction.steps[-1].error == "creation"


def test_a_summary_counts_each_kind_over_all_properties() -> None:
    """How often it came, each rank and step by itself, and in how many examples."""
    program = Program(2, (Remote(0, 1, "a"), Remote(1, 0, "b"), Drop(0, "a"), Drop(1, "b")))
    plan = FaultPlan(FaultTable([DELETE], 6))
    outcome = ideal(program, plan)
    found = accepted(program, plan, outcome)
    done = [Examination(PROPERTIES["drawn-beyond-budget"]) for _ in range(2)]
    for result, examples in zip(done, (1, 2), strict=True):
        for _ in range(examples):
            result.count(Observation(Case(program, plan), outcome, (), (), accepted=found))
    assert done[1].accepted["leak-at-owner"].times == 4
    assert _accepted_in_all(done) == {"leak-at-owner": (6, 3), "shutdown-waits": (6, 3)}


def test_the_example_of_an_effect_is_the_one_of_fewest_steps() -> None:
    """A user reads the example, so a long one gives way to a shorter one, whichever comes first."""
    plan = FaultPlan(FaultTable([DELETE], 6))
    long = Program(2, (Remote(0, 1, "a"), Remote(1, 0, "b"), Drop(0, "a"), Drop(1, "b")))
    short = Program(2, (Remote(0, 1, "a"), Drop(0, "a")))
    result = Examination(PROPERTIES["drawn-beyond-budget"])
    for program in (long, short, long):
        outcome = ideal(program, plan)
        found = accepted(program, plan, outcome)
        result.count(Observation(Case(program, plan), outcome, (), (), accepted=found))
    assert result.accepted["leak-at-owner"].case.program == short
    assert result.accepted["leak-at-owner"].examples == 3


def test_what_allows_an_effect_is_printed() -> None:
    """The report of an effect has torch's words with their place, where there are any."""
    lines = describe_accepted("leak-at-owner", 1, 2, "case")
    assert f"         torch: {DOCUMENTED['leak-at-owner'].allowed_by}" in lines
    assert not any("torch: " in line for line in describe_accepted("context-kept", 1, 2, "case"))


def test_a_long_example_is_shortened() -> None:
    """It fits on three lines of a terminal, which say where the whole of it is."""
    case = ", ".join(f"Call(0, {to})" for to in range(200))
    *_, first, second, third = describe_accepted("context-kept", 1, 2, case)
    assert first.startswith("         such as Call(0, 0), Call(0, 1), ")
    assert third.endswith(" … (--json FILE has the whole of it)")
    assert max(map(len, (first, second, third))) <= 100


def test_every_kind_comes_once_a_place_in_a_fixed_order() -> None:
    """Two effects of one run are told in the order of the documentation, whoever shows them."""
    program = Program(2, (Remote(0, 1, "a"), Remote(1, 0, "b"), Drop(0, "a"), Drop(1, "b")))
    plan = FaultPlan(FaultTable([DELETE], 6))
    assert kinds(program, plan, ideal(program, plan)) == [
        ("leak-at-owner", 0),
        ("leak-at-owner", 1),
        ("shutdown-waits", 0),
        ("shutdown-waits", 1),
    ]
