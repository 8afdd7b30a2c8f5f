"""``rpcprops replay``: runs a recorded failure again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from rpcprops.commands._shared import HOLDS, VIOLATED, Clock, err, out, parse_clock, running

if TYPE_CHECKING:
    from rpcprops.replay import Need, Replay
    from rpcprops.report._artefact import Artefact

#: Real seconds that telling which faults are needed may take without being asked for.
_CHEAP_SECONDS = 30.0


def replay(
    file: Annotated[Path, typer.Argument(help="A failure artefact (.rpcprops/failures/*.json).")],
    *,
    times: Annotated[int, typer.Option(min=1, help="How often to run it.")] = 3,
    clock: Clock = "auto",
    without_fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="Leave this fault out, by the name that replay prints, such as "
            "1:RREF_USER_DELETE or 1:delay:PYTHON_CALL. May be given several times.",
        ),
    ] = None,
    needed: Annotated[
        bool | None,
        typer.Option(
            "--needed/--no-needed",
            help="Leave out each fault in turn, and say which the failure needs. Done by itself "
            f"where it is likely to take less than {_CHEAP_SECONDS:g} s.",
        ),
    ] = None,
) -> None:
    """Run a recorded failure again: exit 1 if it still fails, 0 if it does not."""
    from rpcprops.replay import check_faults, read, replay_program, replay_test

    artefact = read(file)
    parse_clock(clock)
    without = check_faults(artefact, without_fault or [])
    for line in artefact.head:
        out.print(f"  {escape(line)}")
    if artefact.underway:
        out.print("It was under way when its process ended.")
    if artefact.fault_names:
        out.print(f"faults by name: {', '.join(artefact.fault_names)}")
    with ExitStack() as stack:
        if artefact.kind == "pytest":
            chosen = None if clock == "auto" else clock

            def run(names: Sequence[str], *, told: bool = False) -> Replay:
                return replay_test(
                    file, artefact, times=times, without=names, clock=chosen, quiet=not told
                )
        else:
            runner = stack.enter_context(running(clock))
            out.print(f"torch {runner.server.torch_version}, {escape(runner.server.clock_note)}")

            def on_run(number: int, promises: tuple[str, ...]) -> None:
                out.print(f"  run {number + 1}: {', '.join(promises) or 'holds'}")

            def run(names: Sequence[str], *, told: bool = False) -> Replay:
                return replay_program(
                    artefact, runner, times=times, without=names, on_run=on_run if told else None
                )

        began = time.monotonic()
        result = run(without, told=True)
        seconds = time.monotonic() - began
        subject = f" ({artefact.subject})" if artefact.kind == "pytest" else ""
        out.print(escape(f"{result}{subject}"))
        if result.failed:
            _say_needed(artefact, run, without, needed, seconds)
    raise typer.Exit(VIOLATED if result.failed or result.changed else HOLDS)


def _say_needed(
    artefact: Artefact,
    run: Callable[[Sequence[str]], Replay],
    without: Sequence[str],
    asked: bool | None,
    seconds: float,
) -> None:
    """Say which faults a failure needs, if that was asked for or `seconds` a try make it cheap."""
    from rpcprops.replay import needed

    left = [name for name in artefact.fault_names if name not in without]
    if not left:
        out.print("needed   no fault")
        return
    if asked is False:
        return
    estimate = seconds * (len(left) + 1)
    if asked is None and estimate > _CHEAP_SECONDS:
        out.print(f"needed   not tried: it may take {estimate:.0f} s; --needed tries it")
        return

    def on_need(need: Need) -> None:
        out.print(f"  {escape(str(need))}")

    with err.status("leaving out each fault in turn"):
        found = needed(artefact, run, without, on_need)
    names = [need.name for need in found if need.is_needed and " and " not in need.name]
    out.print(f"needed   {', '.join(names) or 'none of them by itself'}")
