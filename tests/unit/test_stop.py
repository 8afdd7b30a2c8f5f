"""A signal ends a command, also where the KeyboardInterrupt that it raises is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rpcprops.commands import _stop

#: Waits; drops the first interrupts, as Python does with one that comes while it collects garbage.
_SCRIPT = """
import sys, time
from rpcprops.commands import _stop

with _stop.listening():
    print("ready", flush=True)
    for _ in range(int(sys.argv[1])):
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            pass
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        _stop.ending()
        time.sleep(float(sys.argv[2]))
        print(_stop.reason(), flush=True)
    code = _stop.exit_code()
sys.exit(code)
"""


def test_signals_are_as_before_once_nobody_listens() -> None:
    """A command that runs in a process of somebody else's leaves no handler, thread or pipe."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    with _stop.listening():
        assert signal.getsignal(signal.SIGTERM) not in before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert _stop.exit_code() == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.parametrize(
    ("dropped", "takes", "number", "said", "least", "most"),
    [
        (0, 0.0, signal.SIGTERM, "ended by SIGTERM\n", 0.0, 1.0),
        (0, 2.5, signal.SIGINT, "interrupted\n", 2.5, 4.0),
        (1, 0.0, signal.SIGTERM, "ended by SIGTERM\n", 1.0, 2.0),
        (9, 0.0, signal.SIGHUP, "", 2.0, 3.0),
    ],
    ids=["at once", "ends slowly", "lost once", "always lost"],
)
def test_a_signal_ends_a_command(
    dropped: int, takes: float, number: signal.Signals, said: str, least: float, most: float
) -> None:
    """In order where that can be; within three seconds anyway; and an orderly end has its time."""
    with subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(dropped), str(takes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            began = time.monotonic()
            process.send_signal(number)
            assert process.wait(timeout=30) == 128 + number
            seconds = time.monotonic() - began
            assert process.stdout.read() == said
            # A busy machine ends it later, never sooner.
            assert least <= seconds < most + 5.0
        finally:
            process.kill()
