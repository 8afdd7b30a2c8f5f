"""Why tests of PyTorch's fail under faults that torch retries: the causes that are understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Violation
from rpcprops.upstream._data import UpstreamTest


@dataclass(frozen=True, slots=True)
class Cause:
    name: str
    fault_of: Literal["test", "torch"]
    why: str
    shows_as: Callable[[UpstreamTest, Violation, FaultPlan], bool]


CAUSES: tuple[Cause, ...] = ()


def cause_of(test: UpstreamTest, violation: Violation, plan: FaultPlan) -> Cause | None:
    for cause in CAUSES:
        if cause.shows_as(test, violation, plan):
            return cause
    return None
