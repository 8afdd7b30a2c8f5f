"""PyTorch's own faulty-agent tests, unchanged, on our fixture and our ranks."""

from __future__ import annotations

import unittest
from typing import Any

import pytest

from rpcprops.fixture import FaultyRpcAgentTestFixture, for_this_rank
from rpcprops.pytest_plugin import ClusterFactory

# After our fixture, which undoes what torch.testing does to Hypothesis's profiles.
# isort: split
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed.rpc.dist_autograd_test import FaultyAgentDistAutogradTest
from torch.testing._internal.distributed.rpc.faulty_agent_rpc_test import FaultyAgentRpcTest
from torch.testing._internal.distributed.rpc.jit.rpc_test_faulty import JitFaultyAgentRpcTest

SUITES = (FaultyAgentRpcTest, FaultyAgentDistAutogradTest, JitFaultyAgentRpcTest)
IN_CI = (
    "FaultyAgentRpcTest::test_check_failed_messages",
    "FaultyAgentRpcTest::test_verify_backend_options",
    "FaultyAgentRpcTest::test_remote_message_dropped_pickle",
    "FaultyAgentRpcTest::test_rpc_builtin_timeout",
    "FaultyAgentDistAutogradTest::test_context_cleanup_tensor_with_grad",
    "JitFaultyAgentRpcTest::test_timeout_in_torchscript_function",
)


def _tests() -> list[str]:
    return [
        f"{suite.__name__}::{name}"
        for suite in SUITES
        for name in unittest.TestLoader().getTestCaseNames(suite)  # type: ignore[arg-type]
    ]


class _OurFixture(FaultyRpcAgentTestFixture):
    """Where these ranks meet is all that a class cannot know by itself."""

    @property
    def world_size(self) -> int:
        return for_this_rank().world_size

    @property
    def init_method(self) -> str:
        return for_this_rank().init_method


def _run(test: str) -> None:
    suite_name, name = test.split("::")
    suite = next(s for s in SUITES if s.__name__ == suite_name)
    cls: Any = type(suite_name, (suite, _OurFixture, TestCase), {})
    case = cls(name)
    case.rank = for_this_rank().rank
    case.file_name = for_this_rank().init_method.removeprefix("file://")
    getattr(case, name)()


def _check(rpc_cluster: ClusterFactory, test: str, clock: Any) -> None:
    # The tests shut RPC down themselves, with their own idea of leaks.
    options = {"world_size": 4, "init": False, "leaks": "allow", "clock": clock, "deadline": 120}
    with rpc_cluster(**options) as cluster:
        cluster.each(_run, test)


def test_the_suites_are_whole() -> None:
    """The wheel carries the 28 faulty-agent tests, and those that CI runs are among them."""
    assert len(_tests()) == 28
    assert set(IN_CI) <= set(_tests())


@pytest.mark.parametrize("test", IN_CI)
def test_runs_unchanged(test: str, rpc_cluster: ClusterFactory) -> None:
    """A faulty-agent test of PyTorch's passes with our fixture mixed in where torch's would be."""
    _check(rpc_cluster, test, clock=10)


@pytest.mark.nightly
@pytest.mark.parametrize("test", _tests())
def test_all_run_unchanged(test: str, rpc_cluster: ClusterFactory) -> None:
    """Every faulty-agent test of PyTorch's passes in real time with our fixture mixed in."""
    _check(rpc_cluster, test, clock="real")
