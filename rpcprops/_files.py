"""Files that commands read, replace, and let grow: regular ones, and never half of one.

What is no regular file is refused before it is read or written: a FIFO blocks, a device may have no
end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from rpcprops.errors import MachineCannot, UsageError

#: The largest file that is read as a whole, unless a caller says less.
MOST_BYTES = 512 << 20
_BLOCK = 1 << 16


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
        msg = f"{path}: {error.strerror or error}."
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


def check_output(option: str, path: Path, *, grows: bool = False) -> None:
    """Make sure, before long work, that a file can be written when that is done.

    Args:
        option: the option that names it, for the message.
        grows: it is added to, and not replaced.

    Raises:
        UsageError: it cannot be written; the message names the option, the value and the remedy.
    """
    name = f"{option} {str(path)!r}"
    target = _target(path, name)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        msg = f"{name}: {error.strerror}; name a file that can be written."
        raise UsageError(msg) from None
    if stat.S_ISDIR(mode):
        msg = f"{name} is a folder; name a file."
        raise UsageError(msg)
    if mode and not stat.S_ISREG(mode):
        msg = f"{name} is no regular file (a device, a pipe or a socket); name a file."
        raise UsageError(msg)
    if mode and not os.access(target, os.W_OK):
        msg = f"{name} may not be written; name another file, or change its permissions."
        raise UsageError(msg)
    if not target.parent.is_dir():
        msg = f"{name}: there is no folder {str(target.parent)!r}; make it first."
        raise UsageError(msg)
    if mode and grows:
        return
    try:
        os.close(_temporary(target)[0])
    except OSError as error:
        msg = (
            f"{name}: the folder {str(target.parent)!r} cannot be written ({error.strerror}); "
            f"name a file in another."
        )
        raise UsageError(msg) from None


def write_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8: a reader sees what was there before or all of it, never a part.

    A link stays a link, and what it leads to is replaced.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    target = Path(os.path.realpath(path))
    fd, temporary = _temporary(target, keep=True)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _target(path: Path, name: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL in the path
        msg = f"{name}: {error}."
        raise UsageError(msg) from None


def _temporary(target: Path, *, keep: bool = False) -> tuple[int, Path]:
    """A new file next to `target`, open, with the permissions that a new file gets here."""
    path = target.with_name(f".writing-{secrets.token_hex(8)}")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    if not keep:
        path.unlink()
    return fd, path


class GrowingFile:
    """A file of JSON lines that only grows, so that work goes on where it was interrupted.

    A last line without its end was being written when a process was killed. It is not read, and
    the next line replaces it, but only in a file that begins as this kind of file begins.

    Args:
        what: what a line holds, for messages.
        begins: how the first line of such a file begins.
        remedy: what to do with another file that is there, for messages.
    """

    def __init__(self, path: Path, what: str, begins: bytes, remedy: str) -> None:
        self.path = path
        self.what = what
        self.begins = begins
        self.remedy = remedy

    def lines(self) -> list[bytes]:
        """The whole lines, without their ends; none where there is no file.

        Raises:
            UsageError: it is no file of this kind, or cannot be read.
        """
        try:
            if not self.path.exists():
                return []
        except (OSError, ValueError):
            pass  # Reading it says why.
        data = read_regular(self.path, else_what=f"it holds no {self.what}")
        self._check_beginning(data)
        return data.split(b"\n")[:-1]

    def append(self, *lines: bytes) -> None:
        """Write lines, at once and for good.

        Raises:
            UsageError: it is no file of this kind.
            MachineCannot: it cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.path, flags, 0o666), "r+b") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    msg = f"{self.path}: no regular file, so it holds no {self.what}."
                    raise UsageError(msg)
                self._check_beginning(file.read(len(self.begins)))
                file.seek(_end_of_lines(file.fileno()))
                file.truncate()
                file.write(b"".join(line + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = f"{self.path} cannot be written: {error.strerror}."
            raise MachineCannot(msg) from None

    def _check_beginning(self, data: bytes) -> None:
        """A whole first line is for the reader to judge, who knows what it must hold."""
        if not data.startswith(self.begins[: len(data)]):
            msg = f"{self.path}, line 1: no {self.what}; {self.remedy}."
            raise UsageError(msg)


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
