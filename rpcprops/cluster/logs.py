"""The output of our processes, kept in memory: no file remains, and a kill loses nothing."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rpcprops.torch_facts import Texts, TorchFacts, installed

_TRACEBACK = b"Traceback (most recent call last):\n"
#: The beginning of every stack of a thread, in the words of `faulthandler`.
_STACK = b"(most recent call first):"

#: Bytes kept of each end of a log, besides the lines that report an error of torch.
END = 1 << 20
_MAX_TOLD = 256 << 10
#: The longest line that is searched as a whole, and the bytes kept around a match in a longer one.
_LONG_LINE = 64 << 10
_TOLD_LINE = 4 << 10
_OVERLAP = 64
_CHUNK = 1 << 20
_STACKS = 64 << 10


@dataclass(frozen=True)
class _Words:
    """The words that are searched for in a log, as bytes.

    Attributes:
        telling: the words that the judge needs. Each is searched for by itself with the C
            library: a gigabyte takes that a tenth of a second, `bytes.find` half a second, and a
            pattern of alternatives twenty.
        failed_send: what torch's retry callback logs for each failed send of a retryable message.
        failed_send_begins: words that every such line contains.
    """

    telling: tuple[bytes, ...]
    failed_send: re.Pattern[bytes]
    failed_send_begins: bytes


@functools.cache
def _words_of(texts: Texts) -> _Words:
    begins, ends = (text.encode() for text in texts.failed_send)
    pattern = re.escape(begins) + rb"\d+" + re.escape(ends) + rb"$"
    telling = (
        *texts.leaks,
        texts.context_kept,
        texts.assertion,
        texts.owners_waited,
        texts.users_waited,
        texts.terminated,
    )
    return _Words(
        tuple(text.encode() for text in telling), re.compile(pattern, re.MULTILINE), begins
    )


@dataclass
class LogScan:
    """Both ends of a log that is read piece by piece, and the words in it that the judge needs.

    Attributes:
        total: bytes read so far.
        facts: what is known of the torch that writes this log.
    """

    total: int = 0
    facts: TorchFacts = field(default_factory=installed)
    _head: bytearray = field(default_factory=bytearray)
    _tail: deque[bytes] = field(default_factory=deque[bytes])
    _tail_size: int = 0
    #: Lines that report an error of torch, each with its position.
    _told: list[tuple[int, bytes]] = field(default_factory=list)
    _told_size: int = 0
    _failed_sends: int = 0
    #: The last line, which has not ended yet, and how much of its beginning was searched.
    _line: bytes = b""
    _searched: int = 0

    def __post_init__(self) -> None:
        self._words = _words_of(self.facts.texts)

    def feed(self, piece: bytes) -> None:
        """Read the next piece."""
        room = END - len(self._head)
        if room > 0:
            self._head += piece[:room]
        rest = piece[room:] if room > 0 else piece
        if rest:
            self._tail.append(rest)
            self._tail_size += len(rest)
            while self._tail_size - len(self._tail[0]) >= END:
                self._tail_size -= len(self._tail.popleft())
        self.total += len(piece)
        # A copy costs as much as a search, so whole lines are searched without one.
        text = self._line + piece if self._line else piece
        begins = self.total - len(text)
        lines = text.rfind(b"\n") + 1
        if lines:
            if _holds(text, lines, self._words.failed_send_begins):
                self._failed_sends += len(self._words.failed_send.findall(text, 0, lines))
            self._search(text, lines, begins)
        self._line = text[lines:]
        if len(self._line) > _LONG_LINE:
            self._search(self._line, len(self._line), self.total - len(self._line))
            self._line = self._line[-_OVERLAP:]
            self._searched = _OVERLAP

    def _search(self, text: bytes, length: int, begins: int) -> None:
        """Keep the lines in the first `length` of `text` that report an error of torch."""
        searched, self._searched = self._searched, 0
        if self._told_size > _MAX_TOLD:
            return
        places: list[int] = []
        for words in self._words.telling:
            if _holds(text, length, words):
                place = text.find(words, max(0, searched - len(words) + 1), length)
                while place >= 0:
                    places.append(place)
                    place = text.find(words, place + len(words), length)
        end = -1
        for place in sorted(places):
            if place < end:
                continue
            start = max(text.rfind(b"\n", 0, place) + 1, place - _TOLD_LINE // 2)
            end = text.find(b"\n", place, length)
            end = min(length if end < 0 else end, place + _TOLD_LINE // 2)
            self._told.append((begins + start, text[start:end]))
            self._told_size += end - start

    def failed_sends(self) -> int:
        """How many injected failures of retryable messages torch has logged."""
        return self._failed_sends + len(self._words.failed_send.findall(self._line))

    def text(self) -> str:
        """The whole log, or both ends, and between them the lines that report an error of torch."""
        if self.total <= 2 * END:
            return _decoded(b"".join([self._head, *self._tail]))
        head, tail = bytes(self._head), b"".join(self._tail)[-END:]
        head = _without_open_traceback(head[: head.rfind(b"\n") + 1] or head)
        tail = tail[tail.find(b"\n") + 1 :] or tail
        tail_begins = self.total - len(tail)
        told = [_decoded(line) for at, line in self._told if len(head) <= at < tail_begins]
        gap = f"… {tail_begins - len(head)} bytes left out …"
        return "\n".join([_decoded(head).removesuffix("\n"), gap, *told, _decoded(tail)])


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _without_open_traceback(text: bytes) -> bytes:
    """`text` without a traceback at its end whose last line, the exception, is missing."""
    start = text.rfind(_TRACEBACK)
    rest = text[start + len(_TRACEBACK) :].splitlines()
    if start < 0 or any(line and not line[:1].isspace() for line in rest):
        return text
    return text[:start]


class RankLog:
    """A memory file that stands in for a process's stdout and stderr.

    Each look reads on from where the last one ended. What a loud process has written is freed in
    the kernel once it was read, so that it takes no memory; both ends of it are kept.
    """

    def __init__(
        self, name: str, facts: TorchFacts | None = None, *, fd: int | None = None
    ) -> None:
        if fd is not None:
            # The position of the file is the writers' own: they share the open file.
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        self.fd = os.memfd_create(name) if fd is None else fd
        self._scan = LogScan(facts=facts or installed())
        #: Called with each piece that was read, and with an empty one when this is closed.
        self.on_piece: Callable[[bytes], None] | None = None
        #: Up to which byte the file has been read, and up to which it was freed.
        self._taken = 0
        self._freed = 0
        #: From this byte on nothing is freed until :meth:`text_from` has read it.
        self._marked: int | None = None
        #: The end of the stretch of data that is being read, as far as it is known.
        self._data_end = 0
        self._seeker = -1
        self._size = 0
        #: The text once this is closed.
        self._final: str | None = None

    def size(self) -> int:
        """Bytes written so far, holes included."""
        return os.fstat(self.fd).st_size if self._final is None else self._size

    def take(self, most: int | None = None) -> int:
        """Read about `most` more bytes, or all there are; returns how many were read.

        Does not move the writer's position, which every process that writes shares.
        """
        if self._final is not None:
            return 0
        size = self.size()
        # A process that truncates the file by opening /dev/stdout anew goes on from its new end.
        self._taken = min(self._taken, size)
        before = self._scan.total
        while self._taken < size and (most is None or self._scan.total - before < most):
            self._take_piece(size)
            if size > 2 * END:
                self._free()
        return self._scan.total - before

    def _take_piece(self, size: int) -> None:
        start, end = self._taken, min(size, self._taken + _CHUNK)
        if end > self._data_end and size - start > _CHUNK:
            # Asked once for each stretch of data: the kernel walks all pages of it to answer.
            start, self._data_end = self._data_after(start, size)
            end = min(self._data_end, start + _CHUNK)
        piece = os.pread(self.fd, end - start, start)
        if start > self._taken:
            # Lines on both sides of a hole are not one line.
            piece = b"\n" + piece.lstrip(b"\0")
        self._taken = end
        self._scan.feed(piece)
        if self.on_piece is not None:
            self.on_piece(piece)

    def _data_after(self, start: int, size: int) -> tuple[int, int]:
        """Where the next data begins and ends: a writer that seeks leaves holes of any size."""
        try:
            if self._seeker < 0:
                # A separate open file: a seek in ours would move the writers' position.
                self._seeker = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            start = os.lseek(self._seeker, start, os.SEEK_DATA)
            end = os.lseek(self._seeker, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return size, size  # only a hole is left
            end = size  # no descriptor to seek with
        return min(start, size), min(end, size)

    def _free(self) -> None:
        """Free the memory of what was read."""
        end = self._taken if self._marked is None else min(self._taken, self._marked)
        end -= end % mmap.PAGESIZE
        if end - self._freed >= _CHUNK:
            _punch_hole(self.fd, self._freed, end - self._freed)
            self._freed = end

    def text(self) -> str:
        """What was written, as text.

        Of more than 2 MiB: the first part, the last part, and between them how much was left out
        and the lines there that report an error of torch.
        """
        if self._final is not None:
            return self._final
        size = self.size()
        if not self._freed and size <= 2 * END:
            return _decoded(os.pread(self.fd, size, 0))
        self.take()
        return self._scan.text()

    def mark(self) -> int:
        """The present end of the file, from which :meth:`text_from` can read on."""
        self._marked = self.size()
        return self._marked

    def text_from(self, start: int) -> str:
        """What was written from `start` on, as text.

        Of more than 2 MiB only 64 KiB: the stacks that `faulthandler` wrote, or else the end.
        """
        length = max(0, self.size() - start)
        if length > 2 * END:
            start, length = self._find_stack(start, start + length), _STACKS
        self._marked = None
        return _decoded(os.pread(self.fd, length, start))

    def _find_stack(self, start: int, size: int) -> int:
        data_end = start
        while start < size:
            if start >= data_end:
                start, data_end = self._data_after(start, size)
            end = min(data_end, start + _CHUNK)
            # Plus the length of the words, so that a match on a border is not missed.
            piece = os.pread(self.fd, end - start + len(_STACK), start)
            found = piece.find(_STACK)
            if found >= 0:
                return start + piece.rfind(b"\n", 0, found) + 1
            start = end
        return size - _STACKS

    def failed_sends(self) -> int:
        """How many injected failures of retryable messages torch has logged."""
        self.take()
        return self._scan.failed_sends()

    def close(self, *, keep_open: bool = False) -> None:
        """Close the descriptor, unless another log is to go on with it; text and numbers stay."""
        if self._final is None:
            self.take()
            self._size, self._final = self.size(), self.text()
            if self.on_piece is not None:
                self.on_piece(b"")
            if not keep_open:
                os.close(self.fd)
            if self._seeker >= 0:
                os.close(self._seeker)


@functools.cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.memmem.argtypes = [ctypes.c_char_p, ctypes.c_size_t] * 2
    library.memmem.restype = ctypes.c_void_p
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


def _holds(text: bytes, length: int, words: bytes) -> bool:
    """Whether `words` stand somewhere in the first `length` of `text`."""
    return _c_library().memmem(text, length, words, len(words)) is not None


def _punch_hole(fd: int, start: int, length: int) -> None:
    """Free the memory of a part of a file, which then reads as zeros."""
    keep_size, punch_hole = 1, 2
    # If the kernel refuses, the memory stays in use, and nothing else changes.
    _c_library().fallocate(fd, punch_hole | keep_size, start, length)
