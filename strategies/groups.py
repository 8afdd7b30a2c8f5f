"""Strategies for programs of dynamic groups, whose members join, call each other and leave."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from hypothesis import strategies as st

from rpcprops.programs import (
    Call,
    Carry,
    Chain,
    Count,
    Drop,
    Fetch,
    Member,
    Program,
    Raising,
    Remote,
    Step,
)
from rpcprops.steps.arguments import PAIRS
from rpcprops.steps.functions import RaisedIn
from rpcprops.steps.groups import OUTSIDE
from rpcprops.steps.values import of_one_call
from rpcprops.strategies._checks import checked_facts
from rpcprops.strategies._weighted import Weighted
from rpcprops.strategies.drawing import below, letters
from rpcprops.torch_facts import TorchFacts

_MAX_WORLD_SIZE = 4
_MAX_STEPS = 14

_Draw = Callable[[st.SearchStrategy[int]], int]
#: A step that may come next, or what draws it; and what changes with it.
_Next = tuple[Step | Callable[[_Draw], Step], Callable[[], None]]
#: By which calls a function raises.
_RAISING: tuple[RaisedIn, ...] = ("sync", "async", "deferred")
#: How often a name has a dash, where a call of a member counts 1.
_SELDOM = 0.25
#: How many values one drawn number chooses from, so that large ones come as often.
_VALUES = 16


def group_programs(*, facts: TorchFacts | None = None) -> st.SearchStrategy[Program]:
    """A program of a dynamic group: up to 4 ranks join it in some order, call each other and leave.

    No fault can act on such a program. What stock torch gets wrong in a group
    (docs/findings.md) is drawn where the torch that is to run it has mended it.

    Shrinks to fewer steps and lower ranks.

    Args:
        facts: what is known of that torch (None: of the installed one).

    Raises:
        UsageError: `facts` is no TorchFacts.
    """
    return _group_programs(checked_facts(facts))


@st.composite
def _group_programs(draw: st.DrawFn, facts: TorchFacts) -> Program:
    size = 2 + draw(below(_MAX_WORLD_SIZE - 1))
    drawn = _Drawn(size, facts)
    for number in range(2 + draw(below(_MAX_STEPS - 1))):
        draw(_NextStep(drawn, must=not number))
    drawn.close()
    return Program(size, tuple(drawn.steps), settles=False)


class _NextStep(st.SearchStrategy[None]):
    """Draws the next step, or none: Hypothesis then knows where each step begins and ends."""

    def __init__(self, drawn: _Drawn, *, must: bool) -> None:
        super().__init__()
        self._drawn = drawn
        self._must = must

    def __repr__(self) -> str:
        return "a step"

    def do_draw(self, data: Any) -> None:
        """Draw it."""
        self._drawn.add(lambda strategy: strategy.do_draw(data), must=self._must)


@functools.lru_cache(maxsize=256)
def _one_of(weights: tuple[float, ...]) -> st.SearchStrategy[int]:
    """A number below that of the weights, as often as they say."""
    able = {number: weight for number, weight in enumerate(weights) if weight}
    return Weighted(0, len(weights) - 1, able)


class _Drawn:
    """The steps drawn so far, and what may follow."""

    def __init__(self, size: int, facts: TorchFacts) -> None:
        self.ranks = range(size)
        self.facts = facts
        self.steps: list[Step] = []
        self.members: list[int] = []
        self.inits: Counter[int] = Counter()
        #: Whether a refusal has kept the token of the group, as this torch does.
        self.stuck = False
        #: Whether the last join was refused.
        self.refused = False
        #: Whether a member has left without telling the others.
        self.broken = False
        #: Whether the name of a rank has a dash.
        self.dashed: dict[int, bool] = {}
        #: Ranks that have called ``init_rpc`` with another rank.
        self.foreign: set[int] = set()
        #: The home of each handle, and the ranks that own the value of one.
        self.homes: dict[str, int] = {}
        self.owners: set[int] = set()
        #: The handles whose value nobody has waited for, in the order in which they were made.
        self.unfetched: dict[str, None] = {}
        self.named = 0
        #: The fewest members beside whom a join is refused, of those whose refusal shows.
        reasons = ("failed-join-keeps-token", "rejoins-alone")
        self.least = 2 if any(map(facts.has_bug, reasons)) else 1

    def add(self, draw: _Draw, *, must: bool = False) -> None:
        """Draw one more step, or none: first the kind, then one of those that may come.

        A number means the same kind after any steps, and 0 means none. So Hypothesis can leave out
        a step, and the others stay the same.
        """
        # Few programs have three ranks and one outside, so refusals come more often there. What a
        # refusal has left behind shows in what comes next. And what one member does with a value
        # of another, and leaves behind, needs several steps. Before anybody can call, the rest must
        # not come as often as joins.
        ways: dict[Callable[[], list[_Next]], float] = {
            self.joins: 1 + 4 * (len(self.members) < 2),
            self.calls: 1,
            self.looks: 1,
            self.uses: 5,
            self.leaves: 4 + 4 * bool(self.homes) + 4 * self.refused,
            self.refusals: 1 + 4 * (len(self.members) > 1),
            self.departures: 1,
            self.outside_calls: 1,
            self.profiled: 1,
            self.further_calls: 1,
            self.dashes: _SELDOM,
        }
        able = [way() for way in ways]
        # Calls must not drown the rest, so a kind is as likely whatever number of steps it has.
        weights = (weight if one else 0 for one, weight in zip(able, ways.values(), strict=True))
        number = draw(_one_of((0, *weights)))
        options = able[max(0, number - 1)] or next(filter(None, able))
        step, then = options[draw(below(len(options)))]
        if number or must:
            self.steps.append(step if isinstance(step, Step) else step(draw))
            then()

    def close(self) -> None:
        """Wait for what is still being made: at the end nothing else does."""
        self.steps += [Fetch(self.homes[name], name) for name in self.unfetched]

    def joins(self) -> list[_Next]:
        """Ranks that may join; none after a refusal where that keeps the token of the group."""
        ranks = [] if self.stuck else self.outside()
        open_ = [rank for rank in ranks if not self.dashed.get(rank)]
        # Who joins for the first time comes more often: where torch has rejoins-alone, little of
        # what follows a second time is predicted.
        first = [rank for rank in open_ if not self.inits[rank]] * 3
        return [(Member(rank), partial(self.join, rank, dash=False)) for rank in (*open_, *first)]

    def dashes(self) -> list[_Next]:
        """Ranks that may join under a name with a dash; none where nobody could join after it."""
        if self.stuck or self.facts.has_bug("dash-in-member-name"):
            return []
        ranks = [rank for rank in self.outside() if self.dashed.get(rank, True)]
        return [(Member(rank, dash=True), partial(self.join, rank, dash=True)) for rank in ranks]

    def outside(self) -> list[int]:
        """Ranks that would find the group."""
        if self.broken:
            return []
        once = self.facts.has_bug("rejoins-alone")
        outside = [r for r in self.ranks if r not in self.members and r not in self.foreign]
        return [rank for rank in outside if not (once and self.inits[rank])]

    def join(self, rank: int, *, dash: bool) -> None:
        self.refused = False
        self.dashed[rank] = dash
        self.members.append(rank)
        self.inits[rank] += 1

    def refusals(self) -> list[_Next]:
        """Ranks whose join may be refused.

        A rank of a static world takes no token, and needs one member. So do the others where torch
        has them give it back; elsewhere they need two, so that more can follow.
        """
        steps: list[Member] = []
        for rank in self.outside():
            is_first = not self.inits[rank]
            if len(self.members) >= self.least and not self.stuck:
                steps.append(Member(rank, "refused"))
                for taken in self.members:
                    steps.append(Member(rank, "refused", why="taken name", taken=taken))
                    if is_first:
                        steps.append(Member(rank, "refused", why="taken rank", taken=taken))
            if self.members and is_first:
                # Beside one member mostly this one, for after the others little is predicted.
                often = 1 if len(self.members) > 1 else 6
                steps += [Member(rank, "refused", why="static")] * often
        return [(step, partial(self.refuse, step)) for step in steps]

    def refuse(self, step: Member) -> None:
        self.refused = True
        self.inits[step.at] += 1
        if step.given_rank != step.at:
            self.foreign.add(step.at)
        if step.why != "static":
            self.stuck = self.facts.has_bug("failed-join-keeps-token")

    def leaves(self) -> list[_Next]:
        """Members that may leave: nobody holds a value of theirs.

        The last one stays, but after a refusal, for then its leave shows what that has left behind.
        """
        if self.stuck or self.broken or len(self.members) < (self.least if self.refused else 2):
            return []
        holds = set(self.homes.values()) if self.facts.has_bug("leaving-keeps-values") else set()
        able = [rank for rank in self.members if rank not in self.owners | holds]
        # Who holds something comes more often: it must be given back.
        able += [rank for rank in able if rank in self.homes.values()] * 6
        return [(Member(rank, "leave"), partial(self.leave, rank)) for rank in able]

    def departures(self) -> list[_Next]:
        """Members that may leave without telling the others: they hold nothing as well."""
        if len(self.members) < 2:
            return []
        able = [r for r in self.members if r not in self.owners | set(self.homes.values())]
        return [(Member(r, "leave at once"), partial(self.depart, r)) for r in able]

    def depart(self, rank: int) -> None:
        self.leave(rank)
        self.broken = True

    def leave(self, rank: int) -> None:
        self.members.remove(rank)
        # Who leaves waits for its calls, and so for what they make.
        self.homes = {name: home for name, home in self.homes.items() if home != rank}
        self.unfetched = {name: None for name in self.unfetched if name in self.homes}

    def further_calls(self) -> list[_Next]:
        """Calls that carry a value of some sort, and calls of functions that raise.

        They leave nothing behind: in a group nothing waits for what is under way at the end, or
        when a member leaves (docs/programs.md).
        """
        pairs = [(at, to) for at in self.members for to in self.members]
        found: list[_Next] = [(partial(self.carry, at, to), _nothing) for at, to in pairs]
        raising = (Raising(at, to, how=how) for at, to in pairs for how in _RAISING)
        return [*found, *((step, _nothing) for step in raising)]

    def carry(self, at: int, to: int, draw: _Draw) -> Carry:
        values = of_one_call(self.facts)
        place = draw(below(1 + len(values) // _VALUES)) * _VALUES + draw(below(_VALUES))
        sort, way = values[place % len(values)]
        return Carry(at, to, sort, way)

    def outside_calls(self) -> list[_Next]:
        """What torch refuses at ranks that have not joined, or have left."""
        outside = [rank for rank in self.ranks if rank not in self.members]
        return [
            (Member(rank, "outside", what=what), _nothing) for rank in outside for what in OUTSIDE
        ]

    def profiled(self) -> list[_Next]:
        """Ranks that may join or leave inside a profiler."""
        able = [*self.joins(), *self.leaves(), *self.dashes()]
        return [(replace(one, profiled=True), then) for one, then in able if isinstance(one, Step)]

    def looks(self) -> list[_Next]:
        """Members that look."""
        return [(Member(rank, "look"), _nothing) for rank in self.members]

    def calls(self) -> list[_Next]:
        """Calls of each member at each."""
        found: list[_Next] = []
        for at in self.members:
            for to in self.members:
                left, right = PAIRS[(at + to) % len(PAIRS)]
                found.append((Call(at, to, left, right), _nothing))
                found.append((Call(at, to, left, right, flavour="script", wait="async"), _nothing))
                found.append((Count(at, to), _nothing))
                found.append((Chain(at, to, self.members[0], left, right), _nothing))
        return found

    def uses(self) -> list[_Next]:
        """RRefs: made, fetched and dropped, at ranks that have not been in a group before."""
        found: list[_Next] = []
        again = not self.facts.has_bug("rref-lifetime-after-reinit")
        for home in self.members:
            if again or self.inits[home] == 1:
                name = letters(self.named)
                for owner in self.members:
                    if owner != home:
                        step = Remote(home, owner, name)
                        found.append((step, partial(self.make, home, owner)))
        for name, home in self.homes.items():
            found.append((Fetch(home, name), partial(self.fetch, name)))
            if name not in self.unfetched:
                found.append((Drop(home, name), partial(self.drop, name)))
        return found

    def make(self, home: int, owner: int) -> None:
        name = letters(self.named)
        self.homes[name] = home
        self.unfetched[name] = None
        self.owners.add(owner)
        self.named += 1

    def fetch(self, name: str) -> None:
        self.unfetched.pop(name, None)

    def drop(self, name: str) -> None:
        del self.homes[name]


def _nothing() -> None:
    pass
