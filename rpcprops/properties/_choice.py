"""Chooses from drawn cases the ones to run: those with most of what has seldom been run so far.

To draw a case takes a few milliseconds, and to run it more than a hundred. Draws are much alike:
the common steps are in most of them. So several cases are drawn for each one that is run, and that
is the one with the rarest *traits*: pairs of options of a step, pairs of steps at one RRef, pairs
of a step and a fault, and the like. Software is known to fail where two such things meet. Whether a
case meets a known finding is no trait, because a hunt looks for others.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator
from dataclasses import fields
from typing import Any

from rpcprops.faults import Fault, MessageFault
from rpcprops.programs import End, Scope
from rpcprops.properties._base import Case
from rpcprops.steps import Leaf

#: How many cases are drawn for each one that a hunt runs.
CANDIDATES = 8
#: With how many of the last cases one is compared.
_COMPARED = 40
#: By how many steps a program takes longer than its own: the time of a program without any.
_STEPS_OF_NONE = 4
#: What a pair of steps at one RRef counts, compared with another trait. A step with many options
#: has far more pairs of them than an RRef has steps.
_AT_ONE_RREF = 3.0
#: The first part of such a trait.
_RREF = "RRef"
#: Virtual seconds: a drawn timeout that is to end nothing is longer.
_ENDS_NOTHING = 600.0
_RANKS = ("to", "via", "then")
#: Fields that list ranks.
_LISTS = frozenset({"owners", "path", "targets", "first"})
#: Fields whose values are names, or text of any kind.
_FREE = frozenset({"at", "handle", "right", "future", "context", "text", *_RANKS})


class Choice:
    """Chooses one of so many cases, as they come; the same cases give the same choice."""

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self._times: Counter[Hashable] = Counter()
        self._latest: deque[float] = deque(maxlen=_COMPARED)

    def takes(self, case: Case) -> bool:
        """Whether this case is to be run: it is one of the rarest of the last ones.

        A long program has more traits than a short one, and takes longer. So what counts is how
        rare its traits are for each step.
        """
        if self._candidates == 1:
            return True
        traits = traits_of(case)
        rarity = sum(_weight(one) / (1 + self._times[one]) for one in traits)
        rarity /= _STEPS_OF_NONE + len(case.program.leaves)
        self._latest.append(rarity)
        better = sum(other > rarity for other in self._latest)
        if better * self._candidates >= len(self._latest):
            return False
        self._times.update(traits)
        return True


def _weight(trait: Any) -> float:
    """What a trait counts."""
    return _AT_ONE_RREF if trait[0] == _RREF else 1.0


def traits_of(case: Case) -> set[Hashable]:
    """What a case has that others may lack."""
    program, plan = case.program, case.plan
    found: set[Hashable] = set()
    for leaf in program.leaves:
        options = list(_options(leaf))
        found.update(options)
        found.update(itertools.combinations(options, 2))
    found.update((one.op, next_.op) for one, next_ in itertools.pairwise(program.leaves))
    found.update(_at_one_rref(case))
    faults = plan.faults(program.world_size)
    around = [
        ("end", program.end.how, program.end != End(), program.ends_hastily),
        ("default timeout", program.rpc_timeout is not None),
        ("threads", program.num_worker_threads is not None),
        ("settles", program.settles),
        *dict.fromkeys(kind for fault in faults for kind in _kinds_of(fault)),
    ]
    found.update(itertools.product(around, {_form(leaf) for leaf in program.leaves}))
    return found


def _options(leaf: Leaf) -> Iterator[Hashable]:
    """The choices of a step that do not depend on others: not its names, and not its numbers."""
    for item in fields(leaf):
        name, value = item.name, getattr(leaf, item.name)
        if name in _RANKS:
            if value == leaf.at:
                yield leaf.op, name, "itself"
        elif name == "timeout":
            if value is not None:
                yield leaf.op, name, value < _ENDS_NOTHING
        elif name in _FREE or name in leaf.makes or not value:
            continue
        elif isinstance(value, float):
            yield leaf.op, name
        elif isinstance(value, str | int):
            yield leaf.op, name, value
        elif isinstance(value, tuple):
            yield from ((leaf.op, name, one) for one in _listed(leaf, name, value))


def _listed(leaf: Leaf, name: str, values: tuple[Any, ...]) -> Iterator[Hashable]:
    """What a list in a field names, or what its ranks have in common, each once.

    Where it holds nothing but numbers, that there is one; of tensors, nothing.
    """
    if name in _LISTS:
        yield "several" if len(values) > 1 else "one"
        if len({*values}) < len(values):
            yield "twice"
        if leaf.at in values:
            yield "itself"
    elif texts := dict.fromkeys(_texts_in(values)):
        yield from texts
    elif not isinstance(values[0], float):
        yield "some"


def _texts_in(values: tuple[Any, ...]) -> Iterator[str]:
    """The texts in a tuple, and in the tuples in it."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            yield from _texts_in(value)


def _kinds_of(fault: Fault) -> Iterator[Hashable]:
    """What a fault does, to which messages, and for which one they wait; without its numbers."""
    if isinstance(fault, MessageFault):
        yield fault.action, fault.message, fault.until and fault.until.message
    else:
        yield from ((message, fault.blocks_sender) for message in fault.targets)


def _form(leaf: Leaf) -> tuple[str, bool, bool, bool]:
    """A step by its kind, and whether a timeout may end it, its function sleeps or gets an RRef."""
    timeout: float | None = getattr(leaf, "timeout", None)
    ends = timeout is not None and timeout < _ENDS_NOTHING
    return leaf.op, ends, leaf.lasts > 0, isinstance(getattr(leaf, "right", None), str)


def _at_one_rref(case: Case) -> Iterator[Hashable]:
    """The pairs of steps that use one RRef."""
    scope = Scope(case.program.world_size)
    before: defaultdict[int, list[Any]] = defaultdict(list)
    for step in case.program.steps:
        used = [(leaf, scope.touched(leaf).used) for leaf in step.leaves]
        scope.add(step)
        for leaf, rrefs in used:
            made = {scope.handles[n].rref for _, n in leaf.made if n in scope.handles}
            for rref in rrefs | made:
                yield from ((_RREF, earlier, _form(leaf)) for earlier in before[rref])
                before[rref].append(_form(leaf))
