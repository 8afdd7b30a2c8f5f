"""How long each phase of a cluster may take, in real seconds, from what its faults account for.

What torch retries, and how often, is in :mod:`rpcprops.faults`; what it waits for at shutdown in
:mod:`rpcprops.cluster._shutdown`; why a settle must look longer than a moment in
:mod:`rpcprops.cluster._settling`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpcprops.faults import FaultPlan
from rpcprops.oracle.ranks import OWNER_WAITS

#: Real seconds in which nothing may change before what is held is called stuck. An answer on
#: loopback takes well under a millisecond; the rest is for a machine that is busy elsewhere.
_QUIET = 0.15
#: The same while a step runs, whose own work (imports, first calls) changes no counter.
_STALLED = 3.0
#: The same while a call is on its way that its caller has given up: no counter of either rank shows
#: it, and on a busy machine it took 75 ms.
_UNSEEN = 1.0


@dataclass(frozen=True)
class Deadlines:
    """Real seconds.

    Attributes:
        quiet: how long nothing may change, with nothing under way, before it is stuck.
        quiet_cleanup: the same while a context is held: retries of its cleanup, which torch sends
            by ``container.cpp: DistAutogradContainer::sendReleaseContextRpc``, have no counter.
        between_cleanups: the longest that a context's cleanup waits between two tries; once no
            rank has logged a failed send for that long, none is still to come.
        last_cleanup: the longest that a cleanup waits before its last try, and that try.
        stalled: how long nothing may change while a step of a program runs.
        unseen: the same while a call that no counter shows may still arrive.
    """

    start: float
    run: float
    look: float
    settle: float
    shutdown: float
    quiet: float
    quiet_cleanup: float
    between_cleanups: float
    last_cleanup: float
    stalled: float
    unseen: float

    @classmethod
    def of(cls, plan: FaultPlan, world_size: int, rate: float, margin: float) -> Deadlines:
        """The deadlines under `plan` at `rate`, each with `margin` real seconds on top."""
        faults = [plan.faults_at(rank) for rank in range(world_size)]
        seen = max(
            sum(f.seconds for f in at if not f.unseen_waits and not f.blocks_sender)
            for at in faults
        )
        unseen = max(sum(f.seconds for f in at if f.unseen_waits) for at in faults)
        # Messages of one sender wait for each other's delays: the agent sleeps in the thread that
        # sends (``faulty_tensorpipe_agent.cpp: FaultyTensorPipeAgent::send``).
        delays = 4 * max(sum(f.seconds for f in at if f.blocks_sender) for at in faults)
        chain = (seen + unseen + delays) / rate
        longest = max((wait for at in faults for f in at for wait in f.unseen_waits), default=0.0)
        # A message that is held up, or waits for its retry, counts as under way: that is not quiet.
        quiet = _QUIET + 1.0 / rate
        return cls(
            start=margin,
            run=margin + chain + world_size * delays / rate,
            look=margin,
            settle=margin + 4 * chain + world_size * delays / rate,
            # ``rref_context.cpp: RRefContext::delAllUsersAndUnforkedOwners`` gives up after that.
            shutdown=margin + 4 * chain + OWNER_WAITS / rate,
            quiet=quiet,
            quiet_cleanup=quiet + unseen / rate,
            between_cleanups=longest * 1.5 / rate + 0.02,
            last_cleanup=longest / rate + 0.02,
            stalled=_STALLED + 2 * chain,
            unseen=_UNSEEN + 1.0 / rate,
        )
