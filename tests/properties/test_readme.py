"""The examples of the README and of the pages it leads to, as a newcomer would type them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests._wire import needs_wire

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/testing.md", "docs/programs.md")
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)


def run_example(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest of a test file of these pages, from outside the checkout."""
    (code,) = re.findall(rf"```python\n(# {name}\n.*?)```", TEXT, re.DOTALL)
    (folder / name).write_text(code)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_the_example_runs(tmp_path: Path) -> None:
    """The test of a counter passes from outside the checkout, and its faults fire."""
    ran = run_example(
        tmp_path, "test_counter.py", "--hypothesis-profile=rpcprops-dev", "--hypothesis-seed=1"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "injected faults fired" in ran.stdout
    assert "vacuous" not in ran.stdout


def test_the_first_example_fails_as_shown(tmp_path: Path) -> None:
    """The bug on the first screen is found, under faults that torch survives, and confirmed."""
    ran = run_example(tmp_path, "test_models.py", "--hypothesis-seed=1")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "the server has memory for two models" in ran.stdout
    assert "replay   rpcprops replay .rpcprops/failures/test_models-py" in ran.stdout


def run_script(page: str, first: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python of the code of a page that begins with these words, from outside the checkout."""
    (code,) = re.findall(rf"```python\n({first}.*?)```", (ROOT / page).read_text(), re.DOTALL)
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_program_runs(tmp_path: Path) -> None:
    """The program of docs/programs.md holds under its plan, as a script of a user's."""
    ran = run_script("docs/programs.md", "from rpcprops import FaultPlan", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_wire
def test_the_program_under_message_faults_runs(tmp_path: Path) -> None:
    """The program of docs/faults.md holds under faults of single messages, and both act."""
    ran = run_script("docs/faults.md", "from rpcprops import FaultPlan, MessageFault", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines() == ["lose RREF_ACK", "hold PYTHON_CALL"]
