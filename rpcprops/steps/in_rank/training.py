"""Steps that train: separate from the others, because importing this takes more than a second."""

from __future__ import annotations

import gc
from time import sleep
from typing import Any

import torch
from torch.distributed import rpc
from torch.distributed.nn.api.remote_module import RemoteModule
from torch.distributed.optim import DistributedOptimizer

from rpcprops.steps.in_rank.constants import LEARNING_RATE, REFUSED_KEYWORDS, keywords
from rpcprops.steps.in_rank.graphs import gradient_of, gradient_there
from rpcprops.steps.in_rank.optimizers import Training, train_alone, train_otherwise, uses_of
from rpcprops.steps.in_rank.shared import dist_autograd, tensor
from rpcprops.steps.in_rank.state import contexts, note_slowly


class PlainSGD(torch.optim.SGD):
    """SGD under another name: torch compiles its own optimizers with TorchScript, slowly."""


class Affine(torch.nn.Module):
    """2 * x + 1 while it trains, and 2 * x - 1 else; without parameters."""

    def __init__(self, seconds: float) -> None:
        """A module that sleeps so long (virtual) in each call."""
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        sleep(self.seconds)
        return 2.0 * x + (1.0 if self.training else -1.0)


def optimize(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    owners: tuple[int, ...],
    value: tuple[float, ...],
    seconds: float,
) -> list[list[float]]:
    """Optimize one parameter at each owner once; the parameters, as their owners then hold them."""
    try:
        there = [world[owner] for owner in owners]
        return halve_parameters(call, name, there, tensor(value), seconds)
    finally:
        # The optimizer's RRefs are in cycles, which only a garbage collection frees.
        gc.collect()


def halve_parameters(
    call: str, name: str, owners: list[str], value: torch.Tensor, seconds: float
) -> list[list[float]]:
    """Make a parameter at each owner, and take one step of a DistributedOptimizer on all."""
    args = (call, value, seconds)
    rrefs: list[Any] = [rpc.remote(owner, make_parameter, args=args) for owner in owners]
    optimizer: Any = DistributedOptimizer(PlainSGD, rrefs, lr=LEARNING_RATE)  # type: ignore[no-untyped-call]
    with dist_autograd.context() as context_id:
        contexts[name] = context_id
        loss = torch.stack([rref.to_here().square().sum() for rref in rrefs]).sum()
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    return [rref.to_here().detach().tolist() for rref in rrefs]


def make_parameter(call: str, value: torch.Tensor, seconds: float) -> torch.Tensor:
    """A parameter to optimize, kept by the RRef of the ``rpc.remote`` that called this."""
    note_slowly(call, seconds)
    return value.clone().requires_grad_()


def train(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    owners: tuple[int, ...],
    optimizer: str,
    rounds: int,
    value: tuple[float, ...],
    seconds: float,
    options: tuple[str, ...],
    left_out: tuple[tuple[int, int], ...],
    refused: str,
) -> dict[str, Any]:
    """Optimize a parameter at each owner, and as many in this process alone; the parameters."""
    starts = [tensor(value) + number for number in range(len(owners))]
    uses = uses_of(rounds, len(owners), left_out)
    training = Training(optimizer, options, owners, starts, uses)
    try:
        rrefs: list[Any] = [
            rpc.remote(world[owner], make_parameter, args=(call, start, seconds))
            for owner, start in zip(owners, starts, strict=True)
        ]
        trainer = remote_optimizer(rrefs, training, refused)
        if refused:
            return {"parameters": None}
        parameters = train_parameters(name, rrefs, trainer, uses)
    finally:
        # The optimizer's RRefs are in cycles, and these RRefs in this frame.
        rrefs, trainer = [], None
        gc.collect()
    shown = {"parameters": parameters, "alone": train_alone(training)}
    otherwise = train_otherwise(training)
    return shown | ({} if otherwise in (None, shown["alone"]) else {"otherwise": otherwise})


def remote_optimizer(rrefs: list[Any], training: Training, refused: str) -> Any:
    """A DistributedOptimizer of parameters of other ranks."""
    given = keywords(training.options) | REFUSED_KEYWORDS.get(refused, {})
    made: Any = DistributedOptimizer(getattr(torch.optim, training.optimizer), rrefs, **given)  # type: ignore[no-untyped-call]
    return made


def train_parameters(
    name: str, rrefs: list[Any], trainer: Any, uses: tuple[tuple[int, ...], ...]
) -> list[list[float]]:
    """Take steps of a DistributedOptimizer, each in a context of its own."""
    for number, used in enumerate(uses):
        with dist_autograd.context() as context_id:
            if not number:
                contexts[name] = context_id
            losses = [rrefs[one].to_here().square().sum() for one in used]
            dist_autograd.backward(context_id, [torch.stack(losses).sum()])
            trainer.step(context_id)
    return [rref.to_here().detach().tolist() for rref in rrefs]


class Layer(torch.nn.Linear):
    """A linear layer with two outputs, whose weights count up from 1 and whose bias from 0."""

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        """A layer for so many inputs, which sleeps so long (virtual) in each call."""
        super().__init__(size, 2, dtype=torch.float64)
        self.seconds = seconds
        with torch.no_grad():
            rows = torch.arange(2.0).reshape(2, 1)
            self.weight.copy_(rows + torch.arange(float(size)) + 1.0)
            self.bias.copy_(rows.flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        sleep(self.seconds)
        return super().forward(x)


def linear(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    to: int,
    value: tuple[float, ...],
    by: str,
    seconds: float,
) -> dict[str, Any]:
    """Run backward through a layer at another rank, and through one here."""
    try:
        result = remote_layer(world[to], name, tensor(value).requires_grad_(), by, seconds)
    finally:
        # As in module(), where a RemoteModule refers to itself.
        gc.collect()
    leaf = tensor(value).requires_grad_()
    layer = Layer(len(value))
    torch.autograd.backward(layer(leaf).square().sum())
    alone = [leaf.grad, layer.weight.grad, layer.bias.grad]
    return result | {"alone": [one.flatten().tolist() for one in alone if one is not None]}


def remote_layer(to: str, name: str, leaf: torch.Tensor, by: str, seconds: float) -> dict[str, Any]:
    """The id of a context, what a layer at another rank gives in it, and the gradients."""
    layer: Any = RemoteModule(f"{to}/cpu", Layer, args=(len(leaf), seconds))
    parameters = layer.remote_parameters()
    with dist_autograd.context() as context_id:
        contexts[name] = context_id
        if by == "forward":
            y = layer.forward(leaf)
        elif by == "async":
            y = layer.forward_async(leaf).wait()
        else:
            y = layer.get_module_rref().rpc_sync().forward(leaf)
        dist_autograd.backward(context_id, [y.square().sum()])
        gradients = [
            gradient_of(context_id, leaf),
            *(rpc.rpc_sync(to, gradient_there, args=(context_id, one)) for one in parameters),
        ]
        return {"id": context_id, "outputs": y.tolist(), "gradients": gradients}


def module(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    value: tuple[float, ...],
    seconds: float,
    mode: str,
    again: bool,
) -> list[float]:
    """Make a RemoteModule at another rank, perhaps change its mode, and call it once."""
    there = f"{world[to]}/cpu"
    try:
        remote_affine: Any = RemoteModule(there, Affine, args=(seconds,))
        if mode:
            remote_affine.eval()
        if mode == "train":
            remote_affine.train()
        if again:
            remote_affine = RemoteModule.init_from_module_rref(
                there, remote_affine.get_module_rref()
            )
        numbers: list[float] = remote_affine.forward(tensor(value)).tolist()
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
