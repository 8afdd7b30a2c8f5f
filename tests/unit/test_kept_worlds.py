"""Worlds that are kept: how many, which one ends, and which programs may leave theirs."""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from rpcprops import ClusterServer, FaultPlan, FaultTable, MessageFault
from rpcprops.agents.wire import NAME, Ledger, count_in, has_ended_in
from rpcprops.agents.wire import ledger as ledgers
from rpcprops.cluster._kept import (
    MOST_PROGRAMS,
    MOST_RANKS,
    MOST_WORLDS,
    KeptWorld,
    KeptWorlds,
    Member,
)
from rpcprops.cluster._peer import Peer
from rpcprops.cluster.logs import RankLog
from rpcprops.cluster.options import complete
from rpcprops.cluster.reuse import has_refusal, left_in_statics, may_reuse, rests_on_time
from rpcprops.commands.shared import running
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.oracle import predict
from rpcprops.outcomes import SentMessage, StepOutcome
from rpcprops.programs import Call, Carry, Default, Drop, Fetch, Program, Remote, Settle, Step
from rpcprops.runner import Runner

CALL = MessageType.PYTHON_CALL


class Made:
    """Makes worlds of one server that never answers, and knows which of them have ended."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.peer = Peer.on(ours)
        self.numbers = itertools.count(1)
        self.open: list[socket.socket] = []

    def world(self, key: str, size: int = 1) -> KeptWorld:
        """One more world."""
        members: list[Member] = []
        number = next(self.numbers)
        for rank in range(size):
            ours, theirs = socket.socketpair()
            self.open.append(theirs)
            log = os.memfd_create("log")
            members.append(Member(1000 * number + rank, f"worker{rank}", ours, log))
        self.peer.clusters += 1
        return KeptWorld(key, self.peer, number, tuple(members), Ledger(16), itertools.count(1))

    def close(self) -> None:
        """Close the ends of what was made."""
        for end in (*self.open, self.theirs, self.peer.sock):
            end.close()


@pytest.fixture
def made() -> Iterator[Made]:
    """Worlds without processes."""
    found = Made()
    yield found
    found.close()


def has_ended(world: KeptWorld) -> bool:
    return all(member.sock.fileno() < 0 for member in world.members) and world.ledger.fd < 0


def test_a_kept_world_is_taken_once(made: Made) -> None:
    """Who wants what the world has gets it, and nobody else does."""
    kept = KeptWorlds()
    world = made.world("a")
    kept.put(world)
    assert kept.take("b") is None
    assert kept.take("a") is world
    assert kept.take("a") is None
    world.end()
    assert made.peer.clusters == 0


def test_few_worlds_are_kept_and_the_one_unused_longest_ends(made: Made) -> None:
    """One world more than the most ends the first of them, and no other."""
    kept = KeptWorlds()
    worlds = [made.world(str(number)) for number in range(MOST_WORLDS + 1)]
    for world in worlds:
        kept.put(world)
    assert [has_ended(world) for world in worlds] == [True, *[False] * MOST_WORLDS]
    kept.close()
    assert len(kept) == 0
    assert all(map(has_ended, worlds))


def test_a_large_world_ends_the_others(made: Made) -> None:
    """All kept worlds together have a most number of ranks."""
    kept = KeptWorlds()
    small, large = made.world("small"), made.world("large", MOST_RANKS)
    kept.put(small)
    kept.put(large)
    assert has_ended(small)
    assert kept.take("large") is large
    large.end()


def test_a_world_does_not_stay_for_ever(made: Made) -> None:
    """After its last program it ends, and so does a world whose key another one has."""
    kept = KeptWorlds()
    old, first, second = (made.world("a") for _ in range(3))
    old.programs = MOST_PROGRAMS
    kept.put(old)
    assert has_ended(old)
    kept.put(first)
    kept.put(second)
    assert has_ended(first)
    kept.close()


def test_a_world_whose_rank_has_died_is_not_taken(made: Made) -> None:
    """The server has reported the end of a rank; or the server itself is gone."""
    kept = KeptWorlds()
    world = made.world("a")
    kept.put(world)
    made.peer.ended[world.members[0].pid] = (9, 0.0)
    assert kept.take("a") is None
    assert has_ended(world)
    world = made.world("a")
    kept.put(world)
    made.theirs.close()
    assert kept.take("a") is None
    assert has_ended(world)


PLAIN = (Remote(0, 1, "a"), Fetch(0, "a"), Call(1, 0))


@pytest.mark.parametrize(
    ("steps", "plan", "agent"),
    [
        ((*PLAIN, Default(0, 1)), FaultPlan(), NAME),
        ((Call(0, 1, raises=True),), FaultPlan(), NAME),
        (PLAIN, FaultPlan(), "FAULTY_TENSORPIPE"),
        (PLAIN, FaultPlan.of(FaultTable((CALL,), 1)), NAME),
        (PLAIN, FaultPlan(others=(MessageFault(0, "lose", "RREF_USER_DELETE"),)), NAME),
    ],
    ids=["kind", "error", "agent", "failing", "lost"],
)
def test_what_could_leave_something_gets_a_new_world(
    steps: tuple[Step, ...], plan: FaultPlan, agent: str
) -> None:
    """A program that may not be followed by another: by its steps, its faults or its agent."""
    program = Program(2, steps)
    assert may_reuse(Program(2, PLAIN), FaultPlan(), NAME, predict(Program(2, PLAIN), FaultPlan()))
    known = plan if plan.others == () else FaultPlan()
    assert not may_reuse(program, plan, agent, predict(program, known))


@pytest.mark.parametrize("steps", [(Remote(0, 0, "a"),), (Remote(0, 1, "a"), Drop(0, "a"))])
@pytest.mark.parametrize("is_message", [False, True], ids=["table", "message"])
def test_a_creation_that_failed_gets_no_program_after_it(
    steps: tuple[Step, ...], *, is_message: bool
) -> None:
    """torch's process keeps it for the next failure, though no rank holds anything."""
    plan = FaultPlan.of(FaultTable(("PYTHON_REMOTE_CALL",), 1))
    if is_message:
        plan = FaultPlan(others=(MessageFault(0, "fail", "PYTHON_REMOTE_CALL"),))
    program = Program(2, steps)
    prediction = predict(program, plan)
    assert not any(step.error for step in prediction.steps)
    assert not prediction.known_bugs
    assert not may_reuse(program, plan, NAME, prediction)
    assert may_reuse(program, FaultPlan(), NAME, predict(program, FaultPlan()))


def test_faults_that_torch_mends_leave_nothing() -> None:
    """Under failures within the budget, and delays, a program may be followed by another."""
    plan = FaultPlan.of(FaultTable((MessageType.RREF_USER_DELETE,), 2, {"PYTHON_CALL": 0.5}))
    program = Program(2, (*PLAIN, Settle()))
    assert may_reuse(program, plan, NAME, predict(program, plan))


@pytest.mark.parametrize(
    ("kind", "shown", "why"),
    [
        ("PYTHON_REMOTE_CALL", {"became": "timed_out"}, "a PYTHON_REMOTE_CALL has failed"),
        ("SCRIPT_REMOTE_CALL", {"became": "failed"}, "a SCRIPT_REMOTE_CALL has failed"),
        ("PYTHON_REMOTE_CALL", {"marks": ("raised",)}, "a PYTHON_REMOTE_CALL has failed"),
        ("FORWARD_AUTOGRAD_REQ", {"failed_by_table": True}, "a FORWARD_AUTOGRAD_REQ has failed"),
        ("RUN_WITH_PROFILING_REQ", {"became": "answered"}, "a profiler has run around a call"),
        ("PYTHON_REMOTE_CALL", {"became": "answered"}, ""),
        ("PYTHON_CALL", {"became": "answered", "marks": ("raised",)}, ""),
        ("PYTHON_CALL", {"became": "timed_out"}, ""),
    ],
)
def test_the_record_tells_what_torch_keeps_in_statics(kind: str, shown: Any, why: str) -> None:
    """A creation that has failed, in whatever way, and what a profiler was around."""
    sent = SentMessage(0.0, 0, 1, 7, kind, is_request=True, **shown)
    assert left_in_statics([sent]) == why
    assert left_in_statics([], 1) == "the record of messages is full"


def test_a_value_that_was_refused_is_known() -> None:
    """torch cuts the pickling of such a value off in the middle."""
    program = Program(2, (Call(0, 1), Carry(0, 1, "lock")))
    refused = StepOutcome(1, {"refused": "RuntimeError"})
    assert has_refusal(program, [StepOutcome(0, [1.0]), refused])
    assert not has_refusal(program, [StepOutcome(0, [1.0]), StepOutcome(1, {"differs": ""})])


def test_a_log_begins_anew_with_each_program() -> None:
    """Two logs on one file after each other: the second has only what was written since."""
    first = RankLog("log")
    with os.fdopen(os.dup(first.fd), "w") as writer:
        print("one", file=writer, flush=True)
        first.close(keep_open=True)
        second = RankLog("log", fd=first.fd)
        assert second.text() == ""
        print("two", file=writer, flush=True)
    assert (first.text(), second.text()) == ("one\n", "two\n")
    second.close()


def test_a_ledger_forgets(made: Made) -> None:
    """A cleared ledger has no messages, as new, and room for as many."""
    ledger = Ledger(16)
    before = os.pread(ledger.fd, 1 << 20, 0)
    os.pwrite(ledger.fd, b"\1" * 64, 24)
    os.pwrite(ledger.fd, b"\1" * 200, 4096)
    os.pwrite(ledger.fd, bytes(48), 40)
    ledger.clear()
    assert os.pread(ledger.fd, 1 << 20, 0) == before
    ledger.close()


DELETE, CALL_TYPE, CLEANUP = 0x0B, 0x02, 0x13
ANSWERED, FAILED, RAISED, READY = 4, 2, 512, 1


def written(*tries: tuple[int, int, int, int]) -> Ledger:
    """A ledger with requests: of each the first id, the type, which try it is, and its flags."""
    ledger = Ledger(16)
    for number, (first, kind, retry, flags) in enumerate(tries):
        times, fault = (1, 1, 0, 0, 0), (0, 0, 0, -1)
        row = (number, first, *times, 0, 1, kind, *fault, retry, READY, flags, 1, 0, 0, 0, 0)
        record = ledgers._RECORD.pack(*row)
        os.pwrite(ledger.fd, record, 4096 + number * len(record))
    os.pwrite(ledger.fd, struct.pack("<Q", len(tries)), 24)
    return ledger


@pytest.mark.parametrize(
    ("tries", "may"),
    [
        ([], False),
        ([(1, DELETE, 0, ANSWERED)], False),
        ([(1, DELETE, 0, FAILED)], True),
        ([(1, DELETE, 0, 0)], True),
        ([(1, DELETE, 0, ANSWERED | RAISED)], True),
        ([(1, DELETE, 0, FAILED), (1, DELETE, 1, ANSWERED)], False),
        ([(1, DELETE, 0, ANSWERED), (2, CLEANUP, 0, FAILED), (2, CLEANUP, 1, FAILED)], True),
        ([(1, DELETE, 5, FAILED), (2, CLEANUP, 20, FAILED)], False),
        ([(1, CALL_TYPE, 0, FAILED)], False),
    ],
    ids=[
        "none",
        "answered",
        "failed",
        "under way",
        "raised",
        "mended",
        "one of two",
        "last",
        "call",
    ],
)
def test_the_ledger_knows_what_torch_may_send_again(
    tries: list[tuple[int, int, int, int]], may: bool
) -> None:
    """Each request of a type that torch retries: over after an answer, or after its last try."""
    ledger = written(*tries)
    assert ledger.may_send_again() is may
    # What is claimed and not complete, or had no room, may be anything.
    os.pwrite(ledger.fd, struct.pack("<QQ", len(tries), 1), 24)
    assert ledger.may_send_again()
    os.pwrite(ledger.fd, struct.pack("<QQ", len(tries) + 1, 0), 24)
    assert ledger.may_send_again()
    ledger.close()


@pytest.mark.parametrize("delay", [3, 4], ids=["delay", "hold"])
def test_the_ledger_knows_what_a_fault_still_delays(delay: int) -> None:
    """A late request is awaited until it has come; what came before is not looked at again."""
    arrived, size = 16, ledgers._RECORD.size
    ledger = written((1, CALL_TYPE, 0, ANSWERED), (2, CALL_TYPE, 0, FAILED))
    assert not ledger.may_come_late()
    ledger.clear()
    for flags, awaited in ((0, True), (FAILED, True), (arrived | FAILED, False)):
        one = (2, 2, 1, 1, 0, 0, 0, 0, 1, CALL_TYPE, 0, delay, 0, 0, 0, READY, flags, 1, 0, 0, 0, 0)
        os.pwrite(ledger.fd, ledgers._RECORD.pack(*one), 4096)
        os.pwrite(ledger.fd, struct.pack("<Q", 1), 24)
        assert ledger.may_come_late() is awaited
    os.pwrite(ledger.fd, bytes(size), 4096)
    assert not ledger.may_come_late()
    ledger.close()


@pytest.mark.parametrize("held_up", [False, True])
def test_a_message_that_a_table_holds_up_is_read(held_up: bool) -> None:
    """It is read before it is sent; no fault of the message alone has acted on it by then."""
    ledger = written()
    one = (2, 2, 1, 1, 0, 0, 0, 0, 1, CALL_TYPE, 0, 3, 2, 0, 0, READY + held_up, 0, 0, 0, 0, 1, 250)
    os.pwrite(ledger.fd, ledgers._RECORD.pack(*one), 4096)
    os.pwrite(ledger.fd, struct.pack("<Q", 1), 24)
    (sent,) = ledger.messages(0)
    assert (sent.failed_by_table, sent.delayed_by_table) == (False, True)
    assert (sent.table_part, sent.table_delay) == (1, 0.25)
    assert (sent.done, sent.fault) == (("", None) if held_up else ("delay", 0))
    assert ledger.may_send_again() is held_up
    assert ledger.may_come_late()
    ledger.close()


ENDED_AT, ACTION_AT, DUPLICATE, TIMED_OUT = 4096 + 48, 4096 + 62, 5, 8


def test_a_ledger_shows_what_no_sender_waits_for() -> None:
    """A request that timed out, and the second copy of one, may still be on their way."""
    for flags, leaves_nothing in ((ANSWERED, True), (FAILED, True), (TIMED_OUT | FAILED, False)):
        ledger = written((1, CALL_TYPE, 0, flags))
        assert ledger.leaves_nothing() is leaves_nothing
        # Twice sent, and processed once so far.
        os.pwrite(ledger.fd, bytes([DUPLICATE]), ACTION_AT)
        assert not ledger.leaves_nothing()
        ledger.close()


def test_a_rank_reads_how_many_messages_there_are_and_whether_all_have_ended() -> None:
    """It reads both from the descriptor of its world's ledger."""
    ledger = written((1, CALL_TYPE, 0, ANSWERED))
    assert (count_in(ledger.fd), has_ended_in(ledger.fd)) == (1, False)
    os.pwrite(ledger.fd, struct.pack("<q", 7), ENDED_AT)
    assert (count_in(ledger.fd), has_ended_in(ledger.fd)) == (1, True)
    ledger.clear()
    assert (count_in(ledger.fd), has_ended_in(ledger.fd)) == (0, True)
    ledger.close()


def test_a_timeout_rests_on_time() -> None:
    """Only a program without one may run at a faster rate."""
    for timeout, rests in ((None, False), (300.0, True)):
        program = Program(2, PLAIN, rpc_timeout=timeout)
        assert rests_on_time(program, predict(program, FaultPlan())) is rests


def test_reuse_needs_the_agent_that_can_tell() -> None:
    """Under another agent it is refused, and so is what is no bool."""
    runner, program = Runner(ClusterServer()), Program(1, (Call(0, 0),))
    with pytest.raises(UsageError, match="reuse=True needs agent='wire'"):
        runner.run_anew(program, reuse=True)
    with pytest.raises(UsageError, match="reuse='yes' must be True or False"):
        runner.run_anew(program, agent="wire", reuse="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "reuse=True needs agent='wire', not FAULTY_TENSORPIPE"),
        ({"agent": "wire", "reuse": 1}, "reuse=1 must be True or False"),
        ({"agent": "wire", "init": "adopt"}, "needs init=True, not init='adopt'"),
        ({"agent": "wire", "init": False}, "needs init=True, not init=False"),
        ({"agent": "wire", "leaks": "allow"}, "needs leaks='raise', not leaks='allow'"),
    ],
    ids=["agent", "bool", "adopt", "init", "leaks"],
)
def test_a_cluster_that_cannot_be_used_again_is_refused(options: Any, says: str) -> None:
    """The message names the value, and what it needs."""
    given: Any = {"world_size": 2, "reuse": True, **options}
    with pytest.raises(UsageError, match=re.escape(says)):
        complete(given, rate_of=lambda _: 1.0, network="host")


@pytest.mark.parametrize(
    ("asked", "agent", "expected"),
    [
        (None, "wire", True),
        (None, None, False),
        (None, "tensorpipe", False),
        (False, "wire", False),
    ],
)
def test_a_server_that_uses_ranks_again_does_so_where_the_agent_can(
    asked: bool | None, agent: str | None, expected: bool
) -> None:
    """That is what commands ask for; a run may ask for fresh ranks, and other servers give them."""
    assert Runner(ClusterServer(reuse=True))._reuses(asked, agent) is expected
    assert Runner(ClusterServer())._reuses(asked, agent) is False


@pytest.mark.parametrize(("asked", "given"), [(None, True), (True, True), (False, False)])
def test_a_command_uses_ranks_again_unless_it_is_told_not_to(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, given: bool
) -> None:
    """Neither --reuse nor --fresh is as --reuse; that no agent but WIRE can is no error then."""
    monkeypatch.setattr(ClusterServer, "start", lambda _: None)
    for agent in ("wire",) if asked else ("wire", None):
        with running("auto", agent, reuse=asked) as runner:
            assert runner.server.reuse is given


def test_the_option_needs_the_agent_too() -> None:
    """``--reuse`` without ``--agent wire`` ends before a server starts."""
    with pytest.raises(UsageError, match="--reuse needs --agent wire"), running("auto", reuse=True):
        pass
