"""The help of every command, in a wide and in a narrow terminal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import typer.main
from typer.testing import CliRunner

from rpcprops.commands.app import app

NARROW = 46


def commands(group: object, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of the application, of each command, and of each command of a group."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *path, name)


EACH = tuple(commands(typer.main.get_command(app)))


def help_of(path: tuple[str, ...], columns: int) -> str:
    """What ``--help`` prints, with as many columns."""
    ended = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(columns)})
    assert ended.exit_code == 0, ended.output
    return ended.output


@pytest.mark.parametrize("path", EACH, ids=" ".join)
def test_each_command_says_its_exit_codes(path: tuple[str, ...]) -> None:
    """The end of each help gives an example and what the exit codes mean, at every width."""
    for columns in (NARROW, 80, 120):
        words = " ".join(help_of(path, columns).split())
        assert "Exit codes: 0 " in words
        assert "2 misuse; 3 this machine cannot; 130 interrupted" in words
        assert not path or f"Example: rpcprops {' '.join(path)}" in words


@pytest.mark.parametrize("path", EACH, ids=" ".join)
def test_a_narrow_terminal_tears_no_word(path: tuple[str, ...]) -> None:
    """No line is too long, and the sentences about each option are there, word for word."""
    text = help_of(path, NARROW)
    assert max(map(len, text.splitlines())) <= NARROW
    words = " ".join(text.split())
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    for param in command.params:
        said = getattr(param, "help", None)
        assert not said or " ".join(said.split()) in words
    assert " ".join((command.help or "").split()) in words
