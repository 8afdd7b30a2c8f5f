"""The shipped properties, under pytest."""

from __future__ import annotations

import pytest
from hypothesis import settings

from rpcprops.profiles import NIGHTLY, current
from rpcprops.properties import PROPERTIES, examine
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import write
from rpcprops.report.text import artefact_of, failure_lines
from rpcprops.runner import Runner

#: Hangs, of which each takes seconds to be sure of, at rate 1 as well.
_SLOW = {"failed-backward-revisits-rank", "early-owner-fork", "refused-init-counted"}
#: Sixteen seconds at rate 1, in which a second rank raises.
_SLOW |= {"freed-context-used"}
#: Five seconds of being sure that a call is served for ever, at rate 1 as well.
_SLOW |= {"fetch-after-delete"}
#: Torch compiles an optimizer in each of its ranks.
_SLOW |= {"rounded-rprop-factor", "functional-default-rate", "adagrad-wrong-parameter"}
_SLOW |= {"unchecked-optimizer-options", "remote-module-skips-hooks"}
#: Ten seconds of retries at rate 1. tests/upstream/test_suites.py has a rank die of it.
_SLOW |= {"fork-request-given-up"}
#: Eight seconds of waiting for a call that never runs, at rate 1 as well.
_SLOW |= {"retried-without-payload"}
#: Twenty seconds of shutdowns that wait for a call which never ends.
_SLOW |= {"unreadable-remote"}
_SLOW |= {prop.name for prop in PROPERTIES.values() if prop.only_named}
#: Some of its cases wait for a timeout. tests/cluster/test_wire_messages.py runs a few others.
_SLOW |= {"drawn-message-faults"}
#: Seconds of waiting for a timeout in each case.
_SLOW |= {prop.name for prop in PROPERTIES.values() if prop.costs > 1}
#: Of each property, but for a night. In CI they are the same ones in every run.
EXAMPLES = 15


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in _SLOW else [])
        for name in PROPERTIES
    ],
)
def test_shipped_property(name: str, rpc_cluster: ClusterFactory) -> None:
    """Stock torch keeps this promise under sampled faults, or breaks it as documented."""
    result = examine(
        PROPERTIES[name],
        Runner(rpc_cluster.server),
        max_examples=settings().max_examples if current() == NIGHTLY else EXAMPLES,
        database=settings().database,
    )
    if not result.is_good():
        lines = [f"{name}: {result.verdict}", *result.unconfirmed]
        if result.failure is not None:
            lines += failure_lines(result.failure, write(artefact_of(result.failure)))
        pytest.fail("\n".join(lines), pytrace=False)
