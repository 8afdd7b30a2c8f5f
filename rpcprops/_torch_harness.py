"""A program run by PyTorch's own harness, for comparison.

``MultiProcessTestCase`` spawns a process for each rank and test, ``dist_init`` initialises RPC with
torch's own ``FaultyRpcAgentTestFixture`` and shuts it down. The program runs on the interpreter
that our ranks use, one step after the other; a store in a file keeps the ranks in step.

The program comes as JSON in the environment, because the harness starts its ranks by module name.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
import unittest
from typing import Any

from rpcprops._json import from_json, to_json
from rpcprops.cluster import interpreter
from rpcprops.cluster.rank_process import read_counters
from rpcprops.faults import FaultTable
from rpcprops.programs import Program, Settle
from rpcprops.torch_facts.symbols import (
    FaultyRpcAgentTestFixture,
    FileStore,
    MultiProcessTestCase,
    dist_init,
)

_PROGRAM = "RPCPROPS_BENCH_PROGRAM"
_TABLE = "RPCPROPS_BENCH_TABLE"
_STORE = "RPCPROPS_BENCH_STORE"


class HarnessExample(MultiProcessTestCase, FaultyRpcAgentTestFixture):
    """One test, which runs the program of the environment."""

    @property
    def world_size(self) -> int:
        return _program().world_size

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def setup_fault_injection(self, faulty_messages: Any, messages_to_delay: Any) -> None:
        table = from_json(json.loads(os.environ[_TABLE]), FaultTable)
        messages = [str(m) for m in table.messages_to_fail] if table.num_fail_sends else []
        delays = {str(m): d for m, d in table.messages_to_delay.items()}
        inherited: Any = super().setup_fault_injection
        inherited(messages, delays)

    @dist_init
    def test_program(self) -> None:
        program = _program()
        store = FileStore(os.environ[_STORE], program.world_size)
        store.set_timeout(datetime.timedelta(seconds=300))
        names = tuple(f"worker{rank}" for rank in range(program.world_size))
        for index, step in enumerate(program.leaves):
            if not isinstance(step, Settle) and step.at == self.rank:
                seen = interpreter.run_step(index, step, names, {})
                assert seen.error is None, seen.error
                store.set(f"done{index}", "")
            store.wait([f"done{index}"])
        while not (counters := read_counters()) or not counters.is_zero:
            time.sleep(0.01)


def _program() -> Program:
    return from_json(json.loads(os.environ[_PROGRAM]), Program)


def run_in_harness(program: Program, table: FaultTable) -> tuple[float, float]:
    """Real seconds, and processor seconds of the ranks, of one example in PyTorch's harness.

    `table` fails 3 times what it fails: torch's fixture has no other count.
    """
    with tempfile.TemporaryDirectory(prefix="rpcprops-bench-") as folder:
        os.environ[_PROGRAM] = json.dumps(to_json(program))
        os.environ[_TABLE] = json.dumps(to_json(table))
        os.environ[_STORE] = os.path.join(folder, "store")
        before = os.times()
        began = time.monotonic()
        result = unittest.TestResult()
        example: Any = HarnessExample("test_program")
        example.run(result)
        seconds = time.monotonic() - began
        after = os.times()
    problems = [text for _, text in [*result.errors, *result.failures]]
    if problems or result.testsRun != 1:
        msg = f"the example failed in PyTorch's harness:\n{problems}"
        raise RuntimeError(msg)
    cpu = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return seconds, cpu


def main() -> None:
    """``python -m rpcprops._torch_harness PROGRAM TABLE``: one example; prints its figures."""
    import sys

    program = from_json(json.loads(sys.argv[1]), Program)
    table = from_json(json.loads(sys.argv[2]), FaultTable)
    print(json.dumps(run_in_harness(program, table)))


if __name__ == "__main__":
    # The harness spawns its ranks by the name of the module that the class is in.
    from rpcprops._torch_harness import main as run

    run()
