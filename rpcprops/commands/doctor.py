"""``rpcprops doctor``: what this machine can do."""

from __future__ import annotations

import os
import shutil
import time
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from rpcprops.commands.live import live, out, plain
from rpcprops.commands.shared import HOLDS, VIOLATED, Clock, agent_option, check_injects, running
from rpcprops.errors import MachineCannot


def doctor(
    *,
    agent: Annotated[
        str | None,
        agent_option("Unless given, the first. tensorpipe cannot: the example has a fault."),
    ] = None,
    clock: Clock = "auto",
) -> None:
    """Say what this machine can do: torch, the RPC agents, the clock, transports."""
    from rpcprops import clock as clocks
    from rpcprops.faults import FaultPlan, FaultTable
    from rpcprops.oracle import judge
    from rpcprops.programs import Drop, Fetch, Program, Remote
    from rpcprops.report.artefact import versions

    check_injects(agent, "the example of doctor has one")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, version in versions().items():
        table.add_row(name, version)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    table.add_row("C compiler", "found" if compiler else "none (needed only to build the clock)")
    problem = clocks.library_problem()
    state = "works" if not problem else "damaged" if clocks.library_path() else "not built"
    table.add_row("clock library", state)
    healthy = True
    with running(clock, agent) as runner:
        # Below `running`, which compiles the agent if it is asked for.
        table.add_row("agent WIRE", plain(wire_state()))
        unasked = runner.server.clock_problem
        # The reason is a long line that a table would wrap, so it is printed below.
        note = "real time, though it was not asked for" if unasked else runner.server.clock_note
        table.add_row("clock", note.removeprefix("clock: "))
        # Which faults a user's test can have; the line about the clock says how to mend it.
        armable = "can be armed for a part of a run"
        table.add_row("faults", runner.server.arming_problem or armable)
        program = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")))
        plan = FaultPlan(FaultTable(["RREF_USER_DELETE"], 1))
        for transport in ("tcp", "shm"):
            began = time.monotonic()
            with live(f"two ranks and one injected failure over {transport}"):
                outcome = runner.run(program, plan, transport=cast("Any", transport))
            found = judge(program, plan, outcome)
            seconds = time.monotonic() - began
            said = f"one injected failure fired and was retried, {seconds:.2f} s"
            table.add_row(transport, str(found[0]) if found else said)
            healthy = healthy and not found
        out.print(table)
    raise typer.Exit(HOLDS if healthy else VIOLATED)


def wire_state() -> str:
    """Whether the agent WIRE is compiled for this torch, or can be, or what it lacks."""
    from rpcprops.agents.wire import build

    try:
        path = build.library_path()
        if path.is_file():
            return "built"
        build.command(path)
    except MachineCannot as error:
        return f"not built: {error}"
    return (
        f"not built; {build.compiler()} can compile it: rpcprops agent build (about a minute), "
        f"or the first run with --agent wire"
    )
