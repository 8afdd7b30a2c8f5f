"""The known findings (docs/findings.md) that a program meets, as the oracle's model notes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rpcprops.faults import FaultPlan, MessageType, WireMessageType
from rpcprops.oracle._kept import Kept
from rpcprops.oracle._now import Now
from rpcprops.oracle.prediction import Met
from rpcprops.oracle.rrefs import Handle
from rpcprops.outcomes import Counters
from rpcprops.torch_facts import TorchFacts


class FindingsMet:
    """What a program meets of the known findings, where the torch that runs it has them.

    Args:
        calls: how often each named call has run so far, by rank.

    Attributes:
        met: what it has met so far.
        kept: what ranks keep for ever because of that.
        stuck: the steps that do not end because of it.
    """

    def __init__(
        self,
        facts: TorchFacts,
        plan: FaultPlan,
        world_size: int,
        now: Now,
        calls: Sequence[Mapping[str, int]],
    ) -> None:
        self.facts = facts
        self.plan = plan
        self.world_size = world_size
        self.now = now
        self.calls = calls
        self.met: set[Met] = set()
        self.kept = Kept()
        self.stuck: set[int] = set()

    def end(self, wanted: Sequence[Counters], step: int | None, *, settles: bool) -> None:
        """Note what ranks keep at a settle, or at the end: see :meth:`Kept.found`."""
        self.met |= set(self.kept.found(wanted, self.met, step, settles=settles))

    def meets(self, finding: str) -> None:
        """Note that the program meets a known finding (docs/findings.md), if this torch has it.

        It may show in any step, at any rank.
        """
        if self.facts.has_bug(finding):
            self.met.add(Met(finding))

    def meets_here(
        self,
        finding: str,
        rank: int,
        says: str = "",
        *,
        breaks: tuple[str, ...] = (),
        lasts: bool = False,
    ) -> None:
        """The same for a finding that shows at `rank` alone: in this step, or with `lasts` later.

        `says` is a regular expression for the message of the violation, `breaks` the promises that
        it breaks, if not all of the finding. What comes later is a death or a hang.
        """
        if self.facts.has_bug(finding):
            self.met.add(Met(finding, rank, self.now.number, says, breaks, lasts=lasts))

    def meets_at_shutdown(self, finding: str) -> None:
        """The same for a finding by which any rank may hang when it shuts down, and only then."""
        if self.facts.has_bug(finding):
            ranks = range(self.world_size)
            says = r"\(phase shutdown,"
            self.met |= {Met(finding, rank, None, says, ("RankHung",)) for rank in ranks}

    def frees_context(self, rank: int, *, keeps: bool = True) -> None:
        """A gradient of this step that `rank` has sent fails when its context has been freed.

        The callback of its future then locks a mutex in that memory (``context.cpp``:
        ``DistAutogradContext::addOutstandingRpc``). That ends the process. Or it raises, and then
        the call is never counted as ended, so that the shutdown waits for it
        (``tensorpipe_agent.cpp``: ``TensorPipeAgent::markFutureWithError``, ``join``).

        Args:
            keeps: False where another finding keeps calls anyway, of any number.
        """
        finding = "freed-context-used"
        self.meets_here(finding, rank, r"killed by SIG(ABRT|SEGV|BUS)", lasts=True)
        if keeps:
            self.keeps_perhaps(finding, rank, Counters(client_calls=1))
            self.meets_at_shutdown(finding)

    def meets_in_proxy(self, handle: Handle, rank: int) -> None:
        """Note that an asynchronous call of `rank` through a handle has failed.

        The frame of that call keeps the RRef (failed-async-proxy), until a shutdown deletes it.
        """
        self.meets("failed-async-proxy")
        if handle.fork:
            self.kept.in_frames.add((rank, handle.rref.owner))

    def never_ends(self, finding: str) -> None:
        """The same for a finding that keeps this step from ending: see :attr:`Prediction.stuck`."""
        if self.facts.has_bug(finding):
            self.stuck.add(self.now.number)

    def keeps(self, finding: str, rank: int, held: Counters) -> None:
        """The same for a finding by which `rank` keeps something for ever."""
        if self.facts.has_bug(finding):
            self.kept.add(finding, rank, held)

    def keeps_perhaps(self, finding: str, rank: int, held: Counters) -> None:
        """The same where `rank` keeps it in some runs only."""
        if self.facts.has_bug(finding):
            self.kept.add_perhaps(finding, rank, held)

    def keeps_user(self, finding: str, rank: int, owner: int) -> None:
        """The same for a user RRef of `rank`, which only its shutdown deletes."""
        if not self.facts.has_bug(finding):
            return
        self.kept.add_user(finding, rank, owner)
        self.sends_otherwise(finding, rank, owner, MessageType.RREF_USER_DELETE)

    def sends_otherwise(
        self, finding: str, rank: int, to: int, message: MessageType | WireMessageType
    ) -> None:
        """The same for a finding by which `rank` sends more or fewer such messages to `to`."""
        if not self.facts.has_bug(finding):
            return
        says = rf"^the record shows \d+ {message} from rank {rank} to rank {to}, "
        self.met.add(Met(finding, rank, None, says, ("MessagesDiffer",)))
        table = self.plan.table(rank)
        counts = []
        if message in table.failing and MessageType(message).is_retryable:
            counts.append(r" failed \d+ sends, the message")
        if message in table.delaying:
            counts.append(r" held up sends ")
        for fault in self.plan.others:
            if fault.rank == rank and message in fault.targets:
                counts.append(rf"^{re.escape(fault.name)} struck ")
        for says in counts:
            self.met.add(Met(finding, rank, None, says, ("FaultsDiffer",)))

    def logs(self, finding: str, rank: int, says: str) -> None:
        """The same for a finding by which `rank` logs an error of which its caller is not told.

        `says` is a regular expression for the start of that error.
        """
        if self.facts.has_bug(finding):
            self.met.add(Met(finding, rank, None, f" wrote: {says}", ("ErrorInLog",)))

    def runs_less(self, finding: str, rank: int, call: str, times: int) -> None:
        """The same for a finding by which a function at `rank` may run up to `times` less often."""
        if self.facts.has_bug(finding):
            promised = self.calls[rank][call]
            fewer = "|".join(map(str, range(promised - times, promised)))
            says = rf"^{re.escape(call)} ran ({fewer}) times "
            self.met.add(Met(finding, rank, None, says, ("NotRunOnce",)))

    def asks_for_nothing(self, finding: str, handle: Handle) -> None:
        """In this step a rank uses an RRef that is never made, and a finding keeps that from it.

        So it gets no error. A user asks the owner, which serves such a request for ever if it comes
        (``rref_context.cpp``: ``RRefContext::getOwnerRRef``).
        """
        if not self.facts.has_bug(finding):
            return
        says, owner = "had to be refused by .*, and came with ", handle.rref.owner
        self.met.add(Met(finding, handle.rank, self.now.number, says, ("MissingError",)))
        if handle.fork:
            self.keeps_perhaps(finding, owner, Counters(server_calls=1, server_async_calls=1))
            fetch = MessageType.PYTHON_RREF_FETCH_CALL
            self.sends_otherwise(finding, handle.rank, owner, fetch)
