"""Holds of a creation until the delete of its own fork, which comes only after the creation."""

from __future__ import annotations

from collections.abc import Sequence

from rpcprops.faults import MessageFault, MessageType
from rpcprops.oracle._messages import Disturbances, refused
from rpcprops.oracle.prediction import Send
from rpcprops.oracle.rrefs import RRef
from rpcprops.steps.base import CLEARLY_LATE


class OwnDeletes:
    """The creations of a program that are so held.

    Args:
        sends: the messages so far.
        rrefs: the RRefs so far.
    """

    def __init__(
        self, disturbed: Disturbances, sends: Sequence[Send], rrefs: Sequence[RRef]
    ) -> None:
        self.disturbed = disturbed
        self.sends = sends
        self.rrefs = rrefs
        #: The fork of each, by the fault that holds it.
        self._forks: dict[MessageFault, str] = {}

    def hold(self, at: int, message: MessageType, timeout: float) -> bool:
        """Note a creation that was just sent if it is held until the delete of its own fork.

        A user deletes its fork only once its creation has ended (``rref_context.cpp``:
        ``RRefContext::addPendingUser``, ``confirmPendingUser``). So the two wait for each other,
        and the creation ends by its timeout.

        Returns: whether it is.
        """
        if not message.endswith("_REMOTE_CALL"):
            return False
        sent = [send for send in self.sends if (send.rank, send.message) == (at, message)]
        rref = self.rrefs[-1]
        for fault in self.disturbed.late:
            until = fault.until
            to_it = (None, rref.owner)
            if (
                until is not None
                and (fault.rank, str(fault.message), fault.which, fault.n)
                == (at, str(message), "nth", len(sent))
                and (until.rank, str(until.message)) == (at, str(MessageType.RREF_USER_DELETE))
                and fault.to is None
                and until.to in to_it
                and rref.first
                and fault.delay >= timeout + CLEARLY_LATE
            ):
                self._forks[fault] = rref.first
                return True
        return False

    def check(self, last: Sequence[Send]) -> None:
        """Check that such a hold does wait for that delete, and not for another one.

        Raises:
            UsageError: it does not.
        """
        for fault, fork in self._forks.items():
            until = fault.until
            assert until is not None
            tries = [
                send.payload
                for send in (*self.sends, *last)
                for _ in range(send.failures + send.delivered)
                if (send.rank, str(send.message)) == (until.rank, str(until.message))
                and until.to in (None, send.to)
            ]
            if tries[until.n - 1 : until.n] != [fork]:
                why = "nobody can tell how long it is held"
                raise refused(fault, why)
