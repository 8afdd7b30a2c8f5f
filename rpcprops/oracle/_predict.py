"""Predicts what a program does under a plan, in each way in which it may end."""

from __future__ import annotations

import functools
from dataclasses import replace

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageType
from rpcprops.oracle._end import ended
from rpcprops.oracle._messages import Disturbances, refused
from rpcprops.oracle.model import Model
from rpcprops.oracle.prediction import Prediction
from rpcprops.programs import Program
from rpcprops.programs.threads import needed_threads, threads_of
from rpcprops.torch_facts import UNKNOWN, TorchFacts

#: The most outcomes of a program that differ by when torch marks creations that time out.
_MOST_ALTERNATIVES = 64


@functools.lru_cache(maxsize=512)
def predict(program: Program, plan: FaultPlan, facts: TorchFacts = UNKNOWN) -> Prediction:
    """What `program` must do under `plan`, within the retry budget or beyond it.

    Args:
        program: what the ranks do.
        plan: the faults that they meet.
        facts: what is known of the torch that runs it: which findings the program may meet. By
            default it may meet every finding.

    Raises:
        UsageError: the plan names a rank outside the world, or the ranks have too few threads for
            the program, or it has a creation that may or may not time out, or too many uses of an
            RRef whose creation times out; or the plan has a fault under which nothing is predicted.
    """
    plan.check(program.world_size)
    disturbed = Disturbances(plan, program)
    disturbed.check(program)
    unpredicted = [fault.name for fault in plan.others if not fault.is_predicted]
    if unpredicted:
        msg = (
            f"the oracle does not predict what a program shows under {', '.join(unpredicted)}; "
            f"take it out of the plan's others, or run functions of your own under it with "
            f"rpc_cluster, which judges what ranks hold and how they exit."
        )
        raise UsageError(msg)
    _check_threads(program)
    _check_end(program, plan, disturbed)
    first, *others = _alternatives(program, plan, facts)
    return replace(first, alternatives=tuple(others))


def _check_threads(program: Program) -> None:
    """Raises:
    UsageError: all threads of a rank may wait for what only another one of them could bring.
    """
    number = program.num_worker_threads
    if number is None:
        return
    timed = program.rpc_timeout is not None
    needed = needed_threads(
        program.world_size, program.steps, timed=timed, also_patient=False, runs_out_at=number
    )
    if number >= needed:
        return
    msg = (
        f"num_worker_threads={number}: all threads of a rank may come to wait for each other, and "
        f"then nothing ends, not even by a timeout (TensorPipeAgent::markFutureWithError); give "
        f"the program {needed}, or None, or put a Settle() after steps whose functions go on."
    )
    raise UsageError(msg)


def _check_end(program: Program, plan: FaultPlan, disturbed: Disturbances) -> None:
    """Raises:
    UsageError: a call of the shutdown itself may miss its timeout.
    """
    timeout = program.end.timeout
    if timeout is None:
        return
    call, delete = (
        max(plan.table(rank).messages_to_delay.get(one, 0.0) for rank in range(program.world_size))
        for one in (MessageType.PYTHON_CALL, MessageType.RREF_USER_DELETE)
    )
    late = disturbed.late_at_meeting
    if late and not program.end.is_in_time(call + late, delete, len(program.leaves)):
        why = (
            f"a rank whose call misses the timeout of its shutdown ({timeout:g} s) raises, while "
            f"the others wait for it (api.py: _all_gather)"
        )
        raise refused(disturbed.late[0], why)
    if not program.end.is_in_time(call, delete, len(program.leaves)):
        msg = (
            f"the plan delays PYTHON_CALL by {call:g} s and RREF_USER_DELETE by {delete:g} s. With "
            f"a timeout of shutdown that is reached ({timeout:g} s), a rank whose call misses it "
            f"raises, while the others wait for it, and owners give up what is deleted late; let "
            f"the delays be shorter, or give the program another end."
        )
        raise UsageError(msg)


def _alternatives(program: Program, plan: FaultPlan, facts: TorchFacts) -> list[Prediction]:
    """All predictions for the program; in the first, no RRef was marked before it was used."""
    found: list[Prediction] = []
    threads = threads_of(program)
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        choices = waiting.pop(0)
        model = Model(
            program.world_size,
            plan,
            choices,
            facts,
            program.rpc_timeout,
            threads=threads,
            disturbed=Disturbances(plan, program),
        )
        model.ends_hastily = program.ends_hastily
        for step in program.leaves:
            model.add(step)
        model.disturbed.check_branches(program)
        model.disturbed.check_running_on(program)
        model.disturbed.check_retries(model.sends)
        at_once = program.end.how == "at once"
        forgets = program.end.ignores_leaks
        found.append(ended(model, settles=program.settles, at_once=at_once, forgets=forgets))
        model.disturbed.check_shutdown(found[-1], settles=program.settles)
        later = range(len(choices), model.creations.unmarked_uses)
        waiting += [(*choices, *[False] * (use - len(choices)), True) for use in later]
        if len(found) + len(waiting) > _MOST_ALTERNATIVES:
            msg = (
                f"the program uses RRefs whose creation times out in more than "
                f"{_MOST_ALTERNATIVES} ways before torch must have marked them; put a Settle() "
                f"between such a remote() and its uses."
            )
            raise UsageError(msg)
    return found
