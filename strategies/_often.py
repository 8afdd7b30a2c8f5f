"""How often the options of a step are drawn, where not all of them come alike.

Weights change only what is generated: an option has the same number whatever the weights are, and
each one comes. A step asks for them by its kind and its field (:meth:`StepDrawer.option`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

#: By kind and field, what an option weighs; 1 if it is not named. A list of options that are given
#: together weighs the product of theirs, unless it is named itself.
WEIGHTS: Mapping[str, Mapping[Hashable, float]] = {
    # What most people train with; and those optimizers more often that keep something for each
    # parameter from one step to the next, or count steps, for that can go wrong.
    "train.optimizer": {
        **{"SGD": 3.0, "Adagrad": 4.0, "Rprop": 3.0},
        **{"Adamax": 2.0, "NAdam": 1.5, "RAdam": 1.5, "ASGD": 1.5},
    },
    # Who gives no rate leaves it to torch, which has one for each version of an optimizer.
    "train.options": {"default_lr": 2.0},
    # As often named as all others together, and so nothing is left out in three of ten steps that
    # could leave out something.
    "train.left_out": {(): 0.4},
}


def weight_of(name: str, option: Hashable) -> float:
    """What an option of the field with that name weighs."""
    weights = WEIGHTS[name]
    if option in weights or not isinstance(option, tuple):
        return weights.get(option, 1.0)
    return math.prod(weights.get(one, 1.0) for one in option)
