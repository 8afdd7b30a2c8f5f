"""Machines that lack something: a check works there, or says what is missing and what to do.

It never calls torch broken because of the machine, shows no traceback, hangs or leaves a process.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.stress import _limits as limits
from tests.stress import _processes as processes
from tests.stress._limits import NOBODY, Scarcity

#: Real seconds within which a command has to have said what it can say.
HANG_SECONDS = 30.0
#: What a remedy is made of, in whatever words; each kind of scarcity may ask for more.
REMEDY = (
    r"raise|lower|set |free|make|mount|bring|run |use |unset|give|allow|choose|start|needs?\b|"
    r"at least|increase|more|chown|chmod|remove|point"
)
#: The number of a user of nobody else's, of which there is no entry in the user database either.
UNKNOWN_USER = 50_000 + os.getpid() % 10_000


def _open_files(count: int) -> Scarcity:
    return Scarcity(
        cause=rf"(ulimit -n|RLIMIT_NOFILE|open files|descriptors).*\b{count}\b|"
        rf"\b{count}\b.*(ulimit -n|RLIMIT_NOFILE|open files|descriptors)",
        remedy=r"ulimit|raise|at least|limit",
        limits=(f"--nofile={count}:{count}",),
    )


def _processes(count: int) -> Scarcity:
    return Scarcity(
        cause=rf"(ulimit -u|RLIMIT_NPROC|processes|threads).*\b{count}\b|"
        rf"\b{count}\b.*(ulimit -u|RLIMIT_NPROC|processes|threads)",
        remedy=r"ulimit|raise|at least|limit",
        limits=(f"--nproc={count}:{count}",),
        user=UNKNOWN_USER,
    )


def _memory(mib: int) -> Scarcity:
    size = mib << 20
    return Scarcity(
        cause=r"(ulimit -v|RLIMIT_AS|address space|memory).*"
        rf"({size}|{size >> 10}|{mib}|{mib >> 10})",
        remedy=r"ulimit|raise|at least|limit",
        limits=(f"--as={size}:{size}",),
    )


def _file_size(size: int) -> Scarcity:
    return Scarcity(
        cause=rf"size of a file is limited to {size / 2**20:.4g} MiB",
        remedy=r"ulimit|raise|at least|limit",
        limits=(f"--fsize={size}:{size}",),
    )


#: A /dev without /dev/shm.
_BARE_DEV = (
    'mkdir "$SCRATCH/dev"; mount -t tmpfs -o mode=755 none "$SCRATCH/dev"',
    'for name in null zero full random urandom tty; do : > "$SCRATCH/dev/$name"; '
    'mount --bind "/dev/$name" "$SCRATCH/dev/$name"; done',
    'ln -s /proc/self/fd "$SCRATCH/dev/fd"; mount --move "$SCRATCH/dev" /dev',
)
_FULL = "head -c 65536 /dev/zero > {0}/full || true"
_READ_ONLY = (
    'mkdir -p "$PROJECT/.rpcprops"; mount --bind "$PROJECT/.rpcprops" "$PROJECT/.rpcprops"',
    'mount -o remount,ro,bind "$PROJECT/.rpcprops"',
)
#: Written below is what can be done without, so that nothing else may be said than that it works.
SCARCITIES: dict[str, Scarcity] = {
    "no interface up": Scarcity(
        cause=r"\blo\b|loopback", remedy=r"ip link|ifconfig|up\b", network=False
    ),
    "no interface up, unprivileged": Scarcity(
        cause=r"\blo\b|loopback",
        remedy=r"ip link|ifconfig|up\b",
        network=False,
        user=NOBODY,
        needs_root=True,
    ),
    "64 open files": _open_files(64),
    "128 open files": _open_files(128),
    "256 open files": _open_files(256),
    "64 open files, 4096 if asked for": Scarcity(
        cause=r"(ulimit -n|RLIMIT_NOFILE|open files|descriptors).*\b64\b",
        remedy="ulimit|raise|at least",
        limits=("--nofile=64:4096",),
    ),
    "5 processes": _processes(5),
    "12 processes": _processes(12),
    "24 processes": _processes(24),
    "64 processes": _processes(64),
    "256 MiB of memory": _memory(256),
    "1 GiB of memory": _memory(1 << 10),
    "2 GiB of memory": _memory(2 << 10),
    "4 GiB of memory": _memory(4 << 10),
    "no byte in files": _file_size(0),
    "4 KiB in files": _file_size(4 << 10),
    "1 MiB in files": _file_size(1 << 20),
    "/dev/shm full": Scarcity(
        setup=("mount -t tmpfs -o size=64k none /dev/shm", _FULL.format("/dev/shm")),
        must_work=True,
    ),
    "/dev/shm absent": Scarcity(setup=_BARE_DEV, must_work=True),
    "/tmp read-only": Scarcity(setup=("mount -t tmpfs -o ro none /tmp",), must_work=True),
    "/tmp full": Scarcity(
        setup=("mount -t tmpfs -o size=64k none /tmp", _FULL.format("/tmp")), must_work=True
    ),
    "nowhere to write temporary files": Scarcity(
        cause=r"temporary|/tmp|TMPDIR",
        remedy="TMPDIR|writ",
        setup=(
            "mount -t tmpfs -o ro none /tmp; mount -t tmpfs -o ro none /var/tmp",
            'mount -o remount,ro,bind "$PROJECT"',
        ),
    ),
    ".rpcprops read-only": Scarcity(setup=_READ_ONLY, must_work=True),
    ".rpcprops of another user": Scarcity(
        setup=('mkdir -p -m 755 "$PROJECT/.rpcprops"',),
        user=NOBODY,
        needs_root=True,
        must_work=True,
    ),
    "working directory read-only": Scarcity(
        setup=('mount -o remount,ro,bind "$PROJECT"',), must_work=True
    ),
    "no HOME": Scarcity(environment={"HOME": None}, must_work=True),
    "no HOME, and no such user": Scarcity(
        environment={"HOME": None, "USER": None, "LOGNAME": None},
        user=UNKNOWN_USER,
        needs_root=True,
        must_work=True,
    ),
    "HOME that cannot be written": Scarcity(
        environment={"HOME": "/nowhere"}, user=NOBODY, needs_root=True, must_work=True
    ),
    "/proc with hidepid": Scarcity(
        setup=("mount -t proc -o hidepid=2 proc /proc",),
        user=NOBODY,
        needs_root=True,
        must_work=True,
    ),
    "no user namespaces": Scarcity(
        setup=("echo 0 > /proc/sys/user/max_user_namespaces",),
        user_namespace=True,
        must_work=True,
    ),
    "no network namespaces": Scarcity(
        setup=(
            "echo 0 > /proc/sys/user/max_net_namespaces",
            "echo 0 > /proc/sys/user/max_user_namespaces",
        ),
        user_namespace=True,
        must_work=True,
    ),
    "no network namespaces, no interface up": Scarcity(
        cause=r"\blo\b|loopback",
        remedy=r"ip link|ifconfig|up\b",
        network=False,
        setup=(
            "echo 0 > /proc/sys/user/max_net_namespaces",
            "echo 0 > /proc/sys/user/max_user_namespaces",
        ),
        user_namespace=True,
    ),
}

#: What every run of the tests looks at; the rest is for the night.
SHORT = ("no interface up", "64 open files", "12 processes", "no byte in files")

#: Where no code of ours runs. pytest keeps what is printed in a temporary file, and does not start
#: where it cannot make or write one; 256 MiB do not suffice for the test's own `import torch`.
NOT_FOR_PYTEST = ("nowhere to write temporary files", "no byte in files", "256 MiB of memory")

CODE = """
import torch
from torch.distributed import rpc


def value():
    return rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1)).item()


def test_value(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(value) == 2
"""


def _chosen() -> list[object]:
    return [
        pytest.param(name, marks=[] if name in SHORT else [pytest.mark.nightly])
        for name in SCARCITIES
    ]


def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "test_user.py").write_text(CODE, encoding="utf-8")
    return folder


def _wrong(name: str, ended: limits.Ended, cannot: int, violated: str) -> list[str]:
    """What is wrong with how a command of ours ended where something is scarce."""
    scarcity = SCARCITIES[name]
    wrong: list[str] = []
    if ended.code is None:
        wrong.append(f"it hung: killed after {ended.seconds:.0f} s")
    elif ended.code not in (0, cannot) or (ended.code and scarcity.must_work):
        wrong.append(f"exit code {ended.code}")
    if "Traceback (most recent call last)" in ended.text:
        wrong.append("it shows a traceback")
    if re.search(violated, ended.text):
        wrong.append("it calls torch broken")
    if ended.code == cannot and not scarcity.must_work:
        # What is said of a limit may be on several lines.
        if not re.search(scarcity.cause, ended.text, re.IGNORECASE | re.DOTALL):
            wrong.append(f"it does not name the cause, {scarcity.cause!r}")
        if not re.search(scarcity.remedy, ended.text, re.IGNORECASE) or not re.search(
            REMEDY, ended.text, re.IGNORECASE
        ):
            wrong.append(f"it names no remedy, {scarcity.remedy!r}")
    if ended.left:
        wrong.append(f"it left {ended.left}")
    return wrong


@pytest.mark.parametrize("name", _chosen())
def test_check_where_something_is_scarce(tmp_path: Path, name: str) -> None:
    """`rpcprops check` holds, or ends with 3 and says what is missing and what to do."""
    command = processes.python("rpcprops", "check", "rref-values", "-n", "3", "--seed", "3")
    ended = limits.run(SCARCITIES[name], command, _folder(tmp_path), HANG_SECONDS)
    wrong = _wrong(name, ended, 3, r"\bviolated\b.*rref-values|\bundecided\b.*rref-values")
    assert not wrong, f"{name}: {wrong}, after {ended.seconds:.1f} s\n{ended.text[-3000:]}"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in SCARCITIES if name not in NOT_FOR_PYTEST])
def test_pytest_where_something_is_scarce(tmp_path: Path, name: str) -> None:
    """A test of a user's passes, or fails with what is missing and what to do."""
    command = processes.python("pytest", "-q", "-p", "no:cacheprovider", "test_user.py")
    ended = limits.run(SCARCITIES[name], command, _folder(tmp_path), HANG_SECONDS)
    broken = r"E +\S*(RankDied|RankHung|RRefLeak|UngracefulShutdown|ErrorInLog|HarnessError)"
    wrong = _wrong(name, ended, 1, broken)
    assert not wrong, f"{name}: {wrong}, after {ended.seconds:.1f} s\n{ended.text[-3000:]}"


def test_nothing_is_scarce_by_itself(tmp_path: Path) -> None:
    """In namespaces of its own, as nobody and with no limit, a command runs as it always does."""
    code = "import os, resource; print(os.getcwd(), resource.getrlimit(resource.RLIMIT_NPROC)[0])"
    command = [sys.executable, "-c", code]
    asked = Scarcity(user=NOBODY, limits=("--nproc=77:77",))
    ended = limits.run(asked, command, _folder(tmp_path), HANG_SECONDS)
    assert (ended.code, ended.text.split(), ended.left) == (0, ["/mnt", "77"], [])
