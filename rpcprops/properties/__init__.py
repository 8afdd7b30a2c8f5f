"""The shipped properties: what torch RPC promises, checked under sampled faults.

:data:`PROPERTIES` holds them by name; :func:`examine` runs one. ``rpcprops check`` and
``tests/properties`` both go through these two.
"""

from rpcprops.properties._base import Case, Observation, Property, accounted, observe
from rpcprops.properties._catalogue import (
    PROPERTIES,
    WITHOUT_FAULTS,
    drawn_properties,
    shipped_programs,
)
from rpcprops.properties._choice import CANDIDATES
from rpcprops.properties._engine import (
    Examination,
    Failure,
    Repeats,
    broken_promise,
    examine,
    failure_in_use,
)
from rpcprops.properties._findings import finding_case, held_case

__all__ = [
    "CANDIDATES",
    "PROPERTIES",
    "WITHOUT_FAULTS",
    "Case",
    "Examination",
    "Failure",
    "Observation",
    "Property",
    "Repeats",
    "accounted",
    "broken_promise",
    "drawn_properties",
    "examine",
    "failure_in_use",
    "finding_case",
    "held_case",
    "observe",
    "shipped_programs",
]
