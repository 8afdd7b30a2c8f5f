"""A Hypothesis state machine over a live cluster: the steps of programs as rules.

::

    class Counting(ClusterMachine):
        world_size = 3
        faults = strategies.fault_plans(world_size=3)

        @rule()
        def count(self):
            assert self.cluster.on(0).call(my_function) == 3


    TestCounting = Counting.TestCase

Each rule draws one step that may follow the earlier ones, runs it on the ranks, and compares the
result with the oracle's prediction. At the end the ranks settle and shut down, and the whole run is
judged.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hypothesis import event, reject
from hypothesis import strategies as st
from hypothesis.control import current_build_context
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from rpcprops import runner as runners
from rpcprops._given import items, shown
from rpcprops._misuse import at_once
from rpcprops.cluster import Cluster
from rpcprops.cluster.options import A_DAY, ClockChoice, Transport, check_counts
from rpcprops.confirmation import Sight, confirm
from rpcprops.errors import HarnessError, UsageError, note_own
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import (
    Prediction,
    account,
    fired_by_type,
    is_expected,
    judge,
    predict,
    set_apart,
)
from rpcprops.oracle.ranks import unsettled
from rpcprops.outcomes import Counters, Outcome, StepOutcome, Violation
from rpcprops.programs import STEP_TYPES, Program, Settle, Step
from rpcprops.properties import broken_promise
from rpcprops.report.artefact import Artefact, write_or_say
from rpcprops.report.text import describe_plan, describe_violations, replay_line
from rpcprops.steps.in_rank.lookup import modules_of
from rpcprops.strategies.drawing import KINDS, PARALLEL, StepDrawer, checked_kinds
from rpcprops.torch_facts import facts_of

#: Promises that do not depend on what the program has done so far.
_ALWAYS = ("RankDied", "RankHung")
#: Promises of what ranks hold when all has settled.
_HELD = ("RRefLeak", "ContextLeak", "CallLeak")


def _is_of_a_step(violation: Violation) -> bool:
    """Whether a violation is of a step, or breaks a promise that holds at any time."""
    return violation.step is not None or violation.promise in _ALWAYS


class ClusterMachine(RuleBasedStateMachine):
    """Steps of programs as rules over one live cluster; subclass it, and add rules of your own.

    A rule of yours runs code on the ranks through :attr:`cluster`. If it holds something there
    while other rules run, :meth:`held` must say so, and :meth:`let_go` must drop it.

    Attributes:
        world_size: number of ranks, 1 to 16.
        faults: a plan, a table for every rank, or a strategy that draws either.
        clock: as for :meth:`rpcprops.ClusterServer.cluster`; None is the server's.
        transport: "tcp" or "shm".
        agent: the RPC agent of the ranks, by its name in :mod:`rpcprops.agents`, such as "wire";
            None is the server's.
        rpc_timeout: the timeout of all that the ranks send and for which no step names one, in
            virtual seconds: of what your own rules send, too. None: a day, which nothing reaches.
            A message that a fault loses is noticed only by a timeout.
        kinds: the kinds of step that are rules, by their ``op``, "parallel" among them; None: all.
    """

    world_size: ClassVar[int] = 2
    faults: ClassVar[Any] = None
    clock: ClassVar[ClockChoice | None] = None
    transport: ClassVar[Transport] = "tcp"
    agent: ClassVar[str | None] = None
    rpc_timeout: ClassVar[float | None] = None
    kinds: ClassVar[Iterable[str] | None] = None

    _asked: ClassVar[tuple[str, ...]] = checked_kinds(None, parallel=True)
    #: Promises whose violation real time has shown, and the file of the last failure.
    _confirmed: ClassVar[set[str]] = set()
    #: Runs that failed once and that slower clocks did not show: they are not tried again.
    _doubted: ClassVar[set[tuple[Program, FaultPlan, str]]] = set()
    #: Runs whose slower runs failed because of a bug of ours, with the error.
    _unasked: ClassVar[dict[tuple[Program, FaultPlan, str], HarnessError]] = {}
    _written: ClassVar[Path | None] = None
    #: Runs that real time has shown, and the file of the last of them.
    _shown: ClassVar[set[tuple[Program, FaultPlan, str]]] = set()
    _kept: ClassVar[Path | None] = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._confirmed, cls._doubted, cls._unasked, cls._written = set(), set(), {}, None
        cls._shown, cls._kept = set(), None
        cls._asked = checked_kinds(cls.kinds, parallel=True)
        Program(1, (), rpc_timeout=cls.rpc_timeout)  # checks it
        for kind in cls._asked:
            if not hasattr(cls, f"step_{kind}"):
                # A kind that is not drawn by default.
                setattr(cls, f"step_{kind}", _rule(kind))

    def __init__(self) -> None:
        super().__init__()
        self._runner = runners.default_runner()
        self._plan = FaultPlan()
        self._drawer: StepDrawer | None = None
        self._cluster: Cluster | None = None
        self._seen: list[StepOutcome] = []
        self._contexts: dict[str, int] = {}
        self._shared = False  # whether a rule of the user's has used the cluster

    # What users see.

    @property
    def cluster(self) -> Cluster:
        """The live cluster, for rules of your own."""
        self._shared = True
        return self._running()

    @property
    def plan(self) -> FaultPlan:
        """The faults of this run."""
        return self._plan

    @property
    def program(self) -> Program:
        """The steps that have run so far."""
        steps = () if self._drawer is None else tuple(self._drawer.steps)
        return Program(self.world_size, steps, type(self).__name__, rpc_timeout=self.rpc_timeout)

    def held(self) -> Sequence[Counters]:
        """What your own rules hold now, by rank; nothing by default."""
        return ()

    def let_go(self) -> None:
        """Called when all rules have passed: drop what your own rules still hold."""

    # Life.

    @property
    def _draws_faults(self) -> bool:
        return isinstance(type(self).faults, st.SearchStrategy)

    def _plans(self) -> st.SearchStrategy[Any]:
        given: Any = type(self).faults
        return given if self._draws_faults else st.just(given)

    @initialize(faults=st.runner().flatmap(lambda machine: machine._plans()))  # noqa: SLF001 - its own
    def start(self, faults: FaultPlan | FaultTable | None) -> None:
        """Fork the ranks of a world under these faults, and let them join.

        Raises:
            UsageError: an attribute of the class, or a plan that was drawn, cannot be. Hypothesis
                then ends the test.
        """
        try:
            self._start(faults)
        except UsageError as misuse:
            raise self._misused(misuse) from misuse.__cause__

    def _start(self, faults: FaultPlan | FaultTable | None) -> None:
        self._plan = FaultPlan.of(faults)
        # Short timeouts of code that nobody predicts would choose a slower clock.
        self._drawer = StepDrawer(
            _no_draw, self.world_size, kinds=self._asked, plan=self._plan, gives_up=False
        )
        clock = self.clock
        if self.rpc_timeout is not None:
            # What is drawn does not let it come where no step and no fault asks for it.
            self._drawer.rpc_timeout = self.rpc_timeout
            clock = self._runner.rate_of(self.program, clock)
        self._cluster = self._runner.server.make_cluster(
            type(self).__module__,
            *modules_of(STEP_TYPES[kind] for kind in self._asked),
            world_size=self.world_size,
            faults=self._plan,
            clock=clock,
            transport=self.transport,
            rpc_timeout=A_DAY if self.rpc_timeout is None else self.rpc_timeout,
            shutdown_faults=True,
            agent=self._runner.server.agent if self.agent is None else self.agent,
        )
        self._cluster.start()
        if self._cluster.has_found:
            self._broken(judge(None, self._plan, self._cluster.outcome))
        # Refuses faults under which no program is predicted.
        self._predicted_or_rejected(self.program, is_drawn=self._draws_faults)

    def teardown(self) -> None:
        """Settle, shut down gracefully and judge the run; if it has failed, kill the ranks."""
        __tracebackhide__ = True
        cluster = self._cluster
        if cluster is None:
            return
        try:
            if sys.exc_info()[0] is None:
                self.let_go()
                self._finish(cluster)
        finally:
            cluster.kill()

    def _finish(self, cluster: Cluster) -> None:
        __tracebackhide__ = True
        prediction = self._predicted(self.program)
        wanted = self._with_held(prediction.counters)
        held = cluster.settle_to(wanted, prediction.retried, prediction.calls)
        found = unsettled(held, wanted, cluster.names)
        if not cluster.has_found and prediction.graceful:
            cluster.shutdown()
        cluster.kill()
        outcome = self._outcome()
        ours = self._tell_fired(outcome)
        judged = self._judged_at_end(outcome)
        found += [v for v in judged if v not in found]
        if found:
            self._broken(tuple(found), ours)
        if ours is not None:
            raise ours

    def _tell_fired(self, outcome: Outcome) -> HarnessError | None:
        """Tell Hypothesis which faults fired; the error of ours by which that is not known."""
        try:
            fired = fired_by_type(account(self.program, self._plan, outcome))
        except HarnessError as own:
            return own
        for name, count in fired.items():
            event(f"fired {name}", count)
        return None

    def _judged_at_end(self, outcome: Outcome) -> tuple[Violation, ...]:
        if not self._shared:
            return judge(self.program, self._plan, outcome)
        # The user's own calls also fail, and hold things that the program does not know; nor does
        # it know their messages, where the agent records them.
        outcome = replace(outcome, messages=())
        judged = self._judged_unsettled(self.program, outcome)
        # It has settled all the same, so no call of the program may be missing.
        settled = judge(self.program, self._plan, outcome)
        return judged + tuple(v for v in settled if v.promise == "NotRunOnce" and v not in judged)

    # Steps.

    def _running(self) -> Cluster:
        if self._cluster is None:
            msg = "the ranks start in the machine's first rule; use the cluster in a @rule."
            raise UsageError(msg)
        return self._cluster

    def _may(self, kind: str) -> bool:
        return self._drawer is not None and kind in self._asked and self._drawer.may(kind)

    def _run(self, steps: Sequence[Step]) -> None:
        """Run steps that were just drawn, which are the last ones of the program."""
        __tracebackhide__ = True
        cluster = self._running()
        program = self.program
        prediction = self._predicted_or_rejected(program, is_drawn=True)
        facts = facts_of(cluster.torch_version)
        cluster.take_time(program.lasts)
        for step in steps:
            first = len(self._seen)
            if isinstance(step, Settle):
                predicted = prediction.steps[first]
                wanted = self._with_held(predicted.counters)
                seen = cluster.settle_to(wanted, predicted.failures, predicted.calls)
                # The program does not count what the user's own rules hold.
                self._seen.append(
                    StepOutcome(first, counters=predicted.counters if seen == wanted else seen)
                )
            else:
                self._seen += runners.run_step(
                    cluster,
                    first,
                    step,
                    self._contexts,
                    lambda seen: is_expected(prediction.steps[seen.index].error, seen.error, facts),
                )
            self._check(program)

    def _check(self, program: Program) -> None:
        """Raise the first violation of the steps so far, at once."""
        __tracebackhide__ = True
        outcome = self._outcome()
        # What remains after the last step, how often calls ran and which messages there were is
        # judged at the end.
        found = tuple(filter(_is_of_a_step, self._judged_unsettled(program, outcome)))
        if found:
            self._broken(found)

    def _judged_unsettled(self, program: Program, outcome: Outcome) -> tuple[Violation, ...]:
        """What a run breaks, apart from what only a settle after the last step shows.

        Under a fault that loses a message, no program is predicted that does not settle: its
        shutdown could come before the timeout. Then only what the ranks hold last is left out.
        """
        try:
            return judge(replace(program, settles=False), self._plan, outcome)
        except UsageError:
            judged = judge(program, self._plan, outcome)
            return tuple(v for v in judged if v.step is not None or v.promise not in _HELD)

    def _predicted(self, program: Program) -> Prediction:
        return predict(program, self._plan, facts_of(self._running().torch_version))

    def _predicted_or_rejected(self, program: Program, *, is_drawn: bool) -> Prediction:
        """The prediction. What the oracle refuses under message faults ends the run, if drawn.

        So does what it refuses because a timeout of the machine's may come.

        Raises:
            UsageError: it refuses what was not drawn.
        """
        try:
            return self._predicted(program)
        except UsageError:
            limited = bool(program.steps) and self.rpc_timeout is not None
            if not (is_drawn and (self._plan.others or limited)):
                raise
            event("the run ended at what is not predicted under its message faults or timeout")
            reject()

    def _outcome(self) -> Outcome:
        return replace(self._running().outcome, steps=tuple(self._seen))

    def _with_held(self, counters: Sequence[Counters]) -> tuple[Counters, ...]:
        own: Any = self.held()
        try:
            held = _held_by(own, self.world_size)
        except UsageError as misuse:
            raise self._misused(misuse) from misuse.__cause__
        return tuple(_sum(one, other) for one, other in zip(counters, held, strict=True))

    def _misused(self, error: UsageError) -> UsageError:
        """The error to raise, once, for one that the class has caused."""
        error.add_note(f"That comes from the class {_place_of(type(self))}.")
        return at_once(error)

    # Failures.

    def _broken(
        self, violations: tuple[Violation, ...], ours: HarnessError | None = None
    ) -> NoReturn:
        """Raise the first violation, unless slower clocks do not show it.

        Args:
            ours: an error of ours that the same run has shown; it comes second.
        """
        __tracebackhide__ = True
        cluster = self._running()
        if not cluster.is_over:
            try:
                cluster.look()
            except HarnessError:
                # The fork server has died, and its ranks with it: no promise was broken.
                raise
            except Exception:
                pass
        cluster.kill()
        outcome = self._outcome()
        prediction = self._predicted(self.program)
        # What no step shows, the user's own rules may have caused.
        own = tuple(one for one in violations if self._shared and one.step is None)
        judged = [one for one in violations if one not in own]
        known, left = set_apart(self.program, prediction.met, outcome, judged)
        for name in known:
            event(f"met the known finding {name}")
        violations = (*left, *own)
        if not violations or not self._is_confirmed(violations[0], outcome):
            if ours is not None:
                raise ours
            reject()
        error = broken_promise(violations)
        lines = [
            *describe_violations(violations),
            *describe_plan(self._plan, self.world_size),
            f"program  {self.program!r}",
            f"plan     {self._plan!r}",
            self._replay(violations, outcome),
            *self._repeats(violations[0], outcome),
        ]
        for line in lines:
            error.add_note(line)
        if ours is not None:
            note_own(error, ours)
        raise error

    def _is_confirmed(self, violation: Violation, outcome: Outcome) -> bool:
        """Whether the program alone breaks the promise at slower rates; once for each promise.

        A run whose ranks were too late proves nothing either way, so the next slower rate is run,
        down to real time. A failure that none shows is reported once, as unconfirmed or undecided.

        A run with rules of the user's own cannot be repeated, and counts as it is.

        Raises:
            HarnessError: a slower run failed because of a bug of ours, so it proves nothing.
        """
        promise = violation.promise
        if self._shared or promise in self._confirmed:
            return True
        key = (self.program, self._plan, promise)
        if key in self._doubted:
            return False
        if key in self._unasked:
            # It failed here before: the result of an example must not change.
            raise self._unasked[key]
        rate, first = outcome.clock_rate, Sight.of(outcome, [violation])
        # A real-time run counts if its ranks were in time; otherwise it is repeated.
        rates = () if rate == 1.0 and first.in_time else None
        try:
            said = confirm(rate, first, lambda at: self._again(at, promise), rates=rates)
        except HarnessError as error:
            self._unasked[key] = error
            raise
        if said.is_confirmed:
            self._confirmed.add(promise)
            self._shown.add(key)
        else:
            self._doubt(key, violation, is_undecided=said.is_undecided)
        return said.is_confirmed

    def _repeats(self, violation: Violation, outcome: Outcome) -> list[str]:
        """For the run that Hypothesis reports: whether real time shows this program too.

        While Hypothesis shrinks, only the first run that breaks a promise is run in real time.
        """
        rate, promise = outcome.clock_rate, violation.promise
        if self._shared or rate == 1.0 or not current_build_context().is_final:
            return []
        key = (self.program, self._plan, promise)
        if key not in self._shown:
            first = Sight.of(outcome, [violation])
            said = confirm(rate, first, lambda at: self._again(at, promise), rates=(1.0,))
            if not said.is_confirmed:
                larger = f": {replay_line(self._kept)}" if self._kept is not None else ""
                return [f"repeats  not in real time; a larger program showed it there{larger}"]
            self._shown.add(key)
            self._keep(self._written)
        return ["repeats  1 of 1 at rate 1"]

    def _keep(self, path: Path | None) -> None:
        """Keep the file of a run that real time has shown, instead of that of an earlier one."""
        cls = type(self)
        if cls._kept is not None and cls._kept != path:
            with suppress(OSError):
                cls._kept.unlink()
        cls._kept = path

    def _again(self, rate: float, promise: str) -> Sight:
        """What the program alone shows of a promise at `rate`, without what findings explain."""
        program, plan = self.program, self._plan
        again = self._runner.run_anew(
            program, plan, clock=rate, transport=self.transport, agent=self.agent
        )
        met = predict(program, plan, facts_of(again.torch_version)).met
        _, left = set_apart(program, met, again, judge(program, plan, again))
        return Sight.of(again, [other for other in left if other.promise == promise])

    def _doubt(
        self, key: tuple[Program, FaultPlan, str], violation: Violation, *, is_undecided: bool
    ) -> None:
        """Report a failure that slower rates did not show, and remember that it was reported."""
        self._doubted.add(key)
        word = "undecided" if is_undecided else "unconfirmed"
        event(f"{word} {violation.promise}")
        line = " ".join(f"{violation} under {self._plan!r}".split())
        tell = self._runner.server.on_unconfirmed
        if tell is not None:
            tell(line, is_undecided)
            return
        why = "the machine was too loaded" if is_undecided else "slower clocks did not show it"
        warnings.warn(f"rpcprops: {word}, {why}: {line}", stacklevel=2)

    def _replay(self, violations: tuple[Violation, ...], outcome: Outcome) -> str:
        """Write the failure, replacing an earlier, larger one; the line that reports it."""
        if self._shared:
            return (
                "replay   not possible, because rules of your own were run. To see whether it also "
                "fails in real time, write clock = 'real' in the class."
            )
        promise = violations[0].promise
        artefact = Artefact(
            kind="program",
            subject=type(self).__name__,
            promise=promise,
            head=tuple(describe_violations(violations)),
            program=self.program,
            plans=(self._plan,),
            outcomes=(outcome,),
            violations=violations,
            clock_rate=outcome.clock_rate,
            transport=self.transport,
        )
        path = write_or_say(artefact)
        cls = type(self)
        if isinstance(path, Path):
            if cls._written not in (None, path, cls._kept):
                with suppress(OSError):
                    cls._written.unlink()
            cls._written = path
            if outcome.clock_rate == 1.0 or (self.program, self._plan, promise) in self._shown:
                self._keep(path)
        return f"replay   {replay_line(path)}"


def _no_draw(_: Any) -> int:
    msg = "a step is drawn by a rule"
    raise AssertionError(msg)


def _held_by(own: object, world_size: int) -> list[Counters]:
    """What :meth:`ClusterMachine.held` has returned, with a Counters for each rank.

    Raises:
        UsageError: it is something else.
    """
    must_be = f"up to {world_size} Counters, one for each rank"
    given = items("held()", own, world_size + 1, must_be)
    if len(given) > world_size or not all(isinstance(one, Counters) for one in given):
        msg = f"held()={shown(own)} must be {must_be}."
        raise UsageError(msg)
    check_counts("held()", given)
    return [*given, *[Counters()] * (world_size - len(given))]


def _place_of(machine: type) -> str:
    """The name of a class, and where it is."""
    try:
        _, line = inspect.getsourcelines(machine)
        return f"{machine.__qualname__} ({inspect.getsourcefile(machine)}:{line})"
    except (OSError, TypeError):
        return machine.__qualname__  # it was made without a file


def _sum(one: Counters, other: Counters) -> Counters:
    return Counters(
        **{i.name: getattr(one, i.name) + getattr(other, i.name) for i in fields(Counters)}
    )


@st.composite
def _steps(draw: st.DrawFn, kind: str) -> tuple[Step, ...]:
    """The steps that a rule adds: one, or several if a parallel step has several at one rank."""
    drawer: StepDrawer = draw(st.runner())._drawer  # noqa: SLF001 - that of the machine
    drawer.draw = draw
    before = len(drawer.steps)
    if kind == PARALLEL:
        drawer.add_parallel()
    else:
        drawer.add_kind(kind)
    return tuple(drawer.steps[before:])


def _rule(kind: str) -> Callable[[Any], None]:
    def run(self: ClusterMachine, steps: tuple[Step, ...]) -> None:
        __tracebackhide__ = True
        self._run(steps)

    run.__name__ = run.__qualname__ = f"step_{kind}"
    run.__doc__ = f"Run a step of the kind {kind!r}."

    def may(machine: ClusterMachine) -> bool:
        return machine._may(kind)  # noqa: SLF001 - a rule of the machine

    made: Any = rule(steps=_steps(kind))(run)
    checked: Callable[[Any], None] = precondition(may)(made)
    return checked


for _kind in (*KINDS, PARALLEL):
    setattr(ClusterMachine, f"step_{_kind}", _rule(_kind))
