"""Steps that send nothing."""

from __future__ import annotations

import time


def pause(call: str, world: tuple[str, ...], *, seconds: float) -> None:
    """Let time pass."""
    time.sleep(seconds)
