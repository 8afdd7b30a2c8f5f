"""Promises about single messages, executed twice, not answered or late, under the agent ``wire``.

A case is a program and faults of messages that it sends without them. What the oracle does not
predict is not drawn (``oracle/_messages.py`` has the reasons, and where they stand in torch).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hypothesis import assume
from hypothesis import strategies as st

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageFault, MessageType, NthMessage, WireMessageType
from rpcprops.oracle import predict
from rpcprops.programs import Call, Context, Count, Drop, End, Fetch, Program, Remote, Settle, Share
from rpcprops.properties import _programs as p
from rpcprops.properties._base import Case
from rpcprops.strategies import programs

#: Virtual seconds after which a message without an answer is given up. The oracle needs 60, and of
#: what a shutdown sends 70 at most.
TIMEOUT = 65.0
#: Virtual seconds by which what comes after that is late.
TOO_LATE = 75.0
#: Virtual seconds by which messages are late. They wait at most so long for another one.
_DELAYS = (0.5, 1.0, 2.0)
#: The most faults in a case.
_MOST = 3
#: Kinds of step whose messages are known one by one.
_CALLING = ("call", "own", "share", "fetch", "drop", "count")
SHARING = (*_CALLING, "remote", "local", "bump", "nest", "chain", "context")


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that a program sends without faults: the nth of its type, sender and receiver."""

    sender: int
    receiver: int
    message: WireMessageType
    n: int

    def request(self) -> NthMessage:
        """The request itself."""
        return NthMessage(self.sender, self.message, to=self.receiver, n=self.n)

    def answer(self) -> NthMessage:
        """Its answer, of which there are as many."""
        return NthMessage(self.receiver, self.message.answer, to=self.sender, n=self.n)


def sent_by(program: Program) -> tuple[Sent, ...]:
    """The requests of a program: those that the model knows, and those inside plain contexts."""
    found = [
        (send.rank, send.to, WireMessageType(send.message))
        for send in predict(program, FaultPlan()).sends
        if send.to is not None
    ]
    for leaf in program.leaves:
        if isinstance(leaf, Context):
            found += in_context(leaf)
    counts = Counter[tuple[int, int, WireMessageType]]()
    rows: list[Sent] = []
    for kind in found:
        counts[kind] += 1
        rows.append(Sent(*kind, counts[kind]))
    return tuple(rows)


def in_context(leaf: Context) -> Iterator[tuple[int, int, WireMessageType]]:
    """Calls, where the context makes them one by one, and gradients."""
    if not leaf.nested and not leaf.rrefs:
        yield from ((leaf.at, to, WireMessageType.FORWARD_AUTOGRAD_REQ) for to in leaf.path)
    for gradients in leaf.passes:
        for at, to in gradients:
            yield at, to, WireMessageType.BACKWARD_AUTOGRAD_REQ


def _is_predicted(program: Program, *faults: MessageFault) -> bool:
    """Whether the oracle predicts it, and the faults make it meet no finding that keeps a thing."""
    try:
        said = predict(program, FaultPlan(others=faults))
    except UsageError:
        return False
    # A run that shows one ends there; each has a case of its own.
    return not said.known_bugs & _KEEPING


#: What a late message may meet: a call, a context or an RRef that stays for ever.
_KEEPING = {"fetch-after-delete", "context-after-cleanup", "timed-out-remote-dropped"}
#: Draws a fault of a program that sends these messages.
_Faults = Callable[[st.DrawFn, Sequence[Sent]], MessageFault]


@dataclass(frozen=True)
class UnderMessageFaults:
    """Some programs, and drawn ones, each with faults of messages that it sends.

    Attributes:
        programs: shrinks to the first of them.
        kinds: the kinds of step of the drawn ones.
        fits: which requests of a program a fault is for, or for whose answers.
        fault: draws one fault.
        most: the most faults.
        rpc_timeout: that of the programs, in virtual seconds, where a fault makes one wait for it.
    """

    programs: Sequence[Program]
    kinds: tuple[str, ...]
    fits: Callable[[Sent], bool]
    fault: _Faults
    most: int = 1
    rpc_timeout: float | None = None

    def __call__(self) -> st.SearchStrategy[Case]:
        """The strategy of the cases."""
        drawn = programs(
            min_world_size=2,
            max_world_size=3,
            min_steps=2,
            max_steps=8,
            kinds=self.kinds,
            branches=False,
            settles=True,
            # For any plan, timeouts would be of some hours, which a lost answer lasts.
            plan=FaultPlan(),
        )

        @st.composite
        def cases(draw: st.DrawFn) -> Case:
            written = st.sampled_from(self.programs)
            # Many drawn programs are refused, which takes time.
            program = draw(st.one_of(written, written, drawn))
            program = replace(program, rpc_timeout=None, num_worker_threads=None, end=End())
            assume(_is_predicted(program))
            sent = [one for one in sent_by(program) if self.fits(one)]
            assume(sent)
            number = draw(st.integers(1, self.most))
            faults = tuple(dict.fromkeys(self.fault(draw, sent) for _ in range(number)))
            if any(map(_ends_by_timeout, faults)):
                program = replace(program, rpc_timeout=self.rpc_timeout)
            assume(_is_predicted(program, *faults))
            return Case(program, FaultPlan(others=faults))

        return cases()


def _any_of(draw: st.DrawFn, sent: Sequence[Sent]) -> Sent:
    """One of them; its type is drawn first, so that what a program sends seldom comes as often."""
    kind = draw(st.sampled_from(tuple(dict.fromkeys(one.message for one in sent))))
    return draw(st.sampled_from([one for one in sent if one.message is kind]))


def _twice(draw: st.DrawFn, sent: Sequence[Sent]) -> MessageFault:
    one = _any_of(draw, sent)
    return MessageFault(one.sender, "duplicate", one.message, to=one.receiver, n=one.n)


def _again(draw: st.DrawFn, sent: Sequence[Sent]) -> MessageFault:
    """A request that comes twice, or whose sender tries it again because it hears nothing.

    Of what follows a fork request that times out, nothing is predicted (``oracle/_messages.py``).
    """
    heard = [one for one in sent if one.message != WireMessageType.RREF_FORK_REQUEST]
    is_unheard = draw(st.booleans()) and bool(heard)
    return _unheard(draw, heard) if is_unheard else _twice(draw, sent)


def _unheard(draw: st.DrawFn, sent: Sequence[Sent]) -> MessageFault:
    """An answer that is lost, or comes after the timeout, or a request that does."""
    one = _any_of(draw, sent)
    form = draw(st.integers(0, 2))
    return (_lost(one.answer()), _too_late(one.answer()), _too_late(one.request()))[form]


def _lost(one: NthMessage) -> MessageFault:
    return MessageFault(one.rank, "lose", one.message, to=one.to, n=one.n)


def _too_late(one: NthMessage) -> MessageFault:
    return MessageFault(one.rank, "delay", one.message, to=one.to, n=one.n, delay=TOO_LATE)


def _ends_by_timeout(fault: MessageFault) -> bool:
    return fault.action == "lose" or fault.delay >= TOO_LATE


def _either(draw: st.DrawFn, one: Sent) -> NthMessage:
    return draw(st.sampled_from((one.request(), one.answer())))


def _late(draw: st.DrawFn, sent: Sequence[Sent]) -> MessageFault:
    """A request or an answer that is late, or waits for another one."""
    one, other = (_either(draw, _any_of(draw, sent)) for _ in range(2))
    delay = draw(st.sampled_from(_DELAYS))
    waits = draw(st.booleans()) and one != other
    return MessageFault(
        one.rank,
        "hold" if waits else "delay",
        one.message,
        to=one.to,
        n=one.n,
        delay=delay,
        until=other if waits else None,
    )


def _is_retried(one: Sent) -> bool:
    return one.message in MessageType.__members__ and MessageType(one.message).is_retryable


def _is_of_user(one: Sent) -> bool:
    return one.message in MessageType.__members__ and not _is_retried(one)


def _is_in_context(one: Sent) -> bool:
    return one.message not in MessageType.__members__


_CONTEXTS = (
    p.context_over(2, (1,)),
    p.context_over(3, (1, 2)),
    p.context_over(3, (1, 2), nested=True),
    p.context_over(3, (2, 1), rrefs=True),
    p.context_over(3, (0, 2), nested=True, rrefs=True, at=1),
    p.context_over(3, (1, 2), raises=True),
)
_WITHOUT_IDS = tuple(
    replace(program, steps=tuple(s for s in program.steps if isinstance(s, Context | Settle)))
    for program in _CONTEXTS
)

#: What torch tries again: an announced fork, its accept, its delete, the cleanup of a context. It
#: comes twice; or its answer is lost or late, or it is late itself, so that torch sends it again.
EXECUTED_TWICE = UnderMessageFaults(
    (
        p.fork_user_to_user(),
        p.fork_user_to_owner(),
        p.fork_back_to_creator(),
        p.fork_chain(3),
        p.owner_shares(3),
        *_CONTEXTS[:3],
        p.two_contexts(),
    ),
    SHARING,
    _is_retried,
    _again,
    most=_MOST,
    rpc_timeout=TIMEOUT,
)

#: The answers of what users send: of calls, of creations and of fetches; and requests that are
#: executed after their timeout.
UNANSWERED_CALLS = UnderMessageFaults(
    (
        Program(2, (Call(0, 1), Call(0, 1))),
        p.calls_of_each_kind(),
        Program(2, (Count(0, 1), Count(0, 1), Count(1, 1))),
        Program(3, (Remote(0, 1, "a"), Settle(), Share(0, "a", 2, "b"), Settle(), Drop(0, "a"))),
        Program(2, (Remote(0, 1, "a"), Settle(), Fetch(0, "a"), Fetch(0, "a"), Drop(0, "a"))),
    ),
    _CALLING,
    _is_of_user,
    _unheard,
    rpc_timeout=TIMEOUT,
)

#: The answers of calls in a context, and of gradients; and gradients that come too late.
UNANSWERED_IN_CONTEXT = UnderMessageFaults(
    (*_CONTEXTS, *_WITHOUT_IDS),
    ("context", "settle"),
    _is_in_context,
    _unheard,
    rpc_timeout=TIMEOUT,
)

#: Any message of a program that is whole without faults.
ANY_ORDER = UnderMessageFaults(
    (
        p.create_and_fetch("python"),
        p.fork_user_to_user(),
        p.fork_back_to_creator(),
        p.fork_chain(3),
        p.owner_shares(3),
        p.nested_remote("python"),
        p.bump_from_everywhere(),
        *_CONTEXTS,
    ),
    SHARING,
    lambda one: True,
    _late,
    most=_MOST,
)
