"""What ranks printed, without what torch and rpcprops write to the same stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rpcprops.cluster import stacks
from rpcprops.outcomes import RankOutcome
from rpcprops.torch_facts import installed

#: The most lines that the report of a failure shows of all its ranks together, and of each at
#: least.
_MOST_LINES = 12
_LEAST_LINES = 3


def is_of_torch(line: str) -> bool:
    """Whether torch's logger wrote this line."""
    return re.match(installed().texts.log_line, line) is not None


def printed(log: str, error: str = "") -> list[str]:
    """The lines of a rank's log that the user's code printed.

    Args:
        error: the text of the error that the report shows. Where a call at another rank raised it,
            torch has printed the same text there (``internal.py: _run_function``).
    """
    lines = stacks.without_stacks(log.splitlines())
    known = set(error.splitlines()) if installed().texts.remote in error else set[str]()
    known |= {line for old in known for line in [old.partition(": ")[2]] if line}
    return stacks.without_ours(
        line for line in lines if not is_of_torch(line) and line not in known
    )


def sections(ranks: Sequence[RankOutcome], error: str = "") -> list[tuple[str, str]]:
    """What ranks printed, as sections of a report of pytest's: title and text, the last lines.

    One stream holds stdout and stderr in the order in which they were written, so a section shows
    both; its title has both words, for ``--show-capture``.
    """
    by_name = {
        rank.name: [line for line in printed(rank.log, error) if line.strip()] for rank in ranks
    }
    spoke = {name: lines for name, lines in by_name.items() if lines}
    most = max(_LEAST_LINES, _MOST_LINES // max(1, len(spoke)))
    found: list[tuple[str, str]] = []
    for name, lines in spoke.items():
        before = len(lines) - most
        shown = lines[-most:]
        if before > 0:
            noun = "line" if before == 1 else "lines"
            shown = [f"({before} {noun} before these: see the log in the artefact)", *shown]
        found.append((f"Captured stdout/stderr rank {name}", "\n".join(shown)))
    return found


class Echo:
    """Passes on each line that the user's code prints in a rank, as soon as it is complete."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._open = b""

    def __call__(self, piece: bytes) -> None:
        """Read the next piece of the rank's log; an empty one ends its last line."""
        ended = b"" if piece or not self._open else b"\n"
        *lines, self._open = (self._open + piece + ended).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace")
            if not is_of_torch(text) and stacks.without_stacks([text]):
                self._write(text)
