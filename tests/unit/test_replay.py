"""Replays without ranks: which faults are left out, what is counted, and what is answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rpcprops import _replay as replay
from rpcprops import _users_test
from rpcprops._kinds import kind_of
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Drop, Fetch, Program, Remote
from rpcprops.properties import Case, Observation, _base
from rpcprops.report.artefact import Artefact

PLAN = FaultPlan(
    FaultTable(["RREF_USER_DELETE"], 2),
    {1: FaultTable(["RREF_CHILD_ACCEPT", "RREF_USER_DELETE"], 1, {"PYTHON_CALL": 0.5})},
)
PROGRAM = Program(3, (Remote(0, 1, "a"), Drop(0, "a")))
ARTEFACT = Artefact("program", "planted", "RRefLeak", program=PROGRAM, plans=(PLAN,))


def test_faults_have_names() -> None:
    """Each rank's faults are named by rank and type, delays apart, in the order of the ranks."""
    assert PLAN.fault_names(3) == (
        "0:RREF_USER_DELETE",
        "1:RREF_CHILD_ACCEPT",
        "1:RREF_USER_DELETE",
        "1:delay:PYTHON_CALL",
        "2:RREF_USER_DELETE",
    )
    assert FaultPlan(FaultTable(["RREF_USER_DELETE"], 0)).fault_names(2) == ()


@pytest.mark.parametrize("name", PLAN.fault_names(3))
def test_a_fault_is_left_out_by_its_name(name: str) -> None:
    """The plan without a fault has all the others, and not that one."""
    rest = PLAN.without([name], 3)
    assert rest.fault_names(3) == tuple(n for n in PLAN.fault_names(3) if n != name)


def test_nothing_left_out_is_the_plan_itself() -> None:
    """A plan without no fault is equal to the plan; without all, no rank is faulty."""
    assert PLAN.without([], 3) == PLAN
    assert PLAN.without(PLAN.fault_names(3), 3).faulty_ranks(3) == ()


def test_a_wrong_name_lists_the_right_ones() -> None:
    """A fault that the artefact has not is misuse, and the message lists those that it has."""
    with pytest.raises(UsageError, match=r"no fault '1:PYTHON_CALL'; it has: 0:RREF_USER_DELETE, "):
        replay.check_faults(ARTEFACT, ["1:PYTHON_CALL"])
    bare = Artefact("program", "planted", "RRefLeak", program=PROGRAM, plans=(FaultPlan(),))
    with pytest.raises(UsageError, match="it has: none"):
        replay.check_faults(bare, ["1:PYTHON_CALL"])


def _observer(monkeypatch: pytest.MonkeyPatch, broken: Any) -> list[Case]:
    """Lets each observed case break the promises that `broken` gives for its plan."""
    cases: list[Case] = []

    def observe(_: Any, case: Case, **options: Any) -> Observation:
        cases.append(case)
        names = broken(case.plan, len(cases))
        outcome = Outcome(3, clock_rate=400.0)
        return Observation(case, outcome, tuple(Violation(n, "planted") for n in names), ())

    monkeypatch.setattr(_base, "observe", observe)
    return cases


@pytest.mark.parametrize(
    ("broken", "answer", "text"),
    [
        (["RRefLeak"] * 3, "reproduced", "reproduced: RRefLeak in 3 of 3 runs at rate 400"),
        (["", "RRefLeak", ""], "reproduced", "reproduced: RRefLeak in 1 of 3 runs at rate 400"),
        (
            ["", "RankDied", "RankHung"],
            "changed",
            "changed: RRefLeak in 0 of 3 runs at rate 400; RankDied instead in 1; "
            "RankHung instead in 1",
        ),
        ([""] * 3, "fixed", "fixed: RRefLeak in 0 of 3 runs at rate 400"),
    ],
)
def test_answers(
    monkeypatch: pytest.MonkeyPatch, broken: list[str], answer: str, text: str
) -> None:
    """The same promise is reproduced, only others changed, none fixed; with how often."""
    _observer(monkeypatch, lambda _, n: [broken[n - 1]] if broken[n - 1] else [])
    result = replay.replay_program(ARTEFACT, None, times=3)  # type: ignore[arg-type]
    assert result.answer == answer
    assert str(result) == text


def test_an_example_that_was_under_way_fails_or_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was only under way broke no promise yet: it fails with whatever it breaks, or holds."""
    in_flight = Artefact("program", "planted", "", program=PROGRAM, plans=(PLAN,), underway=True)
    _observer(monkeypatch, lambda _, n: ["RankDied"] if n == 1 else [])
    result = replay.replay_program(in_flight, None, times=2)  # type: ignore[arg-type]
    assert str(result) == "fails: RankDied in 1 of 2 runs at rate 400"
    again = replay.replay_program(in_flight, None, times=1)  # type: ignore[arg-type]
    assert str(again) == "holds: no failure of 1 runs at rate 400"


def test_a_fault_without_which_nobody_can_judge_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the delay of a creation with a timeout, whether it times out cannot be told."""
    program = Program(2, (Remote(0, 1, "a", timeout=0.5), Fetch(0, "a")))
    plan = FaultPlan(by_rank={0: FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0})})
    artefact = Artefact("program", "planted", "RRefLeak", program=program, plans=(plan,))

    def observe(_: Any, case: Case, **options: Any) -> Observation:
        predict(case.program, case.plan)
        raise AssertionError(case)

    monkeypatch.setattr(_base, "observe", observe)

    def run(names: Sequence[str]) -> replay.Replay:
        return replay.replay_program(artefact, None, times=2, without=names)  # type: ignore[arg-type]

    (need,) = replay.needed(artefact, run)
    assert need.is_needed
    assert str(need) == (
        "0:delay:PYTHON_REMOTE_CALL: needed (nobody can tell what is right without it)"
    )


def test_which_faults_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is left out in turn, then those that were not needed all at once."""
    cases = _observer(
        monkeypatch, lambda plan, _: ["RRefLeak"] if plan.table(1).delaying else ["RankDied"]
    )

    def run(names: Sequence[str]) -> replay.Replay:
        return replay.replay_program(ARTEFACT, None, times=2, without=names)  # type: ignore[arg-type]

    found = replay.needed(ARTEFACT, run, without=["2:RREF_USER_DELETE"])
    assert [need.name for need in found if need.is_needed] == ["1:delay:PYTHON_CALL"]
    assert found[-1].name == "0:RREF_USER_DELETE and 1:RREF_CHILD_ACCEPT and 1:RREF_USER_DELETE"
    assert (found[-1].failed, found[-1].times) == (2, 2)
    assert str(found[3]) == "1:delay:PYTHON_CALL: needed (fails in 0 of 2 without it)"
    assert all("2:RREF_USER_DELETE" not in case.plan.fault_names(3) for case in cases)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a project with settings of pytest's and a test below it."""
    folder = tmp_path / "checkout"
    (folder / "tests").mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "tests" / "test_it.py").touch()
    monkeypatch.chdir(folder)
    return folder


def _of_a_test(folder: Path, rootdir: object, file: str = "tests/test_it.py") -> Any:
    """The path and the artefact of a test, in the failures of a folder."""
    path = folder / ".rpcprops" / "failures" / "x.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, Artefact("pytest", f"{file}::test_x", "RRefLeak", rootdir=str(rootdir))


def _project(folder: Path) -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_it.py").touch()
    return folder


def test_a_test_is_replayed_in_the_checkout_wherever_its_artefact_lies(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written here or elsewhere, downloaded to the failures or anywhere, from any subfolder."""
    for rootdir in (checkout, "/builds/project", "", "a\0b"):
        path, artefact = _of_a_test(checkout, rootdir)
        for where in (path, tmp_path / "x.json", checkout / "x.json"):
            for here in (checkout, checkout / "tests"):
                monkeypatch.chdir(here)
                assert _users_test.root_of(where, artefact) == checkout
        assert _users_test.ran_in(artefact, checkout) == (rootdir == checkout)


@pytest.mark.parametrize("name", ["pyproject.toml", "tox.ini", "setup.cfg", "setup.py"])
def test_the_root_is_the_one_that_pytest_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The nearest folder with settings of pytest's; a pyproject.toml without them comes after."""
    text = {"pyproject.toml": "[tool.pytest.ini_options]", "tox.ini": "[pytest]"}
    top = _project(tmp_path / "top")
    (top / name).write_text(text.get(name, "[tool:pytest]" if name == "setup.cfg" else ""))
    inner = top / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").write_text("[tool.ruff]")
    for here, root in ((top / "tests", top), (inner, inner if name == "setup.py" else top)):
        monkeypatch.chdir(here)
        (here / "test_own.py").touch()
        file = str((here / "test_own.py").relative_to(root))
        assert _users_test.root_of(*_of_a_test(tmp_path / "elsewhere", "", file)) == root


def test_a_test_is_never_replayed_in_a_folder_elsewhere(checkout: Path, tmp_path: Path) -> None:
    """Neither in the folder that the artefact names, nor in that where it lies."""
    elsewhere = _project(tmp_path / "elsewhere")
    path, artefact = _of_a_test(elsewhere, elsewhere)
    assert _users_test.root_of(path, artefact) == checkout
    (checkout / "tests" / "test_it.py").unlink()
    with pytest.raises(UsageError) as caught:
        _users_test.root_of(path, artefact)
    assert f"no test file 'tests/test_it.py' in {str(checkout)!r}." in str(caught.value)
    assert f"The test ran in {str(elsewhere)!r}" in str(caught.value)


def test_a_project_inside_of_another_is_told_by_its_failures(checkout: Path) -> None:
    """Below the working directory: where the artefact says so, or where only it has the file."""
    inner = _project(checkout / "inner")
    assert _users_test.root_of(*_of_a_test(inner, inner)) == inner
    assert _users_test.root_of(*_of_a_test(inner, "/builds/project")) == checkout
    (inner / "test_own.py").touch()
    assert _users_test.root_of(*_of_a_test(inner, "/builds/project", "test_own.py")) == inner


@pytest.mark.parametrize("kind", ["folder", "none"])
def test_what_is_no_file_is_no_test(checkout: Path, kind: str) -> None:
    """pytest would collect a whole folder of that name."""
    if kind == "folder":
        (checkout / "dir.py").mkdir()
    with pytest.raises(UsageError, match=r"no test file 'dir\.py'"):
        _users_test.root_of(*_of_a_test(checkout, checkout, "dir.py"))


def _repeating(*repeats: str) -> Artefact:
    return Artefact("pytest", "test_x.py::test_x", "AssertionError", repeats=repeats)


@pytest.mark.parametrize(
    ("repeats", "times"),
    [
        (("3 of 3 at rate 400", "1 of 1 at rate 1"), 3),
        (("1 of 3 at rate 400", "1 of 1 at rate 1"), 8),
        (("0 of 3 at rate 400",), 17),
        (("0 of 3 at rate 50", "1 of 1 at rate 1"), 3),  # in real time
        ((), 3),
    ],
)
def test_what_is_rare_is_replayed_more_often(repeats: tuple[str, ...], times: int) -> None:
    """So often that one replay of twenty misses it, if it shows as often as before."""
    assert kind_of("pytest").usual_times(_repeating(*repeats)) == times


def test_what_is_rare_is_not_called_fixed() -> None:
    """A failure that a few runs do not show is fixed only if it showed each time before."""
    rare = _repeating("1 of 3 at rate 400", "shrunk for 60 s in real time", "1 of 1 at rate 1")
    told = kind_of("pytest").told(replay.Replay(rare, ((), ()), 400.0))
    assert told.splitlines() == [
        "not seen: AssertionError in 0 of 2 runs at rate 400 (test_x.py::test_x)",
        "it failed in 1 of 3 runs at rate 400 and 1 of 1 runs at rate 1 when it was found; "
        "--times 50 tells more",
    ]
    sure = _repeating("3 of 3 at rate 400", "1 of 1 at rate 1")
    assert kind_of("pytest").told(replay.Replay(sure, ((),), 400.0)).startswith("fixed: ")
