"""Finds the function that runs a step in a rank. It imports torch only where the function does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any


def place_of(kind: Any) -> tuple[str, str]:
    """The module and the name of the function that runs a step, or steps of a class.

    Raises:
        TypeError: no rank runs it.
    """
    runs: str = kind.runs
    if not runs:
        msg = f"{kind!r} is not run in a rank"
        raise TypeError(msg)
    module, _, name = runs.partition(":")
    return module, name


def modules_of(kinds: Iterable[Any]) -> list[str]:
    """The modules that hold what runs steps, or steps of classes, and those classes themselves.

    Imported in the middle of a run, they would make a step look like a hang.
    """
    found: set[str] = set()
    for kind in kinds:
        if kind.runs:
            cls = kind if isinstance(kind, type) else type(kind)
            found |= {cls.__module__, place_of(kind)[0]}
    return sorted(found)


def function_of(step: Any) -> Any:
    """The function that runs a step here; it takes what :func:`arguments_of` gives."""
    module, name = place_of(step)
    return getattr(importlib.import_module(module), name)


def arguments_of(step: Any) -> dict[str, Any]:
    """The fields of a step, by name, but for the rank that runs it."""
    names = (field.name for field in dataclasses.fields(step))
    return {name: getattr(step, name) for name in names if name != "at"}
