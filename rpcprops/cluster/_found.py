"""The violations found in the ranks of one world, and the exception that reports them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rpcprops import errors
from rpcprops.cluster._channel import Channel
from rpcprops.outcomes import SentMessage, Violation

#: The most ranks that notes describe besides those that broke a promise.
_MOST_OTHERS = 4
#: The most lines of all notes together: a report must fit on a screen.
_MOST_LINES = 20


class Found:
    """The violations found so far.

    Attributes:
        violations: in order; the exception that is raised names the promise of the first.
        involved: the ranks that may have caused a hang, including those that only wait for one.
        remedy: what a user can do about it, if that is known.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.violations: list[Violation] = []
        self.involved: list[Channel] = []
        self.remedy = ""
        self._channels = channels

    def __bool__(self) -> bool:
        return bool(self.violations)

    def add(self, promise: str, message: str, rank: int, *, timing_sensitive: bool = False) -> None:
        """Add a violation."""
        self.violations.append(Violation(promise, message, rank, timing_sensitive=timing_sensitive))

    def raise_first(self) -> None:
        """Raise the first violation, with all of them in its text, if there is any.

        Raises:
            BrokenPromise: the subclass for that promise; its notes show what the ranks wrote.
        """
        __tracebackhide__ = True
        if not self.violations:
            return
        kind = getattr(errors, self.violations[0].promise)
        error = kind("\n".join(str(violation) for violation in self.violations))
        blamed = [self._channels[v.rank] for v in self.violations[:3] if v.rank is not None]
        others = [channel for channel in self.involved if channel not in blamed]
        others += [c for c in self._channels if c.held and c not in blamed + others]
        notes = itertools.chain(
            *(channel.notes() for channel in blamed),
            *(channel.notes(lines=0) for channel in others[:_MOST_OTHERS]),
        )
        left = _MOST_LINES
        for note in dict.fromkeys(notes):
            lines = note.splitlines()[:left]
            left -= len(lines)
            if lines:
                error.add_note("\n".join(lines))
        if self.remedy:
            error.add_note(self.remedy)
        raise error


def shorter_timeout(messages: Sequence[SentMessage], rpc_timeout: float) -> str:
    """What to do where a fault lost messages whose requests are still waited for; else empty.

    Nobody is told of a lost message: its request ends by its timeout.
    """
    waited_for = {sent.id for sent in messages if sent.is_request and sent.ended is None}
    lost = [sent for sent in messages if sent.done == "lose" and sent.id in waited_for]
    if not lost:
        return ""
    first = lost[0]
    more = f" (and {len(lost) - 1} more)" if lost[1:] else ""
    return (
        f"A fault lost the {first.type} from rank {first.sender} to rank {first.receiver}{more}. "
        f"Torch notices that only by a timeout. That of the cluster is {rpc_timeout:g} virtual "
        f"seconds: give it a shorter one, such as rpc_timeout=20."
    )
