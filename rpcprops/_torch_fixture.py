"""Our fixture as a class of torch's, which its test suites are mixed with.

Importing this module imports PyTorch's test modules. :mod:`rpcprops.fixture` gives the class.
"""

from __future__ import annotations

from rpcprops._rank_fixture import FaultyAgentOptions
from rpcprops.torch_facts.symbols import RpcAgentTestFixture


class FaultyRpcAgentTestFixture(FaultyAgentOptions, RpcAgentTestFixture):
    """A drop-in for torch's fixture of the same name, see :class:`FaultyAgentOptions`."""
