"""The built wheel: everything of ours is in it, and no name that is not ours."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What a build reads; caches, virtual environments and other people's files stay out.
SOURCES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "conftest.py",
    "requirements.txt",
    "rpcprops",
    "strategies",
    "tests",
)
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def missing() -> str:
    """Why no wheel can be built here, empty where one can."""
    if not (ROOT / "pyproject.toml").is_file():
        return "the tests do not run from a checkout"
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        return "setuptools is not installed"
    if int(version.partition(".")[0]) < 77:
        return f"setuptools {version} is older than the 77 that the build needs"
    return ""


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a wheel, built from a copy of the sources, with the text of small ones."""
    if reason := missing():
        pytest.skip(reason)
    copy = tmp_path_factory.mktemp("sources")
    out = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy(source, copy / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            name: archive.read(name).decode("utf-8", "replace")
            for name in archive.namelist()
            if not name.endswith("/")
        }


def test_every_module_is_in_the_wheel(wheel: dict[str, str]) -> None:
    """No module of the checkout is forgotten in the list of packages."""
    modules = {
        f"rpcprops/{path.relative_to(ROOT / 'rpcprops')}"
        for path in (ROOT / "rpcprops").rglob("*.py")
    }
    drawn = {f"rpcprops/{path.relative_to(ROOT)}" for path in (ROOT / "strategies").rglob("*.py")}
    assert drawn
    assert modules | drawn <= set(wheel)


def test_the_strategies_are_files_of_the_package(wheel: dict[str, str]) -> None:
    """The link of the checkout is a folder with the real sources in the wheel."""
    name = "strategies/faults.py"
    assert wheel[f"rpcprops/{name}"] == (ROOT / name).read_text(encoding="utf-8")


def test_the_wheel_claims_no_name_but_its_own(wheel: dict[str, str]) -> None:
    """Neither `strategies` nor `tests` nor `conftest` is installed at the top level."""
    tops = {name.partition("/")[0] for name in wheel}
    assert "rpcprops" in tops
    assert all(top == "rpcprops" or top.endswith(".dist-info") for top in tops), tops


def test_no_tests_are_installed(wheel: dict[str, str]) -> None:
    """What tests the package stays in the sources."""
    files = [Path(name) for name in wheel]
    assert not [file for file in files if file.name.startswith(("test_", "conftest"))]
    assert not [file for file in files if "tests" in file.parts]


def test_the_wheel_says_that_it_is_typed(wheel: dict[str, str]) -> None:
    """Type checkers of users read the annotations only where this file is."""
    assert "rpcprops/py.typed" in wheel


def test_the_wheel_registers_its_entry_points(wheel: dict[str, str]) -> None:
    """The command, the pytest plugin and the Hypothesis profiles are found once it is installed."""
    (entries,) = (text for name, text in wheel.items() if name.endswith("entry_points.txt"))
    lines = [line.replace(" ", "") for line in entries.splitlines()]
    for line in (
        "[console_scripts]",
        "rpcprops=rpcprops.cli:main",
        "[pytest11]",
        "rpcprops=rpcprops.pytest_plugin",
        "[hypothesis]",
        "rpcprops=rpcprops.profiles:register",
    ):
        assert line in lines
