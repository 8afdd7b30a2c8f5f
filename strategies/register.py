"""What Hypothesis runs when it is imported: ``from_type`` can then draw fault tables and programs.

Every project that has rpcprops installed pays for this, so it imports only the data modules. The
strategies are imported on first use: if rpcprops.strategies is what imports Hypothesis, they are
only half loaded at this point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from rpcprops.faults import FaultTable
    from rpcprops.programs import Program


def register() -> None:
    """Tell Hypothesis how to draw a :class:`~rpcprops.faults.FaultTable` and a
    :class:`~rpcprops.programs.Program` from their types alone.
    """
    from hypothesis.strategies import register_type_strategy

    from rpcprops.faults import FaultTable
    from rpcprops.programs import Program

    register_type_strategy(FaultTable, _tables)
    register_type_strategy(Program, _programs)


def _tables(_kind: type[FaultTable]) -> SearchStrategy[FaultTable]:
    from rpcprops.strategies.faults import fault_tables

    return fault_tables()


def _programs(_kind: type[Program]) -> SearchStrategy[Program]:
    from rpcprops.strategies.programs import programs

    return programs()
