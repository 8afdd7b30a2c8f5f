"""Runs programs under plans: ``run(program, plan) -> Outcome``."""

from __future__ import annotations

import atexit
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rpcprops import agents
from rpcprops._given import argument, shown
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.cluster.options import ClockChoice, Transport, check_transport
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import chosen, is_expected, predict_in
from rpcprops.outcomes import Outcome, StepOutcome
from rpcprops.programs import Program, Settle, Step, check_world_size, threads_of
from rpcprops.steps.in_rank.lookup import modules_of
from rpcprops.torch_facts import facts_of

_REMEMBERED = 2048
#: Real seconds that a program's `rpc_timeout` leaves each message at the least. Where the clock is
#: faster, the program runs at a slower rate, because that is the time of a busy machine.
_REAL_SECONDS = 2.5
#: Virtual seconds: the timeout of programs without one of their own.
_A_DAY = 86_400.0


class Runner:
    """Runs programs on one server, and remembers each outcome.

    With memory, a run is a function of its arguments, as Hypothesis expects of a test: a case that
    fails only sometimes keeps its first outcome (how often it fails again is measured separately,
    with :meth:`run_anew`).
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
        agent: str | None = None,
    ) -> Outcome:
        """As :func:`rpcprops.run`."""
        _check(program, plan, world_size, transport)
        rate = self._rate_of(program, clock)
        agent = agents.named(self.server.agent if agent is None else agent).name
        key = (program, FaultPlan.of(plan), world_size, rate, transport, agent)
        if key not in self._remembered:
            self._remembered[key] = self.run_anew(
                program, plan, world_size=world_size, clock=rate, transport=transport, agent=agent
            )
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]

    def _rate_of(self, program: Program, clock: ClockChoice | None) -> float:
        rate = self.server.rate_of(clock)
        if program.rpc_timeout is None or program.rpc_timeout >= rate * _REAL_SECONDS:
            return rate
        return max(1.0, program.rpc_timeout / _REAL_SECONDS)

    def run_anew(  # noqa: C901 - the life of a run, in its order
        self,
        program: Program,
        plan: FaultPlan | FaultTable | None = None,
        *,
        world_size: int | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
        agent: str | None = None,
    ) -> Outcome:
        """As :meth:`run`, but without the memory."""
        _check(program, plan, world_size, transport)
        faults = FaultPlan.of(plan)
        size = program.world_size if world_size is None else world_size
        if size < program.world_size:
            msg = f"world_size={shown(size)}, but the program needs {program.world_size} ranks."
            raise UsageError(msg)
        threads = threads_of(program)
        cluster = self.server.make_cluster(
            *modules_of(program.leaves),
            world_size=size,
            faults=faults,
            clock=self._rate_of(program, clock),
            transport=transport,
            rpc_timeout=_A_DAY if program.rpc_timeout is None else program.rpc_timeout,
            num_worker_threads=threads.number,
            shutdown_faults=True,
            agent=self.server.agent if agent is None else agent,
        )
        cluster.program = program
        cluster.take_time(threads.lasts if threads.are_few else program.lasts)
        facts = facts_of(cluster.torch_version)
        prediction = predict_in(program, faults, size, facts)
        steps: list[StepOutcome] = []
        contexts: dict[str, int] = {}

        def as_expected(seen: StepOutcome) -> bool:
            # After a failed step, the next steps would be judged for its failure.
            follows = chosen(prediction, [*steps, seen], facts)
            return seen.ended and is_expected(follows.steps[seen.index].error, seen.error, facts)

        try:
            cluster.start()
            for first, step in program.numbered:
                if cluster.has_found:
                    break
                if isinstance(step, Settle):
                    expected = chosen(prediction, steps, facts).steps[first]
                    held = cluster.settle_to(expected.counters, expected.failures, expected.calls)
                    steps.append(StepOutcome(first, counters=held))
                    continue
                seen = run_step(cluster, first, step, contexts, as_expected)
                steps += seen
                if not all(as_expected(outcome) for outcome in seen):
                    if not cluster.has_found:
                        cluster.look()
                    break
            else:
                prediction = chosen(prediction, steps, facts)
                # Without a graceful shutdown, only a settle shows the effects of the last step.
                settles = program.settles or not prediction.graceful
                if settles and not cluster.has_found:
                    cluster.settle_to(prediction.counters, prediction.retried, prediction.calls)
                elif not cluster.has_found:
                    cluster.look()
                if not cluster.has_found and prediction.graceful:
                    cluster.shutdown()
        finally:
            cluster.kill()
        return replace(cluster.outcome, steps=tuple(steps))


def _check(program: object, plan: Any, world_size: object, transport: object) -> None:
    if not isinstance(program, Program):
        msg = (
            f"{argument('program', program)} must be a Program, such as "
            f"Program(2, (Remote(0, 1, 'a'), Fetch(0, 'a')))."
        )
        raise UsageError(msg)
    FaultPlan.of(plan)
    if world_size is not None:
        check_world_size(world_size)
    check_transport(transport)


def run_step(
    cluster: Cluster,
    first: int,
    step: Step,
    contexts: dict[str, int],
    goes_on: Callable[[StepOutcome], bool],
) -> list[StepOutcome]:
    """Run a step that is no Settle; branches run at the same time. `first` numbers its first leaf.

    A branch ends early after a leaf whose `goes_on` is false. The ids of the new contexts are
    recorded in `contexts`, by name.
    """
    numbers = itertools.count(first)
    numbered = [[(next(numbers), leaf) for leaf in branch] for branch in step.at_once]
    seen = cluster.run_branches(numbered, contexts, goes_on)
    leaves = dict(itertools.chain(*numbered))
    for outcome in seen:
        contexts |= leaves[outcome.index].context_ids(outcome.value)
    return seen


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
    """Let :func:`run` use this server, so that the process has only one."""
    global _default
    _default = Runner(server)


def run(
    program: Program,
    plan: FaultPlan | FaultTable | None = None,
    *,
    world_size: int | None = None,
    clock: ClockChoice | None = None,
    transport: Transport = "tcp",
    agent: str | None = None,
) -> Outcome:
    """Run `program` on fresh ranks of real torch under `plan`, and return what it showed.

    The same arguments give the remembered outcome of the first run. :func:`rpcprops.judge` says
    which promises the outcome breaks.

    Args:
        world_size: number of ranks, the program's own unless given; more leave some idle.
        clock: "auto" (fast where this machine can), "real", or a rate. A program with a short
            `rpc_timeout` runs at a slower one, for its messages need some real time.
        transport: "tcp" or "shm".
        agent: the RPC agent of the ranks, by its name in :mod:`rpcprops.agents`, such as "wire";
            torch's faulty one unless given.

    Raises:
        UsageError: an argument is out of its range, or the plan does not fit this world or agent.
        MachineCannot: torch cannot be imported, or this machine cannot give the clock's rate.
    """
    # Check this before a server starts, which takes seconds.
    _check(program, plan, world_size, transport)
    return default_runner().run(
        program, plan, world_size=world_size, clock=clock, transport=transport, agent=agent
    )
