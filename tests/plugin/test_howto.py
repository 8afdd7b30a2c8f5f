"""docs/howto.md, as a reader would follow it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto.md"
#: Real seconds for one block of commands, far above what it takes.
SECONDS = 150
#: So few examples that are the same in every run.
FEW = """
from hypothesis import settings

settings.register_profile("few", deadline=None, max_examples=6, derandomize=True, database=None)
settings.load_profile("few")
"""
_BLOCK = re.compile(r"(?:<!-- exits (\d+) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.py)\n")
_ONE_FILE = re.compile(r"pytest -q (test_\w+\.py)\n")


class Block(NamedTuple):
    """A block of code: its language, its text, and the exit code that its commands must have."""

    language: str
    code: str
    exits: int


def sections() -> dict[str, list[Block]]:
    """The blocks of each section of the page that has some."""
    _, *parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    found = {
        part.partition("\n")[0]: [
            Block(language, code, int(exits or 0)) for exits, language, code in _BLOCK.findall(part)
        ]
        for part in parts
    }
    return {title: blocks for title, blocks in found.items() if blocks}


#: Long, and other tests of every run stand for them: test_options.py and
#: test_shared_database.py for shards and what they share, tests/planted and test_replay.py for a
#: race that is found and replayed, and test_replay.py for a failure that another machine has kept.
LONG = (
    "Reproduce a failure of CI",
    "Share failures, and split a test into shards",
    "Judge a failure that comes and goes",
)


def write(block: Block, folder: Path) -> None:
    """Make the file that a block of Python is."""
    name = _FILE.match(block.code)
    assert name is not None, block.code
    (folder / name[1]).write_text(block.code)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of commands as a reader would."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_the_tests_of_the_other_sections_pass(tmp_path: Path) -> None:
    """Each of their commands runs pytest on one file; here one pytest runs all these files."""
    (tmp_path / "conftest.py").write_text(FEW)
    files: list[str] = []
    for block in (b for title, blocks in sections().items() if title not in LONG for b in blocks):
        if block.language == "python":
            write(block, tmp_path)
            continue
        command = _ONE_FILE.fullmatch(block.code)
        assert command is not None, block.code
        assert block.exits == 0
        files.append(command[1])
    assert len(files) > 3
    ran = run(f"pytest -q {' '.join(files)}", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "vacuous" not in ran.stdout, ran.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("title", sections())
def test_every_block_of_a_section_works(title: str, tmp_path: Path) -> None:
    """Its files are written and its commands run, in order, and end as the page says."""
    # With Hypothesis's own 100 examples for each test this would take minutes.
    (tmp_path / "conftest.py").write_text(FEW)
    for block in sections()[title]:
        if block.language == "python":
            write(block, tmp_path)
            continue
        if block.language == "yaml":
            continue  # for a service that is not here
        assert block.language == "sh", block
        ran = run(block.code, tmp_path)
        assert ran.returncode == block.exits, block.code + ran.stdout + ran.stderr
        assert "vacuous" not in ran.stdout, ran.stdout


def test_the_table_of_contents_is_complete() -> None:
    """The list at the top of the page names every section, in order."""
    text = PAGE.read_text()
    assert set(LONG) <= set(sections())
    listed = re.findall(r"^\* \[(.+?)\]\(#(.+?)\)$", text, re.MULTILINE)
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [title for title, _ in listed] == titles
    for title, anchor in listed:
        assert anchor == re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
