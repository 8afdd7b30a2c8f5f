"""Runs programs under plans: ``run(program, plan) -> Outcome``."""

from __future__ import annotations

import atexit
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rpcprops import agents
from rpcprops._given import argument, shown
from rpcprops._json import to_json
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.cluster.options import (
    A_DAY,
    ClockChoice,
    Transport,
    check_reuse,
    check_transport,
)
from rpcprops.cluster.reuse import has_refusal, may_reuse
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import Prediction, chosen, is_expected, judge, lost_seconds, predict_in
from rpcprops.outcomes import Outcome, StepOutcome, Violation
from rpcprops.programs import ENOUGH_THREADS, Program, Settle, Step, check_world_size
from rpcprops.programs.threads import threads_of
from rpcprops.steps.in_rank.lookup import modules_of
from rpcprops.torch_facts import facts_of

_REMEMBERED = 2048
#: Real seconds that a program's `rpc_timeout` leaves each message at the least. Where the clock is
#: faster, the program runs at a slower rate, because that is the time of a busy machine. A message
#: that takes longer still shows a timeout that slower runs do not confirm.
_REAL_SECONDS = 0.75


@dataclass(frozen=True, slots=True)
class FailedInUse:
    """A failure in a used world that a new world did not show: nobody can tell what it means.

    Attributes:
        after: the last programs that the world ran before, with their plans, the oldest first.
    """

    program: Program
    plan: FaultPlan
    violations: tuple[Violation, ...]
    after: tuple[tuple[Program, FaultPlan], ...]

    def again(self, runner: Runner, **options: Any) -> tuple[Violation, ...]:
        """Run the programs in one world again, in their order; what the last one breaks there.

        Args:
            runner: one whose server has no world that is kept.
            options: as for :func:`run`, but for `reuse`.
        """
        for program, plan in self.after:
            runner.run_anew(program, plan, reuse=True, **options)
        before = len(runner.failed_in_use)
        runner.run_anew(self.program, self.plan, reuse=True, **options)
        return tuple(v for one in runner.failed_in_use[before:] for v in one.violations)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON data."""
        ran = (*self.after, (self.program, self.plan))
        return {
            "violations": [str(violation) for violation in self.violations],
            "ran": [{"program": to_json(program), "plan": to_json(plan)} for program, plan in ran],
        }

    def __str__(self) -> str:
        """In one line; `repr` has all programs as Python."""
        number = len(self.after)
        programs = f"{number} program{'s' if number > 1 else ''}"
        return (
            f"undecided: only in a world that had run {programs} before: "
            f"{'; '.join(map(str, self.violations))} under {self.plan!r}"
        )


class Runner:
    """Runs programs on one server, and remembers each outcome.

    With memory, a run is a function of its arguments, as Hypothesis expects of a test: a case that
    fails only sometimes keeps its first outcome (how often it fails again is measured separately,
    with :meth:`run_anew`).

    Attributes:
        worlds: how many runs had a "new" world and how many a "used" one, how many worlds were
            "kept" afterwards, and by the reason how many were not although they might have been.
        failed_in_use: failures of used worlds that new worlds did not show.
    """

    def __init__(self, server: ClusterServer) -> None:
        self.server = server
        self.worlds: Counter[str] = Counter()
        self.failed_in_use: list[FailedInUse] = []
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
        reuse: bool | None = None,
    ) -> Outcome:
        """As :func:`rpcprops.run`."""
        _check(program, plan, world_size, transport)
        rate = self._rate_of(program, clock)
        agent = agents.named(self.server.agent if agent is None else agent).name
        reuse = self._reuses(reuse, agent)
        key = (program, FaultPlan.of(plan), world_size, rate, transport, agent, reuse)
        if key not in self._remembered:
            self._remembered[key] = self.run_anew(
                program,
                plan,
                world_size=world_size,
                clock=rate,
                transport=transport,
                agent=agent,
                reuse=reuse,
            )
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]

    def _rate_of(self, program: Program, clock: ClockChoice | None) -> float:
        rate = self.server.rate_of(clock)
        if program.rpc_timeout is None or program.rpc_timeout >= rate * _REAL_SECONDS:
            return rate
        return max(1.0, program.rpc_timeout / _REAL_SECONDS)

    def _reuses(self, reuse: bool | None, agent: str | None) -> bool:
        if reuse is None:
            return self.server.reuse
        name = agents.named(self.server.agent if agent is None else agent).name
        return check_reuse(reuse, name)

    def run_anew(
        self,
        program: Program,
        plan: FaultPlan | FaultTable | None = None,
        *,
        world_size: int | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
        agent: str | None = None,
        reuse: bool | None = None,
    ) -> Outcome:
        """As :meth:`run`, but without the memory."""
        _check(program, plan, world_size, transport)
        faults = FaultPlan.of(plan)
        size = program.world_size if world_size is None else world_size
        if size < program.world_size:
            msg = f"world_size={shown(size)}, but the program needs {program.world_size} ranks."
            raise UsageError(msg)

        def run(*, reuse: bool) -> _Run:
            cluster = self.server.make_cluster(
                *modules_of(program.leaves),
                world_size=size,
                faults=faults,
                clock=self._rate_of(program, clock),
                transport=transport,
                names=program.names(size),
                rpc_timeout=A_DAY if program.rpc_timeout is None else program.rpc_timeout,
                num_worker_threads=program.num_worker_threads or ENOUGH_THREADS,
                shutdown_faults=True,
                init=not program.founds_group,
                agent=self.server.agent if agent is None else agent,
            )
            return _run_in(cluster, program, faults, size, reuse=reuse)

        first = run(reuse=self._reuses(reuse, agent))
        if not first.may_reuse:
            return first.outcome
        self.worlds["used" if first.was_used else "new"] += 1
        self.worlds["kept" if first.stays else first.why] += 1
        if first.is_conclusive:
            return first.outcome
        # Only a new world, whose ranks shut RPC down as torch says, can show a failure.
        again = run(reuse=False)
        if first.violations and not judge(program, faults, again.outcome):
            failed = FailedInUse(program, faults, first.violations, first.ran_before)
            self.failed_in_use.append(failed)
        return again.outcome


@dataclass(slots=True)
class _Run:
    """One run of a program in a world.

    Attributes:
        outcome: what it showed, at its end.
        may_reuse: whether it may have been a kept world, and may be one now.
        was_used: whether it was.
        stays: whether it is.
        why: why it is not.
        shows_nothing: whether the run was cut off because the world could not stay.
        violations: what the outcome breaks, where that was asked for.
        ran_before: the last programs of the world before this one, with their plans.
    """

    outcome: Outcome = field(default_factory=lambda: Outcome(0))
    may_reuse: bool = False
    was_used: bool = False
    stays: bool = False
    why: str = ""
    shows_nothing: bool = False
    violations: tuple[Violation, ...] = ()
    ran_before: tuple[tuple[Program, FaultPlan], ...] = ()

    def end(self, cluster: Cluster, program: Program, steps: list[StepOutcome]) -> None:
        """Let the ranks shut RPC down; or let them stay, if they may."""
        if cluster.may_reuse and not has_refusal(program, steps):
            self.why = cluster.stay()
        else:
            cluster.shutdown()

    def decide(self, cluster: Cluster, program: Program, steps: list[StepOutcome]) -> None:
        """Decide whether the world of a run that may be kept is kept."""
        self.was_used, self.ran_before = cluster.is_used, cluster.ran_before
        self.shows_nothing = bool(self.why)
        if not self.shows_nothing:
            so_far = replace(cluster.outcome, steps=tuple(steps))
            self.violations = judge(program, cluster.plan, so_far)
            if self.violations:
                cluster.stays = False
            if not cluster.stays:
                self.why = "a promise was broken" if self.violations else "a value was refused"
        self.stays = cluster.stays

    @property
    def is_conclusive(self) -> bool:
        """Whether its outcome counts."""
        return not self.shows_nothing and not (self.violations and self.was_used)


def _run_in(  # noqa: C901 - the life of a run, in its order
    cluster: Cluster, program: Program, plan: FaultPlan, size: int, *, reuse: bool
) -> _Run:
    """Run a program in a world; with `reuse` perhaps in a used one, which may go on."""
    cluster.program = program
    threads = threads_of(program)
    lasts = threads.lasts if threads.are_few else program.lasts
    facts = facts_of(cluster.torch_version)
    prediction = predict_in(program, plan, size, facts)
    cluster.take_time(lasts + _in_vain(program, prediction) + lost_seconds(program, plan))
    cluster.may_reuse = reuse and may_reuse(program, plan, cluster.options.agent, prediction)
    steps: list[StepOutcome] = []
    contexts: dict[str, int] = {}
    run = _Run(may_reuse=cluster.may_reuse)

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
                run.end(cluster, program, steps)
        if cluster.may_reuse:
            run.decide(cluster, program, steps)
    finally:
        cluster.kill()
    run.outcome = replace(cluster.outcome, steps=tuple(steps))
    return run


def _in_vain(program: Program, prediction: Prediction) -> float:
    """Virtual seconds for which steps wait that meet timeout-needs-thread: as long as they can."""
    met = {one.step for one in prediction.met if one.finding == "timeout-needs-thread"}
    return sum(getattr(program.leaves[step], "patience", 0.0) for step in met if step is not None)


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
    reuse: bool | None = None,
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
        reuse: whether ranks may have run other programs before: only with ``agent="wire"``, and
            only if these have provably left them as they were. What fails in such ranks is run
            again in fresh ones, and their outcome is returned. None is what the server was made
            with, which is False for the default one.

    Raises:
        UsageError: an argument is out of its range, or the plan does not fit this world or agent.
        MachineCannot: torch cannot be imported, or this machine cannot give the clock's rate.
    """
    # Check this before a server starts, which takes seconds.
    _check(program, plan, world_size, transport)
    return default_runner().run(
        program,
        plan,
        world_size=world_size,
        clock=clock,
        transport=transport,
        agent=agent,
        reuse=reuse,
    )
