"""Ranks that die: who, how, and in which phase."""

# ruff: noqa: PT012  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import rpc

from rpcprops import Violation
from rpcprops.cluster.options import Transport
from rpcprops.errors import HarnessError, RankDied, UnexpectedError, UngracefulShutdown
from rpcprops.pytest_plugin import ClusterFactory

pytestmark = pytest.mark.usefixtures("nothing_left")


def kill_here(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(1000)


def read_null() -> None:
    import ctypes

    ctypes.string_at(0)


def at_shutdown(action: Callable[[], Any]) -> None:
    """Replace this rank's shutdown."""
    module: Any = rpc
    module.shutdown = lambda graceful: action()


@pytest.mark.parametrize(
    ("end", "number", "code", "words"),
    [
        (lambda: kill_here(signal.SIGKILL), signal.SIGKILL, None, "killed by SIGKILL"),
        (lambda: kill_here(signal.SIGTERM), signal.SIGTERM, None, "killed by SIGTERM"),
        (read_null, signal.SIGSEGV, None, "killed by SIGSEGV"),
        (os.abort, signal.SIGABRT, None, "killed by SIGABRT"),
        (lambda: os._exit(3), 0, 3, "exit code 3"),
        (lambda: os._exit(0), 0, 0, "exit code 0"),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "exit 3", "exit 0"],
)
def test_death_in_a_call(
    rpc_cluster: ClusterFactory,
    end: Callable[[], None],
    number: int,
    code: int | None,
    words: str,
) -> None:
    """A rank that dies in a call raises RankDied with its name and its end; the rest are killed."""
    cluster = rpc_cluster(world_size=3)
    with pytest.raises(RankDied, match=f"worker1 died during run: {words}") as caught:
        with cluster:
            cluster.on(1).call(end)
    dead, other = cluster.outcome.ranks[1], cluster.outcome.ranks[0]
    assert (dead.signal, dead.exit_code, dead.killed) == (number, code, False)
    assert dead.describe_end() == words
    assert (other.signal, other.exit_code, other.killed) == (0, None, True)
    assert other.describe_end() == "killed by rpcprops"
    phase = cluster.outcome.phase("run")
    assert phase is not None
    assert (phase.verdict, phase.ranks) == ("failed", (1,))
    if words.endswith("SIGSEGV"):
        # faulthandler says where.
        assert "in read_null" in "\n".join(caught.value.__notes__)


def test_an_end_of_a_file_is_no_lost_connection(rpc_cluster: ClusterFactory) -> None:
    """The EOFError of a function is raised at once: nothing has died that could be waited for."""
    with rpc_cluster(world_size=1) as cluster:
        began = time.monotonic()
        with pytest.raises(EOFError, match="EOF when reading a line"):
            cluster.on(0).call(input)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_death_while_another_rank_waits(rpc_cluster: ClusterFactory, transport: Transport) -> None:
    """A rank that dies serving an RPC is found while the caller still waits for its answer."""
    began = time.monotonic()
    with pytest.raises(RankDied, match="worker1 died during run: killed by SIGKILL"):
        with rpc_cluster(world_size=2, clock="real", transport=transport) as cluster:
            cluster.on(0).call(rpc.rpc_sync, "worker1", kill_here, (int(signal.SIGKILL),))
    assert time.monotonic() - began < 10


def test_death_is_found_by_settle_and_snapshot(rpc_cluster: ClusterFactory) -> None:
    """Whatever asks the ranks next says that one has died, and so does the end."""
    for ask in ("settle", "snapshot"):
        with pytest.raises(RankDied, match=r"worker0 died during (run|settle): "):
            with rpc_cluster(world_size=2) as cluster:
                cluster.on(0).submit(kill_here, signal.SIGKILL)
                with pytest.raises(RankDied, match="worker0"):
                    getattr(cluster, ask)()
                    time.sleep(0.3)
                    getattr(cluster, ask)()


def test_death_is_found_at_the_end(rpc_cluster: ClusterFactory) -> None:
    """A death that nothing asked about is raised when the with block is left."""
    with pytest.raises(RankDied, match="worker1 died during settle: killed by SIGKILL"):
        with rpc_cluster(world_size=2) as cluster:
            cluster.on(1).submit(kill_here, signal.SIGKILL)


def test_only_dead_ranks_are_named(rpc_cluster: ClusterFactory) -> None:
    """Two deaths are two lines, and a survivor has none."""
    with pytest.raises(RankDied) as caught:
        with rpc_cluster(world_size=3) as cluster:
            for rank in (0, 2):
                cluster.on(rank).submit(kill_here, signal.SIGKILL)
            time.sleep(0.5)
            cluster.settle()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["RankDied (rank 0)", "RankDied (rank 2)"]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: kill_here(signal.SIGKILL), "killed by SIGKILL"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
    ],
    ids=["SIGKILL", "exit 3", "exit 0"],
)
def test_death_during_shutdown(
    rpc_cluster: ClusterFactory, end: Callable[[], None], words: str
) -> None:
    """A rank that dies while it shuts down is found at once, not when the deadline has passed."""
    cluster = rpc_cluster(world_size=2)
    began = time.monotonic()
    with pytest.raises(RankDied, match=f"worker1 died during shutdown: {words}"):
        with cluster:
            cluster.on(1).call(at_shutdown, end)
    assert time.monotonic() - began < 15
    assert cluster.outcome.ranks[1].describe_end() == words


def test_shutdown_that_raises(rpc_cluster: ClusterFactory) -> None:
    """A shutdown that raises is UngracefulShutdown with its error, and the exit code is not 0."""

    def refuse() -> None:
        msg = "not yet"
        raise RuntimeError(msg)

    cluster = rpc_cluster(world_size=1)
    with pytest.raises(UngracefulShutdown, match=r"worker0 raised RuntimeError: not yet"):
        with cluster:
            cluster.on(0).call(at_shutdown, refuse)
    rank = cluster.outcome.ranks[0]
    assert rank.shutdown_error is not None
    assert rank.exit_code not in (0, None)


def test_dead_ranks_answer_was_given(rpc_cluster: ClusterFactory) -> None:
    """An answer that arrived before the death is still the call's value."""

    def leave_soon() -> str:
        import threading

        threading.Timer(0.05, os._exit, [5]).start()
        return "answered"

    with pytest.raises(RankDied, match="exit code 5"):
        with rpc_cluster(world_size=1, clock="real") as cluster:
            assert cluster.on(0).call(leave_soon) == "answered"
            time.sleep(0.3)


def test_exceptions_in_the_block_are_not_masked(rpc_cluster: ClusterFactory) -> None:
    """The block's own exception comes out as it was, and ranks are killed, not shut down."""
    cluster = rpc_cluster(world_size=3)
    began = time.monotonic()
    with pytest.raises(KeyError, match="mine"):
        with cluster:
            cluster.on(0).submit(time.sleep, 1e9)
            cluster.on(1).submit(kill_here, signal.SIGKILL)
            msg = "mine"
            raise KeyError(msg)
    assert time.monotonic() - began < 5
    assert cluster.outcome.phase("shutdown") is None
    assert cluster.outcome.ranks[0].killed


def test_interrupt_in_the_block(rpc_cluster: ClusterFactory) -> None:
    """A KeyboardInterrupt in the block comes out, and leaves no rank behind."""
    with pytest.raises(KeyboardInterrupt):
        with rpc_cluster(world_size=2) as cluster:
            cluster.on(0).submit(time.sleep, 1e9)
            raise KeyboardInterrupt


def test_interrupt_while_starting(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KeyboardInterrupt while ranks start leaves no rank behind, and the server goes on."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    cluster = rpc_cluster(world_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(cluster._diagnosis, "gather", interrupted)
        with pytest.raises(KeyboardInterrupt), cluster:
            pass
    assert all(rank.killed for rank in cluster.outcome.ranks)
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(1).call(torch.zeros, 1).item() == 0.0


def test_ranks_that_are_forked_too_late_are_ended(rpc_cluster: ClusterFactory) -> None:
    """A server that stops while it is asked for ranks kills them once it goes on, and serves."""
    server = rpc_cluster.server
    peer, _ = server.servers.peer_for([__name__])
    assert peer.hello is not None
    forker = psutil.Process(peer.hello.pid)
    with rpc_cluster(world_size=3) as cluster:
        cluster.settle()
    goes_on = threading.Timer(2.0, forker.resume)
    cluster = rpc_cluster(world_size=4, deadline=0.5, clock="real")
    began = time.monotonic()
    forker.suspend()
    goes_on.start()
    try:
        with pytest.raises(HarnessError, match="did not fork 4 ranks in time"), cluster:
            pass
    finally:
        goes_on.join()
    assert time.monotonic() - began < 10
    assert all(rank.killed and not rank.signal for rank in cluster.outcome.ranks)
    pids = [channel.pid for channel in cluster.ranks.channels]
    assert len(set(pids) - {0}) == 4
    assert not {child.pid for child in forker.children()} & set(pids)
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.each(abs, -1) == [1, 1]


def test_interrupt_while_waiting(rpc_cluster: ClusterFactory) -> None:
    """A real SIGINT while a call is awaited ends the block quickly."""
    began = time.monotonic()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            with rpc_cluster(world_size=2, clock="real") as cluster:
                cluster.on(0).call(time.sleep, 1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert time.monotonic() - began < 6


def test_bad_rendezvous_is_an_error_of_the_start(rpc_cluster: ClusterFactory) -> None:
    """What init_rpc raises in a rank is reported as such, with the rank."""
    cluster = rpc_cluster(world_size=2, num_worker_threads=1)
    # Threads that torch refuses: nothing of ours checks what its agent thinks of them.
    cluster.options = replace(cluster.options, num_worker_threads=-1)
    with pytest.raises((UnexpectedError, RankDied), match=r"rank [01]"), cluster:
        pass


def test_violations_are_exceptions_of_ours() -> None:
    """Each promise that a cluster can find broken names a class in rpcprops.errors."""
    from rpcprops import errors

    for promise in ("RankDied", "RankHung", "RRefLeak", "ContextLeak", "UngracefulShutdown"):
        assert issubclass(getattr(errors, promise), errors.BrokenPromise)
        assert promise in str(Violation(promise, "words", rank=1))
