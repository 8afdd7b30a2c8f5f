"""Hunts: drawn programs with and without faults, batch after batch, in a file that only grows.

Each line of the file is one batch as JSON. A hunt continues where its file ends: seeds that are in
the file are not drawn again, and an example that two batches drew counts once. One process draws
one batch after the other (:func:`go_on`), or several draw different ones at once
(:mod:`rpcprops._hunt_jobs`).
"""

from __future__ import annotations

import bisect
import builtins
import functools
import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from rpcprops import agents
from rpcprops._files import GrowingFile, Unwritten
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.errors import UsageError
from rpcprops.oracle import DOCUMENTED, accepted_json
from rpcprops.properties import (
    CANDIDATES,
    WITHOUT_FAULTS,
    Case,
    Examination,
    Observation,
    Property,
    drawn_properties,
    examine,
)
from rpcprops.report.artefact import versions, write_or_say
from rpcprops.report.in_flight import watched
from rpcprops.report.text import artefact_of, describe_case
from rpcprops.runner import Runner
from rpcprops.torch_facts import installed

#: The properties under faults that every agent can inject, and the transports, in turn.
UNDER_FAULTS = ("drawn-within-budget", "drawn-lost-calls", "drawn-beyond-budget")
#: The property under faults of single messages, which takes part where the agent can inject them.
UNDER_MESSAGE_FAULTS = "drawn-message-faults"
#: The property of dynamic groups, which no fault can reach.
GROUPS = "drawn-groups"
#: The properties whose programs have no fault.
FAULTLESS = (WITHOUT_FAULTS.name, GROUPS)
TRANSPORTS: tuple[Literal["tcp", "shm"], ...] = ("tcp", "shm")
#: What to do about a file that is not of a hunt: to go on with it, or to show it.
_REMEDY = "name a file that rpcprops hunt has written, or a new one to hunt in"
#: The number of draws in one batch, which is one line of the file.
BATCH_SIZE = 400
#: The share of the different examples that have no fault, unless another one is asked for.
SHARE_WITHOUT_FAULTS = 0.5
#: The fewest draws in a batch, if it may have so many: a few draws are mostly the simplest ones. In
#: a short hunt they are this part of it, so that each property is drawn.
_LEAST_DRAWS = 50
_LEAST_SHARE = 6
_LEAST_OF_ALL = 5
#: The share of a batch of dynamic groups, whose few kinds of step are soon alike.
_SHARE_OF_GROUPS = 0.25
#: The share of a hunt's time in which passing cases are run in real time as well.
_SHARE_IN_REAL_TIME = 0.1
#: By how much the first seeds of two hunts differ whose own seeds follow each other: far more than
#: the batches of any hunt.
_SEEDS = 1_000_000
_MAGIC = "rpcprops hunt"
_FORMAT = 1
#: The first characters of a batch's JSON.
_BEGINS = b'{"property":"'


@dataclass
class Batch:
    """One batch of a hunt.

    Attributes:
        cases: a digest of each different example that was run.
        without_faults: those of them that have no fault, by their digests.
        explained: how many examples broke a promise in the way of each known finding, by its name.
        accepted: how many examples showed a documented effect, by its kind.
        accepted_times: how often they showed it, each rank and step by itself.
        accepted_examples: one of them with the fewest steps for each kind, as Python.
        verdict: the verdict of the examination, as for ``rpcprops check``.
        found_after: real seconds from the start of the batch until each known finding, by its name,
            was first met, and each broken promise was first confirmed.
        found_at: how many examples of the batch were run by then.
        after: for each of `cases`, the real seconds from the start of the batch to its end.
        began: real seconds of hunting before the batch; None in older files, where each batch began
            when the one before had ended.
        real_seconds: what passing cases took that were run in real time as well.
        draws: the most different examples that it may have; 0 in older files.
        failure: the promise that an unexplained failure broke, and its artefact, or the line that
            says why there is none.
        unconfirmed: failures that real time did not show again, in the same form.
        agent: the RPC agent of the ranks; empty if it is torch's faulty one.
        known: whether what meets known findings was drawn as well.
        candidates: of how many drawn examples one was run.
        used: how many runs were in ranks that had run other programs before.
    """

    property: str
    seed: int
    transport: str
    rate: float
    torch: str
    verdict: str = ""
    cases: list[str] = field(default_factory=list)
    faults_fired: int = 0
    fired_by_type: dict[str, int] = field(default_factory=dict)
    explained: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    accepted_examples: dict[str, str] = field(default_factory=dict)
    failure: list[str] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    without_faults: list[str] = field(default_factory=list)
    accepted_times: dict[str, int] = field(default_factory=dict)
    found_after: dict[str, float] = field(default_factory=dict)
    found_at: dict[str, int] = field(default_factory=dict)
    after: list[float] = field(default_factory=list)
    began: float | None = None
    real_seconds: float = 0.0
    draws: int = 0
    what: str = _MAGIC
    format: int = _FORMAT
    agent: str = ""
    known: bool = False
    candidates: int = 1
    used: int = 0


def hunted(*, known: bool = False, agent: str = "") -> Mapping[str, Property]:
    """The properties that a hunt draws from, by name.

    Args:
        agent: the agent of its ranks; empty if it is torch's faulty one.
        known: whether it also draws what meets known findings: as for a torch that has mended
            them all. What its runs show is judged by what is known of the torch that ran.
    """
    drawn = drawn_properties(installed().as_if_mended() if known else None)
    return {name: drawn[name] for name in (*FAULTLESS, *under_faults(agent))}


def under_faults(agent: str = "") -> tuple[str, ...]:
    """The properties whose programs run under faults, for an agent as a batch names it."""
    return (*UNDER_FAULTS, UNDER_MESSAGE_FAULTS) if agent == WIRE else UNDER_FAULTS


def _batch(line: bytes) -> Batch:
    batch = msgspec.json.decode(line, type=Batch)
    if batch.what != _MAGIC or batch.format != _FORMAT:
        msg = f"it is not of format {_FORMAT}"
        raise ValueError(msg)
    return batch


@dataclass(frozen=True, slots=True)
class Found:
    """Something that a hunt found.

    Attributes:
        name: a known finding, or the promise that an unexplained failure broke.
        seconds: real seconds of hunting before that, from the first batch of the file on.
        is_known: whether it is a known finding.
        examples: how many different examples had been run by then, by all processes.
    """

    name: str
    seconds: float
    is_known: bool
    examples: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a hunt is to have in the end, and how it is to get there.

    Attributes:
        examples: how many different examples.
        batch_size: the most of them in one batch, after which the file is written.
        share_without_faults: how many of the examples are to have no fault, from 0 to 1. A batch
            has faults or has none, so the share is near this one at the end only.
        candidates: of so many drawn examples one is run, that with most of what was seldom run.
    """

    examples: int
    batch_size: int = BATCH_SIZE
    share_without_faults: float = SHARE_WITHOUT_FAULTS
    candidates: int = CANDIDATES


@dataclass(frozen=True, slots=True)
class Order:
    """A batch that is to be drawn.

    Attributes:
        draws: how many different examples it is to have.
        real_seconds: how long passing cases may also run in real time.
        known: whether what meets known findings is drawn as well.
        candidates: of how many drawn examples one is run.
    """

    property: str
    seed: int
    transport: Literal["tcp", "shm"]
    draws: int
    real_seconds: float = 0.0
    known: bool = False
    candidates: int = CANDIDATES

    @builtins.property
    def key(self) -> tuple[str, int, str]:
        """What no other batch of the hunt has."""
        return self.property, self.seed, self.transport

    def __str__(self) -> str:
        return f"{self.property}, {self.transport}, seed {self.seed}"


@dataclass
class Hunt:
    """All batches of a file.

    Attributes:
        path: the file; it need not exist yet.
        seed: which draws it has; hunts with different seeds have different ones.
        known: whether it also draws what meets known findings (see :func:`hunted`).
        agent: the agent of its ranks; empty if it is torch's faulty one.
    """

    path: Path
    batches: list[Batch] = field(default_factory=list)
    seed: int = 0
    known: bool = False
    agent: str = ""
    _cases: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)
    _alone: set[tuple[str, str]] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        for batch in self.batches:
            self._note(batch)

    @classmethod
    def read(cls, path: Path, seed: int | None = None, *, known: bool | None = None) -> Hunt:
        """The hunt in `path`, an empty one if there is no file.

        Args:
            seed: the seed that it must have, if it is not empty (None: any; an empty one has 0).
            known: whether it must draw what is known (None: either; an empty one does not).

        Raises:
            UsageError: it is no regular file, a line is no batch of a hunt (an incomplete last
                line is ignored), it has another seed, or draws what is known where it must not, or
                does not where it must.
        """
        hunt = cls(path)
        batches = hunt._file.read(_batch)
        if not batches:
            return cls(path, seed=seed or 0, known=known or False)
        draws_known = batches[0].known
        if any(batch.known != draws_known for batch in batches):
            msg = f"{path} mixes batches that were drawn with --known and without; use another."
            raise UsageError(msg)
        if known not in (None, draws_known):
            remedy = "add it" if draws_known else "leave it out"
            msg = (
                f"{path} was hunted with{'' if draws_known else 'out'} --known; {remedy}, or hunt "
                "in another --file."
            )
            raise UsageError(msg)
        of_file = batches[0].seed // _SEEDS
        if seed not in (None, of_file):
            msg = (
                f"{path} is of seed {of_file}, not {seed}; hunt in another --file, or leave --seed "
                "out to go on with its own."
            )
            raise UsageError(msg)
        return cls(path, batches, of_file, draws_known, batches[0].agent)

    def _note(self, batch: Batch) -> None:
        self._cases.update((batch.transport, case) for case in batch.cases)
        self._alone.update((batch.transport, case) for case in batch.without_faults)

    @property
    def examples(self) -> int:
        """Different examples that were run."""
        return len(self._cases)

    @property
    def without_faults(self) -> int:
        """Those of them that have no fault."""
        return len(self._alone)

    @property
    def placed(self) -> Iterator[tuple[float, Batch]]:
        """Each batch, after the real seconds of hunting at which it began."""
        end = 0.0
        for batch in self.batches:
            began = end if batch.began is None else batch.began
            yield began, batch
            end = max(end, began + batch.seconds)

    @property
    def seconds(self) -> float:
        """Real seconds from the start of the hunt to its last batch's end, without breaks."""
        return max((began + batch.seconds for began, batch in self.placed), default=0.0)

    @property
    def found(self) -> list[Found]:
        """What was found, in the order of time."""
        first: dict[str, tuple[float, bool]] = {}
        for began, batch in self.placed:
            for name, seconds in batch.found_after.items():
                is_known = name in batch.explained
                if not is_known and not batch.failure:
                    continue
                number = batch.found_at.get(name, 0)
                # That example counts too, whose end was noted a moment later.
                at = began + max(seconds, *batch.after[number - 1 : number], 0.0)
                if name not in first or at < first[name][0]:
                    first[name] = (at, is_known)
        ends = self._ends()
        return [
            Found(name, round(at, 1), is_known, bisect.bisect_right(ends, at))
            for name, (at, is_known) in sorted(first.items(), key=lambda item: item[1])
        ]

    def clock(self) -> Callable[[], float]:
        """Tells the real seconds of hunting, which go on from the end of the last batch."""
        began = time.monotonic() - self.seconds
        return lambda: round(time.monotonic() - began, 2)

    def _ends(self) -> list[float]:
        """When each different example had first been run, in real seconds of hunting."""
        ends: dict[tuple[str, str], float] = {}
        for began, batch in self.placed:
            each = batch.seconds / max(1, len(batch.cases))
            # An older file does not say it, so they are taken to be alike.
            after = batch.after or [each * number for number in range(1, 1 + len(batch.cases))]
            for case, seconds in zip(batch.cases, after, strict=False):
                key, at = (batch.transport, case), began + seconds
                ends[key] = min(at, ends.get(key, at))
        return sorted(ends.values())

    def total(
        self, name: Literal["fired_by_type", "explained", "accepted", "accepted_times"]
    ) -> Counter[str]:
        """A tally over all batches."""
        total: Counter[str] = Counter()
        for batch in self.batches:
            total.update(getattr(batch, name))
        return total

    @property
    def failures(self) -> list[list[str]]:
        """The unexplained failures, confirmed in real time: promise and artefact of each."""
        return [batch.failure for batch in self.batches if batch.failure]

    @functools.cached_property
    def _file(self) -> GrowingFile:
        return GrowingFile(self.path, "batch of a hunt", _BEGINS, _REMEDY)

    @property
    def unwritten(self) -> Unwritten | None:
        """Why the last batches are not in the file, if they could not be written."""
        return self._file.unwritten

    def append(self, batch: Batch) -> None:
        """Write one more batch, at once and durably; or with the next one, if that fails now.

        Raises:
            UsageError: the file does not belong to a hunt.
        """
        self.batches.append(batch)
        self._note(batch)
        self._file.append(msgspec.json.encode(batch))

    def next_batch(
        self, share: float = SHARE_WITHOUT_FAULTS, under_way: Collection[Order] = ()
    ) -> tuple[str, int, Literal["tcp", "shm"]]:
        """The next draws: property, seed and transport.

        They are without faults as long as no more than that share of the examples so far is, with
        those that are `under_way`. Of the properties with faults each has its turn.
        """
        alone, all_ = self._expected(under_way)
        names = FAULTLESS if share and alone <= share * all_ else self._under_faults
        done = {(b.property, b.seed, b.transport) for b in self.batches}
        done |= {order.key for order in under_way}
        turns = _in_turn(names)
        name = turns[sum(name in names for name, *_ in done) % len(turns)]
        return next(
            (name, seed, transport)
            for seed in itertools.count(self.seed * _SEEDS)
            for transport in TRANSPORTS
            if (name, seed, transport) not in done
        )

    @property
    def _under_faults(self) -> tuple[str, ...]:
        return under_faults(self.agent)

    def _expected(self, under_way: Collection[Order]) -> tuple[int, int]:
        """The examples without faults, and all, once what is under way has been run."""
        alone = sum(order.draws for order in under_way if order.property in FAULTLESS)
        return (
            self.without_faults + alone,
            self.examples + sum(order.draws for order in under_way),
        )

    def missing(
        self, name: str, examples: int, share: float, under_way: Collection[Order] = ()
    ) -> int:
        """How many examples of a property's sort, with or without faults, a hunt still needs.

        Args:
            examples: how many different ones it is to have in all.
            share: how many of these are to have no fault.
            under_way: what is being run.
        """
        so_far, all_ = self._expected(under_way)
        alone = max(0, math.ceil(share * examples) - so_far)
        if name in FAULTLESS:
            return alone
        return max(0, examples - all_ - alone)

    def order(
        self, wanted: Wanted, *, under_way: Collection[Order] = (), jobs: int = 1
    ) -> Order | None:
        """The next batch to draw; None if those that are under way may be enough.

        Args:
            jobs: how many batches are drawn at once.
        """
        examples, share, batch_size = (
            wanted.examples,
            wanted.share_without_faults,
            wanted.batch_size,
        )
        if self._expected(under_way)[1] >= examples:
            return None
        name, seed, transport = self.next_batch(share, under_way)
        # So that each process gets some of a short hunt, and each property does.
        parts = max(jobs, len(_in_turn(FAULTLESS if name in FAULTLESS else self._under_faults)))
        most = math.ceil(batch_size * _SHARE_OF_GROUPS) if name == GROUPS else batch_size
        missing = math.ceil(self.missing(name, examples, share, under_way) / parts)
        least = min(_LEAST_DRAWS, max(_LEAST_OF_ALL, examples // _LEAST_SHARE))
        spent = sum(batch.real_seconds for batch in self.batches)
        allowed = _SHARE_IN_REAL_TIME * sum(batch.seconds for batch in self.batches) - spent
        return Order(
            name,
            seed,
            transport,
            min(most, max(least, missing)),
            max(0.0, allowed) / jobs,
            self.known,
            wanted.candidates,
        )

    def draw_for(self, torch: str, agent: str) -> None:
        """Let batches of this torch and agent follow; the agent decides what is drawn.

        Raises:
            UsageError: the hunt is of others.
        """
        other = {batch.torch for batch in self.batches} - {torch}
        if other:
            msg = (
                f"{self.path} is of torch {', '.join(sorted(other))}, and this is {torch}; hunt in "
                "another --file."
            )
            raise UsageError(msg)
        self.check_agent(agent)
        self.agent = _stored(agent)

    def check_agent(self, agent: str) -> None:
        """Raise UsageError if the hunt is of another agent."""
        others = [batch.agent for batch in self.batches if batch.agent != _stored(agent)]
        if others:
            had = others[0] or agents.default_name()
            msg = (
                f"{self.path} holds a hunt with the agent {had}, not {agent}; give --agent {had}, "
                f"or another --file."
            )
            raise UsageError(msg)


def _in_turn(names: Sequence[str]) -> list[str]:
    """The properties as they take turns.

    Every second one has faults of messages, of which there are far more than of others.
    """
    others = [name for name in names if name != UNDER_MESSAGE_FAULTS]
    if len(others) == len(names):
        return others
    return [name for other in others for name in (other, UNDER_MESSAGE_FAULTS)]


def digest(case: Case) -> str:
    """A short name of a case, the same in every run."""
    return hashlib.sha256(repr(case).encode()).hexdigest()[:12]


def _stored(agent: str) -> str:
    """The name of an agent as a batch has it."""
    return "" if agent == agents.default_name() else agent


def run_order(
    order: Order,
    runner: Runner,
    on_example: Callable[[Batch], None] | None = None,
    artefacts: Path | None = None,
    on_failing: Callable[[str], None] | None = None,
) -> Batch:
    """Draw and run one batch.

    Args:
        on_example: called after each example with the batch so far.
        artefacts: where failures are written (None: where ``rpcprops check`` writes them).
        on_failing: as for :func:`rpcprops.properties.examine`.
    """
    server = runner.server
    batch = Batch(
        order.property,
        order.seed,
        order.transport,
        server.rate,
        server.torch_version,
        agent=_stored(server.agent),
        draws=order.draws,
        known=order.known,
        candidates=order.candidates,
    )
    used = runner.worlds["used"]
    began = time.monotonic()

    def seen(_: Examination, observation: Observation) -> None:
        case = observation.case
        batch.cases.append(digest(case))
        batch.after.append(round(time.monotonic() - began, 2))
        if not case.plan.faulty_ranks(case.program.world_size):
            batch.without_faults.append(batch.cases[-1])
        if on_example is not None:
            on_example(batch)

    with watched(server) as in_flight:
        in_flight.begin(order.property)
        result = examine(
            hunted(known=order.known, agent=batch.agent)[order.property],
            runner,
            max_examples=order.draws,
            seed=order.seed,
            on_example=seen,
            on_failing=on_failing,
            different=True,
            candidates=order.candidates,
            real_seconds=order.real_seconds,
            transport=order.transport,
        )
    batch.used = runner.worlds["used"] - used
    _complete(batch, result, [artefacts] if artefacts else [])
    return batch


def _complete(batch: Batch, result: Examination, where: list[Path]) -> None:
    """Add what an examination found to a batch; write its failures."""
    batch.verdict = result.verdict
    batch.explained = dict(sorted(result.explained.items()))
    batch.accepted = {one.kind: one.examples for one in result.accepted.values()}
    batch.accepted_times = {one.kind: one.times for one in result.accepted.values()}
    batch.found_after = {name: round(after, 2) for name, after in result.found_after.items()}
    batch.found_at = dict(result.found_at)
    batch.accepted_examples = {
        one.kind: describe_case(one.case) for one in result.accepted.values()
    }
    batch.faults_fired = result.faults_fired
    batch.fired_by_type = dict(result.fired_by_type)
    batch.unconfirmed = [
        f"{doubt.line} ({write_or_say(artefact_of(doubt.failure), *where)})"
        if doubt.failure
        else doubt.line
        for doubt in result.doubts
    ]
    batch.real_seconds = round(result.compared_seconds, 2)
    batch.seconds = round(result.seconds, 2)
    if result.failure is not None:
        path = write_or_say(artefact_of(result.failure), *where)
        batch.failure = [result.failure.promise, str(path)]


def go_on(
    hunt: Hunt,
    runner: Runner,
    wanted: Wanted,
    *,
    on_example: Callable[[Batch], None] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    on_failing: Callable[[str], None] | None = None,
    artefacts: Path | None = None,
) -> None:
    """Add batches until the hunt has as many different examples as are wanted.

    Args:
        on_example: called after each example with the batch so far, for a progress display.
        on_batch: called after each batch, when it is in the file.
        on_failing: as for :func:`rpcprops.properties.examine`.
        artefacts: where failures are written (None: where ``rpcprops check`` writes them).

    Raises:
        UsageError: the hunt is of another torch, or of another agent.
    """
    hunt.draw_for(runner.server.torch_version, runner.server.agent)
    now = hunt.clock()
    while order := hunt.order(wanted):
        began = now()
        batch = run_order(order, runner, on_example, artefacts, on_failing)
        batch.began = began
        hunt.append(batch)
        if on_batch is not None:
            on_batch(batch)


def summary(hunt: Hunt) -> dict[str, Any]:
    """The hunt as JSON data."""
    times = hunt.total("accepted_times")
    by_property: dict[str, int] = {}
    for name in (*FAULTLESS, *under_faults(hunt.agent)):
        found = {(b.transport, c) for b in hunt.batches if b.property == name for c in b.cases}
        by_property[name] = len(found)
    return {
        "versions": versions(),
        "examples": hunt.examples,
        "examples_without_faults": hunt.without_faults,
        "examples_with_faults": hunt.examples - hunt.without_faults,
        "examples_by_property": by_property,
        "batches": len(hunt.batches),
        "faults_fired": sum(b.faults_fired for b in hunt.batches),
        "fired_by_type": dict(sorted(hunt.total("fired_by_type").items())),
        "known_findings_met": dict(sorted(hunt.total("explained").items())),
        "accepted": [
            accepted_json(kind, count, _example_of(hunt, kind), times[kind])
            for kind, count in sorted(hunt.total("accepted").items())
            if kind in DOCUMENTED
        ],
        "found": [
            {
                "name": one.name,
                "seconds": one.seconds,
                "examples": one.examples,
                "known": one.is_known,
            }
            for one in hunt.found
        ],
        "failures": hunt.failures,
        "unconfirmed": [line for batch in hunt.batches for line in batch.unconfirmed],
        "seed": hunt.seed,
        "draws_known": hunt.known,
        "runs_in_used_ranks": sum(b.used for b in hunt.batches),
        "seconds": round(hunt.seconds, 1),
        "seconds_of_all_jobs": round(sum(b.seconds for b in hunt.batches), 1),
        "seconds_in_real_time": round(sum(b.real_seconds for b in hunt.batches), 1),
    }


def _example_of(hunt: Hunt, kind: str) -> str:
    """The shortest example of a documented effect; a file that was edited may lack it."""
    found = [b.accepted_examples[kind] for b in hunt.batches if kind in b.accepted_examples]
    return min(found, key=len, default="one that the file does not hold")
