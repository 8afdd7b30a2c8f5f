"""What a dilated Python sees."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., str]

# Each case takes a virtual length in seconds and waits for it.  A try that was
# late is repeated, because the machine may have been busy.
WAITS = """
import asyncio, json, queue, select, selectors, signal, socket, subprocess, sys, threading, time
from rpcprops import clock

RATE = 100
LENGTH = 2.0
clock.set_rate(RATE)

def refused(expected, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except expected:
        return
    raise AssertionError(f"{function} did not raise {expected}")

def condition():
    with (c := threading.Condition()):
        assert not c.wait(LENGTH)

def join():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    thread.join(LENGTH)
    assert thread.is_alive()
    end.set()
    thread.join()

def lock():
    held = threading.Lock()
    held.acquire()
    assert not held.acquire(timeout=LENGTH)

def epoll():
    with select.epoll() as e:
        assert e.poll(LENGTH) == []

def selector():
    with selectors.DefaultSelector() as s:
        a, b = socket.socketpair()
        with a, b:
            s.register(a, selectors.EVENT_READ)
            assert s.select(LENGTH) == []

def wait_for():
    refused(asyncio.TimeoutError, asyncio.run, asyncio.wait_for(asyncio.Event().wait(), LENGTH))

def process():
    with subprocess.Popen(["sleep", "1000000"]) as child:
        try:
            refused(subprocess.TimeoutExpired, child.wait, timeout=LENGTH)
        finally:
            child.kill()

def sock():
    a, b = socket.socketpair()
    with a, b:
        a.settimeout(LENGTH)
        refused(TimeoutError, a.recv, 1)

def timer():
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, LENGTH)
    signal.pause()

def thread_timer():
    fired = threading.Event()
    t = threading.Timer(LENGTH, fired.set)
    t.start()
    fired.wait()
    t.join()

cases = {
    "time.sleep": lambda: time.sleep(LENGTH),
    "Event.wait": lambda: threading.Event().wait(LENGTH),
    "Condition.wait": condition,
    "Queue.get": lambda: refused(queue.Empty, queue.Queue().get, timeout=LENGTH),
    "SimpleQueue.get": lambda: refused(queue.Empty, queue.SimpleQueue().get, timeout=LENGTH),
    "Thread.join": join,
    "Lock.acquire": lock,
    "Semaphore.acquire": lambda: threading.Semaphore(0).acquire(timeout=LENGTH),
    "select": lambda: select.select([], [], [], LENGTH),
    "poll": lambda: select.poll().poll(LENGTH * 1000),
    "epoll": epoll,
    "selectors": selector,
    "asyncio.sleep": lambda: asyncio.run(asyncio.sleep(LENGTH)),
    "asyncio.wait_for": wait_for,
    "Popen.wait": process,
    "socket.recv": sock,
    "setitimer": timer,
    "threading.Timer": thread_timer,
    "sigtimedwait": lambda: signal.sigtimedwait([signal.SIGUSR1], LENGTH),
}
result = {}
for name, case in cases.items():
    for _ in range(5):
        real, virtual = clock.real_monotonic(), time.monotonic()
        case()
        virtual, real = time.monotonic() - virtual, clock.real_monotonic() - real
        result[name] = [virtual, real]
        # The case may do more than wait: it starts threads, loops, programs.
        if virtual < LENGTH or real < 1.5 * LENGTH / RATE + 0.03:
            break
print(json.dumps(result))
"""


def test_python_waits(run_python: RunPython) -> None:
    """Each way to wait in Python lasts its virtual length and a hundredth of it really."""
    result: dict[str, list[float]] = json.loads(run_python(WAITS))
    assert len(result) == 19
    # asyncio ends a wait up to the clock's resolution before its time.
    early = {n: t for n, t in result.items() if t[0] < 2 - 1e-6 or t[1] < (2 - 1e-6) / 100}
    assert early == {}
    assert {n: t for n, t in result.items() if t[1] >= 1.5 * 2 / 100 + 0.03} == {}


def test_control_interface(run_python: RunPython) -> None:
    """Rates are read back, refused where senseless, and the switch interval follows them."""
    run_python(
        """
        import sys, time
        from rpcprops import clock
        assert clock.loaded() and clock.get_rate() == 1.0
        base = sys.getswitchinterval()
        clock.selfcheck()
        for rate in (100, 2.5, 1e6, 1e-3, 1, 200):
            clock.set_rate(rate)
            assert clock.get_rate() == rate
            assert abs(sys.getswitchinterval() - base * rate) <= 1e-6
            clock.selfcheck() if rate >= 1 else None
        for rate in (0, -1, float("nan"), float("inf"), 1e6 + 1):
            try:
                clock.set_rate(rate)
            except clock.ClockError as error:
                assert repr(rate) in str(error)
            else:
                raise AssertionError(rate)
        assert clock.get_rate() == 200
        before, real = time.monotonic(), clock.real_monotonic()
        time.sleep(2)
        assert time.monotonic() - before > 100 * (clock.real_monotonic() - real)
        """
    )


def test_sleeps_are_counted(run_python: RunPython) -> None:
    """nanosleep() calls with a watched length are counted, in every thread, and no others."""
    run_python(
        """
        import ctypes, threading, time
        from rpcprops import clock
        libc = ctypes.CDLL(None)
        def nanosleep(ns):
            libc.nanosleep((ctypes.c_long * 2)(*divmod(ns, 10**9)), None)
        clock.set_rate(1000)
        assert clock.sleep_counts() == []
        clock.watch_sleeps([100_000_000, 1_500_000_000, 7])
        def sleeper():
            nanosleep(100_000_000)
            nanosleep(1_500_000_000)
            nanosleep(1_500_000_001)
            nanosleep(100_000_000)
        threads = [threading.Thread(target=sleeper) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        time.sleep(0.1)  # clock_nanosleep
        libc.usleep(100_000)
        assert clock.sleep_counts() == [8, 4, 0], clock.sleep_counts()
        clock.watch_sleeps([100_000_000])
        assert clock.sleep_counts() == [0]
        # Counted when it starts, so that one that is cut short counts too.
        threading.Thread(target=nanosleep, args=(10**14,), daemon=True).start()
        clock.watch_sleeps([10**15])
        threading.Thread(target=nanosleep, args=(10**15,), daemon=True).start()
        while clock.sleep_counts() != [1]:
            time.sleep(1)
        clock.watch_sleeps([])
        clock.watch_sleeps(range(64))
        try:
            clock.watch_sleeps(range(65))
        except clock.ClockError as error:
            assert "65" in str(error)
        else:
            raise AssertionError
        """
    )


def test_lateness(run_python: RunPython) -> None:
    """A wait that ends late is recorded in real time; one that was due before is not."""
    output = run_python(
        """
        import os, select, signal, threading, time
        from rpcprops import clock
        helper_reads, parent_writes = os.pipe()
        helper = os.fork()
        if helper == 0:
            # Not dilated: the rate is set after the fork.
            os.read(helper_reads, 1)
            for _ in range(3):  # On a busy machine the parent may not wait just then.
                time.sleep(0.02)
                os.kill(os.getppid(), signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        clock.set_rate(100)
        clock.reset_lateness()
        assert clock.lateness() == clock.Lateness(0.0, 0.0, 0)
        for _ in range(3):
            time.sleep(0.5)
            threading.Event().wait(0.5)
            select.select([], [], [], 0.5)
            select.poll().poll(500)
        seen = clock.lateness()
        assert seen.count >= 12, seen
        assert 0 < seen.maximum <= seen.total, seen
        clock.reset_lateness()
        threading.Event().wait(0)
        select.select([], [], [], 0)
        libc = __import__("ctypes").CDLL(None)
        libc.clock_nanosleep(time.CLOCK_MONOTONIC, 1, (__import__("ctypes").c_long * 2)(1, 0), None)
        assert clock.lateness().count == 0, clock.lateness()
        os.write(parent_writes, b"x")
        while os.waitpid(helper, os.WNOHANG)[0] == 0:
            time.sleep(1)
        print(clock.lateness().maximum)
        """
    )
    # Stopped for 0.2 real seconds, within a wait of 10 ms.
    assert 0.15 < float(output) < 5


@pytest.mark.parametrize(("rate", "ends"), [(0, False), (1, False), (100, True)])
def test_a_wait_that_nobody_ends_is_woken_once_a_real_second_under_a_fast_clock(
    run_python: RunPython, rate: int, *, ends: bool
) -> None:
    """Like a spurious wakeup, with or without a deadline; not in real time, and not at rest."""
    output = run_python(
        f"""
        import ctypes, threading, time
        from rpcprops import clock
        if {rate}:
            clock.set_rate({rate})
        libc = ctypes.CDLL(None)
        def wait(name, *rest):
            begun = clock.real_monotonic()
            condition, mutex = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            code = getattr(libc, name)(condition, mutex, *rest)
            found.append((code, clock.real_monotonic() - begun))
        far = (ctypes.c_long * 2)(int(time.time()) + 10**6, 0)
        calls = (("pthread_cond_wait",), ("pthread_cond_timedwait", far))
        for rests in (False, True):
            found = []
            clock.rest(rests)
            for call in calls:
                threading.Thread(target=wait, args=call, daemon=True).start()
            time.sleep({2 * max(1, rate)})
            print(len(found), all(code == 0 and 0.9 < took < 1.9 for code, took in found))
            clock.rest(False)
        """
    )
    assert output.split() == ["2" if ends else "0", "True", "0", "True"]


@pytest.mark.parametrize(("rate", "sleeps"), [(0, False), (1, False), (400, True)])
def test_a_thread_that_only_yields_leaves_its_processor_under_a_fast_clock(
    run_python: RunPython, rate: int, *, sleeps: bool
) -> None:
    """It sleeps when it yields once more with nothing in between; after work, it yields as ever."""
    output = run_python(
        f"""
        import os, resource, time
        from rpcprops import clock
        if {rate}:
            clock.set_rate({rate})
        def sleeps(between, times):
            begun = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            for _ in range(times):
                between()
                os.sched_yield()
            return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - begun
        def work():
            until = time.thread_time() + 20e-6
            while time.thread_time() < until:
                pass
        print(sleeps(lambda: None, 50_000), sleeps(work, 5_000))
        """
    )
    idle, working = map(int, output.split())
    # Few are sleeps, for after one the next yield comes a little later.
    assert (idle >= 10) == sleeps, output
    assert working < 5, output


@pytest.mark.parametrize("rate", [0, 1, 400])
def test_a_thread_that_yields_sleeps_while_its_process_rests(
    run_python: RunPython, rate: int
) -> None:
    """It takes next to no time of the processor, and goes on at once when the rest ends."""
    output = run_python(
        f"""
        import os, threading, time
        from rpcprops import clock
        if {rate}:
            clock.set_rate({rate})
        over, woken = threading.Event(), []
        def yields():
            while not over.is_set():
                os.sched_yield()
            woken.append(clock.real_monotonic())
        thread = threading.Thread(target=yields)
        clock.rest(True)
        thread.start()
        begun = time.process_time()
        until = clock.real_monotonic() + 0.35
        while clock.real_monotonic() < until:
            time.sleep(0.02 * max({rate}, 1))
        took = time.process_time() - begun
        over.set()
        ended = clock.real_monotonic()
        clock.rest(False)
        thread.join()
        print(took, woken[0] - ended)
        """
    )
    took, until_awake = map(float, output.split())
    assert took < 0.1, output
    assert until_awake < 0.05, output


def test_fork_inherits_the_rate(run_python: RunPython) -> None:
    """A forked child goes on in the same virtual time and can take another rate."""
    run_python(
        """
        import os, time
        from rpcprops import clock
        clock.set_rate(100)
        before = time.monotonic()
        child = os.fork()
        if child == 0:
            ok = clock.get_rate() == 100 and before <= time.monotonic() < before + 1000
            clock.set_rate(10)
            start, real = time.monotonic(), clock.real_monotonic()
            time.sleep(0.2)
            ok &= 0.2 <= time.monotonic() - start and clock.real_monotonic() - real >= 0.02
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert clock.get_rate() == 100
        """
    )


def test_standard_library_sleep_is_nanosleep(
    compiler: str, run_python: RunPython, tmp_path: Path
) -> None:
    """std::this_thread::sleep_for of whole milliseconds is one counted nanosleep()."""
    del compiler
    cxx = shutil.which("g++")
    if cxx is None:
        pytest.skip("no C++ compiler")
    source, built = tmp_path / "sleep.cpp", tmp_path / "sleep.so"
    source.write_text(
        """
        #include <chrono>
        #include <thread>
        extern "C" void sleep_ms(int ms)
        {
            std::this_thread::sleep_for(std::chrono::milliseconds(ms));
        }
        """
    )
    subprocess.run([cxx, "-shared", "-fPIC", "-o", str(built), str(source)], check=True, timeout=60)
    run_python(
        """
        import ctypes, sys
        from rpcprops import clock
        clock.set_rate(100)
        clock.watch_sleeps([1_234_000_000, 300_000_000])
        library = ctypes.CDLL(sys.argv[1])
        library.sleep_ms(1234)
        library.sleep_ms(300)
        library.sleep_ms(300)
        assert clock.sleep_counts() == [1, 2], clock.sleep_counts()
        """,
        built,
    )


def test_processes_with_one_origin_agree_on_the_time(run_python: RunPython) -> None:
    """Two processes that take up a rate from one past instant stand at one line from then on."""
    run_python(
        """
        import os, time
        from rpcprops import clock

        def line():
            # Where the virtual clock would stand at real time 0, between two readings.
            before = clock.real_monotonic()
            virtual = time.monotonic()
            after = clock.real_monotonic()
            return virtual - 100 * after, virtual - 100 * before

        origin = time.monotonic_ns()
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            time.sleep(0.05)
            clock.set_rate(100, origin_ns=origin)
            os.write(theirs, repr(line()).encode())
            os._exit(0)
        clock.set_rate(100, origin_ns=origin)
        low, high = line()
        low_there, high_there = eval(os.read(ours, 1000))
        os.waitpid(child, 0)
        assert low <= high_there + 1e-3 and low_there <= high + 1e-3, (low, high_there)
        # From the origin on, whoever took the rate up later.
        expected = origin / 1e9 * (1 - 100)
        assert low - 1e-3 <= expected <= high + 1e-3, (low, expected, high)
        """
    )


def test_an_origin_never_turns_the_clock_back(run_python: RunPython) -> None:
    """An origin that is to come, that is before the last change, or with a slower rate, is now."""
    run_python(
        """
        import time
        from rpcprops import clock
        for rate, origin in ((10, time.monotonic_ns() + 10**9), (5, 0), (50, 0)):
            before = time.monotonic()
            clock.set_rate(rate, origin_ns=origin)
            after = time.monotonic()
            assert before <= after < before + 0.5, (rate, before, after)
            time.sleep(0.01)
        """
    )
