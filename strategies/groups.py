"""Strategies for programs of dynamic groups, whose members join, call each other and leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

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
from rpcprops.strategies.drawing import below, letters
from rpcprops.torch_facts import TorchFacts

_MAX_WORLD_SIZE = 4
_MAX_STEPS = 14

#: A step that may come next, or what draws it; and what changes with it.
_Next = tuple[Step | Callable[[st.DrawFn], Step], Callable[[], None]]
#: By which calls a function raises.
_RAISING: tuple[RaisedIn, ...] = ("sync", "async", "deferred")
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
    for _ in range(2 + draw(below(_MAX_STEPS - 1))):
        drawn.add(draw)
    return Program(size, tuple(drawn.steps), settles=False)


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
        self.named = 0

    def add(self, draw: st.DrawFn) -> None:
        """Draw one more step: first the kind, then one of those that may come."""
        ways = [self.joins, self.calls, self.looks, self.uses, self.leaves, self.refusals]
        ways += [self.departures, self.outside_calls, self.profiled, self.further_calls]
        # Before anybody can call, the rest must not come as often as joins.
        ways += [self.joins] * (4 * (len(self.members) < 2))
        # Few programs have three ranks and one outside, so refusals come more often there.
        ways += [self.refusals] * (4 * (len(self.members) > 1))
        # What one member does with a value of another, and leaves behind, needs several steps.
        ways += [self.uses, self.leaves]
        # What a refusal has left behind shows in what comes next.
        ways += [self.leaves] * (4 * self.refused)
        able = [found for way in ways if (found := way())]
        # Calls must not drown the rest, so each kind is as likely.
        options = able[draw(below(len(able)))]
        step, then = options[draw(below(len(options)))]
        self.steps.append(step if isinstance(step, Step) else step(draw))
        then()

    def joins(self) -> list[_Next]:
        """Ranks that may join; none after a refusal where that keeps the token of the group."""
        ranks = [] if self.stuck else self.outside()
        open_ = [rank for rank in ranks if not self.dashed.get(rank)]
        # Who joins for the first time comes more often: where torch has rejoins-alone, little of
        # what follows a second time is predicted.
        first = [rank for rank in open_ if not self.inits[rank]] * 3
        steps = [Member(rank) for rank in (*open_, *first)]
        # Of the last rank alone: where a torch has the finding, nobody joins after it.
        last = self.ranks[-1]
        is_open = self.dashed.get(last, True) and not self.facts.has_bug("dash-in-member-name")
        if last in ranks and is_open:
            steps.append(Member(last, dash=True))
        return [(step, partial(self.join, step.at, dash=step.dash)) for step in steps]

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

        A rank of a static world takes no token, and needs one member; the others need two.
        """
        steps: list[Member] = []
        for rank in self.outside():
            is_first = not self.inits[rank]
            if len(self.members) > 1 and not self.stuck:
                steps.append(Member(rank, "refused"))
                for taken in self.members:
                    steps.append(Member(rank, "refused", why="taken name", taken=taken))
                    if is_first:
                        steps.append(Member(rank, "refused", why="taken rank", taken=taken))
            if self.members and is_first:
                steps.append(Member(rank, "refused", why="static"))
        return [(step, partial(self.refuse, step)) for step in steps]

    def refuse(self, step: Member) -> None:
        self.refused = True
        self.inits[step.at] += 1
        if step.given_rank != step.at:
            self.foreign.add(step.at)
        if step.why != "static":
            self.stuck = self.facts.has_bug("failed-join-keeps-token")

    def leaves(self) -> list[_Next]:
        """Members that may leave: nobody holds a value of theirs."""
        if self.stuck or self.broken or len(self.members) < 2:
            return []
        holds = set(self.homes.values()) if self.facts.has_bug("leaving-keeps-values") else set()
        able = [rank for rank in self.members if rank not in self.owners | holds]
        # Who holds something comes more often: it must be given back.
        able += [rank for rank in able if rank in self.homes.values()] * 3
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
        self.homes = {name: home for name, home in self.homes.items() if home != rank}

    def further_calls(self) -> list[_Next]:
        """Calls that carry a value of some sort, and calls of functions that raise.

        They leave nothing behind: in a group nothing waits for what is under way at the end, or
        when a member leaves (docs/programs.md).
        """
        pairs = [(at, to) for at in self.members for to in self.members]
        found: list[_Next] = [(partial(self.carry, at, to), _nothing) for at, to in pairs]
        raising = (Raising(at, to, how=how) for at, to in pairs for how in _RAISING)
        return [*found, *((step, _nothing) for step in raising)]

    def carry(self, at: int, to: int, draw: st.DrawFn) -> Carry:
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
        able = [*self.joins(), *self.leaves()]
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
            found.append((Fetch(home, name), _nothing))
            found.append((Drop(home, name), partial(self.drop, name)))
        return found

    def make(self, home: int, owner: int) -> None:
        name = letters(self.named)
        self.homes[name] = home
        # At the end nothing waits for what is still being made.
        self.steps.append(Fetch(home, name))
        self.owners.add(owner)
        self.named += 1

    def drop(self, name: str) -> None:
        del self.homes[name]


def _nothing() -> None:
    pass
