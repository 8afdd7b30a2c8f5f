"""What Python offers to wait on, in a rank under a fast clock."""

from __future__ import annotations

import asyncio
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from rpcprops import clock
from rpcprops.pytest_plugin import ClusterFactory

SECONDS = 4.0
RATE = 50.0


def sleep() -> None:
    time.sleep(SECONDS)


def event() -> None:
    assert not threading.Event().wait(SECONDS)


def condition() -> None:
    waiting = threading.Condition()
    with waiting:
        assert not waiting.wait(SECONDS)


def full_queue() -> None:
    with pytest.raises(queue.Empty):
        queue.Queue[int]().get(timeout=SECONDS)


def join() -> None:
    thread = threading.Thread(target=time.sleep, args=(10 * SECONDS,), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert thread.is_alive()


def lock() -> None:
    held = threading.Lock()
    with held:
        assert not held.acquire(timeout=SECONDS)


def selected() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert select.select([left], [], [], SECONDS) == ([], [], [])


def asyncio_sleep() -> None:
    asyncio.run(asyncio.sleep(SECONDS))


def asyncio_timeout() -> None:
    async def wait() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), SECONDS)

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def child_process() -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=SECONDS, check=False)


def socket_timeout() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(SECONDS)
        with pytest.raises(TimeoutError):
            left.recv(1)


def interval_timer() -> None:
    rang = threading.Event()
    signal.signal(signal.SIGALRM, lambda *_: rang.set())
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.pause()
    assert rang.is_set()


WAITS = (
    sleep,
    event,
    condition,
    full_queue,
    join,
    lock,
    selected,
    asyncio_sleep,
    asyncio_timeout,
    child_process,
    socket_timeout,
    interval_timer,
)


def timed(wait: Callable[[], None]) -> float:
    """Virtual seconds that a wait took."""
    began = time.monotonic()
    wait()
    return time.monotonic() - began


def test_waits_take_their_virtual_time(rpc_cluster: ClusterFactory) -> None:
    """Each way to wait that Python has lasts as long as asked, in virtual and in real seconds."""
    with rpc_cluster(world_size=1, clock=RATE, init=False) as cluster:
        for wait in WAITS:
            began = time.monotonic()
            virtual = cluster.on(0).call(timed, wait)
            real = time.monotonic() - began
            assert virtual >= SECONDS, wait.__name__
            # In real time it would take four seconds.
            assert SECONDS / RATE <= real + 0.001 < SECONDS, wait.__name__


def read_clocks() -> tuple[float, float]:
    """Both clocks, virtual after real, in seconds."""
    return clock.real_monotonic(), time.monotonic()


def test_the_ranks_of_a_world_read_the_same_time(rpc_cluster: ClusterFactory) -> None:
    """Where one rank's clock stands, any other's stands at that instant, to what a read takes."""
    with rpc_cluster(world_size=4, clock=RATE, init=False) as cluster:
        read = cluster.each(read_clocks)
    # The line of a clock: what it would show at real time 0.
    starts = [virtual - RATE * real for real, virtual in read]
    assert max(starts) - min(starts) < RATE * 0.02
