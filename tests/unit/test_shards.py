"""What ``--rpc-shards`` says, and which items run where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.plugin.shards import Shards, without_shard


def _item(nodeid: str) -> Any:
    return SimpleNamespace(nodeid=nodeid)


@pytest.mark.parametrize(
    ("text", "count", "only", "numbers"),
    [("1", 1, None, [1]), ("3", 3, None, [1, 2, 3]), ("2/3", 3, 2, [2]), ("1/1", 1, 1, [1])],
)
def test_what_the_option_says(text: str, count: int, only: int | None, numbers: list[int]) -> None:
    """N is all shards of N, K/N is one of them, and numbers begin at 1."""
    shards = Shards.parse(text)
    assert (shards.count, shards.only, list(shards.numbers)) == (count, only, numbers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "--rpc-shards=0 must be 1 or more"),
        ("-2", "--rpc-shards=-2 must be 1 or more"),
        ("1/0", "--rpc-shards=1/0 must be 1 or more"),
        ("0/4", "--rpc-shards=0/4: the shards of 4 have the numbers 1 to 4"),
        ("5/4", "--rpc-shards=5/4: the shards of 4 have the numbers 1 to 4"),
        ("", "must be N, or K/N"),
        ("two", "--rpc-shards=two must be N, or K/N"),
        ("1/2/3", "must be N, or K/N"),
        ("1.5", "must be N, or K/N"),
        ("9" * 5000, "must be N, or K/N"),
        ("١/٢", "must be N, or K/N"),
    ],
)
def test_what_it_cannot_say(text: str, words: str) -> None:
    """Anything else is the caller's error, which names the value and what there is."""
    with pytest.raises(UsageError) as raised:
        Shards.parse(text)
    assert words in str(raised.value)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_whole_test_runs_in_one_shard(count: int) -> None:
    """A test that is not split belongs to exactly one shard, whatever else is collected."""
    shards = [Shards.parse(f"{only}/{count}") for only in range(1, count + 1)]
    ids = [f"tests/test_{n}.py::test_{n % 3}" for n in range(200)]
    owners = [[shard.only for shard in shards if shard.has(_item(one))] for one in ids]
    assert all(len(owner) == 1 for owner in owners)
    assert {owner[0] for owner in owners} == set(range(1, count + 1))
    assert all(Shards(count).has(_item(one)) for one in ids)


@pytest.mark.parametrize(
    ("nodeid", "test"),
    [
        ("t.py::test_a[shard1]", "t.py::test_a"),
        ("t.py::test_a[b-shard12]", "t.py::test_a[b]"),
        ("t.py::test_a[shard1-b]", "t.py::test_a[b]"),
        ("t.py::test_a[shards]", "t.py::test_a[shards]"),
        ("t.py::test_shard1", "t.py::test_shard1"),
    ],
)
def test_a_shard_has_the_name_of_its_test(nodeid: str, test: str) -> None:
    """The id of a shard without the shard is the id of the test, which replays run."""
    assert without_shard(nodeid) == test
