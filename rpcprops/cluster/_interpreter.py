"""Runs the steps of a :class:`rpcprops.Program` in a rank, on real RRefs and contexts.

The module-level functions are the RPC targets, so ranks import them by this module's name.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections import Counter
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch._C._distributed_autograd import _retrieve_context, backward, get_gradients
from torch.distributed import rpc
from torch.distributed.rpc.constants import UNSET_RPC_TIMEOUT

from rpcprops.outcomes import RaisedError, StepOutcome
from rpcprops.programs import (
    Bump,
    Call,
    Context,
    Drop,
    Fetch,
    Nest,
    Own,
    Refused,
    Remote,
    Share,
    Step,
)

#: How often each user-visible call ran in this rank, by the name that its step gave it.
ledger: Counter[str] = Counter()
_ledger_lock = threading.Lock()

#: The handles that live in this rank.
_handles: dict[str, Any] = {}


class AbandonedError(Exception):
    """Raised inside a context, to leave it by an exception."""


def _ran(call: str) -> None:
    with _ledger_lock:
        ledger[call] += 1


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# RPC targets.


def add(call: str, left: torch.Tensor, right: Any) -> torch.Tensor:
    """left + right, where right may be an RRef."""
    _ran(call)
    return left + (right if isinstance(right, torch.Tensor) else right.to_here())


@torch.jit.script
def script_add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left + right


def keep_handle(call: str, name: str, rref: Any) -> None:
    """Keep an RRef that arrived as an argument."""
    _ran(call)
    _handles[name] = rref


def nested_remote(call: str, flavour: str, to: str, left: torch.Tensor, right: torch.Tensor) -> Any:
    """Call ``remote`` on a third rank and return the RRef."""
    _ran(call)
    return _remote(call + "/nested", flavour, to, left, right)


def hop(call: str, factor: float, x: torch.Tensor) -> torch.Tensor:
    """One hop of a context's path."""
    _ran(call)
    return factor * x + 1.0


def chain(call: str, hops: list[tuple[str, float]], factor: float, x: torch.Tensor) -> Any:
    """One hop, then the rest of the path from there."""
    y = hop(call, factor, x)
    if not hops:
        return y
    (to, next_factor), *rest = hops
    return rpc.rpc_sync(to, chain, args=(call, rest, next_factor, y))


# Steps.


def run_step(
    index: int, step: Step, world: tuple[str, ...], contexts: dict[str, int]
) -> StepOutcome:
    """Run one step here. `world` holds the names of the ranks, `contexts` ids by name."""
    started = time.monotonic()
    value: Any = None
    error: RaisedError | None = None
    try:
        value = _run(f"step{index}", step, world, contexts)
    except BaseException as raised:
        error = RaisedError(type(raised).__name__, str(raised), traceback.format_exc())
        # Frames of the traceback hold RRefs, which then would never be deleted.
        traceback.clear_frames(raised.__traceback__)
        del raised
    return StepOutcome(index, value, error, time.monotonic() - started)


def _run(call: str, step: Step, world: tuple[str, ...], contexts: dict[str, int]) -> Any:
    match step:
        case Remote():
            _handles[step.out] = _remote(
                call, step.flavour, world[step.to], _tensor(step.left), _argument(step.right)
            )
        case Own():
            _handles[step.out] = rpc.RRef(_tensor(step.value))
        case Share():
            rref = _handles[step.handle]
            rpc.rpc_sync(world[step.to], keep_handle, args=(call, step.out, rref))
        case Fetch():
            return _handles[step.handle].to_here().tolist()
        case Call():
            return _call(call, step, world[step.to])
        case Bump():
            rref = _handles[step.handle]
            return rpc.rpc_sync(rref.owner(), bump, args=(rref,)).tolist()
        case Nest():
            _handles[step.out] = rpc.rpc_sync(
                world[step.via],
                nested_remote,
                args=(call, step.flavour, world[step.to], _tensor(step.left), _tensor(step.right)),
            )
        case Drop():
            del _handles[step.handle]
            gc.collect()
        case Context():
            return _context(call, step, world)
        case Refused():
            return _is_refused(contexts[step.context])
        case _:
            msg = f"step {step!r} is not run in a rank"
            raise TypeError(msg)
    return None


@torch.jit.script
def bump(rref: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    value: torch.Tensor = rref.local_value()
    return value.add_(1.0)


def _argument(argument: Any) -> Any:
    return _handles[argument] if isinstance(argument, str) else _tensor(argument)


def _remote(call: str, flavour: str, to: str, left: torch.Tensor, right: Any) -> Any:
    if flavour == "python":
        return rpc.remote(to, add, args=(call, left, right))
    return rpc.remote(to, torch.add if flavour == "builtin" else script_add, args=(left, right))


def _call(call: str, step: Call, to: str) -> Any:
    timeout = UNSET_RPC_TIMEOUT if step.timeout is None else step.timeout
    send: Any = rpc.rpc_sync if step.wait == "sync" else rpc.rpc_async
    left, right = _tensor(step.left), _argument(step.right)
    if step.flavour == "python":
        result = send(to, add, args=(call, left, right), timeout=timeout)
    else:
        function = torch.add if step.flavour == "builtin" else script_add
        result = send(to, function, args=(left, right), timeout=timeout)
    if step.wait == "async":
        result = result.wait()
    return result.tolist()


def _context(call: str, step: Context, world: tuple[str, ...]) -> dict[str, Any]:
    leaf = _tensor(step.value).requires_grad_()
    result: dict[str, Any] = {}
    hops = [(world[rank], float(rank + 2)) for rank in step.path]
    try:
        with dist_autograd.context() as context_id:
            result["id"] = context_id
            y = leaf * leaf
            if step.nested and hops:
                (to, factor), *rest = hops
                send = _fetch_remote if step.rrefs else rpc.rpc_sync
                y = send(to, chain, args=(call, rest, factor, y))
            else:
                for to, factor in hops:
                    send = _fetch_remote if step.rrefs else rpc.rpc_sync
                    y = send(to, hop, args=(call, factor, y))
            loss = y.sum()
            result["loss"] = loss.item()
            if step.backward:
                backward(context_id, [loss])
                result["gradient"] = get_gradients(context_id)[leaf].tolist()
            if step.raises:
                raise AbandonedError
    except AbandonedError:
        result["raised"] = True
    return result


def _fetch_remote(to: str, function: Any, args: tuple[Any, ...]) -> Any:
    return rpc.remote(to, function, args=args).to_here()


def _is_refused(context_id: int) -> dict[str, Any]:
    try:
        _retrieve_context(context_id)
    except RuntimeError as error:
        return {"refused": True, "message": str(error).splitlines()[0]}
    return {"refused": False}
