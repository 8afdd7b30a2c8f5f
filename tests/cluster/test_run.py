"""run(): programs on real ranks, and how their outcomes compare with the oracle's prediction."""

from __future__ import annotations

import pytest

from rpcprops import FaultPlan, FaultTable, MessageType, Program
from rpcprops.cluster import ClusterServer
from rpcprops.cluster.options import ClockChoice
from rpcprops.errors import UsageError
from rpcprops.oracle import accepted, judge, predict
from rpcprops.outcomes import Counters
from rpcprops.programs import Call, Context, Drop, Fetch, Own, Remote, Settle, Share, Step
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner, run

SHARED = Program(
    3,
    (
        Remote(0, 1, "a"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Settle(),
        Drop(0, "a"),
        Fetch(2, "b"),
        Drop(2, "b"),
    ),
)
AUTOGRAD = Program(3, (Context(0, "x", (1, 2)), Settle()))
RETRIED = ("RREF_USER_DELETE", "RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT")


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("message", RETRIED)
def test_failed_sends_match_the_prediction(message: str, count: int) -> None:
    """Failed sends of each retryable RRef message are counted as the message model predicts."""
    plan = FaultPlan(FaultTable([message], count))
    outcome = run(SHARED, plan)
    predicted = [sum(by_type.values()) for by_type in predict(SHARED, plan).failures()]
    assert [rank.failed_sends for rank in outcome.ranks] == predicted
    assert sum(predicted) >= count
    assert judge(SHARED, plan, outcome) == ()
    assert [step.value for step in outcome.steps if step.value] == [[3.0], [3.0]]


@pytest.mark.usefixtures("rpc_cluster")
def test_failed_cleanups_match_the_prediction() -> None:
    """The same for the cleanup of an autograd context, whose sends share one payload."""
    plan = FaultPlan(by_rank={0: FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 2)})
    outcome = run(AUTOGRAD, plan)
    predicted = [sum(by_type.values()) for by_type in predict(AUTOGRAD, plan).failures()]
    assert [rank.failed_sends for rank in outcome.ranks] == predicted
    assert judge(AUTOGRAD, plan, outcome) == ()


@pytest.mark.usefixtures("rpc_cluster")
def test_delays_match_the_prediction() -> None:
    """Delayed sends are counted by length as the message model predicts."""
    lengths = {message: 0.1 + 0.01 * n for n, message in enumerate(MessageType)}
    plan = FaultPlan(FaultTable(messages_to_delay=lengths))
    outcome = run(SHARED, plan)
    if any(rank.delayed_sends is None for rank in outcome.ranks):
        pytest.skip("delays are not visible without the clock library")
    for rank, by_type in enumerate(predict(SHARED, plan).delays(plan)):
        held = plan.table(rank).delaying
        seen = outcome.ranks[rank].delayed_sends or {}
        assert {held[m]: n for m, n in by_type.items() if n} == {k: n for k, n in seen.items() if n}
    assert judge(SHARED, plan, outcome) == ()


FORKS_RETRIED = FaultTable(["RREF_FORK_REQUEST"], 5)


@pytest.mark.parametrize(
    ("steps", "table", "errors"),
    [
        ((Share(0, "a", 2, "b", timeout=5.0),), FORKS_RETRIED, ["", "timeout"]),
        ((Share(0, "a", 2, "b", timeout=100.0),), FORKS_RETRIED, ["", ""]),
        (
            (Share(0, "a", 2, "b", timeout=1.5),),
            FaultTable(messages_to_delay={"RREF_FORK_REQUEST": 3.0}),
            ["", "timeout"],
        ),
        ((Call(0, 2, right="a", timeout=5.0),), FORKS_RETRIED, ["", "timeout"]),
        (
            (Call(0, 2, right="a", timeout=1.5),),
            FaultTable(messages_to_delay={"PYTHON_RREF_FETCH_CALL": 3.0}),
            ["", "timeout"],
        ),
        (
            (Remote(0, 2, "b", right="a", timeout=5.0), Settle(), Fetch(0, "b")),
            FORKS_RETRIED,
            ["", "", "", "creation"],
        ),
    ],
)
def test_a_call_times_out_while_its_callee_waits(
    steps: tuple[Step, ...], table: FaultTable, errors: list[str], rpc_cluster: ClusterFactory
) -> None:
    """Real callees wait for their fork requests, retried or late, before they run what they must.

    So does the prediction, which knows of no other reason for these timeouts.
    """
    program = Program(3, (Remote(0, 1, "a"), *steps))
    plan = FaultPlan(by_rank={2: table})
    assert [step.error for step in predict(program, plan).steps] == errors
    rate = min(20.0, rpc_cluster.server.rate)
    outcome = Runner(rpc_cluster.server).run_anew(program, plan, clock=rate)
    assert judge(program, plan, outcome) == ()
    if errors[-1] == "":
        assert outcome.steps[-1].seconds > 9.0


@pytest.mark.usefixtures("rpc_cluster")
def test_beyond_the_budget_leaks_as_predicted() -> None:
    """Deletes that fail more often than torch tries leave their forks, and the owner says so."""
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 6))
    outcome = run(SHARED, plan)
    assert [rank.counters for rank in outcome.ranks] == list(predict(SHARED, plan).counters)
    assert outcome.ranks[1].shutdown_error is not None
    assert judge(SHARED, plan, outcome) == ()


@pytest.mark.parametrize(
    ("steps", "plan"),
    [
        (
            (Remote(0, 1, "a"), Remote(0, 1, "b", flavour="builtin"), Drop(0, "b")),
            FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE", "PYTHON_REMOTE_CALL"], 2)}),
        ),
        (
            (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(2, "b")),
            FaultPlan(
                by_rank={
                    0: FaultTable(["RREF_USER_DELETE"], 3),
                    2: FaultTable(["RREF_CHILD_ACCEPT"], 6),
                }
            ),
        ),
    ],
)
def test_a_rank_in_a_hurry_fails_as_often_as_it_may(
    steps: tuple[Step, ...], plan: FaultPlan, rpc_cluster: ClusterFactory
) -> None:
    """A creation or an accept was lost, so that nobody waits for the last delete of rank 0."""
    program = Program(3, steps)
    assert predict(program, plan).may_exit_early == {0}
    outcome = Runner(rpc_cluster.server).run_anew(program, plan)
    assert judge(program, plan, outcome) == ()


def test_run_remembers(rpc_cluster: ClusterFactory) -> None:
    """The same program, plan and clock give the same outcome object; anything else runs anew."""
    runner = Runner(rpc_cluster.server)
    program = Program(2, (Call(0, 1),))
    first = runner.run(program)
    assert runner.run(Program(2, (Call(0, 1),)), FaultPlan()) is first
    assert runner.run(program, FaultTable()) is first
    others = [
        runner.run(program, FaultTable(["RREF_USER_DELETE"], 1)),
        runner.run(program, clock="real"),
        runner.run(program, world_size=3),
        runner.run(program, transport="shm"),
        runner.run_anew(program),
    ]
    assert all(other is not first for other in others)
    assert others[2].world_size == 3
    assert others[3].transport == "shm"
    assert runner.run(program) is first


def test_run_uses_the_server_of_the_session(rpc_cluster: ClusterFactory) -> None:
    """In pytest `run` and `rpc_cluster` share one server, so that a process has one."""
    from rpcprops.runner import default_runner

    assert default_runner().server is rpc_cluster.server


@pytest.mark.usefixtures("rpc_cluster")
def test_world_too_small() -> None:
    """A world smaller than the program's is refused before anything starts."""
    with pytest.raises(UsageError, match=r"world_size=2.*needs 3 ranks"):
        run(SHARED, world_size=2)


@pytest.mark.usefixtures("rpc_cluster")
def test_idle_ranks_change_nothing() -> None:
    """More ranks than the program needs stay idle and hold nothing."""
    outcome = run(SHARED, world_size=5)
    assert judge(SHARED, FaultPlan(), outcome) == ()
    assert len(outcome.ranks) == 5
    assert outcome.ranks[4].calls == {}


def test_own_server_of_a_runner() -> None:
    """A Runner on a server that was not started says what to do."""
    with pytest.raises(UsageError, match="not running"):
        Runner(ClusterServer(clock="real")).run(SHARED)


_SLOW_FETCH = FaultPlan(by_rank={1: FaultTable(messages_to_delay={"SCRIPT_RREF_FETCH_CALL": 3.0})})
_SLOW_FORK = FaultPlan(by_rank={1: FaultTable(["RREF_FORK_REQUEST"], 3)})


@pytest.mark.parametrize("clock", ["auto", "real"])
@pytest.mark.parametrize(
    ("program", "plan"),
    [
        (
            Program(2, (Own(0, "o"), Remote(0, 1, "a", right="o", timeout=1), Fetch(0, "a"))),
            _SLOW_FETCH,
        ),
        (
            Program(
                2, (Own(0, "o"), Remote(0, 1, "a", right="o", timeout=1), Share(0, "a", 1, "b"))
            ),
            _SLOW_FETCH,
        ),
        (
            Program(
                3,
                (
                    Own(2, "o"),
                    Share(2, "o", 0, "p"),
                    Remote(0, 1, "a", right="p", timeout=1),
                    Fetch(0, "a"),
                ),
            ),
            _SLOW_FORK,
        ),
    ],
    ids=["fetched", "shared", "late fork request"],
)
def test_an_rref_may_be_used_before_its_timeout_is_handled(
    rpc_cluster: ClusterFactory, program: Program, plan: FaultPlan, clock: ClockChoice
) -> None:
    """Torch documents that such a use may raise nothing, so neither outcome is a violation."""
    assert len(predict(program, plan).alternatives) == 1
    outcome = Runner(rpc_cluster.server).run_anew(program, plan, clock=clock)
    assert judge(program, plan, outcome) == ()
    kinds = [one.kind for one in accepted(program, plan, outcome)]
    raised = outcome.steps[-1].error is not None
    assert ("timed-out-rref-used" in kinds) is not raised


def test_a_context_that_shutdown_leaves_behind_is_seen(rpc_cluster: ClusterFactory) -> None:
    """Its cleanup was waiting for its next try; torch's counter outlives the agent."""
    program = Program(2, (Context(0, "x", (1,)),), settles=False)
    # Three failures are over after 9 ms of a fast clock, and a shutdown may take longer than that.
    # Twenty are over after 11 s.
    plan = FaultPlan(by_rank={0: FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 20)})
    outcome = Runner(rpc_cluster.server).run_anew(program, plan)
    assert judge(program, plan, outcome) == ()
    after = [rank.counters_after_shutdown for rank in outcome.ranks]
    assert after == [Counters(), Counters(contexts=1)]
    # A shutdown that a busy machine holds up may have another documented effect as well.
    seen = {(one.kind, one.rank) for one in accepted(program, plan, outcome)}
    assert ("context-left-by-shutdown", 1) in seen
    # Without the fault nothing stays, so the same counter is a leak.
    clean = Runner(rpc_cluster.server).run_anew(program)
    assert judge(program, None, clean) == ()
    assert [rank.counters_after_shutdown for rank in clean.ranks] == [Counters(), Counters()]
    assert [v.promise for v in judge(program, None, outcome)] == ["ContextLeak"]
