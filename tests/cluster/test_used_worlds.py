"""Worlds that are used again: they show what new ones show, and end when anything is left."""

from __future__ import annotations

import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import strategies as st

from rpcprops import _hunt
from rpcprops._replay import replay_program
from rpcprops._sweep import State, Sweep, cells
from rpcprops._sweep_points import PointSweep, points_of
from rpcprops.agents import wire
from rpcprops.cluster import Cluster, ClusterOptions, reuse
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageFault, MessageType
from rpcprops.oracle import judge, predict
from rpcprops.outcomes import Outcome
from rpcprops.programs import (
    STEP_TYPES,
    Call,
    Carry,
    Count,
    Fetch,
    Own,
    Program,
    Remote,
    Share,
    Step,
)
from rpcprops.properties import Case, Property, examine, failure_in_use
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import Artefact, Earlier, read, write
from rpcprops.report.script import script_of
from rpcprops.report.text import artefact_of
from rpcprops.runner import Runner
from rpcprops.strategies import programs, programs_under_faults
from tests._draws import draws, seed_of_this_run
from tests._wire import needs_wire, own_worlds
from tests.cluster.conftest import StillAlive

if TYPE_CHECKING:
    from rpcprops.oracle import Model, StepPrediction
    from rpcprops.programs import Scope

pytestmark = needs_wire
NO_FAULTS = FaultPlan()


@dataclass(frozen=True, slots=True, repr=False)
class Leave(Step):
    """Leaves something at `at` that is there when the program has ended."""

    op: ClassVar[str] = "leave"
    gives: ClassVar[type] = int
    at: int
    what: str

    def enter(self, scope: Scope) -> None:
        """Needs nothing."""

    def predict(self, model: Model, call: str) -> StepPrediction:
        """The number of runs of it in this program, of which there may be one."""
        return model.shows(1)


# Others count the kinds.
del STEP_TYPES[Leave.op]


def leave(call: str, world: tuple[str, ...], *, what: str) -> int:
    """Leave it; how often this has run in this process."""
    import threading

    import torch
    from torch.distributed import autograd, rpc

    from rpcprops.steps.in_rank import lookup

    if what == "thread":
        threading.Thread(target=threading.Event().wait, name="left", daemon=True).start()
    elif what == "global":
        lookup.left = call  # type: ignore[attr-defined]
    elif what == "dtype":
        torch.set_default_dtype(torch.float64)
    elif what == "timeout":
        rpc._set_rpc_timeout(77.0)  # type: ignore[attr-defined]
    elif what == "call":
        rpc.rpc_async(world[0], time.sleep, (500.0,))
    elif what == "context":
        autograd._new_context()  # type: ignore[attr-defined]
    elif what == "count":
        # Nobody looks here.
        threading.left = getattr(threading, "left", 0) + 1  # type: ignore[attr-defined]
        return int(threading.left)  # type: ignore[attr-defined]
    return 1


@pytest.fixture
def _leaves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The step is known, and believed to leave nothing."""
    STEP_TYPES[Leave.op] = Leave
    monkeypatch.setattr(reuse, "KINDS", reuse.KINDS | {Leave.op})
    yield
    del STEP_TYPES[Leave.op]


class Reusing(Runner):
    """A runner whose ranks run the agent WIRE, and are used again."""

    def run_anew(self, *args: Any, **options: Any) -> Outcome:
        """As in the base."""
        return super().run_anew(*args, **{"agent": "wire", "reuse": True, **options})


@pytest.fixture
def runner(rpc_cluster: ClusterFactory) -> Iterator[Reusing]:
    """A runner on the server of all tests, whose kept worlds are its own."""
    with own_worlds(rpc_cluster.server):
        yield Reusing(rpc_cluster.server)


SMALL = Program(2, (Remote(0, 1, "a"), Share(0, "a", 1, "b"), Fetch(1, "b"), Own(1, "c")))


def shown(program: Program, outcome: Outcome) -> dict[str, Any]:
    """What must be the same in any world: all but times, exits, ids, and how counters stood in the
    middle of a program that does not wait for them.
    """
    return {
        "steps": [
            (step.index, _relative(step.value), step.error, step.counters, step.ended)
            for step in outcome.steps
        ],
        "ranks": [
            (
                rank.counters if program.settles else None,
                rank.counters_after_shutdown,
                dict(rank.calls),
                rank.failed_sends,
                rank.sent,
                rank.failed_by_type,
                rank.delayed_by_type,
                rank.delayed_sends,
                rank.shutdown_error,
            )
            for rank in outcome.ranks
        ],
        "messages": Counter(
            # Not to whom, nor which try: failures are counted by payload, and the cleanups of a
            # context have one payload for all ranks, so whose try fails depends on their order.
            # Nor how the write of a response ended: who has read it may have shut down by then.
            (m.sender, m.type, m.is_request, m.done, m.is_request and m.became, m.processed)
            for m in outcome.messages
        ),
        "phases": [(phase.name, phase.verdict) for phase in outcome.phases],
        "judged": judge(program, None, outcome),
    }


def _relative(value: Any) -> Any:
    """A value, with the id of a context as the rank that made it."""
    if isinstance(value, dict) and "id" in value:
        return {**value, "id": value["id"] >> 48}
    return repr(value)


def compare(runner: Runner, cases: Sequence[tuple[Program, FaultPlan]]) -> Counter[str]:
    """Run each case in a used world where that may be, and in a new one; what was done."""
    done: Counter[str] = Counter()
    for program, plan in cases:
        before = runner.worlds["used"]
        used = runner.run_anew(program, plan)
        if runner.worlds["used"] == before:
            done["new"] += 1
            continue
        done["used"] += 1
        new = runner.run_anew(program, plan, reuse=False)
        assert judge(program, plan, used) == judge(program, plan, new)
        assert shown(program, used) == shown(program, new), program
    assert not runner.failed_in_use
    return done


def test_drawn_programs_show_the_same_in_used_worlds(runner: Runner) -> None:
    """Values, counters, calls, sends and messages of drawn programs, in used and in new worlds."""
    drawn = programs(max_world_size=2, max_steps=4, kinds=sorted(reuse.KINDS - _TRAINING))
    # Those that have a world of their own would only take time.
    usual = [p for p in draws(drawn, 120, 7) if p.num_worker_threads is p.rpc_timeout is None]
    alike = [p for p in usual if reuse.may_reuse(p, NO_FAULTS, wire.NAME, predict(p, NO_FAULTS))]
    done = compare(runner, [(program, NO_FAULTS) for program in alike[:16]])
    assert done["used"] >= 10


_TRAINING = {"optimize", "train", "module", "linear"}


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("faults", [False, True], ids=["without", "under"])
def test_many_drawn_programs_show_the_same_in_used_worlds(
    runner: Runner, faults: bool, part: int
) -> None:
    """The same for 250 programs with steps of all kinds, and 250 plans with programs for them."""
    alone = programs().map(lambda program: (program, FaultPlan()))
    drawn: st.SearchStrategy[tuple[Program, FaultPlan]] = (
        programs_under_faults() if faults else alone
    )
    done = compare(runner, draws(drawn, 50, seed_of_this_run() + part))
    assert done["used"] >= 5


def test_a_program_shows_nothing_of_those_before(runner: Runner) -> None:
    """Counters of functions, messages, sends and logs begin anew in a used world."""
    program = Program(2, (Count(0, 1), Count(0, 1), Call(1, 0, raises=False)))
    first, second, third = (runner.run_anew(program) for _ in range(3))
    assert runner.worlds == {"new": 1, "used": 2, "kept": 3}
    assert [step.value for step in second.steps[:2]] == [1, 2]
    assert len(first.messages) == len(second.messages) == len(third.messages)
    assert [rank.sent for rank in first.ranks] == [rank.sent for rank in third.ranks]
    assert all("step" not in rank.log for rank in third.ranks)
    assert min(message.seconds for message in third.messages) >= 0
    assert not judge(program, None, third)


def test_each_program_has_its_own_faults(runner: Runner) -> None:
    """A plan acts in the program that it is for, and no more in the next one."""
    plan = FaultPlan.of(FaultTable((MessageType.RREF_USER_DELETE,), 2, {"PYTHON_CALL": 0.4}))
    seen = [runner.run_anew(SMALL, one) for one in (None, plan, None, plan)]
    assert runner.worlds == {"new": 1, "used": 3, "kept": 4}
    failed = [sum(rank.failed_sends for rank in outcome.ranks) for outcome in seen]
    assert failed[0] == failed[2] == 0 < failed[1] == failed[3]
    delayed = [
        sum((rank.delayed_by_type or {}).values(), 0) for outcome in seen for rank in outcome.ranks
    ]
    assert delayed[:2] == delayed[4:6] == [0, 0]
    assert delayed[2:4] == delayed[6:] != [0, 0]
    assert not any(judge(SMALL, one, s) for one, s in zip((None, plan) * 2, seen, strict=True))


@pytest.mark.usefixtures("_leaves")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("thread", "threads are left: left"),
        ("global", "a global of rpcprops.steps.in_rank.lookup is another object"),
        ("dtype", "torch's statics differ"),
        ("timeout", "torch's statics differ"),
        ("context", "holds 1 context"),
        pytest.param("call", "worker0 holds 1 server call", marks=pytest.mark.nightly),
    ],
)
def test_what_is_left_ends_the_world(runner: Runner, what: str, says: str) -> None:
    """Whatever the step leaves is found, and the next program gets a new world."""
    program = Program(2, (Leave(1, what),), settles=False)
    outcome = runner.run_anew(program)
    assert runner.worlds["kept"] == 0
    (why,) = (key for key in runner.worlds if key != "new")
    assert says in why
    assert len(runner.server.servers.kept) == 0
    assert outcome.phase("shutdown") is not None


def leaving(what: str) -> Program:
    """A program of that one step."""
    return Program(1, (Leave(0, what),))


@pytest.mark.usefixtures("_leaves")
def test_what_fails_in_a_used_world_only_is_undecided(runner: Runner, tmp_path: Path) -> None:
    """A step that counts where nobody looks gives 2 in a used world; the outcome is a new one's.

    The artefact says that its world was used and by which programs, and is replayed after them.
    """
    other, counts, plan = leaving("other"), leaving("count"), FaultPlan()
    for one in (other, counts):
        assert not judge(one, plan, runner.run_anew(one, plan))
    assert not runner.failed_in_use
    outcome = runner.run_anew(counts, plan)
    assert not judge(counts, plan, outcome)
    assert outcome.ran_before == 0
    (failed,) = runner.failed_in_use
    assert failed.after == ((other, plan), (counts, plan))
    assert [violation.promise for violation in failed.violations] == ["WrongValue"]
    assert "only in a world that had run 2 programs before" in str(failed)
    written = write(artefact_of(failure_in_use("planted", failed)), tmp_path)
    artefact = read(written)
    assert artefact.outcomes[0].ran_before == 2
    assert artefact.after == (Earlier(other), Earlier(counts))
    again = replay_program(artefact, runner, times=2)
    assert (again.answer, again.seen) == ("reproduced", (("WrongValue",),) * 2)
    alone = replace(artefact, after=(Earlier(other),))
    assert replay_program(alone, runner, times=1).answer == "fixed"
    with pytest.raises(UsageError, match="neither a script nor a test has such ranks"):
        script_of(artefact)


def counting(calls: int) -> Program:
    """The step that gives more in a used world, after some calls."""
    return Program(1, (*[Call(0, 0)] * calls, Leave(0, "count")), rpc_timeout=70.0)


COUNTS = Property(
    "planted",
    "A count begins with one.",
    lambda: st.integers(0, 5).map(lambda calls: Case(counting(calls))),
    needs_faults=False,
)
ONLY_IN_USED = "only in a world that had run "


def ran_before(path: Path, least: int) -> None:
    """An artefact names the programs that its world had run, and the world had run them."""
    artefact = read(path)
    assert len(artefact.after) == artefact.outcomes[0].ran_before >= least
    assert all(Leave(0, "count") in one.program.leaves for one in artefact.after)


@pytest.mark.usefixtures("_leaves")
def test_check_calls_undecided_what_fails_in_used_worlds_only(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fresh world shows it, so it is no violation; each doubt says after which programs."""
    monkeypatch.setattr(runner.server, "agent", "WIRE")
    monkeypatch.setattr(runner.server, "reuse", True)
    result = examine(COUNTS, runner, max_examples=5, seed=0, different=True, candidates=1)
    assert (result.verdict, result.failure) == ("undecided", None)
    assert len(result.doubts) == runner.worlds["used"] >= 2
    for doubt in result.doubts:
        assert doubt.line.startswith(ONLY_IN_USED)
        assert doubt.failure is not None
        ran_before(write(artefact_of(doubt.failure), tmp_path), 1)


@pytest.mark.usefixtures("_leaves")
def test_a_hunt_does_not_count_it_either(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch has no failure, and names the doubts with their files."""
    monkeypatch.setattr(_hunt, "hunted", lambda **_: {"planted": COUNTS})
    monkeypatch.setattr(runner.server, "agent", "WIRE")
    monkeypatch.setattr(runner.server, "reuse", True)
    order = _hunt.Order("planted", 0, "tcp", 5, candidates=1)
    batch = _hunt.run_order(order, runner, artefacts=tmp_path)
    assert (batch.verdict, batch.failure) == ("undecided", [])
    assert len(batch.unconfirmed) == batch.used >= 2
    assert all(line.startswith(ONLY_IN_USED) for line in batch.unconfirmed)
    written = [*tmp_path.glob("*.json")]
    assert written
    for path in written:
        assert any(str(path) in line for line in batch.unconfirmed)
        ran_before(path, 1)


@pytest.mark.usefixtures("_leaves")
@pytest.mark.parametrize("by_points", [False, True])
def test_a_sweep_does_not_count_it_either(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_points: bool
) -> None:
    """Its cells are undecided, and each has its file."""
    monkeypatch.chdir(tmp_path)
    program = counting(1)
    state = State(
        program,
        torch_version=runner.server.torch_version,
        rate=runner.server.rate,
        transport="tcp",
        agent="WIRE",
        root=tmp_path,
    )
    if by_points:
        points = PointSweep(program, runner, state, transport="tcp")
        single = points_of(points.record_messages().messages, program)
        late = [one for one in single if one.faults[0].action == "delay"]
        records = [record for record, _ in points.try_all(late)]
    else:
        sweep = Sweep(program, runner, state, transport="tcp", agent="WIRE")
        records = [record for record, _ in sweep.run(cells(1, "all")[:4])]
    in_used = [one for one in records if one.verdict == "undecided"]
    assert len(in_used) >= 1
    assert {one.verdict for one in records} <= {"undecided", "holds"}
    for record in in_used:
        assert (record.promise, record.used) == ("WrongValue", False)
        assert record.broken.startswith(ONLY_IN_USED)
        ran_before(Path(record.artefact), 1)


@pytest.mark.usefixtures("_leaves")
def test_a_replay_says_when_its_world_did_not_stay(runner: Runner) -> None:
    """A program before it leaves a thread, so the world ends, and nothing was repeated."""
    artefact = Artefact(
        kind="program",
        subject="planted",
        promise="WrongValue",
        program=leaving("count"),
        plans=(FaultPlan(),),
        outcomes=(Outcome(1, agent="WIRE", ran_before=2),),
        after=(Earlier(leaving("other")), Earlier(leaving("thread"))),
    )
    again = replay_program(artefact, runner, times=1)
    assert (again.answer, again.times) == ("not repeated", 0)
    assert "because of program 2: worker0: threads are left: left" in str(again)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("check", "rref-values", "-n", "20", "--fresh"), ("worlds", "used")),
        (("check", "rref-values", "-n", "20"), ("worlds", "used")),
        (("hunt", "-n", "30", "--batch", "30"), ("runs_in_used_ranks",)),
        (("hunt", "-n", "30", "--batch", "30", "--jobs", "2"), ("runs_in_used_ranks",)),
        (("sweep", "create_and_fetch[python]"), ("in_used_ranks",)),
        (("sweep", "create_and_fetch[python]", "--points"), ("in_used_ranks",)),
    ],
    ids=["fresh", "check", "hunt", "jobs", "sweep", "points"],
)
def test_commands_use_worlds_again_by_themselves(
    tmp_path: Path, words: tuple[str, ...], where: tuple[str, ...]
) -> None:
    """With the agent WIRE most programs run in used ranks, none of them with --fresh; all hold."""
    done = subprocess.run(
        [sys.executable, "-m", "rpcprops", *words, "--agent", "wire", "--json", "said.json"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "160", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    used: Any = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    for name in where:
        used = used.get(name, 0)
    assert used == 0 if "--fresh" in words else used > 5


def test_a_kept_world_that_died_is_replaced(runner: Runner) -> None:
    """A rank of a kept world is killed: the next program runs in a new world, and holds."""
    runner.run_anew(SMALL)
    ((world,),) = [list(runner.server.servers.kept._worlds.values())]
    os.kill(world.members[1].pid, signal.SIGKILL)
    for _ in range(2):
        assert not judge(SMALL, None, runner.run_anew(SMALL))
    assert runner.worlds == {"new": 2, "used": 1, "kept": 3}


def test_sparse_tensors_are_sent_and_counted(runner: Runner) -> None:
    """A sparse tensor has no size of its own: the ledger has that of its parts."""
    program = Program(1, (Carry(0, 0, "sparse_coo"), Carry(0, 0, "sparse_coo-hybrid", "remote")))
    for _ in range(2):
        outcome = runner.run_anew(program)
        assert not judge(program, None, outcome)
        assert all(message.size > 0 for message in outcome.messages if message.type == "PYTHON_RET")
    assert runner.worlds == {"new": 1, "used": 1, "kept": 2}


def test_other_programs_have_other_worlds(runner: Runner) -> None:
    """Another size or another timeout is another world; more of them are kept at the same time."""
    other = Program(2, SMALL.steps, rpc_timeout=5000.0)
    one = Program(1, (Call(0, 0),))
    for program in (SMALL, other, one) * 2:
        runner.run_anew(program)
    assert runner.worlds == {"new": 3, "used": 3, "kept": 6}


def fetched(left: str = "") -> tuple[int, int]:
    """The process here, and a value that another rank owned for a while; may leave a thread."""
    from torch.distributed import rpc

    if left:
        threading.Thread(target=threading.Event().wait, name=left, daemon=True).start()
    value = rpc.remote("worker1", operator.add, (1, 2)).to_here()
    return os.getpid(), value


def test_a_users_clusters_are_used_again_if_they_ask(rpc_cluster: ClusterFactory) -> None:
    """With ``reuse=True`` the ranks go on, each time under faults of their own; never after a
    thread was left, faults were armed for a part, or the block has raised. Those that confirm a
    failure are fresh.
    """
    server = rpc_cluster.server
    server.servers.kept.close()

    def example(left: str = "", part: FaultTable | None = None, **options: Any) -> Cluster:
        options = {"world_size": 2, "agent": "wire", "reuse": True, "clock": 100.0, **options}
        with rpc_cluster(**options) as cluster:
            with nullcontext() if part is None else cluster.faults(part):
                assert cluster.on(0).call(fetched, left)[1] == 3
            handle = cluster.on(0).call(operator.add, 1, 2, keep=True)
            assert cluster.on(0).call(operator.neg, handle) == -3
        return cluster

    table = FaultTable((MessageType.RREF_USER_DELETE,), 2)
    seen = [example(), example(faults=table), example()]
    assert [cluster.is_used for cluster in seen] == [False, True, True]
    deletes = [dict(cluster.outcome.ranks[0].failed_by_type or {}) for cluster in seen]
    assert deletes == [{}, {"RREF_USER_DELETE": 2}, {}]
    assert not example(reuse=False).is_used
    server.override_rate = 50.0
    try:
        assert not example().is_used
    finally:
        server.override_rate = None
    assert example("left").is_used
    assert not example(part=table).is_used
    assert not example().is_used
    options: ClusterOptions = {"world_size": 2, "agent": "wire", "reuse": True, "clock": 100.0}
    with (
        pytest.raises(ZeroDivisionError) as raised,
        rpc_cluster(**options) as cluster,
    ):
        cluster.on(1).call(operator.truediv, 1, 0)
    assert cluster.is_used
    assert "had run 1 cluster before" in "".join(raised.value.__notes__)
    assert len(server.servers.kept) == 0


def created() -> str:
    """What the creation of an RRef at worker1, and a fetch of it, end with."""
    from torch.distributed import rpc

    created = rpc.remote("worker1", operator.add, (1, 2))
    try:
        return str(created.to_here(timeout=5))
    except RuntimeError as error:
        return type(error).__name__


def created_in_a_context() -> str:
    """The same in an autograd context, where the creation is sent inside another message."""
    from torch.distributed import autograd

    with autograd.context():
        return created()


def profiled() -> str:
    """What a call that torch profiles ends with."""
    from torch.autograd import profiler_legacy
    from torch.distributed import rpc

    with profiler_legacy.profile():  # type: ignore[no-untyped-call]
        return str(rpc.rpc_sync("worker1", operator.add, (1, 2)))


@pytest.mark.parametrize(
    ("call", "fails", "shows"),
    [
        (created, "PYTHON_REMOTE_CALL", "RuntimeError"),
        (created_in_a_context, "FORWARD_AUTOGRAD_REQ", "RuntimeError"),
        (profiled, "", "3"),
    ],
    ids=["creation", "in a context", "profiler"],
)
def test_a_users_world_ends_where_torch_keeps_something(
    rpc_cluster: ClusterFactory, call: Callable[[], str], fails: str, shows: str
) -> None:
    """What torch keeps in statics, no rank holds: so the next cluster has fresh ranks, and it shows
    the same. Where the same code meets no fault, its ranks are used again.
    """

    def example(plan: FaultPlan) -> bool:
        with rpc_cluster(
            world_size=2, agent="wire", reuse=True, clock=100.0, faults=plan
        ) as cluster:
            assert cluster.on(0).call(call) == (shows if plan.others or not fails else "3")
        return cluster.is_used

    plan = FaultPlan(others=(MessageFault(0, "fail", fails),) if fails else ())
    with own_worlds(rpc_cluster.server):
        assert [example(plan), example(plan)] == [False, False]
        if fails:
            assert [example(FaultPlan()), example(FaultPlan())] == [False, True]


def test_kept_ranks_end_with_their_servers(runner: Runner, still_alive: StillAlive) -> None:
    """Closing what is kept, as the end of the servers does, leaves no process."""
    runner.run_anew(SMALL)
    kept = runner.server.servers.kept
    pids = [member.pid for world in kept._worlds.values() for member in world.members]
    assert len(still_alive(pids, 0.0)) == 2
    kept.close()
    assert not still_alive(pids)
