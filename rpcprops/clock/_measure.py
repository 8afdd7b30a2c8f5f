"""Measuring the rate of a dilated process from one that is not dilated.

probe() runs in the dilated process and answers requests over a socket.
observe() runs outside, asks, and compares the answers with its own clock.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple


class ClockError(RuntimeError):
    """The clock refused a request, or does not work correctly."""


# A request: what to do, and for how many virtual nanoseconds.
_REQUEST = struct.Struct("<Bq")
# An answer: two virtual CLOCK_MONOTONIC readings and one of CLOCK_REALTIME.
_ANSWER = struct.Struct("<qqq")

_QUIT = 0
_READ_CLOCK = 1

# Tolerances, stated in the docstring of observe().
RATE_TOLERANCE = 0.02
WAIT_TOLERANCE = 0.25
WAIT_ALLOWANCE = 0.005

_WAIT_REAL_SECONDS = 0.02
_WAIT_TRIES = 6
_BASELINE_REAL_SECONDS = 0.02
_LONGEST_BASELINE_REAL_SECONDS = 2.0
_SILENCE_REAL_SECONDS = 5.0

_REMEDY = "run fewer processes at once, reinstall rpcprops with a C compiler, or pass clock='real'"


# ---------------------------------------------------------------------------
# The dilated side


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


def _timespec(nanoseconds: int) -> _Timespec:
    return _Timespec(*divmod(nanoseconds, 1_000_000_000))


def _wait_nanosleep(nanoseconds: int) -> None:
    ctypes.CDLL(None).nanosleep(ctypes.byref(_timespec(nanoseconds)), None)


def _wait_cond(nanoseconds: int) -> None:
    # Zeroed memory is a valid mutex and a valid condition variable on the
    # realtime clock; both are smaller than this.
    libc = ctypes.CDLL(None)
    mutex, condition = (ctypes.c_uint64 * 16)(), (ctypes.c_uint64 * 16)()
    deadline = _timespec(time.clock_gettime_ns(time.CLOCK_REALTIME) + nanoseconds)
    libc.pthread_mutex_lock(mutex)
    while libc.pthread_cond_timedwait(condition, mutex, ctypes.byref(deadline)) == 0:
        pass
    libc.pthread_mutex_unlock(mutex)


def _wait_event(nanoseconds: int) -> None:
    threading.Event().wait(nanoseconds / 1e9)


def _wait_select(nanoseconds: int) -> None:
    select.select([], [], [], nanoseconds / 1e9)


def _wait_epoll(nanoseconds: int) -> None:
    with select.epoll() as epoll:
        epoll.poll(nanoseconds / 1e9)


_WAITS: dict[int, tuple[str, Callable[[int], None]]] = {
    2: ("nanosleep", _wait_nanosleep),
    3: ("pthread_cond_timedwait", _wait_cond),
    4: ("threading.Event.wait", _wait_event),
    5: ("select", _wait_select),
    6: ("epoll_wait", _wait_epoll),
}


def probe(fd: int) -> None:
    """Answer an observer over the stream socket `fd` until it is done.

    Runs in the process to be measured.  Returns when the observer asks for it
    or closes its end.
    """
    while True:
        try:
            request = _receive(fd, _REQUEST.size)
        except OSError:
            return
        if request is None:
            return
        operation, nanoseconds = _REQUEST.unpack(request)
        if operation == _QUIT:
            return
        start = time.monotonic_ns()
        if operation in _WAITS:
            _WAITS[operation][1](nanoseconds)
        end = time.monotonic_ns()
        answer = _ANSWER.pack(start, end, time.clock_gettime_ns(time.CLOCK_REALTIME))
        try:
            os.write(fd, answer)
        except OSError:
            return


def _receive(fd: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            return None
        data += more
    return data


# ---------------------------------------------------------------------------
# The undilated side


class _Sample(NamedTuple):
    before: int  # real, ns
    after: int  # real, ns
    start: int  # virtual monotonic, ns
    end: int  # virtual monotonic, ns
    wall: int  # virtual realtime, ns


def _ask(fd: int, operation: int, nanoseconds: int, timeout: float) -> _Sample:
    before = time.monotonic_ns()
    try:
        os.write(fd, _REQUEST.pack(operation, nanoseconds))
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(timeout * 1000):
            name = _WAITS[operation][0] if operation in _WAITS else "a clock read"
            message = (
                f"{name} in the dilated process did not end within {timeout:.3g} real seconds: "
                f"{_REMEDY}"
            )
            raise ClockError(message)
        answer = _receive(fd, _ANSWER.size)
    except OSError as error:
        message = f"the dilated process ended while it was measured ({error}): {_REMEDY}"
        raise ClockError(message) from error
    after = time.monotonic_ns()
    if answer is None:
        message = f"the dilated process ended while it was measured: {_REMEDY}"
        raise ClockError(message)
    return _Sample(before, after, *_ANSWER.unpack(answer))


def _read_clock(fd: int) -> _Sample:
    samples = [_ask(fd, _READ_CLOCK, 0, _SILENCE_REAL_SECONDS) for _ in range(5)]
    return min(samples, key=lambda sample: sample.after - sample.before)


def _check_clock(fd: int, first: _Sample, rate: float) -> float:
    """The rate since `first`; lengthens the baseline until it is precise."""
    while True:
        last = _read_clock(fd)
        shortest, longest = last.before - first.after, last.after - first.before
        if shortest > 0 and (longest - shortest) <= RATE_TOLERANCE / 2 * shortest:
            break
        if longest > _LONGEST_BASELINE_REAL_SECONDS * 1e9:
            message = (
                f"rate {rate:g} could not be measured: the dilated process took up to "
                f"{(last.after - last.before) / 1e9:.3g} real seconds to answer; "
                "run fewer processes at once, or pass clock='real'"
            )
            raise ClockError(message)
        time.sleep(_BASELINE_REAL_SECONDS)
    measured = 0.0
    for name, elapsed in (
        ("CLOCK_REALTIME", last.wall - first.wall),
        ("CLOCK_MONOTONIC", last.start - first.start),
    ):
        measured = elapsed / ((shortest + longest) / 2)
        slowest, fastest = elapsed / longest, elapsed / shortest
        if slowest > rate * (1 + RATE_TOLERANCE) or fastest < rate * (1 - RATE_TOLERANCE):
            message = (
                f"{name} in the dilated process runs at rate {measured:.4g}, "
                f"not {rate:g}: pass clock='real'"
            )
            raise ClockError(message)
    return measured


def _check_wait(fd: int, operation: int, rate: float) -> None:
    name = _WAITS[operation][0]
    # Whole milliseconds, because epoll_wait() counts those.
    virtual = max(1, round(_WAIT_REAL_SECONDS * rate * 1000)) * 1_000_000
    real = virtual / rate
    limit = real * (1 + WAIT_TOLERANCE) + WAIT_ALLOWANCE * 1e9
    shortest = float("inf")
    for _ in range(_WAIT_TRIES):
        sample = _ask(fd, operation, virtual, real / 1e9 + _SILENCE_REAL_SECONDS)
        took = sample.after - sample.before
        if took < real or sample.end - sample.start < virtual:
            message = (
                f"{name} of {virtual / 1e9:g} virtual seconds at rate {rate:g} ended early: after "
                f"{(sample.end - sample.start) / 1e9:.6g} virtual and {took / 1e9:.6g} real "
                "seconds; pass clock='real'"
            )
            raise ClockError(message)
        shortest = min(shortest, took)
        if shortest <= limit:
            return
    message = (
        f"{name} of {virtual / 1e9:g} virtual seconds at rate {rate:g} took at least "
        f"{shortest / 1e9:.6g} real seconds in {_WAIT_TRIES} tries, not {real / 1e9:g}; "
        "run fewer processes at once, or pass clock='real'"
    )
    raise ClockError(message)


def observe(fd: int, rate: float) -> float:
    """Measure the process that runs probe() at the other end of `fd`.

    Runs in a process that is not dilated.  Returns the measured rate in
    virtual seconds per real second.  Raises ClockError when

    - a clock read disagrees with `rate` by more than 2 %,
    - a wait ends before its length, in real or in virtual time,
    - a wait takes, at the best of six tries, more than 25 % plus 5 real
      milliseconds longer than its length.

    Tells probe() to return, also when it raises.
    """
    try:
        first = _ask(fd, _READ_CLOCK, 0, _SILENCE_REAL_SECONDS)
        first = _read_clock(fd)
        time.sleep(_BASELINE_REAL_SECONDS)
        # First with a short baseline, so that a rate that is not applied at
        # all is named as such before the waits take their full length.
        _check_clock(fd, first, rate)
        for operation in _WAITS:
            _check_wait(fd, operation, rate)
        return _check_clock(fd, first, rate)
    finally:
        try:
            os.write(fd, _REQUEST.pack(_QUIT, 0))
        except OSError:
            pass
