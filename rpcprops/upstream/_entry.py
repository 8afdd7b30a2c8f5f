"""The functions that the test process calls in a rank. Imports no torch: they travel by name."""

from __future__ import annotations

from rpcprops.upstream.data import RankVerdict, UpstreamTest


def list_tests() -> list[UpstreamTest]:
    """Every test of PyTorch's RPC suites in this torch, in torch's order."""
    from rpcprops.upstream import _rank_side

    return _rank_side.list_tests()


def run_test(suite: str, name: str, file_name: str) -> RankVerdict:
    """Run a test of a suite in this rank.

    Args:
        file_name: the file by which the ranks find each other, the same for all of them.
    """
    from rpcprops.upstream import _rank_side

    return _rank_side.run_test(suite, name, file_name)
