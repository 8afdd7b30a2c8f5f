"""The outcome that a prediction describes, and small changes to it: what worlds are falsified from.

Real ranks showed the texts of the errors and of the log lines; the rest is the prediction's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rpcprops.faults import FaultPlan
from rpcprops.oracle import ErrorClass, Prediction, StepPrediction, predict
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseName,
    PhaseOutcome,
    RaisedError,
    RankOutcome,
    StepOutcome,
    Violation,
)
from rpcprops.programs import (
    Context,
    FailTwice,
    Graph,
    Leaf,
    Linear,
    Outlast,
    Program,
    Refused,
    Settle,
    Train,
)

TIMEOUT = RaisedError("RuntimeError", "RPC ran for more than set timeout (200 ms)")
#: An error of each class, as a rank raises it.
ERRORS: dict[ErrorClass, RaisedError] = {
    "timeout": TIMEOUT,
    "injected": RaisedError("RuntimeError", "RPCErr:2:Send attempt failed intentionally for "),
    "remote": RaisedError("RuntimeError", "On WorkerInfo(id=1, name=worker1):\nstep0"),
    "creation": RaisedError(
        "RuntimeError", "RRef creation via rpc.remote() timed out, and it is possible that the RRef"
    ),
    "missing": RaisedError("MissingHandleError", "a"),
}
_BROKE = "Error on Node 1: RaisedOnPurposeError"
LEAK = "[W rref_context.cpp:361] Detected RRef Leaks during shutdown."
LEAKING = "Leaking RRef GloballyUniqueId(created_on=0, local_id=0) with fork Id 1"
CONTEXT_LEAK = "[W] Could not release Dist Autograd Context on node 1: pipe closed"
OWNER_WAITED = "[E rref_context.cpp:299] Timed out waiting for pending OwnerRRefs to be deleted."
USER_WAITED = (
    "[E rref_context.cpp:250] Timed out waiting for pending UserRRefs to be confirmed by owner and "
    "parent."
)
LEAKED = RaisedError("RuntimeError", LEAKING)
#: What a rank exits with when its shutdown raises.
EXIT_SHUTDOWN_FAILED = 72


def ideal(program: Program, plan: FaultPlan, world_size: int | None = None) -> Outcome:
    """An outcome that shows everything as predicted, from real ranks' point of view."""
    prediction = predict(program, plan)
    size = program.world_size if world_size is None else world_size
    steps = tuple(
        _step(index, leaf, expected, size)
        for index, (leaf, expected) in enumerate(zip(program.leaves, prediction.steps, strict=True))
    )
    names: list[PhaseName] = ["start", "run"]
    if program.settles:
        names.append("settle")
    if prediction.graceful:
        names.append("shutdown")
    phases = tuple(PhaseOutcome(name) for name in names)
    waits = program.end.how != "at once"
    ranks = tuple(_rank(rank, prediction, plan, waits=waits) for rank in range(size))
    return Outcome(size, phases=phases, ranks=ranks, steps=steps)


def _step(index: int, leaf: Leaf, expected: StepPrediction, size: int) -> StepOutcome:
    if isinstance(leaf, Settle):
        idle = size - len(expected.counters)
        return StepOutcome(index, counters=(*expected.counters, *[Counters()] * idle))
    # Where either may come it is the value.
    if expected.error not in ("", "unknown"):
        return StepOutcome(index, error=ERRORS[expected.error])
    return StepOutcome(index, _value(leaf, expected.value))


def _value(leaf: Leaf, expected: Any) -> Any:
    """What a rank shows where `expected` is predicted."""
    value = expected
    if isinstance(leaf, Context | Graph | Linear):
        value = {**expected, "id": 1 << 48}
    if isinstance(leaf, FailTwice):
        value = {**expected, "id": 1 << 48, "broke": "Error on Node 1: raised on purpose"}
    if isinstance(leaf, Outlast):
        value = {**(expected or {}), "id": 1 << 48}
    if isinstance(leaf, Context) and "broke" in expected:
        raised = expected["broke"]
        value["broke"] = ERRORS[raised].message if raised in ERRORS else _BROKE
    if isinstance(leaf, Graph) and leaf.inside is not None:
        value["refused"] = "Already have an autograd context"
    if isinstance(leaf, Train) and expected["parameters"] is None:
        # Of most optimizers the oracle knows no numbers, only that two must agree.
        numbers = [[0.25 for _ in leaf.value] for _ in leaf.owners]
        value = {"parameters": numbers, "alone": numbers}
    if isinstance(leaf, Linear) and expected["alone"] is None:
        value = {**value, **(found := _layer(leaf)), "alone": found}
    if isinstance(leaf, Refused) and expected["refused"]:
        value = {**expected, "message": "Could not find it"}
    return value


def _layer(leaf: Linear) -> dict[str, Any]:
    """What a layer may show whose numbers the oracle does not know."""
    # How many inputs and parameters there are; a norm has three buffers.
    number = {"embedding": 1, "sparse": 1, "keywords": 4, "device": 4}.get(leaf.layer, 3)
    gradients = [[0.25, 1.0] for _ in range(number)]
    state = [[0.5], [0.25], [1.0]] if leaf.layer == "norm" else []
    return {"outputs": [0.5, 2.0], "gradients": gradients, "state": state}


def _rank(rank: int, prediction: Prediction, plan: FaultPlan, *, waits: bool) -> RankOutcome:
    """One rank; those beyond the program's world stay idle."""
    takes_part = rank < len(prediction.counters)
    lengths = plan.table(rank).delaying
    held_up: Counter[int] = Counter(dict.fromkeys(lengths.values(), 0))
    failed = 0
    if takes_part:
        for message, count in prediction.delays(plan)[rank].items():
            held_up[lengths[message]] += count
        # A send that is never tried again shows at its caller, and writes no line.
        failed = prediction.retried[rank] + sum(prediction.last_failures()[rank].values())
    leaks = rank in prediction.leaking
    held = prediction.counters[rank] if takes_part else Counters()
    after = dataclasses.replace(
        Counters(owners=1, forks=1) if leaks else Counters(),
        contexts=held.contexts,
        backward_passes=held.backward_passes,
    )
    said = [CONTEXT_LEAK] if rank in prediction.may_warn_unreleased_context else []
    said += [OWNER_WAITED] if leaks and waits else []
    said += [USER_WAITED] if prediction.graceful and rank in prediction.waiting else []
    return RankOutcome(
        rank,
        f"worker{rank}",
        exit_code=(EXIT_SHUTDOWN_FAILED if leaks else 0) if prediction.graceful else None,
        killed=not prediction.graceful,
        counters=held,
        failed_sends=failed,
        delayed_sends=dict(held_up),
        calls=dict(prediction.calls[rank]) if takes_part else {},
        shutdown_error=LEAKED if leaks else None,
        log="\n".join(said),
        counters_after_shutdown=after if prediction.graceful else None,
    )


def place(violation: Violation) -> tuple[str, int | None, int | None]:
    """What a test compares: the promise, the rank and the step."""
    return violation.promise, violation.rank, violation.step


def with_step(outcome: Outcome, index: int, **changes: Any) -> Outcome:
    """`outcome` with one step changed."""
    steps = list(outcome.steps)
    steps[index] = dataclasses.replace(steps[index], **changes)
    return dataclasses.replace(outcome, steps=tuple(steps))


def with_rank(outcome: Outcome, rank: int, **changes: Any) -> Outcome:
    """`outcome` with one rank changed."""
    ranks = list(outcome.ranks)
    ranks[rank] = dataclasses.replace(ranks[rank], **changes)
    return dataclasses.replace(outcome, ranks=tuple(ranks))


def holding(outcome: Outcome, rank: int, **changes: int) -> Outcome:
    """`outcome` with a rank that holds more, or less, at the end."""
    before = outcome.ranks[rank].counters
    assert before is not None
    return with_rank(outcome, rank, counters=dataclasses.replace(before, **changes))


def settled_with(outcome: Outcome, index: int, rank: int, **changes: int) -> Outcome:
    """`outcome` with a rank that holds more, or less, at a settle step."""
    counters = list(outcome.steps[index].counters)
    counters[rank] = dataclasses.replace(counters[rank], **changes)
    return with_step(outcome, index, counters=tuple(counters))


def calling(outcome: Outcome, rank: int, calls: Mapping[str, int]) -> Outcome:
    """`outcome` with calls counted anew at a rank (0 takes a call away)."""
    now = {**outcome.ranks[rank].calls, **calls}
    return with_rank(outcome, rank, calls={name: times for name, times in now.items() if times})


def stopped(outcome: Outcome, steps: int) -> Outcome:
    """`outcome` of a run that went no further than so many steps, and never shut down."""
    return dataclasses.replace(
        outcome,
        steps=outcome.steps[:steps],
        phases=tuple(phase for phase in outcome.phases if phase.name in ("start", "run")),
        ranks=tuple(
            dataclasses.replace(rank, exit_code=None, killed=True) for rank in outcome.ranks
        ),
    )


def hanging(outcome: Outcome, name: PhaseName, rank: int, steps: int) -> Outcome:
    """`outcome` of a run that hung at one rank in one phase, and was killed there."""
    phases = list(itertools.takewhile(lambda phase: phase.name != name, outcome.phases))
    phases.append(PhaseOutcome(name, "hung", detail=f"worker{rank} hung in {name}", ranks=(rank,)))
    cut = stopped(outcome, steps)
    return dataclasses.replace(cut, phases=tuple(phases))
