"""A backward pass that fails at two ranks, in real ranks."""

from __future__ import annotations

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import judge, predict_for, set_apart
from rpcprops.programs import FailTwice, Program
from rpcprops.runner import default_runner
from rpcprops.torch_facts import facts_of

PROGRAM = Program(3, (FailTwice(0, 1, 2, "x", seconds=8.0),), "fails twice")


@pytest.mark.usefixtures("rpc_cluster")
def test_only_the_finding_makes_its_rank_die() -> None:
    """In some run memory that was freed is used, where torch has the finding; and no more."""
    found: set[str] = set()
    for _ in range(10):
        outcome = default_runner().run_anew(PROGRAM, FaultPlan())
        met = predict_for(PROGRAM, FaultPlan(), outcome).met
        names, left = set_apart(PROGRAM, met, outcome, judge(PROGRAM, FaultPlan(), outcome))
        assert left == ()
        found.update(names)
        if found:
            break
    has_it = facts_of(outcome.torch_version).has_bug("freed-context-used")
    assert found == ({"freed-context-used"} if has_it else set())
