"""Runs programs under plans: ``run(program, plan) -> Outcome``."""

from __future__ import annotations

import atexit
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from rpcprops.cluster import ClusterServer
from rpcprops.cluster._client import ClockChoice, Transport
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.outcomes import Counters, Outcome, StepOutcome
from rpcprops.programs import Context, Program, Settle

_REMEMBERED = 2048


class Runner:
    """Runs programs on one server, and remembers each outcome.

    Remembering makes a run a function of its arguments, as Hypothesis expects of a test: a case
    that fails only sometimes keeps the outcome that it first had (how often it repeats is measured
    apart, with :meth:`run_anew`).
    """

    def __init__(self, server: ClusterServer) -> None:
        self.server = server
        self._remembered: OrderedDict[Any, Outcome] = OrderedDict()

    def run(
        self,
        program: Program,
        plan: FaultPlan | FaultTable | None = None,
        *,
        world_size: int | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
    ) -> Outcome:
        """As :func:`rpcprops.run`."""
        rate = self.server.rate_of(clock)
        key = (program, FaultPlan.of(plan), world_size, rate, transport)
        if key not in self._remembered:
            self._remembered[key] = self.run_anew(
                program, plan, world_size=world_size, clock=rate, transport=transport
            )
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]

    def run_anew(
        self,
        program: Program,
        plan: FaultPlan | FaultTable | None = None,
        *,
        world_size: int | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
    ) -> Outcome:
        """As :meth:`run`, without remembering."""
        faults = FaultPlan.of(plan)
        size = program.world_size if world_size is None else world_size
        if size < program.world_size:
            msg = f"world_size={size!r}, but the program needs {program.world_size} ranks."
            raise UsageError(msg)
        prediction = predict(program, faults)
        failures = [sum(by_type.values()) for by_type in prediction.failures(faults)]
        failures += [0] * (size - len(failures))
        cluster = self.server.cluster(
            world_size=size, faults=faults, clock=clock, transport=transport
        )
        cluster.program = program
        steps: list[StepOutcome] = []
        contexts: dict[str, int] = {}
        try:
            cluster.start()
            for index, (step, expected) in enumerate(
                zip(program.steps, prediction.steps, strict=True)
            ):
                if cluster.has_found:
                    break
                if isinstance(step, Settle):
                    held = cluster.settle_to(_pad(expected.counters, size))
                    steps.append(StepOutcome(index, counters=held))
                    continue
                seen = cluster.run_step(index, step, step.at, contexts)
                steps.append(seen)
                if isinstance(step, Context) and isinstance(seen.value, dict):
                    contexts[step.name] = seen.value["id"]
                # After a step that went wrong, the next ones would be judged for its fault.
                sure = expected.error != "unknown"
                if not seen.ended or (sure and bool(seen.error) != bool(expected.error)):
                    cluster.look()
                    break
            else:
                if program.settles and not cluster.has_found:
                    cluster.settle_to(_pad(prediction.counters, size), failures)
                elif not cluster.has_found:
                    cluster.look()
                if not cluster.has_found:
                    cluster.shutdown()
        finally:
            cluster.kill()
        return replace(cluster.outcome, steps=tuple(steps))


def _pad(counters: tuple[Counters, ...], size: int) -> tuple[Counters, ...]:
    return (*counters, *([Counters()] * (size - len(counters))))


_default: Runner | None = None


def default_runner() -> Runner:
    """The runner of this process: started when first used, closed when the process ends."""
    global _default
    if _default is None:
        server = ClusterServer()
        atexit.register(server.close)
        _default = Runner(server)
    _default.server.start()
    return _default


def use_server(server: ClusterServer) -> None:
    """Let :func:`run` use this server, so that a process has one."""
    global _default
    _default = Runner(server)


def run(
    program: Program,
    plan: FaultPlan | FaultTable | None = None,
    *,
    world_size: int | None = None,
    clock: ClockChoice | None = None,
    transport: Transport = "tcp",
) -> Outcome:
    """Run `program` on fresh ranks of real torch under `plan`, and return what it showed.

    The same arguments give the remembered outcome of the first run. :func:`rpcprops.judge` tells
    which promises the outcome breaks.

    Args:
        world_size: number of ranks, the program's own unless given; more leave some idle.
        clock: "auto" (fast where this machine can), "real", or a rate.
        transport: "tcp" or "shm".

    Raises:
        UsageError: the plan is not of this world or beyond its retry budget.
        MachineCannot: torch cannot be imported, or a clock's rate cannot be had.
    """
    return default_runner().run(
        program, plan, world_size=world_size, clock=clock, transport=transport
    )
