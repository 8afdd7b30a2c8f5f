"""Failure artefacts: one JSON file each, readable, versioned, and data only.

Reading an artefact executes nothing from it. It is written under a temporary name and renamed, so
a reader never sees an incomplete one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from rpcprops._files import Unwritten, read_regular, safe_name, write_whole
from rpcprops._json import from_json, to_json
from rpcprops._kinds import kind_of
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import MAX_CLOCK_RATE, Outcome, Violation
from rpcprops.programs import Program, check_world_size

FORMAT = 1
_MAGIC = "rpcprops failure"
#: The folder for artefacts, below the working directory (or pytest's root).
DIRECTORY = Path(".rpcprops") / "failures"
_WHERE = f"failures are written to {DIRECTORY}/"
_MAX_BYTES = 64 << 20
#: The most characters of a name, a folder or a version, and of an error about a damaged file.
_MOST_TEXT = 10_000
_MOST_SAID = 500
#: The most characters of a reproduction blob: Hypothesis writes a few thousand (compressed).
_MOST_BLOB = 1 << 18
#: The most clusters of an example.
_MOST_CLUSTERS = 10_000


@dataclass(frozen=True, slots=True)
class Earlier:
    """A program that ran in a world before the one that failed there, with its plan."""

    program: Program
    plan: FaultPlan = field(default_factory=FaultPlan)


@dataclass(frozen=True)
class Artefact:
    """A failure that can be run again.

    Attributes:
        kind: the tag of its kind (see :mod:`rpcprops._kinds`). "program" and "reinit" hold a
            program; "pytest" names a user's test, "upstream" one of PyTorch's tests (its program is
            empty, and only says how many ranks there are).
        head: sentences for a reader; no code uses them.
        subject: name of the property, or node id of the test.
        plans: the plan of each cluster that the failing example made, in order.
        outcomes: what those clusters showed; `ran_before` of each is 0 if its ranks were fresh.
        after: if only a used world showed it, the programs that ran there before, the oldest first.
        promise: name of the exception class that the failure raised.
        clock_rate: the rate of its fastest cluster. A test is replayed at this rate.
        reproduction: for a test that Hypothesis draws: its version, and the blob of the example
            ("@example N" for the explicit example of that number, counted from the test upwards).
        rootdir: where pytest ran; relative names are relative to it.
        repeats: how often it failed again, in words.
        world_sizes: number of ranks of each of the clusters.
        underway: no failure was seen: the example was running when its process ended. Then there is
            no promise.
        may_be_used: whether the ranks of what was under way may have run other programs before.
        chosen_agent: of a test, the agent of its clusters that name none (``--rpc-agent``); of
            another example under way, that of its ranks. Empty otherwise.
    """

    kind: str
    subject: str
    promise: str
    plans: tuple[FaultPlan, ...] = ()
    program: Program | None = None
    violations: tuple[Violation, ...] = ()
    clock_rate: float = 1.0
    transport: str = "tcp"
    repeats: tuple[str, ...] = ()
    reproduction: tuple[str, str] | None = None
    rootdir: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    world_sizes: tuple[int, ...] = ()
    underway: bool = False
    may_be_used: bool = False
    chosen_agent: str = ""
    outcomes: tuple[Outcome, ...] = ()
    head: tuple[str, ...] = ()
    after: tuple[Earlier, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of ranks of each cluster, as far as they are known."""
        if self.world_sizes:
            return self.world_sizes
        if self.program is not None:
            return (self.program.world_size,)
        return tuple(outcome.world_size for outcome in self.outcomes)

    @property
    def agent(self) -> str | None:
        """The RPC agent of its ranks; None where it says nothing of that."""
        seen = next((outcome.agent for outcome in self.outcomes if outcome.agent), None)
        return seen or (None if self.outcomes else self.chosen_agent or None)

    @property
    def fault_names(self) -> tuple[str, ...]:
        """The faults of all its clusters by name (see :meth:`FaultPlan.fault_names`)."""
        found = [
            name
            for plan, size in zip(self.plans, self.sizes, strict=False)
            for name in plan.fault_names(size)
        ]
        for outcome in self.outcomes:
            for armed in outcome.armed:
                found += armed.plan.fault_names(outcome.world_size)
        return tuple(dict.fromkeys(found))


@functools.cache
def versions() -> dict[str, str]:
    """Versions of everything on which a failure may depend."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("rpcprops", "torch", "hypothesis", "pytest"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def to_data(artefact: Artefact) -> dict[str, Any]:
    """The content of an artefact's file."""
    values = {item.name: to_json(getattr(artefact, item.name)) for item in fields(artefact)}
    values["versions"] = artefact.versions or versions()
    # The sentences for a reader come first.
    return {"what": _MAGIC, "format": FORMAT, "head": values.pop("head"), **values}


def write(artefact: Artefact, directory: Path = DIRECTORY) -> Path:
    """Write `artefact` below `directory` and return its path.

    Raises:
        OSError: the directory cannot be written.
    """
    data = to_data(artefact)
    path = _path(data, directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(data, indent=1) + "\n")
    return path


def write_or_say(artefact: Artefact, directory: Path = DIRECTORY) -> Path | Unwritten:
    """As :func:`write`; if the file cannot be written, a sentence that says so instead of its path.

    This is how a run writes what it found. On a full disk or in a read-only checkout only the file
    is lost, not the report of the failure or the rest of the run.
    """
    try:
        return write(artefact, directory)
    except OSError as error:
        return Unwritten.because(error, _path(to_data(artefact), directory))


def _path(data: dict[str, Any], directory: Path) -> Path:
    """The path of an artefact: its name contains the subject and a digest of the case.

    So the same failure is always the same file.
    """
    case = [data["subject"], data["promise"], data["program"], data["plans"]]
    armed = [[one["plan"] for one in outcome["armed"]] for outcome in data["outcomes"]]
    if any(armed):
        case.append(armed)
    if data["after"]:
        case.append(data["after"])
    digest = hashlib.sha256(json.dumps(case).encode()).hexdigest()[:10]
    safe = safe_name(data["subject"], keep="end")
    return directory / f"{safe}-{digest}.json"


def read(path: Path) -> Artefact:
    """The artefact at `path`.

    Raises:
        UsageError: the file cannot be read, is damaged, is no artefact, or has a newer format.
    """
    try:
        # Not msgspec, which refuses NaN: a wrong value may be NaN.
        data = json.loads(read_regular(path, _MAX_BYTES, else_what="no artefact of ours"))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        msg = f"{path}: not JSON, so damaged or no artefact ({error}); {_WHERE}."
        raise UsageError(msg) from None
    if not isinstance(data, dict) or data.get("what") != _MAGIC:
        msg = f"{path}: no failure artefact of rpcprops (it does not say {_MAGIC!r}); {_WHERE}."
        raise UsageError(msg)
    if data.get("format") != FORMAT:
        msg = (
            f"{path}: format {_cut(repr(data.get('format')))}, and this version reads {FORMAT}; "
            f"use the rpcprops that wrote it ({_cut(_said(data))})."
        )
        raise UsageError(msg)
    try:
        return _convert(data)
    except (UsageError, msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        msg = f"{path}: damaged: {_cut(str(error))}"
        raise UsageError(msg) from None


def _cut(text: str) -> str:
    """`text`, shortened if it is too long to read: an error may quote a whole file."""
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]} …"


def _said(data: dict[str, Any]) -> str:
    said = data.get("versions")
    return str(said.get("rpcprops", "unknown")) if isinstance(said, dict) else "unknown"


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Artefact)


def _convert(data: dict[str, Any]) -> Artefact:
    given = {"world_sizes": [], "underway": False, "may_be_used": False, **data}
    given.setdefault("chosen_agent", "")
    hints = {name: hint for name, hint in _hints().items() if name != "after"}
    artefact = Artefact(
        **{name: from_json(given.get(name), hint) for name, hint in hints.items()},
        after=tuple(map(_earlier, from_json(given.get("after", []), list[dict[str, Any]]))),
    )
    if artefact.transport not in ("tcp", "shm"):
        msg = f"unknown transport {artefact.transport!r}"
        raise UsageError(msg)
    kind = kind_of(artefact.kind)
    for size in artefact.sizes:
        check_world_size(size)
    _check_sizes(artefact)
    if not 1 <= artefact.clock_rate <= MAX_CLOCK_RATE:  # NaN is neither
        msg = f"clock_rate={artefact.clock_rate!r} must lie in 1 to {MAX_CLOCK_RATE}"
        raise UsageError(msg)
    has_none = artefact.underway and not artefact.promise
    if not has_none and not kind.may_break(artefact.promise):
        msg = f"unknown promise {artefact.promise!r}"
        raise UsageError(msg)
    kind.check(artefact)
    return artefact


def _earlier(data: dict[str, Any]) -> Earlier:
    program = from_json(data.get("program"), Program)
    return Earlier(program, from_json(data.get("plan"), FaultPlan))


def _check_sizes(artefact: Artefact) -> None:
    """Raises:
    UsageError: a part is larger than any that we write, or is no text of Hypothesis's.
    """
    version, blob = artefact.reproduction or ("", "")
    names = ("subject", "promise", "rootdir", "chosen_agent")
    texts = {name: getattr(artefact, name) for name in names}
    for name, length, most in (
        *((name, len(text), _MOST_TEXT) for name, text in texts.items()),
        ("reproduction", max(len(version), len(blob)), _MOST_BLOB),
        ("plans", len(artefact.plans), _MOST_CLUSTERS),
        ("world_sizes", len(artefact.world_sizes), _MOST_CLUSTERS),
        ("after", len(artefact.after), _MOST_CLUSTERS),
    ):
        if length > most:
            msg = f"{name} has a length of {length}, and at most {most} is written"
            raise UsageError(msg)
    # pytest prints the version if it differs from the one installed.
    if not f"{version}{blob}".isprintable():
        msg = f"reproduction={artefact.reproduction!r} is no version and blob of Hypothesis's"
        raise UsageError(msg)
