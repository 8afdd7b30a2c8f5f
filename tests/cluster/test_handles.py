"""A leak says which rank holds the handle, what holds it there, and where it was made."""

# ruff: noqa: PT012  (what is raised comes from leaving the block of the cluster)

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import autograd, rpc
from torch.distributed.rpc import RRef, remote

from rpcprops.cluster import _handles
from rpcprops.errors import BrokenPromise, ContextLeak, RRefLeak
from rpcprops.programs import Program
from rpcprops.pytest_plugin import ClusterFactory

pytestmark = pytest.mark.usefixtures("nothing_left")

FILE = "tests/cluster/test_handles.py"
observers: dict[str, Any] = {}
trainers: dict[str, Any] = {}
contexts: list[Any] = []


class Model:
    """A value at another rank."""

    def take(self, rref: Any) -> None:
        observers["taken"] = [rref]


class Trainer:
    def __init__(self, server: str) -> None:
        # The name that was imported from torch before ranks wrap anything.
        self.model_rref = remote(server, Model)


def line_of(text: str) -> int:
    with open(__file__, encoding="utf-8") as file:
        return 1 + next(n for n, line in enumerate(file) if text in line)


def train() -> None:
    trainers["last"] = Trainer("worker1")
    trainers["last"].model_rref.to_here()


def register(rref: Any) -> None:
    observers["me"] = rref


def announce() -> None:
    rpc.rpc_sync("worker2", register, args=(RRef(torch.ones(2)),))


def give_to_a_method() -> None:
    model = rpc.remote("worker1", Model)
    model.rpc_sync().take(RRef(torch.ones(2)))


def enter() -> None:
    context = autograd.context()
    context.__enter__()
    contexts.append(context)


def keep_in_a_closure() -> Callable[[], Any]:
    mine = RRef(Model())
    return lambda: mine


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (
            train,
            f"worker0 has an RRef to a value of worker1 (Model), made by rpc.remote at {FILE}:"
            f"{line_of('remote(server, Model)')} in Trainer.__init__\n"
            "    held by module {module}: dict 'trainers'['last'], "
            "attribute 'model_rref' of Trainer",
        ),
        (
            announce,
            f"worker2 has an RRef to a value of worker0, received at {FILE}:"
            f"{line_of('def register(')} in register\n"
            "    held by module {module}: dict 'observers'['me']",
        ),
        (
            give_to_a_method,
            "worker1 has an RRef to a value of worker0, received by a call of take\n"
            "    held by module {module}: dict 'observers'['taken'][0]",
        ),
    ],
)
def test_a_leak_names_holder_and_origin(
    rpc_cluster: ClusterFactory, run: Callable[[], None], says: str
) -> None:
    """Rank, kind, the way from the user's module to the handle, and the user's own line."""
    with pytest.raises(RRefLeak) as caught:
        with rpc_cluster(world_size=3) as cluster:
            cluster.on(0).call(run)
    assert says.format(module=__name__) in "\n".join(caught.value.__notes__)


def test_a_kept_closure_and_a_context(rpc_cluster: ClusterFactory) -> None:
    """A value kept in its rank, a variable of a closure, and a context that was never left."""
    kept: Any = None
    with pytest.raises(BrokenPromise) as caught:
        with rpc_cluster(world_size=2) as cluster:
            cluster.on(1).call(enter)
            kept = cluster.on(1).call(keep_in_a_closure, keep=True)
            cluster.settle()
    assert isinstance(caught.value, RRefLeak | ContextLeak)
    assert kept is not None
    notes = "\n".join(caught.value.__notes__)
    assert "worker1 has an RRef to a value of its own (Model), made by rpc.RRef" in notes
    assert re.search(r"the value \d+ that was kept with keep=True", notes)
    assert "closure variable 'mine'" in notes
    entered = line_of("context.__enter__()")
    assert f"a distributed autograd context, entered at {FILE}:{entered} in enter" in notes


def count_handles() -> tuple[int, int, bool]:
    """How many are noted while some live, and after; and whether each handle is gone at once."""
    live = [RRef(1), rpc.remote("worker0", torch.add, args=(1, 2))]
    live[1].to_here()
    noted = len(_handles._made)
    gc.disable()
    try:
        live.clear()
        return noted, len(_handles._made), not _handles._made
    finally:
        gc.enable()


def test_the_bookkeeping_keeps_nothing_alive(rpc_cluster: ClusterFactory) -> None:
    """Without a garbage collection, a handle that is dropped is gone, and with it its note."""
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.on(0).call(count_handles) == (2, 0, True)


def what_torch_has() -> tuple[Any, ...]:
    from torch.distributed.rpc import api

    return (
        rpc.remote is api.remote is remote,
        rpc.RRef is api.RRef is RRef,
        type(RRef(1)) is RRef,
        type(rpc.remote("worker0", torch.add, args=(1, 2))).__name__,
        api.remote.__code__.co_filename.endswith("api.py"),
        RRef.__init__.__name__,
    )


def test_torch_stays_as_it_is(rpc_cluster: ClusterFactory) -> None:
    """The functions and classes that users import are torch's own objects, noted or not."""
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.on(0).call(what_torch_has) == (
            True,
            True,
            True,
            "PyRRef",
            True,
            "__init__",
        )


def is_noted() -> bool:
    rref = RRef(1)
    return any(ref() is rref for ref, _ in _handles._made.values())


def test_programs_are_not_noted(rpc_cluster: ClusterFactory) -> None:
    """Ranks that run the steps of a program note nothing; those of the user's code do."""
    cluster = rpc_cluster(world_size=1)
    with cluster:
        assert cluster.on(0).call(is_noted)
    cluster = rpc_cluster(world_size=1)
    cluster.program = Program(1)
    with cluster:
        assert not cluster.on(0).call(is_noted)


def seconds_for_each(count: int) -> float:
    """Processor seconds of this thread for each note, without torch's own work."""

    class Handle:
        pass

    def note() -> None:
        _handles._note(Handle(), "rpc.RRef")

    best = sys.float_info.max
    for _ in range(5):
        began = time.thread_time()
        for _ in range(count):
            note()
        best = min(best, (time.thread_time() - began) / count)
    return best


def test_a_note_costs_next_to_nothing() -> None:
    """A handle costs a few microseconds, a hundredth of the message that each remote handle needs.

    1.0 was measured, and `rpc.remote(...).to_here()` takes 500.
    """
    assert seconds_for_each(5_000) < 10e-6
