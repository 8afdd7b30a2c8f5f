"""Remote modules of every kind in real ranks, called in every way."""

from __future__ import annotations

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.programs import Linear, Module, Program
from rpcprops.runner import run
from rpcprops.steps.in_rank.constants import REFUSED_METHODS
from rpcprops.steps.training import LAYERS, LayerKind
from rpcprops.strategies import programs
from tests._draws import draws

BYS = ("forward", "async", "call", "proxy")
SKIPS, TAKES = "remote-module-skips-hooks", "remote-module-takes-names"
EVERY_AGENT = pytest.mark.parametrize(
    "agent", [None, pytest.param("wire", marks=pytest.mark.nightly)]
)


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_every_layer_gives_what_it_gives_in_one_process(agent: str | None) -> None:
    """At another rank and at the own one; two of them meet a known finding, unless by a proxy."""
    rest: tuple[LayerKind, ...] = tuple(one for one in LAYERS if one != "device")
    cases = [(layer, by, to) for layer in rest for by in BYS for to in (1, 0)]
    cases += [("device", "proxy", to) for to in (1, 0)]
    steps = [
        Linear(0, f"x{number}", to, (3.0, -1.0, 3.0), by, layer=layer)  # type: ignore[arg-type]
        for number, (layer, by, to) in enumerate(cases)
    ]
    program = Program(2, tuple(steps))
    outcome = run(program, agent=agent)
    plan = FaultPlan()
    violations = judge(program, plan, outcome)
    known, left = set_apart(program, predict_for(program, plan, outcome).met, outcome, violations)
    assert (known, left) == ((SKIPS,), ())
    broken = {(cases[one.step][:2]) for one in violations if one.step is not None}
    assert broken == {("hooked", by) for by in BYS if by != "proxy"}
    shown = dict(zip(cases, (step.value["alone"] for step in outcome.steps), strict=True))
    assert len({str(shown[layer, "forward", 1]) for layer in rest}) == len(rest) - 2
    assert shown["norm", "call", 1]["state"][-1] == [1.0]


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("by", ["forward", "async", "call"])
def test_a_keyword_of_torchs_own_is_refused(by: str) -> None:
    """A known finding, at whichever rank the module is."""
    program = Program(2, (Linear(0, "x", 1, (1.0,), by, layer="device"),))  # type: ignore[arg-type]
    outcome = run(program)
    met = predict_for(program, FaultPlan(), outcome).met
    known, left = set_apart(program, met, outcome, judge(program, FaultPlan(), outcome))
    assert (known, left) == ((TAKES,), ())


@pytest.mark.usefixtures("rpc_cluster")
def test_every_method_that_a_remote_module_refuses() -> None:
    """Whether it has made its module itself or got it by an RRef."""
    steps = [
        Module(0, 1, refused=name, again=bool(number % 2))
        for number, name in enumerate(REFUSED_METHODS)
    ]
    program = Program(2, tuple(steps))
    assert judge(program, FaultPlan(), run(program)) == ()
    with pytest.raises(UsageError, match="refused='train' is no method that a RemoteModule"):
        Program(2, (Module(0, 1, refused="train"),))


def test_layers_are_drawn() -> None:
    """Every kind, in every way in which this torch does it right."""
    found = [
        leaf for p in draws(programs(kinds=("linear",), min_steps=8), 120) for leaf in p.leaves
    ]
    drawn = {(leaf.layer, leaf.by) for leaf in found if isinstance(leaf, Linear)}
    wrong = {(layer, by) for layer in ("hooked", "device") for by in BYS if by != "proxy"}
    assert drawn == {(layer, by) for layer in LAYERS for by in BYS} - wrong
