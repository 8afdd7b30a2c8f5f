"""The sorts of value that hold RRefs, are slow or are counted: what is predicted of each."""

from __future__ import annotations

from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import Prediction, predict
from rpcprops.outcomes import Counters
from rpcprops.programs import Carry, Program, Settle
from rpcprops.programs.threads import threads_of
from rpcprops.steps.values import PACKED, SORTS, Way, _able
from rpcprops.torch_facts import VERSIONS, facts_of

CALL = MessageType.PYTHON_CALL
CREATION = MessageType.PYTHON_REMOTE_CALL
FETCH = MessageType.PYTHON_RREF_FETCH_CALL
TYPED_FETCH = MessageType.SCRIPT_RREF_FETCH_CALL
DELETE = MessageType.RREF_USER_DELETE
ACCEPT = MessageType.RREF_CHILD_ACCEPT
HOLDING = ("rref", "rref-dataclass", "rref-exception", "rref-partial")


def predicted(step: Carry, plan: FaultPlan | None = None) -> Prediction:
    """What a program of that step alone must show."""
    return predict(Program(2, (step, Settle())), plan or FaultPlan())


def sent(step: Carry) -> list[tuple[int, MessageType]]:
    """What a step alone sends, and from which rank."""
    return [(send.rank, send.message) for send in predicted(step).sends]


@pytest.mark.parametrize("sort", HOLDING)
def test_an_rref_is_fetched_wherever_its_holder_arrives(sort: str) -> None:
    """A value that holds an RRef forks it for each message, and leaves nothing behind."""
    assert sent(Carry(0, 1, sort, "result")) == [(0, CALL), (0, TYPED_FETCH), (0, DELETE)]
    echoed = [(0, CALL), (1, TYPED_FETCH), (0, ACCEPT), (1, DELETE)]
    assert sent(Carry(0, 1, sort, "echo")) == echoed
    for way in SORTS[sort].ways:
        for to in (0, 1):
            found = predicted(Carry(0, to, sort, way))
            assert found.steps[0].value == {"differs": ""}
            assert not any(held.owners or held.forks for held in found.counters)


@pytest.mark.parametrize("sort", HOLDING)
def test_an_rref_may_be_the_value_of_another(sort: str) -> None:
    """Who fetches the outer RRef gets a fork of the inner one, which the same rank owns."""
    fetches = [(1, FETCH), (1, TYPED_FETCH)]
    assert sent(Carry(0, 1, sort, "own")) == [(0, CALL), *fetches, (1, DELETE), (1, DELETE)]
    # Its owner gets the inner RRef itself.
    assert sent(Carry(0, 0, sort, "own")) == [(0, CALL)]


def test_an_rref_in_an_rref_is_lost_with_its_fetch() -> None:
    """Where a fetch fails, the function has raised, and has dropped all that it got."""
    for message in (FETCH, TYPED_FETCH):
        lost = FaultPlan(by_rank={1: FaultTable([message], 1)})
        found = predicted(Carry(0, 1, "rref", "own"), lost)
        assert found.steps[0].error == "remote"
        assert not any(held.owners or held.forks for held in found.counters)
    # The outer RRef was forked when its call was written.
    lost = FaultPlan(FaultTable([CALL], 1))
    assert predicted(Carry(0, 1, "rref", "own"), lost).counters[0].owners == 1


@pytest.mark.parametrize(
    ("sort", "error"), [("rref-closure", "AttributeError"), ("lock-and-rref", "TypeError")]
)
def test_what_is_refused_before_an_rref_is_forked_leaves_nothing(sort: str, error: str) -> None:
    """The caller's pickler refuses it as an argument, the callee's as a result."""
    refusals: dict[Way, str] = {"echo": error, "async": error, "remote-echo": error}
    for way in SORTS[sort].ways:
        found = predicted(Carry(0, 1, sort, way))
        assert found.steps[0].value == {"refused": refusals.get(way, "RuntimeError")}
        assert found.calls[1] == ({} if way in refusals else {"step0": 1})
        assert not any(held.owners or held.forks for held in found.counters)
        assert not found.met


@pytest.mark.parametrize(
    ("way", "at", "to"),
    [
        ("result", {"unpickled": 1}, {"": 1, "pickled": 1}),
        ("echo", {"pickled": 1, "unpickled": 1}, {"": 1, "pickled": 1, "unpickled": 1}),
        ("async", {"pickled": 1, "unpickled": 1}, {"": 1, "pickled": 1, "unpickled": 1}),
        ("remote", {"unpickled": 1}, {"": 1, "pickled": 1}),
        ("remote-echo", {"pickled": 1, "unpickled": 1}, {"": 1, "pickled": 1, "unpickled": 1}),
        ("own", {"pickled": 1}, {"": 1, "unpickled": 1}),
    ],
)
def test_a_value_is_pickled_and_unpickled_once_for_each_message(
    way: Way, at: dict[str, int], to: dict[str, int]
) -> None:
    """What a message carries, its sender pickles once and its receiver unpickles once."""

    def named(counts: dict[str, int]) -> dict[str, int]:
        return {f"step0/{name}".rstrip("/"): number for name, number in counts.items()}

    assert predicted(Carry(0, 1, "counted", way)).calls == (named(at), named(to))


def test_what_is_lost_was_pickled_and_is_never_unpickled() -> None:
    """The faulty agent fails a call whose argument has been pickled; a fetch carries none."""
    lost = FaultPlan(FaultTable([CALL], 1))
    assert predicted(Carry(0, 1, "counted", "echo"), lost).calls == ({"step0/pickled": 1}, {})
    lost = FaultPlan(FaultTable([FETCH], 1))
    assert predicted(Carry(0, 1, "counted", "own"), lost).calls == ({}, {"step0": 1})


def test_an_owner_pickles_nothing_for_itself() -> None:
    """Who fetches a value of its own gets the value itself."""
    for way in ("remote", "own"):
        assert predicted(Carry(0, 0, "counted", way)).calls == ({"step0": 1}, {})
    # A call to itself has arguments all the same.
    echoed = {"step0": 1, "step0/pickled": 1, "step0/unpickled": 1}
    assert predicted(Carry(0, 0, "counted", "remote-echo")).calls == (echoed, {})


@pytest.mark.parametrize(
    ("sort", "to", "shows", "called", "messages"),
    [
        ("list", 1, {"differs": ""}, 1, [CREATION, FETCH, DELETE]),
        ("list", 0, {"differs": ""}, 1, [CREATION]),
        ("lock", 1, {"refused": "TypeError"}, 0, []),
        ("sparse_csr", 1, {"refused": "RuntimeError"}, 1, [CREATION, FETCH, DELETE]),
        ("sparse_csr", 0, {"differs": ""}, 1, [CREATION]),
        # The user that was made before the agent looked is deleted, and never was at the owner.
        ("meta", 1, {"refused": "RuntimeError"}, 0, [DELETE]),
        ("meta", 0, {"refused": "RuntimeError"}, 0, []),
        # The RRef has an error, which is the owner's to tell only where it read the call.
        ("raises-unpickled", 1, {"refused": "RuntimeError"}, 0, [CREATION, DELETE]),
        ("raises-unpickled", 0, {"refused": "RuntimeError"}, 0, [CREATION]),
        ("missing-unpickled", 1, {"refused": "AttributeError"}, 0, [CREATION, FETCH, DELETE]),
        ("missing-unpickled", 0, {"refused": "AttributeError"}, 0, [CREATION]),
    ],
)
def test_an_argument_of_remote_comes_back_or_is_refused_and_leaves_nothing(
    sort: str, to: int, shows: dict[str, str], called: int, messages: list[MessageType]
) -> None:
    """What is refused is refused by the caller's pickler or agent, by the owner, or by a fetch."""
    found = predicted(Carry(0, to, sort, "remote-echo"))
    assert found.steps[0].value == shows
    assert found.calls[to].get("step0", 0) == called
    assert [send.message for send in found.sends if send.rank == 0] == messages
    assert found.counters == (Counters(), Counters())


@pytest.mark.parametrize("to", [0, 1])
def test_an_rref_that_is_never_made_raises_whatever_else_becomes_of_its_creation(to: int) -> None:
    """A creation that the faulty agent fails leaves an RRef that raises, too."""
    lost = FaultPlan(FaultTable([CREATION], 1))
    found = predicted(Carry(0, to, "raises-unpickled", "remote-echo"), lost)
    assert found.steps[0].value == {"refused": "RuntimeError"}
    assert not found.known_bugs
    # It comes before what TensorPipe's agent refuses.
    assert predicted(Carry(0, to, "meta", "remote-echo"), lost).steps[0].error == "creation"


@pytest.mark.parametrize("way", ["result", "echo", "async"])
def test_how_long_a_value_takes_to_be_unpickled_leaves_it_open_what_a_timeout_does(
    way: Way,
) -> None:
    """Only the callee's part of that time counts against the timeout, and the caller's does not."""

    def ends(timeout: float) -> str:
        return predicted(Carry(0, 1, "slow-unpickled", way, timeout)).steps[0].error

    assert Carry(0, 1, "slow-unpickled", way).lasts == 1.0
    assert (ends(1.1), ends(700.0)) == ("unknown", "")


def test_the_caller_has_a_thread_that_unpickles() -> None:
    """Where ranks have few threads, one of the caller's is counted as busy, too."""
    slow, other = (Program(2, (Carry(0, 1, sort),)) for sort in ("slow-unpickled", "slow"))
    assert threads_of(slow).sleeping == {0: 1, 1: 1}
    assert threads_of(other).sleeping == {1: 1}


@pytest.mark.parametrize("sort", ["counted", "rref-partial", "large"])
def test_a_timeout_of_what_is_counted_or_forked_is_refused(sort: str) -> None:
    """A late answer was pickled and forked, and nobody unpickles it."""
    step: Any = Carry(0, 1, sort, timeout=3.0)
    with pytest.raises(UsageError, match="use a value without RRefs that is neither counted"):
        Program(2, (step,))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_drawn_for_a_torch_is_accepted(version: str) -> None:
    """Each sort and way that a draw may choose makes a program, whatever that torch has mended."""
    able = _able(None, facts_of(version))
    assert able.keys() >= {"float", "quint8"}
    for sort, ways in able.items():
        for way in ways:
            assert Program(2, (Carry(0, 1, sort, way), Settle())).steps


@pytest.mark.parametrize("sort", PACKED)
def test_packed_tensors_travel_where_torch_does_not_check_their_storage(sort: str) -> None:
    """Until torch 2.12 they are values like others; later torch must refuse them."""
    for way in SORTS[sort].ways:
        program = Program(2, (Carry(0, 1, sort, way), Settle()))
        before = predict(program, FaultPlan(), facts_of("2.12.1"))
        assert before.steps[0].value == {"differs": ""}
        assert not before.met
        for version in ("2.13.0", ""):
            after = predict(program, FaultPlan(), facts_of(version))
            assert after.steps[0].value == {"refused": "RuntimeError"}
            assert after.known_bugs == {"unreadable-tensor"}
