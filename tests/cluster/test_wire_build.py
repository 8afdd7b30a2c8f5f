"""How the agent WIRE is compiled: once for all who ask, and with a clear error where it fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpcprops.agents.wire import build
from rpcprops.commands.doctor import wire_state
from rpcprops.errors import MachineCannot
from rpcprops.pytest_plugin import ClusterFactory

#: Real seconds, far above what a process takes that compiles nothing; and one that does.
SECONDS, COMPILER_SECONDS = 60, 500
ASK = "from rpcprops.agents.wire import build; print(build.built())"
PREPARE = "from rpcprops import agents; agents.named('wire').prepare()"
#: What is said where the compiler cannot do it.
REMEDY = "Install a g++ that knows C++20 (11 or newer) and name it by CXX, or use another agent."

#: A compiler that notes that it was run, takes its time, and writes a file.
SLOW = """#!/bin/sh
echo run >> "$(dirname "$0")/runs"
sleep 0.7
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""
#: One whose process is killed meanwhile.
KILLS = """#!/bin/sh
kill -9 "$PPID"
"""
#: One that knows no C++20.
BROKEN = """#!/bin/sh
echo "_agent.cpp: note: nothing yet"
echo "_agent.cpp:1:1: error: 'concept' does not name a type"
exit 1
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which nothing is compiled yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize(
    ("major", "name", "abi"),
    [
        (2, b"__pybind11_internals_v4_gcc_libstdcpp_cxxabi1016__", "_cxxabi1016"),
        (2, b"__pybind11_internals_v4_gcc_libstdcpp_cxxabi1011__", "_cxxabi1011"),
        (3, b"__pybind11_internals_v11_system_libstdcpp_gxx_abi_1xxx__", ""),
    ],
)
def test_pybind11_is_named_as_in_torch(tmp_path: Path, major: int, name: bytes, abi: str) -> None:
    """Only then an extension shares torch's types: the compiler gets the ABI that built torch."""
    header = tmp_path / "include" / "pybind11" / "detail" / "common.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define PYBIND11_VERSION_MAJOR {major}\n", encoding="utf-8")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_python.so").write_bytes(b"\0code\0" + name + b"\0")
    assert build.pybind11_abi(tmp_path) == abi
    torch = build.Torch("2.7.1", "0", tmp_path, cxx11_abi=True, pybind11_abi=abi)
    options = [one for one in build.definitions(torch) if "PYBIND11_BUILD_ABI" in one]
    assert options == ([f'-DPYBIND11_BUILD_ABI="{abi}"'] if abi else [])


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Have CXX name a script."""
    path = folder / "c++"
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def ask(count: int, seconds: int) -> list[str]:
    """What so many processes print that ask for the library at the same time."""
    return [said for said, _ in ask_by([sys.executable, "-c", ASK], count, seconds)]


def ask_by(command: list[str], count: int, seconds: int) -> list[tuple[str, str]]:
    """What so many processes write to stdout and to stderr, each of which must end well."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        said = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, said
    return [(written.strip(), errors) for written, errors in said]


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + SECONDS
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def told(version: str, folder: Path, does: str, waits: str = "") -> str:
    """What stderr has of a build, as a pattern; its end says how long it took."""
    first = f"rpcprops: {does} for torch {version}{waits}; this takes about a minute, once, "
    where = re.escape(f"{first}and is kept in {folder}\n")
    return where + r"rpcprops: the agent WIRE is compiled, after \d+ s\n"


def told_of_build() -> tuple[str, str]:
    """The patterns of what a process says that compiles, and of one that waits."""
    version, folder = build.installed_torch().version, build.library_path().parent
    return (
        told(version, folder, "compiling the agent WIRE"),
        told(
            version,
            folder,
            "another process compiles the agent WIRE",
            ", and this one waits for it",
        ),
    )


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-c", PREPARE),
        (sys.executable, "-m", "rpcprops", "agent", "build"),
    ],
    ids=["script", "command"],
)
def test_each_process_says_once_that_it_compiles_or_waits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """One line at the start and one at the end, on stderr; and none where nothing is to be done."""
    use(monkeypatch, tmp_path, SLOW.replace("0.7", "4"))
    compiles, waits = told_of_build()
    said = sorted(errors for _, errors in ask_by([*command], 2, SECONDS))
    assert re.fullmatch(waits, said[0]), said
    assert re.fullmatch(compiles, said[1]), said
    ((written, errors),) = ask_by([*command], 1, SECONDS)
    assert not errors
    assert "compiling" not in written
    assert cache.is_dir()


def test_a_process_goes_on_where_the_one_was_killed_for_which_it_waits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says once that it waits, compiles then, and says at the end how long both took."""
    use(monkeypatch, tmp_path, SLOW.replace("0.7", "60"))
    command = [sys.executable, "-c", PREPARE]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stderr is not None
    assert "compiling the agent WIRE" in first.stderr.readline()
    wait_for(tmp_path / "runs")
    use(monkeypatch, tmp_path, SLOW)
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert other.stderr is not None
    line = other.stderr.readline()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=SECONDS)
    line += other.communicate(timeout=SECONDS)[1]
    assert re.fullmatch(told_of_build()[1], line), line
    assert cache.is_dir()


def test_doctor_says_whether_it_is_built(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler it names the remedy, with one the command, and then that it is built."""
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert f"there is no C++ compiler here (CXX={tmp_path / 'none'})" in wire_state()
    assert "install g++, or use another agent." in wire_state()
    other = tmp_path / "g++"
    other.touch(mode=0o700)
    assert f"CXX={tmp_path / 'none'} names no program; unset CXX, for {other} is" in wire_state()
    monkeypatch.setenv("PATH", path)
    use(monkeypatch, tmp_path, SLOW)
    assert f"{tmp_path / 'c++'} can compile it: rpcprops agent build" in wire_state()
    library = build.library_path()
    assert library.is_relative_to(cache)
    library.parent.mkdir(parents=True)
    library.touch()
    assert wire_state() == "built"


def test_processes_that_ask_at_once_compile_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One runs the compiler, the others wait for it, and all name the file that it wrote."""
    use(monkeypatch, tmp_path, SLOW)
    (path,) = set(ask(3, SECONDS))
    assert Path(path).is_relative_to(cache)
    assert Path(path).read_text(encoding="utf-8") == "compiled\n"
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "run\n"
    # Who asks later compiles nothing either, unless told to.
    assert str(build.built()) == path
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "run\n"
    build.built(force=True)
    assert (tmp_path / "runs").read_text(encoding="utf-8") == "run\n" * 2


def test_what_a_killed_process_left_is_removed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed while it compiles; the next one compiles, and leaves only its files."""
    use(monkeypatch, tmp_path, KILLS)
    killed = subprocess.run([sys.executable, "-c", ASK], timeout=SECONDS, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path for path in build.library_path().parent.iterdir() if path.is_dir()]
    use(monkeypatch, tmp_path, SLOW)
    folder = build.built().parent
    assert {path.suffix for path in folder.iterdir()} == {".so", ".log", ".lock"}


def test_a_compiler_that_fails_is_told_with_the_remedy(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has what the compiler called one, and the remedy; the next try starts anew."""
    use(monkeypatch, tmp_path, BROKEN)
    with pytest.raises(MachineCannot) as caught:
        build.built()
    said = str(caught.value)
    assert "error: 'concept' does not name a type" in said
    assert "nothing yet" not in said
    assert said.endswith(REMEDY)
    path = build.library_path()
    assert not path.exists()
    log = path.with_suffix(".log")
    assert str(log) in said
    assert "nothing yet" in log.read_text(encoding="utf-8")
    # No half of a build stays.
    assert {left.suffix for left in path.parent.iterdir()} == {".log", ".lock"}
    use(monkeypatch, tmp_path, SLOW)
    assert build.built() == path
    assert path.is_relative_to(cache)


def test_a_compiler_that_writes_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says that, and has no empty line in its place."""
    use(monkeypatch, tmp_path, "#!/bin/sh\nexit 7\n")
    with pytest.raises(MachineCannot) as caught:
        build.built()
    lines = str(caught.value).splitlines()
    assert lines[1] == "it ended with exit code 7 and wrote nothing."
    assert all(lines)
    assert cache.is_dir()


def test_commands_that_cannot_compile_exit_3(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check --agent wire` ends before it draws anything; `agent show` needs no compiler."""
    use(monkeypatch, tmp_path, BROKEN)
    ends = {}
    for words in (("check", "rref-values", "--agent", "wire"), ("agent", "show")):
        done = subprocess.run(
            [sys.executable, "-m", "rpcprops", *words],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "400", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        ends[words[-1]] = done.returncode
        assert "Traceback" not in done.stdout + done.stderr
        assert "not built" in done.stdout if words[-1] == "show" else REMEDY in done.stderr
    assert ends == {"wire": 3, "show": 0}
    assert cache.is_dir()


def test_what_needs_no_wire_goes_on(
    rpc_cluster: ClusterFactory, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster with the agent is refused, and the next one, with torch's, runs."""
    use(monkeypatch, tmp_path, BROKEN)
    with (
        pytest.raises(MachineCannot, match="could not be compiled"),
        rpc_cluster(world_size=2, agent="wire"),
    ):
        pass
    with rpc_cluster(world_size=2) as cluster:
        assert cluster.on(0).call(abs, -3) == 3
    assert not list(cache.rglob("*.so"))


@pytest.mark.nightly
def test_two_processes_really_compile_once(cache: Path) -> None:
    """With the real compiler: both get one library, and it loads."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    (path,) = set(ask(2, COMPILER_SECONDS))
    assert [str(found) for found in cache.rglob("*.so")] == [path]
    load = "from rpcprops.agents.wire import library; print(library().__file__)"
    done = subprocess.run(
        [sys.executable, "-c", load], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert done.stdout.strip() == path
