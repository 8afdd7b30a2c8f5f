"""Every replaced call of the C library, driven from C."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunDriver = Callable[..., list[list[str]]]

REAL_LENGTH_NS = 8_000_000
# The kernel counts socket timeouts in ticks of up to 10 ms.
ALLOWANCE_NS = 15_000_000
TRIES = 5

# Driven by no case: gai_suspend needs a name server that does not answer, and sched_yield is no
# wait (test_python.py).
NOT_DRIVEN = {"gai_suspend", "sched_yield"}


def early(line: list[str], rate: float) -> str | None:
    name, requested, virtual, real = line[0], int(line[1]), int(line[2]), int(line[3])
    if virtual < requested or real * rate < requested:
        return f"{name} ended early: {requested} asked, {virtual} virtual, {real} real"
    return None if line[4] == "ok" else f"{name}: {line[4]}"


def late(line: list[str], rate: float) -> bool:
    requested, real = int(line[1]), int(line[3])
    return real > 1.5 * requested / rate + ALLOWANCE_NS


@pytest.mark.parametrize("rate", [1, 10, 200])
def test_every_wait_lasts_its_virtual_length(run_driver: RunDriver, rate: int) -> None:
    """Every wait ends at its virtual deadline, never before it, and soon after it."""
    lines = run_driver("waits", rate, REAL_LENGTH_NS * rate)
    assert len(lines) > 70
    for _ in range(TRIES):
        assert [fault for line in lines if (fault := early(line, rate))] == []
        lines = [line for line in lines if late(line, rate)]
        if not lines:
            return
        # Only what was late is tried again: the machine may have been busy.
        lines = run_driver("waits", rate, REAL_LENGTH_NS * rate, *(line[0] for line in lines))
    assert lines == [], "late in every try"


def test_a_wait_at_another_rate_is_noticed() -> None:
    """The bounds above tell a wait that is not scaled, or scaled twice, from a right one."""
    assert early(["poll", "1600000000", "1600000000", "8000000", "ok"], 200) is None
    assert early(["poll", "1600000000", "1600000000", "7999999", "ok"], 200) is not None
    assert early(["poll", "1600000000", "1599999999", "8000000", "ok"], 200) is not None
    assert early(["poll", "1600000000", "1600000000", "8000000", "errno:22"], 200) is not None
    assert late(["poll", "80000000", "80000000", "80000000", "ok"], 10)


@pytest.mark.parametrize("rate", [1, 10, 200])
def test_edges(run_driver: RunDriver, rate: int) -> None:
    """Zero, infinite, invalid, past and huge timeouts behave as the real calls do."""
    lines = run_driver("edges", rate)
    for _ in range(TRIES):
        lines = [line for line in lines if line[1] != "ok"]
        # A value in its right place, but late, may be the machine's doing.
        if not any(line[1].startswith(("took:", "left:", "old:")) for line in lines):
            break
        lines = run_driver("edges", rate)
    assert [line for line in lines if line[1] != "ok"] == []


@pytest.mark.parametrize("rate", [0.5, 1, 10, 200])
def test_every_clock_runs_at_the_rate(run_driver: RunDriver, rate: float) -> None:
    """Every clock goes on from where it was, then runs at the rate; CPU time does not."""
    faults: list[list[str]] = []
    for _ in range(TRIES):
        faults = [line for line in run_driver("reads", rate) if line[1] != "ok"]
        if not faults:
            return
    assert faults == []


def test_nothing_replaced_is_left_untested(compiler: str, library: Path) -> None:
    """Every function that the clock exports occurs in the driver.

    What stands in front of torch is tested with torch (tests/cluster/test_armed_faults.py).
    """
    del compiler  # its binutils are what this needs
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines()}
    source = (Path(__file__).parent / "driver.c").read_text()
    words = set(re.findall(r"\w+", source))
    words |= {word.removeprefix("w_alias_").removeprefix("v_alias_") for word in words}
    controls = {name for name in exported if name.startswith("rpcprops_clock_")}
    assert len(controls) == 10
    of_agents = {
        name for name in exported if name.startswith(("rpcprops_sends_", "rpcprops_faults_"))
    }
    of_torch = {name for name in exported if name.startswith("_ZN")}
    assert (len(of_agents), len(of_torch)) == (8, 4)
    assert exported - controls - of_agents - of_torch - words - NOT_DRIVEN == set()


def test_cost_of_a_clock_read(run_driver: RunDriver) -> None:
    """A dilated clock read costs little more than a real one."""
    dilated = real = 0.0
    for _ in range(TRIES):
        costs = {name: (float(a), float(b)) for name, a, b in run_driver("cost", 100, 20000)}
        print("nanoseconds per read (dilated, real):", costs)
        dilated, real = costs["CLOCK_MONOTONIC"]
        if dilated < 3 * real:
            return
    pytest.fail(f"a read costs {dilated} ns, a real one {real} ns")


def test_clocks_never_run_backwards(run_driver: RunDriver) -> None:
    """No thread sees a clock before what any thread saw, while the rate and forks change it."""
    [[backwards, changes, total, forks]] = run_driver("forward")
    assert int(changes) > 100
    assert int(forks) > 5
    assert int(total) > 1000
    assert backwards == "0"
