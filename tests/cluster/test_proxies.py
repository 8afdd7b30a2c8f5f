"""Proxies of RRefs and remote modules used in every way, on stock torch and on a mended one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.programs import Method, Module, Program, Step
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner, run
from rpcprops.steps.training import Mode
from rpcprops.steps.ways import MethodForm
from rpcprops.torch_facts import installed
from tests.cluster import _mended
from tests.seeded.test_live import PlantingServer

#: A torch that has mended proxies may also look for a method that is missing somewhere else.
FORMS: tuple[MethodForm, ...] = tuple(one for one in get_args(MethodForm) if one != "missing")
HOWS: tuple[Any, ...] = ("sync", "async", "remote")
METHODS = tuple(
    Method(0, to, how, form, seconds=0.5 * to) for form in FORMS for how in HOWS for to in (1, 0)
)
MODULES = tuple(
    Module(0, to, mode=mode, again=again, called=called, sent=sent)
    for mode in get_args(Mode)
    for again, called, sent in itertools.product((False, True), repeat=3)
    for to in (1, 0)
)
FINDINGS = frozenset(
    {
        "remote-module-drops-mode",
        "remote-module-mode-copies",
        "rebuilt-module-not-callable",
        "proxy-takes-keywords",
        "proxy-hides-methods",
        "proxy-asks-class",
    }
)
BOTH = pytest.mark.parametrize("steps", [METHODS, MODULES], ids=["methods", "modules"])
EVERY_AGENT = pytest.mark.parametrize(
    "agent", [None, pytest.param("wire", marks=pytest.mark.nightly)]
)


class MendedServer(PlantingServer):
    """A server whose clusters have torch mended in each rank before the first step."""

    def make_cluster(self, *args: Any, **options: Any) -> Any:
        cluster = self.server.make_cluster(*args, **options)
        start = cluster.start

        def start_mended() -> None:
            start()
            for rank in range(cluster.world_size):
                cluster.on(rank).call(_mended.mend)

        cluster.start = start_mended
        return cluster


def findings(step: Step) -> tuple[str, ...]:
    """What a step alone meets, but for what a failed proxy keeps."""
    assert isinstance(step, Method | Module)
    wrong = (step.finding,) if isinstance(step, Method) else step.wrong
    return wrong[:1] if any(wrong) else ()


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
@BOTH
def test_stock_torch_does_the_rest_as_it_says(agent: str | None, steps: tuple[Step, ...]) -> None:
    """Each step that meets no finding gives its value, and leaves nothing."""
    program = Program(2, tuple(step for step in steps if not findings(step)))
    assert judge(program, FaultPlan(), run(program, agent=agent)) == ()


@pytest.mark.usefixtures("rpc_cluster")
@EVERY_AGENT
def test_stock_torch_shows_the_findings(agent: str | None) -> None:
    """In each way in which a step can meet one, and each shows as itself and as nothing else."""
    shown = set()
    wrong = [step for step in (*METHODS, *MODULES) if findings(step)]
    # A program ends at an error that was not to come, so each has one step.
    for step in wrong if agent else wrong[::5]:
        program = Program(2, (step,))
        outcome = run(program, agent=agent)
        met = predict_for(program, FaultPlan(), outcome).met
        known, left = set_apart(program, met, outcome, judge(program, FaultPlan(), outcome))
        assert (known, left) == (findings(step), ()), step
        shown |= {*known}
    assert shown == FINDINGS


@EVERY_AGENT
@BOTH
def test_a_mended_torch_does_what_is_predicted(
    agent: str | None, steps: tuple[Step, ...], rpc_cluster: ClusterFactory
) -> None:
    """Values, calls, and with a record all messages, are those of torch's documentation."""
    program = Program(2, steps)
    server: Any = MendedServer(rpc_cluster.server, 0, _mended.mend)
    outcome = Runner(server).run_anew(program, agent=agent)
    facts = replace(installed(), mended=FINDINGS)
    assert judge(program, FaultPlan(), outcome, facts=facts) == ()
