"""Damaged libraries: each is named, with what the dynamic linker says of it and what to do."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rpcprops import clock
from rpcprops.clock import _preflight

REMEDY = "; reinstall rpcprops with a C compiler, or pass clock='real' if real time is wanted"
#: Where an ELF header says for which machine the file is, and the number of AArch64.
E_MACHINE, AARCH64 = 18, 183


@pytest.fixture
def damaged(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library, for a test to damage; it is the one that is preloaded."""
    copy = tmp_path / library.name
    shutil.copyfile(library, copy)
    monkeypatch.setattr(clock, "library_path", lambda: copy)
    return copy


def problem() -> str:
    """What is wrong: one line, and the remedy at its end."""
    said = clock.library_problem()
    assert "\n" not in said
    assert said.endswith(REMEDY)
    return said.removesuffix(REMEDY)


def cut_off(path: Path, size: int) -> None:
    """Leave the first `size` bytes of a file."""
    os.truncate(path, size)


def test_the_library_works(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrong with the library that was built, and one program finds that out."""
    del library
    started: list[Any] = []
    run = subprocess.run

    def counted(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(clock, "_problems", {})
    monkeypatch.setattr(subprocess, "run", counted)
    assert clock.library_problem() == ""
    assert clock.library_problem() == ""
    assert len(started) == 1


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "file too short"), (1, "file too short"), (64, "cannot read file data")],
)
def test_a_file_that_the_linker_refuses(damaged: Path, size: int, said: str) -> None:
    """An empty file, and ones that end in their headers: the linker's own line says what it is."""
    cut_off(damaged, size)
    expected = f"ERROR: ld.so: object '{damaged}' from LD_PRELOAD cannot be preloaded ({said})"
    assert problem().startswith(f"the clock library does not load: {expected}")


def test_a_file_that_kills_who_loads_it(damaged: Path) -> None:
    """Cut off behind its headers it maps, and kills: the signal and what is missing are told."""
    cut_off(damaged, 4096)
    said = problem()
    assert f"a program that loads the clock library '{damaged}' is killed by SIG" in said
    assert "; the file is cut off, " in said


def test_every_byte_that_is_mapped_is_missed(damaged: Path) -> None:
    """A file that lacks one byte of its segments is refused; one that lacks symbols is not."""
    whole = damaged.read_bytes()
    cut_off(damaged, 4096)
    mapped = 4096 + _preflight._missing_bytes(damaged)
    assert 4096 < mapped <= len(whole)
    for size in (mapped // 2, mapped - 4096, mapped - 1):
        damaged.write_bytes(whole[:size])
        assert problem().endswith(f"; the file is cut off, {mapped - size} bytes are missing")
    damaged.write_bytes(whole[:mapped])
    assert clock.library_problem() == ""


def test_a_library_of_another_machine(damaged: Path) -> None:
    """A library for another architecture is one that the linker does not take."""
    data = bytearray(damaged.read_bytes())
    struct.pack_into("<H", data, E_MACHINE, AARCH64)
    damaged.write_bytes(data)
    assert f"ERROR: ld.so: object '{damaged}' from LD_PRELOAD cannot be preloaded" in problem()


def test_a_preload_of_the_users_that_is_damaged(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the linker says of another library is no word on ours."""
    other = tmp_path / "other.so"
    other.touch()
    monkeypatch.setenv("LD_PRELOAD", str(other))
    assert clock.library_problem() == ""
    damaged.write_bytes(b"")
    assert f"object '{damaged}'" in problem()


def test_a_library_that_stalls_who_loads_it(
    compiler: str, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that does not get to its end is waited for so long and no longer."""
    source = tmp_path / "stalls.c"
    source.write_text(
        "#include <unistd.h>\n__attribute__((constructor)) static void stall(void) { pause(); }\n",
        encoding="utf-8",
    )
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", damaged], check=True, timeout=60)
    monkeypatch.setattr(_preflight, "PREFLIGHT_SECONDS", 0.5)
    assert "did not end within 0.5 real seconds" in problem()


def test_a_library_that_is_another(compiler: str, damaged: Path, tmp_path: Path) -> None:
    """A library that loads and is not the clock is refused."""
    source = tmp_path / "other.c"
    source.write_text("int other;\n", encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", damaged], check=True, timeout=60)
    assert problem() == f"the clock library does not load: '{damaged}'"


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a library the line says how to get one."""
    monkeypatch.setattr(clock, "library_path", lambda: None)
    assert clock.library_problem() == (
        "the clock library is not built: install a C compiler and reinstall rpcprops, "
        "or pass clock='real'"
    )
