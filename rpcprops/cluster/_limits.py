"""Checks the limits of this machine before a world: descriptors, memory, files, processes.

A rank that runs into a limit fails in many ways, and each looks like a violation of a promise.
So limits are checked before the ranks are forked. What a rank needs was measured on x86-64 with
the torch of requirements.txt (the figures are below), and is rounded up.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from rpcprops.errors import MachineCannot

#: Descriptors of a rank. Measured: 128, and 8 for each rank of its world, over TCP (137 and 56 over
#: shared memory). User code needs some more.
_DESCRIPTORS = {"tcp": (160, 8), "shm": (170, 56)}
#: The test process keeps a socket and a log for each rank, and needs more while it makes them.
_DESCRIPTORS_HERE = (24, 4)
#: MiB of address space. Measured: 1801 over TCP; over shared memory 1821, and 64 for each rank.
_ADDRESS_SPACE_MIB = {"tcp": (1900, 0), "shm": (1900, 64)}
#: MiB of data segment. Measured: 433.
_DATA_MIB = 480
#: Threads of a rank besides its `num_worker_threads`. Measured: 22.
_THREADS = 24
#: MiB that a file must be able to hold: the logs of ranks are files in memory.
_FILE_MIB = 4
#: A soft limit of descriptors that suffices for anything that ranks do.
_ENOUGH_DESCRIPTORS = 8192

_MIB = 1 << 20
_CGROUPS = Path("/sys/fs/cgroup")

#: The limits that are checked, by the shell command that sets them, and the description of each.
_LIMITS = {
    "ulimit -n": resource.RLIMIT_NOFILE,
    "ulimit -v": resource.RLIMIT_AS,
    "ulimit -d": resource.RLIMIT_DATA,
    "ulimit -f": resource.RLIMIT_FSIZE,
}
#: What each one limits, the unit in messages, and that unit in the units of the kernel.
_WHAT = {
    "ulimit -n": ("the number of open descriptors of a process", "", 1),
    "ulimit -v": ("the address space of a process", " MiB", _MIB),
    "ulimit -d": ("the data of a process", " MiB", _MIB),
    "ulimit -f": ("the size of a file", " MiB", _MIB),
}

#: Words for a reached limit in the log of a rank or server: of strerror(3), libstdc++, CPython.
_SCARCITY = re.compile(
    r"Resource temporarily unavailable|[Cc]an't start new thread|Cannot allocate memory"
    r"|std::bad_alloc|Too many open files|File too large|No space left on device|MemoryError"
)


def raise_soft_limits() -> None:
    """Raise this process's soft limits of descriptors and file sizes as far as ranks need.

    The fork server does so before it imports torch, and its ranks inherit the limits.
    """
    _raise_soft_limit(resource.RLIMIT_NOFILE, _ENOUGH_DESCRIPTORS)
    _raise_soft_limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)


def check(world_size: int, transport: str, num_worker_threads: int) -> None:
    """Check that this machine's limits allow a world of such ranks.

    The soft limit of descriptors of this process is raised if it is too low.

    Raises:
        MachineCannot: a limit is too low; the message names it, what is needed, and the remedy.
    """
    base, each = _DESCRIPTORS_HERE
    here = _open_descriptors() + base + each * world_size
    if not _is_enough(resource.getrlimit(resource.RLIMIT_NOFILE)[0], here):
        _raise_soft_limit(resource.RLIMIT_NOFILE, here)
    limits = {name: resource.getrlimit(number) for name, number in _LIMITS.items()}
    base, each = _DESCRIPTORS[transport]
    address_base, address_each = _ADDRESS_SPACE_MIB[transport]
    # The fork server raises its soft limits of descriptors and file sizes, but not of memory.
    for name, limit, needed, who in (
        ("ulimit -n", limits["ulimit -n"][0], here, "the test process"),
        ("ulimit -n", limits["ulimit -n"][1], base + each * world_size, "each rank"),
        (
            "ulimit -v",
            limits["ulimit -v"][0],
            address_base + address_each * world_size,
            "each rank",
        ),
        ("ulimit -d", limits["ulimit -d"][0], _DATA_MIB, "each rank"),
        ("ulimit -f", limits["ulimit -f"][1], _FILE_MIB, "each rank"),
    ):
        what, unit, size = _WHAT[name]
        if not _is_enough(limit, needed * size):
            msg = (
                f"{what} is limited to {limit / size:.4g}{unit}, and {who} of a world of "
                f"{world_size} needs about {needed}{unit}. Raise the limit with `{name}` (and "
                f"`{name.replace('-', '-H')}`) before this process starts."
            )
            raise MachineCannot(msg)
    _check_threads(world_size, world_size * (_THREADS + num_worker_threads))


def scarcity(text: str) -> str:
    """The part of `text` that says that a limit of the machine was reached; else empty."""
    found = _SCARCITY.search(text)
    return found.group() if found else ""


def explain(error: OSError) -> str:
    """What the kernel said, with the limits that may be the cause."""
    words = error.strerror or str(error)
    if error.errno == errno.EAGAIN:
        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        own = "unlimited" if most == resource.RLIM_INFINITY else str(most)
        return f"{words} (limits: ulimit -u = {own}, cgroup pids.max = {_lowest('pids')})"
    if error.errno == errno.ENOMEM:
        return f"{words} (limits: cgroup memory.max = {_lowest('memory')})"
    if error.errno == errno.EMFILE:
        return f"{words} (limits: ulimit -n = {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    return words


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        # No descriptor is left to read the limits with.
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _is_enough(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or (needed != resource.RLIM_INFINITY and limit >= needed)


def _raise_soft_limit(number: int, wanted: int) -> None:
    soft, hard = resource.getrlimit(number)
    if not _is_enough(soft, wanted):
        resource.setrlimit(number, (wanted if _is_enough(hard, wanted) else hard, hard))


def _check_threads(world_size: int, needed: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # The kernel exempts root, and processes with CAP_SYS_RESOURCE or CAP_SYS_ADMIN.
    if os.getuid() != 0 and soft != resource.RLIM_INFINITY and soft < _ENOUGH_DESCRIPTORS:
        used = _threads_of_user()
        if soft - used < needed:
            msg = (
                f"this user may have {soft} threads and has {used}; a world of {world_size} needs "
                f"about {needed}. Raise the limit with `ulimit -u` before this process starts."
            )
            raise MachineCannot(msg)
    for folder in _limited_cgroups():
        try:
            most = int((folder / "pids.max").read_text())
            used = int((folder / "pids.current").read_text())
        except (OSError, ValueError):
            continue
        if most - used < needed:
            msg = (
                f"the control group of this process may have {most} threads and has {used}; a "
                f"world of {world_size} needs about {needed}. Raise its pids.max (a container's "
                f"limit of processes)."
            )
            raise MachineCannot(msg)


@functools.cache
def _limited_cgroups() -> tuple[Path, ...]:
    """The control groups of this process that limit processes."""
    return tuple(folder for folder in _cgroups("pids") if _has_limit(folder))


def _has_limit(folder: Path) -> bool:
    try:
        return (folder / "pids.max").read_text().strip() != "max"
    except OSError:
        return False


def _cgroups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process and those above, its own first.

    cgroups version 2 has one hierarchy, version 1 has one for each controller.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = _CGROUPS / controller if controllers else _CGROUPS
        own = top / path.lstrip("/")
        yield own
        yield from (folder for folder in own.parents if folder.is_relative_to(top))


def _threads_of_user() -> int:
    """How many threads the processes of this user have, as far as /proc shows them."""
    user, found = os.getuid(), 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    found += os.stat(f"/proc/{name}/task").st_nlink - 2
            except OSError:
                continue
    return found


def _lowest(controller: str) -> str:
    """The lowest limit of that kind in the control groups of this process and those above."""
    found: list[int] = []
    for folder in _cgroups(controller):
        try:
            text = (folder / f"{controller}.max").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return str(min(found)) if found else "none"
