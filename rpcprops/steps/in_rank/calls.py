"""Steps that call a function on another rank: now, later, counted, in a chain."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor, timeout_of
from rpcprops.steps.in_rank.state import MissingHandleError, futures, note_call, note_slowly
from rpcprops.steps.in_rank.sums import add, operand, sum_call


def call(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    left: tuple[float, ...],
    right: tuple[float, ...] | str,
    flavour: str,
    wait: str,
    timeout: float | None,
    out: str,
    raises: bool,
    seconds: float,
    spins: bool,
) -> list[float] | None:
    """Let another rank compute a sum by ``rpc_sync``, or ``rpc_async`` and wait now or later."""
    send: Any = rpc.rpc_sync if wait == "sync" else rpc.rpc_async
    how: dict[str, Any] = {"raises": raises, "seconds": seconds, "spins": spins}
    function, args = sum_call(call, flavour, tensor(left), operand(right), **how)
    result = send(world[to], function, args=args, timeout=timeout_of(timeout))
    if wait == "later":
        futures[out] = result
        return None
    if wait == "async":
        result = result.wait()
    value: list[float] = result.tolist()
    return value


def wait(call: str, world: tuple[str, ...], *, future: str) -> list[float]:
    """Wait for an earlier call."""
    if future not in futures:
        raise MissingHandleError(future)
    value: list[float] = futures.pop(future).wait().tolist()
    return value


#: The numbers that :func:`next_number` has not returned yet; ``next`` takes each once.
numbers = itertools.count(1)


def count(
    call: str, world: tuple[str, ...], *, to: int, timeout: float | None, seconds: float
) -> int:
    """Let another rank increment its counter, and return the count."""
    args = (call, seconds) if seconds else (call,)
    number: int = rpc.rpc_sync(world[to], next_number, args=args, timeout=timeout_of(timeout))
    return number


def next_number(call: str, seconds: float = 0.0) -> int:
    """Increment the counter; then sleep."""
    note_call(call)
    number = next(numbers)
    if seconds:
        time.sleep(seconds)
    return number


def chain(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    then: int,
    left: tuple[float, ...],
    right: tuple[float, ...],
    timeout: float | None,
    seconds: float,
) -> list[float]:
    """Call another rank, which answers once a third one has computed the sum for it."""
    args = (call, world[then], tensor(left), tensor(right), seconds)
    limit = timeout_of(timeout)
    value: list[float] = rpc.rpc_sync(world[to], chained_add, args=args, timeout=limit).tolist()
    return value


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def chained_add(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> Any:
    """Sleep, and let another rank add; the answer is sent when that rank has answered."""
    note_slowly(call, seconds)
    return rpc.rpc_async(then, add, args=(call + "/then", left, right))
