"""Bad input of files: each kind of file that is read, damaged in every way, and what is no file.

What cannot be read is refused with an error of ours; what can be is used without a traceback. What
a file says is never run, and never reaches the terminal as more than text.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcprops._hunt import Batch, Hunt, summary
from rpcprops._json import to_json
from rpcprops._sweep import Record, State, cells, find_program
from rpcprops.commands import hunt as hunt_command
from rpcprops.commands import sweep as sweep_command
from rpcprops.commands import upstream as upstream_command
from rpcprops.commands.shared import say_died
from rpcprops.errors import UsageError
from rpcprops.report import artefact as artefacts
from rpcprops.report import in_flight
from rpcprops.report.as_test import regression_test
from rpcprops.report.script import script_of
from rpcprops.upstream.data import UpstreamTest
from tests.stress.test_bad_input import (
    PLAN,
    PROGRAM,
    artefact_data,
    bounded,
    control_characters,
    fingerprint,
    make_folder,
    many,
    run_command,
)

#: Strings that stand for what JSON's own writer does not write.
_RAW = {
    '"@deep@"': "[" * 100_000,
    '"@nested@"': '{"a":' * 900 + "1" + "}" * 900,
    '"@digits@"': "9" * 5000,
    '"@overflow@"': "1e999999",
    '"@twice@"': '{"op": "own", "op": "drop"}',
}

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "x", "\x00", "\x1b[31mred\x1b[0m"),
    *(
        "\x9b31m\x07",
        "\ud800",
        "a\nb",
        "a\rb",
        "@args",
        "-x",
        "--version",
        "../../x",
        "/etc/passwd",
    ),
    *("x" * 10_000, "[bold]", "[/red]", "[", "\\", '"""', "'''", '"""\nimport os\n"""', "{}", "%s"),
    *(
        "²",
        "٣",
        "class",
        "#",
        "\u2028",
        "remote",
        "tcp",
        "RREF_USER_DELETE",
        "WrongValue",
        "RankHung",
    ),
    *([], {}, [[]], {"": {}}, [None], {"op": "remote"}, {"op": "own", "at": 0, "out": "b"}),
    *({"op": "parallel", "branches": [[]]}, {"op": "settle"}, ["x", 1], {"0": {}}, {"-1": {}}),
    *("@deep@", "@nested@", "@digits@", "@overflow@", "@twice@"),
]


_ODD_TEXTS = [x for x in ODD if isinstance(x, str) and not x.startswith("@deep")]


@st.composite
def _changed(draw: st.DrawFn, data: Any) -> Any:
    """`data` with one change, at its top or somewhere below."""
    below = isinstance(data, dict | list) and data
    if not below or not draw(st.integers(0, 4)):
        # A text is most often another text: what has the wrong type is refused early.
        texts = isinstance(data, str) and draw(st.integers(0, 3))
        return copy.deepcopy(draw(st.sampled_from(_ODD_TEXTS if texts else ODD)))
    changed = copy.copy(data)
    key = draw(st.sampled_from(list(data) if isinstance(data, dict) else range(len(data))))
    how = draw(st.sampled_from(["change"] * 6 + ["remove", "add"]))
    if how == "change":
        changed[key] = draw(_changed(data[key]))
    elif how == "remove":
        del changed[key]
    elif isinstance(changed, dict):
        added = draw(st.sampled_from(["", "x", "\x1b[31m", "0", "-1", "op", "steps"]))
        changed[added] = draw(st.sampled_from(ODD))
    else:
        changed.insert(key, draw(st.sampled_from([data[key], *ODD])))
    return changed


def _poisoned(data: Any, text: str) -> Any:
    """`data` with every text in it replaced."""
    if isinstance(data, dict):
        return {key: _poisoned(value, text) for key, value in data.items()}
    if isinstance(data, list):
        return [_poisoned(item, text) for item in data]
    return text if isinstance(data, str) else data


@st.composite
def damaged(draw: st.DrawFn, whole: Any, most: int = 3) -> bytes:
    """A whole file's data as JSON, after up to so many changes to it and then to its text."""
    data = whole
    for _ in range(draw(st.integers(0, most))):
        data = draw(_changed(data))
    if isinstance(data, dict) and data and draw(st.integers(0, 1)):
        key = draw(st.sampled_from(list(data)))
        data = {**data, key: _poisoned(data[key], draw(st.sampled_from(_ODD_TEXTS)))}
    text = json.dumps(data)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    blob = text.encode()
    change = draw(st.sampled_from(["none"] * 12 + ["cut", "byte", "bom", "nul", "tail", "utf16"]))
    if change == "cut":
        blob = blob[: draw(st.integers(0, min(len(blob), 4000)))]
    elif change == "byte":
        place = draw(st.integers(0, min(len(blob), 4000)))
        blob = blob[:place] + draw(st.binary(min_size=1, max_size=3)) + blob[place:]
    elif change == "bom":
        blob = b"\xef\xbb\xbf" + blob
    elif change == "nul":
        blob = b"\x00" * 8 + blob
    elif change == "tail":
        blob += b" trailing"
    elif change == "utf16":
        blob = text.encode("utf-16")
    return blob


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refused(read: Callable[[], Any]) -> Any:
    """What a reader gives; None where it refuses with an error of ours, which it must show well."""
    try:
        with bounded():
            return read()
    except UsageError as error:
        said = str(error)
    assert not control_characters(said), repr(said)
    assert len(said) < 100_000
    return None


artefact_files = st.sampled_from(["program", "reinit", "upstream", "pytest"]).flatmap(
    lambda kind: damaged(artefact_data(kind))
)


@many(200, 3.5)
@given(blob=artefact_files, options=st.sampled_from([(), ("--script",), ("--as-test",)]))
def test_artefacts(place: Path, blob: bytes, options: tuple[str, ...]) -> None:
    """`replay` of any damaged artefact ends as misuse, or as a replay that would start."""
    file = place / "artefact.json"
    file.write_bytes(blob)
    run_command("replay", "artefact.json", *options).check()
    assert file.read_bytes() == blob
    artefact = refused(lambda: artefacts.read(file))
    if artefact is not None:
        # It is written again wherever it was under way.
        refused(lambda: artefacts.write(artefact, place / "written"))
    assert sorted(p.name for p in place.iterdir() if p.name != "written") == ["artefact.json"]


def _as_test(data: dict[str, Any]) -> str:
    return regression_test(artefacts._convert(data))


def _as_script(data: dict[str, Any]) -> str:
    return script_of(artefacts._convert(data)).text


def _shape(text: str) -> list[str]:
    """The statements of a source, without its names and constants."""
    return [type(node).__name__ for node in ast.parse(text).body]


_texts = st.sampled_from([x for x in ODD if isinstance(x, str) and not x.startswith("@")])


@many(60, 2.0)
@given(
    subject=_texts,
    said=_texts,
    repeats=_texts,
    version=_texts,
    name=_texts,
    promise=st.sampled_from(["WrongValue", "RankHung", "RRefLeak"]),
)
def test_generated_code_holds_no_code_of_the_artefact(
    subject: str, said: str, repeats: str, version: str, name: str, promise: str
) -> None:
    """Whatever texts a failure holds, what is made of it has the same statements."""
    plain = artefact_data(promise=promise)
    plain["violations"][0]["promise"] = promise
    odd = copy.deepcopy(plain)
    odd |= {"subject": subject, "repeats": [repeats], "versions": {"torch": version}}
    odd["violations"][0]["message"] = said
    odd["program"]["name"] = name
    for write in (_as_test, _as_script):
        expected, text = refused(partial(write, plain)), refused(partial(write, odd))
        assert expected is not None
        if text is not None:
            assert _shape(text) == _shape(expected)
            assert not control_characters(text)


@many(60, 1.5)
@given(blob=damaged(to_json(PROGRAM)))
def test_programs(place: Path, blob: bytes) -> None:
    """`sweep` of any damaged program is misuse, or a sweep that would start."""
    (place / "program.json").write_bytes(blob)
    run_command("sweep", "program.json").check()
    program = refused(lambda: find_program("program.json"))
    if program is not None:
        for ranks in ("all", "each", "pairs"):
            refused(partial(cells, program.world_size, ranks))


PYTHON = {
    "raises": "raise ValueError('on purpose')",
    "exits": "raise SystemExit(0)",
    "interrupts": "raise KeyboardInterrupt",
    "base": "raise BaseException('on purpose')",
    "syntax": "def (",
    "nul": "x = '\x00'",
    "bytes": "\x1b[31m",
    "shows nothing": "class X:\n def __repr__(self): raise ValueError('no text')\nPROGRAM = X()",
    "text raises": "class E(Exception):\n def __str__(self): return 5\nraise E",
    "looks up": "def __getattr__(name): raise SystemExit(0)",
    "control": "PROGRAM = '\\x1b[31m'",
    "another": "PROGRAM = 5",
    "deletes itself": "import sys; del sys.modules[__name__]",
    "recursion": "def f(): f()\nf()",
}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(pytest.param(text, "PROGRAM", id=name) for name, text in PYTHON.items()),
        *(pytest.param("X = 5", name, id=f"named {name!r}") for name in ("", "a b", "__dict__")),
    ],
)
def test_python_files_of_programs(place: Path, text: str, name: str) -> None:
    """`sweep FILE.py:NAME` runs that file; whatever it does to itself is misuse of the command."""
    (place / "of_mine.py").write_text(text)
    before = dict(sys.modules)
    try:
        ended = run_command("sweep", f"of_mine.py:{name}")
    finally:
        for key in set(sys.modules) - set(before):
            del sys.modules[key]
    if "KeyboardInterrupt" in text:
        assert ended.code == 130
    else:
        ended.check()
        assert ended.code == 2


BATCH = Batch(
    "drawn-within-budget",
    0,
    "tcp",
    400.0,
    "2.13.0",
    "holds",
    ["0123456789ab"],
    3,
    {"RREF_USER_DELETE": 3},
    {"a-finding": 1},
    {"leak-at-owner": 1},
    {"leak-at-owner": "Program(2)"},
    ["WrongValue", "x.json"],
    ["a line"],
    1.0,
)


@many(60, 2.0)
@given(
    blob=st.lists(damaged(msgspec.to_builtins(BATCH), 2), min_size=1, max_size=3),
    end=st.sampled_from([b"\n", b"", b"\n\n", b"\r\n"]),
)
def test_hunts(place: Path, blob: list[bytes], end: bytes) -> None:
    """`hunt` on any damaged file is misuse, or goes on from what it holds and tells it well."""
    file = place / "hunt.jsonl"
    whole = b"\n".join(blob) + end
    file.write_bytes(whole)
    run_command("hunt", "--file", "hunt.jsonl").check()
    assert file.read_bytes() == whole
    hunt = refused(lambda: Hunt.read(file))
    if hunt is not None:

        def tell() -> None:
            json.dumps(summary(hunt))
            hunt.next_batch()
            hunt_command._show(hunt)

        run_command(main=tell).check()


def _state(root: Path, **others: Any) -> State:
    return State(PROGRAM, torch_version="2.13.0", rate=400.0, transport="tcp", root=root, **others)


RECORD = Record(PLAN, "violated", "WrongValue", "it is wrong", 2, {"RREF_USER_DELETE": 2}, 0.5)


@many(60, 2.0)
@given(
    blob=st.just([]) | st.lists(damaged(to_json(RECORD), 2), max_size=2),
    plan=st.sampled_from([to_json(cell.plan) for cell in cells(2, "all")[:3]]),
    promise=st.sampled_from([x for x in ODD if isinstance(x, str)]),
    verdict=st.sampled_from(["holds", "known", "violated", "undecided"]),
)
def test_states_of_sweeps(
    place: Path, blob: list[bytes], plan: Any, promise: str, verdict: str
) -> None:
    """Any damaged file of a sweep is refused, or shown as a map of which nothing is obeyed."""
    path = _state(place).path
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {
        **to_json(RECORD),
        **{"plan": plan, "promise": promise, "verdict": verdict},
        **{"findings": [promise], "accepted": [promise], "broken": promise},
    }
    head = _state(place)._file.begins
    path.write_bytes(b"\n".join([head, *blob, json.dumps(own).encode(), b""]))
    state = refused(lambda: _state(place))
    if state is not None:
        places = cells(2, "all")

        def tell() -> None:
            report = sweep_command._report("program", state, places, "clock: real time")
            json.dumps(report)
            sweep_command._show(state, places, report)

        run_command(main=tell).check()
    path.unlink()


TEST = UpstreamTest("RpcTest", "test_add", "generic", 4)
ROW = {
    **{"class": "RpcTest", "name": "test_add", "verdict": "passed", "reason": ""},
    **{"seconds": 15.0, "processor_seconds": 20.0, "torch": "2.13.0"},
}


@many(60, 1.5)
@given(blob=st.lists(damaged(ROW, 2), min_size=1, max_size=3))
def test_records_of_the_harness(place: Path, blob: list[bytes]) -> None:
    """`upstream --harness` on any damaged file keeps it as it is, and says what it makes of it."""
    file = place / "rows.jsonl"
    whole = b"\n".join([*blob, json.dumps(ROW).encode(), b""])
    file.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_command, "_chosen", lambda _: [TEST])
        run_command("upstream", "--harness", "rows.jsonl").check()
    assert file.read_bytes() == whole


@many(60, 1.5)
@given(
    blob=artefact_files,
    name=st.sampled_from(
        ["1-2.json", "1-.json", "x-y.json", "1-2.writing", "1--.json", "²-3.json"]
    ),
    kind=st.sampled_from(["file", "file", "file", "folder", "fifo", "link", "dangling", "zero"]),
)
def test_examples_under_way(place: Path, blob: bytes, name: str, kind: str) -> None:
    """Whatever lies where examples under way are kept, the next run starts and tells it well."""
    folder = place / in_flight.DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    canary = place / "canary.json"
    canary.write_bytes(blob)
    path = folder / name
    if kind == "file":
        path.write_bytes(blob)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        targets: dict[str, Any] = {"link": canary, "dangling": "nowhere", "zero": "/dev/zero"}
        path.symlink_to(targets[kind])

    try:
        run_command(main=say_died).check()
        assert canary.read_bytes() == blob
    finally:
        if kind == "folder":
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


READERS: dict[str, tuple[str, ...]] = {
    "replay": ("replay",),
    "replay-test": ("replay", "--as-test"),
    "sweep": ("sweep",),
    "hunt": ("hunt", "--file"),
    "output": ("replay", "program.json", "--script", "--output"),
    "harness": ("upstream", "--harness"),
}
ALWAYS = ("folder", "fifo.json", "zero.json", "canary.json", "canary.txt", "loop.json")
NO_FILES = [
    *("folder", "dangling.json", "loop.json", "link.json", "zero.json", "null.json", "full.json"),
    *("fifo.json", "unreadable.json", "canary.json", "canary.txt", "empty.json", "no-end.jsonl"),
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in NO_FILES],
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str
) -> None:
    """A device, a pipe, a folder or a file of the user's is never read for ever nor written to."""
    folder = make_folder(tmp_path / "input")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(upstream_command, "_chosen", lambda _: [TEST])
    before = fingerprint(folder)
    run_command(*READERS[reader], name).check()
    after = fingerprint(folder)
    assert {key: after.get(key) for key in before} == before


@pytest.mark.parametrize(
    "hostile",
    [
        "rootdir",
        "option",
        pytest.param("subject", marks=pytest.mark.nightly),
        pytest.param("folder", marks=pytest.mark.nightly),
    ],
)
def test_replay_runs_nothing_of_the_folder_it_is_told(tmp_path: Path, hostile: str) -> None:
    """An artefact of a test that names another folder, or an option, as its test: nothing runs."""
    elsewhere = make_folder(tmp_path / "elsewhere")
    here = tmp_path / "here"
    kept = here / artefacts.DIRECTORY
    kept.mkdir(parents=True)
    # pytest reads more arguments from a file that is named after an @.
    (elsewhere / "args::x").write_text(f"{elsewhere}/test_it.py\n")
    others: dict[str, Any] = {
        "rootdir": {"rootdir": str(elsewhere), "subject": "test_it.py::test_it"},
        "subject": {"rootdir": str(here), "subject": f"{elsewhere}/test_it.py::test_it"},
        "option": {"rootdir": str(here), "subject": f"@{elsewhere}/args::x"},
        "folder": {"rootdir": str(here), "subject": f"{elsewhere}::x"},
    }[hostile]
    file = kept / "a.json"
    file.write_text(json.dumps(artefact_data("pytest", **others)))
    before = fingerprint(elsewhere)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rpcprops", "replay", str(file)],
        cwd=here,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (2, 3), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert fingerprint(elsewhere) == before


def test_what_is_damaged_is_whole_before(place: Path) -> None:
    """Each kind of file above, undamaged, is read as what it is: the damage is what is refused."""
    for kind in ("program", "reinit", "upstream", "pytest"):
        assert artefacts._convert(artefact_data(kind)).kind == kind
    file = place / "file.json"
    file.write_text(json.dumps(to_json(PROGRAM)))
    assert find_program("file.json") == PROGRAM
    file.write_bytes(msgspec.json.encode(BATCH) + b"\n")
    assert Hunt.read(file).batches == [BATCH]
    state = _state(place)
    state.add(RECORD)
    assert _state(place).records == {PLAN: RECORD}
