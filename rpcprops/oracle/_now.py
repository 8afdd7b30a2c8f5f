"""The step that the oracle's model adds, and how far the program has come."""

from __future__ import annotations

from dataclasses import dataclass

from rpcprops.oracle._messages import Fate
from rpcprops.steps import Leaf


@dataclass(slots=True)
class Now:
    """The present step, as all parts of the model see it.

    Attributes:
        step: the step; None before the first one and in the shutdown.
        number: how many steps came before it.
        before: how many messages came before it.
        settled: how many messages had ended at the last settle.
        fate: what becomes of the message by which its rank asks for something.
        last_fate: what becomes of the message that was sent last.
        is_timed: whether the step has said what its timeout does to that message.
    """

    step: Leaf | None = None
    number: int = 0
    before: int = 0
    settled: int = 0
    fate: Fate = ""
    last_fate: Fate = ""
    is_timed: bool = False
