"""Stacks and tracebacks of ranks as text, reduced to the user's own code.

Below a user's function in a rank are frames of rpcprops and of torch. They are the same in every
run and say nothing about the user's code, so reports leave them out; artefacts keep them.
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from rpcprops.cluster import finder

#: Installed packages whose frames are not the user's. Other installed packages may be.
_NOT_THEIRS = ("torch", "rpcprops", "cloudpickle", "hypothesis", "_pytest", "pluggy", "pytest")
#: The beginning of the stack of one thread, and one frame of it, in the words of `faulthandler`.
_THREAD = re.compile(r"^(?:Thread|Current thread) .*\(most recent call first\):$")
_FRAME = re.compile(r'^  File "([^"]+)", line (\d+) in (.+)$')
#: One frame of a traceback of Python's, and of the list that pybind11 adds to an error's text.
_TRACED = re.compile(r'^(\s*)File "([^"]+)", line \d+')
_AT = re.compile(r"^\s+(\S+)\(\d+\): \S+$")
#: Words that only a stack or the end of a process writes, besides those above.
_OF_STACKS = ("Fatal Python error:", "Extension modules:", "<no Python frame>")
#: The function of torch's that runs a call for another rank (``internal.py``).
_SERVES = "_run_function"
_MOST_SOURCE = 90
#: The most frames of the user's that are shown of one thread.
_MOST_FRAMES = 3


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()[:_MOST_SOURCE]
        at = f"{shown_file(self.file)}:{self.line} in {self.function}"
        return f"{at}: {source}" if source else at


def shown_file(file: str) -> str:
    """A file as messages name it: relative to the working directory, if it is below that."""
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


@functools.cache
def is_theirs(file: str) -> bool:
    """Whether a frame of this file belongs to the user's code, or a library that it uses."""
    if finder.is_user_file(file):
        return True
    package = re.search(r"(?:site|dist)-packages/(?:([^/.]+))", file)
    return package is not None and package.group(1) not in _NOT_THEIRS


def stack_of(frame: FrameType | None) -> Iterator[Frame]:
    """The frames of a thread of this process, the most recent first."""
    while frame is not None:
        yield Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back


def stacks_here() -> str:
    """The stacks of all threads of this process, as `faulthandler` writes them."""
    lines: list[str] = []
    for number, top in sys._current_frames().items():  # noqa: SLF001  (documented in `sys`)
        lines.append(f"Thread 0x{number:016x} (most recent call first):")
        lines += [f'  File "{f.file}", line {f.line} in {f.function}' for f in stack_of(top)]
    return "\n".join(lines)


def threads(text: str) -> list[list[Frame]]:
    """The stacks in a text of `faulthandler`, one list of frames for each thread."""
    found: list[list[Frame]] = []
    is_open = False
    for line in text.splitlines():
        frame = _FRAME.match(line)
        if _THREAD.match(line):
            found.append([])
            is_open = True
        elif frame and is_open:
            found[-1].append(Frame(frame.group(1), int(frame.group(2)), frame.group(3)))
        else:
            is_open = False
    return found


def runs(text: str, function: str) -> bool:
    """Whether a thread of these stacks runs a function of that name."""
    return any(frame.function == function for frames in threads(text) for frame in frames)


def where(name: str, text: str) -> list[str]:
    """Where a rank is in the user's code, in sentences; none if it runs none of it.

    Args:
        name: the rank's.
        text: its stacks; empty if they are not known.
    """
    lines: list[str] = []
    for frames in threads(text):
        theirs = [frame for frame in frames if is_theirs(frame.file)][:_MOST_FRAMES]
        if theirs:
            serves = any(frame.function == _SERVES for frame in frames)
            does = "runs a call for another rank, at" if serves else "is at"
            if any(frame.function == "<module>" for frame in theirs):
                does = "imports a module, at"
            lines.append(f"{name} {does} {theirs[0]}")
            lines += [f"    called at {frame}" for frame in theirs[1:]]
        else:
            lines += [f"{name} is in {frame.function}" for frame in _called_by_us(frames)]
    return lines


def _called_by_us(frames: Sequence[Frame]) -> list[Frame]:
    """The function that a rank was told to call, if that is a function of a library."""
    for number, frame in enumerate(frames):
        if frame.function == "run_call" and frame.file.endswith("_functions.py"):
            # torch's functions are wrapped: api.py, `_require_initialized`.
            return [f for f in reversed(frames[:number]) if f.function != "wrapper"][:1]
    return []


def without_ours(lines: Iterable[str], mark: str = "") -> list[str]:
    """Lines that hold tracebacks, without the frames that are not the user's.

    Args:
        mark: the character that pytest puts before each line of an error.
    """
    kept: list[str] = []
    dropped: int | None = None
    for line in lines:
        text = _unmarked(line, mark)
        traced, at = _TRACED.match(text), _AT.match(text)
        if traced:
            dropped = None if is_theirs(traced.group(2)) else len(traced.group(1))
        elif at and not is_theirs(at.group(1)):
            if kept and _unmarked(kept[-1], mark).strip() == "At:":
                del kept[-1]
            continue
        elif dropped is not None and len(text) - len(text.lstrip()) <= dropped:
            dropped = None
        is_repeated = not text.strip() and bool(kept) and not _unmarked(kept[-1], mark).strip()
        if dropped is None and not is_repeated:
            kept.append(line)
    return kept


def _unmarked(line: str, mark: str) -> str:
    return " " + line[len(mark) :] if mark and line.startswith(mark) else line


def short_traceback(text: str) -> str:
    """A traceback with the user's frames alone; as it is, if none of them is the user's."""
    files = [found.group(2) for line in text.splitlines() if (found := _TRACED.match(line))]
    if not any(map(is_theirs, files)):
        return text
    return "\n".join(without_ours(text.splitlines()))


def without_stacks(lines: Sequence[str]) -> list[str]:
    """The lines of a log that are no part of a stack that `faulthandler` wrote."""
    return [
        line
        for line in lines
        if not (_THREAD.match(line) or _FRAME.match(line) or line.startswith(_OF_STACKS))
    ]
