"""Known findings: what each can have caused, and what stays a failure next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from rpcprops.faults import FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops.oracle import FINDINGS, are_kept, judge, predict, set_apart
from rpcprops.oracle._chosen import predict_for
from rpcprops.oracle._findings import can_cause
from rpcprops.oracle.errors import error_class
from rpcprops.outcomes import Counters, Outcome, RaisedError, SentMessage, Violation
from rpcprops.programs import (
    After,
    Ask,
    Call,
    Carry,
    Context,
    Count,
    Default,
    Deferred,
    Drop,
    End,
    Fetch,
    Gather,
    Graph,
    Linear,
    Local,
    Member,
    Method,
    Module,
    Nest,
    Onward,
    Optimize,
    Outlast,
    Own,
    Profile,
    Program,
    Raising,
    Reach,
    Rejoin,
    Remote,
    Retry,
    Settle,
    Share,
    Step,
    Through,
    Train,
    Wait,
)
from rpcprops.properties import Case, observe
from rpcprops.steps.values import Way
from rpcprops.torch_facts import NEWEST, facts_of
from tests.seeded._ideal import (
    EXIT_SHUTDOWN_FAILED,
    LEAKED,
    OWNER_WAITED,
    calling,
    holding,
    ideal,
    place,
    settled_with,
    with_rank,
    with_step,
)

# Rank 0 may forget an RRef that it sends to itself, and hang, leak or raise for that.
EARLY_FETCHED = Program(
    2, (Nest(0, 1, 0, "a"), Fetch(0, "a"), Share(0, "a", 0, "b"), Fetch(0, "b"))
)
EARLY_FORK = Program(2, (Nest(0, 1, 0, "a"), Share(0, "a", 0, "b"), Fetch(0, "a"), Drop(0, "b")))
# The second creation of rank 0 that is lost is never marked as failed.
TWICE = Program(2, (Remote(0, 1, "a"), Remote(0, 1, "b"), Fetch(0, "b")))
LOST = FaultPlan(by_rank={0: FaultTable(["PYTHON_REMOTE_CALL"], 1)})
VERSION = "2.13.0"


def seen(program: Program, plan: FaultPlan) -> Outcome:
    """What the program shows where nothing is wrong, on the torch of the findings."""
    return replace(ideal(program, plan), torch_version=VERSION)


def explained(program: Program, plan: FaultPlan, violation: Violation) -> tuple[str, ...]:
    """The findings that explain a violation; without any, it is left over."""
    met = predict(program, plan, facts_of(VERSION)).met
    names, others = set_apart(program, met, seen(program, plan), [violation])
    assert others == (() if names else (violation,))
    return names


def left(
    program: Program, plan: FaultPlan, outcome: Outcome, *violations: Violation
) -> tuple[tuple[str, ...], list[str]]:
    """The findings that explain some of these violations, and the promises of the others."""
    names, others = set_apart(program, predict(program, plan).known_bugs, outcome, violations)
    return names, [violation.promise for violation in others]


def test_the_programs_meet_their_findings() -> None:
    """Each meets one, but for the value that has come before its RRef is sent on."""
    assert predict(EARLY_FETCHED, FaultPlan()).known_bugs == set()
    assert predict(EARLY_FORK, FaultPlan()).known_bugs == {"early-owner-fork"}
    assert predict(TWICE, LOST).known_bugs == {"second-failed-remote"}


def test_a_step_that_a_finding_keeps_from_ending_is_predicted() -> None:
    """So that nobody waits long for it; a torch without the finding is waited for as ever."""
    rejoin = Program(2, (Count(0, 1), Settle(), Rejoin(0, failing="running")))
    for program, plan in ((TWICE, LOST), (rejoin, FaultPlan())):
        assert predict(program, plan).stuck == {2}
        assert not predict(program, plan, facts_of(VERSION).as_if_mended()).stuck
    assert not predict(TWICE, FaultPlan()).stuck


class _Shows:
    """A runner whose runs all show one outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def run(self, *_: Any, **__: Any) -> Outcome:
        return self.outcome


@pytest.mark.parametrize("leaks_first", [True, False])
def test_what_no_finding_explains_stays_a_failure(leaks_first: bool) -> None:
    """A leak that a finding explains hides no other of the same run, whichever comes first."""
    explained, other = (0, 1) if leaks_first else (1, 0)
    outcome = holding(seen(EARLY_FORK, FaultPlan()), explained, owners=3, forks=9)
    outcome = holding(outcome, other, contexts=1)
    observed = observe(_Shows(outcome), Case(EARLY_FORK), with_findings=False)  # type: ignore[arg-type]
    assert observed.explained_by == ("early-owner-fork",)
    assert [place(v) for v in observed.violations] == [("ContextLeak", other, None)]
    everything = observe(_Shows(outcome), Case(EARLY_FORK), with_findings=True)  # type: ignore[arg-type]
    assert len(everything.violations) == 2


@pytest.mark.parametrize("leaks", [False, True])
def test_a_step_that_a_finding_explains_hides_nothing_that_comes_after_it(*, leaks: bool) -> None:
    """Its value is set apart, and what the ranks hold at the end is judged all the same."""
    program = Program(2, (Carry(0, 1, "missing-unpickled"),))
    differs = "type builtins.AttributeError instead of rpcprops.MissingWhenUnpickled"
    outcome = with_step(seen(program, FaultPlan()), 0, value={"differs": differs})
    if leaks:
        outcome = holding(outcome, 1, owners=1, forks=1)
    observed = observe(_Shows(outcome), Case(program), with_findings=False)  # type: ignore[arg-type]
    assert observed.explained_by == ("attribute-error-as-value",)
    assert [place(v) for v in observed.violations] == [("RRefLeak", 1, None)] * leaks


def test_a_wait_for_an_rref_that_a_finding_leaks_is_explained_beside_a_wrong_value() -> None:
    """The leak comes after the step, and is judged; the wait for it alone is not explained."""
    steps = (Rejoin(0), Carry(0, 1, "missing-unpickled", way="remote"))
    program = Program(2, steps, settles=False)
    differs = "type builtins.AttributeError instead of rpcprops.MissingWhenUnpickled"
    outcome = with_step(seen(program, FaultPlan()), 1, value={"differs": differs})
    for error, left in ((LEAKED, []), (None, [("ErrorInLog", 1, None)])):
        exits = {"shutdown_error": error, "exit_code": EXIT_SHUTDOWN_FAILED if error else 0}
        told = with_rank(outcome, 1, log=OWNER_WAITED, **exits)
        observed = observe(_Shows(told), Case(program), with_findings=False)  # type: ignore[arg-type]
        assert [place(v) for v in observed.violations] == left


@pytest.mark.parametrize(
    ("steps", "settles", "meets"),
    [
        ((Call(0, 1, right="a", wait="later", out="f"),), False, True),
        ((Call(0, 1, right="a", wait="later", out="f"),), True, False),
        ((Call(0, 1, right="a", wait="later", out="f"), Settle()), False, False),
        ((Call(0, 1, right="a", wait="later", out="f"), Wait(0, "f")), False, False),
        ((Call(0, 0, right="a", wait="later", out="f"),), False, False),
        ((Call(0, 1, right="a"),), False, False),
        ((Call(0, 1, right="a", timeout=1.0, seconds=12.0),), False, True),
        ((Call(0, 1, right="b", wait="later", out="f"),), False, True),
        (
            (
                Call(0, 1, right="a", wait="later", out="f", timeout=14.0, seconds=12.0),
                Wait(0, "f"),
            ),
            False,
            True,
        ),
        ((Call(0, 1, wait="later", out="f"),), False, False),
    ],
)
def test_a_shutdown_deletes_the_argument_of_a_call_that_nobody_waits_for(
    steps: tuple[Step, ...], *, settles: bool, meets: bool
) -> None:
    """If its function fetches that from another rank, and no wait or settle has seen its end."""
    made = (Own(0, "a"), Remote(0, 0, "b", raises=True), Fetch(0, "b"))
    program = Program(2, (*made, *steps), settles=settles)
    prediction = predict(program, FaultPlan())
    expected = {"shutdown-deletes-argument"} if meets else set()
    assert prediction.known_bugs == expected
    # Only the shutdown hangs.
    for phase in ("shutdown", "run"):
        hung = Violation("RankHung", f"worker1 hangs (phase {phase}, after 30 real s)", 1)
        names, _ = set_apart(program, prediction.met, ideal(program, FaultPlan()), [hung])
        assert {*names} == (expected if phase == "shutdown" else set())


def test_where_two_predictions_agree_the_run_may_show_the_findings_of_each() -> None:
    """A use raises before the creation has come, or after it; its drop overtakes it, or not."""
    until = NthMessage(0, "RREF_USER_DELETE")
    held = MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=120.0, until=until)
    program = Program(2, (Remote(0, 1, "a", timeout=0.5), Through(0, "a"), Drop(0, "a")))
    plan = FaultPlan(others=(held,))
    assert not predict(program, plan).known_bugs
    outcome = seen(program, plan)
    assert predict_for(program, plan, outcome).known_bugs == {"timed-out-remote-dropped"}
    # A value that comes without an error tells them apart.
    steps = tuple(replace(step, error=None) for step in outcome.steps)
    assert not predict_for(program, plan, replace(outcome, steps=steps)).known_bugs


def test_a_pass_that_never_ends_keeps_its_rank_from_leaving() -> None:
    """The shutdown waits for the call that is never answered, and so do the other ranks."""
    program = Program(2, (Context(0, "x", (1, 0, 1), nested=True, breaks=0),), settles=False)
    for phase, names in (("shutdown", ("failed-backward-revisits-rank",)), ("run", ())):
        hung = Violation("RankHung", f"worker1 hangs (phase {phase}, after 30 real s)", 1)
        assert explained(program, FaultPlan(), hung)[:1] == names


#: Functions that fetch an RRef of another rank while their own rank may shut down; caller, callee.
FETCHING: tuple[tuple[tuple[Step, ...], int, int], ...] = (
    ((Own(0, "a"), Remote(0, 1, "b", right="a")), 0, 1),
    ((Own(0, "a"), Call(0, 1, right="a", wait="later", out="f")), 0, 1),
    ((Remote(1, 0, "a"), Remote(1, 1, "b", right="a")), 1, 1),
)


@pytest.mark.parametrize(("steps", "caller", "callee"), FETCHING)
def test_a_default_timeout_ends_the_fetch_of_a_deleted_argument(
    steps: tuple[Step, ...], caller: int, callee: int
) -> None:
    """The function raises then, and both ranks have waited in vain for what it makes."""
    timed = Program(2, steps, settles=False, rpc_timeout=300.0)
    users = "Timed out waiting for pending UserRRefs to be confirmed"
    shown = [
        ("ErrorInLog", "worker wrote: RuntimeError: RPCErr:1:RPC ran for more than set", callee),
        ("RRefLeak", "worker still holds 1 owner, 1 fork after its shutdown", callee),
    ]
    if caller != callee:
        shown.append(("ErrorInLog", users, caller))
    for promise, said, rank in shown:
        violation = Violation(promise, said, rank)
        expected = ("shutdown-deletes-argument",)
        assert explained(timed, FaultPlan(), violation) == expected
        # Without a timeout it hangs, and what one rank shows another does not.
        untimed = replace(timed, rpc_timeout=None)
        for program, other in ((untimed, rank), (timed, 1 - rank)):
            if program is untimed or caller != callee:
                there = Violation(promise, said, other)
                assert explained(program, FaultPlan(), there) == ()


@pytest.mark.parametrize("rpc_timeout", [None, 300.0])
def test_a_function_fetches_on_when_nobody_holds_what_it_makes(rpc_timeout: float | None) -> None:
    """The handle is dropped, and its function still needs what the shutdown deletes."""
    steps = (Own(0, "a"), Remote(0, 1, "b", right="a"), Drop(0, "b"))
    program = Program(2, steps, settles=False, rpc_timeout=rpc_timeout)
    assert predict(program, FaultPlan()).known_bugs == {"shutdown-deletes-argument"}


def test_a_fetch_at_its_owner_ends_the_creation_that_it_waits_for() -> None:
    """It has been made then, so no shutdown deletes what its function needs."""
    steps = (Remote(1, 0, "a"), Remote(1, 1, "b", right="a"), Fetch(1, "b"))
    assert not predict(Program(2, steps, settles=False), FaultPlan()).known_bugs


@pytest.mark.parametrize("twice", [False, True])
def test_what_comes_after_a_settle_that_ends_the_run_is_not_missed(*, twice: bool) -> None:
    """No messages of a shutdown are in the record then; how often calls ran is judged."""
    method = Method(0, 1, how="async", form="missing")
    program = Program(2, (Call(0, 1), method, Settle()), settles=False)
    outcome = settled_with(seen(program, FaultPlan()), 2, 1, owners=1, forks=1)
    if twice:
        outcome = calling(outcome, 1, {"step0": 2})
    created = SentMessage(0.0, 0, 1, 1, "PYTHON_REMOTE_CALL", is_request=True, first_id=1)
    cut = replace(outcome, messages=(created,))
    observed = observe(_Shows(cut), Case(program), with_findings=False)  # type: ignore[arg-type]
    assert observed.explained_by == ("failed-async-proxy",)
    assert [place(v) for v in observed.violations] == [("NotRunOnce", 1, None)] * twice


def test_a_finding_explains_on_a_torch_that_nobody_has_measured() -> None:
    """A newer torch has a finding until it is known to be mended; it is only not listed there."""
    outcome = replace(holding(seen(EARLY_FORK, FaultPlan()), 0, owners=3), torch_version="2.99.0")
    violations = judge(EARLY_FORK, None, outcome)
    assert violations
    names, others = set_apart(EARLY_FORK, {"early-owner-fork"}, outcome, violations)
    assert (names, others) == (("early-owner-fork",), ())
    assert FINDINGS["early-owner-fork"].status("2.99.0") == "unlisted"
    assert FINDINGS["early-owner-fork"].status(VERSION) == "listed"


@pytest.mark.parametrize("version", ["2.15.0+cu132", "2.15.0a0+git1234567", "2.16.1", "3.0.0"])
def test_a_mended_finding_explains_nothing_any_more(version: str) -> None:
    """From the release that mended it, what looks like the finding is a failure of torch again."""
    hung = Violation("RankHung", "worker0 hung", 0)
    outcome = replace(seen(TWICE, LOST), torch_version=version)
    assert FINDINGS["second-failed-remote"].status(version) == "fixed"
    assert set_apart(TWICE, {"second-failed-remote"}, outcome, [hung]) == ((), (hung,))


@pytest.mark.parametrize("version", ["2.5.1", "2.14.1", "2.9.0+cu128", "2.14.0.dev20260901"])
def test_before_it_was_mended_the_finding_explains(version: str) -> None:
    """Releases before the mending one have it."""
    hung = Violation("RankHung", "worker0 hung", 0)
    outcome = replace(seen(TWICE, LOST), torch_version=version)
    names, others = set_apart(TWICE, {"second-failed-remote"}, outcome, [hung])
    assert (names, others) == (("second-failed-remote",), ())


def test_a_death_explains_what_its_step_showed_besides_and_no_other() -> None:
    """What was under way may err or leak for that; values, and earlier steps, speak for themselves.

    Here rank 2 aborts, as its fork request is lost, while the ranks settle.
    """
    program = Program(3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Settle(), Fetch(0, "a")))
    plan = FaultPlan(by_rank={2: FaultTable(["RREF_FORK_REQUEST"], 6)})
    outcome = seen(program, plan)
    outcome = replace(outcome, steps=outcome.steps[:3])
    died = Violation("RankDied", "aborted", 2)
    name = ("fork-request-given-up",)
    assert left(program, plan, outcome, died, Violation("RRefLeak", "held", 1, 2)) == (name, [])
    assert left(program, plan, outcome, died, Violation("WrongValue", "4", 0, 2)) == (
        name,
        ["WrongValue"],
    )
    assert left(program, plan, outcome, died, Violation("MissingError", "no", 0, 1)) == (
        name,
        ["MissingError"],
    )
    assert left(program, plan, outcome, Violation("RRefLeak", "held", 1, 2)) == ((), ["RRefLeak"])


def test_a_rank_that_is_about_to_abort_is_explained_as_one_that_has() -> None:
    """The run may end for another reason after it has written so, and before it is dead."""
    program = Program(3, (Remote(0, 1, "a"), Share(0, "a", 2, "b")))
    plan = FaultPlan(by_rank={2: FaultTable(["RREF_FORK_REQUEST"], 6)})
    wrote = "worker2 wrote: terminate called after throwing an instance of 'c10::Error'"
    said = Violation("ErrorInLog", wrote, 2)
    assert left(program, plan, seen(program, plan), said) == (("fork-request-given-up",), [])
    waited = Violation("ErrorInLog", "worker2 wrote: Timed out waiting for pending OwnerRRefs", 2)
    assert left(program, plan, seen(program, plan), waited)[1] == ["ErrorInLog"]
    assert left(program, FaultPlan(), seen(program, plan), said)[1] == ["ErrorInLog"]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([3.0], None),
        (None, RaisedError("RuntimeError", "RPC ran for more than set timeout (100 ms)")),
    ],
)
def test_an_rref_that_is_not_marked_as_failed_is_explained(
    value: Any, error: RaisedError | None
) -> None:
    """Whatever its use gives in place of the error that it had to."""
    outcome = with_step(seen(TWICE, LOST), 2, value=value, error=error)
    (violation,) = judge(TWICE, LOST, outcome)
    assert left(TWICE, LOST, outcome, violation) == (("second-failed-remote",), [])


@pytest.mark.parametrize(
    ("violation", "explained"),
    [
        (Violation("RankHung", "worker0 hung", 0), True),
        (Violation("RankDied", "SIGSEGV", 0), True),
        # Another RRef lies where the first one was, and is marked in its place.
        (
            Violation(
                "UnexpectedError",
                "expected no error, got RuntimeError: RRef creation via rpc.remote() timed out",
            ),
            True,
        ),
        (Violation("UnexpectedError", "expected no error, got RuntimeError: pipe closed"), False),
        (Violation("MissingError", "expected torch's timeout, got the value [3.0]"), False),
        (Violation("WrongValue", "expected [3.0], got [4.0]", 0, 2), False),
        (Violation("RRefLeak", "holds 1", 1), False),
        (Violation("NotRunOnce", "ran 2 times", 1), False),
        (Violation("UngracefulShutdown", "left with 1", 1), False),
    ],
)
def test_a_second_failed_remote_explains_no_more_than_torch_does(
    violation: Violation, explained: bool
) -> None:
    """A mark that is missing, or at another place, can hang, raise or kill, and nothing else."""
    assert can_cause(FINDINGS["second-failed-remote"], violation) is explained


#: What the owner wrote in a run that kept the fork (torch 2.13.0).
KEPT = (
    "[I1126 rref_context.cpp:777] Could not find UserRRef instance, RRefId = "
    "GloballyUniqueId(created_on=0, local_id=2), ForkId = GloballyUniqueId(created_on=0, local_id="
)


@pytest.mark.parametrize(
    ("log", "explained"),
    [
        (f"{KEPT}2), likely because it was deleted by a previously retried message", True),
        # The fork of another rank: its delete came twice.
        (f"{KEPT}3), likely because it was deleted by a previously retried message", False),
        ("", False),
    ],
)
def test_a_leak_is_explained_where_the_owner_could_not_delete_its_own_fork(
    log: str, explained: bool
) -> None:
    """The write to freed memory can also change the fork that torch looks up next."""
    outcome = seen(TWICE, LOST)
    ranks = (replace(outcome.ranks[0], log=log), *outcome.ranks[1:])
    violation = Violation("RRefLeak", "worker0 holds 1 owner, 1 fork; expected nothing", 0)
    found, others = left(TWICE, LOST, replace(outcome, ranks=ranks), violation)
    assert bool(found) is explained
    assert bool(others) is not explained


# The findings that show at one place: each explains what it causes there, and nothing else.

#: For each such finding, a program that meets it, and how it shows.
PLACED: dict[str, tuple[Program, Violation]] = {
    "garbled-exception-text": (
        Program(2, (Count(0, 1), Raising(0, 1, text=": caf\u00e9"))),
        Violation("UnclearError", "RuntimeError came without the text that was raised", 0, 1),
    ),
    "future-exception-as-value": (
        Program(2, (Count(0, 1), Deferred(0, 1, 0, "exception"))),
        Violation(
            "MissingError",
            "expected the exception of the future, got the value "
            "RaisedOnPurposeError('raised on purpose')",
            0,
            1,
        ),
    ),
    "guessed-rref-type": (
        Program(2, (Count(0, 1), Carry(0, 1, "bytes-text", "own"))),
        Violation(
            "WrongValue",
            "a value of the sort 'bytes-text' came with type builtins.str instead of "
            "builtins.bytes",
            0,
            1,
        ),
    ),
    "attribute-error-as-value": (
        Program(2, (Count(0, 1), Carry(0, 1, "missing-unpickled"))),
        Violation(
            "MissingError",
            "a value of the sort 'missing-unpickled' had to be refused by RuntimeError, and came "
            "with type builtins.AttributeError instead of "
            "rpcprops.steps.in_rank.values.MissingWhenUnpickled",
            0,
            1,
        ),
    ),
    "unconfirmed-user": (
        Program(
            2, (Own(1, "a"), Share(1, "a", 0, "b"), Settle(), Ask(0, "b", "confirmed_by_owner"))
        ),
        Violation("WrongValue", "expected [True], got [False]", 0, 3),
    ),
    "rounded-rprop-factor": (
        Program(2, (Count(0, 1), Train(0, "x", (1,), "Rprop", value=(1.0,)))),
        Violation(
            "WrongValue",
            "expected the parameters [[0.45]], got [[0.44999998807907104]], and [[0.45]] alone",
            0,
            1,
        ),
    ),
    "functional-default-rate": (
        Program(2, (Count(0, 1), Train(0, "x", (1,), rounds=1, options=("default_lr",)))),
        Violation(
            "WrongValue",
            "expected the parameters [[1.0]], got [[0.9]], and [[1.0]] alone, as with the default "
            "rate of the functional optimizer",
            0,
            1,
        ),
    ),
    "adagrad-wrong-parameter": (
        Program(2, (Count(0, 1), Train(0, "x", (1, 1), "Adagrad", left_out=((1, 0),)))),
        Violation(
            "WrongValue",
            "expected the parameters [[1.0]], got [[0.9]], and [[1.0]] alone, as with gradients "
            "of other parameters",
            0,
            1,
        ),
    ),
    "stale-gradients": (
        Program(2, (Count(0, 1), Train(0, "x", (1, 0), "RAdam", left_out=((1, 0),)))),
        Violation(
            "WrongValue",
            "expected the parameters [[1.0]], got [[0.9]], and [[1.0]] alone, as with gradients "
            "of earlier contexts",
            0,
            1,
        ),
    ),
    "unchecked-optimizer-options": (
        Program(2, (Count(0, 1), Train(0, "x", (1, 0), "Rprop", refused="etas"))),
        Violation(
            "MissingError",
            "expected what the function raised, got the value {'parameters': None}",
            0,
            1,
        ),
    ),
    "remote-module-skips-hooks": (
        Program(2, (Count(0, 1), Linear(0, "x", 1, by="call", layer="hooked"))),
        Violation(
            "WrongGradient",
            "gradients: expected [[4.0]], got [[2.0]], as without hooks",
            0,
            1,
        ),
    ),
    "remote-module-takes-names": (
        Program(2, (Count(0, 1), Linear(0, "x", 1, by="async", layer="device"))),
        Violation(
            "UnexpectedError",
            "expected no error, got TypeError: TypeError: On WorkerInfo(id=1, name=worker1):",
            0,
            1,
        ),
    ),
    "remote-module-drops-mode": (
        Program(2, (Count(0, 1), Module(0, 1, (1.0, 2.0), mode="parent"))),
        Violation("WrongValue", "expected [1.0, 3.0], got [3.0, 5.0]", 0, 1),
    ),
    "remote-module-mode-copies": (
        Program(2, (Count(0, 1), Module(0, 1, mode="returned"))),
        Violation(
            "UnexpectedError",
            "expected no error, got RuntimeError: eval() had to return the module itself, and "
            "returned another: Affine",
            0,
            1,
        ),
    ),
    "rebuilt-module-not-callable": (
        Program(2, (Count(0, 1), Module(0, 1, called=True, sent=True))),
        Violation(
            "UnexpectedError",
            "expected no error, got AttributeError: 'RemoteModule' object has no attribute "
            "'_backward_hooks'",
            0,
            1,
        ),
    ),
    "proxy-takes-keywords": (
        Program(2, (Count(0, 1), Method(0, 1, "remote", "keyword rref"))),
        Violation(
            "UnexpectedError",
            "expected no error, got TypeError: _invoke_rpc() got multiple values for argument "
            "'rref'",
            0,
            1,
        ),
    ),
    "proxy-hides-methods": (
        Program(2, (Count(0, 1), Method(0, 1, "async", "named rpc_timeout"))),
        Violation(
            "UnexpectedError",
            "expected no error, got TypeError: 'float' object is not callable",
            0,
            1,
        ),
    ),
    "proxy-asks-class": (
        Program(2, (Count(0, 1), Method(0, 1, form="getattr"))),
        Violation(
            "UnexpectedError",
            "expected no error, got AttributeError: type object 'Tally' has no attribute "
            "'late_add'",
            0,
            1,
        ),
    ),
    "retried-without-payload": (
        Program(2, (Count(0, 1), Settle(), Retry(0, 1, 0))),
        Violation(
            "UnexpectedError",
            "expected no error, got RuntimeError: RPC ran for more than set timeout (120000 ms)",
            0,
            2,
        ),
    ),
    "profiled-events-lost": (
        Program(2, (Count(0, 1), Profile(0, 1, times=2))),
        Violation("WrongValue", "the profiler shows nothing of what ran at rank 1", 0, 1),
    ),
    "profiling-key-kept": (
        Program(2, (Count(0, 1), Profile(0, 1, unpicklable=True))),
        Violation(
            "UnexpectedError",
            "expected no error, got RuntimeError: Cannot call RemoteProfilerManager::setCurrentKey "
            "when current key is already set.",
            0,
            1,
        ),
    ),
    "timeout-needs-thread": (
        Program(
            2,
            (Count(0, 1), Onward(0, 1, 0, within=1.0, seconds=2.0, patience=4.0)),
            num_worker_threads=1,
        ),
        Violation(
            "MissingError", "neither an answer nor its timeout ended 1 of 1 calls in 4 s", 0, 1
        ),
    ),
    "failed-join-keeps-token": (
        Program(3, (Member(0), Member(2), Member(1, "refused"), Member(0, "leave")), settles=False),
        Violation("UnexpectedError", "expected no error, got RuntimeError: Wait timeout", 0, 3),
    ),
    "rejoins-alone": (
        Program(2, (Member(1), Member(0), Member(0, "leave"), Member(0)), settles=False),
        Violation("WrongValue", "a member knows the members [0], expected [0, 1]", 0, 3),
    ),
    "leaving-keeps-values": (
        Program(
            2,
            (
                Member(0),
                Member(1),
                Remote(1, 0, "a"),
                Fetch(1, "a"),
                Member(1, "leave"),
                Member(0, "look"),
            ),
            settles=False,
        ),
        Violation("RRefLeak", "a member holds 1 owner, 1 fork; expected nothing", 0, 5),
    ),
    "dash-in-member-name": (
        Program(2, (Member(1, dash=True), Member(0)), settles=False),
        Violation("UnexpectedError", "expected no error, got ValueError: stoi", 0, 1),
    ),
    "late-answer-keeps-rref": (
        Program(2, (Count(0, 1), Nest(0, 1, 0, "a", timeout=3.0, seconds=12.0))),
        Violation("RRefLeak", "worker0 holds 1 owner, 1 fork; expected nothing", 0),
    ),
    "unreadable-remote": (
        Program(2, (Count(0, 1), Carry(0, 1, "raises-unpickled", "remote-echo"))),
        Violation(
            "MissingError",
            "a value of the sort 'raises-unpickled' had to be refused by RuntimeError, and came "
            "with a request for its value",
            0,
            1,
        ),
    ),
    "refused-remote-to-self": (
        Program(2, (Count(0, 1), Carry(0, 0, "meta", "remote-echo"))),
        Violation("RRefLeak", "worker0 holds 1 owner, 1 fork; expected nothing", 0),
    ),
    "failed-pickle-keeps-tensors": (
        Program(2, (Count(0, 1), Carry(0, 1, "tensor-and-lock", "async"))),
        Violation("WrongValue", "the value was refused, and a tensor of it stays", 0, 1),
    ),
    "unreadable-tensor": (
        Program(2, (Count(0, 1), Carry(1, 0, "quint2x4", "echo"))),
        Violation("RankDied", "worker0 died before its time: killed by SIGABRT", 0),
    ),
    "unwritable-tensor": (
        Program(2, (Count(0, 1), Carry(0, 1, "sparse_csc", "echo"))),
        Violation("RankDied", "worker0 died before its time: killed by SIGABRT", 0),
    ),
    "unpicklable-after-rref": (
        Program(2, (Count(0, 1), Carry(0, 1, "rref-and-lock", "echo"))),
        Violation("RRefLeak", "worker0 holds 1 owner, 1 fork; expected nothing", 0),
    ),
    "long-timeout-ends-at-once": (
        Program(2, (Count(0, 1), Reach(0, 1, how="async", timeout=2147484.0))),
        Violation(
            "UnexpectedError",
            "expected no error, got RuntimeError: RPCErr:1:RPC ran for more than set timeout "
            "(-2147483648 ms) and will now be marked with an error",
            0,
            1,
        ),
    ),
    "short-timeout-never-comes": (
        Program(2, (Count(0, 1), Default(0, 1, 0.0005, sleeps=2.0))),
        Violation("MissingError", "expected torch's timeout, got the value [3.0]", 0, 1),
    ),
    "refused-exception-kept": (
        Program(2, (Count(0, 1), After(0, 1, "exception late"))),
        Violation("WrongValue", "expected [3.0, 1.0, 1.0], got [3.0, 1.0, -1.0]", 0, 1),
    ),
    "collect-all-ends-early": (
        Program(2, (Count(0, 1), Gather(0, (1, 0), "done", breaks=1, seconds=2.0))),
        Violation(
            "MissingError", "expected what the function raised, got the value [0.0, 1.0]", 0, 1
        ),
    ),
    "optimizer-options-by-place": (
        Program(
            2, (Count(0, 1), Train(0, "x", (1,), "RMSprop", options=("maximize",), placed=True))
        ),
        Violation(
            "WrongValue",
            "expected the parameters [[1.0]], got [[0.9]], and [[1.0]] alone, as with other "
            "options than those that were given by place",
            0,
            1,
        ),
    ),
}


def apart(program: Program, *violations: Violation) -> tuple[tuple[str, ...], list[str]]:
    """The findings that explain some of these violations, and the promises of the others."""
    met = predict(program, FaultPlan()).met
    names, others = set_apart(program, met, seen(program, FaultPlan()), violations)
    return names, [violation.promise for violation in others]


@pytest.mark.parametrize("name", PLACED)
def test_a_finding_explains_what_it_shows_in_its_step(name: str) -> None:
    """Its smallest case is no failure on a torch that has it, and one on a torch that mended it."""
    program, violation = PLACED[name]
    assert predict(program, FaultPlan()).known_bugs == {name}
    assert apart(program, violation) == ((name,), [])


@pytest.mark.parametrize("name", PLACED)
def test_what_looks_like_a_finding_elsewhere_is_a_failure(name: str) -> None:
    """At another rank, in another step, or of another promise it is reported."""
    program, violation = PLACED[name]
    for other in (
        structs.replace(violation, rank=1),
        structs.replace(violation, step=0),
        structs.replace(violation, promise="NotRunOnce"),
        structs.replace(violation, promise="OwnerGone"),
        Violation("RRefLeak", "worker0 holds 2 owners, 2 forks; expected nothing", 0),
        Violation("RRefLeak", "worker1 holds 1 owner, 1 fork; expected nothing", 1),
        Violation("RankDied", "worker1 died before its time: killed by SIGSEGV", 1),
        Violation("RankHung", "worker0 hung", 0),
    ):
        assert apart(program, other) == ((), [other.promise])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("future-exception-as-value", "expected the exception of the future, got the value 3.0"),
        ("future-exception-as-value", "expected the exception of the future, got no error"),
        (
            "guessed-rref-type",
            "a value of the sort 'bytes-text' came with b'tex' instead of b'text'",
        ),
        (
            "attribute-error-as-value",
            "a value of the sort 'missing-unpickled' had to be refused by RuntimeError, and came",
        ),
        ("unconfirmed-user", "expected [True], got [None]"),
        (
            "long-timeout-ends-at-once",
            "expected no error, got RuntimeError: RPC ran for more than set timeout (60000 ms)",
        ),
        ("short-timeout-never-comes", "expected torch's timeout, got the value [4.0]"),
        ("refused-exception-kept", "expected [3.0, 1.0, 1.0], got [1.0, -1.0]"),
        ("refused-exception-kept", "expected [3.0, 1.0, 1.0], got [4.0, 1.0, -1.0]"),
        (
            "collect-all-ends-early",
            "expected what the function raised, got the value [1.0, 1.0]",
        ),
        (
            "optimizer-options-by-place",
            "expected the parameters [[1.0]], got [[0.9]], and [[1.0]] alone",
        ),
        ("profiled-events-lost", "the profiler does not show its call once, by its name"),
        ("profiled-events-lost", "the profiler shows nothing of what ran at rank 10"),
        ("profiling-key-kept", "expected no error, got RuntimeError: EOF: end of file"),
        ("retried-without-payload", "expected no error, got RuntimeError: EOF: end of file"),
        ("retried-without-payload", "expected no error, got ValueError: timed out"),
        (
            "rounded-rprop-factor",
            "expected the parameters [[0.45]], got [[0.4499]], and [[0.45]] alone",
        ),
        (
            "rounded-rprop-factor",
            "expected the parameters [[0.45]], got [[0.44999998807907104]], and [[0.44]] alone",
        ),
        ("functional-default-rate", "expected the parameters [[1.0]], got [[0.9]]"),
        ("adagrad-wrong-parameter", "expected the parameters [[1.0]], got [[0.9]]"),
        (
            "stale-gradients",
            "expected the parameters [[1.0]], got [[0.9]], as with gradients of other parameters",
        ),
        ("remote-module-skips-hooks", "gradients: expected [[4.0]], got [[2.0]]"),
        ("remote-module-takes-names", "expected no error, got ValueError: On WorkerInfo(id=1"),
        ("remote-module-drops-mode", "expected [1.0, 3.0], got [3.0, 3.0]"),
        ("remote-module-mode-copies", "expected no error, got RuntimeError: pipe closed"),
        (
            "rebuilt-module-not-callable",
            "expected no error, got AttributeError: 'RemoteModule' object has no attribute 'a'",
        ),
        (
            "proxy-takes-keywords",
            "expected no error, got TypeError: _invoke_rpc() got multiple values for argument "
            "'timeout'",
        ),
        ("proxy-hides-methods", "expected no error, got TypeError: add() missing 1 argument"),
        (
            "proxy-asks-class",
            "expected no error, got AttributeError: type object 'Tally' has no attribute 'add'",
        ),
        ("unchecked-optimizer-options", "expected what the function raised, got the value 3.0"),
        ("timeout-needs-thread", "expected [[3.0]], got ['timeout']"),
        ("timeout-needs-thread", "neither an answer nor its timeout ended 2 of 1 calls in 4 s"),
        ("unpicklable-after-rref", "worker0 holds 1 owner, 2 forks; expected nothing"),
        ("failed-join-keeps-token", "expected no error, got RuntimeError: pipe closed"),
        ("dash-in-member-name", "expected no error, got RuntimeError: stoi"),
        ("dash-in-member-name", "expected no error, got ValueError: sto"),
        ("late-answer-keeps-rref", "worker0 holds 1 owner, 2 forks; expected nothing"),
        ("late-answer-keeps-rref", "worker0 holds 1 fork; expected nothing"),
        ("rejoins-alone", "a member knows the members [1], expected [0, 1]"),
        ("rejoins-alone", "a member knows the members [0], expected [0, 1, 2]"),
        ("leaving-keeps-values", "a member holds 1 owner, 2 forks; expected nothing"),
        ("leaving-keeps-values", "a member holds 1 fork; expected nothing"),
        ("unpicklable-after-rref", "worker0 holds 1 fork; expected nothing"),
    ],
)
def test_another_wrong_outcome_in_the_same_step_is_a_failure(name: str, message: str) -> None:
    """A finding explains its own wrong value, error or leak, and no other one at its place."""
    program, violation = PLACED[name]
    other = structs.replace(violation, message=message)
    assert apart(program, other) == ((), [violation.promise])


@pytest.mark.parametrize(
    ("version", "owners", "left_out", "met"),
    [
        ("2.13.0", (1, 1), ((1, 0),), True),
        ("2.13.0", (1, 1), ((1, 1),), False),
        ("2.13.0", (1, 0), ((1, 0),), False),
        ("2.14.1", (1, 1), ((1, 0),), True),
        ("2.14.1", (1, 1), ((1, 1),), True),
        ("2.15.0", (1, 0), ((1, 0),), True),
        ("2.15.0", (1, 1), (), False),
    ],
)
def test_an_adagrad_that_is_not_compiled_raises_instead(
    version: str, owners: tuple[int, ...], left_out: tuple[tuple[int, int], ...], met: bool
) -> None:
    """It raises wherever a parameter is left out, and gives none of them another gradient."""
    program = Program(2, (Train(0, "x", owners, "Adagrad", left_out=left_out),))
    facts = facts_of(version)
    name = "adagrad-wrong-parameter"
    found = predict(program, FaultPlan(), facts)
    assert found.known_bugs == ({name} if met else set())
    _, moved = PLACED[name]
    moved = structs.replace(moved, step=0)
    text = "expected no error, got ValueError: ValueError: On WorkerInfo(id=1, name=worker1):"
    raised = structs.replace(moved, promise="UnexpectedError", message=text)
    shown = replace(seen(program, FaultPlan()), torch_version=version)
    for violation in (moved, raised):
        shows = met and (violation is moved) == facts.compiles_optimizers
        explained = set_apart(program, found.met, shown, [violation], facts)
        assert explained == (((name,), ()) if shows else ((), (violation,)))


def test_a_death_after_the_step_of_an_unwritable_tensor_is_a_failure() -> None:
    """The process ends while the tensor is sent, and at no later time."""
    program = Program(2, (Carry(0, 1, "sparse_csc", "echo"), Count(0, 1)))
    _, died = PLACED["unwritable-tensor"]
    assert apart(program, died) == ((), ["RankDied"])


def test_a_hang_is_explained_where_the_ranks_come_back() -> None:
    """All ranks wait for each other there, so any of them may be named, and no other hang is."""
    program = Program(2, (Count(0, 1), Settle(), Rejoin(0, failing="running"), Count(0, 1)))
    name = "refused-init-counted"
    outcome = seen(program, FaultPlan())
    cut = replace(outcome, steps=outcome.steps[:3])
    hung = Violation("RankHung", "worker1 is silent; worker0 does not end step 2, Rejoin(at=0)", 1)
    met = predict(program, FaultPlan()).met
    assert {one.finding for one in met} == {name}
    for rank in (0, 1):
        one = structs.replace(hung, rank=rank)
        assert set_apart(program, met, cut, [one]) == ((name,), ())
    for other in (
        structs.replace(hung, promise="RankDied"),
        structs.replace(hung, promise="RRefLeak"),
        structs.replace(hung, message="worker1 does not end step 2, Rejoin(at=0)"),
        structs.replace(hung, message="worker0 does not end step 20, Rejoin(at=0)"),
        structs.replace(hung, message="worker0 does not shut down"),
    ):
        assert set_apart(program, met, cut, [other]) == ((), (other,))
    # The ranks have come back, and hang later.
    assert set_apart(program, met, outcome, [hung]) == ((), (hung,))


@pytest.mark.parametrize(
    "step",
    [
        # What a callback raises, and what the caller gets no text of, is not decoded.
        Raising(0, 1, text=": caf\u00e9", how="then"),
        Raising(0, 1, "empty", text=": caf\u00e9"),
        Raising(0, 1, "keyboard", text=r"\users"),
        Raising(0, 1, text=r": \d \. {0}"),
        Deferred(0, 1, 0, "raises"),
        # An owner that fetches its own value pickles nothing.
        Carry(0, 0, "rref-and-lock", "remote"),
        Carry(0, 0, "missing-unpickled", "remote"),
        Carry(0, 0, "parameter", "own"),
        Carry(0, 0, "nested", "own"),
        Carry(0, 0, "quint4x2", "remote"),
        Carry(0, 1, "sparse_csc"),
        # To another rank the agent refuses what nobody counts, and this error the owner can keep.
        Carry(0, 1, "meta", "remote-echo"),
        Carry(0, 1, "missing-unpickled", "remote-echo"),
        # All ranks have counted an init that failed.
        Rejoin(0, failing="bad name"),
        # The first profiled request of a rank is shown.
        Profile(0, 1),
        Profile(0, 1, "nested", 0),
        # Another thread is free.
        Onward(0, 1, 0, 4, within=1.0, seconds=2.0, patience=4.0),
        # The first step of Rprop has no factor.
        Train(0, "x", (1,), "Rprop", 1),
        # A float32 holds this factor.
        Train(0, "x", (1,), "Rprop", 3, options=("etas",)),
        # Only SGD and Adamax have two default rates.
        Train(0, "x", (1,), "Adam", options=("default_lr",)),
        # The parameter without a gradient is the last one of its owner, or another owner's.
        Train(0, "x", (1, 1), "Adagrad", left_out=((0, 1),)),
        Train(0, "x", (1, 0), "Adagrad", left_out=((0, 0),)),
        # It has had no gradient before, or nothing keeps it.
        Train(0, "x", (1, 1), "NAdam", left_out=((0, 0),)),
        Train(0, "x", (1, 1), "Adam", left_out=((1, 0),)),
        # A proxy asks for the forward itself, and passes on what it is given.
        Linear(0, "x", 1, by="proxy", layer="hooked"),
        Linear(0, "x", 1, by="proxy", layer="device"),
        Linear(0, "x", 1, layer="keywords"),
        # Its functional version checks the values; every one refuses a keyword that it lacks.
        Train(0, "x", (1,), "Adam", refused="lr"),
        Train(0, "x", (1,), "SGD", refused="unknown"),
    ],
)
def test_what_is_next_to_a_finding_does_not_meet_it(step: Step) -> None:
    """A program that torch does right has no excuse."""
    assert predict(Program(2, (step,)), FaultPlan()).known_bugs == set()


def test_an_rref_that_another_user_or_remote_gave_must_be_confirmed() -> None:
    """Only one that came from its owner has the finding; before a settle nothing is promised."""
    steps = (Own(0, "a"), Share(0, "a", 1, "b"), Share(1, "b", 2, "c"), Remote(1, 0, "d"))
    asks = (Ask(2, "c", "confirmed_by_owner"), Ask(1, "d", "confirmed_by_owner"))
    prediction = predict(Program(3, (*steps, *asks, Settle(), *asks)), FaultPlan())
    assert prediction.known_bugs == set()
    shown = [prediction.steps[index].value for index in (4, 5, 7, 8)]
    assert shown == [None, None, [True], [True]]


@pytest.mark.parametrize("how", ["sync", "remote"])
def test_a_text_that_cannot_be_read_is_explained_as_what_python_raises(how: str) -> None:
    """The caller of ``to_here`` gets Python's error with the text, other callers without it."""
    program = Program(2, (Raising(0, 1, text=r" in C:\users", how=how),))  # type: ignore[arg-type]
    ours = "UnicodeDecodeError: On WorkerInfo(id=1, name=worker1):"
    if how == "sync":
        ours = "ValueError: UnicodeDecodeError: 'unicodeescape' codec can't decode bytes in"
    wrong = Violation("UnexpectedError", f"expected no error, got {ours}", 0, 0)
    assert apart(program, wrong) == (("garbled-exception-text",), [])
    other = structs.replace(wrong, message="expected no error, got ValueError: no such rank")
    assert apart(program, other) == ((), ["UnexpectedError"])
    unclear = Violation("UnclearError", "RuntimeError came without the text that was raised", 0, 0)
    assert apart(program, unclear) == ((), ["UnclearError"])


def test_leaks_of_several_messages_are_explained_up_to_their_number() -> None:
    """Each rank keeps the RRefs that it pickled, at every settle from then on."""
    unpicklable = [Carry(0, 1, "rref-and-lock", way) for way in ("result", "echo", "remote")]
    program = Program(2, (*unpicklable, Own(0, "a"), Share(0, "a", 1, "b"), Settle()))
    name = ("unpicklable-after-rref",)
    said = "worker0 holds 2 owners, 2 forks; expected 1 owner, 1 fork"
    assert apart(program, Violation("RRefLeak", said, 0, 5)) == (name, [])
    assert apart(program, Violation("RRefLeak", said.replace("2 f", "3 f"), 0, 5))[0] == ()
    two = "worker1 holds 2 owners, 2 forks; expected nothing"
    assert apart(program, Violation("RRefLeak", two, 1, 5)) == (name, [])
    assert apart(program, Violation("RRefLeak", two.replace("2", "3"), 1, 5))[0] == ()
    # Only a settle shows what is held.
    assert apart(program, Violation("RRefLeak", two, 1, 4))[0] == ()


UNEXPECTED, STOPPED = "expected no error, got RuntimeError: ", "RPC is no longer running"


@pytest.mark.parametrize(
    ("violation", "explained"),
    [
        (Violation("UnexpectedError", f"{UNEXPECTED}tried to send, {STOPPED}", 0, 2), True),
        (Violation("UnexpectedError", f"{UNEXPECTED}On WorkerInfo(id=1, name=x)", 1, 3), True),
        (Violation("UnexpectedError", "expected no error, got MissingHandleError: b", 1, 3), True),
        (Violation("UnexpectedError", f"{UNEXPECTED}EOF", 0, 2), False),
        (Violation("UnexpectedError", f"{UNEXPECTED}RPC ran for more than 3 s", 0, 2), False),
        (Violation("NotRunOnce", "step2 ran 0 times on worker1, expected 1", 1), True),
        (Violation("WrongValue", "expected [3.0], got [4.0]", 1, 3), False),
        (Violation("RankDied", "worker1 died before its time: killed by SIGSEGV", 1), False),
    ],
)
def test_an_rref_is_sent_after_a_second_init(violation: Violation, explained: bool) -> None:
    """The finding explains errors with its text and what they keep from running, if it is met."""
    made = (Rejoin(0), Remote(0, 1, "a"))
    steps = (*made, Share(0, "a", 1, "b"), Local(1, "b"))
    name = "rref-sent-after-reinit"
    assert (name in apart(Program(2, steps), violation)[0]) is explained


def _sent_under(table: FaultTable, to: int, violation: Violation) -> bool:
    """Whether that explains it where the rank that gets the RRef has such a table."""
    made = (Rejoin(0), Remote(0, 1, "a"))
    program, plan = Program(3, (*made, Share(0, "a", to, "b"))), FaultPlan(by_rank={to: table})
    met = predict(program, plan).met
    outcome = Outcome(3, torch_version="2.13.0")
    return "rref-sent-after-reinit" in set_apart(program, met, outcome, [violation])[0]


def test_the_agent_of_the_first_init_fails_messages_as_well() -> None:
    """It refuses what it has not failed; it fails once, and nobody learns of an accept."""
    request, accept = FaultTable(["RREF_FORK_REQUEST"], 3), FaultTable(["RREF_CHILD_ACCEPT"], 3)
    for text in ("Send attempt failed intentionally for x", "UnicodeDecodeError: 'utf-8' codec"):
        injected = Violation("UnexpectedError", f"expected no error, got ValueError: {text}", 0, 2)
        assert _sent_under(request, 2, injected)
        # No request is sent to the owner, and an accept is not waited for.
        for table, to in ((request, 1), (accept, 1), (accept, 2), (FaultTable(), 2)):
            assert not _sent_under(table, to, injected)
    for table, to, name in ((request, 2, "RREF_FORK_REQUEST"), (accept, 1, "RREF_CHILD_ACCEPT")):
        once = f"worker{to} failed 1 sends, the message model predicts 3 ({name} 3)"
        tries = f"the record shows 1 {name} from rank {to} with all tries, and 4 were promised"
        assert _sent_under(table, to, Violation("FaultsDiffer", once, to))
        assert not _sent_under(table, to, Violation("FaultsDiffer", once, 0))
        assert _sent_under(table, to, Violation("MessagesDiffer", tries, to))
        assert not _sent_under(FaultTable(), to, Violation("FaultsDiffer", once, to))


def test_who_waits_for_an_rref_that_is_refused_may_get_the_timeout() -> None:
    """Its creation is refused for its argument, and nobody marks it."""
    late = Violation("UnexpectedError", "expected no error, got RPC ran for more than 620 s", 0, 3)
    name = "rref-sent-after-reinit"
    for argument, explained in (("a", True), ((1.0,), False)):
        made = (Rejoin(0), Remote(0, 1, "a"), Remote(0, 1, "b", (1.0,), argument))
        last = Fetch(0, "b", timeout=620.0)
        assert (name in apart(Program(2, (*made, last)), late)[0]) is explained


def test_a_timeout_elsewhere_is_not_that_of_an_rref_that_was_refused() -> None:
    """Only steps that use the RRef, or what was made of it, wait for it."""
    made = (Rejoin(0), Remote(0, 1, "a"), Remote(0, 1, "b", right="a"), Remote(0, 1, "c"))
    steps = (
        *made,
        Remote(0, 1, "d", right="b"),
        Call(0, 1, right="b", wait="later", out="f"),
        Fetch(0, "c", timeout=620.0),
        Fetch(0, "d", timeout=620.0),
        Wait(0, "f"),
        Call(0, 1, timeout=620.0),
    )
    name = "rref-sent-after-reinit"
    for step, explained in ((6, False), (7, True), (8, True), (9, False)):
        for rank in (0, 1):
            text = "expected no error, got RPC ran for more than 620 s"
            late = Violation("UnexpectedError", text, rank, step)
            is_its_own = explained and rank == 0
            assert (name in apart(Program(2, steps), late)[0]) is is_its_own


def test_an_error_elsewhere_is_not_that_of_an_rref_that_was_refused() -> None:
    """Only the step that sends it, and those that use what it was to make, show the refusal."""
    steps = (
        Rejoin(0),
        Remote(0, 1, "a"),
        Fetch(0, "a"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Fetch(0, "a"),
        Call(0, 1),
    )
    name = "rref-sent-after-reinit"
    for said in ("On WorkerInfo(id=1", "RPC is no longer running", "MissingHandleError"):
        text = f"expected no error, got RuntimeError: {said}"
        for step, rank in ((1, 0), (2, 0), (3, 0), (4, 2), (5, 0), (6, 0)):
            wrong = Violation("UnexpectedError", text, rank, step)
            assert (name in apart(Program(3, steps), wrong)[0]) is (step in (3, 4))


def test_only_a_user_cannot_send_an_rref_after_a_second_init() -> None:
    """Its owner may, and before the second init anybody may."""
    name = "rref-sent-after-reinit"
    before = (Remote(0, 1, "a"), Share(0, "a", 1, "b"), Drop(0, "a"), Drop(1, "b"), Settle())
    after = (Remote(0, 1, "c"), Fetch(0, "c"), Own(1, "d"), Share(1, "d", 0, "e"), Fetch(0, "e"))
    steps = (*before, Rejoin(0), *after)
    assert name not in predict(Program(2, steps), FaultPlan()).known_bugs
    for last in (Share(0, "e", 0, "f"), Through(0, "c"), Share(0, "c", 1, "f")):
        assert name in predict(Program(2, (*steps, last)), FaultPlan()).known_bugs


def test_leaks_of_two_findings_are_explained_together_and_apart() -> None:
    """A rank may keep RRefs by several findings: by all, or by those that have shown."""
    late = Nest(0, 1, 1, "a", timeout=3.0, seconds=12.0)
    lock, count = Carry(1, 0, "rref-and-lock", "echo"), Count(0, 1)
    one, two = "late-answer-keeps-rref", "unpicklable-after-rref"
    for steps, explained in (
        ((late, lock), [(one, two), (one, two), ()]),
        ((late, count), [(one,), (), ()]),
    ):
        for number, names in enumerate(explained):
            held = ("1 owner, 1 fork", "2 owners, 2 forks", "3 owners, 3 forks")[number]
            leak = Violation("RRefLeak", f"worker1 holds {held}; expected nothing", 1)
            assert apart(Program(2, steps), leak)[0] == names


def test_an_owner_that_is_asked_in_time_forgets_its_rref_without_a_race() -> None:
    """Its only other user drops the RRef while the value is made, and no message is late."""
    making = Remote(0, 1, "a", seconds=130.0)
    steps = (Share(0, "a", 1, "b"), Share(0, "a", 2, "c"), Drop(2, "c"), Settle(), Local(1, "b"))
    program = Program(3, (making, *steps))
    assert predict(program, FaultPlan()).known_bugs == {"early-owner-fork"}
    hung = Violation("RankHung", "worker1 does not end step 5", 1)
    assert apart(program, hung) == (("early-owner-fork",), [])
    in_time = Program(3, (replace(making, seconds=0.0), *steps))
    assert predict(in_time, FaultPlan()).known_bugs == set()


@pytest.mark.parametrize(
    ("held", "explains"),
    [
        ("1 owner, 1 fork", True),
        ("1 owner, 1 fork, 1 client call", True),
        ("1 owner, 1 fork, 2 contexts, 1 backward pass, 1 server call, 1 server async call", True),
        ("2 owners, 2 forks, 1 client call", False),
        ("1 owner, 1 fork, 1 pending user", False),
        ("1 client call", False),
    ],
)
def test_an_rref_is_kept_beside_a_pass_that_never_ends(held: str, *, explains: bool) -> None:
    """Passes that stay with their calls are no matter of counts, and RRefs beside them are."""
    steps = (Context(2, "x", path=(0, 1, 0, 1), breaks=0), Carry(2, 0, "rref-and-lock", "echo"))
    program = Program(3, steps)
    leak = Violation("RRefLeak", f"worker2 holds {held}; expected nothing", rank=2)
    names = ("unpicklable-after-rref",) if explains else ()
    assert explained(program, FaultPlan(), leak) == names


@pytest.mark.parametrize(
    ("held", "explains"),
    [
        ("1 context", True),
        ("1 owner, 1 fork, 1 context", True),
        ("2 contexts", False),
        ("1 owner, 1 fork, 1 context, 1 client call", False),
    ],
)
def test_a_context_is_kept_beside_an_rref(held: str, *, explains: bool) -> None:
    """RRefs that a finding keeps anywhere are no matter of counts, and contexts beside them are."""
    steps = (
        Outlast(0, 1, "x", then=2, seconds=40.0, what="argument", by="async"),
        Method(2, 1, how="async", form="missing"),
    )
    program = Program(3, steps)
    leak = Violation("ContextLeak", f"worker1 holds {held}; expected nothing", rank=1)
    assert explained(program, FaultPlan(), leak) == (("context-after-cleanup",) if explains else ())


@pytest.mark.parametrize(
    ("held", "are"),
    [
        ([Counters(), Counters(contexts=1), Counters()], True),
        ([Counters(), Counters(), Counters()], False),
        ([Counters(), Counters(contexts=2), Counters()], False),
        ([Counters(contexts=1), Counters(contexts=1), Counters()], False),
        ([Counters(), Counters(contexts=1, owners=1), Counters()], False),
        ([Counters(contexts=1), Counters(), Counters()], False),
    ],
)
def test_what_ranks_keep_for_ever_is_known_when_they_settle(
    held: Sequence[Counters], *, are: bool
) -> None:
    """Only if each rank that holds too much holds what findings make it keep, and no more."""
    program = Program(3, (Outlast(0, 1, "x", then=2, seconds=40.0, what="argument", by="async"),))
    prediction = predict(program, FaultPlan(), facts_of(VERSION))
    names = program.names(3)
    assert are_kept(prediction.met, None, held, prediction.counters, names) == are


@pytest.mark.parametrize(
    ("promise", "rank", "held", "explains"),
    [
        ("CallLeak", 0, "1 server call, 1 client call", True),
        ("CallLeak", 0, "1 client call", True),
        ("CallLeak", 0, "1 server call, 2 client calls", True),
        ("RRefLeak", 1, "1 owner, 1 server call", True),
        ("CallLeak", 0, "1 server call", False),
        ("CallLeak", 0, "3 client calls", False),
        ("CallLeak", 1, "2 server calls", False),
        ("CallLeak", 2, "1 server call", False),
        ("ContextLeak", 0, "1 context", False),
        ("RRefLeak", 1, "1 owner", False),
    ],
)
def test_an_optimizer_leaves_calls_to_parameters_that_were_never_made(
    promise: str, rank: int, held: str, *, explains: bool
) -> None:
    """The constructor asks their owners for them, until one that was marked ends it."""
    program = Program(3, (Optimize(0, "x", (0, 1)), Optimize(0, "y", (0, 1))))
    leak = Violation(promise, f"worker{rank} holds {held}; expected nothing", rank=rank)
    assert explained(program, LOST, leak) == (("second-failed-remote",) if explains else ())


@pytest.mark.parametrize(
    ("held", "explains"),
    [("1 owner, 1 fork", True), ("2 owners, 2 forks", False), ("1 client call", False)],
)
def test_an_optimizer_whose_requests_are_lost_leaves_the_forks_in_them(
    held: str, *, explains: bool
) -> None:
    """Its own rank owns one of the parameters, and has noted a fork for the request."""
    program = Program(3, (Optimize(0, "x", (0, 1)), Optimize(0, "y", (0, 1))))
    lost = FaultPlan(by_rank={0: FaultTable(["PYTHON_REMOTE_CALL", "PYTHON_CALL"], 1)})
    leak = Violation("RRefLeak", f"worker0 holds {held}; expected nothing", rank=0)
    assert explained(program, lost, leak) == (("second-failed-remote",) if explains else ())


@pytest.mark.parametrize(
    ("said", "explains"),
    [
        ("1 PYTHON_CALL from rank 0 to rank 1, and none were promised", True),
        ("1 RREF_USER_DELETE from rank 0 to rank 1, and 2 were promised", True),
        ("1 PYTHON_CALL from rank 0 to rank 2, and none were promised", False),
        ("1 PYTHON_REMOTE_CALL from rank 0 to rank 1, and 2 were promised", False),
    ],
)
def test_an_optimizer_sends_requests_for_parameters_that_were_never_made(
    said: str, *, explains: bool
) -> None:
    """It keeps those that it has sent, and does not delete them."""
    program = Program(3, (Optimize(0, "x", (0, 1)), Optimize(0, "y", (1, 0))))
    lost = FaultPlan(by_rank={0: FaultTable(["PYTHON_REMOTE_CALL", "PYTHON_CALL"], 1)})
    differs = Violation("MessagesDiffer", f"the record shows {said}", rank=0)
    assert explained(program, lost, differs) == (("second-failed-remote",) if explains else ())


@pytest.mark.parametrize(
    ("rank", "said", "explains"),
    [
        (0, "2 PYTHON_CALL from rank 0 to rank 1, and 3 were promised", True),
        (1, "1 RREF_CHILD_ACCEPT from rank 1 to rank 0, and 2 were promised", True),
        (0, "2 PYTHON_CALL from rank 0 to rank 2, and 3 were promised", False),
        (1, "1 PYTHON_CALL from rank 1 to rank 0, and 2 were promised", False),
    ],
)
def test_a_type_that_is_not_asked_for_again_is_a_message_less(
    rank: int, said: str, *, explains: bool
) -> None:
    """And so the owner has no RRef to accept; where the second call times out, only that shows."""
    through = Through(0, "a", timeout=0.25)
    program = Program(2, (Remote(0, 1, "a"), through, through))
    late = FaultPlan(by_rank={0: FaultTable((), 0, {"PYTHON_CALL": 0.5})})
    differs = Violation("MessagesDiffer", f"the record shows {said}", rank=rank)
    assert explained(program, late, differs) == (("timed-out-type-query",) if explains else ())


def test_an_optimizer_whose_first_parameter_failed_first_leaves_no_call() -> None:
    """The first creation that fails in a process is marked, and the constructor ends with it."""
    program = Program(3, (Optimize(0, "x", (1, 0)),))
    leak = Violation("CallLeak", "worker0 holds 1 server call, 1 client call; expected nothing", 0)
    assert explained(program, LOST, leak) == ()


@pytest.mark.parametrize(
    ("via", "failures", "rank", "held", "explains"),
    [
        (0, 6, 0, "1 pending future", True),
        (0, 6, 0, "2 pending futures", False),
        (0, 6, 0, "1 fork, 1 pending future", False),
        (0, 6, 1, "1 pending future", False),
        (1, 6, 1, "1 pending future", False),
        (0, 0, 0, "1 pending future", False),
    ],
)
def test_a_user_that_is_kept_is_deleted_by_the_shutdown_which_waits_for_no_retry(
    via: int, failures: int, rank: int, held: str, *, explains: bool
) -> None:
    """An owner that answered too late keeps no user RRef, and deletes none."""
    program = Program(2, (Nest(0, via, 1, "a", timeout=3.0, seconds=12.0),))
    lost = FaultPlan.of(FaultTable(["RREF_USER_DELETE"] if failures else [], failures))
    said = f"worker{rank} still holds {held} after its shutdown"
    leak = Violation("RRefLeak", said, rank=rank)
    assert explained(program, lost, leak) == (("late-answer-keeps-rref",) if explains else ())


@pytest.mark.parametrize(
    ("via", "rank", "of", "explains"),
    [(0, 0, "User", True), (0, 1, "User", False), (1, 1, "User", False), (0, 0, "Owner", False)],
)
def test_a_shutdown_waits_in_vain_for_the_children_of_a_user_that_is_kept(
    via: int, rank: int, of: str, *, explains: bool
) -> None:
    """It says so, also where nothing is left in the end that would explain it."""
    steps = (
        Remote(0, 1, "a", timeout=3.0, seconds=12.0),
        Nest(0, via, 1, "b", timeout=3.0, seconds=12.0),
    )
    lost = FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 6)})
    said = f"worker{rank} wrote: [E rref_context.cpp:250] Timed out waiting for pending {of}RRefs"
    names = explained(Program(2, steps), lost, Violation("ErrorInLog", said, rank=rank))
    assert names == (("late-answer-keeps-rref",) if explains else ())


@pytest.mark.parametrize(
    ("rank", "users", "explains"), [(1, 1, True), (2, 1, True), (2, 0, False), (0, 1, False)]
)
def test_owners_wait_in_vain_for_a_rank_that_waits_for_the_children_of_a_kept_user(
    rank: int, users: int, *, explains: bool
) -> None:
    """It deletes the users of all its RRefs only after that, and owners wait no longer than it."""
    late = Nest(0, 0, 1, "b", timeout=3.0, seconds=12.0)
    program = Program(3, (*(Remote(0, 2, "a"),) * users, late))
    waited = (
        f"worker{rank} wrote: [E rref_context.cpp:299] Timed out waiting for pending OwnerRRefs"
    )
    leaking = f"rpc.shutdown() of worker{rank} raised RuntimeError: Leaking RRef 1"
    for promise, said in (("ErrorInLog", waited), ("RRefLeak", leaking)):
        names = explained(program, FaultPlan(), Violation(promise, said, rank=rank))
        assert names == (("late-answer-keeps-rref",) if explains else ())


@pytest.mark.parametrize(("how", "meets"), [("async", {"failed-async-proxy"}), ("sync", set())])
def test_a_method_that_times_out_may_have_done_so_when_the_type_was_asked(
    how: Any, meets: set[str]
) -> None:
    """Its timeout may come before the answer to the first of the two messages, or of the second."""
    program = Program(2, (Method(1, 0, how=how, timeout=3.0, seconds=12.0),))
    assert predict(program, FaultPlan()).known_bugs == meets


def test_a_keyword_that_is_refused_is_no_timeout() -> None:
    """Though its name is "timeout": a method that had to time out must not have raised that."""
    program = Program(2, (Method(0, 1, form="keyword timeout", timeout=3.0, seconds=12.0),))
    text = "_invoke_rpc() got multiple values for argument 'timeout'"
    assert error_class(RaisedError("TypeError", text)) == "unknown"
    expected = predict(program, FaultPlan())
    assert expected.steps[0].error == "timeout"
    assert expected.known_bugs == {"proxy-takes-keywords"}
    said = f"expected torch's timeout, got TypeError: {text}"
    names = explained(program, FaultPlan(), Violation("UnexpectedError", said, 0, 0))
    assert names == ("proxy-takes-keywords",)


def test_what_a_failed_proxy_keeps_is_deleted_by_a_shutdown_only() -> None:
    """Where the ranks end without one, or at once, the record shows one delete less."""
    said = "the record shows 0 RREF_USER_DELETE from rank 1 to rank 0, and 1 was promised"
    missing = Violation("MessagesDiffer", said, 1)
    program = Program(2, (Method(1, 0, how="async", form="missing"),), settles=False)
    ends = replace(program, end=End("at once"), settles=True)
    broken = FaultPlan(by_rank={0: FaultTable(["PYTHON_CALL"], 1)})
    for one, plan, names in (
        (program, broken, ("failed-async-proxy",)),
        (ends, FaultPlan(), ("failed-async-proxy",)),
        (program, FaultPlan(), ()),
    ):
        assert explained(one, plan, missing) == names
        other = Violation("MessagesDiffer", said.replace("1 to rank 0", "0 to rank 1"), 0)
        assert explained(one, plan, other) == ()


def test_all_users_of_a_rank_that_keeps_one_are_deleted_late() -> None:
    """Its shutdown waits for the children of the one that it keeps before it deletes any."""
    steps = (Remote(0, 1, "a"), Nest(0, 0, 1, "b", timeout=3.0, seconds=12.0))
    lost = FaultPlan.of(FaultTable(["RREF_USER_DELETE"], 6))
    for number, names in ((2, ("late-answer-keeps-rref",)), (3, ())):
        said = f"worker0 still holds {number} pending futures after its shutdown"
        leak = Violation("RRefLeak", said, rank=0)
        assert explained(Program(2, steps), lost, leak) == names


@pytest.mark.parametrize(("first", "explains"), [(True, True), (False, False)])
def test_a_late_answer_with_an_rref_whose_creation_failed_keeps_it_if_it_is_not_marked(
    *, first: bool, explains: bool
) -> None:
    """An RRef that is marked cannot be sent; the first that fails in a process is."""
    late = Nest(0, 1, 1, "b", timeout=3.0, seconds=12.0)
    before = Remote(1, 1, "a") if first else Remote(0, 1, "a")
    program = Program(2, (before, late))
    lost = FaultPlan.of(FaultTable(["PYTHON_REMOTE_CALL"], 1))
    leak = Violation("RRefLeak", "worker1 holds 1 owner, 1 fork; expected nothing", rank=1)
    assert explained(program, lost, leak) == (("second-failed-remote",) if explains else ())


@pytest.mark.parametrize(
    ("at", "settles_between", "explains"), [(1, False, True), (0, False, False), (1, True, False)]
)
def test_the_creation_of_a_function_that_sleeps_may_fail_after_that_of_a_later_step(
    at: int, *, settles_between: bool, explains: bool
) -> None:
    """Then it is the second that fails in its process, and an answer with it keeps it."""
    late = Nest(0, 1, 1, "b", timeout=3.0, seconds=12.0)
    between = (Settle(),) if settles_between else ()
    program = Program(2, (late, *between, Remote(at, 1, "a")))
    lost = FaultPlan.of(FaultTable(["PYTHON_REMOTE_CALL"], 1))
    leak = Violation("RRefLeak", "worker1 holds 1 owner, 1 fork; expected nothing", rank=1)
    assert explained(program, lost, leak) == (("second-failed-remote",) if explains else ())


def test_a_late_answer_keeps_no_more_than_a_delete_that_was_given_up() -> None:
    """The user's fork stays in both cases; a fork that nobody announced is not at its owner."""
    program = Program(2, (Nest(0, 0, 1, "a", timeout=3.0, seconds=12.0),))
    two = Violation("RRefLeak", "worker1 holds 2 owners, 2 forks; expected 1 owner, 1 fork", 1)
    lost = FaultPlan.of(FaultTable(["RREF_USER_DELETE"], 6))
    assert explained(program, lost, two) == ()


UNREADABLE_TWICE = Program(
    2, (*[Carry(0, 1, "raises-unpickled", "remote-echo")] * 2, Settle(), Count(0, 1))
)


@pytest.mark.parametrize(
    ("rank", "held", "is_known"),
    [
        (0, "2 pending users, 2 client calls", True),
        (0, "1 pending user, 1 client call", False),
        (0, "2 pending users, 3 client calls", False),
        # remote has raised itself, once or twice.
        (0, "2 pending users, 1 client call", True),
        (0, "2 pending users", True),
        (0, "1 owner, 1 fork, 2 pending users, 2 client calls", False),
        # Where its fetch was not sent, the owner serves nothing.
        (1, "2 server calls, 2 server async calls", True),
        (1, "1 server call, 1 server async call", True),
        (1, "1 owner, 1 fork", False),
    ],
)
def test_a_creation_that_was_not_read_keeps_one_user_and_perhaps_one_call(
    rank: int, held: str, is_known: bool
) -> None:
    """The finding explains as many users as there were, and no more calls, at their ranks."""
    promise = "RRefLeak" if "user" in held or "owner" in held else "CallLeak"
    leak = Violation(promise, f"worker{rank} holds {held}; expected nothing", rank, 2)
    names, left = apart(UNREADABLE_TWICE, leak)
    assert (names, left) == ((("unreadable-remote",), []) if is_known else ((), [promise]))


def test_a_creation_of_its_own_that_was_not_read_keeps_an_owner_and_a_call() -> None:
    """A rank that calls itself has no pending user; it holds the RRef itself."""
    program = Program(2, (Carry(0, 0, "raises-unpickled", "remote-echo"),))
    says = "worker0 holds 1 owner, 1 fork, 1 client call; expected nothing"
    assert apart(program, Violation("RRefLeak", says, 0)) == (("unreadable-remote",), [])


def test_no_rank_shuts_down_after_a_creation_that_was_not_read() -> None:
    """All wait for the call that never ends; a hang in another phase is another one's."""
    hung = "worker0, worker1 does not shut down (phase shutdown, after 30.3 real s)"
    assert apart(UNREADABLE_TWICE, Violation("RankHung", hung, 1)) == (("unreadable-remote",), [])
    other = "worker1 does not end step 3, Count(at=0, to=1) (phase run, after 3.1 real s)"
    assert apart(UNREADABLE_TWICE, Violation("RankHung", other, 1)) == ((), ["RankHung"])


@pytest.mark.parametrize(
    ("sort", "way", "ends"),
    [
        *(("nested", way, 0) for way in ("echo", "async", "own")),
        *(("nested", way, 1) for way in ("result", "remote")),
        *(("quint4x2", way, 1) for way in ("echo", "async", "own")),
        *(("quint4x2", way, 0) for way in ("result", "remote")),
    ],
)
def test_a_tensor_ends_who_writes_it_or_who_reads_it(sort: str, way: Way, ends: int) -> None:
    """The death of the other rank is a failure."""
    program = Program(2, (Carry(0, 1, sort, way),))
    for rank in (0, 1):
        died = Violation("RankDied", f"worker{rank} died before its time: killed by SIGABRT", rank)
        assert bool(apart(program, died)[0]) == (rank == ends)


def test_a_mended_torch_forgets_a_creation_that_was_not_read() -> None:
    """There the step shows the error, the ranks hold nothing, and nothing is explained."""
    said = predict(UNREADABLE_TWICE, FaultPlan(), NEWEST.as_if_mended())
    assert [step.value for step in said.steps[:2]] == [{"refused": "RuntimeError"}] * 2
    assert said.counters == (Counters(), Counters())
    assert not said.met


def test_an_owner_that_fetches_must_be_told_of_its_timeout() -> None:
    """A torch with owner-ignores-timeout gives the value instead, in that step and at that rank."""
    slow = Remote(0, 0, "a", seconds=40.0)
    steps = (slow, Fetch(0, "a", timeout=1.0), Fetch(0, "a"))
    for facts, known in ((NEWEST, {"owner-ignores-timeout"}), (NEWEST.as_if_mended(), set())):
        said = predict(Program(1, steps), FaultPlan(), facts)
        assert [step.error for step in said.steps] == ["", "timeout", ""]
        assert said.steps[2].value == [3.0]
        assert said.known_bugs == known
    program = Program(1, steps[:2])
    outcome = with_step(seen(program, FaultPlan()), 1, value=[3.0], error=None)
    violations = judge(program, FaultPlan(), outcome)
    assert [one.promise for one in violations] == ["MissingError"]
    met = predict(program, FaultPlan()).met
    assert set_apart(program, met, outcome, violations) == (("owner-ignores-timeout",), ())
    in_time = predict(Program(1, (slow, Fetch(0, "a", timeout=640.0))), FaultPlan())
    assert (in_time.steps[1].error, in_time.known_bugs) == ("", frozenset())


def test_a_default_timeout_holds_at_an_owner_too() -> None:
    """As the docstring of to_here says, where no timeout is given."""
    steps = (Remote(0, 0, "a", seconds=450.0, timeout=1000.0), Fetch(0, "a"))
    said = predict(Program(1, steps, rpc_timeout=300.0), FaultPlan())
    assert said.steps[1].error == "timeout"
    assert said.known_bugs == {"owner-ignores-timeout"}


def test_an_asynchronous_proxy_that_leaves_its_context_loses_a_gradient_or_waits() -> None:
    """It explains a lost gradient at its rank, and a pass that misses what was sent."""
    first: Any = ("add", (0, 0), 1, "proxy async")
    lost = Graph(0, "x", ((0, "plain"),), (first,), ((1,),))
    wrong = Violation("WrongGradient", "the gradients: expected [[2.0]], got [None]", 0, 0)
    names = ("async-proxy-leaves-context",)
    assert explained(Program(2, (lost,)), FaultPlan(), wrong) == names
    assert explained(Program(2, (Call(0, 1), lost)), FaultPlan(), wrong) == ()
    assert not predict(Program(2, (lost,)), FaultPlan()).stuck
    here: Any = ("add", (0, 0), 0, "proxy async")
    for how in ("sync", "remote", "proxy remote", "proxy"):
        other: Any = ("add", (0, 0), 1, how)
        assert not predict(Program(2, (replace(lost, operations=(other,)),)), FaultPlan()).met
    assert not predict(Program(2, (replace(lost, operations=(here,)),)), FaultPlan()).met
    sent: Any = ("add", (0, 0), 1, "sync")
    after: Any = ("add", (1, 1), 1, "proxy async")
    waits = replace(lost, operations=(sent, after), backwards=((2,),))
    assert predict(Program(2, (waits,)), FaultPlan()).stuck == {0}
    said = "the record shows 2 PYTHON_CALL from rank 0 to rank 1, and 1 was promised"
    more = Violation("MessagesDiffer", said, 0)
    assert explained(Program(2, (lost,)), FaultPlan(), more) == names
    told = "expected no error, got RuntimeError: RuntimeError: On WorkerInfo(id=1, name=worker1):"
    refused = Violation("UnexpectedError", told, 0, 0)
    changes: Any = ("inplace", (1,), 1, "proxy async")
    leaf = replace(lost, operations=(sent, changes), backwards=((2,),))
    assert explained(Program(2, (leaf,)), FaultPlan(), refused) == names
    assert explained(Program(2, (waits,)), FaultPlan(), refused) == ()


def test_a_user_that_came_after_a_second_init_deletes_nothing() -> None:
    """The finding explains that no delete is sent, also where the owner does not say that it leaks.

    A rank that left before may leak as well, and then a shutdown with a timeout does not raise.
    """
    steps = (Rejoin(1), Remote(1, 2, "a"), Fetch(1, "a"))
    said = "the record shows 0 RREF_USER_DELETE from rank {} to rank {}, and 1 was promised"
    finding = ("rref-lifetime-after-reinit",)
    for rank, to, names in ((1, 2, finding), (2, 1, ())):
        none = Violation("MessagesDiffer", said.format(rank, to), rank)
        assert explained(Program(3, steps), FaultPlan(), none) == names
        assert explained(Program(3, steps[1:]), FaultPlan(), none) == ()


def test_a_call_outside_of_its_context_is_struck_as_a_plain_one() -> None:
    """The finding explains what faults of plain calls count at its rank, and of others nothing."""
    proxy: Any = ("add", (0, 0), 1, "proxy async")
    program = Program(2, (Graph(0, "x", ((0, "plain"),), (proxy,), ((1,),)),))
    names = ("async-proxy-leaves-context",)
    for message, found in (("PYTHON_CALL", names), ("SCRIPT_CALL", ())):
        held = Violation(
            "FaultsDiffer",
            "worker0 held up sends {1: 1} (by milliseconds), the message model predicts {1: 0}",
            0,
        )
        plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={message: 0.001})})
        assert explained(program, plan, held) == found
        fault = MessageFault(0, "delay", message, to=1, delay=0.5)
        said = f"{fault.name} struck 1 times, the message model predicts 0"
        struck = Violation("FaultsDiffer", said, 0)
        assert explained(program, FaultPlan(others=(fault,)), struck) == found


def test_without_a_gradient_nothing_is_sent_to_where_it_would_go_on() -> None:
    """The finding explains a missing gradient to the leaves behind it, and to no other rank."""
    proxy: Any = ("mul", (0, 1), 1, "proxy async")
    lost = Graph(0, "x", ((2, "plain"), (1, "plain"), (3, "plain")), (proxy,), ((3,),))
    for rank, to, names in ((0, 2, ("async-proxy-leaves-context",)), (0, 3, ()), (2, 0, ())):
        said = f"the record shows 0 BACKWARD_AUTOGRAD_REQ from rank {rank} to rank {to}, "
        less = Violation("MessagesDiffer", f"{said}and 1 was promised", rank)
        assert explained(Program(4, (lost,)), FaultPlan(), less) == names
    beyond: Any = ("add", (0, 0), 2, "relay")
    passed = replace(
        lost, operations=(beyond, ("add", (3, 3), 1, "proxy async")), backwards=((4,),)
    )
    said = "the record shows 0 BACKWARD_AUTOGRAD_REQ from rank 2 to rank 3, and 1 was promised"
    less = Violation("MessagesDiffer", said, 2)
    assert explained(Program(4, (passed,)), FaultPlan(), less) == ("async-proxy-leaves-context",)


def test_without_a_gradient_no_hook_runs() -> None:
    """The finding explains that at the ranks of these hooks, and nowhere else."""
    proxy: Any = ("add", (0, 0), 1, "proxy async")
    here: Any = ("add", (0, 0), 0, "")
    lost = Graph(0, "x", ((0, "hooked"),), (proxy,), ((1,),))
    silent = Violation("NotRunOnce", "step0/hook ran 0 times on worker0, expected 1", 0)
    names = ("async-proxy-leaves-context",)
    assert explained(Program(2, (lost,)), FaultPlan(), silent) == names
    often = Violation("NotRunOnce", "step0/hook ran 5 times on worker0, expected 1", 0)
    assert explained(Program(2, (lost,)), FaultPlan(), often) == ()
    beside = structs.replace(silent, message="step0/hook ran 0 times on worker0, expected 2")
    assert explained(Program(2, (replace(lost, beside=True),)), FaultPlan(), beside) == names
    # Its gradient comes by the other operation all the same.
    both = replace(lost, operations=(proxy, here, ("add", (1, 2), 0, "")), backwards=((3,),))
    assert explained(Program(2, (both,)), FaultPlan(), silent) == ()
    elsewhere = Violation("NotRunOnce", "step0/hook ran 0 times on worker1, expected 1", 1)
    assert explained(Program(2, (lost,)), FaultPlan(), elsewhere) == ()
    there: Any = ("hook", (0,), 1, "proxy async")
    assert explained(Program(2, (replace(lost, operations=(there,)),)), FaultPlan(), elsewhere) == (
        names
    )


def test_a_call_that_leaves_its_context_may_be_struck_by_faults_of_plain_calls() -> None:
    """It is a PYTHON_CALL then, which the table of its rank fails."""
    proxy: Any = ("add", (0, 0), 1, "proxy async")
    steps = (Graph(0, "x", ((0, "plain"),), (proxy,), ((1,),)),)
    told = "expected no error, got RuntimeError: RPCErr:2:Send attempt failed intentionally for"
    refused = Violation("UnexpectedError", told, 0, 0)
    struck = FaultPlan(by_rank={0: FaultTable(("PYTHON_CALL",), 1)})
    assert explained(Program(2, steps), struck, refused) == ("async-proxy-leaves-context",)
    late = FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 0.5}))
    for plan in (FaultPlan(), FaultPlan(by_rank={1: FaultTable(("PYTHON_CALL",), 1)}), late):
        assert explained(Program(2, steps), plan, refused) == ()
    ended = Violation("UnexpectedError", "expected no error, got RuntimeError: RPC ran for more", 0)
    ended = structs.replace(ended, message=f"{ended.message} than", step=0)
    for plan in (struck, late):
        assert explained(Program(2, steps), plan, ended) == ()


def test_a_pass_that_misses_what_was_sent_ends_by_the_default_timeout_if_there_is_one() -> None:
    """It is that of the gradient whose receiver waits."""
    sent: Any = ("add", (0, 0), 1, "sync")
    after: Any = ("add", (1, 1), 1, "proxy async")
    waits = Graph(0, "x", ((0, "plain"),), (sent, after), ((2,),))
    told = "expected no error, got RuntimeError: Error on Node 0: RPC ran for more than set timeout"
    late = Violation("UnexpectedError", told, 0, 0)
    timed = Program(2, (waits,), rpc_timeout=300.0)
    assert explained(timed, FaultPlan(), late) == ("async-proxy-leaves-context",)
    assert explained(replace(timed, rpc_timeout=None), FaultPlan(), late) == ()
    first: Any = ("add", (0, 0), 1, "proxy async")
    none = replace(waits, operations=(first,), backwards=((1,),))
    assert explained(replace(timed, steps=(none,)), FaultPlan(), late) == ()


def test_an_owner_that_got_no_rref_may_hide_the_error_of_another_owner() -> None:
    """Of two owners that refuse a value, the caller then hears of one, and the other logs it."""
    train = Train(0, "x", (0, 1), "Adadelta", 1, (1.0,), refused="unknown")
    wrote = "worker0 wrote: TypeError: _FunctionalAdadelta.__init__() got an unexpected keyword"
    logged = Violation("ErrorInLog", wrote, 0)
    rejoined = Program(3, (Rejoin(0), train))
    names = ("rref-sent-after-reinit",)
    assert explained(rejoined, FaultPlan(), logged) == names
    assert explained(replace(rejoined, steps=(train,)), FaultPlan(), logged) == ()
    for other in ({"rank": 2}, {"message": "worker0 wrote: RuntimeError: x"}):
        assert explained(rejoined, FaultPlan(), structs.replace(logged, **other)) == ()


def test_a_finding_of_later_steps_explains_nothing_before_them() -> None:
    """An RRef that cannot be sent after a Rejoin explains no timeout of a step before it."""
    made = (Remote(0, 1, "a"), Fetch(0, "a"), Remote(0, 2, "b", right="a"), Fetch(0, "b"))
    program = Program(3, (Call(1, 2), Rejoin(0), *made), end=End("at once"))
    told = "expected no error, got RuntimeError: RPC ran for more than"
    for step, names in ((0, ()), (3, ()), (5, ("rref-sent-after-reinit",))):
        late = Violation("UnexpectedError", told, 0, step)
        assert explained(program, FaultPlan(), late) == names, step
