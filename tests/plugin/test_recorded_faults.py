"""What the plugin says of faults that fired at a rank which then died, under the agent WIRE."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests._wire import needs_wire

pytestmark = needs_wire

CODE = """
import contextlib
import os

from rpcprops import FaultTable


def add_and_die():
    import torch
    import torch.distributed.rpc as rpc

    with contextlib.suppress(RuntimeError, ValueError):
        rpc.rpc_sync("worker1", torch.add, (torch.ones(1), 1))
    os.abort()


def test_dies(rpc_cluster):
    table = FaultTable(["SCRIPT_CALL"], 1, {"PYTHON_CALL": 0.5})
    with rpc_cluster(world_size=2, agent="wire", faults=table) as cluster:
        cluster.on(0).call(add_and_die)
"""


def test_a_rank_that_died_has_fired(make_project: Callable[..., Any]) -> None:
    """Its report, the summary and the JSON count the call that failed, and nothing else."""
    result, report = make_project(test_user=CODE).report()
    assert result.code == 1
    section = result.section("test_dies")
    assert "fired    rank 0: failure SCRIPT_CALL: 1 fired" in section
    assert "delay" not in section.split("fired ")[1]
    assert "none has fired" not in section
    (said,) = re.findall(r"(\d+) injected faults? fired", result.out)
    assert int(said) == report["test_dies"]["faults_fired"] >= 1
    assert report["test_dies"]["fired_by_type"] == {"failure SCRIPT_CALL": int(said)}
