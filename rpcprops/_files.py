"""Files that are written whole or not at all, and what to say where they cannot be."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Where the shell of whoever reads our lines is, wherever tests may change to.
_START = os.path.abspath(os.curdir) if os.path.exists(os.curdir) else os.sep
#: How the line about a file that could not be written begins.
COULD_NOT = "could not be written: "


@dataclass(frozen=True)
class Unwritten:
    """A file that could not be written, and why; as a string, the line that says so."""

    path: Path
    reason: str

    @classmethod
    def because(cls, error: OSError, path: Path) -> Unwritten:
        """What `error` kept from being written at `path`."""
        return cls(shown(path), reason_of(error))

    def __str__(self) -> str:
        return f"{COULD_NOT}{self.path}: {self.reason}"


def reason_of(error: OSError) -> str:
    """Why the system refused, without the name of the file, which may be a temporary one."""
    return error.strerror or str(error)


def shown(path: Path) -> Path:
    """`path` as seen from the folder in which the command began, where it is below that."""
    try:
        return path.relative_to(_START)
    except ValueError:
        return path


def write_whole(path: Path, text: str) -> None:
    """Write `text` under a temporary name and rename it, so that nobody ever reads half a file.

    Raises:
        OSError: it cannot be written; what was there before still is, and nothing else is left.
    """
    # A link stays one: its target is replaced.
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def why_not_writable(path: Path) -> str:
    """Why :func:`write_whole` cannot write `path`, as far as can be told without it; or nothing."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            return "it is a folder; name a file in it"
        if target.exists() and not target.is_file():
            return "it is a pipe, a device or a socket; name a regular file"
        if not target.parent.is_dir():
            return f"there is no folder {str(path.parent)!r}; make it first, or name another file"
        temporary = _temporary(target)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        return f"no file can be made in its folder ({reason_of(error)}); name one elsewhere"
    return ""


def _temporary(target: Path) -> Path:
    return target.with_name(f".writing-{secrets.token_hex(8)}")
