"""Bad input of pytest's options: each `--rpc-...` with anything for its value.

One process runs pytest again and again, and is asked for one run after the other: what an option is
refused for is told as pytest tells misuse, nothing is executed and nothing overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpcprops import pytest_plugin
from tests.stress.test_bad_input import (
    PATHS,
    TEXTS,
    artefact_data,
    control_characters,
    fingerprint,
    make_folder,
    many,
)

#: Runs pytest for each line that it reads, and answers with a line.
DRIVER = """
import contextlib, io, json, signal, sys, traceback
import pytest
answers = sys.stdout
for line in sys.stdin:
    signal.alarm(10)
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    code = None
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = int(pytest.main(json.loads(line)))
    except BaseException:
        traceback.print_exc(file=said)
    signal.alarm(0)
    print(json.dumps([code, said.buffer.getvalue().decode("utf-8")]), file=answers, flush=True)
"""


class _Group:
    """Takes what a plugin adds."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}

    def getgroup(self, *_: str) -> _Group:
        return self

    def addoption(self, name: str, **how: Any) -> None:
        self.options[name] = how


def options() -> dict[str, dict[str, Any]]:
    """The options that the plugin adds, as it adds them."""
    group = _Group()
    pytest_plugin.pytest_addoption(group)  # type: ignore[arg-type]
    return group.options


OPTIONS = options()
#: Those after which a run may go on to more than the collection of the tests here.
_FLAGS = [name for name, how in OPTIONS.items() if how.get("action") == "store_true"]


@dataclass
class Runs:
    """A process that runs pytest, started again where one run ended it, and where it stands."""

    folder: Path
    process: subprocess.Popen[str] | None = None

    def pytest(self, *words: str) -> tuple[int | None, str]:
        if self.process is None:
            self.process = self.started()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.close()
            pytest.fail(f"the process ended (exit code {code}) at {words!r:.2000}")
        code, said = json.loads(line)
        return code, said

    def started(self) -> subprocess.Popen[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != "CI" and not name.startswith(("PYTEST_", "HYPOTHESIS_"))
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-c", DRIVER],
            cwd=self.folder,
            env=kept | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> int | None:
        """End the process; its exit code."""
        if self.process is None:
            return None
        with self.process as process:
            if not self._ends(process):
                process.kill()
        self.process = None
        return process.returncode

    @staticmethod
    def _ends(process: subprocess.Popen[str]) -> bool:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return process.poll() is not None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = make_folder(tmp_path_factory.mktemp("bad") / "input")
    quiet = folder / "quiet"
    quiet.mkdir()
    (quiet / "test_one.py").write_text("def test_one(rpc_cluster):\n    raise SystemExit(9)\n")
    made = Runs(folder)
    yield made
    made.close()


def words_of(draw: st.DrawFn) -> list[str]:
    values = st.sampled_from([*TEXTS, *PATHS]) | st.text(
        st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8
    )
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3, unique=True))
    words: list[str] = []
    for name in chosen:
        if name == "--rpc-upstream":
            # Imports PyTorch's suites for each run.
            continue
        value = draw(values)
        words += [f"{name}={value}"] if draw(st.integers(0, 5)) else [name, value]
    return words


command_lines = st.composite(words_of)()

#: Nothing of the folder's own settings; its conftest.py must not run.
APART = ["-c", os.devnull, "--rootdir=quiet", "--confcutdir=quiet", "-p", "no:cacheprovider"]


def check(runs: Runs, words: list[str]) -> None:
    before = fingerprint(runs.folder)
    # A word without an option names tests; the first is ours.
    code, said = runs.pytest(*APART, "quiet/test_one.py", "--collect-only", *words)
    after = fingerprint(runs.folder)
    assert code in range(6), said
    assert code != 3 and "INTERNALERROR" not in said and "Traceback" not in said, said
    assert not control_characters(said), repr(said)
    assert {key: after.get(key) for key in before} == before, set(after) ^ set(before)


def test_the_options_are_ours() -> None:
    """The options come from the plugin itself, so that a new one is fed as well."""
    assert set(OPTIONS) >= {"--rpc-clock", "--rpc-transport", "--rpc-report", "--rpc-replay"}
    assert all(name.startswith("--rpc-") for name in OPTIONS)
    assert _FLAGS == ["--rpc-upstream"]


@many(30, 3.0)
@given(words=command_lines)
def test_options(runs: Runs, words: list[str]) -> None:
    """Whatever our options are given, pytest ends as it does for misuse, or collects."""
    if any(word in ("planted", "test_it.py", "..", "/", "~", ".", "//") for word in words):
        return
    check(runs, words)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(_FLAGS)))
def test_a_value_that_is_two_dashes(runs: Runs, name: str) -> None:
    """argparse loses such a value and leaves a list, which is misuse and no crash."""
    code, said = runs.pytest(*APART, "quiet/test_one.py", "--collect-only", f"{name}=--")
    assert (code, "INTERNALERROR" in said) == (4, False), said


def test_control_characters_of_a_path(runs: Runs) -> None:
    """The path of an artefact is shown as text that a terminal does not obey."""
    code, said = runs.pytest(
        *APART, "quiet/test_one.py", "--collect-only", "--rpc-replay=\x1b[31mred"
    )
    assert code == 4 and "\\x1b[31mred: No such file" in said
    assert not control_characters(said)


def test_control_characters_of_what_was_under_way(runs: Runs) -> None:
    """The header shows what an earlier run left as text that a terminal does not obey."""
    ours = runs.folder / "quiet" / ".rpcprops"
    (ours / "underway").mkdir(parents=True)
    data = artefact_data(subject="\x1b[31mred", promise="", underway=True)
    (ours / "underway" / "1-2.json").write_text(json.dumps(data))
    try:
        _, said = runs.pytest(*APART, "quiet/test_one.py", "-k", "nothing")
    finally:
        shutil.rmtree(ours)
    assert "rpcprops: an earlier run died during \\x1b[31mred: rpcprops replay" in said
    assert not control_characters(said)


FILES = [name for name, how in OPTIONS.items() if how.get("metavar") == "FILE"]
NO_FILES = [
    *("folder", "missing/x.json", "canary.txt/x", "fifo.json", "zero.json", "full.json"),
    *("loop.json", "canary.json", "dangling.json", "a" * 300),
]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path[:12], marks=() if number % 3 == 0 else pytest.mark.nightly)
        for number, path in enumerate(NO_FILES)
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_options_of_files(runs: Runs, name: str, path: str) -> None:
    """What is no file to read or write is refused before a test runs, and no file is lost."""
    before = fingerprint(runs.folder)
    words = [f"{name}={path}"]
    if name == "--rpc-replay-answer":
        words.append("--rpc-replay=pytest.json")
    code, said = runs.pytest(*APART, "quiet/test_one.py", "--collect-only", *words)
    assert code in range(6), said
    assert code != 3 and "INTERNALERROR" not in said and "Traceback" not in said, said
    after = fingerprint(runs.folder)
    if name in ("--rpc-replay",):
        assert code == 4
    if path == "canary.json" and name != "--rpc-replay":
        # It is what the option names: it may be replaced.
        before.pop(path)
    before.pop("link.json")
    assert {key: after.get(key) for key in before} == before
