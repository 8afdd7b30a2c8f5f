"""What a known finding of torch keeps from being drawn, which comes where torch has mended it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st

from rpcprops._hunt import hunted
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.programs import Profile, Program, Remote
from rpcprops.properties import Case
from rpcprops.strategies import programs
from rpcprops.strategies.drawing import StepDrawer
from rpcprops.torch_facts import FINDINGS, UNKNOWN, TorchFacts, facts_of, installed
from tests._draws import draws

LATE_CREATIONS = FaultTable(
    messages_to_delay={"PYTHON_REMOTE_CALL": 3.0, "SCRIPT_REMOTE_CALL": 3.0}
)
LATE_CALLS = FaultTable(messages_to_delay={"PYTHON_CALL": 3.0})
LATE_FETCHES = FaultTable(
    messages_to_delay={"PYTHON_RREF_FETCH_CALL": 3.0, "SCRIPT_RREF_FETCH_CALL": 3.0}
)
FAILED_DELETES = FaultTable(["RREF_USER_DELETE"], 3)
T = TypeVar("T")
TWO = ("timed-out-remote-dropped", "shutdown-overtakes-creation")


def mended(*names: str) -> TorchFacts:
    """A torch that has mended some findings, and has the others."""
    return TorchFacts("", mended=frozenset(names))


def cases(
    *kinds: str, table: FaultTable | None = None, size: int = 1, most: int = 3
) -> st.SearchStrategy[Case]:
    """Two or more steps of such kinds, at so many ranks, for a torch without any finding."""
    plan = FaultPlan(table or FaultTable())
    facts = UNKNOWN.as_if_mended()
    drawn = programs(
        kinds=kinds,
        plan=plan,
        facts=facts,
        min_world_size=size,
        max_world_size=size,
        min_steps=most - 1,
        max_steps=most,
    )
    return drawn.map(lambda program: Case(program, plan))


#: Findings that programs meet only where torch has mended them: a table, whether the programs
#: settle, and kinds of step of which some then meet it.
AVOIDED: list[tuple[str, FaultTable, bool, tuple[str, ...]]] = [
    ("second-failed-remote", LATE_CREATIONS, True, ("remote", "fetch", "settle")),
    ("timed-out-remote-dropped", LATE_CREATIONS, True, ("remote", "drop")),
    ("early-owner-fork", FaultTable(), True, ("remote", "share")),
    ("timed-out-type-query", LATE_CALLS, True, ("remote", "through")),
    ("failed-backward-revisits-rank", FaultTable(), True, ("context",)),
    ("shutdown-overtakes-creation", FAILED_DELETES, False, ("remote", "fetch")),
    ("shutdown-deletes-argument", FaultTable(), False, ("own", "remote", "share")),
    ("shutdown-deletes-argument", FaultTable(), False, ("own", "call", "wait")),
    ("shutdown-deletes-argument", LATE_CALLS, False, ("own", "call", "wait")),
    ("retried-without-payload", FaultTable(), True, ("call", "retry", "settle")),
    ("refused-init-counted", FaultTable(), True, ("call", "rejoin", "settle")),
    ("gathering-count-kept", FaultTable(), True, ("call", "rejoin", "settle")),
    ("late-remote-to-self", LATE_CREATIONS, True, ("remote",)),
    ("failed-async-proxy", FaultTable(), True, ("remote", "through")),
    ("rref-lifetime-after-reinit", FaultTable(), True, ("remote", "rejoin", "call", "settle")),
    ("late-answer-keeps-rref", FaultTable(), True, ("nest",)),
    ("fetch-after-delete", LATE_FETCHES, True, ("remote", "fetch", "drop")),
]
#: Those that one form of a step meets: kinds of step, and how often each must be drawn.
FORMS: list[tuple[str, list[str], int]] = [
    ("garbled-exception-text", ["raising"], 40),
    ("future-exception-as-value", ["deferred"], 40),
    ("unpicklable-after-rref", ["carry"], 400),
    ("unwritable-tensor", ["carry"], 400),
    ("guessed-rref-type", ["carry"], 400),
    ("unreadable-remote", ["carry"], 400),
    ("refused-remote-to-self", ["carry"], 400),
    ("unreadable-tensor", ["carry"], 400),
    ("failed-pickle-keeps-tensors", ["carry"], 400),
    ("attribute-error-as-value", ["carry"], 400),
    ("unconfirmed-user", ["own", "share", "settle", *["ask"] * 10], 40),
    ("rounded-rprop-factor", ["train"], 40),
    ("functional-default-rate", ["train"], 400),
    ("adagrad-wrong-parameter", ["train"], 400),
    ("stale-gradients", ["train"], 400),
    ("unchecked-optimizer-options", ["train"], 100),
    ("remote-module-skips-hooks", ["linear"], 100),
    ("remote-module-takes-names", ["linear"], 100),
    ("profiling-key-kept", ["profile"], 40),
    ("context-after-cleanup", ["outlast"], 40),
    ("async-proxy-leaves-context", ["graph"], 40),
]
HUNTED = hunted(known=True)
GROUPS = HUNTED["drawn-groups"].cases()
#: A finding that is met only where torch has mended another one as well.
ALSO = {"rref-lifetime-after-reinit": ("rref-sent-after-reinit",)}
#: Those that are drawn for other torches too, or in programs of other sorts.
OTHERS: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("fork-request-given-up", cases("nest", table=FaultTable(["RREF_FORK_REQUEST"], 6), size=3)),
    ("readable-injected-error", cases("call", table=FaultTable(["PYTHON_CALL"], 1))),
    ("profiled-events-lost", cases("profile")),
    ("freed-context-used", cases("fail_twice", "call", size=3)),
    ("timeout-needs-thread", cases("onward")),
    ("timed-out-type-query", HUNTED["drawn-within-budget"].cases()),
    ("failed-join-keeps-token", GROUPS),
    ("rejoins-alone", GROUPS),
    ("leaving-keeps-values", GROUPS),
    ("dash-in-member-name", GROUPS),
    ("shutdown-races-delete", cases("remote", "drop", size=2, most=4)),
    ("rref-sent-after-reinit", cases("rejoin", "call", "remote", "share", size=2, most=6)),
]


@st.composite
def drawn_for(
    draw: st.DrawFn,
    table: FaultTable,
    facts: TorchFacts,
    settles: bool,
    kinds: tuple[str, ...],
    steps: int,
) -> Program:
    """Some steps under a table; a program settles where its shutdown would overtake them."""
    plan = FaultPlan(table)
    drawer = StepDrawer(draw, 2, kinds=kinds, plan=plan, settles=settles, facts=facts)
    for _ in range(steps):
        drawer.add(must=True)
    drawer.close()
    return Program(2, tuple(drawer.steps), settles=settles or drawer.overtakes)


def programs_on(
    table: FaultTable,
    facts: TorchFacts,
    *,
    settles: bool,
    kinds: tuple[str, ...],
    steps: int = 8,
    number: int = 50,
) -> list[Program]:
    """The same few programs each time, as they are drawn for a torch."""
    return draws(drawn_for(table, facts, settles, kinds, steps), number)


@pytest.mark.parametrize(("finding", "table", "settles", "kinds"), AVOIDED)
def test_what_meets_a_finding_is_drawn_where_torch_has_mended_it(
    finding: str, table: FaultTable, settles: bool, kinds: tuple[str, ...]
) -> None:
    """Nothing meets it on a torch that has it, and something would on one that has mended it."""

    def met_by(facts: TorchFacts) -> int:
        # A finding of two uses of one handle needs more steps to come.
        steps = 16 if finding == "timed-out-type-query" else 8
        # One of nine forms of a step must come, or two steps that use one handle.
        several = {"refused-init-counted": 250, "shutdown-deletes-argument": 250}
        several["gathering-count-kept"] = 250
        often = ("timed-out-remote-dropped", "failed-async-proxy", "early-owner-fork")
        several |= dict.fromkeys(often, 150)
        number = several.get(finding, 50)
        found = programs_on(table, facts, settles=settles, kinds=kinds, steps=steps, number=number)
        # By what is known of every finding, since a mended torch meets none.
        return sum(finding in predict(one, FaultPlan(table)).known_bugs for one in found)

    assert met_by(UNKNOWN) == 0
    assert met_by(mended(finding, *ALSO.get(finding, ())))


@pytest.mark.parametrize(("finding", "drawn"), OTHERS)
def test_what_meets_a_finding_is_drawn_in_a_hunt_for_what_is_known(
    finding: str, drawn: st.SearchStrategy[Case]
) -> None:
    """Some of the programs meet it, and the prediction names it."""
    # Of programs of such kinds, one in sixty begins RPC again and then sends an RRef on.
    # One in eighty ends at once while something about an RRef is under way.
    rare = ("rref-sent-after-reinit", "timed-out-type-query", "shutdown-races-delete")
    number = 1000 if finding == "timed-out-type-query" else 400 if finding in rare else 120
    found = draws(drawn, number)
    assert any(finding in predict(case.program, case.plan).known_bugs for case in found)


def test_each_finding_is_drawn_or_has_a_reason() -> None:
    """Every one is in a test of this module, unless data beside it say why it is never drawn."""
    shown = {name for name, *_ in (*AVOIDED, *FORMS, *OTHERS)}
    assert shown == {name for name, finding in FINDINGS.items() if not finding.not_drawn}


class Chance(StepDrawer):
    """A drawer that does without Hypothesis, so that a thousand steps are drawn at once."""

    chance: Random

    def pick(self, options: Sequence[T]) -> T:
        """One of some options."""
        return self.chance.choice(options)


@pytest.mark.parametrize(("finding", "kinds", "times"), FORMS)
def test_a_form_that_meets_a_finding_is_drawn_where_torch_has_mended_it(
    finding: str, kinds: list[str], times: int
) -> None:
    """So many steps of its kind never meet it on a torch that has it, and some would otherwise."""

    def met_by(facts: TorchFacts) -> bool:
        chance = Random(0)
        for _ in range(times):
            drawer = Chance(lambda _: 0, 2, facts=facts)
            drawer.chance = chance
            for kind in kinds:
                assert drawer.add_kind(kind)
            program = Program(2, tuple(drawer.steps))
            if finding in predict(program, FaultPlan()).known_bugs:
                return True
        return False

    assert not met_by(UNKNOWN)
    assert met_by(mended(finding))


def test_profiled_calls_are_repeated_where_torch_shows_them() -> None:
    """Two profiled calls may come by chance; one step makes several only on a mended torch."""

    def most(facts: TorchFacts) -> int:
        drawer = Chance(lambda _: 0, 2, facts=facts)
        drawer.chance = Random(0)
        assert all(drawer.add_kind("profile") for _ in range(40))
        return max(step.times for step in drawer.steps if isinstance(step, Profile))

    assert most(UNKNOWN) == 1
    assert most(mended("profiled-events-lost")) == 9


def test_a_creation_may_time_out_before_a_shutdown_that_can_bear_it() -> None:
    """Without a settle none does, unless torch has mended both findings that such a one meets."""

    def late(*names: str) -> int:
        facts = mended(*names)
        found = programs_on(LATE_CREATIONS, facts, settles=False, kinds=("remote",))
        return sum(
            isinstance(step, Remote) and (step.timeout or 9.0) < 3.0
            for program in found
            for step in program.leaves
        )

    assert late() == late(TWO[0]) == late(TWO[1]) == 0
    assert late(*TWO) > 3


def test_a_torch_without_a_finding_meets_none() -> None:
    """Predictions name only findings that the torch has; without facts, all that there are."""
    lost = FaultPlan(by_rank={0: FaultTable(["PYTHON_REMOTE_CALL"], 1)})
    program = Program(2, (Remote(0, 1, "a"), Remote(0, 1, "b")))
    assert predict(program, lost).known_bugs == {"second-failed-remote"}
    assert predict(program, lost, facts_of("2.14.1")).known_bugs == {"second-failed-remote"}
    assert predict(program, lost, facts_of("2.15.0")).known_bugs == set()


def test_the_installed_torch_is_what_is_drawn_for() -> None:
    """Who says nothing else draws for the torch that ranks will import."""
    drawer = StepDrawer(lambda _: 0, 2)
    assert drawer.facts is installed()


def test_programs_without_faults_have_short_timeouts_and_ranks_that_come_back() -> None:
    """As the installed torch is: half of the examples of a hunt are such programs."""
    found = [case.program for case in draws(hunted()["drawn-without-faults"].cases(), 400)]
    assert {program.rpc_timeout for program in found} == {None, 65.0, 300.0}
    leaves = [leaf for program in found for leaf in program.leaves]
    assert any(leaf.op == "rejoin" for leaf in leaves)
    # What takes longer than its timeout without any fault.
    assert any((getattr(x, "timeout", None) or 9e9) < getattr(x, "seconds", 0) for x in leaves)
