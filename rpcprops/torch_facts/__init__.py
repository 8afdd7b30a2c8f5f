"""What differs between versions of torch: its texts, counters and bugs, and what was measured.

:func:`facts_of` is what we know of a version, written by hand. The matrix is what was measured:
``noxfile.py`` writes a version's column to ``matrix.json``, and docs/findings.md has it as tables.
``symbols`` is separate, because using it imports torch.
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
