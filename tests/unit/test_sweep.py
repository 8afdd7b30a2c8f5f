"""Sweeps without ranks: which plans a map has, what is kept, and which programs there are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops import _sweep as sweep
from rpcprops._json import to_json
from rpcprops.commands.sweep import _maps, _report, _summary
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Drop, Program, Remote
from rpcprops.properties import Case, Observation
from rpcprops.report import artefact as artefacts
from rpcprops.runner import FailedInUse

PROGRAM = Program(3, (Remote(0, 1, "a"), Drop(0, "a")), "mine")
RUNNER: Any = SimpleNamespace(failed_in_use=[])


def _state(root: Path, **changes: Any) -> sweep.State:
    key: dict[str, Any] = {"torch_version": "2.13.0", "rate": 400.0, "transport": "tcp"}
    return sweep.State(PROGRAM, **{**key, **changes}, root=root)


@pytest.mark.parametrize(("ranks", "count"), [("all", 76), ("each", 226), ("pairs", 226)])
def test_a_map_has_every_table_on_every_group_of_ranks(ranks: Any, count: int) -> None:
    """The empty table once, and 75 tables on all of 3 ranks, each of them, and each pair."""
    places = sweep.cells(3, ranks)
    assert len(places) == len({cell.plan for cell in places}) == count
    assert places[0].plan == FaultPlan()
    for cell in places[1:]:
        assert cell.plan.faulty_ranks(3) == (cell.ranks or (0, 1, 2))


def test_records_come_back(tmp_path: Path) -> None:
    """What was kept is known again; a line that was cut short by a kill is not, and goes."""
    places = sweep.cells(3, "all")
    state = _state(tmp_path)
    for cell, verdict in zip(places, ("holds", "violated", "undecided"), strict=False):
        state.add(sweep.Record(cell.plan, verdict, fired=3, fired_by_type={"failure X": 3}))  # type: ignore[arg-type]
    text = state.path.read_text(encoding="utf-8")
    state.path.write_text(text + '{"plan": {"def', encoding="utf-8")
    again = _state(tmp_path)
    assert again.records == state.records
    assert [again.has(cell) for cell in places[:4]] == [True, True, False, False]
    assert state.path.read_text(encoding="utf-8") == text
    assert _state(tmp_path, restart=True).records == {}
    assert not state.path.exists()


def test_a_record_that_cannot_be_written_goes_with_the_next(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """A full disk ends no sweep: it is said, and what was not written is once there is room."""
    records = [sweep.Record(cell.plan, "holds") for cell in sweep.cells(3, "all")[:4]]
    state = _state(tmp_path)
    with full_disk():
        state.add(records[0])
        state.add(records[1])
    assert str(state.unwritten) == f"could not be written: {state.path}: File too large"
    state.add(records[2])
    with full_disk():
        state.add(records[3])
    assert state.unwritten is not None
    assert list(state.records.values()) == records
    assert list(_state(tmp_path).records.values()) == records[:3]
    # A file that is in the way of the folder.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".rpcprops").touch()
    for restart in (False, True):
        blocked = _state(tmp_path / "other", restart=restart)
        blocked.add(records[0])
        assert blocked.has(sweep.cells(3, "all")[0])
        assert "could not be written" in str(blocked.unwritten)


@pytest.mark.parametrize("text", ["my notes", "my notes\n", "{}\n", ""])
def test_a_foreign_file_is_not_cut(tmp_path: Path, text: str) -> None:
    """A state file that holds something else keeps every byte; an empty one is begun."""
    path = _state(tmp_path).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if text:
        with pytest.raises(UsageError, match="--restart begins a new one"):
            _state(tmp_path)
    else:
        assert _state(tmp_path).records == {}
    assert path.read_text(encoding="utf-8") == text


def test_a_program_is_not_waited_for(tmp_path: Path) -> None:
    """A FIFO as PROGRAM or as the file of a sweep is misuse, not a hang."""
    os.mkfifo(tmp_path / "program.json")
    with pytest.raises(UsageError, match="no regular file"):
        sweep.find_program(str(tmp_path / "program.json"))
    path = _state(tmp_path).path
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UsageError, match="no regular file"):
        _state(tmp_path)


def test_each_key_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Another torch, rate or transport does not read this one's records."""
    _state(tmp_path).add(sweep.Record(FaultPlan(), "holds"))
    for change in ({"torch_version": "2.14.0"}, {"rate": 1.0}, {"transport": "shm"}):
        assert not _state(tmp_path, **change).records


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    """A file that holds something else is refused with the way out, not overwritten."""
    state = _state(tmp_path)
    state.add(sweep.Record(FaultPlan(), "holds"))
    state.path.write_text(state.path.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"line 3: no record of this sweep; --restart begins a new one \(Expecting"
    ):
        _state(tmp_path)


def _observer(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[FaultPlan, float], str]
) -> list[float]:
    """Lets each observed case break what `broken` gives for its plan and rate; the rates asked."""
    rates: list[float] = []

    def observe(_: Any, case: Case, *, clock: float = 400.0, **options: Any) -> Observation:
        rates.append(clock)
        name = broken(case.plan, clock)
        found = (Violation(name, "planted"),) if name else ()
        return Observation(case, Outcome(3, clock_rate=clock), found, ())

    monkeypatch.setattr(sweep, "observe", observe)
    return rates


def test_a_failure_counts_once_real_time_has_shown_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first of a promise is run again down to rate 1, later ones fast; each is an artefact."""
    monkeypatch.chdir(tmp_path)
    rates = _observer(monkeypatch, lambda plan, _: "RRefLeak" if plan.faulty_ranks(3) else "")
    found = list(sweep.Sweep(PROGRAM, RUNNER, _state(tmp_path)).run(sweep.cells(3, "all")[:3]))
    assert rates == [400.0, 400.0, 40.0, 1.0, 400.0, 400.0]
    assert [record.verdict for record, _ in found] == ["holds", "violated", "violated"]
    artefact = artefacts.read(Path(found[1][0].artefact))
    assert artefact.subject == "sweep-mine"
    assert artefact.program == PROGRAM
    # The next sweep has nothing left to run.
    assert not list(sweep.Sweep(PROGRAM, RUNNER, _state(tmp_path)).run(sweep.cells(3, "all")[:3]))


def test_what_real_time_does_not_show_is_undecided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failure of the fast clock alone is undecided, and run again by the next sweep."""
    _observer(monkeypatch, lambda _, rate: "RRefLeak" if rate > 1 else "")
    places = sweep.cells(3, "all")[:1]
    for _ in range(2):
        ((record, failure),) = sweep.Sweep(PROGRAM, RUNNER, _state(tmp_path)).run(places)
        assert (record.verdict, failure) == ("undecided", None)


def test_what_only_a_used_world_shows_is_undecided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fresh ranks hold; the record says after how many programs, and its artefact says which."""
    monkeypatch.chdir(tmp_path)
    runner: Any = SimpleNamespace(failed_in_use=[])
    broken, before = (Violation("RRefLeak", "planted"),), ((PROGRAM, FaultPlan()),)

    def observe(_: Any, case: Case, **options: Any) -> Observation:
        shown = Outcome(3, agent="WIRE", ran_before=1)
        failed = FailedInUse(case.program, case.plan, broken, shown, before)
        runner.failed_in_use.append(failed)
        return Observation(case, Outcome(3, agent="WIRE"), (), ())

    monkeypatch.setattr(sweep, "observe", observe)
    places = sweep.cells(3, "all")[:1]
    ((record, failure),) = sweep.Sweep(PROGRAM, runner, _state(tmp_path)).run(places)
    assert (record.verdict, failure) == ("undecided", None)
    assert "only in a world that had run 1 program before: RRefLeak: planted" in record.broken
    artefact = artefacts.read(Path(record.artefact))
    assert artefact.after == (artefacts.Earlier(PROGRAM),)
    assert artefact.outcomes[0].ran_before == 1
    assert not _state(tmp_path).has(places[0])


def test_a_map_says_which_known_finding_a_table_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a finding explains is known, not held; next to something else it is named as well."""
    monkeypatch.chdir(tmp_path)
    places = sweep.cells(3, "all")
    known, both = places[1].plan, places[2].plan

    def observe(_: Any, case: Case, *, clock: float = 400.0, **options: Any) -> Observation:
        found = (Violation("CallLeak", "planted"),) if case.plan == both else ()
        names = ("early-owner-fork",) if case.plan in (known, both) else ()
        return Observation(case, Outcome(3, clock_rate=clock), found, (), names)

    monkeypatch.setattr(sweep, "observe", observe)
    state = _state(tmp_path)
    found = [record for record, _ in sweep.Sweep(PROGRAM, RUNNER, state).run(places[:3])]
    assert [record.verdict for record in found] == ["holds", "known", "violated"]
    assert _state(tmp_path).records == state.records
    report = _report("mine", state, places[:2], "fast")
    assert (report["verdict"], report["holds"], report["known"]) == ("known", 1, 1)
    assert _report("mine", state, places[:3], "fast")["verdict"] == "violated"
    assert _summary(report) == (
        "1 of 2 held, 0 faults fired, 1 met the known finding early-owner-fork"
    )
    (table,) = _maps(state, places)
    assert table.caption == "known 1: early-owner-fork"
    text = [cell for column in table.columns for cell in column.cells]
    assert sum("known 1" in str(cell) for cell in text) == 2
    assert sum("CallLeak, known 1" in str(cell) for cell in text) == 1


def test_programs_are_found(tmp_path: Path) -> None:
    """A shipped name, a program as JSON, an artefact, and a name in a Python file all give one."""
    assert sweep.find_program("fork_user_to_user").world_size == 3
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(to_json(PROGRAM)), encoding="utf-8")
    assert sweep.find_program(str(file)) == PROGRAM
    artefact = artefacts.Artefact(
        "program", "planted", "RRefLeak", program=PROGRAM, plans=(FaultPlan(),)
    )
    assert sweep.find_program(str(artefacts.write(artefact, tmp_path))) == PROGRAM
    code = tmp_path / "mine.py"
    code.write_text(
        "from rpcprops.programs import Program\nP = Program(2)\nBAD = 3\n", encoding="utf-8"
    )
    assert sweep.find_program(f"{code}:P") == Program(2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "no shipped program 'nothing'"),
        ("nothing.json", "No such file"),
        ("nothing.py:P", "no such Python file"),
        (f"{'x' * 300}.py:P", "no such Python file"),
        ("{folder}/code.py:BAD", "BAD is 3 .type int., not a rpcprops.Program"),
        ("{folder}/code.py:NONE", "NONE is None"),
        ("{folder}/code.py:P2", "has no 'P2'; its programs are: none"),
        ("{folder}/code.py", "which program of it"),
        ("{folder}/raises.py:P", "raised ZeroDivisionError"),
        ("{folder}/text.json", "not JSON, so neither a program nor an artefact.*world_size"),
        ("{folder}/list.json", "neither a program nor an artefact; a program has .*steps"),
        ("{folder}/wrong.json", "this is no Program"),
        ("{folder}/other.json", "neither a program nor an artefact; a program has "),
        ("{folder}/what.json", "no failure artefact"),
    ],
)
def test_what_is_no_program_is_misuse(tmp_path: Path, text: str, words: str) -> None:
    """Everything else is a UsageError that names it."""
    (tmp_path / "code.py").write_text("BAD, NONE = 3, None\n", encoding="utf-8")
    (tmp_path / "raises.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "text.json").write_text("no json", encoding="utf-8")
    (tmp_path / "wrong.json").write_text('{"steps": [{"op": "sing"}]}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    (tmp_path / "what.json").write_text('{"what": 1}', encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        sweep.find_program(text.format(folder=tmp_path))
