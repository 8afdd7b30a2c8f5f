"""The kind of artefact that is a user's test: pytest runs it again."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rpcprops import _guard
from rpcprops import clock as clocks
from rpcprops._kinds import Again, Kind
from rpcprops._replay import Replay, check_faults
from rpcprops.cluster.rates import DEFAULT_RATE, unasked_real_time
from rpcprops.errors import UsageError
from rpcprops.programs import Program
from rpcprops.report.artefact import DIRECTORY, Artefact

#: Control characters and line ends; text that cannot be encoded cannot be an argument either.
_NOT_IN_NAMES = ("Cc", "Zl", "Zp")
#: How often a test is replayed at most, unless somebody says how often.
_MOST_TIMES = 20


class OfUser(Kind):
    """A user's test."""

    by_pytest = True

    def describe(self, name: str, program: Program | None) -> list[str]:
        """Nothing: its name is enough."""
        return []

    def may_break(self, promise: str) -> bool:
        """Always: a user's test may raise an exception class of the user's own."""
        return promise.isidentifier()

    def check(self, artefact: Artefact) -> None:
        """Check its subject, which becomes an argument of pytest's."""
        if not _is_node_id(artefact.subject):
            msg = (
                f"{artefact.subject!r} is no node id of a test (path/to/test.py::name, the path "
                f"relative and without ..)"
            )
            raise UsageError(msg)

    def notes(self, artefact: Artefact, again: Again) -> list[str]:
        """Where it is replayed, if that is not where it ran; and why there is no fast clock."""
        found: list[str] = []
        root = root_of(again.file, artefact)
        if not ran_in(artefact, root):
            where = "which is not where you are: it is replayed in"
            found.append(f"the test ran in {artefact.rootdir!r}, {where} {str(root)!r}")
        problem = clocks.library_problem()
        if again.clock == "auto" and problem:
            found.append(unasked_real_time(problem))
        elif again.clock == "auto" and _only_in_real_time(artefact):
            found.append(f"it failed in {_shown(artefact)}: it is replayed in real time")
        return found

    def usual_times(self, artefact: Artefact) -> int:
        """So many that a failure as frequent as it was is missed in one replay of twenty."""
        failed, runs = next(((n, of) for n, of, _ in _repeats(artefact)), (1, 1))
        if failed == runs or _only_in_real_time(artefact):
            return super().usual_times(artefact)
        share = max(failed, 0.5) / runs
        return min(_MOST_TIMES, math.ceil(math.log(0.05) / math.log(1 - share)))

    def replay(
        self,
        artefact: Artefact,
        again: Again,
        without: Sequence[str] = (),
        on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    ) -> Replay:
        """Run pytest, which has its own ranks, and prints what it runs unless `quiet`."""
        clock = None if again.clock == "auto" else again.clock
        return replay_test(
            again.file,
            artefact,
            times=again.times,
            without=without,
            clock=clock,
            agent=again.agent,
            quiet=on_run is None,
        )

    def told(self, result: Replay) -> str:
        """One line that names the test, because pytest's output does not end with the name."""
        line = f"{result} ({result.artefact.subject})"
        rare = result.answer == "fixed" and any(n < of for n, of, _ in _repeats(result.artefact))
        if not rare or result.without:
            return line
        # What shows in some runs only is not known to be mended where a few runs do not show it.
        line = line.replace("fixed:", "not seen:", 1)
        shown = _shown(result.artefact)
        return f"{line}\nit failed in {shown} when it was found; --times 50 tells more"


def root_of(path: Path, artefact: Artefact) -> Path:
    """The folder in which pytest runs the test of an artefact: always a folder of the user's.

    It is pytest's root folder for the working directory, or the folder of the `.rpcprops/failures`
    with the artefact, if that is the working directory or one above or below it. The folder named
    in the artefact only decides between these two: an artefact may come from somebody else, and
    pytest runs the conftest.py of its folder.

    Raises:
        UsageError: neither folder has the file of the test.
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
        return False  # not a folder's name: it contains a NUL, for example


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
    agent: str | None = None,
    quiet: bool = False,
) -> Replay:
    """Run the test of an artefact again in pytest, `times` times on the example that failed.

    A test without Hypothesis needs one pytest run each time.

    Args:
        without: names of faults that no cluster of the test gets.
        clock: as for ``--rpc-clock``; None is the rate that the test ran at.
        agent: as for ``--rpc-agent``; None is the agent that the test ran on.
        quiet: keep what pytest prints, and show it only when it cannot run the test.

    Raises:
        UsageError: the test is not below the folder where the command runs (see :func:`root_of`),
            the artefact does not have those faults, or pytest cannot run the test.
    """
    folder = root_of(path, artefact)
    dropped = check_faults(artefact, without)
    command = [sys.executable, "-m", "pytest", f"--rpc-replay={path.resolve()}"]
    command += ["--rootdir=.", "-p", "no:cacheprovider", "-q"]
    command.append(f"--rpc-transport={artefact.transport}")
    agent = agent or _agent_of(artefact)
    if agent:
        command.append(f"--rpc-agent={agent}")
    command += [f"--rpc-without-fault={name}" for name in dropped]
    command.append(f"--rpc-clock={clock or _clock_of(artefact)}")
    result = Replay(artefact, (), without=dropped)
    with _guard.scratch("rpcprops-replay-") as scratch:
        while result.times < times:
            answer = scratch / f"answer{result.times}.json"
            options = [
                f"--rpc-replay-times={times - result.times}",
                f"--rpc-replay-answer={answer}",
            ]
            # After the hyphens nothing is an option; after ./, @ does not name an options file.
            done = _guard.run(
                [*command, *options, "--", f"./{artefact.subject}"],
                cwd=folder,
                stdout=subprocess.PIPE if quiet else None,
            )
            if done.returncode < 0:
                name = f"killed by {signal.Signals(-done.returncode).name}"
                result = replace(result, seen=(*result.seen, (name,)))
                continue
            differs = _difference(answer)
            if differs:
                msg = (
                    f"the test draws differently now, so its example cannot be replayed: {differs} "
                    f"To search for a failing example anew: pytest {shlex.quote(artefact.subject)}"
                )
                raise UsageError(msg)
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


def _repeats(artefact: Artefact) -> list[tuple[int, int, str]]:
    """How often a failure showed when it was found: in how many, of how many runs, at which rate.

    As its artefact says, and first at the test's own rate.
    """
    found = (re.match(r"(\d+) of ([1-9]\d*) at rate (\S+)$", said) for said in artefact.repeats)
    return [(int(said[1]), int(said[2]), said[3]) for said in found if said is not None]


def _shown(artefact: Artefact) -> str:
    return " and ".join(f"{n} of {of} runs at rate {rate}" for n, of, rate in _repeats(artefact))


def _only_in_real_time(artefact: Artefact) -> bool:
    """Whether only real time has shown a failure again."""
    counts = {rate: failed for failed, _, rate in _repeats(artefact)}
    return counts.pop("1", 0) > 0 and bool(counts) and not any(counts.values())


def _clock_of(artefact: Artefact) -> str:
    """The clock at which a test ran, as ``--rpc-clock`` takes it."""
    if _only_in_real_time(artefact):
        return "real"
    if artefact.clock_rate == DEFAULT_RATE or clocks.library_problem():
        return "auto"  # real time where this machine has no other clock, and pytest then says so
    return f"{artefact.clock_rate!r}"


def _agent_of(artefact: Artefact) -> str:
    """The agent of clusters of a test that name none, as far as the artefact says it.

    Older ones say which agents its clusters had. Where some had torch's, the test chooses.
    """
    if artefact.chosen_agent:
        return artefact.chosen_agent
    agents = {outcome.agent for outcome in artefact.outcomes}
    return agents.pop() if len(agents) == 1 else ""


def _difference(answer: Path) -> str:
    """Why a test no longer draws an example, in a sentence; empty if it does."""
    if not answer.exists():
        return ""
    said = str(json.loads(answer.read_text(encoding="utf-8"))["differs"])
    return f"{said.rstrip('.')}." if said else ""


def _is_node_id(subject: str) -> bool:
    """Whether `subject` is ``path/to/test.py::name``, with a path that goes down from a folder.

    It becomes an argument of pytest's, which takes text with a leading hyphen for an option, and
    reads options from the file named after an @.
    """
    try:
        os.fsencode(subject)
    except UnicodeEncodeError:
        return False
    file, separator, name = subject.partition("::")
    parts = file.split("/")
    return (
        bool(separator and name)
        and file.endswith(".py")
        and not subject.startswith(("-", "@"))
        and not any(part in ("", ".", "..") for part in parts)
        and not any(unicodedata.category(c) in _NOT_IN_NAMES for c in subject)
    )
