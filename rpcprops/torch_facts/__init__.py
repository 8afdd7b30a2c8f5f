"""What differs between versions of torch: its texts, counters and bugs, and what was measured.

:func:`facts_of` is what is known of a version, by hand. The matrix is what was measured of it:
``noxfile.py`` writes its column to ``matrix.json``, and docs/findings.md shows the file as tables.
``symbols`` is apart, because using it imports torch.
"""

from rpcprops.torch_facts._counters import CounterKeys
from rpcprops.torch_facts._facts import NEWEST, UNKNOWN, TorchFacts, facts_of, installed
from rpcprops.torch_facts._findings import FINDINGS, Finding, Status
from rpcprops.torch_facts._matrix import (
    Column,
    FindingCell,
    HuntCell,
    PropertyCell,
    UpstreamCell,
    columns,
    seen_on,
)
from rpcprops.torch_facts._texts import Texts
from rpcprops.torch_facts._versions import VERSIONS, release

__all__ = [
    "FINDINGS",
    "NEWEST",
    "UNKNOWN",
    "VERSIONS",
    "Column",
    "CounterKeys",
    "Finding",
    "FindingCell",
    "HuntCell",
    "PropertyCell",
    "Status",
    "Texts",
    "TorchFacts",
    "UpstreamCell",
    "columns",
    "facts_of",
    "installed",
    "release",
    "seen_on",
]
