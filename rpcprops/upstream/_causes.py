"""Why tests of PyTorch's fail under faults that torch retries: the causes that are understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rpcprops.properties import Failure
from rpcprops.upstream._data import UpstreamTest


@dataclass(frozen=True, slots=True)
class Cause:
    name: str
    fault_of: Literal["test", "torch"]
    why: str
    shows_as: Callable[[UpstreamTest, Failure], bool]


CAUSES: tuple[Cause, ...] = ()


def cause_of(test: UpstreamTest, failure: Failure) -> Cause | None:
    """The cause that is known to make `test` fail as it did; None where there is none."""
    for cause in CAUSES:
        if cause.shows_as(test, failure):
            return cause
    return None
