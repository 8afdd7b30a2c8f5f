"""RRefs and handles, as the oracle's model keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field

from rpcprops.oracle.prediction import ErrorClass
from rpcprops.outcomes import UNLIMITED_SLACK


@dataclass(slots=True)
class RRef:
    """A value at its owner.

    Attributes:
        forks: the users' forks that the owner knows, including those that nobody will ever delete.
        error: how using the value fails: "remote" if the function that makes it raised.
        made: whether its creation has certainly reached the owner.
        takes: virtual seconds by which faults may still delay the function that makes it.
        fetches: whether that function fetches an RRef that another rank sent to it.
        slow: whether that function sleeps, and perhaps still does.
        first: the fork of the user that created it, which the owner learns of when the function
            has returned.
        early: whether the owner got a handle of it before that.
        absent: whether its creation was lost, so that the owner never has it.
        thinned: whether a fork of another user was deleted before that.
        unclear: whether nobody can tell whether a change of its value has been made.
        unsendable: whether its owner answers a fetch with an EXCEPTION.
    """

    owner: int
    value: list[float]
    typed: bool
    forks: set[str] = field(default_factory=set)
    error: ErrorClass = ""
    made: bool = True
    takes: float = 0.0
    fetches: bool = False
    slow: bool = False
    first: str = ""
    early: bool = False
    absent: bool = False
    thinned: bool = False
    unclear: bool = False
    unsendable: bool = False

    def is_made(self) -> None:
        """Note that somebody has waited for its value, or for the error of its function."""
        self.made = True
        self.slow = False
        self.takes = 0.0


@dataclass(slots=True)
class Handle:
    """An RRef object at a rank.

    Attributes:
        fork: empty if the handle is the owner's own.
        broken: the error of a use, if ``remote`` failed and its user knows that.
        timed_out: whether the creation was sent late, so that a delete may arrive before it.
        unmarked: whether the creation times out, and torch may not have marked the RRef yet.
        marked_before: virtual seconds by which that timeout comes before the value is made.
        unaccepted: whether a child that it sent will never be accepted.
        of_owner: whether the owner itself sent it.
        confirmed: whether the owner certainly knows of it, and its rank of that.
        type_error: None before the type was asked for, then "" or the class of the error.
        second: whether a creation of its rank had failed before its own did.
        unanswered: whether its creation was, and only the answer to that is lost.
        beside: handles without a name, which are dropped with it.
    """

    rref: RRef
    rank: int
    fork: str = ""
    broken: ErrorClass = ""
    timed_out: bool = False
    unmarked: bool = False
    marked_before: float = UNLIMITED_SLACK
    unaccepted: bool = False
    of_owner: bool = False
    confirmed: bool = False
    type_error: ErrorClass | None = None
    second: bool = False
    unanswered: bool = False
    beside: tuple[Handle, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether its creation was lost, so that its owner never gets the RRef."""
        return bool(self.broken) and not self.timed_out
