"""Steps with distributed autograd: a context through other ranks, and a request for an old one."""

from __future__ import annotations

import contextlib
import ctypes
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.distributed import rpc

from rpcprops.steps.in_rank.constants import LATE_LASTS, LATE_TIMEOUT
from rpcprops.steps.in_rank.shared import SlowNumber, dist_autograd, target_of, tensor, timeout_of
from rpcprops.steps.in_rank.state import (
    MissingHandleError,
    contexts,
    note_call,
    note_slowly,
    ran,
    until_ran,
)
from rpcprops.steps.in_rank.sums import RaisedOnPurposeError, torchscript


class AbandonedError(Exception):
    """Raised inside a context, to leave it by an exception."""


#: The text of an exception in backward.
ON_PURPOSE = "raised on purpose"


class BreaksInBackward(torch.autograd.Function):
    """Passes a tensor on, and raises in backward after some seconds (virtual)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        """Copy the tensor."""
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sleep and raise."""
        if ctx.seconds:
            time.sleep(ctx.seconds)
        raise RaisedOnPurposeError(ON_PURPOSE)


def context(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    path: tuple[int, ...],
    value: tuple[float, ...],
    nested: bool,
    rrefs: bool,
    backward: bool,
    raises: bool,
    retain: bool,
    breaks: int | None,
    flavour: str,
    wait: str,
    named: str,
    seconds: float,
    profiled: bool,
    root: int | None,
    timeout: float | None,
    late: int | None,
) -> dict[str, Any]:
    """Send a tensor through the ranks of `path` and run backward, in a context of its own.

    Each rank r of the path maps x to (r + 2) * x + 1. With `nested` each rank calls the next one.
    With `profiled` all of that is inside torch's legacy profiler. The calls of this rank have a
    `timeout`, if there is one. The call of the hop of the number `late` times out.
    """
    leaf = tensor(value).requires_grad_()
    result: dict[str, Any] = {}
    # A hop is a rank's name, its factor, whether its backward raises, how long it sleeps, and
    # whether its call times out.
    hops = [
        (world[rank], float(rank + 2), rank == breaks, seconds, number == late)
        for number, rank in enumerate(path)
    ]
    send: Any = call_remote if rrefs else {"sync": rpc.rpc_sync, "async": call_async}[wait]
    send = partial(send, timeout=timeout_of(timeout))
    make_profiler: Any = legacy_profile if profiled else contextlib.nullcontext
    profiler = make_profiler()
    try:
        with profiler, dist_autograd.context() as context_id:
            result["id"] = contexts[name] = context_id
            y = leaf * leaf
            if nested and hops:
                (to, *here), *rest = hops
                there = target_of(world, world.index(to), named)
                y = call_next(send, there, (call, context_id), rest, here, y)
            else:
                for to, *here, is_late in hops:
                    there = target_of(world, world.index(to), named)
                    if is_late:
                        y = call_late(send, there, (call, context_id), [], here[0], y)
                    function, args = hop_call(flavour, call, here, y)
                    y = send(there, function, args=args)
            loss: Any = y.sum() if root is None else owned_sum(call, world[root], y)
            if backward:
                retains = (True, False) if retain else (False,)
                passes = [partial(pass_back, context_id, loss, retain=one) for one in retains]
                result |= run_backward(context_id, passes, leaf)
            result["loss"] = loss.item() if root is None else number_at_owner(loss)
            if raises:
                raise AbandonedError
    except AbandonedError:
        result["raised"] = True
    if profiled:
        here_only = [event.name for event in profiler.function_events if not event.is_remote]
        result["profiled"] = sum(event.startswith("rpc_sync#hop") for event in here_only)
    return result


def call_remote(to: Any, function: Any, args: tuple[Any, ...], timeout: float) -> Any:
    """As ``rpc_sync``, but through an RRef that is fetched at once, with that timeout."""
    return rpc.remote(to, function, args=args).to_here(timeout)


def call_async(to: Any, function: Any, args: tuple[Any, ...], timeout: float) -> Any:
    """As ``rpc_sync``, but by a future."""
    return rpc.rpc_async(to, function, args=args, timeout=timeout).wait()


def hop_call(
    flavour: str, call: str, here: Sequence[Any], x: torch.Tensor
) -> tuple[Any, tuple[Any, ...]]:
    """The function of one hop, and its arguments; `here` is the hop without its rank."""
    factor = here[0]
    if flavour == "builtin":
        ones = torch.ones_like(x)
        return torch.addcmul, (ones, x, factor * ones)
    if flavour == "script":
        return script_hop, (x, factor)
    return hop, (call, *here, x)


@torchscript
def script_hop(x: torch.Tensor, factor: float) -> torch.Tensor:
    """One hop of a context's path, in TorchScript."""
    return factor * x + 1.0


def hop(call: str, factor: float, breaks: bool, seconds: float, x: torch.Tensor) -> torch.Tensor:
    """One hop of a context's path."""
    note_slowly(call, seconds)
    y = factor * x + 1.0
    return break_in_backward(y, 0.0) if breaks else y


def break_in_backward(x: torch.Tensor, seconds: float) -> torch.Tensor:
    """The same tensor, whose backward raises after some seconds (virtual)."""
    broken: torch.Tensor = BreaksInBackward.apply(x, seconds)  # type: ignore[no-untyped-call]
    return broken


#: A hop of a path: see :func:`context`.
Hop = tuple[str, float, bool, float, bool]


def call_next(
    send: Any,
    to: Any,
    where: tuple[str, int],
    rest: list[Hop],
    here: Sequence[Any],
    x: torch.Tensor,
) -> Any:
    """Let a rank do one hop, and the rest of the path; `here` is the hop without its rank.

    `where` is the name of the call, and the id of the context.
    """
    *how, is_late = here
    if is_late:
        return call_late(send, to, where, rest, how[0], x)
    return send(to, hop_on, args=(where, rest, *how, x))


def hop_on(
    where: tuple[str, int],
    hops: list[Hop],
    factor: float,
    breaks: bool,
    seconds: float,
    x: torch.Tensor,
) -> Any:
    """One hop, then the rest of the path from this rank."""
    y = hop(where[0], factor, breaks, seconds, x)
    if not hops:
        return y
    (to, *here), *rest = hops
    return call_next(rpc.rpc_sync, to, where, rest, here, y)


def call_late(
    send: Any,
    to: Any,
    where: tuple[str, int],
    rest: list[Hop],
    factor: float,
    x: torch.Tensor,
) -> Any:
    """Call a rank that answers only once it has given the context up; the call must time out.

    Its function has begun when the error goes on from here, so the rank has the context by then.
    """
    try:
        return send(to, hop_late, args=(where, rest, factor, x), timeout=LATE_TIMEOUT)
    except RuntimeError:
        rpc.rpc_sync(to, until_ran, args=(f"{where[0]}/late",))
        raise


def hop_late(
    where: tuple[str, int], hops: list[Hop], factor: float, x: torch.Tensor
) -> torch.Tensor | None:
    """One hop when this rank has given the context up; then a call of the next rank."""
    call, context_id = where
    note_call(f"{call}/late")
    ends = time.monotonic() + LATE_LASTS
    while time.monotonic() < ends and not has_gone(context_id):
        time.sleep(0.5)
    is_gone = has_gone(context_id)
    y: torch.Tensor | None = factor * (x if is_gone else x.detach()) + 1.0
    if hops and is_gone:
        # This raises before anything is sent.
        y = unless_context_is_gone(lambda: rpc.rpc_sync(hops[0][0], same_tensor, args=(y,)))
    note_call(f"{call}/slept")
    return y


def owned_sum(call: str, owner: str, x: torch.Tensor) -> Any:
    """An RRef to the sum of a tensor, which the owner computes."""
    if owner == rpc.get_worker_info().name:
        return rpc.RRef(x.sum())
    return rpc.remote(owner, sum_there, args=(call + "/root", x))


def sum_there(call: str, x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor."""
    note_call(call)
    return x.sum()


def number_at_owner(rref: Any) -> float:
    """The number that an RRef holds; its owner sends no tensor, which would be a part of a pass."""
    if rref.is_owner():
        return number_here(rref)
    number: float = rpc.rpc_sync(rref.owner(), number_here, args=(rref,))
    return number


def number_here(rref: Any) -> float:
    """The number that an RRef of this rank holds."""
    number: float = rref.local_value().item()
    return number


def pass_back(context_id: int, loss: Any, *, retain: bool) -> None:
    """Run backward from a tensor, or from that of an RRef."""
    if isinstance(loss, torch.Tensor):
        dist_autograd.backward(context_id, [loss], retain_graph=retain)
        return
    rref: Any = loss
    rref.backward(context_id, retain)


def run_backward(
    context_id: int, passes: Sequence[Callable[[], None]], leaf: torch.Tensor
) -> dict[str, Any]:
    """Run some backward passes; the gradient of the leaf, or the error of one of them."""
    try:
        for one in passes:
            one()
    except RuntimeError as error:
        # The frames of a traceback hold objects that would otherwise be freed.
        traceback.clear_frames(error.__traceback__)
        return {"broke": str(error)}
    except UnicodeDecodeError as error:
        # The text of an injected failure quotes the gradients, which are binary.
        traceback.clear_frames(error.__traceback__)
        return {"broke": error.object.decode(errors="backslashreplace")}
    return {"gradient": dist_autograd.get_gradients(context_id)[leaf].tolist()}


#: Virtual seconds after which a call of such a step times out, unless all of it takes less.
SHORT_TIMEOUT = 4.0
#: What torch says where a rank has given a context up.
CONTEXT_IS_GONE = "find autograd context"


def outlast(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    name: str,
    what: str,
    by: str,
    then: int,
    left: tuple[float, ...],
    right: tuple[float, ...],
    seconds: float,
    through: str,
    named: str,
) -> dict[str, Any]:
    """Leave a context while a call of it runs; then wait for the call, if it has not timed out.

    Before it leaves, the call has begun to run, so that its rank has the context, and it goes on
    once that rank has given the context up. A call whose argument is slow to be unpickled has not
    begun.
    """
    terms = (tensor(left).requires_grad_(what == "gradient"), tensor(right))
    slow = SlowNumber(0.0, seconds) if what == "argument" else seconds
    further = world[then] if what == "call" else ""
    result: dict[str, Any] = {}
    future: Any = None
    with dist_autograd.context() as context_id:
        result["id"] = contexts[name] = context_id
        args = (call, *terms, slow, context_id, further)
        there = target_of(world, to, named)
        if by == "async":
            future = rpc.rpc_async(there, add_afterwards, args=args)
        else:
            result |= time_out(through, there, args, min(seconds / 4, SHORT_TIMEOUT))
        while what != "argument" and not rpc.rpc_sync(world[to], has_run, args=(call,)):
            time.sleep(0.05)
    if future is None:
        return result
    total = unless_context_is_gone(future.wait)
    return {**result, "lost": True} if total is None else {**result, "sum": total.tolist()}


class PatientAdder:
    """What a proxy stands for: it adds at the rank of its RRef."""

    def is_there(self) -> bool:
        """Answer at once."""
        return True

    def add(self, *args: Any) -> torch.Tensor | None:
        """Add when the context has gone."""
        return add_afterwards(*args)


def time_out(through: str, to: Any, args: tuple[Any, ...], timeout: float) -> dict[str, Any]:
    """Call with a timeout, and say whether it came."""
    rref: Any = None
    if through == "proxy":
        rref = rpc.remote(to, PatientAdder)
        # From here on the type of its value is known here, so only the call itself can time out.
        rref.rpc_sync().is_there()
    elif through == "remote":
        rref = rpc.remote(to, add_afterwards, args=args)
    try:
        if through == "call":
            rpc.rpc_sync(to, add_afterwards, args=args, timeout=timeout)
        elif through == "future":
            rpc.rpc_async(to, add_afterwards, args=args, timeout=timeout).wait()
        elif through == "remote":
            rref.to_here(timeout)
        else:
            rref.rpc_sync(timeout).add(*args)
    except RuntimeError as error:
        if "timeout" not in str(error):
            raise
        # The frames of a traceback hold the RRef.
        traceback.clear_frames(error.__traceback__)
        return {"timed out": True}
    return {}


def has_run(call: str) -> bool:
    """Whether a call has begun to run in this rank."""
    return ran[call] > 0


def unless_context_is_gone(function: Callable[[], Any]) -> Any:
    """What a function returns; None if it raises that a context is gone."""
    try:
        return function()
    except RuntimeError as error:
        if CONTEXT_IS_GONE not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return None


def add_afterwards(
    call: str, left: torch.Tensor, right: torch.Tensor, seconds: float, context_id: int, then: str
) -> torch.Tensor | None:
    """Add when the context has gone; the sum may go by a further rank, if there is one for that."""
    note_call(call)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not has_gone(context_id):
        time.sleep(0.5)
    total = left + right
    if not then:
        return total
    back: torch.Tensor | None = unless_context_is_gone(
        lambda: rpc.rpc_sync(then, same_tensor, args=(total,))
    )
    return back


def has_gone(context_id: int) -> bool:
    """Whether this rank has given a context up."""
    return unless_context_is_gone(lambda: dist_autograd._retrieve_context(context_id)) is None


def same_tensor(x: torch.Tensor) -> torch.Tensor:
    """The same tensor."""
    return x


def refused(call: str, world: tuple[str, ...], *, context: str) -> dict[str, Any]:
    """Ask for a context that has ended; its id must be refused."""
    if context not in contexts:
        # The step that names it failed before it entered a context.
        raise MissingHandleError(context)
    try:
        dist_autograd._retrieve_context(contexts[context])
    except RuntimeError as error:
        return {"refused": True, "message": str(error).splitlines()[0]}
    return {"refused": False}


def fail_twice(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    then: int,
    name: str,
    value: tuple[float, ...],
    seconds: float,
) -> dict[str, Any]:
    """Run a backward pass that raises at `to`, leave its context, and wait until `then` raises.

    In between, the memory that has become free is used for something else.
    """
    ends = time.monotonic() + 2.0 * seconds
    result = fail_at_two(call, {world[to]: seconds / 4.0, world[then]: seconds}, name, value)
    # From here on nothing of this rank's Python refers to the context.
    kept = use_free_memory()
    time.sleep(max(0.0, ends - time.monotonic()))
    give_back(kept)
    return result


def fail_at_two(
    call: str, fails: dict[str, float], name: str, value: tuple[float, ...]
) -> dict[str, Any]:
    """Run a backward pass through ranks, each of which raises after that many seconds (virtual)."""
    leaf = tensor(value).requires_grad_()
    result: dict[str, Any] = {}
    with dist_autograd.context() as context_id:
        result["id"] = contexts[name] = context_id
        results = [
            rpc.rpc_sync(to, break_later, args=(call, leaf, seconds))
            for to, seconds in fails.items()
        ]
        loss = sum(one.sum() for one in results)
        result["loss"] = loss.item()
        passes = [partial(dist_autograd.backward, context_id, [loss])]
        result |= run_backward(context_id, passes, leaf)
    # Threads of torch hold the context for another moment. After that only the graph of `loss`
    # refers to it, weakly, which keeps its memory until this function returns.
    time.sleep(min(fails.values()))
    return result


def break_later(call: str, x: torch.Tensor, seconds: float) -> torch.Tensor:
    """Double a tensor; its backward raises."""
    note_call(call)
    return break_in_backward(2.0 * x, seconds)


#: Sizes of the pieces of memory that are used, in bytes: each that glibc's malloc keeps apart,
#: eight times. For every thread and size it keeps up to seven pieces that the thread has freed.
PIECES = [size for size in range(24, 1033, 16) for _ in range(8)]


def use_free_memory() -> list[int]:
    """Take memory that has just become free in this thread, and write text into it.

    Where a mutex was, this text asks for a priority that does not exist, and glibc ends the process
    when the mutex is locked.
    """
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    kept: list[int] = []
    for size in PIECES:
        address = library.malloc(ctypes.c_size_t(size))
        ctypes.memset(address, ord("@"), size)
        kept.append(address)
    return kept


def give_back(kept: list[int]) -> None:
    """Free that memory."""
    library = ctypes.CDLL(None)
    for address in kept:
        library.free(ctypes.c_void_p(address))
