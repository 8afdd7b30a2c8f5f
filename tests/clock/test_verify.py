"""Loading the library, and the measurement that decides whether to trust it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from rpcprops import clock
from rpcprops.clock import _measure


@pytest.mark.parametrize("rate", [1, 10, 200])
def test_verify_measures_the_rate(library: Path, rate: float) -> None:
    """verify() finds a working clock right, and does so quickly."""
    del library
    fastest = float("inf")
    for _ in range(4):
        start = time.monotonic()
        assert clock.verify(rate) == pytest.approx(rate, rel=0.02)
        fastest = min(fastest, time.monotonic() - start)
        if fastest < 0.5:
            break
    print(f"verify({rate}) took {fastest:.3f} s")
    assert fastest < 1.5


def test_verify_refuses_a_child_without_the_library() -> None:
    """A child that the library was not loaded into is not mistaken for a dilated one."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with pytest.raises(clock.ClockError, match=r"not loaded|not built"):
        clock._verify(100, environment)


@contextmanager
def probed(probe: Callable[[int], None]) -> Iterator[int]:
    """The observer's end of a probe that runs in a thread of this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=probe, args=[theirs.fileno()])
        thread.start()
        try:
            yield ours.fileno()
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(30)
        assert not thread.is_alive()


def test_observe_refuses_an_undilated_process() -> None:
    """A process that runs in real time is told from one at rate 100, and named."""
    with probed(clock.probe) as fd:
        with pytest.raises(clock.ClockError, match=r"runs at rate (0\.99|1)"):
            clock.observe(fd, 100)


def test_observe_accepts_an_undilated_process_at_rate_1() -> None:
    """The measurement itself is right where nothing is dilated."""
    with probed(clock.probe) as fd:
        assert clock.observe(fd, 1) == pytest.approx(1, rel=0.02)


def test_observe_refuses_a_rate_a_tenth_off(library: Path) -> None:
    """A child at rate 110 does not pass for one at rate 100."""
    ours, theirs = socket.socketpair()
    code = (
        "import sys; from rpcprops import clock; clock.set_rate(110); clock.probe(int(sys.argv[1]))"
    )
    environment = clock.preload_environment(os.environ)
    environment["PYTHONPATH"] = str(library.parents[2])
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        try:
            theirs.close()
            with pytest.raises(clock.ClockError, match="not 100"):
                clock.observe(ours.fileno(), 100)
        finally:
            child.kill()
            child.wait(30)


def fake_probe(waited: float) -> Callable[[int], None]:
    """Right clock reads at rate 100, and waits of `waited` times their length."""

    def virtual() -> int:
        return time.monotonic_ns() * 100

    def probe(fd: int) -> None:
        while request := _measure._receive(fd, _measure._REQUEST.size):
            operation, nanoseconds = _measure._REQUEST.unpack(request)
            if operation == 0:
                return
            start = virtual()
            if operation > 1:
                time.sleep(nanoseconds / 100 / 1e9 * waited)
            try:
                os.write(fd, _measure._ANSWER.pack(start, virtual(), virtual()))
            except OSError:
                return

    return probe


@pytest.mark.parametrize(
    ("waited", "message"), [(0.5, "ended early"), (2.5, "took at least"), (1.0001, "")]
)
def test_observe_refuses_wrong_waits(waited: float, message: str) -> None:
    """Right clock reads do not excuse waits that are too short or too long."""
    with probed(fake_probe(waited)) as fd:
        if message:
            with pytest.raises(clock.ClockError, match=message):
                clock.observe(fd, 100)
        else:
            assert clock.observe(fd, 100) == pytest.approx(100, rel=0.02)


def test_observe_refuses_a_dead_process() -> None:
    """A process that ends while it is measured is an error, not a hang."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(clock.ClockError, match="ended while it was measured"):
            clock.observe(ours.fileno(), 100)


def copied(library: Path, directory: Path) -> ModuleType:
    """This package, imported from a copy in `directory`."""
    shutil.copytree(library.parent, directory, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location(
        "copied_clock", directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["copied_clock"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        for name in [n for n in sys.modules if n.startswith("copied_clock")]:
            del sys.modules[name]
    return module


def test_a_path_with_a_space(library: Path, tmp_path: Path) -> None:
    """The library loads from a directory with a space, beside what was preloaded before."""
    module = copied(library, tmp_path / "a directory with spaces")
    environment = module.preload_environment({"LD_LIBRARY_PATH": "/nowhere"})
    assert " " not in environment["LD_PRELOAD"]
    assert environment["LD_LIBRARY_PATH"].endswith(":/nowhere")
    assert module.verify(50) == pytest.approx(50, rel=0.02)


@pytest.mark.parametrize("name", ["with:colon", "with;semicolon", "with$ORIGIN"])
def test_a_path_that_cannot_be_preloaded(library: Path, tmp_path: Path, name: str) -> None:
    """A path that the dynamic linker would misread is refused by name."""
    module = copied(library, tmp_path / name)
    with pytest.raises(RuntimeError, match="clock='real'") as raised:
        module.preload_environment({})
    assert name in str(raised.value)


def test_preload_environment(library: Path) -> None:
    """The environment is copied, extended once, and starts the clock at rate 1."""
    before = {"LD_PRELOAD": "other.so", "RPCPROPS_CLOCK": "1", "KEPT": "x"}
    after = clock.preload_environment(before)
    assert before == {"LD_PRELOAD": "other.so", "RPCPROPS_CLOCK": "1", "KEPT": "x"}
    assert after["KEPT"] == "x"
    assert "RPCPROPS_CLOCK" not in after
    assert library.name in after["LD_PRELOAD"]
    assert after["LD_PRELOAD"].endswith(":other.so")
    assert clock.preload_environment(after) == after


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is not preloaded reads real time and is told what to do about the rest."""
    if clock.loaded():
        pytest.skip("this process is preloaded")
    assert clock.get_rate() == 1.0
    assert abs(clock.real_monotonic() - time.monotonic()) < 1
    for function in (clock.selfcheck, clock.lateness, clock.reset_lateness, clock.sleep_counts):
        with pytest.raises(clock.ClockUnavailable, match="clock='real'"):
            function()
    with pytest.raises(clock.ClockUnavailable, match="clock='real'"):
        clock.set_rate(100)
    monkeypatch.setattr(clock, "__file__", str(tmp_path / "__init__.py"))
    assert clock.library_path() is None
    with pytest.raises(clock.ClockUnavailable, match="install a C compiler"):
        clock.preload_environment({})
