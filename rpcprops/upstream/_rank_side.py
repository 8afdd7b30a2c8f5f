"""PyTorch's own RPC suites as they run in a rank: torch's classes, with our fixture mixed in.

The classes are made by torch's ``rpc_utils.generate_tests``, as in PyTorch's own test files. In
each process that it spawns, torch's harness (``MultiProcessTestCase.run_test`` in
``torch.testing._internal.common_distributed``) sets the seed, calls the test, handles skips, ends
the process group and then the process. Here a forked rank does the same.
"""

from __future__ import annotations

import traceback
import unittest
import warnings
from typing import Any

import torch.distributed as c10d

from rpcprops import agents
from rpcprops.agents import TensorPipe, tensorpipe
from rpcprops.faults import FaultTable
from rpcprops.fixture import FaultyRpcAgentTestFixture, for_this_rank
from rpcprops.torch_facts import symbols
from rpcprops.upstream import _rules
from rpcprops.upstream.data import Agent, RankVerdict, UpstreamTest

if any(action == "error" for action, *_ in warnings.filters):
    # The user's warning filters (PYTHONWARNINGS=error) are for the user's code. torch.testing
    # cannot even be imported under them, and this process runs only PyTorch's code and ours.
    warnings.resetwarnings()

rpc_utils = symbols.rpc_utils

_CUDA = "needs CUDA devices, and these ranks have none: they run the faulty agent, on the CPU"


class _OfRank(FaultyRpcAgentTestFixture):
    """Our fixture; in ranks for which another agent was chosen, that agent stands in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank = for_this_rank()
        if rank.agent_name != agents.default_name():
            self.agent_name = rank.agent_name
            self.further_options = rank.further_options


class _PlainAgent(_OfRank):
    """Our fixture for suites that PyTorch runs on its plain agent.

    For them torch's own fixture accepts any error of a call to a rank that is gone.
    """

    def get_shutdown_error_regex(self) -> Any:
        """Any error."""
        return ".*"


class _Sampled(_PlainAgent):
    """Our fixture with the table of this rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault_table = for_this_rank().fault_table


class _TensorPipe(_PlainAgent):
    """Our fixture for suites of the plain agent, some about options that the faulty one refuses."""

    agent_name = tensorpipe.NAME

    @property
    def rpc_backend_options(self) -> Any:
        """Options of the plain agent or the one that stands in, new on each access.

        They have torch's defaults, as in PyTorch's fixture.
        """
        return self.agent.options(
            FaultTable(), init_method=self.init_method, **self.further_options
        )


_SUITES: tuple[tuple[Agent, type[FaultyRpcAgentTestFixture], list[Any]], ...] = (
    ("generic", _Sampled, rpc_utils.GENERIC_TESTS),
    ("tensorpipe", _TensorPipe, rpc_utils.TENSORPIPE_TESTS),
    ("faulty", _OfRank, rpc_utils.FAULTY_AGENT_TESTS),
)
_PREFIX = "Upstream"
_CLASSES: dict[str, tuple[Agent, Any]] = {}
for _agent, _mixin, _suites in _SUITES:
    _generated = rpc_utils.generate_tests(_PREFIX, _mixin, _suites, __name__)
    # pickle looks here if a test sends one of its methods.
    globals().update(_generated)
    for _name, _class in _generated.items():
        _CLASSES[_name.removeprefix(_PREFIX)] = (_agent, _class)


def _test_names(cls: Any) -> list[str]:
    return list(unittest.TestLoader().getTestCaseNames(cls))


def list_tests() -> list[UpstreamTest]:
    """Every test of PyTorch's RPC suites in this torch, those that need CUDA last."""
    found = [
        _described(suite, name, agent, cls)
        for suite, (agent, cls) in _CLASSES.items()
        for name in _test_names(cls)
    ]
    cuda: list[Any] = [*rpc_utils.GENERIC_CUDA_TESTS, *rpc_utils.TENSORPIPE_CUDA_TESTS]
    found += [
        UpstreamTest(
            cls.__name__,
            name,
            "cuda",
            0,
            real_time=_rules.asserts_wall_clock(cls, name),
            not_applicable=_CUDA,
        )
        for cls in cuda
        for name in _test_names(cls)
    ]
    return found


def _described(suite: str, name: str, agent: Agent, cls: Any) -> UpstreamTest:
    asks_for, asks_because = _rules.asks_for_agent(cls, name)
    return UpstreamTest(
        suite,
        name,
        agent,
        int(cls(name).world_size),
        real_time=_rules.asserts_wall_clock(cls, name),
        no_delays=_rules.has_timeouts(cls, name),
        no_faults=_rules.means_nothing_under_faults(agent, cls, name),
        asks_for=asks_for,
        asks_because=asks_because,
    )


def run_test(suite: str, name: str, file_name: str) -> RankVerdict:
    """Run one test in this rank; never raises.

    Args:
        file_name: the file by which the ranks find each other.
    """
    _, cls = _CLASSES[suite]
    case = cls(name)
    if case.agent_name == tensorpipe.NAME:
        # Tests of its suites pass members of `rpc.BackendType`.
        TensorPipe().undo_registrations()
    case.rank = for_this_rank().rank
    case.file_name = file_name
    symbols.set_rng_seed()
    return _run(case, name)


def _run(case: Any, name: str) -> RankVerdict:
    if getattr(case, "__unittest_skip__", False):
        return RankVerdict("skipped", case.__unittest_skip_why__)
    try:
        getattr(case, name)()
    except unittest.SkipTest as skip:
        return RankVerdict("skipped", str(skip))
    except SystemExit as left:
        return _left(left.code)
    except BaseException:
        return RankVerdict("failed", traceback.format_exc())
    try:
        c10d.destroy_process_group()
    except (AssertionError, ValueError):
        # There is no process group, or the test has ended it.
        pass
    except Exception:
        return RankVerdict("failed", traceback.format_exc())
    return RankVerdict("passed")


def _left(code: Any) -> RankVerdict:
    """The verdict if a test exits: PyTorch's decorators skip in this way."""
    if not code:
        return RankVerdict("passed")
    for known in symbols.TEST_SKIPS.values():
        if code == known.exit_code:
            return RankVerdict("skipped", known.message)
    return RankVerdict("failed", f"it left by sys.exit({code!r})")
