"""Judges what ranks held and how they exited, whatever ran on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rpcprops.outcomes import Counters, RankOutcome, Violation
from rpcprops.torch_facts import NEWEST, TorchFacts

#: Virtual seconds that an owner which still holds forks waits for their deletes at shutdown
#: (torch's ``RRefContext::delAllUsersAndUnforkedOwners``).
OWNER_WAITS = 100.0
#: Real seconds that a ready process may have to wait for a processor on a busy machine: 0.4 was
#: measured with a dozen busy processes for each core.
_STARVED_SECONDS = 1.0


def unsettled(
    held: Sequence[Counters], wanted: Sequence[Counters], names: Sequence[str]
) -> list[Violation]:
    """One violation for each promise that each rank breaks by holding what it should not."""
    found: list[Violation] = []
    for rank, (now, want) in enumerate(zip(held, wanted, strict=True)):
        if now == want:
            continue
        seen = f"{names[rank]} holds {now.describe()}; expected {want.describe()}"
        kinds: list[str] = []
        if now.owners < want.owners or now.forks < want.forks:
            kinds.append("OwnerGone")
        elif (now.owners, now.forks, now.pending_users, now.pending_futures) != (
            want.owners,
            want.forks,
            want.pending_users,
            want.pending_futures,
        ):
            kinds.append("RRefLeak")
        if (now.contexts, now.backward_passes) != (want.contexts, want.backward_passes):
            kinds.append("ContextLeak")
        if not kinds:
            kinds.append("CallLeak")
        found += [Violation(kind, seen, rank, timing_sensitive=True) for kind in kinds]
    return found


def reports_leak(rank: RankOutcome, facts: TorchFacts = NEWEST) -> bool:
    """Whether the rank reported a leaked RRef when it shut down."""
    return bool(_leak(rank, facts))


def _leak(rank: RankOutcome, facts: TorchFacts) -> str:
    """The line that reports it."""
    error = rank.shutdown_error
    return _line_with(facts.texts.leaks, error.message if error else rank.log)


def could_not_release(rank: RankOutcome, facts: TorchFacts = NEWEST) -> bool:
    """Whether the rank logged that it could not release a context at another rank."""
    return bool(_unreleased_context(rank, facts))


def _unreleased_context(rank: RankOutcome, facts: TorchFacts) -> str:
    return _line_with((facts.texts.context_kept,), rank.log)


def _line_with(texts: Sequence[str], log: str) -> str:
    """The first line of a log that contains one of some texts; empty if there is none."""
    found = re.search(rf"^.*(?:{'|'.join(map(re.escape, texts))}).*$", log, re.MULTILINE)
    return found.group().strip() if found else ""


def owner_slack(rate: float) -> float:
    """The slack of a violation that comes from an owner giving up, in virtual seconds.

    None if its 100 seconds are so short in real time that a busy machine may keep a rank from
    running for that long. How late its timed waits end does not show that.
    """
    return OWNER_WAITS if OWNER_WAITS / rate >= _STARVED_SECONDS else 0.0


def shutdown_violations(
    ranks: Iterable[RankOutcome],
    *,
    leaks_allowed: bool,
    rate: float,
    facts: TorchFacts = NEWEST,
) -> list[Violation]:
    """The violations that a graceful shutdown at `rate` showed."""
    found: list[Violation] = []

    def late(promise: str, message: str, rank: int) -> Violation:
        return Violation(promise, message, rank, timing_sensitive=True, slack=owner_slack(rate))

    for rank in ranks:
        error = rank.shutdown_error
        leak = _leak(rank, facts)
        context = _unreleased_context(rank, facts)
        if error is not None:
            promise = "RRefLeak" if leak else "UngracefulShutdown"
            message = f"rpc.shutdown() of {rank.name} raised {error.first_line()}"
            found.append(late(promise, message, rank.rank))
        elif leak and not leaks_allowed:
            message = f"{rank.name} shut down with a leak: {leak}"
            found.append(late("RRefLeak", message, rank.rank))
        if context:
            message = f"{rank.name} shut down with a context: {context}"
            found.append(late("ContextLeak", message, rank.rank))
        if rank.signal:
            message = f"{rank.name} was {rank.describe_end()} during shutdown"
            found.append(Violation("RankDied", message, rank.rank))
        elif rank.exit_code not in (0, None) and error is None:
            message = f"{rank.name} left with {rank.describe_end()} instead of 0"
            found.append(Violation("UngracefulShutdown", message, rank.rank))
    return found
