"""Help for a narrow terminal: one column, where the tables of typer would tear words apart."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

#: The columns that typer's tables need.
_WIDE = 80


class Command(TyperCommand):
    """A command whose help fits into a narrow terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: as typer does, or in one column."""
        if not _write_narrow(self, ctx, formatter):
            super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group of commands whose help fits into a narrow terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: as typer does, or in one column."""
        if not _write_narrow(self, ctx, formatter):
            super().format_help(ctx, formatter)


def _write_narrow(command: Any, ctx: Any, formatter: Any) -> bool:
    """Write the help of a command in one column, if the terminal is narrow; whether it is."""
    columns = shutil.get_terminal_size().columns
    if columns >= _WIDE:
        return False
    formatter.width = columns
    command.format_usage(ctx, formatter)
    formatter.write_paragraph()
    formatter.write_text(command.help or "")
    records = (param.get_help_record(ctx) for param in command.get_params(ctx))
    _write_section(formatter, "Arguments and options", (one for one in records if one))
    if isinstance(command, Group):
        _write_section(formatter, "Commands", _commands(command, ctx))
    if command.epilog:
        formatter.write_paragraph()
        formatter.write_text(command.epilog)
    return True


def _write_section(formatter: Any, title: str, rows: Iterator[tuple[str, str]]) -> None:
    with formatter.section(title):
        for name, text in rows:
            formatter.write_text(name)
            with formatter.indentation():
                formatter.write_text(text)


def _commands(group: Any, ctx: Any) -> Iterator[tuple[str, str]]:
    """Each command of a group, with the first paragraph of its help."""
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        yield name, (command.help or "").partition("\n\n")[0]
