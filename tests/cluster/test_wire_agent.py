"""The agent WIRE where things go wrong or last long: its ledger, its holds, its state, commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from rpcprops import FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops.agents.wire.ledger import Ledger
from rpcprops.errors import RankDied, UsageError
from rpcprops.fixture import for_this_rank
from rpcprops.oracle import account
from rpcprops.outcomes import SentMessage
from rpcprops.programs import Drop, Fetch, Program, Remote
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import Artefact, write
from rpcprops.torch_facts import symbols
from tests._wire import needs_wire

pytestmark = needs_wire

#: Real seconds, far above what a command takes.
SECONDS = 150


def _call(times: int) -> list[int]:
    return [rpc.rpc_sync("worker1", abs, (-x,)) for x in range(times)]


def _call_and_die() -> None:
    _call(2)
    os.kill(os.getpid(), signal.SIGKILL)


def _state() -> dict[str, Any]:
    found: dict[str, Any] = symbols.current_agent().state()
    return found


def _held() -> dict[str, Any]:
    """The state of the agent while its first call is held, which a second one lets go."""
    first = rpc.rpc_async("worker1", abs, (-1,))
    while not (seen := _state())["waiting_messages"] and not first.done():
        time.sleep(0.01)
    assert rpc.rpc_sync("worker1", abs, (-2,)) == 2
    assert first.wait() == 1
    return seen


def _at_rest() -> dict[str, Any]:
    """The state once no call is counted: torch counts a call down after its future is done."""
    end = time.monotonic() + 5000.0
    while (seen := _state())["client_active_calls"] and time.monotonic() < end:
        time.sleep(0.01)
    return seen


def _users(messages: tuple[SentMessage, ...]) -> list[SentMessage]:
    return [one for one in messages if "spared" not in one.marks]


def test_what_a_full_ledger_drops_is_counted(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first messages stay whole, the others are counted, and the calls do not notice."""
    monkeypatch.setattr(Ledger.__init__, "__defaults__", (4,))
    with rpc_cluster(world_size=2, agent="wire") as cluster:
        assert cluster.on(0).call(_call, 8) == list(range(8))
    outcome = cluster.outcome
    assert [one.type for one in outcome.messages] == ["PYTHON_CALL", "PYTHON_RET"] * 2
    # Six calls more and their answers, and the handshake of the shutdown.
    assert outcome.messages_dropped >= 12


def test_a_ledger_with_room_has_dropped_nothing(rpc_cluster: ClusterFactory) -> None:
    """Nobody is told of messages that are missing where none is."""
    with rpc_cluster(world_size=2, agent="wire") as cluster:
        cluster.on(0).call(_call, 8)
    assert len(_users(cluster.outcome.messages)) == 16
    assert cluster.outcome.messages_dropped == 0


def test_a_killed_rank_loses_no_record(rpc_cluster: ClusterFactory) -> None:
    """What a rank had sent before SIGKILL is in the outcome, with what became of it."""
    with (
        pytest.raises(RankDied, match="SIGKILL"),
        rpc_cluster(world_size=2, agent="wire") as cluster,
    ):
        cluster.on(0).call(_call_and_die)
    sent = [one for one in _users(cluster.outcome.messages) if one.sender == 0]
    assert [(one.type, one.became) for one in sent] == [("PYTHON_CALL", "answered")] * 2


def test_a_delayed_message_is_written_late(rpc_cluster: ClusterFactory) -> None:
    """It is written when its delay is over, by the clock of its rank, and is not overdue."""
    fault = MessageFault(0, "delay", "PYTHON_CALL", delay=200.0)
    with rpc_cluster(world_size=2, agent="wire", faults=FaultPlan(others=(fault,))) as cluster:
        assert cluster.on(0).call(_call, 1) == [0]
    late = _users(cluster.outcome.messages)[0]
    assert (late.done, late.became, late.marks.count("overdue")) == ("delay", "answered", 0)
    assert late.written is not None
    assert late.written - late.seconds >= 200.0


def test_the_agent_says_what_waits_in_it(rpc_cluster: ClusterFactory) -> None:
    """A message that is held is counted with its call, and nothing is once both have ended."""
    until = NthMessage(0, "PYTHON_CALL", n=2)
    fault = MessageFault(0, "hold", "PYTHON_CALL", delay=3000.0, until=until)
    with rpc_cluster(world_size=2, agent="wire", faults=FaultPlan(others=(fault,))) as cluster:
        seen = cluster.on(0).call(_held)
        after = cluster.on(0).call(_at_rest)
    assert (seen["waiting_messages"], seen["client_active_calls"]) == (1, 1)
    assert after["waiting_messages"] == after["client_active_calls"] == after["retries"] == 0
    assert not any(after["pending_responses"].values())


def test_a_hold_that_nothing_ends_is_overdue(rpc_cluster: ClusterFactory) -> None:
    """A message that waits for another that never comes is sent when its time is up, and marked."""
    fault = MessageFault(
        0, "hold", "PYTHON_CALL", delay=100.0, until=NthMessage(1, "PYTHON_CALL", n=1)
    )
    with rpc_cluster(world_size=2, agent="wire", faults=FaultPlan(others=(fault,))) as cluster:
        assert cluster.on(0).call(_call, 1) == [0]
    held = _users(cluster.outcome.messages)[0]
    assert (held.done, held.became) == ("hold", "answered")
    assert "overdue" in held.marks
    assert held.written is not None
    assert held.written - held.seconds >= 100.0


def _tries(times: int) -> list[bool]:
    """Which of some calls succeed."""
    found = []
    for _ in range(times):
        try:
            rpc.rpc_sync("worker1", abs, (-1,))
        except RuntimeError:
            found.append(False)
        else:
            found.append(True)
    return found


def test_faults_are_armed_for_a_part_of_a_run(rpc_cluster: ClusterFactory) -> None:
    """`Cluster.faults` acts under this agent as under torch's, and the ledger names its victims."""
    with rpc_cluster(world_size=2, agent="wire") as cluster:
        assert cluster.on(0).call(_tries, 1) == [True]
        with cluster.faults(FaultTable(["PYTHON_CALL"], 1)):
            assert cluster.on(0).call(_tries, 2) == [False, True]
        assert cluster.on(0).call(_tries, 1) == [True]
        whole = FaultPlan(others=(MessageFault(0, "lose", "PYTHON_CALL"),))
        with (
            pytest.raises(UsageError, match="cannot be armed for a part of a run"),
            cluster.faults(whole),
        ):
            pass
    requests = [one for one in _users(cluster.outcome.messages) if one.is_request]
    assert [one.failed_by_table for one in requests] == [False, True, False, False]
    (armed,) = cluster.outcome.armed
    assert armed.failed[0] == {"PYTHON_CALL": 1}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("check", "rref-values", "-n", "3", "--agent", "wire"), "holds     rref-values"),
        (("hunt", "-n", "3", "--batch", "3", "--agent", "wire"), ""),
        (("sweep", "create_and_fetch[python]", "--agent", "wire"), ""),
        (("replay", "x.json", "--times", "1", "--no-needed", "--agent", "wire"), "of 1 run"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_run_with_it(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    """Each command that takes --agent runs clean programs of stock torch to the end with it."""
    program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
    made = write(
        Artefact(
            kind="program", subject="x", promise="RRefLeak", program=program, plans=(FaultPlan(),)
        ),
        tmp_path,
    )
    made.replace(tmp_path / "x.json")
    done = subprocess.run(
        [sys.executable, "-m", "rpcprops", *words],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "160", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout


def _join_as(rank: int) -> None:
    one = for_this_rank()
    init_rpc: Any = rpc.init_rpc
    init_rpc(
        f"as{rank}",
        backend=one.rpc_backend,
        rank=rank,
        world_size=one.world_size,
        rpc_backend_options=one.rpc_backend_options,
    )


def _join_turned() -> None:
    one = for_this_rank()
    _join_as((one.rank + 1) % one.world_size)


def _add_twice(to: str) -> list[str]:
    """What two calls show, which torch's own function runs there."""
    said = []
    for number in range(2):
        try:
            said.append(str(rpc.rpc_sync(to, torch.add, (torch.ones(1), number)).item()))
        except (RuntimeError, UnicodeDecodeError):  # the second is the text of an injected failure
            said.append("failed")
    return said


def _make_at(to: str) -> float:
    return float(rpc.remote(to, torch.add, (torch.ones(1), 1)).to_here().item())


def test_ranks_that_take_other_numbers(rpc_cluster: ClusterFactory) -> None:
    """Faults act at the ranks of the cluster, and the record names these, whatever init_rpc gets.

    Rank 0 is rank 1 of the group, rank 1 is rank 2, and rank 2 is rank 0.
    """
    table = FaultTable(["SCRIPT_CALL"], 1)
    lost = MessageFault(2, "fail", "SCRIPT_CALL", to=1, n=2)
    plan = FaultPlan(by_rank={0: table}, others=(lost,))
    with rpc_cluster(world_size=3, agent="wire", init=False, faults=plan) as cluster:
        cluster.each(_join_turned)
        assert cluster.on(0).call(_add_twice, "as2") == ["failed", "failed"]
        assert cluster.on(1).call(_add_twice, "as0") == ["1.0", "2.0"]
        assert cluster.on(2).call(_add_twice, "as1") == ["1.0", "2.0"]
        assert cluster.on(2).call(_add_twice, "as2") == ["1.0", "failed"]
        assert cluster.on(1).call(_make_at, "as1") == 2.0
        cluster.settle()
        cluster.each(rpc.shutdown)
    outcome = cluster.outcome
    calls = [one for one in outcome.messages if one.type == "SCRIPT_CALL"]
    assert [(one.sender, one.receiver) for one in calls] == [
        *[(0, 1)] * 2,
        *[(1, 2)] * 2,
        *[(2, 0)] * 2,
        *[(2, 1)] * 2,
    ]
    answers = [one for one in outcome.messages if one.type == "SCRIPT_RET"]
    assert {(one.sender, one.receiver) for one in answers} == {(2, 1), (0, 2), (1, 2)}
    fired = {count.rank: count.fired for count in account(None, plan, outcome)}
    assert fired == {0: 2, 2: 1}
    assert {(one.sender, one.receiver) for one in outcome.messages if "REMOTE" in one.type} == {
        (1, 0),
        (0, 1),
    }


def test_ranks_that_are_worlds_of_their_own(rpc_cluster: ClusterFactory) -> None:
    """Each process may be rank 0 of a group of one; their messages are told apart."""
    with rpc_cluster(world_size=2, agent="wire", init=False) as cluster:
        cluster.each(_alone)
    calls = [one for one in cluster.outcome.messages if one.type == "SCRIPT_CALL"]
    assert sorted((one.sender, one.receiver) for one in calls) == [(0, 0)] * 2 + [(1, 1)] * 2
    assert len({one.id for one in calls}) == len(calls)


def _alone() -> None:
    one = for_this_rank()
    init_rpc: Any = rpc.init_rpc
    options = one.rpc_backend_options
    with tempfile.NamedTemporaryFile() as file:
        options.init_method = f"file://{file.name}"
        init_rpc("me", backend=one.rpc_backend, rank=0, world_size=1, rpc_backend_options=options)
        _add_twice("me")
        rpc.shutdown()
