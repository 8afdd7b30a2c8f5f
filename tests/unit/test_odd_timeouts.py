"""Timeouts that torch counts otherwise than they were given."""

from __future__ import annotations

import pytest

from rpcprops.faults import FaultPlan
from rpcprops.oracle import predict
from rpcprops.programs import Call, Default, Program, Reach, Settle
from rpcprops.steps.timeouts import LONGEST, TOO_LONG, TOO_SHORT, is_too_long, is_too_short
from rpcprops.torch_facts import NEWEST


@pytest.mark.parametrize("timeout", [0.001, 1.0, 60, LONGEST])
def test_torch_takes_these_as_they_are(timeout: float) -> None:
    """They make from one to INT_MAX milliseconds."""
    assert not is_too_long(timeout)
    assert not is_too_short(timeout)


@pytest.mark.parametrize("timeout", [*TOO_LONG, LONGEST + 0.75, 1e300, float("inf")])
def test_these_are_too_long(timeout: float) -> None:
    """Their milliseconds are more than an int of C++ holds, or a float."""
    assert is_too_long(timeout)
    assert not is_too_short(timeout)


@pytest.mark.parametrize("timeout", [*TOO_SHORT, 1e-300])
def test_these_are_too_short(timeout: float) -> None:
    """Their milliseconds are cut to 0, which stands for no timeout."""
    assert is_too_short(timeout)
    assert not is_too_long(timeout)


def test_no_timeout_is_neither() -> None:
    """None stands for the default one."""
    assert not is_too_long(None)
    assert not is_too_short(None)


@pytest.mark.parametrize("step", [Reach(0, 1, timeout=3e6), Default(0, 1, 3e6)])
def test_a_function_may_go_on_after_a_call_that_ended_at_once(step: Reach | Default) -> None:
    """So a torch with the finding does not rest before the next settle, and others do."""
    default = Default(0, 1, 3.0)
    for facts, rests in ((NEWEST, False), (NEWEST.as_if_mended(), True)):
        assert [one.error for one in predict(Program(2, (step,)), FaultPlan(), facts).steps] == [""]
        settled = Program(2, (step, Settle(), default))
        assert predict(settled, FaultPlan(), facts).steps[2].error == "unknown"
        program = Program(2, (step, Call(0, 1), default))
        if rests:
            assert predict(program, FaultPlan(), facts).steps[2].error == "unknown"
        else:
            with pytest.raises(Exception, match=r"put a Settle\(\) before it"):
                predict(program, FaultPlan(), facts)
