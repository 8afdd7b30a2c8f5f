"""Several hunts side by side: in how many each finding was met, and how soon.

A hunt that did not meet a finding would have met it later than it ended, if ever. So for the median
and the quartiles it counts as longer than every hunt that did. A quartile that falls on such a hunt
is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpcprops._hunt import Found, Hunt
from rpcprops.errors import UsageError
from rpcprops.torch_facts import FINDINGS, facts_of

#: What stands for a number that is not known.
_LATER = "later"


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The median and the quartiles of some numbers; None where one is not known."""

    lower: float | None
    median: float | None
    upper: float | None

    def __str__(self) -> str:
        if self.lower is None:
            return _LATER
        lower, median, upper = (
            _LATER if one is None else f"{one:g}" for one in (self.lower, self.median, self.upper)
        )
        return f"{median} ({lower} to {upper})"


@dataclass(frozen=True, slots=True)
class Met:
    """How soon hunts met a finding.

    Attributes:
        name: a known finding, or the promise that an unexplained failure broke.
        met: how many of the hunts met it.
        seconds: real seconds of hunting until then, over all hunts.
        examples: different examples until then.
    """

    name: str
    is_known: bool
    met: int
    seconds: Quartiles
    examples: Quartiles


@dataclass(frozen=True, slots=True)
class Joined:
    """Several hunts of the same torch and agent.

    Attributes:
        findings: first the known ones that were met, soonest first, then what was new, then the
            known ones of this torch that no hunt met.
    """

    hunts: tuple[Hunt, ...]
    torch: str
    findings: tuple[Met, ...]

    @property
    def title(self) -> str:
        """What was joined, in a line."""
        examples = _range([hunt.examples for hunt in self.hunts])
        seconds = _range([round(hunt.seconds) for hunt in self.hunts])
        count = len(self.hunts)
        each = f"{examples} examples in {seconds} s each"
        return f"{count} hunt{'s' * (count > 1)} of torch {self.torch}, {each}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must know."""
        reasons = {name: FINDINGS[name].not_drawn for name in FINDINGS}
        return (
            "seconds and examples: the median, and the quartiles, over all hunts; one that did "
            f"not meet a finding counts as longer than all that did ({_LATER})",
            "drawn with --known: as for a torch without any known finding"
            if self.known
            else "drawn programs avoid some findings of the torch that runs them, for these would "
            "hide others; a hunt without --known meets those seldom, or never",
            *(f"{name} is not drawn: {reason}" for name, reason in reasons.items() if reason),
        )

    @property
    def known(self) -> bool:
        """Whether the hunts also drew what meets known findings."""
        return self.hunts[0].known

    def as_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return {
            "torch": self.torch,
            "draws_known": self.known,
            "hunts": [
                {
                    "file": str(hunt.path),
                    "seed": hunt.seed,
                    "examples": hunt.examples,
                    "seconds": round(hunt.seconds, 1),
                }
                for hunt in self.hunts
            ],
            "findings": [
                {
                    "name": one.name,
                    "known": one.is_known,
                    "met": one.met,
                    "not_drawn": FINDINGS[one.name].not_drawn if one.is_known else "",
                    "seconds": _quartiles_json(one.seconds),
                    "examples": _quartiles_json(one.examples),
                }
                for one in self.findings
            ],
        }


def _quartiles_json(of: Quartiles) -> dict[str, float | None]:
    return {"lower": of.lower, "median": of.median, "upper": of.upper}


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def joined(paths: Sequence[Path]) -> Joined:
    """The hunts in these files.

    Raises:
        UsageError: a file holds no hunt, or is there twice; or the hunts are of different versions
            of torch, or of different agents, or only some were drawn with ``--known``.
    """
    hunts = tuple(Hunt.read(path) for path in paths)
    for hunt in hunts:
        if not hunt.batches:
            lacks = "there is no hunt in it" if hunt.path.exists() else "there is no such file"
            msg = f"{hunt.path}: {lacks}; name files that rpcprops hunt has written."
            raise UsageError(msg)
    if len({path.resolve() for path in paths}) < len(paths):
        msg = "a file of a hunt is named twice; name each once."
        raise UsageError(msg)
    for what, values in (
        ("versions of torch", {batch.torch for hunt in hunts for batch in hunt.batches}),
        ("agents", {batch.agent for hunt in hunts for batch in hunt.batches}),
    ):
        if len(values) > 1:
            names = ", ".join(sorted(value or "the default one" for value in values))
            msg = f"the hunts are of several {what} ({names}); give files of one only."
            raise UsageError(msg)
    if len({hunt.known for hunt in hunts}) > 1:
        msg = "some hunts were drawn with --known and some without; give files of one sort only."
        raise UsageError(msg)
    torch = hunts[0].batches[0].torch
    return Joined(hunts, torch, tuple(_findings(hunts, torch)))


def _findings(hunts: Sequence[Hunt], torch: str) -> list[Met]:
    found = [{one.name: one for one in hunt.found} for hunt in hunts]
    facts = facts_of(torch)
    known = dict.fromkeys((name for name in FINDINGS if facts.has_bug(name)), True)
    known |= {name: one.is_known for of_one in found for name, one in of_one.items()}
    rows = [_met(name, is_known, found) for name, is_known in known.items()]
    # What no hunt met has no median, and comes last.
    return sorted(
        rows, key=lambda one: (not one.met, not one.is_known, _late(one.seconds.median), -one.met)
    )


def _late(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _met(name: str, is_known: bool, found: Sequence[dict[str, Found]]) -> Met:
    of_each = [of_one[name] for of_one in found if name in of_one]
    others = len(found) - len(of_each)
    return Met(
        name,
        is_known,
        len(of_each),
        _quartiles((one.seconds for one in of_each), others),
        _quartiles((one.examples for one in of_each), others),
    )


def _quartiles(numbers: Iterable[float], others: int) -> Quartiles:
    """Quartiles of `numbers` and of so many `others` that are larger than all of them.

    The median of an even number of values is the middle between two.
    """
    values = [*sorted(numbers), *[math.inf] * others]

    def at(share: float) -> float | None:
        place = share * (len(values) - 1)
        low, high = values[math.floor(place)], values[math.ceil(place)]
        if math.isinf(low if place == math.floor(place) else high):
            return None
        return round(low + (high - low) * (place - math.floor(place)), 1)

    return Quartiles(at(0.25), at(0.5), at(0.75))
