"""Distributed optimizers in real ranks, with each option that programs may give them."""

from __future__ import annotations

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.programs import Program, Train
from rpcprops.runner import run
from rpcprops.steps.in_rank.constants import KEYWORDS
from rpcprops.steps.training import OPTIONS, Optimizer
from rpcprops.strategies import programs
from tests._draws import draws


def test_every_keyword_is_an_option() -> None:
    """No option lacks its keywords, and none is left over."""
    assert {option for options in OPTIONS.values() for option in options} == set(KEYWORDS)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("agent", [None, pytest.param("wire", marks=pytest.mark.nightly)])
def test_every_option_of_every_optimizer(agent: str | None) -> None:
    """Each gives what it gives in one process, and something else than without the option."""
    cases = [(name, option) for name, options in OPTIONS.items() for option in ("", *options)]
    steps = [
        Train(0, f"x{number}", (1, 0), name, 3, option=option)
        for number, (name, option) in enumerate(cases)
    ]
    program = Program(2, tuple(steps))
    outcome = run(program, agent=agent)
    met = predict_for(program, FaultPlan(), outcome).met
    known, left = set_apart(program, met, outcome, judge(program, FaultPlan(), outcome))
    assert left == ()
    assert set(known) <= {"rounded-rprop-factor"}
    shown = dict(zip(cases, (step.value["alone"] for step in outcome.steps), strict=True))
    alike = [
        (name, option)
        for name, option in cases
        if option and shown[name, option] == shown[name, ""]
    ]
    assert alike == []


@pytest.mark.parametrize(("optimizer", "option"), [("Adam", "momentum"), ("SGD", "lr")])
def test_another_option_is_refused(optimizer: Optimizer, option: str) -> None:
    """The error names those that the optimizer has."""
    with pytest.raises(UsageError, match=f"option='{option}' is none of {optimizer}; use one of "):
        Program(2, (Train(0, "x", (1,), optimizer, option=option),))


def test_options_are_drawn() -> None:
    """Every optimizer, with and without options."""
    drawn = programs(kinds=("train",), min_steps=8)
    found = [leaf for p in draws(drawn, 60) for leaf in p.leaves if isinstance(leaf, Train)]
    assert {step.optimizer for step in found} == set(OPTIONS)
    assert len({step.option for step in found}) > 10
    assert any(not step.option for step in found)
