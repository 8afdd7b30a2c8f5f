"""Finds the function that runs a step in a rank. Imports torch only if that function does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any


def place_of(kind: Any) -> tuple[str, str]:
    """The module and the name of the function that runs a step, or steps of a class.

    Raises:
        TypeError: no rank runs such a step.
    """
    runs: str = kind.runs
    if not runs:
        msg = f"{kind!r} is not run in a rank"
        raise TypeError(msg)
    module, _, name = runs.partition(":")
    return module, name


def modules_of(kinds: Iterable[Any]) -> list[str]:
    """The modules with the functions that run some steps (or classes of step), and the classes.

    If they were imported in the middle of a run, a step would look like a hang.
    """
    found: set[str] = set()
    for kind in kinds:
        if kind.runs:
            cls = kind if isinstance(kind, type) else type(kind)
            found |= {cls.__module__, place_of(kind)[0]}
    return sorted(found)


def function_of(step: Any) -> Any:
    """The function that runs a step here; it takes the arguments of :func:`arguments_of`."""
    module, name = place_of(step)
    return getattr(importlib.import_module(module), name)


def arguments_of(step: Any) -> dict[str, Any]:
    """The fields of a step by name, except the rank that runs it."""
    names = (field.name for field in dataclasses.fields(step))
    return {name: getattr(step, name) for name in names if name != "at"}
