"""Says which limits of this machine a process met that could not be forked."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def explain(error: OSError) -> str:
    """What the kernel said, with the limits that can be behind it."""
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


def _lowest(controller: str) -> str:
    """The lowest limit of that kind of the control groups around this process."""
    found: list[int] = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # The second version has one hierarchy, the first has one for each controller.
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            try:
                text = (folder / f"{controller}.max").read_text(encoding="ascii").strip()
            except OSError:
                text = ""
            if text.isdigit():
                found.append(int(text))
            if folder == root:
                break
    return str(min(found)) if found else "none"
