"""Which programs may run in a world that others have used, and leave it for the next one.

The list is of what may, not of what may not: a kind of step that nobody has thought about here
gets a new world.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpcprops.agents.wire import NAME
from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import Prediction
from rpcprops.outcomes import UNLIMITED_SLACK, SentMessage, StepOutcome
from rpcprops.programs import End, Program, Step

#: Kinds of step after which RPC, and all that torch keeps in statics, is as before: torch's source
#: was read for each. Not among them are those that initialise RPC again, run a profiler or set the
#: default timeout. Programs that train have worlds apart, for their ranks have imported more.
KINDS = frozenset(
    {
        *("remote", "own", "share", "fetch", "local", "through", "bump", "nest", "drop"),
        *("call", "wait", "count", "chain", "context", "refused", "graph"),
        *("optimize", "train", "module", "linear"),
        *("raising", "invoke", "recurse", "deferred", "scripted", "carry"),
        *("reach", "after", "gather", "ask", "method"),
        *("pause", "settle"),
    }
)
#: What creates an RRef. In an autograd context a creation is sent inside the last of them, as calls
#: are, and no record says which of both it was (``autograd/utils.cpp: getMessageWithAutograd``).
_CREATIONS = ("PYTHON_REMOTE_CALL", "SCRIPT_REMOTE_CALL", "FORWARD_AUTOGRAD_REQ")
_PROFILED = "RUN_WITH_PROFILING_REQ"
#: What faults of any message may do. A message that was lost leaves a call that has no end.
_ACTIONS = ("fail", "delay", "hold", "duplicate")


def can_be_set(plan: FaultPlan) -> bool:
    """Whether ranks that run can be given these faults, which then leave nothing behind."""
    return all(isinstance(one, MessageFault) and one.action in _ACTIONS for one in plan.others)


def may_reuse(program: Program, plan: FaultPlan, agent: str, prediction: Prediction) -> bool:
    """Whether a program may use a kept world, and leave its world to be kept.

    It may not if a step is predicted to fail, if anything is predicted to be left at the end, if it
    meets a known finding, if its faults cannot be set while ranks run, or if it ends in a way of
    its own. Nor if a creation fails: torch's handlers of that are static, and keep the first RRef
    whose creation has failed in the process (rref_impl.cpp: RRef::handleError). A function that
    raises has not failed a creation: the error is in the future of its RRef, which goes with it
    (request_callback_no_python.cpp: RequestCallbackNoPython::assignOwnerRRef; rref_impl.cpp:
    OwnerRRef::setError), and the ranks show at the end that they hold no RRef.
    """
    return (
        agent == NAME
        and program.end == End()
        and all(step.op in KINDS and not _profiles(step) for step in program.leaves)
        and can_be_set(plan)
        and prediction.graceful
        and not any(step.error for step in prediction.steps)
        and not (prediction.leaking or prediction.may_leak or prediction.waiting)
        and not (prediction.may_exit_early or prediction.may_warn_unreleased_context)
        and not prediction.has_failed_creation
        and not prediction.met
    )


def left_in_statics(messages: Sequence[SentMessage], dropped: int = 0) -> str:
    """Why the process of a rank is not as new after a user's code sent these; empty if it may be.

    No rank holds any of it, and none can be asked for it, so the record must tell. One is the
    creation that failed (see :func:`may_reuse`). The other is a request that ran under a profiler:
    ``request_callback_no_python.cpp: RequestCallbackNoPython::processRunWithProfilingReq`` leaves
    the state of the profiler in the thread that has served it.

    A profiled call that torch could not pickle sends nothing, so this does not see it
    (``rpc/api.py: _enable_rpc_profiler`` has set the key of its thread by then).

    Args:
        dropped: how many further messages had no room in the record, and may be such ones.
    """
    if dropped:
        return "the record of messages is full"
    for sent in messages:
        if sent.type == _PROFILED:
            return "a profiler has run around a call"
        failed = sent.became in ("failed", "timed_out") or "raised" in sent.marks
        if sent.type in _CREATIONS and (failed or sent.failed_by_table):
            return f"a {sent.type} has failed"
    return ""


def _profiles(step: Step) -> bool:
    """Whether it runs a profiler, which leaves something in the threads that served it."""
    return bool(getattr(step, "profiled", False))


def rests_on_time(program: Program, prediction: Prediction) -> bool:
    """Whether a step may show something else if the machine is late."""
    return program.rpc_timeout is not None or any(
        step.slack < UNLIMITED_SLACK
        for one in (prediction, *prediction.alternatives)
        for step in one.steps
    )


def has_refusal(program: Program, steps: Sequence[StepOutcome]) -> bool:
    """Whether torch has refused a value that a step sent: some pickling was cut off then."""
    return any(
        program.leaves[step.index].op == "carry" and "refused" in (step.value or {})
        for step in steps
    )
