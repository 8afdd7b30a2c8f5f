"""State machines over live clusters: clean ones pass, and what a rule leaves behind is found."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from torch.distributed import rpc

from rpcprops import Cluster, FaultPlan, FaultTable, MessageFault, strategies
from rpcprops._replay import replay_program
from rpcprops.agents.wire import ledger
from rpcprops.errors import HarnessError, RRefLeak, UsageError, WrongValue
from rpcprops.outcomes import Counters, Outcome, StepOutcome
from rpcprops.programs import Bump, Own, Program
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.report.artefact import read
from rpcprops.runner import Runner, default_runner
from rpcprops.stateful import ClusterMachine
from tests._wire import needs_wire

pytestmark = pytest.mark.usefixtures("rpc_cluster")

KEPT: list[Any] = []


def run(machine: type[ClusterMachine], examples: int = 4, steps: int = 8, **options: Any) -> None:
    """A few derandomized runs."""
    checks: Any = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            database=None,
            deadline=None,
            derandomize=True,
            print_blob=True,
            suppress_health_check=checks,
            **options,
        ),
    )


def keep_one() -> None:
    """Keeps a user's handle in this rank for good."""
    KEPT.append(rpc.remote("worker1", dict))


def drop_all() -> int:
    """Lets go of them; how many there were."""
    number = len(KEPT)
    KEPT.clear()
    return number


def test_a_clean_machine_passes(still_alive: Callable[..., list[int]]) -> None:
    """Drawn steps of all kinds, under drawn faults, keep every promise; no rank is left."""
    ran: list[Any] = []
    pids: list[int] = []

    class Clean(ClusterMachine):
        world_size = 3
        faults = strategies.fault_plans(world_size=3)

        @invariant()
        def follows(self) -> None:
            assert len(self._seen) == len(self.program.leaves)

        def teardown(self) -> None:
            pids.extend(channel.pid for channel in self.cluster.ranks.channels)
            super().teardown()
            ran.append((self.program, self.plan))

    run(Clean, examples=8, steps=12)
    assert max(len(program.leaves) for program, _ in ran) >= 6
    assert len({leaf.op for program, _ in ran for leaf in program.leaves}) >= 8
    assert any(plan != FaultPlan() for _, plan in ran)
    assert not still_alive(pids)


def ask() -> float:
    """A call of a rule of the user's."""
    return float(rpc.rpc_sync("worker1", max, args=(3.0, 4.0)))


#: Delays each call of rank 0, which is within every timeout.
LATE = FaultPlan(others=(MessageFault(0, "delay", "PYTHON_CALL", which="every", delay=0.5),))


@needs_wire
@pytest.mark.parametrize(
    "faults",
    [
        strategies.fault_plans(world_size=2),
        strategies.fault_plans(
            world_size=2, message_faults=strategies.message_faults(world_size=2)
        ),
        LATE,
    ],
    ids=["tables", "messages", "late"],
)
def test_a_machine_under_the_agent_wire(faults: Any) -> None:
    """Its ranks record messages, which its steps must explain unless its own rules send some."""
    ran: list[tuple[Outcome, bool]] = []

    class Recorded(ClusterMachine):
        agent = "wire"
        kinds = ("remote", "fetch", "share", "drop", "call", "settle")

        @rule(go=st.booleans())
        def ask_one(self, go: bool) -> None:
            if go:
                assert self.cluster.on(0).call(ask) == 4.0

        def teardown(self) -> None:
            super().teardown()
            ran.append((self._outcome(), self._shared))

    Recorded.faults = faults
    run(Recorded, examples=12)
    assert {outcome.agent for outcome, _ in ran} == {"WIRE"}
    assert {shared for outcome, shared in ran if outcome.messages} == {True, False}
    if faults is LATE:
        late = [outcome for outcome, shared in ran if shared]
        assert all(any(sent.done == "delay" for sent in one.messages) for one in late)


def default_timeout() -> float:
    """The timeout that a call has for which nothing names one, as torch says it."""
    return float(rpc.get_rpc_timeout())  # type: ignore[attr-defined]


#: Loses one of the first calls of rank 0.
LOST = st.builds(
    lambda n: FaultPlan(others=(MessageFault(0, "lose", "PYTHON_CALL", n=n),)), st.integers(1, 3)
)


@needs_wire
def test_a_machine_with_a_default_timeout() -> None:
    """What a fault loses ends by it, and rules of the user's have it too."""
    ran: list[tuple[Program, Outcome]] = []

    class Timed(ClusterMachine):
        agent = "wire"
        kinds = ("call", "count", "chain", "remote", "share", "settle")
        rpc_timeout = 65.0
        faults = LOST

        @rule(go=st.integers(0, 9))
        def look(self, go: int) -> None:
            if go == 9:
                assert self.cluster.on(1).call(default_timeout) == 65.0

        def teardown(self) -> None:
            super().teardown()
            ran.append((self.program, self._outcome()))

    run(Timed, examples=6, steps=8)
    assert {program.rpc_timeout for program, _ in ran} == {65.0}
    ended = {
        type(leaf).__name__
        for program, outcome in ran
        for leaf, step in zip(program.leaves, outcome.steps, strict=False)
        if step.error is not None and getattr(leaf, "timeout", None) is None
    }
    assert ended
    assert all(outcome.clock_rate <= 65.0 / 0.75 for _, outcome in ran)


@needs_wire
def test_a_machine_refuses_a_plan_under_which_nothing_is_predicted() -> None:
    """Such as failures of requests of all types: the error says why, before a step is drawn."""
    plan = FaultPlan(others=(MessageFault(0, "fail", way="request"),))
    fails = type("Fails", (ClusterMachine,), {"agent": "wire", "faults": plan})
    with pytest.raises(UsageError, match="it acts on all types; name one"):
        run(fails, examples=1)


def test_a_machine_refuses_an_agent_that_there_is_not() -> None:
    """The error names the agents."""
    unknown = type("Unknown", (ClusterMachine,), {"agent": "wires"})
    with pytest.raises(UsageError, match="wires"):
        run(unknown, examples=1)


def test_only_the_kinds_that_were_asked_for_run() -> None:
    """`kinds` picks the rules, branches among them."""
    ran: list[str] = []

    class Few(ClusterMachine):
        kinds = ("remote", "parallel", "settle")

        def teardown(self) -> None:
            super().teardown()
            ran.extend(step.op for step in (*self.program.steps, *self.program.leaves))

    run(Few, examples=6)
    assert set(ran) == {"remote", "parallel", "settle"}


def call_and_falsify() -> None:
    """Has a call failed by the table, and takes the mark of that out of the record of messages."""
    with contextlib.suppress(RuntimeError, ValueError):
        rpc.rpc_sync("worker1", torch.add, (torch.ones(1), 1))
    files = [Path(f"/proc/self/fd/{number}") for number in range(256)]
    (file,) = [one for one in files if one.exists() and "rpcprops-ledger" in str(one.readlink())]
    record = os.open(file, os.O_RDWR)
    size = ledger._RECORD.size
    for number in range(ledger.count_in(record)):
        at = ledger._HEADER_SIZE + number * size
        row = list(ledger._RECORD.unpack(os.pread(record, size, at)))
        row[_TABLE] = 0
        os.pwrite(record, ledger._RECORD.pack(*row), at)
    os.close(record)


#: Which number of a record of the ledger says what a table did to the message.
_TABLE = 12


@needs_wire
@pytest.mark.parametrize("leaks", [True, False])
def test_an_error_of_ours_comes_second(monkeypatch: pytest.MonkeyPatch, leaks: bool) -> None:
    """A leak is raised though the record contradicts a rank, which only a note says then."""
    monkeypatch.setattr(default_runner().server, "agent", "WIRE")
    # Else this test itself would fail with our error.
    monkeypatch.setattr(default_runner().server, "on_end", None)

    class Contradicted(ClusterMachine):
        kinds = ("settle",)
        faults = st.just(FaultPlan(FaultTable(["SCRIPT_CALL"], 1)))

        @rule()
        def contradict(self) -> None:
            self.cluster.on(0).call(call_and_falsify)
            if leaks:
                self.cluster.on(0).call(keep_one)

    with pytest.raises(RRefLeak if leaks else HarnessError) as caught:
        run(Contradicted, examples=2, phases=[Phase.generate])
    notes = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    (said,) = [note for note in notes if "the record of messages shows 0" in note]
    assert said.startswith("rpcprops itself is at fault too" if leaks else "worker0 has counted")


def test_a_rule_that_keeps_an_rref_is_found() -> None:
    """What a user's rule leaves in a rank is a leak at the end, with the program and the plan."""

    class Keeps(ClusterMachine):
        kinds = ("remote", "drop")

        @rule()
        def keep(self) -> None:
            self.cluster.on(0).call(keep_one)

    with pytest.raises(RRefLeak, match=r"worker1 holds 1 owner, 1 fork") as caught:
        run(Keeps, phases=[Phase.generate, Phase.shrink])
    notes = "\n".join(caught.value.__notes__)
    assert "program  Program(2, name='Keeps')" in notes
    assert "plan     FaultPlan()" in notes
    assert "@reproduce_failure" in notes
    assert "state.keep()" in notes


def test_a_rule_may_hold_what_it_lets_go_of() -> None:
    """`held` accounts for what rules of the user's hold in between, and `let_go` ends it."""

    class Holds(ClusterMachine):
        kinds = ("remote", "settle")

        def __init__(self) -> None:
            super().__init__()
            self.number = 0

        @rule()
        def keep(self) -> None:
            self.cluster.on(0).call(keep_one)
            self.number += 1

        def held(self) -> list[Counters]:
            return [Counters(), Counters(owners=self.number, forks=self.number)]

        def let_go(self) -> None:
            assert self.cluster.on(0).call(drop_all) == self.number
            self.number = 0

    run(Holds, examples=6)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (3, "held..=3 .type int. must be up to 2 Counters, one for each rank"),
        ([Counters()] * 3, "must be up to 2 Counters"),
        ([None], "must be up to 2 Counters"),
        ([Counters(forks=-1)], r"held\(\)\[0\]: forks=-1 .* must be an int from 0 up"),
    ],
)
def test_what_rules_hold_must_be_counters(held: Any, words: str) -> None:
    """Else it is a misuse, told once: Hypothesis runs no second example."""
    ran: list[int] = []

    class Wrong(ClusterMachine):
        kinds = ("own",)

        def held(self) -> Any:
            ran.append(1)
            return held

    with pytest.raises(UsageError, match=words) as caught:
        run(Wrong, examples=4)
    assert len(ran) == 1
    assert "That comes from the class " in caught.value.__notes__[0]


def test_a_broken_promise_is_shown_at_once_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpc_cluster: ClusterFactory
) -> None:
    """A step that differs from the prediction ends the run, and its program is written down."""
    monkeypatch.chdir(tmp_path)
    run_branches = Cluster.run_branches

    def miscounted(
        cluster: Cluster,
        branches: Any,
        contexts: Any,
        goes_on: Any = lambda _: True,
        **options: Any,
    ) -> list[StepOutcome]:
        bumps = [n for branch in branches for n, leaf in branch if isinstance(leaf, Bump)]
        return [
            replace(seen, value=[x + 1 for x in seen.value]) if seen.index in bumps else seen
            for seen in run_branches(cluster, branches, contexts, goes_on, **options)
        ]

    monkeypatch.setattr(Cluster, "run_branches", miscounted)

    class Miscounts(ClusterMachine):
        kinds = ("own", "bump", "settle")
        clock = "real"

    with pytest.raises(WrongValue, match=r"expected \[2\.0\], got \[3\.0\]") as caught:
        run(Miscounts, examples=30, steps=6, phases=[Phase.generate, Phase.shrink])
    text = "\n".join(caught.value.__notes__)
    assert re.search(r"program  Program\(\n    2,\n    \(\n        Own\(at=0, out='a'\),\n", text)
    assert "state.teardown()" in text
    (line,) = [line for line in text.splitlines() if line.startswith("replay")]
    path = Path(line.split()[-1])
    assert [file.name for file in Path(".rpcprops/failures").iterdir()] == [path.name]
    artefact = read(path)
    assert artefact.program is not None
    assert artefact.program.steps == (Own(0, "a"), Bump(0, "a"))
    again = replay_program(artefact, Runner(rpc_cluster.server), times=1)
    assert again.answer == "reproduced"


def test_a_machine_that_is_set_up_wrongly_is_refused() -> None:
    """Names of steps are checked with the class, and a plan of another world in the first rule."""
    with pytest.raises(UsageError, match="rpc_timeout='soon'"):
        type("Wrong", (ClusterMachine,), {"rpc_timeout": "soon"})
    with pytest.raises(UsageError, match="'remotes', which is no step"):
        type("Wrong", (ClusterMachine,), {"kinds": ["remotes"]})
    with pytest.raises(UsageError, match="must be a collection"):
        type("Wrong", (ClusterMachine,), {"kinds": "remote"})
    with pytest.raises(UsageError, match="can come first"):
        type("Wrong", (ClusterMachine,), {"kinds": ["drop"]})
    wide = type("Wide", (ClusterMachine,), {"faults": FaultPlan(by_rank={5: FaultTable()})})
    with pytest.raises(UsageError, match="rank 5"):
        run(wide, examples=1)
    drawn = type("Drawn", (ClusterMachine,), {"faults": st.just("RREF_USER_DELETE")})
    with pytest.raises(UsageError, match="must be a FaultTable"):
        run(drawn, examples=1)
