"""Measures what an example costs: PyTorch's own harness, real time, the fast clock, bare floors.

Every figure is a median over repeats, with the smallest and the largest. All kinds of run in a
comparison are measured in turn (A B C, A B C, …), so that a change of the machine's speed favours
none. Kinds that take many seconds take part in fewer rounds.

There are two floors, both of ranks that fork, join, shut down and exit, at our rate. The *bare
floor* does nothing else, in a process that imported torch and froze its objects. In the *bare
floor, prepared* that process and its ranks also do what our own do to make it cheaper.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from rpcprops import _guard, agents
from rpcprops import clock as clocks
from rpcprops._json import to_json
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.cluster.fork_server import server_environment
from rpcprops.cluster.logs import RankLog
from rpcprops.errors import MachineCannot
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable
from rpcprops.oracle import judge
from rpcprops.programs import Call, Context, Drop, Fetch, Program, Remote, Share, Step
from rpcprops.runner import Runner

WORLD_SIZES = (2, 4, 8, 16)
FAILURES = (0, 1, 2, 3, 4, 5)
LENGTHS = (1, 4, 16, 64)
RATES = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
#: How many rounds of a comparison include the runs in real time, which take ten seconds each.
_REAL_ROUNDS = 3
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

    def against(self, other: Spread) -> Spread:
        """How many times the other this is: by the medians, and at the least and the most."""
        return Spread(
            self.median / other.median, self.least / other.greatest, self.greatest / other.least
        )

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


@dataclass(frozen=True)
class Figures:
    """One run: see :class:`Sample`."""

    seconds: float
    processor: float
    late: float = 0.0
    wrong: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of run, and how to do one.

    Attributes:
        rounds: in how many rounds it takes part, evenly spread; None means in all, plus an
            uncounted first one that warms servers and caches.
    """

    name: str
    once: Callable[[], Figures]
    rounds: int | None = None

    def takes_part(self, number: int, of: int) -> bool:
        """Whether it runs in round `number`, from 1 to `of`, or in the one before them, 0."""
        if self.rounds is None:
            return True
        rounds = min(self.rounds, of)
        return number > 0 and number * rounds // of > (number - 1) * rounds // of


def small_program(world_size: int = 4) -> Program:
    """A small RRef and autograd program over all ranks, which most figures are about."""
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
    """All four retryable types fail so often, on every rank."""
    return FaultPlan(FaultTable(RETRYABLE_MESSAGE_TYPES, times)) if times else FaultPlan()


class BareRanks:
    """The process of :mod:`rpcprops._bare_ranks`; it starts with the first run."""

    def __init__(self, rate: float, *, prepared: bool) -> None:
        self.rate = rate
        self.prepared = prepared
        self._process: subprocess.Popen[str] | None = None
        self._log: RankLog | None = None

    def once(self, world_size: int) -> Figures:
        """Run a world of bare ranks once.

        Raises:
            MachineCannot: a rank failed, or they did not end.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([world_size, self.rate]) + "\n")
            process.stdin.flush()
        # At most one line is on its way, so nothing waits in a buffer.
        readable, _, _ = select.select([process.stdout], [], [], _HARNESS_SECONDS)
        line = process.stdout.readline() if readable else ""
        if not line:
            said = self._log.text().strip().splitlines()[-1:] if self._log else []
            self.close()
            msg = f"the bare ranks failed: {said}"
            raise MachineCannot(msg)
        seconds, processor = json.loads(line)
        return Figures(seconds, processor)

    def _start(self) -> subprocess.Popen[str]:
        environ = dict(os.environ)
        if self.rate != 1.0:
            environ = clocks.preload_environment(environ)
        self._log = RankLog("bare-ranks")
        command = [sys.executable, "-m", "rpcprops._bare_ranks"]
        self._process = subprocess.Popen(
            [*command, "prepared"] if self.prepared else command,
            env=server_environment(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.fd,
            text=True,
            # Its ranks are in its group, and are killed with it.
            start_new_session=True,
        )
        return self._process

    def close(self) -> None:
        """End the process and what it forked; may be called again."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Closes its pipes, too.
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


class Bench:
    """Runs the comparisons; `say` gets a line for each thing done. Close it, or enter it."""

    def __init__(self, runner: Runner, repeats: int, say: Callable[[str], None]) -> None:
        self.runner = runner
        self.repeats = repeats
        self.say = say
        self.rate = runner.server.rate
        self._bare = {on: BareRanks(self.rate, prepared=on) for on in (False, True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes of the bare ranks."""
        for bare in self._bare.values():
            bare.close()

    # The kinds of run.

    def example(
        self,
        name: str,
        program: Program,
        plan: FaultPlan,
        rate: float | None = None,
        rounds: int | None = None,
        **options: Any,
    ) -> Kind:
        """An example of ours, at the rate that it has by default unless one is given."""

        def once() -> Figures:
            outcome = self.runner.run_anew(program, plan, clock=rate, **options)
            return Figures(
                outcome.real_seconds,
                sum(rank.processor_seconds for rank in outcome.ranks),
                max(rank.late_seconds for rank in outcome.ranks),
                bool(judge(program, plan, outcome)),
            )

        return Kind(name, once, rounds)

    def floor(self, world_size: int, *, prepared: bool = False) -> Kind:
        """Bare ranks at our rate; `prepared` with what ours do to make them cheaper."""
        bare = self._bare[prepared]
        name = "bare floor, prepared" if prepared else "bare floor"
        return Kind(f"{name}, {world_size} ranks", lambda: bare.once(world_size))

    def harness(self, rounds: int) -> Kind:
        """PyTorch's own harness on the small program, all four types failing three times."""
        program, plan = small_program(), failing(3)
        command = [sys.executable, "-m", "rpcprops._torch_harness"]
        command += [json.dumps(to_json(program)), json.dumps(to_json(plan.default))]

        def once() -> Figures:
            ran = _guard.run(
                command,
                env=_guard.environment(TP_SOCKET_IFNAME="lo"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                timeout=_HARNESS_SECONDS,
            )
            if ran.returncode:
                msg = f"PyTorch's harness failed: {ran.stderr.strip().splitlines()[-1:]}"
                raise MachineCannot(msg)
            seconds, processor = json.loads(ran.stdout.splitlines()[-1])
            return Figures(seconds, processor)

        return Kind("PyTorch's harness", once, rounds)

    def alternate(self, kinds: Sequence[Kind], what: str = "") -> list[Sample]:
        """Measure several kinds of run in turn."""
        seen: list[list[Figures]] = [[] for _ in kinds]
        for number in range(self.repeats + 1):
            for kind, figures in zip(kinds, seen, strict=True):
                if not kind.takes_part(number, self.repeats):
                    continue
                if what:
                    self.say(f"{what}, round {number} of {self.repeats}: {kind.name}")
                ran = kind.once()
                if number:
                    figures.append(ran)
        return [_sample(kind.name, figures) for kind, figures in zip(kinds, seen, strict=True)]

    # The tables.

    def comparison(self, harness_rounds: int) -> dict[str, Any]:
        """PyTorch's harness, ours in real time, ours at the default rate, and the two floors.

        Where the agent WIRE can be had, also new worlds of its ranks, and used ones, in which the
        faults are set anew for each example.
        """
        program = small_program()
        kinds = {
            "real": self.example("ours, real time", program, failing(3), 1.0, _REAL_ROUNDS),
            "fast": self.example(f"ours, rate {self.rate:g}", program, failing(3)),
            "real, faultless": self.example(
                "ours, real time, no faults", program, failing(0), 1.0, _REAL_ROUNDS
            ),
            "faultless": self.example(f"ours, rate {self.rate:g}, no faults", program, failing(0)),
            "floor": self.floor(4),
            "prepared floor": self.floor(4, prepared=True),
        }
        has_wire = _has_wire()
        if has_wire:
            for faults, plan in ((", no faults", failing(0)), ("", failing(3))):
                for world in ("new", "used"):
                    kinds[f"{world}{faults}"] = self.example(
                        f"WIRE, {world} world{faults}",
                        program,
                        plan,
                        agent="wire",
                        reuse=world == "used",
                    )
        if harness_rounds:
            kinds = {"harness": self.harness(harness_rounds), **kinds}
        samples = dict(zip(kinds, self.alternate([*kinds.values()], "comparing"), strict=True))
        median = {name: sample.seconds.median for name, sample in samples.items()}
        waits = median["real"] - median["real, faultless"]
        ratios = {
            "fast against real time": median["real"] / median["fast"],
            "faultless against the bare floor": median["faultless"] / median["floor"],
            "faultless against the bare floor, prepared": (
                median["faultless"] / median["prepared floor"]
            ),
        }
        headline: dict[str, tuple[Sample, Sample]] = {}
        if has_wire:
            new, used = samples["new, no faults"], samples["used, no faults"]
            headline["used_world"] = new, used
            ratios["used world against new, processor"] = (
                new.processor.median / used.processor.median
            )
        if harness_rounds:
            headline["faulted"] = samples["harness"], samples["used" if has_wire else "fast"]
            ratios["fast against PyTorch's harness"] = median["harness"] / median["fast"]
        return {
            "samples": [sample_json(sample, waits) for sample in samples.values()],
            "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
            "headline": {
                name: {
                    "of": [one.name, other.name],
                    "spread": _spread(one.seconds.against(other.seconds)),
                }
                for name, (one, other) in sorted(headline.items())
            },
        }

    def ledger(self, programs: Sequence[Program] = ()) -> list[dict[str, Any]]:
        """What the ledger of the agent WIRE adds to an example: `repeats` pairs with and without.

        Which of a pair comes first alternates. Seconds and processor seconds are those of the
        whole example, in the ranks and in this process, which reads the ledger.

        Args:
            programs: of a short and a long example, unless given.
        """
        named = agents.named(WIRE)
        rows: list[dict[str, Any]] = []
        for program in programs or (small_program(), long_program(64)):
            pairs: list[dict[bool, Figures]] = []
            for number in range(self.repeats + 1):
                self.say(f"the ledger, {program.name}, pair {number} of {self.repeats}")
                pairs.append({})
                for with_ledger in (bool(number % 2), not number % 2):
                    with _ledger(named, on=with_ledger):
                        pairs[-1][with_ledger] = self._whole(program)
            # The first pair warms servers and caches.
            counted = pairs[1:]
            rows.append(
                {
                    "program": program.name,
                    "pairs": len(counted),
                    **{
                        key: _spread(Spread.of([figure(pair) for pair in counted]))
                        for key, figure in _LEDGER_FIGURES.items()
                    },
                }
            )
        return rows

    def _whole(self, program: Program) -> Figures:
        began, own = time.monotonic(), time.process_time()
        outcome = self.runner.run_anew(program, FaultPlan(), clock=self.rate, agent=WIRE)
        ranks = sum(rank.processor_seconds for rank in outcome.ranks)
        processor = ranks + time.process_time() - own
        return Figures(time.monotonic() - began, processor)

    def growth(self) -> dict[str, Any]:
        """With world size, failing sends and program length, each beside the two floors."""
        small, none = small_program(), failing(0)
        return {
            "world_size": self._grow(
                "world_size",
                [
                    (n, self.example(f"{n} ranks", small_program(n), failing(0)))
                    for n in WORLD_SIZES
                ],
                WORLD_SIZES,
            ),
            "failing_sends": self._grow(
                "failing_sends",
                [(n, self.example(f"{n} failing sends", small, failing(n))) for n in FAILURES],
                (4,),
            ),
            "steps": self._grow(
                "steps",
                [(n, self.example(f"{n} steps", long_program(n), none)) for n in LENGTHS],
                (4,),
            ),
        }

    def _grow(
        self, key: str, kinds: Sequence[tuple[int, Kind]], worlds: Sequence[int]
    ) -> list[dict[str, Any]]:
        """A row for each kind, beside the floors of its world: `worlds` is one for all, or each."""
        floors = [self.floor(n, prepared=on) for n in worlds for on in (False, True)]
        measured = self.alternate(
            [*(kind for _, kind in kinds), *floors], f"growth with {key.replace('_', ' ')}"
        )
        samples, under = measured[: len(kinds)], measured[len(kinds) :]
        rows: list[dict[str, Any]] = []
        for index, ((number, _), sample) in enumerate(zip(kinds, samples, strict=True)):
            at = 2 * (index % len(worlds))
            bare, prepared = under[at], under[at + 1]
            rows.append(
                {
                    key: number,
                    **sample_json(sample),
                    "floor": sample_json(bare),
                    "prepared_floor": sample_json(prepared),
                    "against_floor": _ratio(sample, bare),
                    "against_prepared_floor": _ratio(sample, prepared),
                }
            )
        return rows

    def curve(self) -> list[dict[str, Any]]:
        """Rate against seconds an example, lateness and wrong verdicts, idle and loaded."""
        program = small_program()
        rows: list[dict[str, Any]] = []
        for name, hogs in (("idle", 0), ("loaded", 2 * (os.cpu_count() or 1))):
            self.say(f"the curve of rates, machine {name}")
            with load(hogs):
                kinds = [self.example("", program, failing(3), rate) for rate in RATES]
                for rate, sample in zip(RATES, self.alternate(kinds), strict=True):
                    rows.append({"machine": name, "rate": rate, **sample_json(sample)})
        return rows


#: By name: the figures of a pair of runs, with the ledger (True) and without.
_LEDGER_FIGURES: dict[str, Callable[[dict[bool, Figures]], float]] = {
    "seconds": lambda pair: pair[True].seconds,
    "seconds_without": lambda pair: pair[False].seconds,
    "ratio": lambda pair: pair[True].seconds / pair[False].seconds,
    "processor_seconds": lambda pair: pair[True].processor,
    "processor_seconds_without": lambda pair: pair[False].processor,
    "processor_ratio": lambda pair: pair[True].processor / pair[False].processor,
}


@contextmanager
def _ledger(agent: agents.Agent, *, on: bool) -> Iterator[None]:
    """Have worlds of an agent with a ledger, or without one."""
    if not on:
        # Only this object's: its ranks are then given no ledger.
        vars(agent)["has_ledger"] = False
    try:
        yield
    finally:
        vars(agent).pop("has_ledger", None)


def _sample(name: str, figures: Sequence[Figures]) -> Sample:
    return Sample(
        name,
        Spread.of([one.seconds for one in figures]),
        Spread.of([one.processor for one in figures]),
        max(one.late for one in figures),
        sum(one.wrong for one in figures),
    )


def _has_wire() -> bool:
    """Whether the agent WIRE is compiled, or can be."""
    try:
        agents.named(WIRE).prepare()
    except MachineCannot:
        return False
    return True


def growth_with_ranks(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times the seconds of the smallest world the largest takes: ours, and each floor."""

    def times(of: Callable[[dict[str, Any]], dict[str, Any]]) -> float:
        last, first = (of(row)["seconds"]["median"] for row in (rows[-1], rows[0]))
        return float(round(last / first, 2))

    return {
        "ours": times(lambda row: row),
        "floor": times(lambda row: row["floor"]),
        "prepared_floor": times(lambda row: row["prepared_floor"]),
    }


def _ratio(sample: Sample, floor: Sample) -> float:
    return round(sample.seconds.median / floor.seconds.median, 2)


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep the machine busy with `processes` spinning processes."""
    with contextlib.ExitStack() as hogs:
        for _ in range(processes):
            spinning = [sys.executable, "-I", "-S", "-c", "while True: pass"]
            hogs.enter_context(_guard.guarded(spinning, stderr=subprocess.DEVNULL))
        yield


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
