"""Runs programs under plans: ``run(program, plan) -> Outcome``."""

from __future__ import annotations

import atexit
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rpcprops import agents
from rpcprops._given import argument, shown
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.cluster.options import (
    A_DAY,
    ClockChoice,
    Transport,
    check_reuse,
    check_transport,
)
from rpcprops.cluster.rates import DEFAULT_RATE, REUSED_RATE
from rpcprops.cluster.reuse import has_refusal, may_reuse, rests_on_time
from rpcprops.confirmation import is_decided
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import (
    Prediction,
    are_kept,
    chosen,
    is_expected,
    judge,
    lost_seconds,
    predict_in,
    seconds_in_vain,
)
from rpcprops.outcomes import Counters, Outcome, StepOutcome, Violation
from rpcprops.programs import ENOUGH_THREADS, Program, Settle, Step, check_world_size
from rpcprops.programs.threads import threads_of
from rpcprops.steps.in_rank.lookup import modules_of
from rpcprops.torch_facts import facts_of

_REMEMBERED = 2048
#: Real seconds that the timeouts of a program leave each message at the least. Where the clock is
#: faster, the program runs at a slower rate, because that is the time of a busy machine. A message
#: that takes longer still shows a timeout that slower runs do not confirm.
_REAL_SECONDS = 0.75


#: Programs with their plans, in the order in which they ran in one world.
Ran = tuple[tuple[Program, FaultPlan], ...]


@dataclass(frozen=True, slots=True)
class FailedInUse:
    """A failure in a used world that fresh ranks did not show: nobody can tell what it means.

    Attributes:
        outcome: what that world showed.
        after: the programs that the world had run before, with their plans, the oldest first. If
            there are none, the world was new, and only its clock rate differed.
    """

    program: Program
    plan: FaultPlan
    violations: tuple[Violation, ...]
    outcome: Outcome
    after: Ran

    def __str__(self) -> str:
        """In one line; `repr` has all programs as Python."""
        number = len(self.after)
        programs = f"{number} program{'s' if number > 1 else ''}"
        world = f"a world that had run {programs} before" if number else "a world at a faster rate"
        return f"only in {world}: {'; '.join(map(str, self.violations))} under {self.plan!r}"


@dataclass(frozen=True, slots=True)
class RunAfter:
    """What a program showed in a world in which other programs ran before it.

    Attributes:
        outcome: what it showed; without steps if the programs could not run in one world.
        violations: what that breaks.
        why_not: why they could not all run in one world; empty if they did.
    """

    outcome: Outcome
    violations: tuple[Violation, ...] = ()
    why_not: str = ""


class Runner:
    """Runs programs on one server, and remembers each outcome.

    With memory, a run is a function of its arguments, as Hypothesis expects of a test: a case that
    fails only sometimes keeps its first outcome (how often it fails again is measured separately,
    with :meth:`run_anew`).

    Attributes:
        worlds: how many runs had a "new" world and how many a "used" one, how many worlds were
            "kept" afterwards, and by the reason how many were not although they might have been.
        failed_in_use: failures of used worlds that fresh ranks did not show.
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
        rate = self.rate_of(program, clock)
        agent = agents.named(self.server.agent if agent is None else agent).name
        reuse = self._reuses(reuse, agent)
        key = (program, FaultPlan.of(plan), world_size, rate, transport, agent, reuse)
        if key not in self._remembered:
            self._remembered[key] = self.run_anew(
                program,
                plan,
                world_size=world_size,
                clock=clock,
                transport=transport,
                agent=agent,
                reuse=reuse,
            )
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return self._remembered[key]

    def rate_of(self, program: Program, clock: ClockChoice | None = None) -> float:
        """The rate at which a program runs: slower where its timeout is short."""
        rate = self.server.rate_of(clock)
        timeouts = (program.rpc_timeout, program.end.timeout)
        shortest = min((one for one in timeouts if one is not None), default=math.inf)
        if shortest >= rate * _REAL_SECONDS:
            return rate
        return max(1.0, shortest / _REAL_SECONDS)

    def _reused_rate(
        self,
        program: Program,
        plan: FaultPlan,
        size: int,
        clock: ClockChoice | None,
        agent: str,
        *,
        reuse: bool | None,
    ) -> float | None:
        """The rate of a program in a world that may be used again; None if it needs a new world.

        It is a faster one where no verdict rests on a time.
        """
        if not self._reuses(reuse, agent):
            return None
        prediction = predict_in(program, plan, size, facts_of(self.server.torch_version))
        if not may_reuse(program, plan, agent, prediction):
            return None
        rate = self.rate_of(program, clock)
        by_default = clock in (None, "auto") and self.server.clock == "auto"
        if not by_default or rate != DEFAULT_RATE or rests_on_time(program, prediction):
            return rate
        try:
            return self.server.rate_of(REUSED_RATE)
        except MachineCannot:
            return rate

    def _reuses(self, reuse: bool | None, agent: str | None) -> bool:
        name = agents.named(self.server.agent if agent is None else agent).name
        if reuse is None:
            return self.server.reuse and name == WIRE
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
        size = _size(program, world_size)
        agent = agents.named(self.server.agent if agent is None else agent).name
        rate = self.rate_of(program, clock)
        fast = self._reused_rate(program, faults, size, clock, agent, reuse=reuse)
        if fast is None:
            return self._run_once(program, faults, size, rate, transport, agent).outcome
        first = self._run_once(program, faults, size, fast, transport, agent, reuse=True)
        if first.is_conclusive and not (first.violations and fast > rate):
            return first.outcome
        # Only fresh ranks at the usual rate, which shut RPC down as torch says, can show a failure.
        again = self._run_once(program, faults, size, rate, transport, agent).outcome
        if first.violations and not judge(program, faults, again):
            if any(is_decided(violation, first.outcome) for violation in first.violations):
                failed = FailedInUse(
                    program, faults, first.violations, first.outcome, first.ran_before
                )
                self.failed_in_use.append(failed)
            else:
                # As where a rate is too fast for a busy machine, the other run decides.
                self.worlds["too late to tell"] += 1
        return again

    def run_after(
        self,
        before: Ran,
        program: Program,
        plan: FaultPlan,
        *,
        world_size: int | None = None,
        clock: ClockChoice | None = None,
        transport: Transport = "tcp",
        agent: str | None = None,
    ) -> RunAfter:
        """Run programs in one world, in their order, and last of all `program`.

        Arguments and exceptions are those of :func:`run`; the agent must be one whose ranks can be
        used again.
        """
        agent = agents.named(self.server.agent if agent is None else agent).name
        self._reuses(reuse=True, agent=agent)
        self.server.servers.kept.close()
        run = _Run()
        for number, (one, faults) in enumerate((*before, (program, plan))):
            size = _size(one, world_size)
            rate = self._reused_rate(one, faults, size, clock, agent, reuse=True)
            if rate is None:
                return RunAfter(run.outcome, why_not=f"program {number + 1}: it needs a new world")
            run = self._run_once(one, faults, size, rate, transport, agent, reuse=True)
            is_last = number == len(before)
            if run.was_used != (number > 0) or run.shows_nothing or not (is_last or run.stays):
                why = run.why or "the world had ended"
                return RunAfter(run.outcome, why_not=f"program {number + 1}: {why}")
        return RunAfter(run.outcome, run.violations)

    def _run_once(
        self,
        program: Program,
        plan: FaultPlan,
        size: int,
        rate: float,
        transport: Transport,
        agent: str,
        *,
        reuse: bool = False,
    ) -> _Run:
        """Run a program once; with `reuse` perhaps in a used world, which may go on."""
        cluster = self.make_cluster(program, plan, size, rate, transport, agent)
        run = _run_in(cluster, program, plan, size, reuse=reuse)
        if reuse:
            self.worlds["used" if run.was_used else "new"] += 1
            self.worlds["kept" if run.stays else run.why] += 1
        return run

    def make_cluster(
        self,
        program: Program,
        plan: FaultPlan,
        size: int,
        rate: float,
        transport: Transport,
        agent: str,
    ) -> Cluster:
        """The cluster in which a program runs. Its ranks are not forked yet."""
        return self.server.make_cluster(
            *modules_of(program.leaves),
            world_size=size,
            faults=plan,
            clock=rate,
            transport=transport,
            names=program.names(size),
            rpc_timeout=A_DAY if program.rpc_timeout is None else program.rpc_timeout,
            num_worker_threads=program.num_worker_threads or ENOUGH_THREADS,
            shutdown_faults=True,
            init=not program.founds_group,
            agent=agent,
        )


def _size(program: Program, world_size: int | None) -> int:
    """The number of ranks.

    Raises:
        UsageError: the program needs more.
    """
    size = program.world_size if world_size is None else world_size
    if size < program.world_size:
        msg = f"world_size={shown(size)}, but the program needs {program.world_size} ranks."
        raise UsageError(msg)
    return size


@dataclass(slots=True)
class _Run:
    """One run of a program in a world.

    Attributes:
        outcome: what it showed, at its end.
        was_used: whether it was.
        stays: whether it is.
        why: why it is not.
        shows_nothing: whether the run was cut off because the world could not stay.
        violations: what the outcome breaks, where that was asked for.
        ran_before: the programs of the world before this one, with their plans.
    """

    outcome: Outcome = field(default_factory=lambda: Outcome(0))
    was_used: bool = False
    stays: bool = False
    why: str = ""
    shows_nothing: bool = False
    violations: tuple[Violation, ...] = ()
    ran_before: Ran = ()

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
    lasts += seconds_in_vain(program, prediction.met) + lost_seconds(program, plan)
    cluster.take_time(lasts)
    cluster.may_reuse = reuse
    steps: list[StepOutcome] = []
    contexts: dict[str, int] = {}
    stuck = prediction.stuck.intersection(*(one.stuck for one in prediction.alternatives))
    run = _Run()

    def as_expected(seen: StepOutcome) -> bool:
        # After a failed step, the next steps would be judged for its failure.
        follows = chosen(prediction, [*steps, seen], facts)
        return seen.ended and is_expected(follows.steps[seen.index].error, seen.error, facts)

    try:
        cluster.start()
        for first, branches, step in _parts(program, prediction, together=reuse):
            if cluster.has_found:
                break
            if isinstance(step, Settle):
                follows = chosen(prediction, steps, facts)
                expected = follows.steps[first]
                held = cluster.settle_to(
                    expected.counters,
                    expected.failures,
                    expected.calls,
                    _kept_by(follows, first, expected.counters, cluster.names),
                )
                steps.append(StepOutcome(first, counters=held))
                continue
            together = len(step.leaves) == 1
            seen = _run_branches(
                *(cluster, first, branches, contexts, as_expected),
                together=together,
                stuck=stuck,
            )
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
                cluster.settle_to(
                    prediction.counters,
                    prediction.retried,
                    prediction.calls,
                    _kept_by(prediction, None, prediction.counters, cluster.names),
                )
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


def _kept_by(
    prediction: Prediction, step: int | None, wanted: Sequence[Counters], names: Sequence[str]
) -> Callable[[Sequence[Counters]], bool] | None:
    """What says whether findings make ranks keep what they hold; None if they keep nothing."""
    if not any(one.breaks for one in prediction.met):
        return None
    return lambda held: are_kept(prediction.met, step, held, wanted, names)


def _parts(
    program: Program, prediction: Prediction, *, together: bool
) -> Iterator[tuple[int, Sequence[Sequence[Step]], Step]]:
    """What runs one after another: the number of its first leaf, its branches, its first step.

    With `together` consecutive steps of one rank are one branch, if none but the last must raise.
    """
    together = together and not prediction.alternatives
    first, branch = 0, list[Step]()
    for number, step in program.numbered:
        is_next = (
            together
            and branch
            and step.leaves == (step,)
            and not isinstance(step, Settle)
            and step.at == branch[-1].at
            and not prediction.steps[number - 1].error
        )
        if is_next:
            branch.append(step)
            continue
        if branch:
            yield first, (branch,), branch[0]
        first, branch = number, []
        if step.leaves == (step,) and not isinstance(step, Settle):
            branch = [step]
        else:
            yield number, step.at_once, step
    if branch:
        yield first, (branch,), branch[0]


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
    return _run_branches(cluster, first, step.at_once, contexts, goes_on)


def _run_branches(
    cluster: Cluster,
    first: int,
    branches: Sequence[Sequence[Step]],
    contexts: dict[str, int],
    goes_on: Callable[[StepOutcome], bool],
    *,
    together: bool = False,
    stuck: Collection[int] = (),
) -> list[StepOutcome]:
    numbers = itertools.count(first)
    numbered = [[(next(numbers), leaf) for leaf in branch] for branch in branches]
    seen = cluster.run_branches(numbered, contexts, goes_on, together=together, stuck=stuck)
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
            only if these have provably left them as they were. Their clock may be faster than
            usual. What fails in such ranks is run again in fresh ones at the usual rate, and their
            outcome is returned. None is what the server was made
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
