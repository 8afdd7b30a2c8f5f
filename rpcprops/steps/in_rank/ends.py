"""The end of a program in a rank: ``rpc.shutdown`` in one of its ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.distributed import rpc

from rpcprops.steps.in_rank.constants import SHUTDOWN_TIMEOUTS
from rpcprops.steps.in_rank.state import futures


def end_rank(how: str, wait: float) -> None:
    """Shut RPC down after so many seconds; raises what torch raises.

    Raises:
        AssertionError: torch has accepted a second shutdown, or a call has not ended.
    """
    time.sleep(wait)
    shutdown: Callable[..., Any] = rpc.shutdown
    if how in SHUTDOWN_TIMEOUTS:
        shutdown(timeout=SHUTDOWN_TIMEOUTS[how])
    else:
        shutdown(graceful=how != "at once")
    if how == "twice" and not is_refused(shutdown):
        msg = "a second rpc.shutdown() was accepted"
        raise AssertionError(msg)
    # tensorpipe_agent.cpp: TensorPipeAgent::shutdownImpl closes all pipes, and so ends all calls.
    open_calls = [name for name, future in futures.items() if not future.done()]
    if open_calls:
        msg = f"after rpc.shutdown() these calls have not ended: {', '.join(open_calls)}"
        raise AssertionError(msg)


def is_refused(shutdown: Callable[..., Any]) -> bool:
    """Whether a shutdown raises RuntimeError."""
    try:
        shutdown()
    except RuntimeError:
        return True
    return False
