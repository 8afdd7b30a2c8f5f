"""How origin and rate travel to programs that a dilated process executes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpcprops import clock

RunDriver = Callable[..., list[list[str]]]
RunPython = Callable[..., str]

ONE = 1 << 44
STATE = "RPCPROPS_CLOCK"


def state(rate: int, rbase: int, vbase: int, offsets: tuple[int, ...] = (0,) * 5) -> str:
    """The environment variable as the library writes it."""
    words = [1, rate * ONE, rbase, vbase, *offsets, 50000]
    return ":".join(f"{word % (1 << 64):016x}" for word in words)


@pytest.mark.parametrize(
    "how",
    [
        "execve",
        "execv",
        "execvp",
        "execvpe",
        "execl",
        "execveat",
        "fexecve",
        "syscall",
        "vfork",
        "posix_spawn",
        "posix_spawnp",
        "system",
    ],
)
def test_an_executed_program_inherits_origin_and_rate(run_driver: RunDriver, how: str) -> None:
    """A child reads the virtual time that its parent would read at that instant."""
    virtual = real = 0
    for _ in range(5):
        parent, child = run_driver("exec", how)
        assert [parent[0], child[0]] == ["100", "100"]
        virtual = int(child[1]) - int(parent[1])
        real = int(child[2]) - int(parent[2])
        # The readings of a pair are not taken at one instant.
        if abs(virtual - 100 * real) <= 100 * 1_000_000:
            return
    pytest.fail(f"{virtual} virtual ns passed in {real} real ns")


def test_python_subprocesses(run_python: RunPython) -> None:
    """A subprocess is dilated as long as its environment names the library, else not."""
    output = run_python(
        """
        import os, subprocess, sys
        from rpcprops import clock
        clock.set_rate(100)
        code = "from rpcprops import clock; print(clock.loaded(), clock.get_rate())"
        keep = ("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH")
        own = {k: v for k, v in os.environ.items() if k in keep}
        bare = {"PYTHONPATH": own["PYTHONPATH"]}
        for env in (None, dict(os.environ), own, bare):
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True,
                                 text=True, timeout=10_000, check=True)
            print(run.stdout.strip())
        """
    )
    assert output.splitlines() == ["True 100.0"] * 3 + ["False 1.0"]


def test_time_is_inherited_before_any_constructor(
    compiler: str, driver: Path, tmp_path: Path, library: Path
) -> None:
    """A constructor that runs before the library's own reads virtual time already."""
    source = tmp_path / "early.c"
    source.write_text(
        """
        #include <stdio.h>
        #include <time.h>
        __attribute__((constructor)) static void early(void)
        {
            struct timespec ts;
            clock_gettime(CLOCK_MONOTONIC, &ts);
            printf("early %ld\\n", (long)ts.tv_sec);
            fflush(stdout);
        }
        """
    )
    early = tmp_path / "early.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(early), str(source)]
    subprocess.run(command, check=True, timeout=60)
    environment = clock.preload_environment(os.environ)
    environment[STATE] = state(1, time.monotonic_ns(), 10**18)
    for order in (f"{early}:{library}", f"{library}:{early}"):
        output = subprocess.run(
            [str(driver), "origin"],
            env=environment | {"LD_PRELOAD": order},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        assert int(output.split()[1]) >= 10**9


def test_nanoseconds_are_kept_over_days(run_driver: RunDriver) -> None:
    """Five days at rate 10000 are converted without an error of one nanosecond."""
    now = time.monotonic_ns()
    rbase = now - 5 * 86400 * 10**9
    differences: list[int] = []
    for _ in range(20):
        [[rate, virtual, real]] = run_driver("origin", **{STATE: state(10000, rbase, 12345)})
        assert rate == "10000"
        # A whole rate: what was added to the origin is a whole multiple of it.
        elapsed, rest = divmod(int(virtual) - 12345, 10000)
        assert rest == 0
        differences.append(elapsed - (int(real) - rbase))
        assert differences[-1] >= 0
        if differences[-1] < 5_000_000:
            return
    pytest.fail(f"real nanoseconds too many: {differences}")


def test_a_clock_at_its_end_stops(run_driver: RunDriver) -> None:
    """Virtual time past 2^63 ns stays there instead of wrapping around."""
    rbase = time.monotonic_ns() - 30 * 86400 * 10**9
    [[_, virtual, _]] = run_driver("origin", **{STATE: state(10000, rbase, 0)})
    assert int(virtual) == 2**63 - 1


@pytest.mark.parametrize("text", ["", "1", "2:0", state(100, 0, 0) + ":0", "1:zz"])
def test_a_malformed_state_is_refused(driver: Path, text: str) -> None:
    """A program whose inherited clock cannot be read does not run in the wrong time."""
    environment = clock.preload_environment(os.environ) | {STATE: text}
    child = subprocess.run(
        [str(driver), "origin"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 120
    assert "RPCPROPS_CLOCK is malformed" in child.stderr
