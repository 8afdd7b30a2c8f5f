"""The steps of a program that train; apart, because importing them takes more than a second."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.nn.api.remote_module import RemoteModule
from torch.distributed.optim import DistributedOptimizer

from rpcprops.cluster._interpreter import note_call
from rpcprops.programs import Module, Optimize
from rpcprops.torch_facts.symbols import backward

LEARNING_RATE = 0.25


class PlainSGD(torch.optim.SGD):
    """SGD under a name of its own: torch compiles its own optimizers by TorchScript, slowly."""


def _warm_up() -> None:
    """The first optimizer of a process imports two hundred modules; once, before ranks are forked.

    The gradient is set by hand, since a backward pass starts threads.
    """
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    PlainSGD([parameter], lr=LEARNING_RATE).step()


_warm_up()


class Affine(torch.nn.Module):
    """2 * x + 1, without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        return 2.0 * x + 1.0


def make_parameter(call: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter to optimize, kept by the RRef of the ``remote`` that called this."""
    note_call(call)
    return value.clone().requires_grad_()


def run(call: str, step: Optimize | Module, world: tuple[str, ...]) -> Any:
    """Run such a step here; what it gives."""
    value = torch.tensor(step.value, dtype=torch.float64)
    try:
        if isinstance(step, Module):
            module = RemoteModule(f"{world[step.to]}/cpu", Affine)
            return module.forward(value).tolist()
        return _optimize(call, [world[owner] for owner in step.owners], value)
    finally:
        # A RemoteModule refers to itself, so its RRef goes with a collection only.
        gc.collect()


def _optimize(call: str, owners: list[str], value: torch.Tensor) -> list[list[float]]:
    """One step on a parameter at each owner; the parameters, as their owners then hold them."""
    rrefs: list[Any] = [rpc.remote(owner, make_parameter, args=(call, value)) for owner in owners]
    optimizer: Any = DistributedOptimizer(PlainSGD, rrefs, lr=LEARNING_RATE)  # type: ignore[no-untyped-call]
    with dist_autograd.context() as context_id:
        loss = torch.stack([rref.to_here().square().sum() for rref in rrefs]).sum()
        backward(context_id, [loss])
        optimizer.step(context_id)
    return [rref.to_here().detach().tolist() for rref in rrefs]
