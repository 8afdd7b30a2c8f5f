"""In a rank: what a program may have changed besides RPC, and how the rank forgets a program.

A world is used again only if every rank is as it was when its world was new. What torch's agent and
its RRefs hold is asked from the agent (``WireAgent::state``). This module answers for the rest: the
modules that run the steps, the threads of the process, and what torch keeps in statics.
"""

from __future__ import annotations

import itertools
import operator
import sys
import threading
import types
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from rpcprops.steps.in_rank import state
from rpcprops.torch_facts import symbols

#: The modules whose functions run steps.
_STEPS = "rpcprops.steps.in_rank."
#: The module of the step `count`, and its counter.
_CALLS, _NUMBERS = f"{_STEPS}calls", "numbers"
_WARNINGS = "__warningregistry__"


class Newness:
    """What this rank was when its world was new."""

    def __init__(self) -> None:
        self._threads = set(_threads())
        self._torch = symbols.rpc_statics()
        modules = [(name, found) for name, found in sys.modules.items() if name.startswith(_STEPS)]
        self._modules = dict(modules)
        #: What each global is; and the dicts and lists among them, with their contents.
        self._globals = {name: [*_globals_of(module)] for name, module in modules}
        self._held = [
            (name, value, [*_in(value)])
            for name, module in modules
            for key, value in vars(module).items()
            if isinstance(value, dict | list | set | deque)
            if value is not state.ran and not key.startswith("__")
        ]

    def difference(self) -> str:
        """What differs now, in a few words; empty if nothing does."""
        # Branches of programs have threads of ours, which wait for the next one.
        left = [
            name
            for ident, name in _threads().items()
            if ident not in self._threads and not name.startswith("rpcprops-")
        ]
        if left:
            return f"threads are left: {', '.join(left)}"
        if symbols.rpc_statics() != self._torch:
            return "torch's statics differ"
        for name, before in self._globals.items():
            if not _are(_globals_of(self._modules[name]), before):
                return f"a global of {name} is another object"
        for name, value, before in self._held:
            if not _are(_in(value), before):
                return f"a global of {name} holds something else"
        return ""

    def begin(self) -> None:
        """Count from the beginning, for a new program. Nothing may differ."""
        state.ran.clear()
        calls = self._modules.get(_CALLS)
        if calls is not None:
            setattr(calls, _NUMBERS, itertools.count(1))
            self._globals[_CALLS] = [*_globals_of(calls)]


def forget() -> None:
    """Let go of all that the last program has kept here."""
    state.handles.clear()
    state.futures.clear()
    state.contexts.clear()


def busy_parts(agent: Mapping[str, Any]) -> list[str]:
    """The parts of what ``WireAgent::state`` says that are not zero."""
    return [
        name
        for name, value in agent.items()
        if (any(value.values()) if isinstance(value, dict) else value)
    ]


#: What an agent holds at rest too, where a program holds RRefs.
_HELD = ("owners", "forks", "confirmed_users")


def moving_parts(agent: Mapping[str, Any]) -> list[str]:
    """Those of :func:`busy_parts` that change, or may change something, without a new message."""
    return [name for name in busy_parts(agent) if name not in _HELD]


def _threads() -> dict[int, str]:
    """The threads that Python code has started: torch's own only have a stand-in here."""
    return {
        thread.ident or 0: thread.name
        for thread in threading.enumerate()
        if type(thread).__name__ != "_DummyThread"
    }


def _globals_of(module: types.ModuleType) -> Collection[Any]:
    """The globals of a module, without that in which Python notes its warnings."""
    found = vars(module)
    if _WARNINGS not in found:
        return found.values()
    return [value for name, value in found.items() if name != _WARNINGS]


def _in(held: Any) -> Collection[Any]:
    """What a container holds; of a dict, its values."""
    return held.values() if isinstance(held, dict) else held


def _are(now: Collection[Any], before: list[Any]) -> bool:
    """Whether `now` has the same objects, and no others."""
    return len(now) == len(before) and all(map(operator.is_, now, before))
