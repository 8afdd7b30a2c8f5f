"""Arguments that cannot be are refused by value and remedy, before anything starts."""

from __future__ import annotations

import functools
import itertools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from rpcprops import ClusterServer, Counters, FaultPlan, FaultTable, Outcome, Program, judge, run
from rpcprops.errors import UsageError
from rpcprops.faults import delay_milliseconds, retry_wait
from rpcprops.programs import Call, Context, Drop, Parallel, Pause, Remote
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.strategies import message_types, programs

_BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"world_size": 0}, ["world_size=0", "1 to 16"]),
    ({"world_size": 17}, ["world_size=17", "1 to 16"]),
    ({"world_size": -1}, ["world_size=-1", "1 to 16"]),
    ({"world_size": True}, ["world_size=True", "bool", "int"]),
    ({"world_size": 2.0}, ["world_size=2.0", "float", "int"]),
    ({"world_size": "2"}, ["world_size='2'", "str", "int"]),
    ({"faults": FaultPlan(by_rank={2: FaultTable()})}, ["rank 2", "0 to 1", "by_rank"]),
    ({"faults": "RREF_USER_DELETE"}, ["faults='RREF_USER_DELETE'", "FaultTable"]),
    ({"faults": {}}, ["faults={}", "FaultPlan"]),
    ({"transport": "udp"}, ["transport='udp'", "'tcp' or 'shm'"]),
    ({"transport": None}, ["transport=None", "'tcp' or 'shm'"]),
    ({"leaks": "ignore"}, ["leaks='ignore'", "'raise' or 'allow'"]),
    ({"leaks": True}, ["leaks=True", "'raise' or 'allow'"]),
    ({"leaks": [Counters(owners=1)]}, ["leaks=[Counters(owners=1", "or 2 Counters"]),
    ({"leaks": [Counters(), 1]}, ["1]", "or 2 Counters"]),
    ({"leaks": [Counters(), Counters(owners=-1)]}, ["leaks[1]: owners=-1 (type int)", "0 up"]),
    ({"leaks": [Counters(forks=1.5), Counters()]}, ["leaks[0]: forks=1.5 (type float)"]),  # type: ignore[arg-type]
    ({"leaks": [Counters(), Counters(client_calls=1)]}, ["owners, forks and contexts only"]),
    ({"leaks": [Counters(), Counters()], "init": False}, ["needs init=True", "settle(expect=...)"]),
    ({"clock": "fast"}, ["clock='fast'", "'auto', 'real', or a rate"]),
    ({"clock": 0}, ["clock=0", "1 to 2000"]),
    ({"clock": 0.5}, ["clock=0.5", "1 to 2000"]),
    ({"clock": 2001}, ["clock=2001", "1 to 2000"]),
    ({"clock": math.nan}, ["clock=nan", "1 to 2000"]),
    ({"clock": True}, ["clock=True", "1 to 2000"]),
    ({"rpc_timeout": 0}, ["rpc_timeout=0", "above 0"]),
    ({"rpc_timeout": -1.0}, ["rpc_timeout=-1.0", "above 0"]),
    ({"rpc_timeout": math.inf}, ["rpc_timeout=inf", "at most"]),
    ({"rpc_timeout": math.nan}, ["rpc_timeout=nan", "number"]),
    ({"rpc_timeout": "60"}, ["rpc_timeout='60'", "number"]),
    ({"rpc_timeout": True}, ["rpc_timeout=True", "number"]),
    ({"num_worker_threads": 0}, ["num_worker_threads=0", "above 0"]),
    ({"num_worker_threads": 0.5}, ["num_worker_threads=0.5", "int"]),
    ({"deadline": 0}, ["deadline=0", "above 0"]),
    ({"deadline": None}, ["deadline=None", "number"]),
    ({"names": ["a"]}, ["names=['a']", "2 different names"]),
    ({"names": ["a", "a"]}, ["names=['a', 'a']", "2 different names"]),
    ({"names": "ab"}, ["names='ab'", "2 different names"]),
    ({"names": ["a", ""]}, ["''", "1 to 127"]),
    ({"names": ["a", "b" * 128]}, ["1 to 127"]),
    ({"names": ["a", "b c"]}, ["'b c'", "letters, digits"]),
    ({"names": ["a", "ä"]}, ["'ä'", "letters, digits"]),
    ({"names": ["a", 1]}, ["1", "string"]),
    ({"names": ["a", []]}, ["[]", "names"]),
    ({"names": 2}, ["names=2", "2 different names"]),
    ({"init": "no"}, ["init='no'", "True or False"]),
]


@pytest.mark.parametrize(
    ("options", "words"), _BAD, ids=[str(options)[1:-1] for options, _ in _BAD]
)
def test_bad_arguments(options: dict[str, Any], words: list[str]) -> None:
    """A value outside its range raises UsageError with the value and what it may be instead."""
    server = ClusterServer(clock="real")
    given: Any = {"world_size": 2, **options}
    before = len(psutil.Process().children())
    with pytest.raises(UsageError) as caught:
        server.cluster(**given)
    for word in words:
        assert word in str(caught.value)
    assert len(psutil.Process().children()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": 2, "fautls": None}, "no option 'fautls'; did you mean 'faults'"),
        ({}, "needs its number of ranks; give it world_size="),
    ],
)
def test_unknown_and_missing_options(options: Any, words: str) -> None:
    """An option that there is not, and a size that is missing, are named with the remedy."""
    with pytest.raises(UsageError, match=re.escape(words)):
        ClusterServer(clock="real").cluster(**options)


@pytest.mark.parametrize("clock", ["", "REAL", 0, -5, 2001, True, None, math.nan, [1]])
def test_bad_server_clock(clock: Any) -> None:
    """A server refuses a clock that is none when it is made."""
    with pytest.raises(UsageError, match="must be 'auto', 'real', or a rate"):
        ClusterServer(clock=clock)


def test_server_must_run() -> None:
    """Entering a cluster of a server that does not run says what to do."""
    cluster = ClusterServer(clock="real").cluster(world_size=2)
    with pytest.raises(UsageError, match="with block"):
        cluster.start()
    with pytest.raises(UsageError, match="with block"), cluster:
        pass


def test_a_message_that_torch_does_not_know() -> None:
    """A table that torch's agent would refuse in another process is refused here."""
    with pytest.raises(UsageError, match="RREF_FORK"):
        FaultTable(["RREF_FORK"], 1)


def keeps(keep: int = 3) -> int:
    return keep


def accepts_any(**given: int) -> dict[str, int]:
    return given


_ODD: list[Any] = [None, [], {}, "", -1, 1.5, math.nan, 10**30, "x" * 1000, b"", object(), True]
_ODD += [[[]], {1: []}, "\ud800", bytearray(b"x"), 2j]


def but(odd: Any, instead: Any, *fine: Any) -> Any:
    """`odd`, or another value where it is no odd one."""
    return instead if any(type(odd) is type(one) and odd == one for one in fine) else odd


def test_a_keep_of_the_function_is_not_swallowed(rpc_cluster: ClusterFactory) -> None:
    """Where `keep` could mean two things it is refused, with the way out; that way works."""
    with rpc_cluster(world_size=1) as cluster:
        rank = cluster.on(0)
        call: Any = rank.call
        for function in (keeps, lambda *, keep: keep):
            with pytest.raises(UsageError, match=r"keep=True is ambiguous.*functools\.partial"):
                call(function, keep=True)
        for value in (5, "yes", None, 1):
            with pytest.raises(UsageError, match=rf"keep={value!r} .*must be True or False"):
                call(keeps, keep=value)
        assert rank.call(keeps) == 3
        assert rank.call(functools.partial(keeps, keep=5)) == 5
        kept = rank.call(functools.partial(keeps, keep=6), keep=True)
        assert rank.call(abs, kept) == 6
        assert rank.call(accepts_any, fn=1) == {"fn": 1}
        assert rank.call(dict, rank.call(accepts_any, a=1, keep=True)) == {"a": 1}


@pytest.mark.parametrize("odd", _ODD, ids=[str(number) for number in range(len(_ODD))])
def test_odd_values_of_a_running_cluster(rpc_cluster: ClusterFactory, odd: Any) -> None:
    """Whatever is passed is refused by a UsageError, at once, and the cluster goes on."""
    with rpc_cluster(world_size=1) as cluster:
        for function in (
            cluster.on,
            cluster.each,
            cluster.on(0).call,
            cluster.on(0).submit,
            lambda odd: cluster.settle(expect=but(odd, 5, None)),
            lambda odd: cluster.run_to_exit(odd, is_last=bool),
            lambda odd: cluster.run_to_exit(abs, 1, is_last=odd),
        ):
            with pytest.raises(UsageError):
                function(odd)
        assert cluster.on(0).call(abs, -1) == 1


_WITHOUT_RANKS: list[Callable[[Any], object]] = [
    run,
    lambda odd: run(Program(1), but(odd, [], None)),
    lambda odd: run(Program(1), world_size=but(odd, [], None)),
    lambda odd: run(Program(1), transport=odd),
    lambda odd: judge(but(odd, [], None), None, Outcome(1)),
    lambda odd: judge(Program(1), None, odd),
    lambda odd: judge(None, None, odd),
    lambda odd: judge(Program(1), but(odd, [], None), Outcome(1)),
    lambda odd: judge(None, but(odd, [], None), Outcome(1)),
    lambda odd: judge(Program(1), None, Outcome(odd)),
    lambda odd: judge(Program(1), None, Outcome(1, ranks=(odd,))),
    lambda odd: Program(1, (odd,)),
    lambda odd: Program(1, (Parallel(but(odd, 1, [])),)),
    lambda odd: Program(2, (Call(0, 1, left=odd),)),
    lambda odd: Program(2, (Remote(0, 1, but(odd, [], "", "x" * 1000, "\ud800")),)),
    lambda odd: Program(2, (Context(0, "x", path=odd),)),
    lambda odd: Program(2, (Drop(0, odd),)),
    lambda odd: Program(2, (Pause(0, but(odd, None, 1.5)),)),
    lambda odd: FaultPlan().table(but(odd, None, -1, 10**30, True)),
    lambda odd: FaultPlan().faulty_ranks(odd),
    lambda odd: FaultPlan().check(odd),
    lambda odd: FaultPlan().without([], odd),
    retry_wait,
    lambda odd: delay_milliseconds(but(odd, None, 1.5)),
]


@pytest.mark.parametrize("number", range(len(_WITHOUT_RANKS)))
def test_odd_values_where_nothing_starts(number: int) -> None:
    """Whatever is passed is refused by a UsageError, at once, before a server starts."""
    before = len(psutil.Process().children())
    for odd in _ODD:
        with pytest.raises(UsageError):
            _WITHOUT_RANKS[number](odd)
    assert len(psutil.Process().children()) == before


def test_iterables_without_an_end_are_let_go() -> None:
    """What never ends is refused before it fills the memory."""
    endless: Any = itertools.repeat("RREF_USER_DELETE")
    steps: Any = itertools.repeat(Pause(0, 0.0))
    names: Any = map(str, itertools.count())
    began = time.monotonic()
    with pytest.raises(UsageError, match="at most 100000 steps"):
        Program(1, steps)
    with pytest.raises(UsageError, match="which is no step"):
        programs(kinds=endless)
    with pytest.raises(UsageError, match="2 different names"):
        ClusterServer("real").cluster(world_size=2, names=names)
    message_types(among=endless)
    FaultTable(endless, 1)
    assert time.monotonic() - began < 10
