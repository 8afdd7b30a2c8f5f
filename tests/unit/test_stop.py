"""A signal ends a command, also where the KeyboardInterrupt that it raises is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rpcprops.commands import stop

#: Waits; drops the first interrupts, as Python does with one that comes while it collects garbage.
_SCRIPT = """
import sys, time
from rpcprops.commands import stop

words = ["ready"]


def wait():
    # A signal comes once it has said so, and so within the block that catches it.
    if words:
        print(words.pop(), flush=True)
    time.sleep(30)


with stop.listening():
    for _ in range(int(sys.argv[1])):
        try:
            wait()
        except KeyboardInterrupt:
            pass
    try:
        wait()
    except KeyboardInterrupt:
        stop.ending()
        time.sleep(float(sys.argv[2]))
        print(stop.reason(), flush=True)
    code = stop.exit_code()
sys.exit(code)
"""


def test_signals_are_as_before_once_nobody_listens() -> None:
    """A command that runs in a process of somebody else's leaves no handler, thread or pipe."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) not in before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code() == 143
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


#: Waits in the kernel for a child, while another thread is there to be given the signal.
_WAITS = """
import signal, subprocess, sys, threading, time
from rpcprops.commands import stop

with stop.listening():
    try:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        child = subprocess.Popen(["sleep", "60"])
        print(child.pid, flush=True)
        child.wait()
    except KeyboardInterrupt:
        stop.ending()
        child.kill()
        child.wait()
    code = stop.exit_code()
sys.exit(code)
"""


def test_a_signal_that_another_thread_is_given_ends_a_command() -> None:
    """The main thread waits for a child, and is woken; a stopped process gives it to any thread."""
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            try:
                process.stdout.readline()
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.02)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                began = time.monotonic()
                assert process.wait(timeout=30) == 143
                # Without being woken it waits for 60 s; with other work it takes a moment.
                assert time.monotonic() - began < 6.0
            finally:
                process.kill()


#: Gets its signal in a garbage collection, where Python drops what a handler raises.
_COLLECTS = """
import gc, signal, sys, time
from rpcprops.commands import stop


def interrupt(phase, _):
    gc.callbacks.remove(interrupt)
    signal.raise_signal(signal.SIGINT)


with stop.listening():
    try:
        gc.callbacks.append(interrupt)
        gc.collect()
        time.sleep(30)
    except KeyboardInterrupt:
        stop.ending()
    code = stop.exit_code()
sys.exit(code)
"""


def test_an_interrupt_that_python_drops_is_raised_again_in_silence() -> None:
    """One in a garbage collection ends the command a second later, and no traceback is printed."""
    done = subprocess.run(
        [sys.executable, "-c", _COLLECTS], capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
