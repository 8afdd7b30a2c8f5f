"""Tries once whether a program can start with the clock library, before anything depends on it.

If the dynamic linker cannot load a library, it only prints a line about that and continues. But a
truncated file kills the program when it first touches a missing page.
"""

from __future__ import annotations

import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

#: Real seconds that the program may take; on an idle machine it takes 0.03.
PREFLIGHT_SECONDS = 15.0

#: Its exit codes: the library is not loaded, or reports an error itself (see ``selfcheck()``).
_NOT_LOADED, _REFUSED = 97, 98
_PROGRAM = f"""
import ctypes, sys
library = ctypes.CDLL(None)
if not hasattr(library, "rpcprops_clock_selfcheck"):
    sys.exit({_NOT_LOADED})
sys.exit({_REFUSED} if library.rpcprops_clock_selfcheck() else 0)
"""

# Fields of a 64-bit ELF file: place, size and number of program headers, and one header's fields.
_ELF_HEADER = struct.Struct("<32xQ14xHH6x")
_PROGRAM_HEADER = struct.Struct("<I4xQ16xQ16x")
_PT_LOAD = 1


def preflight(library: Path, environment: Mapping[str, str]) -> str:
    """What is wrong with `library`, in words; empty if a program starts with it.

    Args:
        environment: one in which the dynamic linker loads it into every program.
    """
    # The measured child also imports this package, and does not need this module.
    import subprocess

    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PREFLIGHT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (
            f"a program that loads the clock library {str(library)!r} did not end within "
            f"{PREFLIGHT_SECONDS:g} real seconds"
        )
    missing = _missing_bytes(library)
    if ended.returncode == 0 and not missing:
        return ""
    cut = f"; the file is cut off, {missing} bytes are missing" if missing else ""
    if ended.returncode < 0:
        name = _signal_name(-ended.returncode)
        return f"a program that loads the clock library {str(library)!r} is killed by {name}{cut}"
    if ended.returncode == _REFUSED:
        return f"the clock library {str(library)!r} fails its self check{cut}"
    if ended.returncode == 0:
        return f"the clock library {str(library)!r} is damaged{cut}"
    said = _linker_line(ended.stderr.decode(errors="replace"), library)
    return f"the clock library does not load: {said or repr(str(library))}{cut}"


def _linker_line(text: str, library: Path) -> str:
    """The line about `library` in the output of a program, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    about = [line for line in lines if library.name in line]
    return (about or lines or [""])[-1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _missing_bytes(library: Path) -> int:
    """How many bytes of an ELF file's segments, by its own headers, are missing in the file.

    The program above touches only a part of them. If the file is not readable as ELF, the
    linker will report that.
    """
    try:
        data = library.read_bytes()
        start, size, count = _ELF_HEADER.unpack_from(data)
        segments = [_PROGRAM_HEADER.unpack_from(data, start + n * size) for n in range(count)]
    except (OSError, struct.error):
        return 0
    ends = [offset + length for kind, offset, length in segments if kind == _PT_LOAD]
    return max(0, max(ends, default=0) - len(data))
