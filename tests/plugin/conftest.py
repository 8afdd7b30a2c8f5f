"""Projects of their own, whose tests pytest runs in a subprocess with the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Real seconds: far above what a project takes, so that a hang fails instead of staying.
PROJECT_SECONDS = 140


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str = ""

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def section(self, test: str) -> str:
        """What pytest reports of one failing test."""
        head = next(
            n
            for n, line in enumerate(self.lines)
            if line.startswith("___") and line.strip("_ ") == test
        )
        rest = self.lines[head + 1 :]
        ends = [n for n, line in enumerate(rest) if line.startswith(("____", "===="))]
        return "\n".join(rest[: ends[0]])


@dataclass
class Project:
    """A folder with tests."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.folder / f"{name}.py"
            path.write_text(textwrap.dedent(text), encoding="utf-8")

    def command(self, module: str, *arguments: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROJECT_SECONDS,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def pytest(self, *arguments: str) -> Result:
        return self.command("pytest", "-p", "no:cacheprovider", "-ra", *arguments)

    def report(self, *arguments: str) -> tuple[Result, dict[str, dict[str, Any]]]:
        """A run, and what --rpc-report says of each test, by its name."""
        file = self.folder / "report.json"
        result = self.pytest(f"--rpc-report={file}", *arguments)
        data = json.loads(file.read_text(encoding="utf-8"))
        assert set(data) == {"tests"}
        return result, {test["nodeid"].split("::", 1)[1]: test for test in data["tests"]}


MakeProject = Callable[..., Project]


@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> MakeProject:
    """Makes a project with these modules, away from the settings of this one."""

    def make(options: Sequence[str] = (), **files: str) -> Project:
        folder = tmp_path_factory.mktemp("project")
        ini = ["[pytest]", *options]
        (folder / "pytest.ini").write_text("\n".join(ini) + "\n", encoding="utf-8")
        # Neither this run's pytest and xdist nor a CI's Hypothesis profile reach the project.
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != "CI" and not name.startswith(("PYTEST_", "HYPOTHESIS_", "GITHUB_"))
        }
        kept |= {"COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
        project = Project(folder, kept)
        project.write(**files)
        return project

    return make
