"""Brings the modules of a test process into ranks, under their own names and from their own files.

torch's RPC pickles a function as a module name and a qualified name, so the module must be
importable by that name where the function runs. A test module under pytest's ``importlib`` or
``prepend`` mode, or a script's ``__main__``, is not. The test process therefore describes its
modules (:func:`describe_modules`), and a finder in the ranks loads them from the same files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import site
import sys
import sysconfig
import types
from collections.abc import Sequence
from dataclasses import dataclass

from rpcprops.errors import UsageError
from rpcprops.torch_facts import symbols

#: Modules of ours that are imported only on request, since that takes more than a second.
TRAINING = "rpcprops.steps.in_rank.training"
UPSTREAM = "rpcprops.upstream._rank_side"


@dataclass(frozen=True)
class ModuleMap:
    """Where the modules of a test process come from.

    Attributes:
        path: its ``sys.path``.
        files: module name to file, for user modules only (not the standard library, not installed).
        packages: the names in `files` that are packages.
        main: the file that runs as ``__main__``, empty if that is not a user's script.
        first: the modules to import before anything else, in order.
        directory: its working directory.
        argv: its ``sys.argv``, which a script may read while it is imported.
    """

    path: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    packages: frozenset[str] = frozenset()
    main: str = ""
    first: tuple[str, ...] = ()
    directory: str = ""
    argv: tuple[str, ...] = ()

    def covers(self, other: ModuleMap) -> bool:
        """Whether ranks that were made with this map find all that `other` contains."""
        return (self.first, self.directory, self.main, self.path) == (
            other.first,
            other.directory,
            other.main,
            other.path,
        ) and set(self.files) >= set(other.files)


def _installed_prefixes() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths.add(sysconfig.get_path("scripts"))
    paths.update(site.getsitepackages())
    paths.add(site.getusersitepackages())
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # In a checkout, strategies/ is a link.
    paths.update((ours, os.path.join(ours, "strategies")))
    return tuple(sorted(os.path.realpath(path) + os.sep for path in paths if path))


_INSTALLED = _installed_prefixes()


@functools.cache
def is_user_file(file: str | None) -> bool:
    """Whether `file` is Python source of the user: not the standard library, not installed."""
    if not file or not file.endswith(".py"):
        return False
    return not os.path.realpath(file).startswith(_INSTALLED)


def describe_modules(first: Sequence[str]) -> ModuleMap:
    """The map of this process; `first` names the modules that ranks import before anything else."""
    files: dict[str, str] = {}
    packages: set[str] = set()
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        ours = name == "rpcprops" or name.startswith("rpcprops.")
        if ours or name == "__main__" or not is_user_file(file):
            continue
        files[name] = os.path.abspath(str(file))
        if hasattr(module, "__path__"):
            packages.add(name)
    main_file = getattr(sys.modules.get("__main__"), "__file__", None)
    main = os.path.abspath(str(main_file)) if is_user_file(main_file) else ""
    return ModuleMap(
        path=tuple(sys.path),
        files=tuple(files.items()),
        packages=frozenset(packages),
        main=main,
        first=tuple(
            name
            for name in first
            if name in files or name in (TRAINING, UPSTREAM) or (name == "__main__" and main)
        ),
        directory=os.getcwd(),
        argv=tuple(sys.argv),
    )


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, modules: ModuleMap) -> None:
        self.files = dict(modules.files)
        self.packages = modules.packages
        # pytest's importlib mode names modules after folders that are not packages.
        self.parents: dict[str, list[str]] = {}
        for name, file in self.files.items():
            place = os.path.dirname(file) if name in self.packages else file
            while name := name.rpartition(".")[0]:
                place = os.path.dirname(place)
                places = self.parents.setdefault(name, [])
                if place not in places:
                    places.append(place)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        file = self.files.get(fullname)
        if file is None and fullname in self.parents:
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = list(self.parents[fullname])
            return spec
        if file is None:
            return None
        search = [os.path.dirname(file)] if fullname in self.packages else None
        return importlib.util.spec_from_file_location(
            fullname, file, submodule_search_locations=search
        )


def install(modules: ModuleMap) -> None:
    """Make the modules of `modules` importable here, in the test process's own order of paths."""
    sys.path[:] = [*modules.path, *symbols.folders_of_modules()]
    sys.argv[:] = list(modules.argv)
    sys.meta_path.insert(0, _Finder(modules))
    if modules.directory:
        os.chdir(modules.directory)


#: The file that this process imports for the ranks at the moment.
_importing = ""


def import_first(modules: ModuleMap) -> None:
    """Import what the test process asked for; ``__main__`` runs with another ``__name__``."""
    global _importing
    files = dict(modules.files)
    try:
        for name in modules.first:
            if name == "__main__":
                _importing = modules.main
                _import_main(modules.main)
            else:
                _importing = files.get(name, name)
                importlib.import_module(name)
    finally:
        _importing = ""


def check_not_importing() -> None:
    """Raises:
    UsageError: a module starts ranks while it is imported for ranks.
    """
    if _importing:
        msg = (
            f"{_importing} starts ranks while it is imported, and ranks import it too, as the "
            f"processes of multiprocessing do. Start them in a function that only the test "
            f"process calls; in a script, below\n\n    if __name__ == '__main__':\n"
        )
        raise UsageError(msg)


def _import_main(file: str) -> None:
    # Under this name `if __name__ == "__main__"` is false, as in multiprocessing. The alias
    # resolves functions that were pickled as members of __main__.
    loader = importlib.machinery.SourceFileLoader("__mp_main__", file)
    spec = importlib.util.spec_from_file_location("__mp_main__", file, loader=loader)
    if spec is None:
        msg = f"cannot load {file!r} as a module"
        raise ImportError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules["__mp_main__"] = sys.modules["__main__"] = module
    loader.exec_module(module)
