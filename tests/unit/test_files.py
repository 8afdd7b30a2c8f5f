"""Files that are written whole or not at all, and what is said where they cannot be."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rpcprops._files import Unwritten, why_not_writable, write_whole

FullDisk = Callable[[], AbstractContextManager[None]]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, full_disk: FullDisk) -> None:
    """Half of a file never takes the place of a whole one, and goes."""
    path = tmp_path / "file"
    write_whole(path, "before")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_whole(path, "after " * 100)
    assert path.read_text(encoding="utf-8") == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_links_and_modes_stay(tmp_path: Path) -> None:
    """A link goes on pointing at its file, which keeps its mode; a new file has the usual one."""
    usual, path, link = tmp_path / "usual", tmp_path / "file", tmp_path / "link"
    usual.touch()
    write_whole(path, "before")
    assert path.stat().st_mode == usual.stat().st_mode
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "after")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "after"
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    """Folders, pipes, devices, sockets and missing folders are named; looking leaves no file."""
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    before = sorted(tmp_path.iterdir())
    assert why_not_writable(tmp_path) == "it is a folder; name a file in it"
    for special in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/null")):
        assert "a pipe, a device or a socket" in why_not_writable(special)
    assert "there is no folder" in why_not_writable(tmp_path / "none" / "file")
    assert "there is no folder" in why_not_writable(tmp_path / "file" / "file")
    assert "no file can be made" in why_not_writable(Path("/proc/report.json"))
    assert why_not_writable(tmp_path / "file") == why_not_writable(tmp_path / "new") == ""
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text(encoding="utf-8") == "kept"


def test_the_line_names_path_and_reason(tmp_path: Path, full_disk: FullDisk) -> None:
    """What stands in the place of a path says which, and the system's reason."""
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        write_whole(tmp_path / "file", "text " * 100)
    line = str(Unwritten.because(raised.value, tmp_path / "file"))
    assert line == f"could not be written: {tmp_path / 'file'}: File too large"
    below = Path.cwd() / "folder" / "file"
    assert "written: folder/file:" in str(Unwritten.because(raised.value, below))
