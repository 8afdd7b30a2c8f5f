"""Signals that end a command in an orderly way: SIGTERM and SIGHUP do what Ctrl-C does.

Signal handlers alone are not enough. The kernel may give the signal to another thread, and the main
thread goes on waiting. And the KeyboardInterrupt may be lost: Python drops one that is raised in a
garbage collection, and one raised between taking a lock and the block that releases it leaves
other threads waiting. So a thread makes sure that the main thread gets the signal. If that has no
effect within a second, it raises the signal once more, and if that does not help either, it ends
the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Real seconds in which a repeat is ignored: `timeout`, terminals and shells send a signal twice.
_TWICE_SECONDS = 1.0
#: Real seconds within which the main thread notices a signal that another thread was given.
_NOTICED = 0.05
#: Real seconds after a signal until KeyboardInterrupt is raised again, and until the process ends;
#: the last number applies instead if the command has begun to end by itself.
_AGAIN_SECONDS = 1.0
_LOST_SECONDS = 2.0
_END_SECONDS = 10.0


class _State:
    """What the signals of this process have caused so far."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at = 0.0
        self.is_ending = False
        #: Whether the next signal comes from the thread, not from outside.
        self.raises_again = False
        #: Set when the process no longer listens for signals.
        self.over = threading.Event()
        #: A pipe that wakes the thread: Python writes the number of each signal to it.
        self.woken = self.wakes = -1


_state = _State()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first of these signals, and exit at once at a later one.

    A signal that is ignored, as under ``nohup``, stays ignored.
    """
    global _state
    state = _state = _State()
    state.woken, state.wakes = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(state.wakes, False)
    wakeup = signal.set_wakeup_fd(state.wakes, warn_on_full_buffer=False)
    thread = threading.Thread(target=_insist, args=(state,), name="rpcprops-stop", daemon=True)
    thread.start()
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if _is_interrupt(lost) else hook(lost)
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        signal.set_wakeup_fd(wakeup)
        state.over.set()
        os.close(state.wakes)
        thread.join()
        os.close(state.woken)


def _is_interrupt(lost: UnraisableHookArgs) -> bool:
    """Whether Python has dropped our own interrupt, which the thread raises again."""
    return _state.received is not None and issubclass(lost.exc_type, KeyboardInterrupt)


def ending() -> None:
    """Note that the interrupt has arrived: the command is about to end by itself."""
    _state.is_ending = True


def _on_signal(number: int, _: FrameType | None) -> None:
    if _state.received is None:
        _state.received, _state.at = signal.Signals(number), time.monotonic()
        raise KeyboardInterrupt
    if _state.raises_again:
        _state.raises_again = False
        raise KeyboardInterrupt
    if time.monotonic() - _state.at > _TWICE_SECONDS:
        # The user does not want to wait. The processes that we started end without us.
        os._exit(128 + number)


def _insist(state: _State) -> None:
    """The thread: waits for the first signal, then makes sure that the process ends."""
    main = threading.main_thread().ident
    assert main is not None
    # This thread takes no signals; only the pipe wakes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    while state.received is None:
        seen = os.read(state.woken, 64)
        if not seen:
            return
        while seen[0] in _NUMBERS and state.received is None and not state.over.wait(_NOTICED):
            signal.pthread_kill(main, seen[0])
    number = state.received
    if state.over.wait(_AGAIN_SECONDS):
        return
    if not state.is_ending:
        state.raises_again = True
        signal.pthread_kill(main, number)
        if state.over.wait(_LOST_SECONDS - _AGAIN_SECONDS):
            return
    if state.is_ending and state.over.wait(_END_SECONDS):
        return
    os.write(2, f"{reason()}; it did not end in order\n".encode())
    os._exit(128 + number)


def exit_code() -> int | None:
    """The exit code that says which signal ended the command; None if none did."""
    return None if _state.received is None else 128 + _state.received


def reason() -> str:
    """Why a command ends early, in words."""
    if _state.received in (None, signal.SIGINT):
        return "interrupted"
    assert _state.received is not None
    return f"ended by {_state.received.name}"
