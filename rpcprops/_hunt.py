"""Hunts: drawn programs with and without faults, batch after batch, in a file that only grows.

Each line of the file is one batch as JSON. A hunt continues where its file ends: seeds that are in
the file are not drawn again, and an example that two batches drew counts once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from rpcprops import agents
from rpcprops._files import GrowingFile, Unwritten
from rpcprops.errors import UsageError
from rpcprops.oracle import DOCUMENTED, accepted_json
from rpcprops.properties import (
    PROPERTIES,
    WITHOUT_FAULTS,
    Case,
    Examination,
    Observation,
    Property,
    examine,
)
from rpcprops.report.artefact import versions, write_or_say
from rpcprops.report.in_flight import watched
from rpcprops.report.text import artefact_of, describe_case
from rpcprops.runner import Runner

#: The properties under faults, and the transports, in turn.
UNDER_FAULTS = ("drawn-within-budget", "drawn-lost-calls", "drawn-beyond-budget")
#: All properties that a hunt draws from, by name.
HUNTED: Mapping[str, Property] = {
    WITHOUT_FAULTS.name: WITHOUT_FAULTS,
    **{name: PROPERTIES[name] for name in UNDER_FAULTS},
}
TRANSPORTS: tuple[Literal["tcp", "shm"], ...] = ("tcp", "shm")
#: The number of draws in one batch, which is one line of the file.
BATCH_SIZE = 400
#: The share of the different examples that have no fault, unless another one is asked for.
SHARE_WITHOUT_FAULTS = 0.5
#: The fewest draws in a batch, if it may have so many: a few draws are mostly the simplest ones.
_LEAST_DRAWS = 50
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
        accepted_examples: the first of them for each kind, as Python.
        verdict: the verdict of the examination, as for ``rpcprops check``.
        found_after: real seconds from the start of the batch until each known finding, by its name,
            was first met, and each broken promise was first confirmed.
        failure: the promise that an unexplained failure broke, and its artefact, or the line that
            says why there is none.
        unconfirmed: failures that real time did not show again, in the same form.
        agent: the RPC agent of the ranks; empty if it is torch's faulty one.
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
    what: str = _MAGIC
    format: int = _FORMAT
    agent: str = ""


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
    """

    name: str
    seconds: float
    is_known: bool


@dataclass
class Hunt:
    """All batches of a file.

    Attributes:
        path: the file; it need not exist yet.
    """

    path: Path
    batches: list[Batch] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Hunt:
        """The hunt in `path`, an empty one if there is no file.

        Raises:
            UsageError: it is no regular file, or a line is no batch of a hunt (an incomplete last
                line is ignored).
        """
        hunt = cls(path)
        hunt.batches += hunt._file.read(_batch)
        return hunt

    @property
    def examples(self) -> int:
        """Different examples that were run."""
        return len({(b.transport, case) for b in self.batches for case in b.cases})

    @property
    def without_faults(self) -> int:
        """Those of them that have no fault."""
        return len({(b.transport, case) for b in self.batches for case in b.without_faults})

    @property
    def found(self) -> list[Found]:
        """What was found, in the order of time."""
        found: dict[str, Found] = {}
        before = 0.0
        for batch in self.batches:
            for name, seconds in sorted(batch.found_after.items(), key=lambda item: item[1]):
                is_known = name in batch.explained
                if is_known or batch.failure:
                    found.setdefault(name, Found(name, round(before + seconds, 1), is_known))
            before += batch.seconds
        return list(found.values())

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
        return GrowingFile(self.path, "batch of a hunt", _BEGINS, "hunt in another --file")

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
        self._file.append(msgspec.json.encode(batch))

    def next_batch(
        self, share: float = SHARE_WITHOUT_FAULTS
    ) -> tuple[str, int, Literal["tcp", "shm"]]:
        """The next draws: property, seed and transport.

        They are without faults as long as no more than that share of the examples so far is.
        """
        alone = bool(share) and self.without_faults <= share * self.examples
        names = (WITHOUT_FAULTS.name,) if alone else UNDER_FAULTS
        done = {(b.property, b.seed, b.transport) for b in self.batches}
        return next(
            (name, seed, transport)
            for seed in itertools.count()
            for transport in TRANSPORTS
            for name in names
            if (name, seed, transport) not in done
        )

    def missing(self, name: str, examples: int, share: float) -> int:
        """How many examples of a property's sort, with or without faults, a hunt still needs.

        Args:
            examples: how many different ones it is to have in all.
            share: how many of these are to have no fault.
        """
        alone = max(0, math.ceil(share * examples) - self.without_faults)
        if name == WITHOUT_FAULTS.name:
            return alone
        return max(0, examples - self.examples - alone)


def digest(case: Case) -> str:
    """A short name of a case, the same in every run."""
    return hashlib.sha256(repr(case).encode()).hexdigest()[:12]


def go_on(
    hunt: Hunt,
    runner: Runner,
    *,
    examples: int,
    batch_size: int = BATCH_SIZE,
    share_without_faults: float = SHARE_WITHOUT_FAULTS,
    on_example: Callable[[Batch, Observation], None] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    artefacts: Path | None = None,
) -> None:
    """Add batches until the hunt has that many different examples.

    Args:
        batch_size: the most draws between two writes.
        share_without_faults: how many of the examples are to have no fault, from 0 to 1. A batch
            has faults or has none, so the share is near this one at the end only.
        on_example: called after each example with the batch so far, for a progress display.
        on_batch: called after each batch, when it is in the file.
        artefacts: where failures are written (None: where ``rpcprops check`` writes them).

    Raises:
        UsageError: the hunt is of another torch.
    """
    server = runner.server
    other = {batch.torch for batch in hunt.batches} - {server.torch_version}
    if other:
        msg = (
            f"{hunt.path} is of torch {', '.join(sorted(other))}, and this is "
            f"{server.torch_version}; hunt in another --file."
        )
        raise UsageError(msg)
    agent = "" if server.agent == agents.default_name() else server.agent
    if any(batch.agent != agent for batch in hunt.batches):
        msg = f"{hunt.path} is of another agent than {server.agent}; hunt in another --file."
        raise UsageError(msg)
    while hunt.examples < examples:
        name, seed, transport = hunt.next_batch(share_without_faults)
        missing = hunt.missing(name, examples, share_without_faults)
        if name in UNDER_FAULTS:
            # So that a short hunt draws from each of them.
            missing = math.ceil(missing / len(UNDER_FAULTS))
        batch = Batch(name, seed, transport, server.rate, server.torch_version, agent=agent)

        def seen(_: Examination, observation: Observation, batch: Batch = batch) -> None:
            case = observation.case
            batch.cases.append(digest(case))
            if not case.plan.faulty_ranks(case.program.world_size):
                batch.without_faults.append(batch.cases[-1])
            if on_example is not None:
                on_example(batch, observation)

        with watched(server) as in_flight:
            in_flight.begin(name)
            result = examine(
                HUNTED[name],
                runner,
                max_examples=min(batch_size, max(_LEAST_DRAWS, missing)),
                seed=seed,
                on_example=seen,
                transport=transport,
            )
        batch.verdict = result.verdict
        batch.explained = dict(sorted(result.explained.items()))
        batch.accepted = {one.kind: one.examples for one in result.accepted.values()}
        batch.accepted_times = {one.kind: one.times for one in result.accepted.values()}
        batch.found_after = {name: round(after, 1) for name, after in result.found_after.items()}
        batch.accepted_examples = {
            one.kind: describe_case(one.case) for one in result.accepted.values()
        }
        batch.faults_fired = result.faults_fired
        batch.fired_by_type = dict(result.fired_by_type)
        where = [artefacts] if artefacts else []
        batch.unconfirmed = [
            f"{doubt.line} ({write_or_say(artefact_of(doubt.failure), *where)})"
            if doubt.failure
            else doubt.line
            for doubt in result.doubts
        ]
        batch.seconds = round(result.seconds, 2)
        if result.failure is not None:
            path = write_or_say(artefact_of(result.failure), *where)
            batch.failure = [result.failure.promise, str(path)]
        hunt.append(batch)
        if on_batch is not None:
            on_batch(batch)


def summary(hunt: Hunt) -> dict[str, Any]:
    """The hunt as JSON data."""
    times = hunt.total("accepted_times")
    by_property: dict[str, int] = {}
    for name in HUNTED:
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
            {"name": one.name, "seconds": one.seconds, "known": one.is_known} for one in hunt.found
        ],
        "failures": hunt.failures,
        "unconfirmed": [line for batch in hunt.batches for line in batch.unconfirmed],
        "seconds": round(sum(b.seconds for b in hunt.batches), 1),
    }


def _example_of(hunt: Hunt, kind: str) -> str:
    """The first example that showed a documented effect; a file that was edited may lack it."""
    for batch in hunt.batches:
        if kind in batch.accepted_examples:
            return batch.accepted_examples[kind]
    return "one that the file does not hold"
