"""The example that is about to run, in a file of its own, in case its process is killed.

The file is an artefact without a failure: ``.rpcprops/underway/PID-START.json``, where START is
when the process began, so that a number that is used again is not taken for the same process. It is
replaced by rename before each cluster starts, and removed when the process ends in order. What a
dead process left is moved to the failures by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.programs import Program
from rpcprops.report import _artefact as artefacts

#: Below the working directory (or pytest's root).
DIRECTORY = Path(".rpcprops") / "underway"


Reproduction = Callable[[], tuple[str, str] | None]


class Underway:
    """Writes down each cluster that this process starts, before it starts.

    Set as the `on_start` of a server. Where the file cannot be written, nothing is.

    Args:
        root: the folder that holds ``.rpcprops``.
        kind: "program", "upstream" or "pytest", as in an artefact.
    """

    def __init__(self, root: Path, kind: str = "program") -> None:
        self.kind = kind
        self.root = root
        pid = os.getpid()
        self.path = root / DIRECTORY / f"{pid}-{_started(pid)}.json"
        self._kind = kind
        self._made = False
        self._subject = ""
        self._reproduction: Reproduction = lambda: None
        self._plans: tuple[FaultPlan, ...] = ()
        self._sizes: tuple[int, ...] = ()

    def begin(self, subject: str, kind: str | None = None) -> None:
        """The property or test that comes next; what starts before has no name, and is left out.

        `kind` is that of the whole process unless given.
        """
        self._subject = subject
        self._kind = kind or self.kind
        self.example(lambda: None)

    def example(self, reproduction: Reproduction) -> None:
        """The example that comes next, and what gives Hypothesis's version and blob for it."""
        self._reproduction = reproduction
        self.again()

    def again(self) -> None:
        """The same example comes once more."""
        self._plans, self._sizes = (), ()

    def __call__(self, cluster: Cluster) -> None:
        """Write down that a cluster starts."""
        if not self._subject:
            return
        kind, program = self._kind, cluster.program
        if kind == "pytest":
            self._plans += (cluster.plan,)
            self._sizes += (cluster.world_size,)
        else:
            self._plans, self._sizes = (cluster.plan,), (cluster.world_size,)
            if program is None:
                return
            if kind == "program" and not cluster.init:
                kind = "reinit"
        self._write(
            artefacts.Artefact(
                kind=kind,
                subject=self._subject,
                promise="",
                program=program,
                plans=self._plans,
                clock_rate=cluster.rate,
                transport=cluster.transport,
                reproduction=self._reproduction(),
                rootdir=str(self.root) if kind == "pytest" else "",
                world_sizes=self._sizes,
                underway=True,
            )
        )

    def _write(self, artefact: artefacts.Artefact) -> None:
        temporary = self.path.with_suffix(".writing")
        try:
            if not self._made:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made = True
            temporary.write_text(json.dumps(artefacts.to_data(artefact)), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            # A folder that cannot be written is no reason to fail a test.
            self._subject = ""

    def clear(self) -> None:
        """Nothing is under way: remove the file."""
        self._subject = ""
        if self._made:
            self.path.unlink(missing_ok=True)


@contextmanager
def watched(server: ClusterServer) -> Iterator[Underway]:
    """Writes down what a server runs, below the working directory, until the block is left."""
    underway = Underway(Path.cwd())
    server.on_start = underway
    try:
        yield underway
    finally:
        server.on_start = None
        underway.clear()


def collect(root: Path) -> list[tuple[str, Path]]:
    """Move what dead processes left to the failures; the subject and new path of each."""
    found: list[tuple[str, Path]] = []
    for path in sorted((root / DIRECTORY).glob("*-*.*")):
        pid, _, started = path.stem.partition("-")
        if pid.isdecimal() and started == _started(int(pid)):
            continue
        if path.suffix != ".json":
            path.unlink(missing_ok=True)  # half written
            continue
        try:
            artefact = artefacts.read(path)
            head = _head(artefact.program, artefact.plans, artefact.sizes)
            moved = artefacts.write(replace(artefact, head=head), root / artefacts.DIRECTORY)
            path.unlink(missing_ok=True)
        except (UsageError, OSError):
            continue
        found.append((artefact.subject, moved))
    return found


def describe_died(root: Path) -> str:
    """One line about what :func:`collect` finds below `root`; empty when that is nothing."""
    from rpcprops.report._text import replay_line

    found = collect(root)
    if not found:
        return ""
    subject, path = found[0]
    try:
        path = path.relative_to(Path.cwd())
    except ValueError:
        pass
    more = f" (and {len(found) - 1} more in {path.parent})" if len(found) > 1 else ""
    return f"an earlier run died during {subject}: {replay_line(path)}{more}"


def _head(
    program: Program | None, plans: tuple[FaultPlan, ...], sizes: tuple[int, ...]
) -> tuple[str, ...]:
    from rpcprops.report._text import describe_plan, describe_program

    lines = ["died     this was under way when its process ended"]
    for plan, size in zip(plans, sizes, strict=False):
        lines += describe_plan(plan, size)
    if program is not None:
        lines += describe_program(program)
    return tuple(lines)


def _started(pid: int) -> str:
    """When a process began, in clock ticks after boot; empty when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name in parentheses may hold anything; the 22nd field is the 20th after it.
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in ("Z", "X") else rest[18]
