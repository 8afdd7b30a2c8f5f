"""Ranks that join and leave a dynamic group, on real torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Program, Rejoin
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run
from tests.seeded._programs import GROUPS, LEFT_AT_ONCE, REFUSING

pytestmark = pytest.mark.usefixtures("rpc_cluster")


BETWEEN = Program(2, (Rejoin(0, between="group left at once"), Call(1, 0)), "between")
REAL = (*GROUPS[:2], LEFT_AT_ONCE[0], REFUSING[0], BETWEEN)


@pytest.mark.parametrize("program", REAL, ids=lambda p: p.name)
def test_real_members_show_what_is_predicted(program: Program) -> None:
    """Ranks join in some order, call each other, look, leave and are refused as documented."""
    outcome = run(program)
    assert judge(program, None, outcome) == ()
    assert [rank.exit_code for rank in outcome.ranks] == [0] * program.world_size


@pytest.mark.nightly
@pytest.mark.parametrize("program", REAL, ids=lambda p: p.name)
def test_a_script_of_them_runs(program: Program, tmp_path: Path) -> None:
    """Plain torch, in real time and without rpcprops, joins and leaves as well."""
    planted = Violation("WrongValue", "planted", 0, len(program.steps) - 1)
    artefact = Artefact(
        "program",
        "groups",
        "WrongValue",
        program=program,
        plans=(FaultPlan(),),
        violations=(planted,),
    )
    assert tried(script_of(artefact), tmp_path, 1).codes == (0,)
