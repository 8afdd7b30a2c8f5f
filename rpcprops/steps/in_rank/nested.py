"""Calls that functions of other ranks make on, under a timeout."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor
from rpcprops.steps.in_rank.state import note_call
from rpcprops.steps.in_rank.sums import sum_call


def onward(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    then: int,
    calls: int,
    left: tuple[float, ...],
    right: tuple[float, ...],
    within: float,
    seconds: float,
    patience: float,
) -> list[list[float] | str]:
    """Make calls of a rank, each of which calls another one; how the latter calls ended."""
    args = (world[then], (tensor(left), tensor(right)), within, seconds, patience)
    futures = [
        rpc.rpc_async(world[to], call_onward, args=(f"{call}/{number}", *args))
        for number in range(calls)
    ]
    ended: list[list[float] | str] = torch.futures.wait_all(futures)
    return ended


def call_onward(
    call: str,
    then: str,
    terms: tuple[torch.Tensor, torch.Tensor],
    within: float,
    seconds: float,
    patience: float,
) -> list[float] | str:
    """Call another rank; the sum, or "timeout", or "nothing" if the call does not end."""
    note_call(call)
    function, args = sum_call(f"{call}/then", "python", *terms, seconds=seconds)
    future: Any = rpc.rpc_async(then, function, args=args, timeout=within)
    ended = threading.Event()
    future.add_done_callback(lambda _: ended.set())
    if not ended.wait(patience):
        return "nothing"
    try:
        value: list[float] = future.value().tolist()
    except RuntimeError as error:
        if "timeout" not in str(error):
            raise
        return "timeout"
    return value
