"""Lets coverage.py, or another tracer, see what torch's threads run in a rank.

A tracer reaches new threads by ``threading.settrace``, which is for threads that Python starts. The
threads in which an agent runs a function of a request are torch's: each begins in
``torch/distributed/rpc/internal.py: _run_function``, which ``python_rpc_handler.cpp:
PythonRpcHandler::init`` looks up when the agent of a process starts.
"""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

from rpcprops.torch_facts import symbols


def trace_requests() -> None:
    """Have requests traced, if new threads of Python are; call this before the agent starts."""
    if threading.gettrace() is None:
        return
    internal = symbols.rpc_internal
    run = internal._run_function

    @functools.wraps(run)
    def traced(function: Any) -> Any:
        if sys.gettrace() is None:
            sys.settrace(threading.gettrace())
        return run(function)

    internal._run_function = traced
