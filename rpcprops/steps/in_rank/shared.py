"""Functions that several steps need of torch: values, timeouts, distributed autograd."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import autograd, rpc
from torch.distributed.rpc.constants import UNSET_RPC_TIMEOUT

#: Untyped, because torch hides `backward` and other documented functions from type checkers.
dist_autograd: Any = autograd


def tensor(value: Any) -> torch.Tensor:
    """A tensor of float64, in which small sums and products are exact."""
    return torch.tensor(value, dtype=torch.float64)


def target_of(world: Sequence[str], rank: int, named: str) -> Any:
    """What a call names a rank by: its name, its "id" or its "info"."""
    if named == "info":
        return rpc.get_worker_info(world[rank])
    return rank if named == "id" else world[rank]


def timeout_of(seconds: float | None) -> float:
    """The timeout of an RPC; None means the one that init_rpc was given."""
    return UNSET_RPC_TIMEOUT if seconds is None else seconds


class SlowNumber:
    """An object that takes some seconds (virtual) to be unpickled, and then is a number."""

    def __init__(self, number: float, seconds: float) -> None:
        self.given = number, seconds

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how to unpickle it."""
        return slow_number, self.given


def slow_number(number: float, seconds: float) -> float:
    """Sleep, and return the number."""
    time.sleep(seconds)
    return number
