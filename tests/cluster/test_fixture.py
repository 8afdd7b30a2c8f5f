"""The fixture in ranks: a drop-in for torch's own, and the way in for code that calls init_rpc."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch.distributed import rpc

from rpcprops import FaultPlan, FaultTable
from rpcprops.errors import UsageError
from rpcprops.fixture import FaultyRpcAgentTestFixture, for_this_rank
from rpcprops.pytest_plugin import ClusterFactory

SHUTDOWN_MESSAGES = (
    "Exception in thread pool task: x",
    "Connection reset by peer",
    "Connection closed by peer",
    "RPC ran for more than 60000 milliseconds",
    "eof (this error originated at tensorpipe/transport/connection_impl_boilerplate.h:98)",
    "anything else",
)
OPTIONS = (
    "num_worker_threads",
    "rpc_timeout",
    "init_method",
    "num_fail_sends",
    "messages_to_fail",
    "messages_to_delay",
)


def members_of(own: bool) -> dict[str, Any]:
    """What one of the two fixtures gives, in data."""
    from torch.testing._internal.distributed.rpc import faulty_rpc_agent_test_fixture as torchs

    base = FaultyRpcAgentTestFixture if own else torchs.FaultyRpcAgentTestFixture

    class Fixture(base):  # type: ignore[misc, valid-type]
        file_name = "unused"

    fixture = Fixture()
    found: dict[str, Any] = {"backend": str(fixture.rpc_backend)}
    for moment in ("fresh", "set"):
        if moment == "set":
            fixture.setup_fault_injection(["RREF_FORK_REQUEST"], {"SCRIPT_CALL": 0.5})
        options = fixture.rpc_backend_options
        found |= {f"{moment} {name}": getattr(options, name) for name in OPTIONS}
        found[f"{moment} class"] = type(options).__name__
        for name in ("messages_to_fail", "messages_to_delay"):
            value = found[f"{moment} {name}"]
            found[f"{moment} {name}"] = sorted(value.items() if name.endswith("y") else value)
    fixture.setup_fault_injection(None, None)
    found["unchanged"] = sorted(fixture.rpc_backend_options.messages_to_fail)
    for name in ("shutdown", "timeout"):
        pattern = getattr(fixture, f"get_{name}_error_regex")()
        found[name] = [bool(re.search(pattern, text)) for text in SHUTDOWN_MESSAGES]
    found["attributes"] = sorted(set(dir(torchs.FaultyRpcAgentTestFixture)) - set(dir(fixture)))
    return found


def test_drop_in(rpc_cluster: ClusterFactory) -> None:
    """Backend, default and changed options, and what both patterns match, equal torch's own."""
    with rpc_cluster(world_size=1, init=False) as cluster:
        ours = cluster.on(0).call(members_of, True)
        torchs = cluster.on(0).call(members_of, False)
    assert ours == torchs
    assert ours["fresh num_fail_sends"] == 3
    assert ours["attributes"] == []
    assert ours["shutdown"][:3] == [True] * 3
    assert ours["timeout"] == [False, False, False, True, False, False]


Options = tuple[list[str], int, dict[str, float]]


def options_for(table: FaultTable | None, raw: Any = None) -> Options:
    class Fixture(FaultyRpcAgentTestFixture):
        file_name = "unused"

    fixture = Fixture()
    if table is not None:
        fixture.setup_fault_injection(table, None)
        assert fixture.fault_table == table
    else:
        fixture.setup_fault_injection(raw, None)
    options = fixture.rpc_backend_options
    return sorted(options.messages_to_fail), options.num_fail_sends, dict(options.messages_to_delay)


def test_a_table_goes_into_the_fixture(rpc_cluster: ClusterFactory) -> None:
    """A whole FaultTable put into the fixture is what its options say."""
    table = FaultTable(["RREF_USER_DELETE"], 4, {"PYTHON_CALL": 0.25})
    with rpc_cluster(world_size=1, init=False) as cluster:
        assert cluster.on(0).call(options_for, table) == (
            ["RREF_USER_DELETE"],
            4,
            {"PYTHON_CALL": 0.25},
        )
        assert cluster.on(0).call(options_for, FaultTable()) == ([], 0, {})
        with pytest.raises(UsageError, match="RREF_NOTHING"):
            cluster.on(0).call(options_for, None, ["RREF_NOTHING"])


def join_by_hand() -> tuple[int, list[str], int]:
    fixture = for_this_rank()
    options = fixture.rpc_backend_options
    module: Any = rpc
    module.init_rpc(
        fixture.name,
        backend=fixture.rpc_backend,
        rank=fixture.rank,
        world_size=fixture.world_size,
        rpc_backend_options=options,
    )
    return fixture.rank, list(options.messages_to_fail), options.num_fail_sends


def leave_by_hand() -> None:
    rpc.shutdown()


def total(to: str) -> int:
    return int(rpc.rpc_sync(to, sum, args=([1, 2],)))


def test_init_by_hand(rpc_cluster: ClusterFactory) -> None:
    """With init=False the user's code joins, calls and leaves; each rank has its own table."""
    plan = FaultPlan(by_rank={1: FaultTable(["RREF_USER_DELETE"], 2)})
    with rpc_cluster(world_size=2, init=False, faults=plan) as cluster:
        assert [held.is_zero for held in cluster.snapshot()] == [True, True]
        assert cluster.each(join_by_hand) == [(0, [], 0), (1, ["RREF_USER_DELETE"], 2)]
        assert cluster.on(0).call(total, "worker1") == 3
        cluster.settle()
        cluster.each(leave_by_hand)
    assert [rank.exit_code for rank in cluster.outcome.ranks] == [0, 0]


def test_init_by_hand_uses_loopback_tcp(rpc_cluster: ClusterFactory) -> None:
    """A user's own init_rpc keeps the cluster's transport, name, timeout and world."""

    def look() -> tuple[str, float, bool]:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            shared = "tensorpipe_shm" in maps.read()
        api: Any = rpc.api
        return rpc.get_worker_info().name, api.get_rpc_timeout(), shared

    with rpc_cluster(world_size=2, init=False, names=["a", "b"], rpc_timeout=77.0) as cluster:
        cluster.each(join_by_hand)
        assert cluster.each(look) == [("a", 77.0, False), ("b", 77.0, False)]
        cluster.each(leave_by_hand)


def test_no_fixture_outside_ranks() -> None:
    """for_this_rank() in the test process says that this is no rank."""
    with pytest.raises(UsageError, match="no rank of a cluster"):
        for_this_rank()


@pytest.mark.parametrize("table", [None, {}, "RREF_USER_DELETE", FaultPlan()])
def test_only_tables_are_tables(table: Any) -> None:
    """Setting fault_table to anything else is refused by value and type."""
    with pytest.raises(UsageError, match="must be a FaultTable"):
        FaultyRpcAgentTestFixture().fault_table = table
