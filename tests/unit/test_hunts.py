"""Several hunts side by side: how soon they met each finding. No process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rpcprops._hunt import UNDER_FAULTS, Batch, Hunt
from rpcprops._hunts import Met, Quartiles, joined
from rpcprops.errors import UsageError
from rpcprops.torch_facts import FINDINGS, facts_of

MET = "early-owner-fork"


def hunt(
    path: Path,
    found: dict[str, float],
    torch: str = "2.13.0",
    agent: str = "",
    *,
    known: bool = False,
) -> Path:
    """A hunt of ten examples, one each second, that met these findings after so many."""
    cases = [str(number) for number in range(10)]
    one = Batch(UNDER_FAULTS[0], 0, "tcp", 400.0, torch, "holds", cases, seconds=10.0, agent=agent)
    one.after = [float(number) for number in range(1, 11)]
    one.found_after = found
    one.explained = dict.fromkeys((name for name in found if name in FINDINGS), 1)
    one.failure = [name for name in found if name not in FINDINGS]
    one.known = known
    Hunt(path).append(one)
    return path


def test_a_finding_has_its_median_and_quartiles(tmp_path: Path) -> None:
    """Over all hunts, where one that did not meet it counts as longer than all that did."""
    paths = [hunt(tmp_path / str(n), {MET: float(n)}) for n in (1, 2, 3, 4)]
    paths.append(hunt(tmp_path / "none", {}))
    rows = joined(paths).findings
    four = Quartiles(2, 3, 4)
    assert rows[0] == Met(MET, True, 4, four, four)
    assert [str(one) for one in (four, Quartiles(2, 3, None), Quartiles(None, None, None))] == [
        "3 (2 to 4)",
        "3 (2 to later)",
        "later",
    ]
    only = {one.name: one for one in joined([paths[1], *paths[4:]]).findings}[MET]
    assert only == Met(MET, True, 1, Quartiles(None, None, None), Quartiles(None, None, None))


def test_what_no_hunt_met_is_listed_last(tmp_path: Path) -> None:
    """Each known finding of that torch has a row, and what was new has one too."""
    path = hunt(tmp_path / "one", {MET: 2.5, "WrongValue": 4.0})
    data = joined([path])
    names = [one.name for one in data.findings]
    assert names[:2] == [MET, "WrongValue"]
    has_bug = facts_of("2.13.0").has_bug
    assert set(names) == {"WrongValue", *filter(has_bug, FINDINGS)}
    assert [one.met for one in data.findings] == [1, 1] + [0] * (len(names) - 2)
    assert data.findings[0].examples.median == 2
    assert data.as_json()["findings"][1]["known"] is False
    assert data.title == "1 hunt of torch 2.13.0, 10 examples in 10 s each"


def test_hunts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Each error names what differs, and what to do."""
    one = hunt(tmp_path / "one", {})
    other = hunt(tmp_path / "other", {}, torch="2.12.0")
    wire = hunt(tmp_path / "wire", {}, agent="wire")
    known = hunt(tmp_path / "known", {}, known=True)
    empty = tmp_path / "empty"
    empty.touch()
    for paths, said in (
        ([one, other], r"several versions of torch \(2.12.0, 2.13.0\); give files of one"),
        ([one, wire], r"several agents \(the default one, wire\)"),
        ([one, one], "named twice"),
        ([one, known], "some hunts were drawn with --known and some without"),
        ([one, empty], "there is no hunt in it; name files"),
        ([one, tmp_path / "none"], "none: there is no such file; name files"),
    ):
        with pytest.raises(UsageError, match=said):
            joined(paths)


def test_how_the_programs_were_drawn_is_said(tmp_path: Path) -> None:
    """A table of hunts that drew what is known says so, and so do its data."""
    plain, known = (joined([hunt(tmp_path / str(x), {MET: 1.0}, known=x)]) for x in (False, True))
    assert "avoid some findings" in plain.notes[1]
    assert known.notes[1] == "drawn with --known: as for a torch without any known finding"
    assert [data.as_json()["draws_known"] for data in (plain, known)] == [False, True]


def test_a_finding_that_is_not_drawn_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason stands below the table and in its data, and nothing of the kind for others."""
    reason = "a message must be held for it"
    data = joined([hunt(tmp_path / "one", {}, known=True)])
    assert not any(f"{MET} is not drawn" in note for note in data.notes)
    changed = {**FINDINGS, MET: replace(FINDINGS[MET], not_drawn=reason)}
    monkeypatch.setattr("rpcprops._hunts.FINDINGS", changed)
    assert f"{MET} is not drawn: {reason}" in data.notes
    assert {x["name"]: x["not_drawn"] for x in data.as_json()["findings"]}[MET] == reason
