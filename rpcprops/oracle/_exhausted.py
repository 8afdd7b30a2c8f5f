"""Ranks whose agents have run out of threads: what they hold for ever, and what may still follow.

A function that waits for a call keeps its thread. The end of that call, an answer or a timeout,
needs a thread of the same rank (``tensorpipe_agent.cpp``: ``TensorPipeAgent::markFutureAsComplete``
and ``markFutureWithError`` run in ``threadPool_``). So once all threads of a rank wait, none is
ever free again. What comes to the rank is counted (``TensorPipeAgent::respond`` calls
``increaseCallCount(serverActiveCalls_)`` before it hands a request to the pool), and stays.

Such a rank cannot shut RPC down: the calls by which the ranks meet need a thread as well
(``torch/distributed/rpc/api.py``: ``_all_gather``), and ``TensorPipeAgent::join`` waits for
``clientActiveCalls_``. A shutdown that waits for nobody does not end either, for
``TensorPipeAgent::shutdownImpl`` waits for the pool (``waitWorkComplete``).
"""

from __future__ import annotations

from collections.abc import Mapping

from rpcprops.errors import UsageError
from rpcprops.outcomes import Counters
from rpcprops.steps import Leaf

#: Kinds of step that may follow, at other ranks: all that they send, they say before they send it.
_MAY_FOLLOW = frozenset({"settle", "pause", "own", "local", "drop"})
_MAY_FOLLOW |= {"call", "count", "chain", "recurse", "remote", "share", "fetch"}
#: Kinds after which all ranks are at rest if they were before.
_LEAVE_NOTHING = frozenset({"settle", "pause", "own", "local"})


class Exhausted:
    """The ranks that take part in calls which nothing ends, and what these calls hold.

    Attributes:
        ranks: all of them, also those that still have a free thread.
        at_rest: whether nothing can be under way, as at the start and after a settle.
    """

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self.at_rest = True
        self._held: dict[int, Counters] = {}

    def __bool__(self) -> bool:
        return bool(self.ranks)

    def add(self, ranks: set[int], held: Mapping[int, Counters]) -> None:
        """Note such calls: the ranks that take part, and what each holds for ever."""
        self.ranks |= ranks
        self._held.update(held)

    def with_calls(self, rank: int, held: Counters) -> Counters:
        """What a rank holds, with these calls."""
        own = self._held.get(rank, Counters())
        calls = {"server_calls": own.server_calls, "client_calls": own.client_calls}
        return Counters(held.owners, held.forks, 0, 0, held.contexts, held.backward_passes, **calls)

    def check(self, step: Leaf) -> None:
        """Check that a step may follow.

        Raises:
            UsageError: it may not.
        """
        if self.ranks and step.op not in _MAY_FOLLOW:
            msg = f"{step!r} {_WHY}; use one of {', '.join(sorted(_MAY_FOLLOW))}."
            raise UsageError(msg)

    def note(self, step: Leaf) -> None:
        """Note that a step has ended."""
        self.at_rest = step.op == "settle" or (self.at_rest and step.op in _LEAVE_NOTHING)

    def check_send(self, step: Leaf | None, rank: int, to: int | None) -> None:
        """Check that a message of a step is of other ranks.

        Raises:
            UsageError: it is not.
        """
        if self.ranks and step is not None and not self.ranks.isdisjoint({rank, to}):
            named = ", ".join(map(str, sorted(self.ranks)))
            msg = f"{step!r} {_WHY}; let it use none of the ranks {named}."
            raise UsageError(msg)

    def check_end(self, *, settles: bool) -> None:
        """Check that the program can end.

        Raises:
            UsageError: it would wait for these ranks.
        """
        if self.ranks and not settles:
            msg = (
                "the program ends without a settle, and not all of its ranks can shut RPC down, "
                "for their threads wait for ever (TensorPipeAgent::join); write settles=True."
            )
            raise UsageError(msg)


_WHY = (
    "comes after calls that keep all threads of a rank waiting for ever "
    "(TensorPipeAgent::markFutureWithError), and what it shows there is not modelled"
)
