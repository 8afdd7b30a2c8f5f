"""How the ranks of a program end: the way in which each shuts RPC down, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from rpcprops._given import argument, items
from rpcprops.errors import UsageError
from rpcprops.steps.in_rank.constants import SHUTDOWN_TIMEOUTS

#: A graceful shutdown; one with a timeout that nothing reaches; one with a timeout that is reached
#: where a rank comes late; a graceful one, and a second call, which torch must refuse (``api.py``:
#: _require_initialized); a shutdown that waits for nobody.
#:
#: A timeout that is reached raises nothing. ``api.py``: _all_gather waits for ``proceed_signal``,
#: does not look at what comes of that, and goes on: the first rank tells the others to proceed, and
#: a late one finds that. Then TensorPipeAgent::join, which ignores its timeout, waits for all in
#: the store (``tensorpipe_agent.cpp``). So nothing is to differ, and no RRef is to be left, if the
#: late rank deletes what it holds before owners give it up (``rref_context.cpp``:
#: RRefContext::delAllUsersAndUnforkedOwners), which they begin to wait for at their timeout. But
#: the calls of _all_gather have the same timeout, and where one of them misses it that rank raises
#: and the others wait for it: nothing is predicted where faults may do that.
Shutdown = Literal["graceful", "timeout", "timed out", "twice", "at once"]
SHUTDOWNS: tuple[Shutdown, ...] = get_args(Shutdown)
#: Virtual seconds: the longest that a rank may wait before its shutdown.
_LONGEST = 1000.0
#: Virtual seconds: the longest that a rank may come late, with all its deletes, where the timeout
#: of the shutdown is reached, so that these come long before owners give up, also if torch must
#: try them again.
_LATEST = 90.0
#: The most RRefs that a step makes.
_RREFS = 3
#: More ranks than a world has.
_MOST = 17


@dataclass(frozen=True, slots=True)
class End:
    """The end of a program, by ``rpc.shutdown`` at each rank.

    Attributes:
        how: the way, the same at all ranks.
        waits: virtual seconds that ranks wait before they shut down, by rank; others wait for none.
        ignores_leaks: whether an owner that shuts down "at once" only logs that RRefs are left, as
            torch has it by default (``api.py``: _ignore_rref_leak), instead of raising. Only then
            does it go on to forget them (``rref_context.cpp``: RRefContext::destroyInstance).

    Raises:
        UsageError: there is no such way; or `waits` is no tuple of up to 16 numbers from 0 to 1000;
            or a rank comes so late that owners may have given it up; or `ignores_leaks` is no
            bool, or leaks are ignored by a graceful shutdown.
    """

    how: Shutdown = "graceful"
    waits: tuple[float, ...] = ()
    ignores_leaks: bool = False

    def __post_init__(self) -> None:
        if self.how not in SHUTDOWNS:
            msg = f"{argument('how', self.how)} must be one of {', '.join(map(repr, SHUTDOWNS))}."
            raise UsageError(msg)
        must_be = f"a tuple of virtual seconds from 0 to {_LONGEST:g}, one for each of some ranks"
        given: tuple[Any, ...] = tuple(items("waits", self.waits, _MOST, must_be))
        if len(given) >= _MOST or not all(map(_is_wait, given)):
            msg = f"{argument('waits', self.waits)} must be {must_be}."
            raise UsageError(msg)
        object.__setattr__(self, "waits", tuple(float(wait) for wait in given))
        ignores: object = self.ignores_leaks
        if not isinstance(ignores, bool):
            msg = f"{argument('ignores_leaks', ignores)} must be True or False."
            raise UsageError(msg)
        if self.ignores_leaks and self.how != "at once":
            msg = f"ignores_leaks=True needs how='at once', not {self.how!r}."
            raise UsageError(msg)
        if self.timeout is not None and self.lasts > _LATEST:
            msg = (
                f"{argument('waits', self.waits)} must be at most {_LATEST:g} where "
                f"how={self.how!r}: owners give up the RRefs of a rank that comes later."
            )
            raise UsageError(msg)

    @property
    def timeout(self) -> float | None:
        """The timeout of each shutdown, in virtual seconds, if that may be reached."""
        return SHUTDOWN_TIMEOUTS[self.how] if self.how == "timed out" else None

    def is_in_time(self, call: float, delete: float, steps: int) -> bool:
        """Whether nothing misses that timeout which must not.

        Args:
            call: for how long each call of a shutdown is delayed, in virtual seconds.
            delete: the same for each delete of an RRef, one after the other.
            steps: of how many steps the RRefs may be.
        """
        if self.timeout is None:
            return True
        return 2 * call <= self.timeout and self.lasts + delete * steps * _RREFS <= _LATEST

    @property
    def lasts(self) -> float:
        """Virtual seconds until its last rank begins to shut down."""
        return max(self.waits, default=0.0)

    def wait_of(self, rank: int) -> float:
        """Virtual seconds that a rank waits before it shuts down."""
        return self.waits[rank] if rank < len(self.waits) else 0.0

    def __repr__(self) -> str:
        given = [] if self.how == "graceful" else [repr(self.how)]
        if self.waits:
            given.append(f"waits={self.waits!r}")
        if self.ignores_leaks:
            given.append("ignores_leaks=True")
        return f"End({', '.join(given)})"


def _is_wait(wait: object) -> bool:
    is_number = isinstance(wait, int | float) and not isinstance(wait, bool)
    return is_number and 0 <= wait <= _LONGEST  # type: ignore[operator]


#: How programs end unless they say otherwise.
USUAL = End()
