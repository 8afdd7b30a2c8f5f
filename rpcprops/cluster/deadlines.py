"""How long each phase of a cluster may take, in real seconds, given its faults.

What torch retries, and how often, is in :mod:`rpcprops.faults`. What torch waits for at shutdown is
in :mod:`rpcprops.cluster._shutdown`. Why a settle must look for longer than a moment is in
:mod:`rpcprops.cluster._settling`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpcprops.faults import FaultPlan
from rpcprops.oracle.ranks import OWNER_WAITS

#: Real seconds without any change after which what is held counts as stuck. An answer on loopback
#: takes well under a millisecond; the rest is for a busy machine.
_QUIET = 0.15
#: The same while a step runs: its own work (imports, first calls) changes no counter.
_STALLED = 3.0
#: The same under a fast clock, where a known finding keeps the step from ending. At rate 1, which
#: confirms findings too, no wait is shorter.
_STUCK = 0.5
#: The same while a call may still arrive that its caller has given up: no counter of either rank
#: shows it. On a busy machine one took 75 ms.
_UNSEEN = 1.0


@dataclass
class Deadlines:
    """Deadlines and waits, all in real seconds; they grow when faults are armed.

    Attributes:
        quiet: how long nothing may change, with no message on its way, before it is stuck.
        quiet_cleanup: the same while a context is held: retries of its cleanup, which torch sends
            by ``container.cpp: DistAutogradContainer::sendReleaseContextRpc``, have no counter.
        between_cleanups: the longest wait of a context's cleanup between two tries; once no rank
            has logged a failed send for that long, no retry is left.
        last_cleanup: the longest wait of a cleanup before its last try, plus that try.
        stalled: how long nothing may change while a step of a program runs.
        stuck: the same while all steps that run are predicted never to end.
        unseen: the same while a call may still arrive that no counter shows.
        kept: the same where the ranks run no function, and hold what a known finding makes them
            keep.
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
    stuck: float
    unseen: float
    kept: float

    @classmethod
    def of(
        cls, plan: FaultPlan, world_size: int, rate: float, margin: float, lasts: float = 0.0
    ) -> Deadlines:
        """The deadlines under `plan` at `rate`, each with `margin` real seconds on top.

        Functions that run for up to `lasts` (virtual seconds) change no counter meanwhile.
        """
        own = lasts / rate
        faults = [plan.faults_at(rank) for rank in range(world_size)]
        seen = max(
            sum(f.seconds for f in at if not f.unseen_waits and not f.blocks_sender)
            for at in faults
        )
        unseen = max(sum(f.seconds for f in at if f.unseen_waits) for at in faults)
        # Delays of one sender add up: the agent sleeps in the thread that sends
        # (``faulty_tensorpipe_agent.cpp: FaultyTensorPipeAgent::send``).
        delays = 4 * max(sum(f.seconds for f in at if f.blocks_sender) for at in faults)
        chain = (seen + unseen + delays) / rate
        longest = max((wait for at in faults for f in at for wait in f.unseen_waits), default=0.0)
        # A message that is delayed, or waits for its retry, is under way: that is not quiet.
        quiet = _QUIET + 1.0 / rate + own
        return cls(
            start=margin,
            run=margin + chain + world_size * delays / rate + own,
            look=margin,
            settle=margin + 4 * chain + world_size * delays / rate + own,
            # ``rref_context.cpp: RRefContext::delAllUsersAndUnforkedOwners`` gives up after this.
            shutdown=margin + 4 * chain + OWNER_WAITS / rate + own,
            quiet=quiet,
            quiet_cleanup=quiet + unseen / rate,
            between_cleanups=longest * 1.5 / rate + 0.02,
            last_cleanup=longest / rate + 0.02,
            stalled=_STALLED + 2 * chain + own,
            stuck=(_STUCK if rate > 1 else _STALLED) + 2 * chain + own,
            unseen=_UNSEEN + 1.0 / rate + own,
            kept=_QUIET + 1.0 / rate,
        )

    def become(self, others: Deadlines) -> None:
        """Take the values of others, for everybody who holds this object."""
        vars(self).update(vars(others))
