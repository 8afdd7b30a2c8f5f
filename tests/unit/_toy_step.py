"""A kind of step that only tests know. Its class names the function that runs it in a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rpcprops.programs import Pause


@dataclass(frozen=True, slots=True, repr=False)
class Toy(Pause):
    """Looks like a pause to who predicts it, and runs :func:`tests.unit._toy_in_rank.toy`."""

    runs: ClassVar[str] = "tests.unit._toy_in_rank:toy"
