"""Ranks that shut down in each way, on real torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import accepted, judge
from rpcprops.outcomes import Violation
from rpcprops.programs import Program
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run
from tests.seeded._programs import ENDS

pytestmark = pytest.mark.usefixtures("rpc_cluster")


@pytest.mark.parametrize("program", ENDS, ids=lambda p: p.name)
def test_real_ranks_end_as_predicted(program: Program) -> None:
    """With RRefs held, each end shows what torch documents: one that waits for nobody a leak."""
    outcome = run(program)
    assert judge(program, None, outcome) == ()
    kinds = [(one.kind, one.rank) for one in accepted(program, FaultPlan(), outcome)]
    assert kinds == ([("held-at-once", 1)] if program.end.how == "at once" else [])


@pytest.mark.nightly
@pytest.mark.parametrize("program", ENDS, ids=lambda p: p.name)
def test_a_script_of_them_runs(program: Program, tmp_path: Path) -> None:
    """Plain torch, in real time and without rpcprops, ends in the same way."""
    planted = Violation("UngracefulShutdown", "worker0 left with exit code 3 instead of 0", 0)
    artefact = Artefact(
        "program",
        "ends",
        "UngracefulShutdown",
        program=program,
        plans=(FaultPlan(),),
        violations=(planted,),
    )
    assert tried(script_of(artefact), tmp_path, 1).codes == (0,)
