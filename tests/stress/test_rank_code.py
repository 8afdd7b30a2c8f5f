"""Code of users that misbehaves in a rank: each kind with what the test process must make of it.

A kind is a function that a user may send to a rank, or that torch runs there, and what is expected:
a value and a quiet end, or an error that names what happened and in which rank. Expectations were
written from what the README promises and before any of it was run. After each kind no process of
its cluster may be left, and the same server must serve the next cluster.
"""

# ruff: noqa: EM101, PLE0307  (exceptions are raised, and shown, in every way)

from __future__ import annotations

import asyncio
import atexit
import builtins
import concurrent.futures
import contextlib
import ctypes
import faulthandler
import gc
import itertools
import logging
import multiprocessing
import os
import pdb
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import psutil
import pytest
import torch
from torch.distributed import rpc

from rpcprops import ClusterServer, FaultTable, _rank_fixture, fixture
from rpcprops.cluster import _wire
from rpcprops.errors import (
    BrokenPromise,
    HarnessError,
    RankDied,
    RankHung,
    RemoteError,
    RemoteTraceback,
    RRefLeak,
    UngracefulShutdown,
    UsageError,
)
from rpcprops.pytest_plugin import ClusterFactory

#: Real seconds for a kind that must not hang, and within which nothing may be left of a cluster.
SECONDS = 30.0
GONE_SECONDS = 3.0

How = Literal["call", "rpc", "each", "submit", "keep"]
Errors = tuple[type[BaseException], ...]
F = TypeVar("F", bound=Callable[[], Any])

#: What a quiet function gives.
FINE = 5


@dataclass(frozen=True)
class Kind:
    """A function that misbehaves, and what must come of it.

    Attributes:
        errors: one of these is raised by the call or when the block is left; none if empty.
        says: patterns that the error must show, with its cause and its notes.
        how: run in rank 0's main thread (called, called with keep, submitted, or in each rank at
            once), or by torch in rank 1.
        rank: the rank that the error must name.
        deadline: of the cluster, in real seconds.
    """

    name: str
    function: Callable[[], Any]
    errors: Errors = ()
    says: tuple[str, ...] = ()
    value: Any = FINE
    how: How = "call"
    rank: int = 0
    deadline: float = 20.0


KINDS: dict[str, Kind] = {}
#: Those that every run tries: at least one of each class of behaviour.
ALWAYS: set[str] = set()


def kind(
    errors: type[BaseException] | Errors = (),
    *says: str,
    always: bool = False,
    name: str = "",
    **others: Any,
) -> Callable[[F], F]:
    """Put a function into the table; the name is the function's unless given."""

    def enter(function: F) -> F:
        chosen = name or function.__name__
        assert chosen not in KINDS, f"two kinds are named {chosen}"
        listed = errors if isinstance(errors, tuple) else (errors,)
        KINDS[chosen] = Kind(chosen, function, listed, says, **others)
        if always:
            ALWAYS.add(chosen)
        return function

    return enter


def also(
    function: Callable[[], Any],
    name: str,
    errors: type[BaseException] | Errors = (),
    *says: str,
    **others: Any,
) -> None:
    """The same function in another way."""
    kind(errors, *says, name=name, **others)(function)


kept_here: list[Any] = []


def peer_pid() -> int:
    return int(rpc.rpc_sync("worker1", os.getpid))


def control_socket() -> socket.socket:
    """The control socket of the rank that this runs in, from the frames below."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(getattr(owner, "control", None), socket.socket):
            found: socket.socket = owner.control  # type: ignore[union-attr]
            return found
        frame = frame.f_back
    msg = "no control socket below"
    raise LookupError(msg)


# It raises.


@kind(RemoteError, "SystemExit", always=True)
def exits_with_0() -> None:
    sys.exit(0)


@kind(RemoteError, "SystemExit", "on purpose")
def exits_with_a_text() -> None:
    sys.exit("on purpose")


@kind(RemoteError, "KeyboardInterrupt")
def raises_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


@kind(RemoteError, "GeneratorExit")
def raises_generator_exit() -> None:
    raise GeneratorExit


@kind(RemoteError, "BaseException", "on purpose")
def raises_base_exception() -> None:
    raise BaseException("on purpose")


@kind(RemoteError, "CancelledError")
def raises_cancelled() -> None:
    raise asyncio.CancelledError


@kind(RemoteError, "BaseExceptionGroup", "KeyboardInterrupt")
def raises_a_group_of_interrupts() -> None:
    raise BaseExceptionGroup("two", [KeyboardInterrupt(), ValueError("other")])


@kind((RemoteError, pytest.fail.Exception), "on purpose", always=True)
def calls_pytest_fail() -> None:
    pytest.fail("on purpose")


@kind(StopIteration, always=True)
def raises_stop_iteration() -> None:
    raise StopIteration("on purpose")


@kind(MemoryError)
def allocates_too_much() -> None:
    bytearray(1 << 60)


@kind(RecursionError, always=True)
def recurses() -> None:
    recurses()


class TextRaises(Exception):
    def __str__(self) -> str:
        msg = "no text"
        raise ValueError(msg)


@kind((TextRaises, RemoteError), "TextRaises", always=True)
def raises_without_a_text() -> None:
    raise TextRaises


class TextExits(Exception):
    def __str__(self) -> str:
        sys.exit("no text")

    __repr__ = __str__


@kind((TextExits, RemoteError), "TextExits")
def raises_what_exits_when_shown() -> None:
    raise TextExits


class TextIsNoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]

    __repr__ = __str__


@kind((TextIsNoText, RemoteError), "TextIsNoText")
def raises_with_a_number_for_a_text() -> None:
    raise TextIsNoText


class ReduceRaises(Exception):
    def __reduce__(self) -> Any:
        msg = "no pickle"
        raise ValueError(msg)


@kind(RemoteError, "ReduceRaises", "on purpose", always=True)
def raises_what_cannot_be_pickled() -> None:
    raise ReduceRaises("on purpose")


class ReduceExits(Exception):
    def __reduce__(self) -> Any:
        sys.exit("no pickle")


@kind(RemoteError, "ReduceExits", "on purpose")
def raises_what_exits_when_pickled() -> None:
    raise ReduceExits("on purpose")


class NeedsTwo(Exception):
    def __init__(self, left: str, right: str) -> None:
        super().__init__(left + right)


@kind(RemoteError, "NeedsTwo", "on purpose")
def raises_what_cannot_be_read_back() -> None:
    raise NeedsTwo("on ", "purpose")


def in_a_rank() -> bool:
    return _rank_fixture._this_rank is not None


def read_in_ranks_only(how: str) -> Exception:
    if in_a_rank():
        return ValueError("read in a rank")
    if how == "exits":
        sys.exit("on purpose")
    if how == "interrupts":
        raise KeyboardInterrupt
    msg = "on purpose"
    raise LookupError(msg)


class ReadInRanksOnly(Exception):
    def __reduce__(self) -> Any:
        return read_in_ranks_only, self.args


@kind(RemoteError, "ReadInRanksOnly")
def raises_what_the_test_cannot_read() -> None:
    raise ReadInRanksOnly("raises")


@kind(RemoteError, "ReadInRanksOnly", always=True)
def raises_what_exits_when_read() -> None:
    raise ReadInRanksOnly("exits")


@kind(RemoteError, "ReadInRanksOnly")
def raises_what_interrupts_when_read() -> None:
    raise ReadInRanksOnly("interrupts")


class BecomesADict(Exception):
    def __reduce__(self) -> Any:
        return dict, ()


@kind(RemoteError, "BecomesADict")
def raises_what_becomes_a_dict() -> None:
    raise BecomesADict


class HoldsALock(Exception):
    def __init__(self) -> None:
        super().__init__("on purpose")
        self.lock = threading.Lock()


@kind(RemoteError, "HoldsALock", "on purpose")
def raises_with_a_lock() -> None:
    raise HoldsALock


@kind((RemoteError, ValueError), "on purpose", always=True)
def raises_with_an_rref() -> None:
    raise ValueError("on purpose", rpc.RRef(5))


@kind(ValueError, "x{9999}", always=True)
def raises_a_megabyte() -> None:
    raise ValueError("x" * (1 << 20))


@kind(ValueError, "purpose")
def raises_control_characters() -> None:
    raise ValueError("on\x1b[31m\x00\r\n\x9b\udc80\ud800 purpose")


@kind(ExceptionGroup, "first", "second")
def raises_a_group() -> None:
    raise ExceptionGroup("two", [ValueError("first"), LookupError("second")])


@kind((ExceptionGroup, RemoteError), "ExceptionGroup")
def raises_nested_groups() -> None:
    error: Any = ValueError("innermost")
    for _ in range(3000):
        error = ExceptionGroup("outer", [error])
    raise error


@kind(ValueError, "the effect", "LookupError", "the cause")
def raises_with_a_cause() -> None:
    msg = "the effect"
    raise ValueError(msg) from LookupError("the cause")


@kind((ValueError, RemoteError), "number 4999")
def raises_with_a_long_chain_of_causes() -> None:
    error = ValueError("number 0")
    for number in range(1, 5000):
        after = ValueError(f"number {number}")
        after.__cause__ = error
        error = after
    raise error


@kind(ValueError, "on purpose", "a note of the user")
def raises_with_a_note() -> None:
    error = ValueError("on purpose")
    error.add_note("a note of the user")
    raise error


@kind((ValueError, RemoteError), "on purpose")
def raises_with_notes_that_are_none() -> None:
    error = ValueError("on purpose")
    error.__notes__ = 5  # type: ignore[assignment]
    raise error


@kind((SyntaxError, RemoteError), "SyntaxError")
def raises_a_syntax_error_of_odd_parts() -> None:
    error = SyntaxError("on purpose")
    error.filename, error.lineno, error.offset, error.text = "f", 1, "x", 3  # type: ignore[assignment]
    raise error


@kind(Exception, "LocalError", "on purpose")
def raises_a_local_class() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("on purpose")


@kind(RemoteError, "OnlyThere", "on purpose")
def raises_a_class_of_a_module_that_is_only_there() -> None:
    module = sys.modules["only_there"] = types.ModuleType("only_there")
    exec("class OnlyThere(Exception): pass", module.__dict__)
    raise module.OnlyThere("on purpose")


@kind(RuntimeError, "size", "rank 0")
def raises_in_torch() -> None:
    kept_here.append(torch.ones(2) + torch.ones(3))


@kind(EOFError)
def reads_standard_input() -> None:
    input()


@kind(Exception, "BdbQuit")
def sets_a_breakpoint() -> None:
    pdb.Pdb(nosigint=True).set_trace()


@kind(UsageError, "on purpose")
def raises_an_error_of_ours() -> None:
    msg = "on purpose"
    raise UsageError(msg)


# It ends its process, or another's.


@kind(RankDied, "exit code 0", always=True)
def leaves_with_0() -> None:
    os._exit(0)


@kind(RankDied, "exit code 3")
def leaves_with_3() -> None:
    os._exit(3)


@kind(RankDied, "SIGABRT")
def aborts() -> None:
    os.abort()


def _send_myself(number: int) -> NoReturn:
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(1e9)
    raise AssertionError


@kind(RankDied, "SIGKILL", always=True)
def kills_itself() -> None:
    _send_myself(signal.SIGKILL)


@kind(RankDied, "SIGTERM")
def terminates_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1e9)


@kind(RankDied, "SIGSEGV", always=True)
def faults() -> None:
    ctypes.string_at(0)


@kind(RankDied, "SIGKILL")
def kills_its_group() -> None:
    assert os.getpgid(0) == os.getpid()
    os.killpg(0, signal.SIGKILL)
    time.sleep(1e9)


@kind(RemoteError, "KeyboardInterrupt", always=True)
def interrupts_itself() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


@kind(RankDied, "SIGALRM")
def sets_an_alarm() -> None:
    signal.alarm(1)
    while True:
        signal.pause()


@kind(BrokenPromise, "KeyboardInterrupt|interrupt", always=True)
def interrupts_its_main_thread_later() -> int:
    def later() -> None:
        time.sleep(40)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=later, daemon=True).start()
    # The cluster ends later than the thread, as it waits for this.
    rpc.rpc_async("worker1", time.sleep, args=(400,))
    return FINE


@kind(RankDied, "SIGKILL", rank=1, always=True)
def kills_its_peer() -> int:
    os.kill(peer_pid(), signal.SIGKILL)
    return FINE


@kind(RankDied, "SIGTERM", rank=1)
def kills_its_peer_and_calls_it() -> None:
    os.kill(peer_pid(), signal.SIGTERM)
    rpc.rpc_sync("worker1", abs, args=(-1,))


@kind(RankHung, rank=1, deadline=2.0)
def stops_its_peer() -> int:
    os.kill(peer_pid(), signal.SIGSTOP)
    return FINE


@kind(RankDied, "SIGXCPU")
def uses_up_its_processor_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
    while True:
        pass


# It never ends.


@kind(RankHung, deadline=2.0)
def spins() -> None:
    while True:
        pass


@kind(RankHung, "sleeps_for_ever", deadline=2.0, always=True)
def sleeps_for_ever() -> None:
    time.sleep(1e9)


@kind(RankHung, "waits_for_its_own_lock", deadline=2.0)
def waits_for_its_own_lock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


@kind(RankHung, deadline=2.0)
def holds_the_interpreter() -> None:
    for _ in map(sum, [itertools.repeat(1)]):
        pass


@kind(RankHung, deadline=2.0)
def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@kind(RankHung, deadline=2.0)
def hangs_without_a_handler_for_stacks() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    time.sleep(1e9)


@kind(RankHung, deadline=2.0)
def hangs_and_ignores_every_signal() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    time.sleep(1e9)


class EndsNever:
    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        time.sleep(1e9)


@kind(RankHung, "worker0", deadline=2.0)
def leaves_a_cycle_whose_end_never_ends() -> int:
    EndsNever()
    return FINE


@kind(RankHung, "worker0", how="submit", deadline=2.0)
def is_never_waited_for() -> None:
    time.sleep(1e9)


@kind(how="submit")
def raises_and_is_never_asked() -> None:
    msg = "on purpose"
    raise ValueError(msg)


@kind(RankHung, "shutdown", deadline=2.0)
def shuts_down_alone() -> None:
    rpc.shutdown()


def _ends_never_when_pickled() -> NoReturn:
    while True:
        time.sleep(1e9)


class PickledForEver:
    def __reduce__(self) -> Any:
        _ends_never_when_pickled()


@kind(RankHung, "_ends_never_when_pickled", deadline=2.0)
def returns_what_is_pickled_for_ever() -> Any:
    return PickledForEver()


# What it returns.


@kind(UsageError, "rank 0 returned", "lock", always=True)
def returns_a_lock() -> Any:
    return threading.Lock()


@kind(UsageError, "rank 0 returned an RRef", always=True)
def returns_an_rref() -> Any:
    return rpc.RRef(5)


@kind(UsageError, "rank 0 returned generator")
def returns_a_generator() -> Any:
    return (n for n in range(3))


@kind(UsageError, "rank 0 returned")
def returns_its_control_socket() -> Any:
    return control_socket()


@kind(UsageError, "rank 0 returned")
def returns_a_deep_list() -> Any:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


class ResultReduceRaises:
    def __reduce__(self) -> Any:
        msg = "on purpose"
        raise LookupError(msg)


@kind(UsageError, "rank 0 returned ResultReduceRaises", "on purpose")
def returns_what_cannot_be_pickled() -> Any:
    return ResultReduceRaises()


class ResultReduceExits:
    def __reduce__(self) -> Any:
        sys.exit("on purpose")


@kind((UsageError, RemoteError), "rank 0", "on purpose")
def returns_what_exits_when_pickled() -> Any:
    return ResultReduceExits()


class ResultReadInRanksOnly:
    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return read_in_ranks_only, (self.how,)


@kind(UsageError, "rank 0", "on purpose", always=True)
def returns_what_the_test_cannot_read() -> Any:
    return ResultReadInRanksOnly("raises")


@kind(UsageError, "rank 0")
def returns_what_exits_when_read() -> Any:
    return ResultReadInRanksOnly("exits")


@kind(UsageError, "rank 0")
def returns_what_interrupts_when_read() -> Any:
    return ResultReadInRanksOnly("interrupts")


@kind(UsageError, "rank 0", "only_there")
def returns_a_value_of_a_module_that_is_only_there() -> Any:
    module = sys.modules["only_there"] = types.ModuleType("only_there")
    exec("class There: pass", module.__dict__)
    return module.There()


@kind(value=b"x" * (100 << 20))
def returns_100_megabytes() -> Any:
    return b"x" * (100 << 20)


@kind(how="keep", always=True)
def keeps_a_lock() -> Any:
    return threading.Lock()


# torch counts an owner once another rank has a fork of it.
also(returns_an_rref, "keeps_an_rref_of_its_own", how="keep")
also(exits_with_0, "keeps_an_exit", RemoteError, "SystemExit", how="keep")
also(raises_what_cannot_be_pickled, "keeps_an_error", RemoteError, "on purpose", how="keep")
also(sleeps_for_ever, "keeps_a_hang", RankHung, how="keep", deadline=2.0)


# Its descriptors.


@kind(always=True)
def closes_0_to_2() -> int:
    for number in range(3):
        os.close(number)
    return FINE


@kind(RankDied, always=True)
def closes_every_descriptor() -> int:
    os.closerange(3, 1024)
    return FINE


@kind(RankDied, always=True)
def closes_the_control_socket() -> int:
    control_socket().close()
    return FINE


@kind(RankDied)
def ends_the_control_channel() -> int:
    control_socket().shutdown(socket.SHUT_RDWR)
    time.sleep(1e9)
    return FINE


#: What a frame that is none of ours may be told as: who wrote it must be named.
DAMAGED: Errors = (BrokenPromise, UsageError)


@kind(DAMAGED, always=True)
def writes_a_frame_of_garbage() -> int:
    control_socket().sendall(b"\x00\x00\x00\x04junk")
    return FINE


@kind(DAMAGED, deadline=2.0)
def announces_a_frame_that_never_comes() -> int:
    control_socket().sendall(b"\x7f\xff\xff\xff")
    return FINE


@kind(DAMAGED)
def writes_an_empty_frame() -> int:
    control_socket().sendall(b"\x00\x00\x00\x00")
    return FINE


@kind(DAMAGED)
def writes_a_frame_of_another_kind() -> int:
    control_socket().sendall(_wire.pack(5))
    return FINE


# An answer to what nobody has asked: it does no harm.
@kind()
def writes_an_answer_to_nothing() -> int:
    control_socket().sendall(_wire.pack((1.5, "unheard of", None)))
    return FINE


@kind(DAMAGED)
def writes_garbage_everywhere() -> int:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            number = int(name)
            if number > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.set_blocking(number, False)
                os.write(number, b"\x00\x00\x00\x04junk" * 8)
    return FINE


# torch's graceful shutdown opens descriptors; it says nothing of it, and waits for ever.
@kind((UngracefulShutdown, RankDied, RankHung), deadline=2.0)
def may_open_no_more() -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return FINE


@kind((UngracefulShutdown, RankDied, RankHung), deadline=2.0)
def uses_up_its_descriptors() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with contextlib.suppress(OSError):
        while True:
            kept_here.append(os.open("/dev/null", os.O_RDONLY))
    return FINE


@kind()
def opens_many_descriptors() -> int:
    kept_here.extend(os.open("/dev/null", os.O_RDONLY) for _ in range(500))
    return FINE


# Its output.


@kind(always=True)
def prints_50_megabytes() -> int:
    for _ in range(50):
        print("x" * (1 << 20))
    return FINE


@kind(RankDied, "exit code 3")
def prints_a_line_of_megabytes_and_leaves() -> None:
    sys.stdout.write("x" * (10 << 20))
    sys.stdout.flush()
    os._exit(3)


@kind(RankDied, "exit code 3", "readable")
def prints_what_is_no_text_and_leaves() -> None:
    os.write(1, b"\xff\xfe\x00\x80readable\n")
    os._exit(3)


@kind()
def prints_what_is_no_text() -> int:
    os.write(1, bytes(range(256)))
    return FINE


@kind(always=True)
def has_no_standard_output() -> int:
    sys.stdout = sys.stderr = None
    return FINE


@kind()
def closes_its_streams() -> int:
    sys.stdout.close()
    sys.stderr.close()
    sys.stdin.close()
    return FINE


@kind(ValueError, "on purpose")
def has_another_print() -> None:
    setattr(builtins, "print", None)  # noqa: B010
    msg = "on purpose"
    raise ValueError(msg)


@kind()
def forges_lines_of_torch() -> int:
    # A user's own text: without a fault nothing counts it.
    print("[I] Send try 1 failed")
    return FINE


@kind()
def misuses_logging() -> int:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            msg = "on purpose"
            raise ValueError(msg)

    logging.getLogger().addHandler(Handler())
    logging.getLogger().setLevel(1)
    logging.shutdown()
    logging.disable(logging.CRITICAL)
    return FINE


# Its place and limits.


@kind()
def goes_to_the_root() -> int:
    os.chdir("/")
    return FINE


@kind(always=True)
def stands_in_a_folder_that_is_gone() -> int:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    shutil.rmtree(folder)
    return FINE


@kind(OSError, always=True)
def may_write_no_file() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    print("x", flush=True)


@kind(UngracefulShutdown, "[Ff]ile too large|rpc.shutdown")
def may_write_no_file_and_does_not() -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return FINE


@kind(MemoryError)
def may_have_no_more_memory() -> None:
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), resource.RLIM_INFINITY))
    bytearray(1 << 30)


@kind()
def is_nice() -> int:
    os.nice(19)
    return FINE


@kind()
def makes_files_for_nobody() -> int:
    os.umask(0o777)
    return FINE


@kind()
def has_no_environment() -> int:
    os.environ.clear()
    return FINE


# Other processes.


@kind(value="parent", always=True)
def forks_and_the_child_returns_first() -> str:
    if os.fork() == 0:
        return "child"
    time.sleep(200)
    return "parent"


@kind(value="parent")
def forks_and_the_child_raises() -> str:
    if os.fork() == 0:
        msg = "in the child"
        raise ValueError(msg)
    time.sleep(200)
    return "parent"


@kind()
def forks_and_the_child_leaves() -> int:
    if os.fork() == 0:
        os._exit(0)
    return FINE


@kind(always=True)
def forks_and_the_child_stays() -> int:
    if os.fork() == 0:
        time.sleep(1e9)
    return FINE


@kind()
def forks_and_the_child_stays_in_its_own_session() -> int:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1e9)
        os._exit(0)
    return FINE


@kind()
def leaves_a_subprocess() -> int:
    kept_here.append(subprocess.Popen(["sleep", "1000"]))
    return FINE


@kind(always=True)
def leaves_a_subprocess_in_its_own_session() -> int:
    kept_here.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
    return FINE


@kind(RankDied, "SIGKILL")
def leaves_a_subprocess_and_dies() -> None:
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGKILL)


@kind(PermissionError)
def becomes_a_session() -> None:
    # It leads its process group already, so the kernel refuses.
    os.setsid()


@kind()
def joins_the_group_of_its_parent() -> int:
    os.setpgid(0, os.getpgid(os.getppid()))
    return FINE


@kind()
def may_outlive_its_parent() -> int:
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    return FINE


@kind()
def is_traced() -> int:
    ctypes.CDLL(None).ptrace(0, 0, None, None)
    return FINE


@kind((RankHung, RankDied), deadline=2.0)
def is_traced_and_stops() -> int:
    ctypes.CDLL(None).ptrace(0, 0, None, None)
    signal.raise_signal(signal.SIGWINCH)
    return FINE


@kind(value=1)
def uses_multiprocessing_spawn() -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(len, ["x"])[0]


@kind(value=1)
def uses_multiprocessing_fork() -> int:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(len, ["x"])[0]


@kind()
def leaves_a_process_of_multiprocessing() -> int:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1e9,))
    process.start()
    kept_here.append(process)
    return FINE


# Threads.


def _spin() -> None:
    while True:
        pass


def _raise() -> None:
    msg = "in a thread"
    raise ValueError(msg)


@kind()
def leaves_a_busy_thread() -> int:
    threading.Thread(target=_spin, daemon=True).start()
    return FINE


@kind(always=True)
def leaves_a_thread_that_the_interpreter_would_wait_for() -> int:
    threading.Thread(target=time.sleep, args=(1e9,), daemon=False).start()
    return FINE


@kind()
def starts_a_thread_that_raises() -> int:
    thread = threading.Thread(target=_raise)
    thread.start()
    thread.join()
    return FINE


@kind()
def has_a_hook_for_threads_that_raises() -> int:
    def hook(_: Any) -> None:
        _raise()

    threading.excepthook = hook
    return starts_a_thread_that_raises()


@kind()
def leaves_a_pool_of_threads() -> int:
    pool = concurrent.futures.ThreadPoolExecutor(4)
    kept_here.extend(pool.submit(time.sleep, 1e9) for _ in range(8))
    return FINE


@kind(RankDied, "exit code 3")
def leaves_from_a_thread() -> None:
    threading.Thread(target=os._exit, args=(3,)).start()
    time.sleep(1e9)


# Signals, hooks and the interpreter.


@kind()
def handles_signals() -> int:
    for number in (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, lambda *_: None)
    return FINE


@kind()
def blocks_every_signal() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    return FINE


@kind()
def disables_faulthandler() -> int:
    faulthandler.disable()
    faulthandler.unregister(signal.SIGUSR1)
    return FINE


@kind(always=True)
def has_hooks_that_raise() -> int:
    def hook(*_: Any) -> None:
        _raise()

    sys.excepthook = sys.unraisablehook = hook
    atexit.register(hook)
    gc.callbacks.append(hook)
    return FINE


# Python raises what a trace function raises in whatever is traced, which then is ours.
@kind((ValueError, *DAMAGED), "in a thread")
def traces_and_raises() -> int:
    def trace(*_: Any) -> None:
        _raise()

    threading.settrace(trace)
    sys.settrace(trace)
    return FINE


@kind()
def profiles() -> int:
    sys.setprofile(lambda *_: None)
    threading.setprofile(lambda *_: None)
    return FINE


@kind()
def allows_little_recursion() -> int:
    sys.setrecursionlimit(100)
    return FINE


@kind()
def makes_warnings_errors() -> int:
    warnings.simplefilter("error")
    return FINE


@kind()
def has_no_path() -> int:
    sys.path.clear()
    sys.path_importer_cache.clear()
    return FINE


# Nothing can be pickled there any more, so that the rank cannot even say what it holds.
@kind(DAMAGED, "sys.modules", always=True)
def has_no_modules() -> int:
    sys.modules.clear()
    return FINE


@kind()
def runs_an_event_loop() -> int:
    async def inside() -> int:
        await asyncio.sleep(0.1)
        return FINE

    return asyncio.run(inside())


# torch.


class Cycle:
    def __init__(self, held: Any) -> None:
        self.me = self
        self.held = held


@kind(always=True)
def leaves_an_rref_in_a_cycle() -> int:
    gc.disable()
    Cycle(rpc.remote("worker1", abs, args=(-1,)))
    return FINE


# torch counts the leak where the value is.
@kind(RRefLeak, rank=1, always=True)
def freezes_an_rref_in_a_cycle() -> int:
    Cycle(rpc.remote("worker1", abs, args=(-1,)))
    gc.freeze()
    return FINE


@kind(RRefLeak, rank=1, how="keep")
def keeps_an_rref_for_the_test() -> Any:
    return rpc.remote("worker1", abs, args=(-1,))


@kind(RRefLeak, rank=1)
def keeps_an_rref() -> int:
    kept_here.append(rpc.remote("worker1", abs, args=(-1,)))
    return FINE


# Its peer sees the connections close.
@kind(BrokenPromise, rank=1)
def has_another_shutdown() -> int:
    setattr(rpc, "shutdown", lambda **_: None)  # noqa: B010
    return FINE


# The other rank waits for this one for ever; what this one raised comes first.
@kind(UngracefulShutdown, "worker0 raised .*on purpose", deadline=2.0)
def has_a_shutdown_that_raises() -> int:
    def shutdown(**_: Any) -> None:
        msg = "on purpose"
        raise ValueError(msg)

    setattr(rpc, "shutdown", shutdown)  # noqa: B010
    return FINE


@kind((UngracefulShutdown, RankDied), deadline=5.0)
def shuts_down_at_once() -> int:
    rpc.shutdown(graceful=False)
    return FINE


@kind(UngracefulShutdown, "worker0 raised .*on purpose", deadline=2.0, always=True)
def has_a_shutdown_that_raises_and_no_streams() -> int:
    closes_its_streams()
    return has_a_shutdown_that_raises()


@kind(UngracefulShutdown, how="each", value=[FINE, FINE])
def shuts_down_itself() -> int:
    rpc.shutdown()
    return FINE


@kind(RuntimeError, "initiali[sz]ed")
def initialises_rpc_again() -> None:
    fixture.for_this_rank().init_rpc()


@kind()
def sets_threads_seeds_and_defaults() -> int:
    torch.set_num_threads(4)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    return FINE


@kind((), how="each", value=[FINE, FINE])
def calls_the_other_while_it_calls() -> int:
    me = rpc.get_worker_info().id
    for _ in range(20):
        rpc.rpc_sync(f"worker{1 - me}", abs, args=(-1,))
    return FINE


@kind(RankDied, "exit code 3", how="each", rank=1, always=True)
def dies_in_one_while_the_other_waits() -> None:
    if rpc.get_worker_info().id == 1:
        os._exit(3)
    rpc.rpc_sync("worker1", time.sleep, args=(1e6,))


@kind(ValueError, "from rank 1", how="each", rank=1)
def raises_in_one_rank() -> int:
    if rpc.get_worker_info().id == 1:
        msg = "from rank 1"
        raise ValueError(msg)
    return FINE


# What torch runs, in rank 1.

also(raises_in_torch, "torch_runs_what_raises", RuntimeError, "size", how="rpc", rank=1)
also(leaves_with_3, "torch_runs_what_leaves", RankDied, "exit code 3", how="rpc", rank=1)
also(kills_itself, "torch_runs_what_is_killed", RankDied, "SIGKILL", how="rpc", rank=1)
also(sleeps_for_ever, "torch_runs_what_hangs", RankHung, "sleeps_for_ever", how="rpc", deadline=2.0)
also(exits_with_0, "torch_runs_an_exit", Exception, "SystemExit", how="rpc", rank=1)
also(
    raises_keyboard_interrupt,
    "torch_runs_an_interrupt",
    Exception,
    "KeyboardInterrupt",
    how="rpc",
    rank=1,
)
also(raises_without_a_text, "torch_runs_no_text", Exception, how="rpc", rank=1)
also(
    raises_what_cannot_be_pickled,
    "torch_runs_what_cannot_be_pickled",
    Exception,
    "ReduceRaises|on purpose",
    how="rpc",
    rank=1,
)
# torch makes a RuntimeError of it, whose text says what it was.
also(recurses, "torch_runs_a_recursion", Exception, "RecursionError", how="rpc", rank=1)
also(returns_a_lock, "torch_runs_what_returns_a_lock", Exception, "lock|pickle", how="rpc", rank=1)
also(raises_a_megabyte, "torch_runs_a_megabyte", ValueError, "x{999}", how="rpc", rank=1)
also(prints_50_megabytes, "torch_runs_50_megabytes_of_text", how="rpc")
also(forks_and_the_child_stays, "torch_runs_a_fork_that_stays", how="rpc")
also(forks_and_the_child_leaves, "torch_runs_a_fork_that_leaves", how="rpc")
also(leaves_a_busy_thread, "torch_runs_what_leaves_a_thread", how="rpc")
also(starts_a_thread_that_raises, "torch_runs_a_thread_that_raises", how="rpc")
also(has_no_standard_output, "torch_runs_no_standard_output", how="rpc")
also(handles_signals, "torch_runs_handlers", ValueError, "main thread", how="rpc", rank=1)
also(stops_itself, "torch_runs_a_stop", RankHung, how="rpc", rank=1, deadline=2.0)
ALWAYS |= {"torch_runs_an_exit", "torch_runs_what_leaves", "torch_runs_a_fork_that_stays"}


# The test itself.


def ask(function: Callable[[], Any]) -> Any:
    return rpc.rpc_sync("worker1", function)


def use(cluster: Any, one: Kind) -> Any:
    first = cluster.on(0)
    if one.how == "each":
        return cluster.each(one.function)
    if one.how == "rpc":
        return first.call(ask, one.function)
    if one.how == "submit":
        # Not waited for: the rank may be at it when the block is left.
        first.submit(one.function)
        return one.value
    if one.how == "keep":
        # Whoever gets the handle holds the value in the rank.
        return first.call(one.function, keep=True)
    return first.call(one.function)


def left_of_clusters(server: ClusterServer) -> list[str]:
    """The processes below a server that are no servers, once its pre-forked ranks were let go."""
    peers = server.servers.peers
    servers = {peer.hello.pid for peer in peers if peer.hello}
    for peer in peers:
        _wire.send(peer.sock, ("preforked", 0))
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        below: dict[int, str] = {}
        for pid in servers:
            for child in psutil.Process(pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    below[child.pid] = f"{child.pid} {child.status()} {child.cmdline()}"
        left = [said for pid, said in below.items() if pid not in servers]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def parameters() -> list[Any]:
    return [
        pytest.param(one, id=name, marks=() if name in ALWAYS else pytest.mark.nightly)
        for name, one in KINDS.items()
    ]


@pytest.mark.parametrize("one", parameters())
def test_misbehaving_code(rpc_cluster: ClusterFactory, one: Kind) -> None:
    """A kind gives its value or an error that names the rank; nothing is left, the next works."""
    began = time.monotonic()
    found: BaseException | None = None
    value: Any = None
    cluster = rpc_cluster(world_size=2, deadline=one.deadline)
    try:
        with cluster:
            value = use(cluster, one)
    except BaseException as error:
        found = error
    took = time.monotonic() - began
    left = left_of_clusters(rpc_cluster.server)
    with rpc_cluster(world_size=2) as after:
        assert after.each(abs, -1) == [1, 1]
    told = "" if found is None else "".join(traceback.format_exception(found))
    assert not left, f"left behind: {left}\n{told}"
    assert not isinstance(found, HarnessError), told
    assert took < SECONDS
    if not one.errors:
        assert found is None, told
        assert one.how == "keep" or value == one.value
        return
    assert found is not None, f"nothing was raised, and the value is {value!r:.200}"
    # The error itself: a subclass would be handled as another by who catches it.
    promise = any(issubclass(error, BrokenPromise) for error in one.errors)
    if promise or Exception in one.errors:
        assert isinstance(found, one.errors), told
    else:
        assert type(found) in one.errors, told
    assert any(name in told for name in (f"rank {one.rank}", f"worker{one.rank}")), told
    for words in one.says:
        assert re.search(words, told), f"nothing of {words!r} in:\n{told:.20000}"


def raise_it(name: str, arguments: tuple[Any, ...]) -> None:
    raise getattr(builtins, name)(*arguments)


def builtin_exceptions() -> list[tuple[str, tuple[Any, ...]]]:
    """Each builtin class of exception that an `except Exception` catches, and arguments for it."""
    special: dict[str, tuple[Any, ...]] = {
        "UnicodeDecodeError": ("utf-8", b"\xff", 0, 1, "on purpose"),
        "UnicodeEncodeError": ("utf-8", "\ud800", 0, 1, "on purpose"),
        "UnicodeTranslateError": ("x", 0, 1, "on purpose"),
        "ExceptionGroup": ("on purpose", [ValueError("inside")]),
    }
    return [
        (name, special.get(name, ("on purpose",)))
        for name, found in sorted(vars(builtins).items())
        if isinstance(found, type) and issubclass(found, Exception) and found.__name__ == name
    ]


def test_each_builtin_exception_arrives(rpc_cluster: ClusterFactory) -> None:
    """Every builtin exception arrives as its own type, with its arguments and its rank."""
    with rpc_cluster(world_size=1) as cluster:
        for name, arguments in builtin_exceptions():
            with pytest.raises(getattr(builtins, name)) as caught:
                cluster.on(0).call(raise_it, name, arguments)
            assert type(caught.value).__name__ == name
            assert str(caught.value.args) == str(arguments)
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert caught.value.__cause__.rank == 0
        assert cluster.on(0).call(abs, -1) == 1
        cluster.settle()


def test_the_same_under_faults(rpc_cluster: ClusterFactory) -> None:
    """An error that is no fault's is told as itself also where messages fail and come late."""
    faults = FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_CALL": 0.5})
    for name in ("raises_with_an_rref", "torch_runs_what_leaves", "kills_its_peer"):
        one = KINDS[name]
        with pytest.raises(one.errors) as caught:
            with rpc_cluster(world_size=2, faults=faults) as cluster:
                use(cluster, one)
        told = "".join(traceback.format_exception(caught.value))
        assert f"rank {one.rank}" in told or f"worker{one.rank}" in told
    assert not left_of_clusters(rpc_cluster.server)


def test_how_many_kinds_there_are() -> None:
    """There are more than a hundred kinds, and what every run tries covers each class of them."""
    names = set(KINDS)
    assert len(names) >= 100
    assert names >= ALWAYS
    sample = [KINDS[name] for name in ALWAYS]
    assert {one.how for one in sample} == {"call", "rpc", "each", "keep"}
    wanted = (RemoteError, RankDied, RankHung, RRefLeak, UsageError, BrokenPromise)
    assert {error for one in sample for error in one.errors} >= set(wanted)
    assert any(not one.errors for one in sample)
    documented = Path(__file__).read_text(encoding="utf-8")
    assert all(f"def {one.function.__name__}(" in documented for one in KINDS.values())
