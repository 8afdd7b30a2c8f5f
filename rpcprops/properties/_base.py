"""What a property is: a promise, how to draw its cases, and how to observe one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

from hypothesis.strategies import SearchStrategy

from rpcprops._kinds import Kind, kind_of
from rpcprops._replay import OfRanks
from rpcprops.errors import HarnessError, note_shown
from rpcprops.faults import FaultPlan
from rpcprops.oracle import (
    Accepted,
    FaultCount,
    Finding,
    Met,
    accepted,
    account,
    is_expected,
    judge,
    judge_unpredicted,
    predict_for,
    set_apart,
)
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Program, Settle
from rpcprops.report.artefact import Artefact
from rpcprops.runner import Runner
from rpcprops.torch_facts import facts_of


@dataclass(frozen=True, slots=True)
class Case:
    """What is drawn: the work of the ranks, and the faults under which they do it.

    Attributes:
        kind: the tag of what is run (see :mod:`rpcprops._kinds`): "program" runs `program`;
            "reinit" runs it in ranks that have already been through one ``init_rpc`` and
            ``shutdown``; "unpredicted" runs it under a plan that the oracle does not predict;
            "upstream" runs one of PyTorch's tests.
    """

    program: Program
    plan: FaultPlan = field(default_factory=FaultPlan)
    kind: str = "program"


@dataclass(frozen=True, slots=True)
class Observation:
    """One case, run and judged.

    Attributes:
        explained_by: the known findings that may have caused violations which `violations` lacks.
        accepted: the documented effects that it showed, which are not violations.
    """

    case: Case
    outcome: Outcome
    violations: tuple[Violation, ...]
    faults: tuple[FaultCount, ...]
    explained_by: tuple[str, ...] = ()
    accepted: tuple[Accepted, ...] = ()


def observe(
    runner: Runner, case: Case, *, anew: bool = False, with_findings: bool = True, **options: Any
) -> Observation:
    """Run a case and judge it. `options` are those of :meth:`Runner.run`.

    Without `with_findings`, what a known finding can have caused is no violation; everything
    else that is wrong still is.
    """
    kind = kind_of(case.kind)
    outcome = kind.run(runner, case, anew=anew, **options)
    if not kind.is_predicted:
        violations = judge_unpredicted(case.program, case.plan, outcome)
        return Observation(
            case, outcome, violations, accounted(None, case.plan, outcome, violations)
        )
    violations = judge(case.program, case.plan, outcome)
    explained_by: tuple[str, ...] = ()
    if violations and not with_findings:
        explained_by, violations = _set_apart(case, outcome, violations)
    return Observation(
        case,
        outcome,
        violations,
        accounted(case.program, case.plan, outcome, violations),
        explained_by,
        accepted(case.program, case.plan, outcome),
    )


def accounted(
    program: Program | None, plan: FaultPlan, outcome: Outcome, violations: Sequence[Violation]
) -> tuple[FaultCount, ...]:
    """The faults of a run that broke these promises, as :func:`rpcprops.oracle.account` has them.

    Raises:
        HarnessError: as there; its notes have the violations.
    """
    try:
        return account(program, plan, outcome)
    except HarnessError as own:
        note_shown(own, violations)
        raise


def _set_apart(
    case: Case, outcome: Outcome, violations: tuple[Violation, ...]
) -> tuple[tuple[str, ...], tuple[Violation, ...]]:
    """As :func:`rpcprops.oracle.set_apart`; a value that a finding explains hides nothing after it.

    An error that had to come and did not, or the other way round, changes the course of a program,
    and so what must come after it. A settle in which ranks do not come to rest ends the run before
    its shutdown, so the messages of that are in no record.
    """
    met = findings_met(case, outcome)
    names, left = set_apart(case.program, met, outcome, violations)
    wrong = {violation.step for violation in violations if violation.step is not None}
    is_explained = wrong and all(violation.step is None for violation in left)
    if not is_explained or not _took_its_course(case, outcome):
        return names, left
    # What comes after the last step also says which errors in a log were to be expected.
    rest = judge(case.program, case.plan, outcome, aside=wrong)
    if any(isinstance(case.program.leaves[step], Settle) for step in wrong):
        rest = tuple(one for one in rest if one.promise not in ("MessagesDiffer", "FaultsDiffer"))
    more, left = set_apart(case.program, met, outcome, rest)
    return tuple(sorted({*names, *more})), left


def _took_its_course(case: Case, outcome: Outcome) -> bool:
    """Whether each step ended, and raised an error of the class that it had to, or none."""
    expected = predict_for(case.program, case.plan, outcome).steps
    facts = facts_of(outcome.torch_version)
    return len(outcome.steps) == len(case.program.leaves) and all(
        seen.ended and is_expected(expected[seen.index].error, seen.error, facts)
        for seen in outcome.steps
    )


def findings_met(case: Case, outcome: Outcome) -> frozenset[str | Met]:
    """The known findings that a case meets, by the prediction that its run followed."""
    met: frozenset[str | Met] = predict_for(case.program, case.plan, outcome).met
    return met | kind_of(case.kind).findings


class OfProgram(OfRanks):
    """A program, in fresh ranks."""

    test = """
def test_{name}() -> None:
    outcome = rpcprops.run(PROGRAM, PLAN{transport})
    found = rpcprops.judge(PROGRAM, PLAN, outcome)
    assert not found, f"{{RECORDED}}; now {{'; '.join(map(str, found))}}"
"""
    test_imports: ClassVar[tuple[str, ...]] = ("import rpcprops",)

    def in_cluster(self, *, init: bool) -> Kind:
        """The kind itself, or "reinit" for ranks that do not join at once: they join twice."""
        return self if init else kind_of("reinit")

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """Judges a run as :func:`observe` judges a case of a property."""
        case = Case(cast("Program", artefact.program), plan, kind=self.tag)
        return partial(observe, runner, case)


@dataclass(frozen=True)
class Property:
    """A named promise, with the cases that try to break it.

    Attributes:
        name: its name on the command line.
        promise: what must hold, in one sentence.
        cases: makes the strategy for its cases; called when the property is examined.
        needs_faults: whether a run in which no fault fired proves nothing (it is then "vacuous").
        injects: whether its cases have faults, so that an agent that injects none cannot run them.
        finding: the known finding whose smallest case this is, if it is one.
        only_named: whether it takes so long that it is checked only if it is asked for by name.
        compares: whether some cases that pass under a fast clock run in real time as well.
        agent: the only agent that can run its cases, if there is such a one. Where this machine
            cannot have it, or another agent is named, the property is not run.
        costs: how many usual examples take as long as one of its own, which waits for a timeout.
            So many fewer are drawn.
        observe: runs and judges a case; called as :func:`observe`.
    """

    name: str
    promise: str
    cases: Callable[[], SearchStrategy[Case]]
    needs_faults: bool = True
    injects: bool = True
    finding: Finding | None = None
    only_named: bool = False
    compares: bool = True
    agent: str = ""
    costs: int = 1
    observe: Callable[..., Observation] = observe

    def examples_of(self, usual: int) -> int:
        """How many examples are drawn where `usual` are asked for."""
        return max(1, usual // self.costs)
