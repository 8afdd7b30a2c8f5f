"""Steps that train: separate from the others, because importing this takes more than a second."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.distributed import rpc
from torch.distributed.nn.api.remote_module import RemoteModule
from torch.distributed.optim import DistributedOptimizer

from rpcprops.steps.in_rank.shared import dist_autograd, tensor
from rpcprops.steps.in_rank.state import contexts, note_call

#: With this rate, a step of the optimizer halves a parameter whose loss is its square.
LEARNING_RATE = 0.25


class PlainSGD(torch.optim.SGD):
    """SGD under another name: torch compiles its own optimizers with TorchScript, slowly."""


class Affine(torch.nn.Module):
    """2 * x + 1, without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return 2.0 * x + 1.0


def optimize(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    owners: tuple[int, ...],
    value: tuple[float, ...],
) -> list[list[float]]:
    """Optimize one parameter at each owner once; the parameters, as their owners then hold them."""
    try:
        return halve_parameters(call, name, [world[owner] for owner in owners], tensor(value))
    finally:
        # The optimizer's RRefs are in cycles, which only a garbage collection frees.
        gc.collect()


def halve_parameters(
    call: str, name: str, owners: list[str], value: torch.Tensor
) -> list[list[float]]:
    """Make a parameter at each owner, and take one step of a DistributedOptimizer on all."""
    rrefs: list[Any] = [rpc.remote(owner, make_parameter, args=(call, value)) for owner in owners]
    optimizer: Any = DistributedOptimizer(PlainSGD, rrefs, lr=LEARNING_RATE)  # type: ignore[no-untyped-call]
    with dist_autograd.context() as context_id:
        contexts[name] = context_id
        loss = torch.stack([rref.to_here().square().sum() for rref in rrefs]).sum()
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    return [rref.to_here().detach().tolist() for rref in rrefs]


def make_parameter(call: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter to optimize, kept by the RRef of the ``rpc.remote`` that called this."""
    note_call(call)
    return value.clone().requires_grad_()


def module(call: str, world: tuple[str, ...], *, to: int, value: tuple[float, ...]) -> list[float]:
    """Make a RemoteModule at another rank, and call it once."""
    try:
        affine = RemoteModule(f"{world[to]}/cpu", Affine)
        numbers: list[float] = affine.forward(tensor(value)).tolist()
        return numbers
    finally:
        # A RemoteModule refers to itself, so only a garbage collection frees its RRef.
        gc.collect()


def _warm_up() -> None:
    """Make an optimizer before ranks are forked: the first in a process imports 200 modules.

    The gradient is set by hand, because a backward pass starts threads.
    """
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    PlainSGD([parameter], lr=LEARNING_RATE).step()


_warm_up()
