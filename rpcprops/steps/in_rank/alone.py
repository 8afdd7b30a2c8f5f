"""One rank leaves a static world by itself, and the others go on for a while.

The ranks meet in a store of their own, so that no message is needed to know who has come where.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import dist_autograd, tensor
from rpcprops.steps.in_rank.state import meets_at, note_call
from rpcprops.steps.in_rank.sums import add

#: Nothing takes so long.
WAITS_A_DAY = timedelta(days=1)
#: The names of the points to which ranks come, and for which others wait.
HELD = "held"
LEFT = "left"
FAILED = "failed"


def class_of_error(function: Callable[[], Any]) -> str:
    """The class of a function's error, "RuntimeError" for what derives from it; or ""."""
    try:
        function()
    except RuntimeError:
        return "RuntimeError"
    except Exception as error:
        return type(error).__name__
    return ""


#: Calls that torch must refuse while no agent runs.
CALLS_OUTSIDE: dict[str, Callable[[], Any]] = {
    "rpc_sync": lambda: rpc.rpc_sync("worker0", torch.add, args=(1, 1)),
    "rpc_async": lambda: rpc.rpc_async("worker0", torch.add, args=(1, 1)),
    "remote": lambda: rpc.remote("worker0", torch.add, args=(1, 1)),
    "get_worker_info": rpc.get_worker_info,
    "shutdown": rpc.shutdown,
    "shutdown at once": lambda: rpc.shutdown(graceful=False),
    "get_rpc_timeout": rpc.get_rpc_timeout,  # type: ignore[attr-defined]
}


@dataclass(frozen=True)
class Departure:
    """One rank leaves alone; what each rank is told of it.

    `amid` says what goes on between it and the rank `at` meanwhile, and `work` what the other ranks
    then try with it.
    """

    call: str
    world: tuple[str, ...]
    at: int
    alone: int
    amid: str
    work: tuple[str, ...]

    @property
    def others(self) -> list[int]:
        """The ranks that stay."""
        return [rank for rank in range(len(self.world)) if rank != self.alone]


def store_of(call: str) -> Any:
    """A store of the step `call`, which no agent uses."""
    _, url = meets_at[0]
    stores: Any = distributed
    store = stores.FileStore(url.removeprefix("file://"), -1)
    store.set_timeout(WAITS_A_DAY)
    return stores.PrefixStore(f"alone/{call}", store)


def hold_until(call: str, until: str) -> None:
    """Note that this runs, and return once some rank has come to the point `until`."""
    note_call(call)
    store = store_of(call)
    store.set(HELD, "there")
    store.wait([until])


def begin_amid(told: Departure) -> Callable[[], str]:
    """Begin, at the rank `at`, what the other rank leaves amid.

    Returns: a function that ends it after that, and returns the class of the error, or "".
    """
    to = told.world[told.alone]
    held = f"{told.call}/{HELD}"
    if told.amid == "serving":
        future = rpc.rpc_async(to, hold_until, args=(held, FAILED))

        def wait_for_it() -> str:
            # The function still runs there: only when this has failed may it return.
            seen = class_of_error(future.wait)
            store_of(held).set(FAILED, "there")
            return seen

        return wait_for_it
    if told.amid == "backward":
        return go_backward_later(to, held)
    if told.amid == "owning":
        made = rpc.remote(to, add, args=(held, tensor((1.0,)), tensor((2.0,))))
        made.to_here()
        # Who holds that keeps the RRef: it is dropped only after the shutdown of this rank.
        return lambda: class_of_error(made.to_here)
    if told.amid == "using":
        own = rpc.RRef(tensor((3.0,)))
        rpc.rpc_sync(to, keep_rref, args=(held, own))
        return lambda: class_of_error(own.local_value)
    return lambda: ""


#: RRefs to values of other ranks that this one holds when it leaves alone.
kept_rrefs: list[Any] = []


def keep_rref(call: str, rref: Any) -> None:
    """Note that this runs, and keep an RRef until this rank has left."""
    note_call(call)
    kept_rrefs.append(rref)


def go_backward_later(to: str, call: str) -> Callable[[], str]:
    """Make a call inside a context; returns a function that goes backward there, and leaves it.

    In a thread of its own: what this one calls until then is not for the context.
    """
    called, goes_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def run() -> None:
        with dist_autograd.context() as context:
            leaf = tensor((1.0, 2.0)).requires_grad_()
            loss = rpc.rpc_sync(to, add, args=(call, leaf, leaf)).sum()
            called.set()
            goes_on.wait()
            seen.append(class_of_error(lambda: dist_autograd.backward(context, [loss])))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    called.wait()

    def go_backward() -> str:
        goes_on.set()
        thread.join()
        return seen[0]

    return go_backward


def leave_amid(told: Departure) -> None:
    """At the rank that leaves: come to where it is amid something."""
    held = f"{told.call}/{HELD}"
    if told.amid == "calling":
        # Of a future after a shutdown, api.py (shutdown) says that nobody should wait for it.
        rpc.rpc_async(told.world[told.at], hold_until, args=(held, LEFT))
    if told.amid in ("serving", "calling"):
        store_of(held).wait([HELD])


def has_left(told: Departure) -> None:
    """At the rank that has left: say so, and wait until the others have tried what they do."""
    kept_rrefs.clear()
    if told.amid == "calling":
        store_of(f"{told.call}/{HELD}").set(LEFT, "there")
    store = store_of(told.call)
    store.set(LEFT, "there")
    store.wait([str(rank) for rank in told.others])


def work_on(told: Departure, here: int, end_amid: Callable[[], str]) -> list[str]:
    """At a rank that stays: what each call showed, once that one has left.

    First the sums of calls to all who stay, then the class of the error of each call of `work`; at
    the rank `at` last of all that of what was going on.
    """
    ended = [end_amid()] if told.amid == "serving" and here == told.at else []
    store = store_of(told.call)
    store.wait([LEFT])
    sums = [sum_at(f"{told.call}/work", told.world[rank]) for rank in told.others]
    seen = [" ".join(sums)]
    gone = told.world[told.alone]
    by = told.others[(told.others.index(here) + 1) % len(told.others)]
    for name in told.work:
        attempt = partial(ATTEMPTS[name], told.call, gone, told.world[by])
        seen.append(class_of_error(attempt))
    if told.amid in ("backward", "owning", "using") and here == told.at:
        ended = [end_amid()]
    # A graceful shutdown waits for this rank's calls, but one that is not may be the next step of
    # another rank, so each goes on only when all have made theirs.
    store.set(str(here), "there")
    store.wait([str(rank) for rank in told.others])
    return [*seen, *ended]


def sum_at(call: str, to: str) -> str:
    """The sum that a rank which stays must give, as text; or the class of the error."""
    sums: list[float] = []

    def ask() -> None:
        sums.append(rpc.rpc_sync(to, add, args=(call, tensor(1.0), tensor(2.0))).item())

    return class_of_error(ask) or str(sums[0])


def call_the_gone(call: str, then: str) -> torch.Tensor:
    """Note that this runs, and call the rank that has left."""
    note_call(call)
    total: torch.Tensor = rpc.rpc_sync(then, add, args=(call, tensor(1.0), tensor(2.0)))
    return total


#: What a rank that stays tries with the one that has left, each as (call, gone, another rank).
ATTEMPTS: dict[str, Callable[[str, str, str], Any]] = {
    "sync": lambda call, gone, _: rpc.rpc_sync(gone, add, args=(call, tensor(1.0), tensor(2.0))),
    "async": lambda call, gone, _: rpc.rpc_async(
        gone, add, args=(call, tensor(1.0), tensor(2.0))
    ).wait(),
    "through": lambda call, gone, by: rpc.rpc_sync(
        by, call_the_gone, args=(f"{call}/through", gone)
    ),
    "info": lambda _, gone, __: rpc.get_worker_info(gone),
}
