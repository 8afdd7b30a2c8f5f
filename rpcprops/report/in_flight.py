"""The in-flight record: the example that is about to run, in a file, in case its process dies.

The file is an artefact without a failure: ``.rpcprops/underway/PID-START-WHERE.json``. START is
when the process began, because process numbers are used again. WHERE stands for the boot of the
machine and the PID namespace of the process: a container or another machine may use this folder,
and nobody can see from here whether its process lives. The file is replaced by rename before each
cluster starts, and removed when the process ends normally. The next run moves what a dead process
left to the failures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rpcprops._files import shown, write_whole
from rpcprops._kinds import kind_of
from rpcprops.cluster import Cluster, ClusterServer
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.report import artefact as artefacts

#: The folder, below the working directory (or pytest's root).
DIRECTORY = Path(".rpcprops") / "underway"
#: Real seconds after which a file of another namespace, boot or machine is taken to be of a dead
#: process. A process that runs examples replaces its file with each of them.
FOREIGN_SECONDS = 86_400.0

Reproduction = Callable[[], tuple[str, str] | None]


class InFlight:
    """Writes down each cluster that this process starts, before it starts.

    Used as the `on_start` of a server. If the file cannot be written, there is no record.

    Args:
        root: the folder that holds ``.rpcprops``.
        kind: the tag of what runs here, as in an artefact; :meth:`begin` may name another.
        agent: the agent of the clusters of tests that name none.
    """

    def __init__(self, root: Path, kind: str = "program", agent: str = "") -> None:
        self._agent = agent
        self.kind = kind
        self.root = root
        pid = os.getpid()
        self.path = root / DIRECTORY / f"{pid}-{_started(pid)}-{_here()}.json"
        #: Set to keep the file although this process will end normally.
        self.stays = False
        self._kind = kind
        self._made = False
        self._subject = ""
        self._reproduction: Reproduction = lambda: None
        self._plans: tuple[FaultPlan, ...] = ()
        self._sizes: tuple[int, ...] = ()

    def begin(self, subject: str, kind: str | None = None) -> None:
        """Name the next property or test; clusters before the first have no name, and no record.

        `kind` is by default that of the whole process.
        """
        self._subject = subject
        self._kind = kind or self.kind
        self.example(lambda: None)

    def example(self, reproduction: Reproduction) -> None:
        """Announce the next example; `reproduction` gives Hypothesis's version and blob for it."""
        self._reproduction = reproduction
        self.again()

    def again(self) -> None:
        """Announce that the same example runs once more."""
        self._plans, self._sizes = (), ()

    def __call__(self, cluster: Cluster) -> None:
        """Write down that a cluster starts."""
        if not self._subject:
            return
        kind = kind_of(self._kind).in_cluster(init=cluster.init)
        if not kind.by_pytest:
            if cluster.program is None:
                return
            self.again()
        self._plans += (cluster.plan,)
        self._sizes += (cluster.world_size,)
        self._write(
            artefacts.Artefact(
                kind=kind.tag,
                subject=self._subject,
                promise="",
                program=cluster.program,
                plans=self._plans,
                clock_rate=cluster.rate,
                transport=cluster.transport,
                reproduction=self._reproduction(),
                rootdir=str(self.root) if kind.by_pytest else "",
                world_sizes=self._sizes,
                underway=True,
                may_be_used=cluster.may_reuse,
                chosen_agent=self._agent if kind.by_pytest else cluster.options.agent,
            )
        )

    def _write(self, artefact: artefacts.Artefact) -> None:
        try:
            if not self._made:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made = True
            # Under a name that says which process writes it, so that `collect` finds half a file.
            temporary = self.path.with_suffix(".writing")
            write_whole(self.path, json.dumps(artefacts.to_data(artefact)), temporary=temporary)
        except OSError:
            # An unwritable folder is no reason to fail a test. But the file of the example before
            # would name the wrong one, so it is removed.
            self.clear()

    def clear(self) -> None:
        """Remove the file: no example is running."""
        self._subject = ""
        if self._made and not self.stays:
            _remove(self.path)
            # The folder may be gone by the next time, so it is made again.
            self._made = False


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def watched(server: ClusterServer) -> Iterator[InFlight]:
    """Write down what a server runs, below the working directory, until the block is left."""
    in_flight = InFlight(Path.cwd())
    server.on_start = in_flight
    try:
        yield in_flight
    finally:
        server.on_start = None
        in_flight.clear()


@dataclass(frozen=True)
class Died:
    """An example that was running when its process was killed.

    Attributes:
        subject: the property or test.
        path: its artefact.
    """

    subject: str
    path: Path


def collect(root: Path, *, removes: bool = True) -> list[Died]:
    """Write what dead processes left to the failures, and remove their files if `removes`."""
    found: list[Died] = []
    try:
        paths = sorted((root / DIRECTORY).glob("*-*.*"))
    except OSError:
        return []
    for path in paths:
        pid, _, rest = path.stem.partition("-")
        started, _, where = rest.partition("-")
        if pid.isdecimal() and _may_live(path, int(pid), started, where):
            continue
        if path.suffix != ".json":
            if removes:
                _remove(path)  # incomplete
            continue
        try:
            artefact = artefacts.read(path)
        except (UsageError, OSError):
            continue
        moved = artefacts.write_or_say(
            replace(artefact, head=_head(artefact)), root / artefacts.DIRECTORY
        )
        if not isinstance(moved, Path):
            moved = path  # it can be replayed from there
        elif removes:
            _remove(path)
        found.append(Died(artefact.subject, moved))
    return found


def describe_died(root: Path) -> str:
    """One line about what :func:`collect` finds below `root`; empty if it finds nothing."""
    return died_line(collect(root))


def died_line(found: Collection[Died], who: str = "an earlier run") -> str:
    """One line about the examples that dead processes were running; empty if there are none."""
    if not found:
        return ""
    from rpcprops.report.text import replay_line

    first = next(iter(found))
    folder = shown(first.path).parent
    more = f" (and {len(found) - 1} more in {folder})" if len(found) > 1 else ""
    return f"{who} died during {first.subject}: {replay_line(first.path)}{more}"


def _head(artefact: artefacts.Artefact) -> tuple[str, ...]:
    from rpcprops.report.text import describe_plan

    lines = ["died     this was under way when its process ended"]
    for plan, size in zip(artefact.plans, artefact.sizes, strict=False):
        lines += describe_plan(plan, size)
    if artefact.may_be_used:
        lines.append("world    its ranks may have run others before; a replay has fresh ranks")
    kind = kind_of(artefact.kind)
    return (*lines, *kind.foreword, *kind.describe(artefact.subject, artefact.program))


@functools.cache
def _here() -> str:
    """A short name for this boot and this PID namespace, in which process numbers are unique."""
    parts: list[str] = []
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    except OSError:
        # The next best name of a machine.
        parts.append(socket.gethostname())
    try:
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        parts.append("")
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:12]


def _may_live(path: Path, pid: int, started: str, where: str) -> bool:
    """Whether the process that wrote a file may still run, as far as this process can see."""
    if where not in ("", _here()):
        # The process number means nothing here.
        try:
            return time.time() - path.stat().st_mtime < FOREIGN_SECONDS
        except OSError:
            return True
    now = _started(pid)
    if now or not _is_hidden(pid):
        return bool(now) and now == started
    return True


def _is_hidden(pid: int) -> bool:
    """Whether /proc hides an existing process from this user (its hidepid option)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except (OSError, OverflowError):
        pass
    return False


def _started(pid: int) -> str:
    """The start of a process, in clock ticks after boot; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name in parentheses may contain anything; the 22nd field is the 20th after it.
    state, *rest = text.rpartition(")")[2].split()
    return "" if state in ("Z", "X") else rest[18]
