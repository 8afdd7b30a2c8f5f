"""Chooses the passing cases that also run in real time: a few cheap ones, by the draws alone.

A fast clock could hide a failure that real time shows. Nothing suggests that it does. To run all
cases in real time would cost what the fast clock saves, so a sample must do.
"""

from __future__ import annotations

from rpcprops.cluster.deadlines import Deadlines
from rpcprops.faults import MessageFault, MessageType
from rpcprops.oracle import fired, lost_seconds, predict, seconds_in_vain
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.properties._base import Case, Observation
from rpcprops.torch_facts import FINDINGS, UNKNOWN, TorchFacts, facts_of

#: Of the passing cases that qualify, one in this number is also run in real time.
EVERY = 5
#: The most such runs for one property.
MOST = 20
#: The most predicted real seconds of waits in one such run.
CASE_SECONDS = 3.0
#: The most predicted real seconds of all such runs for a property (or a tenth of its time).
ALL_SECONDS = 3.0
#: Real seconds after which a rank counts as hung, unless a cluster has another deadline.
_HUNG_SECONDS = 30.0
#: Real seconds of an example besides its waits.
_EXAMPLE_SECONDS = 0.1
#: The share of the time of all examples that such runs may take.
SHARE = 0.1


def real_waits(case: Case, facts: TorchFacts = UNKNOWN) -> float:
    """Seconds that `case` waits for retries and delays at rate 1, as if one after the other."""
    program, plan = case.program, case.plan
    size = program.world_size
    prediction = predict(program, plan, facts)
    waits = 0.0
    struck = {fault: sum(fault.strikes(prediction.sends)) for fault in plan.faults(size)}
    for fault, times in struck.items():
        # Retries of different messages wait at the same time, but delays of one sender add up. The
        # model knows neither answers nor receivers, so a message fault may act in any case.
        acts = bool(times) or isinstance(fault, MessageFault)
        waits += fault.seconds * (times if fault.blocks_sender else acts)
    # Cleanup retries have no counter: a settle after a failed one waits until its last try.
    settles = 1 + sum(bool(step.counters) for step in prediction.steps)
    if any(times and fault.unseen_waits for fault, times in struck.items()):
        waits += settles * Deadlines.of(plan, size, 1.0, 0.0).last_cleanup
    waits += sum(leaf.lasts for leaf in program.leaves)
    # A request that is lost, or whose answer is, takes as long as its timeout.
    waits += seconds_in_vain(program, prediction.met) + lost_seconds(program, plan)
    if not program.settles:
        # In the shutdown all ranks drop their remaining handles at the same time.
        deletes = [f for f in struck if MessageType.RREF_USER_DELETE in f.targets]
        waits += max((f.seconds for f in deletes if not f.blocks_sender), default=0.0)
    waits += program.end.lasts
    is_waited = prediction.graceful and program.end.how != "at once"
    if is_waited and (prediction.leaking or prediction.may_exit_early):
        # Users wait for accepts that never come, and owners for deletes.
        waits += 2 * OWNER_WAITS
    if any(
        "RankHung" in {FINDINGS[n].promise, *FINDINGS[n].shows_as} for n in prediction.known_bugs
    ):
        # A rank that hangs is given all of its time, and then the finding explains the run.
        waits += _HUNG_SECONDS
    # Shutdown gathers by Python calls: each rank calls the first, which then calls every other.
    late = [f for f in struck if f.blocks_sender and MessageType.PYTHON_CALL in f.targets]
    waits += sum(f.seconds for f in late if f.rank == 0) * (size - 1)
    return waits + max((f.seconds for f in late if f.rank), default=0.0)


class Sample:
    """Chooses from the passing cases of one property, in the order in which they come."""

    def __init__(self, *, needs_faults: bool, seconds: float = ALL_SECONDS) -> None:
        self.needs_faults = needs_faults
        self.seconds = seconds
        self.taken = 0
        self.spent = 0.0
        self._passed = 0
        self._due = 0
        self._latest = 0.0

    def takes(self, seen: Observation) -> bool:
        """Whether this passing case is one that is run in real time.

        The first is one in which faults fired (unless the property needs none), and then one in
        every :data:`EVERY`. If that one would wait too long, the next takes its place.
        """
        if self.needs_faults and not fired(seen.faults):
            return False
        self._passed += 1
        if self._passed <= self._due or self.taken >= MOST:
            return False
        waits = real_waits(seen.case, facts_of(seen.outcome.torch_version))
        allowed = max(self.seconds, self._passed * _EXAMPLE_SECONDS * SHARE)
        if waits > CASE_SECONDS or self.spent + waits > allowed:
            return False
        self.taken += 1
        self._latest = waits + _EXAMPLE_SECONDS
        self.spent += self._latest
        self._due = self._passed + EVERY - 1
        return True

    def took(self, seconds: float) -> None:
        """Note how long the case that was taken last really took: longer counts, shorter not."""
        self.spent += max(0.0, seconds - self._latest)
        self._latest = max(self._latest, seconds)
