"""The agent WIRE on real ranks: its ledger, and what each kind of message fault does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import rpc

from rpcprops import FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops._hunt import Order, run_order
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.agents.wire import build
from rpcprops.cluster import Cluster
from rpcprops.errors import BrokenPromise, MachineCannot, RankHung, RRefLeak
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.programs import (
    Call,
    Context,
    Drop,
    Fetch,
    Program,
    Remote,
    Retry,
    Settle,
    Share,
)
from rpcprops.properties import PROPERTIES, examine, held_case
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner, run
from rpcprops.torch_facts import facts_of
from tests._wire import needs_wire

pytestmark = needs_wire

_ran = [0]


def _bump(x: int) -> int:
    _ran[0] += 1
    return x + 1


def _count() -> int:
    return _ran[0]


def _call(times: int, timeout: float) -> list[int | str]:
    found: list[int | str] = []
    for x in range(times):
        try:
            found.append(rpc.rpc_sync("worker1", _bump, (x,), timeout=timeout))
        except RuntimeError as error:
            found.append(str(error))
    return found


def _two_calls() -> tuple[int, int]:
    first = rpc.rpc_async("worker1", _bump, (0,))
    second = rpc.rpc_async("worker1", abs, (-3,))
    return first.wait(), second.wait()


def _made(rpc_cluster: ClusterFactory, *faults: MessageFault, **others: object) -> Cluster:
    plan = FaultPlan(others=faults)
    return rpc_cluster(world_size=2, agent="wire", faults=plan, **others)  # type: ignore[arg-type]


def test_every_message_is_recorded_with_what_became_of_it(rpc_cluster: ClusterFactory) -> None:
    """The ledger has a request and its response under one id, and how the request ended."""
    with _made(rpc_cluster) as cluster:
        assert cluster.on(0).call(_call, 1, 1000.0) == [1]
    sent = [one for one in cluster.outcome.messages if "spared" not in one.marks]
    request, response = sent
    assert (request.type, response.type) == ("PYTHON_CALL", "PYTHON_RET")
    assert request.id == response.id
    assert (request.became, request.processed, response.became) == ("answered", 1, "written")
    assert (response.sender, response.receiver) == (1, 0)


def test_ids_name_the_sender(rpc_cluster: ClusterFactory) -> None:
    """The rank that sent a request stands in the bits of its id above the 40th."""
    with _made(rpc_cluster) as cluster:
        cluster.on(0).call(_call, 2, 1000.0)
    requests = [one for one in cluster.outcome.messages if one.is_request]
    assert all(one.id >> 40 == one.sender for one in requests)
    assert len({one.id for one in requests}) == len(requests)


def test_a_table_does_what_it_does_under_torchs_agent(rpc_cluster: ClusterFactory) -> None:
    """Both agents count, fail and delay the same sends of one table."""
    table = FaultTable(["PYTHON_CALL"], 1, {"PYTHON_CALL": 0.5})
    shown = []
    for agent in ("FAULTY_TENSORPIPE", "wire"):
        with rpc_cluster(world_size=2, agent=agent, faults=table) as cluster:
            said = cluster.on(0).call(_call, 2, 1000.0)
        rank = cluster.outcome.ranks[0]
        if rank.sent is None:
            pytest.skip("this build of torch's agent cannot be counted")
        shown.append((said, rank.sent, rank.failed_by_type, rank.delayed_by_type))
    assert shown[0] == shown[1]
    assert "Send attempt failed intentionally" in str(shown[0][0][0])


def test_a_lost_response_leaves_a_timeout_after_one_execution(rpc_cluster: ClusterFactory) -> None:
    """The function runs, its caller gets a timeout, and the next call works."""
    with _made(rpc_cluster, MessageFault(1, "lose", "PYTHON_RET")) as cluster:
        first, second = cluster.on(0).call(_call, 2, 100.0)
        assert cluster.on(1).call(_count) == 2
    assert "ran for more than set timeout" in str(first)
    assert second == 2
    (lost,) = [one for one in cluster.outcome.messages if one.done]
    assert (lost.done, lost.became, lost.written) == ("lose", "lost", None)


def _call_once() -> int:
    return int(rpc.rpc_sync("worker1", abs, (-3,)))


def _make_and_drop() -> None:
    rpc.remote("worker1", dict).to_here()


@pytest.mark.parametrize(
    ("lost", "call", "broken"),
    [("PYTHON_RET", _call_once, RankHung), ("RREF_ACK", _make_and_drop, RRefLeak)],
)
def test_a_wait_for_what_is_lost_names_the_timeout(
    rpc_cluster: ClusterFactory,
    lost: str,
    call: Callable[[], object],
    broken: type[BrokenPromise],
) -> None:
    """Torch would notice it after the cluster's timeout, a day unless a shorter one is given."""
    with pytest.raises(broken) as caught:
        with _made(rpc_cluster, MessageFault(1, "lose", lost), deadline=1) as cluster:
            cluster.on(0).call(call)
    notes = "\n".join(caught.value.__notes__)
    assert f"A fault lost the {lost} from rank 1 to rank 0." in notes
    assert "That of the cluster is 86400 virtual seconds: give it a shorter one" in notes


def test_a_request_that_comes_twice_is_executed_twice(rpc_cluster: ClusterFactory) -> None:
    """Both copies are whole; the second answer is swallowed, so the caller sees one."""
    fault = MessageFault(0, "duplicate", "PYTHON_CALL")
    with _made(rpc_cluster, fault) as cluster:
        assert cluster.on(0).call(_call, 1, 1000.0) == [1]
        assert cluster.on(1).call(_count) == 2
    twice, *answers = [one for one in cluster.outcome.messages if one.id == 0]
    assert twice.processed == 2
    assert sorted("swallowed" in one.marks for one in answers) == [False, True]
    assert {one.type for one in answers} == {"PYTHON_RET"}


def test_a_held_request_goes_after_the_other_was_answered(rpc_cluster: ClusterFactory) -> None:
    """The first call is written only when the answer to the second has come."""
    until = NthMessage(0, "PYTHON_CALL", n=2)
    fault = MessageFault(0, "hold", "PYTHON_CALL", delay=3000.0, until=until)
    with _made(rpc_cluster, fault) as cluster:
        assert cluster.on(0).call(_two_calls) == (1, 3)
    calls = [one for one in cluster.outcome.messages if one.sender == 0 and one.is_request]
    held, other = calls[:2]
    assert held.done == "hold"
    assert "overdue" not in held.marks
    assert held.written is not None
    assert other.ended is not None
    assert held.written > other.ended


def test_the_nth_message_fails_and_no_other(rpc_cluster: ClusterFactory) -> None:
    """Messages are counted from 1 at their sender."""
    with _made(rpc_cluster, MessageFault(0, "fail", "PYTHON_CALL", n=2)) as cluster:
        first, second, third = cluster.on(0).call(_call, 3, 1000.0)
    assert (first, third) == (1, 3)
    assert "Send attempt failed intentionally" in str(second)


def _rearm_and_disarm() -> list[int | str]:
    from rpcprops.agents.wire.wire import library

    agent: Any = rpc.api._get_current_rpc_agent()  # type: ignore[attr-defined]
    number = library().arm(["PYTHON_CALL"], 1, {}, 1)
    agent.rearm(["PYTHON_CALL"], 1, {}, [])
    for forgotten in range(number + 1):
        library().disarm(forgotten)
    return _call(2, 1000.0)


def test_the_end_of_an_old_agent_leaves_the_tables_of_the_next(rpc_cluster: ClusterFactory) -> None:
    """What was forgotten with the faults of a former program cannot be disarmed any more."""
    with _made(rpc_cluster) as cluster:
        said = cluster.on(0).call(_rearm_and_disarm)
    assert ["Send attempt failed intentionally" in str(one) for one in said] == [True, True]


@pytest.mark.usefixtures("rpc_cluster")
def test_the_record_shows_that_what_is_tried_again_is_empty() -> None:
    """A fork request that timed out is sent again without its payload (retried-without-payload)."""
    outcome = run(Program(2, (Retry(0, 1, 0, timeout=8.0),)), agent="wire")
    first, *more = [one.size for one in outcome.messages if one.type == "RREF_FORK_REQUEST"]
    assert first
    assert more
    is_kept = not facts_of(outcome.torch_version).has_bug("retried-without-payload")
    assert set(more) == {first if is_kept else 0}


def test_without_a_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Where nothing is built and CXX names no compiler, the error names it and the remedy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(MachineCannot, match=r"no-such-compiler.*install g\+\+"):
        build.built()


_HELD_RUNS = (
    *((name, 20) for name in ("timed-out-remote-dropped", "shutdown-overtakes-creation")),
    *((name, 20) for name in ("early-owner-fork", "shutdown-deletes-argument")),
    ("fetch-after-delete", 5),
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("timed-out-remote-dropped", 20),
        *(
            pytest.param(name, number, marks=pytest.mark.nightly)
            for name, times in _HELD_RUNS
            for number in range(times)
        ),
    ],
)
def test_a_hold_shows_a_finding_in_every_run(
    rpc_cluster: ClusterFactory, name: str, number: int
) -> None:
    """What two messages show in one order of the two shows each time, and nothing else does."""
    case = held_case(name, number, rpc_cluster.server.rate)
    assert case is not None
    seen = Runner(rpc_cluster.server).run_anew(case.program, case.plan, agent="wire")
    broken = judge(case.program, case.plan, seen)
    met = predict_for(case.program, case.plan, seen).met
    assert set_apart(case.program, met, seen, broken) == ((name,), ())


def test_what_is_reported_of_a_hold_holds_in_a_fast_replay(rpc_cluster: ClusterFactory) -> None:
    """Its plan holds the message for real seconds at the rate at which a replay runs it."""
    finding = PROPERTIES["timed-out-remote-dropped"]
    result = examine(finding, Runner(rpc_cluster.server), max_examples=2)
    assert result.failure is not None
    assert result.failure.outcome.clock_rate == rpc_cluster.server.rate
    (hold,) = result.failure.case.plan.others
    assert isinstance(hold, MessageFault)
    assert hold.delay >= rpc_cluster.server.rate


def test_a_settle_waits_for_what_is_held(rpc_cluster: ClusterFactory) -> None:
    """A creation that has timed out and is held comes at last, as a settle expects."""
    program = Program(2, (Remote(0, 1, "a", timeout=0.5),))
    until = NthMessage(0, "RREF_USER_DELETE")
    fault = MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=500.0, until=until)
    plan = FaultPlan(others=(fault,))
    seen = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire")
    assert any("overdue" in sent.marks for sent in seen.messages)
    assert judge(program, plan, seen) == ()


def test_a_hunt_draws_message_faults(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of a hunt with this agent has them, and they act."""
    monkeypatch.setattr(rpc_cluster.server, "agent", WIRE)
    order = Order("drawn-message-faults", 0, "tcp", 3)
    batch = run_order(order, Runner(rpc_cluster.server))
    assert (batch.agent, batch.verdict, batch.failure) == (WIRE, "holds", [])
    assert len(batch.cases) == 3
    assert any(name.startswith("message") for name in batch.fired_by_type)


#: Messages that users send and that torch sends by itself; the last step leaves a delete.
_PROGRAM = Program(
    2, (Call(0, 1), Remote(0, 1, "a"), Fetch(0, "a"), Context(0, "x", (1,)), Drop(0, "a"))
)
_POINTS = (
    MessageFault(0, "fail", "PYTHON_CALL", to=1),
    MessageFault(0, "duplicate", "PYTHON_CALL", to=1),
    MessageFault(0, "fail", "FORWARD_AUTOGRAD_REQ", to=1),
    MessageFault(1, "fail", "BACKWARD_AUTOGRAD_REQ", to=0),
    MessageFault(0, "duplicate", "RREF_USER_DELETE", to=1),
    MessageFault(1, "delay", way="response", which="every", delay=0.5),
)
#: These wait for the timeout, which takes seconds.
_LOST = (
    MessageFault(0, "lose", "PYTHON_CALL", to=1),
    MessageFault(1, "lose", "PYTHON_RET", to=0),
    MessageFault(0, "lose", "PYTHON_RREF_FETCH_CALL"),
    MessageFault(1, "lose", "FORWARD_AUTOGRAD_RESP"),
    MessageFault(0, "lose", "BACKWARD_AUTOGRAD_REQ", to=1),
    MessageFault(1, "lose", "BACKWARD_AUTOGRAD_RESP", to=0),
    MessageFault(0, "lose", "CLEANUP_AUTOGRAD_CONTEXT_REQ"),
    MessageFault(0, "lose", "RREF_USER_DELETE"),
    MessageFault(1, "lose", "CLEANUP_AUTOGRAD_CONTEXT_RESP"),
    *(
        MessageFault(rank, "delay", kind, delay=75.0)
        for rank, kind in (
            (0, "PYTHON_RREF_FETCH_CALL"),
            (0, "FORWARD_AUTOGRAD_REQ"),
            (0, "CLEANUP_AUTOGRAD_CONTEXT_REQ"),
            (1, "CLEANUP_AUTOGRAD_CONTEXT_RESP"),
            (0, "RREF_USER_DELETE"),
        )
    ),
)


@pytest.mark.parametrize(
    "fault", [*_POINTS, *(pytest.param(fault, marks=pytest.mark.nightly) for fault in _LOST)]
)
def test_a_program_shows_what_is_predicted_under_a_message_fault(
    rpc_cluster: ClusterFactory, fault: MessageFault
) -> None:
    """The fault acts, and steps, counters, calls, logs and the record are as the oracle says."""
    plan = FaultPlan(others=(fault,))
    program = replace(_PROGRAM, rpc_timeout=70.0) if fault in _LOST else _PROGRAM
    seen = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire")
    assert any(sent.done for sent in seen.messages)
    broken = judge(program, plan, seen)
    met = predict_for(program, plan, seen).met
    assert set_apart(program, met, seen, broken)[1] == ()


def test_a_share_that_comes_too_late_brings_its_handle_once(rpc_cluster: ClusterFactory) -> None:
    """Its sender drops the RRef meanwhile, and the value stays until the receiver has used it."""
    steps = (
        Remote(0, 1, "a"),
        Settle(),
        Share(0, "a", 2, "b", timeout=2.0),
        Drop(0, "a"),
        Settle(),
        Fetch(2, "b"),
        Drop(2, "b"),
    )
    plan = FaultPlan(others=(MessageFault(0, "delay", "PYTHON_CALL", to=2, delay=9.0),))
    seen = Runner(rpc_cluster.server).run_anew(Program(3, steps), plan, agent="wire")
    assert judge(Program(3, steps), plan, seen) == ()
    assert [bool(step.error) for step in seen.steps] == [n == 2 for n in range(7)]


def test_each_try_of_real_ranks_is_promised(rpc_cluster: ClusterFactory) -> None:
    """Of the true record nothing is said; a try more or less of each type is missed."""
    retried = ["RREF_FORK_REQUEST", "RREF_USER_DELETE", "CLEANUP_AUTOGRAD_CONTEXT_REQ"]
    plan = FaultPlan(FaultTable(retried, 3))
    steps = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Context(0, "x", (1, 2)), Drop(0, "a"))
    program = Program(3, steps)
    seen = Runner(rpc_cluster.server).run_anew(program, plan, agent="wire")
    assert judge(program, plan, seen) == ()
    again = {(one.type, one.sender): one for one in seen.messages if one.retry}
    assert {name for name, _ in again} == {*retried}
    for (name, rank), one in again.items():
        tries = sum((sent.type, sent.sender) == (name, rank) for sent in seen.messages)
        less = tuple(sent for sent in seen.messages if sent is not one)
        more = (*seen.messages, replace(one, id=1 << 30, became="failed"))
        for number, messages in ((tries - 1, less), (tries + 1, more)):
            said = [v.message for v in judge(program, plan, replace(seen, messages=messages))]
            words = f"the record shows {number} {name} from rank {rank} with all tries"
            assert any(message.startswith(words) for message in said), said
