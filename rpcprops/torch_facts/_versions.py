"""The releases of torch that the package supports, as a list; standard library only.

``noxfile.py`` runs this file by its path, in a process that has no rpcprops.
"""

from __future__ import annotations

import re

#: The last release of each minor version, the oldest first.
VERSIONS = (
    *("2.5.1", "2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0"),
    *("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"),
)


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version: ``(2, 13)`` of ``2.13.0+cpu`` or ``2.13.0a0+git1``.

    A version that does not begin with two numbers is (0, 0): older than all.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
