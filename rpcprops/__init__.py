"""Property tests for torch.distributed.rpc under sampled faults, on real ranks."""

from rpcprops._scripts import load_script
from rpcprops.cluster import Cluster, ClusterServer, RpcCluster
from rpcprops.faults import (
    DEFAULT_MESSAGES_TO_DELAY,
    RETRYABLE_MESSAGE_TYPES,
    FaultPlan,
    FaultTable,
    MessageFault,
    MessageType,
    NthMessage,
)
from rpcprops.oracle import judge
from rpcprops.outcomes import Counters, Outcome, Violation
from rpcprops.programs import Program
from rpcprops.runner import run

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MESSAGES_TO_DELAY",
    "RETRYABLE_MESSAGE_TYPES",
    "Cluster",
    "ClusterServer",
    "Counters",
    "FaultPlan",
    "FaultTable",
    "MessageFault",
    "MessageType",
    "NthMessage",
    "Outcome",
    "Program",
    "RpcCluster",
    "Violation",
    "judge",
    "load_script",
    "run",
]
