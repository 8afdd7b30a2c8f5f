"""Shards of a test: one item for each part of its examples (``--rpc-shards``).

``--rpc-shards=4`` makes four items of each Hypothesis test of ``rpc_cluster``. ``--rpc-shards=2/4``
makes the second of them alone, and keeps a part of all other tests: four machines, each with one
number, run everything between them.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Any, Self

import pytest

from rpcprops._printable import printable
from rpcprops.errors import UsageError

#: The parameter that a split test gets, and the fixture that reads it.
_SHARD = "rpc_shard"


@dataclass(frozen=True, slots=True)
class Shards:
    """Into how many shards tests are split, and which of them run here.

    Attributes:
        only: the number of the shard that runs here, from 1; None if all do.
    """

    count: int = 1
    only: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shards that the text of the option names: ``N``, or ``K/N`` for the K-th of N.

        Raises:
            UsageError: the text is neither, or names a shard that there is not.
        """
        match = re.fullmatch(r"(?:(-?\d{1,9})/)?(-?\d{1,9})", text, re.ASCII)
        if match is None:
            said = printable(text)
            msg = f"--rpc-shards={said} must be N, or K/N for the K-th of N shards alone"
            raise UsageError(msg)
        only, count = match.groups()
        if int(count) < 1:
            msg = f"--rpc-shards={text} must be 1 or more"
            raise UsageError(msg)
        if only is None:
            return cls(int(count))
        if not 1 <= int(only) <= int(count):
            msg = f"--rpc-shards={text}: the shards of {count} have the numbers 1 to {count}"
            raise UsageError(msg)
        return cls(int(count), int(only))

    @property
    def numbers(self) -> range:
        """The numbers of the shards that run here."""
        if self.only is None:
            return range(1, self.count + 1)
        return range(self.only, self.only + 1)

    def has(self, item: pytest.Item) -> bool:
        """Whether an item runs here. A test that is not split runs in one of the shards."""
        if self.only is None or shard_of(item) is not None:
            return True
        # By its id alone: it must not depend on which other tests a machine collects.
        return zlib.crc32(item.nodeid.encode()) % self.count == self.only - 1


def split(metafunc: pytest.Metafunc, shards: Shards) -> None:
    """Make one item for each shard of a test that runs here."""
    metafunc.fixturenames.append(_SHARD)
    metafunc.parametrize(_SHARD, shards.numbers, ids=[f"shard{n}" for n in shards.numbers])


def choose(config: pytest.Config, items: list[pytest.Item], shards: Shards) -> None:
    """Deselect the items that run in another shard."""
    others = [item for item in items if not shards.has(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if shards.has(item)]


def shard_of(item: pytest.Item) -> int | None:
    """The shard number of an item, from 1; None if its test is not split."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(_SHARD)


def without_shard(nodeid: str) -> str:
    """The id of the test to which a shard belongs: a replay does not split tests."""
    return re.sub(r"\[shard\d+\]$|-shard\d+(?=\]$)|(?<=\[)shard\d+-", "", nodeid)


def share_key(item: pytest.Item, inner: Any) -> None:
    """Let the shards of a test have one key in Hypothesis's database, that of the whole test.

    Hypothesis adds the id of an item to the key if its test has parameters
    (``_hypothesis_pytestplugin.pytest_runtest_call``), and the id of a shard names the shard.
    """
    if getattr(inner, "_hypothesis_internal_add_digest", None) == item.nodeid.encode():
        inner._hypothesis_internal_add_digest = without_shard(item.nodeid).encode()


def seed_of(item: pytest.Item, seed: Any) -> str:
    """The seed of a shard, where Hypothesis would give all shards the same.

    Args:
        seed: that of ``@seed``, or None.
    """
    if seed is None:
        seed = item.config.getoption("--hypothesis-seed", None)
    return f"{seed}/{shard_of(item)}"
