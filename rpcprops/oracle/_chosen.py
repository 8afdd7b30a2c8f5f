"""Which of a program's predictions a run follows, where torch allows more than one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rpcprops.faults import FaultPlan
from rpcprops.oracle.errors import is_expected
from rpcprops.oracle.model import predict
from rpcprops.oracle.prediction import Prediction
from rpcprops.outcomes import Outcome, StepOutcome
from rpcprops.programs import Program
from rpcprops.torch_facts import NEWEST, UNKNOWN, TorchFacts, facts_of


def chosen(
    prediction: Prediction, steps: Iterable[StepOutcome], facts: TorchFacts = NEWEST
) -> Prediction:
    """The prediction, of all alternatives, that the errors of the steps so far agree with.

    Where none does, the first: the run is then wrong by any of them.
    """
    ended = [step for step in steps if step.ended]
    for one in (prediction, *prediction.alternatives):
        if all(is_expected(one.steps[step.index].error, step.error, facts) for step in ended):
            return one
    return prediction


def predict_in(
    program: Program, plan: FaultPlan, world_size: int, facts: TorchFacts = UNKNOWN
) -> Prediction:
    """What `program` must show in a world that may be larger than it needs; the others are idle.

    Raises:
        UsageError: as :func:`predict`; or there can be no such world.
    """
    if world_size != program.world_size:
        program = replace(program, world_size=world_size)
    return predict(program, plan, facts)


def predict_for(
    program: Program, plan: FaultPlan, outcome: Outcome, facts: TorchFacts | None = None
) -> Prediction:
    """What `program` must show under `plan`, by the alternative that `outcome` follows.

    `facts` are those of the outcome's torch, where they are not given.
    """
    facts = facts or facts_of(outcome.torch_version)
    prediction = predict_in(program, plan, max(program.world_size, outcome.world_size), facts)
    return chosen(prediction, outcome.steps, facts) if prediction.alternatives else prediction
