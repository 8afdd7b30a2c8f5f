"""Calls in ranks: values, exceptions, functions of every kind, and values that stay."""

from __future__ import annotations

import functools
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from rpcprops import Cluster
from rpcprops.cluster import _functions
from rpcprops.errors import HarnessError, RemoteError, RemoteTraceback, UsageError
from rpcprops.pytest_plugin import ClusterFactory

counter = 0
in_rank = False


def read_counter() -> int:
    return counter


def add(left: int, right: int = 1) -> int:
    return left + right


def fail(text: str) -> None:
    raise ValueError(text)


def number_kept() -> int:
    return len(_functions._kept)


def ask(to: str, function: Callable[..., Any], *args: object) -> Any:
    return rpc.rpc_sync(to, function, args=args)


def rank_and_world() -> tuple[int, str]:
    info = rpc.get_worker_info()
    return info.id, info.name


class TwoArgumentsError(Exception):
    """Pickles, and cannot be made again from what it pickles as."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


class RankOnlyError(Exception):
    """Can be made again in a rank only."""

    def __reduce__(self) -> Any:
        return make_rank_only, ()


def make_rank_only() -> RankOnlyError:
    if not in_rank:
        msg = "not here"
        raise RuntimeError(msg)
    return RankOnlyError("only there")


class WordlessError(Exception):
    """Has no text, and cannot be pickled."""

    def __str__(self) -> str:
        msg = "no words"
        raise RuntimeError(msg)

    def __reduce__(self) -> Any:
        msg = "no pickle"
        raise RuntimeError(msg)


def test_values_come_back(rpc_cluster: ClusterFactory) -> None:
    """A call gives its function's value, with arguments by place and by name."""
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(add, 2, right=3) == 5
        assert cluster.on(1).call(add, 2) == 3
        assert cluster.on(0).call(ask, "worker1", add, 4) == 5
        assert torch.equal(cluster.on(0).call(torch.arange, 3), torch.tensor([0, 1, 2]))


def test_each_runs_everywhere_at_once(rpc_cluster: ClusterFactory) -> None:
    """`each` runs in all ranks side by side and gives the results by rank."""

    def meet() -> str:
        for rank in range(3):
            rpc.rpc_sync(f"worker{rank}", add, args=(1,))
        return rank_and_world()[1]

    with rpc_cluster(world_size=3) as cluster:
        assert cluster.each(meet) == ["worker0", "worker1", "worker2"]
        assert len(set(cluster.each(os.getpid))) == 3


def test_submit_gives_futures(rpc_cluster: ClusterFactory) -> None:
    """Futures may be asked in any order, and more than once, for values and for exceptions."""
    with rpc_cluster(world_size=2, deadline=5) as cluster:
        slow = cluster.on(0).submit(time.sleep, 5.0)
        first = cluster.on(1).submit(add, 1)
        second = cluster.on(1).submit(add, 2)
        wrong = cluster.on(1).submit(fail, "no")
        assert (second.result(), first.result()) == (3, 2)
        assert first.done()
        assert (second.result(), first.result()) == (3, 2)
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                wrong.result()
        slow.result()
        assert slow.done()


def test_futures_outlive_the_cluster(rpc_cluster: ClusterFactory) -> None:
    """After the end a future that was answered keeps its value, another says that it is over."""
    with rpc_cluster(world_size=1) as cluster:
        kept = cluster.on(0).submit(add, 1)
        kept.result()
        cluster.settle()
        never = cluster.on(0).submit(add, 2)
    assert kept.result() == 2
    assert kept.done()
    # Its call was still served before the shutdown.
    assert never.done()
    assert never.result() == 3


def test_exceptions_come_back(rpc_cluster: ClusterFactory) -> None:
    """An exception is raised as itself, caused by the traceback that it had in the rank."""
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(ValueError, match=r"^wrong$") as caught:
            cluster.on(1).call(fail, "wrong")
        cause = caught.value.__cause__
        assert isinstance(cause, RemoteTraceback)
        assert cause.rank == 1
        assert "in fail" in str(cause)
        assert "ValueError: wrong" in str(cause)
        assert cluster.on(1).call(add, 1) == 2


def test_exception_of_another_rank(rpc_cluster: ClusterFactory) -> None:
    """What an RPC target raised in a second rank arrives as the exception that torch made of it."""
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(ValueError, match="far away") as caught:
            cluster.on(0).call(ask, "worker1", fail, "far away")
        assert "On WorkerInfo(id=1, name=worker1)" in str(caught.value)


def test_exception_that_cannot_be_made_again(rpc_cluster: ClusterFactory) -> None:
    """An exception that does not unpickle in its rank becomes a RemoteError with its traceback."""

    def raises() -> None:
        raise TwoArgumentsError(1, 2)

    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(RemoteError, match="rank 0 raised TwoArgumentsError: 1 and 2") as caught:
            cluster.on(0).call(raises)
        assert "in raises" in str(caught.value.__cause__)


def test_exception_that_cannot_be_read_here(rpc_cluster: ClusterFactory) -> None:
    """An exception that unpickles in a rank but not here keeps its text and its traceback."""

    def raises() -> None:
        global in_rank
        in_rank = True
        msg = "only there"
        raise RankOnlyError(msg)

    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(RemoteError, match="RankOnlyError") as caught:
            cluster.on(0).call(raises)
        assert "in raises" in str(caught.value.__cause__)


def test_exception_without_words(rpc_cluster: ClusterFactory) -> None:
    """An exception whose text and pickle both fail is still only an exception, not a dead rank."""

    def raises() -> None:
        raise WordlessError

    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(RemoteError, match="WordlessError"):
            cluster.on(0).call(raises)
        assert cluster.on(0).call(add, 1) == 2


def test_exception_that_holds_an_rref(rpc_cluster: ClusterFactory) -> None:
    """An exception that carries an RRef comes back in words, and the RRef still drains."""

    def raises() -> None:
        msg = "holds"
        raise ValueError(msg, rpc.remote("worker1", torch.add, args=(torch.ones(1), 1)))

    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(RemoteError, match="ValueError"):
            cluster.on(0).call(raises)
        cluster.settle()


def test_traceback_holds_no_rref(rpc_cluster: ClusterFactory) -> None:
    """RRefs in the frames of an exception, and of its context, do not count as leaks."""

    def inner() -> None:
        rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 1))
        assert rref is not None
        msg = "first"
        raise KeyError(msg)

    def raises() -> None:
        rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 2))
        try:
            inner()
        except KeyError as error:
            msg = f"second {rref is not None}"
            raise ValueError(msg) from error

    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(ValueError, match="second True"):
            cluster.on(0).call(raises)
        cluster.settle()


def interrupt_itself() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def interrupt_when_idle() -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (functools.partial(sys.exit, 0), "SystemExit: 0"),
        (functools.partial(pytest.exit, "enough"), "Exit: enough"),
        (interrupt_itself, "KeyboardInterrupt"),
    ],
    ids=["sys.exit", "pytest.exit", "SIGINT"],
)
def test_leaving_by_exit_is_no_end_of_the_tests(
    rpc_cluster: ClusterFactory, leave: Callable[[], None], said: str
) -> None:
    """What would end a process is an error of the rank that did it, which goes on."""
    with rpc_cluster(world_size=2) as cluster:
        ways: list[Callable[[], Any]] = [
            lambda: cluster.on(0).call(leave),
            lambda: cluster.each(leave),
            cluster.on(0).submit(leave).result,
        ]
        for way in ways:
            with pytest.raises(RemoteError, match=f"rank 0 raised {said}") as caught:
                way()
            assert said in str(caught.value.__cause__)
        assert cluster.each(add, 1) == [2, 2]


def test_an_interrupt_between_two_calls_waits_for_the_next(rpc_cluster: ClusterFactory) -> None:
    """SIGINT ends no rank that has nothing to do, and is not lost."""
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(interrupt_when_idle)
        time.sleep(0.3)
        with pytest.raises(RemoteError, match="rank 0 raised KeyboardInterrupt"):
            cluster.on(0).call(add, 1)
        assert cluster.on(0).call(add, 1) == 2


def test_a_test_is_skipped_or_failed_from_a_rank(rpc_cluster: ClusterFactory) -> None:
    """pytest.skip and pytest.fail speak of the test, wherever they are called."""
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(pytest.skip.Exception, match="not here"):
            cluster.on(0).call(pytest.skip, "not here")
        with pytest.raises(pytest.fail.Exception, match="wrong"):
            cluster.on(0).call(pytest.fail, "wrong")
        assert cluster.on(0).call(add, 1) == 2


def test_closures_and_lambdas(rpc_cluster: ClusterFactory) -> None:
    """Closures, lambdas, defaults, recursion and bound methods work as entry functions."""
    step = 5
    table = {"a": [1, 2]}

    def closure(value: int, *, factor: int = 2) -> int:
        return add(value, step) * factor + len(table["a"])

    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    with rpc_cluster(world_size=1) as cluster:
        rank = cluster.on(0)
        assert rank.call(closure, 1) == 14
        assert rank.call(closure, 1, factor=1) == 8
        assert rank.call(factorial, 6) == 720
        assert rank.call(lambda: (step, read_counter())) == (5, 0)
        assert rank.call("a-b".split, "-") == ["a", "b"]


def test_module_counter_is_one(rpc_cluster: ClusterFactory) -> None:
    """A closure changes the live module of the rank, which plain functions and targets see."""
    step = 3

    def raise_counter() -> None:
        global counter
        counter += step

    with rpc_cluster(world_size=2) as cluster:
        for _ in range(2):
            cluster.on(1).call(raise_counter)
        assert cluster.on(1).call(read_counter) == 6
        assert cluster.on(0).call(ask, "worker1", read_counter) == 6
        assert cluster.on(0).call(read_counter) == 0
    assert counter == 0
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.each(read_counter) == [0, 0]


def test_kept_values_stay(rpc_cluster: ClusterFactory) -> None:
    """A kept RRef is used by later calls on its rank, alone or inside another argument."""

    def make() -> Any:
        return rpc.remote("worker1", torch.add, args=(torch.ones(2), 1))

    with rpc_cluster(world_size=2) as cluster:
        rank = cluster.on(0)
        kept: Any = rank.call(make, keep=True)
        assert repr(kept).startswith("<value")
        assert repr(kept).endswith("kept in rank 0>")
        assert rank.call(lambda rref: rref.to_here().tolist(), kept) == [2.0, 2.0]
        assert rank.call(lambda given: given["r"][0].to_here().tolist(), {"r": [kept]}) == [2, 2]
        assert cluster.snapshot()[1].owners == 1
        with pytest.raises(UsageError, match="kept in rank 0 was passed to rank 1"):
            cluster.on(1).call(lambda rref: rref.to_here(), kept)
        del kept
        gc.collect()
        cluster.settle()


def test_kept_values_are_released_at_the_end(rpc_cluster: ClusterFactory) -> None:
    """A handle that outlives its cluster harms neither the cluster nor the next one."""
    with rpc_cluster(world_size=1) as cluster:
        kept: Any = cluster.on(0).call(dict, keep=True)
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(UsageError, match="released before"):
            cluster.on(0).call(len, kept)
        del kept
        assert cluster.on(0).call(add, 1) == 2


def test_a_stopped_rank_gets_all_that_it_was_sent(rpc_cluster: ClusterFactory) -> None:
    """What a rank does not read waits without a wait of ours, and arrives whole and in order."""
    with rpc_cluster(world_size=1, deadline=5) as cluster:
        rank = cluster.on(0)
        kept: list[Any] = [rank.call(dict, keep=True) for _ in range(3)]
        os.kill(rank.call(os.getpid), signal.SIGSTOP)
        began = time.monotonic()
        data = os.urandom(5_000_000)
        futures: list[Any] = [rank.submit(lambda given: given[::-1], data), rank.submit(add, 1)]
        # Handles that are dropped send nothing from within the garbage collector.
        dropper = threading.Thread(target=kept.clear)
        dropper.start()
        dropper.join()
        gc.collect()
        futures += [rank.submit(number_kept)]
        assert time.monotonic() - began < 3
        os.kill(cluster.ranks.channels[0].pid, signal.SIGCONT)
        assert [future.result() for future in futures] == [data[::-1], 2, 0]


def send_junk(cluster: Cluster, *, in_rank: bool) -> None:
    junk = b"\0\0\0\4junk"
    channel = cluster.ranks.channels[0]
    if in_rank:
        channel.sock.send(junk)
    else:
        channel.reader.buffer += junk


@pytest.mark.parametrize("calls", [False, True], ids=["no call", "a call"])
@pytest.mark.parametrize("in_rank", [True, False], ids=["to the rank", "from the rank"])
def test_a_broken_channel_is_no_death(
    rpc_cluster: ClusterFactory, in_rank: bool, calls: bool
) -> None:
    """What cannot be read as a message is rpcprops's fault, unless code of the user's ran there."""
    words = "the control channel of worker0 is broken"
    broken = pytest.raises(UsageError if calls else HarnessError, match=words)
    with broken as caught, rpc_cluster(world_size=1, deadline=5) as cluster:
        if calls:
            cluster.on(0).call(add, 1)
        send_junk(cluster, in_rank=in_rank)
        cluster.settle()
    assert "UnpicklingError" in str(caught.value)
    assert ("A function that was called there" in str(caught.value)) is calls


def test_a_default_timeout_of_sockets_is_not_for_the_channels(rpc_cluster: ClusterFactory) -> None:
    """`socket.setdefaulttimeout` in a test leaves ranks waiting, without work, for a call."""
    socket.setdefaulttimeout(0.2)
    try:
        with rpc_cluster(world_size=1) as cluster:
            before = cluster.on(0).call(time.process_time)
            time.sleep(0.5)
            data = os.urandom(3_000_000)
            assert cluster.on(0).call(lambda given: given[::-1], data) == data[::-1]
            assert cluster.on(0).call(time.process_time) - before < 0.3
    finally:
        socket.setdefaulttimeout(None)


def test_keep_passes_exceptions_on(rpc_cluster: ClusterFactory) -> None:
    """A call that was to keep its value and raises instead raises here."""
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(ValueError, match=r"^kept$"):
            cluster.on(0).call(fail, "kept", keep=True)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a list"])
def test_rref_results_are_refused(rpc_cluster: ClusterFactory, inside: bool) -> None:
    """An RRef has no meaning here: the error says so, and what to do; nothing leaks."""

    def make() -> Any:
        rref = rpc.remote("worker1", torch.add, args=(torch.ones(1), 1))
        return [rref] if inside else rref

    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(UsageError, match=r"returned an RRef.*keep=True"):
            cluster.on(0).call(make)
        cluster.settle()


def test_unpicklable_results(rpc_cluster: ClusterFactory) -> None:
    """A result that cannot be pickled is refused by its type, and the rank lives on."""
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(UsageError, match="rank 0 returned lock, which cannot be pickled"):
            cluster.on(0).call(threading.Lock)
        assert cluster.on(0).call(add, 1) == 2


def test_unpicklable_arguments(rpc_cluster: ClusterFactory) -> None:
    """A call that cannot be sent is refused here, naming the function."""
    lock: Any = threading.Lock()
    number: Any = 3
    with rpc_cluster(world_size=1) as cluster:
        with pytest.raises(UsageError, match=r"'add' cannot be sent to a rank.*cloudpickle"):
            cluster.on(0).call(add, lock)
        with pytest.raises(UsageError, match="cannot be sent"):
            cluster.on(0).call(lambda: lock)
        with pytest.raises(UsageError, match="can only call a function, got 3"):
            cluster.on(0).call(number)
        assert cluster.on(0).call(add, 1) == 2


def test_targets_that_torch_cannot_send(rpc_cluster: ClusterFactory) -> None:
    """A closure or lambda as RPC target fails with torch's error and our note on what to do."""

    def local() -> int:
        return 1

    with rpc_cluster(world_size=2) as cluster:
        for target in (local, lambda: 2):
            with pytest.raises(Exception, match=r"pickle|local") as caught:
                cluster.on(0).call(ask, "worker1", target)
            notes = " ".join(caught.value.__notes__)
            assert "must be a plain function at the top of a module" in notes


def test_big_values_travel(rpc_cluster: ClusterFactory) -> None:
    """Arguments and results of some megabytes arrive whole, both ways at once."""
    data = os.urandom(6_000_000)
    with rpc_cluster(world_size=2) as cluster:
        futures = [cluster.on(rank).submit(lambda given: given[::-1], data) for rank in (0, 1)]
        more = cluster.on(0).submit(len, data)
        assert [future.result() == data[::-1] for future in futures] == [True, True]
        assert more.result() == len(data)


def test_ranks_go_by_name(rpc_cluster: ClusterFactory) -> None:
    """`names=` gives the ranks their names, by which torch and `on` know them."""
    with rpc_cluster(world_size=2, names=["trainer", "server-1:b"]) as cluster:
        assert cluster.each(rank_and_world) == [(0, "trainer"), (1, "server-1:b")]
        assert cluster.on("server-1:b").call(rank_and_world)[0] == 1
        assert cluster.on("trainer").call(ask, "server-1:b", add, 1) == 2
        assert "rank 1 of" in repr(cluster.on("server-1:b"))
    assert [rank.name for rank in cluster.outcome.ranks] == ["trainer", "server-1:b"]


@pytest.mark.parametrize("rank", [2, -1, True, 0.0, "worker2", None, "0"])
def test_ranks_outside_are_refused(rpc_cluster: ClusterFactory, rank: Any) -> None:
    """`on` names the rank that does not exist."""
    with rpc_cluster(world_size=2) as cluster:
        with pytest.raises(UsageError, match=f"rank={rank!r}"):
            cluster.on(rank)


def test_output_of_ranks_is_kept(rpc_cluster: ClusterFactory) -> None:
    """What a rank prints is in its outcome, and nowhere on the terminal."""
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(print, "printed there")
    assert "printed there" in cluster.outcome.ranks[0].log


def shout(blocks: int) -> None:
    block = "a line that says little\n" * 40_000
    for _ in range(blocks):
        print(block, end="")


def test_a_loud_rank_costs_little(rpc_cluster: ClusterFactory) -> None:
    """A quarter of a gigabyte of output is read once, and takes memory in neither process."""
    with rpc_cluster(world_size=2, deadline=10) as cluster:
        before = time.process_time()
        cluster.on(0).call(shout, 270)
        cluster.settle()
        cluster.on(0).call(print, "the end of it")
        assert cluster.outcome.ranks[0].log.endswith("the end of it\n")
        assert os.fstat(cluster.ranks.channels[0].log.fd).st_blocks * 512 < 8 << 20
    assert time.process_time() - before < 4
    log = cluster.outcome.ranks[0].log
    assert len(log) < 3 << 20
    assert "bytes left out" in log


def test_a_rank_may_seek_in_its_output(rpc_cluster: ClusterFactory) -> None:
    """A hole of a terabyte in a rank's output is nothing."""
    with rpc_cluster(world_size=1) as cluster:
        cluster.on(0).call(os.lseek, 1, 1 << 40, os.SEEK_SET)
        cluster.on(0).call(print, "after the hole")
    assert "after the hole\n" in cluster.outcome.ranks[0].log
