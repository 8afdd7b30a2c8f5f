"""What real ranks show of the message that the step Retry has torch send again."""

from __future__ import annotations

from rpcprops.programs import ENOUGH_THREADS, Program, Retry
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import default_runner
from tests._wire import needs_wire


@needs_wire
def test_what_a_first_try_shows_that_times_out(rpc_cluster: ClusterFactory) -> None:
    """It times out at its sender, is logged as a failed send, and is followed by another one."""
    program = Program(3, (Retry(0, 1, 2, timeout=8.0),))
    outcome = default_runner().run(program, agent="wire")
    tries = [one for one in outcome.messages if one.type == "RREF_FORK_REQUEST"]
    assert [(one.sender, one.retry) for one in tries[:2]] == [(2, 0), (2, 1)]
    assert tries[0].became == "timed_out"
    assert "Send try 1 failed" in outcome.ranks[2].log
    holds = [one for one in outcome.messages if (one.sender, one.receiver) == (1, 1)]
    assert [one.type for one in holds if one.is_request] == ["PYTHON_CALL"] * (ENOUGH_THREADS - 1)
