"""Live worlds: real ranks of real torch, one of them wrong, and each is reported as what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from rpcprops.faults import MAX_DELAY, FaultPlan, FaultTable
from rpcprops.oracle import judge, predict
from rpcprops.programs import (
    Call,
    Carry,
    Context,
    Count,
    Default,
    Drop,
    Fetch,
    Graph,
    Module,
    Optimize,
    Outlast,
    Own,
    Pause,
    Program,
    Raising,
    Remote,
    Settle,
    Share,
    Step,
)
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests.seeded import _rank_side as wrong
from tests.seeded._falsified import Place
from tests.seeded._ideal import place

#: Where a delay or a timeout decides, it does so by far (virtual seconds).
LATE = 300.0
LONGEST = MAX_DELAY
NONE = FaultTable()


class PlantingServer:
    """A server whose clusters have something done to one rank before the first step."""

    def __init__(self, server: Any, rank: int, plant: Callable[..., None], *args: Any) -> None:
        self.server = server
        self.agent = server.agent
        self.reuse = server.reuse
        self.rank = rank
        self.plant = plant
        self.args = args

    def rate_of(self, clock: Any) -> float:
        return float(self.server.rate_of(clock))

    def make_cluster(self, *args: Any, **options: Any) -> Any:
        cluster = self.server.make_cluster(*args, **options)
        start = cluster.start

        def start_wrong() -> None:
            start()
            cluster.on(self.rank).call(self.plant, *self.args)

        cluster.start = start_wrong
        return cluster


@dataclass(frozen=True)
class Live:
    """A rank that something is wrong with, and what must be said of it.

    Attributes:
        says: the promise, rank and step of each violation.
        plant: what makes the rank wrong, with its arguments.
        ran: the faults of the rank; the others have none.
        told: what the judge is told of them, where that is wrong.
        slowly: whether it waits for so little that a loaded machine needs a slower clock.
        needs_clock: whether only a fast clock makes it short, or only its library sees it.
    """

    rank: int
    steps: tuple[Step, ...]
    says: tuple[Place, ...]
    plant: Callable[..., None] | None = None
    args: tuple[Any, ...] = ()
    ran: FaultTable = NONE
    told: FaultTable | None = None
    settles: bool = True
    needs_clock: bool = False
    slowly: bool = False

    @property
    def program(self) -> Program:
        """What the ranks are asked to do."""
        return Program(3, self.steps, settles=self.settles)

    @property
    def plan(self) -> FaultPlan:
        """The faults under which they do it."""
        return FaultPlan(by_rank={self.rank: self.ran})


CALLED = (Call(0, 1), Call(0, 1, (5.0,), (6.0,)))
OWNED = (Remote(0, 1, "a"), Fetch(0, "a"), Settle(), Fetch(0, "a"), Drop(0, "a"))
SHARED = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Drop(0, "a"), Drop(2, "b"))
LOST = FaultTable(["PYTHON_CALL"], 1)

#: What of a call in a context may time out.
THROUGH: tuple[Any, ...] = ("call", "future", "remote", "proxy")
#: What may be under another default timeout, and end by it.
HOWS: tuple[Any, ...] = ("sync", "async", "fetch", "proxy")

LIVE: dict[str, Live] = {
    "runs a call twice": Live(1, CALLED, (("NotRunOnce", 1, None),) * 2, wrong.run_twice),
    "answers without running the call": Live(
        1, (Remote(0, 1, "a"), Drop(0, "a")), (("NotRunOnce", 1, None),), wrong.run_never
    ),
    "lets another rank run a call": Live(
        1,
        (Call(0, 1),),
        (("NotRunOnce", 1, None), ("NotRunOnce", 2, None)),
        wrong.run_at,
        ("worker2",),
    ),
    "returns a stale value": Live(1, CALLED, (("WrongValue", 0, 1),), wrong.answer_first_value),
    "does not count": Live(
        1, (Count(0, 1), Count(2, 1)), (("WrongValue", 2, 1),), wrong.count_once
    ),
    "changes a value that it owns": Live(
        1,
        (Remote(0, 1, "a"), Fetch(0, "a"), Call(2, 1), Fetch(0, "a")),
        (("WrongValue", 0, 3),),
        wrong.change_values,
    ),
    "raises in a call": Live(1, OWNED, (("UnexpectedError", 0, 1),), wrong.raise_in_calls),
    "swallows what a function raises": Live(
        1, (Call(0, 1, raises=True),), (("MissingError", 0, 0),), wrong.swallow_exceptions
    ),
    "makes up a value for a lost call": Live(
        0, (Call(0, 1),), (("MissingError", 0, 0),), wrong.hide_lost_calls, ran=LOST
    ),
    "answers after the timeout": Live(
        1,
        (Call(0, 1, timeout=LATE),),
        (("UnexpectedError", 0, 0),),
        wrong.sleep_in_calls,
        (2 * LATE,),
        needs_clock=True,
    ),
    "drops a delete": Live(0, OWNED, (("RRefLeak", 1, None),), wrong.keep_dropped_handles),
    "keeps an argument": Live(
        2,
        (Remote(0, 1, "a"), Call(0, 2, right="a"), Drop(0, "a"), Settle()),
        (("RRefLeak", 1, 3),),
        wrong.keep_arguments,
    ),
    "keeps what was raised, with its RRef": Live(
        1,
        (Raising(0, 1, "rref"), Settle()),
        (("RRefLeak", 0, 1),),
        wrong.keep_what_is_raised,
    ),
    "pickles a message twice": Live(
        0, (Carry(0, 1, "counted", "echo"),), (("NotRunOnce", 0, None),), wrong.pickle_twice
    ),
    "pickles an answer twice": Live(
        1, (Carry(0, 1, "counted"),), (("NotRunOnce", 1, None),), wrong.pickle_twice
    ),
    "counts a fork that nobody has": Live(
        1, (Own(1, "o"), Settle()), (("RRefLeak", 1, 1),), wrong.fork_for_nobody
    ),
    "never leaves a context, also when it shuts down": Live(
        1, CALLED, (("ContextLeak", 1, None),), wrong.never_leave_a_context, settles=False
    ),
    "has a thread that raises": Live(
        1, CALLED, (("ErrorInLog", 1, None),), wrong.raise_in_a_thread
    ),
    "counts a fork that nobody has until it shuts down": Live(
        1, (Own(1, "o"),), (("RRefLeak", 1, None),), wrong.fork_for_nobody, settles=False
    ),
    "deletes while a handle lives": Live(
        0, (Remote(0, 1, "a"), Settle()), (("OwnerGone", 1, 1),), wrong.delete_what_lives
    ),
    "deletes twice": Live(
        2,
        (Own(1, "o"), Share(1, "o", 2, "a"), Settle(), Fetch(2, "a")),
        (("OwnerGone", 1, 2),),
        wrong.delete_twice,
    ),
    "keeps a context": Live(
        0,
        (Context(0, "x", (1,)), Settle()),
        (("ContextLeak", 0, 1), ("ContextLeak", 1, 1)),
        wrong.keep_contexts,
    ),
    "swallows what leaves a context": Live(
        0,
        (Context(0, "x", (1,), raises=True),),
        (("MissingError", 0, 0),),
        wrong.swallow_what_leaves_contexts,
    ),
    "loses a gradient": Live(
        1, (Context(0, "x", (2, 1)),), (("WrongGradient", 0, 0),), wrong.lose_gradients
    ),
    "loses a gradient behind a proxy": Live(
        1,
        (Graph(0, "x", ((0, "plain"),), (("add", (0, 0), 1, "proxy remote"),), ((1,),)),),
        (("WrongGradient", 0, 0),),
        wrong.lose_gradients_of_proxies,
    ),
    "loses a gradient behind a proxy that was used before": Live(
        1,
        (Graph(0, "x", ((0, "plain"),), (("add", (0, 0), 1, "proxy before async"),), ((1,),)),),
        (("WrongGradient", 0, 0),),
        wrong.lose_gradients_of_proxies,
    ),
    "loses a gradient behind a callback": Live(
        0,
        (Graph(0, "x", ((0, "plain"),), (("add", (0, 0), 1, "async then"),), ((1,),)),),
        (("WrongGradient", 0, 0),),
        wrong.lose_gradients_of_futures,
    ),
    "leaves its context for a call": Live(
        0,
        (Context(0, "x", (1,), flavour="script", wait="async"),),
        (("UnexpectedError", 0, 0),),
        wrong.leave_contexts_for_calls,
    ),
    **{
        f"hides a timeout in a context ({through})": Live(
            0,
            (Outlast(0, 1, "x", by="timeout", through=through),),
            (("MissingError", 0, 0),),
            wrong.hide_timeouts_in_contexts,
        )
        for through in THROUGH
    },
    "asks an owner for one pass instead of two": Live(
        0,
        (Context(0, "x", (1,), root=2, retain=True),),
        (("WrongGradient", 0, 0),),
        wrong.ask_owners_for_one_pass,
    ),
    "ignores the mode of a module": Live(
        1,
        (Module(0, 1, mode="train"), Module(0, 1, mode="eval")),
        (("WrongValue", 0, 1),),
        wrong.stay_in_training,
    ),
    "accepts what a remote module has to refuse": Live(
        0, (Module(0, 1, refused="state_dict"),), (("UnexpectedError", 0, 0),), wrong.give_state
    ),
    "computes another loss": Live(
        1, (Context(0, "x", (1,)),), (("WrongValue", 0, 0),), wrong.compute_otherwise
    ),
    "does not break where it has to": Live(
        1, (Context(0, "x", (1,), breaks=1),), (("MissingError", 0, 0),), wrong.break_silently
    ),
    "does not step": Live(
        1, (Optimize(0, "x", (1, 2)),), (("WrongValue", 0, 0),), wrong.step_without_moving
    ),
    "never finishes a call": Live(
        1,
        (Pause(0, 0.0), Settle()),
        (("CallLeak", 0, 1), ("CallLeak", 1, 1)),
        wrong.never_finish_a_call,
        ("worker0",),
    ),
    "never returns from a call": Live(1, CALLED, (("RankHung", 0, None),), wrong.block_in_calls),
    "stops": Live(1, CALLED, (("RankHung", 1, None),), wrong.stop_in_calls),
    "is killed": Live(1, CALLED, (("RankDied", 1, None),), wrong.die_in_calls),
    "leaves": Live(1, CALLED, (("RankDied", 1, None),), wrong.leave_in_calls),
    "raises in its shutdown": Live(
        1, CALLED, (("UngracefulShutdown", 1, None),), wrong.raise_in_shutdown
    ),
    "leaves with an error": Live(
        2, CALLED, (("UngracefulShutdown", 2, None),), wrong.exit_with_an_error
    ),
    "is killed in its shutdown": Live(2, CALLED, (("RankDied", 2, None),), wrong.die_in_shutdown),
    "forgets an accept": Live(
        2,
        SHARED,
        # Rank 0 waits for the accept when it shuts down, and says so.
        (("RRefLeak", 1, None), ("ErrorInLog", 0, None)),
        ran=FaultTable(["RREF_CHILD_ACCEPT"], 6),
        told=FaultTable(["RREF_CHILD_ACCEPT"], 5),
    ),
    "gives a delete up": Live(
        2,
        SHARED,
        (("RRefLeak", 1, None),),
        ran=FaultTable(["RREF_USER_DELETE"], 6),
        told=FaultTable(["RREF_USER_DELETE"], 5),
    ),
    "loses a call": Live(
        0,
        CALLED[:1],
        (("UnexpectedError", 0, 0),),
        ran=FaultTable(["PYTHON_CALL"], 1),
        told=FaultTable(),
    ),
    "loses a fetch": Live(
        0,
        OWNED,
        (("UnexpectedError", 0, 1),),
        ran=FaultTable(["PYTHON_RREF_FETCH_CALL"], 1),
        told=FaultTable(),
    ),
    "sends what has to be lost": Live(
        0,
        CALLED,
        (("MissingError", 0, 0), ("MissingError", 0, 1)),
        ran=FaultTable(),
        told=FaultTable(["PYTHON_CALL"], 1),
    ),
    "retries less often": Live(
        2,
        SHARED,
        (("FaultsDiffer", 2, None),),
        ran=FaultTable(["RREF_FORK_REQUEST"], 1),
        told=FaultTable(["RREF_FORK_REQUEST"], 2),
    ),
    **{
        f"keeps its default timeout ({how})": Live(
            0,
            (Default(0, 1, 3.0, sleeps=12.0, how=how),),
            (("MissingError", 0, 0),),
            wrong.keep_the_default_timeout,
        )
        for how in HOWS
    },
    "announces a handle where it has to try that again": Live(
        2,
        (Remote(0, 1, "a"), Share(0, "a", 2, "b", timeout=4.0)),
        (("MissingError", 0, 1),),
        ran=FaultTable(),
        told=FaultTable(["RREF_FORK_REQUEST"], 5),
        slowly=True,
    ),
    "is in time where it has to be late": Live(
        0,
        (Call(0, 1, timeout=LONGEST - LATE),),
        (("MissingError", 0, 0),),
        ran=FaultTable(),
        told=FaultTable(messages_to_delay={"PYTHON_CALL": LONGEST}),
    ),
    "is late where it has to be in time": Live(
        0,
        OWNED,
        (("FaultsDiffer", 0, None),),
        ran=FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0}),
        told=FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 2.0}),
        needs_clock=True,
    ),
}


@pytest.mark.usefixtures("seeded_defect")
@pytest.mark.parametrize("name", LIVE)
def test_a_rank_that_is_wrong_is_reported_as_what_it_is(
    name: str, rpc_cluster: ClusterFactory
) -> None:
    """One real rank does not do what stock torch would, and the report names just that."""
    live = LIVE[name]
    server: Any = rpc_cluster.server
    if live.needs_clock and server.rate == 1.0:
        pytest.skip("needs a fast clock")
    if live.plant is not None:
        server = PlantingServer(server, live.rank, live.plant, *live.args)
    clock = min(server.rate, 40.0) if live.slowly else None
    outcome = Runner(server).run_anew(live.program, live.plan, clock=clock)
    told = live.plan if live.told is None else FaultPlan(by_rank={live.rank: live.told})
    said = judge(live.program, told, outcome)
    assert [place(violation) for violation in said] == list(live.says), said


def test_the_same_programs_are_clean_where_no_rank_is_wrong(rpc_cluster: ClusterFactory) -> None:
    """What is reported above is the defects' doing: without them there is nothing to say."""
    runner = Runner(rpc_cluster.server)
    for program, plan in dict.fromkeys((live.program, live.plan) for live in LIVE.values()):
        if predict(program, plan).known_bugs:
            # Stock torch itself is known to be wrong there.
            continue
        assert judge(program, plan, runner.run_anew(program, plan)) == ()


def test_enough_live_defects() -> None:
    """Those that are asked for, and each promise that a rank can break by itself."""
    assert len(LIVE) >= 12
