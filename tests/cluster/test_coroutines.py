"""What a rank does with a coroutine function, and with breakpoint()."""

from __future__ import annotations

import asyncio
import bdb
import pdb

import pytest

from rpcprops import RpcCluster
from rpcprops.errors import UsageError


async def later(n: int) -> int:
    await asyncio.sleep(1.0)
    if n < 0:
        msg = f"{n} is negative"
        raise ValueError(msg)
    return n


def test_a_coroutine_runs_to_its_end(rpc_cluster: RpcCluster) -> None:
    """Its value and its exception come back, by each way to call it."""
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(later, 5) == 5
        assert cluster.each(later, 6) == [6, 6]
        kept = cluster.on(1).call(later, 7, keep=True)
        assert cluster.on(1).submit(lambda value: value, kept).result() == 7
        with pytest.raises(ValueError, match="-1 is negative"):
            cluster.on(0).call(later, -1)


def test_a_debugger_is_refused(rpc_cluster: RpcCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """breakpoint() names rank and line, pdb.set_trace() the rank; both say what to do instead."""

    def stops() -> None:
        breakpoint()

    line = stops.__code__.co_firstlineno + 1
    place = rf"breakpoint\(\) in rank 1 at .*test_coroutines\.py:{line}: a rank has no terminal"
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(UsageError, match=place):
            cluster.on(1).call(stops)
        with pytest.raises(bdb.BdbQuit) as caught:
            cluster.on(1).call(pdb.set_trace)
    assert "pdb in rank 1: a rank has no terminal" in caught.value.__notes__[0]
