"""Steps that train: separate from the others, because importing this takes more than a second."""

from __future__ import annotations

import gc
from time import sleep
from typing import Any

import torch
from torch.distributed import rpc
from torch.distributed.nn.api.remote_module import RemoteModule
from torch.distributed.optim import DistributedOptimizer

from rpcprops.steps.in_rank.constants import (
    LEARNING_RATE,
    REFUSED_KEYWORDS,
    REFUSED_METHODS,
    RETURNS_ITSELF,
)
from rpcprops.steps.in_rank.layers import (
    LAYERS,
    compute_alone,
    inputs_of,
    numbers_of,
    state_of,
)
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
    placed: bool,
) -> dict[str, Any]:
    """Optimize a parameter at each owner, and as many in this process alone; the parameters."""
    starts = [tensor(value) + number for number in range(len(owners))]
    uses = uses_of(rounds, len(owners), left_out)
    training = Training(optimizer, options, owners, starts, uses, placed)
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
    placed, named = training.arguments(REFUSED_KEYWORDS.get(refused, {}))
    made: Any = DistributedOptimizer(training.constructor, rrefs, *placed, **named)  # type: ignore[no-untyped-call]
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


def linear(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    to: int,
    value: tuple[float, ...],
    by: str,
    seconds: float,
    layer: str,
) -> dict[str, Any]:
    """Run backward through a layer at another rank, and through one here."""
    try:
        result = remote_layer(world[to], name, layer, value, by, seconds)
    finally:
        # As in module(), where a RemoteModule refers to itself.
        gc.collect()
    # A proxy is asked for `forward` itself.
    alone = compute_alone(layer, value, 0.0, hooks=by != "proxy")
    otherwise = compute_alone(layer, value, 0.0, hooks=False) if layer == "hooked" else alone
    return {**result, "alone": alone} | ({} if otherwise == alone else {"otherwise": otherwise})


def remote_layer(
    to: str, name: str, kind: str, value: tuple[float, ...], by: str, seconds: float
) -> dict[str, Any]:
    """The id of a context, and what a layer at another rank gives in it."""
    layer: Any = RemoteModule(f"{to}/cpu", LAYERS[kind], args=(len(value), seconds))
    parameters = layer.remote_parameters()
    args, named, leaves = inputs_of(kind, value)
    with dist_autograd.context() as context_id:
        contexts[name] = context_id
        if by == "forward":
            y = layer.forward(*args, **named)
        elif by == "call":
            y = layer(*args, **named)
        elif by == "async":
            y = layer.forward_async(*args, **named).wait()
        else:
            y = layer.get_module_rref().rpc_sync().forward(*args, **named)
        dist_autograd.backward(context_id, [y.square().sum()])
        gradients = [
            *(gradient_here(context_id, leaf) for leaf in leaves),
            *(rpc.rpc_sync(to, dense_gradient_there, args=(context_id, one)) for one in parameters),
        ]
        state = rpc.rpc_sync(to, state_there, args=(layer.get_module_rref(),))
        return {
            "id": context_id,
            "outputs": numbers_of(y),
            "gradients": gradients,
            "state": state,
        }


def dense_gradient_there(context_id: int, rref: Any) -> list[float] | None:
    """The gradient of a parameter that this rank owns, in a context; None if there is none."""
    return gradient_here(context_id, rref.local_value())


def gradient_here(context_id: int, leaf: torch.Tensor) -> list[float] | None:
    """The gradient of a leaf of this rank, dense or sparse."""
    return numbers_of(dist_autograd.get_gradients(context_id).get(leaf))


def state_there(rref: Any) -> list[list[float] | None]:
    """The buffers of a layer of this rank."""
    return state_of(rref.local_value())


def module(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    value: tuple[float, ...],
    seconds: float,
    mode: str,
    again: bool,
    refused: str,
    called: bool,
    sent: bool,
) -> list[float]:
    """Make a RemoteModule at another rank, perhaps change its mode, and use it once or twice."""
    there = f"{world[to]}/cpu"
    try:
        remote_affine: Any = RemoteModule(there, Affine, args=(seconds,))
        set_mode(remote_affine, mode)
        if again:
            remote_affine = RemoteModule.init_from_module_rref(
                there, remote_affine.get_module_rref()
            )
        if refused:
            must_refuse(remote_affine, refused)
        numbers = use(remote_affine, tensor(value), called=called)
        if sent:
            args = (remote_affine, tensor(value), called)
            there = rpc.rpc_sync(world[to], use_sent, args=args)
            if isinstance(there, str):
                raise AttributeError(there)
            numbers += there
        return numbers
    finally:
        # A RemoteModule refers to itself, so only a garbage collection frees its RRef.
        gc.collect()


def set_mode(remote_module: Any, mode: str) -> None:
    """Put a module into a mode, in one of the ways that a module has.

    Raises:
        RuntimeError: it had to return itself, and has not.
    """
    if mode in ("eval", "train", "returned"):
        returned = remote_module.eval()
        if mode == "returned" and returned is not remote_module:
            msg = f"{RETURNS_ITSELF}: {type(returned).__name__}"
            raise RuntimeError(msg)
    if mode == "train":
        remote_module.train()
    elif mode == "train(False)":
        remote_module.train(False)
    elif mode == "parent":
        parent: Any = torch.nn.Module()
        parent.child = remote_module
        parent.eval()


def use(module: Any, value: torch.Tensor, *, called: bool) -> list[float]:
    """What a module gives, when it is called or when its forward is."""
    result = module(value) if called else module.forward(value)
    numbers: list[float] = result.tolist()
    return numbers


def use_sent(module: Any, value: torch.Tensor, called: bool) -> list[float] | str:
    """The same, of a module that was sent here; the text of an AttributeError.

    Torch would make a RuntimeError of that, as of what else may be raised here.
    """
    try:
        return use(module, value, called=called)
    except AttributeError as error:
        return str(error)
    finally:
        # It refers to itself, and the caller's arguments to it, so no garbage collection frees it.
        vars(module).clear()


def must_refuse(remote_module: Any, name: str) -> None:
    """Call a method that a RemoteModule refuses by a ValueError which names the method.

    Raises:
        RuntimeError: it does not.
    """
    try:
        said = repr(getattr(remote_module, name)(*REFUSED_METHODS[name]))
    except ValueError as error:
        said = str(error)
    if f"Method ``{name}`` not supported" not in said:
        msg = f"{name} had to be refused, and gave {said}"
        raise RuntimeError(msg)


def _warm_up() -> None:
    """Make an optimizer before ranks are forked: the first in a process imports 200 modules.

    The gradient is set by hand, because a backward pass starts threads.
    """
    parameter = torch.ones(1, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(1, dtype=torch.float64)
    PlainSGD([parameter], lr=LEARNING_RATE).step()


_warm_up()
