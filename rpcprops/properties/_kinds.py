"""A program as what an artefact is of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, cast

from rpcprops._kinds import Kind, kind_of
from rpcprops.faults import FaultPlan
from rpcprops.programs import Program
from rpcprops.properties._base import Case, Observation, observe
from rpcprops.report._artefact import Artefact
from rpcprops.runner import Runner


class OfProgram(Kind):
    """A program, in fresh ranks."""

    test = """
def test_{name}() -> None:
    outcome = rpcprops.run(PROGRAM, PLAN{transport})
    found = rpcprops.judge(PROGRAM, PLAN, outcome)
    assert not found, f"{{RECORDED}}; now {{'; '.join(map(str, found))}}"
"""
    test_imports: ClassVar[tuple[str, ...]] = ("import rpcprops",)

    def in_cluster(self, *, init: bool) -> Kind:
        """Ranks that do not join at once join twice."""
        return self if init else kind_of("reinit")

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """As of a case of a property."""
        case = Case(cast("Program", artefact.program), plan, kind=self.tag)
        return partial(observe, runner, case)
