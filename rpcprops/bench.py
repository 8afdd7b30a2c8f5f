"""Measures what an example costs: PyTorch's own harness, real time, the fast clock, the bare floor.

Every figure is a median over repeats with its least and greatest. Our own kinds of run are measured
in turn (A B C, A B C, …), so that a machine whose speed drifts does not favour one; the floor and
PyTorch's harness are processes of their own and run in blocks of the same run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rpcprops import clock as clocks
from rpcprops._json import to_json
from rpcprops.cluster._client import server_environment
from rpcprops.errors import MachineCannot
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable
from rpcprops.oracle import judge
from rpcprops.programs import Call, Context, Drop, Fetch, Program, Remote, Share, Step
from rpcprops.runner import Runner

WORLD_SIZES = (2, 4, 8, 16)
FAILURES = (0, 1, 2, 3, 4, 5)
LENGTHS = (1, 4, 16, 64)
RATES = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
_HARNESS_SECONDS = 300


@dataclass(frozen=True)
class Spread:
    """A figure over its repeats."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.greatest:.3f})"


@dataclass(frozen=True)
class Sample:
    """One kind of run.

    Attributes:
        seconds: real seconds an example, from fork to exit.
        processor: user and system seconds of the ranks of an example.
        late: the longest, in real seconds, that a timed wait of a rank returned after its deadline.
        wrong: repeats in which a promise seemed broken.
    """

    name: str
    seconds: Spread
    processor: Spread
    late: float = 0.0
    wrong: int = 0


def small_program(world_size: int = 4) -> Program:
    """A small RRef and autograd program over all ranks, the one that the figures are about."""
    others = tuple(range(1, world_size))
    steps: list[Step] = [Remote(0, 1, "a"), Fetch(0, "a")]
    if world_size > 2:
        steps += [Share(0, "a", 2, "b"), Fetch(2, "b"), Drop(2, "b")]
    steps += [Context(0, "x", others), Drop(0, "a")]
    return Program(world_size, tuple(steps), f"small[{world_size}]")


def long_program(length: int) -> Program:
    """`length` steps over four ranks: calls and fetches, round and round."""
    steps: list[Step] = [Remote(0, 1, "a")]
    for number in range(length - 1):
        at = number % 4
        steps.append(Call(at, (at + 1) % 4) if number % 2 else Fetch(0, "a"))
    return Program(4, tuple(steps), f"long[{length}]", settles=False)


def failing(times: int) -> FaultPlan:
    """All four retryable types failing so often, on every rank."""
    return FaultPlan(FaultTable(RETRYABLE_MESSAGE_TYPES, times)) if times else FaultPlan()


class Bench:
    """Runs the comparisons; `say` gets a line for each thing done."""

    def __init__(self, runner: Runner, repeats: int, say: Callable[[str], None]) -> None:
        self.runner = runner
        self.repeats = repeats
        self.say = say
        self.rate = runner.server.rate

    def sample(self, name: str, program: Program, plan: FaultPlan, rate: float) -> Sample:
        return self.alternate([(name, program, plan, rate)])[0]

    def alternate(self, kinds: Sequence[tuple[str, Program, FaultPlan, float]]) -> list[Sample]:
        """Measure several kinds of run in turn."""
        seconds: list[list[float]] = [[] for _ in kinds]
        processor: list[list[float]] = [[] for _ in kinds]
        late = [0.0] * len(kinds)
        wrong = [0] * len(kinds)
        for repeat in range(self.repeats + 1):
            for index, (_, program, plan, rate) in enumerate(kinds):
                outcome = self.runner.run_anew(program, plan, clock=rate)
                if repeat == 0:
                    continue  # the first warms module servers and caches
                seconds[index].append(outcome.real_seconds)
                processor[index].append(sum(r.processor_seconds for r in outcome.ranks))
                late[index] = max([late[index], *(r.late_seconds for r in outcome.ranks)])
                wrong[index] += bool(judge(program, plan, outcome))
        return [
            Sample(kind[0], Spread.of(s), Spread.of(p), late_by, bad)
            for kind, s, p, late_by, bad in zip(kinds, seconds, processor, late, wrong, strict=True)
        ]

    def floor(self, world_size: int) -> Sample:
        """The bare ranks of :mod:`rpcprops._bare_ranks`, at this server's rate."""
        command = [sys.executable, "-m", "rpcprops._bare_ranks"]
        command += [str(world_size), str(self.rate), str(self.repeats + 1)]
        environ = dict(os.environ)
        if self.rate != 1.0:
            environ = clocks.preload_environment(environ)
        ran = subprocess.run(
            command,
            env=server_environment(environ),
            capture_output=True,
            text=True,
            timeout=_HARNESS_SECONDS,
            check=False,
        )
        if ran.returncode:
            msg = f"the bare ranks failed: {ran.stderr.strip().splitlines()[-1:]}"
            raise MachineCannot(msg)
        pairs = [json.loads(line) for line in ran.stdout.splitlines()][1:]
        return Sample(
            f"bare floor, {world_size} ranks",
            Spread.of([pair[0] for pair in pairs]),
            Spread.of([pair[1] for pair in pairs]),
        )

    def harness(self, repeats: int) -> Sample:
        """PyTorch's own harness on the small program, all four types failing three times."""
        program, plan = small_program(), failing(3)
        pairs: list[tuple[float, float]] = []
        for repeat in range(repeats):
            self.say(f"PyTorch's own harness, {repeat + 1} of {repeats}")
            command = [sys.executable, "-m", "rpcprops._torch_harness"]
            command += [json.dumps(to_json(program)), json.dumps(to_json(plan.default))]
            ran = subprocess.run(
                command,
                env={**os.environ, "TP_SOCKET_IFNAME": "lo"},
                capture_output=True,
                text=True,
                timeout=_HARNESS_SECONDS,
                check=False,
            )
            if ran.returncode:
                msg = f"PyTorch's harness failed: {ran.stderr.strip().splitlines()[-1:]}"
                raise MachineCannot(msg)
            seconds, processor = json.loads(ran.stdout.splitlines()[-1])
            pairs.append((seconds, processor))
        return Sample(
            "PyTorch's harness",
            Spread.of([pair[0] for pair in pairs]),
            Spread.of([pair[1] for pair in pairs]),
        )

    # The tables.

    def comparison(self, harness_repeats: int) -> dict[str, Any]:
        """PyTorch's harness, ours in real time, ours at the default rate, and the bare floor."""
        program = small_program()
        self.say("ours, real time and fast, with and without faults")
        fast, faultless = self.alternate(
            [
                (f"ours, rate {self.rate:g}", program, failing(3), self.rate),
                (f"ours, rate {self.rate:g}, no faults", program, failing(0), self.rate),
            ]
        )
        few = Bench(self.runner, min(self.repeats, 3), self.say)
        real, real_faultless = few.alternate(
            [
                ("ours, real time", program, failing(3), 1.0),
                ("ours, real time, no faults", program, failing(0), 1.0),
            ]
        )
        self.say("the bare floor")
        floor = self.floor(4)
        harness = self.harness(harness_repeats) if harness_repeats else None
        waits = real.seconds.median - real_faultless.seconds.median
        samples = [
            sample for sample in (harness, real, fast, real_faultless, faultless, floor) if sample
        ]
        ratios = {
            "fast against real time": real.seconds.median / fast.seconds.median,
            "faultless against the bare floor": faultless.seconds.median / floor.seconds.median,
        }
        if harness:
            ratios["fast against PyTorch's harness"] = harness.seconds.median / fast.seconds.median
        return {
            "samples": [sample_json(sample, waits) for sample in samples],
            "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        }

    def growth(self) -> dict[str, Any]:
        """With world size, failing sends and program length, each beside the bare floor."""
        table: dict[str, Any] = {}
        self.say("growth with world size")
        table["world_size"] = [
            {
                "world_size": size,
                **sample_json(self.sample("", small_program(size), failing(0), self.rate)),
                "floor": sample_json(self.floor(size)),
            }
            for size in WORLD_SIZES
        ]
        self.say("growth with failing sends")
        program = small_program()
        samples = self.alternate([("", program, failing(n), self.rate) for n in FAILURES])
        floor = {"floor": sample_json(self.floor(4))}
        table["failing_sends"] = [
            {"failing_sends": n, **sample_json(s), **floor}
            for n, s in zip(FAILURES, samples, strict=True)
        ]
        self.say("growth with program length")
        samples = self.alternate([("", long_program(n), failing(0), self.rate) for n in LENGTHS])
        table["steps"] = [
            {"steps": n, **sample_json(s), **floor} for n, s in zip(LENGTHS, samples, strict=True)
        ]
        return table

    def curve(self) -> list[dict[str, Any]]:
        """Rate against seconds an example, lateness and wrong verdicts, idle and loaded."""
        program = small_program()
        rows: list[dict[str, Any]] = []
        for name, hogs in (("idle", 0), ("loaded", 2 * (os.cpu_count() or 1))):
            self.say(f"the curve of rates, machine {name}")
            with load(hogs):
                kinds = [("", program, failing(3), rate) for rate in RATES]
                for rate, sample in zip(RATES, self.alternate(kinds), strict=True):
                    rows.append({"machine": name, "rate": rate, **sample_json(sample)})
        return rows


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep the machine busy with so many spinning processes."""
    context = multiprocessing.get_context("spawn")
    hogs = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    try:
        for hog in hogs:
            hog.start()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.join()


def _spin() -> None:
    while True:
        pass


def sample_json(sample: Sample, fault_seconds: float | None = None) -> dict[str, Any]:
    """A sample as data; `fault_seconds` are the virtual seconds of retry waits in an example."""
    data: dict[str, Any] = {
        "name": sample.name,
        "seconds": _spread(sample.seconds),
        "examples_per_second": round(1 / sample.seconds.median, 3),
        "processor_seconds": _spread(sample.processor),
        "late_seconds": round(sample.late, 6),
        "wrong_verdicts": sample.wrong,
    }
    if fault_seconds is not None and "no faults" not in sample.name and "floor" not in sample.name:
        data["fault_seconds_per_second"] = round(fault_seconds / sample.seconds.median, 2)
    return data


def _spread(spread: Spread) -> dict[str, float]:
    return {
        "median": round(spread.median, 4),
        "least": round(spread.least, 4),
        "greatest": round(spread.greatest, 4),
    }
