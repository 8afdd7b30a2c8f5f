"""Seeded defects of the promises about single messages, in made-up runs of their own cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import judge
from rpcprops.outcomes import Outcome
from rpcprops.programs import (
    Call,
    Context,
    Count,
    Drop,
    Fetch,
    Leaf,
    Own,
    Program,
    Remote,
    Settle,
    Share,
    Step,
)
from rpcprops.properties import PROPERTIES
from tests._draws import draws
from tests.seeded._corpus import World
from tests.seeded._ideal import (
    LEAKING,
    calling,
    hanging,
    holding,
    place,
    settled_with,
    with_rank,
    with_step,
)

Place: TypeAlias = tuple[str, int | None, int | None]
Wrongs: TypeAlias = Iterator[tuple[Outcome, list[Place]]]

#: In how many different cases each defect is planted, at the least.
_CASES = 4
#: The number of draws of each property. Half of those of a lost answer are about no gradient.
_DRAWS = {"executed-twice": 14, "any-order": 12, "unanswered-calls": 28}
_DRAWS["unanswered-in-context"] = 60


#: Requests that come after the timeout of their step, and what follows them.
_AFTER_TIMEOUT: tuple[tuple[tuple[Step, ...], str, float], ...] = (
    ((Call(0, 1, timeout=5.0), Call(0, 1), Settle(), Call(1, 0)), "PYTHON_CALL", 8.0),
    ((Call(0, 1, flavour="script", timeout=5.0), Call(0, 1)), "SCRIPT_CALL", 8.0),
    ((Call(0, 1), Call(0, 1, timeout=2.0), Settle(), Count(1, 0)), "PYTHON_CALL", 4.0),
    ((Count(0, 1, timeout=2.0), Settle(), Count(0, 1), Call(1, 0)), "PYTHON_CALL", 90.0),
    ((Count(0, 1), Settle(), Count(0, 1, timeout=1.0), Call(1, 1)), "PYTHON_CALL", 2.0),
    ((Call(0, 1), Own(0, "a"), Count(0, 1, timeout=1.0), Settle()), "PYTHON_CALL", 2.0),
)


def _after_timeout() -> Iterator[World]:
    for steps, message, delay in _AFTER_TIMEOUT:
        program = Program(2, steps)
        calls = [x for x in steps if isinstance(x, Call | Count) and x.at == 0]
        n = 1 + [x.timeout is not None for x in calls].index(True)
        late = MessageFault(0, "delay", message, to=1, n=n, delay=delay)
        yield World.of(program, FaultPlan(others=(late,)))


def _too_late() -> Iterator[World]:
    """Messages with RRefs that come after their timeout, and what torch tries again that does."""
    first: tuple[Step, ...] = (Remote(0, 1, "a"), Settle())
    late: dict[str, Any] = {"action": "delay", "delay": 70.0}
    call = MessageFault(0, message="PYTHON_CALL", **late)
    share, drop = Share(0, "a", 2, "b"), Drop(0, "a")
    for steps, fault in (
        ((*first, share, drop, Settle(), Fetch(2, "b")), call),
        ((*first, share, Settle(), Fetch(2, "b"), Drop(2, "b")), call),
        ((*first, Share(0, "a", 1, "b"), drop, Settle(), Call(1, 0)), call),
        ((*first, Call(0, 2, right="a"), drop, Settle(), Call(1, 0)), call),
        ((*first, Fetch(0, "a"), drop), MessageFault(0, message="RREF_USER_DELETE", **late)),
        ((*first, share, drop), MessageFault(2, message="RREF_CHILD_ACCEPT", **late)),
    ):
        yield World.of(Program(3, steps, rpc_timeout=65.0), FaultPlan(others=(fault,)))


def _gradient_fails() -> Iterator[World]:
    for context in (Context(0, "x", (1, 2)), Context(0, "x", (1, 2), nested=True)):
        for at, to in context.gradients:
            fault = MessageFault(at, "fail", "BACKWARD_AUTOGRAD_REQ", to=to)
            program = Program(3, (context, Call(0, 1)), rpc_timeout=65.0)
            yield World.of(program, FaultPlan(others=(fault,)))


#: Cases that are written down, by a name for them.
_WRITTEN = {
    "after-timeout": _after_timeout,
    "too-late": _too_late,
    "gradient-fails": _gradient_fails,
}


@functools.cache
def worlds(name: str) -> tuple[World, ...]:
    """Cases of a property, each with the outcome that keeps every promise."""
    if name in _WRITTEN:
        return tuple(_WRITTEN[name]())
    cases = dict.fromkeys(draws(PROPERTIES[name].cases(), _DRAWS[name]))
    return tuple(World.of(case.program, case.plan) for case in cases)


def _told(world: World) -> Iterator[tuple[int, Any]]:
    """Each step that must raise the timeout because its answer is lost."""
    rows = zip(world.program.leaves, world.prediction.steps, strict=True)
    for index, (leaf, expected) in enumerate(rows):
        if expected.error == "timeout":
            yield index, leaf


def _broken(world: World) -> Iterator[tuple[int, Context, dict[str, Any]]]:
    """Each context whose backward must raise it."""
    rows = zip(world.program.leaves, world.prediction.steps, world.outcome.steps, strict=True)
    for index, (leaf, expected, seen) in enumerate(rows):
        if isinstance(leaf, Context) and expected.value and "broke" in expected.value:
            yield index, leaf, seen.value


def _ran_at(world: World, index: int) -> Iterator[int]:
    for rank, calls in enumerate(world.prediction.calls):
        if calls.get(f"step{index}") == 1:
            yield rank


def _times(world: World, times: int) -> Wrongs:
    for index, leaf in _told(world):
        for rank in _ran_at(world, index):
            assert isinstance(leaf, Leaf)
            wrong = calling(world.outcome, rank, {f"step{index}": times})
            yield wrong, [("NotRunOnce", rank, None)]


def _sent_again(world: World) -> Wrongs:
    yield from _times(world, 2)


def _never_run(world: World) -> Wrongs:
    yield from _times(world, 0)


def _has_late_answer(world: World) -> bool:
    return any(
        isinstance(one, MessageFault)
        and one.action == "delay"
        and one.message is not None
        and not one.message.is_request
        for one in world.plan.others
    )


def _late_answer_taken(world: World) -> Wrongs:
    yield from _given_all_the_same(world) if _has_late_answer(world) else ()


def _late_answer_kills(world: World) -> Wrongs:
    """The second completion of a future aborts the rank, as that of an unknown id does."""
    for _, leaf in _told(world) if _has_late_answer(world) else ():
        wrong = with_rank(world.outcome, leaf.at, signal="SIGABRT", exit_code=None)
        yield wrong, [("RankDied", leaf.at, None)]


def _given_all_the_same(world: World) -> Wrongs:
    for index, leaf in _told(world):
        if isinstance(leaf, Call | Count):
            yield with_step(world.outcome, index, error=None), [("MissingError", leaf.at, index)]


def _waited_for(world: World) -> Wrongs:
    for index, leaf in _told(world):
        cut = hanging(world.outcome, "run", leaf.at, index + 1)
        yield with_step(cut, index, ended=False, error=None), [("RankHung", leaf.at, None)]


def _with_broke(world: World, index: int, value: dict[str, Any], broke: str) -> Outcome:
    changed = {key: one for key, one in value.items() if key != "broke"}
    return with_step(world.outcome, index, value=changed | ({"broke": broke} if broke else {}))


def _silent_backward(world: World) -> Wrongs:
    for index, leaf, value in _broken(world):
        yield _with_broke(world, index, value, ""), [("MissingError", leaf.at, index)]


def _other_error(world: World) -> Wrongs:
    for index, leaf, value in _broken(world):
        wrong = _with_broke(world, index, value, "Error on Node 1: EOF: end of file")
        yield wrong, [("UnexpectedError", leaf.at, index)]


def _kept(what: str, promise: str) -> Callable[[World], Wrongs]:
    def found(world: World) -> Wrongs:
        for rank in range(world.program.world_size):
            held = world.outcome.ranks[rank].counters
            assert held is not None
            wrong = holding(world.outcome, rank, **{what: getattr(held, what) + 1})
            yield wrong, [(promise, rank, None)]

    return found


def _announced_again(world: World) -> Wrongs:
    """A copy of a fork request, or of a delete, leaves a fork at the owner."""
    for fault in world.plan.others:
        assert isinstance(fault, MessageFault)
        if str(fault.message) in ("RREF_FORK_REQUEST", "RREF_USER_DELETE"):
            assert fault.to is not None
            held = world.outcome.ranks[fault.to].counters
            assert held is not None
            wrong = holding(world.outcome, fault.to, owners=held.owners or 1, forks=held.forks + 1)
            yield wrong, [("RRefLeak", fault.to, None)]


def _reported_leak(world: World) -> Wrongs:
    if not world.prediction.graceful or world.prediction.leaking:
        return
    for rank in range(world.program.world_size):
        wrong = with_rank(world.outcome, rank, shutdown_error=LEAKING)
        yield wrong, [("RRefLeak", rank, None)]


def _another_value(world: World) -> Wrongs:
    rows = zip(world.program.leaves, world.outcome.steps, strict=True)
    for index, (leaf, seen) in enumerate(rows):
        if isinstance(seen.value, list) and seen.value:
            wrong = with_step(world.outcome, index, value=[*seen.value[:-1], 99.0])
            yield wrong, [("WrongValue", leaf.at, index)]


def _forgotten(world: World) -> Wrongs:
    """An owner has no value that a late message has still to bring to a rank."""
    for index, seen in enumerate(world.outcome.steps):
        for rank, held in enumerate(seen.counters):
            if held.owners:
                wrong = settled_with(world.outcome, index, rank, owners=0, forks=0)
                yield wrong, [("OwnerGone", rank, index)]


def _late_call(world: World) -> Wrongs:
    for index, seen in enumerate(world.outcome.steps):
        for rank in range(len(seen.counters)):
            wrong = settled_with(world.outcome, index, rank, server_async_calls=1)
            yield wrong, [("CallLeak", rank, index)]


_Defect: TypeAlias = tuple[str, str, Callable[[World], Wrongs]]
_DEFECTS: tuple[_Defect, ...] = (
    ("unanswered-calls", "a call whose answer is lost is sent again", _sent_again),
    ("unanswered-calls", "a call whose answer is lost never ran", _never_run),
    ("unanswered-calls", "the answer comes all the same", _given_all_the_same),
    ("unanswered-calls", "the caller waits for ever", _waited_for),
    ("unanswered-calls", "an answer that comes after it is taken", _late_answer_taken),
    ("unanswered-calls", "an answer that comes after it kills the caller", _late_answer_kills),
    ("after-timeout", "a call that comes after its timeout is dropped", _never_run),
    ("after-timeout", "a call that comes after its timeout runs twice", _sent_again),
    ("after-timeout", "its caller gets the answer all the same", _given_all_the_same),
    ("after-timeout", "its caller waits for ever", _waited_for),
    ("after-timeout", "it is served for ever", _kept("server_async_calls", "CallLeak")),
    ("unanswered-in-context", "a call in a context is sent again", _sent_again),
    ("unanswered-in-context", "a call in a context is waited for, for ever", _waited_for),
    ("unanswered-in-context", "backward says nothing of what is lost", _silent_backward),
    ("unanswered-in-context", "backward raises something else", _other_error),
    ("unanswered-in-context", "a context stays", _kept("contexts", "ContextLeak")),
    ("unanswered-in-context", "a pass goes on for ever", _kept("backward_passes", "ContextLeak")),
    ("unanswered-in-context", "a gradient is served for ever", _kept("server_calls", "CallLeak")),
    ("too-late", "an RRef that comes too late is forgotten", _forgotten),
    ("too-late", "an RRef that comes too late stays", _kept("forks", "RRefLeak")),
    ("too-late", "a request that comes too late is served for ever", _late_call),
    ("gradient-fails", "backward says nothing of what fails", _silent_backward),
    ("gradient-fails", "backward raises something else than what failed", _other_error),
    ("gradient-fails", "its context stays", _kept("contexts", "ContextLeak")),
    ("executed-twice", "a copy leaves a fork", _announced_again),
    ("executed-twice", "a copied cleanup leaves a context", _kept("contexts", "ContextLeak")),
    ("executed-twice", "a copied accept is awaited", _kept("pending_users", "RRefLeak")),
    ("any-order", "a late message changes a value", _another_value),
    ("any-order", "a late delete is dropped", _kept("forks", "RRefLeak")),
)


@pytest.mark.usefixtures("seeded_defect")
@pytest.mark.parametrize(("name", "said", "defect"), _DEFECTS, ids=[one[1] for one in _DEFECTS])
def test_a_defect_is_reported_as_what_it_is(
    name: str, said: str, defect: Callable[[World], Wrongs]
) -> None:
    """Each promise about single messages is broken in several ways, and the judge names each."""
    planted = set()
    for world in worlds(name):
        for wrong, expected in defect(world):
            found = [place(one) for one in judge(world.program, world.plan, wrong)]
            assert found == expected, (said, world.program, world.plan)
            planted.add((world.program, world.plan))
    assert len(planted) >= _CASES


@pytest.mark.parametrize("name", [*_DRAWS, *_WRITTEN])
def test_the_ideal_run_breaks_nothing(name: str) -> None:
    """Without a defect the same cases are clean."""
    for world in worlds(name):
        assert judge(world.program, world.plan, world.outcome) == ()
