"""Compiles the agent WIRE against the installed torch, once for each torch and source.

Nothing here imports torch: what the compiler needs is in files of torch's. The library is kept in
the user's cache folder, under a name that says what it was made from, so that another torch or
another source never finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rpcprops.agents._agent import Progress
from rpcprops.errors import MachineCannot

#: The name of the extension module.
MODULE = "_rpcprops_wire"

_SOURCES = ("_agent.cpp", "_ledger.h")
_FLAGS = (
    "-std=c++20",
    "-O1",
    "-g0",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    f"-DTORCH_EXTENSION_NAME={MODULE}",
    # As torch itself is built: its headers show the agent only then.
    "-DUSE_C10D",
    "-DUSE_DISTRIBUTED",
    "-DUSE_RPC",
    "-DUSE_TENSORPIPE",
)
#: The name under which pybind11 2 keeps its types. It ends with the ABI of the compiler that built
#: torch, and an extension shares torch's types only if it uses the same name.
_PYBIND11_TYPES = re.compile(rb"__pybind11_internals_v\d+_gcc_libstdcpp(_cxxabi\d+)__")
_LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")
#: Real seconds that the compiler may take.
_COMPILER_SECONDS = 1200.0
_SHOWN_LINES = 12
#: How the names of folders begin in which the compiler writes.
_TEMPORARY = "compiling-"
#: Real seconds of a wait for another process that nobody is told of, and between two looks.
_SILENT_SECONDS, _LOOK_SECONDS = 1.0, 0.02


@dataclass(frozen=True)
class Torch:
    """The installed torch, as far as a compiler must know it.

    Attributes:
        version: as torch names it, with the tag of its build.
        commit: the commit of torch that it was built from.
        folder: where its package is.
        cxx11_abi: which of the two ABIs of the C++ library it was built with.
        pybind11_abi: the ABI in the names of pybind11, ``_cxxabi1016``; empty if they have none.
    """

    version: str
    commit: str
    folder: Path
    cxx11_abi: bool
    pybind11_abi: str = ""


@functools.cache
def installed_torch() -> Torch:
    """The torch that this Python would import.

    Raises:
        MachineCannot: there is none, or it is not an installed wheel.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        msg = "there is no torch here, so the agent WIRE cannot be compiled; install torch."
        raise MachineCannot(msg)
    folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        text = ""
    version = re.search(r"__version__ = '([^']+)'", text)
    commit = re.search(r"git_version = '([^']+)'", text)
    if version is None or commit is None or not (folder / "include" / "tensorpipe").is_dir():
        msg = (
            f"the torch in {folder} has no headers of TensorPipe, so the agent WIRE cannot be "
            f"compiled; install a Linux wheel of torch."
        )
        raise MachineCannot(msg)
    # Since 2.8 all wheels have the new ABI, and no file says so any more.
    config = folder / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    old = config.is_file() and "_GLIBCXX_USE_CXX11_ABI=0" in config.read_text()
    return Torch(version[1], commit[1], folder, not old, pybind11_abi(folder))


def pybind11_abi(folder: Path) -> str:
    """The ABI that the names of pybind11 in torch have. Since torch 2.9, and pybind11 3, none."""
    header = folder / "include" / "pybind11" / "detail" / "common.h"
    library = folder / "lib" / "libtorch_python.so"
    if "define PYBIND11_VERSION_MAJOR 2" not in header.read_text():
        return ""
    found = _PYBIND11_TYPES.search(library.read_bytes())
    return found[1].decode() if found else ""


def compiler() -> str | None:
    """The C++ compiler: what ``CXX`` names, or g++, or c++; None if there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else _usual_compiler()


def _usual_compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def sources() -> tuple[Path, ...]:
    """The files that are compiled."""
    return tuple(Path(__file__).with_name(name) for name in _SOURCES)


def library_path() -> Path:
    """Where the library for this Python, this torch and this source is, or will be.

    Virtual environments that hold the same torch share it. A torch that its user builds again and
    again from changed sources is told by its headers of RPC and by the size of its libraries.

    Raises:
        MachineCannot: there is no torch that it could be compiled against.
    """
    torch = installed_torch()
    digest = hashlib.sha256()
    libraries = (torch.folder / "lib" / f"lib{name[2:]}.so" for name in _LIBRARIES)
    sizes = (path.stat().st_size for path in libraries)
    for part in (torch.commit, *definitions(torch), *sizes):
        digest.update(f"{part}\n".encode())
    headers = torch.folder / "include" / "torch" / "csrc" / "distributed" / "rpc"
    for source in (*sources(), *sorted(headers.glob("*.h"))):
        digest.update(source.read_bytes())
    name = f"wire-{torch.version}-{sysconfig.get_config_var('SOABI')}-{digest.hexdigest()[:16]}"
    return _cache() / name / f"{MODULE}.so"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return home / "rpcprops" / "agents"


def definitions(torch: Torch) -> list[str]:
    """The compiler's options that name no folder."""
    abi = torch.pybind11_abi
    older = [
        '-DPYBIND11_COMPILER_TYPE="_gcc"',
        '-DPYBIND11_STDLIB="_libstdcpp"',
        f'-DPYBIND11_BUILD_ABI="{abi}"',
    ]
    return [
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
        *(older if abi else ()),
    ]


def _flags(torch: Torch) -> list[str]:
    include = torch.folder / "include"
    return [
        *definitions(torch),
        f"-isystem{include}",
        f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]


def command(target: Path) -> list[str]:
    """The command that compiles the library to `target`.

    Raises:
        MachineCannot: there is no C++ compiler, or no torch.
    """
    found = compiler()
    if found is None:
        named = os.environ.get("CXX")
        other = _usual_compiler()
        if named and other:
            lacks = f"CXX={named} names no program; unset CXX, for {other} is there"
        else:
            lacks = (
                f"there is no C++ compiler here{f' (CXX={named})' if named else ''}; install g++"
            )
        msg = f"the agent WIRE must be compiled, and {lacks}, or use another agent."
        raise MachineCannot(msg)
    torch = installed_torch()
    library = torch.folder / "lib"
    return [
        found,
        *_flags(torch),
        str(sources()[0]),
        "-o",
        str(target),
        f"-L{library}",
        *_LIBRARIES,
    ]


def _silent(*_: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext()


def built(*, force: bool = False, progress: Progress = _silent) -> Path:
    """The library, compiled if it is not there yet; that takes about a minute of one processor.

    Of several processes that ask at the same time one compiles, and the others wait for it.

    Args:
        force: compile it even if it is there.
        progress: called once if this process compiles, or waits for longer than a second.

    Raises:
        MachineCannot: it cannot be compiled, or the cache folder cannot be written.
    """
    path = library_path()
    if path.is_file() and not force:
        return path
    command(path)  # Without a compiler there is nothing to wait for.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            _build(path, lock, force=force, progress=progress)
    except OSError as error:
        msg = (
            f"the agent WIRE cannot be kept in {path.parent}: {error.strerror or error}. Name "
            f"another folder by XDG_CACHE_HOME."
        )
        raise MachineCannot(msg) from error
    return path


def _build(path: Path, lock: TextIO, *, force: bool, progress: Progress) -> None:
    """Compile the library, or wait for the process that does."""
    is_ours = _locks(lock, _SILENT_SECONDS)
    if is_ours and path.is_file() and not force:
        return
    does = "compiling the agent WIRE" if is_ours else "another process compiles the agent WIRE"
    waits = "" if is_ours else ", and this one waits for it"
    what = (
        f"{does} for torch {installed_torch().version}{waits}; this takes about a minute, once, "
        f"and is kept in {path.parent}"
    )
    with progress(what, "the agent WIRE is compiled"):
        if not is_ours:
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The other process may have been killed, or its compiler has failed.
        if force or not path.is_file():
            _compile(path)


def _locks(file: TextIO, seconds: float) -> bool:
    """Take the lock, unless another process holds it for longer than that (real time)."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_SECONDS)
        else:
            return True


def _compile(path: Path) -> None:
    """Write the library and its log; the lock is held, so no other process compiles here."""
    log = path.with_suffix(".log")
    for left in path.parent.glob(f"{_TEMPORARY}*"):  # A process was killed while it compiled.
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=path.parent) as folder:
        target = Path(folder) / path.name
        line = command(target)
        try:
            done = subprocess.run(
                line,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_COMPILER_SECONDS,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
            text, failed = done.stdout.decode("utf-8", "replace"), done.returncode != 0
        except subprocess.TimeoutExpired:
            text, failed = f"it was stopped after {_COMPILER_SECONDS:g} s", True
        log.write_text(" ".join(line) + "\n" + text)
        if failed:
            said = [row for row in text.splitlines() if "error" in row] or text.splitlines()
            shown = "\n".join(said[:_SHOWN_LINES])
            if not shown.strip():
                shown = f"it ended with exit code {done.returncode} and wrote nothing."
            msg = (
                f"the agent WIRE could not be compiled against torch {installed_torch().version} "
                f"by {line[0]}:\n{shown}\nThe whole output is in {log}. Install a g++ that knows "
                f"C++20 (11 or newer) and name it by CXX, or use another agent."
            )
            raise MachineCannot(msg)
        target.replace(path)
