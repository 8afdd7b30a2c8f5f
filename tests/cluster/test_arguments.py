"""Arguments that cannot be are refused by value and remedy, before anything starts."""

from __future__ import annotations

import math
from typing import Any

import psutil
import pytest

from rpcprops import ClusterServer, FaultPlan, FaultTable
from rpcprops.errors import UsageError

_BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"world_size": 0}, ["world_size=0", "1 to 16"]),
    ({"world_size": 17}, ["world_size=17", "1 to 16"]),
    ({"world_size": -1}, ["world_size=-1", "1 to 16"]),
    ({"world_size": True}, ["world_size=True", "bool", "int"]),
    ({"world_size": 2.0}, ["world_size=2.0", "float", "int"]),
    ({"world_size": "2"}, ["world_size='2'", "str", "int"]),
    ({"faults": FaultPlan(by_rank={2: FaultTable()})}, ["rank 2", "0 to 1", "by_rank"]),
    ({"faults": "RREF_USER_DELETE"}, ["faults='RREF_USER_DELETE'", "FaultTable"]),
    ({"faults": {}}, ["faults={}", "FaultPlan"]),
    ({"transport": "udp"}, ["transport='udp'", "'tcp' or 'shm'"]),
    ({"transport": None}, ["transport=None", "'tcp' or 'shm'"]),
    ({"leaks": "ignore"}, ["leaks='ignore'", "'raise' or 'allow'"]),
    ({"leaks": True}, ["leaks=True", "'raise' or 'allow'"]),
    ({"clock": "fast"}, ["clock='fast'", "'auto', 'real', or a rate"]),
    ({"clock": 0}, ["clock=0", "1 to 1000"]),
    ({"clock": 0.5}, ["clock=0.5", "1 to 1000"]),
    ({"clock": 1001}, ["clock=1001", "1 to 1000"]),
    ({"clock": math.nan}, ["clock=nan", "1 to 1000"]),
    ({"clock": True}, ["clock=True", "1 to 1000"]),
    ({"rpc_timeout": 0}, ["rpc_timeout=0", "above 0"]),
    ({"rpc_timeout": -1.0}, ["rpc_timeout=-1.0", "above 0"]),
    ({"rpc_timeout": math.inf}, ["rpc_timeout=inf", "at most"]),
    ({"rpc_timeout": math.nan}, ["rpc_timeout=nan", "number"]),
    ({"rpc_timeout": "60"}, ["rpc_timeout='60'", "number"]),
    ({"rpc_timeout": True}, ["rpc_timeout=True", "number"]),
    ({"num_worker_threads": 0}, ["num_worker_threads=0", "above 0"]),
    ({"num_worker_threads": 0.5}, ["num_worker_threads=0.5", "int"]),
    ({"deadline": 0}, ["deadline=0", "above 0"]),
    ({"deadline": None}, ["deadline=None", "number"]),
    ({"names": ["a"]}, ["names=['a']", "2 different names"]),
    ({"names": ["a", "a"]}, ["names=['a', 'a']", "2 different names"]),
    ({"names": "ab"}, ["names='ab'", "2 different names"]),
    ({"names": ["a", ""]}, ["''", "1 to 127"]),
    ({"names": ["a", "b" * 128]}, ["1 to 127"]),
    ({"names": ["a", "b c"]}, ["'b c'", "letters, digits"]),
    ({"names": ["a", "ä"]}, ["'ä'", "letters, digits"]),
    ({"names": ["a", 1]}, ["1", "string"]),
    ({"names": ["a", []]}, ["[]", "names"]),
    ({"names": 2}, ["names=2", "2 different names"]),
    ({"init": "no"}, ["init='no'", "True or False"]),
]


@pytest.mark.parametrize(
    ("options", "words"), _BAD, ids=[str(options)[1:-1] for options, _ in _BAD]
)
def test_bad_arguments(options: dict[str, Any], words: list[str]) -> None:
    """A value outside its range raises UsageError with the value and what it may be instead."""
    server = ClusterServer(clock="real")
    before = len(psutil.Process().children())
    with pytest.raises(UsageError) as caught:
        server.cluster(**{"world_size": 2, **options})
    for word in words:
        assert word in str(caught.value)
    assert len(psutil.Process().children()) == before


@pytest.mark.parametrize("clock", ["", "REAL", 0, -5, 1001, True, None, math.nan, [1]])
def test_bad_server_clock(clock: Any) -> None:
    """A server refuses a clock that is none when it is made."""
    with pytest.raises(UsageError, match="must be 'auto', 'real', or a rate"):
        ClusterServer(clock=clock)


def test_server_must_run() -> None:
    """Entering a cluster of a server that does not run says what to do."""
    cluster = ClusterServer(clock="real").cluster(world_size=2)
    with pytest.raises(UsageError, match="with block"):
        cluster.start()
    with pytest.raises(UsageError, match="with block"), cluster:
        pass


def test_a_message_that_torch_does_not_know() -> None:
    """A table that torch's agent would refuse in another process is refused here."""
    with pytest.raises(UsageError, match="RREF_FORK"):
        FaultTable(["RREF_FORK"], 1)
