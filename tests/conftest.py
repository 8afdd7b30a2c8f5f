"""Skips the long tests unless the profile asks for them."""

from __future__ import annotations

import pytest

from rpcprops.profiles import NIGHTLY, current


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if current() == NIGHTLY:
        return
    skip = pytest.mark.skip(reason=f"long: runs with --hypothesis-profile={NIGHTLY}")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)
