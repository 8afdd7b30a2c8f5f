"""Ranks that profile, and ranks that leave and come back, on real torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import judge, predict, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import (
    Call,
    Context,
    Count,
    End,
    Fetch,
    Profile,
    Program,
    Rejoin,
    Remote,
    Settle,
    Share,
)
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import script_of, tried
from rpcprops.runner import run
from rpcprops.steps.life import AMID, FAILING, WORK, Amid, Failing, Leaving
from rpcprops.torch_facts import facts_of
from tests.seeded._programs import LIVES, PROFILES

pytestmark = pytest.mark.usefixtures("rpc_cluster")
#: Three failures are retried away, and each call comes late.
HELD_UP = FaultPlan(
    FaultTable(["RREF_USER_DELETE", "CLEANUP_AUTOGRAD_CONTEXT_REQ"], 3, {"PYTHON_CALL": 0.5})
)


@pytest.mark.parametrize("plan", [FaultPlan(), HELD_UP], ids=["undisturbed", "held up"])
@pytest.mark.parametrize("program", [PROFILES, LIVES[-1]], ids=lambda p: p.name)
def test_real_ranks_show_what_is_predicted(program: Program, plan: FaultPlan) -> None:
    """Profiled calls give values and events, and ranks come back in each way, also under faults."""
    outcome = run(program, plan)
    met = predict(program, plan, facts_of(outcome.torch_version)).met
    assert set_apart(program, met, outcome, judge(program, plan, outcome))[1] == ()


@pytest.mark.parametrize("agent", [None, "wire"])
@pytest.mark.parametrize(("to", "runs"), [(2, 0), (1, 1)], ids=["request", "accept"])
def test_the_agent_of_the_first_init_also_fails_what_it_would_refuse(
    to: int, runs: int, agent: str | None
) -> None:
    """A fork request fails the call that sends the RRef; of a failed accept nobody learns."""
    plan = FaultPlan(by_rank={to: FaultTable(["RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT"], 2)})
    steps = (Rejoin(0), Remote(0, 1, "a"), Fetch(0, "a"), Share(0, "a", to, "b"))
    program = Program(3, steps, end=End("at once"))
    outcome = run(program, plan, agent=agent)
    met = predict(program, plan, facts_of(outcome.torch_version)).met
    names, left = set_apart(program, met, outcome, judge(program, plan, outcome))
    assert left == ()
    assert (len(outcome.steps), outcome.ranks[to].calls.get("step3", 0)) == (4, runs)
    assert outcome.ranks[to].failed_sends == 1
    assert "rref-sent-after-reinit" in names


@pytest.mark.parametrize("agent", [None, "wire"])
def test_the_table_of_a_second_agent_fails_what_it_sends_as_often_as_given(
    agent: str | None,
) -> None:
    """That of the first, which torch keeps, does nothing to it."""
    plan = FaultPlan(FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 1))
    program = Program(2, (Rejoin(0), Context(0, "x", (1,))))
    outcome = run(program, plan, agent=agent)
    assert judge(program, plan, outcome) == ()
    assert [rank.failed_sends for rank in outcome.ranks] == [1, 1]


#: Those in which the other ranks make no init that fails, or nobody says whether it does.
OTHERWISE = {"running", "one no store", "one too few", "one unreachable, counted"}


@pytest.mark.parametrize("failing", [x for x in FAILING[1:] if x not in OTHERWISE])
def test_ranks_join_after_an_init_that_failed(failing: Failing) -> None:
    """Every init that must fail raises RuntimeError at every rank, and the next one works.

    After one while RPC is running it does not: that is the finding refused-init-counted.
    """
    program = Program(2, (Rejoin(1, failing=failing), Count(0, 1), Settle(), Call(1, 0)))
    outcome = run(program)
    assert judge(program, None, outcome) == ()
    assert outcome.steps[0].value == [["", "0 0", "RuntimeError", ""]] * 2


@pytest.mark.parametrize("agent", [None, "wire"])
@pytest.mark.parametrize("failing", sorted(OTHERWISE - {"running"}))
def test_an_init_that_goes_wrong_at_one_rank_keeps_nobody_from_coming_back(
    failing: Failing, agent: str | None
) -> None:
    """Whatever comes of it at the others, all ranks can call each other after the next one."""
    program = Program(3, (Rejoin(1, failing=failing), Count(0, 1), Settle(), Call(1, 0)))
    outcome = run(program, agent=agent)
    assert judge(program, None, outcome) == ()
    errors = [texts[2] for texts in outcome.steps[0].value]
    if failing == "one no store":
        assert errors == ["", "RuntimeError", ""]
    elif failing == "one unreachable, counted":
        assert errors == ["RuntimeError"] * 3


@pytest.mark.parametrize("agent", [None, "wire"])
@pytest.mark.parametrize("alone", range(3))
@pytest.mark.parametrize("amid", AMID)
def test_the_others_go_on_without_a_rank_that_left_alone(
    amid: Amid, alone: int, agent: str | None
) -> None:
    """They call each other, each call of the one that is gone fails, and all come back."""
    at = (alone + 1) % 3
    step = Rejoin(at, "at once", alone=alone, amid=amid, work=WORK)
    program = Program(3, (Call(0, 1), Settle(), step, Count(0, 1)))
    outcome = run(program, agent=agent)
    assert judge(program, None, outcome) == ()
    value = outcome.steps[2].value
    # The owner of an RRef that nobody will delete reports it, and keeps the value.
    owner = {"owning": alone, "using": at}.get(amid)
    raised = ["RuntimeError" if rank == owner else "" for rank in range(3)]
    held = [int(rank == owner) for rank in range(3)]
    assert value[alone] == [raised[alone], f"{held[alone]} {int(amid == 'backward')}", ""]
    gone = ["RuntimeError"] * 3
    ended = ["RuntimeError"] if amid in ("serving", "backward", "owning") else []
    ended = [""] if amid == "using" else ended
    assert value[at] == [raised[at], f"{held[at]} 0", "", "3.0 3.0", *gone, "", *ended]
    assert outcome.ranks[alone].calls.get("step2/held", 0) == (amid not in ("", "calling"))


@pytest.mark.parametrize(("alone", "how"), [(0, "graceful"), (0, "timeout"), (2, "timeout")])
def test_a_graceful_shutdown_raises_where_a_rank_is_gone(alone: int, how: Leaving) -> None:
    """Each rank but the first raises if that one is gone, and only the first one otherwise."""
    program = Program(3, (Rejoin(1, how, alone=alone),), end=End("at once"))
    outcome = run(program)
    assert judge(program, None, outcome) == ()
    raised = [texts[0] for texts in outcome.steps[0].value]
    wanted = {0: ["", "RuntimeError", "RuntimeError"], 2: ["RuntimeError", "", ""]}
    assert raised == wanted[alone]


@pytest.mark.nightly
@pytest.mark.parametrize("program", [PROFILES, LIVES[-1]], ids=lambda p: p.name)
def test_a_script_of_them_runs(program: Program, tmp_path: Path) -> None:
    """Plain torch, in real time and without rpcprops, profiles and comes back as well."""
    planted = Violation("WrongValue", "planted", 0, 0)
    artefact = Artefact(
        "program",
        "life",
        "WrongValue",
        program=program,
        plans=(FaultPlan(),),
        violations=(planted,),
    )
    assert tried(script_of(artefact), tmp_path, 1).codes == (0,)


def test_a_wrong_event_is_a_violation() -> None:
    """A rank whose profiler shows no call is reported, at its step."""
    program = Program(2, (Profile(0, 1),))
    outcome = run(program)
    value = outcome.steps[0].value
    assert value == {"sum": [3.0], "named": True, "there": True, "refused": ""}
    value["there"] = False
    message = "the profiler shows nothing of what ran at rank 1"
    assert judge(program, None, outcome) == (Violation("WrongValue", message, 0, 0),)
