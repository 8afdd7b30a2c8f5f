"""What torch's faulty agent sends in this process: counted, and failed or delayed by tables.

The preload library does it, where it is loaded: it stands in front of the functions that
``FaultyTensorPipeAgent`` calls for each send (see ``_sends.c``). A send that torch tries again is
counted again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rpcprops.errors import HarnessError

#: torch's names and numbers of requests, from ``enum MessageType`` (message.h): the low byte, which
#: no release of torch has changed. A response is never asked about.
REQUEST_NUMBERS: Mapping[int, str] = {
    0x00: "SCRIPT_CALL",
    0x02: "PYTHON_CALL",
    0x04: "SCRIPT_REMOTE_CALL",
    0x05: "PYTHON_REMOTE_CALL",
    0x07: "SCRIPT_RREF_FETCH_CALL",
    0x08: "PYTHON_RREF_FETCH_CALL",
    0x0B: "RREF_USER_DELETE",
    0x0C: "RREF_FORK_REQUEST",
    0x0D: "RREF_CHILD_ACCEPT",
    0x0F: "FORWARD_AUTOGRAD_REQ",
    0x11: "BACKWARD_AUTOGRAD_REQ",
    0x13: "CLEANUP_AUTOGRAD_CONTEXT_REQ",
    0x15: "RUN_WITH_PROFILING_REQ",
    0x17: "RREF_BACKWARD_REQ",
}

#: With this `num_fail_sends`, which no count reaches, an agent fails every send that it is told to.
UNLIMITED = 2**31 - 1

_NUMBERS = {name: number for number, name in REQUEST_NUMBERS.items()}
_TYPES = 256
_Rows = ctypes.c_int64 * (4 * _TYPES)


class Sends(NamedTuple):
    """Sends by message type; a type that was never sent is in none of the three.

    Attributes:
        sent: for each send that was tried, whether it failed or not; without those of `spared`.
        failed: those that the agent failed on purpose.
        delayed: those that the agent held up first.
    """

    sent: dict[str, int]
    failed: dict[str, int]
    delayed: dict[str, int]


class Struck(NamedTuple):
    """What one table has failed and delayed, by message type."""

    failed: dict[str, int]
    delayed: dict[str, int]


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.rpcprops_sends_name.restype = ctypes.c_char_p
    library.rpcprops_faults_arm.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return library


@functools.cache
def problem() -> str:
    """Why sends cannot be counted in this process, in one line; empty if they are counted.

    Call it once torch has been imported. A process that is forked later has the same answer.
    """
    if not hasattr(ctypes.CDLL(None), "rpcprops_sends_probe"):
        return "the preload library is not loaded"
    code = int(_library().rpcprops_sends_probe())
    if code == 0:
        return ""
    if code < 0:
        return "libtorch_cpu.so, which holds torch's faulty agent, is not loaded"
    name = _library().rpcprops_sends_name(code - 1).decode()
    return f"this build of torch does not call {name} in a way that can be seen"


def counts() -> Sends | None:
    """What the faulty agent has sent since this process started; None if that is not counted."""
    if problem():
        return None
    rows = _Rows()
    return Sends(*_by_type(rows, _library().rpcprops_sends_counts(rows)))


def decide() -> None:
    """From now on tables decide what fails and what is late, instead of the agent itself.

    Until one is armed, nothing is.
    """
    _library().rpcprops_faults_decide()


def arm(
    messages_to_fail: Iterable[str], num_fail_sends: int, messages_to_delay: Mapping[str, float]
) -> int:
    """Arm a table that means what the same options of torch's agent mean; returns its number.

    It counts payloads from 0. With several tables, the one armed first fails a send that it may
    still fail, and then the others do not count it; of several delays the longest applies.
    """
    fails = (ctypes.c_uint8 * _TYPES)()
    for name in messages_to_fail:
        fails[_NUMBERS[name]] = 1
    delays = (ctypes.c_float * _TYPES)()
    for name, seconds in messages_to_delay.items():
        delays[_NUMBERS[name]] = seconds
    number = int(_library().rpcprops_faults_arm(fails, num_fail_sends, delays))
    if not number:
        msg = "there is no memory for another table of faults."
        raise HarnessError(msg)
    return number


def disarm(number: int) -> None:
    """Let a table fail and delay nothing more; what it has done stays counted."""
    _library().rpcprops_faults_disarm(number)


def struck(number: int) -> Struck:
    """What a table has failed and delayed since it was armed."""
    rows = _Rows()
    _, failed, delayed = _by_type(rows, _library().rpcprops_faults_counts(number, rows))
    return Struck(failed, delayed)


@contextlib.contextmanager
def spared(message: str) -> Iterator[None]:
    """Within the block, sends of a type by this thread are not failed, delayed or counted."""
    _library().rpcprops_sends_spare(_NUMBERS[message])
    try:
        yield
    finally:
        _library().rpcprops_sends_spare(-1)


def _by_type(rows: ctypes.Array[ctypes.c_int64], length: int) -> tuple[dict[str, int], ...]:
    """Three columns of the rows, by the name of the type; without zeros."""
    columns: tuple[dict[str, int], ...] = ({}, {}, {})
    for at in range(0, 4 * length, 4):
        number, *numbers = rows[at : at + 4]
        name = REQUEST_NUMBERS.get(number, f"type {number:#x}")
        for column, count in zip(columns, numbers, strict=True):
            if count:
                column[name] = count
    return columns
