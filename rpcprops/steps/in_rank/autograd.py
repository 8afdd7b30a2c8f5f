"""Steps with distributed autograd: a context through other ranks, and a request for an old one."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import dist_autograd, tensor
from rpcprops.steps.in_rank.state import contexts, note_call
from rpcprops.steps.in_rank.sums import RaisedOnPurposeError


class AbandonedError(Exception):
    """Raised inside a context, to leave it by an exception."""


class BreaksInBackward(torch.autograd.Function):
    """Passes a tensor on, and raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Copy the tensor."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        """Raise."""
        raise RaisedOnPurposeError


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
) -> dict[str, Any]:
    """Send a tensor through the ranks of `path` and run backward, in a context of its own.

    Each rank r of the path maps x to (r + 2) * x + 1. With `nested` each rank calls the next one.
    """
    leaf = tensor(value).requires_grad_()
    result: dict[str, Any] = {}
    # A hop is a rank's name, its factor, and whether its backward raises.
    hops = [(world[rank], float(rank + 2), rank == breaks) for rank in path]
    send: Any = call_remote if rrefs else rpc.rpc_sync
    try:
        with dist_autograd.context() as context_id:
            result["id"] = contexts[name] = context_id
            y = leaf * leaf
            if nested and hops:
                (to, *here), *rest = hops
                y = send(to, hop_on, args=(call, rest, *here, y))
            else:
                for to, *here in hops:
                    y = send(to, hop, args=(call, *here, y))
            loss = y.sum()
            result["loss"] = loss.item()
            if backward:
                result |= run_backward(context_id, loss, leaf, retain=retain)
            if raises:
                raise AbandonedError
    except AbandonedError:
        result["raised"] = True
    return result


def call_remote(to: str, function: Any, args: tuple[Any, ...]) -> Any:
    """As ``rpc_sync``, but through an RRef that is fetched at once."""
    return rpc.remote(to, function, args=args).to_here()


def hop(call: str, factor: float, breaks: bool, x: torch.Tensor) -> torch.Tensor:
    """One hop of a context's path."""
    note_call(call)
    y = factor * x + 1.0
    broken: torch.Tensor = BreaksInBackward.apply(y) if breaks else y  # type: ignore[no-untyped-call]
    return broken


def hop_on(
    call: str, hops: list[tuple[str, float, bool]], factor: float, breaks: bool, x: torch.Tensor
) -> Any:
    """One hop, then the rest of the path from this rank."""
    y = hop(call, factor, breaks, x)
    if not hops:
        return y
    (to, *here), *rest = hops
    return rpc.rpc_sync(to, hop_on, args=(call, rest, *here, y))


def run_backward(
    context_id: int, loss: torch.Tensor, leaf: torch.Tensor, *, retain: bool
) -> dict[str, Any]:
    """Run backward, with `retain` twice; the gradient of the leaf, or the error of backward."""
    try:
        if retain:
            dist_autograd.backward(context_id, [loss], retain_graph=True)
        dist_autograd.backward(context_id, [loss])
    except RuntimeError as error:
        # The frames of a traceback hold objects that would otherwise be freed.
        traceback.clear_frames(error.__traceback__)
        return {"broke": str(error)}
    return {"gradient": dist_autograd.get_gradients(context_id)[leaf].tolist()}


def refused(call: str, world: tuple[str, ...], *, context: str) -> dict[str, Any]:
    """Ask for a context that has ended; its id must be refused."""
    try:
        dist_autograd._retrieve_context(contexts[context])
    except RuntimeError as error:
        return {"refused": True, "message": str(error).splitlines()[0]}
    return {"refused": False}
