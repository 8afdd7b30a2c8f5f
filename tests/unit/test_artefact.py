"""Failure artefacts: what is written is read back, and no file can do harm or cause a traceback."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops.outcomes import Counters, Outcome, PhaseOutcome, RankOutcome, StepOutcome, Violation
from rpcprops.programs import Drop, Fetch, Program, Remote
from rpcprops.report.artefact import (
    FORMAT,
    Artefact,
    Earlier,
    read,
    versions,
    write,
    write_or_say,
)
from rpcprops.report.text import replay_line

PROGRAM = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")), "small")
PLAN = FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 3, {"PYTHON_CALL": 1.5})})
OUTCOME = Outcome(
    2,
    clock_rate=100.0,
    torch_version="2.13.0",
    phases=(PhaseOutcome("start"), PhaseOutcome("settle", "failed", detail="no")),
    ranks=(
        RankOutcome(0, "worker0", calls={"step0": 1}, delayed_sends={1500: 1}),
        RankOutcome(1, "worker1", counters=Counters(owners=1, forks=1), log="two\nlines"),
    ),
    steps=(StepOutcome(0), StepOutcome(1, [3.0])),
)
OF_A_PROGRAM = Artefact(
    kind="program",
    subject="rref-lifetime",
    promise="RRefLeak",
    head=("broken   RRefLeak: worker1 holds 1 owner",),
    program=PROGRAM,
    plans=(PLAN,),
    outcomes=(OUTCOME,),
    violations=(Violation("RRefLeak", "worker1 holds 1 owner", 1, timing_sensitive=True),),
    clock_rate=100.0,
    repeats=("3 of 3 at rate 100",),
    versions={"rpcprops": "0.1.0", "torch": "2.13.0"},
)
OF_MESSAGES = FaultPlan(
    others=(
        MessageFault(
            0, "hold", "RREF_USER_DELETE", delay=9, until=NthMessage(1, "RREF_CHILD_ACCEPT")
        ),
        MessageFault(1, "lose", way="response"),
    )
)
OF_A_TEST = Artefact(
    kind="pytest",
    subject="tests/test_mine.py::test_it[a/b-1]",
    promise="AssertionError",
    plans=(PLAN, OF_MESSAGES, FaultPlan()),
    outcomes=(OUTCOME,),
    reproduction=("6.170.0", "AXicY2BkAAMAAB4ABA=="),
    rootdir="where/it/ran",
    versions={"hypothesis": "6.170.0"},
    chosen_agent="WIRE",
)


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def changed(tmp_path: Path, **values: Any) -> Path:
    """A file of a good artefact with some of its values changed; ``...`` takes a value out."""
    data = json.loads(write(OF_A_PROGRAM, tmp_path / "good").read_bytes())
    data |= values
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    return path


OF_A_USED_WORLD = dataclasses.replace(
    OF_A_PROGRAM,
    outcomes=(dataclasses.replace(OUTCOME, agent="WIRE", ran_before=2),),
    after=(Earlier(Program(2, (Remote(0, 1, "z"),)), PLAN), Earlier(PROGRAM)),
)


def test_what_a_used_world_ran_before_is_in_the_file(tmp_path: Path) -> None:
    """It is read back, gives the file a name of its own, and only a program may have it."""
    written = write(OF_A_USED_WORLD, tmp_path)
    assert read(written).after == OF_A_USED_WORLD.after
    assert read(written).outcomes[0].ran_before == 2
    assert written != write(OF_A_PROGRAM, tmp_path)
    after = json.loads(written.read_text())["after"]
    assert "only a program runs after others" in refusal(
        changed(tmp_path, after=after, kind="reinit", promise="RRefLeak")
    )
    assert "this is no Program" in refusal(changed(tmp_path, after=[{"plan": {}}]))


@pytest.mark.parametrize("artefact", [OF_A_PROGRAM, OF_A_TEST], ids=lambda a: a.kind)
def test_what_is_written_is_read_back(artefact: Artefact, tmp_path: Path) -> None:
    """Every part of an artefact survives the file."""
    assert read(write(artefact, tmp_path)) == artefact


def test_a_case_of_reinitialised_ranks_is_read_back(tmp_path: Path) -> None:
    """The third kind of artefact keeps its kind."""
    artefact = dataclasses.replace(OF_A_PROGRAM, kind="reinit")
    assert read(write(artefact, tmp_path)).kind == "reinit"


def test_values_that_are_no_numbers_are_read_back(tmp_path: Path) -> None:
    """A failure whose wrong value is NaN or infinite can be replayed like any other."""
    steps = (StepOutcome(0, {"loss": math.nan, "gradient": [math.inf, -math.inf]}),)
    outcome = dataclasses.replace(OUTCOME, steps=steps)
    artefact = dataclasses.replace(OF_A_PROGRAM, outcomes=(outcome,))
    value = read(write(artefact, tmp_path)).outcomes[0].steps[0].value
    assert math.isnan(value["loss"])
    assert value["gradient"] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    "text", ["\ud800 \udcff", "\x00\x1b[0m\x7f", "\u2028 'a' \"b\" \\", "é 漢 😀"]
)
def test_any_text_is_read_back(text: str, tmp_path: Path) -> None:
    """Whatever a rank wrote or a path holds, surrogates and control characters too, survives."""
    rank = dataclasses.replace(OUTCOME.ranks[0], log=text, stack=text)
    outcome = dataclasses.replace(OUTCOME, ranks=(rank,))
    artefact = dataclasses.replace(OF_A_TEST, outcomes=(outcome,), rootdir=text, head=(text,))
    assert read(write(artefact, tmp_path)) == artefact


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    """It says first what it is, in lines, with the sentences for a reader at its head."""
    lines = write(OF_A_PROGRAM, tmp_path).read_text().splitlines()
    assert lines[1].strip() == '"what": "rpcprops failure",'
    assert lines[2].strip() == f'"format": {FORMAT},'
    assert "worker1 holds 1 owner" in lines[4]


def test_versions_are_noted_unless_given(tmp_path: Path) -> None:
    """A new artefact names everything that a failure may hang on, with nothing left empty."""
    found = read(write(dataclasses.replace(OF_A_PROGRAM, versions={}), tmp_path)).versions
    assert found == versions()
    assert set(found) == {"python", "platform", "rpcprops", "torch", "hypothesis", "pytest"}
    assert all(found.values())


def test_the_same_failure_is_the_same_file(tmp_path: Path) -> None:
    """What a case showed, when and how often it repeats does not change the name of its file."""
    first = write(OF_A_PROGRAM, tmp_path)
    again = dataclasses.replace(OF_A_PROGRAM, outcomes=(), head=(), repeats=(), clock_rate=1.0)
    assert write(again, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert read(first) == again


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(OF_A_PROGRAM, subject="rref-values"),
        dataclasses.replace(OF_A_PROGRAM, promise="OwnerGone"),
        dataclasses.replace(OF_A_PROGRAM, plans=(FaultPlan(),)),
        dataclasses.replace(OF_A_PROGRAM, program=Program(2)),
    ],
)
def test_another_failure_is_another_file(other: Artefact, tmp_path: Path) -> None:
    """Subject, promise, faults and program all tell failures apart."""
    assert write(other, tmp_path) != write(OF_A_PROGRAM, tmp_path)


@pytest.mark.parametrize(
    "subject",
    [
        "../../etc/passwd",
        "/",
        "",
        "a b;c|d$(e)`f`",
        "x" * 5000,
        "漢" * 300,
        "\N{MATHEMATICAL SCRIPT CAPITAL A}" * 99,
        "a\0b\nc",
    ],
    ids=lambda subject: ascii(subject[:8]),
)
def test_any_subject_makes_a_plain_file_name(subject: str, tmp_path: Path) -> None:
    """No name of a test leaves the directory, holds a separator, or is too long for a file."""
    folder = tmp_path / "failures"
    path = write(dataclasses.replace(OF_A_PROGRAM, subject=subject), folder)
    assert path.parent == folder
    assert os.listdir(folder) == [path.name]
    assert not set(path.name) & set(" ;|$`/\0\n")
    assert read(path).subject == subject


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Folders are made as needed, and afterwards they hold the artefact and nothing else."""
    path = write(OF_A_PROGRAM, tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader never sees half a file: the new one takes the name only once it is whole."""
    path = write(OF_A_PROGRAM, tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rpcprops._files.os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write(dataclasses.replace(OF_A_PROGRAM, clock_rate=1.0), tmp_path)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    """Where a file is in the way of the folder, the system's own error is raised."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(OF_A_PROGRAM, tmp_path / "file")


def test_a_run_says_what_could_not_be_written(tmp_path: Path) -> None:
    """Where there can be no artefact, its line says so, with path and reason; nothing is raised."""
    assert write_or_say(OF_A_PROGRAM, tmp_path) == write(OF_A_PROGRAM, tmp_path)
    (tmp_path / "file").write_text("")
    told = write_or_say(OF_A_PROGRAM, tmp_path / "file")
    name = write(OF_A_PROGRAM, tmp_path).name
    line = f"could not be written: {tmp_path / 'file' / name}: "
    assert replay_line(told).startswith(line)
    # A hunt and a sweep keep it as text.
    assert replay_line(str(told)) == replay_line(told)


@pytest.mark.parametrize("keep", [0, 1, 2, 100, 0.25, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    """A file that was cut off anywhere is no JSON, and says so."""
    whole = write(OF_A_PROGRAM, tmp_path).read_bytes()
    path = tmp_path / "cut.json"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert "not JSON" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        bytes(range(256)),
        b"\xef\xbb\xbf{",
        b"%PDF-1.7",
        b"\x7fELF\x02\x01\x01",
        b"what: rpcprops failure\n",
        b"{'what': 'rpcprops failure'}",
        b'{"what": "rpcprops failure", "format": 1',
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"what": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda content: repr(content[:16]),
)
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    """Binary, half and hugely nested files are refused in one line, and crash nothing."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert "not JSON" in refusal(path)


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "1", '"rpcprops failure"', "{}", '{"what": "pytest cache"}', '{"what": null}'],
)
def test_other_json_is_refused(content: str, tmp_path: Path) -> None:
    """JSON of some other program is no artefact of ours."""
    path = tmp_path / "a.json"
    path.write_text(content)
    assert "no failure artefact" in refusal(path)


@pytest.mark.parametrize("number", [0, 2, 99, "1", None, [1], ...])
def test_another_format_is_refused_with_the_version_to_use(number: Any, tmp_path: Path) -> None:
    """A newer file names the rpcprops that wrote it, which is the one that reads it."""
    path = changed(tmp_path, format=number, versions={"rpcprops": "7.5"})
    message = refusal(path)
    assert "this version reads 1" in message
    assert "7.5" in message


@pytest.mark.parametrize("said", [None, [], "1.0", {}])
def test_another_format_without_versions_is_refused_too(said: Any, tmp_path: Path) -> None:
    """Not even what a newer file says of its versions is relied on."""
    assert "unknown" in refusal(changed(tmp_path, format=2, versions=said))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "shell"}, "unknown kind 'shell'"),
        ({"kind": None}, "str"),
        ({"kind": ...}, "str"),
        ({"subject": 1}, "str"),
        ({"promise": ...}, "str"),
        ({"head": "text"}, "array"),
        ({"program": None}, "one program and one plan"),
        ({"program": "rm -rf"}, "steps"),
        ({"program": {"world_size": 2, "steps": [{"op": "exec"}]}}, "exec"),
        ({"program": {"world_size": 2, "steps": [{"op": "fetch", "at": 0, "handle": "z"}]}}, "'z'"),
        (
            {
                "program": {
                    "world_size": 2,
                    "steps": [{"op": "call", "at": 0, "to": 1, "left": [1.0], "right": [1.0, 2.0]}],
                }
            },
            "same length",
        ),
        ({"plans": []}, "one program and one plan"),
        ({"plans": [{}, {}]}, "one program and one plan"),
        ({"plans": {}}, "array"),
        ({"plans": [None]}, "FaultPlan"),
        ({"plans": [{"default": {"messages_to_fail": ["NOBODY"]}}]}, "NOBODY"),
        ({"plans": [{"default": {"num_fail_sends": -1}}]}, "num_fail_sends"),
        ({"outcomes": [{"world_size": None}]}, "world_size"),
        ({"outcomes": ...}, "array"),
        ({"violations": [{}]}, "promise"),
        ({"clock_rate": "fast"}, "float"),
        ({"transport": 7}, "str"),
        ({"repeats": [1]}, "str"),
        ({"reproduction": ["1"]}, "length 2"),
        ({"reproduction": "blob"}, "array"),
        ({"versions": {"torch": 2}}, "str"),
        ({"rootdir": None}, "str"),
        ({"promise": "Exception"}, "unknown promise"),
        ({"promise": "BrokenPromise"}, "unknown promise"),
        ({"promise": ""}, "unknown promise"),
        ({"kind": "pytest", "promise": "os.system()"}, "unknown promise"),
        ({"clock_rate": math.nan}, "must lie in 1 to 2000"),
        ({"clock_rate": math.inf}, "must lie in 1 to 2000"),
        ({"clock_rate": -1.0}, "must lie in 1 to 2000"),
        ({"clock_rate": 2001.0}, "must lie in 1 to 2000"),
        ({"subject": "x" * 20_000}, "subject has a length of 20000"),
        ({"reproduction": ["1", "x" * 300_000]}, "reproduction has a length of 300000"),
        ({"reproduction": ["1\x1b[2J", "b''"]}, "is no version and blob"),
        ({"world_sizes": [2] * 20_000}, "world_sizes has a length of 20000"),
        ({"kind": "x" * 20_000}, "unknown kind 'xxx"),
        ({"transport": "pigeon"}, "unknown transport"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A file that holds something else than it should is damaged; the message says in what."""
    message = refusal(changed(tmp_path, **values))
    assert "damaged: " in message
    assert said in message


@pytest.mark.parametrize(
    "subject",
    [
        "-pmodule::x",
        "@options.py::x",
        "tests",
        "tests::x",
        "tests/options.txt::x",
        "test_x.py::",
        "../test_x.py::x",
        "tests/../../test_x.py::x",
        "/home/me/test_x.py::x",
        "./test_x.py::x",
        "tests//test_x.py::x",
        "test_x.py\0::x",
        "test_x.py::x\x1b[2J",
        "test_x.py::x\u2028",
        "test_x.py::x\ud800",
    ],
)
def test_what_is_no_node_id_is_refused(subject: str, tmp_path: Path) -> None:
    """What pytest could take for an option, a file of options, or a file elsewhere is no test."""
    assert "is no node id of a test" in refusal(changed(tmp_path, kind="pytest", subject=subject))


def test_the_exception_of_a_test_may_be_the_users(tmp_path: Path) -> None:
    """A test may raise what it likes; an example that was under way has raised nothing yet."""
    user = changed(tmp_path, kind="pytest", subject="test_x.py::x", promise="MyOwn_Übel")
    assert read(user).promise == "MyOwn_Übel"
    assert read(changed(tmp_path, promise="", underway=True)).promise == ""


def test_a_path_with_a_nul_is_refused() -> None:
    """No system call takes such a path; it is the caller's mistake like any other."""
    with pytest.raises(UsageError, match="null"):
        read(Path("a\0b"))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_does_not_end_is_refused_unread(kind: str, tmp_path: Path) -> None:
    """A FIFO would wait for its writer, and a device has no end: neither is opened to be read."""
    path = Path("/dev/zero")
    if kind == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    assert "no regular file" in refusal(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that leads nowhere is the caller's mistake, not a traceback."""
    assert "No such file" in refusal(tmp_path / "none.json")
    assert "Not a directory" in refusal(write(OF_A_PROGRAM, tmp_path) / "below.json")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    """A folder is no artefact."""
    assert "no regular file" in refusal(tmp_path)


def test_a_path_too_long_is_refused(tmp_path: Path) -> None:
    """What the system will not even look up is refused like any other file."""
    assert "too long" in refusal(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """A file without read permission is refused with the system's reason."""
    path = write(OF_A_PROGRAM, tmp_path)
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    """A file larger than any artefact is refused by its size (this one takes no disk)."""
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "larger than 64 MiB" in refusal(path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    """A pickle, a Python file, and code in every string of an artefact are read as data."""
    sign = tmp_path / "sign"
    path = tmp_path / "bomb.json"
    path.write_bytes(pickle.dumps(Bomb(sign)))
    refusal(path)
    code = f"open({str(sign)!r}, 'w').write('ran')"
    path.write_text(code)
    refusal(path)
    path.write_text(f"raise SystemExit\n{code}\n")
    refusal(path)
    hidden = f"__import__('pathlib').Path({str(sign)!r}).write_text('ran')"
    before = set(sys.modules)
    artefact = read(
        changed(
            tmp_path,
            subject=hidden,
            head=[hidden],
            repeats=[hidden],
            reproduction=[hidden, hidden],
            rootdir=hidden,
            versions={hidden: hidden},
        )
    )
    assert artefact.subject == hidden
    assert not sign.exists()
    assert set(sys.modules) == before


def test_unknown_values_of_the_same_format_are_ignored(tmp_path: Path) -> None:
    """A file may say more than is read, as long as its format is ours."""
    assert read(changed(tmp_path, colour="red")) == OF_A_PROGRAM
