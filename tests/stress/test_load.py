"""Eight servers at once beside busy loops: a machine that has no time is not taken for a defect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from rpcprops._bench import load
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.properties import PROPERTIES, held_case
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests._draws import seed_of_this_run
from tests._wire import needs_wire
from tests.stress import _processes as processes
from tests.stress._processes import Run

#: Processes with a server each, and loops that take what is left of two processors.
SERVERS, LOOPS = 8, 2
#: What CI, which has other tests to run beside this one, starts of them.
FEW_SERVERS = 3
#: Each server has one of them. All are confirmed in real time before they count as violated.
CHEAP = ("rref-values", "rref-lifetime", "calls-run-once", "autograd-gradients")
#: Whatever programs there are, under faults that change nothing that they see.
DRAWN = ("drawn-within-budget",)
#: The findings that one order of two messages shows, and how often each is shown.
HELD = sorted(name for name in PROPERTIES if held_case(name, 0, 1.0))
HELD_RUNS = 3
#: Real seconds, far above what the runs take.
SHORT_SECONDS, NIGHTLY_SECONDS = 150.0, 60 * 60.0


@pytest.fixture
def busy() -> Iterator[None]:
    """Loops that compute beside the test."""
    loops = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"])
        for _ in range(LOOPS)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def check_at_once(
    folder: Path, properties: Sequence[str], servers: int, examples: int, seconds: float, seed: int
) -> list[dict[str, object]]:
    """What some `rpcprops check` at the same time say, each in a folder of its own."""
    logs = folder / "logs"
    logs.mkdir()
    runs: list[Run] = []
    deadline = time.monotonic() + seconds
    try:
        for number in range(servers):
            place = folder / f"run{number}"
            place.mkdir()
            name = properties[number % len(properties)]
            options = ["-n", str(examples), "--seed", str(seed + number), "--json", "said.json"]
            command = processes.python("rpcprops", "check", name, *options)
            runs.append(Run.start(command, place, logs))
        said: list[dict[str, object]] = []
        for run in runs:
            code = run.process.wait(max(1.0, deadline - time.monotonic()))
            assert code in (0, 1), f"seed {seed}: exit code {code}\n{run.text}"
            (found,) = json.loads((run.folder / "said.json").read_text())["properties"]
            said.append(found | {"text": run.text})
            assert not run.left_after(processes.GONE_SECONDS)
        return said
    finally:
        for run in runs:
            run.kill()


def hold_under_load(
    folder: Path,
    properties: Sequence[str],
    servers: int,
    record: Callable[[str, object], None],
    *,
    asked: int,
    examples: int,
    seconds: float,
) -> None:
    """No verdict is "violated"; what is undecided is counted.

    Args:
        asked: how many examples Hypothesis is asked for, in all servers together. Some of them are
            the same program under the same plan.
        examples: how many different ones there must be.
    """
    seed = seed_of_this_run()
    said = check_at_once(folder, properties, servers, -(-asked // servers), seconds, seed)
    counts = Counter(str(one["verdict"]) for one in said)
    for one in said:
        for name, value in (("examples", one["examples"]), ("reruns", one["reruns"])):
            assert isinstance(value, int)
            counts[name] += value
        failed_once = one["failed_once"]
        assert isinstance(failed_once, list)
        counts["failed once"] += len(failed_once)
    # pytest prints the sums at its end.
    record("load", dict(counts))
    # A verdict that is undecided ends its run early.
    assert counts["examples"] >= examples or counts["undecided"]
    false = [str(one["text"]) for one in said if one["verdict"] not in ("holds", "undecided")]
    assert not false, f"seeds from {seed} on: {dict(counts)}\n" + "\n".join(false)


@pytest.mark.nightly  # tests/plugin/test_lateness.py makes ranks late, on purpose and alone
@pytest.mark.usefixtures("busy")
def test_load(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Of 24 examples on an overloaded machine, none is said to violate a promise."""
    least = partial(hold_under_load, asked=27, examples=24, seconds=SHORT_SECONDS)
    least(tmp_path, CHEAP, FEW_SERVERS, record_property)


@pytest.mark.nightly
@pytest.mark.usefixtures("busy")
def test_long_load(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Of 2,000 examples on an overloaded machine, none is said to violate a promise."""
    most = partial(hold_under_load, asked=4_000, examples=2_000, seconds=NIGHTLY_SECONDS)
    most(tmp_path, DRAWN, SERVERS, record_property)


@pytest.mark.nightly
@needs_wire
@pytest.mark.parametrize("name", HELD)
def test_a_hold_shows_its_finding_on_a_busy_machine(rpc_cluster: ClusterFactory, name: str) -> None:
    """In every run, though two processes compute for each processor; and nothing else is shown."""
    runner = Runner(rpc_cluster.server)
    with load(2 * (os.cpu_count() or 1)):
        for number in range(HELD_RUNS):
            case = held_case(name, number, rpc_cluster.server.rate)
            assert case is not None
            seen = runner.run_anew(case.program, case.plan, agent="wire")
            broken = judge(case.program, case.plan, seen)
            met = predict_for(case.program, case.plan, seen).met
            assert set_apart(case.program, met, seen, broken) == ((name,), ()), number
