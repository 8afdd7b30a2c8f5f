"""Marks what counts towards the score: seeded defects, and clean examples."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def seeded_defect(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """The test plants one defect; it passes where that is reported as what it is."""
    record_property("seeded defect", "live" if request.node.path.stem == "test_live" else "false")
