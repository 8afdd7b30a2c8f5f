"""Shards on several machines: what each draws, and the example database that they share.

A folder stands for each machine. Tests in CI use no ranks: they are about what Hypothesis draws and
keeps, and only that a test asks for ``rpc_cluster`` matters for that.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MakeProject = Callable[..., Any]

NO_RANKS = """
import pytest


@pytest.fixture(scope="session")
def rpc_cluster():
    return None
"""

#: Each example is a line in the file of its item. Any number of 1000 or more fails.
DRAWN = """
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def show(number):
    item = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    with Path(f"drawn-{item}").open("a") as file:
        print(number, file=file)


@settings(max_examples=60)
@given(number=st.integers(0, 10**6))
def test_drawn(rpc_cluster, number):
    show(number)
    assert number < LIMIT


@pytest.mark.parametrize("kind", ["a", "b"])
@settings(max_examples=60)
@given(number=st.integers(0, 10**6))
def test_kinds(rpc_cluster, number, kind):
    show(number)
    assert kind == "b" or number < LIMIT


LIMIT = 1000


def test_whole_1():
    show(0)


def test_whole_2():
    show(0)


def test_whole_3():
    show(0)
"""

EXAMPLES = Path(".hypothesis", "examples")


def _drawn(project: Any) -> dict[str, list[int]]:
    """What each item of a project has drawn, in order, and forget it."""
    found = {}
    for file in sorted(project.folder.glob("drawn-*")):
        numbers = file.read_text(encoding="utf-8").split()
        found[file.name.removeprefix("drawn-")] = [int(number) for number in numbers]
        file.unlink()
    return found


def test_a_failure_of_one_machine_is_replayed_first_by_all(make_project: MakeProject) -> None:
    """Shard 1 finds; with its database, shard 2 and a run without shards begin with the failure.

    Also of a test with parameters, whose shards have ids of their own.
    """
    first, second, developer = (make_project(test_user=DRAWN, conftest=NO_RANKS) for _ in range(3))
    found = first.pytest("--rpc-shards=1/2")
    assert found.code == 1, found.out
    assert "rpcprops: shard 1 of 2" in found.lines
    drawn = _drawn(first)
    assert min(n for n in drawn["test_drawn[shard1]"] if n >= 1000) == 1000
    for machine in (second, developer):
        shutil.copytree(first.folder / EXAMPLES, machine.folder / EXAMPLES)
    assert second.pytest("--rpc-shards=2/2").code == 1
    assert developer.pytest().code == 1
    there, here = _drawn(second), _drawn(developer)
    assert there["test_drawn[shard2]"][0] == here["test_drawn"][0] == 1000
    assert there["test_kinds[shard2-a]"][0] == here["test_kinds[a]"][0] == 1000
    # What is not split ran on exactly one of the two machines, and all that is not on the third.
    whole = {name for name in here if "whole" in name}
    assert len(whole) == 3
    assert whole & set(drawn) | whole & set(there) == whole
    assert not whole & set(drawn) & set(there)


@pytest.mark.nightly
def test_derandomized_shards_differ_and_repeat(make_project: MakeProject) -> None:
    """Each shard draws other examples, and the same in one run of xdist's as alone elsewhere."""
    code = DRAWN.replace("LIMIT = 1000", "LIMIT = 10**7")
    profile = """
    from hypothesis import settings

    settings.register_profile("mine", derandomize=True)
    settings.load_profile("mine")
    """
    project = make_project(test_user=code, conftest=NO_RANKS + profile.replace("\n    ", "\n"))
    assert project.pytest("--rpc-shards=3", "-n", "2", "-k", "test_drawn").code == 0
    together = _drawn(project)
    assert sorted(together) == [f"test_drawn[shard{n}]" for n in (1, 2, 3)]
    alone: dict[str, list[int]] = {}
    for number in (1, 3):
        assert project.pytest(f"--rpc-shards={number}/3", "-k", "test_drawn").code == 0
        alone |= _drawn(project)
    assert sorted(alone) == ["test_drawn[shard1]", "test_drawn[shard3]"]
    assert all(together[name] == drawn for name, drawn in alone.items())
    _all_differ(together)


def test_shards_of_a_forced_seed_differ(make_project: MakeProject) -> None:
    """--hypothesis-seed gives no two shards the same examples."""
    code = DRAWN.replace("LIMIT = 1000", "LIMIT = 10**7")
    project = make_project(test_user=code, conftest=NO_RANKS)
    assert project.pytest("--rpc-shards=3", "--hypothesis-seed=7", "-k", "test_drawn").code == 0
    _all_differ(_drawn(project))


def _all_differ(drawn: dict[str, list[int]]) -> None:
    """Of 20 numbers of a million in each of three shards, few may be in two of them."""
    assert len(drawn) == 3
    assert all(len(numbers) == 20 for numbers in drawn.values())
    assert len({number for numbers in drawn.values() for number in numbers}) >= 50


RANKS = """
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rpcprops import FaultTable

TABLES = [FaultTable(), FaultTable(["RREF_USER_DELETE"], 1)]


@settings(max_examples=16)
@given(faults=st.sampled_from(TABLES))
def test_tables(rpc_cluster, faults):
    with Path("drawn.txt").open("a") as file:
        print(sys.executable, *faults.messages_to_fail, file=file)
    with rpc_cluster(world_size=2, faults=faults):
        pass
    assert "RREF_USER_DELETE" not in faults.failing, "planted"
"""


def _lines(project: Any) -> list[list[str]]:
    """The interpreter and the failing types of each example, in order, and forget them."""
    file = project.folder / "drawn.txt"
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    file.unlink()
    return lines


@pytest.mark.nightly
def test_two_interpreters_share_what_they_find(make_project: MakeProject, tmp_path: Path) -> None:
    """xdist over two environments: both run shards on ranks, and the failure replays in each."""
    pythons = []
    for name in ("one", "two"):
        venv.create(tmp_path / name, symlinks=True)
        (packages,) = (tmp_path / name / "lib").glob("python*/site-packages")
        ours = f"import site; site.addsitedir({str(Path(pytest.__file__).parents[1])!r})\n"
        (packages / "ours.pth").write_text(ours, encoding="utf-8")
        pythons.append(str(tmp_path / name / "bin" / "python"))
    project = make_project(test_user=RANKS)
    workers = [f"--tx=popen//python={python}" for python in pythons]
    ran = project.pytest("--dist=load", *workers, "--rpc-shards=4")
    assert ran.code == 1, ran.out
    assert {line[0] for line in _lines(project)} == set(pythons)
    for python in pythons:
        again = subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider"],
            cwd=project.folder,
            env=project.environment,
            capture_output=True,
            text=True,
            timeout=140,
            check=False,
        )
        assert again.returncode == 1, again.stdout + again.stderr
        assert _lines(project)[0] == [python, "RREF_USER_DELETE"]


REDIS = """
from datetime import timedelta

from hypothesis import settings
from hypothesis.extra.redis import RedisExampleDatabase
from redis import Redis

settings.register_profile(
    "shared", database=RedisExampleDatabase(Redis(port={port}), expire_after=timedelta(days=8))
)
settings.load_profile("shared")
"""


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """A Redis of this test's own, on a free port of loopback, which writes no file."""
    pytest.importorskip("redis", reason="the client is missing: pip install 'hypothesis[redis]'")
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with subprocess.Popen(
        [server, *options], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.02)
            assert process.poll() is None, "redis-server ended"
            yield port
        finally:
            process.kill()


@pytest.mark.nightly
def test_machines_share_a_redis(make_project: MakeProject, redis_port: int) -> None:
    """What shard 1 finds, shard 2 and a run without shards replay first; nothing is carried."""
    conftest = REDIS.format(port=redis_port)
    first, second, developer = (make_project(test_user=RANKS, conftest=conftest) for _ in range(3))
    found = first.pytest("--rpc-shards=1/2", "-n", "2")
    assert found.code == 1, found.out
    for machine, options in ((second, ["--rpc-shards=2/2"]), (developer, [])):
        result = machine.pytest(*options)
        assert result.code == 1, result.out
        assert _lines(machine)[0] == [sys.executable, "RREF_USER_DELETE"]
        assert not (machine.folder / EXAMPLES).exists()
