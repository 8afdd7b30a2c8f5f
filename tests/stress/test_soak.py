"""One server runs examples without end: nothing of it, nor of the test process, grows."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest

#: Examples of a cycle: after each the same is read, so the last of every cycle is the same too.
CYCLE = 10
#: Cycles before the first reading: caches fill, and the allocators find their size.
WARM_UP = 3
#: What may be said of a process that is flat: of its first fifth (the noise is on top).
FLAT = 0.05
#: Bytes by which memory may move in the few examples of a short run.
SHORT_BYTES = 2 << 20
#: Real seconds after which a run ends with the cycles that it has.
SHORT_SECONDS, NIGHTLY_SECONDS = 120, 50 * 60


@dataclass(frozen=True)
class Reading:
    """What is counted after a cycle.

    Attributes:
        seconds: real seconds of the cycle, by example: the median.
        memory: bytes that are resident: of the test process, then of its servers.
        descriptors: open ones, of the same.
        threads: the same.
        processes: that live below the test process, its pre-forked ranks included.
        files: in /dev/shm that name one of these processes, and temporary ones.
    """

    seconds: float
    memory: list[int]
    descriptors: list[int]
    threads: list[int]
    processes: int
    files: int


def main(cycles: int, most_seconds: float) -> None:
    """What the test process of a soak does: cycles of drawn examples, and a reading after each."""
    from rpcprops import ClusterServer, judge
    from rpcprops.runner import Runner
    from rpcprops.strategies import programs_under_faults
    from tests._draws import draws

    drawn = programs_under_faults(min_world_size=2, max_world_size=3, max_steps=6)
    pairs = draws(drawn, CYCLE - 1)
    readings: list[dict[str, object]] = []
    began = time.monotonic()
    with ClusterServer() as server:
        runner = Runner(server)
        for number in range(WARM_UP + cycles):
            times = []
            for program, plan in pairs:
                start = time.monotonic()
                # Not the remembered outcome of the last cycle.
                judge(program, plan, runner.run_anew(program, plan))
                times.append(time.monotonic() - start)
            with server.cluster(world_size=2) as cluster:
                assert cluster.each(abs, -3) == [3, 3]
            if number >= WARM_UP:
                readings.append(asdict(read(statistics.median(times))))
            if time.monotonic() - began > most_seconds:
                break
    print(json.dumps(readings))


def read(seconds: float) -> Reading:
    """Count, once the pre-forked ranks of the last world have been forked."""
    us = psutil.Process()
    last: list[int] = []
    for _ in range(60):
        below = sorted(one.pid for one in us.children(recursive=True))
        if below == last:
            break
        last = below
        time.sleep(0.05)
    # The fork server is older than the one that has this module imported.
    servers = [psutil.Process(pid) for pid in last if is_server(pid)]
    family = [us, *sorted(servers, key=psutil.Process.create_time)]
    pids = {str(pid) for pid in (us.pid, *last)}
    shared = [name for name in os.listdir("/dev/shm") if any(pid in name for pid in pids)]
    return Reading(
        seconds,
        [one.memory_info().rss for one in family],
        [one.num_fds() for one in family],
        [one.num_threads() for one in family],
        len(last),
        len(shared) + len(os.listdir(os.environ["TMPDIR"])),
    )


def is_server(pid: int) -> bool:
    """Whether a process below the test process is a server: those wait on several descriptors."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return any("eventpoll" in link for link in links)


def soak(folder: Path, cycles: int, seconds: float) -> list[Reading]:
    """The readings of a test process of its own, whose memory is nobody else's."""
    scratch = folder / "tmp"
    scratch.mkdir()
    code = f"from tests.stress import test_soak; test_soak.main({cycles}, {seconds})"
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ
        | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [Reading(**one) for one in json.loads(ran.stdout)]


Value = Callable[[Reading], float]


def fifths(readings: Sequence[Reading]) -> tuple[Sequence[Reading], Sequence[Reading]]:
    count = max(1, len(readings) // 5)
    return readings[:count], readings[-count:]


def growth(readings: Sequence[Reading], value: Value) -> tuple[float, float, float]:
    """Medians of a value in the first and the last fifth, and its noise.

    The noise is half of how far the middle half of the first fifth spreads.
    """
    first, last = ([value(one) for one in part] for part in fifths(readings))
    noise = 0.0
    if len(first) > 3:
        low, _, high = statistics.quantiles(first, n=4)
        noise = (high - low) / 2
    return statistics.median(first), statistics.median(last), noise


def memory_of(place: int) -> Value:
    return lambda one: one.memory[place]


def names(readings: Sequence[Reading]) -> list[str]:
    servers = len(readings[0].memory) - 1
    return ["the test process", *["the fork server", "the module server"][:servers]]


def check_exact(readings: Sequence[Reading]) -> list[str]:
    """What of descriptors, threads, processes and files is not the same all the time."""
    wrong = []
    for name in ("descriptors", "threads", "processes", "files"):
        seen = [getattr(one, name) for one in readings]
        if any(one != seen[0] for one in seen):
            wrong.append(f"{name}: {seen[0]} at first, then {seen}")
    return wrong


def tell(readings: Sequence[Reading]) -> str:
    parts = []
    for place, name in enumerate(names(readings)):
        first, last, noise = growth(readings, memory_of(place))
        parts.append(
            f"{name} {first / 2**20:.1f} to {last / 2**20:.1f} MiB (noise {noise / 2**20:.2f})"
        )
    first, last, noise = growth(readings, lambda one: one.seconds)
    parts.append(f"{1 / first:.1f} to {1 / last:.1f} examples a second (noise {noise / first:.0%})")
    return f"soak of {len(readings) * CYCLE} examples: {'; '.join(parts)}"


def test_a_short_soak(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """In 60 examples no descriptor, thread, process or file is gained, and memory is bounded."""
    readings = soak(tmp_path, 6 - WARM_UP, SHORT_SECONDS)
    line = tell(readings)
    record_property("soak", line)
    print(line)
    wrong = check_exact(readings)
    for place, name in enumerate(names(readings)):
        first, last, _ = growth(readings, memory_of(place))
        if last - first > SHORT_BYTES:
            wrong.append(f"memory of {name}: {first / 2**20:.1f} to {last / 2**20:.1f} MiB")
    assert not wrong, f"{line}\n{wrong}"


@pytest.mark.nightly
def test_a_long_soak(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Over 10,000 examples nothing grows by more than 5 % and noise, and none gets slower."""
    readings = soak(tmp_path, 10_000 // CYCLE, NIGHTLY_SECONDS)
    line = tell(readings)
    record_property("soak", line)
    print(line)
    wrong = check_exact(readings)
    values: dict[str, Value] = {"seconds an example": lambda one: one.seconds}
    for place, name in enumerate(names(readings)):
        values[f"memory of {name}"] = memory_of(place)
    for name, value in values.items():
        first, last, noise = growth(readings, value)
        if last > first * (1 + FLAT) + noise:
            wrong.append(f"{name}: {first:g} to {last:g} (noise {noise:g})")
    assert not wrong, f"{line}\n{wrong}"
    assert len(readings) >= 10_000 // CYCLE, f"too slow, not all was run: {line}"


def test_growth_is_seen() -> None:
    """A descriptor that is not closed, and memory that grows by a tenth, are told from noise."""
    flat = [Reading(0.1, [1000 + n % 7], [9], [1], 4, 0) for n in range(100)]
    first, last, noise = growth(flat, lambda one: one.memory[0])
    assert last <= first * (1 + FLAT) + noise and not check_exact(flat)
    grown = [Reading(0.1, [1000 + n], [9 + n // 50], [1], 4, 0) for n in range(150)]
    first, last, noise = growth(grown, lambda one: one.memory[0])
    assert last > first * (1 + FLAT) + noise
    assert [line.split(":")[0] for line in check_exact(grown)] == ["descriptors"]
