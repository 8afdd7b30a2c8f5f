"""What known findings make ranks keep for ever, and how such a rank then says what it holds."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import fields, replace

from rpcprops.oracle.prediction import Met
from rpcprops.outcomes import Counters
from rpcprops.torch_facts import FINDINGS, Texts

#: The counters of RRefs; the others are of contexts and calls.
_OF_RREFS = ("owners", "forks", "pending_users", "pending_futures")
#: What a rank breaks that holds something for ever.
_LEAKS = ("RRefLeak", "ContextLeak", "CallLeak")


class Kept:
    """What each rank keeps because of known findings.

    One finding may not show in a run in which another one does, so each may keep its part or not.
    """

    def __init__(self) -> None:
        #: By rank and finding: what it keeps in every run in which it shows.
        self._surely: dict[tuple[int, str], Counters] = {}
        #: The same for what it keeps in some of these runs, one by one.
        self._perhaps: defaultdict[tuple[int, str], list[Counters]] = defaultdict(list)
        #: How many user RRefs of which owner a rank keeps, which it deletes when it shuts down.
        self._users: Counter[tuple[int, str, int]] = Counter()
        #: The ranks that keep a user RRef in the frame of a failed call, and its owner.
        self.in_frames: set[tuple[int, int]] = set()

    def add(self, finding: str, rank: int, held: Counters) -> None:
        """Note that the finding makes a rank keep this."""
        key = (rank, finding)
        self._surely[key] = _sum((self._surely.get(key, Counters()), held))

    def add_perhaps(self, finding: str, rank: int, held: Counters) -> None:
        """Note that it makes a rank keep this in some runs."""
        self._perhaps[rank, finding].append(held)

    def add_user(self, finding: str, rank: int, owner: int) -> None:
        """Note that it makes a rank keep a user RRef, which is deleted by the shutdown only."""
        self._users[rank, finding, owner] += 1

    def found(
        self, wanted: Sequence[Counters], met: Iterable[Met], step: int | None, *, settles: bool
    ) -> Iterator[Met]:
        """What explains that the ranks do not hold what is `wanted`, at a settle or at the end.

        Args:
            met: what the program has met so far.
            step: the settle; None at the end of the run.
            settles: whether the ranks say what they hold. Without a settle at the end, a rank
                reports a leak when it shuts down, and not how many RRefs.
        """
        keys = self._surely.keys() | self._perhaps.keys()
        anywhere = [FINDINGS[one.finding] for one in met if one.rank is None]
        for rank, finding in keys:
            if not settles:
                yield Met(finding, rank, step)
                continue
            own = [held for held in self._ways(rank, finding) if held != Counters()]
            others = [
                {Counters(), *self._ways(rank, name)}
                for at, name in keys
                if at == rank and name != finding
            ]
            shown = {
                name
                for one in anywhere
                if one.name != finding
                for name in (one.promise, *one.shows_as)
            }
            said = {
                _says(_sum((wanted[rank], *parts)), shown)
                for parts in itertools.product(own, *others)
            }
            says = (
                f"holds ({'|'.join(sorted(said))}); expected {re.escape(wanted[rank].describe())}$"
            )
            yield Met(finding, rank, step, says, _LEAKS)

    def late_deletes(self, rank: int, users: int) -> Iterator[Met]:
        """What explains deletes that still wait to be sent again after a graceful shutdown.

        ``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners`` first waits in vain for
        the children of a user that is kept. By the time when it deletes the users of its rank, the
        owners have stopped to wait for that, and ``TensorPipeAgent::join`` (tensorpipe_agent.cpp)
        waits for no message that is to be sent again.

        Args:
            rank: one whose deletes may fail.
            users: how many users it deletes besides those that are kept.
        """
        mine = {key: kept for key, kept in self._users.items() if key[0] == rank}
        number = "|".join(str(1 + n) for n in range(sum(mine.values()) + users))
        says = rf"holds (?:{number}) pending futures?(?:, .*)? after its shutdown$"
        for finding in {key[1] for key in mine}:
            yield Met(finding, rank, None, says, ("RRefLeak",))

    def waits(self, texts: Texts, owners_of: Callable[[int], Iterable[int]]) -> Iterator[Met]:
        """What explains that ranks have waited in vain in a graceful shutdown, and then leak.

        A rank that keeps a user waits for the children of that user, as :meth:`late_deletes` says.
        Only then does it delete its users. Their owners have waited for that as long as it has, and
        report a leak if they leave before (``rref_context.cpp``: ``RRefContext::destroyInstance``).

        Args:
            owners_of: the owners of all users that a rank deletes besides those that are kept.
        """
        for rank, finding, owner in self._users:
            yield Met(finding, rank, None, re.escape(texts.users_waited), ("ErrorInLog",))
            leaks = rf"^rpc\.shutdown\(\) of \S+ raised \w+: {re.escape(texts.leaks[0])}"
            for other in {owner, *owners_of(rank)}:
                yield Met(finding, other, None, re.escape(texts.owners_waited), ("ErrorInLog",))
                yield Met(finding, other, None, leaks, ("RRefLeak",))

    def _ways(self, rank: int, finding: str) -> set[Counters]:
        """All that the finding may make a rank keep in a run in which it shows."""
        key = (rank, finding)
        found = {self._surely.get(key, Counters())}
        for more in self._perhaps.get(key, ()):
            found |= {_sum((held, more)) for held in found}
        return found


def _sum(held: Iterable[Counters]) -> Counters:
    held = tuple(held)
    names = [item.name for item in fields(Counters)]
    return Counters(**{name: sum(getattr(one, name) for one in held) for name in names})


def _says(held: Counters, shown: Set[str]) -> str:
    """What a rank says that it holds, as a pattern.

    Some findings keep RRefs, or calls and contexts, and nobody can tell at which ranks. Where
    the program meets one, so that `shown` has its promise, that sort is of any number, and the
    other sort is exact all the same.
    """
    rrefs = replace(Counters(), **{name: getattr(held, name) for name in _OF_RREFS})
    others = replace(held, **dict.fromkeys(_OF_RREFS, 0))
    forms = itertools.product(
        _forms(rrefs, r"(?:owner|fork|pending user|pending future)s?", shown & {"RRefLeak"}),
        _forms(
            others,
            r"(?:contexts?|backward pass(?:es)?|(?:server|server async|client) calls?)",
            shown & {"ContextLeak", "CallLeak"},
        ),
    )
    return "|".join(", ".join(filter(None, form)) for form in forms if any(form))


def _forms(held: Counters, one: str, anywhere: Set[str]) -> list[str]:
    """Patterns of what a rank may hold of a sort: exactly that, or any number `anywhere`."""
    if anywhere:
        item = rf"\d+ {one}"
        return ["", f"{item}(?:, {item})*"]
    return ["" if held == Counters() else re.escape(held.describe())]
