"""RPC agents: what differs from one to another. Another agent is a class and :func:`register`.

What is said of an agent is data, and imports no torch; what makes its options does, where it runs.
"""

from rpcprops.agents._agent import Agent
from rpcprops.agents._registry import default_name, named, names, register
from rpcprops.agents.faulty_tensorpipe import FaultyTensorPipe
from rpcprops.agents.tensorpipe import TensorPipe

__all__ = [
    "Agent",
    "FaultyTensorPipe",
    "TensorPipe",
    "default_name",
    "named",
    "names",
    "register",
]
