"""The model against counts made by hand: messages, budgets, counters, calls and timeouts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import Prediction, predict, predict_in
from rpcprops.outcomes import Counters
from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Flavour,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Parallel,
    Pause,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Wait,
)
from tests.seeded._programs import EVERY_KIND, shipped_programs

ACCEPT = MessageType.RREF_CHILD_ACCEPT
FORK = MessageType.RREF_FORK_REQUEST
DELETE = MessageType.RREF_USER_DELETE
CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
CALL = MessageType.PYTHON_CALL
REMOTE = MessageType.PYTHON_REMOTE_CALL
FETCH = MessageType.PYTHON_RREF_FETCH_CALL
SCRIPT_CALL = MessageType.SCRIPT_CALL
SCRIPT_REMOTE = MessageType.SCRIPT_REMOTE_CALL
SCRIPT_FETCH = MessageType.SCRIPT_RREF_FETCH_CALL

NONE = FaultPlan()
NOTHING = Counters()


def predicted(*steps: Step, world_size: int = 3, plan: FaultPlan = NONE) -> Prediction:
    """The prediction for some steps."""
    return predict(Program(world_size, steps), plan)


def sends(prediction: Prediction) -> list[list[MessageType]]:
    """The messages of each rank, in order."""
    found: list[list[MessageType]] = [[] for _ in prediction.counters]
    for send in prediction.sends:
        found[send.rank].append(send.message)
    return found


def failures(*steps: Step, table: FaultTable, world_size: int = 3) -> list[dict[MessageType, int]]:
    """How many sends of each type fail at each rank when every rank has a table."""
    seen = predicted(*steps, world_size=world_size, plan=FaultPlan(table))
    return [dict(by_type) for by_type in seen.failures()]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Call(0, 1, timeout=1.75, seconds=2.0), "timeout"),
        (Call(0, 1, timeout=1.8, seconds=2.0), "unknown"),
        (Call(0, 1, timeout=62.0, seconds=2.0), ""),
        (Call(0, 1, timeout=61.9, seconds=2.0), "unknown"),
        (Call(0, 1, raises=True, timeout=1.0, seconds=2.0), "timeout"),
        (Call(0, 1, raises=True, seconds=2.0), "remote"),
    ],
)
def test_a_timeout_is_compared_with_the_sleep_of_the_function(step: Call, error: str) -> None:
    """A call times out if its function sleeps clearly longer, and runs once all the same."""
    seen = predicted(step)
    assert seen.steps[0].error == error
    assert seen.calls[1] == {"step0": 1}


def test_a_fetch_waits_for_a_value_that_is_still_being_made() -> None:
    """A short timeout right after the creation ends the fetch; later ones are not predicted."""
    made = Remote(0, 1, "a", seconds=130.0)
    late, then = predicted(made, Fetch(0, "a", timeout=99.0), Fetch(0, "a")).steps[1:]
    assert (late.error, then.value) == ("timeout", [3.0])
    assert predicted(made, Pause(0), Fetch(0, "a", timeout=99.0)).steps[2].error == "unknown"
    assert predicted(made, Fetch(0, "a", timeout=190.0)).steps[1].error == ""
    assert predicted(made, Fetch(0, "a", timeout=110.0)).steps[1].error == "unknown"
    slow_request = FaultPlan(FaultTable(messages_to_delay={FETCH: 100.0}))
    fetch = Fetch(0, "a", timeout=101.0)
    assert predicted(made, fetch, plan=slow_request).steps[1].error == "unknown"


def test_a_creation_times_out_while_its_function_sleeps() -> None:
    """torch marks the RRef in its own time; after a settle its use fails and its value is held."""
    made = Remote(0, 1, "a", timeout=1.0, seconds=2.0)
    seen = predicted(made, Fetch(0, "a"))
    errors = {one.steps[1].error for one in (seen, *seen.alternatives)}
    assert errors == {"", "creation"}
    seen = predicted(made, Settle(), Fetch(0, "a"))
    assert seen.steps[2].error == "creation"
    assert [counters.owners for counters in seen.steps[1].counters] == [0, 1, 0]


@pytest.mark.parametrize("finding", [True, False])
def test_an_owner_forgets_a_value_that_is_still_being_made(finding: bool) -> None:
    """If it got a handle early and all forks that it knows are deleted, it forgets the value."""
    back = (Share(0, "a", 1, "b"),) if finding else ()
    steps = (Remote(0, 1, "a", seconds=2.0), *back, Share(0, "a", 2, "c"), Drop(2, "c"))
    assert ("early-owner-fork" in predicted(*steps).known_bugs) == finding
    fetched = (*steps[:1], Fetch(0, "a"), *steps[1:])
    assert not predicted(*fetched).known_bugs


@pytest.mark.parametrize(
    ("flavour", "remote", "fetch"),
    [
        ("python", REMOTE, FETCH),
        ("builtin", SCRIPT_REMOTE, SCRIPT_FETCH),
        ("script", SCRIPT_REMOTE, SCRIPT_FETCH),
    ],
)
def test_create_fetch_and_drop(flavour: Flavour, remote: MessageType, fetch: MessageType) -> None:
    """A creator sends one call to create, one for each fetch and one delete; its owner nothing."""
    seen = predicted(
        Remote(0, 1, "a", (1.0, 2.0), (3.0, 4.0), flavour=flavour),
        Fetch(0, "a"),
        Fetch(0, "a"),
        Drop(0, "a"),
    )
    assert sends(seen) == [[remote, fetch, fetch, DELETE], [], []]
    assert [step.value for step in seen.steps] == [None, [4.0, 6.0], [4.0, 6.0], None]


def test_an_owner_shares_its_value() -> None:
    """A fork that the owner makes is known to it at once: only the call that carries it is sent.

    Rank 0 owns, sends one call to rank 1, and fetches its own value without a message. Rank 1
    fetches once and deletes once.
    """
    seen = predicted(
        Own(0, "mine", (5.0,)),
        Share(0, "mine", 1, "a"),
        Fetch(0, "mine"),
        Fetch(1, "a"),
        Drop(0, "mine"),
        Drop(1, "a"),
    )
    # The value's type is inferred, so the fetch is a script fetch.
    assert sends(seen) == [[CALL], [SCRIPT_FETCH, DELETE], []]


def test_a_user_shares_with_a_user() -> None:
    """The receiver tells the owner of the fork and then the sender, and deletes its own fork.

    Rank 0: create, call with the handle, delete. Rank 2: fork request to the owner, accept to rank
    0, fetch, delete. Rank 1, the owner, sends nothing.
    """
    seen = predicted(
        Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Fetch(2, "b"), Drop(2, "b")
    )
    assert sends(seen) == [[REMOTE, CALL, DELETE], [], [FORK, ACCEPT, FETCH, DELETE]]


def test_a_user_shares_with_the_owner() -> None:
    """The owner needs no fork of its own: it only accepts, then fetches and drops silently.

    Rank 0: create, call with the handle, delete. Rank 1: one accept.
    """
    seen = predicted(
        Remote(0, 1, "a"), Share(0, "a", 1, "b"), Fetch(1, "b"), Drop(0, "a"), Drop(1, "b")
    )
    assert sends(seen) == [[REMOTE, CALL, DELETE], [ACCEPT], []]


def test_a_user_shares_with_itself() -> None:
    """A rank that sends a handle to itself is a user of a further fork, with all its messages.

    Rank 0: create, call, fork request, accept (to itself), two deletes.
    """
    seen = predicted(Remote(0, 1, "a"), Share(0, "a", 0, "b"), Drop(0, "a"), Drop(0, "b"))
    assert sends(seen) == [[REMOTE, CALL, FORK, ACCEPT, DELETE, DELETE], [], []]


def test_remote_on_oneself() -> None:
    """A rank that creates a value on itself owns it: no fetch message and no delete."""
    seen = predicted(Remote(0, 0, "a"), Fetch(0, "a"), Drop(0, "a"))
    assert sends(seen) == [[REMOTE], [], []]


def test_a_handle_as_an_argument_is_a_fork_that_ends_with_the_call() -> None:
    """The callee receives a fork, fetches it, and deletes it when the call is over.

    Rank 0: create at 1, call to 2, delete. Rank 2: fork request, accept, fetch, delete.
    """
    seen = predicted(Remote(0, 1, "a"), Call(0, 2, (10.0,), "a"), Drop(0, "a"))
    assert sends(seen) == [[REMOTE, CALL, DELETE], [], [FORK, ACCEPT, FETCH, DELETE]]
    assert seen.steps[1].value == [13.0]  # 1 + 2 were added when it was created


def test_a_nested_remote_returns_a_fork() -> None:
    """The rank in between creates, returns the handle, and lets go of its own.

    Rank 0: call to 1; on the returned handle a fork request and an accept. Rank 1: create at 2,
    delete. At the end rank 0 still holds its fork.
    """
    seen = predicted(Nest(0, 1, 2, "a"))
    assert sends(seen) == [[CALL, FORK, ACCEPT], [REMOTE, DELETE], []]
    assert seen.counters == (NOTHING, NOTHING, Counters(owners=1, forks=1))


def test_a_nested_remote_that_returns_to_the_owner() -> None:
    """The caller owns the value itself, so it only accepts. Rank 1: create at 0, delete."""
    seen = predicted(Nest(0, 1, 0, "a"))
    assert sends(seen) == [[CALL, ACCEPT], [REMOTE, DELETE], []]
    assert seen.counters == (NOTHING,) * 3


def test_a_bump_lends_its_handle_to_the_owner() -> None:
    """A user's bump sends the handle to the owner, which accepts it; an owner's bump is one call.

    Rank 0: create (script), call, delete. Rank 1: one accept; later a call to itself.
    """
    seen = predicted(
        Remote(0, 1, "a", flavour="builtin"),
        Bump(0, "a"),
        Share(0, "a", 1, "o"),
        Bump(1, "o"),
        Drop(0, "a"),
        Drop(1, "o"),
    )
    assert sends(seen) == [
        [SCRIPT_REMOTE, SCRIPT_CALL, CALL, DELETE],
        [ACCEPT, ACCEPT, SCRIPT_CALL],
        [],
    ]
    assert [seen.steps[1].value, seen.steps[3].value] == [[4.0], [5.0]]


@pytest.mark.parametrize(
    ("reads", "ends"),
    [
        (Remote(0, 2, "b", right="a"), Fetch(0, "b")),
        (Through(0, "a", "remote", out="b"), Through(0, "b")),
        (Call(0, 2, right="a", wait="later", out="f"), Wait(0, "f")),
    ],
)
def test_nobody_knows_what_a_function_reads_that_runs_beside_a_change(
    reads: Step, ends: Step
) -> None:
    """An owner handles both at once. So somebody must have waited for the function, or settled."""
    made = Remote(0, 1, "a", flavour="builtin")
    with pytest.raises(UsageError, match=r"^Bump\(at=0, handle='a'\): .* may still read"):
        predicted(made, reads, Bump(0, "a"))
    assert predicted(made, reads, ends, Bump(0, "a")).steps[3].value == [4.0]
    assert predicted(made, reads, Settle(), Bump(0, "a")).steps[3].value == [4.0]
    other = Remote(0, 1, "c", flavour="builtin")
    assert predicted(made, other, reads, Bump(0, "c")).steps[3].value == [4.0]


def test_the_first_call_through_a_handle_asks_for_the_type() -> None:
    """The question carries the handle, and so does each call: the owner accepts every one.

    Rank 0: create, question, two calls. Rank 1: three accepts.
    """
    seen = predicted(Remote(0, 1, "a"), Through(0, "a"), Through(0, "a", "async", 5.0))
    assert sends(seen) == [[REMOTE, CALL, CALL, CALL], [ACCEPT] * 3, []]
    assert [step.value for step in seen.steps] == [None, [4.0], [8.0]]


def test_a_remote_through_a_handle_makes_another() -> None:
    """After the question for the type, the call is a creation whose value the same owner has."""
    seen = predicted(
        Remote(0, 1, "a"), Through(0, "a", "remote", out="b"), Settle(), Fetch(0, "b"), Drop(0, "b")
    )
    assert sends(seen) == [[REMOTE, CALL, REMOTE, FETCH, DELETE], [ACCEPT] * 2, []]
    assert seen.steps[2].counters == (NOTHING, Counters(owners=2, forks=2), NOTHING)
    assert seen.steps[3].value == [4.0]


def test_an_owner_asks_nobody_for_the_type() -> None:
    """At the owner a call through a handle is a call to itself, without forks and accepts."""
    seen = predicted(Own(1, "a", (2.0, 3.0)), Through(1, "a"), Through(1, "a", "remote", out="b"))
    assert sends(seen) == [[], [CALL, REMOTE], []]
    assert seen.steps[1].value == [3.0, 4.0]


def test_each_handle_asks_for_the_type_itself() -> None:
    """What one handle knows, another handle of the same value does not, even at the same rank."""
    seen = predicted(Remote(0, 1, "a"), Share(0, "a", 0, "b"), Through(0, "a"), Through(0, "b"))
    assert sends(seen)[0].count(CALL) == 1 + 2 + 2


def test_a_chain_is_a_call_of_each_link() -> None:
    """The caller calls `to`, which calls `then`; both run once."""
    seen = predicted(Chain(0, 1, 2, (1.0, 2.0), (10.0, 20.0)))
    assert sends(seen) == [[CALL], [CALL], []]
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 1}, {"step0/then": 1}]
    assert seen.steps[0].value == [11.0, 22.0]


def test_a_module_lives_for_one_call() -> None:
    """It is created, called with its handle among the arguments, and deleted."""
    seen = predicted(Module(0, 1, (1.0, 2.0)))
    assert sends(seen) == [[REMOTE, CALL, DELETE], [ACCEPT], []]
    assert seen.steps[0].value == [3.0, 5.0]
    assert seen.counters == (NOTHING,) * 3


@pytest.mark.parametrize(("mode", "calls"), [("", 0), ("train(False)", 2), ("train", 3)])
def test_a_module_that_is_sent_calls_its_owner_there(mode: Any, calls: int) -> None:
    """Its RRef goes with it, and from there to the same rank; a mode is set through a proxy."""
    seen = predicted(Module(0, 1, (1.0, 2.0), mode=mode, sent=True))
    here, there, _ = sends(seen)
    assert here == [REMOTE, *[CALL] * (calls + 2), DELETE]
    assert Counter(there) == {ACCEPT: calls + 2, CALL: 1}
    assert seen.steps[0].value == ([1.0, 3.0] if calls == 2 else [3.0, 5.0]) * 2
    assert seen.counters == (NOTHING,) * 3


@pytest.mark.parametrize("owners", [(1,), (2, 1)])
def test_an_optimizer_asks_every_owner(owners: tuple[int, ...]) -> None:
    """For each owner a creation, a question, a fetch, two deletes and a cleanup.

    Each owner accepts its parameter for the optimizer, and its optimizer for the step, and cleans
    up. The parameter and the optimizer are both gone at the end.
    """
    seen = predicted(Optimize(0, "x", owners, (2.0, 4.0)))
    times = len(owners)
    once = {REMOTE: times, CALL: times, FETCH: times, CLEANUP: times}
    assert Counter(sends(seen)[0]) == {**once, DELETE: 2 * times}
    for owner in owners:
        assert Counter(sends(seen)[owner]) == {ACCEPT: 2, CLEANUP: 1}
    assert seen.steps[0].value == [[1.0, 2.0]] * times
    assert seen.counters == (NOTHING,) * 3
    assert [dict(seen.calls[owner]) for owner in owners] == [{"step0": 1}] * times


def test_an_optimizer_of_ones_own_parameter() -> None:
    """What the caller owns itself needs neither fetch nor delete, and is cleaned up like the rest.

    One creation and one question to itself, and a cleanup to itself.
    """
    assert Counter(sends(predicted(Optimize(0, "x", (0,))))[0]) == {REMOTE: 1, CALL: 1, CLEANUP: 1}


def test_a_counter_counts_every_call_of_its_rank() -> None:
    """Each rank has a counter of its own, whoever calls."""
    seen = predicted(Count(0, 1), Count(2, 1), Count(0, 0), Count(1, 1))
    assert sends(seen) == [[CALL, CALL], [CALL], [CALL]]
    assert [step.value for step in seen.steps] == [1, 2, 1, 3]


def test_a_future_gives_its_value_when_it_is_waited_for() -> None:
    """The call is sent and runs at once; the value is the wait's."""
    seen = predicted(Call(0, 1, wait="later", out="f"), Call(0, 2, (5.0,)), Wait(0, "f"))
    assert sends(seen) == [[CALL, CALL], [], []]
    assert [step.value for step in seen.steps] == [None, [7.0], [3.0]]
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 1}, {"step1": 1}]


def test_what_stays_in_a_rank_sends_nothing() -> None:
    """A pause, and a look at one's own value, are nobody else's business."""
    seen = predicted(Own(0, "a", (7.0,)), Pause(0, 5.0), Local(0, "a"), Pause(2))
    assert sends(seen) == [[], [], []]
    assert seen.steps[2].value == [7.0]


@pytest.mark.parametrize("flavour", ["python", "script"])
def test_a_function_that_raises_sends_what_one_that_does_not_sends(flavour: Flavour) -> None:
    """The answer is an error instead of a value; a Python function has run all the same."""
    seen = predicted(Call(0, 1, flavour=flavour, raises=True))
    assert sends(seen) == sends(predicted(Call(0, 1, flavour=flavour)))
    assert [step.error for step in seen.steps] == ["remote"]
    assert dict(seen.calls[1]) == ({"step0": 1} if flavour == "python" else {})


def test_a_value_that_was_never_made_raises_wherever_it_is_used() -> None:
    """The creation itself shows nothing; a fetch, a call with it and a call through it do."""
    seen = predicted(
        Remote(0, 1, "a", raises=True),
        Fetch(0, "a"),
        Call(0, 1, right="a"),
        Share(0, "a", 1, "o"),
        Local(1, "o"),
        Through(0, "a"),
        Remote(0, 2, "b", right="a"),
        Fetch(0, "b"),
        Drop(0, "a"),
    )
    errors = [step.error for step in seen.steps]
    assert errors == ["", "remote", "remote", "", "remote", "remote", "", "remote", ""]


def test_retained_gradients_add_up() -> None:
    """A second backward pass adds the same gradient again, and sends nothing that can fail."""
    once, twice = predicted(Context(0, "x", (1,))), predicted(Context(0, "x", (1,), retain=True))
    assert twice.steps[0].value["gradient"] == [2 * x for x in once.steps[0].value["gradient"]]
    assert sends(once) == sends(twice)


def test_a_backward_that_breaks_gives_the_loss_and_no_gradient() -> None:
    """The context ends and is cleaned up as ever."""
    whole, broken = predicted(Context(0, "x", (1, 2))), predicted(Context(0, "x", (1, 2), breaks=2))
    assert broken.steps[0].value == {"loss": 70.0, "broke": True}
    assert sends(broken) == sends(whole)
    assert broken.known_bugs == frozenset()


@pytest.mark.parametrize("path", [(1, 0), (1, 2, 1)])
def test_a_backward_that_breaks_and_comes_by_a_rank_twice_is_a_known_finding(
    path: tuple[int, ...],
) -> None:
    """torch then forgets who waits; the program is marked, and its prediction is the promise."""
    seen = predicted(Context(0, "x", path, breaks=1))
    assert seen.known_bugs == {"failed-backward-revisits-rank", "freed-context-used"}
    assert seen.counters == (NOTHING,) * 3
    assert predicted(Context(0, "x", path)).known_bugs == frozenset()


def test_branches_send_what_their_steps_send_one_after_the_other() -> None:
    """At once or in turn: values, messages, counters and calls by number are the same."""
    branches: tuple[tuple[Leaf, ...], ...] = (
        (Remote(0, 1, "a"), Fetch(0, "a"), Share(0, "a", 2, "b")),
        (Call(1, 2), Count(1, 0)),
        (Context(2, "x", (0,)), Own(2, "c")),
    )
    at_once = predicted(Parallel(branches))
    assert at_once == predicted(*branches[0], *branches[1], *branches[2])
    assert len(at_once.steps) == 7
    assert dict(at_once.calls[0]) == {"step4": 1, "step5": 1}


def test_a_fork_request_and_its_delete_share_one_budget() -> None:
    """The two have one payload, and the agent counts by payload: what the first spends is gone.

    Rank 2 asks for a fork (3 failures) and later deletes it (none left). Rank 0 deletes its own
    fork, which it never asked for: 3 failures.
    """
    steps = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Drop(2, "b"))
    both, delete, fork = (FaultTable(armed, 3) for armed in ([FORK, DELETE], [DELETE], [FORK]))
    assert failures(*steps, table=both) == [{DELETE: 3}, {}, {FORK: 3}]
    assert failures(*steps, table=delete) == [{DELETE: 3}, {}, {DELETE: 3}]
    assert failures(*steps, table=fork) == [{}, {}, {FORK: 3}]


def test_each_fork_has_a_budget_of_its_own() -> None:
    """Two forks at one rank fail separately: two requests of 2 failures each at rank 2."""
    steps = (
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b"),
        Share(0, "a", 2, "c"),
        Drop(0, "a"),
        Drop(2, "b"),
        Drop(2, "c"),
    )
    assert failures(*steps, table=FaultTable(RETRYABLE_MESSAGE_TYPES, 2)) == [
        {DELETE: 2},
        {},
        {FORK: 4, ACCEPT: 4},
    ]


def test_a_table_of_one_rank_fails_that_ranks_sends_only() -> None:
    """Failures happen on the sender, so only the faulty rank's messages count."""
    steps = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Drop(2, "b"))
    seen = predicted(*steps, plan=FaultPlan(by_rank={0: FaultTable([DELETE], 5)}))
    assert [dict(by_type) for by_type in seen.failures()] == [{DELETE: 5}, {}, {}]


def test_a_count_of_zero_or_no_types_fails_nothing() -> None:
    """Types without a count, or a count without types, leave every send alone."""
    for table in (FaultTable(), FaultTable(RETRYABLE_MESSAGE_TYPES, 0), FaultTable((), 5)):
        assert failures(Remote(0, 1, "a"), Drop(0, "a"), table=table) == [{}, {}, {}]


def test_a_star_of_a_context_is_cleaned_up_from_its_centre() -> None:
    """Rank 0 sends a cleanup to each of its three peers, and each of them one back.

    The three of rank 0 have one payload, so all together fail 4 times, and so does each peer's one.
    """
    star, table = Context(0, "x", (1, 2, 3)), FaultTable([CLEANUP], 4)
    seen = predicted(star, world_size=4)
    assert sends(seen) == [[CLEANUP] * 3, [CLEANUP], [CLEANUP], [CLEANUP]]
    assert failures(star, table=table, world_size=4) == [{CLEANUP: 4}] * 4


def test_a_chain_of_a_context_is_cleaned_up_link_by_link() -> None:
    """In 0 -> 1 -> 2 -> 3 the ends know one rank each, the middle two each."""
    chain, table = Context(0, "x", (1, 2, 3), nested=True), FaultTable([CLEANUP], 20)
    seen = predicted(chain, world_size=4)
    assert sends(seen) == [[CLEANUP], [CLEANUP] * 2, [CLEANUP] * 2, [CLEANUP]]
    assert failures(chain, table=table, world_size=4) == [{CLEANUP: 20}] * 4


def test_two_contexts_have_two_payloads() -> None:
    """Each context's cleanup has a budget of its own: two of 3 failures at both ranks."""
    two, table = (Context(0, "x", (1,)), Context(0, "y", (1,))), FaultTable([CLEANUP], 3)
    assert sends(predicted(*two, world_size=2)) == [[CLEANUP] * 2, [CLEANUP] * 2]
    assert failures(*two, table=table, world_size=2) == [{CLEANUP: 6}] * 2


def test_a_context_that_nobody_else_took_part_in_needs_no_cleanup() -> None:
    """Without a path no other rank has the context, and nothing is sent."""
    seen = predicted(Context(0, "x"))
    assert sends(seen) == [[], [], []]


def test_calls_inside_a_context_travel_under_another_name() -> None:
    """Inside a context only the deletes of its RRefs and the cleanup can be failed or delayed.

    Rank 0 creates an RRef on 1 and one on 2: two deletes. Then two cleanups, and one from each.
    """
    star = Context(0, "x", (1, 2), rrefs=True)
    seen = predicted(star)
    assert sends(seen) == [[DELETE, DELETE, CLEANUP, CLEANUP], [CLEANUP], [CLEANUP]]
    assert failures(star, table=FaultTable([DELETE], 2)) == [{DELETE: 4}, {}, {}]


def test_a_nested_context_makes_one_rref() -> None:
    """Only the first hop of a nested path is a ``remote``; the others are calls."""
    seen = predicted(Context(0, "x", (1, 2), rrefs=True, nested=True))
    assert sends(seen) == [[DELETE, CLEANUP], [CLEANUP, CLEANUP], [CLEANUP]]


def test_a_context_gives_loss_and_gradient() -> None:
    """x squared, then 3y + 1 at rank 1 and 4y + 1 at rank 2, for x of 1 and 2.

    1 -> 1 -> 4 -> 17 and 2 -> 4 -> 13 -> 53: the loss is 70. The slope is 2x * 3 * 4: 24 and 48.
    """
    seen = predicted(Context(0, "x", (1, 2)), Context(0, "y", (1, 2), backward=False, raises=True))
    assert seen.steps[0].value == {"loss": 70.0, "gradient": [24.0, 48.0]}
    assert seen.steps[1].value == {"loss": 70.0, "raised": True}


def test_delays_count_per_send() -> None:
    """A delay holds up every send of its type, whatever its payload.

    Rank 0 creates once and fetches three times; it cleans up a context at two peers.
    """
    seen = predicted(
        Remote(0, 1, "a"), Fetch(0, "a"), Fetch(0, "a"), Fetch(0, "a"), Context(0, "x", (1, 2))
    )
    plan = FaultPlan(FaultTable(messages_to_delay={FETCH: 0.5, CLEANUP: 0.25, REMOTE: 0.0001}))
    # A delay below a millisecond is none.
    assert seen.delays(plan) == ({FETCH: 3, CLEANUP: 2}, {CLEANUP: 1}, {CLEANUP: 1})


def test_delays_and_failures_of_one_message_are_counted_apart() -> None:
    """A delete that fails twice is sent late once, when it passes."""
    plan = FaultPlan(FaultTable([DELETE], 2, {"RREF_USER_DELETE": 1.0}))
    seen = predicted(Remote(0, 1, "a"), Drop(0, "a"), plan=plan)
    assert seen.failures() == ({DELETE: 2}, {}, {})
    assert seen.delays(plan) == ({DELETE: 1}, {}, {})


def test_an_owner_counts_the_forks_that_live() -> None:
    """After each step, the owner holds one value while there are forks, and the number of forks."""
    seen = predicted(
        Remote(0, 1, "a"),
        Settle(),  # the creator's fork
        Share(0, "a", 2, "b"),
        Settle(),  # and rank 2's
        Share(0, "a", 1, "o"),
        Settle(),  # the owner's own handle is no fork
        Drop(0, "a"),
        Settle(),
        Drop(2, "b"),
        Settle(),  # only the owner's handle is left, which its table does not hold
        Drop(1, "o"),
    )
    forks = [seen.steps[index].counters[1].forks for index in (1, 3, 5, 7, 9)]
    owners = [seen.steps[index].counters[1].owners for index in (1, 3, 5, 7, 9)]
    assert forks == [1, 2, 2, 1, 0]
    assert owners == [1, 1, 1, 1, 0]
    for index in (1, 3, 5, 7, 9):
        assert seen.steps[index].counters[0] == seen.steps[index].counters[2] == NOTHING
    assert seen.counters == (NOTHING,) * 3


def test_a_value_that_only_its_owner_holds_is_in_no_table() -> None:
    """What a rank owns itself counts only once somebody else uses it."""
    seen = predicted(Own(0, "a"), Settle(), Share(0, "a", 1, "b"), Settle(), Drop(0, "a"), Settle())
    assert seen.steps[1].counters == (NOTHING,) * 3
    assert seen.steps[3].counters == (Counters(owners=1, forks=1), NOTHING, NOTHING)
    assert seen.steps[5].counters == (Counters(owners=1, forks=1), NOTHING, NOTHING)


def test_two_values_of_one_owner_add_up() -> None:
    """Rank 1 owns two values, with one fork at rank 0 and two forks at ranks 0 and 2."""
    seen = predicted(Remote(0, 1, "a"), Remote(0, 1, "b"), Share(0, "b", 2, "c"))
    assert seen.counters == (NOTHING, Counters(owners=2, forks=3), NOTHING)


def test_calls_are_counted_where_they_run() -> None:
    """Python functions count at the rank that runs them; builtin and script ones cannot count.

    Step 0 runs at 1, step 1 nowhere visible, step 2 at 2 (it keeps a handle), step 3 at 0, step 4
    at 1 and, nested, at 2.
    """
    seen = predicted(
        Remote(0, 1, "a"),
        Call(0, 1, flavour="script"),
        Share(0, "a", 2, "b"),
        Call(1, 0),
        Nest(0, 1, 2, "n"),
    )
    assert [dict(calls) for calls in seen.calls] == [
        {"step3": 1},
        {"step0": 1, "step4": 1},
        {"step2": 1, "step4/nested": 1},
    ]


def test_each_hop_of_a_context_is_a_call() -> None:
    """A path that comes by a rank twice runs there twice."""
    seen = predicted(Context(0, "x", (1, 2, 1)))
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 2}, {"step0": 1}]


def test_a_bump_shows_at_every_handle_and_in_no_other_value() -> None:
    """Handles of one value see one another's bumps; values that were read before do not change."""
    seen = predicted(
        Own(0, "a", (1.0,)),
        Share(0, "a", 1, "b"),
        Own(0, "z", (1.0,)),
        Fetch(1, "b"),
        Bump(0, "a"),
        Bump(1, "b"),
        Fetch(0, "a"),
        Fetch(0, "z"),
    )
    assert [step.value for step in seen.steps[3:]] == [[1.0], [2.0], [3.0], [3.0], [1.0]]


@pytest.mark.parametrize(
    ("timeout", "delay", "error"),
    [
        (None, 2.0, ""),
        (0.2, 1.0, "timeout"),
        (0.75, 1.0, "timeout"),  # by exactly the quarter second that is clear enough
        (0.76, 1.0, "unknown"),
        (1.0, 1.0, "unknown"),
        (60.9, 1.0, "unknown"),
        (61.0, 1.0, ""),  # a minute to come back in
        (601.0, 1.0, ""),
        (0.2, 0.0, "unknown"),  # without a delay the answer alone must be in time
        (60.0, 0.0, ""),
    ],
)
@pytest.mark.parametrize(
    ("flavour", "message"), [("python", CALL), ("builtin", SCRIPT_CALL), ("script", SCRIPT_CALL)]
)
def test_a_timeout_is_sure_only_when_it_is_clear_of_the_delay(
    timeout: float | None, delay: float, error: str, flavour: Flavour, message: MessageType
) -> None:
    """Well below the delay it must come, a minute above it must not, between both are right."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={message: delay})})
    (step,) = predicted(Call(0, 1, timeout=timeout, flavour=flavour), plan=plan).steps
    assert step.error == error
    assert step.value == (None if error == "timeout" else [3.0])


def test_only_the_callers_delay_of_the_calls_own_type_makes_it_late() -> None:
    """Another rank's delay, or another message's, has no part in a call's timeout."""
    late = FaultTable(messages_to_delay={CALL: 2.0})
    plans = [
        FaultPlan(by_rank={1: late}),
        FaultPlan(by_rank={0: FaultTable(messages_to_delay={SCRIPT_CALL: 2.0})}),
    ]
    for plan in plans:
        assert predicted(Call(0, 1, timeout=0.2), plan=plan).steps[0].error == "unknown"
        assert predicted(Call(0, 1, timeout=90), plan=plan).steps[0].error == ""


FORK_FAILS_5 = FaultTable([FORK], 5)


@pytest.mark.parametrize(
    ("table", "timeout", "error"),
    [
        (FORK_FAILS_5, 8.875, "timeout"),  # 1 + 1 + 1.5 + 2.25 + 3.375 s between six tries
        (FORK_FAILS_5, 8.9, "unknown"),
        (FORK_FAILS_5, 69.1, "unknown"),
        (FORK_FAILS_5, 69.125, ""),
        (FaultTable([FORK], 2, {"RREF_FORK_REQUEST": 3.0}), 4.75, "timeout"),
        (FaultTable([FORK], 2, {"RREF_FORK_REQUEST": 3.0}), 65.0, ""),
        # Accepts and deletes need not hold the answer up, and may.
        (FaultTable(messages_to_delay={"RREF_CHILD_ACCEPT": 3.0}), 2.0, "unknown"),
        (FaultTable(messages_to_delay={"RREF_CHILD_ACCEPT": 3.0}), 62.9, "unknown"),
        (FaultTable(messages_to_delay={"RREF_CHILD_ACCEPT": 3.0}), 63.0, ""),
        (FaultTable([ACCEPT, DELETE], 5), 60.0, ""),  # nobody waits for their retries
    ],
)
@pytest.mark.parametrize("step", [Share(0, "a", 2, "b"), Call(0, 2, right="a")])
def test_a_callee_waits_for_the_fork_requests_of_its_arguments(
    step: Share | Call, table: FaultTable, timeout: float, error: str
) -> None:
    """What they wait for at the rank that sends them counts against the timeout of the caller."""
    timed = replace(step, timeout=timeout)
    plan = FaultPlan(by_rank={2: table})
    seen = predicted(Remote(0, 1, "a"), timed, plan=plan)
    assert seen.steps[1].error == error
    assert seen.certain is (error != "unknown")


def test_a_function_waits_for_the_value_of_its_argument() -> None:
    """The delay of its fetch counts against the caller's timeout, and that of the caller's own."""
    table = FaultTable(messages_to_delay={FETCH: 3.0})
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={CALL: 1.0}), 2: table})
    for timeout, error in ((3.75, "timeout"), (3.8, "unknown"), (63.9, "unknown"), (64.0, "")):
        seen = predicted(Remote(0, 1, "a"), Call(0, 2, right="a", timeout=timeout), plan=plan)
        assert seen.steps[1].error == error


@pytest.mark.parametrize(
    "steps",
    [
        (Remote(0, 2, "a"), Share(0, "a", 2, "b", timeout=60.0)),
        (Own(0, "a"), Share(0, "a", 2, "b", timeout=60.0)),
        (Remote(0, 1, "a"), Call(0, 2, timeout=60.0)),
        (Remote(0, 1, "a"), Share(0, "a", 2, "c"), Call(0, 2, timeout=60.0)),
    ],
)
def test_no_fork_request_is_no_wait(steps: tuple[Leaf, ...]) -> None:
    """To its owner, from its owner, without an RRef, or after another call has sent it: none."""
    seen = predicted(*steps, plan=FaultPlan(by_rank={2: FORK_FAILS_5}))
    assert [step.error for step in seen.steps] == [""] * len(steps)


def test_a_creation_waits_for_the_fork_requests_of_its_argument() -> None:
    """Shorter than the wait it fails, a minute longer it does not, and between it is refused.

    Until torch has marked it as failed, a use may raise nothing; a settle waits for that.
    """

    def created(timeout: float, *between: Leaf) -> list[str]:
        made = Remote(0, 2, "b", right="a", timeout=timeout)
        steps = (Remote(0, 1, "a"), made, *between, Fetch(0, "b"))
        seen = predicted(*steps, plan=FaultPlan(by_rank={2: FORK_FAILS_5}))
        return [one.steps[-1].error for one in (seen, *seen.alternatives)]

    assert created(8.875) == ["", "creation"]
    assert created(8.875, Settle()) == ["creation"]
    assert created(69.125) == [""]
    with pytest.raises(UsageError, match=r"takes 9\.125 to 9\.125 s .* let the timeout be 60 s"):
        created(69.0)


def test_a_value_under_way_may_hold_up_who_asks_for_it() -> None:
    """Until a settle or an answer, what its creation waits for is added; how much is not known."""
    plan = FaultPlan(by_rank={2: FORK_FAILS_5})
    made = (Remote(0, 1, "a"), Remote(0, 2, "b", right="a"))

    def last(*steps: Leaf) -> str:
        return predicted(*made, *steps, plan=plan).steps[-1].error

    for timeout, error in ((5.0, "unknown"), (69.0, "unknown"), (69.125, "")):
        assert last(Fetch(0, "b", timeout=timeout)) == error
        assert last(Call(0, 1, right="b", timeout=timeout)) == error
        assert last(Through(0, "b", timeout=timeout)) == error
    assert last(Settle(), Fetch(0, "b", timeout=60.0)) == ""
    assert last(Fetch(0, "b"), Fetch(0, "b", timeout=60.0)) == ""
    assert last(Fetch(0, "b", timeout=60.0), Fetch(0, "b", timeout=60.0)) == "unknown"


def test_a_call_that_times_out_still_runs() -> None:
    """The message is delivered late all the same: it counts as a call, a send and a delay."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={CALL: 2.0})})
    seen = predicted(Call(0, 1, timeout=0.2), plan=plan)
    assert seen.steps[0].error == "timeout"
    assert [dict(calls) for calls in seen.calls] == [{}, {"step0": 1}, {}]
    assert seen.delays(plan) == ({CALL: 1}, {}, {})


def test_an_ended_context_is_refused() -> None:
    """The prediction for a refusal says so, whatever the rank."""
    seen = predicted(Context(0, "x", (1,)), Settle(), Refused(1, "x"), Refused(2, "x"))
    assert [step.value for step in seen.steps[2:]] == [{"refused": True}] * 2


@pytest.mark.parametrize(
    "table",
    [
        FaultTable([DELETE, FORK, ACCEPT], 5),
        FaultTable([CLEANUP], 20),
        FaultTable([CALL], 0),
        FaultTable(messages_to_delay=dict.fromkeys(MessageType, 2.0)),
    ],
)
def test_a_plan_within_the_budget_is_predicted(table: FaultTable) -> None:
    """As many failures as there are retries, and any delays, change no value."""
    assert predicted(Remote(0, 1, "a"), Fetch(0, "a"), plan=FaultPlan(table)).steps[1].value == [
        3.0
    ]


def test_a_plan_of_a_larger_world_is_refused() -> None:
    """A plan with faults at a rank that the program has not is no plan for it."""
    with pytest.raises(UsageError, match="rank 3, but a world of 3"):
        predicted(Own(0, "a"), plan=FaultPlan(by_rank={3: FaultTable([DELETE], 1)}))


def test_a_plan_beyond_the_budget_at_a_rank_that_is_not_there_does_not_count() -> None:
    """The default of a plan whose every rank is named makes nobody faulty."""
    plan = FaultPlan(FaultTable([CALL], 1), {0: FaultTable(), 1: FaultTable()})
    seen = predicted(Own(0, "a"), world_size=2, plan=plan)
    assert seen.counters == (NOTHING, NOTHING)


def test_every_send_is_of_an_injectable_type_and_counted_once() -> None:
    """The totals over ranks and types are those of the list of sends, each failing once."""
    program = Program(
        3,
        (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Fetch(2, "b"), Drop(0, "a"), Drop(2, "b")),
    )
    seen = predict(program, NONE)
    total = sum(
        (
            Counter(d)
            for d in seen.delays(
                FaultPlan(FaultTable(messages_to_delay=dict.fromkeys(MessageType, 0.001)))
            )
        ),
        Counter(),
    )
    assert total == Counter(send.message for send in seen.sends)


@pytest.mark.parametrize("program", [*shipped_programs()[::3], *EVERY_KIND], ids=lambda p: p.name)
def test_a_larger_world_has_idle_ranks_alone(program: Program) -> None:
    """What the program's own ranks must show is the same; the others hold and send nothing."""
    tables = (FaultTable(), FaultTable(RETRYABLE_MESSAGE_TYPES, 2), FaultTable(["PYTHON_CALL"], 1))
    for plan in map(FaultPlan, tables):
        own, wide = predict(program, plan), predict_in(program, plan, program.world_size + 1)
        idle = {"counters": Counters(), "retried": 0, "calls": {}}
        idle |= {"abandoned_calls": frozenset(), "contexts_left": range(1)}
        steps = [
            replace(
                step,
                counters=(*step.counters, Counters()) if step.counters else (),
                failures=(*step.failures, 0) if step.counters else (),
                calls=(*step.calls, {}) if step.counters else (),
            )
            for step in own.steps
        ]
        added: dict[str, Any] = {name: (*getattr(own, name), value) for name, value in idle.items()}
        expected = replace(own, steps=tuple(steps), **added)
        # A shutdown that waits for one rank may keep every other one.
        met = {one for one in wide.met if one.rank != program.world_size}
        assert all("shutdown" in one.says for one in wide.met - met)
        wide_alone = replace(wide, alternatives=(), met=frozenset(met))
        assert wide_alone == replace(expected, alternatives=())
        assert len(wide.alternatives) == len(own.alternatives)
