"""Functions that read the value of an RRef, and for which no step has waited yet."""

from __future__ import annotations

from rpcprops.errors import UsageError
from rpcprops.oracle._now import Now
from rpcprops.oracle.rrefs import RRef


class Readers:
    """Such functions since the last settle.

    Attributes:
        reading: the RRefs that they read, each with the RRef whose value the function makes, or the
            name of its future.
    """

    def __init__(self, now: Now) -> None:
        self.now = now
        self.reading: list[tuple[RRef, RRef | str]] = []

    def add(self, rref: RRef, by: RRef | str) -> None:
        """A function reads a value, and its caller goes on; it makes an RRef, or ends a future."""
        self.reading.append((rref, by))

    def end(self, future: str) -> None:
        """A step has waited for that future."""
        for rref in [read for read, by in self.reading if by == future]:
            rref.is_made()
        self.reading = [one for one in self.reading if one[1] != future]

    def known_made(self, rref: RRef) -> bool:
        """Whether a step has waited for a value, or for another one that was made of it."""
        if rref.made:
            return True
        others = [by for read, by in self.reading if read is rref and not isinstance(by, str)]
        return any(map(self.known_made, others))

    def may_wait_for_own(self) -> bool:
        """Whether a function may still wait for an RRef of its own rank, got before its value."""
        return any(
            not isinstance(by, str)
            and by.owner == read.owner
            and not self.known_made(by)
            and not self.known_made(read)
            for read, by in self.reading
        )

    def check_none(self, rref: RRef) -> None:
        """Check that no function may still read the value of an RRef, which this step changes.

        An owner handles each request in another thread (``tensorpipe_agent.cpp``:
        ``TensorPipeAgent::respond``), so nobody knows which comes first.

        Raises:
            UsageError: one may.
        """
        if any(read is rref and (isinstance(by, str) or not by.made) for read, by in self.reading):
            msg = (
                f"{self.now.step!r}: a function that an earlier step has started may still read "
                "the value that it changes; put a Settle() before it, or a Fetch or a Wait of what "
                "that step makes."
            )
            raise UsageError(msg)
