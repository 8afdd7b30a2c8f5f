"""Distributed optimizers in real ranks, with each option that programs may give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.outcomes import Outcome
from rpcprops.programs import Program, Train
from rpcprops.runner import run
from rpcprops.steps.in_rank.constants import BY_PLACE, KEYWORDS, REFUSED_KEYWORDS
from rpcprops.steps.optimizers import (
    CHECKED,
    LACKING,
    OPTIMIZERS,
    OPTIONS,
    REFUSALS,
    UNCOMPILED,
    Optimizer,
    is_uncompiled,
)
from rpcprops.strategies import programs
from rpcprops.torch_facts import installed
from tests._draws import draws

EVERY_AGENT = pytest.mark.parametrize(
    "agent", [None, pytest.param("wire", marks=pytest.mark.nightly)]
)


def known_in(steps: Sequence[Train], agent: str | None, size: int = 2) -> tuple[set[str], Outcome]:
    """The findings that show, and nothing else does; and what the steps showed."""
    program = Program(size, tuple(steps))
    outcome = run(program, agent=agent)
    met = predict_for(program, FaultPlan(), outcome).met
    known, left = set_apart(program, met, outcome, judge(program, FaultPlan(), outcome))
    assert left == ()
    return set(known), outcome


def test_every_keyword_is_an_option() -> None:
    """No option lacks its keywords, and none is left over."""
    assert {option for options in OPTIONS.values() for option in options} == set(KEYWORDS)
    assert {value for values in REFUSALS.values() for value in values} == set(REFUSED_KEYWORDS)


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_every_option_of_every_optimizer(agent: str | None) -> None:
    """Each gives what it gives in one process, and something else than without the option."""
    cases = [
        (name, option)
        for name, options in OPTIONS.items()
        for option in ("", *options)
        if option not in UNCOMPILED
    ]
    steps = [
        Train(0, f"x{number}", (1, 0), name, 3, options=(option,) if option else ())
        for number, (name, option) in enumerate(cases)
    ]
    known, outcome = known_in(steps, agent)
    assert known <= {"rounded-rprop-factor", "functional-default-rate"}
    shown = dict(zip(cases, (step.value["alone"] for step in outcome.steps), strict=True))
    alike = [
        (name, option)
        for name, option in cases
        if option and shown[name, option] == shown[name, ""]
    ]
    assert alike == []


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_options_that_choose_an_implementation(agent: str | None) -> None:
    """Compiled optimizers refuse them in their first step, and others give the same with them."""
    cases = [(name, one) for name, options in OPTIONS.items() for one in options]
    cases = [case for case in cases if case[1] in UNCOMPILED]
    steps = [
        Train(0, f"x{number}", (1, 0), name, 3, options=(option,))
        for number, (name, option) in enumerate(cases)
    ]
    known, outcome = known_in(steps, agent)
    assert known <= {"rounded-rprop-factor"}
    raised = [case for case, step in zip(cases, outcome.steps, strict=True) if step.error]
    compiled = installed().compiles_optimizers
    wanted = [case for case in cases if is_uncompiled(case[0], case[1:], placed=False)]
    assert raised == (wanted if compiled else [])


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_options_that_are_given_by_place(agent: str | None) -> None:
    """All that come so are those of the optimizer in one process, but for a known finding."""
    cases = [
        (name, tuple(one for one in options if one not in ("default_lr", "dampening", *UNCOMPILED)))
        for name, options in OPTIONS.items()
    ]
    steps = [
        Train(0, f"x{number}", (1, 0), name, 2, options=options, placed=True)
        for number, (name, options) in enumerate(cases)
        if name not in BY_PLACE
    ]
    assert known_in(steps, agent)[0] == set()
    finding = "optimizer-options-by-place"
    lost: list[tuple[Optimizer, str]] = [
        *(("Adagrad", "eps"), ("RMSprop", "maximize"), ("RMSprop", "foreach"))
    ]
    for name, option in lost:
        step = Train(0, "x", (1, 0), name, 2, options=(option,), placed=True)
        assert known_in([step], agent)[0] == ({finding} if installed().has_bug(finding) else set())


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_a_parameter_that_is_not_in_a_loss(agent: str | None) -> None:
    """It stays as it is, with every optimizer; known findings change it, or another one's."""
    steps = [
        Train(0, f"{name} {number}", (1, 0, 1), name, 3, left_out=left_out)
        for name in OPTIMIZERS
        for number, left_out in enumerate([((0, 0), (2, 2)), ((1, 1),), ((0, 2), (1, 2))])
    ]
    adagrad = "adagrad-wrong-parameter"
    # Where it is not compiled, it raises, which ends a program.
    raises = not installed().compiles_optimizers
    alone = [step for step in steps if raises and step.optimizer == "Adagrad"]
    known, _ = known_in([step for step in steps if step not in alone], agent)
    for step in alone:
        found, _ = known_in([step], agent)
        assert found == ({adagrad} if installed().has_bug(adagrad) else set())
        known |= found
    finding = {adagrad, "stale-gradients"}
    assert known - {"rounded-rprop-factor"} == {one for one in finding if installed().has_bug(one)}


REFUSED = [(name, refused) for name in OPTIMIZERS for refused in REFUSALS[name]]
UNCHECKED = [
    case for case in REFUSED if case[0] not in CHECKED and case[1] not in ("unknown", *LACKING)
]


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_every_value_that_an_optimizer_refuses(agent: str | None) -> None:
    """Those that check refuse each value, and every optimizer what it does not know."""
    cases = [case for case in REFUSED if case not in UNCHECKED]
    steps = [
        Train(0, f"x{number}", (1, 0, 1), name, refused=refused)
        for number, (name, refused) in enumerate(cases)
    ]
    known, outcome = known_in(steps, agent)
    assert not known
    shown = [step.error for step in outcome.steps]
    assert len(shown) == len(cases)
    assert all(error is not None and "On WorkerInfo" in error.message for error in shown)


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_values_that_no_one_refuses(agent: str | None) -> None:
    """An optimizer whose functional version checks nothing is made: a known finding."""
    for name, refused in UNCHECKED[:: 1 if agent else 3]:
        known, _ = known_in([Train(0, "x", (1, 0, 1), name, refused=refused)], agent)
        assert known == {"unchecked-optimizer-options"}


@pytest.mark.parametrize(
    ("optimizer", "refused"), [case for case in REFUSED if case[1] not in LACKING]
)
def test_an_optimizer_refuses_it_in_one_process(optimizer: Optimizer, refused: str) -> None:
    """So DistributedOptimizer, which is to give it the same, has to refuse it as well."""
    given = {"lr": 0.25, **REFUSED_KEYWORDS[refused]}
    with pytest.raises(TypeError if refused == "unknown" else ValueError):
        getattr(torch.optim, optimizer)([torch.ones(1, requires_grad=True)], **given)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("Adam", ("momentum",)), ("SGD", ("lr",)), ("SGD", ("nesterov", "dampening"))],
)
def test_another_option_is_refused(optimizer: Optimizer, options: tuple[str, ...]) -> None:
    """The error names those that the optimizer has."""
    with pytest.raises(UsageError, match=f"are none of {optimizer}; use some of "):
        Program(2, (Train(0, "x", (1,), optimizer, options=options),))


@pytest.mark.parametrize("left_out", [((0, 0),), ((0, 2),), ((2, 1),), ((1, 1), (0, 1))])
def test_what_cannot_be_left_out_is_refused(left_out: tuple[tuple[int, int], ...]) -> None:
    """A loss needs a parameter, and pairs name steps and parameters that there are, in order."""
    owners = (1,) if left_out == ((0, 0),) else (1, 0)
    with pytest.raises(UsageError, match="left_out="):
        Program(2, (Train(0, "x", owners, left_out=left_out),))


@pytest.mark.parametrize("other", [{"options": ("momentum",)}, {"left_out": ((0, 1),)}])
def test_a_refused_value_stands_alone(other: dict[str, tuple[str, ...]]) -> None:
    """Nothing is trained then, so nothing else is given."""
    for given in ({"refused": "rho"}, {"refused": "lr", **other}):
        with pytest.raises(UsageError, match="refused="):
            Program(2, (Train(0, "x", (1, 0), **given),))


@pytest.mark.parametrize("other", [{"refused": "lr"}, {"options": ("default_lr",)}])
def test_what_is_given_by_place_has_a_rate(other: dict[str, Any]) -> None:
    """The rate is the first argument that an optimizer takes by place."""
    with pytest.raises(UsageError, match="placed=True needs"):
        Program(2, (Train(0, "x", (1,), placed=True, **other),))


def test_options_are_drawn() -> None:
    """Every optimizer, with and without options, and with refused ones."""
    drawn = programs(kinds=("train",), min_steps=8)
    found = [leaf for p in draws(drawn, 120) for leaf in p.leaves if isinstance(leaf, Train)]
    assert {step.optimizer for step in found} == set(OPTIONS)
    assert len({step.options for step in found}) > 40
    assert {len(step.options) for step in found} == {0, 1, 2}
    assert {bool(step.left_out) for step in found} == {False, True}
    assert {bool(step.refused) for step in found} == {False, True}
    assert any(len(set(step.owners)) < len(step.owners) for step in found)
    assert {step.placed for step in found} == {False, True}
    assert {option for step in found for option in step.options} >= {*UNCOMPILED}
    assert {step.refused for step in found} >= {"capturable", "differentiable"}
