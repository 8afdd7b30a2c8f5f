"""The faults that can be injected, as data: single faults, tables for ranks, plans for worlds.

Nothing here imports torch. All times are virtual seconds.
"""

from rpcprops.faults._fault import MAX_RANKS, Fault, Predicted, PredictedSend, fault_class, register
from rpcprops.faults._messages import (
    CUT_OFF,
    MESSAGE_ACTIONS,
    MessageAction,
    MessageFault,
    NthMessage,
    acted_on,
    agent_faults,
)
from rpcprops.faults._points import pairs, points, reversal
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
    WireMessageType,
    message_type,
    retry_wait,
    wire_message_type,
)
from rpcprops.faults.tables import (
    DEFAULT_MESSAGES_TO_DELAY,
    FaultPlan,
    FaultTable,
    retryable_tables,
)

__all__ = [
    "CUT_OFF",
    "DEFAULT_MESSAGES_TO_DELAY",
    "MAX_DELAY",
    "MAX_RANKS",
    "MESSAGE_ACTIONS",
    "RETRYABLE_MESSAGE_TYPES",
    "Fault",
    "FaultPlan",
    "FaultTable",
    "MessageAction",
    "MessageFault",
    "MessageType",
    "NthMessage",
    "Predicted",
    "PredictedSend",
    "SendDelay",
    "SendFailure",
    "WireMessageType",
    "acted_on",
    "agent_faults",
    "checked_delay",
    "delay_milliseconds",
    "fault_class",
    "message_type",
    "pairs",
    "points",
    "register",
    "retry_wait",
    "retryable_tables",
    "reversal",
    "wire_message_type",
]
