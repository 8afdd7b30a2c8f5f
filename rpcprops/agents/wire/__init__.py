"""The agent WIRE: a ledger of every message, and faults on any of them.

It is written in C++ (``_agent.cpp``) and compiled against the installed torch when it is first
asked for. Importing this package imports no torch and compiles nothing.
"""

from rpcprops.agents.wire.ledger import Ledger, count_in, has_ended_in
from rpcprops.agents.wire.wire import NAME, Wire, library

__all__ = ["NAME", "Ledger", "Wire", "count_in", "has_ended_in", "library"]
