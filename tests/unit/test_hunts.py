"""Several hunts side by side: how soon they met each finding. No process."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpcprops._hunt import UNDER_FAULTS, Batch, Hunt
from rpcprops._hunts import Met, Quartiles, joined
from rpcprops.errors import UsageError
from rpcprops.torch_facts import FINDINGS, facts_of

MET = "early-owner-fork"


def hunt(path: Path, found: dict[str, float], torch: str = "2.13.0", agent: str = "") -> Path:
    """A hunt of ten examples, one each second, that met these findings after so many."""
    cases = [str(number) for number in range(10)]
    one = Batch(UNDER_FAULTS[0], 0, "tcp", 400.0, torch, "holds", cases, seconds=10.0, agent=agent)
    one.after = [float(number) for number in range(1, 11)]
    one.found_after = found
    one.explained = dict.fromkeys((name for name in found if name in FINDINGS), 1)
    one.failure = [name for name in found if name not in FINDINGS]
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
    for paths, said in (
        ([one, other], r"several versions of torch \(2.12.0, 2.13.0\); join those of one"),
        ([one, wire], r"several agents \(the default one, wire\)"),
        ([one, one], "named twice"),
        ([one, tmp_path / "none"], "there is no hunt in it; name files"),
    ):
        with pytest.raises(UsageError, match=said):
            joined(paths)
