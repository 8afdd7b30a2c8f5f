"""Which ranks wait for ever in a shutdown in which a call is lost by which they meet, or fails.

The ranks of a graceful shutdown meet in ``torch/distributed/rpc/api.py``: _all_gather. The rank
whose name is the first leads. In phase 1 each follower calls _gather_to_leader there, and then all
wait for ``proceed_signal``, which the leader gets once all have called. In phase 2 the leader calls
_broadcast_to_followers at each follower, which sets the signal there, and waits for the answers. A
shutdown without a timeout gives these calls the timeout 0, which is none
(``tensorpipe_agent.cpp``: TensorPipeAgent::send), and waits for the signal without one. So:

* a call of a follower that fails: its rank raises, and all others wait for their signals;
* one that is lost: all ranks wait;
* the answer to one that is lost: that follower waits;
* a call of the leader that fails: the leader raises once the others have answered, and that
  follower waits;
* one that is lost: that follower and the leader wait;
* the answer to one that is lost: the leader waits.

The ranks that are not named go on, and wait for these in the store (TensorPipeAgent::join). How
long that lasts is a matter of the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageFault, WireMessageType
from rpcprops.oracle._messages import OTHER_AGENTS
from rpcprops.oracle._predict import predict
from rpcprops.oracle.errors import error_class
from rpcprops.outcomes import Outcome, RankOutcome, SentMessage, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import TorchFacts

#: A call by which the ranks meet, and its answer.
_GATHERING = (WireMessageType.PYTHON_CALL, WireMessageType.PYTHON_RET)


@dataclass(frozen=True, slots=True)
class Meeting:
    """How ranks end whose meeting is disturbed.

    Attributes:
        waiting: those that wait for ever.
        raising: those whose shutdown raises the injected failure.
    """

    waiting: frozenset[int]
    raising: frozenset[int] = frozenset()


def meeting(
    program: Program, plan: FaultPlan, outcome: Outcome, facts: TorchFacts
) -> Meeting | None:
    """How the ranks must end, where one fault has acted, and on a call of their meeting.

    None where nothing of that is predicted, or the run has ended before its shutdown.
    """
    stopped = [sent for sent in outcome.messages if sent.done]
    if not (
        len(stopped) == 1
        and stopped[0].done in ("fail", "lose")
        and gathers(stopped[0], outcome)
        and _is_of_shutdown(stopped[0], outcome)
        and any(phase.name == "shutdown" for phase in outcome.phases)
        and not outcome.messages_dropped
        and _meets_without_timeout(program, plan, facts)
    ):
        return None
    (sent,) = stopped
    ranks = {rank.rank: rank.name for rank in outcome.ranks}
    leader = min(ranks, key=ranks.__getitem__)
    ways = (sent.sender, sent.receiver)
    if leader not in ways:
        return None
    asks, asked = ways if sent.is_request else ways[::-1]
    if asks == leader:
        both = {leader} if not sent.is_request else {asked} if sent.done == "fail" else {*ways}
        return Meeting(frozenset(both), frozenset({leader} if sent.done == "fail" else ()))
    if not sent.is_request:
        return Meeting(frozenset({asks}))
    raising = frozenset({asks} if sent.done == "fail" else ())
    return Meeting(frozenset(ranks) - raising, raising)


def gathers(sent: SentMessage, outcome: Outcome) -> bool:
    """Whether a message may be of the meeting: the last of its ranks and its type."""
    alike = [
        one
        for one in outcome.messages
        if (one.type, one.sender, one.receiver) == (sent.type, sent.sender, sent.receiver)
    ]
    return sent.type in _GATHERING and alike[-1] == sent


def _is_of_shutdown(sent: SentMessage, outcome: Outcome) -> bool:
    """Whether a rank has sent a message, or its request, while it shut down."""
    same = [one for one in outcome.messages if one.id == sent.id and one.is_request]
    return any("leaving" in one.marks for one in same)


def not_as_in_meeting(
    program: Program, plan: FaultPlan, outcome: Outcome, facts: TorchFacts
) -> Iterator[Violation]:
    """Ranks that end otherwise than :func:`meeting` says."""
    expected = meeting(program, plan, outcome, facts)
    for rank in outcome.ranks if expected else ():
        assert expected is not None
        if rank.rank in expected.waiting and not rank.killed:
            message = (
                f"expected {rank.name} to wait for ever in its shutdown (api.py: _all_gather), "
                f"{_how_it_ended(rank)}"
            )
            yield Violation("UngracefulShutdown", message, rank.rank)
        if rank.rank in expected.raising and not _has_raised(rank, facts):
            message = (
                f"expected the shutdown of {rank.name} to raise the injected failure, "
                f"{_how_it_ended(rank)}"
            )
            yield Violation("UngracefulShutdown", message, rank.rank)


def _has_raised(rank: RankOutcome, facts: TorchFacts) -> bool:
    """Whether the meeting has raised the injected failure at a rank, or it may still do so.

    Before the rank leaves it logs the failure (``api.py``: _wait_all_workers), and torch's
    formatter imports torch._dynamo for the first record (``torch/_logging/_internal.py``:
    TorchLogsFormatter.format). That takes seconds on a busy machine, so the rank may have been
    ended meanwhile, with the ranks that wait.
    """
    return rank.killed or error_class(rank.shutdown_error, facts) == "injected"


def _how_it_ended(rank: RankOutcome) -> str:
    if rank.shutdown_error is not None:
        return f"and it raised {rank.shutdown_error.first_line()}"
    return f"and it ended with exit code {rank.exit_code}"


def _meets_without_timeout(program: Program, plan: FaultPlan, facts: TorchFacts) -> bool:
    """Whether the ranks meet once, at rest, under this fault alone, and would leave at once else.

    Functions that go on could make calls of the same types in a shutdown.
    """
    is_one = len(plan.others) == 1 and plan == FaultPlan(others=plan.others)
    if not is_one or not isinstance(plan.others[0], MessageFault):
        return False
    if not program.settles or program.end.how != "graceful":
        return False
    if any(leaf.op in OTHER_AGENTS for leaf in program.leaves):
        return False
    try:
        calm = predict(program, FaultPlan(), facts)
    except UsageError:
        return False
    return calm.graceful and not (calm.known_bugs or calm.waiting or calm.leaking)
