"""How a program ends: what its shutdown sends, and what each rank holds and says then."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.oracle._hasty import may_give_up, may_race
from rpcprops.oracle._waited import Waited
from rpcprops.oracle.prediction import Met, Prediction, Send
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.steps.base import CLEARLY_IN_TIME

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model

_CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
_RACES = "shutdown-races-delete"
_GIVEN_UP = "fork-request-given-up"


def ended(
    model: Model, *, settles: bool = True, at_once: bool = False, forgets: bool = False
) -> Prediction:
    """What the steps so far must have shown, and what a shutdown now must show.

    Without `settles` the shutdown comes straight after the last step. It is graceful, or waits
    for nobody if it is `at_once`; then an owner `forgets` RRefs that are left, or raises.
    """
    for handle in model.handles.values():
        model.creations.mark(handle)
    if model.group.inits and not all(rref.made for rref in model.rrefs):
        msg = (
            "the members of a dynamic group end while a value is being made that nobody has "
            "fetched; put a Fetch after each Remote."
        )
        raise UsageError(msg)
    if model.unread and not settles and not at_once:
        msg = (
            "a step ends by its timeout, and the program may end before its answer; put a "
            "Settle() after it, or let the program settle."
        )
        raise UsageError(msg)
    if not settles and not at_once:
        _check_made_in_time(model)
    # Graceful shutdown does not wait for a cleanup that is being retried.
    late = [] if settles else model.sends[model.now.settled :]
    abandoned = {send.rank for send in late if send.message is _CLEANUP and send.failures}
    counters = model.counters()
    # api.py: shutdown(graceful=False) makes no calls.
    graceful = at_once or not any(
        MessageType.PYTHON_CALL in model.plan.table(rank).failing
        for rank in range(model.world_size)
    )
    graceful = graceful and model.disturbed.is_shutdown_safe
    model.exhausted.check_end(settles=settles)
    graceful = graceful and not model.exhausted
    sends = tuple(model.sends)
    waiting = {user.rank for user in model.users if user.unaccepted}
    certain = model.certain
    if at_once:
        last, leaking, perhaps = _end_at_once(model, settles=settles)
        waiting = set()
    else:
        last, leaking, perhaps = _shutdown(model, waiting) if graceful else ((), set(), set())
    broken = {user.rank for user in model.users if user.broken or user.rref.absent}
    early = waiting if at_once else waiting | model.leaves_early | broken
    if graceful and not settles and not at_once:
        _meets_overtaken(model, last)
    _meets_kept_at_end(model, settles=settles, graceful=graceful, at_once=at_once)
    model.own_deletes.check(last)
    is_certain, model.certain = model.certain, certain
    dropped = (
        model.abandoned_calls if graceful and not settles else [set[str]() for _ in model.calls]
    )
    found = Prediction(
        steps=tuple(model.steps),
        sends=sends,
        calls=model.called(),
        counters=counters,
        retried=model.retried(),
        last_sends=last,
        graceful=graceful,
        abandoned_calls=tuple(map(frozenset, dropped)),
        leaking=frozenset(leaking),
        may_exit_early=frozenset(early),
        may_leak=frozenset(perhaps),
        may_warn_unreleased_context=frozenset(model.may_warn_unreleased_context | abandoned),
        met=frozenset(model.findings.met),
        certain=is_certain,
        waiting=frozenset(waiting),
        has_failed_function=any(rref.error for rref in model.rrefs),
        unmarked_uses=model.creations.unmarked,
        contexts_left=_contexts_left(model, settles=settles),
        told=model.group.told if model.group.inits else None,
        has_failed_creation=bool(model.creations.broke_one),
        stuck=frozenset(model.findings.stuck),
        wire_sends=dict(+model.in_contexts.sent),
        wire_more=frozenset(model.in_contexts.more),
        tries_in_vain=frozenset(model.absent.tries_in_vain),
        errors=dict(+model.answers.errors),
        more_errors=frozenset(model.answers.more),
        graded=dict(+model.in_contexts.graded),
        more_graded=frozenset(model.in_contexts.more_graded),
    )
    return _cut_off(model, found, forgets=forgets) if at_once and not settles else found


def _cut_off(model: Model, found: Prediction, *, forgets: bool) -> Prediction:
    """The same where the ranks shut down at once, while something may be under way."""
    since = model.since_rest
    waited = Waited.by(model.leaves, model.steps)
    abandoned = model.abandoned_calls
    cleaning = found.may_warn_unreleased_context | since.cleaning
    most = since.most_left(model.rrefs, model.sends, found.counters)
    lacking = since.may_lack(model.sends, model.in_contexts.sent, waited, abandoned)
    for rank in may_race(most, lacking, forgets=forgets):
        _meets_race(model, rank, forgets=forgets)
    if model.facts.has_bug(_GIVEN_UP):
        says = r"in its shutdown: killed by SIGABRT"
        ranks = may_give_up(lacking)
        model.findings.met |= {Met(_GIVEN_UP, rank, None, says, ("RankDied",)) for rank in ranks}
    return replace(
        found,
        met=frozenset(model.findings.met),
        abandoned_calls=since.may_not_run(model.called(), waited, abandoned),
        may_warn_unreleased_context=cleaning,
        contexts_left=since.contexts_left(model.leaked_contexts),
        most_left=most,
        may_lack=lacking,
    )


def _meets_race(model: Model, rank: int, *, forgets: bool) -> None:
    """Note that a rank may serve requests for its RRefs while its shutdown forgets them.

    It may read freed memory. If it `forgets` them in spite of a leak, a request that has made
    one, or waited for one, no longer finds it (``rref_context.cpp``: RRefContext::getOwnerRRef
    asserts then that it is there).
    """
    says = r"in its shutdown: killed by SIG(SEGV|ABRT)"
    if forgets:
        says += f"|{re.escape(model.facts.texts.owner_expected)}"
    if model.facts.has_bug(_RACES):
        model.findings.met.add(Met(_RACES, rank, None, says))


def _meets_overtaken(model: Model, last: Sequence[Send]) -> None:
    """Note the findings of a graceful shutdown that comes straight after the last step."""
    if _overtakes(model, last):
        model.findings.meets("shutdown-overtakes-creation")
    if any(u.timed_out and not u.rref.made for u in model.users):
        # The shutdown deletes what is still held, as a drop would (rref_context.cpp:
        # RRefContext::delAllUsersAndUnforkedOwners).
        model.findings.meets("timed-out-remote-dropped")
    if model.readers.may_wait_for_own():
        # The shutdown forgets an owner of which it knows no fork, and so the value that comes
        # then is another one's (RRefContext::delAllUsersAndUnforkedOwners).
        model.findings.meets("early-owner-fork")
    _meets_deleted_arguments(model)


def _check_made_in_time(model: Model) -> None:
    """Check that no value is made for longer than a graceful shutdown waits.

    ``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners`` gives up then, and says
    that users were not confirmed: their owner confirms them once it has made the value. Or it
    says that owners are pending: a rank holds an RRef that it creates at itself as one of its
    own forks until then (``RRefContext::addSelfAsFork``).

    Raises:
        UsageError: one may be.
    """
    making = (rref for rref in model.rrefs if not (model.readers.known_made(rref) and rref.first))
    longest = max((rref.takes for rref in making), default=0.0)
    if longest + CLEARLY_IN_TIME / 2 > OWNER_WAITS:
        msg = (
            f"a value may take {longest:g} s (virtual) to make, and a shutdown waits for "
            f"{OWNER_WAITS:g} s; put a Fetch or a Settle() after its Remote, or let the "
            f"program settle."
        )
        raise UsageError(msg)


def _contexts_left(model: Model, *, settles: bool) -> tuple[range, ...]:
    """How many contexts each rank may hold after a graceful shutdown, which waits for no retry.

    ``TensorPipeAgent::join`` waits for ``clientActiveCalls_``, which does not count a message
    that only waits to be sent again (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``).
    """
    found: list[range] = []
    for rank, leaked in enumerate(model.leaked_contexts):
        late = 0 if settles else sum(rank in ranks for ranks in model.late_contexts)
        found.append(range(len(leaked), len(leaked) + late + 1))
    return tuple(found)


def _overtakes(model: Model, last: Sequence[Send]) -> bool:
    """Whether a delete is retried after owners may have seen that they own nothing."""
    again = {send.payload for send in last if send.failures}
    early = [
        user.rref
        for user in model.users
        if user.fork in again and not (user.lost or user.rref.absent)
    ]
    return any(not rref.made for rref in (*early, *model.early_deletes))


def _shutdown(model: Model, waiting: set[int]) -> tuple[tuple[Send, ...], set[int], set[int]]:
    """Users delete what they still hold; what an owner then still has is reported there."""
    before, failed, counts = len(model.sends), model.failed.copy(), [*model.disturbed.counts]
    model.now.step = model.disturbed.leaf = None
    gone: set[str] = set()
    perhaps = set(model.owns_nothing)
    for user in model.users:
        if model.send(user.rank, MessageType.RREF_USER_DELETE, user.fork, user.rref.owner):
            gone.add(user.fork)
        if user.rank in waiting or model.may_be_overtaken(user):
            perhaps.add(user.rref.owner)
    leaking = {rref.owner for rref in model.rrefs if rref.forks - gone}
    last = tuple(model.sends[before:])
    del model.sends[before:]
    model.failed, model.disturbed.counts = failed, counts
    return last, leaking, perhaps - leaking


def _end_at_once(model: Model, *, settles: bool) -> tuple[tuple[Send, ...], set[int], set[int]]:
    """Nobody deletes anything, so an owner still knows each fork that it knew.

    ``rref_context.cpp``: ``RRefContext::destroyInstance`` reports them by ``checkRRefLeaks``.
    """
    if settles:
        return (), {rref.owner for rref in model.rrefs if rref.forks}, set()
    return (), *model.since_rest.leaks(model.rrefs)


def _meets_kept_at_end(model: Model, *, settles: bool, graceful: bool, at_once: bool) -> None:
    """Note what the ranks that keep something hold at the end of the run.

    Args:
        graceful: whether the ranks shut down at all.
        at_once: whether that deletes no RRefs.
    """
    model.findings.end(model.counters(), None, settles=settles)
    if graceful and not at_once and model.gathers_apart:
        model.findings.meets_at_shutdown("gathering-count-kept")
    for rank, owner in model.findings.kept.in_frames if at_once or not graceful else ():
        message = MessageType.RREF_USER_DELETE
        model.findings.sends_otherwise("failed-async-proxy", rank, owner, message)
    if graceful:

        def owners_of(rank: int) -> set[int]:
            return {user.rref.owner for user in model.users if user.rank == rank}

        model.findings.met |= set(model.findings.kept.waits(model.facts.texts, owners_of))
        deletes = MessageType.RREF_USER_DELETE
        users = Counter(user.rank for user in model.users)
        model.findings.met |= {
            one
            for rank in range(model.world_size)
            if deletes in model.plan.table(rank).failing
            for one in model.findings.kept.late_deletes(rank, users[rank])
        }


def _meets_deleted_arguments(model: Model) -> None:
    """Note which functions may fetch what the shutdown has deleted, which is not answered."""
    finding = "shutdown-deletes-argument"
    making = [r for r in model.rrefs if r.fetches and not (model.readers.known_made(r) and r.first)]
    ranks = {r.owner for r in making} | {to for _, to in model.fetching.values()}
    if not ranks or not model.facts.has_bug(finding):
        return
    model.findings.meets_at_shutdown(finding)
    if model.times.rpc_timeout is None:
        return
    # The default timeout ends the fetch, so the function raises, and too late: its rank and its
    # caller have waited in vain for the RRef that it makes.
    texts = model.facts.texts
    raised = "|".join(map(re.escape, (texts.timeout, texts.owners_waited)))
    kept = "|".join(map(re.escape, (*texts.leaks, " still holds 1 owner, ")))
    for rank in ranks:
        model.findings.met.add(Met(finding, rank, None, raised, ("ErrorInLog",)))
        model.findings.met.add(Met(finding, rank, None, kept, ("RRefLeak",)))
    callers = {user.rank for user in model.users if any(user.rref is r for r in making)}
    for caller in callers | {at for at, _ in model.fetching.values()}:
        waited = re.escape(texts.users_waited)
        model.findings.met.add(Met(finding, caller, None, waited, ("ErrorInLog",)))
    if model.facts.has_bug("late-remote-to-self"):
        # The timeout of such a creation has come before that of the fetch.
        late = re.escape(texts.assertion)
        model.findings.met |= {
            Met("late-remote-to-self", r.owner, None, late, ("ErrorInLog",))
            for r in making
            if not r.first
        }
