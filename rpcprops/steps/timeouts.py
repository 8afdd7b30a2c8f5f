"""Timeouts as torch counts them: in whole milliseconds, in an ``int`` of C++.

``torch/csrc/distributed/rpc/tensorpipe_agent.cpp``: TensorPipeAgent::send makes
``static_cast<int>(rpcTimeoutSeconds * kSecToMsConversion)`` of the timeout of a message, which is a
float, and ``init.cpp``: ``_set_rpc_timeout`` does the same with a default. 0 stands for no timeout.
"""

from __future__ import annotations

import struct

#: Timeouts that do not fit into such a number: nothing that a program does takes so long (virtual
#: seconds). The first one is the smallest whole number of seconds.
TOO_LONG = (2147484.0, 3e6, 1e9)
#: The longest whole number of seconds that fits.
LONGEST = 2147483.0
#: Timeouts of less than a millisecond.
TOO_SHORT = (0.0005, 0.0001)

#: The findings about such timeouts.
ENDS_AT_ONCE = "long-timeout-ends-at-once"
NEVER_COMES = "short-timeout-never-comes"
#: What the processor makes of a float that does not fit, in milliseconds.
_WRAPPED = -(2**31)


def is_too_long(timeout: float | None) -> bool:
    """Whether torch makes something else of a timeout because it is too long (virtual seconds)."""
    return timeout is not None and _single(_single(timeout) * 1000.0) >= 2**31


def is_too_short(timeout: float | None) -> bool:
    """Whether torch makes no timeout of a timeout because it is too short (virtual seconds)."""
    return timeout is not None and timeout > 0 and _single(_single(timeout) * 1000.0) < 1


def says_at_once() -> str:
    """What the error says that comes at once, as a regular expression."""
    return rf"\({_WRAPPED} ms\)"


def _single(number: float) -> float:
    """A number as a C float holds it."""
    try:
        found: float = struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return float("inf")
    return found
