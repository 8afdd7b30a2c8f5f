"""The floor under every example: ranks that fork, join, shut down and exit, and do nothing else.

``python -m rpcprops._bare_ranks WORLD_SIZE RATE REPEATS``, started with the clock preloaded,
imports torch once and prints for each repeat the real seconds, and the ranks' processor seconds.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time

from torch.distributed import rpc

from rpcprops import clock
from rpcprops.cluster import _pages, _rank
from rpcprops.faults import FaultTable
from rpcprops.fixture import RankFixture


def _rank_main(rank: int, world_size: int, rate: float, store: int) -> None:
    if clock.loaded():
        clock.set_rate(rate)
    _rank._widen_descriptor_table()
    fixture = RankFixture(
        rank=rank,
        name=f"worker{rank}",
        world_size=world_size,
        init_method=f"file:///proc/self/fd/{store}",
        table=FaultTable(),
        rpc_timeout=86_400.0,
        num_worker_threads=8,
    )
    with _rank._transport("tcp"):
        fixture.init_rpc()
    rpc.shutdown()


def main() -> None:
    """Entry point; see the module."""
    world_size, rate, repeats = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    gc.collect()
    gc.freeze()
    _pages.collapse()
    for _ in range(repeats):
        began = time.monotonic()
        store = os.memfd_create("store")
        pids: list[int] = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                try:
                    _rank_main(rank, world_size, rate, store)
                    os._exit(0)
                finally:
                    os._exit(1)
            pids.append(pid)
        cpu = 0.0
        for pid in pids:
            _, status, usage = os.wait4(pid, 0)
            if status:
                sys.exit(f"a bare rank ended with status {status}")
            cpu += usage.ru_utime + usage.ru_stime
        os.close(store)
        print(json.dumps([time.monotonic() - began, cpu]), flush=True)


if __name__ == "__main__":
    main()
