"""Steps whose messages torch itself must try again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor
from rpcprops.steps.in_rank.state import note_call

#: Seconds after which a rank has more than enough of waiting for what must come at once.
GIVES_UP = 600.0
#: The timeout of the fork request that cannot be answered in time, in seconds.
TOO_SHORT = 0.25
#: How many threads each such call keeps busy here, and the calls that no longer keep any.
busy: dict[str, int] = {}
released: set[str] = set()
changed = threading.Condition()


class DefaultTimeout:
    """Sets the default timeout of the rank that unpickles it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Callable[[float], None], tuple[float]]:
        return set_default, (self.seconds,)


def set_default(seconds: float) -> None:
    """Set the default timeout of all that this rank sends from now on."""
    # The docstrings of rpc_sync, rpc_async and remote name this function.
    rpc._set_rpc_timeout(seconds)  # type: ignore[attr-defined]


def retry(
    call: str,
    world: tuple[str, ...],
    *,
    via: int,
    to: int,
    value: tuple[float, ...],
    timeout: float,
) -> list[float]:
    """Send an RRef to a rank while its owner is too busy to answer that rank's first request."""
    rref: Any = rpc.remote(world[via], torch.add, args=(tensor(value), 1.0))
    rref.to_here()
    me = rpc.get_worker_info().name
    done = rpc.rpc_async(world[via], be_busy, args=(call, me))
    with changed:
        changed.wait_for(lambda: call in busy, GIVES_UP)
    before = rpc.get_rpc_timeout()  # type: ignore[attr-defined]
    # The rank unpickles these in order, and sends its fork request while it unpickles the RRef.
    args = (call, DefaultTimeout(TOO_SHORT), rref, DefaultTimeout(before))
    try:
        total: list[float] = rpc.rpc_sync(world[to], fetch_sent, args=args, timeout=timeout)
        return total
    finally:
        done.wait()


def fetch_sent(call: str, _: None, rref: Any, __: None) -> list[float]:
    """Fetch the value of an RRef that came as an argument."""
    note_call(call)
    numbers: list[float] = rref.to_here().tolist()
    return numbers


def be_busy(call: str, caller: str) -> None:
    """Keep every thread of this rank's agent busy until two more requests have come."""
    debug_info: Any = rpc._get_debug_info
    threads = int(debug_info()["agent.thread_pool_size"])
    me = rpc.get_worker_info().name
    for _ in range(threads - 1):
        rpc.rpc_async(me, hold, args=(call,))
    with changed:
        changed.wait_for(lambda: busy.get(call, 0) == threads - 1, GIVES_UP)
    # Its answer is read only when a thread is free again.
    rpc.rpc_async(caller, note_busy, args=(call,))
    deadline = time.monotonic() + GIVES_UP
    while int(debug_info()["agent.server_active_calls"]) < threads + 2:
        if time.monotonic() > deadline:
            break
        time.sleep(TOO_SHORT / 10)
    with changed:
        released.add(call)
        changed.notify_all()


def hold(call: str) -> None:
    """Keep a thread of the agent busy until it is released."""
    with changed:
        busy[call] = busy.get(call, 0) + 1
        changed.notify_all()
        changed.wait_for(lambda: call in released, GIVES_UP)


def note_busy(call: str) -> None:
    """Note that all threads of the owner's agent are busy."""
    with changed:
        busy[call] = 0
        changed.notify_all()
