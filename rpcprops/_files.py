"""Files that are read, replaced, and added to: regular ones, and never half of one.

What is no regular file is refused before it is read or written: a FIFO blocks, a device may have no
end. A file that cannot be written costs that file and nothing else: see :class:`Unwritten`.
"""

from __future__ import annotations

import errno
import os
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

#: The largest file that is read as a whole, unless a caller says less.
MOST_BYTES = 512 << 20
_BLOCK = 1 << 16
#: Bytes of a name that stand for a longer text.
_MOST_OF_NAME = 60
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


def read_regular(path: Path, most: int = MOST_BYTES, *, else_what: str = "") -> bytes:
    """What is in a regular file of at most `most` bytes.

    Args:
        else_what: what another kind of file, or a larger one, cannot be; said in the message.

    Raises:
        UsageError: it is another kind of file, is larger, or cannot be read.
    """
    so = f", so {else_what}" if else_what else ""
    try:
        # Not to wait for the writer of a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                msg = f"{path}: no regular file{so}."
                raise UsageError(msg)
            data = b""
            if found.st_size <= most:
                with os.fdopen(fd, "rb", closefd=False) as file:
                    # The file may have grown since, or the system may not know its size.
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
    """Write `text` under a temporary name and rename it, so that nobody ever reads half a file.

    Args:
        temporary: a name next to `path`, for who removes what a killed process left; otherwise one
            that nobody else has.

    Raises:
        OSError: it cannot be written; what was there before still is, and nothing else is left.
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
    """Make sure, before long work, that a file can be written when that is done.

    Args:
        option: the option that names it, for the message.
        grows: it is added to, and not replaced.

    Raises:
        UsageError: it cannot be written; the message names the option, the value and the remedy.
    """
    why = why_not_writable(path, grows=grows)
    if why:
        msg = f"{option} {str(path)!r}: {why}."
        raise UsageError(msg)


def why_not_writable(path: Path, *, grows: bool = False) -> str:
    """Why a file cannot be written, as far as can be told without writing it; or nothing."""
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
    """Why what is there cannot become a file of ours; or nothing."""
    if target.is_dir():
        return "it is a folder; name a file in it"
    if not target.is_file():
        return "it is no regular file (a pipe, a device or a socket); name a regular file"
    if not os.access(target, os.W_OK):
        return "it may not be written; name another file, or change its permissions"
    return ""


def safe_name(text: str, keep: Literal["start", "end"]) -> str:
    """A part of a file's name that stands for `text`: what may be in any name, and not much of it.

    Cut by bytes, which is how file systems measure a name.
    """
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in text).encode()
    cut = safe[:_MOST_OF_NAME] if keep == "start" else safe[-_MOST_OF_NAME:]
    return cut.decode(errors="ignore").strip("-")


def _target(path: Path) -> Path:
    """What is replaced when `path` is written: a link stays one, and its target is replaced.

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
    """A file of JSON lines that only grows, so that work goes on where it was interrupted.

    A last line without its end was being written when a process was killed. It is not read, and
    the next line replaces it, but only in a file that begins as this kind of file begins. Lines
    that cannot be written are written with the next ones.

    Args:
        what: what a line holds, for messages.
        begins: how the first line of such a file begins.
        remedy: what to do with another file that is there, for messages.
        identifies: `begins` is the whole first line, and says what the others are of. It is written
            with the first of them, and is none of :meth:`lines`.

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
        """Forget what the file holds: with the next line it has that alone."""
        self._begins_anew = True
        with suppress(OSError, ValueError):
            self.path.unlink()

    def lines(self) -> list[bytes]:
        """The whole lines, without their ends; none where there is no file.

        Raises:
            UsageError: it is no file of this kind, or cannot be read.
        """
        with suppress(ValueError):  # a NUL in the path, of which reading it tells
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
            UsageError: it is no file of this kind, cannot be read, or `decode` refuses a line: by
                any error that a line can cause.
        """
        found: list[T] = []
        for number, line in enumerate(self.lines(), 2 if self.identifies else 1):
            try:
                found.append(decode(line))
            except (ValueError, LookupError, TypeError, RecursionError, MsgspecError) as error:
                raise self._refusal(number, f" ({error})") from None
        return found

    def append(self, *lines: bytes) -> None:
        """Write lines, at once and for good; with the next ones where that cannot be.

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
        """A whole first line is for the reader to judge, who knows what it must hold."""
        if not data.startswith(self.begins[: len(data)]):
            raise self._refusal(1)

    def _refusal(self, number: int, why: str = "") -> UsageError:
        return UsageError(f"{self.path}, line {number}: no {self.what}; {self.remedy}{why}.")


def _end_of_lines(fd: int) -> int:
    """The place behind the last newline of a file."""
    end = os.fstat(fd).st_size
    while end:
        start = max(0, end - _BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
