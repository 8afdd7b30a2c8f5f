"""The example database of ``rpcprops check``, which may be in a folder that cannot be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from rpcprops._files import Unwritten, write_whole


class Database(ExampleDatabase):
    """Hypothesis's database, but it also reports a case that could not be stored.

    Args:
        on_unwritten: called the first time that a case could not be stored.
    """

    def __init__(self, folder: Path, on_unwritten: Callable[[Unwritten], None]) -> None:
        super().__init__()
        self._folder = folder
        self._on_unwritten = on_unwritten
        self._told = False
        self._kept = DirectoryBasedExampleDatabase(folder)

    def fetch(self, key: bytes) -> Iterable[bytes]:
        """The cases of a property; none if the folder may not be read."""
        try:
            return list(self._kept.fetch(key))
        except OSError:
            return []

    def save(self, key: bytes, value: bytes) -> None:
        """Store a case; if that fails, find out why."""
        with suppress(OSError):
            self._kept.save(key, value)
        if not self._told and value not in self.fetch(key):
            self._told = True
            self._on_unwritten(self._why(value))

    def _why(self, value: bytes) -> Unwritten:
        probe = self._folder / "probe"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(probe, value.hex())
            probe.unlink()
        except OSError as error:
            return Unwritten.because(error, self._folder)
        return Unwritten(self._folder, "Hypothesis does not say why")

    def delete(self, key: bytes, value: bytes) -> None:
        """Delete a case."""
        with suppress(OSError):
            self._kept.delete(key, value)
