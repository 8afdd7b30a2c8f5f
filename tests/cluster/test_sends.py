"""What a rank says that its agent has sent: counted by type, against the message model's counts."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from rpcprops import FaultPlan, FaultTable, MessageType, Program
from rpcprops.clock.sends import REQUEST_NUMBERS
from rpcprops.oracle import predict
from rpcprops.programs import Call, Drop, Fetch, Remote, Share
from rpcprops.runner import run

SHARED = Program(
    3, (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Fetch(2, "b"), Drop(0, "a"), Drop(2, "b"))
)


@pytest.mark.usefixtures("rpc_cluster")
def test_failures_and_delays_are_counted_by_type() -> None:
    """Each rank counts exactly the failures and delays of each type that the model predicts."""
    failing = ["RREF_USER_DELETE", "RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT"]
    plan = FaultPlan(FaultTable(failing, 2, {"PYTHON_REMOTE_CALL": 0.5}))
    outcome = run(SHARED, plan)
    if outcome.ranks[0].sent is None:
        pytest.skip("sends are not counted without the preload library")
    for rank, failures in zip(outcome.ranks, predict(SHARED, plan).failures(), strict=True):
        assert rank.failed_by_type == {m: n for m, n in failures.items() if n}
        assert sum((rank.failed_by_type or {}).values()) == rank.failed_sends
    assert [rank.delayed_by_type for rank in outcome.ranks] == [{"PYTHON_REMOTE_CALL": 1}, {}, {}]


@pytest.mark.usefixtures("rpc_cluster")
def test_every_try_of_a_send_is_counted() -> None:
    """A type is counted once for each try, and the handshake of a graceful shutdown as well."""
    program = Program(2, (Remote(0, 1, "a"), Call(0, 1, (1.0,)), Drop(0, "a")))
    outcome = run(program, FaultPlan(FaultTable(["RREF_USER_DELETE"], 3)))
    if outcome.ranks[0].sent is None:
        pytest.skip("sends are not counted without the preload library")
    # The handshake: worker1 tells worker0, which answers with a call of its own.
    assert outcome.ranks[0].sent == {
        "PYTHON_REMOTE_CALL": 1,
        "PYTHON_CALL": 2,
        "RREF_USER_DELETE": 4,
    }
    assert outcome.ranks[1].sent == {"PYTHON_CALL": 1}


def test_the_numbers_of_message_types_are_those_of_torch() -> None:
    """The header that this torch installs gives each request type the number that is used here."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    header = Path(torch.origin).parent / "include/torch/csrc/distributed/rpc/message.h"
    text = re.sub(r"\s+", " ", re.sub(r"//.*", "", header.read_text(encoding="utf-8")))
    found = re.findall(r"(\w+) = (0x\w+) \| MessageTypeFlags::REQUEST_TYPE", text)
    assert {int(number, 16): name for name, number in found} == REQUEST_NUMBERS
    assert set(MessageType) <= set(REQUEST_NUMBERS.values())
