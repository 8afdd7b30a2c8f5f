"""Runs a program in ranks that have already been through ``init_rpc`` and ``shutdown`` once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rpcprops.errors import text_of
from rpcprops.oracle import predict
from rpcprops.outcomes import Outcome, RaisedError, StepOutcome
from rpcprops.properties._base import Case, OfProgram
from rpcprops.runner import Runner, run_step
from rpcprops.torch_facts import facts_of


def _init() -> None:
    from rpcprops.fixture import for_this_rank

    for_this_rank().init_rpc()


def _shutdown() -> None:
    from torch.distributed import rpc

    rpc.shutdown()


def _went_well(seen: StepOutcome) -> bool:
    return seen.ended and seen.error is None


class OfReinitialised(OfProgram):
    """A program in ranks that have initialised RPC a second time."""

    reinit = True
    findings = frozenset({"rref-lifetime-after-reinit"})
    foreword = ("case     in ranks that have shut RPC down once and initialised it again",)
    test = """
def test_{name}() -> None:
    # In ranks that have shut RPC down once and initialised it again.
    case = Case(PROGRAM, PLAN, kind="reinit")
    found = observe(default_runner(), case, anew=True{transport}).violations
    assert not found, f"{{RECORDED}}; now {{'; '.join(map(str, found))}}"
"""
    test_imports = (
        "from rpcprops.properties import Case, observe",
        "from rpcprops.runner import default_runner",
    )

    def run(self, runner: Runner, case: Case, *, anew: bool, **options: Any) -> Outcome:
        """Run the case; a remembered outcome is never used."""
        return _run_again(runner, case, **options)


def _run_again(runner: Runner, case: Case, **options: Any) -> Outcome:
    """The outcome of the case's program after the second ``init_rpc`` of its ranks.

    The run ends at the settle: shutting down ranks that did not settle takes 100 virtual seconds
    and shows nothing more.
    """
    cluster = runner.server.cluster(
        world_size=case.program.world_size,
        faults=case.plan,
        init=False,
        shutdown_faults=True,
        **options,
    )
    cluster.program = case.program
    prediction = predict(case.program, case.plan, facts_of(cluster.torch_version))
    steps: list[StepOutcome] = []
    try:
        cluster.start()
        for enter in (_init, _shutdown, _init):
            try:
                cluster.each(enter)
            except Exception as error:
                # An exception here is what the case shows: its first step cannot be run.
                raised = RaisedError(type(error).__name__, text_of(error))
                steps.append(StepOutcome(0, error=raised))
                return replace(cluster.outcome, steps=tuple(steps))
        contexts: dict[str, int] = {}
        for first, step in case.program.numbered:
            seen = run_step(cluster, first, step, contexts, _went_well)
            steps += seen
            if not all(map(_went_well, seen)):
                break
        else:
            cluster.settle_to(prediction.counters, calls=prediction.calls)
    finally:
        cluster.kill()
    return replace(cluster.outcome, steps=tuple(steps))
