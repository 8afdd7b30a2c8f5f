"""Where the commands print: tables and verdicts on stdout, and a sign of life while work is done.

On a terminal the sign of life is one line that changes. Elsewhere (a pipe, a CI log, a terminal
with ``TERM=dumb``) it is plain lines on stderr: the first after two seconds, then fewer and fewer.
Colours follow ``NO_COLOR`` and ``FORCE_COLOR``, as :mod:`rich` reads them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task
from rich.progress_bar import ProgressBar
from rich.text import Text

from rpcprops import agents
from rpcprops._printable import printable

#: Columns of output to a pipe or a file: nothing is cut there, whatever COLUMNS says.
_ALL_OF_IT = 10_000
#: Columns of a terminal that has room for a bar.
_BAR_FROM = 70
#: Real seconds after which a plain line is printed; from the last on, it is printed again after as
#: many again.
_PACE = (2.0, 10.0, 30.0, 60.0)


def _console(stream: TextIO, *, stderr: bool = False) -> Console:
    if stream.isatty():
        return Console(stderr=stderr, highlight=False, soft_wrap=True)
    # Without the height, rich takes 80 columns where TERM=dumb and FORCE_COLOR are both set.
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=_ALL_OF_IT, height=100)


#: The lines that change on the terminal now.
_redrawn_now: list[Line] = []

out = _console(sys.stdout)
err = _console(sys.stderr, stderr=True)


def plain(text: object) -> str:
    """`text` for `out` and `err` as it is: no markup, and no control sequences for a terminal."""
    return escape(printable(text))


class Line:
    """What is being done, how much of it is done, and a note."""

    def __init__(self) -> None:
        self.what = self.note = ""
        self.done = 0
        self.total: int | None = None
        self.began = time.monotonic()

    def begin(self, what: str, total: int | None = None, done: int = 0) -> None:
        """Begin something else, `total` pieces of work if their number is known."""
        self.what, self.total, self.done, self.note = printable(what), total, done, ""
        self.began = time.monotonic()

    def update(self, done: int | None = None, note: str = "") -> None:
        """Say how much is done by now; `done` stays as it is unless given."""
        self.done = self.done if done is None else done
        self.note = printable(note)

    @property
    def seconds(self) -> float:
        """Real seconds since this was begun."""
        return time.monotonic() - self.began

    def __str__(self) -> str:
        words = [self.what]
        if self.total is not None:
            words = [f"{self.what}: {self.done} of {self.total}"]
        elif self.done:
            words = [f"{self.what}: {self.done}"]
        words += [self.note] if self.note else []
        return ", ".join([*words, f"{self.seconds:.0f} s"])


@contextmanager
def live(what: str, total: int | None = None, done: int = 0) -> Iterator[Line]:
    """Show that the work in this block goes on; what it prints on `out` comes above the line."""
    line = Line()
    line.begin(what, total, done)
    console = _redrawable()
    with _redrawn(line, console) if console is not None else _repeated(line):
        yield line


@contextmanager
def compiling(what: str, end: str) -> Iterator[None]:
    """Show that an agent is compiled (:data:`rpcprops.agents.Progress`).

    What is said at the start and at the end are lines on stderr. On a terminal another line changes
    meanwhile, unless there is one already: rich before 14.1 has no second one.
    """
    with agents.lines_by(agents.to_stderr)(what, end):
        line = Line()
        line.begin(what.partition(";")[0])
        console = None if _redrawn_now else _redrawable()
        with contextlib.nullcontext() if console is None else _redrawn(line, console):
            yield


def _redrawable() -> Console | None:
    return next((one for one in (out, err) if _can_redraw(one)), None)


def _can_redraw(console: Console) -> bool:
    # Not console.is_terminal: FORCE_COLOR makes that true of a pipe.
    return console.file.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class _Shown(ProgressColumn):
    """A :class:`Line` as it is now."""

    max_refresh = None

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def render(self, task: Task) -> Text:
        return Text(str(self.line), overflow="ellipsis", no_wrap=True)


class _Bar(ProgressColumn):
    """A bar, if it is known how much there is to do."""

    max_refresh = None

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def render(self, task: Task) -> ProgressBar | Text:
        total = self.line.total
        # In a narrow terminal the words need the room.
        return (
            Text()
            if not total or out.width < _BAR_FROM
            else ProgressBar(total, min(self.line.done, total), width=24)
        )


@contextmanager
def _redrawn(line: Line, console: Console) -> Iterator[None]:
    columns = (SpinnerColumn(), _Bar(line), _Shown(line))
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("")
        _redrawn_now.append(line)
        try:
            yield
        finally:
            _redrawn_now.pop()


@contextmanager
def _repeated(line: Line) -> Iterator[None]:
    over = threading.Event()

    def repeat() -> None:
        began = time.monotonic()
        number = 0
        while True:
            after = _PACE[number] if number < len(_PACE) else _PACE[-1] * (number - 2)
            if over.wait(max(0.0, began + after - time.monotonic())):
                return
            with contextlib.suppress(OSError):
                print(f"rpcprops: {line}", file=sys.stderr, flush=True)
            number += 1

    thread = threading.Thread(target=repeat, name="rpcprops-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1.0)
