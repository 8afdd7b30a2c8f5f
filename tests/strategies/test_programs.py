"""The strategies for programs: what they draw, what it shrinks to, what they refuse."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import programs as language
from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import (
    STEP_TYPES,
    After,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Gather,
    Graph,
    Leaf,
    Linear,
    Local,
    Nest,
    Optimize,
    Outlast,
    Own,
    Parallel,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Train,
    Unreached,
    Wait,
)
from rpcprops.steps.base import BETWEEN_STEPS, CLEARLY_LATE
from rpcprops.steps.values import SORTS
from rpcprops.strategies import fault_tables, programs, programs_under_faults, register
from rpcprops.strategies.drawing import FIRST_KINDS, KINDS, StepDrawer
from rpcprops.strategies.late import Late, waits_of
from tests._draws import QUIET, draws, smallest

NAMES = {
    name: getattr(language, name)
    for name in ("Program", "End", *(c.__name__ for c in STEP_TYPES.values()))
} | {"FaultPlan": FaultPlan, "FaultTable": FaultTable}
SEEDS = 1
CLEANUP = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
#: Virtual seconds that drawn timeouts leave for an answer, more than the oracle asks.
IN_TIME = 600.0
DELAYED = FaultPlan(
    by_rank={1: FaultTable(messages_to_delay=dict.fromkeys(MessageType, 2.0))},
)


@functools.cache
def long_programs() -> tuple[Program, ...]:
    """Programs of up to 64 steps, drawn once for all the tests that look at such."""
    return tuple(draws(programs(max_steps=64), 600, 1))


def leaves_of_long_programs() -> list[Leaf]:
    return [leaf for program in long_programs() for leaf in program.leaves]


def owners(program: Program) -> dict[str, int]:
    """The rank that owns what each handle of a program refers to."""
    found: dict[str, int] = {}
    for leaf in program.leaves:
        match leaf:
            case Remote() | Nest():
                found[leaf.out] = leaf.to
            case Own():
                found[leaf.out] = leaf.at
            case Graph(late=(rank, _)) if leaf.out:
                found[leaf.out] = rank
            case Share() | Through() if leaf.out:
                found[leaf.out] = found[leaf.handle]
            case _:
                pass
    return found


Message = tuple[int, MessageType]


def messages(program: Program) -> Iterator[Message]:
    """The messages that some step of a program surely sends, and their senders."""
    for _, sent in messages_by_step(program):
        yield from sent


def messages_by_step(program: Program) -> Iterator[tuple[Leaf, list[Message]]]:
    """Each step, and what it surely sends; the message that its timeout bounds comes first."""
    owner = owners(program)
    typed: dict[str, bool] = {}
    for leaf in program.leaves:
        yield leaf, list(_messages(leaf, owner, typed))


def _carried(leaf: Carry) -> Iterator[Message]:
    """What a value surely sends; an RRef in it sends more."""
    fate = SORTS[leaf.sort]
    caller, fetcher = leaf.at, leaf.to
    match leaf.way:
        case "result":
            yield caller, MessageType.PYTHON_CALL
        case "echo" | "async" if not fate.argument or fate.refused_by in ("reader", "answer"):
            yield caller, MessageType.PYTHON_CALL
            if fate.rrefs and caller != fetcher:
                yield caller, MessageType.RREF_CHILD_ACCEPT
                yield fetcher, MessageType.SCRIPT_RREF_FETCH_CALL
                yield fetcher, MessageType.RREF_USER_DELETE
        case "remote":
            yield caller, MessageType.PYTHON_REMOTE_CALL
            if caller != fetcher:
                yield caller, MessageType.PYTHON_RREF_FETCH_CALL
                yield caller, MessageType.RREF_USER_DELETE
        case "remote-echo" if not fate.argument or fate.refused_by in ("reader", "answer"):
            yield caller, MessageType.PYTHON_REMOTE_CALL
            if caller != fetcher:
                yield caller, MessageType.RREF_USER_DELETE
        case "own" if fate.owned != "refused":
            yield caller, MessageType.PYTHON_CALL
            if caller != fetcher:
                kind = "SCRIPT" if fate.owned == "typed" else "PYTHON"
                yield fetcher, MessageType[f"{kind}_RREF_FETCH_CALL"]
                yield fetcher, MessageType.RREF_USER_DELETE
        case _:
            pass


def asked(leaf: Context | Graph | Linear | Optimize | Train) -> Sequence[int]:
    """The ranks that a step asks in its context, and that mostly answer with a gradient to come."""
    match leaf:
        case Context():
            return leaf.path
        case Graph():
            return sorted({rank for *_, rank, how in leaf.operations if how})
        case Linear():
            return (leaf.to,)
        case _:
            return leaf.owners


def _messages(  # noqa: C901, PLR0912 - one case for each kind of step
    leaf: Leaf, owner: dict[str, int], typed: dict[str, bool]
) -> Iterator[Message]:
    def arrives(handle: str, sender: int, receiver: int) -> Iterator[Message]:
        if sender != owner[handle]:
            yield receiver, MessageType.RREF_CHILD_ACCEPT
            if receiver != owner[handle]:
                yield receiver, MessageType.RREF_FORK_REQUEST

    script = getattr(leaf, "flavour", "python") != "python"
    match leaf:
        case Remote():
            typed[leaf.out] = script
            yield leaf.at, MessageType["SCRIPT_REMOTE_CALL" if script else "PYTHON_REMOTE_CALL"]
            if isinstance(leaf.right, str):
                yield from arrives(leaf.right, leaf.at, leaf.to)
        case Own():
            typed[leaf.out] = True
        case Carry():
            yield from _carried(leaf)
        case Call():
            yield leaf.at, MessageType["SCRIPT_CALL" if script else "PYTHON_CALL"]
            if isinstance(leaf.right, str):
                yield from arrives(leaf.right, leaf.at, leaf.to)
        case Share():
            typed[leaf.out] = typed[leaf.handle]
            yield leaf.at, MessageType.PYTHON_CALL
            yield from arrives(leaf.handle, leaf.at, leaf.to)
        case Fetch() if owner[leaf.handle] != leaf.at:
            kind = "SCRIPT" if typed[leaf.handle] else "PYTHON"
            yield leaf.at, MessageType[f"{kind}_RREF_FETCH_CALL"]
        case Drop() if owner[leaf.handle] != leaf.at:
            yield leaf.at, MessageType.RREF_USER_DELETE
        case Bump():
            yield leaf.at, MessageType.SCRIPT_CALL
            yield from arrives(leaf.handle, leaf.at, owner[leaf.handle])
        case Nest():
            typed[leaf.out] = script
            yield leaf.at, MessageType.PYTHON_CALL
            yield (
                leaf.via,
                MessageType["SCRIPT_REMOTE_CALL" if script else "PYTHON_REMOTE_CALL"],
            )
            yield from arrives(leaf.out, leaf.via, leaf.at)
            if leaf.via != leaf.to:
                yield leaf.via, MessageType.RREF_USER_DELETE
        case Through():
            if leaf.out:
                typed[leaf.out] = False
        case Context() | Graph() | Linear() | Optimize() | Train():
            for rank in asked(leaf):
                if rank != leaf.at:
                    yield leaf.at, CLEANUP
                    yield rank, CLEANUP
        case _:
            pass


def can_fire(program: Program, plan: FaultPlan) -> bool:
    """Whether the plan strikes some message of the program, its shutdown included."""
    seen = predict(program, plan)
    struck = (*seen.failures(), *seen.last_failures(), *seen.delays(plan))
    return any(sum(by_type.values()) for by_type in struck)


# Every draw is valid.


WIDE = st.one_of(
    programs(),
    programs(max_steps=64),
    programs(plan=DELAYED),
    programs_under_faults(max_steps=32).map(lambda drawn: drawn[0]),
)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_ranks_may_come_late_to_the_end(size: int) -> None:
    """Each rank may be the first or the last to shut down; the number 0 names the last rank."""
    ranks = range(size)

    def late(who: Late) -> list[set[int]]:
        found = (waits_of(who, number, size) for number in range(2**size))
        return [{rank for rank, wait in enumerate(waits) if wait} for waits in found]

    assert late("one")[:size] == [{size - 1 - n} for n in ranks]
    assert late("others")[:size] == [{*ranks} - {size - 1 - n} for n in ranks]
    some = late("some")
    assert some[0] == {size - 1}
    assert len({frozenset(one) for one in some}) == max(1, 2**size - 2)
    assert size == 1 or {*ranks} not in some
    assert set(map(len, late(""))) == {0}


def test_every_rank_shuts_down_first_in_some_program() -> None:
    """Also alone, before all others."""
    drawn = programs(min_world_size=3, max_world_size=3, max_steps=1, plan=FaultPlan())
    ends = {one.end.waits for start in range(4) for one in draws(drawn, 200, start)}
    assert {(30.0, 30.0), (30.0, 0.0, 30.0), (0.0, 30.0, 30.0)} <= ends
    assert {(30.0,), (0.0, 30.0), (0.0, 0.0, 30.0)} <= ends


def test_what_few_programs_have_is_drawn() -> None:
    """More RRefs beside a handle and a larger value, without faults; owners that ignore leaks."""
    limits: Any = {"max_world_size": 3, "min_steps": 2, "max_steps": 8}
    drawn = programs(kinds=("remote", "drop"), settles=True, plan=FaultPlan(), **limits)
    found = [one for start in range(6) for one in draws(drawn, 200, start)]
    made = [leaf for one in found for leaf in one.leaves if isinstance(leaf, Remote)]
    assert {1, 7} <= {step.beside for step in made}
    assert {0, 1} == {step.megabytes for step in made}
    assert sum(step.beside + step.megabytes > 0 for step in made) < len(made) / 8
    faulty = programs(kinds=("remote",), plan=FaultTable([MessageType.SCRIPT_REMOTE_CALL], 1))
    assert not any("beside" in repr(one) for one in draws(faulty, 200))
    at_once = [one.end for one in found if one.end.how == "at once"]
    ignoring = sum(end.ignores_leaks for end in at_once)
    assert 0 < ignoring < len(at_once) / 2
    assert not any(one.end.ignores_leaks for one in found if one.end.how != "at once")


@settings(QUIET, max_examples=150)
@given(WIDE)
def test_a_program_comes_back_from_json_and_from_its_repr(program: Program) -> None:
    """What is drawn is accepted anew, as Python and as JSON, and equals itself."""
    fields = (program.world_size, program.steps, program.name, program.settles, program.rpc_timeout)
    assert Program(*fields, program.num_worker_threads, program.end) == program
    assert from_json(to_json(program), Program) == program
    assert eval(repr(program), NAMES) == program


@settings(QUIET, max_examples=60)
@given(WIDE)
def test_a_program_can_do_without_any_step(program: Program) -> None:
    """Without one step, and what needs it, there is a valid program that is shorter."""
    for index in range(len(program.leaves)):
        assert len(program.without(index).leaves) < len(program.leaves)


@settings(QUIET, max_examples=100)
@given(st.data())
def test_a_program_keeps_to_what_was_asked(data: st.DataObject) -> None:
    """Ranks, steps, kinds, branches and the settle at the end stay within their bounds."""
    world = sorted(data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8))))
    steps = sorted(data.draw(st.tuples(st.integers(0, 64), st.integers(0, 64))))
    kinds = data.draw(st.none() | st.sets(st.sampled_from(KINDS)))
    if kinds is not None:
        kinds |= {data.draw(st.sampled_from(FIRST_KINDS))}
    branches = data.draw(st.booleans())
    settles = data.draw(st.sampled_from([None, True, False]))
    program = data.draw(
        programs(
            min_world_size=world[0],
            max_world_size=world[1],
            min_steps=steps[0],
            max_steps=steps[1],
            kinds=kinds,
            branches=branches,
            settles=settles,
        )
    )
    assert world[0] <= program.world_size <= world[1]
    assert steps[0] <= len(program.leaves) <= steps[1]
    assert kinds is None or {leaf.op for leaf in program.leaves} <= kinds
    assert branches or not any(isinstance(step, Parallel) for step in program.steps)
    assert settles is None or program.settles is settles


def test_names_are_given_in_order() -> None:
    """Handles are a, b, …, futures f0, f1, …, contexts x0, x1, …, as the program makes them."""
    for program in long_programs():
        made: list[str] = []
        futures: list[str] = []
        contexts: list[str] = []
        for leaf in program.leaves:
            if isinstance(leaf, Call):
                futures += [leaf.out] if leaf.out else []
            elif isinstance(
                leaf, Context | Graph | Linear | Optimize | Outlast | Train | Unreached
            ):
                contexts.append(leaf.name)
                made += [leaf.out] if isinstance(leaf, Graph) and leaf.out else []
            elif getattr(leaf, "out", ""):
                made.append(leaf.out)  # type: ignore[attr-defined]
        assert made == sorted(made, key=lambda name: (len(name), name))
        assert made[:26] == list("abcdefghijklmnopqrstuvwxyz")[: len(made)]
        assert futures == [f"f{n}" for n in range(len(futures))]
        assert contexts == [f"x{n}" for n in range(len(contexts))]


def numbers(value: Any) -> Iterator[float]:
    """Every number in the values of a step."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from numbers(item)


def test_values_are_exact() -> None:
    """Values are small whole numbers, so no order of operations changes a sum or a product."""
    for program in long_programs():
        for leaf in program.leaves:
            for name in ("left", "right", "value", "addend"):
                for number in numbers(getattr(leaf, name, ())):
                    assert number == int(number)
                    assert abs(number) <= 5
            if isinstance(leaf, Context):
                assert len(leaf.path) <= 5


@settings(QUIET, max_examples=100)
@given(programs_under_faults(max_steps=64))
def test_a_program_is_certain_and_meets_no_known_finding(
    drawn: tuple[Program, FaultPlan],
) -> None:
    """Under the plan it was drawn for, the oracle knows how each step ends."""
    program, plan = drawn
    seen = predict(program, plan)
    # Two profiled calls meet the first, and a program may have two (docs/findings.md). The others
    # explain only how a rank dies where ranks shut down at once.
    hasty = (
        {"shutdown-races-delete", "fork-request-given-up"} if program.ends_hastily else set[str]()
    )
    assert seen.known_bugs <= {"profiled-events-lost"} | hasty
    assert "unknown" not in {step.error for step in seen.steps}


def test_no_value_is_changed_that_a_function_may_still_read() -> None:
    """The oracle predicts all that is drawn, though some change values and some read them later."""
    for reads in ("through", "remote", "share", "call"):
        kinds = ("remote", reads, "bump")
        for program in draws(programs(kinds=kinds, max_world_size=2, max_steps=24), 60):
            predict(program, FaultPlan())


def test_a_context_is_asked_for_after_a_settle() -> None:
    """A context id is refused for sure only once the ranks have cleaned up."""
    for program in long_programs():
        settled: set[str] = set()
        ended: set[str] = set()
        for leaf in program.leaves:
            if isinstance(leaf, Context | Graph | Linear | Outlast | Unreached):
                ended.add(leaf.name)
            elif isinstance(leaf, Settle):
                settled |= ended
            elif isinstance(leaf, Refused):
                assert leaf.context in settled


# Timeouts.


@pytest.mark.parametrize(
    "plan",
    [
        FaultPlan(),
        DELAYED,
        FaultPlan(FaultTable(messages_to_delay=dict.fromkeys(MessageType, 0.5))),
        FaultPlan(FaultTable(messages_to_delay=dict.fromkeys(MessageType, 0.499))),
        FaultPlan(FaultTable(messages_to_delay=dict.fromkeys(MessageType, 3600.0))),
    ],
)
def test_a_timeout_decides(plan: FaultPlan) -> None:
    """Under its plan each timeout is shorter than the wait, or longer, by what the oracle asks."""
    timeouts: Counter[bool] = Counter()
    kinds = ("remote", "own", "call", "share", "fetch", "settle")
    for program in draws(programs(plan=plan, kinds=kinds, max_world_size=3, branches=False), 150):
        for leaf, sent in messages_by_step(program):
            timeout = getattr(leaf, "timeout", None)
            if timeout is None:
                continue
            delay = 0.0
            if sent:
                # The answer of a call that shares an RRef waits until its new user is confirmed.
                confirms = MessageType.RREF_FORK_REQUEST if isinstance(leaf, Share) else None
                awaited = [sent[0], *(one for one in sent[1:] if one[1] is confirms)]
                delay = max(plan.table(at).messages_to_delay.get(what, 0.0) for at, what in awaited)
            if isinstance(leaf, Fetch) and timeout < delay + IN_TIME - BETWEEN_STEPS:
                # The step before it has begun to make the value.
                delay = max(delay, 130.0 - BETWEEN_STEPS)
            slack = timeout - delay - leaf.lasts
            assert slack <= -CLEARLY_LATE or slack >= IN_TIME
            timeouts[timeout < delay] += not leaf.lasts and not isinstance(leaf, Fetch)
    assert timeouts[False]
    late = any(table.delaying and max(table.delaying.values()) >= 500 for table in tables(plan))
    assert bool(timeouts[True]) == late


def test_a_timeout_decides_whatever_its_answer_waits_for() -> None:
    """Retries and the longest delays of what callees send leave no drawn timeout undecided."""
    slow = FaultTable(RETRYABLE_MESSAGE_TYPES, 5, dict.fromkeys(MessageType, 3600.0))
    kinds = ("remote", "call", "fetch", "share", "through", "settle")
    drawn = programs(plan=slow, kinds=kinds, max_world_size=3, min_steps=8, max_steps=64)
    for program in draws(drawn, 100):
        assert "unknown" not in {step.error for step in predict(program, FaultPlan(slow)).steps}


def tables(plan: FaultPlan) -> list[FaultTable]:
    return [plan.default, *plan.by_rank.values()]


def test_a_timeout_without_a_plan_is_beyond_any_delay() -> None:
    """A program for any plan has timeouts that even the longest delay of one does not reach."""
    kinds = ("remote", "share", "fetch", "call", "settle")
    drawn = draws(programs(kinds=kinds, min_steps=6), 250)
    leaves = [leaf for program in drawn for leaf in program.leaves]
    found = [leaf for leaf in leaves if isinstance(leaf, Remote | Share | Fetch | Call)]
    given = [leaf.timeout - leaf.lasts for leaf in found if leaf.timeout is not None]
    in_time = [slack for slack in given if slack > 0]
    assert 0 < len(in_time) < len(given) < len(found) / 2
    assert min(in_time) > 3600 + IN_TIME


# What it shrinks to.


def has(*kinds: type[Any]) -> Callable[[Program], bool]:
    return lambda program: any(isinstance(leaf, kinds) for leaf in program.leaves)


def has_threads(program: Program) -> bool:
    """Whether some rank runs two branches at the same time."""
    return any(
        len(step.branches) > len({leaf.at for leaf in step.leaves})
        for step in program.steps
        if isinstance(step, Parallel)
    )


def forks_and_fetches(program: Program) -> bool:
    """A user shares with another user, which fetches."""
    owner = owners(program)
    forks = [
        leaf.out
        for leaf in program.leaves
        if isinstance(leaf, Share) and len({leaf.at, leaf.to, owner[leaf.out]}) == 3
    ]
    return any(isinstance(leaf, Fetch) and leaf.handle in forks for leaf in program.leaves)


def two_contexts_at_once(program: Program) -> bool:
    return any(
        isinstance(step, Parallel)
        and sum(any(isinstance(leaf, Context) for leaf in branch) for branch in step.branches) > 1
        for step in program.steps
    )


ANY = Remote(0, 0, "a")


@pytest.mark.parametrize(
    ("holds", "world_size", "steps"),
    [
        (lambda _: True, 1, (ANY,)),
        (lambda p: p.world_size == 3, 3, (Remote(0, 1, "a"),)),
        (lambda p: not p.settles, 1, (ANY,)),
        (lambda p: len(p.leaves) > 2, 1, (ANY, Remote(0, 0, "b"), Remote(0, 0, "c"))),
        (has(Drop), 1, (ANY, Drop(0, "a"))),
        (has(Own), 1, (Own(0, "a"),)),
        (
            lambda p: has(Bump)(p) and not has(Own)(p),
            1,
            (Remote(0, 0, "a", flavour="builtin"), Bump(0, "a")),
        ),
        (has(Wait), 1, (Call(0, 0, wait="later", out="f0"), Wait(0, "f0"))),
        (has(Refused), 1, (Context(0, "x0"), Settle(), Refused(0, "x0"))),
        (
            lambda p: any(
                isinstance(leaf, Call) and leaf.raises and leaf.wait == "async" for leaf in p.leaves
            ),
            1,
            (Call(0, 0, wait="async", raises=True),),
        ),
        (
            lambda p: any(isinstance(leaf, Context) and len(leaf.path) > 1 for leaf in p.leaves),
            2,
            (Context(0, "x0", (1, 0)),),
        ),
        (
            lambda p: any(isinstance(x, Context) and x.nested and x.retain for x in p.leaves),
            1,
            (Context(0, "x0", nested=True, retain=True),),
        ),
        (
            lambda p: any(isinstance(leaf, Optimize) and len(leaf.owners) > 1 for leaf in p.leaves),
            2,
            (Optimize(0, "x0", (1, 0)),),
        ),
        (
            lambda p: any(isinstance(step, Parallel) for step in p.steps),
            1,
            (Parallel(((Remote(0, 0, "a"),), (Remote(0, 0, "b"),))),),
        ),
        pytest.param(
            has_threads,
            1,
            (Parallel(((Remote(0, 0, "a"),), (Remote(0, 0, "b"),))),),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            two_contexts_at_once,
            2,
            (Parallel(((Context(0, "x0"),), (Context(1, "x1"),))),),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_smallest_program(holds: Any, world_size: int, steps: tuple[Step, ...]) -> None:
    """A program shrinks to the steps that a person would write for what must be in it."""
    for program in smallest(programs(), holds, SEEDS):
        assert (program.world_size, program.steps) == (world_size, steps)


@pytest.mark.nightly
def test_the_smallest_program_in_which_a_user_forks_to_a_user() -> None:
    """What makes a handle, a share to the third rank, and a fetch there."""
    for program in smallest(programs(), forks_and_fetches, SEEDS):
        assert program.world_size == 3
        makes, shares, fetches = program.steps
        assert isinstance(makes, Remote | Nest)
        assert shares in [Share(makes.at, "a", rank, "b") for rank in range(3)]
        assert fetches in [Fetch(rank, "b") for rank in range(3)]


def fires(kind: MessageType) -> Callable[[tuple[Program, FaultPlan]], bool]:
    return lambda drawn: any(
        message is kind and kind in drawn[1].table(rank).failing
        for rank, message in messages(drawn[0])
    )


_LEAF: Any = ((0, "plain"),)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [
        (
            CLEANUP,
            [
                (2, (Context(0, "x0", (1,)),)),
                (2, (Optimize(0, "x0", (1,)),)),
                (2, (Train(0, "x0", (1,)),)),
                (2, (Graph(0, "x0", _LEAF, (("add", (0, 0), 1, "sync"),), ((1,),)),)),
            ],
        ),
        pytest.param(
            MessageType.RREF_FORK_REQUEST,
            [
                (2, (Nest(0, 0, 1, "a"),)),
                (3, (Nest(0, 1, 2, "a"),)),
                (2, (Remote(0, 1, "a"), Share(0, "a", 0, "b"))),
            ],
            # The other shows the same, and takes a third of the time.
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_program_shrinks_together_with_its_plan(
    kind: MessageType, alone: list[tuple[int, tuple[Step, ...]]]
) -> None:
    """What is left is one failure of one type at one rank, and the step whose message it fails.

    That step may need the one that makes its handle: to replace both by one of a later kind, a
    number would have to grow. So it would to make two ranks of the three of a nested call.
    """
    least = FaultPlan(by_rank={0: FaultTable((kind,), 1)})
    for program, plan in smallest(programs_under_faults(), fires(kind), 5):
        assert plan == least
        assert (program.world_size, program.steps) in alone


@pytest.mark.nightly
def test_a_timeout_shrinks_together_with_its_delay() -> None:
    """A fetch that is late for sure: half a second of delay, and half of that as its timeout."""

    def is_late(drawn: tuple[Program, FaultPlan]) -> bool:
        return any(isinstance(x, Fetch) and (x.timeout or 60) < 5 for x in drawn[0].leaves)

    for program, plan in smallest(programs_under_faults(), is_late, SEEDS):
        assert len(program.steps) == 2
        assert isinstance(program.steps[1], Fetch)
        assert program.steps[1].timeout == 0.25
        (table,) = plan.by_rank.values()
        assert set(table.messages_to_delay.values()) == {0.5}


# What is drawn.


#: Kinds that make what the others need, and that may stand in branches.
FEW = ("remote", "call", "context")


def in_branches(found: Iterable[Program]) -> set[str]:
    """The kinds that stand in branches."""
    steps = [step for program in found for step in program.steps if isinstance(step, Parallel)]
    return {leaf.op for step in steps for leaf in step.leaves}


def test_every_kind_and_every_size_is_drawn() -> None:
    """All kinds of step come, alone and in branches, in programs of few steps and of many."""
    found = long_programs()
    kinds = Counter(leaf.op for program in found for leaf in program.leaves)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 20, kinds
    parallel = [s for program in found for s in program.steps if isinstance(s, Parallel)]
    assert len(parallel) >= 60
    assert max(len(step.branches) for step in parallel) >= 4
    able = {kind for kind in KINDS if STEP_TYPES[kind].in_branch}
    assert in_branches(found) <= able
    for kind in able - in_branches(found):
        # By chance among so many kinds; it does come among few.
        few = programs(kinds={kind, *FEW}, min_world_size=2, min_steps=8)
        assert any(kind in in_branches(draws(few, 50, start)) for start in range(4))
    sizes = [len(program.leaves) for program in found]
    assert sum(size <= 8 for size in sizes) >= 30
    assert sum(size >= 32 for size in sizes) >= 60
    assert {program.world_size for program in found} == set(range(1, 9))
    assert {program.settles for program in found} == {True, False}


def test_each_kind_is_off_in_part_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind, early or late in the order, is off in a fifth to two thirds of the programs.

    Those that make or use RRefs are off in about a quarter, and others in half. Waits of minutes
    come in about a 40th. Hypothesis does not draw evenly, so both are bounds.
    """
    module = importlib.import_module("rpcprops.strategies.programs")
    off: Counter[str] = Counter()
    minutes: list[bool] = []

    class Seen(StepDrawer):
        def __init__(self, *args: Any, **options: Any) -> None:
            off.update(options["off"])
            minutes.append(options["minutes"])
            super().__init__(*args, **options)

    monkeypatch.setattr(module, "StepDrawer", Seen)
    for start in range(4):
        draws(programs(min_steps=0, max_steps=1), 500, start)
    for kind in KINDS:
        assert 1 / 5 < off[kind] / len(minutes) < 2 / 3, kind
    assert 0.02 < sum(minutes) / len(minutes) < 0.1


def test_the_kind_that_can_branch_may_be_off() -> None:
    """Where no kind that is on may stand in a branch, no branches begin."""
    for kinds in ({"settle", "pause"}, {"settle", "own", "refused"}):
        found = draws(programs(kinds=kinds, min_steps=8, max_steps=8), 60)
        assert {len(program.leaves) for program in found} == {8}


def test_a_program_goes_without_some_kinds() -> None:
    """Long programs lack many kinds each, so that those they have come often enough to meet."""
    found = draws(programs(min_steps=48, max_steps=48), 50)
    kinds = [len({leaf.op for leaf in program.leaves}) for program in found]
    assert sum(number <= len(KINDS) - 5 for number in kinds) >= 25


def test_forms_of_steps_are_drawn() -> None:
    """Flavours, ways to wait, errors, argument handles, nested contexts all come."""
    leaves = leaves_of_long_programs()
    calls = [leaf for leaf in leaves if isinstance(leaf, Call)]
    assert {(c.flavour, c.wait) for c in calls} == {
        (flavour, wait)
        for flavour in ("python", "builtin", "script")
        for wait in ("sync", "async", "later")
    }
    assert any(isinstance(call.right, str) for call in calls)
    assert {c.flavour for c in calls if c.raises} == {"python", "script"}
    assert {leaf.inside for leaf in leaves if isinstance(leaf, Share)} == {"", "list", "dict"}
    assert {x.how for x in leaves if isinstance(x, Through)} == {"sync", "async", "remote"}
    assert {x.by for x in leaves if isinstance(x, Drop)} == {"del", "scope"}
    contexts = [leaf for leaf in leaves if isinstance(leaf, Context)]
    for name in ("nested", "rrefs", "backward", "raises", "retain"):
        assert {getattr(context, name) for context in contexts} == {True, False}
    assert {len(context.path) for context in contexts} == set(range(6))
    assert any(isinstance(leaf, Remote) and leaf.raises for leaf in leaves)
    assert any(isinstance(leaf, Chain) and leaf.at == leaf.then != leaf.to for leaf in leaves)
    assert any(isinstance(leaf, Count) and leaf.at == leaf.to for leaf in leaves)


def test_contexts_that_break_are_drawn() -> None:
    """Some contexts have a rank whose backward raises."""
    found = draws(programs(min_steps=8, kinds=("context",)), 20, start=1)
    leaves = [leaf for program in found for leaf in program.leaves]
    assert any(isinstance(leaf, Context) and leaf.breaks is not None for leaf in leaves)


@functools.cache
def of_four_ranks(plan: FaultPlan | None) -> tuple[Program, ...]:
    return tuple(draws(programs(plan=plan, min_world_size=4, max_world_size=4), 150))


@pytest.mark.parametrize("kind", MessageType)
def test_a_plan_guides_the_draw(kind: MessageType) -> None:
    """Most programs drawn for a fault at one rank send what it strikes; few of the others do."""
    table = FaultTable(messages_to_delay={kind: 1.0})
    if kind.is_retryable:
        table = FaultTable((kind,), 1)
    plan = FaultPlan(by_rank={2: table})
    guided, unguided = (
        sum(can_fire(program, plan) for program in found) / len(found)
        for found in (of_four_ranks(plan), of_four_ranks(None))
    )
    assert guided > 0.5
    assert guided > 1.5 * unguided


def test_most_plans_fire_in_the_program_that_is_drawn_with_them() -> None:
    """Where there are faults, they mostly strike."""
    found = draws(programs_under_faults(min_world_size=2, min_steps=4), 200)
    faulty = [(program, plan) for program, plan in found if plan != FaultPlan()]
    assert len(faulty) > 100
    assert sum(can_fire(*drawn) for drawn in faulty) > 0.6 * len(faulty)


def test_a_plan_is_of_the_world_of_its_program() -> None:
    """The plan names ranks of the program only, and draws from the tables that were given."""
    mild = fault_tables(messages=("RREF_USER_DELETE",), max_fail_sends=1, max_delay=0)
    for program, plan in draws(programs_under_faults(tables=mild, max_faulty_ranks=1), 100):
        plan.check(program.world_size)
        assert len(plan.faulty_ranks(program.world_size)) <= 1
        assert set(tables(plan)) <= {FaultTable(), FaultTable(("RREF_USER_DELETE",), 1)}


@pytest.mark.parametrize("kinds", [{kind} for kind in FIRST_KINDS])
def test_one_kind_alone_can_be_drawn(kinds: set[str]) -> None:
    """Any kind that can come first makes whole programs by itself, with branches too."""
    found = draws(programs(kinds=kinds, min_world_size=2, min_steps=6), 20)
    assert {leaf.op for program in found for leaf in program.leaves} == kinds
    parallel = any(isinstance(step, Parallel) for program in found for step in program.steps)
    assert parallel == any(STEP_TYPES[kind].in_branch for kind in kinds)


def test_no_steps_can_be_asked_for() -> None:
    """A program of no steps only starts and shuts down its ranks."""
    assert {p.steps for p in draws(programs(min_steps=0, max_steps=0), 20)} == {()}


def test_a_value_is_sent_on_from_its_owner_once_it_is_there() -> None:
    """An owner that was sent its own RRef fetches the value, or settles, before it sends it on."""
    for program in long_programs():
        owner = owners(program)
        unmade: set[str] = set()
        for leaf in program.leaves:
            sent = getattr(leaf, "right", None)
            if isinstance(leaf, Share | Bump | Through):
                sent = leaf.handle
            assert sent not in unmade
            if isinstance(leaf, Settle):
                unmade.clear()
            elif isinstance(leaf, Fetch | Local):
                unmade.discard(leaf.handle)
            elif (isinstance(leaf, Share) and leaf.at != leaf.to == owner[leaf.out]) or (
                isinstance(leaf, Nest) and leaf.via != leaf.to == leaf.at
            ):
                unmade.add(leaf.out)


# One step at a time.


@settings(QUIET, max_examples=60)
@given(st.data(), st.lists(st.sampled_from(KINDS), max_size=30))
def test_steps_can_be_asked_for_one_by_one(data: st.DataObject, kinds: list[str]) -> None:
    """Each kind is drawn when it can come next, and refused without a trace when it cannot."""
    steps = StepDrawer(data.draw, 3)
    for kind in kinds:
        before = list(steps.steps)
        may = steps.may(kind)
        added = steps.add_kind(kind)
        assert added == may
        assert len(steps.steps) == len(before) + added
        assert added or kind not in FIRST_KINDS
        if added:
            assert steps.steps[-1].op == kind
    Program(3, tuple(steps.steps))


# Determinism, registration.


@pytest.mark.parametrize("strategy", [programs(max_steps=64), programs_under_faults()])
def test_a_seed_draws_one_sequence(strategy: st.SearchStrategy[Any]) -> None:
    """Runs with one seed draw the same values in the same order; another seed draws others."""
    first = draws(strategy, 20, start=1)
    assert all(draws(strategy, 20, start=1) == first for _ in range(3))
    assert draws(strategy, 20, start=2) != first


def test_a_program_is_drawn_from_its_type() -> None:
    """After registration from_type(Program), and so any builds() of a caller's, draws programs."""
    register.register()
    assert len({program.world_size for program in draws(st.from_type(Program), 50)}) > 3


# What is refused.


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (programs, {"min_steps": -1}, ["min_steps=-1 (type int)", "0 to 64"]),
        (programs, {"max_steps": 65}, ["max_steps=65 (type int)", "0 to 64", "yourself"]),
        (programs, {"max_steps": True}, ["max_steps=True (type bool)", "must be an int"]),
        (programs, {"min_steps": 17}, ["min_steps=17 (type int)", "raise max_steps"]),
        (programs, {"min_world_size": 0}, ["min_world_size=0 (type int)", "1 to 16"]),
        (programs, {"max_world_size": 17}, ["max_world_size=17 (type int)", "1 to 16"]),
        (programs, {"max_world_size": "4"}, ["max_world_size='4' (type str)", "must be an int"]),
        (
            programs,
            {"min_world_size": 3, "max_world_size": 2},
            ["min_world_size=3 (type int)", "max_world_size=2", "lower it"],
        ),
        (programs, {"kinds": "remote"}, ["kinds='remote' (type str)", "('remote',)"]),
        (programs, {"kinds": 3}, ["kinds=3 (type int)", "collection"]),
        (programs, {"kinds": ["remotes"]}, ["kinds=['remotes']", "'remotes'", "no step", "remote"]),
        (programs, {"kinds": [Remote]}, ["kinds=[", "no step"]),
        (programs, {"kinds": ()}, ["kinds=() (type tuple)", "come first", "remote"]),
        (programs, {"kinds": {"fetch"}}, ["kinds={'fetch'} (type set)", "come first", "remote"]),
        (programs, {"kinds": ["parallel"]}, ["kinds=['parallel'] (type list)", "branches=True"]),
        (programs, {"branches": 1}, ["branches=1 (type int)", "bool"]),
        (programs, {"branches": None}, ["branches=None (type NoneType)", "bool"]),
        (programs, {"settles": "no"}, ["settles='no' (type str)", "None for either"]),
        (programs, {"plan": {}}, ["plan={} (type dict)", "FaultPlan", "programs_under_faults("]),
        (
            programs,
            {"plan": FaultPlan(by_rank={8: FaultTable()})},
            ["max_world_size=8 (type int)", "at least 9", "rank 8", "raise it"],
        ),
        (programs_under_faults, {"tables": FaultTable()}, ["tables=FaultTable()", "just(table)"]),
        (programs_under_faults, {"max_faulty_ranks": -1}, ["max_faulty_ranks=-1 (type int)"]),
        (programs_under_faults, {"max_steps": 65}, ["max_steps=65 (type int)", "0 to 64"]),
        (programs_under_faults, {"max_world_size": 0}, ["max_world_size=0 (type int)", "1 to 16"]),
    ],
)
def test_a_wrong_argument_is_refused_at_the_call(
    make: Any, arguments: dict[str, Any], expected: list[str]
) -> None:
    """The call itself raises, before any draw, and names the argument, its type and the remedy."""
    with pytest.raises(UsageError) as caught:
        make(**arguments)
    message = str(caught.value)
    assert all(part in message for part in expected), message


def test_arguments_are_keyword_only_and_described() -> None:
    """The strategies take their arguments by name, and say what they shrink to and raise."""
    for function in (programs, programs_under_faults):
        parameters = inspect.signature(function).parameters
        assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
        text = inspect.getdoc(function) or ""
        assert "Shrinks" in text
        assert "UsageError" in text
        assert all(f"{name}: " in text for name in parameters)


def test_nothing_rests_after_a_call_through_a_proxy() -> None:
    """Its RRef is deleted once the step has ended, so no short default timeout may follow."""
    quiet = (After(0, 1), Gather(0, (1, 1)))
    for step in (*quiet, After(0, 1, of="proxy"), Gather(0, (1, 1), of="proxy")):
        drawer = StepDrawer(lambda _: 0, 2)
        drawer.steps.append(step)
        assert drawer.rests == (step in quiet)
