"""The file that type checkers read is at least Python, and uses all that is public."""

from __future__ import annotations

import ast
from pathlib import Path

import rpcprops
from rpcprops import strategies

API = Path(__file__).parents[1] / "typing" / "api.py"


def test_the_typed_file_compiles() -> None:
    """Nothing runs it, so a slip in its syntax would otherwise show in no test."""
    compile(API.read_text(encoding="utf-8"), str(API), "exec", dont_inherit=True)


def test_the_typed_file_uses_all_that_is_public() -> None:
    """A name that is added to the public API must be used there too."""
    tree = ast.parse(API.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(rpcprops.__all__) <= used
    assert set(strategies.__all__) <= used
