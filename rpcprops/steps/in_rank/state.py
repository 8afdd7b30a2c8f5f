"""What a rank keeps for the steps of its program, by name. Nothing here imports torch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

#: The RRefs that live in this rank, by name.
handles: dict[str, Any] = {}

#: The RRefs that were made beside a handle, and are dropped with it.
beside_handles: dict[str, list[Any]] = {}

#: The calls of this rank that nobody has waited for yet, by name.
futures: dict[str, Any] = {}

#: The ids of distributed autograd contexts by name, including those of other ranks.
contexts: dict[str, int] = {}

#: How often each call ran in this rank, by the name that its caller gave it.
ran: Counter[str] = Counter()
ran_lock = threading.Lock()

#: Initialises RPC here once more; whoever starts the ranks puts it in. Its argument is a name that
#: differs each time, and is the same in all ranks. Otherwise RPC is initialised as it was before,
#: but for a `name` and a `rank` of this rank, a `world_size`, an `init_method` (a URL) and an
#: `rpc_timeout` in seconds, that are given.
init_again: list[Callable[..., None]] = []

#: The number of this rank, and the URL of a store by which it can find others. Whoever starts the
#: ranks puts it in.
meets_at: list[tuple[int, str]] = []

#: Gives the backend, and its options for the URL of a store, by which this rank joins a dynamic
#: group. Empty where that is torch's own agent.
joins_by: list[Callable[[str], dict[str, Any]]] = []


#: In what an agent is started, so that it uses the transport of the world. Empty where any will do.
starts_in: list[Callable[[], AbstractContextManager[None]]] = []


class MissingHandleError(Exception):
    """A step needs something that never came here: the step that makes or sends it failed."""


def note_call(call: str) -> None:
    """Count one more run of a call in this rank."""
    with ran_lock:
        ran[call] += 1


def note_slowly(call: str, seconds: float) -> None:
    """Count one more run of a call in this rank, and sleep."""
    note_call(call)
    if seconds:
        time.sleep(seconds)


def until_ran(call: str) -> None:
    """Wait until a call has begun to run in this rank."""
    while not ran[call]:
        time.sleep(0.05)


def hold_gil() -> None:
    """Hold the GIL: one call of C that gives it up nowhere, about 10 ms of real time."""
    sum(range(500_000))


def handle_of(name: str) -> Any:
    """The RRef that lives here under a name."""
    try:
        return handles[name]
    except KeyError:
        raise MissingHandleError(name) from None
