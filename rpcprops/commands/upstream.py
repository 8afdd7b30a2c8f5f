"""``rpcprops upstream``: PyTorch's own RPC suites, on our ranks and under sampled faults."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NoReturn

import typer

from rpcprops import _guard, agents
from rpcprops._files import check_output
from rpcprops.cluster.options import parse_clock
from rpcprops.commands.live import Line, compiling, err, live, out, plain
from rpcprops.commands.shared import (
    CANNOT,
    HOLDS,
    INTERRUPTED,
    MISUSE,
    VIOLATED,
    Clock,
    check_injects,
)
from rpcprops.errors import UsageError

if TYPE_CHECKING:
    import pytest

    from rpcprops.upstream.data import UpstreamTest

#: The warning of pytest's about a plugin that its process has imported before.
_IS_LOADED = "Module already imported so cannot be rewritten; rpcprops"
#: pytest's exit codes: passed, failed, interrupted, internal error, misuse, nothing selected.
_CODES = {0: HOLDS, 1: VIOLATED, 2: INTERRUPTED, 3: CANNOT, 4: MISUSE, 5: MISUSE}


def upstream(  # noqa: PLR0913 - one argument for each option
    *,
    select: Annotated[
        str,
        typer.Option("-k", metavar="EXPR", help="Only tests whose names match, as in pytest."),
    ] = "",
    workers: Annotated[
        int, typer.Option("-n", min=1, help="How many tests to run side by side.")
    ] = 1,
    faults: Annotated[
        str,
        typer.Option(
            help="none, or sampled: tests that faults can affect also run under drawn tables, "
            "which may change nothing that they assert."
        ),
    ] = "none",
    examples: Annotated[
        int, typer.Option(min=1, help="With sampled faults: tables for each test.")
    ] = 5,
    seed: Annotated[
        int | None,
        typer.Option(help="With sampled faults: a number; the same one draws the same tables."),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            help="The RPC agent of all ranks, such as wire; unless given, each suite runs the "
            "agent for which it is written. Tests that ask for another agent are left out."
        ),
    ] = None,
    clock: Clock = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the verdict of each test to this file as JSON."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write the results as JUnit XML.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the tests; run none.")] = False,
    harness: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Run the tests in PyTorch's own harness instead (10 s and more each), and add a "
            "line of JSON for each to FILE; those that are in it already are not run again.",
        ),
    ] = None,
) -> None:
    """Run PyTorch's own RPC tests, from the installed torch, on our ranks."""
    if faults not in ("none", "sampled"):
        msg = f"--faults {faults!r} must be 'none' or 'sampled'."
        raise UsageError(msg)
    parse_clock(clock)
    for option, path in (("--json", json_file), ("--junit", junit), ("--harness", harness)):
        if path is not None:
            check_output(option, path, grows=option == "--harness")
    if harness is not None:
        given = [json_file, junit, seed, agent, list_only or None]
        if any(one is not None for one in given) or (workers, faults, clock) != (1, "none", "auto"):
            msg = "--harness goes with -k alone: PyTorch's harness has no other option of these."
            raise UsageError(msg)
        _run_in_harness(select, harness)
    if faults == "sampled":
        check_injects(agent, "--faults sampled asks for some")
    if agent is not None:
        # Before there are several processes.
        agents.named(agent).prepare(compiling)
    command = ["--rpc-upstream", f"--rpc-clock={clock}", f"--rpc-upstream-faults={faults}"]
    command += [f"--rpc-upstream-examples={examples}", "-p", "no:cacheprovider", "-ra"]
    # pytest loads the plugin, which this process has imported already.
    command += ["-W", f"ignore:{_IS_LOADED}:pytest.PytestAssertRewriteWarning"]
    command += ["-k", select] if select else []
    command += _side_by_side(workers)
    command += _option("--rpc-upstream-agent", agent)
    command += _option("--rpc-upstream-seed", seed)
    command += _option("--rpc-upstream-report", json_file)
    command += _option("--junitxml", junit)
    command += ["--collect-only", "-q"] if list_only else []
    if sys.stdout.isatty():
        _leave(_pytest(command))
    # In a pipe, Python holds back what pytest prints until it is a few kilobytes.
    with live("PyTorch's tests") as line:
        code = _pytest(command, _Counting(line))
    _leave(code)


class _Counting:
    """A plugin of pytest that shows how many tests have ended."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The number of tests; with xdist, the process that prints collects none."""
        if session.items:
            self._line.begin(self._line.what, len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One test has ended."""
        if report.when == "teardown":
            self._line.update(self._line.done + 1, report.nodeid)


def _has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


def _side_by_side(workers: int) -> list[str]:
    """pytest's arguments for `workers` processes.

    Raises:
        UsageError: pytest-xdist, which that needs, is not installed.
    """
    if workers == 1:
        return []
    if not _has_xdist():
        msg = f"-n {workers} needs pytest-xdist, which is not installed: pip install pytest-xdist."
        raise UsageError(msg)
    return ["-n", str(workers)]


def _option(name: str, value: int | str | Path | None) -> list[str]:
    """A pytest option, if it has a value."""
    if value is None:
        return []
    return [f"{name}={value.absolute() if isinstance(value, Path) else value}"]


def _pytest(command: Sequence[str], *plugins: object) -> int:
    """Run pytest without the configuration of environment and working directory; the exit code."""
    import pytest

    # Such configuration is for the tests there; and it must not decide whether we are a plugin.
    os.environ.pop("PYTEST_ADDOPTS", None)
    autoload = not os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    ours = [] if autoload else ["-p", "rpcprops.pytest_plugin"]
    ours += ["-p", "xdist"] if not autoload and _has_xdist() else []
    apart = ["-c", os.devnull, f"--rootdir={Path.cwd()}", "--noconftest"]
    return int(pytest.main([*ours, *apart, *command], plugins=list(plugins)))


def _chosen(select: str) -> list[UpstreamTest]:
    """The tests that ``-k`` selects, as pytest selects them."""

    class Chosen:
        def __init__(self) -> None:
            self.tests: list[UpstreamTest] = []

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.tests += [item.test for item in session.items]  # type: ignore[attr-defined]

    chosen = Chosen()
    command = ["--rpc-upstream", "--collect-only", "-p", "no:terminal", "-k", select]
    code = _pytest([*command, "-p", "no:cacheprovider"], chosen)
    if code == 5:
        msg = f"-k {select!r} selects no test; --list shows their names."
        raise UsageError(msg)
    if code:
        _leave(code)
    return chosen.tests


def _leave(code: int) -> NoReturn:
    if code == 5:
        err.print("[bold red]rpcprops:[/bold red] no test was selected; --list shows their names.")
    raise typer.Exit(_CODES.get(code, code))


def _run_in_harness(select: str, file: Path) -> NoReturn:
    """Run PyTorch's own harness, one process for all tests; skips tests that the file has."""
    from rpcprops.upstream.rows import read_rows, rows_file

    log_file = file.with_name(f"{file.name}.log")
    check_output("the log of --harness", log_file, grows=True)
    kept = rows_file(file)
    known = read_rows(kept)
    chosen = [test for test in _chosen(select) if not test.not_applicable]
    done = {f"{row['class']}::{row['name']}" for row in known}
    left = [test for test in chosen if test.id not in done]
    out.print(
        f"{len(chosen)} tests, of which {len(chosen) - len(left)} are in {plain(file)} already"
    )
    # Adds no row, but removes the incomplete row of a killed run.
    kept.append()
    with live("PyTorch's harness", len(left)) as line, log_file.open("ab") as log:

        def on_end(said: str) -> None:
            line.update(line.done + 1, said)

        for agent in ("TensorPipe", "Faulty"):
            names = [test.id for test in left if (test.agent == "faulty") == (agent == "Faulty")]
            if names:
                _run_script(file, agent, names, log, on_end)
    rows = {f"{row['class']}::{row['name']}": row for row in read_rows(kept)}
    verdicts = [str(rows[test.id]["verdict"]) for test in chosen if test.id in rows]
    said = ", ".join(f"{verdicts.count(one)} {one}" for one in dict.fromkeys(verdicts))
    out.print(plain(f"{said}; {file}"))
    raise typer.Exit(HOLDS)


def _run_script(
    file: Path, agent: str, names: Sequence[str], log: BinaryIO, on_end: Callable[[str], None]
) -> None:
    """Run one agent's tests in a process of PyTorch's harness, and wait for its end."""
    script = Path(__file__).parents[1] / "upstream" / "_pytorch_harness.py"
    with _guard.guarded(
        [sys.executable, str(script), str(file.absolute()), agent],
        # torch.testing imports Hypothesis, which would import rpcprops in each process.
        env=_guard.environment(HYPOTHESIS_NO_PLUGINS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n".join(names))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("ended "):
                on_end(line.removeprefix("ended ").strip())
        code = process.wait()
    if code:
        err.print(f"PyTorch's harness left with exit code {code}; its output: {plain(log.name)}")
        raise typer.Exit(CANNOT)
