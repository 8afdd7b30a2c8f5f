"""The types of message that torch sends: the ten of its faulty agent, and all; how it retries them.

Sources: the ten names are ``FaultyTensorPipeAgent::messageStringToType``, the retry budgets
``RpcRetryOptions`` (5 retries, backoff 1.5) and ``kNumCleanupContextRetries`` (20) in torch's C++.
All names, and which are requests, are ``MessageType`` in ``message.h``.
"""

from __future__ import annotations

import enum

from rpcprops._given import counted, shown
from rpcprops.errors import UsageError

_MAX_RETRIES = 1000


class MessageType(enum.StrEnum):
    """The ten message types that torch's faulty agent can fail or delay, by torch's own names."""

    CLEANUP_AUTOGRAD_CONTEXT_REQ = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
    RREF_CHILD_ACCEPT = "RREF_CHILD_ACCEPT"
    RREF_FORK_REQUEST = "RREF_FORK_REQUEST"
    RREF_USER_DELETE = "RREF_USER_DELETE"
    PYTHON_CALL = "PYTHON_CALL"
    PYTHON_REMOTE_CALL = "PYTHON_REMOTE_CALL"
    PYTHON_RREF_FETCH_CALL = "PYTHON_RREF_FETCH_CALL"
    SCRIPT_CALL = "SCRIPT_CALL"
    SCRIPT_REMOTE_CALL = "SCRIPT_REMOTE_CALL"
    SCRIPT_RREF_FETCH_CALL = "SCRIPT_RREF_FETCH_CALL"

    def __repr__(self) -> str:
        return f"MessageType.{self.name}"

    @property
    def max_retries(self) -> int:
        """How many times torch sends again after a failed send (0: it never retries)."""
        if self is MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
            return 20
        return 5 if self.name.startswith("RREF_") else 0

    @property
    def is_retryable(self) -> bool:
        """Whether torch sends this type again when a send fails."""
        return self.max_retries > 0


class WireMessageType(enum.StrEnum):
    """All 26 types of message that torch sends, by its own names (``message.h``, without UNKNOWN).

    Ten of them are in :class:`MessageType` too: those that torch's faulty agent can fail or delay.
    Equal names are equal: ``WireMessageType.PYTHON_CALL == MessageType.PYTHON_CALL``.
    """

    SCRIPT_CALL = "SCRIPT_CALL"
    SCRIPT_RET = "SCRIPT_RET"
    PYTHON_CALL = "PYTHON_CALL"
    PYTHON_RET = "PYTHON_RET"
    SCRIPT_REMOTE_CALL = "SCRIPT_REMOTE_CALL"
    PYTHON_REMOTE_CALL = "PYTHON_REMOTE_CALL"
    REMOTE_RET = "REMOTE_RET"
    SCRIPT_RREF_FETCH_CALL = "SCRIPT_RREF_FETCH_CALL"
    PYTHON_RREF_FETCH_CALL = "PYTHON_RREF_FETCH_CALL"
    SCRIPT_RREF_FETCH_RET = "SCRIPT_RREF_FETCH_RET"
    PYTHON_RREF_FETCH_RET = "PYTHON_RREF_FETCH_RET"
    RREF_USER_DELETE = "RREF_USER_DELETE"
    RREF_FORK_REQUEST = "RREF_FORK_REQUEST"
    RREF_CHILD_ACCEPT = "RREF_CHILD_ACCEPT"
    RREF_ACK = "RREF_ACK"
    FORWARD_AUTOGRAD_REQ = "FORWARD_AUTOGRAD_REQ"
    FORWARD_AUTOGRAD_RESP = "FORWARD_AUTOGRAD_RESP"
    BACKWARD_AUTOGRAD_REQ = "BACKWARD_AUTOGRAD_REQ"
    BACKWARD_AUTOGRAD_RESP = "BACKWARD_AUTOGRAD_RESP"
    CLEANUP_AUTOGRAD_CONTEXT_REQ = "CLEANUP_AUTOGRAD_CONTEXT_REQ"
    CLEANUP_AUTOGRAD_CONTEXT_RESP = "CLEANUP_AUTOGRAD_CONTEXT_RESP"
    RUN_WITH_PROFILING_REQ = "RUN_WITH_PROFILING_REQ"
    RUN_WITH_PROFILING_RESP = "RUN_WITH_PROFILING_RESP"
    RREF_BACKWARD_REQ = "RREF_BACKWARD_REQ"
    RREF_BACKWARD_RESP = "RREF_BACKWARD_RESP"
    EXCEPTION = "EXCEPTION"

    def __repr__(self) -> str:
        return f"WireMessageType.{self.name}"

    @property
    def is_request(self) -> bool:
        """Whether it is a request; if not, it answers one (the flags in ``message.h``)."""
        return self in _ANSWERS

    @property
    def answer(self) -> WireMessageType | None:
        """The type that answers this request, unless an EXCEPTION does; None of a response."""
        return _ANSWERS.get(self)

    @property
    def max_retries(self) -> int:
        """How many times torch sends again after any error, a timeout included (0: never)."""
        return MessageType(self).max_retries if self in MessageType.__members__ else 0

    @property
    def is_retryable(self) -> bool:
        """Whether torch sends this type again when it gets an error instead of an answer."""
        return self.max_retries > 0


#: Requests and their answers: ``RequestCallbackNoPython::processRpc``
#: (request_callback_no_python.cpp) and the same functions in request_callback_impl.cpp.
_ANSWERS = {
    WireMessageType.SCRIPT_CALL: WireMessageType.SCRIPT_RET,
    WireMessageType.PYTHON_CALL: WireMessageType.PYTHON_RET,
    WireMessageType.SCRIPT_REMOTE_CALL: WireMessageType.REMOTE_RET,
    WireMessageType.PYTHON_REMOTE_CALL: WireMessageType.REMOTE_RET,
    WireMessageType.SCRIPT_RREF_FETCH_CALL: WireMessageType.SCRIPT_RREF_FETCH_RET,
    WireMessageType.PYTHON_RREF_FETCH_CALL: WireMessageType.PYTHON_RREF_FETCH_RET,
    WireMessageType.RREF_USER_DELETE: WireMessageType.RREF_ACK,
    WireMessageType.RREF_FORK_REQUEST: WireMessageType.RREF_ACK,
    WireMessageType.RREF_CHILD_ACCEPT: WireMessageType.RREF_ACK,
    WireMessageType.FORWARD_AUTOGRAD_REQ: WireMessageType.FORWARD_AUTOGRAD_RESP,
    WireMessageType.BACKWARD_AUTOGRAD_REQ: WireMessageType.BACKWARD_AUTOGRAD_RESP,
    WireMessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ: WireMessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP,
    WireMessageType.RUN_WITH_PROFILING_REQ: WireMessageType.RUN_WITH_PROFILING_RESP,
    WireMessageType.RREF_BACKWARD_REQ: WireMessageType.RREF_BACKWARD_RESP,
}


#: The four types that torch retries; failing them at most ``max_retries`` times changes nothing.
RETRYABLE_MESSAGE_TYPES: tuple[MessageType, ...] = tuple(m for m in MessageType if m.is_retryable)


def retry_wait(failures: int) -> float:
    """Virtual seconds that torch waits in total before the send after `failures` failed ones.

    The waits are 1, 1, 1.5, 2.25, 3.375, … s: ``computeNewRpcRetryTime`` uses the count before
    incrementing it, so the first two are equal.

    Raises:
        UsageError: `failures` is no int from 0 to 1000 (torch retries at most 20 times).
    """
    counted("failures", failures, _MAX_RETRIES)
    return sum(1.5 ** max(0, n - 1) for n in range(failures))


def message_type(value: object) -> MessageType:
    """The message type that `value` names.

    Raises:
        UsageError: it is not one of torch's message types that can be failed or delayed.
    """
    if isinstance(value, str):
        try:
            return MessageType(value)
        except ValueError:
            pass
        hint = ""
        if value.upper() in MessageType.__members__:
            hint = f" Did you mean {value.upper()!r}? Names are in upper case."
        msg = (
            f"message type {shown(value)} cannot be failed or delayed by torch's agent.{hint} "
            f"It knows: {', '.join(MessageType)}."
        )
    else:
        msg = (
            f"a message type must be a rpcprops.MessageType or its name, "
            f"got {shown(value)} (type {type(value).__name__})."
        )
    raise UsageError(msg)


def wire_message_type(value: object, *, way: str | None = None) -> WireMessageType:
    """The type of message that `value` names, of all that torch sends.

    Args:
        way: "request" or "response", if the caller takes only these: the error names no others.

    Raises:
        UsageError: torch sends no such message.
    """
    if isinstance(value, str):
        try:
            return WireMessageType(value)
        except ValueError:
            pass
        hint = ""
        if value.upper() in WireMessageType.__members__:
            hint = f" Did you mean {value.upper()!r}? Names are in upper case."
        names = ", ".join(
            one
            for one in WireMessageType
            if way in (None, "request" if one.is_request else "response")
        )
        what = "It sends" if way is None else f"As a {way} it sends"
        msg = f"torch sends no message of type {shown(value)}.{hint} {what}: {names}."
    else:
        msg = (
            f"a message type must be a rpcprops.faults.WireMessageType or its name, "
            f"got {shown(value)} (type {type(value).__name__})."
        )
    raise UsageError(msg)
