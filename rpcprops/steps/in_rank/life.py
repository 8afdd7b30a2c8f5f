"""Steps about the life of RPC in a rank: a profiler around calls."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor
from rpcprops.steps.in_rank.state import note_call
from rpcprops.steps.in_rank.sums import add, sum_call


def profile(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    form: str,
    beyond: int | None,
    flavour: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    raises: bool,
) -> dict[str, Any]:
    """Make a call inside torch's legacy profiler; its value, and what the events tell of it."""
    function, args = sum_call(call, flavour, tensor(left), tensor(right), raises=raises)
    if beyond is not None:
        function = nested_add if form == "nested" else deferred_add
        args = (call, world[beyond], *args[1:])
    send: Any = rpc.rpc_sync if form in ("sync", "nested", "deferred") else rpc.rpc_async
    if form == "remote":
        send = rpc.remote
    with legacy_profile() as profiler:
        result = send(world[to], function, args=args)
        if form == "async":
            result = result.wait()
        elif form == "remote":
            result = result.to_here()
    if form == "late":
        result = result.wait()
    way = {rpc.rpc_async: "async", rpc.remote: "remote"}.get(send, "sync")
    named = f"rpc_{way}#", f"({world[rpc.get_worker_info().id]} -> {world[to]})"
    return {"sum": result.tolist(), **told(profiler.function_events, *named, to, beyond is None)}


def told(events: Any, begins: str, ends: str, to: int, adds_there: bool) -> dict[str, bool]:
    """Whether one event has the name of the call, and whether one tells what ran at `to`."""
    ran = "aten::add" if adds_there else "rpc_"
    here = [event.name for event in events if not event.is_remote]
    there = [event.name.split("#remote_op: ", 1) for event in events if event.is_remote]
    return {
        "named": [x.startswith(begins) and x.endswith(ends) for x in here].count(True) == 1,
        "there": any(
            x[0].startswith(begins) and x[0].endswith(ends) and x[1].startswith(ran) for x in there
        ),
    }


def nested_add(call: str, then: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Let another rank add, and wait for it."""
    note_call(call)
    total: torch.Tensor = rpc.rpc_sync(then, add, args=(call + "/then", left, right))
    return total


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def deferred_add(call: str, then: str, left: torch.Tensor, right: torch.Tensor) -> Any:
    """Let another rank add; the answer is sent when that rank has answered."""
    note_call(call)
    return rpc.rpc_async(then, add, args=(call + "/then", left, right))
