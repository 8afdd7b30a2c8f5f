"""The layers that remote modules of programs are, with parameters that are always the same."""

from __future__ import annotations

from time import sleep
from typing import Any, NamedTuple

import torch

from rpcprops.steps.in_rank.shared import tensor


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


class Hooked(Layer):
    """The same, with hooks that double the inputs and count the outputs up."""

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        """A layer for so many inputs."""
        super().__init__(size, seconds)
        self.register_forward_pre_hook(double_inputs)
        self.register_forward_hook(count_up)


def double_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A hook before each call."""
    return 2.0 * inputs[0]


def count_up(_: torch.nn.Module, __: Any, outputs: torch.Tensor) -> torch.Tensor:
    """A hook after each call."""
    return outputs + 1.0


class Named(Layer):
    """The same, of the product of two inputs, with keywords that change the outputs."""

    def forward(
        self, x: torch.Tensor, other: Any = None, *, scale: float = 1.0, device: str = ""
    ) -> torch.Tensor:
        """One call; the name of a device changes nothing."""
        return scale * super().forward(x * other)


class Dropped(torch.nn.Module):
    """A linear layer and a dropout in a sequence, in evaluation mode."""

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        """A layer for so many inputs."""
        super().__init__()
        self.layers = torch.nn.Sequential(Layer(size, seconds), torch.nn.Dropout(0.5))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call."""
        found: torch.Tensor = self.layers(x)
        return found


class Normed(torch.nn.Module):
    """A batch norm in training mode, which counts its calls and keeps running figures."""

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        """A layer for so many inputs."""
        super().__init__()
        self.seconds = seconds
        self.norm = torch.nn.BatchNorm1d(size, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call, with a batch of two: the input, and other numbers."""
        sleep(self.seconds)
        other = 2.0 * x.detach() + torch.arange(len(x)) + 1.0
        found: torch.Tensor = self.norm(torch.stack([x, other])) + x
        return found


class Rows(torch.nn.Module):
    """An embedding of four rows of two numbers, which count up from 1."""

    sparse = False

    def __init__(self, _: int, seconds: float = 0.0) -> None:
        """A table, perhaps with sparse gradients."""
        super().__init__()
        self.seconds = seconds
        self.rows = torch.nn.Embedding(4, 2, sparse=self.sparse, dtype=torch.float64)
        with torch.no_grad():
            self.rows.weight.copy_(torch.arange(8.0).reshape(4, 2) + 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One call; the input holds numbers of rows, and may hold some more than once."""
        sleep(self.seconds)
        found: torch.Tensor = self.rows(x)
        return found


class SparseRows(Rows):
    """The same with sparse gradients."""

    sparse = True


LAYERS: dict[str, type[torch.nn.Module]] = {
    "linear": Layer,
    "dropout": Dropped,
    "norm": Normed,
    "embedding": Rows,
    "sparse": SparseRows,
    "keywords": Named,
    "device": Named,
    "hooked": Hooked,
}


class Inputs(NamedTuple):
    """The arguments of a call of a layer, and those of them that require a gradient."""

    args: tuple[torch.Tensor, ...]
    keywords: dict[str, Any]
    leaves: tuple[torch.Tensor, ...]


def inputs_of(kind: str, value: tuple[float, ...]) -> Inputs:
    """The arguments for a layer of that kind."""
    if kind in ("embedding", "sparse"):
        return Inputs((tensor(value).abs().long() % 4,), {}, ())
    leaf = tensor(value).requires_grad_()
    if kind not in ("keywords", "device"):
        return Inputs((leaf,), {}, (leaf,))
    other = (tensor(value) + 1.0).requires_grad_()
    named = {"device": "cpu"} if kind == "device" else {}
    return Inputs((leaf,), {"other": other, "scale": 0.5, **named}, (leaf, other))


def numbers_of(found: torch.Tensor | None) -> list[float] | None:
    """A tensor, dense or sparse, as a list."""
    return None if found is None else found.detach().to_dense().flatten().tolist()


def state_of(layer: torch.nn.Module) -> list[list[float] | None]:
    """The buffers of a layer."""
    return [numbers_of(one.double()) for one in layer.buffers()]


def compute_alone(
    kind: str, value: tuple[float, ...], seconds: float, *, hooks: bool
) -> dict[str, Any]:
    """What a layer gives in this process: outputs, gradients and buffers.

    Args:
        hooks: whether it is called, and not its ``forward``, which runs no hook.
    """
    layer: Any = LAYERS[kind](len(value), seconds)
    args, named, leaves = inputs_of(kind, value)
    outputs = (layer if hooks else layer.forward)(*args, **named)
    torch.autograd.backward(outputs.square().sum())
    return {
        "outputs": numbers_of(outputs),
        "gradients": [numbers_of(one.grad) for one in (*leaves, *layer.parameters())],
        "state": state_of(layer),
    }
