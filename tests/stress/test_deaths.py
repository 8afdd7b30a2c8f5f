"""Processes of ours that are killed at random moments: nothing is left, and the next run works.

Every test is one run: some of its processes are killed one after the other, the one that was
started last. Moments, victims and signals come from a seed, which a failure prints;
``RPCPROPS_STRESS_SEED=SEED`` draws the same again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from rpcprops import FaultPlan, FaultTable, Program
from rpcprops.programs import Drop, Remote
from rpcprops.report import artefact as artefacts
from tests._draws import seed_of_this_run
from tests.stress import _processes as processes
from tests.stress._processes import Run

KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
#: Which signals a process may meet. A Ctrl-C is for what the user started, not for what that did.
FAIR = {
    "pytest": (KILL, TERM, INT),
    "xdist controller": (KILL, TERM, INT),
    "rpcprops check": (KILL, TERM, INT),
    "rpcprops hunt": (KILL, TERM, INT),
    "rpcprops sweep": (KILL, TERM, INT),
    "rpcprops replay": (KILL, TERM, INT),
    "pytest of a replay": (KILL, TERM),
    "xdist worker": (KILL, TERM),
    "maker of networks": (KILL, TERM),
    "watcher": (KILL, TERM),
    "fork server": (KILL, TERM),
    "module server": (KILL, TERM),
    "rank": (KILL, TERM),
    "pre-forked rank": (KILL, TERM),
    "child of a rank": (KILL, TERM),
}
#: Temporary folders of pytest's, and of torch's, which makes one when its optimizers are imported
#: (torch/_inductor/runtime/cache_dir_utils.py: default_cache_dir).
_NOT_OURS = ("pytest-of-", "torchinductor_")
#: Processes without which a run goes on as if nothing had happened.
_UNNOTICED = ("pre-forked rank", "child of a rank", "maker of networks")
#: Real seconds: for a process to show up on a busy machine, and for a whole run of a passing test.
SHOWS_UP_SECONDS = 40.0
NEXT_RUN_SECONDS = 60.0
#: Real seconds that the nightly tests of this module take together, before the rest are skipped.
NIGHTLY_SECONDS = 50 * 60
#: How long xdist, without any of us, waits for its workers after a Ctrl-C (EXIT_TIMEOUT in its
#: workermanage.py): tests that do nothing but sleep took 9 s to end.
XDIST_SECONDS = 10.0
#: Above what starting takes, so that a moment may fall before, in or after the import of torch.
START_SECONDS = 4.5

CODE = """
import subprocess

import pytest
import torch
from hypothesis import given, settings
from torch.distributed import rpc

from rpcprops.strategies import fault_tables


def start_child():
    # In a session of its own, and its parent ends at once.
    subprocess.run(["setsid", "--fork", "sleep", "987654"], check=True)


def value():
    return rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1)).item()


@pytest.mark.parametrize("number", range(400))
@settings(max_examples=4, database=None, deadline=None)
@given(table=fault_tables())
def test_drawn(rpc_cluster, number, table):
    with rpc_cluster(world_size=2, faults=table) as cluster:
        cluster.on(0).call(start_child)
        assert cluster.on(0).call(value) == 2


def test_once(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(value) == 2
"""

#: What may lie in the folder of a run: our own files, ours of Hypothesis and pytest, and the test.
ALLOWED = {".rpcprops", ".hypothesis", ".pytest_cache", "test_user.py", "pytest.ini", "input"}


@dataclass(frozen=True)
class Kind:
    """A run: its command, what is killed in it, and the run that comes after.

    Attributes:
        goes_on: whether the run goes on after one of its processes has died; a command reports the
            death instead, and may end.
    """

    command: list[str]
    victims: tuple[str, ...]
    after: list[str]
    goes_on: bool = False


_PYTEST = ["-p", "no:cacheprovider", "test_user.py"]
_AFTER_PYTEST = processes.python("pytest", "-p", "no:cacheprovider", "test_user.py::test_once")
_AFTER_COMMAND = processes.python("rpcprops", "check", "timeout-holds", "-n", "1")
_IN_PYTEST = (
    *("pre-forked rank", "rank", "child of a rank", "module server", "fork server"),
    *("watcher", "maker of networks"),
)


def _command(*arguments: str) -> list[str]:
    return processes.python("rpcprops", *arguments)


KINDS = {
    "pytest": Kind(processes.python("pytest", *_PYTEST), _IN_PYTEST, _AFTER_PYTEST, True),
    "xdist": Kind(
        processes.python("pytest", "-n", "2", *_PYTEST),
        ("xdist worker", *_IN_PYTEST),
        _AFTER_PYTEST,
        True,
    ),
    "check": Kind(
        _command("check", "rref-values", "-n", "100000"),
        ("pre-forked rank", "rank", "fork server"),
        _AFTER_COMMAND,
    ),
    "hunt": Kind(
        _command("hunt", "-n", "100000", "--batch", "20"),
        ("pre-forked rank", "rank", "fork server"),
        _AFTER_COMMAND,
    ),
    "sweep": Kind(
        _command("sweep", "fork_chain[4]", "--ranks", "pairs", "--restart"),
        ("pre-forked rank", "rank", "fork server"),
        _AFTER_COMMAND,
    ),
    "replay": Kind(
        _command("replay", "input/program.json", "--times", "100000", "--no-needed"),
        ("pre-forked rank", "rank", "fork server"),
        _AFTER_COMMAND,
    ),
    "replay of a test": Kind(
        _command("replay", "input/test.json", "--times", "1000", "--no-needed"),
        ("pytest of a replay", "module server", "rank"),
        _AFTER_PYTEST,
    ),
}


@dataclass
class Deaths:
    """Kills processes of runs in one folder, and looks at what that leaves."""

    folder: Path
    logs: Path
    random: random.Random
    count: Callable[[str], None]
    problems: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def start(self, command: Sequence[str]) -> Run:
        run = Run.start(command, self.folder, self.logs)
        self.runs.append(run)
        self.note(f"starts {' '.join(command[2:])}")
        return run

    def note(self, what: str) -> None:
        """What a failure tells of the course of events."""
        self.events.append(f"{time.monotonic() - self.began:6.2f} s  {what}")

    def report(self, what: str, run: Run | None = None) -> None:
        tail = "" if run is None else "\n" + "\n".join(run.text.splitlines()[-12:])
        self.problems.append(what + tail)

    def inner(self, run: Run, wanted: str, kind: Kind) -> bool:
        """Kill a process that the started one has below it; whether the run goes on as it should.

        A command may end, and says why; a pytest goes on with the next test.
        """
        if not run.wait_for(wanted, SHOWS_UP_SECONDS):
            if not run.has_ended():
                self.report(f"no {wanted} has shown up in {SHOWS_UP_SECONDS:g} s", run)
            return False
        time.sleep(self.random.uniform(0.0, 0.6))
        if wanted == "xdist worker":
            # xdist itself ends with an internal error when a worker dies while it is bootstrapped,
            # so only one that runs tests counts: it has a server.
            run.wait_for("fork server", SHOWS_UP_SECONDS)
        # It may have ended by now, and have been followed by another.
        found = run.wait_for(wanted, SHOWS_UP_SECONDS)
        if wanted == "xdist worker":
            found = [one for one in found if _has_children(one)]
        if not found:
            return not run.has_ended()
        victim = self.random.choice(sorted(found, key=lambda one: one.pid))
        number = self.random.choice(FAIR[wanted])
        dead = self.kill(run, victim, wanted, number)
        if dead is None or wanted in _UNNOTICED or not kind.goes_on:
            return not run.has_ended()
        if run.wait_for("rank", SHOWS_UP_SECONDS, since=dead):
            return True
        self.report(f"after {number.name} to a {wanted}, no rank was started any more", run)
        return False

    def top(self, run: Run, name: str) -> None:
        """Kill the process that was started: nothing of the run is left."""
        number = self.random.choice(FAIR[name])
        # It has come so far that it is ours, not Python's, to end in order.
        has_begun = name.startswith("rpcprops") and "clock: " in run.text
        if self.kill(run, psutil.Process(run.process.pid), name, number) is None:
            return
        if has_begun and number == INT:
            code = run.process.poll()
            if code not in (130, None):
                self.report(f"a Ctrl-C ends {name} with {code}, not 130", run)
            if "Traceback (most recent call last)" in run.text:
                self.report(f"a Ctrl-C ends {name} with a traceback", run)

    def kill(
        self, run: Run, victim: psutil.Process, name: str, number: signal.Signals
    ) -> float | None:
        """Kill one, and look for what is left of it. When it died, or None if it had ended."""
        if not processes.stop(victim):
            return None
        is_top = victim.pid == run.process.pid
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = victim.children(recursive=True)
        has_ranks = any(processes.role(one, run.process.pid) == "rank" for one in below)
        died = time.time()
        processes.send(victim, number)
        self.note(f"{number.name} to {name} {victim.pid}")
        self.count(f"{name} by {number.name}")
        # Of one inside, what was below it; of the started one, all that there is.
        bound = processes.GONE_SECONDS
        if name == "xdist controller" and number == INT:
            bound += XDIST_SECONDS
        left = run.left_after(bound, None if is_top else [victim, *below])
        if run.late and not left:
            self.count(f"later than {bound:g} s, on a loaded machine")
        if left:
            late = run.left_after(10.0, None if is_top else [victim, *below])
            more = f"; after {time.time() - died:.0f} s: {len(late)}" if late else ""
            gone = "" if late else f"; gone after {time.time() - died:.1f} s"
            listed = "\n  ".join(left)
            self.report(
                f"{bound:g} s after {number.name} to the {name}, {len(left)} "
                f"processes are left{more}{gone}:\n  {listed}"
            )
        by_signal = number == KILL or (is_top and run.process.poll() == -number)
        tests = name in ("pytest", "xdist worker", "rpcprops check", "rpcprops hunt")
        if (tests or name == "rpcprops sweep") and has_ranks and by_signal:
            self.count("under way")
            self.expect_in_flight(victim.pid, name, number, died)
        return died

    def expect_in_flight(self, pid: int, name: str, number: signal.Signals, died: float) -> None:
        """What a test process was running when it died is on disk."""
        if list((self.folder / ".rpcprops" / "underway").glob(f"{pid}-*.json")):
            return
        moved = [
            path
            for path in (self.folder / ".rpcprops" / "failures").glob("*.json")
            if path.stat().st_mtime >= died and json.loads(path.read_text()).get("underway")
        ]
        if not moved:
            self.report(
                f"{number.name} to the {name} {pid}: its ranks ran, and no file of the example "
                f"under way is left"
            )

    def next_run(self, command: Sequence[str], *, replays: bool) -> None:
        """The next run passes, names what was under way, and `replay` takes that."""
        in_flight = self.folder / ".rpcprops" / "underway"
        waiting = {path.name for path in in_flight.glob("*.json")}
        run = self.start(command)
        try:
            code = run.process.wait(NEXT_RUN_SECONDS)
        except subprocess.TimeoutExpired:
            self.report(f"the next run did not end in {NEXT_RUN_SECONDS:g} s", run)
            return
        if code != 0:
            self.report(f"the next run ended with {code}", run)
        self.note(f"the run has ended with {code}")
        left = run.left_after(processes.GONE_SECONDS)
        if left:
            self.report(f"the next run left {left}")
        named = re.search(r"an earlier run died during .*?: rpcprops replay (\S+)", run.text)
        if waiting and named is None:
            self.report(f"the next run did not name what was under way: {sorted(waiting)}", run)
        still = {path.name for path in in_flight.glob("*.json")} & waiting
        if still:
            self.report(f"the next run left what was under way where it was: {sorted(still)}", run)
        if named is not None and replays:
            self.replay(named[1])

    def replay(self, path: str) -> None:
        """`rpcprops replay` runs the example that was under way, which holds."""
        run = self.start(_command("replay", path, "--times", "1", "--no-needed"))
        try:
            code = run.process.wait(NEXT_RUN_SECONDS)
        except subprocess.TimeoutExpired:
            self.report(f"replay {path} did not end in {NEXT_RUN_SECONDS:g} s", run)
            return
        if code != 0:
            self.report(f"replay {path} of an example that was under way ended with {code}", run)
        else:
            self.count("replayed")

    def look_at_files(self) -> None:
        """No file of ours lies anywhere but in .rpcprops."""
        strangers = {path.name for path in self.folder.iterdir()} - ALLOWED
        if strangers:
            self.report(f"files in the working directory: {sorted(strangers)}")
        half = list((self.folder / ".rpcprops").rglob("*.tmp"))
        if half:
            self.report(f"half-written files: {half}")
        for run in self.runs:
            found = [one for one in run.scratch.iterdir() if not one.name.startswith(_NOT_OURS)]
            if found:
                command = " ".join(run.command[2:4])
                self.report(f"temporary files of {command}: {[one.name for one in found]}")
        pids = {str(run.process.pid) for run in self.runs}
        for place in ("/tmp", "/dev/shm"):
            ours = [one for one in os.listdir(place) if pids & set(re.findall(r"\d+", one))]
            if ours:
                self.report(f"files in {place}: {ours}")


def _has_children(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.children())
    return False


@pytest.fixture
def deaths(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> Iterator[Deaths]:
    """A folder of a user's with tests and artefacts; what was found wrong fails the test."""
    given = os.environ.get("RPCPROPS_STRESS_SEED")
    seed = int(given) if given else seed_of_this_run()
    folder, logs = tmp_path / "run", tmp_path / "logs"
    (folder / "input").mkdir(parents=True)
    logs.mkdir()
    (folder / "test_user.py").write_text(CODE, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    _write_artefacts(folder)

    def count(what: str) -> None:
        # pytest prints the sums at its end.
        record_property("death", what)

    made = Deaths(folder, logs, random.Random(f"{seed} {request.node.name}"), count)
    try:
        yield made
        made.look_at_files()
    finally:
        for run in made.runs:
            run.kill()
    print("\n".join(made.events))
    if made.problems:
        head = f"seed {seed}: RPCPROPS_STRESS_SEED={seed} pytest '{request.node.nodeid}'"
        pytest.fail("\n\n".join([head, "\n".join(made.events), *made.problems]), pytrace=False)


def _write_artefacts(folder: Path) -> None:
    """Two for `replay` to run for a long time: of a program, and of a test."""
    program = Program(2, (Remote(0, 1, "a"), Drop(0, "a")))
    plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 1))
    test = artefacts.Artefact(
        "pytest",
        "test_user.py::test_once",
        "AssertionError",
        plans=(FaultPlan(),),
        rootdir=str(folder),
        world_sizes=(2,),
    )
    made = artefacts.Artefact("program", "rref-values", "RRefLeak", program=program, plans=(plan,))
    for name, artefact in (("program", made), ("test", test)):
        data = json.dumps(artefacts.to_data(artefact))
        (folder / "input" / f"{name}.json").write_text(data, encoding="utf-8")


def one_run(deaths: Deaths, name: str, inner: Sequence[str]) -> None:
    """Start a run, kill some of its processes, then itself."""
    kind = KINDS[name]
    run = deaths.start(kind.command)
    for wanted in inner:
        if not deaths.inner(run, wanted, kind):
            break
    if not inner:
        time.sleep(deaths.random.uniform(0.0, START_SECONDS))
    elif deaths.random.random() < 0.7:
        # While an example is under way.
        run.wait_for("rank", SHOWS_UP_SECONDS)
        time.sleep(deaths.random.uniform(0.0, 0.05))
    if run.has_ended():
        left = run.left_after(processes.GONE_SECONDS)
        if left:
            deaths.report(f"the run ended, and left {left}", run)
    else:
        deaths.top(run, processes.role(psutil.Process(run.process.pid), run.process.pid))
    run.kill()


# In every run tests/cluster kills each of these at a moment that is chosen: test_servers.py
# the servers, test_leftovers.py the test process, test_deaths.py ranks, test_preforked.py the rest.
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pytest", "commands", "xdist"])
def test_deaths(deaths: Deaths, name: str) -> None:
    """Some processes, killed at random: nothing of theirs is left, and the next run works."""
    if name == "commands":
        for chosen in (deaths.random.choice(["check", "hunt", "sweep"]), "replay of a test"):
            one_run(deaths, chosen, ())
        deaths.next_run(_AFTER_COMMAND, replays=False)
        return
    inner = {
        "pytest": ["pre-forked rank", "rank", "child of a rank", "module server"],
        "xdist": ["pre-forked rank", "rank", "fork server", "xdist worker"],
    }[name]
    deaths.random.shuffle(inner)
    one_run(deaths, name, inner)
    deaths.next_run(KINDS[name].after, replays=name == "pytest")


_began = time.monotonic()


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("turn", range(24))
def test_many_deaths(deaths: Deaths, name: str, turn: int) -> None:
    """Some hundred processes of runs of each kind, killed at random, leave nothing."""
    if time.monotonic() - _began > NIGHTLY_SECONDS:
        pytest.skip(f"the {NIGHTLY_SECONDS} s for the deaths of a night are spent")
    kind = KINDS[name]
    # Every fourth at a moment that may be before anything has been forked.
    inner = list(kind.victims) * (turn % 4 != 0)
    deaths.random.shuffle(inner)
    one_run(deaths, name, inner[:4])
    deaths.next_run(kind.after, replays=True)


def test_the_look_finds_what_is_left(tmp_path: Path) -> None:
    """A process that has another parent and session by now is found by its mark, and killed."""
    script = "import subprocess; subprocess.run(['setsid', '--fork', 'sleep', '987654'])"
    run = Run.start([sys.executable, "-c", script], tmp_path, tmp_path)
    try:
        assert run.process.wait(20) == 0
        (left,) = run.left_after(0.2)
        assert left.startswith("child of a rank ")
        assert run.processes("child of a rank")[0].ppid() != run.process.pid
    finally:
        run.kill()
    assert not run.left_after(0.0)
