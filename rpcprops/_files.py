"""Files that are read, replaced, or extended: regular files only, and never left incomplete.

Anything but a regular file is refused before it is read or written: a FIFO blocks, a device may
have no end. If a file cannot be written, only that file is lost: see :class:`Unwritten`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from msgspec import MsgspecError

from rpcprops.errors import UsageError

T = TypeVar("T")

#: The largest file that is read as a whole, unless a caller gives a smaller limit.
MOST_BYTES = 512 << 20
_BLOCK = 1 << 16
#: Bytes of a name that represents a longer text.
_MOST_OF_NAME = 100
#: The working directory of the user's shell, even after tests have changed theirs.
_START = os.path.abspath(os.curdir) if os.path.exists(os.curdir) else os.sep
#: The first words of the line about a file that could not be written.
COULD_NOT = "could not be written: "


@dataclass(frozen=True)
class Unwritten:
    """A file that could not be written, and why; as a string, the line that says so."""

    path: Path
    reason: str

    @classmethod
    def because(cls, error: OSError, path: Path) -> Unwritten:
        """The file at `path`, which could not be written because of `error`."""
        return cls(shown(path), reason_of(error))

    def __str__(self) -> str:
        return f"{COULD_NOT}{self.path}: {self.reason}"


def reason_of(error: OSError) -> str:
    """The system's reason, without the file name, which may be a temporary one."""
    return error.strerror or str(error)


def shown(path: Path) -> Path:
    """`path` relative to the folder in which the command began, if it is below that."""
    try:
        return path.relative_to(_START)
    except ValueError:
        return path


def read_regular(path: Path, most: int = MOST_BYTES, *, else_what: str = "") -> bytes:
    """The content of a regular file of at most `most` bytes.

    Args:
        else_what: what a file of another kind or size is said not to be, in the message.

    Raises:
        UsageError: the file is of another kind, is larger, or cannot be read.
    """
    so = f", so {else_what}" if else_what else ""
    try:
        # Do not wait for the writer of a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                msg = f"{path}: no regular file{so}."
                raise UsageError(msg)
            data = b""
            if found.st_size <= most:
                with os.fdopen(fd, "rb", closefd=False) as file:
                    # The file may have grown meanwhile, or the system may not know its size.
                    data = file.read(most + 1)
        finally:
            os.close(fd)
    except OSError as error:
        msg = f"{path}: {reason_of(error)}."
        raise UsageError(msg) from None
    except UsageError:
        raise
    except ValueError as error:  # a NUL in the path
        msg = f"{str(path)!r}: {error}."
        raise UsageError(msg) from None
    if found.st_size > most or len(data) > most:
        msg = f"{path}: larger than {most >> 20} MiB{so}."
        raise UsageError(msg)
    return data


def write_whole(path: Path, text: str, *, temporary: Path | None = None) -> None:
    """Write `text` under a temporary name and rename it, so that nobody reads half a file.

    Args:
        temporary: a name next to `path`, for callers that remove what a killed process left; by
            default a unique name.

    Raises:
        OSError: it cannot be written; then the old file is unchanged, and no other file is left.
    """
    target = _target(path)
    temporary = temporary or _temporary(target)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_output(option: str, path: Path, *, grows: bool = False) -> None:
    """Check, before long work, that a file can be written at its end.

    Args:
        option: the option that names it, for the message.
        grows: whether the file is added to, and not replaced.

    Raises:
        UsageError: it cannot be written; the message names the option, the value and the remedy.
    """
    why = why_not_writable(path, grows=grows)
    if why:
        msg = f"{option} {str(path)!r}: {why}."
        raise UsageError(msg)


def why_not_writable(path: Path, *, grows: bool = False) -> str:
    """Why a file cannot be written, as far as that shows without writing it; else empty."""
    try:
        target = _target(path)
        if target.exists():
            why = _why_not_replaced(target)
        elif not target.parent.is_dir():
            why = f"there is no folder {str(path.parent)!r}; make it first, or name another file"
        else:
            why = ""
        if not why and not (grows and target.exists()):
            temporary = _temporary(target)
            temporary.touch(exist_ok=False)
            temporary.unlink()
    except OSError as error:
        return f"no file can be made there ({reason_of(error)}); name one elsewhere"
    except ValueError as error:  # a NUL in the path
        return f"{error}; name another file"
    return why


def _why_not_replaced(target: Path) -> str:
    """Why the existing file cannot be replaced by ours; else empty."""
    if target.is_dir():
        return "it is a folder; name a file in it"
    if not target.is_file():
        return "it is no regular file (a pipe, a device or a socket); name a regular file"
    if not os.access(target, os.W_OK):
        return "it may not be written; name another file, or change its permissions"
    return ""


def safe_name(text: str, keep: Literal["start", "end"]) -> str:
    """A part of a file's name that represents `text`: only safe characters, and not many.

    Cut by bytes, which is how file systems measure a name; between two words if there are any.
    """
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in text).encode()
    if len(safe) > _MOST_OF_NAME:
        # One more byte than may stay: a cut next to a border of words loses no word.
        cut = safe[: _MOST_OF_NAME + 1] if keep == "start" else safe[-_MOST_OF_NAME - 1 :]
        between = (
            re.split(rb"[-_]", cut, maxsplit=1)
            if keep == "end"
            else re.split(rb"[-_](?=[^-_]*$)", cut, maxsplit=1)
        )
        if len(between) == 2:
            safe = between[0 if keep == "start" else 1]
        else:
            safe = cut[:-1] if keep == "start" else cut[1:]
    return safe.decode(errors="ignore").strip("-_")


def _target(path: Path) -> Path:
    """The file that is replaced when `path` is written: a link stays, its target is replaced.

    Raises:
        OSError: it is a link to itself.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _temporary(target: Path) -> Path:
    return target.with_name(f".writing-{secrets.token_hex(8)}")


class GrowingFile:
    """A file of JSON lines that only grows, so that interrupted work can continue.

    A last line without a newline was being written when a process was killed. It is not read, and
    the next line replaces it, but only if the file begins as this kind of file begins. Lines that
    cannot be written now are written together with the next ones.

    Args:
        what: what a line holds, for messages.
        begins: the first characters of such a file.
        remedy: what to do about a file of another kind at this path, for messages.
        identifies: whether `begins` is the whole first line, which says what the others belong to.
            It is written together with the first of them, and :meth:`lines` does not return it.

    Attributes:
        unwritten: why the last lines are not in the file, if they could not be written.
    """

    def __init__(
        self, path: Path, what: str, begins: bytes, remedy: str, *, identifies: bool = False
    ) -> None:
        self.path = path
        self.what = what
        self.begins = begins
        self.remedy = remedy
        self.identifies = identifies
        self.unwritten: Unwritten | None = None
        self._pending: list[bytes] = []
        self._begins_anew = False

    def begin_anew(self) -> None:
        """Ignore what the file holds: the next line replaces all of it."""
        self._begins_anew = True
        with suppress(OSError, ValueError):
            self.path.unlink()

    def lines(self) -> list[bytes]:
        """The complete lines, without newlines; none if there is no file.

        Raises:
            UsageError: it is no file of this kind, or cannot be read.
        """
        with suppress(ValueError):  # a NUL in the path; reading it reports that
            try:
                self.path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return []
            except OSError:
                pass  # Reading it says why.
        data = read_regular(self.path, else_what=f"it holds no {self.what}")
        self._check_beginning(data)
        lines = data.split(b"\n")[:-1]
        if self.identifies and lines and lines.pop(0) != self.begins:
            raise self._refusal(1)
        return lines

    def read(self, decode: Callable[[bytes], T]) -> list[T]:
        """What `decode` makes of each whole line.

        Raises:
            UsageError: it is no file of this kind, cannot be read, or `decode` raises an error of
                a kind that a line can cause.
        """
        found: list[T] = []
        for number, line in enumerate(self.lines(), 2 if self.identifies else 1):
            try:
                found.append(decode(line))
            except (ValueError, LookupError, TypeError, RecursionError, MsgspecError) as error:
                raise self._refusal(number, f" ({error})") from None
        return found

    def append(self, *lines: bytes) -> None:
        """Write lines, at once and durably; or with the next ones, if that is impossible now.

        Raises:
            UsageError: it is no file of this kind.
        """
        self._pending += lines
        try:
            self._write()
        except OSError as error:
            self.unwritten = Unwritten.because(error, self.path)
        else:
            self.unwritten = None
            self._pending.clear()

    def _write(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._begins_anew:
            self.path.unlink(missing_ok=True)
        with os.fdopen(os.open(self.path, flags, 0o666), "r+b") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                msg = f"{self.path}: no regular file, so it holds no {self.what}."
                raise UsageError(msg)
            self._begins_anew = False
            self._check_beginning(file.read(len(self.begins)))
            end = file.seek(_end_of_lines(file.fileno()))
            file.truncate()
            first = [self.begins] if self.identifies and self._pending and not end else []
            file.write(b"".join(line + b"\n" for line in [*first, *self._pending]))
            file.flush()
            os.fsync(file.fileno())

    def _check_beginning(self, data: bytes) -> None:
        """Check the beginning; the reader checks a complete first line, as it knows the content."""
        if not data.startswith(self.begins[: len(data)]):
            raise self._refusal(1)

    def _refusal(self, number: int, why: str = "") -> UsageError:
        return UsageError(f"{self.path}, line {number}: no {self.what}; {self.remedy}{why}.")


def _end_of_lines(fd: int) -> int:
    """The position after the last newline of a file."""
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - _BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
