"""Copies functions out of modules, with all that they use, into the text of one file.

A name that a function uses is defined or imported in its module. What comes from torch or the
standard library is imported in the file too; everything else is copied word for word. Sources are
read and not imported, so nothing here imports torch.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rpcprops.errors import HarnessError

_Import = ast.Import | ast.ImportFrom


class Module:
    """The source of a module.

    Attributes:
        statements: its top-level statements, in order.
        defined: the statement that defines each name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = _read(name)
        self.lines = self.text.splitlines()
        self.statements = ast.parse(self.text).body
        self.defined: dict[str, list[ast.stmt]] = {}
        for statement in self.statements:
            for defined in self.defined_by(statement):
                self.defined.setdefault(defined, []).append(statement)

    @staticmethod
    def defined_by(statement: ast.stmt) -> list[str]:
        """The names that a statement defines or imports."""
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return [statement.name]
            case ast.Import() | ast.ImportFrom():
                return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
            case ast.Assign():
                return [node.id for node in statement.targets if isinstance(node, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                return [name]
            case _:
                return []

    def source(self, statement: ast.stmt) -> str:
        """The text of a statement, with its decorators and the comment right above it."""
        decorators = getattr(statement, "decorator_list", [])
        first = min(node.lineno for node in (statement, *decorators)) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : statement.end_lineno])

    def origin(self, imported: ast.ImportFrom) -> str:
        """The full name of the module that a statement imports from."""
        package = self.name.rpartition(".")[0]
        return importlib.util.resolve_name("." * imported.level + (imported.module or ""), package)


@dataclass
class Sources:
    """What has been copied so far.

    Attributes:
        taken: the copied statements, by module; a module comes after those that it imports.
        imports: the lines that import whole modules.
        imported: the names imported from modules, by module.
    """

    taken: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    imported: dict[str, set[str]] = field(default_factory=dict)
    _modules: dict[str, Module] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)

    def module(self, name: str) -> Module:
        """The source of a module, read once."""
        if name not in self._modules:
            self._modules[name] = Module(name)
        return self._modules[name]

    def take(self, module: str, name: str) -> None:
        """Copy what a module defines as `name`, and all that it uses.

        Raises:
            HarnessError: its source is missing, or cannot be part of a separate file.
        """
        here = self.module(module)
        if name not in here.defined:
            raise _cannot(module, name, "is not defined at the module's top")
        for statement in here.defined[name]:
            if isinstance(statement, _Import):
                self.take_import(here, statement, name)
            elif statement not in self.taken.setdefault(module, []):
                self.claim(module, name)
                self.taken[module].append(statement)
                self._check_inside(here, name, statement)
                for used in sorted(_used_in(here.source(statement))):
                    if used in here.defined or not hasattr(builtins, used):
                        self.take(module, used)

    def take_import(self, here: Module, statement: _Import, name: str = "") -> None:
        """Import what a statement imports, or copy it; only `name`, if one is given."""
        for alias in statement.names:
            bound = alias.asname or alias.name.partition(".")[0]
            if name not in ("", bound):
                continue
            origin = alias.name if isinstance(statement, ast.Import) else here.origin(statement)
            if origin == "__future__":
                continue
            if not _is_everywhere(origin):
                if isinstance(statement, ast.Import) or alias.asname not in (None, alias.name):
                    said = ast.unparse(statement)
                    raise _cannot(
                        here.name, bound, f"must be imported by its own name, not {said!r}"
                    )
                self.take(origin, alias.name)
            elif isinstance(statement, ast.Import):
                self.claim(origin if alias.asname else bound, bound)
                self.imports.add(ast.unparse(ast.Import([alias])))
            else:
                self.claim(f"{origin}.{alias.name}", bound)
                self.imported.setdefault(origin, set()).add(ast.unparse(alias))

    def _check_inside(self, here: Module, name: str, statement: ast.stmt) -> None:
        """Raises:
        HarnessError: a statement inside a function imports something that a script must copy.
        """
        for node in ast.walk(statement):
            origins: list[str] = []
            if isinstance(node, ast.Import):
                origins = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                origins = [here.origin(node)]
            if not all(map(_is_everywhere, origins)):
                said = ast.unparse(node)
                raise _cannot(here.name, name, f"must have {said!r} at the top of its module")

    def claim(self, owner: str, name: str) -> None:
        """Note that a name of the file belongs to `owner`.

        Raises:
            HarnessError: the name belongs to another owner.
        """
        if self._owners.setdefault(name, owner) != owner:
            raise _cannot(owner, name, f"is also a name of {self._owners[name]}")

    def import_lines(self, *, of_torch: bool) -> list[str]:
        """The sorted imports: those of torch, or those of the standard library."""
        lines = sorted(self.imports)
        for origin, names in sorted(self.imported.items()):
            lines.append(f"from {origin} import {', '.join(sorted(names))}")
        return [line for line in lines if (line.split()[1].split(".")[0] == "torch") is of_torch]

    def definitions(self) -> str:
        """The text of what was copied, in the order of each module's source."""
        text = ""
        between = ""
        for name in self._in_order():
            module = self.module(name)
            for statement in module.statements:
                if statement in self.taken[name]:
                    # As ruff would format it.
                    lines = 1 if isinstance(statement, ast.Assign | ast.AnnAssign) else 2
                    text += "\n" * max(lines, len(between)) if text else ""
                    text += module.source(statement) + "\n"
                    between = "\n" * lines
        return text.rstrip("\n")

    def _in_order(self) -> list[str]:
        ordered: list[str] = []

        def visit(name: str) -> None:
            if name in ordered or name not in self.taken:
                return
            module = self.module(name)
            for statement in module.statements:
                if isinstance(statement, ast.ImportFrom):
                    visit(module.origin(statement))
            ordered.append(name)

        for name in sorted(self.taken):
            visit(name)
        return ordered


def _is_everywhere(module: str) -> bool:
    """Whether a script can import a module where it runs: torch's, or the standard library's."""
    return module.partition(".")[0] in ("torch", *sys.stdlib_module_names)


def _cannot(module: str, name: str, why: str) -> HarnessError:
    return HarnessError(f"{name!r} of {module} cannot stand in a script: it {why}.")


def _read(name: str) -> str:
    """The source of a module, which may be in a zip file.

    Raises:
        HarnessError: there is no source.
    """
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            msg = "there is no such module"
            raise ImportError(msg)
        get_source = getattr(spec.loader, "get_source", None)
        if get_source is not None:
            if text := get_source(name):
                return str(text)
            msg = "it was installed without its source"
            raise ImportError(msg)
        # The loader with which pytest imports tests.
        return importlib.util.decode_source(Path(str(spec.origin)).read_bytes())
    except (ImportError, OSError, ValueError) as error:
        msg = (
            f"a script needs the source of {name}, which cannot be read: {error}. Install rpcprops "
            f"from its wheel or its sources, with the .py files."
        )
        raise HarnessError(msg) from error


def _used_in(text: str) -> set[str]:
    """The names of its module that the text of a statement uses."""

    def of(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                yield symbol.get_name()
        for child in table.get_children():
            yield from of(child)

    return set(of(symtable.symtable(text, "<source>", "exec")))
