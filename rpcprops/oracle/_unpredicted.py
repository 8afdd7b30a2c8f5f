"""Judges a run of which nothing is predicted, by what torch promises whatever the faults are.

* No rank dies by a signal, or exits as if it had failed (``c10``: an error of torch's is an
  exception, which a step raises).
* The wait of each caller ends: torch gives every message a timeout (``rpc/constants.py``:
  ``DEFAULT_RPC_TIMEOUT_SEC``). Some other waits have none: see :func:`endless_wait`.
* A step that ends gives a value of its type, or raises an error of torch's.
* A fault acts on the messages that it is for, by the record, and on no others.
* Where a call is lost, or fails, by which the ranks meet in a shutdown, each rank waits, or raises,
  as its source says (:mod:`rpcprops.oracle._meeting`).
* No rank does or keeps more than the messages of the record can have caused
  (:mod:`rpcprops.oracle._bounds`).

Which values and errors of torch's must come, how often a function must have run at the least, and
which RRefs and contexts a rank may hold whose messages were disturbed: nobody can tell.
"""

from __future__ import annotations

from collections.abc import Iterator

from rpcprops.faults import FaultPlan, MessageFault, WireMessageType, acted_on
from rpcprops.oracle._bounds import exceeded
from rpcprops.oracle._judge import judge
from rpcprops.oracle._meeting import gathers, not_as_in_meeting
from rpcprops.oracle.errors import error_class
from rpcprops.outcomes import (
    Outcome,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    SentMessage,
    Violation,
)
from rpcprops.programs import Program
from rpcprops.torch_facts import TorchFacts, facts_of

_CREATIONS = (WireMessageType.SCRIPT_REMOTE_CALL, WireMessageType.PYTHON_REMOTE_CALL)
_AUTOGRAD = (
    WireMessageType.FORWARD_AUTOGRAD_REQ,
    WireMessageType.FORWARD_AUTOGRAD_RESP,
    WireMessageType.BACKWARD_AUTOGRAD_REQ,
    WireMessageType.BACKWARD_AUTOGRAD_RESP,
)
#: What nothing can excuse.
_NEVER = frozenset({"RankHung", "RankDied", "UnexpectedError"})


def judge_unpredicted(program: Program, plan: FaultPlan, outcome: Outcome) -> tuple[Violation, ...]:
    """Every violation in the outcome of a program under a plan that the oracle does not predict."""
    facts = facts_of(outcome.torch_version)
    ends = [v for v in judge(None, plan, outcome) if _counts(v, outcome, facts)]
    if endless_wait(program, outcome):
        ends = [violation for violation in ends if violation.promise != "RankHung"]
    if any(violation.promise == "RankDied" for violation in ends):
        # What steps raise after that follows from it.
        return tuple(ends)
    bounds = exceeded(program, outcome, facts)
    ends += not_as_in_meeting(program, plan, outcome, facts)
    return (*ends, *_steps(program, outcome, facts), *_faults(plan, outcome), *bounds)


def endless_wait(program: Program, outcome: Outcome) -> str:
    """Why a rank may wait for ever in a run in which one does; empty if it may not, or none does.

    torch ends the wait of a caller by a timeout. It does not end these:

    * all waits, where the program has no ``rpc_timeout``: then ours is a day, which no run lasts;
    * in a shutdown, that for a call by which the ranks meet (``api.py``: ``_all_gather`` has the
      timeout 0), or at the rank to which such a call does not come;
    * in a shutdown, that of a rank for a call that it still serves, though its caller has given it
      up (``tensorpipe_agent.cpp``: ``TensorPipeAgent::join``), such as a fetch of an RRef that is
      never created (``rref_context.cpp``: ``RRefContext::getOwnerRRef``);
    * in a shutdown, that of a rank for a call of its own that was answered with an error, if torch
      throws that in the callback of the call (``rref_context.cpp``: ``handleException``, called by
      ``callback::confirmPendingUser``): then the call never counts as ended;
    * that of an owner for the value of an RRef whose creation did not come (``py_rref.cpp``:
      ``PyRRef::toHere``; the finding owner-ignores-timeout);
    * that of a backward pass for gradients that nobody has still to send (``dist_engine.cpp``:
      ``DistEngine::execute``; only a gradient that is on its way has a timeout).
    """
    hung = next((phase for phase in outcome.phases if phase.verdict == "hung"), None)
    stopped = [sent for sent in outcome.messages if sent.done in ("fail", "lose", "duplicate")]
    if hung is None or not stopped:
        return ""
    serving = [rank.name for rank in outcome.ranks if _serves(rank)]
    why = ""
    if program.rpc_timeout is None and any(sent.done == "lose" for sent in stopped):
        why = "what was lost has no timeout in this program"
    elif hung.name == "shutdown" and any(gathers(sent, outcome) for sent in stopped):
        why = "the calls by which ranks meet in a shutdown have no timeout (api.py: _all_gather)"
    elif hung.name == "shutdown" and serving:
        why = (
            f"a shutdown waits for a call that {' and '.join(serving)} still serves, without a "
            f"timeout (TensorPipeAgent::join)"
        )
    elif hung.name == "shutdown" and _threw_in_callback(outcome):
        why = (
            "a shutdown waits for a call that was answered with an error, which torch threw in its "
            "callback (RRefContext::handleException)"
        )
    elif hung.name == "run" and any(_makes_owner_wait(sent, hung, outcome) for sent in stopped):
        why = "an owner waits without a timeout for a value that is never made (PyRRef::toHere)"
    elif hung.name == "run" and any(sent.type in _AUTOGRAD for sent in stopped):
        why = "a backward pass has no timeout (DistEngine::execute)"
    return f"{hung.detail}: {why}" if why else ""


def _makes_owner_wait(sent: SentMessage, hung: PhaseOutcome, outcome: Outcome) -> bool:
    """Whether a creation did not come to the rank that hangs."""
    names = [rank.name for rank in outcome.ranks if rank.rank == sent.receiver]
    is_missing = sent.type in _CREATIONS and sent.done in ("fail", "lose")
    return is_missing and any(hung.detail.startswith(f"{name} ") for name in names)


def _threw_in_callback(outcome: Outcome) -> bool:
    """Whether a rank that waits for an answer wrote that an error was thrown in its threads."""
    text = facts_of(outcome.torch_version).texts.gone[0]
    return any(
        text in rank.log and rank.counters is not None and rank.counters.client_calls
        for rank in outcome.ranks
    )


def _serves(rank: RankOutcome) -> bool:
    """Whether a rank served a call when it was last looked at, which was before its shutdown."""
    held = rank.counters
    return held is not None and bool(held.server_calls or held.server_async_calls)


def _counts(violation: Violation, outcome: Outcome, facts: TorchFacts) -> bool:
    """Whether a violation by the end of a rank is one whatever the faults are."""
    if violation.promise != "UngracefulShutdown":
        return violation.promise in _NEVER
    rank = next((one for one in outcome.ranks if one.rank == violation.rank), None)
    error = None if rank is None else rank.shutdown_error
    return error is None or not _is_torchs(error, facts)


def _is_torchs(error: RaisedError, facts: TorchFacts) -> bool:
    """Whether torch raises such an error where messages are disturbed."""
    return (
        error_class(error, facts) != "unknown"
        # The text of an injected failure, which torch puts the payload into.
        or error.type == facts.texts.unreadable
        # A second copy of a message is refused by an assertion (rref_context.cpp, context.cpp).
        or facts.texts.assertion in error.message
    )


def _steps(program: Program, outcome: Outcome, facts: TorchFacts) -> Iterator[Violation]:
    """Steps that have ended with something else than a value of their type or torch's error."""
    leaves = dict(enumerate(program.leaves))
    for seen in outcome.steps:
        leaf = leaves[seen.index]
        where = getattr(leaf, "at", None)
        if not seen.ended or seen.counters:
            continue
        if seen.error is None and not isinstance(seen.value, leaf.gives):
            message = f"expected a value of type {leaf.gives.__name__}, got {seen.value!r}"
            yield Violation("WrongValue", message, where, seen.index)
        elif seen.error is not None and not _is_torchs(seen.error, facts):
            message = f"expected a value or an error of torch's, got {seen.error.first_line()}"
            yield Violation("UnexpectedError", message, where, seen.index)


def _faults(plan: FaultPlan, outcome: Outcome) -> Iterator[Violation]:
    """Faults that have acted on other messages than those that they are for."""
    if outcome.messages_dropped:
        return
    for fault in plan.others:
        if not isinstance(fault, MessageFault):
            continue
        due, acted = fault.due(outcome.messages), acted_on(fault, plan, outcome.messages)
        if due != acted:
            message = (
                f"{fault.name} was due for {_told(due)} by the record, and acted on {_told(acted)}"
            )
            yield Violation("FaultsDiffer", message, fault.rank)


def _told(messages: tuple[SentMessage, ...]) -> str:
    return " and ".join(f"message {sent.id} ({sent.type})" for sent in messages) or "nothing"
