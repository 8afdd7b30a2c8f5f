"""Whether a program can start with the clock library: tried once, before anything depends on it.

The dynamic linker only prints a line about a library that it cannot load, and goes on without it. A
file that was cut off kills the program instead, where it first touches a page that is not there.
"""

from __future__ import annotations

import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

#: Real seconds that the program may take; on an idle machine it takes 0.03.
PREFLIGHT_SECONDS = 15.0

#: Its exit codes: the library is not loaded, or refuses itself (see ``selfcheck()``).
_NOT_LOADED, _REFUSED = 97, 98
_PROGRAM = f"""
import ctypes, sys
library = ctypes.CDLL(None)
if not hasattr(library, "rpcprops_clock_selfcheck"):
    sys.exit({_NOT_LOADED})
sys.exit({_REFUSED} if library.rpcprops_clock_selfcheck() else 0)
"""

# Of a 64-bit ELF file: where its program headers are, their size and number, and what one says.
_ELF_HEADER = struct.Struct("<32xQ14xHH6x")
_PROGRAM_HEADER = struct.Struct("<I4xQ16xQ16x")
_PT_LOAD = 1


def preflight(library: Path, environment: Mapping[str, str]) -> str:
    """What is wrong with `library`, in words; empty where a program starts with it.

    Args:
        environment: one in which the dynamic linker loads it into every program.
    """
    # The measured child imports this package too, and can do without.
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
    """The line on `library` in what a program printed, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    about = [line for line in lines if library.name in line]
    return (about or lines or [""])[-1]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _missing_bytes(library: Path) -> int:
    """How many bytes of the segments that an ELF file says it has are not in it.

    The program above touches a part of them only. What does not read as an ELF file is for the
    linker to name.
    """
    try:
        data = library.read_bytes()
        start, size, count = _ELF_HEADER.unpack_from(data)
        segments = [_PROGRAM_HEADER.unpack_from(data, start + n * size) for n in range(count)]
    except (OSError, struct.error):
        return 0
    ends = [offset + length for kind, offset, length in segments if kind == _PT_LOAD]
    return max(0, max(ends, default=0) - len(data))
