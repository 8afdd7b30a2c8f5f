"""What a process of ours wrote, kept in memory: no file outlives it, and a kill loses nothing."""

from __future__ import annotations

import os
import re

#: What torch's retry callback logs at INFO for each failed send of a retryable message.
_FAILED_SEND = re.compile(rb"\] Send try \d+ failed$", re.MULTILINE)
#: What the judge looks for in a log, kept however long that is.
_TELLING = re.compile(
    rb"^.*(?:Leaking RRef|Detected RRef Leaks|Could not release Dist Autograd Context"
    rb"|INTERNAL ASSERT FAILED|Timed out waiting for pending|terminate called).*$",
    re.MULTILINE,
)
_KEPT = 64 << 10


class RankLog:
    """A memory file that stands in for a process's stdout and stderr."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name)
        self._final: bytes | None = None

    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self.fd).st_size if self._final is None else len(self._final)

    def read(self, start: int = 0) -> bytes:
        """Everything from `start` on. Does not move the writer's position."""
        if self._final is not None:
            return self._final[start:]
        return os.pread(self.fd, max(0, self.size() - start), start)

    def text(self) -> str:
        """The last 64 KiB, as text, after the lines before them that tell of an error of torch."""
        start = max(0, self.size() - _KEPT)
        told = [line.decode("utf-8", "replace") for line in _TELLING.findall(self.read()[:start])]
        return "\n".join([*told, self.text_from(start)])

    def text_from(self, start: int) -> str:
        """Everything from `start` on, as text."""
        return self.read(start).decode("utf-8", "replace")

    def failed_sends(self) -> int:
        """How many injected failures of retryable messages torch has logged."""
        return len(_FAILED_SEND.findall(self.read()))

    def close(self) -> None:
        """Let go of the descriptor; what was written stays readable."""
        if self._final is None:
            self._final = self.read()
            os.close(self.fd)
