"""PyTorch's own RPC suites, unchanged, on our fixture and our ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from rpcprops.agents import Agent
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import account, fired
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from rpcprops.upstream._examine import failures_of, run_under_faults, run_without_faults
from rpcprops.upstream._ranks import DEFAULT_RATE, Seen, UpstreamCase, UpstreamRanks
from rpcprops.upstream.data import UpstreamTest
from tests._wire import needs_wire

#: Of torch 2.13, by torch's own count of its classes.
SUITES = {
    "RpcTest": 215,
    "ParameterServerTest": 1,
    "DistAutogradTest": 63,
    "DistOptimizerTest": 4,
    "JitRpcTest": 54,
    "JitDistAutogradTest": 4,
    "RemoteModuleTest": 13,
    "ThreeWorkersRemoteModuleTest": 3,
    "DdpUnderDistAutogradTest": 4,
    "DdpComparisonTest": 4,
    "ReinforcementLearningRpcTest": 1,
    "TensorPipeAgentRpcTest": 39,
    "TensorPipeAgentDistAutogradTest": 31,
    "FaultyAgentRpcTest": 20,
    "FaultyAgentDistAutogradTest": 2,
    "JitFaultyAgentRpcTest": 6,
}
#: One of each kind: what it needs of ranks that a plain call does not.
IN_CI = (
    "FaultyAgentRpcTest::test_check_failed_messages",
    "FaultyAgentRpcTest::test_rpc_builtin_timeout",
    "FaultyAgentDistAutogradTest::test_context_cleanup_tensor_with_grad",
    "JitFaultyAgentRpcTest::test_timeout_in_torchscript_function",
    # World sizes of their own, a process group next to RPC, and a store by name.
    "DdpUnderDistAutogradTest::test_backward_no_ddp",
    "DdpComparisonTest::test_ddp_comparison",
    # Ranks that leave while others wait for them to be gone.
    "DistAutogradTest::test_backward_node_failure",
    # A rank that leaves by sys.exit.
    "DistAutogradTest::test_backward_without_context",
    # Events of several ranks in the order of one clock.
    "RpcTest::test_profiler_with_sync_rpc_builtin_single_threaded",
    # Options of the plain agent, and its type.
    "TensorPipeAgentRpcTest::test_infer_backend_from_options",
)


#: One of each kind of suite. One has two agents in a process, two have tables, one a dynamic group.
ON_THE_WIRE = (
    "RpcTest::test_init_rpc_twice",
    "FaultyAgentRpcTest::test_check_failed_messages",
    "FaultyAgentRpcTest::test_rpc_builtin_timeout",
    "TensorPipeAgentRpcTest::test_dynamic_rpc_existing_rank_can_communicate_with_new_rank",
)
#: The tests that name an agent.
ASKING = {
    "TensorPipeAgentRpcTest::test_dynamic_rpc_init_rpc_without_rank": "TENSORPIPE",
    "TensorPipeAgentRpcTest::test_infer_backend_from_options": "TENSORPIPE",
    "TensorPipeAgentRpcTest::test_mismatched_type_for_options": "TENSORPIPE",
    "TensorPipeAgentRpcTest::test_set_and_get_num_worker_threads": "TENSORPIPE",
    "TensorPipeAgentRpcTest::test_tensorpipe_options_throw_on_timedelta_timeout": "TENSORPIPE",
    "TensorPipeAgentRpcTest::test_tensorpipe_set_default_timeout": "TENSORPIPE",
    "FaultyAgentRpcTest::test_verify_backend_options": "FAULTY_TENSORPIPE",
    "FaultyAgentDistAutogradTest::test_verify_backend_options": "FAULTY_TENSORPIPE",
}


@pytest.fixture(scope="module")
def ranks(rpc_cluster: ClusterFactory) -> UpstreamRanks:
    return UpstreamRanks(rpc_cluster.server)


@pytest.fixture(scope="module")
def on_the_wire(rpc_cluster: ClusterFactory) -> UpstreamRanks:
    return UpstreamRanks(rpc_cluster.server, "wire")


def test_the_suites_are_whole(ranks: UpstreamRanks) -> None:
    """The wheel's classes and the number of their tests are those of torch 2.13."""
    found = Counter(test.suite for test in ranks.tests() if test.agent != "cuda")
    assert found == SUITES
    assert found.total() == 464


def test_cuda_suites_are_not_applicable(ranks: UpstreamRanks) -> None:
    """Tests that need devices are listed, each with the reason why it does not run."""
    cuda = [test for test in ranks.tests() if test.agent == "cuda"]
    assert len(cuda) == 99
    result = run_without_faults(ranks, cuda[0])
    assert result.verdict == "not_applicable"
    assert "CUDA" in result.reason


def test_the_rule_finds_what_asserts_wall_clock(ranks: UpstreamRanks) -> None:
    """The one test of this torch that bounds how long something took is found by its source."""
    timed = [test.name for test in ranks.tests() if test.real_time]
    assert timed == ["test_device_maps_missing_config_not_timeout"]


def test_what_asserts_wall_clock_runs_in_real_time(ranks: UpstreamRanks) -> None:
    """A test that the rule names gets rate 1, any other the fast one."""
    test = ranks.test("RpcTest::test_add")
    assert ranks.rate_of(dataclasses.replace(test, real_time="it bounds its time")) == 1.0
    if ranks.server.rate != 1.0:
        assert ranks.rate_of(test) == DEFAULT_RATE


@pytest.mark.parametrize("name", IN_CI)
def test_runs_unchanged(ranks: UpstreamRanks, name: str) -> None:
    """A test of PyTorch's passes with our fixture mixed in where torch's would be."""
    result = run_without_faults(ranks, ranks.test(name))
    assert (result.verdict, result.reason) == ("passed", "")


def test_a_skip_is_the_tests_own(ranks: UpstreamRanks) -> None:
    """A test that PyTorch skips is skipped here, with PyTorch's reason."""
    result = run_without_faults(ranks, ranks.test("RpcTest::test_profiler_rpc_key_names"))
    assert result.verdict == "skipped"
    assert "pytorch/pytorch/issues" in result.reason


def test_drawn_tables_strike_and_change_nothing(ranks: UpstreamRanks) -> None:
    """A test that forks RRefs holds under tables that are seen to strike it."""
    result = run_without_faults(ranks, ranks.test("RpcTest::test_rref_forward_chain"))
    run_under_faults(ranks, Runner(ranks.server), result, examples=3, seed=1)
    under = result.under_faults
    assert under is not None
    assert (under.verdict, under.tables) == ("holds", 3)
    assert under.faults_fired > 0


def test_a_crash_fails_one_test_only(ranks: UpstreamRanks) -> None:
    """A rank that dies fails the test that it ran, by signal and name; the next one runs."""
    killing = FaultPlan(FaultTable(["RREF_FORK_REQUEST"], 6))
    test = ranks.test("RpcTest::test_rref_forward_chain")
    seen = ranks.run(test, killing, DEFAULT_RATE)
    assert (seen.verdict, seen.promise) == ("failed", "RankDied")
    assert "SIGABRT" in seen.reason
    assert fired(account(None, killing, seen.outcome)) >= 6
    assert ranks.run(test, rate=DEFAULT_RATE).verdict == "passed"


LOST = FaultTable(["SCRIPT_CALL"], 1)
#: What delays more message types only looks at what is sent.
MOST_LATE = 4


class LossyRanks(UpstreamRanks):
    """Ranks that lose their first script call, whatever they are asked to run under."""

    def run(
        self,
        test: UpstreamTest,
        plan: FaultPlan | None = None,
        rate: float = 1.0,
        agent: Agent | None = None,
    ) -> Seen:
        return super().run(test, FaultPlan(LOST), rate, agent)


class TouchyRanks(UpstreamRanks):
    """Ranks of which rank 0 loses its first script call where its script calls are to be late."""

    def run(
        self,
        test: UpstreamTest,
        plan: FaultPlan | None = None,
        rate: float = 1.0,
        agent: Agent | None = None,
    ) -> Seen:
        late = (plan or FaultPlan()).table(0).messages_to_delay
        touched = "SCRIPT_CALL" in late and len(late) <= MOST_LATE
        return super().run(test, FaultPlan(by_rank={0: LOST}) if touched else plan, rate, agent)


def test_a_failure_is_told_with_its_rank(ranks: UpstreamRanks) -> None:
    """A test that fails is asked again down to real time, and tells the traceback of its rank."""
    result = run_without_faults(LossyRanks(ranks.server), ranks.test("RpcTest::test_add"))
    assert (result.verdict, result.rate) == ("failed", 1.0)
    assert result.reason.startswith("in rank ")
    assert "in test_add" in result.reason
    assert [failure.promise for failure in failures_of(result)] == ["UpstreamTestFails"]


def test_what_breaks_a_test_is_shrunk_and_confirmed(ranks: UpstreamRanks) -> None:
    """A test that one fault breaks is violated, with that fault alone, shown in real time."""
    touchy = TouchyRanks(ranks.server)
    result = run_without_faults(touchy, ranks.test("RpcTest::test_add"))
    run_under_faults(touchy, Runner(ranks.server), result, examples=40, seed=1)
    assert result.under_faults is not None
    assert result.under_faults.verdict == "violated"
    (failure,) = failures_of(result)
    needed = FaultPlan(by_rank={0: FaultTable((), 0, {"SCRIPT_CALL": 0.001})})
    assert failure.case.plan == needed
    assert any(repeats.rate == 1.0 and repeats.failed for repeats in failure.repeats)


class MiscountingRanks(UpstreamRanks):
    """Ranks that lose their first script call under faults, and then say wrong numbers of them."""

    def run(
        self,
        test: UpstreamTest,
        plan: FaultPlan | None = None,
        rate: float = 1.0,
        agent: Agent | None = None,
    ) -> Seen:
        if not plan or len(plan.default.messages_to_delay) > MOST_LATE:
            return super().run(test, plan, rate, agent)
        seen = super().run(test, FaultPlan(LOST), rate, agent)
        many = {str(message): 99 for message in MessageType}
        ranks = [
            dataclasses.replace(rank, failed_by_type=many, delayed_by_type=many)
            for rank in seen.outcome.ranks
        ]
        return dataclasses.replace(
            seen, outcome=dataclasses.replace(seen.outcome, ranks=tuple(ranks))
        )


@needs_wire
def test_an_error_of_ours_does_not_hide_a_verdict(on_the_wire: UpstreamRanks) -> None:
    """It says that the test passed without faults, and how it failed under the first table."""
    ranks = MiscountingRanks(on_the_wire.server, "wire")
    result = run_without_faults(ranks, ranks.test("RpcTest::test_add"))
    with pytest.raises(HarnessError, match="counted 99 firings of the fault") as caught:
        run_under_faults(ranks, Runner(ranks.server), result, examples=1, seed=1)
    failed, *_, passed = caught.value.__notes__
    assert "in test_add" in failed
    assert passed.endswith("without faults, the test passed at rate 50")


@needs_wire
@pytest.mark.parametrize("name", ON_THE_WIRE)
def test_the_wire_agent_stands_in(on_the_wire: UpstreamRanks, name: str) -> None:
    """A test of each kind of suite passes on the agent WIRE, which records its messages."""
    result = run_without_faults(on_the_wire, on_the_wire.test(name))
    assert (result.verdict, result.reason) == ("passed", "")
    assert result.last is not None
    assert result.last.outcome.agent == "WIRE"
    assert result.last.outcome.messages


def test_few_tests_ask_for_an_agent(ranks: UpstreamRanks) -> None:
    """In this torch eight of the 464 tests name an agent; under the usual ones they run."""
    asking = {t.id: t.asks_for for t in ranks.tests() if t.agent != "cuda" and t.asks_for}
    assert asking == ASKING
    assert not any(ranks.test(name).not_applicable for name in asking)


@needs_wire
def test_a_test_that_asks_for_another_agent_is_not_run(on_the_wire: UpstreamRanks) -> None:
    """Under the agent WIRE it is left out with its reason, and a replay of it is refused."""
    test = on_the_wire.test("FaultyAgentRpcTest::test_verify_backend_options")
    result = run_without_faults(on_the_wire, test)
    assert result.verdict == "not_applicable"
    assert "names BackendType.FAULTY_TENSORPIPE" in result.reason
    with pytest.raises(UsageError, match="does not run under the agent WIRE"):
        on_the_wire.observe(Runner(on_the_wire.server), UpstreamCase.of(test))


@needs_wire
@pytest.mark.nightly
@pytest.mark.parametrize("suite", SUITES)
def test_all_that_ask_for_no_agent_run_on_the_wire(on_the_wire: UpstreamRanks, suite: str) -> None:
    """Every test of the suite that asks for no other agent passes on WIRE, or skips itself."""
    verdicts = {
        test.id: run_without_faults(on_the_wire, test).verdict
        for test in on_the_wire.tests()
        if test.suite == suite
    }
    left_out = {name for name, verdict in verdicts.items() if verdict == "not_applicable"}
    assert left_out == {name for name in ASKING if name.startswith(f"{suite}::")}
    assert {name for name, verdict in verdicts.items() if verdict == "failed"} == set()


@pytest.mark.nightly
@pytest.mark.parametrize("suite", SUITES)
def test_all_run_unchanged(ranks: UpstreamRanks, suite: str) -> None:
    """Every test of the suite passes, or is skipped by itself, with our fixture mixed in."""
    failed = {
        test.id: result.reason
        for test in ranks.tests()
        if test.suite == suite
        and (result := run_without_faults(ranks, test)).verdict not in ("passed", "skipped")
    }
    assert failed == {}
