"""Signals that end a command in order: SIGTERM and SIGHUP do what Ctrl-C does.

The KeyboardInterrupt that a signal raises may be lost: Python drops one that is raised while it
collects garbage, and one that comes between the taking of a lock and the block that releases it
leaves other threads waiting. So a thread raises it once more where it changed nothing within a
second, and ends the process where that does not help either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Real seconds: `timeout`, terminals and shells send one signal twice, to us and to our group.
_TWICE_SECONDS = 1.0
#: Real seconds after a signal: until KeyboardInterrupt is raised again, and until the process ends,
#: unless it has begun to end in order; then it has the last of these.
_AGAIN_SECONDS = 1.0
_LOST_SECONDS = 2.0
_END_SECONDS = 10.0


class _State:
    """What the signals of this process have done so far."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at = 0.0
        self.is_ending = False
        #: Whether the next signal comes from the thread, and not from outside.
        self.raises_again = False
        #: Set when nobody listens any more.
        self.over = threading.Event()
        #: A pipe that wakes the thread: a handler may write to it at any moment.
        self.woken = self.wakes = -1


_state = _State()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first of these signals, and leave at once at a later one.

    A signal that is ignored stays so, as under ``nohup``.
    """
    global _state
    state = _state = _State()
    state.woken, state.wakes = os.pipe2(os.O_CLOEXEC)
    thread = threading.Thread(target=_insist, args=(state,), name="rpcprops-stop", daemon=True)
    thread.start()
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        state.over.set()
        os.close(state.wakes)
        thread.join()
        os.close(state.woken)


def ending() -> None:
    """Say that the interrupt has arrived: the command is about to end in order."""
    _state.is_ending = True


def _on_signal(number: int, _: FrameType | None) -> None:
    if _state.received is None:
        _state.received, _state.at = signal.Signals(number), time.monotonic()
        os.write(_state.wakes, b"\n")
        raise KeyboardInterrupt
    if _state.raises_again:
        _state.raises_again = False
        raise KeyboardInterrupt
    if time.monotonic() - _state.at > _TWICE_SECONDS:
        # Somebody does not want to wait. What we started ends without us.
        os._exit(128 + number)


def _insist(state: _State) -> None:
    """The thread: wait for the first signal, then see to it that the process ends."""
    os.read(state.woken, 1)
    number = state.received
    if number is None or state.over.wait(_AGAIN_SECONDS):
        return
    if not state.is_ending:
        state.raises_again = True
        os.kill(os.getpid(), number)
        if state.over.wait(_LOST_SECONDS - _AGAIN_SECONDS):
            return
    if state.is_ending and state.over.wait(_END_SECONDS):
        return
    os.write(2, f"{reason()}; it did not end in order\n".encode())
    os._exit(128 + number)


def exit_code() -> int | None:
    """The exit code that says which signal ended the command; None where none did."""
    return None if _state.received is None else 128 + _state.received


def reason() -> str:
    """Why a command ends early, in words."""
    if _state.received in (None, signal.SIGINT):
        return "interrupted"
    assert _state.received is not None
    return f"ended by {_state.received.name}"
