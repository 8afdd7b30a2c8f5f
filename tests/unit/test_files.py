"""Files that commands read, replace and let grow: never half of one, and none but regular ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rpcprops._files import (
    GrowingFile,
    Unwritten,
    check_output,
    read_regular,
    safe_name,
    write_whole,
)
from rpcprops._printable import printable
from rpcprops.commands.shared import write_json
from rpcprops.errors import UsageError

FullDisk = Callable[[], AbstractContextManager[None]]


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop"


def _grows(path: Path) -> GrowingFile:
    return GrowingFile(path, "line of ours", b'{"ours":', "name another")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "it is a folder; name a file in it."),
        (lambda folder: folder / "none" / "x.json", "there is no folder"),
        (_fifo, "it is no regular file (a pipe, a device or a socket); name a regular file."),
        (lambda _: Path("/dev/zero"), "is no regular file"),
        (lambda _: Path("a\0b"), "null"),
        (lambda _: Path("/proc/self/x.json"), "name one elsewhere."),
        (lambda folder: folder / ("x" * 300), "too long"),
        (_loop, "links); name one elsewhere."),
    ],
    ids=["folder", "no folder", "fifo", "device", "nul", "read-only", "long", "loop"],
)
def test_what_cannot_be_written_is_said_before(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    """The message names the option, the value and what to do, and nothing is left behind."""
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        check_output("--json", path)
    assert str(caught.value).startswith(f"--json {str(path)!r}")
    assert words in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_makes_and_changes_nothing(tmp_path: Path) -> None:
    """A file that can be written is as it was, there or not."""
    there = tmp_path / "there.json"
    there.write_text("before", encoding="utf-8")
    check_output("--json", there)
    check_output("--json", tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text(encoding="utf-8") == "before"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """Half a text is never seen: the old one stays, and no temporary file with it."""
    path = tmp_path / "out.json"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "x" * 100_000 + "\ud800")
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_and_permissions_stay(tmp_path: Path) -> None:
    """What a link leads to is replaced, with its permissions; a new file gets the usual ones."""
    target, link, new = tmp_path / "target", tmp_path / "link", tmp_path / "new"
    target.write_text("before", encoding="utf-8")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, "after")
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "after"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    new.touch()
    usual = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    write_whole(new, "")
    assert stat.S_IMODE(new.stat().st_mode) == usual


@pytest.mark.parametrize("text", [b"my notes", b"my notes\nand more", b"[1]", b"\n", b"{ "])
def test_a_foreign_file_does_not_grow_and_is_not_cut(tmp_path: Path, text: bytes) -> None:
    """A file that does not begin as ours is refused by both ends, and keeps every byte."""
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=r"line 1: no line of ours; name another\."):
        _grows(path).lines()
    with pytest.raises(UsageError, match=r"line 1: no line of ours; name another\."):
        _grows(path).append(b'{"ours":1}')
    assert path.read_bytes() == text


@pytest.mark.parametrize("cut", [b"", b"{", b'{"ou', b'{"ours":1, "more'])
def test_what_a_kill_cut_short_is_replaced(tmp_path: Path, cut: bytes) -> None:
    """The first line or a later one: what has no end is not read, and the next line replaces it."""
    for whole in (b"", b'{"ours":0}\n' + b'{"ours":"' + b"x" * 200_000 + b'"}\n'):
        path = tmp_path / f"{len(whole)}.jsonl"
        path.write_bytes(whole + cut)
        assert _grows(path).lines() == whole.splitlines()
        _grows(path).append(b'{"ours":2}')
        assert path.read_bytes() == whole + b'{"ours":2}\n'


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    """A FIFO has no writer and a device no end: both are refused at once, as a folder is."""
    path = {"device": Path("/dev/zero"), "folder": tmp_path}.get(kind) or _fifo(tmp_path)
    with pytest.raises(UsageError, match="no regular file, so it holds no line of ours"):
        _grows(path).lines()
    with pytest.raises(UsageError, match="no regular file"):
        read_regular(path)


def test_no_more_is_read_than_was_allowed(tmp_path: Path) -> None:
    """A file that is too large is refused, also where the system does not know its size."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    assert read_regular(path, 11) == b"x" * 11
    with pytest.raises(UsageError, match="larger than"):
        read_regular(path, 10)
    with pytest.raises(UsageError, match="larger than"):
        read_regular(Path("/proc/self/smaps"), 10)


def test_nothing_that_a_terminal_obeys_is_printed() -> None:
    """Escape sequences, and what changes the direction of a line, are shown as what they are."""
    assert printable("a\x1b]0;title\x07\r\x9b2J\u202e\ud800b\n\tc 漢") == (
        "a\\x1b]0;title\\x07\\r\\x9b2J\\u202e\\ud800b\n\tc 漢"
    )


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, full_disk: FullDisk) -> None:
    """Half of a file never takes the place of a whole one, and goes."""
    path = tmp_path / "file"
    write_whole(path, "before")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_whole(path, "after " * 100)
    assert path.read_text(encoding="utf-8") == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_itself_is_not_replaced(tmp_path: Path) -> None:
    """It is nobody's file, and stays as it is."""
    loop = _loop(tmp_path)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(loop, "text")
    assert loop.is_symlink() and os.listdir(tmp_path) == ["loop"]


def test_the_line_names_path_and_reason(tmp_path: Path, full_disk: FullDisk) -> None:
    """What stands in the place of a path says which, and the system's reason."""
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        write_whole(tmp_path / "file", "text " * 100)
    line = str(Unwritten.because(raised.value, tmp_path / "file"))
    assert line == f"could not be written: {tmp_path / 'file'}: File too large"
    below = Path.cwd() / "folder" / "file"
    assert "written: folder/file:" in str(Unwritten.because(raised.value, below))


def test_lines_that_cannot_be_written_go_with_the_next(tmp_path: Path, full_disk: FullDisk) -> None:
    """A full disk is said, loses nothing, and ends nothing."""
    file = _grows(tmp_path / "lines.jsonl")
    with full_disk():
        file.append(b'{"ours":1}')
        file.append(b'{"ours":2}')
    assert str(file.unwritten) == f"could not be written: {file.path}: File too large"
    file.append(b'{"ours":3}')
    assert file.unwritten is None
    assert file.lines() == [b'{"ours":1}', b'{"ours":2}', b'{"ours":3}']


def test_a_file_begins_anew(tmp_path: Path) -> None:
    """What it held is gone, whatever that was."""
    path = tmp_path / "lines.jsonl"
    path.write_text("notes")
    file = _grows(path)
    file.begin_anew()
    file.append(b'{"ours":1}')
    assert path.read_bytes() == b'{"ours":1}\n'


def test_a_first_line_says_what_the_others_are_of(tmp_path: Path) -> None:
    """It comes with the first line, is none of them, and another file is not gone on with."""

    def grows(first: bytes) -> GrowingFile:
        return GrowingFile(tmp_path / "l.jsonl", "line", first, "name another", identifies=True)

    file = grows(b'"mine"')
    file.append()
    assert file.path.read_bytes() == b""
    file.append(b"1")
    file.append(b"2")
    assert file.path.read_bytes() == b'"mine"\n1\n2\n'
    assert grows(b'"mine"').read(int) == [1, 2]
    for other in (b'"mine" ', b'"mine', b'"yours"'):
        with pytest.raises(UsageError, match=r"line 1: no line; name another\.$"):
            grows(other).lines()
    file.append(b"x")
    with pytest.raises(UsageError, match=r"line 4: no line; name another \(invalid literal"):
        grows(b'"mine"').read(int)


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("a b/../c", "a-b----c", "a-b----c"),
        ("0" * 50 + "1" * 60, "0" * 50 + "1" * 50, "0" * 40 + "1" * 60),
        ("漢" * 99, "漢" * 33, "漢" * 33),
        ("ab_" * 40, "_".join(["ab"] * 33), "_".join(["ab"] * 33)),
        ("a::" + "b" * 98, "a", "b" * 98),
        (f"{'x' * 49}/{'y' * 50}", f"{'x' * 49}-{'y' * 50}", f"{'x' * 49}-{'y' * 50}"),
        (f"{'x' * 50}/{'y' * 50}", "x" * 50, "y" * 50),
        ("/\udc80\0", "", ""),
    ],
)
def test_any_text_makes_a_part_of_a_file_name(text: str, start: str, end: str) -> None:
    """It holds no separator, has at most 100 bytes from either end, and is cut between words."""
    assert (safe_name(text, keep="start"), safe_name(text, keep="end")) == (start, end)


def test_a_report_that_cannot_be_written_changes_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that fails at the end of long work is a line, not an exception."""
    write_json(tmp_path / "gone" / "x.json", {})
    said = " ".join(capsys.readouterr().err.split())
    assert f"could not be written: {tmp_path}/gone/x.json: No such file or directory." in said
    assert said.endswith("The exit code is the verdict's.")
