"""The map of a program's points without ranks: which there are, what is kept, what fails it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops import _sweep as tables
from rpcprops import _sweep_points as sweep
from rpcprops.commands import sweep_points as command
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageFault
from rpcprops.oracle import Accepted
from rpcprops.outcomes import (
    Counters,
    Outcome,
    PhaseOutcome,
    RankOutcome,
    SentMessage,
    Violation,
)
from rpcprops.programs import Call, Drop, Program, Remote
from rpcprops.properties import Case, Observation
from rpcprops.report import artefact as artefacts

PROGRAM = Program(2, (Call(0, 1), Remote(0, 1, "a"), Drop(0, "a")), "mine", rpc_timeout=70.0)


def _message(number: int, at: int, kind: str, answer: str) -> tuple[SentMessage, SentMessage]:
    request = SentMessage(number, at, 1 - at, number, kind, is_request=True, first_id=number)
    return request, SentMessage(number + 0.5, 1 - at, at, number, answer, is_request=False)


RUN: tuple[SentMessage, ...] = (
    *_message(0, 0, "PYTHON_CALL", "PYTHON_RET"),
    *_message(1, 0, "PYTHON_REMOTE_CALL", "REMOTE_RET"),
    *_message(2, 0, "RREF_USER_DELETE", "RREF_ACK"),
    replace(_message(3, 0, "PYTHON_CALL", "PYTHON_RET")[0], marks=("spared",)),
)
#: Requests can fail, be late, be held, come twice and be lost, answers be late, held and lost; the
#: last message and its answer cannot be held until a later one has passed.
NUMBER = 3 * (5 + 3) - 2


class Torch:
    """Runs that show what `broken` says for a plan; every fault acts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: Any = lambda _: "") -> None:
        self.plans: list[FaultPlan] = []
        self.kinds: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.broken = broken
        monkeypatch.setattr(sweep, "observe", self.observe)
        monkeypatch.setattr(tables, "observe", self.observe)

    def observe(self, _: Any, case: Case, **options: Any) -> Observation:
        self.plans.append(case.plan)
        self.kinds.append(case.kind)
        self.options.append(options)
        name = self.broken(case.plan)
        messages: tuple[SentMessage, ...] = RUN
        if case.plan.others:
            messages = (replace(RUN[0], done="lose"),) * len(case.plan.others)
        found = (Violation(name, "planted"),) if name else ()
        return Observation(case, Outcome(2, clock_rate=1.0, messages=messages), found, ())


def _state(root: Path) -> tables.State:
    return tables.State(
        PROGRAM, torch_version="2.13.0", rate=1.0, transport="tcp", agent="WIRE, points", root=root
    )


def _swept(root: Path, program: Program = PROGRAM, **options: Any) -> bool:
    server = SimpleNamespace(torch_version="2.13.0", rate=1.0, clock_note="made up")
    given: dict[str, Any] = {"pairs": False, "restart": False, "json_file": root / "map.json"}
    given |= options
    runner: Any = SimpleNamespace(server=server, failed_in_use=[])
    return command.sweep_points(program, runner, transport="tcp", name="mine", **given)


def _rows(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "map.json").read_text())["points"]
    return found


def test_each_message_has_each_fault_that_it_can_have() -> None:
    """One point for each pair, in the order of the record, each about one message."""
    points = sweep.points_of(RUN)
    keys = [sweep.key_of(point.faults[0]) for point in points]
    assert keys == [(m.sender, m.receiver, m.type, n, a) for m, n, a in sweep.wanted(RUN)]
    assert len(points) == len(set(keys)) == len({point.plan for point in points}) == NUMBER
    assert not any(sent.marks for sent, _, _ in sweep.wanted(RUN))


def test_pairs_are_about_two_messages() -> None:
    """Every two points but those about one message."""
    points = sweep.points_of(RUN)
    pairs = sweep.pairs_of(points)
    alike = sum(
        sweep.key_of(a.faults[0])[:4] == sweep.key_of(b.faults[0])[:4]
        for i, a in enumerate(points)
        for b in points[i + 1 :]
    )
    assert len(pairs) == NUMBER * (NUMBER - 1) // 2 - alike


def test_a_sweep_goes_on_where_it_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second sweep runs nothing, also where the program would send in another order now."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)
    assert _swept(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{NUMBER} points to try\n")
    assert "ran: nothing is predicted" in printed
    rows = _rows(tmp_path)
    assert len(rows) == NUMBER
    said = {row["verdict"] for row in rows}
    assert said == {"holds", "ran"}
    assert len(torch.plans) == 1 + len(rows)
    torch.plans.clear()
    monkeypatch.setattr(sys.modules[__name__], "RUN", RUN[2:])
    assert _swept(tmp_path)
    assert torch.plans == []
    assert _rows(tmp_path) == rows
    assert _swept(tmp_path, restart=True)
    assert len(_rows(tmp_path)) < NUMBER


def test_the_messages_of_the_shutdown_are_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request that its rank sends while it shuts down, with its answer; the help says it too."""
    monkeypatch.chdir(tmp_path)
    call, answer = _message(4, 1, "PYTHON_CALL", "PYTHON_RET")
    # The rank that answers has not begun its own shutdown.
    leaving = (*RUN, replace(call, marks=("leaving",)), answer)
    monkeypatch.setattr(sys.modules[__name__], "RUN", leaving)
    torch = Torch(monkeypatch)
    assert _swept(tmp_path)
    marked = {(r["type"], r["sender"], r["number"]) for r in _rows(tmp_path) if r["in_shutdown"]}
    assert marked == {("PYTHON_CALL", 1, 1), ("PYTHON_RET", 0, 1)}
    printed = capsys.readouterr().out
    assert "PYTHON_CALL 1 to 0, 1 (shutdown)" in printed
    assert "PYTHON_CALL 0 to 1, 1 (shutdown)" not in printed
    assert "(shutdown): a request that a rank sends while it shuts down, or its answer" in printed
    assert torch.plans


def test_a_pair_that_fails_is_named_at_the_end_also_when_a_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair has no row in the map, so a line says which it was and what it broke."""
    monkeypatch.chdir(tmp_path)
    two = next(
        pair.plan
        for pair in sweep.pairs_of(sweep.points_of(RUN))
        if {fault.action for fault in pair.faults} == {"delay"}
    )
    torch = Torch(monkeypatch, lambda plan: "RRefLeak" if plan == two else "")
    names = " and ".join(fault.name for fault in two.others)
    for _ in range(2):
        assert not _swept(tmp_path, pairs=True)
        said = " ".join(capsys.readouterr().out.split())
        assert f"violated: {names}: RRefLeak: planted" in said
        assert f"{NUMBER} points, " in said
        pairs = len(sweep.pairs_of(sweep.points_of(RUN)))
        assert f"{NUMBER} points and {pairs} pairs of them to try" in said
    assert torch.plans.count(FaultPlan()) == 1


def _of(rows: list[dict[str, Any]], kind: str, action: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["type"], row["action"]) == (kind, action)]
    return row


def test_what_is_not_predicted_is_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An RRef that is created twice is run without a prediction, and its row has the reason."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)
    assert _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_REMOTE_CALL", "duplicate")
    assert (row["verdict"], row["predicted"]) == ("ran", False)
    assert "a fork of an RRef is new" in row["said"]
    assert row["unpredicted"].startswith("RRefContext::addForkOfOwner asserts that a fork of an")
    assert "take it out" not in row["unpredicted"]
    kinds = dict(zip(torch.plans, torch.kinds, strict=True))
    unpredicted = [plan for plan, kind in kinds.items() if kind == "unpredicted"]
    assert [plan.others[0].name for plan in unpredicted] == [row["fault"]]
    report = json.loads((tmp_path / "map.json").read_text())
    assert report["run"] == {"predicted": NUMBER - 1, "unpredicted": 1, "not_tried": 0}
    said = " ".join(capsys.readouterr().out.split())
    assert f"({NUMBER - 1} run with a prediction, 1 without): " in said
    assert "1 ran" in said
    reason = "no prediction: duplicate of PYTHON_REMOTE_CALL 0:1:1: RRefContext::addForkOfOwner"
    assert said.count("no prediction: ") == said.count(reason) == 1


def test_a_crash_without_a_prediction_fails_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its artefact has the kind that is judged without a prediction."""
    monkeypatch.chdir(tmp_path)
    name = "0:message:duplicate:PYTHON_REMOTE_CALL:to-1:nth-1"
    Torch(monkeypatch, lambda plan: "RankDied" if name in [f.name for f in plan.others] else "")
    assert not _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_REMOTE_CALL", "duplicate")
    assert row["verdict"] == "violated"
    artefact = artefacts.read(Path(row["artefact"]))
    assert (artefact.kind, artefact.promise) == ("unpredicted", "RankDied")


def test_a_wait_without_end_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shutdown that waits for a call which a rank serves for ever has a verdict of its own."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)
    hung = PhaseOutcome("shutdown", "hung", detail="worker1 does not shut down")
    busy = RankOutcome(1, "worker1", counters=Counters(server_calls=1))

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        if case.kind != "unpredicted":
            return seen
        return replace(seen, outcome=replace(seen.outcome, phases=(hung,), ranks=(busy,)))

    monkeypatch.setattr(tables, "observe", observe)
    assert _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_REMOTE_CALL", "duplicate")
    assert row["verdict"] == "waits"
    assert "worker1 does not shut down" in row["said"]
    said = " ".join(capsys.readouterr().out.split())
    assert "waits without end, and was ended: duplicate of PYTHON_REMOTE_CALL 0:1:1" in said


@pytest.mark.parametrize(("slower", "verdict"), [(True, "waits"), (False, "undecided")])
def test_a_wait_is_confirmed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slower: bool, verdict: str
) -> None:
    """What waits only under a fast clock is no wait without end; a reason is confirmed once."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)
    hung = PhaseOutcome("shutdown", "hung", detail="worker1 does not shut down")
    busy = RankOutcome(1, "worker1", counters=Counters(server_calls=1))
    clocks: list[float | None] = []

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        if case.kind != "unpredicted":
            return seen
        rate = options.get("clock")
        clocks.append(rate)
        outcome = replace(seen.outcome, clock_rate=100.0 if rate is None else rate)
        if rate is None or slower or rate == 100.0:
            outcome = replace(outcome, phases=(hung,), ranks=(busy,))
        return replace(seen, outcome=outcome)

    monkeypatch.setattr(tables, "observe", observe)
    program = replace(PROGRAM, steps=(*PROGRAM.steps, Remote(0, 1, "b"), Drop(0, "b")))
    monkeypatch.setattr(sweep, "RPC_TIMEOUT", 70.0)
    assert _swept(tmp_path, program) == slower
    row = _of(_rows(tmp_path), "PYTHON_REMOTE_CALL", "duplicate")
    assert row["verdict"] == verdict
    assert clocks[:3] == [None, 100.0, 10.0]
    if not slower:
        assert "not confirmed (not again: yes at rate 100, no at rate 10)" in row["said"]


@pytest.mark.parametrize(("again", "verdict"), [("", "ran"), ("RankDied", "undecided")])
def test_a_wait_that_depends_on_a_race_need_not_show_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again: str, verdict: str
) -> None:
    """Of a call that comes twice in a shutdown either answer is right, if nothing else is wrong."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)
    hung = PhaseOutcome("shutdown", "hung", detail="worker1 does not shut down")
    busy = RankOutcome(1, "worker1", counters=Counters(server_calls=1))
    runs: list[str] = []

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        (fault,) = case.plan.others
        if "duplicate:PYTHON_CALL" not in fault.name:
            return seen
        if case.kind != "unpredicted":
            accepted = (Accepted("no-graceful-shutdown"),)
            return replace(seen, outcome=replace(seen.outcome, messages=RUN), accepted=accepted)
        runs.append(fault.name)
        if len(runs) == 1:
            return replace(seen, outcome=replace(seen.outcome, phases=(hung,), ranks=(busy,)))
        return replace(seen, violations=(Violation(again, "gone", 1),) if again else ())

    monkeypatch.setattr(tables, "observe", observe)
    assert _swept(tmp_path) == (not again)
    row = _of(_rows(tmp_path), "PYTHON_CALL", "duplicate")
    assert (row["verdict"], row["predicted"]) == (verdict, False)
    assert len(runs) > 1
    if not again:
        assert row["said"].startswith("not in every run (no at rate ")
        assert "worker1 does not shut down" in row["said"]


def test_a_message_of_a_shutdown_is_tried_in_a_run_that_has_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is ended before its shutdown did not try it, however well it went."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        (fault,) = case.plan.others
        if case.kind == "unpredicted" or "PYTHON_CALL" not in fault.name:
            return seen
        accepted = (Accepted("no-graceful-shutdown"),)
        return replace(seen, outcome=replace(seen.outcome, messages=RUN), accepted=accepted)

    monkeypatch.setattr(tables, "observe", observe)
    assert _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_CALL", "lose")
    assert (row["verdict"], row["predicted"]) == ("ran", False)
    assert "a rank waits for ever" in row["unpredicted"]
    again = [row for row in _rows(tmp_path) if row["unpredicted"] and "CALL" in row["type"]]
    assert {row["action"] for row in again if "race of two" in row["unpredicted"]} == {"duplicate"}
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"no prediction: \d points of PYTHON_CALL \(fail 1, lose 1\): without", said)


def _overdue(plan: FaultPlan) -> tuple[SentMessage, ...]:
    """The messages of a run in which the first one was held until the hold ran out."""
    (fault,) = plan.others
    if (
        not isinstance(fault, MessageFault)
        or fault.action != "hold"
        or fault.message != RUN[0].type
    ):
        return (replace(RUN[0], done="lose"),)
    held = replace(RUN[0], done="hold", marks=("overdue",), written=8.0)
    return (held, *RUN[1:])


def test_a_hold_that_ran_out_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no failure, and its verdict is not that of a hold which another message has ended."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        return replace(seen, outcome=replace(seen.outcome, messages=_overdue(case.plan)[:1]))

    monkeypatch.setattr(tables, "observe", observe)
    assert _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_CALL", "hold")
    assert (row["verdict"], row["overdue"]) == ("overdue", True)
    assert "the other message did not pass" in row["said"]
    said = " ".join(capsys.readouterr().out.split())
    assert "1 overdue" in said
    assert "overdue: nothing could pass while the message was held" in said
    assert "documented:" not in said
    other = _of(_rows(tmp_path), "PYTHON_REMOTE_CALL", "hold")
    assert (other["verdict"], other["overdue"]) == ("holds", False)


def test_a_hold_that_ran_out_is_tried_with_what_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A message that came while the hold lasted can pass, so the second try waits for that one."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        messages = _overdue(case.plan)
        (fault,) = case.plan.others
        until = getattr(fault, "until", None)
        if until is not None and until.message == "RREF_USER_DELETE":
            messages = (replace(RUN[0], done="hold"), *RUN[1:])
        elif messages[1:]:
            # The creation is sent, and not answered; only the delete has passed.
            came = [replace(m, ended=3.0) for m in RUN if m.type == "RREF_USER_DELETE"]
            messages = (messages[0], RUN[2], *came)
        return replace(seen, outcome=replace(seen.outcome, messages=messages))

    monkeypatch.setattr(tables, "observe", observe)
    assert _swept(tmp_path)
    row = _of(_rows(tmp_path), "PYTHON_CALL", "hold")
    assert (row["verdict"], row["overdue"]) == ("holds", False)
    assert "until:0:RREF_USER_DELETE:to-1:nth-1" in row["fault"]
    # Where the sweep goes on, that point is known, though its plan is another one.
    torch.plans.clear()
    assert _swept(tmp_path)
    assert torch.plans == []
    assert _of(_rows(tmp_path), "PYTHON_CALL", "hold") == row


def test_a_hold_waits_for_what_can_pass() -> None:
    """The first message that was sent before the held one was answered; else the next one."""
    (call, answer), (other, _) = _message(0, 0, "PYTHON_CALL", "PYTHON_RET"), RUN[2:4]
    late = replace(RUN[4], seconds=0.3)
    rows = [(one, 1) for one in (call, answer, other, late)]
    assert sweep._other(call, rows) == late
    between = replace(other, seconds=0.2, sender=1, receiver=0)
    free = replace(call, ended=0.5)
    assert sweep._other(free, [(free, 1), (between, 1), (late, 1)]) == late
    assert sweep._other(call, [(call, 1), (answer, 1)]) is None


def test_a_hold_lasts_a_real_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its clock is so slow that the hold gives a busy machine time for the other message."""
    torch = Torch(monkeypatch)
    server = SimpleNamespace(torch_version="2.13.0", rate=400.0)
    runner: Any = SimpleNamespace(server=server, failed_in_use=[])
    trial = sweep.PointSweep(PROGRAM, runner, _state(tmp_path))
    points = sweep.points_of(RUN, PROGRAM)
    list(trial.try_all(points))
    for plan, options in zip(torch.plans, torch.options, strict=True):
        (fault,) = plan.others
        assert isinstance(fault, MessageFault)
        if fault.action == "hold":
            assert fault.delay / options["clock"] >= 1.0
        else:
            assert "clock" not in options


def test_what_breaks_a_promise_fails_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its row is violated, and names an artefact."""
    monkeypatch.chdir(tmp_path)

    def broken(plan: FaultPlan) -> str:
        names = [fault.name for fault in plan.others]
        return "RRefLeak" if "0:message:lose:RREF_USER_DELETE:to-1:nth-1" in names else ""

    Torch(monkeypatch, broken)
    assert not _swept(tmp_path)
    (row,) = [row for row in _rows(tmp_path) if row["verdict"] == "violated"]
    assert (row["type"], row["action"]) == ("RREF_USER_DELETE", "lose")
    assert Path(row["artefact"]).is_file()


@pytest.mark.parametrize("lacks", [0, 7, NUMBER - 1])
def test_a_point_that_was_not_tried_fails_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacks: int
) -> None:
    """A message that no point is about with some action is named, by a count of its own."""
    monkeypatch.chdir(tmp_path)
    Torch(monkeypatch)
    whole = sweep.points_of

    def fewer(messages: Sequence[SentMessage], program: Program) -> tuple[sweep.Point, ...]:
        points = whole(messages, program)
        return points[:lacks] + points[lacks + 1 :]

    monkeypatch.setattr(sweep, "points_of", fewer)
    assert not _swept(tmp_path)
    assert [n for n, row in enumerate(_rows(tmp_path)) if row["verdict"] == "not tried"] == [lacks]


@pytest.mark.parametrize("number", [0, 1, 5, 6, 40])
def test_many_points_that_were_not_tried_are_counted(number: int) -> None:
    """Up to five are named, each in a line; more are one line with their number."""
    row = {"type": "RREF_ACK", "sender": 0, "receiver": 1, "number": 2}
    rows = [{**row, "action": "lose", "verdict": "not tried"}] * number
    lines = command._not_tried([*rows, {**row, "action": "fail", "verdict": "holds"}])
    if number <= 5:
        assert lines == ["not tried: lose of RREF_ACK 0:1:2"] * number
    else:
        assert len(lines) == 1
        assert lines[0].startswith(f"not tried: {number} points (lose {number});")


def test_a_fault_that_did_not_act_is_undecided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run without the message tried nothing, so the sweep fails, and tries it again."""
    monkeypatch.chdir(tmp_path)
    torch = Torch(monkeypatch)

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        return replace(seen, outcome=replace(seen.outcome, messages=RUN))

    monkeypatch.setattr(tables, "observe", observe)
    assert not _swept(tmp_path)
    assert "undecided" in {row["verdict"] for row in _rows(tmp_path)}


@pytest.mark.parametrize(
    ("done", "verdicts"), [("lose", {"unmet"}), ("delay", {"undecided"}), ("", {"undecided"})]
)
def test_a_message_that_is_not_sent_without_another_one_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: Any, verdicts: set[str]
) -> None:
    """Of two faults only the first acted. A loss explains that; a delay, or no fault, does not."""
    torch = Torch(monkeypatch)

    def observe(runner: Any, case: Case, **options: Any) -> Observation:
        seen = torch.observe(runner, case, **options)
        only = (replace(RUN[0], done=done), *RUN[1:])
        return replace(seen, outcome=replace(seen.outcome, messages=only))

    monkeypatch.setattr(tables, "observe", observe)
    pairs = [
        pair
        for pair in sweep.pairs_of(sweep.points_of(RUN))
        if {fault.action for fault in pair.faults} <= {"delay"}
    ]
    runner: Any = SimpleNamespace(failed_in_use=[])
    trial = sweep.PointSweep(PROGRAM, runner, _state(tmp_path))
    assert {record.verdict for record, _ in trial.try_all(pairs[:3])} == verdicts


def test_a_program_that_fails_without_faults_is_misuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is no map of a program that does not hold by itself."""
    monkeypatch.chdir(tmp_path)
    Torch(monkeypatch, lambda _: "RRefLeak")
    with pytest.raises(UsageError, match="breaks a promise without any fault"):
        _swept(tmp_path)


def test_a_program_gets_a_timeout_to_notice_what_is_lost() -> None:
    """A timeout of its own stays; one that is not predicted with ours keeps none."""
    assert sweep.with_timeout(PROGRAM) == PROGRAM
    assert sweep.with_timeout(replace(PROGRAM, rpc_timeout=None)) == PROGRAM
    slow = Program(2, (Call(0, 1, seconds=60.0),))
    assert sweep.with_timeout(slow) in (slow, replace(slow, rpc_timeout=70.0))
