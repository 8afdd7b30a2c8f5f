"""Ranks that shut down in each way, on real torch."""

from __future__ import annotations

import select
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rpcprops.cluster import RpcCluster
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phase
from rpcprops.errors import UngracefulShutdown
from rpcprops.faults import FaultPlan
from rpcprops.oracle import accepted, judge
from rpcprops.outcomes import Violation
from rpcprops.programs import Call, Context, Deferred, End, Program, Remote, Settle
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import default_runner, run
from rpcprops.steps.in_rank.state import futures
from tests.seeded._programs import ENDS

pytestmark = pytest.mark.usefixtures("rpc_cluster")


@pytest.mark.parametrize("program", ENDS, ids=lambda p: p.name)
def test_real_ranks_end_as_predicted(program: Program) -> None:
    """With RRefs held, each end shows what torch documents: one that waits for nobody a leak."""
    outcome = run(program)
    assert judge(program, None, outcome) == ()
    kinds = [(one.kind, one.rank) for one in accepted(program, FaultPlan(), outcome)]
    assert kinds == ([("held-at-once", 1)] if program.end.how == "at once" else [])


def test_an_answer_that_is_read_after_the_exit_of_its_rank_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the error of a shutdown that raises, after which its rank exits with a code."""
    dead = Diagnosis.dead

    def late(self: Diagnosis, phase: Phase) -> bool:
        """Read all exits from the server before anything of what the ranks have sent."""
        peer = self._ranks.peer
        assert peer is not None
        while phase.name == "shutdown" and self._ranks.alive():
            assert select.select([peer.sock], [], [], 10.0)[0]
            peer.read()
            for channel in self._ranks.alive():
                if channel.pid in peer.ended:
                    channel.status, channel.processor_seconds = peer.ended.pop(channel.pid)
        return dead(self, phase)

    monkeypatch.setattr(Diagnosis, "dead", late)
    program = Program(2, (Remote(0, 1, "a"),), end=End("at once"))
    outcome = default_runner().run_anew(program)
    assert judge(program, None, outcome) == ()
    assert [rank.exit_code for rank in outcome.ranks] == [0, 72]
    assert outcome.ranks[1].shutdown_error is not None


@pytest.mark.parametrize("program", ENDS, ids=lambda p: p.name)
def test_a_timeout_is_reached_where_a_rank_comes_late(program: Program) -> None:
    """Then the first rank calls that one before it has called, and nobody raises."""
    outcome = run(program, agent="wire")
    assert judge(program, None, outcome) == ()
    calls = {
        (one.sender, one.receiver): one.seconds
        for one in outcome.messages
        if one.type == "PYTHON_CALL" and "leaving" in one.marks
    }
    for rank in (1, 2) if program.gathers else ():
        is_late = program.end.wait_of(rank) > program.end.wait_of(0)
        came_first = calls[0, rank] < calls[rank, 0] - 5.0
        assert came_first is (is_late and program.end.how == "timed out")


#: A function that has begun, one that calls on, one that a timeout has ended at its caller, one of
#: an operator's creation, and a context whose cleanup is under way.
HASTY = Program(
    3,
    (
        Remote(0, 1, "a"),
        Settle(),
        Remote(0, 2, "b", seconds=2.0),
        Deferred(1, 2, 0),
        Call(0, 1, timeout=3.0, seconds=12.0),
        Call(0, 1, wait="later", out="f", seconds=2.0),
        Remote(1, 0, "c", flavour="builtin"),
        Context(0, "x", (1, 2)),
    ),
    settles=False,
    end=End("at once"),
)


@pytest.mark.parametrize("agent", [None, "wire"])
@pytest.mark.parametrize("waits", [(), (30.0,), (0.0, 30.0, 30.0)], ids=["together", "0", "1, 2"])
def test_real_ranks_end_while_calls_are_under_way(
    waits: tuple[float, ...], agent: str | None
) -> None:
    """Each shutdown ends, the value of before the settle is reported, and no call runs twice."""
    program = replace(HASTY, end=End("at once", waits))
    outcome = run(program, agent=agent)
    assert judge(program, None, outcome) == ()
    assert len(outcome.steps) == len(program.leaves)
    assert ("held-at-once", 1) in [
        (one.kind, one.rank) for one in accepted(program, FaultPlan(), outcome)
    ]
    # What had begun was served to its end, and its caller's timeout changes nothing.
    assert outcome.ranks[1].calls["step4"] == 1


def forget() -> None:
    """Keep a future that nobody will ever complete, as if it were one of a call."""
    futures["forgotten"] = torch.futures.Future()


def test_a_call_that_has_not_ended_is_a_violation(rpc_cluster: RpcCluster) -> None:
    """A rank looks at all its futures after its shutdown."""
    with pytest.raises(UngracefulShutdown, match="these calls have not ended: forgotten"):
        with rpc_cluster(world_size=1) as cluster:
            cluster.on(0).call(forget)


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
