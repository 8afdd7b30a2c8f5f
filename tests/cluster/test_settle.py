"""Settling: who holds what, what is expected, and what counts as a leak."""

# ruff: noqa: PT012  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc

from rpcprops import RETRYABLE_MESSAGE_TYPES, Counters, FaultPlan, FaultTable
from rpcprops.errors import BrokenPromise, ContextLeak, OwnerGone, RRefLeak, UsageError
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.steps.in_rank.state import note_call

held: list[Any] = []


def hold(to: str) -> None:
    held.append(rpc.remote(to, torch.add, args=(torch.ones(1), 1)))


def drop() -> None:
    held.clear()


def fetch() -> float:
    return float(held[0].to_here().item())


def open_context() -> None:
    context = dist_autograd.context()
    context.__enter__()
    held.append(context)


def close_context() -> None:
    held.pop().__exit__(None, None, None)


def run_later(seconds: float) -> None:
    """Run a call after some virtual seconds in which no counter shows it."""
    threading.Timer(seconds, note_call, ("late",)).start()


OWNED = (Counters(), Counters(owners=1, forks=1))


def test_settle_names_the_owner(rpc_cluster: ClusterFactory) -> None:
    """An RRef that is kept is a leak at its owner; settle raises it and the end repeats it."""
    cluster = rpc_cluster(world_size=2)
    with pytest.raises(RRefLeak, match="worker1 holds 1 owner, 1 fork; expected nothing"):
        with cluster:
            cluster.on(0).call(hold, "worker1")
            with pytest.raises(RRefLeak, match=r"\(rank 1\)"):
                cluster.settle()
    outcome = cluster.outcome
    assert outcome.ranks[1].counters == OWNED[1]
    phase = outcome.phase("settle")
    assert phase is not None
    assert phase.verdict == "failed"
    assert outcome.phase("shutdown") is None
    assert all(rank.killed for rank in outcome.ranks)


def test_the_end_settles(rpc_cluster: ClusterFactory) -> None:
    """Leaving the with block finds what was never settled."""
    with pytest.raises(RRefLeak, match="worker1 holds 1 owner, 1 fork"):
        with rpc_cluster(world_size=2) as cluster:
            cluster.on(0).call(hold, "worker1")


def test_every_leak_is_named(rpc_cluster: ClusterFactory) -> None:
    """Leaks at two ranks, of two kinds, are all in the message; the first decides the class."""
    with pytest.raises(RRefLeak) as caught:
        with rpc_cluster(world_size=3) as cluster:
            cluster.on(0).call(hold, "worker1")
            cluster.on(1).call(hold, "worker2")
            cluster.on(2).call(open_context)
    text = str(caught.value)
    assert re.search(r"^RRefLeak \(rank 1\): worker1 holds", text, re.MULTILINE)
    assert re.search(r"^RRefLeak \(rank 2\): worker2 holds", text, re.MULTILINE)
    assert re.search(r"^ContextLeak \(rank 2\): .* 1 context", text, re.MULTILINE)


def test_settle_waits_for_what_is_expected(rpc_cluster: ClusterFactory) -> None:
    """`expect=` lets named counters stay, under faults too; a later settle finds them gone."""
    faults = FaultTable(RETRYABLE_MESSAGE_TYPES, 3)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(hold, "worker1")
        assert cluster.settle(expect=OWNED) == OWNED
        assert cluster.snapshot() == OWNED
        assert cluster.on(0).call(fetch) == 2.0
        cluster.on(0).call(drop)
        assert cluster.settle() == (Counters(), Counters())
    assert cluster.outcome.ranks[0].failed_sends == 3


def test_less_than_expected_is_an_owner_gone(rpc_cluster: ClusterFactory) -> None:
    """Expecting an owner that is not there raises OwnerGone."""
    with pytest.raises(OwnerGone, match="worker1 holds nothing; expected 1 owner, 1 fork"):
        with rpc_cluster(world_size=2) as cluster:
            cluster.settle(expect=OWNED)


NEGATIVE = (Counters(), Counters(owners=-1))
TEXT: Any = (Counters(), Counters(contexts="one"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "expect", [(), (Counters(),), (Counters(),) * 3, (Counters(), None), 5, NEGATIVE, TEXT]
)
def test_bad_expectations(rpc_cluster: ClusterFactory, expect: Any) -> None:
    """An expectation that is no counters for each rank is refused, and the cluster goes on."""
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(UsageError, match="expect"):
            cluster.settle(expect=expect)
        cluster.settle()


def test_context_left_open(rpc_cluster: ClusterFactory) -> None:
    """An autograd context that is never left is a ContextLeak at its rank."""
    with pytest.raises(ContextLeak, match="worker0 holds 1 context; expected nothing"):
        with rpc_cluster(world_size=2) as cluster:
            cluster.on(0).call(open_context)
            cluster.settle()


def test_context_closed_in_a_later_call(rpc_cluster: ClusterFactory) -> None:
    """A context that another call leaves is no leak."""
    with rpc_cluster(world_size=2) as cluster:
        cluster.on(0).call(open_context)
        assert cluster.snapshot()[0].contexts == 1
        cluster.on(0).call(close_context)
        cluster.settle()


def test_allowed_leaks_pass(rpc_cluster: ClusterFactory) -> None:
    """With leaks="allow" what is held until the exit passes, and every rank exits with 0."""
    with rpc_cluster(world_size=3, leaks="allow") as cluster:
        cluster.on(0).call(hold, "worker1")
        cluster.on(1).call(hold, "worker2")
        one = Counters(owners=1, forks=1)
        cluster.settle(expect=(Counters(), one, one))
    assert [rank.exit_code for rank in cluster.outcome.ranks] == [0, 0, 0]


def test_allowed_leaks_are_raised_by_settle(rpc_cluster: ClusterFactory) -> None:
    """With leaks="allow" settle, when asked, still says who holds what."""
    with pytest.raises(RRefLeak, match="worker1"):
        with rpc_cluster(world_size=2, leaks="allow") as cluster:
            cluster.on(0).call(hold, "worker1")
            cluster.settle()


def test_snapshots_disturb_nothing(rpc_cluster: ClusterFactory) -> None:
    """Looking sends no RPC: neither a fault on PYTHON_CALL nor an open context notices it."""
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_CALL": 2.0})})
    with rpc_cluster(world_size=2, faults=plan) as cluster:
        cluster.on(0).call(open_context)
        for _ in range(5):
            assert [held.contexts for held in cluster.snapshot()] == [1, 0]
        cluster.on(0).call(close_context)
        cluster.settle()
        delayed = cluster.outcome.ranks[0].delayed_sends
        if delayed is not None:
            assert delayed == {2000: 0}


def test_looking_works_while_a_call_runs(rpc_cluster: ClusterFactory) -> None:
    """A snapshot is answered while the rank's main thread waits in a call."""
    with rpc_cluster(world_size=2, clock="real") as cluster:
        waiting = cluster.on(0).submit(rpc.rpc_sync, "worker1", torch.add, (torch.ones(1), 1))
        assert len(cluster.snapshot()) == 2
        assert waiting.result().item() == 2.0


def test_cleanup_retries_are_waited_for(rpc_cluster: ClusterFactory) -> None:
    """A context whose cleanup fails three times at first is still gone from its peer."""

    def use_context() -> None:
        with dist_autograd.context():
            leaf = torch.ones(2, requires_grad=True)
            rpc.rpc_sync("worker1", torch.mul, args=(leaf, 2.0))

    faults = FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 3)
    with rpc_cluster(world_size=2, faults=faults) as cluster:
        cluster.on(0).call(use_context)
        cluster.settle()
    assert cluster.outcome.ranks[0].failed_sends == 3
    assert [rank.exit_code for rank in cluster.outcome.ranks] == [0, 0]


def test_a_call_that_no_counter_shows_is_waited_for(rpc_cluster: ClusterFactory) -> None:
    """A call that its caller has given up is counted nowhere while it is on its way."""
    with rpc_cluster(world_size=2, clock="real") as cluster:
        cluster.on(1).call(run_later, 0.3)
        held = cluster.settle_to(None, calls=({}, {"late": 1}))
        assert held == (Counters(), Counters())
        assert cluster.outcome.ranks[1].calls == {"late": 1}
        assert not cluster.has_found


def test_a_call_that_never_comes_ends_no_settle_for_ever(rpc_cluster: ClusterFactory) -> None:
    """Whether it had to come is for the judge; what is held is still told."""
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.settle_to(None, calls=({}, {"lost": 1})) == (Counters(), Counters())
        assert not cluster.has_found
        phase = cluster.outcome.phase("settle")
        assert phase is not None
        assert phase.verdict == "ok"
        assert phase.real_seconds < 5 + cluster.deadlines.unseen


@pytest.mark.parametrize(
    ("to", "error"),
    [(["worker1"], ""), (["worker1", "worker1"], "RRefLeak"), ([], "OwnerGone")],
    ids=["exactly", "more", "less"],
)
def test_a_known_leak(rpc_cluster: ClusterFactory, to: list[str], error: str) -> None:
    """With Counters as leaks, more and less than they say are failures, and exactly it is none."""
    cluster = rpc_cluster(world_size=2, leaks=OWNED)
    if not error:
        with cluster:
            for name in to:
                cluster.on(0).call(hold, name)
        assert [rank.exit_code for rank in cluster.outcome.ranks] == [0, 0]
        return
    with pytest.raises(BrokenPromise, match="expected 1 owner, 1 fork") as caught:
        with cluster:
            for name in to:
                cluster.on(0).call(hold, name)
    assert type(caught.value).__name__ == error
