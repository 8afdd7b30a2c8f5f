"""Machines that lack something: namespaces and limits that a test makes for one command of ours.

All of it is made by util-linux: unshare(1) makes the namespaces, a few lines of shell change what
is mounted in them, prlimit(1) sets limits, and setpriv(1) gives up root. The machine itself is not
changed: mounts are private to the namespace, which ends with the command.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.stress import _processes as processes

#: Where the folder of a command is mounted, so that it is reached where the temporary one is not.
_PLACE = "/mnt"
NOBODY = 65534


@dataclass(frozen=True)
class Scarcity:
    """What a machine lacks.

    Attributes:
        cause: a pattern that the message has to match where the machine cannot: the limit with its
            value, or what is missing.
        remedy: the same of what is to be done about it.
        network: False gives a network in which no interface is up.
        setup: lines of shell, run as root of the namespaces; ``$SCRATCH`` is an empty folder of
            the test's, ``$PROJECT`` the one in which the command runs.
        limits: options of prlimit(1).
        user: the user that the command runs as, where the test runs as root.
        environment: what is changed; None takes a name out.
        user_namespace: gives a user namespace of its own, even to root.
        needs_root: whether nobody but root can make it, in the user namespace of the machine.
        must_work: whether nothing that is needed is missing, so that it has to work.
    """

    cause: str = ""
    remedy: str = ""
    network: bool = True
    setup: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    user: int | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    user_namespace: bool = False
    needs_root: bool = False
    must_work: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is None where it had to be killed.

    Attributes:
        left: what of it was still there afterwards, in words.
    """

    code: int | None
    text: str
    seconds: float
    left: list[str]


def run(scarcity: Scarcity, command: Sequence[str], folder: Path, seconds: float) -> Ended:
    """Run a command in `folder` where these things are scarce; a skip where that cannot be made."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # Under some limits not even Python starts.
        _check(_prefix(replace(scarcity, limits=()), folder, Path(scratch)), folder)
        prefix = _prefix(scarcity, folder, Path(scratch))
        return _run([*prefix, *command], scarcity, folder, seconds)


def _prefix(scarcity: Scarcity, folder: Path, scratch: Path) -> list[str]:
    """What comes before the command."""
    is_root = os.geteuid() == 0
    if scarcity.needs_root and not is_root:
        pytest.skip("only root can be made another user")
    unshare = ["unshare", "--mount"]
    if scarcity.user_namespace or not is_root:
        unshare += ["--user", "--map-root-user"]
    if not scarcity.network:
        unshare.append("--net")
    lines = [
        f"SCRATCH={shlex.quote(str(scratch))}",
        # Empty again in each namespace.
        'mount -t tmpfs -o mode=755 none "$SCRATCH"',
        f"PROJECT={_PLACE}",
        f"mount --bind {shlex.quote(str(folder))} {_PLACE}",
    ]
    then = ["exec"]
    if scarcity.user is not None and is_root:
        os.chown(folder, scarcity.user, scarcity.user)
        lines += _open_to_all()
        ids = [f"--reuid={scarcity.user}", f"--regid={scarcity.user}", "--clear-groups"]
        then += ["setpriv", *ids, "--"]
    lines += scarcity.setup
    if scarcity.limits:
        then += ["prlimit", *scarcity.limits, "--"]
    lines += [f"cd {_PLACE}", f'{" ".join(then)} "$@"']
    return [*unshare, "--", "sh", "-euc", "\n".join(lines), "sh"]


def _open_to_all() -> list[str]:
    """Lines that make Python and the package reachable where a folder above is root's alone."""
    package = Path(__file__).parents[2]
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), package.resolve()}
    closed: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    binds: list[str] = []
    moves: list[str] = []
    for parent, paths in closed.items():
        moves.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(parent))}")
        for path in paths:
            number = len(binds)
            quoted = shlex.quote(str(path))
            binds.append(f'mkdir "$SCRATCH/{number}"; mount --bind {quoted} "$SCRATCH/{number}"')
            moves.append(f'mkdir -p {quoted}; mount --move "$SCRATCH/{number}" {quoted}')
    return [*binds, *moves]


def _check(prefix: Sequence[str], folder: Path) -> None:
    """Skip where this machine does not allow such namespaces, or the user cannot read Python."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", "import msgspec, psutil"],
        cwd=folder,
        env=environment({}, "none"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        pytest.skip(f"this machine does not let a test make that scarcity: {said}")


def environment(changed: Mapping[str, str | None], mark: str) -> dict[str, str]:
    """The environment of a command, which finds this checkout and has a home of its own."""
    made = processes.environment(mark)
    package = str(Path(__file__).parents[2])
    made |= {"HOME": _PLACE, "PYTHONPATH": package, "NO_COLOR": "1"}
    for name, value in changed.items():
        if value is None:
            made.pop(name, None)
        else:
            made[name] = value
    return made


def _run(command: Sequence[str], scarcity: Scarcity, folder: Path, seconds: float) -> Ended:
    mark = uuid.uuid4().hex
    began = time.monotonic()
    # A pipe, not a file: RLIMIT_FSIZE would be about the file.
    with subprocess.Popen(
        list(command),
        cwd=folder,
        env=environment(scarcity.environment, mark),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        code: int | None = None
        try:
            said, _ = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            processes.kill_marked(mark)
            said, _ = process.communicate(timeout=20)
        took = time.monotonic() - began
        left = processes.left_of(mark, processes.GONE_SECONDS) if code is not None else []
        processes.kill_marked(mark)
    return Ended(code, said.decode(errors="replace"), took, left)
