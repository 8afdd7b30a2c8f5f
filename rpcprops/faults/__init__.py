"""The faults that can be injected, as data: single faults, tables for ranks, plans for worlds.

Nothing here imports torch. All times are virtual seconds.
"""

from rpcprops.faults._fault import MAX_RANKS, Fault, Predicted, PredictedSend, fault_class, register
from rpcprops.faults._sends import (
    MAX_DELAY,
    SendDelay,
    SendFailure,
    checked_delay,
    delay_milliseconds,
)
from rpcprops.faults.message_types import (
    RETRYABLE_MESSAGE_TYPES,
    MessageType,
    message_type,
    retry_wait,
)
from rpcprops.faults.tables import (
    DEFAULT_MESSAGES_TO_DELAY,
    FaultPlan,
    FaultTable,
    retryable_tables,
)

__all__ = [
    "DEFAULT_MESSAGES_TO_DELAY",
    "MAX_DELAY",
    "MAX_RANKS",
    "RETRYABLE_MESSAGE_TYPES",
    "Fault",
    "FaultPlan",
    "FaultTable",
    "MessageType",
    "Predicted",
    "PredictedSend",
    "SendDelay",
    "SendFailure",
    "checked_delay",
    "delay_milliseconds",
    "fault_class",
    "message_type",
    "register",
    "retry_wait",
    "retryable_tables",
]
