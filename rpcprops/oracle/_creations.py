"""Creations of RRefs that fail, and what their users get to know of that."""

from __future__ import annotations

from collections.abc import Sequence

from rpcprops.errors import UsageError
from rpcprops.oracle._messages import Disturbances, refused
from rpcprops.oracle._met import FindingsMet
from rpcprops.oracle._now import Now
from rpcprops.oracle.prediction import ErrorClass
from rpcprops.oracle.rrefs import Handle
from rpcprops.outcomes import UNLIMITED_SLACK, Counters
from rpcprops.steps import StepFails
from rpcprops.torch_facts import TorchFacts


class Creations:
    """What ranks know of creations that fail.

    Args:
        choices: each use of an RRef whose creation timed out, in order: whether torch has marked
            the RRef by then. Uses beyond the last choice count as not marked.

    Attributes:
        unmarked_uses: the number of such uses so far.
        told: how many of them raise that error all the same.
        used_now: the handles that the present step has so used.
        unsure: handles whose creation comes after its timeout: they are used only after a settle.
        answered_late: handles whose creation fails, in functions that answer with them when nobody
            waits.
        broke_one: ranks in which the creation of an RRef has failed before.
    """

    def __init__(
        self,
        choices: Sequence[bool],
        facts: TorchFacts,
        disturbed: Disturbances,
        findings: FindingsMet,
        now: Now,
    ) -> None:
        self.choices = choices
        self.facts = facts
        self.disturbed = disturbed
        self.findings = findings
        self.now = now
        self.unmarked_uses = 0
        self.told = 0
        self.used_now: list[Handle] = []
        self.unsure: list[Handle] = []
        self.answered_late: list[Handle] = []
        self.broke_one: set[int] = set()
        #: Ranks whose function uses an RRef whose creation fails, when nobody waits for that.
        self._abandoned: set[int] = set()

    @property
    def unmarked(self) -> int:
        """How many uses of an RRef whose creation timed out raise nothing."""
        return self.unmarked_uses - sum(self.choices[: self.unmarked_uses]) - self.told

    def use(self, handle: Handle) -> None:
        """A rank uses a handle, which may fail.

        Raises:
            StepFails: its creation failed, and torch knows that.
        """
        if handle.unmarked and any(handle is one for one in self.unsure):
            step = self.now.step
            why = f"{step!r} uses an RRef before torch has marked it; put a Settle() before"
            raise refused(self.disturbed.faults[0], why)
        if handle.unmarked and handle.rref.absent and handle.rank == handle.rref.owner:
            why = (
                f"{self.now.step!r} waits at its owner for a value that was never made, and "
                f"OwnerRRef::getValue (rref_impl.cpp) has no timeout"
            )
            raise refused(self.disturbed.faults[0], why)
        if handle.unmarked and not any(used is handle for used in self.used_now):
            self.used_now.append(handle)
            marked = self.choices[self.unmarked_uses : self.unmarked_uses + 1]
            self.unmarked_uses += 1
            if any(marked):
                self.mark(handle)
        if handle.broken:
            if handle.second:
                # It is never marked: whoever uses it waits for its creation.
                self.findings.never_ends("second-failed-remote")
            # Before a settle, torch knows of a timeout only once one of its threads has handled it.
            raise StepFails(
                handle.broken, handle.marked_before if handle.timed_out else UNLIMITED_SLACK
            )

    def mark(self, handle: Handle) -> None:
        """torch has marked the RRef as timed out, if its creation does time out.

        ``rref_impl.cpp``: ``RRef::handleError``.
        """
        if handle.unmarked:
            handle.unmarked = False
            self.fails(handle, "creation")

    def fails(self, handle: Handle, how: ErrorClass) -> None:
        """Note that the creation of a handle's RRef failed, as far as its rank knows."""
        handle.broken = how
        handle.second = handle.rank in self.broke_one
        if handle.second:
            self._check_abandoned(handle.rank)
            self.findings.meets("second-failed-remote")
            for late in [one for one in self.answered_late if one.rank == handle.rank]:
                # The function sleeps first, so it may well be its creation that fails second.
                self._keeps_unmarked(late)
        self.broke_one.add(handle.rank)

    def abandons(self, rank: int, *, second: bool) -> None:
        """A function of `rank` for which nobody waits uses an RRef whose creation fails.

        Args:
            second: whether a creation of the rank had failed before.

        Raises:
            UsageError: the creation may be the second one that fails.
        """
        self._abandoned.add(rank)
        if second:
            self._check_abandoned(rank)

    def _check_abandoned(self, rank: int) -> None:
        """Check that a function does not wait for ever for an RRef that torch takes for good.

        Raises:
            UsageError: it may.
        """
        finding = "second-failed-remote"
        if rank in self._abandoned and self.facts.has_bug(finding):
            msg = (
                f"two creations of rank {rank} fail, one in a function that nobody waits for any "
                f"more, so nobody can tell which is the second ({finding}), and whether the "
                f"function waits for ever; give its step no timeout, or another form."
            )
            raise UsageError(msg)

    def answers_late(self, handle: Handle) -> None:
        """A function answers with an RRef whose creation failed, when nobody waits for that.

        A torch that does not know that the creation has failed sends the RRef. The answer is late,
        and so the fork in it stays (``rref_context.cpp``: ``RRefContext::prepareChildFork``).
        """
        if handle.second:
            self._keeps_unmarked(handle)
        else:
            self.answered_late.append(handle)

    def _keeps_unmarked(self, handle: Handle) -> None:
        finding = "second-failed-remote"
        if handle.fork:
            self.findings.keeps_user(finding, handle.rank, handle.rref.owner)
        else:
            self.findings.keeps_perhaps(finding, handle.rank, Counters(owners=1, forks=1))
