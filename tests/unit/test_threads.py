"""The number of threads of a program's ranks: what steps need, what too few mean, what is drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar, TypeVar

import pytest

from rpcprops._json import from_json, to_json
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.outcomes import Counters
from rpcprops.programs import (
    STEP_TYPES,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Deferred,
    FailTwice,
    Fetch,
    Gather,
    Graph,
    Invoke,
    Method,
    Onward,
    Outlast,
    Own,
    Parallel,
    Profile,
    Program,
    Recurse,
    Remote,
    Scripted,
    Settle,
    Share,
    Step,
    Through,
)
from rpcprops.programs.threads import needed_threads, runs_out
from rpcprops.steps.run_out import run_out
from rpcprops.strategies import programs, programs_under_faults
from rpcprops.strategies.drawing import KINDS, StepDrawer
from rpcprops.torch_facts import UNKNOWN, TorchFacts
from tests._draws import draws

T = TypeVar("T")


@dataclass(frozen=True, slots=True, repr=False)
class Unknown(Step):
    """A kind of step of a user."""

    op: ClassVar[str] = "unknown-to-threads"
    at: int


# Others count the kinds.
del STEP_TYPES[Unknown.op]

QUIET = FaultPlan()
LATE = FaultPlan(FaultTable(messages_to_delay={"PYTHON_CALL": 1.0}))
FETCHING = Remote(0, 1, "b", right="a")


def needed(*steps: Step, timed: bool = False) -> int:
    return needed_threads(3, steps, timed=timed)


def test_each_kind_that_is_drawn_is_counted() -> None:
    """A kind that nobody has counted gets as many threads as were always there."""
    uncounted = {op for op in KINDS if STEP_TYPES[op].waits_at is Step.waits_at}
    # A call that outlasts its context keeps a thread busy while others must be served.
    assert uncounted <= {"rejoin", "outlast"}


@pytest.mark.parametrize(
    ("steps", "number"),
    [
        # Nothing waits in these.
        ((Call(0, 1), Count(1, 0), Chain(0, 1, 2), Own(0, "a"), Share(0, "a", 1, "b")), 1),
        ((Remote(0, 1, "a", seconds=2.0), Fetch(0, "a"), Gather(0, (1, 1))), 1),
        ((Context(0, "x", (1, 2, 1)), Deferred(0, 1, 2), Invoke(0, 1), Carry(0, 1, "rref")), 1),
        ((Carry(0, 1, "none", "own"),), 2),
        ((Carry(0, 1, "rref-pair", "echo"),), 2),
        # A called function fetches the value of a handle.
        ((Own(0, "a"), Call(0, 1, right="a")), 2),
        # The thread of a remote() may still wait when the next step begins, until a settle.
        ((Own(0, "a"), FETCHING, Call(0, 1, right="a")), 3),
        ((Own(0, "a"), FETCHING, Settle(), Call(0, 1, right="a")), 2),
        ((Remote(0, 1, "a", flavour="builtin"), Bump(0, "a"), Through(0, "a")), 2),
        ((Invoke(0, 1, "method", how="proxy"), Method(0, 1), Deferred(0, 1, 2, "again")), 2),
        # A function in TorchScript that waits for a future gives its thread back.
        ((Scripted(0, 1, 2), Scripted(0, 1, 2, "future"), Scripted(0, 1, 2, "fork")), 1),
        ((Scripted(0, 1, 2, "sync"),), 2),
        ((Scripted(0, 1, 2, "remote", timeout=900.0), Scripted(0, 1, 1, "sync")), 3),
        ((Profile(0, 1, "nested", 2), Graph(0, "x", ((1, "plain"),), ())), 2),
        # Every rank of a path but the last one waits.
        ((Recurse(0, (1,)),), 1),
        ((Recurse(0, (1, 2)),), 2),
        ((Recurse(0, (1, 0, 1, 0, 1)),), 3),
        ((Recurse(0, (1, 0), timeout=900.0), Recurse(0, (1, 0))), 3),
        ((Context(0, "x", (1, 2, 1, 2), nested=True),), 3),
        ((Onward(0, 1, 2, 3),), 4),
        # Branches run at once; the steps of one do not.
        ((Parallel(((Recurse(0, (1, 2)),), (Recurse(2, (1, 0)), Recurse(2, (1, 0))))),), 3),
    ],
)
def test_a_step_needs_a_thread_more_than_may_wait(steps: tuple[Step, ...], number: int) -> None:
    """So many threads suffice for these steps, which are predicted with them and not with fewer."""
    assert needed(*steps) == number
    assert predict(Program(3, steps, num_worker_threads=number), QUIET).certain
    if number > 1 and not any(isinstance(step, Onward) for step in steps):
        says = f"give the program {number}, or None|give it a timeout, or more threads"
        with pytest.raises(UsageError, match=says):
            predict(Program(3, steps, num_worker_threads=number - 1), QUIET)


@pytest.mark.parametrize(
    ("path", "number", "started", "stuck", "held"),
    [
        # The call of rank 1 is answered, and no thread is left there to hand that over.
        ((1, 0), 1, 2, {1}, {1: (1, 1), 0: (0, 0)}),
        # A function for which there is no thread is counted where it waits.
        ((1, 1), 1, 1, {1}, {1: (2, 1)}),
        ((1, 0, 1, 0, 1), 2, 4, {0, 1}, {1: (3, 2), 0: (2, 2)}),
        ((1, 2, 1, 0, 1), 2, 4, {1}, {1: (3, 2), 2: (1, 1), 0: (1, 1)}),
        # Ranks with a thread left come to rest until the first one that has none.
        ((1, 1, 2, 0), 2, 4, {1}, {1: (2, 2), 2: (0, 0), 0: (0, 0)}),
        ((1, 2, 0), 1, 3, {1, 2}, {1: (1, 1), 2: (1, 1), 0: (0, 0)}),
    ],
)
def test_calls_that_run_out_of_threads(
    path: tuple[int, ...],
    number: int,
    started: int,
    stuck: set[int],
    held: dict[int, tuple[int, int]],
) -> None:
    """Which functions start, which ranks wait for ever, and what the ranks then serve and await."""
    found = run_out(path, number)
    assert found is not None
    assert (found.started, set(found.stuck), dict(found.held)) == (started, stuck, held)
    assert found.sent == min(started + 1, len(path))
    assert run_out(path, len(path)) is None


def test_recursion_that_runs_out_of_threads_is_predicted() -> None:
    """Its caller gets the timeout, and the ranks hold for ever what they serve and await."""
    late = Recurse(0, (1, 2, 1), timeout=3.0)
    program = Program(3, (Own(0, "a"), late, Call(0, 0)), num_worker_threads=1)
    predicted = predict(program, QUIET)
    assert [step.error for step in predicted.steps] == ["", "timeout", ""]
    assert predicted.certain
    # api.py: _all_gather would wait for ever.
    assert not predicted.graceful
    held = [(held.server_calls, held.client_calls) for held in predicted.counters]
    assert held == [(0, 0), (2, 1), (1, 1)]
    assert [calls.get("step1", 0) for calls in predicted.calls] == [0, 1, 1]
    assert not predicted.met
    assert predict(replace(program, num_worker_threads=2), QUIET).graceful


def test_a_default_timeout_ends_what_waits_where_a_thread_is_left() -> None:
    """So what is kept is kept by the finding; and a rank without a thread waits for ever."""
    program = Program(3, (Recurse(0, (1, 2, 2)),), num_worker_threads=1, rpc_timeout=65.0)
    predicted = predict(program, QUIET)
    assert predicted.steps[0].error == "timeout"
    assert predicted.counters == (Counters(),) * 3
    says = {one.rank: one.says for one in predicted.met if one.finding == "timeout-needs-thread"}
    assert set(says) == {1, 2}
    assert "1 server call, 1 client call" in says[1].replace("\\", "")
    assert "2 server calls, 1 client call" in says[2].replace("\\", "")
    own = Program(2, (Recurse(0, (1, 0, 1), timeout=3.0),), num_worker_threads=1)
    assert predict(own, QUIET).stuck == {0}


RUNS_OUT = Recurse(0, (1, 1), timeout=3.0)


@pytest.mark.parametrize(
    ("program", "plan", "facts", "message"),
    [
        (Program(2, (Recurse(0, (1, 1)),)), QUIET, UNKNOWN, "give it a timeout, or more threads"),
        (Program(2, (Call(0, 1), RUNS_OUT)), QUIET, UNKNOWN, "put a Settle.. before it"),
        (
            Program(3, (Parallel(((RUNS_OUT,), (Call(2, 2),))),)),
            QUIET,
            UNKNOWN,
            "and no step beside",
        ),
        (Program(2, (RUNS_OUT, Call(0, 1))), QUIET, UNKNOWN, "use none of the ranks 1"),
        (Program(2, (RUNS_OUT, Carry(0, 0))), QUIET, UNKNOWN, "use one of call, chain"),
        (Program(2, (RUNS_OUT,), settles=False), QUIET, UNKNOWN, "write settles=True"),
        (
            Program(2, (RUNS_OUT,)),
            FaultPlan(by_rank={1: FaultTable(["PYTHON_CALL"], 1)}),
            UNKNOWN,
            "the plan fails some of its calls",
        ),
        (Program(2, (RUNS_OUT,)), QUIET, UNKNOWN.as_if_mended(), "and for no other"),
    ],
)
def test_what_is_not_known_of_recursion_that_runs_out_is_refused(
    program: Program, plan: FaultPlan, facts: TorchFacts, message: str
) -> None:
    """Where another step may take a thread, or end one, nobody can tell what is left."""
    program = replace(program, num_worker_threads=1)
    with pytest.raises(UsageError, match=message):
        predict(program, plan, facts)


def test_the_first_of_two_equal_timeouts_is_not_known() -> None:
    """Where the first rank has a thread left, its function raises when the default has come."""
    program = Program(3, (Recurse(0, (1, 2, 2)),), num_worker_threads=2, rpc_timeout=65.0)
    assert predict(program, QUIET).steps[0].error == ""
    longer = replace(program, steps=(Recurse(0, (1, 2, 2, 2)),))
    with pytest.raises(UsageError, match="at almost the same time"):
        predict(longer, QUIET)
    shorter = replace(program, steps=(Recurse(0, (1, 2, 2, 2), timeout=9.0),))
    assert predict(shorter, QUIET).steps[0].slack == 56.0


def test_a_default_timeout_leaves_threads_waiting() -> None:
    """After a call that it may have ended, the threads of that call count until a settle."""
    steps = (Recurse(0, (1, 0)), Recurse(0, (1, 0)))
    assert needed(*steps) == 2
    assert needed(*steps, timed=True) == 3


def test_a_step_of_another_kind_may_need_any_number() -> None:
    """Steps that a user defines get the threads that all programs have by default."""
    assert needed(Unknown(0)) == 8


def test_timeouts_are_certain_only_where_a_thread_is_free() -> None:
    """With few threads a call may wait for functions that sleep, and for messages that are late."""

    def errors(*steps: Step, plan: FaultPlan = QUIET, threads: int | None = 1) -> list[str]:
        program = Program(2, steps, num_worker_threads=threads)
        return [step.error for step in predict(program, plan).steps]

    late = Call(0, 1, timeout=3.0, seconds=12.0)
    assert errors(late) == ["timeout"]
    # The thread that would hand the timeout over runs the function.
    assert errors(Call(0, 0, timeout=3.0, seconds=12.0)) == ["unknown"]
    assert errors(Call(0, 0, timeout=3.0, seconds=12.0), threads=2) == ["timeout"]
    assert errors(late, plan=LATE) == ["unknown"]
    assert errors(late, plan=LATE, threads=8) == ["timeout"]
    assert errors(late, plan=LATE, threads=None) == ["timeout"]
    in_time = Call(0, 1, timeout=100.0)
    assert errors(in_time) == [""]
    assert errors(in_time, Call(0, 1, seconds=50.0)) == ["unknown", ""]
    assert errors(in_time, Call(0, 1, seconds=50.0), threads=8) == ["", ""]
    assert errors(in_time, plan=LATE) == ["unknown"]
    assert errors(Call(0, 1, timeout=30_000.0), plan=LATE) == [""]


def test_where_all_threads_wait_the_finding_is_met() -> None:
    """With one thread more it is not, and functions beside it take threads too."""

    def met(*steps: Step, threads: int | None) -> set[str]:
        return set(predict(Program(3, steps, num_worker_threads=threads), QUIET).known_bugs)

    step = Onward(0, 1, 2, 2)
    assert met(step, threads=2) == {"timeout-needs-thread"}
    assert met(step, threads=3) == met(step, threads=None) == set()
    both = Parallel(((step,), (Recurse(2, (1, 0)),)))
    assert met(both, threads=3) == {"timeout-needs-thread"}
    assert met(both, threads=4) == set()


def test_it_travels_and_is_printed() -> None:
    """JSON and repr keep it, JSON of older versions has none, and it tells programs apart."""
    program = Program(2, (Call(0, 1),), num_worker_threads=1)
    data = json.loads(json.dumps(to_json(program)))
    assert from_json(data, Program) == program != Program(2, (Call(0, 1),))
    del data["num_worker_threads"]
    assert from_json(data, Program) == Program(2, (Call(0, 1),))
    assert "num_worker_threads=1," in repr(program)
    assert "threads" not in repr(Program(2))


@pytest.mark.parametrize("wrong", [0, -1, 17, 1.0, True, "1"])
def test_a_wrong_one_is_refused(wrong: Any) -> None:
    """It is an int from 1 to torch's own number."""
    with pytest.raises(UsageError, match="num_worker_threads="):
        Program(2, (), num_worker_threads=wrong)


def test_drawn_numbers_suffice() -> None:
    """A share of the programs has a number, small ones most; all steps of these are predicted."""
    # Draws of one seed resemble each other.
    pairs = [(program, QUIET) for n in range(8) for program in draws(programs(max_steps=5), 50, n)]
    pairs += draws(programs_under_faults(max_world_size=4, max_steps=5), 60)
    numbers = Counter(program.num_worker_threads for program, _ in pairs)
    assert len(pairs) / 2 < numbers[None] < len(pairs)
    few = sum(count for number, count in numbers.items() if number and number < 4)
    assert few > 10
    for program, plan in pairs:
        if program.num_worker_threads is not None:
            predicted = predict(program, plan)
            assert predicted.certain
            assert "timeout-needs-thread" not in predicted.known_bugs


class Chance(StepDrawer):
    """A drawer that does without Hypothesis."""

    chance: Random

    def pick(self, options: Sequence[T], weights: tuple[float, ...] = ()) -> T:
        """One of some options."""
        return self.chance.choices(options, weights)[0] if weights else self.chance.choice(options)


def test_too_few_threads_are_drawn_where_torch_has_mended_the_finding() -> None:
    """Then all threads may run functions that wait, and otherwise one more is there."""

    def drawn(facts: TorchFacts) -> set[tuple[int, int | None]]:
        chance = Random(0)
        found: set[tuple[int, int | None]] = set()
        for _ in range(30):
            drawer = Chance(lambda _: 0, 3, facts=facts, threads=1)
            drawer.chance = chance
            assert drawer.add_kind("onward")
            (step,) = drawer.steps
            assert isinstance(step, Onward)
            found.add((step.calls, drawer.threads_of_ranks))
        return found

    assert drawn(UNKNOWN) == {(calls, calls + 1) for calls in range(1, 5)}
    assert drawn(UNKNOWN.as_if_mended()) == {(calls, 1) for calls in range(1, 5)}


def test_recursion_that_runs_out_is_drawn_last() -> None:
    """In a small share of the programs with few threads; the ranks on its path do nothing else."""
    found = 0
    for number in range(48):
        if found and number >= 16:
            # They are so few that the first sixteen hundred may well hold none.
            break
        for program, plan in draws(programs_under_faults(max_world_size=4), 100, number):
            threads = program.num_worker_threads or 0
            out = [step for step in program.leaves if runs_out(step, threads)]
            found += len(out)
            if out:
                assert [*program.steps[-2:]] == [Settle(), out[0]]
                assert program.settles
                assert not predict(program, plan).graceful
    assert found


def test_the_end_of_nested_calls_is_predicted() -> None:
    """Each inner call is answered or timed out, and a lost one is an error of its function."""
    late = Onward(0, 1, 2, 2, within=3.0, seconds=12.0, patience=600.0)
    predicted = predict(Program(3, (Onward(0, 1, 2, 2), late)), QUIET)
    assert [step.value for step in predicted.steps] == [[[3.0], [3.0]], ["timeout"] * 2]
    assert predicted.calls[2] == dict.fromkeys(
        ("step0/0/then", "step0/1/then", "step1/0/then", "step1/1/then"), 1
    )
    for rank, error in ((0, "injected"), (1, "remote")):
        lost = FaultPlan(by_rank={rank: FaultTable(["PYTHON_CALL"], 1)})
        assert predict(Program(3, (Onward(0, 1, 2, 2),)), lost).steps[0].error == error
    # The delay of the inner call outlasts its timeout; a timeout that is near tells nothing.
    delayed = FaultPlan(by_rank={1: FaultTable(messages_to_delay={"PYTHON_CALL": 4.0})})
    short = Onward(0, 1, 2, within=2.0)
    assert predict(Program(3, (short,)), delayed).steps[0].value == ["timeout"]
    assert predict(Program(3, (short,)), QUIET).steps[0].error == "unknown"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Onward(0, 1, 2, 0), "calls=0 must lie in 1 to 4"),
        (Onward(0, 1, 2, within=0.0), "within=0.0 must lie in"),
        (Onward(0, 1, 2, within=5.0, patience=5.0), "must be above within=5.0"),
        (Onward(0, 1, 1, seconds=2.0), "needs another rank than to=1"),
    ],
)
def test_nested_calls_that_show_nothing_are_refused(step: Step, message: str) -> None:
    """A step says what it lacks."""
    with pytest.raises(UsageError, match=message):
        Program(3, (step,))


def test_a_default_timeout_and_few_threads_go_together_where_nothing_waits_too_long() -> None:
    """What waits for a thread waits for all that sleeps; a default below that is refused."""
    slow = Call(0, 1, seconds=40.0)
    program = Program(2, (slow, Count(0, 1), Call(0, 1, seconds=40.0)), rpc_timeout=130.0)
    assert [step.error for step in predict(program, FaultPlan()).steps] == ["", "", ""]
    few = replace(program, num_worker_threads=2)
    assert [step.error for step in predict(few, FaultPlan()).steps] != ["", "", ""]
    longer = replace(few, rpc_timeout=300.0)
    assert [step.error for step in predict(longer, FaultPlan()).steps] == ["", "", ""]
    nested = replace(few, steps=(*few.steps, Chain(0, 1, 0)))
    with pytest.raises(UsageError, match="default"):
        predict(nested, FaultPlan())


def test_both_are_drawn() -> None:
    """A program may have a default timeout and few threads, and then none of its calls ends."""
    chance, together = Random(0), 0
    for _ in range(60):
        drawer = Chance(lambda _: 0, 3, plan=FaultPlan(), rpc_timeout=300.0, threads=2)
        drawer.chance = chance
        for _ in range(4):
            drawer.add_kind(chance.choice(("call", "count", "chain", "share", "remote", "pause")))
        limit, number = drawer.default_timeout, drawer.threads_of_ranks
        steps = tuple(drawer.steps)
        program = Program(3, steps, rpc_timeout=limit, num_worker_threads=number)
        together += limit is not None
        seen = predict(program, FaultPlan())
        assert seen.certain
        assert not any(step.error in ("timeout", "unknown") for step in seen.steps)
    assert together > 30


@pytest.mark.parametrize(("number", "limit"), [(2, 300.0), (3, None)])
def test_a_drawn_default_timeout_leaves_room_for_the_step_that_waits_for_the_others(
    number: int, limit: float | None
) -> None:
    """Three steps keep threads busy for 240 s, and what waits for those takes 40 s itself."""
    drawer = StepDrawer(lambda _: 0, 3, plan=FaultPlan(), rpc_timeout=300.0, threads=2)
    drawer.steps = [FailTwice(0, 1, 2, f"x{name}") for name in range(number)]
    assert drawer.default_timeout == limit
    program = Program(3, tuple(drawer.steps), rpc_timeout=limit, num_worker_threads=2)
    assert predict(program, FaultPlan()).certain


def test_a_program_gets_the_threads_of_steps_that_wait_as_long_as_they_must() -> None:
    """Where a step that waits for a given time asks for many, all the others count as well."""
    late = [Outlast(1, 0, name, "gradient", "timeout", seconds=100.0) for name in ("x", "y")]
    steps = (late[0], Onward(0, 1, 0, within=1050.0, patience=1650.0), late[1])
    drawer = StepDrawer(lambda _: 0, 2, facts=UNKNOWN)
    drawer.steps, drawer.rpc_timeout = [*steps], 300.0
    number = drawer.threads_of_ranks
    assert number is not None
    predict(Program(2, steps, rpc_timeout=300.0, num_worker_threads=number), QUIET)


def test_a_message_waits_for_what_runs_beside_its_own_step() -> None:
    """Also in the last step: where threads are few and messages late, the default may come."""
    late = FaultPlan(FaultTable((), 0, {"PYTHON_CALL": 40.0}))
    program = Program(3, (Chain(0, 1, 2, seconds=12.0),), num_worker_threads=3, rpc_timeout=300.0)
    with pytest.raises(UsageError, match="which the default rpc_timeout=300 may end"):
        predict(program, late)
