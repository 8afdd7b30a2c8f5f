"""What the source of a test says about it: by rules, so that nobody must maintain lists of names.

A rule looks at the test and at every helper of PyTorch's test code that it reaches, as far as names
in the source show that: methods of its class, functions of the modules below ``torch.testing``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from rpcprops.torch_facts.symbols import TESTING

_CLOCKS = frozenset(
    {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
)
_HOME = f"{TESTING}."


def asserts_wall_clock(cls: Any, name: str) -> str:
    """Why a test must run in real time, else empty: it asserts how long something took.

    An upper bound on seconds allows less real work when seconds pass faster.
    """
    for function in reached(cls, name):
        tree = _tree(function)
        measured = _measured(tree)
        for node in ast.walk(tree):
            if _is_assertion(node) and (_reads_clock(node) or measured & _names(node)):
                return f"{function.__qualname__} asserts how long something took"
    return ""


def _measured(tree: ast.AST) -> set[str]:
    """The variables that hold a clock reading, or a value computed from one."""
    found: set[str] = set()
    while True:
        more = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and (_reads_clock(node.value) or found & _names(node.value))
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if more <= found:
            return found
        found |= more


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def has_timeouts(cls: Any, name: str) -> str:
    """Why messages of a test must not be delayed, else empty: it sets timeouts.

    A delay that is longer than a timeout rightly changes what the test asserts.
    """
    for function in reached(cls, name):
        for node in ast.walk(_tree(function)):
            named = getattr(node, "id", None) or getattr(node, "attr", None)
            if isinstance(node, ast.keyword):
                named = node.arg
            if isinstance(named, str) and "timeout" in named.lower():
                return f"{function.__qualname__} has {named}"
    return ""


def means_nothing_under_faults(agent: str, cls: Any, name: str) -> str:
    """Why a test is not run under drawn tables, else empty."""
    if agent != "generic":
        return "its suite is about the agent itself, and brings its own options and tables"
    return ""


def reached(cls: Any, name: str) -> list[types.FunctionType]:
    """The test `name` of `cls`, and the functions of PyTorch's test code that it reaches."""
    found: dict[types.FunctionType, None] = {}
    waiting = [_plain(inspect.getattr_static(cls, name))]
    while waiting:
        function = waiting.pop()
        if function is None or function in found or not function.__module__.startswith(_HOME):
            continue
        found[function] = None
        waiting += [_plain(one) for one in _named(cls, function)]
    return list(found)


def _named(cls: Any, function: types.FunctionType) -> Iterator[Any]:
    """The objects to which the names in a function's source refer."""
    space = function.__globals__
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Name):
            yield space.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = cls if node.value.id in ("self", "cls") else space.get(node.value.id)
            if owner is not None:
                yield inspect.getattr_static(owner, node.attr, None)


def _plain(found: Any) -> types.FunctionType | None:
    """The function inside decorators; None if there is none, or if it is a class."""
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, types.FunctionType) else None


@functools.cache
def _tree(function: types.FunctionType) -> ast.AST:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return ast.Module([], [])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            # Decorators of tests are the same for all tests.
            node.decorator_list.clear()
    return tree


def _reads_clock(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Call) and _is_clock(part.func) for part in ast.walk(node))


def _is_clock(function: ast.AST) -> bool:
    """Whether this is ``time.NAME``, or a NAME that only clocks have."""
    if isinstance(function, ast.Attribute):
        owner = function.value
        return isinstance(owner, ast.Name) and owner.id == "time" and function.attr in _CLOCKS
    return isinstance(function, ast.Name) and function.id in _CLOCKS - {"time"}


def _is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("assert")
    )
