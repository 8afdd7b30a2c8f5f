"""What is left where the ranks shut RPC down at once while something is still under way.

``api.py``: shutdown documents that ``graceful=False`` "is a local shutdown, and it does not wait
for other RPC processes", and that a shutdown "stops the local agent from accepting outstanding
requests". By the source this is promised all the same:

* *It ends.* ``tensorpipe_agent.cpp``: TensorPipeAgent::shutdownImpl closes all pipes, which gives
  each call without an answer an error (TensorPipeAgent::handleClientError), so that functions which
  wait for such a call go on; and it waits for the functions that it has begun, and no others
  (``threadPool_.waitWorkComplete``).
* *Every call has ended then*, with its value or with an error, also at callers that have not waited
  for it (``steps/in_rank/ends.py`` looks).
* *No function runs twice*, and none for which somebody has waited is missing, nor a request that
  such a function has sent (``oracle/_waited.py``). One that a rank had not read yet does not run
  any more.
* *Nothing is deleted then* (``rref_context.cpp``: RRefContext::delUser, after destroyInstance). So
  an owner reports each fork that it knew at the last settle and that nobody has dropped since
  (RRefContext::checkRRefLeaks). Of a fork that was made or dropped since then, nobody can tell
  whether its owner knows: its message may be under way.
* *A context that has ended since the last settle* may stay at each rank that took part in it. Its
  cleanup is not waited for (``autograd/context/container.cpp``:
  DistAutogradContainer::sendReleaseContextRpc).

What else ranks have sent since the last settle may lack, and no more than that may be sent. A
function whose own call is cut off raises, so of the requests that may lack each may be answered by
an EXCEPTION instead. Where nothing may lack, nothing is cut off.

What a rank holds in the end is no more than what it may have come to hold since the last settle
(``rref_context.cpp``: RRefContext::getDebugInfo):

* *Owners and forks*: those of then, and those that it has got to know since. An RRef of its own
  that no message has carried is none (RRefContext::createOwnerRRef, prepareChildFork).
* *Pending users*: RRefs of other ranks that it has made, or got, since
  (RRefContext::addPendingUser).
* *Pending futures*: forks, accepts and deletes that it has sent since (``numPendingFutures_``).
* *Backward passes*: one for each context that has ended since, which may not have ended there
  (``autograd/engine/dist_engine.cpp``: DistEngine::cleanupBackwardPass), besides those that never
  do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol

from rpcprops.faults import WireMessageType
from rpcprops.oracle._waited import Waited, step_of
from rpcprops.oracle.prediction import Send, WireKind
from rpcprops.outcomes import Counters

#: Requests for which an owner changes what it knows of the forks of an RRef
#: (``request_callback_no_python.cpp``: processRRefUserDelete calls RRefContext::delForkOfOwner,
#: assignOwnerRRef RRefContext::getOrCreateOwnerRRef and addForkOfOwner).
_OF_FORKS = frozenset(
    {
        WireMessageType.RREF_USER_DELETE,
        WireMessageType.PYTHON_REMOTE_CALL,
        WireMessageType.SCRIPT_REMOTE_CALL,
    }
)
#: Those for which it only looks an RRef up (retrieveOwnerRRef calls RRefContext::getOwnerRRef).
_OF_OWNERS = frozenset(
    {WireMessageType.PYTHON_RREF_FETCH_CALL, WireMessageType.SCRIPT_RREF_FETCH_CALL}
)


def may_race(
    most: Sequence[Counters], lacking: Mapping[WireKind, int], *, forgets: bool
) -> frozenset[int]:
    """The owners that may be serving such a request while their shutdown forgets what they own.

    ``rref_context.cpp``: RRefContext::destroyInstance walks through ``forks_``, and then through
    ``owners_``, which it empties, without ``mutex_``, under which the threads of the agent read and
    change them (shutdown-races-delete). Where there are forks and leaks are not ignored, it raises
    before it comes to ``owners_``. So a fetch, which looks at ``owners_`` alone, does not race it
    then, unless another request takes the last fork away, or brings an RRef that has none yet.

    Args:
        most: the most that each rank may own.
        lacking: the messages that may be under way.
        forgets: whether leaks are ignored.
    """
    kinds = _OF_FORKS | _OF_OWNERS if forgets else _OF_FORKS
    asked = {to for (_, to, message), times in lacking.items() if times and message in kinds}
    return frozenset(rank for rank in asked if most[rank].owners)


def may_give_up(lacking: Mapping[WireKind, int]) -> frozenset[int]:
    """The ranks that may still ask an owner to know a fork when that owner has left.

    Each try fails then, and the rank aborts after the last one, unless its own agent has stopped
    before (fork-request-given-up; ``rpc_agent.cpp``: RpcAgent::rpcRetryCallback).

    Args:
        lacking: the messages that may be under way.
    """
    request = WireMessageType.RREF_FORK_REQUEST
    return frozenset(
        rank for (rank, _, message), times in lacking.items() if times and message is request
    )


class RRefOfModel(Protocol):
    """What is needed of an RRef."""

    owner: int
    forks: set[str]


@dataclass(slots=True)
class SinceRest:
    """What may be under way since the ranks have last come to rest.

    Attributes:
        sends: how many messages there were then.
        calls: how often each named call had run, by rank.
        forks: the forks that the owner of each RRef knew, by the RRef's number.
        contexts: how many contexts each rank kept for ever.
        begun: where the ranks end so, for each step since then how many messages there were before
            it, and how many inside contexts and profilers, by the step's number.
        forked: how many forks have been made since then of each RRef, by its `id`.
        sent: the RRefs that a message has carried since then, by their `id`.
        plain: those that their owner has made itself, with a value.
        users: how many RRefs of other ranks each rank has got since then.
        ended: the ranks of each context that has ended since then.
    """

    sends: int = 0
    calls: Sequence[Mapping[str, int]] = ()
    forks: Sequence[frozenset[str]] = ()
    contexts: Sequence[int] = ()
    begun: dict[int, tuple[int, Counter[WireKind]]] = field(default_factory=dict)
    forked: Counter[int] = field(default_factory=Counter)
    sent: set[int] = field(default_factory=set)
    plain: set[int] = field(default_factory=set)
    users: Counter[int] = field(default_factory=Counter)
    ended: list[set[int]] = field(default_factory=list)

    def leaks(self, rrefs: Sequence[RRefOfModel]) -> tuple[set[int], set[int]]:
        """The owners that must report a leak, and those that may."""
        surely: set[int] = set()
        perhaps: set[int] = set()
        for number, rref in enumerate(rrefs):
            known = self._known(number)
            if known & rref.forks:
                surely.add(rref.owner)
            if self._is_new(number, rref) or known != rref.forks:
                perhaps.add(rref.owner)
        return surely, perhaps - surely

    def _known(self, number: int) -> frozenset[str]:
        """The forks of an RRef that its owner knew then."""
        return self.forks[number] if number < len(self.forks) else frozenset[str]()

    def _is_new(self, number: int, rref: RRefOfModel) -> bool:
        """Whether its owner may have come to keep an RRef, or another fork of it, since then."""
        if id(rref) in self.sent:
            return True
        return number >= len(self.forks) and id(rref) not in self.plain

    @property
    def cleaning(self) -> frozenset[int]:
        """The ranks that may still wait for the cleanup of a context, or serve one."""
        return frozenset[int]().union(*self.ended)

    def contexts_left(self, leaked: Sequence[Set[str]]) -> tuple[range, ...]:
        """How many contexts each rank may hold."""
        found: list[range] = []
        for rank, names in enumerate(leaked):
            late = self._contexts_of(rank)
            least = self.contexts[rank] if self.contexts else 0
            found.append(range(min(least, len(names)), len(names) + late + 1))
        return tuple(found)

    def _contexts_of(self, rank: int) -> int:
        """How many contexts have ended since then in which a rank takes part."""
        return sum(rank in ranks for ranks in self.ended)

    def most_left(
        self, rrefs: Sequence[RRefOfModel], sends: Sequence[Send], settled: Sequence[Counters]
    ) -> tuple[Counters, ...]:
        """The most that each rank may hold, besides contexts.

        Args:
            rrefs: all RRefs.
            sends: all messages.
            settled: what the ranks would hold if they settled.
        """
        owners: Counter[int] = Counter()
        forks: Counter[int] = Counter()
        for number, rref in enumerate(rrefs):
            known = self._known(number)
            if known or self._is_new(number, rref):
                owners[rref.owner] += 1
                forks[rref.owner] += len(known) + self.forked[id(rref)]
        futures: Counter[int] = Counter()
        for send in sends[self.sends :]:
            futures[send.rank] += send.message.startswith("RREF_") and send.message.is_retryable
        return tuple(
            Counters(
                owners=owners[rank],
                forks=forks[rank],
                pending_users=self.users[rank],
                pending_futures=futures[rank],
                backward_passes=one.backward_passes + self._contexts_of(rank),
            )
            for rank, one in enumerate(settled)
        )

    def begins(self, step: int, sends: int, wire: Counter[WireKind]) -> None:
        """A step begins, when there were so many messages, and these in contexts and profilers."""
        self.begun[step] = (sends, wire.copy())

    def may_lack(
        self,
        sends: Sequence[Send],
        wire: Counter[WireKind],
        waited: Waited,
        abandoned: Sequence[Set[str]],
    ) -> Counter[WireKind]:
        """How many messages may lack of each kind.

        Of a step that somebody has waited for these are the messages that torch tries again, for
        which no function waits; but all, where one of its calls has been given up.
        """
        given_up = {step_of(call) for calls in abandoned for call in calls}
        found: Counter[WireKind] = Counter()
        for number, sent, more in self._messages(sends, wire):
            has_ended = number in waited.steps and number not in given_up
            for send in sent:
                if send.to is not None and (send.message.is_retryable or not has_ended):
                    found[send.rank, send.to, WireMessageType(send.message)] += 1
            found.update(more if not has_ended else {})
        return +found

    def _messages(
        self, sends: Sequence[Send], wire: Counter[WireKind]
    ) -> Iterator[tuple[int, Sequence[Send], Counter[WireKind]]]:
        """The messages of each step since then, and those inside contexts and profilers."""
        ends = [*self.begun.values(), (len(sends), wire)][1:]
        for (number, (first, before)), (last, after) in zip(self.begun.items(), ends, strict=True):
            yield number, sends[first:last], after - before

    def may_not_run(
        self, calls: Sequence[Mapping[str, int]], waited: Waited, abandoned: Sequence[Set[str]]
    ) -> tuple[frozenset[str], ...]:
        """The named calls of each rank for which nobody has waited since then."""
        found: list[frozenset[str]] = []
        for rank, ran in enumerate(calls):
            before = self.calls[rank] if self.calls else {}
            late = (call for call, times in ran.items() if times > before.get(call, 0))
            found.append(
                frozenset(x for x in late if x in abandoned[rank] or not waited.has_run(x))
            )
        return tuple(found)
