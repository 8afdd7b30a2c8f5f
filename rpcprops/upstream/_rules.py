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

from rpcprops.agents import tensorpipe
from rpcprops.torch_facts.symbols import TESTING

_CLOCKS = frozenset(
    {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
)
_HOME = f"{TESTING}."
#: torch's names of the options of an agent (``rpc.options``), which no other agent takes.
_OPTIONS = {"TensorPipeRpcBackendOptions": tensorpipe.NAME}


def asserts_wall_clock(cls: Any, name: str) -> str:
    """Why a test must run in real time, else empty: it asserts how long something took.

    An upper bound on seconds allows less real work when seconds pass faster.
    """
    for function in reached(cls, name):
        if _bounds_time(function):
            return f"{function.__qualname__} asserts how long something took"
    return ""


# Hundreds of tests reach the same functions, so each function is looked at once.
@functools.cache
def _bounds_time(function: types.FunctionType) -> bool:
    tree = _tree(function)
    measured = _measured(tree)
    return any(
        _is_assertion(node) and (_reads_clock(node) or bool(measured & _names(node)))
        for node in ast.walk(tree)
    )


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
        if named := _timeout_in(function):
            return f"{function.__qualname__} has {named}"
    return ""


@functools.cache
def _timeout_in(function: types.FunctionType) -> str:
    """The first name in a function that is about a timeout, or empty."""
    for node in ast.walk(_tree(function)):
        named = getattr(node, "id", None) or getattr(node, "attr", None)
        if isinstance(node, ast.keyword):
            named = node.arg
        if isinstance(named, str) and "timeout" in named.lower():
            return named
    return ""


def means_nothing_under_faults(agent: str, cls: Any, name: str) -> str:
    """Why a test is not run under drawn tables, else empty."""
    if agent != "generic":
        return "its suite is about the agent itself, and brings its own options and tables"
    return ""


def asks_for_agent(cls: Any, name: str) -> tuple[str, str]:
    """The agent for which a test asks, and how; empty if it takes what its fixture gives.

    torch's suites get their agent by a fixture that is mixed in (``rpc_utils.generate_tests``), so
    a test asks for one only where its source names it: as a member of ``BackendType``, or by the
    class of its options.
    """
    for function in reached(cls, name):
        agent, named = _agent_in(function)
        if agent:
            return agent, f"{function.__qualname__} names {named}"
    return "", ""


@functools.cache
def _agent_in(function: types.FunctionType) -> tuple[str, str]:
    """The first agent that a function names, and the name in its source; or two empty texts."""
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Attribute | ast.Name):
            own = node.attr if isinstance(node, ast.Attribute) else node.id
            if own in _OPTIONS:
                return _OPTIONS[own], own
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", None) or getattr(node.value, "id", None)
            if owner == "BackendType":
                return node.attr, f"BackendType.{node.attr}"
    return "", ""


@functools.cache
def reached(cls: Any, name: str) -> tuple[types.FunctionType, ...]:
    """The test `name` of `cls`, and the functions of PyTorch's test code that it reaches."""
    found: dict[types.FunctionType, None] = {}
    waiting = [_plain(inspect.getattr_static(cls, name))]
    while waiting:
        function = waiting.pop()
        if function is None or function in found or not function.__module__.startswith(_HOME):
            continue
        found[function] = None
        waiting += [_plain(one) for one in _named(cls, function)]
    return tuple(found)


def _named(cls: Any, function: types.FunctionType) -> Iterator[Any]:
    """The objects to which the names in a function's source refer."""
    space = function.__globals__
    for of, name in _names_in(function):
        if not of:
            yield space.get(name)
            continue
        owner = cls if of in ("self", "cls") else space.get(of)
        if owner is not None:
            yield inspect.getattr_static(owner, name, None)


@functools.cache
def _names_in(function: types.FunctionType) -> tuple[tuple[str, str], ...]:
    """Each plain name in a function, as ("", name), and each attribute of one, as (of, name)."""
    found: dict[tuple[str, str], None] = {}
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Name):
            found["", node.id] = None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found[node.value.id, node.attr] = None
    return tuple(found)


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
