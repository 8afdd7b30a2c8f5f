"""What fails in ranks that other clusters have used counts only where fresh ones show it too."""

from __future__ import annotations

from tests._wire import needs_wire
from tests.plugin.conftest import MakeProject

pytestmark = needs_wire

COUNTS = """
import torch.distributed.rpc as rpc

count = 0

def hit(most):
    global count
    count += 1
    assert count <= most, count

def go(most):
    rpc.rpc_sync("worker1", hit, (most,))
"""

CODE = """
from hypothesis import given, settings
from rpcprops import strategies
from counts import go

def used(rpc_cluster, most, **options):
    with rpc_cluster(world_size=2, agent="wire", reuse=True, **options) as cluster:
        cluster.on(0).call(go, most)

@settings(max_examples=4)
@given(faults=strategies.fault_tables())
def test_drawn(rpc_cluster, faults):
    used(rpc_cluster, 1, faults=faults)

def test_plain(rpc_cluster):
    rpc_cluster.server.servers.kept.close()
    for _ in range(4):
        used(rpc_cluster, 2)

def test_fails_in_fresh_ranks_too(rpc_cluster):
    rpc_cluster.server.servers.kept.close()
    used(rpc_cluster, 1)
    used(rpc_cluster, 0)

runs = []

def test_fails_otherwise_in_fresh_ranks(rpc_cluster):
    rpc_cluster.server.servers.kept.close()
    runs.append(0)
    assert len(runs) == 1, "its fixtures were not set up again"
    for _ in range(2):
        used(rpc_cluster, 1)
"""


def test_what_fails_in_used_ranks_is_run_in_fresh_ones(make_project: MakeProject) -> None:
    """What these do not show fails no test, and the summary says where it was seen; what they show
    too is reported as they show it; where a test then fails in another way, the first one counts.
    """
    project = make_project(counts=COUNTS, test_it=CODE)
    result, tests = project.report("-rN")
    said = [line for line in result.lines if "seen only in used ranks" in line]
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_drawn": "passed",
        "test_plain": "passed",
        "test_fails_in_fresh_ranks_too": "failed",
        "test_fails_otherwise_in_fresh_ranks": "failed",
    }, result.out
    drawn, plain = said
    assert "test_drawn: RuntimeError: AssertionError: On WorkerInfo" in drawn
    assert "(after 1 cluster)" in drawn
    assert "test_plain: " in plain
    assert "(after 2 clusters)" in plain
    assert "not confirmed in real time" not in result.out
    assert len(tests["test_plain"]["in_used_ranks"]) == 1
    assert "had run" not in result.section("test_fails_in_fresh_ranks_too")
    otherwise = result.section("test_fails_otherwise_in_fresh_ranks")
    assert "had run 1 cluster before" in otherwise
    assert "Run again in fresh ranks, it raised AssertionError: its fixtures" in otherwise
