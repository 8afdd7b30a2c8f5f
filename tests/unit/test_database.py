"""The example database of `rpcprops check`, in folders that can be written and that cannot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rpcprops._files import Unwritten
from rpcprops.commands.database import Database


def test_cases_are_kept(tmp_path: Path) -> None:
    """What is saved is fetched, by another process too, until it is deleted."""
    told: list[Unwritten] = []
    database = Database(tmp_path / "examples", told.append)
    database.save(b"key", b"case")
    assert list(Database(tmp_path / "examples", told.append).fetch(b"key")) == [b"case"]
    database.delete(b"key", b"case")
    assert list(database.fetch(b"key")) == []
    assert told == []


def test_a_case_that_cannot_be_kept_is_told(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """A file in the way, or a full disk, raises nothing, and the line says path and reason."""
    (tmp_path / "file").touch()
    told: list[Unwritten] = []
    blocked = Database(tmp_path / "file" / "examples", told.append)
    blocked.save(b"key", b"case")
    blocked.save(b"key", b"other case")
    blocked.delete(b"key", b"case")
    assert list(blocked.fetch(b"key")) == []
    line = f"could not be written: {tmp_path / 'file' / 'examples'}: Not a directory"
    assert list(map(str, told)) == [line]
    full = Database(tmp_path / "examples", told.append)
    with full_disk():
        full.save(b"key", b"a case of more than a few bytes")
    assert str(told[-1]).endswith("examples: File too large")
