"""Steps with RRefs: made, sent, fetched, called through, dropped."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import SlowNumber, tensor, timeout_of
from rpcprops.steps.in_rank.state import (
    beside_handles,
    handle_of,
    handles,
    note_call,
    note_slowly,
)
from rpcprops.steps.in_rank.sums import operand, sum_call, torchscript


def remote(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    out: str,
    left: tuple[float, ...],
    right: tuple[float, ...] | str,
    flavour: str,
    raises: bool,
    timeout: float | None,
    seconds: float,
    megabytes: int,
    beside: int,
) -> None:
    """Let another rank compute a sum and own it; keep the RRef, and some more of the same."""
    how: dict[str, Any] = {"raises": raises, "seconds": seconds, "megabytes": megabytes}
    function, args = sum_call(call, flavour, tensor(left), operand(right), **how)
    made = [
        rpc.remote(world[to], function, args=args, timeout=timeout_of(timeout))
        for _ in range(beside + 1)
    ]
    handles[out] = made.pop()
    if made:
        beside_handles[out] = made


def own(call: str, world: tuple[str, ...], *, out: str, value: tuple[float, ...]) -> None:
    """Own a value here, and keep its RRef."""
    handles[out] = rpc.RRef(tensor(value))


def share(
    call: str,
    world: tuple[str, ...],
    *,
    handle: str,
    to: int,
    out: str,
    inside: str,
    timeout: float | None,
    seconds: float,
) -> None:
    """Send an RRef to another rank, which keeps it: alone, or inside a list or a dict."""
    rref = handle_of(handle)
    sent = {"list": [rref], "dict": {"rref": rref}}.get(inside, rref)
    args = (call, out, sent, seconds) if seconds else (call, out, sent)
    rpc.rpc_sync(world[to], store_handle, args=args, timeout=timeout_of(timeout))


def store_handle(call: str, name: str, sent: Any, seconds: float = 0.0) -> None:
    """Keep an RRef that arrived as an argument, alone or in a list or a dict; then sleep."""
    note_call(call)
    if isinstance(sent, list):
        (sent,) = sent
    elif isinstance(sent, dict):
        sent = sent["rref"]
    handles[name] = sent
    if seconds:
        time.sleep(seconds)


def fetch(call: str, world: tuple[str, ...], *, handle: str, timeout: float | None) -> list[float]:
    """Copy the value of an RRef to here."""
    value: list[float] = handle_of(handle).to_here(timeout=timeout_of(timeout)).tolist()
    return value


def local(call: str, world: tuple[str, ...], *, handle: str) -> list[float]:
    """The value of an RRef that is owned here."""
    value: list[float] = handle_of(handle).local_value().tolist()
    return value


def through(
    call: str,
    world: tuple[str, ...],
    *,
    handle: str,
    how: str,
    addend: float,
    out: str,
    timeout: float | None,
    seconds: float,
) -> list[float] | None:
    """Call a method of an RRef's value at its owner."""
    rref = handle_of(handle)
    if how == "remote":
        handles[out] = rref.remote().add(addend)
        return None
    number = SlowNumber(addend, seconds) if seconds else addend
    if how == "async":
        value = rref.rpc_async(timeout_of(timeout)).add(number).wait()
    else:
        value = rref.rpc_sync(timeout_of(timeout)).add(number)
    numbers: list[float] = value.tolist()
    return numbers


def bump(call: str, world: tuple[str, ...], *, handle: str, timeout: float | None) -> list[float]:
    """Add one to the value of an RRef in place, at its owner."""
    rref = handle_of(handle)
    limit = timeout_of(timeout)
    value: list[float] = rpc.rpc_sync(rref.owner(), add_one, args=(rref,), timeout=limit).tolist()
    return value


@torchscript
def add_one(rref: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    """Add one to a tensor that is owned here, in place."""
    value: torch.Tensor = rref.local_value()
    return value.add_(1.0)


def nest(
    call: str,
    world: tuple[str, ...],
    *,
    via: int,
    to: int,
    out: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    flavour: str,
    timeout: float | None,
    seconds: float,
) -> None:
    """Let `via` call ``rpc.remote`` on a third rank; keep the RRef that it returns."""
    args = (call, flavour, world[to], tensor(left), tensor(right), seconds)
    limit = timeout_of(timeout)
    handles[out] = rpc.rpc_sync(world[via], nested_remote, args=args, timeout=limit)


def nested_remote(
    call: str, flavour: str, to: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> Any:
    """Sleep, call ``rpc.remote`` on a third rank, and return the RRef."""
    note_slowly(call, seconds)
    function, args = sum_call(call + "/nested", flavour, left, right)
    return rpc.remote(to, function, args=args)


def drop(call: str, world: tuple[str, ...], *, handle: str, by: str) -> None:
    """Drop an RRef and those beside it, by ``del``, in a scope or in a thread; collect garbage."""
    beside = beside_handles.pop(handle, [])
    if by == "scope":
        leave_scope(handle)
    elif by == "thread":
        beside.append(handle_of(handle))
        del handles[handle]
        threading.Thread(target=drop_slowly, args=(beside,), daemon=True).start()
    else:
        handle_of(handle)
        del handles[handle]
    del beside
    gc.collect()


def drop_slowly(held: list[Any]) -> None:
    """Drop one RRef after another, about one in a millisecond of real time."""
    while held:
        del held[0]
        sum(range(50_000))


def leave_scope(handle: str) -> None:
    """Drop an RRef when this function ends."""
    held = handle_of(handle)
    del handles[handle]
    held.owner()
