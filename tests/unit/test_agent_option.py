"""``--agent`` of the commands: which agents there are, and which cannot do what is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from rpcprops.commands.app import app
from rpcprops.errors import UsageError
from rpcprops.properties import PROPERTIES, examine
from tests.unit.test_help import help_of


@pytest.mark.parametrize("command", ["check", "hunt", "sweep", "replay", "doctor"])
def test_the_help_names_the_agents(command: str) -> None:
    """Each with what it can do, and which of them the command takes."""
    words = " ".join(help_of((command,), 200).replace("│", " ").split())
    for said in ("faulty_tensorpipe (torch's own", "wire (ours", "tensorpipe (torch's usual one"):
        assert said in words
    assert "Unless given, " in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "just_dropped"], "and a sweep is of faults. Leave the option out"),
        (["sweep", "just_dropped", "--points"], "and a sweep is of faults. Leave"),
        (["hunt", "-n", "5"], "and a part of this hunt has some. Add --without-faults 1. Leave"),
        (
            ["check", "rref-values", "rref-lifetime"],
            "and these properties need them. Others do not, such as drawn-without-faults and ",
        ),
        (["upstream", "--faults", "sampled"], "and --faults sampled asks for some. Leave"),
        (["doctor"], "and the example of doctor has one. Leave"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_agent_that_injects_no_faults_is_refused_where_there_are_some(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything starts: its ranks would die, which would look like a broken promise."""
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, [*arguments, "--agent", "tensorpipe"])
    assert isinstance(ended.exception, UsageError)
    assert str(ended.exception).startswith(f"--agent 'tensorpipe' injects no faults, {said}")
    assert str(ended.exception).endswith("for torch's faulty agent, or write --agent wire.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rref-values", "fetch-after-delete"])
def test_among_others_a_property_that_injects_faults_is_not_run(name: str) -> None:
    """It is no failure of torch's; the reason says so."""
    never: Any = SimpleNamespace(failed_in_use=[])
    result = examine(PROPERTIES[name], never, max_examples=2, by_chance=True, can_inject=False)
    assert (result.verdict, result.examples) == ("not_run", 0)
    assert result.reason == "not run: it injects faults, which the agent of the ranks cannot"
    assert PROPERTIES["drawn-without-faults"].injects is False
