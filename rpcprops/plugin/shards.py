"""Shards of a test: one item for each part of its examples (``--rpc-shards``)."""

from __future__ import annotations

import re

import pytest

#: The parameter that a split test gets, and the fixture that reads it.
_SHARD = "rpc_shard"


def split(metafunc: pytest.Metafunc, shards: int) -> None:
    """Make one item for each shard of a test."""
    metafunc.fixturenames.append(_SHARD)
    metafunc.parametrize(_SHARD, range(shards), ids=[f"shard{n}" for n in range(shards)])


def shard_of(item: pytest.Item) -> int | None:
    """The shard number of an item; None if its test is not split."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(_SHARD)


def without_shard(nodeid: str) -> str:
    """The id of the test to which a shard belongs: a replay does not split tests."""
    return re.sub(r"\[shard\d+\]$|-shard\d+(?=\]$)|(?<=\[)shard\d+-", "", nodeid)
