"""The smallest case of each known finding of stock torch, as a property that is known to fail."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from hypothesis import strategies as st

from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import FINDINGS
from rpcprops.programs import (
    Context,
    Drop,
    Fetch,
    Nest,
    Own,
    Program,
    Remote,
    Settle,
    Share,
    Step,
    Through,
)
from rpcprops.properties import _programs
from rpcprops.properties._base import Case, Property


def _at(rank: int, table: FaultTable) -> FaultPlan:
    return FaultPlan(by_rank={rank: table})


def _case(world_size: int, *steps: Step, plan: FaultPlan | None = None) -> Case:
    return Case(Program(world_size, steps), plan or FaultPlan())


def _late_creation(number: int) -> Case:
    table = FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0 + number / 1000})
    return _case(2, Remote(0, 1, "a", timeout=0.5), Drop(0, "a"), plan=_at(0, table))


def _deleted_argument(number: int) -> Case:
    program = Program(
        2, (Own(0, "a", (float(number),)), Remote(0, 1, "b", right="a")), settles=False
    )
    late = FaultTable(messages_to_delay={"SCRIPT_RREF_FETCH_CALL": 2.0})
    return Case(program, FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 1), 1: late}))


def _early_fork(number: int) -> Case:
    return _case(
        2,
        Nest(0, 1, 0, "a", left=(float(number),), flavour="script"),
        Share(0, "a", 0, "b"),
        Fetch(0, "a"),
    )


#: What torch promises, and the smallest case in which it does not keep it.
_CASES: dict[str, tuple[str, Case]] = {
    "rref-lifetime-after-reinit": (
        "In a process that shut RPC down and initialised it again, RRefs are deleted as before.",
        Case(_programs.create_and_drop(), kind="reinit"),
    ),
    "fork-request-given-up": (
        "A rank whose fork request is lost for good says so, and lives on.",
        _case(
            3,
            Remote(0, 1, "a"),
            Share(0, "a", 2, "b"),
            Settle(),
            plan=_at(2, FaultTable(["RREF_FORK_REQUEST"], 6)),
        ),
    ),
    "second-failed-remote": (
        "Every RRef whose creation failed says so, however many have failed before.",
        _case(
            2,
            Remote(0, 1, "a"),
            Remote(0, 1, "b"),
            Fetch(0, "b"),
            plan=_at(0, FaultTable(["PYTHON_REMOTE_CALL"], 1)),
        ),
    ),
    "timed-out-remote-dropped": (
        "An RRef whose creation timed out is deleted at its owner once its user has dropped it.",
        _late_creation(0),
    ),
    "shutdown-overtakes-creation": (
        "A graceful shutdown straight after a remote() leaves no RRef behind.",
        Case(
            Program(2, (Own(0, "a"), Remote(0, 1, "b", right="a")), settles=False),
            FaultPlan(
                by_rank={
                    0: FaultTable(["RREF_USER_DELETE"], 3),
                    1: FaultTable(["RREF_USER_DELETE"], 3, {"SCRIPT_RREF_FETCH_CALL": 2.0}),
                }
            ),
        ),
    ),
    "shutdown-deletes-argument": (
        "A function that remote() started can use its arguments until it ends.",
        _deleted_argument(1),
    ),
    "timed-out-type-query": (
        "A call through an RRef after one that timed out is made anew.",
        _case(
            2,
            Remote(0, 1, "a"),
            Through(0, "a", timeout=0.5),
            Through(0, "a"),
            plan=_at(0, FaultTable(messages_to_delay={"PYTHON_CALL": 1.0})),
        ),
    ),
    "failed-backward-revisits-rank": (
        "A backward pass that fails ends on every rank.",
        _case(2, Context(0, "x", (1, 0), nested=True, breaks=0)),
    ),
    "early-owner-fork": (
        "An owner that is sent its own RRef may send it on to itself, whenever its value comes.",
        _early_fork(1),
    ),
    "readable-injected-error": (
        "A call whose message is lost raises an error that says so.",
        _case(
            2,
            Remote(0, 1, "a"),
            Fetch(0, "a"),
            plan=_at(0, FaultTable(["PYTHON_RREF_FETCH_CALL"], 1)),
        ),
    ),
}


#: Those that only some runs show. Runs are remembered by what is run, so trying again takes
#: another case: the same but for a number.
_SOMETIMES: dict[str, Callable[[int], Case]] = {
    "timed-out-remote-dropped": _late_creation,
    "early-owner-fork": _early_fork,
    "shutdown-deletes-argument": _deleted_argument,
}


#: Those that take minutes of real time: shutdowns that wait for what never comes.
_SLOW = frozenset({"shutdown-deletes-argument"})


def _cases(name: str) -> st.SearchStrategy[Case]:
    if name in _SOMETIMES:
        return st.integers(0, 999).map(_SOMETIMES[name])
    return st.just(_CASES[name][1])


def finding_properties() -> Iterator[Property]:
    """A property for each known finding; its cases are its smallest one."""
    for name, finding in FINDINGS.items():
        promise, _ = _CASES[name]
        yield Property(
            name,
            promise,
            functools.partial(_cases, name),
            needs_faults=False,
            with_findings=True,
            known=finding,
            only_named=name in _SLOW,
        )
