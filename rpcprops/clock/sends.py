"""What torch's faulty agent sends in this process, counted by message type.

The preload library counts it, where it is loaded: it stands in front of the functions that
``FaultyTensorPipeAgent`` calls for each send (see ``_sends.c``). A send that torch tries again is
counted again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import NamedTuple

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

_TYPES = 256
_Array = ctypes.c_int64 * _TYPES


class Sends(NamedTuple):
    """Sends by message type; a type that was never sent is in none of the three.

    Attributes:
        sent: for each send that was tried, whether it failed or not.
        failed: those that the agent failed on purpose.
        delayed: those that the agent held up first.
    """

    sent: dict[str, int]
    failed: dict[str, int]
    delayed: dict[str, int]


@functools.cache
def problem() -> str:
    """Why sends cannot be counted in this process, in one line; empty if they are counted.

    Call it once torch has been imported. A process that is forked later has the same answer.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "rpcprops_sends_probe"):
        return "the preload library is not loaded"
    code = int(library.rpcprops_sends_probe())
    if code == 0:
        return ""
    if code < 0:
        return "libtorch_cpu.so, which holds torch's faulty agent, is not loaded"
    library.rpcprops_sends_name.restype = ctypes.c_char_p
    name = library.rpcprops_sends_name(code - 1).decode()
    return f"this build of torch does not call {name} in a way that can be seen"


def counts() -> Sends | None:
    """What the faulty agent has sent since this process started; None if that is not counted."""
    if problem():
        return None
    arrays = (_Array(), _Array(), _Array())
    ctypes.CDLL(None).rpcprops_sends_counts(*arrays)
    return Sends(*(_named(array) for array in arrays))


def _named(array: ctypes.Array[ctypes.c_int64]) -> dict[str, int]:
    numbers = {number: int(count) for number, count in enumerate(array) if count}
    return {REQUEST_NUMBERS.get(number, f"type {number:#x}"): n for number, n in numbers.items()}
