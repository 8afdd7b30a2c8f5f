"""Optimizers of one process, as torch documents them and as known findings make them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.adagrad import adagrad

from rpcprops.steps.in_rank.constants import FUNCTIONAL_RATES, keywords, options_there


class Training(NamedTuple):
    """What an optimizer of ``torch.optim`` is asked to do.

    Attributes:
        optimizer: its name.
        options: the names of its options.
        owners: the rank of each parameter.
        starts: the parameters.
        uses: for each step, the numbers of the parameters that are in its loss.
        placed: whether the arguments are given by place, as far as that can be.
    """

    optimizer: str
    options: tuple[str, ...]
    owners: tuple[int, ...]
    starts: Sequence[torch.Tensor]
    uses: Sequence[Sequence[int]]
    placed: bool = False

    @property
    def constructor(self) -> type[torch.optim.Optimizer]:
        """The class in ``torch.optim``."""
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.optimizer)
        return found

    def arguments(self, others: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What the optimizer is given by place and by keyword, perhaps with other keywords."""
        given = {**keywords(self.options), **others}
        return by_place(self.constructor, given) if self.placed else ([], given)

    def made(self, parameters: Sequence[torch.Tensor], **others: Any) -> torch.optim.Optimizer:
        """The optimizer of ``torch.optim``, perhaps with other keywords."""
        placed, named = self.arguments(others)
        made: Any = self.constructor
        optimizer: torch.optim.Optimizer = made(parameters, *placed, **named)
        return optimizer


def by_place(
    constructor: type[torch.optim.Optimizer], given: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that a constructor of ``torch.optim`` takes by place, and the others.

    Those before the last one that is given get their defaults.
    """
    _, _, *known = inspect.signature(constructor.__init__).parameters.values()
    places = [one for one in known if one.kind is one.POSITIONAL_OR_KEYWORD]
    while places and places[-1].name not in given:
        del places[-1]
    names = [one.name for one in places]
    placed = [given.get(one.name, one.default) for one in places]
    return placed, {name: value for name, value in given.items() if name not in names}


def uses_of(
    rounds: int, number: int, left_out: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """For each of `rounds` steps, which of so many parameters are in its loss."""
    return tuple(
        tuple(one for one in range(number) if (step, one) not in left_out) for step in range(rounds)
    )


def train_alone(training: Training, **others: Any) -> list[list[float]]:
    """The parameters after these steps of the optimizer in one process."""
    parameters = [start.clone().requires_grad_() for start in training.starts]
    trainer = training.made(parameters, **others)
    for used in training.uses:
        trainer.zero_grad()
        torch.autograd.backward(torch.stack([parameters[one].square().sum() for one in used]).sum())
        trainer.step()
    return [one.tolist() for one in parameters]


def train_otherwise(training: Training) -> list[list[float]] | None:
    """The parameters as the known finding about this optimizer makes them; None if it has none."""
    if training.placed:
        there = options_there(training.optimizer, training.options)
        if there != training.options:
            given = training._replace(options=there, placed=False)
            return _train_shifted(given) if given.optimizer == "Adagrad" else train_alone(given)
    rate = FUNCTIONAL_RATES.get(training.optimizer)
    if rate is not None:
        return train_alone(training, lr=rate) if "default_lr" in training.options else None
    if training.optimizer == "Adagrad":
        return _train_shifted(training)
    return _train_stale(training)


def _train_stale(training: Training) -> list[list[float]]:
    """A parameter without a gradient keeps that of an earlier step.

    ``torch/distributed/optim/optimizer.py``: _LocalOptimizer.step sets ``param.grad`` of those
    parameters alone that have a gradient in the context, and takes it away from none.
    """
    parameters = [start.clone().requires_grad_() for start in training.starts]
    trainer = training.made(parameters)
    for used in training.uses:
        for one in used:
            parameters[one].grad = 2.0 * parameters[one].detach()
        trainer.step()
    return [one.tolist() for one in parameters]


def _train_shifted(training: Training) -> list[list[float]]:
    """At each owner, the first parameters get the gradients of those that have one.

    ``torch/distributed/optim/functional_adagrad.py``: _FunctionalAdagrad.step gives ``F.adagrad``
    all parameters, but gradients and state of those alone that have a gradient.
    """
    parameters = [start.clone() for start in training.starts]
    given: dict[str, Any] = {"weight_decay": 0.0, "lr_decay": 0.0, "eps": 1e-10, "maximize": False}
    given |= {"lr": 0.01} | keywords(training.options)
    first = given.pop("initial_accumulator_value", 0.0)
    sums = [torch.full_like(one, first) for one in parameters]
    steps = [torch.tensor(0.0) for _ in parameters]
    for used in training.uses:
        for owner in dict.fromkeys(training.owners):
            there = [one for one, home in enumerate(training.owners) if home == owner]
            having = [one for one in there if one in used]
            adagrad(
                [parameters[one] for one in there[: len(having)]],
                [2.0 * parameters[one] for one in having],
                [sums[one] for one in having],
                [steps[one] for one in having],
                **given,
            )
    return [one.tolist() for one in parameters]
