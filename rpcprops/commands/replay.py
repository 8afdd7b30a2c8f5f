"""``rpcprops replay``: runs a recorded failure again."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rpcprops import _guard
from rpcprops._files import Unwritten, check_output, write_whole
from rpcprops._kinds import Again, kind_of
from rpcprops.cluster.options import parse_clock
from rpcprops.commands.live import Line, live, out, plain
from rpcprops.commands.shared import (
    CANNOT,
    HOLDS,
    VIOLATED,
    Clock,
    agent_option,
    running,
    say_clock_problem,
    say_torch,
)
from rpcprops.errors import UsageError

if TYPE_CHECKING:
    from rpcprops._replay import Need, Replay
    from rpcprops.report.artefact import Artefact
    from rpcprops.runner import Runner

#: Real seconds for finding out which faults are needed, if nobody asked for that, and if they did.
_CHEAP_SECONDS = 30.0
_NEEDED_SECONDS = 300.0


def replay(  # noqa: PLR0913 - one for each option
    file: Annotated[Path, typer.Argument(help="A failure artefact (.rpcprops/failures/*.json).")],
    *,
    times: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How often to run it. Unless given, 3 times (a script twice), and up to 20 times "
            "where the failure did not show each time when it was found.",
        ),
    ] = None,
    clock: Clock = "auto",
    agent: Annotated[
        str | None, agent_option("Unless given, the one on which the failure was found.")
    ] = None,
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
            help="Leave out each fault in turn, and say which ones the failure needs. Without "
            f"either option it is done where it should take less than {_CHEAP_SECONDS:g} s. No "
            f"run starts after {_NEEDED_SECONDS:g} s.",
        ),
    ] = None,
    script: Annotated[
        bool,
        typer.Option(
            "--script",
            help="Write a Python file that shows the failure with torch alone, in real time. It is "
            "run first, and replay says how often it showed the failure.",
        ),
    ] = False,
    as_test: Annotated[
        bool,
        typer.Option(
            "--as-test",
            help="Write a pytest test that fails in the same way. It is run first.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Where --script or --as-test write; next to the artefact unless given."),
    ] = None,
) -> None:
    """Run a recorded failure again: exit 1 if it still fails, 0 if it does not.

    With --script or --as-test, a file is written that shows the failure, and the exit code is that
    of the file's runs. This needs the failure of a program, not of a test of your own.
    """
    from rpcprops._replay import check_faults, read

    artefact = read(file)
    parse_clock(clock)
    without = check_faults(artefact, without_fault or [])
    if script and as_test:
        msg = "--script and --as-test write a file each; ask for one of them."
        raise UsageError(msg)
    if script or as_test:
        _write(file, artefact, without, script=script, times=times or 2, output=output)
    if output is not None:
        msg = f"--output {str(output)!r} is for --script and --as-test."
        raise UsageError(msg)
    kind = kind_of(artefact.kind)
    times = times or kind.usual_times(artefact)
    with ExitStack() as stack:

        @functools.cache
        def runner() -> Runner:
            found = stack.enter_context(running(clock, agent or artefact.agent))
            say_torch(found)
            return found

        def on_run(number: int, promises: tuple[str, ...]) -> None:
            out.print(f"  run {number + 1}: {', '.join(promises) or 'holds'}")
            if shown is not None:
                shown.update(number + 1)

        run = partial(kind.replay, artefact, again := Again(file, times, clock, runner, agent))
        _say_what(artefact, kind.notes(artefact, again))
        if not kind.by_pytest:
            runner()  # Start its server now, so that this is not part of the time of a try.
        began = time.monotonic()
        with _shows(kind.by_pytest, times) as shown:
            result = run(without, on_run)
        seconds = time.monotonic() - began
        out.print(plain(kind.told(result)))
        if result.failed:
            _say_needed(artefact, run, without, needed, seconds, times)
        # A runner of programs prints that itself, once it is closed.
        say_clock_problem(result.clock_problem)
    if result.answer == "not repeated":
        raise typer.Exit(CANNOT)
    raise typer.Exit(VIOLATED if result.failed or result.changed else HOLDS)


def _shows(by_pytest: bool, times: int) -> AbstractContextManager[Line | None]:
    """A sign of life for the runs: on a terminal pytest gives its own, in a pipe none."""
    if not by_pytest:
        return live("replay", times)
    return nullcontext() if sys.stdout.isatty() else live("replay, by pytest")


def _say_what(artefact: Artefact, notes: Sequence[str]) -> None:
    """Print what was recorded, and what a reader must know before it runs again."""
    for line in artefact.head:
        # Text after a newline in it must not look like a line of ours.
        out.print("  " + plain(line).replace("\n", "\n  "))
    if artefact.underway:
        out.print("It was under way when its process ended.")
    if artefact.fault_names:
        out.print(f"faults by name: {', '.join(artefact.fault_names)}")
    for note in notes:
        out.print(plain(note))


def _write(
    file: Path,
    artefact: Artefact,
    without: Sequence[str],
    *,
    script: bool,
    times: int,
    output: Path | None,
) -> NoReturn:
    """Run a script or a test, write it to its file, and exit with the code of a replay."""
    from rpcprops.report.script import is_ours

    default = file.stem if script else f"test_{re.sub(r'[^0-9A-Za-z]+', '_', file.stem)}"
    path = output or file.with_name(f"{default}.py")
    check_output("--output" if output else "without --output,", path)
    if path.exists() and not is_ours(path):
        msg = f"{path} is there, and not made by replay; choose another with --output."
        raise UsageError(msg)
    text, codes = _made(artefact, without, script=script, times=times)
    told = "replaces" if path.exists() else "wrote"
    try:
        write_whole(path, text)
        said = f"{told} {path}"
    except OSError as error:
        said = f"{Unwritten.because(error, path)}. The exit code is that of the runs."
    what = "the script" if script else "the test"
    shown = f"{what} shows the failure in {codes.count(1)} of {len(codes)} runs"
    others = len(codes) - codes.count(0) - codes.count(1)
    if others:
        shown += f"; {others} ended in another way (exit codes {', '.join(map(str, codes))})"
    out.print(plain(shown))
    out.print(plain(said))
    if 1 in codes:
        raise typer.Exit(VIOLATED)
    raise typer.Exit(HOLDS if set(codes) == {0} else CANNOT)


def _made(
    artefact: Artefact, without: Sequence[str], *, script: bool, times: int
) -> tuple[str, tuple[int, ...]]:
    """The text of a script or a test, and the exit codes of its runs."""
    from rpcprops.report.as_test import regression_test
    from rpcprops.report.script import script_of, tried

    plan = None
    if artefact.plans:
        plan = artefact.plans[0].without(without, artefact.sizes[0] if artefact.sizes else 0)
    with _guard.scratch("rpcprops-script-") as scratch:
        if script:
            made = script_of(artefact, plan)
            with live(f"running it {times} times, at least {10 + made.seconds:.0f} s each"):
                made = tried(made, scratch, times)
            return made.text, made.codes
        text = regression_test(artefact, plan)
        with live("running it"):
            return text, (_run_test(text, scratch),)


def _run_test(text: str, folder: Path) -> int:
    """Run a test; pytest's exit code."""
    path = folder / "test_it.py"
    path.write_text(text, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    return _guard.run(
        command,
        cwd=folder,
        # What the test leaves there is deleted with the folder.
        env=_guard.environment(TMPDIR=str(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ).returncode


def _say_needed(
    artefact: Artefact,
    run: Callable[[Sequence[str]], Replay],
    without: Sequence[str],
    asked: bool | None,
    seconds: float,
    runs: int,
) -> None:
    """Say which faults a failure needs, if asked to, or if a try of `seconds` makes it cheap."""
    from rpcprops._replay import needed

    left = [name for name in artefact.fault_names if name not in without]
    if not left:
        out.print("needed   no fault")
        return
    if asked is False:
        return
    # One try without each fault, and one without all that are not needed.
    tries = len(left) + (len(left) > 1)
    estimate = seconds * tries
    if asked is None and estimate > _CHEAP_SECONDS:
        out.print(f"needed   not tried: it may take {estimate:.0f} s; --needed tries it")
        return

    def on_need(need: Need) -> None:
        out.print(f"  {plain(str(need))}")

    times = f"at most {tries} tries of {runs} runs, about {estimate:.0f} s"
    out.print(f"needed   leaving out each fault in turn: {times}; ends after {_NEEDED_SECONDS:g} s")
    with live("leaving out each fault in turn"):
        found = needed(artefact, run, without, on_need, seconds=_NEEDED_SECONDS)
    missed = [name for name in left if name not in [need.name for need in found]]
    if missed:
        out.print(f"needed   not tried, for want of time: {', '.join(missed)}")
    names = [need.name for need in found if need.is_needed and " and " not in need.name]
    out.print(f"needed   {', '.join(names) or 'none of them by itself'}")
