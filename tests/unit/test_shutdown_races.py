"""A rank that dies in its shutdown while other ranks still use what it owns.

torch's ``rref_context.cpp``: RRefContext::destroyInstance (shutdown-races-delete).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault
from rpcprops.oracle import judge, predict, set_apart
from rpcprops.outcomes import Violation
from rpcprops.programs import Drop, End, Fetch, Own, Program, Remote, Settle, Step
from rpcprops.properties._findings import finding_case
from rpcprops.torch_facts import TorchFacts
from tests.seeded._ideal import ideal, with_rank

NAME = "shutdown-races-delete"
DROPS: tuple[Step, ...] = (Remote(1, 0, "a"), Fetch(1, "a"), Settle(), Drop(1, "a"))
DAMAGED = "a warning\nmalloc(): unaligned tcache chunk detected\nFatal Python error: Aborted\n"
RACES = Program(2, DROPS, settles=False, end=End("at once"))


def reported(
    program: Program, rank: int, end: int, log: str = ""
) -> tuple[tuple[str, ...], list[str]]:
    """What explains that a rank died by a signal in its shutdown, and what is left to report."""
    outcome = ideal(program, FaultPlan())
    died = with_rank(outcome, rank, signal=end, exit_code=None, log=log)
    met = predict(program, FaultPlan()).met
    names, left = set_apart(program, met, died, judge(program, None, died))
    return names, [violation.promise for violation in left]


@pytest.mark.parametrize(("signal", "log"), [(11, ""), (6, DAMAGED)])
@pytest.mark.parametrize(
    "steps",
    [
        DROPS,
        DROPS[:2] + DROPS[3:],
        # A creation looks up an RRef of the owner as a delete does.
        (Remote(1, 0, "a"),),
    ],
)
def test_an_owner_may_die_while_a_user_deletes(
    steps: tuple[Step, ...], signal: int, log: str
) -> None:
    """By SIGSEGV where it reads freed memory, by SIGABRT where the heap is damaged."""
    assert reported(replace(RACES, steps=steps), 0, signal, log) == ((NAME,), [])


@pytest.mark.parametrize("signal", [4, 6, 7, 8, 9, 15])
def test_another_signal_is_a_failure(signal: int) -> None:
    """Nothing there sends one; of SIGABRT the log must say that the heap is damaged."""
    assert reported(RACES, 0, signal, "terminate called\n") == ((), ["RankDied"])


def test_the_death_of_the_user_is_a_failure() -> None:
    """It owns nothing."""
    assert reported(RACES, 1, 11) == ((), ["RankDied"])


@pytest.mark.parametrize(
    "program",
    [
        # All has come to rest before it.
        replace(RACES, settles=True),
        # The users keep what they have.
        replace(RACES, steps=DROPS[:-1]),
        # Somebody has waited for all that was sent.
        replace(RACES, steps=DROPS[:2]),
        # All ranks wait for each other.
        replace(RACES, end=End()),
        # Nobody uses what the rank owns.
        replace(RACES, steps=(Own(0, "a"), Drop(0, "a"))),
    ],
)
def test_a_death_with_no_delete_under_way_is_a_failure(program: Program) -> None:
    """The finding is not met, whatever signal ends the rank."""
    assert NAME not in predict(program, FaultPlan()).known_bugs
    assert reported(program, 0, 11) == ((), ["RankDied"])


@pytest.mark.parametrize("ignores", [False, True])
def test_a_fetch_races_a_shutdown_that_ignores_leaks(ignores: bool) -> None:
    """An owner that raises about the fork that is left never comes to what fetches look at."""
    late = FaultTable(messages_to_delay={"PYTHON_RREF_FETCH_CALL": 8.0})
    plan = FaultPlan(by_rank={1: late})
    end = End("at once", ignores_leaks=ignores)
    program = replace(RACES, steps=(*DROPS[:3], Fetch(1, "a", timeout=2.0)), end=end)
    assert (NAME in predict(program, plan).known_bugs) is ignores


def test_a_death_before_the_shutdown_is_a_failure() -> None:
    """Only the shutdown forgets what a rank owns."""
    met = predict(RACES, FaultPlan()).met
    death = Violation("RankDied", "worker0 died before its time: killed by SIGSEGV", 0)
    assert set_apart(RACES, met, ideal(RACES, FaultPlan()), [death]) == ((), (death,))


@pytest.mark.parametrize(
    ("ignores", "rank", "file", "known"),
    [
        (True, 0, "rref_context.cpp", True),
        (False, 0, "rref_context.cpp", False),
        (True, 1, "rref_context.cpp", False),
        (True, 0, "tensorpipe_agent.cpp", False),
    ],
)
def test_a_request_that_misses_its_rref_is_known_where_leaks_are_ignored(
    ignores: bool, rank: int, file: str, known: bool
) -> None:
    """Else the shutdown ends at the leak, and forgets nothing."""
    program = replace(RACES, end=End("at once", ignores_leaks=ignores))
    met = predict(program, FaultPlan()).met
    said = f'false INTERNAL ASSERT FAILED at "{file}":390. Expected OwnerRRef with id 1'
    wrong = Violation("ErrorInLog", f"worker{rank} wrote: {said} to be created.", rank)
    expected: Any = ((NAME,), ()) if known else ((), (wrong,))
    assert set_apart(program, met, ideal(program, FaultPlan()), [wrong]) == expected


def test_what_else_the_run_shows_is_a_failure() -> None:
    """A wrong value or a missing error of the last step is reported beside that death."""
    met = predict(RACES, FaultPlan()).met
    death = Violation("RankDied", "worker0 died in its shutdown: killed by SIGSEGV", 0)
    others = [
        Violation("UnexpectedError", "Drop raised", 1, 3),
        Violation("WrongValue", "another value", 1, 1),
        Violation("CallLeak", "worker1 holds a call", 1),
    ]
    outcome = ideal(RACES, FaultPlan())
    assert set_apart(RACES, met, outcome, [death, *others]) == ((NAME,), tuple(others))


def test_a_torch_that_mended_it_has_no_excuse() -> None:
    """The prediction names nothing there."""
    mended = TorchFacts("", mended=frozenset({NAME}))
    assert NAME not in predict(RACES, FaultPlan(), facts=mended).known_bugs


def test_its_case_meets_nothing_else() -> None:
    """A thread drops many large RRefs, and the model follows each of them."""
    case = finding_case(NAME, 0)
    prediction = predict(case.program, case.plan)
    assert prediction.known_bugs == {NAME}
    held = prediction.steps[1].counters
    assert held is not None
    assert (held[0].owners, held[0].forks) == (150, 150)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"megabytes": 17, "flavour": "script"}, "megabytes=17 must lie in 0 to 16"),
        ({"beside": -1, "flavour": "script"}, "beside=-1 must lie in 0 to 200"),
        ({"megabytes": 1}, "megabytes=1 needs flavour 'script', not 'python'"),
        ({"beside": 1, "flavour": "builtin"}, "beside=1 needs flavour 'script', not 'builtin'"),
    ],
)
def test_what_a_remote_cannot_make_is_refused(given: dict[str, Any], message: str) -> None:
    """Only a TorchScript function makes values of another size."""
    with pytest.raises(UsageError, match=message):
        Program(2, (Remote(0, 1, "a", **given),))


@pytest.mark.parametrize(
    ("timeout", "plan"),
    [
        (2.0, FaultPlan(by_rank={0: FaultTable(messages_to_delay={"SCRIPT_REMOTE_CALL": 8.0})})),
        (None, FaultPlan(others=(MessageFault(0, "lose", "SCRIPT_REMOTE_CALL"),))),
        (None, FaultPlan(others=(MessageFault(1, "lose", "REMOTE_RET", to=0),))),
    ],
)
def test_many_creations_of_a_remote_may_not_time_out(
    timeout: float | None, plan: FaultPlan
) -> None:
    """A fault may act on one beside the kept one, and a second one that fails is never marked."""
    made = Remote(0, 1, "a", flavour="script", timeout=timeout)
    program = Program(2, (made, Settle(), Fetch(0, "a")), rpc_timeout=65.0)
    assert predict(program, plan).steps[2].error == "creation"
    many = replace(program, steps=(replace(made, beside=2), *program.steps[1:]))
    with pytest.raises(UsageError, match=r"creations end by their timeout, .* let beside be 0"):
        predict(many, plan)


def test_only_a_shutdown_at_once_can_ignore_leaks() -> None:
    """A graceful one that leaves something is to raise."""
    assert repr(End("at once", ignores_leaks=True)) == "End('at once', ignores_leaks=True)"
    with pytest.raises(UsageError, match="ignores_leaks=True needs how='at once', not 'graceful'"):
        End(ignores_leaks=True)
    wrong: Any = "no"
    with pytest.raises(UsageError, match=r"ignores_leaks='no' .type str. must be True or False"):
        End("at once", ignores_leaks=wrong)
