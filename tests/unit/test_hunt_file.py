"""Where a hunt keeps its file: what cannot be written there is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rpcprops.commands.app import app
from rpcprops.errors import UsageError


def refusal(*arguments: str) -> str:
    """What a hunt says that does not start."""
    ended = CliRunner().invoke(app, ["hunt", "-n", "1", *arguments])
    assert isinstance(ended.exception, UsageError), ended.output
    return str(ended.exception)


def test_a_file_where_its_folder_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the hunt ran, and said at its end that nothing was kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".rpcprops").write_text("")
    assert refusal() == ("'.rpcprops' is no folder; move it away, or name a file with --file.")


def test_a_folder_where_its_file_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked as the file of --file is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".rpcprops" / "hunt.jsonl").mkdir(parents=True)
    assert refusal().startswith("without --file, '.rpcprops/hunt.jsonl': it is a folder")


def test_a_folder_in_which_none_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may make a folder in /proc."""
    monkeypatch.chdir("/proc")
    said = refusal()
    assert said.startswith("without --file, '.rpcprops': no file can be made there (")
    assert said.endswith("name one elsewhere.")
