"""The pages for readers: their links lead somewhere, and their program in JSON is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rpcprops._json import from_json
from rpcprops.cluster.options import ClusterOptions
from rpcprops.plugin.options import DECLARED
from rpcprops.programs import Drop, Fetch, Program, Remote
from tests.strategies.test_shrinking import CASES, FEWER

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file of the checkout, and a title of it if it has an anchor."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_can_be_found() -> None:
    """The README leads to each page of docs/."""
    linked = re.findall(r"\]\((docs/\w+\.md)", (ROOT / "README.md").read_text())
    assert set(linked) == {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")}


def test_every_option_is_described() -> None:
    """docs/testing.md has each option of a cluster, and of pytest but for those of commands."""
    text = (ROOT / "docs/testing.md").read_text()
    of_commands = ("--rpc-replay", "--rpc-without-fault", "--rpc-upstream")
    names = [name for name in DECLARED if not name.startswith(of_commands)]
    for name in [*ClusterOptions.__annotations__, *names]:
        assert re.search(rf"`{name}[`=\s]", text), name


def test_the_sizes_of_findings() -> None:
    """docs/findings.md says to how few steps searches shrink, as the test of them does."""
    text = (ROOT / "docs/findings.md").read_text().partition("## How small")[2].partition("## ")[0]
    told = {
        name: tuple(map(int, re.findall(r"\d", steps)))
        for name, steps in re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|.*\|$", text, re.MULTILINE)
    }
    fewer = {name: (steps,) for name, (steps, _) in FEWER.items()}
    assert told == {name: (steps, *fewer.get(name, ())) for _, name, steps in CASES}


def test_the_program_in_json() -> None:
    """docs/programs.md shows a program as JSON: it is read as the program that it describes."""
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/programs.md").read_text(), re.DOTALL)
    expected = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
    assert from_json(json.loads(text), Program) == expected
