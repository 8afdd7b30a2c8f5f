"""Another agent than torch's faulty one: a class and a registration, and ranks run it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest

from rpcprops import FaultPlan, FaultTable, agents, run
from rpcprops.agents import FaultyTensorPipe, TensorPipe
from rpcprops.errors import UsageError
from rpcprops.fixture import for_this_rank
from rpcprops.programs import Program
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.torch_facts import TorchFacts

#: The agents that this process has started, by the name of their rank.
started: list[str] = []


class LoggedTensorPipe(FaultyTensorPipe):
    """torch's faulty agent under another backend, which notes that it starts."""

    name = "LOGGED_TENSORPIPE"

    def facts(self, facts: TorchFacts) -> TorchFacts:
        """It has a text of its own."""
        return replace(facts, texts=replace(facts.texts, timeout="the logged agent waited"))

    def make_known(self) -> None:
        """Register it on top of the stock one."""
        from torch.distributed.rpc import backend_registry as registry

        super().make_known()
        if registry.backend_registered(self.name):  # type: ignore[no-untyped-call]
            return
        stock: Any = registry.BackendType[FaultyTensorPipe.name].value

        def init(store: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            started.append(name)
            logging.getLogger(__name__).warning("the logged agent of %s starts", name)
            return stock.init_backend_handler(store, name, *args, **kwargs)

        register: Any = registry.register_backend
        register(self.name, stock.construct_rpc_backend_options_handler, init)


# Ranks import this module, and so know it as well.
agents.register(LoggedTensorPipe())


def backend_in_rank() -> tuple[list[str], str, str, str]:
    fixture = for_this_rank()
    options = type(fixture.rpc_backend_options).__name__
    return started, str(fixture.rpc_backend), options, fixture.get_timeout_error_regex()


def make_and_drop() -> float:
    from torch.distributed import rpc

    return float(rpc.remote("worker1", float, args=(2,)).to_here())


def test_ranks_run_another_agent_and_a_table_fires_under_it(
    rpc_cluster: ClusterFactory,
) -> None:
    """Each rank starts the registered agent, and a failing delete is tried three times more."""
    table = FaultTable(["RREF_USER_DELETE"], 3)
    with rpc_cluster(world_size=2, faults=table, agent=LoggedTensorPipe.name) as cluster:
        seen = cluster.each(backend_in_rank)
        assert cluster.on(0).call(make_and_drop) == 2.0
    assert seen == [
        (
            [f"worker{rank}"],
            "BackendType.LOGGED_TENSORPIPE",
            "FaultyTensorPipeRpcBackendOptions",
            re.escape("the logged agent waited"),
        )
        for rank in range(2)
    ]
    assert [rank.failed_sends for rank in cluster.outcome.ranks] == [3, 0]
    assert "the logged agent of worker1 starts" in cluster.outcome.ranks[1].log


def test_the_stock_agent_is_what_runs_unless_another_is_named(rpc_cluster: ClusterFactory) -> None:
    """A world that names no agent runs torch's faulty one, also where others are registered."""
    with rpc_cluster(world_size=1) as cluster:
        _, backend, *_ = cluster.on(0).call(backend_in_rank)
        assert cluster.on(0).call(started.copy) == []
    assert backend == "BackendType.FAULTY_TENSORPIPE"


def test_an_agent_that_nobody_knows_is_refused(
    rpc_cluster: ClusterFactory,
) -> None:
    """The world does not start, and the error says which agents there are and what to do."""
    with pytest.raises(UsageError, match=r"no agent 'NOT_THERE'.*LOGGED_TENSORPIPE"):
        with rpc_cluster(world_size=1, agent="NOT_THERE"):
            pass


class Nameless(agents.Agent):
    """No backend."""


class Impostor(FaultyTensorPipe):
    """Another class with the name of the stock agent."""


@pytest.mark.parametrize("agent", [None, "FAULTY_TENSORPIPE", Nameless(), Impostor()])
def test_what_is_no_agent_of_its_own_is_refused(agent: Any) -> None:
    """An agent has a name, and no other has that; whatever was registered stays."""
    before = {name: agents.named(name) for name in agents.names()}
    with pytest.raises(UsageError):
        agents.register(agent)
    assert {name: agents.named(name) for name in agents.names()} == before


def test_a_table_that_an_agent_cannot_carry_out_is_refused() -> None:
    """The plain agent injects nothing, and says so before torch is asked for options."""
    plain = TensorPipe()
    assert plain.arguments(FaultTable(["PYTHON_CALL"], 0)) == {}
    refusal = "the agent TENSORPIPE injects no faults, so it cannot carry out .*choose another"
    with pytest.raises(UsageError, match=refusal):
        plain.arguments(FaultTable(["PYTHON_CALL"], 1))
    with pytest.raises(UsageError, match=refusal):
        plain.arguments(FaultTable(messages_to_delay={"SCRIPT_CALL": 1.0}))


def test_a_table_for_an_agent_without_faults_starts_no_rank(rpc_cluster: ClusterFactory) -> None:
    """It is refused where the cluster is made, also if only one rank has it; a program as well."""
    table = FaultTable(["PYTHON_CALL"], 1)
    with pytest.raises(UsageError, match="the agent TENSORPIPE injects no faults"):
        rpc_cluster(world_size=2, faults=FaultPlan(by_rank={1: table}), agent="TENSORPIPE")
    with pytest.raises(UsageError, match="the agent TENSORPIPE injects no faults"):
        run(Program(1, ()), table, agent="tensorpipe")
    rpc_cluster(world_size=1, faults=FaultTable(["PYTHON_CALL"], 0), agent="TENSORPIPE").kill()


def test_the_stock_agent_says_what_a_script_needs() -> None:
    """The import line and the backend are Python that names the same backend."""
    stock = agents.named(agents.default_name())
    assert stock.module == "torch.distributed.rpc._testing"
    assert stock.name == "FAULTY_TENSORPIPE"
    table = FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_CALL": 0.5})
    assert stock.arguments(table) == {
        "num_fail_sends": 2,
        "messages_to_fail": ["RREF_USER_DELETE"],
        "messages_to_delay": {"PYTHON_CALL": 0.5},
    }
    assert set(stock.retries) == {message for message in stock.can_fail if message.is_retryable}
