"""The floor under every example: ranks that fork, join, shut down and exit, and do nothing else.

``python -m rpcprops._bare_ranks``, started with the clock preloaded, imports torch once and freezes
what it holds. For each line ``[world_size, rate]`` on its stdin it runs so many ranks once, and
prints the real seconds and the ranks' processor seconds as ``[seconds, processor]``. It ends with
its stdin.

With ``prepared`` as its argument it does what our server and ranks do to make this cheaper: huge
pages before the first fork, and a wide descriptor table in each rank.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time

from torch.distributed import rpc

from rpcprops import clock
from rpcprops._rank_fixture import RankFixture
from rpcprops.cluster import pages, rank_process
from rpcprops.cluster.options import A_DAY
from rpcprops.faults import FaultTable


def _rank_main(rank: int, world_size: int, rate: float, store: int, *, prepared: bool) -> None:
    if clock.loaded():
        clock.set_rate(rate)
    if prepared:
        rank_process.widen_descriptor_table()
    fixture = RankFixture(
        rank=rank,
        name=f"worker{rank}",
        world_size=world_size,
        init_method=f"file:///proc/self/fd/{store}",
        table=FaultTable(),
        rpc_timeout=A_DAY,
        num_worker_threads=8,
    )
    with rank_process.only_transport("tcp"):
        fixture.init_rpc()
    rpc.shutdown()


def _once(world_size: int, rate: float, *, prepared: bool) -> tuple[float, float]:
    began = time.monotonic()
    store = os.memfd_create("store")
    pids: set[int] = set()
    try:
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                try:
                    _rank_main(rank, world_size, rate, store, prepared=prepared)
                    os._exit(0)
                finally:
                    os._exit(1)
            pids.add(pid)
        processor = 0.0
        while pids:
            pid, status, usage = os.wait4(-1, 0)
            pids.discard(pid)
            if status:
                sys.exit(f"a bare rank ended with status {status}")
            processor += usage.ru_utime + usage.ru_stime
    finally:
        # Only where a rank failed: the others wait for it.
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os.close(store)
    return time.monotonic() - began, processor


def main() -> None:
    """Entry point; see the module."""
    prepared = sys.argv[1:] == ["prepared"]
    gc.collect()
    gc.freeze()
    if prepared:
        pages.collapse()
    for line in sys.stdin:
        world_size, rate = json.loads(line)
        print(json.dumps(_once(world_size, rate, prepared=prepared)), flush=True)


if __name__ == "__main__":
    main()
