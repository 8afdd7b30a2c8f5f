"""Runs a failure artefact again and says whether it still fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpcprops.errors import UsageError
from rpcprops.properties import Case, observe
from rpcprops.report._artefact import Artefact, read
from rpcprops.runner import Runner

Answer = Literal["reproduced", "changed", "fixed"]


@dataclass(frozen=True)
class Replay:
    """What running an artefact again showed.

    Attributes:
        failed: how often it broke the same promise.
        changed: how often it failed in another way, with what.
    """

    artefact: Artefact
    times: int
    failed: int
    changed: tuple[str, ...] = ()
    rate: float = 1.0

    @property
    def answer(self) -> Answer:
        """Whether it ever broke the same promise, only others, or none."""
        if self.failed:
            return "reproduced"
        return "changed" if self.changed else "fixed"

    def __str__(self) -> str:
        where = f"at rate {self.rate:g}" if self.rate else ""
        text = (
            f"{self.answer}: {self.artefact.promise} in {self.failed} of {self.times} runs {where}"
        )
        for name, count in Counter(self.changed).items():
            text += f"; {name} instead in {count}"
        return text.strip()


def replay_program(
    artefact: Artefact,
    runner: Runner,
    *,
    times: int,
    on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    **options: Any,
) -> Replay:
    """Run the program of an artefact `times` times.

    Args:
        on_run: called after each run with its number and the promises that it broke.
        options: `clock`, as for :func:`rpcprops.run`.

    Raises:
        UsageError: the artefact is of a test, not of a program.
    """
    if artefact.program is None:
        msg = f"the artefact is of the test {artefact.subject}, which pytest replays."
        raise UsageError(msg)
    case = Case(artefact.program, artefact.plans[0], kind=artefact.kind)  # type: ignore[arg-type]
    options.setdefault("transport", artefact.transport)
    failed = 0
    changed: list[str] = []
    rate = 1.0
    for number in range(times):
        seen = observe(runner, case, anew=True, **options)
        rate = seen.outcome.clock_rate
        promises = tuple(dict.fromkeys(v.promise for v in seen.violations))
        if artefact.promise in promises:
            failed += 1
        elif promises:
            changed.append(promises[0])
        if on_run is not None:
            on_run(number, promises)
    return Replay(artefact, times, failed, tuple(changed), rate)


def replay_test(path: Path, artefact: Artefact, *, clock: str | None) -> int:
    """Run the test of an artefact again in pytest, on the example that failed; its exit code.

    Raises:
        UsageError: the folder in which the test ran is gone.
    """
    folder = Path(artefact.rootdir)
    if not folder.is_dir():
        # Written on another machine: the folder that holds .rpcprops/failures here.
        folder = path.resolve().parents[2]
    if not folder.is_dir():
        msg = f"the test ran in {artefact.rootdir!r}, which is no folder here."
        raise UsageError(msg)
    command = [sys.executable, "-m", "pytest", artefact.subject, f"--rpc-replay={path.resolve()}"]
    command += ["-p", "no:cacheprovider", "-q", f"--rpc-transport={artefact.transport}"]
    if clock is not None:
        command.append(f"--rpc-clock={clock}")
    return subprocess.run(command, cwd=folder, env=dict(os.environ), check=False).returncode


__all__ = ["Replay", "read", "replay_program", "replay_test"]
