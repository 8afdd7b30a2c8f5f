"""Effects that are accepted because they are documented: they are counted, and never hidden.

The sentences stand in docs/faults.md, word for word (``tests/unit/test_documented.py`` compares).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rpcprops.faults import FaultPlan
from rpcprops.oracle._chosen import predict_for
from rpcprops.oracle._log_errors import log_errors
from rpcprops.oracle.prediction import Prediction
from rpcprops.oracle.ranks import could_not_release, reports_leak
from rpcprops.outcomes import Counters, Outcome, RankOutcome
from rpcprops.programs import Program
from rpcprops.programs.threads import runs_out
from rpcprops.torch_facts import TorchFacts, facts_of


@dataclass(frozen=True, slots=True)
class Documented:
    """A kind of effect that the judge accepts.

    Attributes:
        sentence: what happens, and when, as docs/faults.md says it.
        is_defect: whether a user of torch would call it a defect of torch.
        quote: the words of torch's documentation that allow it, empty if it says nothing of it.
        place: where they stand: a file below torch's own folder, or below its repository's.
    """

    sentence: str
    is_defect: bool = False
    quote: str = ""
    place: str = ""

    @property
    def allowed_by(self) -> str:
        """The quotation with its place, in words; empty if there is none."""
        return f'"{self.quote}" ({self.place})' if self.quote else ""


_NO_LOSS = "It cannot handle node crashes or permanent network partitions."
_RREFS = "docs/source/rpc/rref.md, Assumptions"
_SHUTDOWN = "distributed/rpc/api.py, shutdown"

#: Every kind of effect that is accepted, by the name under which it is counted.
DOCUMENTED: Mapping[str, Documented] = {
    "leak-at-owner": Documented(
        "An owner reports a leaked RRef at shutdown, because a message that would have deleted a "
        "fork was lost for good; the rank that lost it is told nothing.",
        is_defect=True,
        quote=_NO_LOSS,
        place=_RREFS,
    ),
    "leak-by-chance": Documented(
        "An owner may or may not report a leaked RRef at shutdown, because a user deletes its fork "
        "only after 100 s, which is when the owner gives up, or because the owner has never got "
        "the RRef and so does not wait until the delete is sent again.",
        is_defect=True,
        quote=_NO_LOSS,
        place=_RREFS,
    ),
    "held-at-once": Documented(
        "An owner reports a leaked RRef when the ranks shut down with graceful=False, because its "
        "users have not deleted their forks.",
        quote="this is a local shutdown, and it does not wait for other RPC processes",
        place=_SHUTDOWN,
    ),
    "cut-off-at-once": Documented(
        "A call never runs, or an RRef or an autograd context stays, because the ranks shut down "
        "with graceful=False while its messages were under way.",
        quote="stops the local agent from accepting outstanding requests",
        place=_SHUTDOWN,
    ),
    "shutdown-waits": Documented(
        "Shutdown takes 100 s longer, because a rank waits for a message that was lost for good.",
        is_defect=True,
        quote="wait until there is no pending system messages for ``UserRRefs``",
        place=_SHUTDOWN,
    ),
    "context-kept": Documented(
        "A rank keeps an autograd context for ever, because its cleanup was lost 21 times.",
        is_defect=True,
    ),
    "context-left-by-shutdown": Documented(
        "A rank still has an autograd context after shutdown, because shutdown does not wait for "
        "cleanup that is being tried again.",
        is_defect=True,
    ),
    "call-dropped-by-shutdown": Documented(
        "A call that timed out at its caller never runs, because shutdown drops it on its way.",
        quote="stops the local agent from accepting outstanding requests",
        place=_SHUTDOWN,
    ),
    "no-graceful-shutdown": Documented(
        "The ranks are ended without a shutdown, because a fault of PYTHON_CALL breaks the calls "
        "that shutdown itself makes.",
        is_defect=True,
        quote="are not idempotent and therefore cannot be retried",
        place=_RREFS,
    ),
    "no-thread-left": Documented(
        "The ranks are ended without a shutdown, because functions that wait for each other keep "
        "all threads of a rank for ever.",
        is_defect=True,
        quote="to execute requests (default: 16)",
        place="distributed/rpc/options.py, TensorPipeRpcBackendOptions",
    ),
    "timed-out-rref-used": Documented(
        "A use of an RRef whose creation times out raises nothing, because torch has not marked "
        "the RRef yet.",
        quote="errors may not be raised as they have not yet been handled",
        place="distributed/rpc/api.py, remote",
    ),
    "either-way": Documented(
        "A step may give its value or an error, because its timeout is too near to what it waits "
        "for; which of the two came is not judged.",
        quote="If the RPC does not complete in this amount of time, an exception indicating it has "
        "timed out will be raised",
        place="distributed/rpc/api.py, rpc_sync",
    ),
    "backward-waits": Documented(
        "A backward pass never ends, because it does not reach a tensor that was sent in its "
        "context.",
        quote="The key assumption of this algorithm is that each `send` function has a dependency "
        "of 1 when we run a backward pass.",
        place="docs/source/rpc/distributed_autograd.md, FAST mode algorithm",
    ),
    "fired-not-judged": Documented(
        "How many injected faults fired is not compared with the prediction, because a timeout or "
        "a cleanup that reaches some ranks only leaves it open.",
    ),
    "last-deletes-not-judged": Documented(
        "How often the deletes that shutdown sends have failed is known within bounds only, "
        "because a rank may leave before their last try.",
    ),
}


@dataclass(frozen=True, slots=True, order=True)
class Accepted:
    """One documented effect in one run.

    Attributes:
        kind: its name in :data:`DOCUMENTED`.
        rank: where it was seen, None if it belongs to no rank.
        step: the step that showed it, None if it belongs to no step.
    """

    kind: str
    rank: int | None = None
    step: int | None = None


def accepted_json(
    kind: str, examples: int, example: Any, times: int | None = None
) -> dict[str, Any]:
    """A documented effect in a report.

    Args:
        examples: how many examples showed it.
        example: one of them, as JSON.
        times: how often they showed it, each rank and step by itself; None if nobody counted.
    """
    documented = DOCUMENTED[kind]
    return {
        "kind": kind,
        "examples": examples,
        **({} if times is None else {"times": times}),
        "sentence": documented.sentence,
        "allowed_by": documented.allowed_by,
        "is_defect": documented.is_defect,
        "example": example,
    }


def accepted(program: Program, plan: FaultPlan, outcome: Outcome) -> tuple[Accepted, ...]:
    """Every documented effect that `outcome` shows, in the order of :data:`DOCUMENTED`."""
    prediction = predict_for(program, plan, outcome)
    # A rank may show one kind in several ways.
    at_ranks = dict.fromkeys(_at_ranks(program, prediction, outcome))
    found = [*at_ranks, *_in_steps(program, prediction, outcome)]
    started = bool(outcome.ranks) and len(outcome.steps) == len(prediction.steps)
    if started and prediction.unmarked_uses:
        found.append(Accepted("timed-out-rref-used"))
    if started and not prediction.graceful:
        number = program.num_worker_threads or 0
        out = any(runs_out(leaf, number) for leaf in program.leaves)
        found.append(Accepted("no-thread-left" if out else "no-graceful-shutdown"))
    if started and program.settles and not prediction.certain:
        found.append(Accepted("fired-not-judged"))
    order = list(DOCUMENTED)
    return tuple(sorted(found, key=lambda one: (order.index(one.kind), one.rank or 0)))


def _at_ranks(program: Program, prediction: Prediction, outcome: Outcome) -> Iterator[Accepted]:
    if outcome.phase("shutdown") is None:
        if outcome.phase("settle") is not None:
            for number, held in enumerate(prediction.counters):
                if held.contexts:
                    yield Accepted("context-kept", number)
        return
    facts = facts_of(outcome.torch_version)
    for rank, may_fail in zip(outcome.ranks, prediction.failed_sends(), strict=False):
        for kind in (
            *_rrefs(program, prediction, rank, facts),
            *_contexts(program, prediction, rank, facts),
        ):
            yield Accepted(kind, rank.rank)
        given_up = _given_up(prediction, rank.rank)
        wanted = prediction.calls[rank.rank].items()
        if any(rank.calls.get(call, 0) < times and call in given_up for call, times in wanted):
            hasty = program.ends_hastily
            yield Accepted("cut-off-at-once" if hasty else "call-dropped-by-shutdown", rank.rank)
        if len(may_fail) > 1 and rank.rank in prediction.may_exit_early:
            yield Accepted("last-deletes-not-judged", rank.rank)


def _rrefs(
    program: Program, prediction: Prediction, rank: RankOutcome, facts: TorchFacts
) -> Iterator[str]:
    """The kinds of documented effect that a rank showed of RRefs at shutdown."""
    if reports_leak(rank, facts):
        if rank.rank in prediction.leaking:
            yield "held-at-once" if program.end.how == "at once" else "leak-at-owner"
        elif rank.rank in prediction.may_leak:
            yield "cut-off-at-once" if program.ends_hastily else "leak-by-chance"
    if any(error.kind in ("owners", "users") for error in log_errors(rank.log, facts)):
        yield "shutdown-waits"


def _contexts(
    program: Program, prediction: Prediction, rank: RankOutcome, facts: TorchFacts
) -> Iterator[str]:
    """The kinds of documented effect that a rank showed of contexts at shutdown."""
    kept = prediction.counters[rank.rank].contexts
    after = rank.counters_after_shutdown or Counters()
    if kept:
        yield "context-kept"
    # If the program settled, a rank that could not release a context has lost its cleanup for good.
    gave_up = (
        not program.settles
        and rank.rank in prediction.may_warn_unreleased_context
        and could_not_release(rank, facts)
    )
    if after.contexts > kept or gave_up:
        yield "cut-off-at-once" if program.ends_hastily else "context-left-by-shutdown"


def _given_up(prediction: Prediction, rank: int) -> frozenset[str]:
    return (
        prediction.abandoned_calls[rank] if rank < len(prediction.abandoned_calls) else frozenset()
    )


def _in_steps(program: Program, prediction: Prediction, outcome: Outcome) -> Iterator[Accepted]:
    for step in outcome.steps:
        leaf, expected = program.leaves[step.index], prediction.steps[step.index]
        is_well = step.ended and not step.error and not expected.error
        if leaf.documented and is_well and not leaf.judge(expected.value, step.value):
            yield Accepted(leaf.documented, None, step.index)
        if step.ended and prediction.steps[step.index].error == "unknown":
            yield Accepted("either-way", None, step.index)
