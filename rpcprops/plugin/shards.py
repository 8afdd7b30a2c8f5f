"""Shards of a test: items of its own for each part of its examples (``--rpc-shards``)."""

from __future__ import annotations

import re

import pytest

#: The parameter that a test gets, and the fixture that takes it.
_SHARD = "rpc_shard"


def split(metafunc: pytest.Metafunc, shards: int) -> None:
    """Make an item of each shard of a test."""
    metafunc.fixturenames.append(_SHARD)
    metafunc.parametrize(_SHARD, range(shards), ids=[f"shard{n}" for n in range(shards)])


def shard_of(item: pytest.Item) -> int | None:
    """The number of the shard that an item is; None where its test is not split."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(_SHARD)


def without_shard(nodeid: str) -> str:
    """The id of the test that a shard is part of: a replay does not split tests."""
    return re.sub(r"\[shard\d+\]$|-shard\d+(?=\]$)|(?<=\[)shard\d+-", "", nodeid)
