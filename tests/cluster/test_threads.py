"""The number of threads of a program's ranks, in real ranks and in scripts of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpcprops import RpcCluster
from rpcprops.errors import RankHung
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge, predict, predict_for, set_apart
from rpcprops.programs import (
    Call,
    Chain,
    Context,
    Count,
    Deferred,
    Fetch,
    Onward,
    Own,
    Program,
    Recurse,
    Remote,
    Settle,
    Share,
    Step,
)
from rpcprops.properties._findings import finding_case
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run
from rpcprops.steps.in_rank.functions import recurse

#: Steps that a single thread in each rank suffices for.
WITH_ONE: tuple[Step, ...] = (
    Remote(0, 1, "a", seconds=2.0),
    Share(0, "a", 2, "b"),
    Fetch(2, "b"),
    Context(0, "x", (1, 2, 1)),
    Chain(0, 1, 2),
    Deferred(0, 1, 0, "thens", how="remote"),
    Call(0, 0, wait="async"),
    Count(1, 1),
)
#: Steps for which three suffice, and two do not.
WITH_THREE: tuple[Step, ...] = (
    Recurse(0, (1, 0, 1, 0, 1)),
    Own(0, "o"),
    Remote(0, 1, "c", right="o"),
    Call(0, 1, right="o"),
    Settle(),
    Onward(0, 1, 0, 2),
    Onward(0, 1, 2, 2, within=3.0, seconds=12.0, patience=600.0),
)
LATE = FaultPlan(FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_CALL": 1.0}))


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(("steps", "threads"), [(WITH_ONE, 1), (WITH_THREE, 3)])
def test_the_fewest_threads_suffice_in_real_ranks(steps: tuple[Step, ...], threads: int) -> None:
    """Ranks with no more threads than the steps need run them as predicted."""
    program = Program(3, steps, num_worker_threads=threads)
    assert judge(program, None, run(program)) == ()


@pytest.mark.usefixtures("rpc_cluster")
def test_one_thread_suffices_under_delays_and_failures() -> None:
    """Messages that are late or sent again wait for the one thread, and all come."""
    program = Program(3, WITH_ONE, num_worker_threads=1)
    assert predict(program, LATE).certain
    assert judge(program, LATE, run(program, LATE)) == ()


@pytest.mark.usefixtures("rpc_cluster")
def test_ranks_have_the_threads_that_the_program_says() -> None:
    """Two functions wait at once where there are three threads, and not where there are two."""
    step = Onward(0, 1, 0, 2, within=1.0, seconds=0.5, patience=4.0)
    # At this rate a busy machine cannot delay a call by as long as the functions wait.
    found = [run(Program(2, (step,), num_worker_threads=number), clock=4) for number in (3, 2)]
    assert [outcome.steps[0].value.count("nothing") > 0 for outcome in found] == [False, True]


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(
    ("path", "threads"),
    [((1, 0), 1), ((1, 1), 1), ((1, 2, 0), 1), ((1, 2, 1, 0, 1), 2), ((2, 2, 2, 2, 2), 4)],
)
@pytest.mark.parametrize("plan", [FaultPlan(), LATE])
def test_recursion_runs_out_of_threads_as_predicted(
    path: tuple[int, ...], threads: int, plan: FaultPlan
) -> None:
    """Its caller gets the timeout, and what the ranks then hold stays, without any finding."""
    steps = (Own(0, "a"), Recurse(0, path, spins=True, timeout=3.0), Settle(), Fetch(0, "a"))
    program = Program(3, steps, num_worker_threads=threads)
    outcome = run(program, plan)
    assert judge(program, plan, outcome) == ()
    assert any(held.server_calls and held.client_calls for held in outcome.steps[2].counters)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(
    "program",
    [
        # Ranks with a thread left come to rest when the default timeout comes, and others do not.
        Program(3, (Recurse(0, (1, 2, 2), timeout=9.0),), num_worker_threads=1, rpc_timeout=65.0),
        Program(3, (Recurse(0, (1, 1, 2, 0)),), num_worker_threads=2, rpc_timeout=65.0),
        # The caller has no thread left for its timeout, which comes late enough for that.
        Program(2, (Recurse(0, (1, 0, 1), timeout=300.0),), num_worker_threads=1),
    ],
)
def test_where_no_timeout_comes_the_finding_explains_it(program: Program) -> None:
    """The promise is broken, and just that."""
    outcome = run(program)
    found = judge(program, None, outcome)
    met = predict_for(program, FaultPlan(), outcome).met
    assert set_apart(program, met, outcome, found) == (("timeout-needs-thread",), ())
    assert found


def test_a_rank_without_a_thread_never_shuts_down(rpc_cluster: RpcCluster) -> None:
    """The call by which it meets the others ends in no thread of it, and nor does that of others.

    ``torch/distributed/rpc/api.py``: ``_all_gather``.
    """
    how: dict[str, Any] = {"path": (1, 1), "seconds": 0.0, "spins": False, "timeout": 3.0}
    with pytest.raises(RankHung, match="does not shut down"):  # noqa: PT012
        with rpc_cluster(
            world_size=2, num_worker_threads=1, leaks="allow", deadline=1.0
        ) as cluster:
            with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
                cluster.on(0).call(recurse, "call", ("worker0", "worker1"), **how)


@pytest.mark.nightly
@pytest.mark.parametrize(("threads", "code"), [(1, 1), (2, 0)])
def test_a_script_has_the_threads(threads: int, code: int, tmp_path: Path) -> None:
    """A script of plain torch shows the finding with one thread, and not with two."""
    case = finding_case("timeout-needs-thread", 1)
    program = Program(2, case.program.steps, num_worker_threads=threads)
    outcome = run(Program(2, case.program.steps, num_worker_threads=1))
    artefact = Artefact(
        "program",
        "threads",
        "MissingError",
        program=program,
        plans=(FaultPlan(),),
        violations=judge(case.program, None, outcome),
        outcomes=(outcome,),
    )
    script = script_of(artefact)
    assert f"THREADS = {threads}" in script.text
    assert tried(script, tmp_path, 1).codes == (code,)
