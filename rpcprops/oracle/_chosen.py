"""Chooses the prediction that a run follows, where torch allows more than one."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import replace

from rpcprops.faults import FaultPlan
from rpcprops.oracle._predict import predict
from rpcprops.oracle.errors import is_expected
from rpcprops.oracle.prediction import Met, Prediction
from rpcprops.outcomes import Outcome, StepOutcome
from rpcprops.programs import Program
from rpcprops.torch_facts import NEWEST, UNKNOWN, TorchFacts, facts_of


def chosen(
    prediction: Prediction, steps: Iterable[StepOutcome], facts: TorchFacts = NEWEST
) -> Prediction:
    """The alternative prediction that agrees with the errors of the steps so far.

    Where none agrees with all, it is the one that agrees for longest, and the first of several: a
    known finding may have changed what a step showed, and says nothing of the steps before it.
    Where several agree with all, nobody can tell which the run has followed, so it may show the
    known findings of each.
    """
    ended = sorted((step for step in steps if step.ended), key=lambda step: step.index)

    def agrees_until(one: Prediction) -> int:
        right = (is_expected(one.steps[step.index].error, step.error, facts) for step in ended)
        return sum(itertools.takewhile(bool, right))

    agreed = [(agrees_until(one), one) for one in (prediction, *prediction.alternatives)]
    alike = [one for steps_alike, one in agreed if steps_alike == len(ended)]
    if len(alike) > 1:
        return replace(alike[0], met=frozenset[Met]().union(*(one.met for one in alike)))
    return max(agreed, key=operator.itemgetter(0))[1]


def predict_in(
    program: Program, plan: FaultPlan, world_size: int, facts: TorchFacts = UNKNOWN
) -> Prediction:
    """What `program` must show in a world of perhaps more ranks than it uses; those are idle.

    Raises:
        UsageError: as :func:`predict`, or such a world is impossible.
    """
    if world_size != program.world_size:
        program = replace(program, world_size=world_size)
    return predict(program, plan, facts)


def predict_for(
    program: Program, plan: FaultPlan, outcome: Outcome, facts: TorchFacts | None = None
) -> Prediction:
    """What `program` must show under `plan`, in the alternative that `outcome` follows.

    `facts` defaults to what is known of the outcome's torch.
    """
    facts = facts or facts_of(outcome.torch_version)
    prediction = predict_in(program, plan, max(program.world_size, outcome.world_size), facts)
    return chosen(prediction, outcome.steps, facts) if prediction.alternatives else prediction
