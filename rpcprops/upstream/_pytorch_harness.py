"""PyTorch's own RPC tests, run by PyTorch's own harness, as its test files run them.

This is a script, not a module of the package. The harness spawns four processes for each test, and
each imports this file again, so it imports only what PyTorch's own test files import.
``rpcprops upstream --harness`` runs it; alone it is

    python _pytorch_harness.py FILE AGENT < NAMES

with one ``Class::test`` on each line of the standard input. When a test has ended, a line of JSON
is added to FILE, and ``ended Class::test: verdict`` is printed.

AGENT is TensorPipe or Faulty, because PyTorch has one test file for each. One run for both would
fail: the fixture of the faulty agent registers it, which makes a new ``BackendType`` in torch, and
tests of the other agent compare its members with those of the old one.
"""

import json
import os
import sys
import time
import unittest
from typing import Any

import torch
from torch.testing._internal.distributed import rpc_utils

_AGENT = sys.argv[2]
_mixin: Any
_suites: list[Any]
if _AGENT == "Faulty":
    from torch.testing._internal.distributed.rpc import faulty_rpc_agent_test_fixture as fixture

    _mixin, _suites = fixture.FaultyRpcAgentTestFixture, rpc_utils.FAULTY_AGENT_TESTS
else:
    from torch.testing._internal.distributed.rpc import tensorpipe_rpc_agent_test_fixture as plain

    _mixin = plain.TensorPipeRpcAgentTestFixture
    _suites = [*rpc_utils.GENERIC_TESTS, *rpc_utils.TENSORPIPE_TESTS]
_CLASSES: dict[str, Any] = {}
for _name, _class in rpc_utils.generate_tests(_AGENT, _mixin, _suites, __name__).items():
    globals()[_name] = _class
    _CLASSES[_name.removeprefix(_AGENT)] = _class
# `FaultyAgentRpcTest` is generated as `FaultyFaultyAgentRpcTest`, `TensorPipeAgentRpcTest` as
# `TensorPipeTensorPipeAgentRpcTest`. One prefix is removed, so the names are the suites'.


def _run(name: str) -> dict[str, Any]:
    suite, method = name.split("::")
    case = _CLASSES[suite](method)
    result = unittest.TestResult()
    before = os.times()
    began = time.monotonic()
    case.run(result)
    seconds = time.monotonic() - began
    after = os.times()
    if result.skipped:
        verdict, reason = "skipped", result.skipped[0][1]
    elif problems := [*result.errors, *result.failures]:
        verdict, reason = "failed", problems[0][1][-4000:]
    else:
        verdict, reason = "passed", ""
    cpu = sum(after[:4]) - sum(before[:4])
    return {
        "class": suite,
        "name": method,
        "verdict": verdict,
        "reason": reason,
        "seconds": round(seconds, 2),
        "processor_seconds": round(cpu, 2),
        "torch": torch.__version__,
    }


def main() -> None:
    names = sys.stdin.read().split()
    with open(sys.argv[1], "a+", encoding="utf-8") as rows:
        rows.seek(0)
        before = rows.read()
        if before and not before.endswith("\n"):
            # An incomplete line of a run that was killed.
            rows.write("\n")
        for name in names:
            row = _run(name)
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            print(f"ended {name}: {row['verdict']}", flush=True)


if __name__ == "__main__":
    main()
