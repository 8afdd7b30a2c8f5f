"""What the oracle predicts under faults of single messages, and what it refuses to predict."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import (
    FaultPlan,
    FaultTable,
    MessageAction,
    MessageFault,
    MessageType,
    NthMessage,
)
from rpcprops.oracle import Prediction, lost_seconds, predict
from rpcprops.oracle._findings import explanations
from rpcprops.outcomes import Counters, Violation
from rpcprops.programs import (
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Nest,
    Own,
    Parallel,
    Program,
    Refused,
    Rejoin,
    Remote,
    Settle,
    Share,
    Step,
)
from rpcprops.torch_facts import NEWEST

#: Each sort of message that a user sends, and each that torch sends by itself.
PROGRAM = Program(
    3,
    (
        Call(0, 1),
        Remote(0, 1, "a"),
        Settle(),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Settle(),
        Drop(2, "b"),
        Count(0, 2),
        Context(0, "x", (1, 2)),
    ),
    rpc_timeout=65.0,
)
NOTHING = predict(PROGRAM, FaultPlan())


def under(*faults: MessageFault, program: Program = PROGRAM) -> Prediction:
    return predict(program, FaultPlan(others=faults))


def test_a_creation_that_is_held_is_marked_before_it_is_used() -> None:
    """By as much as a table delays it beyond its timeout; a rank that is later proves nothing."""
    program = Program(2, (Remote(0, 1, "a", timeout=0.5), Fetch(0, "a"), Settle(), Drop(0, "a")))
    until = NthMessage(0, "RREF_USER_DELETE")
    hold = MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=30.0, until=until)
    late = FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 2.0})
    said = predict(program, FaultPlan(by_rank={0: late}, others=(hold,)))
    assert (said.steps[1].error, said.steps[1].slack) == ("creation", 1.5)


def test_a_creation_is_not_held_until_a_shutdown_deletes_it() -> None:
    """That delete waits for the creation, and the shutdown for both; it gives up after 100 s."""
    program = Program(2, (Own(0, "a"), Share(0, "a", 1, "b"), Remote(0, 1, "c")), settles=False)
    for rank, is_predicted in ((0, False), (1, True)):
        until = NthMessage(rank, "RREF_USER_DELETE")
        hold = MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=120.0, until=until)
        if is_predicted:
            assert under(hold, program=program).graceful
        else:
            with pytest.raises(UsageError, match=r"may be 120 s .*late, and a shutdown waits"):
                under(hold, program=program)
        assert under(replace(hold, delay=30.0), program=program).graceful


@pytest.mark.parametrize("is_late", [False, True])
def test_a_fetch_waits_for_a_delete_of_the_shutdown_if_its_function_has_begun(
    *, is_late: bool
) -> None:
    """A function that begins after the last deletes of its rank waits for one that never comes."""
    program = Program(2, (Own(0, "a"), Remote(0, 1, "b", right="a")), settles=False)
    until = NthMessage(1, "RREF_USER_DELETE")
    fetch = MessageFault(1, "hold", "SCRIPT_RREF_FETCH_CALL", delay=120.0, until=until)
    creation = MessageFault(0, "delay", "PYTHON_REMOTE_CALL", delay=30.0)
    if not is_late:
        assert under(fetch, program=program).known_bugs == {"shutdown-deletes-argument"}
        return
    with pytest.raises(UsageError, match=r"may be 150 s .*late, and a shutdown waits"):
        under(fetch, creation, program=program)


@pytest.mark.parametrize(
    ("action", "calls", "deletes"),
    [("fail", 0, 1), ("lose", 1, 2), ("delay", 1, 1), ("duplicate", 1, 1)],
)
def test_a_table_delays_what_is_lost_then(action: Any, calls: int, deletes: int) -> None:
    """The agent waits before it writes or loses a try; one that fails does not come so far."""
    late = {MessageType.PYTHON_CALL: 0.5, MessageType.RREF_USER_DELETE: 0.25}
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay=late)})
    made = (Remote(0, 1, "a"), Settle(), Drop(0, "a"), Settle(), Call(0, 1))
    program = Program(2, made, rpc_timeout=65.0)
    for message, times in zip(late, (calls, deletes), strict=True):
        fault = MessageFault(0, action, message, delay=1.0 if action == "delay" else 0.0)
        said = predict(program, replace(plan, others=(fault,))).delays(plan)[0]
        assert said.get(message, 0) == times


def changed(said: Prediction) -> dict[int, str]:
    """The steps that end otherwise than without a fault, with the class of their error."""
    return {
        number: step.error
        for number, (step, usual) in enumerate(zip(said.steps, NOTHING.steps, strict=True))
        if (step.value, step.error) != (usual.value, usual.error)
    }


@pytest.mark.parametrize(
    "fault",
    [
        MessageFault(0, "delay", which="every", delay=0.5),
        MessageFault(1, "delay", way="response", which="every", delay=0.5),
        MessageFault(2, "hold", "RREF_FORK_REQUEST", delay=4.0, until=NthMessage(1, "RREF_ACK")),
        *(
            MessageFault(rank, "duplicate", kind)
            for rank, kind in (
                (2, "RREF_FORK_REQUEST"),
                (2, "RREF_CHILD_ACCEPT"),
                (2, "RREF_USER_DELETE"),
                (1, "CLEANUP_AUTOGRAD_CONTEXT_REQ"),
                (2, "PYTHON_RREF_FETCH_CALL"),
            )
        ),
        MessageFault(2, "lose", "RREF_CHILD_ACCEPT"),
        MessageFault(2, "lose", "RREF_USER_DELETE"),
        MessageFault(0, "lose", "CLEANUP_AUTOGRAD_CONTEXT_REQ"),
        MessageFault(2, "fail", "RREF_FORK_REQUEST", which="first", n=3),
    ],
)
def test_what_torch_promises_to_survive_changes_nothing(fault: MessageFault) -> None:
    """Late messages, copies of what is idempotent, and what is tried again: all is as without."""
    said = under(fault)
    assert changed(said) == {}
    assert (said.calls, said.counters) == (NOTHING.calls, NOTHING.counters)


def test_tries_that_fail_are_counted() -> None:
    """A try that fails or is lost is one failed send of its rank."""
    assert under(MessageFault(2, "lose", "RREF_CHILD_ACCEPT")).retried == (0, 0, 1)
    assert under(MessageFault(2, "fail", "RREF_USER_DELETE")).retried == (0, 0, 1)
    fault = MessageFault(0, "fail", "CLEANUP_AUTOGRAD_CONTEXT_REQ", which="first", n=3)
    assert under(fault).retried == (3, 0, 0)


@pytest.mark.parametrize(
    ("fault", "step", "error", "runs"),
    [
        (MessageFault(0, "lose", "PYTHON_CALL"), 0, "timeout", 0),
        (MessageFault(0, "fail", "PYTHON_CALL"), 0, "injected", 0),
        (MessageFault(1, "lose", "PYTHON_RET"), 0, "timeout", 1),
        (MessageFault(0, "lose", "PYTHON_CALL", to=2, n=2), 7, "timeout", 0),
        (MessageFault(2, "lose", "PYTHON_RET", n=2), 7, "timeout", 1),
        (MessageFault(2, "lose", "PYTHON_RREF_FETCH_CALL"), 4, "timeout", None),
        (MessageFault(1, "lose", "PYTHON_RREF_FETCH_RET"), 4, "timeout", None),
        (MessageFault(2, "fail", "PYTHON_RREF_FETCH_CALL"), 4, "injected", None),
        (MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ", to=2), 8, "timeout", 0),
        (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", to=2), 8, "injected", 0),
        (MessageFault(2, "lose", "FORWARD_AUTOGRAD_RESP"), 8, "timeout", 1),
    ],
)
def test_the_caller_is_told_of_what_is_lost(
    fault: MessageFault, step: int, error: str, runs: int | None
) -> None:
    """The timeout or the failure reaches the caller; the function ran once if only its answer is
    lost, else not at all; nothing else changes, and no context stays.
    """
    said = under(fault)
    assert changed(said) == {step: error}
    where = {0: 1, 7: 2, 8: 2}.get(step, 0)
    if runs is not None:
        assert said.calls[where].get(f"step{step}", 0) == runs
    assert said.counters == NOTHING.counters


@pytest.mark.parametrize("call", [Call(0, 1, raises=True), Call(0, 1, seconds=5.0)])
def test_a_request_that_is_lost_runs_nothing(call: Call) -> None:
    """So a function that raises or takes its time does not matter; where it runs, it does."""
    program = Program(2, (call, Call(0, 1)), rpc_timeout=65.0)
    said = under(MessageFault(0, "lose", "PYTHON_CALL"), program=program)
    assert [step.error for step in said.steps] == ["timeout", ""]
    assert said.calls[1] == {"step1": 1}
    with pytest.raises(UsageError, match="raises, or takes time of its own"):
        under(MessageFault(0, message="PYTHON_CALL", **LATE), program=program)


#: Later than the timeout of 65 s: what the sender does not hear any more.
LATE: Any = {"action": "delay", "delay": 70.0}
LOST: Any = {"action": "lose"}


@pytest.mark.parametrize(
    ("fault", "step", "runs"),
    [
        (MessageFault(0, message="PYTHON_CALL", **LATE), 0, 1),
        (MessageFault(1, message="PYTHON_RET", **LATE), 0, 1),
        (MessageFault(0, message="PYTHON_CALL", to=2, n=2, **LATE), 7, 1),
        (MessageFault(2, message="PYTHON_RET", n=2, **LATE), 7, 1),
        (MessageFault(2, message="PYTHON_RREF_FETCH_CALL", **LATE), 4, None),
        (MessageFault(1, message="PYTHON_RREF_FETCH_RET", **LATE), 4, None),
        (MessageFault(2, message="FORWARD_AUTOGRAD_RESP", **LATE), 8, 1),
    ],
)
def test_what_comes_after_its_timeout_is_executed_once(
    fault: MessageFault, step: int, runs: int | None
) -> None:
    """The caller gets the timeout, nothing else changes, and the function runs all the same."""
    said = under(fault)
    assert changed(said) == {step: "timeout"}
    assert said.steps[step].slack == 5.0
    if runs is not None:
        assert said.calls[{0: 1, 7: 2, 8: 2}[step]][f"step{step}"] == runs
    assert (said.counters, said.certain) == (NOTHING.counters, True)


def test_a_gradient_that_comes_after_its_timeout_ends_backward() -> None:
    """So does its answer; the contexts are cleaned up as without."""
    for fault in (
        MessageFault(0, message="BACKWARD_AUTOGRAD_REQ", to=2, **LATE),
        MessageFault(2, message="BACKWARD_AUTOGRAD_RESP", to=0, **LATE),
    ):
        said = under(fault)
        assert said.steps[8].value["broke"] == "timeout"
        assert said.counters == NOTHING.counters


def test_a_creation_that_comes_after_its_timeout_is_held_until_it_is_dropped() -> None:
    """The owner has the RRef, each use raises, and the delete of the user removes it."""
    steps: tuple[Step, ...] = (Remote(0, 1, "a", timeout=2.0), Settle(), Fetch(0, "a"))
    late = MessageFault(0, "delay", "PYTHON_REMOTE_CALL", delay=3.0)
    said = under(late, program=Program(2, (*steps, Drop(0, "a"))))
    assert [step.error for step in said.steps] == ["", "", "creation", ""]
    assert said.steps[1].counters == (Counters(), Counters(owners=1, forks=1))
    assert said.counters == (Counters(), Counters())
    with pytest.raises(UsageError, match="before torch has marked it"):
        under(late, program=Program(2, (steps[0], steps[2])))


def test_a_step_may_have_a_timeout_of_its_own() -> None:
    """What is lost or too late is noticed by it, whatever the program's timeout is."""
    step = Call(0, 1, timeout=2.0)
    for fault in (
        MessageFault(0, "lose", "PYTHON_CALL"),
        MessageFault(0, "delay", "PYTHON_CALL", delay=3.0),
        MessageFault(1, "lose", "PYTHON_RET", which="every"),
    ):
        for limit in (None, 400.0):
            said = under(fault, program=Program(2, (step, Call(1, 0)), rpc_timeout=limit))
            assert [one.error for one in said.steps] == ["timeout", ""]


def test_steps_that_run_at_the_same_time() -> None:
    """It is predicted what a fault does whose messages one branch alone sends."""
    branches = Parallel(((Call(0, 1), Count(0, 2)), (Call(1, 0), Call(1, 2))))
    program = Program(3, (branches, Call(2, 1)), rpc_timeout=200.0)
    for fault, wrong in (
        (MessageFault(0, "lose", "PYTHON_CALL", n=2), 1),
        (MessageFault(1, "delay", "PYTHON_CALL", to=2, delay=201.0), 3),
        (MessageFault(2, "lose", "PYTHON_RET", to=1), 3),
        (MessageFault(2, "lose", "PYTHON_CALL"), 4),
    ):
        errors = [step.error for step in under(fault, program=program).steps]
        assert errors == ["timeout" if number == wrong else "" for number in range(5)]
    with pytest.raises(UsageError, match="in no certain order"):
        under(MessageFault(2, "lose", "PYTHON_RET"), program=program)
    every = under(MessageFault(2, "lose", "PYTHON_RET", which="every"), program=program)
    assert [step.error for step in every.steps] == ["", "timeout", "", "timeout", ""]


def test_a_call_that_comes_twice_runs_twice() -> None:
    """Its caller sees one answer, the same as ever."""
    said = under(MessageFault(0, "duplicate", "PYTHON_CALL"))
    assert changed(said) == {}
    assert said.calls[1]["step0"] == 2


def test_one_of_two_answers_may_be_lost() -> None:
    """A request that comes twice is answered twice, so one lost answer changes nothing more."""
    twice = MessageFault(0, "duplicate", "PYTHON_CALL", to=1)
    program = Program(2, (Call(0, 1), Settle(), Call(0, 1)), rpc_timeout=65.0)
    for n, error in ((1, ""), (2, ""), (3, "timeout")):
        lost = MessageFault(1, "lose", "PYTHON_RET", to=0, n=n)
        said = under(twice, lost, program=program)
        assert [step.error for step in said.steps] == ["", "", error]
        assert said.calls[1]["step0"] == 2
        # The first of two answers ends the step, and the second one may come later.
        with pytest.raises(UsageError, match="second answer to a copied request may come later"):
            under(twice, lost, program=replace(program, steps=(Call(0, 1), Call(0, 1))))
    both = MessageFault(1, "lose", "PYTHON_RET", to=0, which="first", n=2)
    with pytest.raises(UsageError, match="both answers to a PYTHON_CALL that came twice"):
        under(twice, both, program=program)


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=2), True),
        (MessageFault(2, "lose", "BACKWARD_AUTOGRAD_RESP", to=0), True),
        (MessageFault(1, "lose", "BACKWARD_AUTOGRAD_REQ", to=0), True),
        (MessageFault(0, "lose", "BACKWARD_AUTOGRAD_RESP", to=1), True),
        (MessageFault(1, "lose", "BACKWARD_AUTOGRAD_REQ", to=2), False),
        (MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1, n=2), False),
        (MessageFault(0, "delay", "BACKWARD_AUTOGRAD_RESP", delay=2.0), False),
    ],
)
def test_a_lost_gradient_or_answer_ends_backward_with_the_timeout(
    fault: MessageFault, changes: bool
) -> None:
    """The loss is there, backward raises, and every rank cleans the context up."""
    said = under(fault)
    wanted = dict(NOTHING.steps[8].value)
    if changes:
        del wanted["gradient"]
        wanted["broke"] = "timeout"
    assert said.steps[8].value == wanted
    assert (said.counters, said.calls) == (NOTHING.counters, NOTHING.calls)


def test_in_which_order_gradients_travel() -> None:
    """From the end of the path to its start, and on by each rank; a lost one ends the pass."""
    assert Context(0, "x", (1, 2)).gradients == [(0, 2), (2, 0), (0, 1), (1, 0)]
    assert Context(0, "x", (1, 2), nested=True).gradients == [(0, 1), (1, 2), (2, 1), (1, 0)]
    steps = (Context(0, "x", (1, 2)), Context(0, "y", (1,), retain=True))
    program = Program(3, steps, rpc_timeout=65.0)
    for n, broken in ((1, [True, False]), (2, [False, True]), (3, [False, True])):
        lost = MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1, n=n)
        said = under(lost, program=program)
        assert ["broke" in step.value for step in said.steps] == broken
    first = MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=2)
    second = MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1)
    assert "broke" in under(first, second, program=program).steps[1].value


def test_an_rref_that_was_lost_says_so_after_a_settle() -> None:
    """A lost creation leaves nothing at the owner, a lost answer the value; uses raise that."""
    steps: tuple[Step, ...] = (Remote(0, 1, "a"), Settle(), Fetch(0, "a"))
    program = Program(2, steps, rpc_timeout=65.0)
    for fault, held in (
        (MessageFault(0, "lose", "PYTHON_REMOTE_CALL"), Counters()),
        (MessageFault(1, "lose", "REMOTE_RET"), Counters(owners=1, forks=1)),
    ):
        said = under(fault, program=program)
        assert [step.error for step in said.steps] == ["", "", "creation"]
        assert said.steps[1].counters == (Counters(), held)


def test_an_rref_that_was_lost_is_used_before_torch_knows_it() -> None:
    """Its owner serves the fetch for ever; a lost answer hides nothing until its timeout comes."""
    steps: tuple[Step, ...] = (
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Settle(),
        Fetch(0, "a"),
    )
    program = Program(3, steps, rpc_timeout=65.0)
    said = under(MessageFault(0, "lose", "PYTHON_REMOTE_CALL"), program=program)
    assert [step.error for step in said.steps] == ["", "", "timeout", "", "creation"]
    served = Counters(forks=1, server_calls=1, server_async_calls=1)
    assert said.steps[3].counters == (Counters(), served, Counters())
    # Where torch has marked it by then, nothing is sent.
    (marked,) = said.alternatives
    assert [step.error for step in marked.steps] == ["", "creation", "missing", "", "creation"]
    assert marked.counters == (Counters(),) * 3
    silent = under(MessageFault(1, "lose", "REMOTE_RET", to=0), program=program)
    assert [step.error for step in silent.steps] == ["", "", "", "", "creation"]
    assert silent.steps[2].value == [3.0]


def test_a_fetch_that_is_never_answered_has_no_answer_to_count() -> None:
    """So a fault that counts it is refused; so is a use that waits where no timeout comes."""
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a")), rpc_timeout=65.0)
    lost = MessageFault(0, "lose", "PYTHON_REMOTE_CALL")
    other = MessageFault(1, "lose", "PYTHON_RREF_FETCH_RET")
    with pytest.raises(UsageError, match="counts the answer to a PYTHON_RREF_FETCH_CALL"):
        under(lost, other, program=program)
    for steps, words in (
        ((Share(0, "a", 1, "b"),), "sends an RRef to its owner"),
        ((Call(0, 2, right="a"),), "a function of .* fetches an RRef that was never created"),
    ):
        with pytest.raises(UsageError, match=words):
            under(lost, program=Program(3, (Remote(0, 1, "a"), *steps), rpc_timeout=65.0))
    with pytest.raises(UsageError, match=r"OwnerRRef::getValue .* has no timeout"):
        under(lost, program=Program(1, (Remote(0, 0, "a"), Fetch(0, "a")), rpc_timeout=65.0))


def test_what_is_lost_before_a_shutdown_at_once_is_noticed_in_it() -> None:
    """One message, if its timeout comes before the 100 s; two of them take too long."""
    steps: tuple[Step, ...] = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"))
    program = Program(3, steps, rpc_timeout=65.0, settles=False)
    accept = MessageFault(2, "lose", "RREF_CHILD_ACCEPT")
    delete = MessageFault(0, "lose", "RREF_USER_DELETE")
    assert under(accept, program=program).graceful
    assert under(delete, program=program).graceful
    with pytest.raises(UsageError, match=r"noticed 130 s .*waits for 100 s"):
        under(accept, delete, program=program)
    with pytest.raises(UsageError, match="60 to 70 s"):
        under(accept, program=replace(program, rpc_timeout=75.0))


def test_answers_that_go_to_several_ranks_at_once_have_no_order() -> None:
    """Ranks delete at the same time in a shutdown, and a remote returns before its answer."""
    program = Program(3, (Remote(0, 1, "a"), Remote(2, 1, "b"), Settle()), rpc_timeout=65.0)
    for kind in ("REMOTE_RET", "RREF_ACK"):
        fault = MessageFault(1, "lose", kind, n=2)
        with pytest.raises(UsageError, match=f"in which order a rank sends {kind} to several"):
            under(fault, program=program)
        assert under(replace(fault, to=2, n=1), program=program)


def test_a_remote_that_goes_on_sends_beside_later_steps() -> None:
    """What its function sends is counted beside them, unless somebody has waited for its value."""
    steps: tuple[Step, ...] = (
        Own(0, "a"),
        Remote(1, 2, "s", right="b"),
        Share(0, "a", 2, "c"),
        Fetch(2, "c"),
    )
    program = Program(3, (steps[0], Share(0, "a", 1, "b"), *steps[1:]), rpc_timeout=65.0)
    calls = MessageFault(0, "lose", "PYTHON_CALL", n=2)
    assert under(calls, program=program).steps[3].error == "timeout"
    fetch = MessageFault(2, "fail", "SCRIPT_RREF_FETCH_CALL", n=2)
    with pytest.raises(UsageError, match=r"Remote\(.* goes on, and later steps send such"):
        under(fetch, program=program)
    waited = (*program.steps[:3], Fetch(1, "s"), *program.steps[3:])
    assert under(fetch, program=replace(program, steps=waited)).steps[5].error == "injected"
    # Another fault may act on the fetch that would wait.
    with pytest.raises(UsageError, match="goes on, and later steps send such"):
        under(fetch, replace(calls, n=9), program=replace(program, steps=waited))
    slow = Program(2, (Remote(0, 1, "a", seconds=2.0), Call(0, 1)), rpc_timeout=65.0)
    assert under(MessageFault(0, "lose", "PYTHON_CALL"), program=slow).steps[1].error == "timeout"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (MessageFault(1, "fail", "PYTHON_REMOTE_CALL", n=2), "either may be answered first"),
        (MessageFault(2, "lose", "REMOTE_RET", to=1), "either may be answered first"),
        (MessageFault(1, "delay", "PYTHON_REMOTE_CALL", delay=1.0), None),
    ],
)
def test_the_copies_of_a_nest_must_make_the_same(fault: MessageFault, says: str | None) -> None:
    """A call that comes twice creates twice; which of the two its caller gets is a race."""
    program = Program(3, (Nest(0, 1, 2, "a"), Fetch(0, "a")), rpc_timeout=65.0)
    twice = MessageFault(0, "duplicate", "PYTHON_CALL")
    if says is None:
        assert [step.error for step in under(twice, fault, program=program).steps] == ["", ""]
        return
    with pytest.raises(UsageError, match=says):
        under(twice, fault, program=program)


def test_a_nest_that_is_lost_on_its_way() -> None:
    """Its call, its answer, and the creation that its function makes."""
    program = Program(3, (Nest(0, 1, 2, "a"), Fetch(0, "a"), Settle()), rpc_timeout=65.0)
    call, answer, creation, silent = (
        under(fault, program=program)
        for fault in (
            MessageFault(0, "lose", "PYTHON_CALL"),
            MessageFault(1, "lose", "PYTHON_RET"),
            MessageFault(1, "lose", "PYTHON_REMOTE_CALL"),
            MessageFault(2, "lose", "REMOTE_RET", to=1),
        )
    )
    assert [step.error for step in call.steps] == ["timeout", "missing", ""]
    assert not sum(sum(ran.values()) for ran in call.calls)
    # The function has run, and its user waits for the accept of a child that nobody got.
    assert [step.error for step in answer.steps] == ["timeout", "missing", ""]
    assert answer.waiting == {1}
    assert answer.counters[2] == Counters(owners=1, forks=1)
    assert [step.error for step in creation.steps] == ["", "timeout", ""]
    assert creation.counters[2] == Counters(forks=1, server_calls=1, server_async_calls=1)
    assert [step.error for step in silent.steps] == ["", "", ""]
    twice = under(MessageFault(0, "duplicate", "PYTHON_CALL"), program=program)
    assert twice.calls[1]["step0"] == 2
    assert twice.waiting == {1}


def test_a_context_that_fetches_what_was_lost() -> None:
    """A hop by an RRef sends its creation and its fetch; each may fail or be lost."""
    program = Program(2, (Context(0, "x", (1,), rrefs=True), Settle()), rpc_timeout=65.0)
    for action, n, error, held in (
        ("fail", 1, "creation", Counters()),
        ("fail", 2, "injected", Counters()),
        ("lose", 1, "timeout", Counters(server_calls=1, server_async_calls=1)),
        ("lose", 2, "timeout", Counters()),
    ):
        fault = MessageFault(0, action, "FORWARD_AUTOGRAD_REQ", n=n)  # type: ignore[arg-type]
        said = under(fault, program=program)
        assert (said.steps[0].error, said.counters[1]) == (error, held)
        # Its function ran where its creation came.
        assert said.calls[1].get("step0", 0) == (n == 2)
    nested = Program(2, (Context(0, "x", (1, 0), nested=True),), rpc_timeout=65.0)
    inner = under(MessageFault(1, "fail", "FORWARD_AUTOGRAD_REQ"), program=nested)
    assert inner.steps[0].error == "remote"


def test_each_context_whose_fetch_fails_may_stay_or_not() -> None:
    """The cleanup follows at once, and comes before the creation or after it."""
    steps = (Context(0, "x", (1,), rrefs=True), Context(0, "y", (1,), rrefs=True), Settle())
    program = Program(2, steps, rpc_timeout=65.0)
    faults = (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", n=n) for n in (2, 4))
    met = under(*faults, program=program).met
    for held in ("1 context", "2 contexts"):
        leak = Violation("ContextLeak", f"worker1 holds {held}; expected nothing", 1, 2)
        assert explanations(met, leak, NEWEST) == ("context-after-cleanup",)
    more = Violation("ContextLeak", "worker1 holds 3 contexts; expected nothing", 1, 2)
    assert explanations(met, more, NEWEST) == ()


def test_a_lost_share_leaves_its_fork() -> None:
    """The sender waits for the accept of a child that does not exist, as beyond the budget."""
    said = under(MessageFault(0, "lose", "PYTHON_CALL", to=2))
    assert said.steps[3].error == "timeout"
    assert said.steps[4].error == "missing"
    assert said.waiting == {0}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (FaultTable(["RREF_USER_DELETE"], 1), {1}),
        (FaultTable(messages_to_delay={"RREF_USER_DELETE": 2.0}), set()),
        (FaultTable(), set()),
    ],
)
def test_an_owner_without_the_rref_waits_for_no_second_try(
    table: FaultTable, expected: set[int]
) -> None:
    """It may leave before the delete of a fork that it was told of is sent again."""
    program = Program(2, (Remote(0, 1, "a"), Share(0, "a", 0, "b")), rpc_timeout=65.0)
    lost = MessageFault(0, "lose", "PYTHON_REMOTE_CALL", to=1)
    found = predict(program, FaultPlan(by_rank={0: table}, others=(lost,)))
    assert found.may_leak == expected
    assert not found.known_bugs
    assert not found.leaking


def test_a_fault_that_is_left_for_the_shutdown_prevents_it() -> None:
    """Where the calls of a shutdown may be lost, the ranks settle and are ended."""
    assert NOTHING.graceful
    assert not under(MessageFault(1, "lose", "PYTHON_CALL")).graceful
    assert under(MessageFault(1, "delay", "PYTHON_CALL", delay=1.0)).graceful
    assert under(MessageFault(0, "lose", "PYTHON_CALL")).graceful


def test_what_is_executed_and_not_answered_is_not_counted() -> None:
    """How often torch tries again after a lost answer is not judged; that it changes nothing is."""
    said = under(MessageFault(1, "lose", "RREF_ACK", to=2, n=2))
    assert not said.certain
    assert said.counters == NOTHING.counters
    last = under(MessageFault(1, "lose", "RREF_ACK", to=0))
    assert not last.certain


#: A nested creation at its own rank accepts its child there: nothing waits for that.
NESTS = Program(3, (Nest(0, 0, 2, "a"), Nest(2, 2, 0, "b")), rpc_timeout=65.0)
#: Its faults of two messages of which the first comes again only later, and words of the reason.
COMES_AGAIN: tuple[tuple[Program, tuple[MessageFault, ...], str], ...] = (
    (
        NESTS,
        (MessageFault(0, "lose", "RREF_ACK"), MessageFault(0, "lose", "RREF_CHILD_ACCEPT")),
        r"rank 0 may send RREF_CHILD_ACCEPT again or late, after others that it counts",
    ),
    (
        NESTS,
        (
            MessageFault(0, "lose", "RREF_ACK"),
            MessageFault(0, "delay", "RREF_CHILD_ACCEPT", delay=2.0),
        ),
        r"rank 0 may send RREF_CHILD_ACCEPT again or late",
    ),
    (
        Program(2, (Nest(0, 0, 1, "a"), Nest(0, 0, 1, "b")), rpc_timeout=65.0),
        (
            MessageFault(0, "lose", "RREF_CHILD_ACCEPT"),
            MessageFault(0, "fail", "RREF_CHILD_ACCEPT", n=2),
        ),
        r"RREF_CHILD_ACCEPT come again, after others",
    ),
)


@pytest.mark.parametrize(("program", "faults", "words"), COMES_AGAIN)
def test_no_fault_counts_past_what_comes_again(
    program: Program, faults: tuple[MessageFault, ...], words: str
) -> None:
    """torch goes on while a try waits, so what comes next is another message; alone it is fine."""
    with pytest.raises(UsageError, match=words):
        predict(program, FaultPlan(others=faults))
    for fault in faults[1:]:
        assert predict(program, FaultPlan(others=(fault,)))


#: A program, a fault, and words of the reason for which nothing is predicted.
REFUSED: tuple[tuple[Program, MessageFault, str], ...] = (
    (PROGRAM, MessageFault(0, "lose"), "acts on all types"),
    (PROGRAM, MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ"), "name their receiver"),
    (
        Program(3, (Context(0, "x", (1, 2, 1), nested=True, breaks=2),), rpc_timeout=65.0),
        MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1),
        "raises, or has a root",
    ),
    (
        Program(2, (Context(0, "x", (1, 1)),), rpc_timeout=65.0),
        MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1, which="first", n=2),
        "comes by a rank twice, which answers before the pass has ended there",
    ),
    (PROGRAM, MessageFault(0, "fail", "BACKWARD_AUTOGRAD_REQ"), "name their receiver"),
    (PROGRAM, MessageFault(0, "duplicate", "BACKWARD_AUTOGRAD_REQ", to=2), "gradient function"),
    (PROGRAM, MessageFault(0, "duplicate", "FORWARD_AUTOGRAD_REQ"), "addRecvFunction"),
    (PROGRAM, MessageFault(2, "lose", "RREF_FORK_REQUEST"), "a Share with a timeout of 125 s"),
    (PROGRAM, MessageFault(2, message="RREF_FORK_REQUEST", **LATE), "a timeout of 125 s"),
    (PROGRAM, MessageFault(1, "lose", "RREF_ACK"), "tries of RREF_FORK_REQUEST that follow"),
    (PROGRAM, MessageFault(2, "fail", "RREF_USER_DELETE", which="first", n=6), "5 times only"),
    (PROGRAM, MessageFault(0, "duplicate", "PYTHON_REMOTE_CALL"), "a fork of an RRef is new"),
    (PROGRAM, MessageFault(0, "duplicate", "PYTHON_CALL", to=2), "same fork"),
    (PROGRAM, MessageFault(0, "duplicate", "PYTHON_CALL", to=2, n=2), "which of the two counts"),
    (replace(PROGRAM, rpc_timeout=None), MessageFault(0, "lose", "PYTHON_CALL"), "no timeout"),
    (
        replace(PROGRAM, rpc_timeout=None),
        MessageFault(2, "lose", "RREF_USER_DELETE"),
        "60 to 3600 s",
    ),
    (
        replace(PROGRAM, rpc_timeout=75.0),
        MessageFault(0, "lose", "RREF_USER_DELETE"),
        "60 to 70 s, .* before a shutdown gives up after 100 s",
    ),
    (
        Program(2, (Context(0, "x", (1,)),), rpc_timeout=65.0, settles=False),
        MessageFault(0, "lose", "CLEANUP_AUTOGRAD_CONTEXT_REQ"),
        "before the timeout",
    ),
    (
        Program(3, (Parallel(((Call(0, 1),), (Chain(2, 0, 1),))),), rpc_timeout=65.0),
        MessageFault(0, "lose", "PYTHON_CALL"),
        "in no certain order",
    ),
    (
        Program(2, (Call(0, 1), Settle(), Rejoin(0), Call(0, 1))),
        MessageFault(0, "delay", "PYTHON_CALL", delay=1.0),
        "ends the agent",
    ),
    (
        Program(2, (Context(0, "x", (1, 0), rrefs=True, nested=True),), rpc_timeout=65.0),
        MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ"),
        "creates an RRef whose function makes calls",
    ),
    (
        Program(2, (Context(0, "x", (1, 0), nested=True),), rpc_timeout=65.0),
        MessageFault(1, "lose", "FORWARD_AUTOGRAD_REQ"),
        "almost the same time",
    ),
    (
        Program(2, (Context(0, "x", (1, 0), nested=True),), rpc_timeout=65.0),
        MessageFault(0, message="FORWARD_AUTOGRAD_REQ", which="every", **LATE),
        "are counted",
    ),
    (
        Program(3, (Context(0, "x", (1, 2, 1), nested=True),), rpc_timeout=65.0),
        MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP"),
        "in the opposite order",
    ),
    (
        Program(3, (Context(0, "x", (1, 2, 0, 1), nested=True),), rpc_timeout=65.0),
        MessageFault(1, message="FORWARD_AUTOGRAD_RESP", to=0, **LATE),
        "in the opposite order",
    ),
    (
        Program(2, (Call(1, 0), Call(0, 1, wait="later", out="f")), rpc_timeout=65.0),
        MessageFault(0, "lose", "PYTHON_CALL"),
        "in which order",
    ),
    (
        Program(
            3,
            (Remote(0, 1, "a"), Settle(), Share(0, "a", 2, "b"), Fetch(2, "b")),
            rpc_timeout=65.0,
        ),
        MessageFault(0, message="PYTHON_CALL", **LATE),
        "before it has come",
    ),
    (
        Program(
            3,
            (
                Remote(0, 1, "a"),
                Settle(),
                Share(0, "a", 2, "b", timeout=200.0),
                Settle(),
                Call(2, 0, right="b"),
            ),
            rpc_timeout=65.0,
        ),
        MessageFault(0, message="RREF_FORK_REQUEST", **LATE),
        "waits for it",
    ),
    (
        Program(3, (Chain(0, 1, 2),), rpc_timeout=65.0),
        MessageFault(0, "lose", "PYTHON_CALL"),
        "shows without its own message is not modelled",
    ),
    (
        Program(3, (Chain(0, 1, 2),), rpc_timeout=65.0),
        MessageFault(1, "lose", "PYTHON_CALL"),
        "a function of .* waits for it",
    ),
    (
        Program(2, (Call(0, 1, timeout=2.0), Call(0, 1))),
        MessageFault(0, "delay", "PYTHON_CALL", n=2, delay=3.0),
        "has no timeout",
    ),
    (
        Program(2, (Call(0, 1, timeout=2.0), Call(0, 1)), rpc_timeout=65.0),
        MessageFault(0, "delay", "PYTHON_CALL", n=2, delay=3.0),
        "has a timeout of 65 s",
    ),
    (
        Program(2, (Call(0, 1, seconds=435.0), Call(0, 1)), rpc_timeout=300.0),
        MessageFault(1, "lose", "PYTHON_RET", n=2),
        "may end before its messages",
    ),
    (
        Program(2, (Call(0, 1, timeout=2.0), Call(0, 1)), rpc_timeout=65.0),
        MessageFault(1, "lose", "PYTHON_RET"),
        "may end before its messages",
    ),
    (
        Program(2, (Remote(0, 1, "a"),)),
        MessageFault(0, "delay", "RREF_USER_DELETE", delay=90.0),
        "a shutdown waits for 100 s",
    ),
)


@pytest.mark.parametrize(
    ("action", "sender", "to", "number", "error"),
    [
        ("lose", 0, 1, 1, "timeout"),
        ("lose", 0, 1, 2, "timeout"),
        ("lose", 2, 1, 1, "timeout"),
        ("fail", 0, 1, 2, "injected"),
        ("fail", 1, 2, 1, "injected"),
        ("fail", 1, 0, 1, "injected"),
    ],
)
def test_a_pass_that_comes_by_a_rank_twice_ends_with_its_error(
    action: MessageAction, sender: int, to: int, number: int, error: str
) -> None:
    """Each gradient depends on the one before, so `backward` gets the timeout, or the failure.

    A rank that has answered its second gradient before that, or waits for it, may wait for ever.
    """
    program = Program(3, (Context(0, "x", (1, 2, 1)),), rpc_timeout=65.0)
    fault = MessageFault(sender, action, "BACKWARD_AUTOGRAD_REQ", to=to, n=number)
    if (sender, to) in {(1, 2), (2, 1)}:
        program = Program(3, (Context(0, "x", (1, 2, 1), nested=True),), rpc_timeout=65.0)
    said = under(fault, program=program)
    assert said.steps[0].value["broke"] == error
    assert "failed-backward-revisits-rank" in said.known_bugs
    assert "failed-backward-revisits-rank" not in predict(program, FaultPlan()).known_bugs
    if action == "lose":
        answer = MessageFault(to, "lose", "BACKWARD_AUTOGRAD_RESP", to=sender, n=number)
        assert under(answer, program=program).steps == said.steps


@pytest.mark.parametrize(("program", "fault", "why"), REFUSED)
def test_anything_else_is_refused_with_its_reason(
    program: Program, fault: MessageFault, why: str
) -> None:
    """The message names the fault, and says why nothing is predicted."""
    with pytest.raises(UsageError, match=why) as raised:
        under(fault, program=program)
    assert fault.name in str(raised.value)
    assert predict(program, FaultPlan()).steps


def test_a_late_call_of_a_context_makes_the_context_anew() -> None:
    """It comes after the cleanup, so its rank keeps it, and each rank that its function calls."""
    both = (Context(0, "x", (1, 2)), Call(1, 2))
    for step, n, ran, kept in (
        (both[0], 1, {1: 1}, {1}),
        (both[0], 2, {1: 1, 2: 1}, {2}),
        (Context(0, "x", (1, 2, 1)), 3, {1: 2, 2: 1}, {1}),
        (Context(0, "x", (1, 0, 2), nested=True), 1, {1: 1, 0: 1, 2: 1}, {0, 1, 2}),
    ):
        program = Program(3, (step, both[1]), rpc_timeout=65.0)
        late = MessageFault(0, message="FORWARD_AUTOGRAD_REQ", n=n, **LATE)
        said = under(late, program=program)
        assert [one.error for one in said.steps] == ["timeout", ""]
        assert said.steps[0].slack == 5.0
        assert {rank: one["step0"] for rank, one in enumerate(said.calls) if "step0" in one} == ran
        assert said.counters == (Counters(),) * 3
        assert {one.rank for one in said.met} == kept
        assert said.known_bugs == {"context-after-cleanup"}
        for one in said.met:
            assert re.search(one.says, "worker1 holds 1 context; expected nothing")
            assert not re.search(one.says, "worker1 holds 2 contexts; expected nothing")


def test_a_context_that_has_failed_is_refused_everywhere_after_a_settle() -> None:
    """Also at a rank that never heard of it."""
    steps: tuple[Step, ...] = (
        Context(0, "x", (1,)),
        Settle(),
        *(Refused(r, "x") for r in range(3)),
    )
    for fault in (
        MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ"),
        MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ"),
        MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP"),
    ):
        said = under(fault, program=Program(3, steps, rpc_timeout=65.0))
        assert [one.value for one in said.steps[2:]] == [{"refused": True}] * 3


def test_a_late_call_is_refused_where_its_cleanup_may_be_late() -> None:
    """Nobody could tell whether the context stays."""
    late = MessageFault(0, message="FORWARD_AUTOGRAD_REQ", **LATE)
    cleanup = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
    with pytest.raises(UsageError, match="comes before the late call"):
        under(late, MessageFault(0, "fail", cleanup))
    with pytest.raises(UsageError, match="comes before the late call"):
        under(late, MessageFault(0, "delay", cleanup, delay=1.0))
    for table in (FaultTable([cleanup], 1), FaultTable(messages_to_delay={cleanup: 1.0})):
        with pytest.raises(UsageError, match="comes before the late call"):
            predict(PROGRAM, FaultPlan(table, others=(late,)))
    assert under(late, MessageFault(1, "fail", cleanup)).known_bugs == {"context-after-cleanup"}


@pytest.mark.parametrize(
    ("fault", "runs", "error"),
    [
        (MessageFault(0, "lose", "FORWARD_AUTOGRAD_REQ"), False, "timeout"),
        (MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ"), False, "injected"),
        (MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP", to=0), True, "timeout"),
        (MessageFault(1, message="FORWARD_AUTOGRAD_RESP", to=0, **LATE), True, "timeout"),
    ],
)
@pytest.mark.parametrize("path", [(1,), (1, 2), (1, 2, 3)])
def test_the_first_call_of_a_nested_context_may_be_lost(
    path: tuple[int, ...], fault: MessageFault, runs: bool, error: str
) -> None:
    """Where only its answer is, all the others have run, and the cleanup reaches every rank.

    Each rank sends it to those that it has called, and to its caller.
    """
    program = Program(4, (Context(0, "x", path, nested=True),), rpc_timeout=65.0)
    said = under(fault, program=program)
    assert said.steps[0].error == error
    there = [runs and rank in path for rank in (1, 2, 3)]
    assert [one.get("step0", 0) for one in said.calls] == [0, *there]
    calls = set(pairwise((0, *path)))
    cleaned = Counter((one.rank, one.to) for one in said.sends)
    assert cleaned == Counter(calls | {(to, at) for at, to in calls} if runs else {(0, 1)})
    assert said.counters == (Counters(),) * 4


@pytest.mark.parametrize("action", ["lose", "fail"])
def test_the_answer_of_a_nested_call_is_refused_beside_another_fault(action: Any) -> None:
    """Where a call on the way is lost or fails, the first one is answered with its error."""
    program = Program(3, (Context(0, "x", (1, 2), nested=True),), rpc_timeout=65.0)
    answer = MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP", to=0)
    with pytest.raises(UsageError, match="in the opposite order"):
        under(answer, MessageFault(1, action, "FORWARD_AUTOGRAD_REQ"), program=program)


def test_a_gradient_that_fails_ends_backward_with_the_injected_failure() -> None:
    """Wherever its sender is, at once; every rank cleans the context up."""
    for rank, to in ((0, 2), (2, 0), (0, 1), (1, 0)):
        said = under(MessageFault(rank, "fail", "BACKWARD_AUTOGRAD_REQ", to=to))
        assert said.steps[8].value["broke"] == "injected"
        assert "gradient" not in said.steps[8].value
        assert (said.counters, said.calls) == (NOTHING.counters, NOTHING.calls)
        assert (said.sends, said.known_bugs) == (NOTHING.sends, frozenset())


@pytest.mark.parametrize(
    "kind", ["RREF_CHILD_ACCEPT", "RREF_USER_DELETE", "CLEANUP_AUTOGRAD_CONTEXT_REQ"]
)
@pytest.mark.parametrize("limit", [65.0, 300.0])
def test_what_torch_tries_again_may_come_after_its_timeout(kind: str, limit: float) -> None:
    """The next try is executed first, and then the one that is late, which finds nothing to do."""
    rank = 0 if kind.startswith("CLEANUP") else 2
    program = replace(PROGRAM, rpc_timeout=limit)
    late = MessageFault(rank, "delay", kind, delay=limit + 5.0)
    said, usual = under(late, program=program), predict(program, FaultPlan())
    lost = under(MessageFault(rank, "lose", kind), program=program)
    assert [one.error for one in said.steps] == [""] * 9
    assert (said.counters, said.calls, said.certain) == (usual.counters, usual.calls, True)
    assert said.retried == lost.retried == tuple(int(one == rank) for one in range(3))
    assert lost_seconds(program, FaultPlan(others=(late,))) == limit + 5.0


def test_a_lost_answer_to_a_cleanup_changes_nothing_that_is_judged() -> None:
    """The context is gone. What torch sends again carries nothing, and may go on for an hour."""
    for form in (LOST, LATE):
        fault = MessageFault(1, message="CLEANUP_AUTOGRAD_CONTEXT_RESP", to=0, **form)
        said = under(fault)
        assert changed(said) == {}
        assert (said.counters, said.retried) == (NOTHING.counters, NOTHING.retried)
        assert said.may_warn_unreleased_context == {0}
        assert not said.certain


def test_a_lost_fork_request_is_tried_again_within_a_longer_timeout() -> None:
    """So the function starts late. The try that is late comes before the fork is deleted."""
    share = Share(0, "a", 2, "b", timeout=130.0)
    steps: tuple[Step, ...] = (Remote(0, 1, "a"), Settle(), share, Settle(), Drop(2, "b"))
    program = Program(3, steps, rpc_timeout=65.0)
    for form in (LOST, LATE):
        said = under(MessageFault(2, message="RREF_FORK_REQUEST", **form), program=program)
        assert [one.error for one in said.steps] == [""] * 5
        assert said.retried == (0, 0, 1)
        assert said.counters == predict(program, FaultPlan()).counters


def test_a_share_that_comes_after_its_timeout() -> None:
    """The handle arrives once, and is there after a settle; meanwhile its sender drops its own."""
    first: tuple[Step, ...] = (Remote(0, 1, "a"), Settle(), Share(0, "a", 2, "b"))
    late = MessageFault(0, message="PYTHON_CALL", **LATE)
    program = Program(3, (*first, Drop(0, "a"), Settle(), Fetch(2, "b")), rpc_timeout=65.0)
    said = under(late, program=program)
    assert [one.error for one in said.steps] == ["", "", "timeout", "", "", ""]
    assert said.calls[2]["step2"] == 1
    assert said.steps[4].counters[1] == Counters(owners=1, forks=1)
    assert said.met == frozenset()
    for other in (
        MessageFault(2, "lose", "RREF_CHILD_ACCEPT"),
        MessageFault(1, "lose", "RREF_ACK", to=0),
    ):
        with pytest.raises(UsageError, match="what follows from it is not known"):
            under(late, other, program=program)


def test_a_call_with_an_rref_that_comes_after_its_timeout() -> None:
    """Its function fetches the argument then, and its owner still has it."""
    call = Call(0, 2, right="a")
    steps: tuple[Step, ...] = (Remote(0, 1, "a"), Settle(), call, Drop(0, "a"), Settle())
    program = Program(3, steps, rpc_timeout=65.0)
    said, usual = (
        under(*faults, program=program)
        for faults in ((MessageFault(0, message="PYTHON_CALL", **LATE),), ())
    )
    assert [one.error for one in said.steps] == ["", "", "timeout", "", ""]
    assert (said.sends, said.calls, said.met) == (usual.sends, usual.calls, frozenset())


def test_a_fetch_that_comes_after_the_delete_stays_at_the_owner() -> None:
    """If no other rank has the RRef; after a settle the fetch has come first."""
    late = MessageFault(0, message="PYTHON_RREF_FETCH_CALL", **LATE)
    remote, fetch, drop = Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")
    for steps, kept in (
        ((remote, fetch, drop), True),
        ((remote, fetch, Settle(), drop), False),
        ((remote, Settle(), Share(0, "a", 2, "b"), fetch, drop), False),
        ((remote, Settle(), Share(0, "a", 2, "b"), fetch, drop, Settle(), Drop(2, "b")), False),
        ((remote, Settle(), Share(0, "a", 2, "b"), fetch, drop, Drop(2, "b")), True),
    ):
        said = under(late, program=Program(3, steps, rpc_timeout=65.0))
        assert [step.error for step in said.steps].count("timeout") == 1
        assert said.known_bugs == ({"fetch-after-delete"} if kept else set())
        # Where a table delays the fetch as well, it is the same one.
        table = FaultTable(messages_to_delay={"PYTHON_RREF_FETCH_CALL": 70.0})
        plan = FaultPlan(by_rank={0: table}, others=(late,))
        both = predict(Program(3, steps, rpc_timeout=65.0), plan)
        assert both.met == said.met
        for one in said.met:
            assert one.rank == 1
            left = "worker1 holds 1 server call, 1 server async call; expected nothing"
            assert re.search(one.says, left)


def test_a_fetch_that_a_table_delays_comes_after_the_delete_in_some_runs_only() -> None:
    """It is sent before the delete; what is late by a fault of its own surely comes after it."""
    steps = (Remote(0, 1, "a"), Fetch(0, "a", 0.5), Fetch(0, "a", 0.5), Drop(0, "a"))
    table = FaultTable(messages_to_delay={"PYTHON_RREF_FETCH_CALL": 2.0})
    second = MessageFault(0, "delay", "PYTHON_RREF_FETCH_CALL", n=2, delay=75.0)
    for others, kept in (((second,), [1, 2]), ((), [1, 2])):
        (met,) = predict(Program(2, steps), FaultPlan(by_rank={0: table}, others=others)).met
        (says,) = re.findall(r"\((.*)\)", met.says.replace("\\", ""))
        assert [int(one.split()[0]) for one in says.split("|")] == kept


@pytest.mark.parametrize("first", [0, 1])
def test_which_of_two_faults_acts_on_a_cleanup_must_be_known(first: int) -> None:
    """A rank cleans up the others in any order, so no fault counts all beside one of them."""
    program = Program(2, (Context(1, "x", (0, 1)),), rpc_timeout=65.0)
    kind = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
    late = MessageFault(1, "delay", kind, to=0, delay=0.5)
    lost = MessageFault(1, "lose", kind)
    both = (late, lost)
    with pytest.raises(UsageError, match="in which order a rank cleans up others"):
        predict(program, FaultPlan(others=(both[first], both[1 - first])))
    predict(program, FaultPlan(others=(late, replace(lost, to=1))))
    predict(program, FaultPlan(others=(replace(late, to=None), replace(late, delay=1.0))))


def test_a_creation_waits_for_an_argument_whose_own_function_still_fetches() -> None:
    """So where the shutdown deletes what that one fetches, both hang."""
    steps = (Remote(0, 0, "b"), Remote(0, 1, "c", right="b"), Remote(0, 1, "e", right="c"))
    hold = MessageFault(
        1, "hold", "PYTHON_RREF_FETCH_CALL", delay=30.0, until=NthMessage(1, "RREF_USER_DELETE")
    )
    program = Program(2, steps, settles=False)
    assert "shutdown-deletes-argument" in under(hold, program=program).known_bugs
    waited = replace(program, steps=(*steps, Fetch(0, "e")))
    assert under(program=waited).known_bugs == frozenset()


def test_a_rank_may_leave_while_its_last_delete_comes_twice() -> None:
    """The delete comes late, and its owner may be gone when the last of its tries is sent."""
    program = Program(2, (Remote(0, 1, "a"),), rpc_timeout=65.0)
    late = MessageFault(0, "delay", "RREF_USER_DELETE", delay=75.0)
    lost = MessageFault(0, "lose", "RREF_USER_DELETE", n=2)
    assert predict(program, FaultPlan(others=(late,))).failed_sends()[0] == range(1, 2)
    seen = predict(program, FaultPlan(others=(late, lost)))
    assert (seen.may_exit_early, seen.failed_sends()[0]) == (frozenset({0}), range(7))
    # If neither of two tries comes, the owner has given up by the time of the third.
    for second in (lost, replace(late, n=2)):
        with pytest.raises(UsageError, match="two tries of a last delete take 130 s"):
            predict(program, FaultPlan(others=(replace(lost, n=1), second)))
    # A settle waits until it has come.
    dropped = replace(program, steps=(*program.steps, Drop(0, "a")))
    seen = predict(dropped, FaultPlan(others=(late, lost)))
    assert (seen.may_exit_early, seen.failed_sends()[0]) == (frozenset(), range(2, 3))


def test_a_creation_that_comes_after_its_delete() -> None:
    """Its owner keeps it, which is a finding."""
    late = MessageFault(0, message="PYTHON_REMOTE_CALL", **LATE)
    said = under(late, program=Program(2, (Remote(0, 1, "a"), Drop(0, "a")), rpc_timeout=65.0))
    assert said.counters == (Counters(), Counters())
    assert said.known_bugs == {"timed-out-remote-dropped"}


def test_a_timeout_of_a_step_is_none_of_what_torch_sends() -> None:
    """A delete that is later than it is only late, for it has the timeout of the program."""
    call = Call(0, 1, timeout=2.0, seconds=9.0)
    steps: tuple[Step, ...] = (call, Remote(0, 1, "a"), Drop(0, "a"))
    late = MessageFault(0, "delay", "RREF_USER_DELETE", delay=3.0)
    for limit in (None, 300.0):
        said = under(late, program=Program(2, steps, rpc_timeout=limit))
        assert [step.error for step in said.steps] == ["timeout", "", ""]
        assert said.retried == (0, 0)


def test_the_answer_to_a_late_request_is_not_counted() -> None:
    """It comes at any time, so no other fault may count it."""
    late = MessageFault(0, message="PYTHON_CALL", **LATE)
    with pytest.raises(UsageError, match="counts its answer is not known"):
        under(late, MessageFault(1, "lose", "PYTHON_RET", n=2))
    assert changed(under(late, MessageFault(2, "lose", "PYTHON_RET", n=2))) == {
        0: "timeout",
        7: "timeout",
    }


def test_a_timeout_that_late_messages_may_meet_is_refused() -> None:
    """Within the timeout nothing changes; the message says by how much it must be longer."""
    step = Call(0, 1, timeout=100.0)
    fault: Any = {"which": "every", "delay": 4.0}
    said = predict(
        Program(2, (step,)), FaultPlan(others=(MessageFault(0, "delay", "PYTHON_CALL", **fault),))
    )
    assert said.steps[0].error == ""
    fault["delay"] = 8.0
    with pytest.raises(UsageError, match=r"may come 64 s .*let the timeout be 60 s above that"):
        under(MessageFault(0, "delay", "PYTHON_CALL", **fault), program=Program(2, (step,)))


def test_a_table_and_a_fault_of_one_type_are_refused() -> None:
    """Nobody could say which try is the nth."""
    plan = FaultPlan(
        FaultTable(["RREF_USER_DELETE"], 1), others=(MessageFault(2, "fail", "RREF_USER_DELETE"),)
    )
    with pytest.raises(UsageError, match="a fault table fails RREF_USER_DELETE as well"):
        predict(PROGRAM, plan)


def test_how_long_a_run_may_wait_for_what_is_lost() -> None:
    """One timeout for each message that a fault may lose."""
    lose = MessageFault(0, "lose", "PYTHON_CALL")
    assert lost_seconds(PROGRAM, FaultPlan()) == 0.0
    assert lost_seconds(PROGRAM, FaultPlan(others=(lose, replace(lose, n=2)))) == 130.0
    late = MessageFault(0, message="PYTHON_CALL", **LATE)
    assert lost_seconds(PROGRAM, FaultPlan(others=(late, lose))) == 135.0
