"""The public API as a user writes it. Type-checked, never run.

What a checker must accept stands here plainly, with the type that it must infer. What it must
refuse carries an ignore comment, which is itself an error wherever it is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, assert_type

from hypothesis import given
from hypothesis import strategies as st

import rpcprops
from rpcprops import (
    DEFAULT_MESSAGES_TO_DELAY,
    RETRYABLE_MESSAGE_TYPES,
    Cluster,
    ClusterServer,
    Counters,
    FaultPlan,
    FaultTable,
    MessageFault,
    MessageType,
    NthMessage,
    Outcome,
    Program,
    RpcCluster,
    Violation,
    load_script,
    strategies,
)
from rpcprops.cluster import ClusterOptions, RankFuture, RankProxy
from rpcprops.faults import WireMessageType, acted_on, pairs, points, reversal
from rpcprops.outcomes import SentMessage
from rpcprops.programs import Call, Context, Drop, Fetch, Own, Refused, Remote, Settle, Share


def work(x: int, factor: float = 1.0) -> str:
    """What a user's function might look like."""
    return str(x * factor)


def make() -> dict[str, int]:
    """A value that stays in its rank."""
    return {"a": 1}


def use(value: Any, name: str) -> int:
    """Takes a value that was kept."""
    return int(value[name])


async def count_later(n: int) -> int:
    """A coroutine function, which a rank runs to its end."""
    return n


# Faults: torch's own words, plain strings or the enumeration, any collection of them.
TABLE = FaultTable(["RREF_USER_DELETE"], 3, {"PYTHON_CALL": 1.5})
TABLES: list[FaultTable] = [
    FaultTable(),
    FaultTable(("RREF_USER_DELETE", MessageType.RREF_CHILD_ACCEPT), num_fail_sends=5),
    FaultTable({"RREF_USER_DELETE"}, 1),
    FaultTable(RETRYABLE_MESSAGE_TYPES, 2, DEFAULT_MESSAGES_TO_DELAY),
    FaultTable(messages_to_fail=[MessageType.RREF_FORK_REQUEST], num_fail_sends=1),
    FaultTable(messages_to_delay={MessageType.SCRIPT_CALL: 2}),
    FaultTable(messages_to_delay=dict.fromkeys(MessageType, 0.5)),
]
FaultTable("RREF_USER_DELETE", "3")  # type: ignore[arg-type]
FaultTable(messages_to_delay=["PYTHON_CALL"])  # type: ignore[arg-type]

PLAN = FaultPlan(by_rank={1: TABLE})
PLANS: list[FaultPlan] = [FaultPlan(), FaultPlan(TABLE), FaultPlan(TABLE, {0: FaultTable()})]
FaultPlan(by_rank=[TABLE])  # type: ignore[arg-type]

# Faults of any message: a type by torch's name, or one of the two enumerations.
LOST = MessageFault(1, "lose", "RREF_ACK")
HELD = MessageFault(
    0, "hold", "PYTHON_CALL", to=1, which="first", n=3, delay=2, until=NthMessage(1, "PYTHON_RET")
)
MESSAGE_PLAN = FaultPlan(
    others=(
        LOST,
        HELD,
        MessageFault(0, "fail", MessageType.PYTHON_CALL, which="every"),
        MessageFault(0, "delay", WireMessageType.REMOTE_RET, delay=0.5),
        MessageFault(2, "duplicate", way="request"),
    )
)
MessageFault(0, "drop")  # type: ignore[arg-type]
MessageFault(0, "lose", "RREF_ACK", 1)  # type: ignore[call-arg]


def faults() -> None:
    """What a table and a plan tell."""
    assert_type(TABLE.messages_to_fail, tuple[MessageType, ...])
    assert_type(TABLE.num_fail_sends, int)
    assert_type(TABLE.messages_to_delay, Mapping[MessageType, float])
    assert_type(TABLE.is_within_budget, bool)
    assert_type(TABLE.retry_seconds("RREF_USER_DELETE"), float)
    assert_type(PLAN.table(1), FaultTable)
    assert_type(PLAN.faulty_ranks(4), tuple[int, ...])
    assert_type(MessageType("PYTHON_CALL").is_retryable, bool)
    assert_type(MessageType.PYTHON_CALL.max_retries, int)
    TABLE.num_fail_sends = 4  # type: ignore[misc]
    assert_type(LOST.message, WireMessageType | None)
    assert_type(LOST.for_agent(), dict[str, Any])
    assert_type(HELD.until, NthMessage | None)


def messages(outcome: Outcome) -> None:
    """What a record of messages tells, and the faults that are made from it."""
    assert_type(outcome.messages, tuple[SentMessage, ...])
    assert_type(acted_on(LOST, MESSAGE_PLAN, outcome.messages), tuple[SentMessage, ...])
    single = points(outcome.messages, actions=["lose", "delay"], delay=0.5)
    assert_type(single, tuple[MessageFault, ...])
    for one, other in pairs(single):
        assert_type((one, other), tuple[MessageFault, MessageFault])
    first, second, *_ = outcome.messages
    assert_type(reversal(first, second, outcome.messages), MessageFault)


def drawing() -> None:
    """Every strategy, with and without arguments."""
    assert_type(strategies.message_types(among=["PYTHON_CALL"]), st.SearchStrategy[MessageType])
    assert_type(strategies.fail_counts(max_fail_sends=3), st.SearchStrategy[int])
    assert_type(strategies.delays(max_delay=1.0, min_delay=0.5), st.SearchStrategy[float])
    assert_type(
        strategies.retryable_subsets(messages=["RREF_USER_DELETE"], min_size=1),
        st.SearchStrategy[tuple[MessageType, ...]],
    )
    assert_type(
        strategies.delay_tables(messages=("PYTHON_CALL",), max_size=1),
        st.SearchStrategy[Mapping[MessageType, float]],
    )
    tables = strategies.fault_tables(
        messages=RETRYABLE_MESSAGE_TYPES, max_fail_sends=5, max_delay=2.0
    )
    assert_type(tables, st.SearchStrategy[FaultTable])
    assert_type(
        strategies.fault_plans(world_size=4, tables=tables, max_faulty_ranks=1),
        st.SearchStrategy[FaultPlan],
    )

    late = strategies.message_faults(world_size=4, actions=["delay"], messages=["RREF_ACK"])
    assert_type(late, st.SearchStrategy[MessageFault])
    assert_type(
        strategies.fault_plans(world_size=4, message_faults=late), st.SearchStrategy[FaultPlan]
    )
    strategies.fault_plans(world_size=4, message_faults=tables)  # type: ignore[arg-type]
    assert_type(
        strategies.programs(max_steps=64, kinds={"remote", "fetch"}, plan=PLAN),
        st.SearchStrategy[Program],
    )
    assert_type(
        strategies.programs_under_faults(max_world_size=3, tables=tables),
        st.SearchStrategy[tuple[Program, FaultPlan]],
    )
    assert_type(strategies.group_programs(), st.SearchStrategy[Program])
    strategies.programs(4)  # type: ignore[call-arg]


@given(faults=strategies.fault_tables())
def a_property(faults: FaultTable) -> None:
    """How most users meet the package: a drawn table, a cluster, calls."""
    with ClusterServer().cluster(world_size=2, faults=faults) as cluster:
        assert cluster.on(0).call(work, 1) == "1"


def servers() -> None:
    """Every way to make a server and a cluster."""
    with ClusterServer() as server, server.cluster(world_size=3) as cluster:
        assert_type(server, ClusterServer)
        assert_type(cluster, Cluster)
    ClusterServer(clock="real")
    ClusterServer(clock=50)
    ClusterServer(clock="slow")  # type: ignore[arg-type]
    server.cluster(
        world_size=2,
        faults=PLAN,
        names=["ps", "trainer"],
        clock="auto",
        transport="shm",
        rpc_timeout=120,
        num_worker_threads=4,
        leaks="allow",
        init=False,
        deadline=10,
    )
    server.cluster(world_size=2, leaks=[Counters(owners=1), Counters()])
    server.cluster(world_size=2, leaks="ignore")  # type: ignore[arg-type]
    server.cluster(world_size=2, init="adopt")
    server.cluster(world_size=2, init="adapt")  # type: ignore[arg-type]
    server.cluster(world_size=2, transport="ibv")  # type: ignore[arg-type]
    server.cluster(2)  # type: ignore[call-arg]
    server.cluster()  # type: ignore[call-arg]
    server.cluster(world_size=2, fautls=TABLE)  # type: ignore[call-arg]


def fixtures(rpc_cluster: RpcCluster) -> None:
    """The fixture takes the options of a cluster, by name, and nothing else."""
    with rpc_cluster(world_size=2, faults=TABLE, names=("ps", "trainer"), clock=50) as cluster:
        assert_type(cluster, Cluster)
    options: ClusterOptions = {"world_size": 2, "transport": "shm"}
    assert_type(rpc_cluster(**options), Cluster)
    rpc_cluster(world_size=2, fautls=TABLE)  # type: ignore[call-arg]
    rpc_cluster(world_size="2")  # type: ignore[arg-type]
    rpc_cluster(faults=TABLE)  # type: ignore[call-arg]


def calling(cluster: Cluster) -> None:
    """A call keeps the type of what it calls, its arguments and its result."""
    rank = cluster.on(0)
    assert_type(rank, RankProxy)
    assert_type(rank.call(work, 1), str)
    assert_type(rank.call(work, 1, factor=2.0), str)
    assert_type(cluster.on("trainer").call(make), dict[str, int])
    assert_type(rank.submit(work, 1), RankFuture[str])
    assert_type(rank.submit(work, 1).result(), str)
    assert_type(rank.submit(work, 1).done(), bool)
    assert_type(cluster.each(work, 1), list[str])
    assert_type(cluster.each_rank(work), list[str])
    assert_type(rank.call(lambda: 5), int)
    assert_type(rank.call(count_later, 1), int)
    assert_type(rank.submit(count_later, 1), RankFuture[int])
    assert_type(cluster.each(count_later, 1), list[int])
    kept = rank.call(make, keep=True)
    assert_type(rank.call(use, kept, "a"), int)
    rank.submit(work, "one")  # type: ignore[call-overload]
    cluster.each(work)  # type: ignore[call-overload]


def scripts() -> None:
    """A script is loaded as a module."""
    assert_type(load_script("main.py", "--steps", "3"), ModuleType)
    load_script()  # type: ignore[call-arg]


def looking(cluster: Cluster) -> None:
    """What a cluster shows of itself."""
    assert_type(cluster.settle(), tuple[Counters, ...])
    cluster.settle(expect=[Counters(owners=1, forks=1), Counters()])
    assert_type(cluster.snapshot(), tuple[Counters, ...])
    assert_type(cluster.snapshot()[0].owners, int)
    assert_type(cluster.outcome, Outcome)
    assert_type(cluster.world_size, int)
    assert_type(cluster.outcome.ranks[0].exit_code, int | None)


PROGRAM = Program(
    3,
    (
        Remote(0, 1, "a", (1.0, 2.0), (3.0, 4.0), flavour="builtin"),
        Own(2, "mine"),
        Share(0, "a", 2, "b"),
        Fetch(2, "b"),
        Call(0, 1, timeout=0.5, wait="async"),
        Call(0, 2, (1.0, 2.0), right="a"),
        Context(0, "x", (1, 2), nested=True),
        Settle(),
        Refused(1, "x"),
        Drop(0, "a"),
        Drop(2, "b"),
    ),
    name="everything",
)
Remote(0, 1, "a", flavour="rust")  # type: ignore[arg-type]


def judging() -> None:
    """A program is run under a table, a plan or nothing, and what it showed is judged."""
    for under in (TABLE, PLAN, None):
        outcome = rpcprops.run(PROGRAM, under, world_size=4, clock=50)
        assert_type(outcome, Outcome)
        assert_type(rpcprops.judge(PROGRAM, under, outcome), tuple[Violation, ...])
    found = rpcprops.judge(None, PLAN, rpcprops.run(PROGRAM))
    assert_type(found[0].promise, str)
    assert_type(found[0].rank, int | None)
