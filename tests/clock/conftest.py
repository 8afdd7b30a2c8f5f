"""Preloaded programs to test the clock in: a C driver and Python children."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rpcprops import clock

# Far above what any child takes, so that a hang fails instead of staying.
CHILD_SECONDS = 60

RunDriver = Callable[..., list[list[str]]]
RunPython = Callable[..., str]


def run_child(arguments: Sequence[str], environment: dict[str, str]) -> str:
    # subprocess.run kills the child when the time is up or the test is stopped.
    child = subprocess.run(
        arguments,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}\n{child.stderr}"
    assert "cannot be preloaded" not in child.stderr
    return child.stdout


@pytest.fixture(scope="session")
def library() -> Path:
    path = clock.library_path()
    if path is None:
        pytest.skip("the clock library is not built")
    return path


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler")
    return found


@pytest.fixture(scope="session")
def driver(compiler: str, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("driver") / "driver"
    source = Path(__file__).parent / "driver.c"
    flags = ["-std=c11", "-O1", "-Wno-nonnull"]
    subprocess.run(
        [compiler, *flags, str(source), "-o", str(program), "-lpthread", "-ldl"],
        check=True,
        timeout=CHILD_SECONDS,
    )
    return program


@pytest.fixture(scope="session")
def run_driver(driver: Path) -> RunDriver:
    """Runs the preloaded driver; returns its lines, split into words."""

    def run(*arguments: object, **variables: str) -> list[list[str]]:
        environment = clock.preload_environment(os.environ) | variables
        output = run_child([str(driver), *map(str, arguments)], environment)
        return [line.split() for line in output.splitlines()]

    return run


@pytest.fixture(scope="session")
def run_python(library: Path) -> RunPython:
    """Runs Python source in a preloaded child; returns what it printed."""
    root = str(Path(clock.__file__).parents[2])

    def run(source: str, *arguments: object) -> str:
        environment = clock.preload_environment(os.environ)
        environment["PYTHONPATH"] = root
        command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
        return run_child(command, environment)

    return run
