"""What was found wrong with the ranks of one world, and the exception that tells of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rpcprops import errors
from rpcprops.cluster._channel import Channel
from rpcprops.outcomes import Violation


class Found:
    """What was found so far.

    Attributes:
        violations: the first of them is the promise that is told of.
        involved: the ranks that a hang may come from, those that wait for them among them.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.violations: list[Violation] = []
        self.involved: list[Channel] = []
        self._channels = channels

    def __bool__(self) -> bool:
        return bool(self.violations)

    def add(self, promise: str, message: str, rank: int, *, timing_sensitive: bool = False) -> None:
        """Add a violation."""
        self.violations.append(Violation(promise, message, rank, timing_sensitive=timing_sensitive))

    def raise_first(self) -> None:
        """Raise the first violation, with all of them in words, if there is any.

        Raises:
            BrokenPromise: its subclass for that promise; notes show what the ranks wrote.
        """
        __tracebackhide__ = True
        if not self.violations:
            return
        kind = getattr(errors, self.violations[0].promise)
        error = kind("\n".join(str(violation) for violation in self.violations))
        blamed = [self._channels[v.rank] for v in self.violations[:3] if v.rank is not None]
        others = [channel for channel in self.involved if channel not in blamed]
        for note in itertools.chain(
            *(channel.notes() for channel in blamed),
            *(channel.notes(lines=0) for channel in others[:2]),
        ):
            error.add_note(note)
        raise error
