"""init="adopt": programs that call init_rpc and rpc.shutdown themselves run as they are."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist
from torch.distributed import rpc

from rpcprops import FaultPlan, FaultTable, load_script
from rpcprops.cluster import namespaces
from rpcprops.errors import ContextLeak, RRefLeak, UngracefulShutdown, UsageError
from rpcprops.fixture import for_this_rank
from rpcprops.pytest_plugin import ClusterFactory

program: Any = load_script(Path(__file__).with_name("_adopted_program.py"), "--rounds", "2")
init_rpc: Any = rpc.init_rpc
api: Any = rpc.api

TABLE = FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_REMOTE_CALL": 0.5})


def test_it_is_judged_as_our_own(rpc_cluster: ClusterFactory) -> None:
    """The cluster knows the program's names, what its faults did, and its shutdown."""
    with rpc_cluster(world_size=3, init="adopt", faults=TABLE) as cluster:
        assert cluster.each_rank(program.run, 3) == [None, [8.0] * 3, None]
        assert cluster.names == ("store", "client1", "client2")
    ranks = cluster.outcome.ranks
    assert [rank.name for rank in ranks] == ["store", "client1", "client2"]
    assert [rank.exit_code for rank in ranks] == [0, 0, 0]
    # client1 makes three remote calls, and deletes three RRefs, two of whose sends fail each.
    assert [rank.failed_sends for rank in ranks] == [0, 6, 0]
    if cluster.rate > 1:  # delays are counted by the clock library
        assert [rank.delayed_sends for rank in ranks] == [{500: 0}, {500: 3}, {500: 0}]
    for rank in ranks:
        assert rank.counters is not None
        assert rank.counters.is_zero
        assert rank.counters_after_shutdown is not None
    names = [phase.name for phase in cluster.outcome.phases]
    assert names.index("settle") < names.index("shutdown")


@pytest.mark.parametrize(("leak", "error"), [("rref", RRefLeak), ("context", ContextLeak)])
def test_a_leak_is_found(rpc_cluster: ClusterFactory, leak: str, error: type[Exception]) -> None:
    """What the program holds when it calls rpc.shutdown() is reported, by its own names."""
    with (
        pytest.raises(error, match=r"store holds 1 owner|client1 holds 1 context"),
        rpc_cluster(world_size=3, init="adopt") as cluster,
    ):
        cluster.each_rank(program.run, 3, leak)


def test_a_leak_may_be_allowed(rpc_cluster: ClusterFactory) -> None:
    """With leaks="allow" a program may hold RRefs until it exits."""
    with rpc_cluster(world_size=3, init="adopt", leaks="allow", faults=TABLE) as cluster:
        cluster.each_rank(program.run, 3, "rref")
    assert all(rank.exit_code == 0 for rank in cluster.outcome.ranks)


def test_two_worlds_use_one_port(rpc_cluster: ClusterFactory) -> None:
    """Port 29500 is open in two worlds at once, for RPC and for a process group beside it."""
    if problem := namespaces.problem():
        pytest.skip(f"a fixed port needs a network for each world: {problem}")
    with (
        rpc_cluster(world_size=2, init="adopt") as one,
        rpc_cluster(world_size=2, init="adopt") as other,
    ):
        run = program.run_with_a_process_group
        running = [world.on(rank).submit(run, rank, 2) for rank in (0, 1) for world in (one, other)]
        assert [future.result() for future in running] == [2.0] * 4


def open_store(port: int) -> None:
    c10d: Any = dist
    c10d.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_a_port_of_the_machine_may_be_taken(rpc_cluster: ClusterFactory) -> None:
    """In the network of the machine, the error of a taken port says what to do."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        rpc_cluster(world_size=1, init=False, network="host") as cluster,
        pytest.raises(RuntimeError, match="in use") as caught,
    ):
        cluster.on(0).call(open_store, taken.getsockname()[1])
    assert any("choose a free port" in note for note in caught.value.__notes__)


def see(rank: int) -> tuple[str, tuple[str, ...], float, str]:
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=7)
    init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    timeout = api.get_rpc_timeout()
    name = rpc.get_worker_info().name
    rpc.shutdown()
    failing = tuple(map(str, for_this_rank().fault_table.messages_to_fail))
    return name, failing, timeout, os.environ["WORLD_SIZE"]


def test_the_rank_is_the_one_that_the_program_names(rpc_cluster: ClusterFactory) -> None:
    """Faults, results and reports go by the rank in init_rpc, whichever process it is."""
    plan = FaultPlan(by_rank={1: FaultTable(["RREF_USER_DELETE"], 1)})
    with rpc_cluster(world_size=2, init="adopt", faults=plan, clock="real") as cluster:
        turned = [cluster.on(process).submit(see, 1 - process) for process in (0, 1)]
        assert turned[0].result() == ("w1", ("RREF_USER_DELETE",), 7.0, "2")
        assert turned[1].result() == ("w0", (), 7.0, "2")
    assert [(rank.rank, rank.name) for rank in cluster.outcome.ranks] == [(0, "w0"), (1, "w1")]


def test_work_is_no_timeout(rpc_cluster: ClusterFactory) -> None:
    """Only faults that last as long as the program's timeout leave it as short on a fast clock."""
    seen: list[float] = []
    for delay in (6.9, 7.0):
        faults = FaultTable(messages_to_delay={"SCRIPT_CALL": delay})
        with rpc_cluster(world_size=2, init="adopt", faults=faults) as cluster:
            seen.append(cluster.each_rank(see)[0][2])
    longer = 0 if cluster.rate == 1 else cluster.rate * 15
    assert seen == [7.0 + longer, 7.0]


def again(rank: int) -> str:
    text = ""
    for name in ("first", "second"):
        init_rpc(f"{name}{rank}", rank=rank, world_size=2)
        try:
            init_rpc("third", rank=rank, world_size=2)
        except RuntimeError as error:
            text = str(error)
        rpc.shutdown()
    return text


def test_init_rpc_twice(rpc_cluster: ClusterFactory) -> None:
    """A second init_rpc raises while RPC runs, and starts another world after shutdown."""
    with rpc_cluster(world_size=2, init="adopt") as cluster:
        first, _ = cluster.each_rank(again)
        assert first.startswith("RPC is already initialized in this process, as 'second0'")
        assert cluster.names == ("second0", "second1")


def only_join(rank: int) -> None:
    init_rpc(f"w{rank}", rank=rank, world_size=2)


def leave_unless(rank: int, exception: int, graceful: bool) -> None:
    if rank != exception:
        rpc.shutdown(graceful)


def test_shutdown_is_ours_if_the_program_has_none(rpc_cluster: ClusterFactory) -> None:
    """Ranks that still run RPC at the end are shut down as our own are."""
    with rpc_cluster(world_size=2, init="adopt") as cluster:
        cluster.each_rank(only_join)
        assert cluster.on("w1").call(rpc.get_worker_info).name == "w1"
    assert all(rank.counters_after_shutdown for rank in cluster.outcome.ranks)
    with rpc_cluster(world_size=2, init="adopt") as cluster:
        cluster.each_rank(only_join)
        cluster.each_rank(leave_unless, 1, graceful=False)


def join_and_leave_unless(rank: int, exception: int) -> None:
    only_join(rank)
    leave_unless(rank, exception, graceful=True)


def join_and_fail(rank: int) -> None:
    only_join(rank)
    if rank == 1:
        msg = "rank 1 fails"
        raise OSError(msg)
    rpc.shutdown()


def test_who_keeps_others_waiting_is_told_of(rpc_cluster: ClusterFactory) -> None:
    """Ranks that wait for one that will not come are told so at once, with what it raised."""
    with (
        pytest.raises(UngracefulShutdown, match=r"\(rank 1\): w0 waits in rpc.shutdown\(\) for w1"),
        rpc_cluster(world_size=2, init="adopt") as cluster,
    ):
        cluster.each_rank(join_and_leave_unless, 1)
    with (
        pytest.raises(OSError, match="rank 1 fails"),
        rpc_cluster(world_size=2, init="adopt") as cluster,
    ):
        cluster.each_rank(join_and_fail)


def ask_for(rank: int, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": f"w{rank}", "rank": rank, "world_size": 2, **changes}
    if given.pop("faulty", False):
        given["backend"] = for_this_rank().rpc_backend
    if "devices" in given:
        options = rpc.TensorPipeRpcBackendOptions(
            device_maps={"w1": {given["devices"]: given.pop("devices")}}
        )
        given["rpc_backend_options"] = options
    init_rpc(**given)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"world_size": 3}, r"in a cluster of 2 ranks; make it rpc_cluster\(world_size=3"),
    ({"world_size": None}, "dynamic group.*Pass world_size"),
    ({"rank": 5}, "must be below 2; cluster.each_rank passes 0 to 1"),
    ({"rank": -1}, "cluster.each_rank passes it"),
    ({"rank": 0}, "has the rank of init_rpc.'w0'"),
    ({"name": "same"}, "has the name of init_rpc.'same'"),
    ({"name": 7}, "name must be a string"),
    ({"faulty": True}, r"brings faults of its own.*rpc_cluster\(..., faults=...\)"),
    ({"backend": "gloo"}, "backend='gloo' is not adopted"),
    ({"devices": "cuda:0"}, "name devices.*cuda"),
    ({"rpc_backend_options": {}}, "must be TensorPipeRpcBackendOptions"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_be_adopted(
    rpc_cluster: ClusterFactory, changes: dict[str, Any], text: str
) -> None:
    """What init_rpc is asked for and cannot have is refused, with the value and the remedy."""
    with (
        pytest.raises(UsageError, match=text),
        rpc_cluster(world_size=2, init="adopt") as cluster,
    ):
        cluster.each_rank(ask_for, changes)


def test_a_world_needs_all_its_ranks(rpc_cluster: ClusterFactory) -> None:
    """A cluster in which only some ranks call init_rpc, or none, says so."""
    with (
        pytest.raises(UsageError, match=r"w1 waits in init_rpc .* and rank 0 will not call it"),
        rpc_cluster(world_size=2, init="adopt") as cluster,
    ):
        cluster.on(1).call(only_join, 1)
    with (
        pytest.raises(UsageError, match="no rank has called init_rpc"),
        rpc_cluster(world_size=2, init="adopt"),
    ):
        pass
    for name, value in (("names", ["a", "b"]), ("rpc_timeout", 5), ("num_worker_threads", 2)):
        options: Any = {name: value}
        with pytest.raises(UsageError, match=f"{name}=.*no effect with init='adopt'"):
            rpc_cluster(world_size=2, init="adopt", **options)
