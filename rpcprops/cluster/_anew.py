"""In a rank: what a program may have changed besides RPC, and how the rank forgets a program.

A world is used again only if every rank is as it was when its world was new. What torch's agent and
its RRefs hold is asked from the agent (``WireAgent::state``). This module answers for the rest: the
modules that run the steps, the threads of the process, and what torch keeps in statics.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import deque
from typing import Any

from rpcprops.steps.in_rank import state
from rpcprops.torch_facts import symbols

#: The modules whose functions run steps.
_STEPS = "rpcprops.steps.in_rank."
#: The counter of the step `count`, and its first number.
_COUNTER = (f"{_STEPS}calls", "numbers")
#: What is new with each program.
_NEW = {_COUNTER, (state.__name__, "ran")}


class Newness:
    """What this rank was when its world was new."""

    def __init__(self) -> None:
        self._threads = _threads()
        self._torch = symbols.rpc_statics()
        self._modules = _modules()

    def difference(self) -> str:
        """What differs now, in a few words; empty if nothing does."""
        threads = [name for ident, name in _threads().items() if ident not in self._threads]
        # Branches of programs have threads of ours, which wait for the next one.
        left = [name for name in threads if not name.startswith("rpcprops-")]
        if left:
            return f"threads are left: {', '.join(left)}"
        if symbols.rpc_statics() != self._torch:
            return "torch's statics differ"
        modules = _modules()
        if modules != self._modules:
            changed = {key for key, _ in modules.items() ^ self._modules.items()}
            return f"globals differ: {', '.join(sorted(map('.'.join, changed)))}"
        return ""


def forget() -> None:
    """Let go of all that the last program has kept here."""
    state.handles.clear()
    state.futures.clear()
    state.contexts.clear()


def begin() -> None:
    """Count from the beginning, for a new program."""
    state.ran.clear()
    module, name = _COUNTER
    if module in sys.modules:
        setattr(sys.modules[module], name, itertools.count(1))


def _threads() -> dict[int, str]:
    """The threads that Python code has started: torch's own only have a stand-in here."""
    return {
        thread.ident or 0: thread.name
        for thread in threading.enumerate()
        if type(thread).__name__ != "_DummyThread"
    }


def _modules() -> dict[tuple[str, str], Any]:
    """The globals of the modules that run steps, in a form that shows whether one has changed."""
    return {
        (name, key): _mark(value)
        for name, module in list(sys.modules.items())
        if name.startswith(_STEPS)
        for key, value in vars(module).items()
        if not key.startswith("__") and (name, key) not in _NEW
    }


def _mark(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), *map(id, value.values())
    if isinstance(value, list | set | deque):
        return id(value), len(value)
    return id(value), repr(value) if isinstance(value, itertools.count) else ""
