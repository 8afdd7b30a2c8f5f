"""What ranks may have done and hold at the most, whatever faults of messages there were.

All of it is read off the record of messages, and rests on these parts of torch's source:

* A function runs once for each request that its rank processes (``request_callback_impl.cpp``:
  ``processPythonCall``, ``processPythonRemoteCall``), and torch sends no call a second time: only
  ``rref_context.cpp`` and ``container.cpp`` call ``RpcAgent::sendWithRetries``.
* A message of the four types that are tried again is sent as often as that, and no more once a try
  has been answered without an error (``rpc_agent.cpp``: ``RpcAgent::rpcRetryCallback``).
* A rank makes a context only when it enters one, or when it processes a message of one
  (``container.cpp``: ``newContext``, ``getOrCreateContext``). Leaving it, and a cleanup, erase it
  (``releaseContext``, ``releaseContextIfPresent``).
* An owner that has forks left when it shuts down says so (``rref_context.cpp``:
  ``RRefContext::checkRRefLeaks``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, WireMessageType
from rpcprops.oracle._predict import predict
from rpcprops.oracle._recorded import answers_differ
from rpcprops.oracle.prediction import Prediction
from rpcprops.oracle.ranks import reports_leak
from rpcprops.outcomes import Outcome, RankOutcome, SentMessage, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import TorchFacts

#: The requests that may run a function of Python.
_RUNNING = frozenset(
    {
        WireMessageType.PYTHON_CALL,
        WireMessageType.PYTHON_REMOTE_CALL,
        WireMessageType.FORWARD_AUTOGRAD_REQ,
        WireMessageType.RUN_WITH_PROFILING_REQ,
    }
)
#: The requests that belong to a context.
_OF_CONTEXTS = frozenset(
    {
        WireMessageType.FORWARD_AUTOGRAD_REQ,
        WireMessageType.BACKWARD_AUTOGRAD_REQ,
        WireMessageType.RREF_BACKWARD_REQ,
    }
)
#: What steps count under these names is no run of a function that was called.
_NO_CALLS = ("/hook", "/pickled", "/unpickled")


def exceeded(program: Program, outcome: Outcome, facts: TorchFacts) -> Iterator[Violation]:
    """Where a run shows more than its messages can have caused.

    Nothing is compared where the record is not whole.
    """
    if not outcome.messages or outcome.messages_dropped:
        return
    try:
        usual = predict(program, FaultPlan(), facts)
    except UsageError:
        usual = None
    yield from _runs(usual, outcome)
    yield from _tries(outcome)
    yield from answers_differ(outcome)
    for rank in outcome.ranks:
        if rank.exit_code == 0 and rank.counters_after_shutdown is not None:
            yield from _contexts(program, usual, outcome, rank)
            yield from _forks(outcome, rank, facts)


def _runs(usual: Prediction | None, outcome: Outcome) -> Iterator[Violation]:
    """Functions that ran more often than requests were processed, or than they are called."""
    running = [sent for sent in outcome.messages if sent.is_request and sent.type in _RUNNING]
    is_once = all(sent.processed <= 1 for sent in running)
    for rank in outcome.ranks:
        processed = sum(sent.processed for sent in running if sent.receiver == rank.rank)
        ran = {name: n for name, n in rank.calls.items() if not name.endswith(_NO_CALLS)}
        if sum(ran.values()) > processed:
            message = (
                f"{rank.name} ran functions {sum(ran.values())} times, and has processed "
                f"{processed} requests that run one"
            )
            yield Violation("NotRunOnce", message, rank.rank)
        elif usual is not None and is_once:
            for name, times in sorted(ran.items()):
                most = usual.calls[rank.rank].get(name, 0)
                if times > most:
                    message = (
                        f"{name} ran {times} times on {rank.name}, which is called {most} times, "
                        f"and no request came twice"
                    )
                    yield Violation("NotRunOnce", message, rank.rank)


def _tries(outcome: Outcome) -> Iterator[Violation]:
    """Requests that were sent again too often, or after one try had been answered."""
    tries: defaultdict[int, list[SentMessage]] = defaultdict(list)
    for sent in outcome.messages:
        if sent.is_request:
            tries[sent.first_id].append(sent)
    for one in tries.values():
        kind = WireMessageType(one[0].type)
        most = 1 + (kind.max_retries or 0)
        done = [sent for sent in one[:-1] if sent.became == "answered"]
        message = ""
        if len(one) > most:
            message = f"was sent {len(one)} times, and may be sent {most} times"
        elif any("raised" not in sent.marks for sent in done):
            message = "was sent again after it had been answered without an error"
        if message:
            where = one[0].sender
            told = f"the {kind} of rank {where} to rank {one[0].receiver} {message}"
            yield Violation("MessagesDiffer", told, where)


def _contexts(
    program: Program, usual: Prediction | None, outcome: Outcome, rank: RankOutcome
) -> Iterator[Violation]:
    """Contexts that a rank still holds although nothing can have made them again."""
    held = rank.counters_after_shutdown
    assert held is not None
    most = usual.contexts_left[rank.rank].stop - 1 if usual and usual.contexts_left else None
    if most is None or held.contexts <= most:
        return
    its = [
        sent
        for sent in outcome.messages
        if sent.is_request
        and sent.type in _OF_CONTEXTS
        and rank.rank in (sent.sender, sent.receiver)
    ]
    if not its:
        why = "no message of a context was sent to it, or by it"
    elif _is_cleaned(program, outcome.messages, its, rank.rank):
        why = "it has answered the cleanup, which came after all messages of the only context"
    else:
        return
    message = f"{rank.name} still holds {held.describe()} after its shutdown, and {why}"
    yield Violation("ContextLeak", message, rank.rank, timing_sensitive=True)


def _is_cleaned(
    program: Program, messages: Sequence[SentMessage], its: Sequence[SentMessage], rank: int
) -> bool:
    """Whether a rank was certainly told to erase the only context of a program, for good.

    Args:
        its: the requests of the context that it has sent, or that were sent to it.
    """
    makers = [leaf for leaf in program.leaves if "context" in leaf.makes.values()]
    if len(makers) != 1 or getattr(makers[0], "at", rank) == rank:
        return False
    cleanups = [
        sent
        for sent in messages
        if sent.type == WireMessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
        and sent.receiver == rank
        and sent.became == "answered"
        and "raised" not in sent.marks
    ]
    return any(all(_is_over(one, cleanup) for one in its) for cleanup in cleanups)


def _is_over(sent: SentMessage, later: SentMessage) -> bool:
    """Whether a request can have no effect any more when a later one was sent."""
    if sent.done in ("fail", "lose"):
        return not sent.processed
    was_answered = sent.became == "answered" and sent.done != "duplicate"
    return was_answered and sent.ended is not None and sent.ended < later.seconds


def _forks(outcome: Outcome, rank: RankOutcome, facts: TorchFacts) -> Iterator[Violation]:
    """Forks that a rank kept in its shutdown and has not reported.

    What still comes while it shuts down may add one after it has looked.
    """
    held = rank.counters_after_shutdown
    assert held is not None
    if not held.forks or reports_leak(rank, facts):
        return
    came = [sent for sent in outcome.messages if sent.is_request and sent.receiver == rank.rank]
    if all(_has_come(sent) for sent in came):
        message = f"{rank.name} holds {held.describe()} after its shutdown, and has not said so"
        yield Violation("RRefLeak", message, rank.rank, timing_sensitive=True)


def _has_come(sent: SentMessage) -> bool:
    """Whether a request was processed once, or never will be."""
    if sent.done in ("fail", "lose"):
        return not sent.processed
    return sent.became == "answered" and sent.processed == 1
