"""What several commands use: exit codes, common options, a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rpcprops import agents
from rpcprops._files import Unwritten, check_output, write_whole
from rpcprops._given import shown
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.cluster import ClusterServer
from rpcprops.cluster.options import parse_clock
from rpcprops.commands import stop
from rpcprops.commands.live import compiling, err, live, out, plain
from rpcprops.errors import UsageError
from rpcprops.outcomes import MAX_CLOCK_RATE
from rpcprops.runner import Runner

HOLDS, VIOLATED, MISUSE, CANNOT, INTERRUPTED = 0, 1, 2, 3, 130

Clock = Annotated[
    str,
    typer.Option(
        help=f"auto, real, or a rate: virtual seconds for each real second (1 to {MAX_CLOCK_RATE})."
    ),
]
_AGENTS = (
    "The RPC agent of the ranks: faulty_tensorpipe (torch's own; fails messages of ten types, or "
    "delays them), wire (ours; disturbs any message, and needs a C++ compiler), or tensorpipe "
    "(torch's usual one; injects no faults)."
)


def agent_option(what: str) -> Any:
    """The option ``--agent``, with what a command says of it besides which agents there are."""
    return typer.Option(help=f"{_AGENTS} {what}")


def check_injects(agent: str | None, what: str, remedy: str = "") -> None:
    """Check that the agent that ``--agent`` names can inject faults.

    Args:
        what: what needs them, as the message says it.
        remedy: what else than to name another agent would help.

    Raises:
        UsageError: it cannot, or there is no such agent.
    """
    if agent is not None and not agents.named(agent).can_inject:
        msg = (
            f"--agent {shown(agent)} injects no faults, and {what}. {remedy}Leave the option out "
            f"for torch's faulty agent, or write --agent wire."
        )
        raise UsageError(msg)


Reuse = Annotated[
    bool | None,
    typer.Option(
        "--reuse/--fresh",
        help="Whether programs may run in ranks that others have left as they were. With the agent "
        "wire they may unless --fresh is given; no other agent can. Programs whose faults or "
        "errors may leave something behind get fresh ranks, as most do that a hunt draws. What "
        "fails in used ranks is run again in fresh ones before it counts.",
    ),
]
Transport = Annotated[str, typer.Option(help="tcp (loopback) or shm (shared memory).")]

COLOURS = {
    "holds": "green",
    "known": "cyan",
    "not_seen": "cyan",
    "not_run": "yellow",
    "violated": "bold red",
    "vacuous": "yellow",
    "undecided": "yellow",
}


def check_transport(text: str) -> None:
    """Raises:
    UsageError: `text` names no transport.
    """
    if text not in ("tcp", "shm"):
        msg = f"--transport {text!r} must be 'tcp' or 'shm'."
        raise UsageError(msg)


def check_reuse(agent: str, *, reuse: bool | None) -> None:
    """Raises:
    UsageError: `reuse` is asked for, and another agent than WIRE.
    """
    if reuse and agent != WIRE:
        msg = f"--reuse needs --agent wire, not {agent}."
        raise UsageError(msg)


@contextmanager
def running(
    clock: str, agent: str | None = None, *, reuse: bool | None = False
) -> Iterator[Runner]:
    """A runner with its own server; at its end, prints why ranks ran in real time unasked.

    Args:
        reuse: whether ranks are used again; None: where their agent can be.

    Raises:
        UsageError: `reuse` is True, and another agent than WIRE is asked for.
    """
    server = ClusterServer(clock=parse_clock(clock), agent=agent, reuse=reuse is not False)
    check_reuse(server.agent, reuse=reuse)
    runner = Runner(server)
    try:
        agents.named(server.agent).prepare(compiling)
        with live("starting the fork server, which imports torch"):
            server.start()
        if server.network_problem:
            out.print(f"[yellow]{plain(server.network_problem)}[/yellow]")
        yield runner
    except KeyboardInterrupt:
        stop.ending()
        raise typer.Exit(INTERRUPTED) from None
    finally:
        server.close()
        say_clock_problem(server.clock_problem)


@contextmanager
def interruptible() -> Iterator[None]:
    """A Ctrl-C in this block ends the command in order."""
    try:
        yield
    except KeyboardInterrupt:
        stop.ending()
        raise typer.Exit(INTERRUPTED) from None


def say_torch(runner: Runner) -> None:
    """Print which torch the ranks run, and with which clock."""
    out.print(f"torch {runner.server.torch_version}, {plain(runner.server.clock_note)}")


def say_died() -> None:
    """Print what an earlier run here left in flight, if there is anything."""
    from rpcprops.report.in_flight import describe_died

    died = describe_died(Path.cwd())
    if died:
        out.print(f"[yellow]{plain(died)}[/yellow]")


def say_clock_problem(problem: str) -> None:
    """Print why ranks ran in real time though nobody asked for it, if they did."""
    if problem:
        out.print(f"[yellow]{plain(problem)}[/yellow]")


def check_json(path: Path | None) -> None:
    """Check, before anything runs, that the file of ``--json`` can be written.

    Raises:
        UsageError: it cannot be written.
    """
    if path is not None:
        check_output("--json", path)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write the file of ``--json``; if that fails, print that: the verdict does not change."""
    if path is None:
        return
    try:
        write_whole(path, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        line = f"{Unwritten.because(error, path)}. The exit code is the verdict's."
        err.print(f"[bold red]rpcprops:[/bold red] {plain(line)}")
