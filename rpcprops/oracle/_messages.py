"""What faults of single messages do to a program, as far as that is predicted.

*Late messages* change nothing that torch promises: it assumes no order of messages between two
ranks (docs/source/rpc/rref.md, Assumptions), and waits for the answer of each request. What is
predicted without the fault must come, unless a wait of torch's is shorter than what is late:

* the timeout of a call (``tensorpipe_agent.cpp``: ``TensorPipeAgent::send``), or the program's;
* the 100 s for which a shutdown waits for accepts and deletes
  (``rref_context.cpp``: ``RRefContext::delAllUsersAndUnforkedOwners``).

Where one of these may end first, the program is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, MessageFault, MessageType, NthMessage
from rpcprops.oracle.prediction import Prediction, Send
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.programs import Leaf, Program
from rpcprops.steps.base import CLEARLY_IN_TIME

_LATE = ("delay", "hold")
#: The most messages of which each waits for the one before: a function that fetches an argument
#: which another user sent needs eight, with their answers.
_IN_A_ROW = 8
#: What a shutdown does not wait for: a function that ``remote`` started, and what it fetches.
_NOT_AWAITED = tuple(m for m in MessageType if m.endswith(("_REMOTE_CALL", "_FETCH_CALL")))


class Disturbances:
    """The message faults of a plan, as the model of one program meets them.

    Attributes:
        faults: those that act on messages, in the order of the plan.
    """

    def __init__(self, plan: FaultPlan) -> None:
        self.faults = tuple(one for one in plan.others if isinstance(one, MessageFault))
        self.late = tuple(one for one in self.faults if one.action in _LATE)

    def __bool__(self) -> bool:
        return bool(self.faults)

    @property
    def seconds(self) -> float:
        """Virtual seconds by which an answer may come later because of them all."""
        return sum(one.delay * _times(one) for one in self.late)

    def may_be_late(self, rank: int, message: MessageType) -> bool:
        """Whether such messages of a rank may be late."""
        return any(one.rank == rank and message in one.targets for one in self.late)

    def check(self, program: Program) -> None:
        """Raises:
        UsageError: the oracle does not predict what the program shows under these faults.
        """
        for fault in self.faults:
            if fault.action not in _LATE:
                raise refused(fault)
        for leaf in program.leaves if self.faults else ():
            if leaf.op in _OTHER_AGENTS:
                raise refused(self.faults[0], f"{leaf!r} ends the agent that counts the messages")

    def check_shutdown(self, prediction: Prediction, *, settles: bool) -> None:
        """Check that no accept and no delete is so late that a shutdown gives up waiting for it.

        Raises:
            UsageError: one may be.
        """
        if settles:
            deletes = [f.delay for f in self.late if MessageType.RREF_USER_DELETE in f.targets]
            longest = max(deletes, default=0.0)
        else:
            waited = [f for f in self.late if not _ends_in_shutdown(f, prediction)]
            longest = sum(one.delay * _times(one) for one in waited)
        if longest + CLEARLY_IN_TIME / 2 > OWNER_WAITS:
            why = (
                f"messages may be {longest:g} s (virtual) late, and a shutdown waits for "
                f"{OWNER_WAITS:g} s; let it be {OWNER_WAITS - CLEARLY_IN_TIME / 2:g} s at most"
            )
            raise refused(self.late[0], why)


#: Steps after which ranks have another agent, which counts its messages anew.
_OTHER_AGENTS = frozenset({"rejoin"})


def refused(fault: MessageFault, why: str = "") -> UsageError:
    """The error that says that nothing is predicted under a fault, and why."""
    because = f" ({why})" if why else ""
    msg = (
        f"the oracle does not predict what a program shows under {fault.name}{because}; take it "
        f"out of the plan's others, or run functions of your own under it with rpc_cluster, which "
        f"judges what ranks hold and how they exit."
    )
    return UsageError(msg)


def timeout_may_come(step: Leaf, late: float) -> UsageError:
    """The error that says that late messages may meet a timeout of a step."""
    msg = (
        f"{step!r}: its messages, and those of what it calls, may be {late:g} s (virtual) late "
        f"under the plan's message faults, and a timeout may end it first; let the timeout be "
        f"{CLEARLY_IN_TIME:g} s above that, or None."
    )
    return UsageError(msg)


def _times(fault: MessageFault) -> int:
    """How many messages of a row it makes late."""
    return {"nth": 1, "first": min(fault.n, _IN_A_ROW), "every": _IN_A_ROW}[fault.which]


def _ends_in_shutdown(fault: MessageFault, prediction: Prediction) -> bool:
    """Whether it holds what a shutdown does not wait for, until a delete that the shutdown sends.

    That delete comes whether or not the held message does (``RRefContext::
    delAllUsersAndUnforkedOwners``), so the message is not held for long. A torch that has the
    finding so deletes what functions that still run have as arguments, too.
    """
    until = fault.until
    if until is None or until.message != MessageType.RREF_USER_DELETE or until.to is not None:
        return False
    before = _tries(until, prediction.sends)
    last = before + _tries(until, prediction.last_sends)
    early = "shutdown-deletes-argument" in prediction.known_bugs
    is_last = until.n <= last and (early or before < until.n)
    return is_last and set(fault.may_be) <= set(_NOT_AWAITED)


def _tries(one: NthMessage, sends: Sequence[Send]) -> int:
    """How often such a message is sent, tries that fail included."""
    mine = [send for send in sends if send.rank == one.rank and send.message == one.message]
    return sum(send.failures + send.delivered for send in mine)
