"""The options of an agent as PyTorch's fixtures give them, and the fixture of one rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed import rpc

from rpcprops import agents
from rpcprops._frozen import FrozenMap
from rpcprops._given import argument
from rpcprops.agents import faulty_tensorpipe
from rpcprops.errors import UsageError
from rpcprops.faults import DEFAULT_MESSAGES_TO_DELAY, RETRYABLE_MESSAGE_TYPES, FaultTable
from rpcprops.torch_facts import TorchFacts, facts_of

# Before a fork, because each registration replaces torch's enum of backends.
agents.named(faulty_tensorpipe.NAME).make_known()

#: The types that torch's fixture fails, and how often, if a test does not say.
DEFAULT_FAULT_TABLE = FaultTable(
    messages_to_fail=RETRYABLE_MESSAGE_TYPES,
    num_fail_sends=3,
    messages_to_delay=DEFAULT_MESSAGES_TO_DELAY,
)


class FaultyAgentOptions:
    """Options of an agent, torch's faulty one, made from a :class:`rpcprops.FaultTable`.

    As in torch, ``messages_to_fail`` and ``messages_to_delay`` are attributes that a test may set,
    and ``dist_init`` calls :meth:`setup_fault_injection`. In addition, a whole table may be set
    (:attr:`fault_table`), and everything is checked when the options are made.

    Attributes:
        num_worker_threads: threads of the agent (torch's fixture has 8).
        rpc_timeout: seconds (virtual in a rank with a fast clock) before a call fails; None leaves
            torch's default of 60.
        agent_name: the agent's name in :mod:`rpcprops.agents`.
        further_options: options that only this agent has.
    """

    further_options: Mapping[str, Any] = FrozenMap[str, Any]()
    agent_name: str = faulty_tensorpipe.NAME
    num_worker_threads: int = 8
    rpc_timeout: float | None = None

    if TYPE_CHECKING:

        @property
        def init_method(self) -> Any:
            """Where the ranks find each other: what derives from this class says it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault_table = DEFAULT_FAULT_TABLE

    @property
    def fault_table(self) -> FaultTable:
        """The table from which the options are made.

        Raises:
            UsageError: an attribute has a value that no table accepts.
        """
        return FaultTable(self.messages_to_fail, self.num_fail_sends, self.messages_to_delay)

    @fault_table.setter
    def fault_table(self, table: FaultTable) -> None:
        given: object = table
        if not isinstance(given, FaultTable):
            msg = f"{argument('fault_table', table)} must be a FaultTable."
            raise UsageError(msg)
        self.messages_to_fail = [str(m) for m in table.messages_to_fail]
        self.num_fail_sends = table.num_fail_sends
        self.messages_to_delay = {str(m): d for m, d in table.messages_to_delay.items()}

    @property
    def agent(self) -> agents.Agent:
        """The agent.

        Raises:
            UsageError: no agent with that name is known in this process.
        """
        return agents.named(self.agent_name)

    @property
    def facts(self) -> TorchFacts:
        """What is known of this torch, under this agent."""
        return self.agent.facts(facts_of(str(torch.__version__)))

    @property
    def rpc_backend(self) -> Any:
        """The agent's member of torch's ``BackendType``.

        Raises:
            MachineCannot: this torch was built without it.
        """
        return self.agent.backend()

    @property
    def rpc_backend_options(self) -> Any:
        """The agent's options for ``rpc.init_rpc``, new on each access."""
        others = {"num_worker_threads": self.num_worker_threads, **self.further_options}
        if self.rpc_timeout is not None:
            others["rpc_timeout"] = self.rpc_timeout
        return self.agent.options(self.fault_table, init_method=self.init_method, **others)

    def setup_fault_injection(
        self,
        faulty_messages: Iterable[str] | FaultTable | None,
        messages_to_delay: Mapping[str, float] | None,
    ) -> None:
        """Called by ``dist_init`` before each test; None leaves the present setting.

        Args:
            faulty_messages: types to fail, or a whole table.
            messages_to_delay: seconds by type.
        """
        if isinstance(faulty_messages, FaultTable):
            self.fault_table = faulty_messages
        elif faulty_messages is not None:
            self.messages_to_fail = cast("list[str]", faulty_messages)
        given: object = messages_to_delay
        if given is not None and not isinstance(given, Mapping):
            msg = (
                f"{argument('messages_to_delay', given)} must map message types "
                f"to seconds, or be None."
            )
            raise UsageError(msg)
        if messages_to_delay is not None:
            self.messages_to_delay = dict(messages_to_delay)

    # torch's base class declares these without a result; its own fixtures return strings.

    def get_shutdown_error_regex(self) -> Any:
        """A pattern for the errors that a call to a rank that is gone may raise."""
        return "|".join(f"({re.escape(text)})" for text in self.facts.texts.gone)

    def get_timeout_error_regex(self) -> Any:
        """A pattern for the error of a call whose RPC timeout has passed."""
        return re.escape(self.facts.texts.timeout)


class RankFixture(FaultyAgentOptions):
    """The fixture of one rank of a cluster: its table, name, world and rendezvous.

    Code that calls ``init_rpc`` itself (``init=False``) gets it from :func:`for_this_rank`.
    """

    def __init__(
        self,
        *,
        rank: int,
        name: str,
        world_size: int,
        init_method: str,
        table: FaultTable,
        rpc_timeout: float,
        num_worker_threads: int,
        agent_name: str = faulty_tensorpipe.NAME,
    ) -> None:
        super().__init__()
        self.agent_name = agent_name
        self.rank = rank
        self.name = name
        self._world_size = world_size
        self._init_method = init_method
        self.fault_table = table
        self.rpc_timeout = rpc_timeout
        self.num_worker_threads = num_worker_threads

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    @property
    def init_method(self) -> str:
        """Where the ranks find each other: a store in memory that all of them inherited."""
        return self._init_method

    def init_rpc(self) -> None:
        """``rpc.init_rpc`` with this rank's name, world and options."""
        init_rpc: Any = rpc.init_rpc
        init_rpc(
            self.name,
            backend=self.rpc_backend,
            rank=self.rank,
            world_size=self.world_size,
            rpc_backend_options=self.rpc_backend_options,
        )


_this_rank: RankFixture | None = None


def for_this_rank() -> RankFixture:
    """The fixture of the rank in which this code runs.

    Raises:
        UsageError: this process is no rank of a cluster.
    """
    if _this_rank is None:
        msg = "for_this_rank() was called in a process that is no rank of a cluster."
        raise UsageError(msg)
    return _this_rank


def set_this_rank(fixture: RankFixture) -> None:
    """Called once by the rank's main, right after the fork."""
    global _this_rank
    _this_rank = fixture
