"""Limits of the machine are told before a rank runs into them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from rpcprops.cluster import _limits
from rpcprops.errors import MachineCannot

UNLIMITED = resource.RLIM_INFINITY
MIB = 1 << 20


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The limits of this process, soft and hard, as the test sets them; unlimited else."""
    given: dict[int, tuple[int, int]] = {}

    def read(number: int) -> tuple[int, int]:
        return given.get(number, (UNLIMITED, UNLIMITED))

    monkeypatch.setattr(resource, "getrlimit", read)
    monkeypatch.setattr(resource, "setrlimit", given.__setitem__)
    monkeypatch.setattr(_limits, "_limited_cgroups", lambda: ())
    return given


def test_without_limits_any_world_can_be(limits: dict[int, tuple[int, int]]) -> None:
    """Nothing is refused, and nothing is changed."""
    _limits.check(16, "shm", 1024)
    assert limits == {}


@pytest.mark.parametrize(
    ("number", "limit", "said"),
    [
        (
            resource.RLIMIT_NOFILE,
            128,
            r"limited to 128, .* about 176\. .*`ulimit -Hn`",
        ),
        (resource.RLIMIT_AS, 1000 * MIB, r"limited to 1000 MiB, .* about 1900 MiB.*`ulimit -v`"),
        (resource.RLIMIT_DATA, 100 * MIB, r"limited to 100 MiB, .* about 480 MiB.*`ulimit -d`"),
        (resource.RLIMIT_FSIZE, 0, r"limited to 0 MiB, .* about 4 MiB.*`ulimit -f`"),
    ],
)
def test_a_limit_that_is_too_low_is_named(
    limits: dict[int, tuple[int, int]], number: int, limit: int, said: str
) -> None:
    """The message has the limit, what a rank needs, and the command that raises it."""
    limits[number] = (limit, limit)
    with pytest.raises(MachineCannot, match=said):
        _limits.check(2, "tcp", 8)


def test_what_a_rank_needs_grows_with_its_world(limits: dict[int, tuple[int, int]]) -> None:
    """A limit that lets two ranks be is too low for sixteen, and for shared memory."""
    limits[resource.RLIMIT_NOFILE] = (280, 280)
    _limits.check(2, "tcp", 8)
    with pytest.raises(MachineCannot, match="world of 16 needs about 288"):
        _limits.check(16, "tcp", 8)
    with pytest.raises(MachineCannot, match="world of 2 needs about 282"):
        _limits.check(2, "shm", 8)


def test_a_soft_limit_of_descriptors_is_raised(limits: dict[int, tuple[int, int]]) -> None:
    """The test process takes what it needs; a server as much as ranks may ever want."""
    limits[resource.RLIMIT_NOFILE] = (20, 100_000)
    _limits.check(4, "tcp", 8)
    soft, hard = limits[resource.RLIMIT_NOFILE]
    assert 40 < soft < 1000
    assert hard == 100_000
    _limits.raise_soft_limits()
    assert limits[resource.RLIMIT_NOFILE] == (8192, 100_000)


def test_no_limit_is_ever_lowered(limits: dict[int, tuple[int, int]]) -> None:
    """What is higher than needed stays."""
    limits[resource.RLIMIT_NOFILE] = (20_000, 20_000)
    limits[resource.RLIMIT_FSIZE] = (100, 5 * MIB)
    _limits.raise_soft_limits()
    assert limits[resource.RLIMIT_NOFILE] == (20_000, 20_000)
    assert limits[resource.RLIMIT_FSIZE] == (5 * MIB, 5 * MIB)


def test_threads_of_the_user_count(
    limits: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user runs already is no room for ranks; the kernel exempts root."""
    limits[resource.RLIMIT_NPROC] = (200, 200)
    monkeypatch.setattr(_limits, "_threads_of_user", lambda: 150)
    monkeypatch.setattr("os.getuid", lambda: 1000)
    with pytest.raises(MachineCannot, match=r"may have 200 threads and has 150; .* about 64"):
        _limits.check(2, "tcp", 8)
    monkeypatch.setattr("os.getuid", lambda: 0)
    _limits.check(2, "tcp", 8)


def test_a_control_group_counts(
    limits: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container's limit of processes is read where the kernel keeps it."""
    (tmp_path / "pids.max").write_text("100\n")
    (tmp_path / "pids.current").write_text("90\n")
    monkeypatch.setattr(_limits, "_limited_cgroups", lambda: (tmp_path,))
    with pytest.raises(MachineCannot, match=r"control group .* 100 .* and has 90; .*pids\.max"):
        _limits.check(2, "tcp", 8)
    (tmp_path / "pids.current").write_text("10\n")
    _limits.check(2, "tcp", 8)


def test_the_threads_of_this_user_are_counted() -> None:
    """At least those of this process, as the kernel has them."""
    own = len(list(Path("/proc/self/task").iterdir()))
    assert _limits._threads_of_user() >= own


@pytest.mark.parametrize(
    "text",
    [
        "OSError: [Errno 24] Too many open files",
        "RuntimeError: can't start new thread",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "what():  Resource temporarily unavailable",
    ],
)
def test_scarcity_is_known_by_its_words(text: str) -> None:
    """Those of the C library, of libstdc++ and of CPython."""
    assert _limits.scarcity(text)
    assert not _limits.scarcity("ValueError: 3 is too many")
