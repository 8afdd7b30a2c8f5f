"""Faults for a part of a run, and messages of ours that no fault of the user's strikes."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch.distributed import rpc

from rpcprops import ClusterServer, FaultPlan, FaultTable, Program
from rpcprops import clock as clocks
from rpcprops.agents import TensorPipe
from rpcprops.cluster._cluster import Cluster
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import retryable_tables
from rpcprops.fixture import for_this_rank
from rpcprops.oracle import account, fired_by_type, judge
from rpcprops.programs import Drop, Fetch, Remote, Share
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner

pytestmark = pytest.mark.skipif(
    bool(clocks.library_problem()), reason="faults are armed by the preload library"
)

LOST = FaultTable(["PYTHON_CALL"], 2)


def tries(number: int, argument: int = -1) -> str:
    """Call worker1 so often with one payload: a letter for each call, lost or answered."""
    seen = ""
    for _ in range(number):
        try:
            seen += "a" if rpc.rpc_sync("worker1", abs, args=(argument,)) == -argument else "?"
        except RuntimeError as error:
            seen += "l" if "Send attempt failed intentionally" in str(error) else "?"
    return seen


def retries(argument: int) -> int:
    """The right way to call where calls may be lost."""
    for _ in range(5):
        try:
            return int(rpc.rpc_sync("worker1", abs, args=(argument,)))
        except RuntimeError as error:
            if "Send attempt failed intentionally" not in str(error):
                raise
    raise AssertionError


def joins() -> None:
    for_this_rank().init_rpc()


def leaves() -> None:
    rpc.shutdown()


def failed(cluster: Cluster) -> list[dict[str, int]]:
    return [dict(rank.failed_by_type or {}) for rank in cluster.outcome.ranks]


@pytest.mark.parametrize("init", [True, False])
def test_a_client_that_retries_passes(rpc_cluster: ClusterFactory, init: bool) -> None:
    """Lost calls that are tried again leave no trace but their count, and no hang of shutdown."""
    began = time.monotonic()
    with rpc_cluster(world_size=3, faults=LOST, init=init) as cluster:
        if not init:
            cluster.each(joins)
        assert [cluster.on(0).call(retries, n) for n in (-3, -4)] == [3, 4]
        if not init:
            cluster.each(leaves)
    # Had the handshake been struck, the phase would have lasted for its 30 seconds.
    assert time.monotonic() - began < 20
    assert failed(cluster) == [{"PYTHON_CALL": 4}, {}, {}]
    assert [rank.sent for rank in cluster.outcome.ranks] == [{"PYTHON_CALL": 6}, {}, {}]
    fired = fired_by_type(account(None, cluster.plan, cluster.outcome))
    assert fired == {"failure PYTHON_CALL": 4}


def test_with_shutdown_faults_the_handshake_is_struck(rpc_cluster: ClusterFactory) -> None:
    """Who asks for it gets torch's own agent: worker1's part of the handshake comes late."""
    late = FaultTable([], 0, {"PYTHON_CALL": 0.25})
    seen = []
    for shutdown_faults in (True, False):
        options: Any = {"init": False, "shutdown_faults": shutdown_faults}
        with rpc_cluster(world_size=2, faults=late, **options) as cluster:
            cluster.each(joins)
            cluster.each(leaves)
            cluster.snapshot()
        seen.append([rank.delayed_by_type for rank in cluster.outcome.ranks])
    assert seen == [[{"PYTHON_CALL": 1}, {"PYTHON_CALL": 1}], [{}, {}]]


def keeps_a_reference() -> rpc.RRef[int]:
    reference: rpc.RRef[int] = rpc.remote("worker1", int, args=(7,))
    assert reference.to_here() == 7
    return reference


def test_the_users_own_messages_are_struck_at_shutdown(rpc_cluster: ClusterFactory) -> None:
    """The delete of an RRef that a rank holds until it leaves fails as often as the table says."""
    table = FaultTable(["RREF_USER_DELETE", "PYTHON_CALL"], 3)
    with rpc_cluster(world_size=2, faults=table, leaks="allow") as cluster:
        kept = cluster.on(0).call(keeps_a_reference, keep=True)
    del kept
    assert failed(cluster) == [{"RREF_USER_DELETE": 3}, {}]


def test_faults_act_in_their_block_alone(rpc_cluster: ClusterFactory) -> None:
    """In a block each payload of the type fails so often; before and after it, nothing does."""
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(tries, 2) == "aa"
        with cluster.faults(FaultPlan(by_rank={0: LOST})):
            assert cluster.on(0).call(tries, 3) == "lla"
            assert cluster.on(0).call(tries, 3, -2) == "lla"
            assert cluster.on(1).call(tries, 2) == "aa"
        assert cluster.on(0).call(tries, 2, -3) == "aa"
        # A new block counts payloads from 0.
        with cluster.faults(FaultTable(["PYTHON_CALL", "RREF_USER_DELETE"], 1)):
            assert cluster.on(0).call(tries, 2) == "la"
        with cluster.faults(FaultTable(["PYTHON_REMOTE_CALL"], 1)):
            assert cluster.on(0).call(tries, 2) == "aa"
    first, second, third = cluster.outcome.armed
    assert first.plan == FaultPlan(by_rank={0: LOST})
    assert first.failed == ({"PYTHON_CALL": 4}, {})
    assert second.failed == ({"PYTHON_CALL": 1}, {})
    assert third.failed == ({}, {})
    assert first.ends is not None and 0 < first.begins < first.ends < second.begins
    assert failed(cluster) == [{"PYTHON_CALL": 5}, {}]
    fired = fired_by_type(account(None, cluster.plan, cluster.outcome))
    assert fired == {"failure PYTHON_CALL": 5}


def test_blocks_and_the_clusters_own_faults_add_up(rpc_cluster: ClusterFactory) -> None:
    """Each table counts by itself, the first armed strikes first, and each is accounted for."""
    one = FaultTable(["PYTHON_CALL"], 1, {"PYTHON_CALL": 0.2})
    with rpc_cluster(world_size=2, faults=one) as cluster:
        with cluster.faults(FaultTable(["PYTHON_CALL"], 2, {"PYTHON_CALL": 0.1})):
            with cluster.faults(FaultTable(["PYTHON_CALL"], 1, {"PYTHON_CALL": 0.3})):
                assert cluster.on(0).call(tries, 6) == "llllaa"
            assert cluster.on(0).call(tries, 2) == "aa"
    assert [armed.failed[0] for armed in cluster.outcome.armed] == [
        {"PYTHON_CALL": 2},
        {"PYTHON_CALL": 1},
    ]
    # The longest delay applies: that of the inner block, then that of the cluster.
    assert [armed.delayed[0] for armed in cluster.outcome.armed] == [{}, {"PYTHON_CALL": 2}]
    counts = account(None, cluster.plan, cluster.outcome)
    assert [(c.part, c.kind, c.fired) for c in counts if c.fired] == [
        (0, "failure", 1),
        (0, "delay", 2),
        (1, "failure", 2),
        (2, "failure", 1),
        (2, "delay", 2),
    ]


def calls_until_lost() -> int:
    for number in range(100_000):
        if tries(1) == "l":
            return number
    raise AssertionError


def test_a_rank_that_runs_a_call_is_armed_too(rpc_cluster: ClusterFactory) -> None:
    """The change reaches a rank whose main thread is busy, and is over when the block ends."""
    with rpc_cluster(world_size=2) as cluster:
        busy = cluster.on(0).submit(calls_until_lost)
        time.sleep(0.05)
        assert not busy.done()
        with cluster.faults(FaultTable(["PYTHON_CALL"], 1)):
            assert busy.result() > 0
        assert cluster.on(0).call(tries, 3, -2) == "aaa"


def test_a_retry_after_the_block_arrives(rpc_cluster: ClusterFactory) -> None:
    """A delete fails in its block; torch tries it again after that, and the RRef goes."""
    # At this rate, five tries take a fifth of a real second.
    with rpc_cluster(world_size=2, clock=50.0) as cluster:
        kept = cluster.on(0).call(keeps_a_reference, keep=True)
        with cluster.faults(FaultTable(["RREF_USER_DELETE"], 5)):
            del kept
            cluster.snapshot()
            while not failed(cluster)[0]:
                cluster.snapshot()
    (armed,) = cluster.outcome.armed
    assert 1 <= armed.failed[0]["RREF_USER_DELETE"] < 5
    assert failed(cluster) == list(armed.failed)


def test_a_second_agent_counts_from_0(rpc_cluster: ClusterFactory) -> None:
    """As with torch's agent, which keeps its counts in itself."""
    with rpc_cluster(world_size=2, faults=FaultTable(["PYTHON_CALL"], 1), init=False) as cluster:
        for _ in range(2):
            cluster.each(joins)
            assert cluster.on(0).call(tries, 2) == "la"
            cluster.each(leaves)
    assert failed(cluster) == [{"PYTHON_CALL": 2}, {}]


SHARED = Program(
    3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Fetch(2, "b"), Drop(0, "a"), Drop(2, "b"))
)


class _OfUsers:
    """A server whose clusters are made as those of users are."""

    def __init__(self, server: ClusterServer) -> None:
        self.server = server
        self.agent = server.agent
        self.rate_of = server.rate_of
        self.reuse = server.reuse

    def make_cluster(self, *modules: str, **options: Any) -> Cluster:
        options["shutdown_faults"] = False
        return self.server.make_cluster(*modules, **options)


def _differs(server: ClusterServer, table: FaultTable) -> object:
    runner: Any = Runner(_OfUsers(server))  # type: ignore[arg-type]
    plan = FaultPlan(table)
    return judge(SHARED, plan, runner.run_anew(SHARED, plan))


def test_our_decisions_are_those_of_torchs_agent(rpc_cluster: ClusterFactory) -> None:
    """A program shows exactly what is predicted for torch's agent, which shares counts too."""
    table = FaultTable(["RREF_FORK_REQUEST", "RREF_USER_DELETE"], 2, {"PYTHON_REMOTE_CALL": 0.5})
    assert _differs(rpc_cluster.server, table) == ()


@pytest.mark.nightly
@pytest.mark.parametrize("table", retryable_tables(), ids=repr)
def test_our_decisions_under_every_table(rpc_cluster: ClusterFactory, table: FaultTable) -> None:
    """The same under each of the 76 tables that torch survives."""
    assert _differs(rpc_cluster.server, table) == ()


def joins_plainly() -> None:
    fixture = for_this_rank()
    options = rpc.TensorPipeRpcBackendOptions(init_method=fixture.init_method)
    init_rpc: Any = rpc.init_rpc
    init_rpc(
        fixture.name,
        backend=rpc.backend_registry.BackendType["TENSORPIPE"],
        rank=fixture.rank,
        world_size=fixture.world_size,
        rpc_backend_options=options,
    )


def test_what_cannot_be_armed_is_refused(rpc_cluster: ClusterFactory) -> None:
    """Each misuse is named with its value and its remedy, and arms nothing."""
    with rpc_cluster(world_size=2) as cluster:
        for wrong, said in (
            (FaultPlan(by_rank={2: LOST}), "rank 2, but a world of 2"),
            (None, r"faults=None .* must be a FaultTable"),
            (["PYTHON_CALL"], "must be a FaultTable"),
        ):
            with pytest.raises(UsageError, match=said), cluster.faults(wrong):  # type: ignore[arg-type]
                raise AssertionError
        cluster.arming.problem = "the clock library is not built: install a C compiler"
        with pytest.raises(MachineCannot, match="install a C compiler; or give them"):
            with cluster.faults(LOST):
                raise AssertionError
        assert cluster.outcome.armed == ()
    with pytest.raises(UsageError, match=r"is over|is not running"), cluster.faults(LOST):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"agent": TensorPipe.name, "init": False},
            "TENSORPIPE injects no faults, so it cannot carry out FaultTable",
        ),
        ({"shutdown_faults": True}, "has shutdown_faults=True"),
    ],
)
def test_where_nothing_can_be_armed(
    rpc_cluster: ClusterFactory, options: dict[str, Any], said: str
) -> None:
    """An agent without faults, and one that decides alone."""
    with rpc_cluster(world_size=1, **options) as cluster:
        with pytest.raises(UsageError, match=said), cluster.faults(LOST):
            raise AssertionError


def test_an_agent_of_the_users_that_injects_nothing(rpc_cluster: ClusterFactory) -> None:
    """Where the user's code made a plain agent, that is said instead of injecting nothing."""
    with rpc_cluster(world_size=1, init=False) as cluster:
        cluster.on(0).call(joins_plainly)
        with pytest.raises(UsageError, match="worker0 runs the agent TensorPipeAgent"):
            with cluster.faults(LOST):
                raise AssertionError
        cluster.on(0).call(leaves)


def test_an_error_of_the_block_ends_it(rpc_cluster: ClusterFactory) -> None:
    """What the block raises comes out as it is, and its faults act no more."""
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(RuntimeError, match="Send attempt failed intentionally"):
            with cluster.faults(LOST):
                cluster.on(0).call(rpc.rpc_sync, "worker1", abs, args=(-1,))
        assert cluster.on(0).call(tries, 2, -2) == "aa"


def sends_to_nobody() -> str:
    torch_rpc: Any = rpc
    try:
        rpc.rpc_sync(torch_rpc.WorkerInfo("nobody", 77), abs, args=(-1,))
    except Exception as error:
        return str(error)
    return ""


def test_an_exception_of_torchs_send_passes_through(rpc_cluster: ClusterFactory) -> None:
    """torch's C++ exception crosses our C functions, and the next send counts as usual."""
    with rpc_cluster(world_size=2, faults=FaultTable(["PYTHON_CALL"], 1)) as cluster:
        assert "intentionally" in cluster.on(0).call(sends_to_nobody)
        assert "nobody" in cluster.on(0).call(sends_to_nobody)
        assert cluster.on(0).call(tries, 2, -2) == "la"
    assert failed(cluster) == [{"PYTHON_CALL": 2}, {}]
