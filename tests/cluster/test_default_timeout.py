"""The default timeout of a program, in real ranks and in a script of plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Context, Count, Fetch, Program, Remote, Settle, Share
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run

ENDS = Program(
    3,
    (
        Call(0, 1, seconds=70.0),
        Call(0, 1),
        Context(0, "x", (1, 2)),
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Count(0, 2),
    ),
    rpc_timeout=60.0,
)
OUTLASTS = Program(
    2,
    (
        Remote(0, 1, "a", seconds=145.0, timeout=800.0),
        Fetch(0, "a"),
        Settle(),
        Fetch(0, "a"),
        Remote(0, 1, "b", seconds=130.0),
        Settle(),
        Fetch(0, "b"),
    ),
    rpc_timeout=100.0,
)


@pytest.mark.usefixtures("rpc_cluster")
def test_it_ends_what_outlasts_it_in_real_ranks() -> None:
    """torch ends a call at the default that was set after the start, and nothing else."""
    outcome = run(ENDS)
    assert judge(ENDS, None, outcome) == ()
    assert [step.error is None for step in outcome.steps] == [False, *[True] * 6]
    # Its messages have some real time.
    assert outcome.clock_rate <= 80.0


@pytest.mark.nightly
@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("delays", [{}, {"PYTHON_REMOTE_CALL": 2.0, "RREF_USER_DELETE": 1.0}])
def test_it_ends_fetches_and_creations(delays: dict[str, float]) -> None:
    """A fetch ends at it though the creation has a longer timeout, and a creation of its own."""
    plan = FaultPlan(FaultTable(messages_to_delay=delays))
    outcome = run(OUTLASTS, plan)
    assert judge(OUTLASTS, plan, outcome) == ()
    assert [step.error is None for step in outcome.steps] == [
        *(True, False, True, True),
        *(True, True, False),
    ]


@pytest.mark.nightly
def test_a_script_sets_it(tmp_path: Path) -> None:
    """A script of plain torch sets it after the start, and its call ends there in real time."""
    artefact = Artefact(
        "program",
        "default",
        "MissingError",
        program=Program(2, (Call(0, 1, seconds=5.0),), rpc_timeout=2.0),
        plans=(FaultPlan(),),
        violations=(Violation("MissingError", "planted", 0, 0),),
    )
    script = script_of(artefact)
    assert "RPC_TIMEOUT = 2.0" in script.text
    assert tried(script, tmp_path, 1).codes == (0,)
