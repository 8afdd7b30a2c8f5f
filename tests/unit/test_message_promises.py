"""The properties about single messages: their cases, and when they are not run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops.agents.wire import NAME as WIRE
from rpcprops.agents.wire import build
from rpcprops.commands import check
from rpcprops.errors import MachineCannot
from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import FaultCount, predict
from rpcprops.outcomes import Outcome
from rpcprops.programs import Call, Context, Drop, Fetch, Program, Remote
from rpcprops.properties import (
    PROPERTIES,
    Case,
    Examination,
    Observation,
    drawn_properties,
    examine,
)
from rpcprops.properties._messages import TIMEOUT, sent_by
from tests._draws import draws

NAMES = [name for name, item in PROPERTIES.items() if item.agent and name not in drawn_properties()]
#: Those in which a step shows the timeout.
COSTLY = [name for name in NAMES if PROPERTIES[name].costs > 2]


def test_which_promises_need_the_agent() -> None:
    """All are about what no other agent can do."""
    assert NAMES == ["executed-twice", "any-order", "unanswered-calls", "unanswered-in-context"]
    assert [PROPERTIES[name].costs for name in NAMES] == [2, 1, 4, 4]
    assert NAMES[2:] == COSTLY


def test_the_messages_of_a_program() -> None:
    """Requests with their numbers, calls in a plain context, and gradients."""
    program = Program(
        2, (Remote(0, 1, "a"), Fetch(0, "a"), Call(1, 0), Drop(0, "a"), Context(0, "x", (1,)))
    )
    kinds = [(one.sender, one.receiver, str(one.message), one.n) for one in sent_by(program)]
    assert kinds == [
        (0, 1, "PYTHON_REMOTE_CALL", 1),
        (0, 1, "PYTHON_RREF_FETCH_CALL", 1),
        (1, 0, "PYTHON_CALL", 1),
        (0, 1, "RREF_USER_DELETE", 1),
        (0, 1, "CLEANUP_AUTOGRAD_CONTEXT_REQ", 1),
        (1, 0, "CLEANUP_AUTOGRAD_CONTEXT_REQ", 1),
        (0, 1, "FORWARD_AUTOGRAD_REQ", 1),
        (0, 1, "BACKWARD_AUTOGRAD_REQ", 1),
        (1, 0, "BACKWARD_AUTOGRAD_REQ", 1),
    ]
    twice = Program(2, (Context(0, "x", (1,), retain=True), Context(0, "y", (1,), nested=True)))
    numbers = [one.n for one in sent_by(twice) if one.message == "BACKWARD_AUTOGRAD_REQ"]
    assert numbers == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_for_a_message_that_the_program_sends(name: str) -> None:
    """So it acts in every run; a lost answer is seen, and nothing else is. None lasts for hours."""
    told = 0
    for case in draws(PROPERTIES[name].cases(), 12):
        given = [getattr(leaf, "timeout", None) or 0.0 for leaf in case.program.leaves]
        assert max(given) < 1200.0
        sent = sent_by(case.program)
        known = {one.request() for one in sent} | {one.answer() for one in sent}
        for fault in case.plan.others:
            assert isinstance(fault, MessageFault)
            assert any(
                (fault.rank, fault.message, fault.to, fault.n)
                == (one.rank, one.message, one.to, one.n)
                for one in known
            )
        said, usual = (predict(case.program, plan) for plan in (case.plan, FaultPlan()))
        told += [(s.value, s.error) for s in said.steps] != [
            (s.value, s.error) for s in usual.steps
        ]
        assert said.counters == usual.counters or name == "unanswered-calls"
    assert bool(told) == (name in COSTLY)


def test_what_is_executed_twice_came_twice_or_was_tried_again() -> None:
    """Each message that torch tries again is drawn in each form that is predicted."""
    found = set()
    cases = PROPERTIES["executed-twice"].cases()
    for case in (one for start in range(3) for one in draws(cases, 100, start)):
        waits = False
        for fault in case.plan.others:
            assert isinstance(fault, MessageFault)
            assert fault.message is not None
            found.add((fault.action, fault.message.is_request, str(fault.message)))
            waits |= fault.action != "duplicate"
        # Torch tries again when the timeout has come, and a case without one needs none.
        assert case.program.rpc_timeout == (TIMEOUT if waits else None)
    tried = ("RREF_CHILD_ACCEPT", "RREF_USER_DELETE", "CLEANUP_AUTOGRAD_CONTEXT_REQ")
    answers = ("RREF_ACK", "CLEANUP_AUTOGRAD_CONTEXT_RESP")
    assert found == {
        *(("duplicate", True, message) for message in ("RREF_FORK_REQUEST", *tried)),
        *(("delay", True, message) for message in tried),
        *((action, False, message) for action in ("lose", "delay") for message in answers),
    }


class Runs:
    """Runs that go well, in which one fault fires; the agents that were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, has_compiler: bool = True) -> None:
        self.agents: list[str | None] = []

        def built(*_: Any, **__: Any) -> None:
            if not has_compiler:
                msg = "no C++ compiler: install g++"
                raise MachineCannot(msg)

        monkeypatch.setattr(build, "built", built)

    def observe(self, _: Any, case: Case, **options: Any) -> Observation:
        self.agents.append(options.get("agent"))
        counts = (FaultCount(0, "message", "any", None, 1),)
        return Observation(case, Outcome(2, clock_rate=1.0), (), counts)

    def examine(self, name: str, agent: str = "FAULTY_TENSORPIPE", **options: Any) -> Examination:
        runner: Any = SimpleNamespace(server=SimpleNamespace(agent=agent), failed_in_use=[])
        prop = replace(PROPERTIES[name], observe=self.observe)
        return examine(prop, runner, max_examples=8, seed=0, **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_under_the_agent_that_it_needs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where ranks have another agent by default; each case that waits counts as several."""
    runs = Runs(monkeypatch)
    result = runs.examine(name)
    assert (result.verdict, set(runs.agents)) == ("holds", {WIRE})
    assert len(runs.agents) <= 8 // PROPERTIES[name].costs
    told = [line for line in check._details(result) if line.startswith("examples ")]
    costs = PROPERTIES[name].costs
    why = f"examples one for each {costs} that were asked for, because each waits for a timeout"
    assert told == ([why] if costs > 1 else [])


def test_without_a_compiler_it_is_not_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no failure, and the reason has the remedy."""
    runs = Runs(monkeypatch, has_compiler=False)
    result = runs.examine("executed-twice")
    assert (result.verdict, result.examples, runs.agents) == ("not_run", 0, [])
    assert result.is_good()
    assert result.reason == "not run: it needs the agent WIRE: no C++ compiler: install g++"


def test_it_is_not_run_where_another_agent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's choice counts; WIRE is a choice under which it runs."""
    runs = Runs(monkeypatch)
    result = runs.examine("any-order", "TENSORPIPE", by_chance=True)
    assert (result.verdict, runs.agents) == ("not_run", [])
    assert result.reason == "not run: it needs the agent WIRE, and TENSORPIPE was named"
    assert runs.examine("any-order", WIRE, by_chance=True).verdict == "holds"
