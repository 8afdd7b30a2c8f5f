"""The number of threads of a program's ranks, in real ranks and in scripts of plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge, predict
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
    found = [run(Program(2, (step,), num_worker_threads=number)) for number in (3, 2)]
    assert [outcome.steps[0].value.count("nothing") > 0 for outcome in found] == [False, True]


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
