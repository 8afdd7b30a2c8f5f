"""Steps that send nothing."""

from __future__ import annotations

import time

from rpcprops.steps.in_rank.state import MissingHandleError, handles

#: Seconds between two looks for an RRef.
_LOOKS_SECONDS = 0.05


def pause(call: str, world: tuple[str, ...], *, seconds: float, handle: str) -> None:
    """Let time pass; or wait until an RRef has come here."""
    if not handle:
        time.sleep(seconds)
        return
    until = time.monotonic() + seconds
    while handle not in handles:
        if time.monotonic() >= until:
            raise MissingHandleError(handle)
        time.sleep(_LOOKS_SECONDS)
