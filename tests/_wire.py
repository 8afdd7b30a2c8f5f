"""Tests that need the agent WIRE: compiled already, or with a compiler for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rpcprops.agents.wire import build
from rpcprops.cluster import ClusterServer

needs_wire = pytest.mark.skipif(
    build.compiler() is None and not build.library_path().is_file(), reason="no C++ compiler"
)


@contextmanager
def own_worlds(server: ClusterServer) -> Iterator[None]:
    """The worlds that a server keeps for later programs are those of this block alone."""
    server.servers.kept.close()
    yield
    server.servers.kept.close()
