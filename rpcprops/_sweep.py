"""Runs a program under every retryable table, and records what each showed: the program's map.

The results are kept in a file of JSON lines, one for each plan, so that an interrupted sweep can go
on. The file belongs to one program on one torch version, at one rate and over one transport. Which
ranks are faulty may differ from sweep to sweep.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from rpcprops._files import GrowingFile, Unwritten, read_regular, safe_name
from rpcprops._json import from_json, to_json
from rpcprops._kinds import kind_of
from rpcprops.confirmation import Sight, confirm
from rpcprops.errors import UsageError, text_of
from rpcprops.faults import FaultPlan, FaultTable, retryable_tables
from rpcprops.oracle import fired, fired_by_type
from rpcprops.outcomes import SentMessage, Violation
from rpcprops.programs import Program
from rpcprops.properties import (
    Case,
    Failure,
    Observation,
    Repeats,
    failure_in_use,
    observe,
    shipped_programs,
)
from rpcprops.report import artefact as artefacts
from rpcprops.report.text import artefact_of
from rpcprops.runner import FailedInUse, Runner

Ranks = Literal["all", "each", "pairs"]
#: The verdict of a table: "known" is a violation that a known finding of stock torch explains.
TableVerdict = Literal["holds", "known", "violated", "undecided"]
#: The verdict of a point can be another one, too:
#:
#: * "documented": what it shows is accepted.
#: * "overdue": all is as predicted, but no other message has passed the one that was held.
#: * "unmet": without one of two messages, the other one is not sent.
#: * "ran": it was run without a prediction, and breaks no promise that needs none.
#: * "waits": the same, but a rank waited for what torch gives no timeout, and was ended.
Verdict = Literal[TableVerdict, "documented", "overdue", "unmet", "ran", "waits"]

#: The folder for the files of sweeps, below the working directory.
DIRECTORY = Path(".rpcprops") / "sweeps"
_MAGIC = "rpcprops sweep"
_FORMAT = 2
#: The key of the line that holds the messages of the run without faults.
_MESSAGES = "messages"


class Place(Protocol):
    """One place of a map: it has a plan."""

    @property
    def plan(self) -> FaultPlan: ...


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the map: a table, and the ranks that have it (none: every rank)."""

    table: FaultTable
    ranks: tuple[int, ...] = ()

    @property
    def plan(self) -> FaultPlan:
        """The plan of this cell."""
        if not self.ranks:
            return FaultPlan(self.table)
        return FaultPlan(by_rank=dict.fromkeys(self.ranks, self.table))


@dataclass(frozen=True, slots=True)
class Record:
    """What one plan showed.

    Attributes:
        broken: the first broken promise, in a sentence.
        fired: how many injected faults fired.
        seconds: real seconds.
        artefact: where its failure was written.
        findings: known findings that explain some of its violations, or all of them.
        accepted: the kinds of documented effects that it showed.
        used: whether its ranks had run other programs before.
        predicted: whether it was compared with a prediction.
        overdue: how many messages were held for as long as the fault allows.
        unpredicted: why it was not compared with a prediction; empty if it was.
    """

    plan: FaultPlan
    verdict: Verdict
    promise: str = ""
    broken: str = ""
    fired: int = 0
    fired_by_type: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    artefact: str = ""
    findings: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    used: bool = False
    predicted: bool = True
    overdue: int = 0
    unpredicted: str = ""


def first_of(violations: Sequence[Violation]) -> tuple[str, str]:
    """The promise of the first violation, and the violation in a sentence; empty if none is."""
    return (violations[0].promise, str(violations[0])) if violations else ("", "")


def find_program(text: str) -> Program:
    """The program that a command line names: a shipped one, a JSON file, or ``path.py:NAME``.

    A Python file is executed; a JSON file is only read.

    Raises:
        UsageError: it names no program.
    """
    shipped = shipped_programs()
    if text in shipped:
        return shipped[text]
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_python(Path(file), name)
    if text.endswith(".json"):
        return _from_json(Path(text))
    if text.endswith(".py") and os.path.isfile(text):
        msg = f"{text}: which program of it? Write {text}:NAME."
        raise UsageError(msg)
    close = difflib.get_close_matches(text, shipped, 1)
    hint = f"did you mean {close[0]}?" if close else "--list names them"
    msg = (
        f"there is no shipped program {text!r} ({hint}), and it is neither a JSON file nor "
        "path/to/file.py:NAME."
    )
    raise UsageError(msg)


def _from_python(path: Path, name: str) -> Program:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    # os.path, unlike Path, says that a file with too long a name does not exist.
    if not os.path.isfile(path) or spec is None or spec.loader is None:
        msg = f"{path}: no such Python file."
        raise UsageError(msg)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        # This runs code of the module: it may have a __getattr__, and its objects a __repr__.
        found = getattr(module, name, None)
        if isinstance(found, Program):
            return found
        is_there = found is not None or name in vars(module)
        shown = f"{found!r} (type {type(found).__name__})"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        msg = f"{path}: it raised {type(error).__name__}: {text_of(error)}"
        raise UsageError(msg) from error
    msg = f"{path}: {name} is {shown}, not a rpcprops.Program."
    if not is_there:
        programs = [key for key, one in vars(module).items() if isinstance(one, Program)]
        msg = f"{path}: it has no {name!r}; its programs are: {', '.join(programs) or 'none'}."
    raise UsageError(msg)


#: What a JSON file may be.
_FORMS = (
    'a program has "world_size" and "steps" (docs/programs.md), and artefacts are in '
    ".rpcprops/failures/"
)


def _from_json(path: Path) -> Program:
    try:
        data = json.loads(read_regular(path, else_what="no program of ours"))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        msg = f"{path}: not JSON, so neither a program nor an artefact ({error}); {_FORMS}."
        raise UsageError(msg) from None
    if not isinstance(data, dict) or not {"steps", "what"} & set(data):
        msg = f"{path}: neither a program nor an artefact; {_FORMS}."
        raise UsageError(msg)
    if "steps" in data:
        try:
            return from_json(data, Program)
        except UsageError as error:
            msg = f"{path}: {error}"
            raise UsageError(msg) from None
    program = artefacts.read(path).program
    if program is None:
        msg = (
            f"{path}: an artefact of a test, which holds no program; name one of check, hunt, "
            f"sweep or a state machine, or a shipped program (--list)."
        )
        raise UsageError(msg)
    return program


def cells(world_size: int, ranks: Ranks) -> tuple[Cell, ...]:
    """The cells of a map: every table on all ranks, on each rank alone, or on each pair."""
    empty, *tables = retryable_tables()
    groups: list[tuple[int, ...]] = [()]
    if ranks == "each":
        groups = [(rank,) for rank in range(world_size)]
    elif ranks == "pairs":
        groups = list(itertools.combinations(range(world_size), 2))
        if not groups:
            msg = f"--ranks pairs: a program on {world_size} rank has no pairs; use all or each."
            raise UsageError(msg)
    return (Cell(empty), *(Cell(table, group) for group in groups for table in tables))


class State:
    """The records of a program so far, in a file.

    Args:
        restart: ignore what the file holds.

    Attributes:
        torch_version: the torch that the records are of.
        path: the file; it is made when the first record is added.
        messages: those of the run without faults, if its points are swept and it was kept.
        unwritten: why the file lacks the last records, if they could not be written.
    """

    def __init__(
        self,
        program: Program,
        *,
        torch_version: str,
        rate: float,
        transport: str,
        agent: str = "",
        root: Path,
        restart: bool = False,
    ) -> None:
        head = {
            "what": _MAGIC,
            "format": _FORMAT,
            "program": to_json(program),
            "torch": torch_version,
            "rate": rate,
            "transport": transport,
            **({"agent": agent} if agent else {}),
        }
        first = json.dumps(head).encode()
        digest = hashlib.sha256(first).hexdigest()[:10]
        name = safe_name(program.name, keep="start") or "program"
        self.torch_version = torch_version
        self.path = root / DIRECTORY / f"{name}-{digest}.jsonl"
        self._file = GrowingFile(
            self.path, "record of this sweep", first, "--restart begins a new one", identifies=True
        )
        self.records: dict[FaultPlan, Record] = {}
        self.messages: tuple[SentMessage, ...] = ()
        if restart:
            self._file.begin_anew()
            return
        for line in self._file.read(_line):
            if isinstance(line, Record):
                self.records[line.plan] = line
            else:
                self.messages = line
        if self.records or self.messages:
            # Remove the incomplete line of a run that was killed.
            self._file.append()

    @property
    def unwritten(self) -> Unwritten | None:
        """Why the file lacks the last records, if they could not be written."""
        return self._file.unwritten

    def keep(self, messages: tuple[SentMessage, ...]) -> None:
        """Keep the messages of the run without faults, whose order may differ between two runs."""
        self.messages = messages
        self._file.append(json.dumps({_MESSAGES: to_json(messages)}).encode())

    def add(self, record: Record) -> None:
        """Keep a record, and append it to the file; with the next one if that fails now."""
        self.records[record.plan] = record
        self._file.append(json.dumps(to_json(record)).encode())

    def has(self, cell: Place) -> bool:
        """Whether a place has a result; an undecided one does not count."""
        record = self.records.get(cell.plan)
        return record is not None and record.verdict != "undecided"


def _line(line: bytes) -> Record | tuple[SentMessage, ...]:
    data = json.loads(line)
    if isinstance(data, dict) and set(data) == {_MESSAGES}:
        return from_json(data[_MESSAGES], tuple[SentMessage, ...])
    return from_json(data, Record)


class Sweep:
    """Runs a program under the plans of a map that have no result yet.

    Args:
        options: `transport`, as for :func:`rpcprops.run`.
    """

    def __init__(self, program: Program, runner: Runner, state: State, **options: Any) -> None:
        self.program = program
        self.runner = runner
        self.state = state
        #: Violations that a known finding explains do not fail a sweep, but are named.
        self.options = {"with_findings": False, **options}
        self._confirmed = {r.promise for r in state.records.values() if r.verdict == "violated"}

    def run(self, places: tuple[Cell, ...]) -> Iterator[tuple[Record, Failure | None]]:
        """Run the cells without a result; yields each record once it is kept, with its failure."""
        for cell in places:
            if self.state.has(cell):
                continue
            began = time.monotonic()
            seen, in_use = self._observe(Case(self.program, cell.plan))
            verdict, repeats = self._verdict(seen)
            failure = self._failure(seen, repeats) if verdict == "violated" else None
            promise, broken = first_of(seen.violations)
            if failure is None and in_use is not None:
                promise, _ = first_of(in_use.violations)
                verdict, broken = "undecided", str(in_use)
            record = Record(
                plan=cell.plan,
                verdict=verdict,
                promise=promise,
                broken=broken,
                fired=fired(seen.faults),
                fired_by_type=fired_by_type(seen.faults),
                seconds=round(time.monotonic() - began, 3),
                artefact=self._written(failure, in_use),
                findings=seen.explained_by,
                accepted=tuple(dict.fromkeys(one.kind for one in seen.accepted)),
                used=seen.outcome.ran_before > 0,
            )
            self.state.add(record)
            yield record, failure

    def _observe(self, case: Case, **options: Any) -> tuple[Observation, FailedInUse | None]:
        """Run a case; and what then failed in a used world only."""
        before = len(self.runner.failed_in_use)
        seen = observe(self.runner, case, anew=True, **self.options, **options)
        return seen, next(iter(self.runner.failed_in_use[before:]), None)

    def _written(self, failure: Failure | None, in_use: FailedInUse | None) -> str:
        """Where a failure was written; empty if there is none."""
        if failure is None and in_use is not None:
            failure = failure_in_use(self._name, in_use)
        return "" if failure is None else str(artefacts.write_or_say(artefact_of(failure)))

    def _verdict(self, seen: Observation) -> tuple[Verdict, list[Repeats]]:
        """The verdict; a failure must be seen again: in real time for a new promise, else fast."""
        if not seen.violations:
            return "known" if seen.explained_by else "holds", []
        first, rate = seen.violations[0], seen.outcome.clock_rate

        def run(at: float) -> Sight:
            options = {**self.options, "clock": at, "reuse": False}
            again = observe(self.runner, seen.case, anew=True, **options)
            same = [v for v in again.violations if v.promise == first.promise]
            return Sight.of(again.outcome, same)

        rates: tuple[float, ...] | None = (rate,) if first.promise in self._confirmed else None
        if not kind_of(seen.case.kind).is_predicted:
            # It waits for timeouts of the whole program, which take minutes in real time.
            rates = (rate, max(1.0, rate / 10))
        said = confirm(rate, Sight.of(seen.outcome, [first]), run, rates=rates)
        repeats = [Repeats(at, int(shows), 1) for at, shows in said.runs]
        if not said.is_confirmed:
            return "undecided", repeats
        self._confirmed.add(first.promise)
        return "violated", repeats

    @property
    def _name(self) -> str:
        return f"sweep-{self.program.name or 'program'}"

    def _failure(self, seen: Observation, repeats: list[Repeats]) -> Failure:
        return Failure(
            property=self._name,
            promise=seen.violations[0].promise,
            case=seen.case,
            violations=seen.violations,
            outcome=seen.outcome,
            faults=seen.faults,
            repeats=tuple(repeats),
        )
