"""Runs a program in ranks that have been through ``init_rpc`` and ``shutdown`` once before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rpcprops.oracle import predict
from rpcprops.outcomes import Outcome, RaisedError, StepOutcome
from rpcprops.properties._base import Case
from rpcprops.runner import Runner


def _init() -> None:
    from rpcprops.fixture import for_this_rank

    for_this_rank().init_rpc()


def _shutdown() -> None:
    from torch.distributed import rpc

    rpc.shutdown()


def run_again(runner: Runner, case: Case, **options: Any) -> Outcome:
    """The outcome of the case's program in its ranks' second life.

    The run ends at the settle: shutting down what did not settle waits 100 virtual seconds and adds
    nothing.
    """
    prediction = predict(case.program, case.plan)
    cluster = runner.server.cluster(
        world_size=case.program.world_size, faults=case.plan, init=False, **options
    )
    cluster.program = case.program
    steps: list[StepOutcome] = []
    try:
        cluster.start()
        for enter in (_init, _shutdown, _init):
            try:
                cluster.each(enter)
            except Exception as error:
                # What this raises is what the case shows: its first step cannot be run.
                raised = RaisedError(type(error).__name__, str(error))
                steps.append(StepOutcome(0, error=raised))
                return replace(cluster.outcome, steps=tuple(steps))
        for index, step in enumerate(case.program.leaves):
            seen = cluster.run_step(index, step, {})
            steps.append(seen)
            if not seen.ended or seen.error:
                break
        else:
            cluster.settle_to(prediction.counters, calls=prediction.calls)
    finally:
        cluster.kill()
    return replace(cluster.outcome, steps=tuple(steps))
