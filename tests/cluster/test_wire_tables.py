"""Under the agent WIRE, what fault tables did is read from the record of messages, exactly."""

# ruff: noqa: PT012  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest
import torch
from torch.distributed import rpc

from rpcprops import FaultPlan, FaultTable
from rpcprops.agents.wire.wire import library
from rpcprops.cluster import Cluster
from rpcprops.errors import RankDied, RankHung
from rpcprops.oracle import FaultCount, account, judge
from rpcprops.programs import Drop, Fetch, Program, Remote, Share
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests._wire import needs_wire, own_worlds

pytestmark = [needs_wire, pytest.mark.usefixtures("nothing_left")]

FORK, ACCEPT, CALL = "RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT", "PYTHON_CALL"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def add_and_die() -> None:
    """A call of an operator that fails, after which this rank is killed."""
    # torch puts the payload into the error, and that is no text: UnicodeDecodeError.
    with contextlib.suppress(RuntimeError, ValueError):
        rpc.rpc_sync("worker1", torch.add, (torch.ones(1), 1))
    die()


def call(times: int) -> int:
    """How many calls of so many, of different payloads, raised."""
    raised = 0
    for number in range(times):
        try:
            rpc.rpc_sync("worker1", abs, (-number,))
        except RuntimeError:
            raised += 1
    return raised


def call_and_die(times: int) -> None:
    call(times)
    die()


def die_while_it_is_held_up() -> None:
    """This rank is killed while its table holds its first call up."""
    threading.Thread(target=call, args=(1,), daemon=True).start()
    end = time.monotonic() + 5000.0
    while not library().counts().get(CALL, (0, 0, 0))[2] and time.monotonic() < end:
        time.sleep(0.01)
    die()


def sleep_for_ever() -> None:
    time.sleep(1e9)


def start_a_call_without_end() -> None:
    rpc.rpc_async("worker1", sleep_for_ever)


def counts(cluster: Cluster) -> list[FaultCount]:
    """What fired, of a test of a user's."""
    return [one for one in account(None, cluster.plan, cluster.outcome) if one.fired != 0]


def test_types_of_a_rank_that_aborts_are_told_apart(rpc_cluster: ClusterFactory) -> None:
    """A fork request is given up and aborts its rank; no accept was sent, and none has failed."""
    program = Program(3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Drop(2, "b")))
    plan = FaultPlan(by_rank={2: FaultTable([FORK, ACCEPT], 6)})
    outcome = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire")
    assert outcome.ranks[2].signal == signal.SIGABRT
    counted = account(program, plan, outcome)
    assert counted == (
        FaultCount(2, "failure", ACCEPT, 6, 0, "recorded"),
        FaultCount(2, "failure", FORK, 6, 6, "recorded"),
    )
    failed = [sent.type for sent in outcome.messages if sent.failed_by_table]
    assert failed == [FORK] * 6


def test_a_rank_that_dies_after_a_failed_send(rpc_cluster: ClusterFactory) -> None:
    """Nobody has asked the rank between the failure and its death, and the failure counts."""
    cluster = rpc_cluster(world_size=2, agent="wire", faults=FaultTable(["SCRIPT_CALL"], 1))
    with pytest.raises(RankDied, match="SIGKILL"), cluster:
        cluster.on(0).call(add_and_die)
    assert counts(cluster) == [FaultCount(0, "failure", "SCRIPT_CALL", None, 1, "recorded")]


def test_a_rank_that_dies_after_a_delay(rpc_cluster: ClusterFactory) -> None:
    """Each of the calls was late, and the record says by how much."""
    table = FaultTable(messages_to_delay={CALL: 0.25, "SCRIPT_CALL": 0.25})
    cluster = rpc_cluster(world_size=2, agent="wire", faults=table)
    with pytest.raises(RankDied, match="SIGKILL"), cluster:
        cluster.on(0).call(call_and_die, 3)
    assert counts(cluster) == [FaultCount(0, "delay", CALL, None, 3, "recorded")]
    late = [sent for sent in cluster.outcome.messages if sent.delayed_by_table]
    assert {(sent.sender, sent.type, sent.table_delay) for sent in late} == {(0, CALL, 0.25)}


def test_a_rank_that_dies_during_a_delay(rpc_cluster: ClusterFactory) -> None:
    """The message that a table holds up is in the record before its sender waits."""
    cluster = rpc_cluster(
        world_size=2, agent="wire", faults=FaultTable(messages_to_delay={CALL: 3600.0})
    )
    with pytest.raises(RankDied, match="SIGKILL"), cluster:
        cluster.on(0).call(die_while_it_is_held_up)
    assert counts(cluster) == [FaultCount(0, "delay", CALL, None, 1, "recorded")]
    (late,) = [sent for sent in cluster.outcome.messages if sent.delayed_by_table]
    assert (late.became, late.written, late.table_delay) == ("", None, 3600.0)


def test_the_tables_of_a_rank_that_dies_are_told_apart(rpc_cluster: ClusterFactory) -> None:
    """The record names the table: that of the cluster, or that of a part of the run."""
    late = FaultTable(messages_to_delay={CALL: 0.25})
    part = FaultPlan(by_rank={0: FaultTable([CALL], 1)})
    cluster = rpc_cluster(world_size=2, agent="wire", faults=late)
    with pytest.raises(RankDied, match="SIGKILL"), cluster:
        assert cluster.on(0).call(call, 2) == 0
        with cluster.faults(part):
            assert cluster.on(0).call(call, 3) == 3
        with cluster.faults(part):
            cluster.on(0).call(call_and_die, 1)
    assert counts(cluster) == [
        FaultCount(0, "delay", CALL, None, 2, "recorded"),
        FaultCount(0, "failure", CALL, None, 3, "recorded", part=1),
        FaultCount(0, "failure", CALL, None, 1, "recorded", part=2),
    ]


def test_what_lives_is_recorded_as_it_is_counted(rpc_cluster: ClusterFactory) -> None:
    """Where no rank dies, the record agrees with the counts of the ranks, or this would raise."""
    table = FaultTable([CALL], 1, {CALL: 0.25})
    with rpc_cluster(world_size=2, agent="wire", faults=table) as cluster:
        assert cluster.on(0).call(call, 3) == 3
        assert cluster.on(0).call(call, 4) == 1
    assert cluster.outcome.ranks[0].failed_by_type == {CALL: 4}
    assert counts(cluster) == [
        FaultCount(0, "failure", CALL, None, 4, "recorded"),
        FaultCount(0, "delay", CALL, None, 3, "recorded"),
    ]


@pytest.mark.parametrize("reuse", [False, True])
def test_delays_of_a_programs_shutdown_do_not_count(
    rpc_cluster: ClusterFactory, reuse: bool
) -> None:
    """As the model predicts none of them, what only they fire is not taken for fired."""
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable(messages_to_delay={CALL: 0.25, "PYTHON_RREF_FETCH_CALL": 0.25}))
    with own_worlds(rpc_cluster.server):
        outcome = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire", reuse=reuse)
        assert judge(program, plan, outcome) == ()
    fired = {(one.rank, one.message): one.fired for one in account(program, plan, outcome)}
    assert fired[0, "PYTHON_RREF_FETCH_CALL"] == 1
    assert fired[0, CALL] == fired[1, CALL] == 0
    late = [sent for sent in outcome.messages if sent.delayed_by_table and sent.type == CALL]
    assert late
    assert all("leaving" in sent.marks for sent in late)


@pytest.mark.parametrize("agent", ["wire", "faulty_tensorpipe"])
def test_delays_of_a_shutdown_that_hangs_do_not_count(
    rpc_cluster: ClusterFactory, agent: str
) -> None:
    """What ranks say once they hang there is what they had counted before it, as in the record."""
    table = FaultTable(messages_to_delay={CALL: 0.25})
    cluster = rpc_cluster(
        world_size=2,
        agent=agent,
        faults=table,
        shutdown_faults=True,
        leaks="allow",
        deadline=1.0,
    )
    with pytest.raises(RankHung, match="does not shut down"), cluster:
        cluster.on(0).call(start_a_call_without_end)
    if agent == "wire":
        late = [sent.marks for sent in cluster.outcome.messages if sent.delayed_by_table]
        assert ["leaving" in marks for marks in late] == [False, True, True]
    ranks = cluster.outcome.ranks
    assert [rank.delayed_by_type for rank in ranks] == [{CALL: 1}, {}]
    assert [rank.delayed_sends for rank in ranks] == [{250: 1}, {250: 0}]
    assert [(one.rank, one.fired) for one in counts(cluster)] == [(0, 1)]
