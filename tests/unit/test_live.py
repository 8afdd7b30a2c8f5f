"""The sign of life of the commands, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import pty
import threading
from pathlib import Path

import pytest
from rich.console import Console

from rpcprops.commands import live


@pytest.fixture
def dull(monkeypatch: pytest.MonkeyPatch) -> None:
    """No console is a terminal, and the pace is a hundred times as fast."""
    monkeypatch.setattr(live, "_can_redraw", lambda _: False)
    monkeypatch.setattr(live, "_PACE", (0.02, 0.1, 0.3, 0.6))


def test_a_line_says_what_how_much_and_how_long() -> None:
    """With and without a total and a note; a control sequence in a name stays harmless."""
    line = live.Line()
    line.begin("a\x1b[2Jb")
    assert str(line) == "a\\x1b[2Jb, 0 s"
    line.begin("check", 10, 3)
    assert str(line) == "check: 3 of 10, 0 s"
    line.update(note="2 bad")
    assert str(line) == "check: 3 of 10, 2 bad, 0 s"
    line.begin("tests")
    line.update(4)
    assert str(line) == "tests: 4, 0 s"


@pytest.mark.usefixtures("dull")
def test_elsewhere_plain_lines_come_at_a_slowing_pace(capsys: pytest.CaptureFixture[str]) -> None:
    """Not before its time, on stderr alone, fewer and fewer, and none once the work is done."""
    with live.live("work", 5) as line:
        assert not capsys.readouterr().err
        line.update(2, "so far")
        threading.Event().wait(0.5)
    seen = capsys.readouterr()
    assert seen.err.splitlines() == ["rpcprops: work: 2 of 5, so far, 0 s"] * 3
    assert not seen.out
    threading.Event().wait(0.15)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("term", "redraws"), [("xterm", True), ("dumb", False), ("", False)], ids=repr
)
def test_what_is_redrawn(monkeypatch: pytest.MonkeyPatch, term: str, redraws: bool) -> None:
    """A real terminal is; a dumb one is not, and a pipe is not whatever FORCE_COLOR says."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    ours, theirs = pty.openpty()
    try:
        with os.fdopen(theirs, "w") as terminal:
            assert live._can_redraw(Console(file=terminal)) is redraws
    finally:
        os.close(ours)
    assert not live._can_redraw(Console(file=io.StringIO()))


def test_a_pipe_has_full_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where TERM=dumb and FORCE_COLOR are set, for which rich takes 80 columns."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "out").open("w") as file:
        assert live._console(file).width > 1000
