"""Runs an artefact again: whether it still fails, and which of its faults that needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rpcprops import _guard
from rpcprops.errors import UsageError
from rpcprops.properties import Case, Observation, observe
from rpcprops.report._artefact import DIRECTORY, Artefact, read
from rpcprops.runner import Runner

Answer = Literal["reproduced", "changed", "fixed", "fails", "holds"]


@dataclass(frozen=True)
class Replay:
    """What running an artefact again showed.

    Attributes:
        seen: the promises that each run broke (for a test: the type of what it raised).
        without: the faults that were left out, by name.
        clock_problem: why pytest's ranks ran in real time though nobody asked for it; else empty.
    """

    artefact: Artefact
    seen: tuple[tuple[str, ...], ...]
    rate: float = 1.0
    without: tuple[str, ...] = ()
    clock_problem: str = ""

    @property
    def times(self) -> int:
        """How often it was run."""
        return len(self.seen)

    @property
    def failed(self) -> int:
        """How often it broke the same promise (any, where it was only under way)."""
        if self.artefact.underway:
            return sum(bool(broken) for broken in self.seen)
        return sum(self.artefact.promise in broken for broken in self.seen)

    @property
    def changed(self) -> tuple[str, ...]:
        """What the runs broke that broke another promise."""
        if self.artefact.underway:
            return ()
        return tuple(b[0] for b in self.seen if b and self.artefact.promise not in b)

    @property
    def answer(self) -> Answer:
        """Whether it ever broke the same promise, only others, or none.

        An example that was only under way broke none that it could break again.
        """
        if self.artefact.underway:
            return "fails" if self.failed else "holds"
        if self.failed:
            return "reproduced"
        return "changed" if self.changed else "fixed"

    def __str__(self) -> str:
        where = f" at rate {self.rate:g}"
        if self.without:
            where += f", without {', '.join(self.without)}"
        if self.artefact.underway:
            kinds = Counter(broken[0] for broken in self.seen if broken)
            what = ", ".join(f"{name} in {count}" for name, count in kinds.items()) or "no failure"
            return f"{self.answer}: {what} of {self.times} runs{where}"
        text = (
            f"{self.answer}: {self.artefact.promise} in {self.failed} of {self.times} runs{where}"
        )
        for name, count in Counter(self.changed).items():
            text += f"; {name} instead in {count}"
        return text


@dataclass(frozen=True)
class Need:
    """Whether a failure needs a fault: how often it showed in `times` runs without it.

    There are no such runs where nobody can tell what the program must do without the fault.
    """

    name: str
    failed: int
    times: int

    @property
    def is_needed(self) -> bool:
        """Whether it never failed without."""
        return not self.failed

    def __str__(self) -> str:
        if not self.times:
            return f"{self.name}: needed (nobody can tell what is right without it)"
        word = "needed" if self.is_needed else "not needed"
        return f"{self.name}: {word} (fails in {self.failed} of {self.times} without it)"


Run = Callable[[Sequence[str]], Replay]


def check_faults(artefact: Artefact, names: Sequence[str]) -> tuple[str, ...]:
    """`names` if the artefact has faults of all those names.

    Raises:
        UsageError: it has not; the message lists those that it has.
    """
    known = artefact.fault_names
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none (it fails without any)"
            msg = f"the artefact has no fault {name!r}; it has: {listed}."
            raise UsageError(msg)
    return tuple(dict.fromkeys(names))


def needed(
    artefact: Artefact,
    run: Run,
    without: Sequence[str] = (),
    on_need: Callable[[Need], None] | None = None,
) -> tuple[Need, ...]:
    """Leave out each fault in turn, on top of `without`; then all that were not needed at once.

    Args:
        run: runs the artefact without the faults of some names.
        on_need: called with each answer as it is known; those left out together come last, their
            names joined by " and ".
    """
    found: list[Need] = []

    def tell(names: Sequence[str]) -> None:
        try:
            result = run((*without, *names))
            need = Need(" and ".join(names), result.failed, result.times)
        except UsageError:
            # A creation may then time out, or not: a program of which there is no prediction.
            need = Need(" and ".join(names), 0, 0)
        found.append(need)
        if on_need is not None:
            on_need(need)

    for name in artefact.fault_names:
        if name not in without:
            tell([name])
    spare = [need.name for need in found if not need.is_needed]
    if len(spare) > 1:
        tell(spare)
    return tuple(found)


def replay_program(
    artefact: Artefact,
    runner: Runner,
    *,
    times: int,
    without: Sequence[str] = (),
    on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    **options: Any,
) -> Replay:
    """Run the program of an artefact `times` times.

    Args:
        without: names of faults to leave out.
        on_run: called after each run with its number and the promises that it broke.
        options: `clock`, as for :func:`rpcprops.run`.

    Raises:
        UsageError: the artefact is of a test, not of a program, or has not those faults.
    """
    if artefact.program is None:
        msg = f"the artefact is of the test {artefact.subject}, which pytest replays."
        raise UsageError(msg)
    dropped = check_faults(artefact, without)
    plan = artefact.plans[0].without(dropped, artefact.program.world_size)
    case = Case(artefact.program, plan, kind=artefact.kind)  # type: ignore[arg-type]
    watch: Callable[..., Observation] = observe
    if artefact.kind == "upstream":
        from rpcprops.upstream._ranks import UpstreamCase, UpstreamRanks

        ranks = UpstreamRanks(runner.server)
        case, watch = UpstreamCase.of(ranks.test(artefact.subject), plan), ranks.observe
    options.setdefault("transport", artefact.transport)
    result = Replay(artefact, (), without=dropped)
    for number in range(times):
        seen = watch(runner, case, anew=True, **options)
        promises = tuple(dict.fromkeys(v.promise for v in seen.violations))
        result = replace(result, seen=(*result.seen, promises), rate=seen.outcome.clock_rate)
        if on_run is not None:
            on_run(number, promises)
    return result


def root_of(path: Path, artefact: Artefact) -> Path:
    """The folder in which pytest runs the test of an artefact: one of the user's, never another.

    It is pytest's root folder of the working directory, or the folder that holds the
    ``.rpcprops/failures`` in which the artefact lies, where that is the working directory or one
    above or below it. The folder that the artefact names decides between the two, and is no third:
    an artefact may come from somebody else, and pytest runs the conftest.py of its folder.

    Raises:
        UsageError: the file of the test is in neither.
    """
    here = Path.cwd()
    folders = [_pytest_root(here)]
    failures = path.resolve().parent
    if failures.parts[-2:] == DIRECTORY.parts:
        holder = failures.parents[1]
        if here.is_relative_to(holder) or holder.is_relative_to(here):
            folders.append(holder)
    folders.sort(key=lambda folder: not ran_in(artefact, folder))
    file = artefact.subject.partition("::")[0]
    for folder in folders:
        if (folder / file).is_file():
            return folder
    tried = " or ".join(dict.fromkeys(repr(str(folder)) for folder in folders))
    msg = (
        f"there is no test file {file!r} in {tried}. The test ran in {artefact.rootdir!r}, and is "
        f"replayed only where you are; change to the folder that {file!r} is relative to."
    )
    raise UsageError(msg)


def ran_in(artefact: Artefact, folder: Path) -> bool:
    """Whether an artefact says that its test ran in that folder."""
    try:
        return bool(artefact.rootdir) and os.path.realpath(artefact.rootdir) == str(folder)
    except ValueError:
        return False  # no name of a folder: it holds a NUL, say


def _pytest_root(folder: Path) -> Path:
    """The root folder that pytest finds from `folder`: the nearest with its settings, or itself.

    As in pytest's documentation ("finding the rootdir").
    """
    candidates = (folder, *folder.parents)
    for name in ("settings", "pyproject.toml", "setup.py"):
        for candidate in candidates:
            if name == "settings":
                if _has_settings(candidate):
                    return candidate
            elif (candidate / name).is_file():
                return candidate
    return folder


def _has_settings(folder: Path) -> bool:
    names = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini")
    if any((folder / name).is_file() for name in names):
        return True
    try:
        if "pytest" in tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["tool"]:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for name, section in (("tox.ini", "[pytest]"), ("setup.cfg", "[tool:pytest]")):
        try:
            lines = (folder / name).read_text("utf-8").splitlines()
        except (OSError, ValueError):
            continue
        if any(line.strip() == section for line in lines):
            return True
    return False


def replay_test(
    path: Path,
    artefact: Artefact,
    *,
    times: int,
    without: Sequence[str] = (),
    clock: str | None,
    quiet: bool = False,
) -> Replay:
    """Run the test of an artefact again in pytest, `times` times on the example that failed.

    A test that draws inside its body, or one without Hypothesis, takes a pytest for each time.

    Args:
        without: names of faults that no cluster of the test gets.
        clock: as for ``--rpc-clock``; None leaves pytest's own choice.
        quiet: keep what pytest prints, and show it only when it cannot run the test.

    Raises:
        UsageError: the test is not below the folder where the command runs (see :func:`root_of`),
            the artefact has not those faults, or pytest cannot run the test.
    """
    folder = root_of(path, artefact)
    dropped = check_faults(artefact, without)
    command = [sys.executable, "-m", "pytest", f"--rpc-replay={path.resolve()}"]
    command += ["--rootdir=.", "-p", "no:cacheprovider", "-q"]
    command.append(f"--rpc-transport={artefact.transport}")
    command += [f"--rpc-without-fault={name}" for name in dropped]
    if clock is not None:
        command.append(f"--rpc-clock={clock}")
    result = Replay(artefact, (), without=dropped)
    with _guard.scratch("rpcprops-replay-") as scratch:
        while result.times < times:
            answer = scratch / f"answer{result.times}.json"
            options = [
                f"--rpc-replay-times={times - result.times}",
                f"--rpc-replay-answer={answer}",
            ]
            # Behind the hyphens nothing is an option; with ./ in front, an @ names no file of them.
            done = _guard.run(
                [*command, *options, "--", f"./{artefact.subject}"],
                cwd=folder,
                stdout=subprocess.PIPE if quiet else None,
            )
            if done.returncode < 0:
                name = f"killed by {signal.Signals(-done.returncode).name}"
                result = replace(result, seen=(*result.seen, (name,)))
                continue
            if done.returncode not in (0, 1) or not answer.exists():
                if done.stdout:
                    sys.stdout.buffer.write(done.stdout)
                code = done.returncode
                msg = f"pytest could not run {artefact.subject} (its exit code was {code})."
                raise UsageError(msg)
            said = json.loads(answer.read_text(encoding="utf-8"))
            raised = tuple((name,) if name else () for name in said["raised"])
            result = replace(
                result,
                seen=result.seen + raised,
                rate=said["rate"],
                clock_problem=said["clock_problem"],
            )
    return result


__all__ = [
    "Need",
    "Replay",
    "check_faults",
    "needed",
    "ran_in",
    "read",
    "replay_program",
    "replay_test",
    "root_of",
]
