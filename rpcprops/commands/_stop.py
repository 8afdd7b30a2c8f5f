"""Signals that end a command in order: SIGTERM and SIGHUP do what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Real seconds: `timeout`, terminals and shells send one signal twice, to us and to our group.
_TWICE_SECONDS = 1.0
_received: list[tuple[signal.Signals, float]] = []


def listen() -> None:
    """Raise KeyboardInterrupt at the first of these signals, and leave at once at a later one.

    A signal that is ignored stays so, as under ``nohup``.
    """
    _received.clear()
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _on_signal(number: int, _: FrameType | None) -> None:
    now = time.monotonic()
    if not _received:
        _received.append((signal.Signals(number), now))
        raise KeyboardInterrupt
    if now - _received[0][1] > _TWICE_SECONDS:
        # Somebody does not want to wait. What we started ends without us.
        os._exit(128 + number)


def exit_code() -> int | None:
    """The exit code that says which signal ended the command; None where none did."""
    return 128 + _received[0][0] if _received else None


def reason() -> str:
    """Why a command ends early, in words."""
    if not _received or _received[0][0] == signal.SIGINT:
        return "interrupted"
    return f"ended by {_received[0][0].name}"
