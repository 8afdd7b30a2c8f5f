"""Ranks that hang: in which phase, where in their code, and holding what."""

# ruff: noqa: PT012, PT031  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import rpc

import rpcprops
from rpcprops import Counters
from rpcprops import clock as clocks
from rpcprops.errors import RankHung
from rpcprops.fixture import for_this_rank
from rpcprops.programs import Program, Rejoin
from rpcprops.pytest_plugin import ClusterFactory

pytestmark = pytest.mark.usefixtures("nothing_left")

held: list[Any] = []


def sleep_for_ever() -> None:
    time.sleep(1e9)


def keep_the_interpreter_busy() -> None:
    # One C call that never lets another thread run.
    for _ in map(sum, [itertools.repeat(1)]):
        pass


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    # Other threads are stopped a moment later than the one that was given the signal.
    time.sleep(60)


def print_for_ever() -> None:
    while True:
        print("a line that says little\n" * 1000)
        time.sleep(0.001)


def hold_and_sleep() -> None:
    held.append(rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)))
    held[0].to_here()
    sleep_for_ever()


def wait_for_the_other() -> None:
    rpc.rpc_sync("worker1", sleep_for_ever)


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def test_the_answers_to_a_look_that_was_given_up_are_dropped(rpc_cluster: ClusterFactory) -> None:
    """A rank that was stopped for a while answers late, and nothing is kept of that."""
    with rpc_cluster(world_size=2) as cluster:
        pid = cluster.on(1).call(os.getpid)
        os.kill(pid, signal.SIGSTOP)
        assert not cluster._diagnosis.look(wait=0.1)
        assert [channel.silent for channel in cluster.ranks.channels] == [False, True]
        os.kill(pid, signal.SIGCONT)
        assert cluster.snapshot() == (Counters(), Counters())
        for channel in cluster.ranks.channels:
            assert (channel.silent, channel.answers, channel.given_up) == (False, {}, set())


def test_hang_in_a_call(rpc_cluster: ClusterFactory) -> None:
    """A call that sleeps for ever is RankHung in phase run, with its function on the stack."""
    cluster = rpc_cluster(world_size=2, deadline=0.5)
    began = time.monotonic()
    with pytest.raises(RankHung, match=r"worker0 does not answer a call \(phase run") as caught:
        with cluster:
            cluster.on(0).call(sleep_for_ever)
    assert time.monotonic() - began < 10
    assert "in sleep_for_ever" in notes_of(caught.value)
    outcome = cluster.outcome
    phase = outcome.phase("run")
    assert phase is not None
    assert (phase.verdict, phase.ranks) == ("hung", (0,))
    assert "in sleep_for_ever" in outcome.ranks[0].stack
    assert all(rank.killed for rank in outcome.ranks)


def test_hang_in_another_rank(rpc_cluster: ClusterFactory) -> None:
    """The error names the rank that is waited for as well, with the stacks of both."""
    cluster = rpc_cluster(world_size=2, deadline=0.5)
    words = "worker0 does not answer a call; worker1 runs a call for another rank"
    with pytest.raises(RankHung, match=words) as caught, cluster:
        cluster.on(0).call(wait_for_the_other)
    assert "in wait_for_the_other" in cluster.outcome.ranks[0].stack
    assert "in sleep_for_ever" in cluster.outcome.ranks[1].stack
    for words in ("in wait_for_the_other", "in sleep_for_ever"):
        assert words in notes_of(caught.value)


def test_a_stopped_rank_that_another_waits_for(rpc_cluster: ClusterFactory) -> None:
    """The rank that does not even answer a look is blamed, not the one that waits for it."""
    cluster = rpc_cluster(world_size=2, deadline=0.5)
    words = "^RankHung .rank 1.: worker1 does not answer the control channel; worker0 does not"
    with pytest.raises(RankHung, match=words) as caught, cluster:
        cluster.on(0).call(rpc.rpc_sync, "worker1", stop_here)
    assert "in rpc_sync" in notes_of(caught.value)


def join_late() -> None:
    mine = for_this_rank()
    if mine.rank == 1:
        sleep_for_ever()
    module: Any = rpc
    module.init_rpc(
        mine.name,
        backend=mine.rpc_backend,
        rank=mine.rank,
        world_size=mine.world_size,
        rpc_backend_options=mine.rpc_backend_options,
    )


def test_a_rank_that_never_joins_is_blamed(rpc_cluster: ClusterFactory) -> None:
    """Not the one that waits for it in its own init_rpc; both with their lines."""
    cluster = rpc_cluster(world_size=2, init=False, deadline=0.7)
    words = "^RankHung .rank 1.: worker1 did not join the world; worker0 waits for that in init_rpc"
    with pytest.raises(RankHung, match=words) as caught, cluster:
        cluster.each(join_late)
    notes = notes_of(caught.value)
    assert "in sleep_for_ever: time.sleep(1e9)" in notes
    assert "in join_late: module.init_rpc(" in notes


def test_what_a_hung_rank_holds(rpc_cluster: ClusterFactory) -> None:
    """The counters that were last seen are in the outcome of a hang."""
    cluster = rpc_cluster(world_size=2, deadline=0.7)
    with pytest.raises(RankHung, match="worker0"), cluster:
        waiting = cluster.on(0).submit(hold_and_sleep)
        while cluster.snapshot()[1] != Counters(owners=1, forks=1):
            time.sleep(0.01)
        waiting.result()
    assert cluster.outcome.ranks[1].counters == Counters(owners=1, forks=1)


def test_hang_that_holds_the_interpreter(rpc_cluster: ClusterFactory) -> None:
    """A rank that runs C code without end still gives its Python stack."""
    with pytest.raises(RankHung, match="phase run") as caught:
        with rpc_cluster(world_size=1, deadline=0.5) as cluster:
            cluster.on(0).call(keep_the_interpreter_busy)
    assert "in keep_the_interpreter_busy" in notes_of(caught.value)


@pytest.mark.parametrize("hangs", [sleep_for_ever, keep_the_interpreter_busy])
def test_only_a_rank_that_cannot_answer_gets_a_signal(
    rpc_cluster: ClusterFactory, hangs: Callable[[], None]
) -> None:
    """faulthandler may crash a rank whose other threads run Python; it writes into the log."""
    with (
        pytest.raises(RankHung, match="phase run"),
        rpc_cluster(world_size=1, deadline=0.7) as cluster,
    ):
        cluster.on(0).call(hangs)
    (rank,) = cluster.outcome.ranks
    assert f"in {hangs.__name__}" in rank.stack
    assert ("most recent call first" in rank.log) == (hangs is keep_the_interpreter_busy)


def test_hang_in_much_output(rpc_cluster: ClusterFactory) -> None:
    """The stack of a rank that prints without end is found in what it prints."""
    cluster = rpc_cluster(world_size=1, deadline=0.5)
    with pytest.raises(RankHung, match="phase run"), cluster:
        cluster.on(0).call(print_for_ever)
    assert "in print_for_ever" in cluster.outcome.ranks[0].stack
    assert len(cluster.outcome.ranks[0].log) < 3 << 20


def test_hang_in_settle(rpc_cluster: ClusterFactory) -> None:
    """A rank that cannot even answer a look hangs the settle, and the message says that phase."""
    with pytest.raises(RankHung, match=r"worker1 does not answer .*phase settle") as caught:
        with rpc_cluster(world_size=2, deadline=0.5) as cluster:
            cluster.on(1).submit(keep_the_interpreter_busy)
    assert "in keep_the_interpreter_busy" in notes_of(caught.value)


def test_hang_seen_by_a_snapshot(rpc_cluster: ClusterFactory) -> None:
    """A snapshot of a rank that does not answer raises instead of waiting for ever."""
    with pytest.raises(RankHung, match="worker0 does not answer the control channel"):
        with rpc_cluster(world_size=2, deadline=0.5) as cluster:
            cluster.on(0).submit(keep_the_interpreter_busy)
            cluster.snapshot()


def test_stopped_rank(rpc_cluster: ClusterFactory) -> None:
    """A rank that was stopped (SIGSTOP) is a hang too, without a stack, and is killed."""
    cluster = rpc_cluster(world_size=2, deadline=0.5)
    with pytest.raises(RankHung, match="worker0"), cluster:
        cluster.on(0).call(stop_here)
    assert cluster.outcome.ranks[0].killed
    assert not cluster.outcome.ranks[0].stack


def test_stopped_rank_is_sent_much(rpc_cluster: ClusterFactory) -> None:
    """Sending megabytes to a rank that reads nothing ends at the deadline as well."""
    began = time.monotonic()
    with pytest.raises(RankHung, match="worker0"):
        with rpc_cluster(world_size=1, deadline=0.5) as cluster:
            cluster.on(0).submit(stop_here)
            time.sleep(0.2)
            cluster.on(0).call(len, bytes(30_000_000))
    assert time.monotonic() - began < 10


def test_hang_in_shutdown(rpc_cluster: ClusterFactory) -> None:
    """A shutdown that does not end is RankHung in phase shutdown, with its stack."""

    def replace_shutdown(action: Callable[[], None]) -> None:
        module: Any = rpc
        module.shutdown = lambda graceful: action()

    cluster = rpc_cluster(world_size=2, deadline=0.5, clock=100)
    with pytest.raises(RankHung, match=r"does not shut down \(phase shutdown") as caught:
        with cluster:
            cluster.on(1).call(replace_shutdown, sleep_for_ever)
    assert "in sleep_for_ever" in notes_of(caught.value) + cluster.outcome.ranks[1].stack


def test_a_rank_that_leaves_while_a_hang_is_looked_at_has_not_died(
    rpc_cluster: ClusterFactory,
) -> None:
    """It answers no look any more, because it has shut down and exited as it was asked to."""
    cluster = rpc_cluster(world_size=2, init=False)
    cluster.start()
    _, leaves = cluster.ranks.channels
    leaves.exit_number = cluster.ranks.send(leaves, "exit", None)
    until = time.monotonic() + 10
    while not leaves.has_left and time.monotonic() < until:
        cluster.ranks.pump(0.1)
    assert not cluster._diagnosis.look()
    assert not cluster._diagnosis.found
    cluster.kill()


_WAITS_IN_RANKS = """
import sys
import threading
import time

event = threading.Event()
threading.Thread(target=event.wait, daemon=True).start()


def import_that_never_ends():
    time.sleep(1e9)

from rpcprops.errors import UsageError
from rpcprops.fixture import for_this_rank

try:
    for_this_rank()
except UsageError:
    pass
else:
    import_that_never_ends()
"""


def test_hang_at_the_start(
    rpc_cluster: ClusterFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that never joins the world is RankHung in phase start, with its stack."""
    file = tmp_path / "waits_in_ranks.py"
    file.write_text(_WAITS_IN_RANKS, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("waits_in_ranks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "waits_in_ranks", module)
    spec.loader.exec_module(module)
    try:
        with pytest.warns(UserWarning, match="importing waits_in_ranks .*thread"):
            cluster = rpc_cluster.server.make_cluster("waits_in_ranks", world_size=2, deadline=3)
            with pytest.raises(RankHung, match=r"did not join the world \(phase start") as caught:
                with cluster:
                    pass
    finally:
        module.event.set()
    assert "in import_that_never_ends" in notes_of(caught.value)


@pytest.mark.skipif(clocks.library_path() is None, reason="no clock library")
def test_a_hang_that_a_finding_predicts_is_not_waited_for_long() -> None:
    """A step that is known never to end is given up within 3 s; any other is given 3 s to move."""
    program = Program(2, (Rejoin(0, failing="running"),))
    outcome = rpcprops.run(program)
    phase = next(phase for phase in outcome.phases if phase.name == "run")
    assert phase.verdict == "hung"
    assert phase.real_seconds < 2.9
    assert [(step.index, step.ended) for step in outcome.steps] == [(0, False)]
