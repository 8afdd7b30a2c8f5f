"""Ranks that join and leave a dynamic group, on real torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Program, Rejoin
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run
from tests._wire import needs_wire
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


@needs_wire
def test_all_that_members_send_is_as_predicted() -> None:
    """Under the agent wire a call that nobody promised, or that is missing, is a violation."""
    program = GROUPS[0]
    outcome = run(program, agent="wire")
    assert judge(program, None, outcome) == ()
    joining = [m for m in outcome.messages if m.is_request and m.sender == m.receiver == 1]
    assert joining[0].type == "PYTHON_CALL"
    less = tuple(m for m in outcome.messages if m.id != joining[0].id)
    more = (*outcome.messages, replace(joining[0], id=2**50, first_id=2**50, became=""))
    for messages, number in ((less, 0), (more, 2)):
        (wrong,) = judge(program, None, replace(outcome, messages=messages))
        assert (wrong.promise, wrong.rank) == ("MessagesDiffer", 1)
        assert f"shows {number} PYTHON_CALL from rank 1 to rank 1, and 1 was" in wrong.message


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
