"""Compares the record of all messages of a run with those that the message model predicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from rpcprops.faults import MessageType, WireMessageType
from rpcprops.oracle.prediction import Prediction
from rpcprops.outcomes import Outcome, SentMessage, Violation
from rpcprops.torch_facts import FINDINGS, facts_of

_DELETE = MessageType.RREF_USER_DELETE
_CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
#: A call in a context wraps a request of a user. Where no gradient must come back, its answer is
#: that of the other one (``autograd/utils.cpp``: ``getMessageWithAutograd``). An answer in a
#: profiler is always wrapped (``rpc/request_callback_no_python.cpp``:
#: ``RequestCallbackNoPython::processRunWithProfilingReq``).
_WRAPPING = WireMessageType.FORWARD_AUTOGRAD_REQ
_WRAPPED = tuple(WireMessageType(message) for message in MessageType if not message.is_retryable)
_EXCEPTION = WireMessageType.EXCEPTION
#: Requests of which it is predicted how many there are.
_COMPARED = frozenset(
    {
        *MessageType.__members__,
        str(WireMessageType.FORWARD_AUTOGRAD_REQ),
        str(WireMessageType.BACKWARD_AUTOGRAD_REQ),
        str(WireMessageType.RUN_WITH_PROFILING_REQ),
        str(WireMessageType.RREF_BACKWARD_REQ),
    }
)
#: Type, sender and receiver.
_Kind = tuple[str, int, int]


def recorded_violations(
    prediction: Prediction, outcome: Outcome, *, gathers: bool = True, settles: bool = True
) -> list[Violation]:
    """Where the record of a run that went well differs from what the prediction says.

    Nothing is compared where nobody kept a whole record, or the prediction is not certain, or some
    step does not say to whom it sends.

    Args:
        gathers: whether a shutdown waits for all ranks, by calls of its own.
        settles: whether the ranks have settled before it.
    """
    if not outcome.messages or outcome.messages_dropped or not prediction.certain:
        return []
    if any(send.to is None for send in (*prediction.sends, *prediction.last_sends)):
        return []
    is_gathering = gathers and prediction.graceful
    found = [*_requests(prediction, outcome, gathers=is_gathering), *answers_differ(outcome)]
    if not found:
        has_bug = facts_of(outcome.torch_version).has_bug
        met = filter(has_bug, prediction.known_bugs)
        if not any(FINDINGS[name].changes_answers for name in met):
            found += [*_errors(prediction, outcome)] or _graded(prediction, outcome)
        found += _tries(prediction, outcome) if settles else ()
    return found


def _requests(prediction: Prediction, outcome: Outcome, *, gathers: bool) -> Iterator[Violation]:
    """Each type of request; what is tried again is one."""
    wanted = _promised(prediction, outcome.world_size, gathers=gathers)
    first_tries: dict[int, SentMessage] = {}
    for sent in outcome.messages:
        if sent.is_request and sent.type in _COMPARED and "spared" not in sent.marks:
            first_tries.setdefault(sent.first_id, sent)
    seen, unsent = Counter[_Kind](), Counter[_Kind]()
    for sent in first_tries.values():
        kind = (sent.type, sent.sender, sent.receiver)
        seen[kind] += 1
        unsent[kind] += _was_refused(sent)
    for kind in sorted({*wanted, *seen}):
        name, sender, receiver = kind
        # Whether a member of a dynamic group deletes what it holds when it leaves is judged by what
        # the owners hold: stock torch does not (the finding leaving-keeps-values).
        leaves_early = sender in prediction.may_exit_early or prediction.told is not None
        may_miss = {
            str(_DELETE): wanted[kind] if leaves_early else 0,
            # A rank that a cleanup has not reached when it shuts down does not send it on.
            str(_CLEANUP): len(prediction.contexts_left[sender]) - 1,
        }
        lacks = prediction.may_lack.get((sender, receiver, WireMessageType(name)), 0)
        least = wanted[kind] - max(lacks, may_miss.get(name, 0))
        is_open = (sender, receiver, WireMessageType(name)) in prediction.wire_more
        if least <= seen[kind] and (is_open or seen[kind] - unsent[kind] <= wanted[kind]):
            continue
        shown = f"{seen[kind]} {name} from rank {sender} to rank {receiver}"
        yield _differs(shown, wanted[kind], sender)


def _was_refused(sent: SentMessage) -> bool:
    """Whether the agent took the request, and then could not write it: nothing was sent.

    ``tensorpipe_agent.cpp``: ``TensorPipeAgent::send`` serializes a message (tensorpipe_utils.cpp:
    tensorpipeSerialize), which a tensor without memory cannot be.
    """
    return (
        sent.became == "failed"
        and sent.written is None
        and sent.fault is None
        and not sent.failed_by_table
    )


def _promised(prediction: Prediction, size: int, *, gathers: bool) -> Counter[_Kind]:
    """The requests that are promised, by type, sender and receiver.

    A graceful shutdown of a static world gathers by calls between the first rank and each other
    (``torch/distributed/rpc/api.py``: ``shutdown`` calls ``_wait_all_workers``). Members of a
    dynamic group call each other when one joins or leaves.
    """
    found = Counter[_Kind]()
    for send in (*prediction.sends, *prediction.last_sends):
        if send.to is not None:
            found[str(send.message), send.rank, send.to] += 1
    for (rank, to, message), times in prediction.wire_sends.items():
        found[str(message), rank, to] += times
    for (rank, to), times in (prediction.told or {}).items():
        found[str(MessageType.PYTHON_CALL), rank, to] += times
    for rank in range(1, size) if gathers else ():
        found[str(MessageType.PYTHON_CALL), rank, 0] += 1
        found[str(MessageType.PYTHON_CALL), 0, rank] += 1
    return found


def _tries(prediction: Prediction, outcome: Outcome) -> Iterator[Violation]:
    """How often a rank has sent the requests of a type that torch tries again.

    Each try that fails is followed by another one, up to the retry budget (``rpc_agent.cpp``:
    ``RpcAgent::rpcRetryCallback``). Of cleanups it is not known to which rank: they have one
    payload, by which the agent counts failures, and go out in the order of an unordered set
    (``context.cpp``: ``DistAutogradContext::getKnownWorkerIds``). Tries may lack where a rank
    leaves early or a program does not settle, and deletes where members of a group leave. Of what
    is sent to a rank that is gone nobody can tell how often.
    """
    in_vain = {(str(message), rank) for rank, message in prediction.tries_in_vain}
    wanted, seen, unsent = (Counter[tuple[str, int]]() for _ in range(3))
    for send in (*prediction.sends, *prediction.last_sends):
        if send.message.is_retryable:
            wanted[str(send.message), send.rank] += send.failures + send.delivered
    for sent in outcome.messages:
        if sent.is_request and WireMessageType(sent.type).is_retryable:
            seen[sent.type, sent.sender] += 1
            unsent[sent.type, sent.sender] += _was_refused(sent)
    kinds = {*wanted, *seen} - in_vain
    for name, rank in sorted(kinds) if prediction.told is None else ():
        times, tries = wanted[name, rank], seen[name, rank]
        differs = not tries - unsent[name, rank] <= times <= tries
        if differs and rank not in prediction.may_exit_early:
            yield _differs(f"{tries} {name} from rank {rank} with all tries", times, rank)


def answers_differ(outcome: Outcome) -> Iterator[Violation]:
    """Each request that was answered has one answer, of its type or an exception.

    Where a request came twice, one of its answers may have been lost.
    """
    answers = _types_of_answers(outcome)
    for sent in outcome.messages:
        if not sent.is_request or sent.became != "answered":
            continue
        found = answers[sent.id]
        fitting = _fitting(WireMessageType(sent.type))
        if len(found) != 1 or not {*found} <= {*fitting, _EXCEPTION}:
            message = (
                f"the record shows {' and '.join(found) or 'nothing'} as the answer to the "
                f"{sent.type} of rank {sent.sender} with id {sent.id}, and one {fitting[0]} was "
                f"promised"
            )
            yield Violation("MessagesDiffer", message, sent.receiver)


def _graded(prediction: Prediction, outcome: Outcome) -> Iterator[Violation]:
    """How many calls in contexts were answered with a tensor that requires a gradient.

    See ``oracle/_contexts.py``. Those without an answer may lack.
    """
    answers = _types_of_answers(outcome)
    seen, unanswered = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for sent in outcome.messages:
        if sent.is_request and sent.type == _WRAPPING:
            pair = (sent.sender, sent.receiver)
            unanswered[pair] += sent.became != "answered"
            seen[pair] += sent.became == "answered" and _WRAPPING.answer in answers[sent.id]
    for pair in sorted({*prediction.graded, *seen} - prediction.more_graded):
        sender, receiver = pair
        wanted = prediction.graded.get(pair, 0)
        lacks = prediction.may_lack.get((sender, receiver, _WRAPPING), 0)
        if wanted - unanswered[pair] - lacks <= seen[pair] <= wanted:
            continue
        shown = f"{seen[pair]} {_WRAPPING.answer} from rank {receiver} to rank {sender}"
        yield _differs(shown, wanted, receiver)


def _types_of_answers(outcome: Outcome) -> dict[int, list[str]]:
    """The types of the answers that came, by the number of their request."""
    answers: dict[int, list[str]] = defaultdict(list)
    for sent in outcome.messages:
        if not sent.is_request and "swallowed" not in sent.marks and sent.became != "lost":
            answers[sent.id].append(sent.type)
    return answers


def _fitting(request: WireMessageType) -> list[WireMessageType]:
    """The types that may answer a request, besides an EXCEPTION."""
    wrapped = _WRAPPED if request is _WRAPPING else ()
    return [answer for one in (request, *wrapped) if (answer := one.answer) is not None]


def _errors(prediction: Prediction, outcome: Outcome) -> Iterator[Violation]:
    """How many requests were answered by an EXCEPTION; those without an answer may lack."""
    answers = _types_of_answers(outcome)
    wanted, raised, unanswered = (Counter[_Kind]() for _ in range(3))
    for sent in outcome.messages:
        if sent.is_request:
            kind = (sent.type, sent.sender, sent.receiver)
            unanswered[kind] += sent.became != "answered"
            raised[kind] += sent.became == "answered" and _EXCEPTION in answers[sent.id]
    for (sender, receiver, promised), times in prediction.errors.items():
        wanted[str(promised), sender, receiver] = times
    for kind in sorted({*wanted, *raised}):
        name, sender, receiver = kind
        wire_kind = (sender, receiver, WireMessageType(name))
        lacks = prediction.may_lack.get(wire_kind, 0)
        is_open = wire_kind in prediction.more_errors
        least = wanted[kind] - unanswered[kind] - lacks
        # A function raises whose own call a shutdown has cut off; somebody waited for the others.
        most = wanted[kind] + lacks
        if least <= raised[kind] and (is_open or raised[kind] <= most):
            continue
        answer = f"EXCEPTION as the answer to a {name} of rank {sender} at rank {receiver}"
        yield _differs(f"{raised[kind]} {answer}", wanted[kind], receiver)


def _differs(shown: str, promised: int, rank: int) -> Violation:
    """What the record shows of such messages, and how many of them were promised."""
    verb = "was" if promised == 1 else "were"
    message = f"the record shows {shown}, and {promised or 'none'} {verb} promised"
    return Violation("MessagesDiffer", message, rank)
