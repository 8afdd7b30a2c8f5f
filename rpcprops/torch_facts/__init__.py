"""What differs between versions of torch, as it was measured.

``noxfile.py`` measures a version and writes its column to ``matrix.json``; docs/findings.md shows
the file as tables.
"""

from rpcprops.torch_facts._matrix import (
    Column,
    FindingCell,
    HuntCell,
    PropertyCell,
    UpstreamCell,
    columns,
    release,
    seen_on,
)

__all__ = [
    "Column",
    "FindingCell",
    "HuntCell",
    "PropertyCell",
    "UpstreamCell",
    "columns",
    "release",
    "seen_on",
]
