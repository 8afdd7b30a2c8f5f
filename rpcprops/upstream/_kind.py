"""A test of PyTorch's own as what an artefact is of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rpcprops._kinds import Kind
from rpcprops.faults import FaultPlan
from rpcprops.programs import Program
from rpcprops.properties import Observation
from rpcprops.report._artefact import Artefact
from rpcprops.runner import Runner
from rpcprops.upstream._ranks import UpstreamCase, UpstreamRanks


class OfPyTorch(Kind):
    """A test of PyTorch's own, which is named by its suite and its method."""

    def describe(self, name: str, program: Program | None) -> list[str]:
        """Its name: its program is empty."""
        return [f"test     {name}, PyTorch's own"]

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """Its verdict, as in PyTorch's harness."""
        ranks = UpstreamRanks(runner.server)
        case = UpstreamCase.of(ranks.test(artefact.subject), plan)
        return partial(ranks.observe, runner, case)
