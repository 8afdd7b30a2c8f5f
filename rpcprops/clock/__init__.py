"""A clock that runs faster for one process.

A small C library, loaded with ``LD_PRELOAD``, makes everything in a process see
time pass ``rate`` times faster: clock reads are scaled and timed waits end at
the same point of the scaled clock.  A 10 s wait takes 0.1 s at rate 100.

Seconds are *real* when they are those of the machine, and *virtual* when they
are those that a dilated process sees.  Importing this package starts nothing
and changes nothing.

The same library has a second half: what torch's faulty agent sends, and which
sends fail or come late (:mod:`rpcprops.clock.sends`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._measure import ClockError, observe, probe
from ._preflight import preflight

__all__ = [
    "ClockError",
    "ClockUnavailable",
    "Lateness",
    "get_rate",
    "lateness",
    "library_path",
    "library_problem",
    "loaded",
    "observe",
    "preload_environment",
    "probe",
    "real_monotonic",
    "reset_lateness",
    "rest",
    "selfcheck",
    "set_rate",
    "sleep_counts",
    "verify",
    "watch_sleeps",
]

STATE_VARIABLE = "RPCPROPS_CLOCK"
MAX_WATCHED = 64
MIN_RATE = 1e-6
MAX_RATE = 1e6

#: The last instant of the clocks, so it is never in the past.
_NEVER = 2**63 - 1

_REMEDY = "install a C compiler and reinstall rpcprops, or pass clock='real'"

_DAMAGED_REMEDY = (
    "reinstall rpcprops with a C compiler, or pass clock='real' if real time is wanted"
)

_SELFCHECK_MESSAGES = {
    1: "the C library lacks a function that the clock needs",
    2: "another preloaded library stands in front of the clock",
    3: "the C library does not keep the clock of a condition variable where expected",
    4: "a timed wait on a condition variable ended early or with the wrong result",
    5: "a virtual clock ran backwards",
    6: "a deadline was converted to an instant before it",
}


class ClockUnavailable(ClockError):
    """The clock library is not built, or not loaded in this process."""


@dataclass(frozen=True)
class Lateness:
    """How late timed waits returned past their deadline, in real seconds.

    Only waits that timed out count.
    """

    maximum: float
    total: float
    count: int


def library_path() -> Path | None:
    """The built library beside this package, or None when it was not built."""
    directory = Path(__file__).resolve().parent
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}-"
    built = sorted(directory.glob("_preload*.so"))
    # An editable install used by several interpreters holds several libraries.
    matching = [path for path in built if tag in path.name]
    found = matching or built
    return found[0] if found else None


def preload_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """A copy of `environ` in which a new program starts with the clock loaded.

    The clock starts at rate 1.  Raises ClockUnavailable when the library is
    not built, or lies on a path that the dynamic linker cannot be told.
    """
    library = library_path()
    if library is None:
        message = f"the clock library is not built: {_REMEDY}"
        raise ClockUnavailable(message)
    result = dict(environ)
    result.pop(STATE_VARIABLE, None)
    directory = str(library.parent)
    if any(char in directory for char in ":;$"):
        message = (
            f"the clock library cannot be preloaded from {directory!r}: the dynamic linker "
            "splits paths at ':' and ';' and expands '$'; install rpcprops on another path, "
            "or pass clock='real'"
        )
        raise ClockUnavailable(message)
    if " " in directory:
        # LD_PRELOAD splits at spaces, LD_LIBRARY_PATH does not.
        entry = library.name
        _put_in_front(result, "LD_LIBRARY_PATH", directory)
    else:
        entry = str(library)
    _put_in_front(result, "LD_PRELOAD", entry)
    return result


def library_problem() -> str:
    """Why no program can start with the clock, in one line that ends with the remedy; else empty.

    The first call starts a small program with the library (0.03 real seconds on
    an idle machine, at most PREFLIGHT_SECONDS); the answer is kept for as long
    as the file and what is preloaded beside it stay the same.
    """
    try:
        environment = preload_environment(os.environ)
    except ClockUnavailable as error:
        return str(error)
    library = library_path()
    assert library is not None
    try:
        state = library.stat()
    except OSError as error:
        return f"the clock library {str(library)!r}: {error.strerror}; {_DAMAGED_REMEDY}"
    variables = tuple(environment.get(name, "") for name in ("LD_PRELOAD", "LD_LIBRARY_PATH"))
    key = (library, state.st_size, state.st_mtime_ns, *variables)
    if key not in _problems:
        _problems[key] = preflight(library, environment)
    problem = _problems[key]
    return f"{problem}; {_DAMAGED_REMEDY}" if problem else ""


_problems: dict[tuple[object, ...], str] = {}


def _put_in_front(environ: dict[str, str], name: str, entry: str) -> None:
    old = environ.get(name, "")
    if entry not in old.split(":"):
        environ[name] = f"{entry}:{old}" if old else entry


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "rpcprops_clock_set_rate"):
        return None
    int64_pointer = ctypes.POINTER(ctypes.c_int64)
    library.rpcprops_clock_set_rate_from.argtypes = [ctypes.c_double, ctypes.c_int64]
    library.rpcprops_clock_set_rate_from.restype = ctypes.c_int
    library.rpcprops_clock_get_rate.argtypes = []
    library.rpcprops_clock_get_rate.restype = ctypes.c_double
    library.rpcprops_clock_real_ns.argtypes = [ctypes.c_int]
    library.rpcprops_clock_real_ns.restype = ctypes.c_int64
    library.rpcprops_clock_selfcheck.argtypes = []
    library.rpcprops_clock_selfcheck.restype = ctypes.c_int
    library.rpcprops_clock_sleeps_watch.argtypes = [int64_pointer, ctypes.c_int]
    library.rpcprops_clock_sleeps_watch.restype = ctypes.c_int
    library.rpcprops_clock_sleeps_count.argtypes = [int64_pointer, ctypes.c_int]
    library.rpcprops_clock_sleeps_count.restype = ctypes.c_int
    library.rpcprops_clock_lateness.argtypes = [int64_pointer] * 3
    library.rpcprops_clock_lateness.restype = None
    library.rpcprops_clock_lateness_reset.argtypes = []
    library.rpcprops_clock_lateness_reset.restype = None
    library.rpcprops_clock_rest.argtypes = [ctypes.c_int]
    library.rpcprops_clock_rest.restype = None
    return library


def _loaded_library() -> ctypes.CDLL:
    library = _library()
    if library is not None:
        return library
    if library_path() is None:
        message = f"the clock library is not built: {_REMEDY}"
        raise ClockUnavailable(message)
    message = (
        "the clock library is not loaded in this process: start it with the environment that "
        "rpcprops.clock.preload_environment() returns, or pass clock='real'"
    )
    raise ClockUnavailable(message)


def loaded() -> bool:
    """Whether the clock library is loaded in this process."""
    return _library() is not None


_base_switch_interval: float | None = None


def set_rate(rate: float, *, origin_ns: int | None = None) -> None:
    """Make time pass at `rate` virtual seconds per real second from now on.

    All virtual clocks go on from their present time.  Waits that have begun keep the
    rate they started with.  Call it before threads are started.

    Args:
        origin_ns: an instant of the real monotonic clock, in nanoseconds,
            that is past: the clocks skip to where they would be had the rate
            been set then.  Processes at rate 1 that get the same one agree on
            the time from then on.
    """
    global _base_switch_interval
    library = _loaded_library()
    origin = _NEVER if origin_ns is None else origin_ns
    if library.rpcprops_clock_set_rate_from(rate, origin) != 0:
        if not MIN_RATE <= rate <= MAX_RATE:
            message = f"rate {rate!r} is refused: pass a rate between {MIN_RATE:g} and {MAX_RATE:g}"
            raise ClockError(message)
        selfcheck()
        message = f"rate {rate!r} is refused: pass clock='real'"
        raise ClockError(message)
    # The switch interval is in virtual time: unchanged, threads would be switched
    # `rate` times as often as Python intends.
    if _base_switch_interval is None:
        _base_switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(max(_base_switch_interval * rate, 1e-6))


def get_rate() -> float:
    """Virtual seconds per real second in this process; 1.0 when not loaded."""
    library = _library()
    return 1.0 if library is None else float(library.rpcprops_clock_get_rate())


def real_monotonic() -> float:
    """The machine's monotonic clock in real seconds, whatever the rate."""
    library = _library()
    if library is None:
        return time.monotonic()
    return int(library.rpcprops_clock_real_ns(time.CLOCK_MONOTONIC)) / 1e9


def watch_sleeps(lengths_ns: Sequence[int]) -> None:
    """Count calls of nanosleep() with exactly these lengths, from 0.

    The lengths are virtual nanoseconds, at most 64 of them.
    ``std::this_thread::sleep_for`` makes such a call; Python's ``time.sleep``
    does not.
    """
    library = _loaded_library()
    if len(lengths_ns) > MAX_WATCHED:
        message = f"{len(lengths_ns)} lengths cannot be watched: pass at most {MAX_WATCHED}"
        raise ClockError(message)
    array = (ctypes.c_int64 * len(lengths_ns))(*lengths_ns)
    library.rpcprops_clock_sleeps_watch(array, len(lengths_ns))


def sleep_counts() -> list[int]:
    """For each watched length, how many such sleeps were started since then."""
    library = _loaded_library()
    array = (ctypes.c_int64 * MAX_WATCHED)()
    watched = int(library.rpcprops_clock_sleeps_count(array, MAX_WATCHED))
    return list(array[:watched])


def lateness() -> Lateness:
    """How late timed waits of this process returned, since the last reset.

    Nothing is recorded before the first call of set_rate().
    """
    library = _loaded_library()
    maximum, total, count = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
    library.rpcprops_clock_lateness(ctypes.byref(maximum), ctypes.byref(total), ctypes.byref(count))
    return Lateness(maximum.value / 1e9, total.value / 1e9, count.value)


def reset_lateness() -> None:
    """Reset what lateness() reports."""
    _loaded_library().rpcprops_clock_lateness_reset()


def rest(on: bool) -> None:
    """Say whether this process rests: nobody sends it anything until it is said to rest no more.

    While it rests, its threads that call sched_yield() sleep there, 100 real ms at most.
    TensorPipe's thread for shared memory does nothing else while it waits for messages.
    """
    _loaded_library().rpcprops_clock_rest(on)


def selfcheck() -> None:
    """Check the library in this process; takes two virtual milliseconds.

    Raises ClockError naming what is wrong.
    """
    code = int(_loaded_library().rpcprops_clock_selfcheck())
    if code != 0:
        fault = _SELFCHECK_MESSAGES.get(code, "unknown fault")
        message = f"the clock failed self check {code}: {fault}; pass clock='real'"
        raise ClockError(message)


# Loads the package under a private name: importing rpcprops itself could cost
# the child more than the whole measurement.
_VERIFY_CHILD = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location(
    "_rpcprops_clock", sys.argv[1], submodule_search_locations=[os.path.dirname(sys.argv[1])])
clock = importlib.util.module_from_spec(spec)
sys.modules["_rpcprops_clock"] = clock
spec.loader.exec_module(clock)
clock.set_rate(float(sys.argv[2]))
clock.probe(int(sys.argv[3]))
"""


def verify(rate: float) -> float:
    """Measure a dilated child against this process's clock; returns its rate.

    Raises ClockError when clock reads or waits in the child disagree with
    `rate` by more than the tolerances of observe().  Takes less than half a
    real second on an idle machine.  Call it in a process that is not dilated.
    """
    if get_rate() != 1.0:
        message = (
            f"this process runs at rate {get_rate():g} and cannot measure another: "
            "call verify() in a process that is not dilated"
        )
        raise ClockError(message)
    return _verify(rate, preload_environment(os.environ))


def _verify(rate: float, environment: Mapping[str, str]) -> float:
    import socket
    import subprocess

    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                _VERIFY_CHILD,
                __file__,
                repr(rate),
                str(theirs.fileno()),
            ],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        try:
            theirs.close()
            return observe(ours.fileno(), rate)
        except ClockError as error:
            failure = error
        finally:
            child.kill()
            messages = child.communicate()[1].decode(errors="replace").strip().splitlines()
    detail = f" ({messages[-1]})" if messages else ""
    message = f"{failure}{detail}"
    raise ClockError(message) from failure
