"""The user's modules in ranks: under their own names, from their own files, imported once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

MakeProject = Callable[..., Any]

FIRST = """
import os

import torch.distributed.rpc as rpc

from helpers import deep
from . import beside

state = 0


def where(value):
    return __name__, os.path.basename(__file__), value


def change(value):
    global state
    state += value
    return state


def ask(to, function, *args):
    return rpc.rpc_sync(to, function, args=args)


def test_own_name(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(ask, "worker1", where, 1) == (__name__, "test_same.py", 1)
        assert __name__ == "tests.one.test_same"


def test_one_module_for_all(rpc_cluster):
    step = 4
    with rpc_cluster(world_size=2) as cluster:
        cluster.on(1).call(lambda: change(step))
        assert cluster.on(0).call(ask, "worker1", change, 1) == 5
    assert state == 0


def test_helpers(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(ask, "worker1", deep.double, 4) == 8
        assert cluster.on(0).call(ask, "worker1", beside.triple, 4) == 12
        assert cluster.on(0).call(ask, "worker1", deep.Counter.made, 4) == 5


def test_conftest(rpc_cluster, from_conftest):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(ask, "worker1", from_conftest, 4) == 16


def test_imported_later(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(where, 0)[2] == 0
    import late

    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(ask, "worker1", late.negate, 4) == -4


def test_dataclasses_and_exceptions(rpc_cluster):
    import pytest

    with rpc_cluster(world_size=2) as cluster:
        moved = cluster.on(0).call(ask, "worker1", beside.move, beside.Point(1, 2))
        assert moved == beside.Point(2, 1)
        with pytest.raises(beside.OwnError, match="own"):
            cluster.on(0).call(beside.fail)
"""

BESIDE = """
import dataclasses


@dataclasses.dataclass
class Point:
    x: int
    y: int


class OwnError(Exception):
    pass


def triple(value):
    return 3 * value


def move(point):
    return Point(point.y, point.x)


def fail():
    raise OwnError("own")
"""

SECOND = """
import torch.distributed.rpc as rpc


def where(value):
    return __name__, value


def test_own_name(rpc_cluster):
    with rpc_cluster(world_size=2) as cluster:
        args = ("worker1", where, (2,))
        assert cluster.on(0).call(lambda: rpc.rpc_sync("worker1", where, args=(2,))) == (
            "tests.two.test_same",
            2,
        )
"""

CONFTEST = """
import pytest


def square(value):
    return value * value


@pytest.fixture
def from_conftest():
    return square
"""

DEEP = """
class Counter:
    @staticmethod
    def made(value):
        return value + 1


def double(value):
    return 2 * value
"""

THREADS = """
import os
import threading

import torch.distributed.rpc as rpc

event = threading.Event()
threading.Thread(target=event.wait, daemon=True).start()
imported_in = os.getpid()


def pids():
    return imported_in, os.getpid(), threading.active_count()


def test_imported_in_ranks(rpc_cluster):
    for _ in range(2):
        with rpc_cluster(world_size=2) as cluster:
            mine = cluster.on(0).call(pids)
            theirs = cluster.on(0).call(lambda: rpc.rpc_sync("worker1", pids))
    assert mine[0] == mine[1] and theirs[0] == theirs[1] and mine[0] != theirs[0]
    # The thread lives in each rank.
    assert mine[2] >= 3
"""

FAILS = """
import sys

if "pytest" not in str(sys.modules.get("__main__")):
    raise ImportError("only under pytest")


def test_import_fails_in_ranks(rpc_cluster):
    import pytest

    with pytest.raises(ValueError, match="importing tests.one.test_fails for the ranks failed"):
        with rpc_cluster(world_size=1):
            pass
    with pytest.raises(ValueError, match="only under pytest"):
        with rpc_cluster(world_size=1):
            pass
"""


def test_modules_of_a_project(make_project: MakeProject) -> None:
    """In importlib mode modules of tests, helpers, conftest, and late ones hold RPC targets."""
    project = make_project(
        ["pythonpath = .", "addopts = --import-mode=importlib"],
        late="def negate(value):\n    return -value\n",
    )
    files = {
        "helpers/__init__.py": "",
        "helpers/deep.py": DEEP,
        "tests/conftest.py": CONFTEST,
        "tests/one/test_same.py": FIRST,
        "tests/one/beside.py": BESIDE,
        "tests/one/test_threads.py": THREADS,
        "tests/one/test_fails.py": FAILS,
        "tests/two/test_same.py": SECOND,
    }
    for name, text in files.items():
        path = project.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    result = project.pytest()
    assert result.code == 0, result.out
    assert "9 passed, 1 warning" in result.out
    pattern = "UserWarning: .*importing tests.one.test_threads .*thread"
    assert len(re.findall(pattern, result.out)) == 1


@pytest.mark.nightly
def test_modules_in_prepend_mode(make_project: MakeProject) -> None:
    """In pytest's default mode a test module's own functions are targets under its plain name."""
    code = """
    import torch.distributed.rpc as rpc


    def name():
        return __name__


    def test_name(rpc_cluster):
        with rpc_cluster(world_size=2) as cluster:
            assert cluster.on(0).call(lambda: rpc.rpc_sync("worker1", name)) == "test_plain"
    """
    project = make_project(test_plain=code)
    result = project.pytest()
    assert result.code == 0, result.out
