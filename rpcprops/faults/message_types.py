"""The message types that torch's faulty agent can fail or delay, and how torch retries them.

Sources: the ten names are ``FaultyTensorPipeAgent::messageStringToType``, the retry budgets
``RpcRetryOptions`` (5 retries, backoff 1.5) and ``kNumCleanupContextRetries`` (20) in torch's C++.
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
