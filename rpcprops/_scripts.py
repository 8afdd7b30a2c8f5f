"""Imports a program that is a script, so that a test can call the functions that it spawns."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from types import ModuleType

from rpcprops._given import argument
from rpcprops.errors import UsageError


def load_script(path: str | os.PathLike[str], *argv: str) -> ModuleType:
    """Import the script at `path` as a module, as a process does that it has spawned.

    The part below ``if __name__ == "__main__"`` does not run. While the module is imported,
    ``sys.argv`` is the script with `argv`, for a parser of arguments at the top of it. Its folder
    is and stays on ``sys.path``, because its functions may import from there. The module is named
    after its folder and its file (``rl/main.py``: ``rl_main``), so that two scripts ``main.py`` are
    two modules. A second call gives the same module.

    Call it at the top of the test module: ranks import that too, and so have the script.

    Args:
        path: absolute, or relative to the working directory.

    Raises:
        UsageError: there is no such file, or the script exits while it is imported (it refuses
            `argv`, or has no ``if __name__ == "__main__"``), or another module has its name.
    """
    try:
        file = os.path.realpath(str(os.fspath(path)))
        is_there = file.endswith(".py") and os.path.isfile(file)
    except (TypeError, ValueError):  # no path, or one with characters that no path has
        file, is_there = "", False
    if not is_there:
        where = f" ({file})" if file else ""
        msg = f"{argument('path', path)} must be the path of a Python file that is there{where}."
        raise UsageError(msg)
    folder, base = os.path.split(file)
    name = re.sub(r"\W", "_", f"{os.path.basename(folder)}_{base.removesuffix('.py')}")
    known = sys.modules.get(name)
    if known is not None:
        if os.path.realpath(known.__file__ or "") != file:
            msg = f"{file} would be the module {name}, which is {known.__file__}; rename a folder."
            raise UsageError(msg)
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    before, sys.argv = sys.argv, [file, *argv]
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, SystemExit):
            raise
        msg = (
            f"{file} exits with {error.code!r} while it is imported with the arguments {argv!r}: "
            f"give it those that it needs (load_script(path, '--option', ...)), and let it start "
            f"its processes below `if __name__ == '__main__'`."
        )
        raise UsageError(msg) from error
    finally:
        sys.argv = before
    return module
