"""Which names of torch a function uses, read from its source: directly, and through its helpers.

Nothing is imported or run. A name counts where it stands in the source, whether or not it is
reached there. Annotations do not count.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: The folder of this package, and its name.
_PACKAGE = Path(__file__).parent
_OURS = __package__ or "rpcprops"


@dataclass(frozen=True, slots=True)
class Uses:
    """What a function uses.

    Attributes:
        dotted: names that begin with an imported module, such as ``torch.futures.wait_all``.
        attributes: names of attributes of anything else, each with the source text of what has it:
            ``("to_here", "rref")``.
        keywords: names of keyword arguments and short strings, such as those of options.
    """

    dotted: frozenset[str] = frozenset()
    attributes: frozenset[tuple[str, str]] = frozenset()
    keywords: frozenset[str] = frozenset()

    def __or__(self, other: Uses) -> Uses:
        return Uses(
            self.dotted | other.dotted,
            self.attributes | other.attributes,
            self.keywords | other.keywords,
        )


@dataclass
class _Module:
    """A parsed module.

    Attributes:
        imported: what each imported name stands for.
        defined: the statement that defines each name at the top of the module.
    """

    name: str
    tree: ast.Module
    imported: dict[str, str] = field(default_factory=dict)
    defined: dict[str, ast.stmt] = field(default_factory=dict)


@functools.cache
def _parsed(name: str, path: Path) -> _Module:
    module = _Module(name, ast.parse(path.read_text(encoding="utf-8")))
    for node in ast.walk(module.tree):
        module.imported |= _imported(node)
    for statement in module.tree.body:
        module.defined |= dict.fromkeys(_names_of(statement), statement)
    return module


def _imported(node: ast.AST) -> dict[str, str]:
    """The names that a statement imports, and what each stands for."""
    if isinstance(node, ast.ImportFrom) and not node.level:
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Import):
        first = [alias.name.partition(".")[0] for alias in node.names]
        return {
            alias.asname or package: alias.name if alias.asname else package
            for alias, package in zip(node.names, first, strict=True)
        }
    return {}


def _names_of(statement: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _module(name: str) -> _Module | None:
    """A module of this package; None if it is no such module."""
    if name.partition(".")[0] != _OURS:
        return None
    path = _PACKAGE.joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return _parsed(name, file)
    return None


def uses_of(module: str, function: str) -> Uses:
    """What a function at the top of a module of this package uses."""
    found = _module(module)
    return _of_definition(found, function, set()) if found is not None else Uses()


def uses_of_modules(names: Iterable[str]) -> Uses:
    """What whole modules use, without the modules that they import."""
    uses = Uses()
    for name in names:
        module = _module(name)
        if module is not None:
            uses |= _of_node(module, module.tree, None)
    return uses


def _of_definition(module: _Module, name: str, seen: set[tuple[str, str]]) -> Uses:
    statement = module.defined.get(name)
    if statement is None or (module.name, name) in seen:
        return Uses()
    seen.add((module.name, name))
    return _of_node(module, statement, seen)


def _of_node(module: _Module, node: ast.AST, seen: set[tuple[str, str]] | None) -> Uses:
    """What a piece of source uses; with `seen`, also what the names in it that are ours use."""
    dotted: set[str] = set()
    attributes: set[tuple[str, str]] = set()
    keywords: set[str] = set()
    helpers = Uses()
    local = _bound(node) if seen is not None else set[str]()
    for part in _parts(node):
        if isinstance(part, ast.keyword) and part.arg:
            keywords.add(part.arg)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            keywords.add(part.value[:80])
        elif isinstance(part, ast.Name | ast.Attribute):
            if isinstance(part, ast.Name) and part.id in local:
                continue
            full = _dotted(module, part)
            if full is not None and not full.startswith(f"{_OURS}."):
                dotted.add(full)
            elif isinstance(part, ast.Attribute) and full is None:
                attributes.add((part.attr, ast.unparse(part.value)))
            elif seen is not None and full is not None:
                place, _, name = full.rpartition(".")
                other = _module(place)
                if other is not None:
                    helpers |= _of_definition(other, name, seen)
    return Uses(frozenset(dotted), frozenset(attributes), frozenset(keywords)) | helpers


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but for annotations."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _parts(child)


def _bound(node: ast.AST) -> set[str]:
    """The names of parameters and variables inside a function, which hide those of its module."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    found = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    return found | {
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }


def _dotted(module: _Module, node: ast.AST) -> str | None:
    """The full name that a name, or a chain of attributes, stands for; None if it is a value."""
    if isinstance(node, ast.Attribute):
        base = _dotted(module, node.value)
        # An attribute of something of ours is one of a value.
        return None if base is None or base.startswith(f"{_OURS}.") else f"{base}.{node.attr}"
    if not isinstance(node, ast.Name):
        return None
    if node.id in module.imported:
        place, _, name = module.imported[node.id].rpartition(".")
        other = _module(place)
        alias = _alias(other, name) if other is not None else None
        return alias or module.imported[node.id]
    if node.id in module.defined:
        return _alias(module, node.id) or f"{module.name}.{node.id}"
    return None


def _alias(module: _Module, name: str) -> str | None:
    """The full name that a module gives another name to, as in ``autograd: Any = torch.autograd``.

    None if the name is no such one.
    """
    statement = module.defined.get(name)
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return None
    full = _dotted(module, statement.value)
    return None if full is None or full.startswith(f"{_OURS}.") else full


def methods_used(
    uses: Uses,
    names: Iterable[str],
    members: Iterable[str],
    needs: Mapping[str, tuple[str, ...]],
    receivers: Mapping[str, str],
) -> set[str]:
    """The public members of classes, out of `members`, that attributes in `uses` stand for.

    Args:
        names: the public names that the function uses.
        needs: for members whose name others have as well: names of which the function must also
            use one.
        receivers: for others: a regular expression for the source text of what has the attribute.
    """
    used = set(names)
    found: set[str] = set()
    for member in members:
        _, _, attribute = member.rpartition(".")
        holders = [text for name, text in uses.attributes if name == attribute]
        pattern = receivers.get(member, "")
        if not any(re.search(pattern, text) for text in holders):
            continue
        if not needs.get(member) or used & set(needs[member]):
            found.add(member)
    return found
