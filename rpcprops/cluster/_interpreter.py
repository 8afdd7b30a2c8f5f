"""Runs the steps of a :class:`rpcprops.Program` in a rank, on real RRefs and contexts.

The module-level functions are the RPC targets, so ranks import them by this module's name.
"""

from __future__ import annotations

import gc
import importlib
import threading
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc.constants import UNSET_RPC_TIMEOUT

from rpcprops.errors import text_of
from rpcprops.outcomes import RaisedError, StepOutcome
from rpcprops.programs import (
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Pause,
    Refused,
    Remote,
    Share,
    Through,
    Wait,
)
from rpcprops.torch_facts.symbols import backward, get_gradients, retrieve_context

#: How often each user-visible call ran in this rank, by the name that its step gave it.
ledger: Counter[str] = Counter()
_ledger_lock = threading.Lock()

#: The handles and futures that live in this rank.
_handles: dict[str, Any] = {}
_futures: dict[str, Any] = {}

#: What :func:`count` has counted here.
_counter = 0


class AbandonedError(Exception):
    """Raised inside a context, to leave it by an exception."""


class MissingHandleError(Exception):
    """A step needs a handle that never came here, because the step that sends it failed."""


class RaisedOnPurposeError(Exception):
    """Raised by functions that a program asks to raise."""


def note_call(call: str) -> None:
    """Count a user-visible call that runs here."""
    with _ledger_lock:
        ledger[call] += 1


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# RPC targets.


def add(call: str, left: torch.Tensor, right: Any) -> torch.Tensor:
    """left + right, where right may be an RRef."""
    note_call(call)
    return left + (right if isinstance(right, torch.Tensor) else right.to_here())


def _script(function: Any) -> Any:
    """A TorchScript function: torch warns that they are deprecated, and they are what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


@_script
def script_add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left + right


@_script
def script_raise(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.numel() >= 0:
        raise RuntimeError("raised on purpose")  # noqa: EM101  (TorchScript)
    return left + right


def raise_on_purpose(call: str, left: torch.Tensor, right: Any) -> torch.Tensor:
    """Raise, whatever the arguments."""
    note_call(call)
    raise RaisedOnPurposeError(call)


def keep_handle(call: str, name: str, sent: Any) -> None:
    """Keep an RRef that arrived as an argument, alone or in a list or a dict."""
    note_call(call)
    if isinstance(sent, list):
        (sent,) = sent
    elif isinstance(sent, dict):
        sent = sent["rref"]
    _handles[name] = sent


def count(call: str) -> int:
    """Count one more, and say how many."""
    global _counter
    note_call(call)
    with _ledger_lock:
        _counter += 1
        return _counter


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def chained(call: str, then: str, left: torch.Tensor, right: torch.Tensor) -> Any:
    """Let another rank compute it; the answer goes out when that one's has come."""
    note_call(call)
    return rpc.rpc_async(then, add, args=(call + "/then", left, right))


def nested_remote(call: str, flavour: str, to: str, left: torch.Tensor, right: torch.Tensor) -> Any:
    """Call ``remote`` on a third rank and return the RRef."""
    note_call(call)
    args = (call + "/nested", left, right) if flavour == "python" else (left, right)
    return rpc.remote(to, _function(flavour), args=args)


class _Breaks(torch.autograd.Function):
    """Passes a tensor on, and raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        raise RaisedOnPurposeError


#: A rank of a context's path: its name, its factor, and whether its backward raises.
_Hop = tuple[str, float, bool]


def hop(call: str, factor: float, breaks: bool, x: torch.Tensor) -> torch.Tensor:
    """One hop of a context's path."""
    note_call(call)
    y = factor * x + 1.0
    broken: torch.Tensor = _Breaks.apply(y) if breaks else y  # type: ignore[no-untyped-call]
    return broken


def chain(call: str, hops: list[_Hop], factor: float, breaks: bool, x: torch.Tensor) -> Any:
    """One hop, then the rest of the path from there."""
    y = hop(call, factor, breaks, x)
    if not hops:
        return y
    (to, *here), *rest = hops
    return rpc.rpc_sync(to, chain, args=(call, rest, *here, y))


# Steps.


def run_step(
    index: int, step: Leaf, world: tuple[str, ...], contexts: dict[str, int]
) -> StepOutcome:
    """Run one step here. `world` holds the names of the ranks, `contexts` ids by name."""
    started = time.monotonic()
    value: Any = None
    error: RaisedError | None = None
    try:
        value = _run(f"step{index}", step, world, contexts)
    except BaseException as raised:
        error = RaisedError(type(raised).__name__, _message(raised), traceback.format_exc())
        # Frames of the traceback hold RRefs, which then would never be deleted.
        traceback.clear_frames(raised.__traceback__)
        del raised
    return StepOutcome(index, value, error, time.monotonic() - started)


def _message(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        # The agent puts the payload, which is binary, into the text of an injected failure.
        return error.object.decode(errors="backslashreplace")
    return text_of(error)


def _run(call: str, step: Leaf, world: tuple[str, ...], contexts: dict[str, int]) -> Any:
    match step:
        case Remote():
            _handles[step.out] = _remote(call, step, world[step.to])
        case Own():
            _handles[step.out] = rpc.RRef(_tensor(step.value))
        case Share():
            rref = _handle(step.handle)
            sent = {"list": [rref], "dict": {"rref": rref}}.get(step.inside, rref)
            timeout = _timeout(step.timeout)
            rpc.rpc_sync(world[step.to], keep_handle, args=(call, step.out, sent), timeout=timeout)
        case Fetch():
            return _handle(step.handle).to_here(timeout=_timeout(step.timeout)).tolist()
        case Local():
            return _handle(step.handle).local_value().tolist()
        case Call():
            return _call(call, step, world[step.to])
        case Wait():
            if step.future not in _futures:
                raise MissingHandleError(step.future)
            return _futures.pop(step.future).wait().tolist()
        case Count():
            return rpc.rpc_sync(world[step.to], count, args=(call,))
        case Chain():
            numbers = (_tensor(step.left), _tensor(step.right))
            args = (call, world[step.then], *numbers)
            return rpc.rpc_sync(world[step.to], chained, args=args).tolist()
        case Through():
            return _through(step)
        case Bump():
            rref = _handle(step.handle)
            return rpc.rpc_sync(rref.owner(), bump, args=(rref,)).tolist()
        case Nest():
            _handles[step.out] = rpc.rpc_sync(
                world[step.via],
                nested_remote,
                args=(call, step.flavour, world[step.to], _tensor(step.left), _tensor(step.right)),
            )
        case Drop():
            _drop(step)
        case Context():
            return _context(call, step, world)
        case Optimize() | Module():
            # Importing torch's optimizers takes more than a second: only who needs them does.
            training = importlib.import_module("rpcprops.cluster._training")
            return training.run(call, step, world)
        case Pause():
            time.sleep(step.seconds)
        case Refused():
            return _is_refused(contexts[step.context])
        case _:
            msg = f"step {step!r} is not run in a rank"
            raise TypeError(msg)
    return None


@_script
def bump(rref: rpc.RRef[torch.Tensor]) -> torch.Tensor:
    value: torch.Tensor = rref.local_value()
    return value.add_(1.0)


def _handle(name: str) -> Any:
    try:
        return _handles[name]
    except KeyError:
        raise MissingHandleError(name) from None


def _drop(step: Drop) -> None:
    if step.by == "scope":
        _leave_scope(step.handle)
    else:
        _handle(step.handle)
        del _handles[step.handle]
    gc.collect()


def _leave_scope(name: str) -> None:
    held = _handle(name)
    del _handles[name]
    held.owner()


def _argument(argument: Any) -> Any:
    return _handle(argument) if isinstance(argument, str) else _tensor(argument)


def _timeout(seconds: float | None) -> float:
    return UNSET_RPC_TIMEOUT if seconds is None else seconds


def _function(flavour: str, *, raises: bool = False) -> Any:
    if raises:
        return raise_on_purpose if flavour == "python" else script_raise
    return {"python": add, "builtin": torch.add, "script": script_add}[flavour]


def _remote(call: str, step: Remote, to: str) -> Any:
    left, right = _tensor(step.left), _argument(step.right)
    args = (call, left, right) if step.flavour == "python" else (left, right)
    function = _function(step.flavour, raises=step.raises)
    return rpc.remote(to, function, args=args, timeout=_timeout(step.timeout))


def _call(call: str, step: Call, to: str) -> Any:
    send: Any = rpc.rpc_sync if step.wait == "sync" else rpc.rpc_async
    left, right = _tensor(step.left), _argument(step.right)
    args = (call, left, right) if step.flavour == "python" else (left, right)
    function = _function(step.flavour, raises=step.raises)
    result = send(to, function, args=args, timeout=_timeout(step.timeout))
    if step.wait == "later":
        _futures[step.out] = result
        return None
    if step.wait == "async":
        result = result.wait()
    return result.tolist()


def _through(step: Through) -> Any:
    rref = _handle(step.handle)
    if step.how == "remote":
        _handles[step.out] = rref.remote().add(step.addend)
        return None
    timeout = _timeout(step.timeout)
    if step.how == "async":
        return rref.rpc_async(timeout).add(step.addend).wait().tolist()
    return rref.rpc_sync(timeout).add(step.addend).tolist()


def _context(call: str, step: Context, world: tuple[str, ...]) -> dict[str, Any]:
    leaf = _tensor(step.value).requires_grad_()
    result: dict[str, Any] = {}
    hops = [(world[rank], float(rank + 2), rank == step.breaks) for rank in step.path]
    try:
        with dist_autograd.context() as context_id:
            result["id"] = context_id
            y = leaf * leaf
            if step.nested and hops:
                (to, *here), *rest = hops
                send = _fetch_remote if step.rrefs else rpc.rpc_sync
                y = send(to, chain, args=(call, rest, *here, y))
            else:
                for to, *here in hops:
                    send = _fetch_remote if step.rrefs else rpc.rpc_sync
                    y = send(to, hop, args=(call, *here, y))
            loss = y.sum()
            result["loss"] = loss.item()
            if step.backward:
                _backward(context_id, loss, step, leaf, result)
            if step.raises:
                raise AbandonedError
    except AbandonedError:
        result["raised"] = True
    return result


def _backward(
    context_id: int, loss: torch.Tensor, step: Context, leaf: torch.Tensor, result: dict[str, Any]
) -> None:
    try:
        if step.retain:
            backward(context_id, [loss], retain_graph=True)
        backward(context_id, [loss])
    except RuntimeError as error:
        result["broke"] = str(error)
        traceback.clear_frames(error.__traceback__)
        return
    result["gradient"] = get_gradients(context_id)[leaf].tolist()


def _fetch_remote(to: str, function: Any, args: tuple[Any, ...]) -> Any:
    return rpc.remote(to, function, args=args).to_here()


def _is_refused(context_id: int) -> dict[str, Any]:
    try:
        retrieve_context(context_id)
    except RuntimeError as error:
        return {"refused": True, "message": str(error).splitlines()[0]}
    return {"refused": False}
