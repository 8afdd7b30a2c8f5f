"""Drawn programs, each with faults of messages that it sends, for the agent ``wire``.

The oracle predicts which messages a program sends, and in which order. So a fault names one of
them, and a message that is held waits for one that comes. What the oracle does not predict is left
out (``oracle/_messages.py`` has the reasons, and where they stand in torch).
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hypothesis import assume
from hypothesis import strategies as st

from rpcprops.errors import UsageError
from rpcprops.faults import (
    FaultPlan,
    FaultTable,
    MessageAction,
    MessageFault,
    NthMessage,
    WireMessageType,
)
from rpcprops.oracle import Prediction, predict
from rpcprops.programs import Context, Drop, End, Fetch, Program, Remote, Shutdown, Step
from rpcprops.properties._base import Case
from rpcprops.properties._messages import SHARING, TIMEOUT, TOO_LATE, in_context
from rpcprops.strategies import fault_tables, programs_under_faults
from rpcprops.strategies.drawing import KINDS
from rpcprops.strategies.late import Late, waits_of
from rpcprops.torch_facts import TorchFacts, installed

#: The most message faults in a case.
_MOST = 3
#: Kinds of step that show when messages come, so that nothing is predicted where any is late.
_TIMED = ("outlast", "onward", "fail_twice", "unreached")
#: Actions that only requests can have.
_OF_REQUESTS = ("fail", "duplicate")
#: Virtual seconds by which messages are late.
_DELAYS = (0.5, 1.0, 2.0, 30.0)
#: The same where the program has a default timeout: the last are later than that.
_LATE = (0.5, 2.0, TOO_LATE, TOO_LATE)
#: Virtual seconds for which they wait at most: the last are real seconds, also under a fast clock,
#: in which several further steps run.
_HOLDS = (1.0, 30.0, 120.0)
_MOSTLY_LONG = (*_HOLDS, *_HOLDS[-1:] * 2)
#: The timeout of a step whose message is held or late for longer, in virtual seconds.
GIVEN_UP = 0.5
_REMOTES = (WireMessageType.PYTHON_REMOTE_CALL, WireMessageType.SCRIPT_REMOTE_CALL)
_FETCHES = (WireMessageType.PYTHON_RREF_FETCH_CALL, WireMessageType.SCRIPT_RREF_FETCH_CALL)
_FORWARD = (WireMessageType.FORWARD_AUTOGRAD_REQ, WireMessageType.FORWARD_AUTOGRAD_RESP)
_DELETE = WireMessageType.RREF_USER_DELETE
#: Messages for which a program seldom waits, so that it goes on while they are held.
_UNAWAITED = frozenset(
    {
        *_REMOTES,
        WireMessageType.RREF_CHILD_ACCEPT,
        *_FETCHES,
        _DELETE,
    }
)
#: How programs end, who comes late to that (`strategies/late.py`), and whether they settle before;
#: None: as they do. Most end as usual, because a used world takes only these.
_ENDS: tuple[tuple[Shutdown, Late, bool | None], ...] = (
    *(("graceful", "", None),) * 9,
    ("at once", "", True),
    ("at once", "", False),
    ("graceful", "one", None),
    ("timed out", "one", None),
    ("at once", "one", False),
    ("twice", "", None),
    ("timeout", "others", None),
    ("timed out", "others", None),
    ("at once", "others", False),
    ("graceful", "some", None),
)
_Which = Literal["nth", "first", "every"]
_WHICH: tuple[_Which, ...] = ("nth", "nth", "nth", "nth", "first", "every")


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that a program sends: a request or an answer, by its number at its sender.

    Attributes:
        n: its number among those of its type and sender that go to `to`.
        of_all: its number among all of its type and sender.
        place: the place of its request among all requests.
    """

    rank: int
    to: int
    message: WireMessageType
    n: int
    of_all: int
    place: int

    def nth(self, *, to_any: bool) -> NthMessage:
        """The message, as one of all that its rank sends, or of those that have its receiver."""
        return NthMessage(
            self.rank,
            self.message,
            to=None if to_any else self.to,
            n=self.of_all if to_any else self.n,
        )


def sent_under(program: Program, prediction: Prediction) -> tuple[Sent, ...]:
    """All messages that a program sends, with those of its shutdown, as far as they are predicted.

    What is tried again is the message that arrives: faults count the tries that fail as well.
    """
    requests = [
        (send.rank, send.to, WireMessageType(send.message), send.failures, send.delivered)
        for send in (*prediction.sends, *prediction.last_sends)
        if send.to is not None
    ]
    for leaf in program.leaves:
        if isinstance(leaf, Context):
            requests += [(*kind, 0, True) for kind in in_context(leaf)]
    counts = Counter[tuple[int, int | None, WireMessageType]]()
    found: list[Sent] = []

    def count(rank: int, to: int, message: WireMessageType, times: int, place: int) -> Sent:
        counts[rank, to, message] += times
        counts[rank, None, message] += times
        numbers = (counts[rank, to, message], counts[rank, None, message])
        return Sent(rank, to, message, *numbers, place)

    for place, (rank, to, message, failures, delivered) in enumerate(requests):
        sent = count(rank, to, message, failures + delivered, place)
        if delivered:
            found.append(sent)
            if message.answer is not None:
                found.append(count(to, rank, message.answer, 1, place))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Form:
    """A sort of case: the programs, and what happens to their messages.

    Attributes:
        kinds: the kinds of step.
        rpc_timeout: that of the program, in virtual seconds; None: whatever is drawn.
        branches: whether steps run at the same time.
        settles: whether the program settles at its end; None: either.
    """

    actions: tuple[MessageAction, ...]
    kinds: tuple[str, ...]
    rpc_timeout: float | None = None
    branches: bool = False
    settles: bool | None = None


_IN_ORDER = (*SHARING, "settle", "refused")
_OF_RREFS = ("remote", "share", "own", "fetch", "drop")
_FORMS = (
    # What is late changes nothing, so programs may do whatever does not show when messages come.
    _Form(
        ("delay", "hold", "hold"),
        tuple(kind for kind in KINDS if kind not in _TIMED),
        branches=True,
    ),
    # Few kinds, which go on with the same RRefs: what comes of them may depend on the order.
    _Form(("hold", "hold", "delay"), _OF_RREFS),
    _Form(("hold",), _OF_RREFS, settles=False),
    # Of what is lost or comes twice, it must be certain which message it is.
    _Form(("fail", "duplicate", "lose", "hold", "delay"), _IN_ORDER),
    _Form(("lose", "lose", "delay", "fail"), _IN_ORDER, rpc_timeout=TIMEOUT, settles=True),
)


def drawn_under_message_faults(facts: TorchFacts) -> st.SearchStrategy[Case]:
    """Drawn programs, each for a drawn plan in which faults of messages come beside tables.

    Args:
        facts: what is known of the torch that they are drawn for: faults that make a program meet
            its findings are left out. Which faults are predicted depends on the installed one.
    """
    return st.sampled_from(_FORMS).flatmap(functools.partial(_of_form, facts))


def _of_form(facts: TorchFacts, form: _Form) -> st.SearchStrategy[Case]:
    # A program that does not settle may meet that finding without any message fault.
    early = facts.has_bug("shutdown-overtakes-creation")
    # Most plans have no table: one that fails a type leaves no fault of that type.
    nothing = st.just(FaultTable())
    drawn = programs_under_faults(
        min_world_size=2,
        max_world_size=4,
        max_steps=10,
        tables=st.one_of(nothing, nothing, fault_tables()),
        kinds=form.kinds,
        branches=form.branches,
        settles=None if form.settles is False and early else form.settles,
        facts=facts,
    )
    return disturbed(drawn, facts, form.actions, form.rpc_timeout)


@st.composite
def disturbed(
    draw: st.DrawFn,
    drawn: st.SearchStrategy[tuple[Program, FaultPlan]],
    facts: TorchFacts,
    actions: Sequence[MessageAction],
    rpc_timeout: float | None = None,
) -> Case:
    """Programs and plans that are drawn, with one to three message faults more.

    Args:
        facts: as for :func:`drawn_under_message_faults`.
        actions: what may happen to messages; one that stands there twice comes more often.
        rpc_timeout: that of the programs, in virtual seconds; None: the one that was drawn.
    """
    program, plan = draw(drawn)
    program = replace(program, end=End(), settles=program.settles or program.ends_hastily)
    if rpc_timeout is not None:
        program = replace(program, rpc_timeout=rpc_timeout, num_worker_threads=None)
    case = Case(_with_end(draw, program, plan), plan)
    for _ in range(draw(st.integers(1, _MOST))):
        case = _with_one_more(draw, case, facts, draw(st.sampled_from(actions)))
    assume(case.plan.others)
    return case


def _with_end(draw: st.DrawFn, program: Program, plan: FaultPlan) -> Program:
    """The program with an end of its own, if that is predicted under the plan."""
    how, late, settles = draw(st.sampled_from(_ENDS))
    number = draw(st.integers(0, 2**program.world_size - 1)) if late else 0
    end = End(how, waits_of(late, number, program.world_size))
    settled = program.settles if settles is None else settles
    try:
        changed = replace(program, end=end, settles=settled)
    except UsageError:
        return program
    return changed if _predicted(Case(changed, plan)) is not None else program


def _with_one_more(draw: st.DrawFn, case: Case, facts: TorchFacts, action: MessageAction) -> Case:
    """The case with another fault, if what was drawn is predicted."""
    before = _predicted(case)
    if before is None:
        return case
    rows = [
        one
        for one in sent_under(case.program, before)
        if one.message.is_request or action not in _OF_REQUESTS
    ]
    if not rows:
        return case
    for program, fault in _drawn(draw, case.program, action, rows):
        changed = Case(program, replace(case.plan, others=(*case.plan.others, fault)))
        after = _predicted(changed)
        if after is None or fault in case.plan.others:
            continue
        if not any(map(facts.has_bug, after.known_bugs - before.known_bugs)):
            return changed
    return case


def _predicted(case: Case) -> Prediction | None:
    """What a case shows in the installed torch; None if that is not predicted."""
    try:
        return predict(case.program, case.plan, installed())
    except UsageError:
        return None


def _any_of(draw: st.DrawFn, rows: Sequence[Sent]) -> Sent:
    """One of them; its type is drawn first, so that what a program sends seldom comes as often."""
    kind = draw(st.sampled_from(tuple(dict.fromkeys(one.message for one in rows))))
    return draw(st.sampled_from([one for one in rows if one.message is kind]))


def _drawn(
    draw: st.DrawFn,
    program: Program,
    action: MessageAction,
    rows: Sequence[Sent],
) -> Iterator[tuple[Program, MessageFault]]:
    """Faults of one of these messages, each with its program; the first that is predicted counts.

    They differ in how long the message is late.
    """
    behind = [
        (fault_of, late)
        for fault_of, could_be_late in _BEHIND_DELETES.get(action, ())
        if (late := [one for one in rows if could_be_late(program, one)])
    ]
    comes_after: bool = draw(st.booleans()) if behind else False
    if comes_after:
        fault_of, late = behind[0]
        yield from fault_of(program, _any_of(draw, late), rows)
        return
    unawaited = [one for one in rows if one.message in _UNAWAITED]
    fetches = [one for one in rows if one.message in _FETCHES]
    # Half of what is held or late are messages that others can overtake.
    free = {"hold": unawaited, "delay": fetches}.get(action)
    one = _any_of(draw, free if free and draw(st.booleans()) else rows)
    held = one.nth(to_any=draw(st.booleans()))
    which = draw(st.sampled_from(_WHICH))
    delays: Sequence[float] = (0.0,)
    until = None
    if action == "delay":
        delays = (draw(st.sampled_from(_DELAYS if program.rpc_timeout is None else _LATE)),)
    elif action == "hold":
        # What comes after it can wait for it, unless the program does.
        other = _any_of(draw, [row for row in rows if row.place > one.place] or rows)
        until = other.nth(to_any=draw(st.booleans()))
        most = draw(st.sampled_from(_MOSTLY_LONG if one in unawaited else _HOLDS[:1]))
        delays = tuple(delay for delay in reversed(_HOLDS) if delay <= most)
    # The first messages include the one after it, for the first alone is the nth.
    n = {"nth": held.n, "first": held.n + 1, "every": 1}[which]
    given: Any = {"to": held.to, "which": which, "n": n, "until": until}
    for number, delay in enumerate(delays):
        if not number and one.message in _FORWARD and action in ("lose", "delay"):
            lateness = TOO_LATE if action == "delay" else 0.0
            fault = MessageFault(held.rank, action, held.message, delay=lateness, **given)
            yield _with_timed_contexts(program), fault
        try:
            fault = MessageFault(held.rank, action, held.message, delay=delay, **given)
        except UsageError:
            # It would wait for itself.
            return
        yield program, fault


_Drawn = Iterator[tuple[Program, MessageFault]]


def _timed(program: Program, number: int) -> Program:
    """The program with a short timeout of a step."""
    steps = [*program.steps]
    steps[number] = replace(steps[number], **{"timeout": GIVEN_UP})
    return replace(program, steps=tuple(steps))


def _with_timed_contexts(program: Program) -> Program:
    """The program, whose calls in contexts have a timeout of their own where that is no step's."""
    steps = [
        replace(step, timeout=TIMEOUT) if isinstance(step, Context) and step.late is None else step
        for step in program.steps
    ]
    return replace(program, steps=tuple(steps))


def _creation_behind_its_delete(program: Program, creation: Sent, rows: Sequence[Sent]) -> _Drawn:
    """Holds of a creation until its own fork is deleted, each in a program that has a timeout.

    A user deletes its fork only once its creation has ended (``rref_context.cpp``:
    ``RRefContext::addPendingUser``, ``confirmPendingUser``). So such a creation ends by its
    timeout, and the step that sends it gets one. Only the right step and the right delete are
    predicted.
    """
    for number, step in enumerate(program.steps):
        if isinstance(step, Remote) and (step.at, step.to) == (creation.rank, creation.to):
            for _, fault in _held_behind_a_delete(program, creation, rows):
                yield _timed(program, number), fault


def _held_behind_a_delete(program: Program, held: Sent, rows: Sequence[Sent]) -> _Drawn:
    """Holds of a message until its rank deletes a fork at the rank that the message goes to."""
    for delete in rows:
        if (delete.rank, delete.to, delete.message) == (held.rank, held.to, _DELETE):
            given: Any = {"n": held.of_all, "until": delete.nth(to_any=True)}
            # The shorter one where a shutdown may wait for it.
            for delay in _HOLDS[:0:-1]:
                yield program, MessageFault(held.rank, "hold", held.message, delay=delay, **given)


def _argument_behind_its_delete(program: Program, fetch: Sent, rows: Sequence[Sent]) -> _Drawn:
    """Holds of a function's fetch of its argument, in a program that ends while that lasts.

    The shutdown deletes the argument (``rref_context.cpp``:
    ``RRefContext::delAllUsersAndUnforkedOwners``).
    """
    for number, step in enumerate(program.steps):
        if _takes_handle(step, fetch.rank):
            try:
                ended = replace(program, steps=program.steps[: number + 1], settles=False)
            except UsageError:
                # Some ends need a settle before them.
                return
            for _, fault in _held_behind_a_delete(program, fetch, rows):
                yield ended, fault


def _takes_handle(step: Step, rank: int) -> bool:
    """Whether a step runs a function at a rank that takes a handle, so that it may fetch."""
    return isinstance(getattr(step, "right", None), str) and getattr(step, "to", None) == rank


def _fetch_after_its_timeout(program: Program, fetch: Sent, _: Sequence[Sent]) -> _Drawn:
    """Delays of a fetch beyond the timeout of the step that sends it, which a drop follows.

    It is no hold, because a settle waits for what is delayed only.
    """
    given: Any = {"delay": TOO_LATE, "n": fetch.of_all}
    fault = MessageFault(fetch.rank, "delay", fetch.message, **given)
    for number, step in enumerate(program.steps):
        if not isinstance(step, Fetch) or step.at != fetch.rank:
            continue
        timed = _timed(program, number)
        before, after = timed.steps[: number + 1], timed.steps[number + 1 :]
        forms = [timed]
        # Later steps may need the handle.
        with contextlib.suppress(UsageError):
            dropped = (*before, Drop(step.at, step.handle), *after)
            forms.insert(0, replace(timed, steps=dropped))
        for form in forms:
            yield form, fault


def _is_creation(program: Program, one: Sent) -> bool:
    return one.message in _REMOTES


def _is_of_a_function(program: Program, one: Sent) -> bool:
    takes = any(_takes_handle(step, one.rank) for step in program.steps)
    return takes and one.message in _FETCHES


def _is_of_a_fetch(program: Program, one: Sent) -> bool:
    fetches = any(isinstance(step, Fetch) and step.at == one.rank for step in program.steps)
    return fetches and one.message in _FETCHES


#: What half of the faults do, where a program sends such messages: they come after a delete that
#: was sent later. The first that a program allows is taken, so those that few allow come first.
_BEHIND_DELETES: dict[
    MessageAction,
    tuple[
        tuple[
            Callable[[Program, Sent, Sequence[Sent]], _Drawn],
            Callable[[Program, Sent], bool],
        ],
        ...,
    ],
] = {
    "hold": (
        (_argument_behind_its_delete, _is_of_a_function),
        (_creation_behind_its_delete, _is_creation),
    ),
    "delay": ((_fetch_after_its_timeout, _is_of_a_fetch),),
}
