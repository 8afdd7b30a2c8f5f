"""Counts what tests show that run ranks without ``rpc_cluster``: state machines, and programs.

Their failures are confirmed and described elsewhere, or not at all, so nothing is kept of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome
from rpcprops.plugin.drawn import function_of
from rpcprops.plugin.examples import suitable
from rpcprops.plugin.records import ITEM, ItemRecord, is_armed
from rpcprops.plugin.session import Session


def call(item: pytest.Item, session: Session) -> Generator[None, None, None]:
    """Run a test around the `yield`; if it has run ranks, its item has a record of them.

    Raises:
        HarnessError: the test passes, and an error of ours has shown in its clusters.
    """
    record = ItemRecord(is_watched=False)
    counter = _Counter(record)
    _prepare(item)
    try:
        with session.counting(record, counter.ended):
            yield
            own, _ = session.ended(None)
    finally:
        counter.close()
        if record.clusters:
            item.stash[ITEM] = record
    if own is not None:
        raise own


def _prepare(item: pytest.Item) -> None:
    """Give a state machine of ours the settings that a test of ``rpc_cluster`` gets."""
    function = function_of(item)
    machine = getattr(function, "_hypothesis_state_machine_class", None)
    if machine is None:
        return
    from rpcprops.stateful import ClusterMachine

    if issubclass(machine, ClusterMachine):
        case: Any = getattr(item, "instance", None)
        case.settings = suitable(case.settings)


class _Counter:
    """Counts the examples in which clusters end; those that Hypothesis repeats, once."""

    def __init__(self, record: ItemRecord) -> None:
        self._record = record
        #: What Hypothesis has chosen for the example that runs now; None outside of Hypothesis.
        self._data: Any = None
        #: Whether Hypothesis runs it once and for all: one of ``@example``, or a failure again.
        self._is_final = False
        self._is_open = False
        self._is_armed = False
        self._counted: set[int] = set()

    def ended(self, plan: FaultPlan, outcome: Outcome) -> None:
        """A cluster has ended in the example that runs now."""
        data, is_final = _data()
        if data is not self._data:
            self.close()
        self._record.drawn = self._record.drawn or data is not None
        self._data, self._is_final, self._is_open = data, is_final, True
        self._is_armed = self._is_armed or is_armed(plan, outcome)

    def close(self) -> None:
        """Count the example that has run last. What it has drawn is complete only now."""
        if self._is_open and not self._is_known():
            self._record.examples += 1
            self._record.armed += self._is_armed
        self._data, self._is_final, self._is_open, self._is_armed = None, False, False, False

    def _is_known(self) -> bool:
        """Whether it was counted before, or Hypothesis has given it up."""
        if self._data is None:
            return False
        from hypothesis.internal.conjecture.data import Status

        key = hash(tuple(map(repr, self._data.choices)))
        is_known = key in self._counted or self._data.status < Status.VALID
        if self._data.choices or not self._is_final:
            # For each ``@example`` Hypothesis chooses nothing, so they are all alike to us.
            self._counted.add(key)
        return is_known


def _data() -> tuple[Any, bool]:
    """What Hypothesis chooses for the example that runs now, and whether that run is final.

    None and False outside of an example.
    """
    if "hypothesis" not in sys.modules:
        return None, False
    from hypothesis.control import current_build_context, currently_in_test_context

    if not currently_in_test_context():
        return None, False
    context = current_build_context()
    return context.data, context.is_final
