"""``rpcprops agent``: the agent WIRE, which is compiled on this machine."""

from __future__ import annotations

import subprocess
from typing import Annotated

import typer
from rich.table import Table

from rpcprops.commands.live import compiling, out, plain
from rpcprops.commands.shared import HOLDS


def build(
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Compile it again, even if it is there.")
    ] = False,
) -> None:
    """Compile the agent against the installed torch, unless that was done before.

    The first run that needs it does the same.
    """
    from rpcprops.agents.wire import build as builder

    path = builder.built(force=force, progress=compiling)
    out.print(f"[green]built[/green] {plain(path)}")


def show() -> None:
    """Say where the agent is, whether it is compiled, and what it is compiled against."""
    from rpcprops.agents.wire import build as builder

    torch = builder.installed_torch()
    path = builder.library_path()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("state", "built" if path.is_file() else "not built")
    table.add_row("path", plain(path))
    table.add_row("torch", plain(torch.version))
    table.add_row("C++ ABI", "new (cxx11)" if torch.cxx11_abi else "old (before cxx11)")
    table.add_row("compiler", plain(_version(builder.compiler())))
    out.print(table)
    raise typer.Exit(HOLDS)


def _version(compiler: str | None) -> str:
    if compiler is None:
        return "none"
    done = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    first = next(iter(done.stdout.splitlines()), "says no version")
    return f"{compiler} ({first})"
