"""Programs and plans, shipped and drawn, with the ideal outcome of each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, FaultTable, MessageType
from rpcprops.oracle import Prediction, predict
from rpcprops.outcomes import Outcome
from rpcprops.programs import Context, Program
from rpcprops.strategies import fault_tables, group_programs, programs_under_faults
from tests._draws import draws
from tests.seeded._ideal import ideal
from tests.seeded._programs import (
    ALONE,
    ENDS,
    EVERY_KIND,
    GROUPS,
    IMPATIENT_WAYS,
    LEFT_AT_ONCE,
    LIVES,
    OUTLASTING,
    OUTLIVED,
    PROFILED_AGAIN,
    PROFILED_LIVES,
    REFUSED_INITS,
    REFUSING,
    RETRIES,
    SLOW,
    UNDER_WAY,
    UNREAD,
    WRONG_AT_ONE,
    asks,
    beside,
    bumps,
    callables,
    futures,
    gathers,
    held_and_counted,
    onwards,
    refusals,
    rooted,
    running_out,
    scripts,
    shared_late,
    shipped_programs,
)

PLANS = (
    FaultPlan(),
    FaultPlan(FaultTable(RETRYABLE_MESSAGE_TYPES, 3)),
    FaultPlan(FaultTable([m for m in MessageType if not m.is_retryable], 1)),
    FaultPlan(FaultTable([MessageType.RREF_USER_DELETE, MessageType.RREF_CHILD_ACCEPT], 6)),
    FaultPlan(by_rank={0: FaultTable(tuple(MessageType), 42)}),
    FaultPlan(FaultTable((), 0, dict.fromkeys(MessageType, 2.0))),
)
#: The plans that lose nothing, so that ranks may leave and come back.
SPARING = (PLANS[0], PLANS[1], PLANS[-1])
#: Beyond every budget: all types, and counts up to those that no retry survives.
WIDE_TABLES = fault_tables(messages=tuple(MessageType), max_fail_sends=42, max_delay=2.0)


@dataclass(frozen=True)
class World:
    """A program under a plan, what it must show, and the outcome that shows it."""

    program: Program
    plan: FaultPlan
    prediction: Prediction
    outcome: Outcome

    @classmethod
    def of(cls, program: Program, plan: FaultPlan) -> World:
        """The world in which everything is as predicted."""
        return cls(program, plan, predict(program, plan), ideal(program, plan))


def drawn(
    number: int, *, min_steps: int = 1, tables: st.SearchStrategy[FaultTable] | None = None
) -> list[World]:
    """So many different worlds, within the retry budget unless `tables` say otherwise."""
    strategy = programs_under_faults(max_world_size=4, min_steps=min_steps, tables=tables)
    found: dict[tuple[Program, FaultPlan], None] = {}
    for start in itertools.count():
        if len(found) >= number:
            break
        found |= dict.fromkeys(draws(strategy, 100, start))
    return [World.of(*pair) for pair in itertools.islice(found, number)]


@functools.cache
def corpus() -> tuple[World, ...]:
    """What defects are planted in: shipped programs, every kind of step, and drawn ones."""
    written = [
        *shipped_programs()[::5],
        *bumps(),
        *refusals(),
        *futures(),
        *scripts(),
        *rooted(),
        *EVERY_KIND,
        *ENDS,
    ]
    written += [*SLOW, *OUTLASTING[1:], *IMPATIENT_WAYS[1:]]
    written += _breaking()
    worlds = [World.of(program, plan) for program in written for plan in PLANS]
    worlds += [
        World.of(program, FaultPlan())
        for program in (*callables(), *asks(), *onwards(), *held_and_counted(), *PROFILED_AGAIN[1:])
    ]
    sparing = (*LIVES, *REFUSED_INITS, *gathers())
    worlds += [World.of(program, plan) for program in sparing for plan in SPARING]
    worlds += [
        World.of(program, FaultPlan()) for program in (*ALONE, *WRONG_AT_ONE, *PROFILED_LIVES)
    ]
    worlds += [World.of(program, plan) for program in RETRIES for plan in (PLANS[0], PLANS[3])]
    worlds += [World.of(program, FaultPlan()) for program in (*UNDER_WAY[1:], *UNREAD[1:])]
    late = (*OUTLIVED[1:], *shared_late(), *running_out(), *beside())
    worlds += [World.of(program, FaultPlan()) for program in late]
    grouped = dict.fromkeys(draws(group_programs(), 60))
    groups = (*GROUPS, *REFUSING, *LEFT_AT_ONCE, *grouped)
    worlds += [World.of(program, FaultPlan()) for program in groups]
    worlds += drawn(150, min_steps=4)
    worlds += drawn(150, min_steps=4, tables=WIDE_TABLES)
    return (*worlds, *_aimed())


def _breaking() -> list[Program]:
    """Contexts whose backward raises at each rank of their path."""
    return [
        Program(3, (Context(at, "x", tuple(path), nested=nested, breaks=breaks),))
        for nested, (at, *path) in zip(
            itertools.cycle((False, False, True)), itertools.permutations(range(3)), strict=False
        )
        for breaks in path
    ]


def _aimed() -> Iterator[World]:
    """Drawn worlds in which rare things meet: counts of one rank, one family, delays, timeouts."""
    for number, tables, kinds in (
        (60, None, ("count", "call")),
        (40, None, ("recurse", "settle")),
        (50, None, ("graph", "train", "linear")),
        (25, None, ("context", "settle")),
        (15, None, ("optimize", "settle")),
        (25, None, ("unreached", "settle")),
        (50, None, ("reach", "gather", "method")),
        (60, st.just(PLANS[-1].default), ("call", "remote", "own", "fetch", "share", "through")),
    ):
        strategy = programs_under_faults(
            max_world_size=3, min_steps=6, kinds=kinds, tables=tables, branches=False
        )
        for program, plan in draws(strategy, number):
            yield World.of(program, plan)
