"""The clock in ranks: its rate, injected delays on it, and the deadlines that go with it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from rpcprops import ClusterServer, FaultPlan, FaultTable, MessageType
from rpcprops import clock as clocks
from rpcprops.pytest_plugin import ClusterFactory

needs_clock = pytest.mark.skipif(clocks.library_path() is None, reason="no clock library")


def nothing() -> None:
    pass


def slept(seconds: float) -> tuple[float, float, float]:
    """What three clocks say of a sleep, in virtual seconds."""
    wall, monotonic, counter = time.time(), time.monotonic(), time.perf_counter()
    time.sleep(seconds)
    return time.time() - wall, time.monotonic() - monotonic, time.perf_counter() - counter


def timed_call(to: str, timeout: float = 0.0) -> float:
    began = time.monotonic()
    if timeout:
        rpc.rpc_sync(to, nothing, timeout=timeout)
    else:
        rpc.rpc_sync(to, nothing)
    return time.monotonic() - began


@needs_clock
@pytest.mark.parametrize("rate", [2, 10, 100.0])
def test_time_runs_at_the_rate(rpc_cluster: ClusterFactory, rate: float) -> None:
    """A sleep in a rank takes its length on the rank's clocks, and 1/rate of it here."""
    seconds = 0.4 * rate
    with rpc_cluster(world_size=1, clock=rate) as cluster:
        assert cluster.rate == rate
        began = time.monotonic()
        measured = cluster.on(0).call(slept, seconds)
        passed = time.monotonic() - began
    assert cluster.outcome.clock_rate == rate
    # Above, only by what the machine takes to wake it and to answer.
    assert all(seconds * 0.98 <= virtual <= seconds * 2.5 for virtual in measured)
    assert 0.4 * 0.98 <= passed < 3.0


def test_real_time(rpc_cluster: ClusterFactory) -> None:
    """With clock="real" a second is a second, on a server that could run faster."""
    with rpc_cluster(world_size=1, clock="real") as cluster:
        assert cluster.rate == 1.0
        began = time.monotonic()
        measured = cluster.on(0).call(slept, 0.3)
        passed = time.monotonic() - began
    assert cluster.outcome.clock_rate == 1.0
    assert all(0.29 <= virtual <= passed + 0.05 for virtual in measured)


def test_the_test_process_keeps_its_clock(rpc_cluster: ClusterFactory) -> None:
    """Nothing is dilated here."""
    assert clocks.get_rate() == 1.0
    with rpc_cluster(world_size=1):
        assert clocks.get_rate() == 1.0


@needs_clock
def test_clusters_of_two_rates_at_once(rpc_cluster: ClusterFactory) -> None:
    """The rate belongs to a cluster: two at once run at their own."""
    one, other = rpc_cluster(world_size=1, clock=50), rpc_cluster(world_size=1, clock="real")
    with one as fast, other as slow:
        quick = fast.on(0).submit(slept, 20.0)
        began = time.monotonic()
        assert slow.on(0).call(slept, 0.2)[1] < 5.0
        assert quick.result()[1] >= 19.9
        assert time.monotonic() - began < 8.0


@needs_clock
def test_server_of_a_rate() -> None:
    """ClusterServer(clock=10) runs its clusters at 10 and says that it measured it."""
    with ClusterServer(clock=10) as server:
        assert server.rate == 10.0
        assert "10 virtual seconds for each real second (measured)" in server.clock_note
        with server.cluster(world_size=1) as cluster:
            assert cluster.on(0).call(slept, 2.0)[0] >= 1.99
        with server.cluster(world_size=1, clock="auto") as cluster:
            assert cluster.rate == 10.0


def test_server_of_real_time() -> None:
    """ClusterServer(clock=1) is one of real time, and says that this was asked for."""
    with ClusterServer(clock=1) as server:
        assert server.clock_note == "clock: real time, as asked for"
        with server.cluster(world_size=1) as cluster:
            assert cluster.on(0).call(clocks.get_rate) == 1.0


@needs_clock
def test_an_injected_delay_takes_its_time(rpc_cluster: ClusterFactory) -> None:
    """A PYTHON_CALL delayed by 1.5 s takes about 1.5 virtual seconds, and is seen as delayed."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 1.5})})
    with rpc_cluster(world_size=2, faults=plan, clock=10) as cluster:
        late = cluster.on(0).call(timed_call, "worker1")
        prompt = cluster.on(1).call(timed_call, "worker0")
        cluster.settle()
    assert 1.5 <= late < 6.0
    # Its own message is not delayed; a busy machine is.
    assert prompt < late + 5.0
    assert cluster.outcome.ranks[0].delayed_sends == {1500: 1}
    assert cluster.outcome.ranks[1].delayed_sends == {}


def test_an_injected_delay_in_real_time(rpc_cluster: ClusterFactory) -> None:
    """The same delay in real time: 0.4 s are 0.4 s."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 0.4})})
    with rpc_cluster(world_size=2, faults=plan, clock="real") as cluster:
        assert 0.4 <= cluster.on(0).call(timed_call, "worker1") < 5.0


def test_a_delay_beyond_the_timeout(rpc_cluster: ClusterFactory) -> None:
    """A call that times out before its delay ends raises torch's timeout, and still settles."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 2.0})})
    with rpc_cluster(world_size=2, faults=plan) as cluster:
        with pytest.raises(RuntimeError, match="RPC ran for more than"):
            cluster.on(0).call(timed_call, "worker1", timeout=0.2)
        cluster.settle()


def test_the_rpc_timeout_is_the_clusters(rpc_cluster: ClusterFactory) -> None:
    """`rpc_timeout` is what calls without a timeout of their own wait, in virtual seconds."""

    def options() -> tuple[float, int]:
        api: Any = rpc.api
        options = api._get_current_rpc_agent()._get_backend_options()
        return api.get_rpc_timeout(), options.num_worker_threads

    with rpc_cluster(world_size=1, rpc_timeout=123, num_worker_threads=3) as cluster:
        assert cluster.on(0).call(options) == (123.0, 3)
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.on(0).call(options) == (86_400.0, 8)


@needs_clock
def test_retries_of_minutes_take_seconds(rpc_cluster: ClusterFactory) -> None:
    """Five failures of an RREF delete are retried within the virtual 9 s that they take."""
    faults = FaultTable([MessageType.RREF_USER_DELETE], 5)
    with rpc_cluster(world_size=2, faults=faults, clock=100) as cluster:
        cluster.on(0).call(make_and_drop)
        began = time.monotonic()
        cluster.settle()
        assert time.monotonic() - began < 5.0
    assert [rank.failed_sends for rank in cluster.outcome.ranks] == [5, 0]


def make_and_drop() -> None:
    rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)).to_here()
