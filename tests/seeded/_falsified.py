"""Defects: each takes an ideal outcome and makes one thing of it wrong, wherever it can.

A defect yields the falsified outcome together with what must be said of it: the promise, the rank
and the step of each violation, and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from rpcprops.faults import MessageType, WireMessageType
from rpcprops.oracle import ErrorClass, StepPrediction
from rpcprops.oracle.prediction import Send
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseOutcome,
    RaisedError,
    SentMessage,
    StepOutcome,
)
from rpcprops.programs import (
    After,
    Ask,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Default,
    Deferred,
    Drop,
    FailTwice,
    Fetch,
    Gather,
    Graph,
    Invoke,
    Leaf,
    Linear,
    Local,
    Member,
    Method,
    Nest,
    Onward,
    Optimize,
    Outlast,
    Pause,
    Profile,
    Raising,
    Reach,
    Recurse,
    Refused,
    Rejoin,
    Remote,
    Retry,
    Scripted,
    Settle,
    Share,
    Step,
    Through,
    Train,
    Unreached,
)
from rpcprops.steps.life import FAILING, Work
from rpcprops.steps.run_out import RunOut, run_out
from rpcprops.steps.values import SORTS
from rpcprops.torch_facts import FINDINGS
from tests.seeded._corpus import World
from tests.seeded._ideal import (
    CONTEXT_LEAK,
    ERRORS,
    LEAKING,
    OWNER_WAITED,
    USER_WAITED,
    calling,
    hanging,
    holding,
    settled_with,
    stopped,
    with_rank,
    with_step,
)

Place: TypeAlias = tuple[str, int | None, int | None]
Falsified: TypeAlias = Iterator[tuple[Outcome, list[Place]]]
Defect: TypeAlias = Callable[[World], Falsified]
LOST = RaisedError("RuntimeError", "EOF: end of file")
ASSERTION = (
    "[E request_callback_no_python.cpp:561] Received error while processing request type 260: "
    'false INTERNAL ASSERT FAILED at "rref_context.cpp":390, please report a bug to PyTorch.'
)
TRACEBACK = (
    "Traceback (most recent call last):\n"
    '  File "torch/distributed/rpc/api.py", line 1, in run\n'
    "    callback()\n"
    "ZeroDivisionError: division by zero"
)
UNREADABLE = RaisedError("UnicodeDecodeError", r"Send attempt failed intentionally for \x80\x02")

DEFECTS: dict[str, Defect] = {}


def defect(name: str) -> Callable[[Defect], Defect]:
    """Add a defect under a name."""

    def add(found: Defect) -> Defect:
        assert name not in DEFECTS
        DEFECTS[name] = found
        return found

    return add


# Steps.


#: The kinds of step whose value is a dict.
_WITH_PARTS = (Carry, Context, FailTwice, Graph, Linear, Member, Outlast, Profile, Refused, Train)


def _steps(world: World) -> Iterator[tuple[int, Leaf, StepPrediction, StepOutcome]]:
    """Each step that a rank runs, with what it must show and what it shows."""
    rows = zip(world.program.leaves, world.prediction.steps, world.outcome.steps, strict=True)
    for index, (leaf, expected, seen) in enumerate(rows):
        if not isinstance(leaf, Settle):
            yield index, leaf, expected, seen


def _at(leaf: Leaf) -> int:
    assert not isinstance(leaf, Settle)
    return leaf.at


def _wrong(value: Any) -> Any:
    """Another value of the same shape; the same where there is no number in it."""
    if isinstance(value, list):
        return [*value[:-1], _wrong(value[-1])] if value else value
    return f"not {value}" if isinstance(value, str) else value + 1


def _valued(world: World) -> Iterator[tuple[int, Leaf, Any]]:
    """Each step that gives numbers."""
    for index, leaf, _, seen in _steps(world):
        if not isinstance(leaf, _WITH_PARTS) and _wrong_or_none(seen.value):
            yield index, leaf, seen.value


def _wrong_or_none(value: Any) -> bool:
    if isinstance(value, bool | dict):
        return False
    return value is not None and bool(value != _wrong(value))


@defect("a step gives another value")
def _another_value(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        yield (
            with_step(world.outcome, index, value=_wrong(value)),
            [("WrongValue", _at(leaf), index)],
        )


@defect("a step gives no value")
def _no_value(world: World) -> Falsified:
    for index, leaf, _ in _valued(world):
        yield with_step(world.outcome, index, value=None), [("WrongValue", _at(leaf), index)]


@defect("a fetch gives the value before a bump")
def _stale_fetch(world: World) -> Falsified:
    origins: dict[str, str] = {}
    bumped: set[str] = set()
    for index, leaf, expected, seen in _steps(world):
        handle = getattr(leaf, "handle", "")
        origin = origins.get(handle, handle)
        if isinstance(leaf, Share):
            origins[leaf.out] = origin
        elif isinstance(leaf, Bump) and not expected.error:
            bumped.add(origin)
        elif isinstance(leaf, Fetch | Local) and origin in bumped and seen.value:
            stale = [x - 1.0 for x in seen.value]
            yield with_step(world.outcome, index, value=stale), [("WrongValue", leaf.at, index)]


@defect("a bump counts twice")
def _double_bump(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Bump):
            twice = [x + 1.0 for x in value]
            yield with_step(world.outcome, index, value=twice), [("WrongValue", leaf.at, index)]


@defect("a counter gives a count again")
def _stale_count(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Count) and value > 1:
            wrong = with_step(world.outcome, index, value=value - 1)
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("an optimizer does not step")
def _no_step(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Optimize) and any(leaf.value):
            still = [list(leaf.value) for _ in value]
            yield with_step(world.outcome, index, value=still), [("WrongValue", leaf.at, index)]


@defect("an optimizer steps at all owners but one")
def _one_no_step(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Optimize) and any(leaf.value):
            still = [list(leaf.value), *value[1:]]
            yield with_step(world.outcome, index, value=still), [("WrongValue", leaf.at, index)]


@defect("the second try of a message carries nothing")
def _empty_try(world: World) -> Falsified:
    for index, leaf, _ in _valued(world):
        if isinstance(leaf, Retry):
            cut = stopped(world.outcome, index + 1)
            yield (
                with_step(cut, index, value=None, error=ERRORS["timeout"]),
                [("UnexpectedError", leaf.at, index)],
            )


@defect("a callback does not run")
def _no_callback(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, After):
            wrong = with_step(world.outcome, index, value=value[:-1])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a callback runs twice")
def _callback_twice(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, After):
            wrong = with_step(world.outcome, index, value=[*value, value[-1]])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a callback of a call that failed does not run")
def _no_callback_of_failed(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, After) and expected.error:
            wrong = with_step(world.outcome, index, value=[], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("gathered values come in another order")
def _other_order(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Gather):
            wrong = with_step(world.outcome, index, value=value[::-1])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a gathered value is left out")
def _left_out(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Gather):
            wrong = with_step(world.outcome, index, value=value[1:])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("the future of all is done before one of them")
def _done_early(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Gather) and leaf.how == "done":
            done = [1.0] * (len(leaf.targets) - 1) + [0.0]
            promise = "MissingError" if expected.error else "WrongValue"
            yield (
                with_step(world.outcome, index, value=done, error=None),
                [(promise, leaf.at, index)],
            )


@defect("a target that is no rank is accepted")
def _target_accepted(world: World) -> Falsified:
    for index, leaf, _ in _valued(world):
        if isinstance(leaf, Reach) and leaf.named.startswith("no "):
            wrong = with_step(world.outcome, index, value=[""])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("an RRef gives what it must refuse")
def _not_refused(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Ask) and value == ["RuntimeError"]:
            wrong = with_step(world.outcome, index, value=[""])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("an object forgets the first call of its method")
def _forgets(world: World) -> Falsified:
    for index, leaf, value in _valued(world):
        if isinstance(leaf, Method) and leaf.form not in ("missing", "static"):
            wrong = with_step(world.outcome, index, value=[value[0], value[0]])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a default timeout strikes where it must not")
def _default_strikes(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Default) and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


def _silent(error: ErrorClass) -> Defect:
    """An error that had to come does not."""

    def silent(world: World) -> Falsified:
        for index, leaf, expected, _ in _steps(world):
            if expected.error == error:
                wrong = with_step(world.outcome, index, value=[3.0], error=None)
                yield wrong, [("MissingError", _at(leaf), index)]

    return silent


DEFECTS |= {
    "what a function raised is swallowed": _silent("remote"),
    "a lost message is passed over": _silent("injected"),
    "an answer comes after its timeout": _silent("timeout"),
    "an RRef that was never created has a value": _silent("creation"),
    "a handle that never came is used": _silent("missing"),
}


@defect("a step raises")
def _raises(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if expected.error in ("", "unknown"):
            wrong = with_step(world.outcome, index, value=None, error=LOST)
            yield wrong, [("UnexpectedError", _at(leaf), index)]


@defect("a step that has no timeout times out")
def _times_out(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", _at(leaf), index)]


@defect("a step raises another error than it has to")
def _raises_another(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if expected.error not in ("", "unknown"):
            other: ErrorClass = "timeout" if expected.error != "timeout" else "remote"
            wrong = with_step(world.outcome, index, error=ERRORS[other])
            yield wrong, [("UnexpectedError", _at(leaf), index)]


@defect("an error cannot be read")
def _unreadable(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if expected.error == "injected":
            wrong = with_step(world.outcome, index, error=UNREADABLE)
            yield wrong, [("UnclearError", _at(leaf), index)]


@defect("the program stops early")
def _stops(world: World) -> Falsified:
    if len(world.outcome.steps) > 1:
        yield stopped(world.outcome, 1), [("UnexpectedError", None, None)]


# What is called.


def _raised(world: World, promise: str, **changes: Any) -> Falsified:
    """Each step that shows what a function raised, shows something else of it."""
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Raising | Deferred) and isinstance(seen.value, dict):
            value = {**seen.value, **changes}
            yield with_step(world.outcome, index, value=value), [(promise, leaf.at, index)]


@defect("what a function raised comes as another class")
def _another_class(world: World) -> Falsified:
    yield from _raised(world, "UnexpectedError", raised="OSError")


@defect("the text of what a function raised is lost")
def _lost_text(world: World) -> Falsified:
    yield from _raised(world, "UnclearError", kept=False)


@defect("what a function raised comes as a value")
def _raised_nothing(world: World) -> Falsified:
    yield from _raised(world, "MissingError", raised="", kept=False)


@defect("what cannot be pickled is called")
def _called_unpickled(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Invoke) and seen.value is True:
            wrong = with_step(world.outcome, index, value=False)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("the ranks of a path answer in another order")
def _another_order(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Recurse) and seen.value and seen.value != seen.value[::-1]:
            wrong = with_step(world.outcome, index, value=seen.value[::-1])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a callback of a future is left out")
def _no_then(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Deferred) and leaf.form == "then" and seen.value:
            wrong = with_step(world.outcome, index, value=[x - 1.0 for x in seen.value])
            yield wrong, [("WrongValue", leaf.at, index)]


# Values.


def _carried(world: World, *, refused: bool) -> Iterator[tuple[int, Carry]]:
    """Each step that sends a value which arrives, or which is refused."""
    for index, leaf, expected, seen in _steps(world):
        if isinstance(leaf, Carry) and seen.error is None:
            if ("refused" in expected.value) == refused:
                yield index, leaf


def _showing(promise: str, value: dict[str, str], *, refused: bool) -> Defect:
    """A value that arrives, or is refused, does something else."""

    def showing(world: World) -> Falsified:
        for index, leaf in _carried(world, refused=refused):
            yield with_step(world.outcome, index, value=value), [(promise, leaf.at, index)]

    return showing


_OTHER_ELEMENTS = {"differs": "other elements"}
_NO_GRADIENT = {"differs": "requires_grad False instead of True"}
_OTHER_TYPE = {"differs": "type builtins.str instead of builtins.bytes"}
DEFECTS |= {
    "a tensor arrives with another element": _showing("WrongValue", _OTHER_ELEMENTS, refused=False),
    "a tensor no longer requires a gradient": _showing("WrongValue", _NO_GRADIENT, refused=False),
    "a value arrives as one of another type": _showing("WrongValue", _OTHER_TYPE, refused=False),
    "a value that can be sent is refused": _showing(
        "UnexpectedError", {"refused": "TypeError"}, refused=False
    ),
    "a value that cannot be sent arrives": _showing("MissingError", {"differs": ""}, refused=True),
    "a value is refused by another error": _showing(
        "UnexpectedError", {"refused": "KeyError"}, refused=True
    ),
}


@defect("a function is called whose argument was refused")
def _called_all_the_same(world: World) -> Falsified:
    for index, leaf in _carried(world, refused=True):
        name = f"step{index}"
        if not world.prediction.calls[leaf.to].get(name):
            yield calling(world.outcome, leaf.to, {name: 1}), [("NotRunOnce", leaf.to, None)]


@defect("a refused value leaves a fork behind")
def _fork_of_refused(world: World) -> Falsified:
    for _, leaf in _carried(world, refused=True):
        yield from _forked_once_more(world, leaf.at)


def _recounted(what: str, more: int) -> Defect:
    """A value is pickled, or unpickled, some times more or fewer than it is sent."""

    def recounted(world: World) -> Falsified:
        for index, leaf in _carried(world, refused=False):
            name = f"step{index}/{what}"
            for rank in sorted({leaf.at, leaf.to}):
                if number := world.prediction.calls[rank].get(name):
                    wrong = calling(world.outcome, rank, {name: number + more})
                    yield wrong, [("NotRunOnce", rank, None)]

    return recounted


DEFECTS |= {
    "a message is pickled twice": _recounted("pickled", 1),
    "a message is unpickled twice": _recounted("unpickled", 1),
    "a value arrives that nobody has unpickled": _recounted("unpickled", -1),
}


def _forked_once_more(world: World, rank: int) -> Falsified:
    """A rank counts one more fork of one more RRef than it has to."""
    held = world.outcome.ranks[rank].counters
    if world.program.settles and held is not None:
        more = {"owners": held.owners + 1, "forks": held.forks + 1}
        yield holding(world.outcome, rank, **more), [("RRefLeak", rank, None)]


@defect("an RRef that was the value of another one stays")
def _inner_rref_stays(world: World) -> Falsified:
    for _, leaf in _carried(world, refused=False):
        if leaf.way == "own" and SORTS[leaf.sort].rrefs and leaf.at != leaf.to:
            yield from _forked_once_more(world, leaf.at)


@defect("an exception that a function has raised keeps its RRef alive")
def _raised_rref_stays(world: World) -> Falsified:
    for _, leaf, _, seen in _steps(world):
        if isinstance(leaf, Raising) and leaf.kind == "rref" and not seen.error:
            yield from _forked_once_more(world, leaf.at)


# Slow functions, and timeouts that end before them.

#: The kinds of step whose timeout may end before one named call of a function does.
_ABANDONING = (
    After,
    Call,
    Carry,
    Chain,
    Count,
    Deferred,
    Invoke,
    Nest,
    Raising,
    Reach,
    Scripted,
    Share,
)


def _abandoned(world: World) -> Iterator[tuple[int, Leaf, int]]:
    """Each step whose timeout ends before its function does, and the rank of the function."""
    for index, leaf, expected, _ in _steps(world):
        if not isinstance(leaf, _ABANDONING):
            continue
        if leaf.seconds > (leaf.timeout or leaf.seconds):
            if expected.error == "timeout":
                yield index, leaf, leaf.via if isinstance(leaf, Nest) else leaf.to


@defect("a call that timed out never runs")
def _abandoned_never(world: World) -> Falsified:
    for index, _, rank in _abandoned(world):
        name = f"step{index}"
        if name not in world.prediction.abandoned_calls[rank]:
            yield calling(world.outcome, rank, {name: 0}), [("NotRunOnce", rank, None)]


@defect("a call that timed out is sent again")
def _abandoned_twice(world: World) -> Falsified:
    for index, _, rank in _abandoned(world):
        wrong = calling(world.outcome, rank, {f"step{index}": 2})
        yield wrong, [("NotRunOnce", rank, None)]


@defect("a call waits for its slow function, whatever its timeout")
def _patient(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        value = None if isinstance(leaf, Nest | Share) else [3.0]
        wrong = with_step(world.outcome, index, value=value, error=None)
        yield wrong, [("MissingError", _at(leaf), index)]


@defect("a fetch waits for a value that is being made, whatever its timeout")
def _patient_fetch(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Fetch) and expected.error == "timeout":
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a slow call that has no timeout times out")
def _impatient(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if not isinstance(leaf, (*_ABANDONING, Gather, Method, Remote)) or isinstance(leaf, After):
            continue
        if leaf.seconds and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a count is made again because its call timed out")
def _counted_again(world: World) -> Falsified:
    late = {leaf.to for _, leaf, _ in _abandoned(world) if isinstance(leaf, Count)}
    for index, leaf, expected, seen in _steps(world):
        if isinstance(leaf, Count) and leaf.to in late and not expected.error and seen.value > 1:
            wrong = with_step(world.outcome, index, value=seen.value + 1)
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a bump or a nest times out long before its timeout")
def _too_soon(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Bump | Nest) and leaf.timeout and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


def _unread(world: World) -> Iterator[tuple[int, Nest]]:
    """Each nest whose handle comes too late."""
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Nest) and expected.error == "timeout":
            yield index, leaf


@defect("a function whose answer came too late makes its RRef twice")
def _made_twice(world: World) -> Falsified:
    for index, leaf in _unread(world):
        if leaf.flavour == "python" and world.prediction.calls[leaf.to][f"step{index}/nested"]:
            wrong = calling(world.outcome, leaf.to, {f"step{index}/nested": 2})
            yield wrong, [("NotRunOnce", leaf.to, None)]


@defect("a function whose answer came too late makes no RRef")
def _made_never(world: World) -> Falsified:
    for index, leaf in _unread(world):
        name = f"step{index}/nested"
        if leaf.flavour == "python" and name not in world.prediction.abandoned_calls[leaf.to]:
            yield calling(world.outcome, leaf.to, {name: 0}), [("NotRunOnce", leaf.to, None)]


@defect("a handle in a late answer can be used")
def _late_handle_used(world: World) -> Falsified:
    late = {leaf.out for _, leaf in _unread(world)}
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Fetch) and leaf.handle in late and expected.error == "missing":
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("the owner of an RRef in a late answer keeps it")
def _late_rref_kept(world: World) -> Falsified:
    settles = [n for n, leaf in enumerate(world.program.leaves) if isinstance(leaf, Settle)]
    for index, leaf in _unread(world):
        for settle in (n for n in settles if n > index):
            held = world.outcome.steps[settle].counters[leaf.to]
            more = {"owners": held.owners + 1, "forks": held.forks + 1}
            wrong = settled_with(world.outcome, settle, leaf.to, **more)
            yield wrong, [("RRefLeak", leaf.to, settle)]


@defect("a default that was set ends nothing")
def _default_ends_nothing(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Default) and expected.error == "timeout":
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a call that the default timeout has ended runs twice")
def _ended_twice(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Default) and expected.error == "timeout":
            wrong = calling(world.outcome, leaf.to, {f"step{index}": 2})
            yield wrong, [("NotRunOnce", leaf.to, None)]


@defect("a call without a timeout ends by the default")
def _endless_ends(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Default) and leaf.endless and leaf.sleeps and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a call gets the value of a handle whose creation timed out, after torch knew of that")
def _value_of_failed(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Call) and isinstance(leaf.right, str) and expected.error == "creation":
            wrong = with_step(world.outcome, index, value=[4.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a handle whose share timed out never comes")
def _never_comes(world: World) -> Falsified:
    shared = {leaf.out for _, leaf, _ in _abandoned(world) if isinstance(leaf, Share)}
    for index, leaf, expected, _ in _steps(world):
        if expected.error or not isinstance(leaf, Fetch | Local | Pause):
            continue
        if leaf.handle in shared:
            missing = ERRORS["missing"]
            wrong = with_step(world.outcome, index, value=None, error=missing)
            yield wrong, [("UnexpectedError", leaf.at, index)]


def _under_way(world: World) -> Iterator[tuple[int, Leaf]]:
    """Each step that uses a handle before its share, which timed out, has surely ended."""
    shared = {leaf.out for _, leaf, _ in _abandoned(world) if isinstance(leaf, Share)}
    came: set[str] = set()
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Settle):
            came.clear()
        elif isinstance(leaf, Pause) and leaf.handle in shared:
            came.add(leaf.handle)
        elif came.intersection(leaf.used) and not expected.error:
            yield index, leaf


@defect("an RRef that is used while it is being shared counts as one that was never made")
def _shared_not_made(world: World) -> Falsified:
    for index, leaf in _under_way(world):
        if isinstance(leaf, Fetch | Share):
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["creation"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("the owner forgets an RRef that its receiver drops while it is being shared")
def _shared_and_dropped(world: World) -> Falsified:
    for _, leaf in _under_way(world):
        for rank, held in enumerate(world.prediction.counters):
            if isinstance(leaf, Drop) and held.owners:
                yield holding(world.outcome, rank, owners=-1), [("OwnerGone", rank, None)]


def _run_out(world: World) -> Iterator[tuple[int, Recurse, RunOut]]:
    """Each recursion that needs more threads than a rank has, and what becomes of its calls."""
    number = world.program.num_worker_threads
    for index, leaf in enumerate(world.program.leaves):
        if isinstance(leaf, Recurse) and number:
            out = run_out(leaf.path, number)
            if out is not None:
                yield index, leaf, out


@defect("a function for which there was no thread runs all the same")
def _runs_without_thread(world: World) -> Falsified:
    for index, leaf, out in _run_out(world):
        if out.started < len(leaf.path):
            rank, name = leaf.path[out.started], f"step{index}"
            times = world.outcome.ranks[rank].calls.get(name, 0)
            wrong = calling(world.outcome, rank, {name: times + 1})
            yield wrong, [("NotRunOnce", rank, None)]


@defect("calls that need more threads than there are end with a value")
def _ends_without_thread(world: World) -> Falsified:
    for index, leaf, _ in _run_out(world):
        wrong = with_step(world.outcome, index, value=[*leaf.path], error=None)
        yield wrong, [("MissingError", leaf.at, index)]


@defect("a rank forgets a call that waits for a thread for ever")
def _forgets_call(world: World) -> Falsified:
    for _, _, out in _run_out(world):
        for rank in sorted(out.stuck):
            yield holding(world.outcome, rank, server_calls=-1), [("CallLeak", rank, None)]


def _beside(world: World) -> Iterator[tuple[int, Leaf]]:
    """Each step of a branch that runs beside others."""
    for first, step in world.program.numbered:
        if len(step.leaves) > 1:
            yield from enumerate(step.leaves, first)


@defect("a function that holds the GIL beside others runs twice")
def _spins_twice(world: World) -> Falsified:
    for index, leaf in _beside(world):
        if isinstance(leaf, Call) and leaf.spins and not world.prediction.steps[index].error:
            wrong = calling(world.outcome, leaf.to, {f"step{index}": 2})
            yield wrong, [("NotRunOnce", leaf.to, None)]


@defect("a value that is pickled slowly, or with effects, comes as another one beside other steps")
def _slow_and_wrong(world: World) -> Falsified:
    for index, leaf in _beside(world):
        if isinstance(leaf, Carry) and (SORTS[leaf.sort].slow or SORTS[leaf.sort].counted):
            if world.outcome.steps[index].value == {"differs": ""}:
                wrong = with_step(world.outcome, index, value={"differs": "value 2 instead of 1"})
                yield wrong, [("WrongValue", leaf.at, index)]


@defect("a value that is pickled beside other steps is pickled twice")
def _pickled_again(world: World) -> Falsified:
    for index, leaf in _beside(world):
        if isinstance(leaf, Carry) and SORTS[leaf.sort].counted:
            for rank in (leaf.at, leaf.to):
                name = f"step{index}/pickled"
                if times := world.outcome.ranks[rank].calls.get(name, 0):
                    wrong = calling(world.outcome, rank, {name: times + 1})
                    yield wrong, [("NotRunOnce", rank, None)]


@defect("a value that was not made in time for a fetch is never made")
def _never_made(world: World) -> Falsified:
    waited: set[str] = set()
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Fetch) and expected.error == "timeout":
            waited.add(leaf.handle)
        elif isinstance(leaf, Share) and leaf.handle in waited:
            waited.add(leaf.out)
        elif isinstance(leaf, Fetch | Local) and leaf.handle in waited and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a call that timed out never tells its callbacks")
def _callback_of_late(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        if isinstance(leaf, After):
            wrong = with_step(world.outcome, index, value=[], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


def _made_late(world: World) -> Iterator[tuple[int, Remote, int]]:
    """Each step at which a value is still being made, how it is made, and at which step that is."""
    making: dict[str, tuple[int, Remote]] = {}
    for index, leaf in enumerate(world.program.leaves):
        handle = getattr(leaf, "handle", "")
        if isinstance(leaf, Settle):
            making.clear()
        elif isinstance(leaf, Remote) and leaf.seconds and leaf.at != leaf.to:
            making[leaf.out] = index, leaf
        elif handle in making:
            number, made = making[handle]
            if isinstance(leaf, Share):
                making[leaf.out] = making[handle]
            yield index, made, number


@defect("a handle that is sent on before its value is made never comes")
def _early_never_comes(world: World) -> Falsified:
    leaves = world.program.leaves
    shared = {one.out for n, *_ in _made_late(world) if isinstance(one := leaves[n], Share)}
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Fetch | Local) and leaf.handle in shared and not expected.error:
            missing = ERRORS["missing"]
            wrong = with_step(world.outcome, index, value=None, error=missing)
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a value that is asked for before it is made is made again")
def _made_again(world: World) -> Falsified:
    for index, made, number in _made_late(world):
        if isinstance(world.program.leaves[index], Through | Fetch | Local):
            wrong = calling(world.outcome, made.to, {f"step{number}": 2})
            yield wrong, [("NotRunOnce", made.to, None)]


@defect("a call through a handle does not wait for the value")
def _too_early(world: World) -> Falsified:
    for index, _, _ in _made_late(world):
        leaf, seen = world.program.leaves[index], world.outcome.steps[index]
        if isinstance(leaf, Through) and seen.value:
            addend = [leaf.addend] * len(seen.value)
            wrong = with_step(world.outcome, index, value=addend)
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a call goes through an RRef whose creation timed out")
def _called_through(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Through) and expected.error == "creation":
            wrong = with_step(world.outcome, index, value=[4.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("what a call that timed out has asked for never runs")
def _asked_never(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        rank = leaf.then if isinstance(leaf, Chain | Deferred | Scripted) else None
        name = f"step{index}/then"
        if rank is not None and world.prediction.calls[rank].get(name):
            if name not in world.prediction.abandoned_calls[rank]:
                yield calling(world.outcome, rank, {name: 0}), [("NotRunOnce", rank, None)]


@defect("a callback of a future asks again after its call has timed out, and once more")
def _asked_once_more(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        if isinstance(leaf, Deferred) and world.prediction.calls[leaf.then].get(
            name := f"step{index}/again"
        ):
            yield calling(world.outcome, leaf.then, {name: 2}), [("NotRunOnce", leaf.then, None)]


@defect("a function in TorchScript does not wait for what it has called")
def _script_does_not_wait(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Scripted) and not expected.error and any(leaf.left):
            wrong = with_step(world.outcome, index, value=list(leaf.right))
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a function in TorchScript does not notice that its call is lost")
def _script_notices_nothing(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Scripted) and expected.error in ("injected", "creation"):
            wrong = with_step(world.outcome, index, value=list(leaf.right), error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("what a function in TorchScript calls runs twice")
def _script_calls_twice(world: World) -> Falsified:
    for index, leaf, _, _ in _steps(world):
        name = f"step{index}/then"
        if isinstance(leaf, Scripted) and world.prediction.calls[leaf.then].get(name):
            yield calling(world.outcome, leaf.then, {name: 2}), [("NotRunOnce", leaf.then, None)]


@defect("what a function in TorchScript must call does not run")
def _script_calls_nothing(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        name = f"step{index}/then"
        if isinstance(leaf, Scripted) and not expected.error:
            yield calling(world.outcome, leaf.then, {name: 0}), [("NotRunOnce", leaf.then, None)]


@defect("the error that ends a function in TorchScript is another one")
def _script_ends_otherwise(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Scripted) and expected.error in ("injected", "creation"):
            wrong = with_step(world.outcome, index, error=ERRORS["remote"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a value that came after its timeout is given all the same")
def _late_value(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        if isinstance(leaf, Carry):
            wrong = with_step(world.outcome, index, value={"differs": ""}, error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("what a function raised comes after its timeout, instead of it")
def _late_raise(world: World) -> Falsified:
    for index, leaf, _ in _abandoned(world):
        if isinstance(leaf, Raising):
            wrong = with_step(world.outcome, index, error=ERRORS["remote"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("a callback of a call that timed out raises nothing")
def _late_callback(world: World) -> Falsified:
    for index, leaf, expected, seen in _steps(world):
        if isinstance(leaf, Raising) and leaf.how == "then" and not expected.error:
            if leaf.seconds > (leaf.timeout or leaf.seconds):
                value = {**seen.value, "raised": "", "kept": False}
                wrong = with_step(world.outcome, index, value=value)
                yield wrong, [("MissingError", leaf.at, index)]


@defect("a method of an object is waited for, whatever the timeout")
def _patient_method(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Method) and expected.error == "timeout":
            wrong = with_step(world.outcome, index, value=[3.0, 5.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("gathered calls wait for each other, whatever their timeouts")
def _patient_gather(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Gather) and expected.error == "timeout":
            wrong = with_step(world.outcome, index, value=[[3.0]] * len(leaf.targets), error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("one of the gathered calls that timed out is sent again")
def _gathered_twice(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Gather) and expected.error == "timeout":
            rank = leaf.targets[-1]
            name = f"step{index}/{len(leaf.targets) - 1}"
            yield calling(world.outcome, rank, {name: 2}), [("NotRunOnce", rank, None)]


def _onward(world: World) -> Iterator[tuple[int, Onward, list[Any]]]:
    """Each step whose inner calls end, and how they do."""
    for index, leaf, expected, seen in _steps(world):
        if isinstance(leaf, Onward) and not expected.error:
            yield index, leaf, list(seen.value)


@defect("nothing ends a nested call")
def _endless(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        wrong = with_step(world.outcome, index, value=[*value[1:], "nothing"])
        yield wrong, [("MissingError", leaf.at, index)]


@defect("a nested call ends by another one's timeout")
def _hasty(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        if "timeout" not in value:
            wrong = with_step(world.outcome, index, value=["timeout"] * leaf.calls)
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("no timeout ends a nested call, and so its late answer comes")
def _late_answer(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        if "timeout" in value:
            wrong = with_step(world.outcome, index, value=[[3.0]] * leaf.calls)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("of several nested calls only some tell how they ended")
def _some_onward(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        wrong = with_step(world.outcome, index, value=value[1:])
        yield wrong, [("WrongValue", leaf.at, index)]


@defect("the answers of nested calls are mixed up")
def _mixed(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        if "timeout" not in value:
            wrong = with_step(world.outcome, index, value=[[x + 1.0 for x in one] for one in value])
            yield wrong, [("WrongValue", leaf.at, index)]


@defect("a nested call that timed out is sent again")
def _onward_twice(world: World) -> Falsified:
    for index, leaf, value in _onward(world):
        if "timeout" in value:
            name = f"step{index}/0/then"
            yield calling(world.outcome, leaf.then, {name: 2}), [("NotRunOnce", leaf.then, None)]


@defect("what a call that timed out has called never runs")
def _ends_with_its_caller(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Recurse) and expected.error == "timeout":
            rank, name = next(iter(leaf.path[1:]), None), f"step{index}"
            if rank is not None and name not in world.prediction.abandoned_calls[rank]:
                yield calling(world.outcome, rank, {name: 0}), [("NotRunOnce", rank, None)]


@defect("a path of calls in time times out")
def _impatient_path(world: World) -> Falsified:
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Recurse) and leaf.timeout and not expected.error:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


# The default timeout of a program.


def _ended_by_default(world: World) -> Iterator[tuple[int, Leaf, StepPrediction]]:
    """Each step that the default timeout ends."""
    for index, leaf, expected, _ in _steps(world):
        if expected.error == "timeout" and getattr(leaf, "timeout", 0) is None:
            yield index, leaf, expected


@defect("a call knows no default timeout")
def _no_default(world: World) -> Falsified:
    for index, leaf, _ in _ended_by_default(world):
        if isinstance(leaf, Call):
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a fetch knows no default timeout")
def _no_default_of_fetch(world: World) -> Falsified:
    for index, leaf, _ in _ended_by_default(world):
        if isinstance(leaf, Fetch):
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a creation knows no default timeout")
def _no_default_of_creation(world: World) -> Falsified:
    created = {
        leaf.out
        for leaf in world.program.leaves
        if isinstance(leaf, Remote) and leaf.timeout is None and leaf.seconds
    }
    for index, leaf, expected, _ in _steps(world):
        if world.program.rpc_timeout is None or expected.error != "creation":
            continue
        if isinstance(leaf, Fetch) and leaf.handle in created:
            wrong = with_step(world.outcome, index, value=[3.0], error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a call that the default timeout ended is sent again")
def _default_sends_again(world: World) -> Falsified:
    for index, leaf, _ in _ended_by_default(world):
        if isinstance(leaf, Call | Share):
            wrong = calling(world.outcome, leaf.to, {f"step{index}": 2})
            yield wrong, [("NotRunOnce", leaf.to, None)]


@defect("a call that the default timeout ended never runs")
def _default_prevents(world: World) -> Falsified:
    for index, leaf, _ in _ended_by_default(world):
        name = f"step{index}"
        if isinstance(leaf, Call | Share) and (
            name not in world.prediction.abandoned_calls[leaf.to]
        ):
            yield calling(world.outcome, leaf.to, {name: 0}), [("NotRunOnce", leaf.to, None)]


@defect("a default timeout goes before that of a call")
def _default_first(world: World) -> Falsified:
    default = world.program.rpc_timeout
    for index, leaf, expected, _ in _steps(world):
        if default is None or expected.error or not isinstance(leaf, Call | Remote | Share):
            continue
        if leaf.seconds > default:
            wrong = with_step(world.outcome, index, value=None, error=ERRORS["timeout"])
            yield wrong, [("UnexpectedError", leaf.at, index)]


# Contexts.


def _contexts(world: World) -> Iterator[tuple[int, Context, dict[str, Any]]]:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Context) and leaf.late is None:
            yield index, leaf, seen.value


def _with_value(world: World, index: int, **changes: Any) -> Outcome:
    value = {**world.outcome.steps[index].value, **changes}
    return with_step(world.outcome, index, value={k: v for k, v in value.items() if v is not None})


@defect("a context computes another loss")
def _another_loss(world: World) -> Falsified:
    for index, leaf, value in _contexts(world):
        wrong = _with_value(world, index, loss=value["loss"] + 1.0)
        yield wrong, [("WrongValue", leaf.at, index)]


@defect("a rank's part of a gradient is lost")
def _lost_gradient(world: World) -> Falsified:
    for index, leaf, value in _contexts(world):
        gradient = value.get("gradient", [])
        if any(gradient):
            wrong = _with_value(world, index, gradient=[0.0] * len(gradient))
            yield wrong, [("WrongGradient", leaf.at, index)]


@defect("a gradient is never computed")
def _no_gradient(world: World) -> Falsified:
    for index, leaf, value in _contexts(world):
        if "gradient" in value:
            yield _with_value(world, index, gradient=None), [("WrongGradient", leaf.at, index)]


@defect("a gradient that was retained is not added to")
def _not_added(world: World) -> Falsified:
    for index, leaf, value in _contexts(world):
        if leaf.retain and any(value.get("gradient", [])):
            once = [x / 2 for x in value["gradient"]]
            yield _with_value(world, index, gradient=once), [("WrongGradient", leaf.at, index)]


@defect("a backward pass that breaks says nothing")
def _silent_backward(world: World) -> Falsified:
    for index, leaf, _ in _contexts(world):
        if leaf.breaks is not None:
            yield _with_value(world, index, broke=None), [("MissingError", leaf.at, index)]


@defect("a backward pass breaks")
def _broken_backward(world: World) -> Falsified:
    for index, leaf, _ in _contexts(world):
        if leaf.breaks is None and leaf.backward:
            wrong = _with_value(world, index, broke="Error on Node 1: EOF", gradient=None)
            yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("an exception that leaves a context is swallowed")
def _swallowed(world: World) -> Falsified:
    for index, leaf, _ in _contexts(world):
        if leaf.raises:
            yield _with_value(world, index, raised=None), [("MissingError", leaf.at, index)]


def _asked(world: World) -> Iterator[tuple[int, Refused, bool]]:
    """Each question for a context that there was, and whether its id must be refused."""
    for index, leaf, expected, _ in _steps(world):
        if isinstance(leaf, Refused) and not expected.error:
            yield index, leaf, expected.value["refused"]


@defect("the id of an ended context is accepted")
def _accepted(world: World) -> Falsified:
    for index, leaf, must in _asked(world):
        if must:
            wrong = with_step(world.outcome, index, value={"refused": False})
            yield wrong, [("ContextLeak", leaf.at, index)]


@defect("the id of a context whose cleanup was lost is refused")
def _refused(world: World) -> Falsified:
    for index, leaf, must in _asked(world):
        if not must:
            wrong = with_step(world.outcome, index, value={"refused": True, "message": "x"})
            yield wrong, [("ContextLeak", leaf.at, index)]


def _outlasting(world: World, key: str) -> Iterator[tuple[int, Outlast, dict[str, Any]]]:
    """Each call that outlasts its context and shows that."""
    for index, leaf, expected, seen in _steps(world):
        if isinstance(leaf, Outlast) and not expected.error and key in seen.value:
            yield index, leaf, {name: x for name, x in seen.value.items() if name != key}


@defect("a call that outlasts its context gives another sum")
def _outlasting_sum(world: World) -> Falsified:
    for index, leaf, rest in _outlasting(world, "sum"):
        wrong = with_step(world.outcome, index, value={**rest, "sum": [0.5]})
        yield wrong, [("WrongValue", leaf.at, index)]


@defect("a call that needs no context is refused after its end")
def _outlasting_lost(world: World) -> Falsified:
    for index, leaf, rest in _outlasting(world, "sum"):
        wrong = with_step(world.outcome, index, value={**rest, "lost": True})
        yield wrong, [("UnexpectedError", leaf.at, index)]


@defect("an answer belongs to a context that has ended")
def _outlasting_kept(world: World) -> Falsified:
    for index, leaf, rest in _outlasting(world, "lost"):
        wrong = with_step(world.outcome, index, value={**rest, "sum": [3.0]})
        yield wrong, [("MissingError", leaf.at, index)]


@defect("a call in a context knows no timeout")
def _outlasting_patient(world: World) -> Falsified:
    for index, leaf, rest in _outlasting(world, "timed out"):
        wrong = with_step(world.outcome, index, value={**rest, "sum": [3.0]})
        yield wrong, [("MissingError", leaf.at, index)]


@defect("a call that outlasts its context never runs")
def _outlasting_never(world: World) -> Falsified:
    for index, leaf, _ in _outlasting(world, "id"):
        name = f"step{index}"
        if name not in world.prediction.abandoned_calls[leaf.to]:
            yield calling(world.outcome, leaf.to, {name: 0}), [("NotRunOnce", leaf.to, None)]


@defect("a call that outlasts its context makes it anew, and it stays")
def _outlasting_leak(world: World) -> Falsified:
    leaves = world.program.leaves
    for index, leaf, _ in _outlasting(world, "id"):
        for settle in range(index, len(leaves)):
            if isinstance(leaves[settle], Settle):
                more = world.outcome.steps[settle].counters[leaf.to].contexts + 1
                wrong = settled_with(world.outcome, settle, leaf.to, contexts=more)
                yield wrong, [("ContextLeak", leaf.to, settle)]
                break


@defect("a backward pass ends that does not reach what was sent")
def _reached(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Unreached):
            value = {**seen.value, "ended": True}
            yield with_step(world.outcome, index, value=value), [("WrongValue", leaf.at, index)]


@defect("a slow call in a context gives its value in spite of its timeout")
def _patient_in_context(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Graph | Unreached) and "late" in (seen.value or ()):
            value = {**seen.value, "late": False}
            yield with_step(world.outcome, index, value=value), [("MissingError", leaf.at, index)]
        elif isinstance(leaf, Context) and leaf.late is not None:
            wrong = with_step(world.outcome, index, value={"loss": 1.0}, error=None)
            yield wrong, [("MissingError", leaf.at, index)]


@defect("a backward pass that never ends changes the loss")
def _other_loss(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Unreached):
            value = {**seen.value, "loss": seen.value["loss"] + 1.0}
            yield with_step(world.outcome, index, value=value), [("WrongValue", leaf.at, index)]


@defect("a backward pass that never ends is no longer counted")
def _forgotten_pass(world: World) -> Falsified:
    leaves = world.program.leaves
    for settle, leaf in enumerate(leaves):
        counters = world.outcome.steps[settle].counters if isinstance(leaf, Settle) else ()
        for rank, held in enumerate(counters):
            if held.backward_passes:
                fewer = held.backward_passes - 1
                wrong = settled_with(world.outcome, settle, rank, backward_passes=fewer)
                yield wrong, [("ContextLeak", rank, settle)]


def _failing_twice(world: World) -> Iterator[tuple[int, FailTwice, dict[str, Any]]]:
    """Each backward pass that fails at two ranks, and what it shows."""
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, FailTwice):
            yield index, leaf, seen.value


@defect("a backward pass that fails at two ranks raises nothing")
def _failing_silently(world: World) -> Falsified:
    for index, leaf, seen in _failing_twice(world):
        value = {key: shown for key, shown in seen.items() if key != "broke"}
        yield with_step(world.outcome, index, value=value), [("MissingError", leaf.at, index)]


@defect("a backward pass that fails at two ranks raises an error of its own")
def _failing_otherwise(world: World) -> Falsified:
    for index, leaf, seen in _failing_twice(world):
        value = {**seen, "broke": "Error on Node 1: context is gone"}
        yield with_step(world.outcome, index, value=value), [("UnexpectedError", leaf.at, index)]


# Graphs, trained parameters and remote layers: one part of the value is another than it must be.


def _in_part(
    kinds: type[Step] | tuple[type[Step], ...],
    key: str,
    promise: str,
    change: Callable[[Any], Any],
) -> Defect:
    """The part `key` of a step's value is changed, wherever that makes a difference."""

    def falsify(world: World) -> Falsified:
        for index, leaf, _, seen in _steps(world):
            if isinstance(leaf, kinds) and isinstance(seen.value, dict) and key in seen.value:
                now = change(seen.value[key])
                if now != seen.value[key]:
                    value = {**seen.value, key: now}
                    wrong = with_step(world.outcome, index, value=value)
                    yield wrong, [(promise, _at(leaf), index)]

    return falsify


def _last(numbers: Any, change: Callable[[float], float]) -> Any:
    """The same lists of numbers, with the last number changed."""
    if not numbers or numbers[-1] is None:
        return numbers
    *rest, last = numbers
    return [*rest, _last(last, change) if isinstance(last, list) else change(last)]


def _each(numbers: Any, change: Callable[[float], float]) -> Any:
    """The same lists of numbers, with each number changed."""
    if isinstance(numbers, list):
        return [_each(one, change) for one in numbers]
    return numbers if numbers is None else change(numbers)


DEFECTS |= {
    "an operation of a graph gives another result": _in_part(
        Graph, "results", "WrongValue", lambda found: _last(found, lambda x: x + 1.0)
    ),
    "the result of an operation does not arrive": _in_part(
        Graph, "results", "WrongValue", lambda found: found[:-1]
    ),
    "a leaf of a graph gets no gradient": _in_part(
        Graph, "gradients", "WrongGradient", lambda found: [*found[:-1], None]
    ),
    "a leaf that no pass reaches gets a gradient": _in_part(
        Graph, "gradients", "WrongGradient", lambda found: [one or [0.0, 0.0] for one in found]
    ),
    "a gradient of a graph comes twice": _in_part(
        Graph, "gradients", "WrongGradient", lambda found: _each(found, lambda x: 2.0 * x)
    ),
    "two contexts share their gradients": _in_part(
        Graph, "beside", "WrongGradient", lambda found: _each(found, lambda x: 2.0 * x)
    ),
    "a context inside another one is accepted": _in_part(
        Graph, "refused", "MissingError", lambda _: None
    ),
    "one process computes other gradients": _in_part(
        Graph, "alone", "WrongValue", lambda found: _last(found, lambda x: x + 1.0)
    ),
    "a layer of one process gives another output": _in_part(
        Linear,
        "alone",
        "WrongValue",
        lambda found: {**found, "outputs": _last(found["outputs"], lambda x: x + 1.0)},
    ),
    "a layer of one process shows nothing": _in_part(Linear, "alone", "WrongValue", lambda _: None),
    "a remote layer has a buffer more": _in_part(
        Linear, "state", "WrongValue", lambda found: [*found, [0.0]]
    ),
    "one process runs a hook less": _in_part(
        Graph, "hooks", "WrongValue", lambda times: max(0, times - 1)
    ),
    "an optimizer forgets what it remembers between steps": _in_part(
        Train, "parameters", "WrongValue", lambda found: _each(found, lambda x: 1.000001 * x)
    ),
    "a parameter is never trained": _in_part(
        Train, "parameters", "WrongValue", lambda found: found[:-1]
    ),
    "one process trains nothing": _in_part(Train, "alone", "WrongValue", lambda _: None),
    "a remote layer gives another output": _in_part(
        Linear, "outputs", "WrongValue", lambda found: _last(found, lambda x: x + 1.0)
    ),
    "a bias of a remote layer gets no gradient": _in_part(
        Linear, "gradients", "WrongGradient", lambda found: [*found[:-1], None]
    ),
    "a profiled call gives another sum": _in_part(
        Profile, "sum", "WrongValue", lambda found: _last(found, lambda x: x + 1.0)
    ),
    "a profiled call has no event": _in_part(
        Profile, "named", "WrongValue", lambda named: False if named else named
    ),
    "no event tells what a profiled call ran": _in_part(
        Profile, "there", "WrongValue", lambda there: False if there else there
    ),
    "a profiled call of what cannot be pickled is sent": _in_part(
        Profile, "refused", "MissingError", lambda refused: ""
    ),
    "a profiled call of what can be pickled is refused": _in_part(
        Profile, "refused", "MissingError", lambda refused: refused or "TypeError"
    ),
}


# Dynamic groups.


def _of_member(name: str, promise: str, change: Callable[[Any], Any]) -> Defect:
    """A part of what a member shows is another, where `change` changes it."""

    def falsify(world: World) -> Falsified:
        for index, leaf, expected, seen in _steps(world):
            part = expected.value.get(name) if isinstance(leaf, Member) else None
            if part is not None and (wrong := change(part)) != part:
                value = {**seen.value, name: wrong}
                outcome = with_step(world.outcome, index, value=value)
                yield outcome, [(promise, _at(leaf), index)]

    return falsify


def _does_not_know(place: int) -> Defect:
    """A member does not know one that it must know, the first or the last of these."""

    def falsify(world: World) -> Falsified:
        for index, leaf, expected, seen in _steps(world):
            value = expected.value if isinstance(leaf, Member) else {}
            known = [name for name in value or {} if name.startswith("knows")]
            if known:
                wrong = {name: one for name, one in seen.value.items() if name != known[place]}
                outcome = with_step(world.outcome, index, value=wrong)
                yield outcome, [("WrongValue", _at(leaf), index)]

    return falsify


DEFECTS |= {
    "a member is alone in its group": _of_member("members", "WrongValue", lambda seen: seen[:1]),
    "a member knows one that has left": _of_member(
        "members", "WrongValue", lambda seen: [*seen, max(seen) + 1]
    ),
    "a member keeps what one that has left used": _of_member(
        "held", "RRefLeak", lambda held: [held[0] + 1, held[1] + 1]
    ),
    "a member keeps a fork of one that has left": _of_member(
        "held", "RRefLeak", lambda held: [held[0], held[1] + 1]
    ),
    "a member loses what another one uses": _of_member(
        "held", "OwnerGone", lambda held: [max(0, number - 1) for number in held]
    ),
    "a join that must be refused is not": _of_member("refused", "MissingError", lambda _: ""),
    "a join is refused by another class of error": _of_member(
        "refused", "MissingError", lambda _: "ValueError"
    ),
    "a profiler does not see a call by which a rank joins or leaves": _of_member(
        "profiled", "WrongValue", lambda calls: calls - 1
    ),
    "a member forgets one when another has left at once": _does_not_know(0),
    "a member forgets the last one when another has left at once": _does_not_know(-1),
}


# Ranks that leave and come back: the text of one rank is another than it must be.


def _text(find: Callable[[Rejoin], int | None], now: str) -> Defect:
    """The last rank shows `now` at the place that `find` gives, if it gives one."""

    def falsify(world: World) -> Falsified:
        for index, leaf, _, seen in _steps(world):
            if not isinstance(leaf, Rejoin) or leaf.alone is not None or _is_wrong_at_one(leaf):
                continue
            if (number := find(leaf)) is not None:
                *others, last = seen.value
                changed = [*last[:number], now, *last[number + 1 :]]
                wrong = with_step(world.outcome, index, value=[*others, changed])
                yield wrong, [("WrongValue", _at(leaf), index)]

    return falsify


def _is_wrong_at_one(leaf: Rejoin) -> bool:
    return leaf.failing in FAILING[FAILING.index("one no store") :]


def _outside(leaf: Rejoin) -> int | None:
    return 1 if leaf.outside else None


def _held_then(leaf: Rejoin) -> int:
    return 1 + len(leaf.outside)


def _failed(leaf: Rejoin) -> int | None:
    # An init while RPC is running is refused to one rank only.
    return 2 + len(leaf.outside) if leaf.failing not in ("", "running") else None


def _returned(leaf: Rejoin) -> int:
    return _after_group(leaf) + bool(leaf.between)


def _after_group(leaf: Rejoin) -> int:
    return 2 + len(leaf.outside) + bool(leaf.failing)


def _in_group(leaf: Rejoin) -> int | None:
    return _after_group(leaf) if leaf.between else None


DEFECTS |= {
    "a shutdown raises and the ranks go on": _text(lambda _: 0, "RuntimeError"),
    "a call is accepted after the shutdown": _text(_outside, ""),
    "a call after the shutdown raises another class": _text(_outside, "ValueError"),
    "an RRef outlives the shutdown": _text(_held_then, "1 0"),
    "a context outlives the shutdown": _text(_held_then, "0 1"),
    "an init that must fail does not": _text(_failed, ""),
    "a second init raises": _text(_returned, "RuntimeError"),
    "a group between two worlds cannot be joined": _text(_in_group, "RuntimeError"),
    "a group between two worlds is not complete": _text(_in_group, "members 0 1, sum 3.0"),
    "a group between two worlds has one member": _text(_in_group, "members 2, sum 3.0"),
    "a call in a group between two worlds gives another sum": _text(
        _in_group, "members 0 1 2, sum 2.0"
    ),
}


# A rank that leaves alone, and those that go on; an init that goes wrong at one rank.

_Rejoins = Iterator[tuple[int, Rejoin, StepOutcome]]


def _of_alone(world: World) -> _Rejoins:
    """Each step in which a rank leaves before the others."""
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Rejoin) and leaf.alone is not None:
            yield index, leaf, seen


def _of_wrong(world: World) -> _Rejoins:
    """Each step in which an init goes wrong at one rank."""
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Rejoin) and _is_wrong_at_one(leaf):
            yield index, leaf, seen


def _says(
    steps: Callable[[World], _Rejoins], find: Callable[[Rejoin], tuple[int, int] | None], now: str
) -> Defect:
    """A rank shows `now` at the place that `find` gives: the rank, and the number of its text."""

    def falsify(world: World) -> Falsified:
        for index, leaf, seen in steps(world):
            if (found := find(leaf)) is not None:
                shown = [list(texts) for texts in seen.value]
                shown[found[0]][found[1]] = now
                yield with_step(world.outcome, index, value=shown), [("WrongValue", leaf.at, index)]

    return falsify


def _stays(leaf: Rejoin) -> int:
    """A rank that goes on, and is not the one that tells the others."""
    return next(rank for rank in range(3) if rank not in (leaf.at, leaf.alone))


def _sums(leaf: Rejoin) -> tuple[int, int]:
    return _stays(leaf), -1 - len(leaf.work)


def _attempt(name: Work) -> Callable[[Rejoin], tuple[int, int] | None]:
    def find(leaf: Rejoin) -> tuple[int, int] | None:
        if name not in leaf.work:
            return None
        return _stays(leaf), leaf.work.index(name) - len(leaf.work)

    return find


def _amid(leaf: Rejoin) -> tuple[int, int] | None:
    return (leaf.at, -1) if leaf.amid in ("serving", "backward") else None


def _leaves_alone(leaf: Rejoin) -> tuple[int, int] | None:
    """The shutdown that waits for nobody; it raises by itself where its rank owns an RRef."""
    return (leaf.alone or 0, 0) if leaf.amid != "owning" else None


def _first_waits(leaf: Rejoin) -> tuple[int, int] | None:
    """The shutdown of a rank that must notice that another one is gone."""
    if leaf.how == "at once":
        return None
    return (0 if leaf.alone else _stays(leaf)), 0


def _fails_here(leaf: Rejoin) -> tuple[int, int] | None:
    return (leaf.at, 2) if leaf.failing != "one too few" else None


DEFECTS |= {
    "a shutdown that waits for nobody raises": _says(_of_alone, _leaves_alone, "RuntimeError"),
    "those that go on cannot call each other": _says(_of_alone, _sums, "RuntimeError"),
    "those that go on get another sum": _says(_of_alone, _sums, "3.0 2.0"),
    "a call of a rank that is gone is answered": _says(_of_alone, _attempt("sync"), ""),
    "a future of a rank that is gone has a value": _says(_of_alone, _attempt("async"), ""),
    "a call through another rank of one that is gone is answered": _says(
        _of_alone, _attempt("through"), ""
    ),
    "a call of a rank that is gone raises another class": _says(
        _of_alone, _attempt("sync"), "ValueError"
    ),
    "the name of a rank that is gone is forgotten": _says(
        _of_alone, _attempt("info"), "RuntimeError"
    ),
    "what a rank left amid has no error": _says(_of_alone, _amid, ""),
    "a graceful shutdown without all ranks does not raise": _says(_of_alone, _first_waits, ""),
    "a rank that left alone cannot come back": _says(
        _of_alone, lambda leaf: (leaf.alone or 0, -1), "RuntimeError"
    ),
    "an init that must fail at one rank does not": _says(_of_wrong, _fails_here, ""),
    "an init that goes wrong at one rank raises another class": _says(
        _of_wrong, lambda leaf: (leaf.at, 1 + len(leaf.outside) + 1), "TypeError"
    ),
    "an init that went wrong at one rank keeps another from coming back": _says(
        _of_wrong, lambda leaf: ((leaf.at + 1) % 3, -1), "RuntimeError"
    ),
}


@defect("a profiler around a context lacks one of its calls")
def _context_unprofiled(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if (
            isinstance(leaf, Context)
            and leaf.profiled
            and leaf.path
            and isinstance(seen.value, dict)
        ):
            value = {**seen.value, "profiled": seen.value["profiled"] - 1}
            yield with_step(world.outcome, index, value=value), [("WrongValue", leaf.at, index)]


@defect("a profiler around a shutdown shows another number of its calls")
def _shutdown_unprofiled(world: World) -> Falsified:
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Rejoin) and leaf.profiled:
            shown = [list(texts) for texts in seen.value]
            shown[-1][-1] = "3 profiled"
            yield with_step(world.outcome, index, value=shown), [("WrongValue", leaf.at, index)]


@defect("a rank waits in vain for one that is gone")
def _waits_for_gone(world: World) -> Falsified:
    for index, leaf, _ in _of_alone(world):
        cut = hanging(world.outcome, "run", leaf.at, index)
        yield cut, [("RankHung", leaf.at, None)]


def _of_running(world: World) -> Iterator[tuple[int, Rejoin, StepOutcome]]:
    """Each step in which one rank must be refused an init, because RPC is running there."""
    for index, leaf, _, seen in _steps(world):
        if isinstance(leaf, Rejoin) and leaf.failing == "running":
            yield index, leaf, seen


@defect("an init is accepted while RPC is running")
def _accepted_init(world: World) -> Falsified:
    for index, leaf, seen in _of_running(world):
        shown = [list(texts) for texts in seen.value]
        shown[leaf.at][-2] = ""
        yield with_step(world.outcome, index, value=shown), [("WrongValue", leaf.at, index)]


@defect("an init that was refused is counted, and the next one of all ranks hangs")
def _counted_init(world: World) -> Falsified:
    for index, leaf, _ in _of_running(world):
        cut = hanging(world.outcome, "run", leaf.at, index)
        yield cut, [("RankHung", leaf.at, None)]


# Calls.


def _calls(world: World) -> Iterator[tuple[int, str, int]]:
    for rank in world.outcome.ranks:
        for name, times in sorted(rank.calls.items()):
            yield rank.rank, name, times


@defect("a call runs twice")
def _twice(world: World) -> Falsified:
    for rank, name, times in _calls(world):
        wrong = calling(world.outcome, rank, {name: times + 1})
        yield wrong, [("NotRunOnce", rank, None)]


@defect("a call never runs")
def _never(world: World) -> Falsified:
    for rank, name, times in _calls(world):
        if name in world.prediction.abandoned_calls[rank]:
            continue
        yield calling(world.outcome, rank, {name: times - 1}), [("NotRunOnce", rank, None)]


@defect("a call runs at another rank")
def _elsewhere(world: World) -> Falsified:
    size = world.program.world_size
    for rank, name, times in _calls(world):
        other = (rank + 1) % size
        if other == rank or name in world.prediction.abandoned_calls[rank]:
            continue
        there = world.outcome.ranks[other].calls.get(name, 0)
        moved = calling(world.outcome, rank, {name: times - 1})
        moved = calling(moved, other, {name: there + 1})
        yield moved, [("NotRunOnce", low, None) for low in sorted((rank, other))]


@defect("a call runs that nobody made")
def _unasked(world: World) -> Falsified:
    for rank in range(world.program.world_size):
        yield calling(world.outcome, rank, {"step99": 1}), [("NotRunOnce", rank, None)]


# What ranks hold, at a settle or at the end.

_Change: TypeAlias = Callable[[Counters], Mapping[str, int] | None]


def _holding(promise: str, change: _Change, *, at_end: bool) -> Defect:
    """A rank holds something else than it should."""

    def held(world: World) -> Falsified:
        if at_end:
            ranks = world.outcome.ranks if world.program.settles else ()
            for rank in ranks:
                changes = change(rank.counters or Counters())
                if changes:
                    wrong = holding(world.outcome, rank.rank, **changes)
                    yield wrong, [(promise, rank.rank, None)]
            return
        for index, leaf in enumerate(world.program.leaves):
            if isinstance(leaf, Settle):
                for rank_number, counters in enumerate(world.outcome.steps[index].counters):
                    changes = change(counters)
                    if changes:
                        wrong = settled_with(world.outcome, index, rank_number, **changes)
                        yield wrong, [(promise, rank_number, index)]

    return held


def _one_fork_more(held: Counters) -> Mapping[str, int]:
    return {"owners": held.owners or 1, "forks": held.forks + 1}


def _one_fork_less(held: Counters) -> Mapping[str, int] | None:
    if not held.forks:
        return None
    return {"owners": min(held.owners, held.forks - 1), "forks": held.forks - 1}


def _more(name: str) -> _Change:
    return lambda held: {name: getattr(held, name) + 1}


def _forget_contexts(held: Counters) -> Mapping[str, int] | None:
    return {"contexts": 0} if held.contexts else None


for _name, _promise, _change in (
    ("a delete is dropped", "RRefLeak", _one_fork_more),
    ("a delete is sent too early, or twice", "OwnerGone", _one_fork_less),
    ("an accept is forgotten", "RRefLeak", _more("pending_users")),
    ("a creation is never confirmed", "RRefLeak", _more("pending_futures")),
    ("a context is kept", "ContextLeak", _more("contexts")),
    ("a backward pass is kept", "ContextLeak", _more("backward_passes")),
    ("a context is let go that nobody cleaned up", "ContextLeak", _forget_contexts),
    ("a call is served for ever", "CallLeak", _more("server_calls")),
    ("an asynchronous call is served for ever", "CallLeak", _more("server_async_calls")),
    ("a call is awaited for ever", "CallLeak", _more("client_calls")),
):
    DEFECTS[_name] = _holding(_promise, _change, at_end=True)
    DEFECTS[f"{_name}, at a settle"] = _holding(_promise, _change, at_end=False)


# How ranks live and leave.


def _first_step(world: World) -> int | None:
    return next((index for index, *_ in _steps(world)), None)


@defect("a rank is killed while a step runs")
def _killed(world: World) -> Falsified:
    first = _first_step(world)
    if first is None:
        return
    for rank in range(world.program.world_size):
        cut = with_step(stopped(world.outcome, first + 1), first, value=None, ended=False)
        yield with_rank(cut, rank, killed=False, signal=9), [("RankDied", rank, None)]


@defect("a rank is killed, and its peer says so")
def _killed_and_told(world: World) -> Falsified:
    first = _first_step(world)
    if first is None:
        return
    for rank in range(world.program.world_size):
        cut = with_step(stopped(world.outcome, first + 1), first, value=None, error=LOST)
        yield with_rank(cut, rank, killed=False, signal=11), [("RankDied", rank, None)]


@defect("a rank leaves before its time")
def _left(world: World) -> Falsified:
    first = _first_step(world)
    if first is None:
        return
    for rank in range(world.program.world_size):
        cut = stopped(world.outcome, first)
        yield with_rank(cut, rank, killed=False, exit_code=0), [("RankDied", rank, None)]


@defect("a rank never joins")
def _never_joins(world: World) -> Falsified:
    phase = PhaseOutcome("start", "failed", detail="joining the world raised")
    yield (
        dataclasses.replace(stopped(world.outcome, 0), phases=(phase,)),
        [("UnexpectedError", None, None)],
    )


@defect("a rank stops in a step")
def _hangs(world: World) -> Falsified:
    first = _first_step(world)
    if first is None:
        return
    for rank in range(world.program.world_size):
        cut = hanging(world.outcome, "run", rank, first + 1)
        yield with_step(cut, first, value=None, ended=False), [("RankHung", rank, None)]


@defect("a rank stops while the world settles")
def _hangs_settling(world: World) -> Falsified:
    if world.program.settles:
        for rank in range(world.program.world_size):
            cut = hanging(world.outcome, "settle", rank, len(world.outcome.steps))
            yield cut, [("RankHung", rank, None)]


def _graceful(world: World) -> Iterator[int]:
    """The ranks that shut down and have nothing to report."""
    seen = world.prediction
    if seen.graceful:
        for rank in range(world.program.world_size):
            if rank not in seen.leaking | seen.may_leak | seen.may_warn_unreleased_context:
                yield rank


@defect("a rank stops in its shutdown")
def _hangs_leaving(world: World) -> Falsified:
    for rank in _graceful(world):
        cut = hanging(world.outcome, "shutdown", rank, len(world.outcome.steps))
        yield cut, [("RankHung", rank, None)]


@defect("a rank is killed in its shutdown")
def _killed_leaving(world: World) -> Falsified:
    for rank in _graceful(world):
        wrong = with_rank(world.outcome, rank, exit_code=None, signal=6)
        yield wrong, [("RankDied", rank, None)]


@defect("a second shutdown is accepted")
def _second_shutdown(world: World) -> Falsified:
    error = RaisedError("AssertionError", "a second rpc.shutdown() was accepted")
    for rank in _graceful(world) if world.program.end.how == "twice" else ():
        wrong = with_rank(world.outcome, rank, shutdown_error=error, exit_code=72)
        yield wrong, [("UngracefulShutdown", rank, None)]


@defect("a shutdown raises")
def _raises_leaving(world: World) -> Falsified:
    for rank in _graceful(world):
        wrong = with_rank(world.outcome, rank, shutdown_error=LOST, exit_code=72)
        yield wrong, [("UngracefulShutdown", rank, None)]


@defect("a rank leaves with an error")
def _exits(world: World) -> Falsified:
    for rank in _graceful(world):
        yield with_rank(world.outcome, rank, exit_code=3), [("UngracefulShutdown", rank, None)]


@defect("a shutdown finds a leak")
def _leaks_leaving(world: World) -> Falsified:
    for rank in _graceful(world):
        yield with_rank(world.outcome, rank, log=LEAKING), [("RRefLeak", rank, None)]


@defect("a shutdown cannot release a context")
def _keeps_leaving(world: World) -> Falsified:
    for rank in _graceful(world):
        yield with_rank(world.outcome, rank, log=CONTEXT_LEAK), [("ContextLeak", rank, None)]


def _wrote(world: World, line: str) -> Falsified:
    """Each rank in turn wrote one more line."""
    for rank in world.outcome.ranks:
        log = f"{rank.log}\n{line}".strip()
        yield with_rank(world.outcome, rank.rank, log=log), [("ErrorInLog", rank.rank, None)]


@defect("an internal assertion of torch fails")
def _assertion(world: World) -> Falsified:
    yield from _wrote(world, ASSERTION)


@defect("a thread of torch raises")
def _thread_raises(world: World) -> Falsified:
    yield from _wrote(world, TRACEBACK)


@defect("an owner waits for a delete that nobody lost")
def _owner_waits(world: World) -> Falsified:
    may = world.prediction.leaking | world.prediction.may_leak
    for falsified, (place,) in _wrote(world, OWNER_WAITED):
        if place[1] not in may:
            yield falsified, [place]


@defect("a user waits for an accept that nobody lost")
def _user_waits(world: World) -> Falsified:
    for falsified, (place,) in _wrote(world, USER_WAITED):
        rank = place[1]
        if rank not in world.prediction.waiting | world.prediction.leaking:
            yield falsified, [place]


def _after_shutdown(promise: str, field: str) -> Defect:
    """Each rank in turn still holds one more of these once its shutdown has returned."""

    def falsify(world: World) -> Falsified:
        said = world.prediction
        may = said.leaking | said.may_leak
        for rank in world.outcome.ranks:
            held = rank.counters_after_shutdown
            if held is None:
                continue
            most = said.most_left[rank.rank] if said.most_left else held
            # An owner that may report a leak may hold what leaks: how much is known where the ranks
            # shut down at once while something is under way.
            if promise == "RRefLeak" and rank.rank in may and not said.most_left:
                continue
            now = 1 + (
                said.contexts_left[rank.rank][-1] if field == "contexts" else getattr(most, field)
            )
            more = dataclasses.replace(held, **{field: now})
            falsified = with_rank(world.outcome, rank.rank, counters_after_shutdown=more)
            yield falsified, [(promise, rank.rank, None)]

    return falsify


for _promise, _field in (
    ("ContextLeak", "contexts"),
    ("ContextLeak", "backward_passes"),
    ("RRefLeak", "owners"),
    ("RRefLeak", "forks"),
    ("RRefLeak", "pending_users"),
):
    _name = f"a rank still holds {_field.replace('_', ' ')} after its shutdown"
    DEFECTS[_name] = _after_shutdown(_promise, _field)


@defect("a leak goes unreported")
def _unreported(world: World) -> Falsified:
    for rank in sorted(world.prediction.leaking):
        wrong = with_rank(world.outcome, rank, exit_code=0, shutdown_error=None)
        yield wrong, [("MissingError", rank, None)]


# The record of messages, which some agents keep.


def _record(world: World) -> list[SentMessage]:
    """The requests that the model predicts, and those that ranks and groups add."""
    sends = (*world.prediction.sends, *world.prediction.last_sends)
    kinds = [(send.rank, send.to, str(send.message)) for send in sends]
    for (rank, to, message), times in world.prediction.wire_sends.items():
        kinds += [(rank, to, str(message))] * times
    for (rank, to), times in (world.prediction.told or {}).items():
        kinds += [(rank, to, "PYTHON_CALL")] * times
    gathers = world.prediction.graceful and world.program.gathers
    for rank in range(1, world.outcome.world_size) if gathers else ():
        kinds += [(rank, 0, "PYTHON_CALL"), (0, rank, "PYTHON_CALL")]
    found = [
        SentMessage(float(number), rank, to, number, kind, is_request=True, first_id=number)
        for number, (rank, to, kind) in enumerate(kinds)
        if to is not None
    ]
    again = [
        sent for sent in found if sent.id < len(sends) for _ in range(_retries(sends[sent.id]))
    ]
    for number, sent in enumerate(again, len(kinds)):
        found.append(dataclasses.replace(sent, id=number, retry=1))
    return found


def _retries(send: Send) -> int:
    """How often it is sent again."""
    return send.failures + send.delivered - 1 if send.message.is_retryable else 0


@defect("a message is sent that was not promised")
def _sends_more(world: World) -> Falsified:
    record = _record(world)
    last = [sent for sent in record if sent.type in MessageType.__members__][-1:]
    for sent in last if world.prediction.certain else ():
        again = dataclasses.replace(sent, id=len(record), first_id=len(record))
        wrong = dataclasses.replace(world.outcome, messages=(*record, again))
        yield wrong, [("MessagesDiffer", sent.sender, None)]


@defect("a promised message is not sent")
def _sends_less(world: World) -> Falsified:
    record = _record(world)
    left = world.prediction.contexts_left
    # A rank that ends early may lack any, and one that a cleanup may not reach lacks its own.
    surely = [
        sent
        for sent in record
        if sent.type in MessageType.__members__
        and sent.sender not in world.prediction.may_exit_early
        and not (sent.type == "CLEANUP_AUTOGRAD_CONTEXT_REQ" and len(left[sent.sender]) > 1)
        and (sent.sender, sent.receiver, sent.type) not in world.prediction.may_lack
    ]
    if surely and len(record) > 1 and world.prediction.certain:
        rest = tuple(sent for sent in record if sent.first_id != surely[0].first_id)
        yield (
            dataclasses.replace(world.outcome, messages=rest),
            [("MessagesDiffer", surely[0].sender, None)],
        )


def _tried(more: int) -> Defect:
    """What torch tries again is sent once more, or once less, though it is to go on."""

    def falsify(world: World) -> Falsified:
        said = world.prediction
        is_known = said.certain and world.program.settles and said.told is None
        record = _record(world)
        for number, sent in enumerate(record if is_known else ()):
            if sent.sender in said.may_exit_early or not (more > 0 or sent.retry):
                continue
            if (sent.sender, sent.type) in said.tries_in_vain:
                continue
            if MessageType.__members__.get(sent.type, MessageType.PYTHON_CALL).is_retryable:
                again = dataclasses.replace(sent, id=len(record), retry=1)
                rest = (*record[:number], *record[number + 1 :])
                messages = (*record, again) if more > 0 else rest
                wrong = dataclasses.replace(world.outcome, messages=messages)
                yield wrong, [("MessagesDiffer", sent.sender, None)]

    return falsify


DEFECTS["a message is tried once more than promised"] = _tried(1)
DEFECTS["a message is tried once less than promised"] = _tried(-1)


def _in_contexts(message: WireMessageType, more: int) -> Defect:
    """A message of a context comes once more, or lacks, between each two ranks."""

    def falsify(world: World) -> Falsified:
        record = _record(world)
        for kind in sorted(world.prediction.wire_sends) if world.prediction.certain else ():
            rank, to, _ = kind
            # Of these, more may come, or some lack.
            if kind[2] is not message or (more > 0 and kind in world.prediction.wire_more):
                continue
            if more < 0 and kind in world.prediction.may_lack:
                continue
            place = next(
                number
                for number, sent in enumerate(record)
                if (sent.sender, sent.receiver, sent.type) == (rank, to, message)
            )
            again = dataclasses.replace(record[place], id=len(record), first_id=len(record))
            rest = (*record[:place], *record[place + 1 :])
            messages = (*record, again) if more > 0 else rest
            # A run without any message was not recorded.
            if messages:
                wrong = dataclasses.replace(world.outcome, messages=messages)
                yield wrong, [("MessagesDiffer", rank, None)]

    return falsify


for _message, _words in (
    (WireMessageType.FORWARD_AUTOGRAD_REQ, "call in a context"),
    (WireMessageType.BACKWARD_AUTOGRAD_REQ, "gradient"),
    (WireMessageType.RUN_WITH_PROFILING_REQ, "call in a profiler"),
    (WireMessageType.RREF_BACKWARD_REQ, "pass that an owner is asked to run"),
):
    DEFECTS[f"a {_words} is sent that was not promised"] = _in_contexts(_message, 1)
    DEFECTS[f"a promised {_words} is not sent"] = _in_contexts(_message, -1)


@defect("a call in a context is sent outside of it")
def _plain_in_context(world: World) -> Falsified:
    record = _record(world)
    forward = WireMessageType.FORWARD_AUTOGRAD_REQ
    certain = world.prediction.certain
    for kind in sorted(world.prediction.wire_sends) if certain else ():
        is_open = kind in world.prediction.wire_more or kind in world.prediction.may_lack
        if kind[2] is not forward or is_open:
            continue
        place = next(
            number
            for number, sent in enumerate(record)
            if (sent.sender, sent.receiver, sent.type) == kind
        )
        plain = dataclasses.replace(record[place], type="SCRIPT_CALL")
        wrong = dataclasses.replace(
            world.outcome, messages=(*record[:place], plain, *record[place + 1 :])
        )
        yield wrong, [("MessagesDiffer", kind[0], None)] * 2


#: The answer of a call in a context that holds no tensor which requires a gradient.
_PLAIN = "PYTHON_RET"


def _answered(world: World) -> list[tuple[SentMessage, SentMessage]]:
    """Each request of the record that is answered, and its answer, as the model predicts them."""
    said = world.prediction
    errors, graded = dict(said.errors), dict(said.graded)
    sends = (*said.sends, *said.last_sends)
    lost = {number for number, send in enumerate(sends) if not send.delivered}
    found: list[tuple[SentMessage, SentMessage]] = []
    for sent in _record(world):
        if sent.retry or sent.first_id in lost:
            continue
        kind = WireMessageType(sent.type)
        place = (sent.sender, sent.receiver, kind)
        is_error = errors.get(place, 0) > 0
        if is_error:
            errors[place] -= 1
        name = str(kind.answer)
        if kind is WireMessageType.FORWARD_AUTOGRAD_REQ and not is_error:
            left = graded.get(place[:2], 0)
            graded[place[:2]] = left - 1
            name = name if left > 0 else _PLAIN
        answer = dataclasses.replace(
            sent,
            sender=sent.receiver,
            receiver=sent.sender,
            type="EXCEPTION" if is_error else name,
            is_request=False,
        )
        found.append((dataclasses.replace(sent, became="answered"), answer))
    return found


def _answers_otherwise(is_error: bool, other: str) -> Defect:
    """One request of each type between two ranks gets another class of answer."""

    def falsify(world: World) -> Falsified:
        record = {sent.id: sent for sent in _record(world)}
        # Where a finding changes what an answer is, the classes of answers are not compared.
        met = [FINDINGS[name] for name in world.prediction.known_bugs]
        compared = world.prediction.certain and not any(one.changes_answers for one in met)
        pairs = _answered(world) if compared else []
        whole = {**record, **{sent.id: sent for sent, _ in pairs}}
        seen = set[Any]()
        for number, (sent, answer) in enumerate(pairs):
            place = (sent.sender, sent.receiver, WireMessageType(sent.type))
            if (answer.type == "EXCEPTION") != is_error or place in seen:
                continue
            more = other == "EXCEPTION" and place in world.prediction.more_errors
            more |= bool(other) and place in world.prediction.may_lack
            # As many may lack as requests are not answered.
            unanswered = sum(
                one.became != "answered" and (one.sender, one.receiver, one.type) == place
                for one in whole.values()
            )
            if more or (is_error and unanswered):
                continue
            seen.add(place)
            answers = [one for _, one in pairs]
            wrong_type = "CLEANUP_AUTOGRAD_CONTEXT_RESP"
            of_another = "RREF_ACK" if sent.type.startswith("CLEANUP") else wrong_type
            name = {"RET": str(place[2].answer), "": of_another}.get(other, other)
            answers[number] = dataclasses.replace(answer, type=name)
            wrong = dataclasses.replace(world.outcome, messages=(*whole.values(), *answers))
            yield wrong, [("MessagesDiffer", sent.receiver, None)]

    return falsify


def _grades_otherwise(old: str, new: str) -> Defect:
    """One answer of a call in a context has a gradient, or lacks the one that it must have."""

    def falsify(world: World) -> Falsified:
        compared = world.prediction.certain and not world.prediction.known_bugs
        pairs = _answered(world) if compared else []
        record = {sent.id: sent for sent in _record(world)}
        whole = {**record, **{sent.id: sent for sent, _ in pairs}}
        forward = WireMessageType.FORWARD_AUTOGRAD_REQ
        seen = set[Any]()
        for number, (sent, answer) in enumerate(pairs):
            place = (sent.sender, sent.receiver)
            # Where ranks leave at once, a call may lack, and with it its answer.
            may_lack = old == _GRADED and (*place, forward) in world.prediction.may_lack
            is_open = place in seen or may_lack or place in world.prediction.more_graded
            if sent.type != forward or answer.type != old or is_open:
                continue
            seen.add(place)
            answers = [one for _, one in pairs]
            answers[number] = dataclasses.replace(answer, type=new)
            wrong = dataclasses.replace(world.outcome, messages=(*whole.values(), *answers))
            yield wrong, [("MessagesDiffer", sent.receiver, None)]

    return falsify


_GRADED = "FORWARD_AUTOGRAD_RESP"
DEFECTS["the answer of a call in a context has a gradient too many"] = _grades_otherwise(
    _PLAIN, _GRADED
)
DEFECTS["the answer of a call in a context lacks its gradient"] = _grades_otherwise(_GRADED, _PLAIN)
DEFECTS["an error answers where none was promised"] = _answers_otherwise(False, "EXCEPTION")
DEFECTS["a value answers where an error was promised"] = _answers_otherwise(True, "RET")
DEFECTS["a request gets the answer of another one"] = _answers_otherwise(False, "")


# What fires. Of a rank whose last deletes nobody waits for, some counts may be.


@defect("a failure fires that was not armed")
def _fires_more(world: World) -> Falsified:
    if world.program.settles and world.prediction.certain:
        for rank, numbers in enumerate(world.prediction.failed_sends()):
            wrong = with_rank(world.outcome, rank, failed_sends=numbers[-1] + 1)
            yield wrong, [("FaultsDiffer", rank, None)]


@defect("a failure does not fire")
def _fires_less(world: World) -> Falsified:
    if world.program.settles and world.prediction.certain:
        for rank, numbers in enumerate(world.prediction.failed_sends()):
            if numbers[0]:
                wrong = with_rank(world.outcome, rank, failed_sends=numbers[0] - 1)
                yield wrong, [("FaultsDiffer", rank, None)]


@defect("a delay does not happen")
def _not_late(world: World) -> Falsified:
    if world.program.settles and world.prediction.certain:
        for rank in world.outcome.ranks:
            for length, times in (rank.delayed_sends or {}).items():
                if times:
                    fewer = {**(rank.delayed_sends or {}), length: times - 1}
                    wrong = with_rank(world.outcome, rank.rank, delayed_sends=fewer)
                    yield wrong, [("FaultsDiffer", rank.rank, None)]
