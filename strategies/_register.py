"""What Hypothesis runs when it is imported, so that ``from_type(FaultTable)`` draws fault tables.

Every project that has rpcprops installed pays for this, so it imports no more than the data. The
strategies are imported when a table is first asked for: when it is rpcprops.strategies that imports
Hypothesis, they are only half made at this point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from rpcprops.faults import FaultTable


def register() -> None:
    """Tell Hypothesis how to draw a :class:`~rpcprops.faults.FaultTable` from its type alone."""
    from hypothesis.strategies import register_type_strategy

    from rpcprops.faults import FaultTable

    register_type_strategy(FaultTable, _tables)


def _tables(_kind: type[FaultTable]) -> SearchStrategy[FaultTable]:
    from rpcprops.strategies.faults import fault_tables

    return fault_tables()
