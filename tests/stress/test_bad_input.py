"""Bad input of the commands: every command with every option, whatever is given for it.

What is refused is refused with an error of ours and exit code 2, before anything runs: no
traceback, nothing executed, nothing overwritten, no control character on the terminal, in bounded
time. A drawn command that is accepted ends where it would start a process.

The other modules of this name feed files, functions and options of pytest; their helpers are here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rpcprops import ClusterServer, FaultPlan, FaultTable, Outcome, Program, Violation, cli
from rpcprops._json import to_json
from rpcprops.commands import app
from rpcprops.commands import upstream as upstream_command
from rpcprops.outcomes import Counters, PhaseOutcome, RankOutcome, StepOutcome
from rpcprops.profiles import NIGHTLY, current
from rpcprops.programs import Drop, Fetch, Remote, Settle
from rpcprops.properties import PROPERTIES
from rpcprops.properties._catalogue import shipped_programs
from rpcprops.report import artefact as artefacts

F = TypeVar("F", bound=Callable[..., None])

#: Real seconds and bytes that one example may take: far above what any needs.
SECONDS = 10.0
MEMORY = 1 << 30


# Helpers, for the other modules as well.


class TookTooLongError(BaseException):
    """An example did not end in time."""


class ReachedError(BaseException):
    """The input was accepted: a process would start now."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Interrupt what takes longer, and refuse it more memory than that."""

    def late(*_: object) -> NoReturn:
        msg = f"not done after {seconds:g} s"
        raise TookTooLongError(msg)

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def many(examples: int, seconds: float) -> Callable[[F], F]:
    """So many examples, ten times as many in nightly; no more are tried after `seconds`.

    In nightly the time is ten times as long too. What has failed shrinks for as long again and a
    little: after that only what is known to fail is run, and so fails again.
    """
    factor = 10 if current() == NIGHTLY else 1

    def decorate(test: F) -> F:
        began: list[float] = []
        failed: dict[str, float] = {}

        @functools.wraps(test)
        def example(*args: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            began.append(now)
            # What draws inside its body is known by its body alone.
            key = "" if "data" in kwargs else repr((args, kwargs))
            first = min(failed.values(), default=0.0)
            if key not in failed and now > (first or began[0]) + seconds * factor + 5.0 * bool(
                first
            ):
                return
            try:
                test(*args, **kwargs)
            except BaseException as error:
                # Hypothesis ends examples that it will not count by exceptions of its own.
                if not type(error).__module__.startswith("hypothesis"):
                    failed.setdefault(key, time.monotonic())
                raise

        chosen = settings(
            max_examples=examples * factor,
            deadline=None,
            print_blob=True,
            # To explain a failure takes longer than to find it.
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.filter_too_much,
                HealthCheck.function_scoped_fixture,
            ],
        )
        return chosen(example)  # type: ignore[return-value]

    return decorate


def control_characters(text: str) -> list[str]:
    """What a terminal would obey rather than show."""
    return sorted({c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160})


def fingerprint(folder: Path) -> dict[str, object]:
    """What is in a folder: kinds, modes, targets and contents."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        held: object = None
        if stat.S_ISLNK(mode):
            held = os.readlink(path)
        elif stat.S_ISREG(mode):
            held = path.read_bytes()
        found[str(path.relative_to(folder))] = (mode, held)
    return found


PROGRAM = Program(
    2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a"), Settle()), name="remote-and-fetch"
)
PLAN = FaultPlan(by_rank={1: FaultTable(["RREF_USER_DELETE"], 2, {"PYTHON_CALL": 1.5})})
OUTCOME = Outcome(
    2,
    400.0,
    "tcp",
    "2.13.0",
    (PhaseOutcome("start"), PhaseOutcome("run", "hung", 1.0, 0.1, 30.0, "it hangs", (1,))),
    tuple(RankOutcome(rank, f"worker{rank}", 0, counters=Counters(owners=1)) for rank in range(2)),
    (StepOutcome(0), StepOutcome(1, [3.0])),
)
VIOLATION = Violation("WrongValue", "expected [3.0], got [4.0]", 0, 1)


def artefact_data(kind: str = "program", **others: Any) -> dict[str, Any]:
    """What a whole artefact of that kind holds."""
    whole: dict[str, Any] = {
        "kind": kind,
        "subject": "rref-values",
        "promise": "WrongValue",
        "head": ("faults   one", "broken   two"),
        "program": PROGRAM,
        "plans": (PLAN,),
        "outcomes": (OUTCOME,),
        "violations": (VIOLATION,),
        "clock_rate": 400.0,
        "repeats": ("3 of 3 at rate 400",),
        "world_sizes": (2,),
    }
    if kind == "pytest":
        whole |= {
            "subject": "test_it.py::test_it",
            "program": None,
            "reproduction": ("6.0.0", "b'AAE='"),
            "rootdir": "/nowhere",
        }
    elif kind == "upstream":
        whole |= {"subject": "RpcTest::test_add", "program": Program(4), "world_sizes": (4,)}
    return artefacts.to_data(artefacts.Artefact(**(whole | others)))


#: What a planted file does when it is run.
PLANTED = "import pathlib\npathlib.Path({!r}).write_text('executed')\n"
MARKER = "EXECUTED"


def make_folder(folder: Path) -> Path:
    """A folder of odd and of whole files, none of which may change or be run."""
    folder.mkdir()
    planted = PLANTED.format(str(folder / MARKER))
    for name in ("conftest.py", "test_it.py", "sitecustomize.py", "planted.py"):
        (folder / name).write_text(planted)
    (folder / "args").write_text("--version\nplanted.py\n")
    (folder / "canary.txt").write_text("a text of the user's\n")
    (folder / "canary.json").write_text('{"mine": true}\n')
    (folder / "no-end.jsonl").write_text('{"what": "mine"}')
    (folder / "empty.json").touch()
    (folder / "folder").mkdir()
    (folder / "dangling.json").symlink_to("nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "link.json").symlink_to("canary.json")
    for device in ("zero", "null", "full"):
        (folder / f"{device}.json").symlink_to(f"/dev/{device}")
    os.mkfifo(folder / "fifo.json")
    (folder / "unreadable.json").write_text("{}")
    (folder / "unreadable.json").chmod(0)
    for kind in ("program", "reinit", "upstream", "pytest"):
        text = json.dumps(artefact_data(kind))
        (folder / f"{kind}.json").write_text(text)
    (folder / "steps.json").write_text(json.dumps(to_json(PROGRAM)))
    return folder


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None where it would have started a process."""

    code: int | None
    out: str
    err: str

    def check(self) -> None:
        """What every command promises, whatever it was given."""
        said = self.out + self.err
        assert self.code in (None, 0, 2, 3), said
        assert "Traceback" not in said and "at fault" not in said, said
        assert not control_characters(said), repr(said)
        if self.code:
            assert self.err.strip()


def _would_start(*_: object, **__: object) -> NoReturn:
    raise ReachedError


def run_command(*arguments: str, main: Callable[[], object] = cli.main) -> Ended:
    """Run the command in this process, up to where it would start another one."""
    buffers = [io.BytesIO(), io.BytesIO()]
    streams = [
        io.TextIOWrapper(held, encoding="utf-8", errors=errors, write_through=True)
        for held, errors in zip(buffers, ("strict", "backslashreplace"), strict=True)
    ]
    code: int | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rpcprops", *arguments])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        patch.setattr(ClusterServer, "start", _would_start)
        patch.setattr(subprocess.Popen, "__init__", _would_start)
        patch.setattr(upstream_command, "_pytest", _would_start)
        try:
            with bounded():
                main()
        except ReachedError:
            pass
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    out, err = (held.getvalue().decode("utf-8") for held in buffers)
    return Ended(code, out, err)


# What is drawn.


def _commands() -> dict[str, Any]:
    """Every command by its words: a group is not one, its members are."""
    top: dict[str, Any] = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    groups = {name: one.commands for name, one in top.items() if hasattr(one, "commands")}
    members = {f"{name} {m}": one for name, members in groups.items() for m, one in members.items()}
    return {name: one for name, one in top.items() if name not in groups} | members


COMMANDS = _commands()

#: What may stand on a command line: no NUL; bytes that are no UTF-8 arrive as surrogates.
TEXTS = [
    *("", " ", "-", "--", "-n", "-1", "0", "1", " 1", "1_000", "0x10", "007", "1.5", "1e3"),
    *("1e400", "nan", "inf", "-inf", "٣", "9" * 5000, "-" + "9" * 30, "1" * 30),
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\x08\x7f", "a\nb", "a\rb", "\udcff"),
    *("[bold]", "[/]", "[/bold]", "[red", "[link=x]", "\\[", "{}", "%s", "%(x)s", "a" * 100_000),
    *("@args", "@", "..", ".", "/", "~", "//", "a/b/c", "é", "💥", "None", "true", "*", "'", '"'),
    *("auto", "real", "400", "1000", "1001", "tcp", "shm", "none", "sampled", "all", "each"),
    *("pairs", "dev", "ci", "nightly", "debug", "(", "not", "a and", "1:RREF_USER_DELETE"),
    *("1:delay:PYTHON_CALL", "RREF_USER_DELETE", *list(PROPERTIES)[:3]),
    *(*list(shipped_programs())[:2], "--help", "--list", "--version", "--clock", "planted"),
]
PATHS = [
    *("canary.txt", "canary.json", "no-end.jsonl", "empty.json", "folder", "folder/", "folder/x"),
    *("canary.txt/x", "dangling.json", "loop.json", "link.json", "zero.json", "null.json"),
    *("full.json", "fifo.json", "unreadable.json", "program.json", "reinit.json", "upstream.json"),
    *("pytest.json", "steps.json", "missing.json", "missing/x.json", "/proc/self/mem", "/dev/tty"),
    *("canary.txt:PROGRAM", "missing.py:PROGRAM", "folder.py:X", "x" * 300, "/etc/passwd"),
]

values = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(PATHS),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12),
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, each given anything."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words = name.split()
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            words += draw(st.lists(values, max_size=2))
            continue
        if not draw(st.integers(0, 3)):
            flags = [*parameter.opts, *parameter.secondary_opts]
            words.append(draw(st.sampled_from(flags)))
            if not parameter.is_flag or not draw(st.integers(0, 9)):
                words.append(draw(values))
    if not draw(st.integers(0, 9)):
        words.append(draw(values))
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bad") / "input")


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_every_command_is_drawn() -> None:
    """The commands and options come from the command line itself, each with what can be given."""
    assert set(COMMANDS) >= {"check", "replay", "sweep", "hunt", "upstream", "bench", "doctor"}
    for name, command in COMMANDS.items():
        assert command.params or name == "agent show"
        assert all(p.opts for p in command.params)


@many(400, 6.0)
@given(words=command_lines())
def test_commands(inside: Path, words: list[str]) -> None:
    """Whatever a command is given is accepted, or refused as misuse, and nothing changes."""
    before = fingerprint(inside)
    run_command(*words).check()
    assert fingerprint(inside) == before


def each_file_option() -> list[Any]:
    """Each option that names a file to write, and the command line that gives it."""
    ready = {
        "check": ["check", "rref-values"],
        "sweep": ["sweep", next(iter(shipped_programs()))],
        "replay": ["replay", "program.json", "--script"],
    }
    found: list[Any] = []
    for name, command in COMMANDS.items():
        for parameter in command.params:
            takes = repr(getattr(parameter, "type_descriptor", getattr(parameter, "type", None)))
            if parameter.param_type_name != "option" or "path" not in takes.lower():
                continue
            words = [*ready.get(name, name.split()), parameter.opts[0]]
            found.append(pytest.param(words, id=f"{name}{parameter.opts[0]}"))
    return found


@pytest.mark.parametrize("words", each_file_option())
@pytest.mark.parametrize("path", ["folder", "canary.txt/x", pytest.param("x" * 300, id="long")])
def test_a_file_that_cannot_be_written_is_refused_first(
    inside: Path, words: list[str], path: str
) -> None:
    """A run of minutes is not lost at its end: where its result cannot go is said before."""
    before = fingerprint(inside)
    ended = run_command(*words, path)
    ended.check()
    assert ended.code == 2
    assert fingerprint(inside) == before


def test_there_are_options_that_name_files() -> None:
    """The test above has something to try."""
    assert len(each_file_option()) >= 7


REAL: Sequence[tuple[str, ...]] = (
    ("replay", "fifo.json"),
    ("replay", "zero.json", "--script"),
    ("hunt", "--file", "zero.json"),
    ("hunt", "--file", "fifo.json"),
    ("sweep", "zero.json"),
    ("sweep", "canary.json"),
    ("upstream", "-k", "("),
    ("check", "\x1b[31mred"),
)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words), marks=() if n in (0, 7) else pytest.mark.nightly)
        for n, words in enumerate(REAL)
    ],
)
def test_real_commands(folder: Path, words: tuple[str, ...]) -> None:
    """The same in a process of its own, as `rpcprops` is: the folder is not on its path."""
    before = fingerprint(folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    done = subprocess.run(
        [sys.executable, "-P", "-m", "rpcprops", *words],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit,
        check=False,
    )
    Ended(done.returncode, done.stdout, done.stderr).check()
    assert done.returncode == 2
    assert fingerprint(folder) == before
