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
* *No function runs twice*, and none for which somebody has waited is missing. One that a rank had
  not read yet does not run any more.
* *Nothing is deleted then* (``rref_context.cpp``: RRefContext::delUser, after destroyInstance). So
  an owner reports each fork that it knew at the last settle and that nobody has dropped since
  (RRefContext::checkRRefLeaks). Of a fork that was made or dropped since then, nobody can tell
  whether its owner knows: its message may be under way.
* *A context that has ended since the last settle* may stay at each rank that took part in it. Its
  cleanup is not waited for (``autograd/context/container.cpp``:
  DistAutogradContainer::sendReleaseContextRpc).

What ranks have sent since the last settle may lack, and no more than that may be sent. A function
whose own call is cut off raises, so there may be more answers that are an EXCEPTION.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rpcprops.faults import MessageType, WireMessageType
from rpcprops.oracle.prediction import Send, StepPrediction, WireKind
from rpcprops.steps import Leaf

#: Kinds of step that end only once each function has run that they let run.
_WAITING = frozenset({"call", "count", "chain", "recurse", "fetch", "gather", "context", "reach"})


class RRefOfModel(Protocol):
    """What is needed of an RRef."""

    owner: int
    forks: set[str]


@dataclass(slots=True)
class SinceRest:
    """What may be under way since the ranks have last come to rest.

    Attributes:
        sends: how many messages there were then.
        steps: how many steps.
        calls: how often each named call had run, by rank.
        wire: the messages inside contexts and profilers.
        forks: the forks that the owner of each RRef knew, by the RRef's number.
        contexts: how many contexts each rank kept for ever.
        sent: the RRefs that a message has carried since then, by their `id`.
        makers: the ranks that have made an RRef since then.
        ended: the ranks of each context that has ended since then.
    """

    sends: int = 0
    steps: int = 0
    calls: Sequence[Mapping[str, int]] = ()
    wire: Mapping[WireKind, int] = field(default_factory=dict)
    forks: Sequence[frozenset[str]] = ()
    contexts: Sequence[int] = ()
    sent: set[int] = field(default_factory=set)
    makers: set[int] = field(default_factory=set)
    ended: list[set[int]] = field(default_factory=list)

    def leaks(self, rrefs: Sequence[RRefOfModel]) -> tuple[set[int], set[int]]:
        """The owners that must report a leak, and those that may."""
        surely: set[int] = set()
        perhaps: set[int] = set()
        for number, rref in enumerate(rrefs):
            known = self.forks[number] if number < len(self.forks) else frozenset[str]()
            if known & rref.forks:
                surely.add(rref.owner)
            if number >= len(self.forks) or id(rref) in self.sent or known != rref.forks:
                perhaps.add(rref.owner)
        return surely, perhaps - surely

    def ranks(self, sends: Sequence[Send]) -> set[int]:
        """Ranks that may still wait for answers about RRefs or contexts, or serve such requests."""
        asking = {send.rank for send in sends[self.sends :] if _is_about_rrefs(send.message)}
        return asking.union(self.makers, *self.ended)

    def contexts_left(self, leaked: Sequence[set[str]]) -> tuple[range, ...]:
        """How many contexts each rank may hold."""
        found: list[range] = []
        for rank, names in enumerate(leaked):
            late = sum(rank in ranks for ranks in self.ended)
            least = self.contexts[rank] if self.contexts else 0
            found.append(range(min(least, len(names)), len(names) + late + 1))
        return tuple(found)

    def may_lack(self, sends: Sequence[Send], wire: Mapping[WireKind, int]) -> Counter[WireKind]:
        """How many messages may lack of each kind."""
        found: Counter[WireKind] = Counter()
        for send in sends[self.sends :]:
            if send.to is not None:
                found[send.rank, send.to, WireMessageType(send.message)] += 1
        for kind, times in wire.items():
            found[kind] += times - self.wire.get(kind, 0)
        return +found

    def may_not_run(
        self,
        calls: Sequence[Mapping[str, int]],
        steps: Sequence[StepPrediction],
        leaves: Sequence[Leaf],
    ) -> tuple[frozenset[str], ...]:
        """The named calls of each rank for which nobody has waited since then."""
        waited = {
            f"step{number}"
            for number, (step, leaf) in enumerate(zip(steps, leaves, strict=True))
            if not step.error and _is_waited_for(leaf)
        }
        found: list[frozenset[str]] = []
        for rank, ran in enumerate(calls):
            before = self.calls[rank] if self.calls else {}
            late = (call for call, times in ran.items() if times > before.get(call, 0))
            found.append(frozenset(x for x in late if x.partition("/")[0] not in waited))
        return tuple(found)


def _is_about_rrefs(message: MessageType) -> bool:
    return message.is_retryable or message.endswith("_REMOTE_CALL")


def _is_waited_for(leaf: Leaf) -> bool:
    """Whether all that a step lets run has ended when it has, unless it fails."""
    goes_on = {"later", "remote"} & {getattr(leaf, "wait", ""), getattr(leaf, "how", "")}
    made = {sort for sort, _ in leaf.made}
    return leaf.op in _WAITING and not goes_on and made <= {"context"}
