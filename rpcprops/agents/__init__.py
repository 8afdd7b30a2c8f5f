"""RPC agents: what differs between them. A new agent is a class and a call of :func:`register`.

The description of an agent is data, and imports no torch. Its options are made where torch runs.
"""

from rpcprops.agents._agent import Agent, Progress, lines_by, show_progress_by, to_stderr
from rpcprops.agents._registry import default_name, named, names, register
from rpcprops.agents.faulty_tensorpipe import FaultyTensorPipe
from rpcprops.agents.tensorpipe import TensorPipe
from rpcprops.agents.wire import Wire

__all__ = [
    "Agent",
    "FaultyTensorPipe",
    "Progress",
    "TensorPipe",
    "Wire",
    "default_name",
    "lines_by",
    "named",
    "names",
    "register",
    "show_progress_by",
    "to_stderr",
]
