"""What the steps of a rank share: what lives in it, by name, and how often each call ran there."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import torch
from torch.distributed import autograd
from torch.distributed.rpc.constants import UNSET_RPC_TIMEOUT

#: Without types: torch hides `backward` and others, which it documents, from type checkers.
dist_autograd: Any = autograd

#: The RRefs that live in this rank, by name.
handles: dict[str, Any] = {}

#: The calls of this rank that were not waited for yet, by name.
futures: dict[str, Any] = {}

#: The ids of distributed autograd contexts, by name, those of other ranks included.
contexts: dict[str, int] = {}

#: How often each call ran in this rank, by the name that its caller gave it.
ran: Counter[str] = Counter()
ran_lock = threading.Lock()


class MissingHandleError(Exception):
    """A step needs what never came here, because the step that makes or sends it failed."""


def note_call(call: str) -> None:
    """Count one more run of a call in this rank."""
    with ran_lock:
        ran[call] += 1


def tensor(value: Any) -> torch.Tensor:
    """A tensor of float64, in which small sums and products are exact."""
    return torch.tensor(value, dtype=torch.float64)


def handle_of(name: str) -> Any:
    """The RRef that lives here under a name."""
    try:
        return handles[name]
    except KeyError:
        raise MissingHandleError(name) from None


def timeout_of(seconds: float | None) -> float:
    """The timeout of an RPC; None leaves it to the one that init_rpc was given."""
    return UNSET_RPC_TIMEOUT if seconds is None else seconds
