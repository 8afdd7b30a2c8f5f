"""Stand-alone scripts: a program's failure in plain torch, in real time, without us.

A script holds the program's steps as functions (see ``_script_steps``), a driver that runs each in
a process of its own rank, and only those checks that what is broken needs. It exits 1 when the
failure shows, 0 when it does not, and 2 when something else goes wrong.
"""

from __future__ import annotations

import json
import math
import pprint
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rpcprops import _guard
from rpcprops._kinds import kind_of
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.oracle._errors import TEXTS
from rpcprops.oracle._model import Prediction
from rpcprops.oracle._worlds import OWNER_WAITS
from rpcprops.outcomes import Counters, Violation
from rpcprops.programs import Context, Leaf, Parallel, Pause, Program, Refused, Settle
from rpcprops.report._artefact import Artefact
from rpcprops.report._script_steps import StepWriter

#: The first or second line of everything that replay generates.
MARK = "# Made by rpcprops replay."

#: What a script says it looks for, by the kind that its checks raise.
Kind = Literal["value", "error", "no error", "unclear", "calls", "held", "shutdown", "died", "hung"]
_KINDS: dict[str, Kind] = {
    "WrongValue": "value",
    "WrongGradient": "value",
    "UnexpectedError": "error",
    "MissingError": "no error",
    "UnclearError": "unclear",
    "NotRunOnce": "calls",
    "OwnerGone": "held",
    "RRefLeak": "held",
    "ContextLeak": "held",
    "CallLeak": "held",
    "UngracefulShutdown": "shutdown",
    "RankDied": "died",
    "RankHung": "hung",
}
_WORDS: dict[Kind, str] = {
    "value": "a step gives a wrong value",
    "error": "a step raises, and must not, or raises something else",
    "no error": "a step does not raise, and must",
    "unclear": "what a step raises cannot be read",
    "calls": "a call runs another number of times than it must",
    "held": "a rank does not come to hold what it must, and nothing else",
    "shutdown": "rpc.shutdown() raises, or its process does not leave with exit code 0",
    "died": "a rank dies before its time",
    "hung": "something does not end in time",
}

#: What the error of a step that must raise says, as a regular expression.
_ERRORS = {**TEXTS, "missing": "KeyError"}

#: torch's names of what our counters count.
_TORCH_NAMES = {
    "owners": "num_owner_rrefs",
    "forks": "num_forks",
    "pending_users": "num_pending_users",
    "pending_futures": "num_pending_futures",
    "contexts": "num_autograd_contexts",
    "backward_passes": "num_current_backward_passes",
    "server_calls": "agent.server_active_calls",
    "server_async_calls": "agent.server_active_async_calls",
    "client_calls": "agent.client_active_calls",
}

#: Modules of the standard library that a script may use.
_MODULES = ("collections", "gc", "itertools", "multiprocessing", "re", "tempfile", "time")

#: Real seconds: what a busy machine may add to anything; processes import torch in the first.
_START_SECONDS = 180
_MARGIN_SECONDS = 20
#: Beyond that, what the retries and delays themselves take makes a script no use.
_LONGEST_SECONDS = 600.0


@dataclass(frozen=True)
class Script:
    """A script of a failure.

    Attributes:
        text: its source, which says in how many of how many runs it showed the failure.
        seconds: real seconds that its faults take at most, beyond the start of its processes.
        patience: real seconds after which it gives up on any one thing.
    """

    artefact: Artefact
    plan: FaultPlan
    text: str
    seconds: float
    patience: float
    codes: tuple[int, ...] = ()


def script_of(artefact: Artefact, plan: FaultPlan | None = None) -> Script:
    """The script of a program's failure, not run yet.

    Args:
        plan: other faults than those of the artefact.

    Raises:
        UsageError: the artefact is of a test, or of something that torch alone cannot show.
    """
    return _Writer(artefact, artefact.plans[0] if plan is None else plan).script(())


def tried(script: Script, folder: Path, times: int) -> Script:
    """Run a script `times` times; the script that says how often it showed its failure.

    Args:
        folder: an empty one, where it is put while it runs.
    """
    path = folder / "script.py"
    path.write_text(script.text, encoding="utf-8")
    codes: list[int] = []
    for _ in range(times):
        try:
            done = _guard.run(
                [sys.executable, str(path)],
                cwd=folder,
                # What it leaves there goes with the folder.
                env=_guard.environment(TMPDIR=str(folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_START_SECONDS + 10 * script.patience,
            )
        except subprocess.TimeoutExpired:
            codes.append(2)
        else:
            codes.append(done.returncode)
    return _Writer(script.artefact, script.plan).script(tuple(codes))


def is_ours(path: Path) -> bool:
    """Whether a file was generated here, so that it may be replaced."""
    try:
        with path.open(encoding="utf-8") as file:
            return any(line.strip() == MARK for line in (file.readline(), file.readline()))
    except (OSError, UnicodeDecodeError):
        return False


def refuse(artefact: Artefact) -> tuple[Program, Violation]:
    """The program of an artefact, and how it first broke its promise.

    Raises:
        UsageError: it holds no program, or no failure.
    """
    if artefact.program is None or not kind_of(artefact.kind).test:
        msg = (
            f"the artefact is of the test {artefact.subject}, which is code already; only a "
            f"program's failure is written as a script or a test."
        )
        raise UsageError(msg)
    found = [v for v in artefact.violations if v.promise == artefact.promise]
    if artefact.underway or not found:
        msg = "the artefact shows no failure (it was only under way); replay it first."
        raise UsageError(msg)
    count = len(artefact.program.leaves)
    if found[0].step is not None and not 0 <= found[0].step < count:
        msg = f"the artefact is damaged: its failure is at step {found[0].step} of {count}."
        raise UsageError(msg)
    return artefact.program, found[0]


class _Writer:
    def __init__(self, artefact: Artefact, plan: FaultPlan) -> None:
        self.artefact = artefact
        self.plan = plan
        self.program, self.violation = refuse(artefact)
        self.size = artefact.sizes[0]
        self.prediction: Prediction = predict(self.program, plan)
        self.leaves = self.program.leaves
        self.kind: Kind = self._kind()
        tables = [plan.table(rank) for rank in range(self.size)]
        # Calls that may fail must differ, since the agent counts failures by their bytes.
        differ = any(not m.is_retryable for table in tables for m in table.failing)
        self.counts = self.kind == "calls"
        names = tuple(f"worker{rank}" for rank in range(self.size))
        self.writer = StepWriter(names, labels=differ or self.counts, counts=self.counts)
        pauses = sum(leaf.seconds for leaf in self.leaves if isinstance(leaf, Pause))
        self.seconds = self.prediction.fault_seconds(plan) + pauses
        if self.seconds > _LONGEST_SECONDS:
            msg = f"in real time its faults take {self.seconds:.0f} s, which is no use as a script."
            raise UsageError(msg)
        # A message that is given up takes one more wait than one that arrives at last.
        self.patience = math.ceil(_MARGIN_SECONDS + 2.0 * self.seconds)

    def _kind(self) -> Kind:
        promise = self.violation.promise
        if promise == "ErrorInLog":
            msg = "only a line in the log of a rank shows it; a script cannot."
            raise UsageError(msg)
        if promise not in _KINDS:
            msg = f"{promise} is a matter of rpcprops's own model; torch alone cannot show it."
            raise UsageError(msg)
        kind = _KINDS[promise]
        step = self.violation.step
        if step is not None and isinstance(self.leaves[step], Refused):
            return "value"
        at_shutdown = "shut down" in self.violation.message or not self.program.settles
        if promise == "ContextLeak" and at_shutdown and step is None:
            msg = "at shutdown only a line in the log shows a kept context; a script cannot."
            raise UsageError(msg)
        if kind == "held" and at_shutdown and step is None:
            return "shutdown"
        return kind

    @property
    def reinit(self) -> bool:
        """Whether the ranks have shut RPC down once before."""
        return kind_of(self.artefact.kind).reinit

    @property
    def settles_at_end(self) -> bool:
        """Whether what ranks hold after the last step is looked at."""
        return self.program.settles and self.violation.step is None

    @property
    def shuts_down(self) -> bool:
        """Whether the failure may show in a graceful shutdown."""
        if self.violation.step is not None or self.reinit or not self.prediction.graceful:
            return False
        last = self.artefact.outcomes[0].phases if self.artefact.outcomes else ()
        reached = not last or any(phase.name == "shutdown" for phase in last)
        return self.kind in ("shutdown", "no error") or (self.kind in ("died", "hung") and reached)

    def script(self, codes: tuple[int, ...]) -> Script:
        """The whole script; `codes` are what it exited with so far."""
        self.writer.functions.clear()
        self.writer.imports.clear()
        # First the steps, which say what is needed before them.
        steps = self._steps()
        code = [self._constants(), *self._functions(), _kept(_STEPS, self._flags()), *steps]
        code += self._driver()
        imports = self._imports("\n".join(code))
        parts = [f"{self._head(codes)}\n{imports}", *code]
        text = "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"
        return Script(self.artefact, self.plan, text, self.seconds, self.patience, codes)

    # The parts, from the top.

    def _head(self, codes: tuple[int, ...]) -> str:
        versions = self.artefact.versions
        recorded = f"torch {versions.get('torch', 'unknown')}, Python {versions.get('python', '?')}"
        rate = "It has not been run yet."
        if codes:
            rate = (
                f"It showed the failure in {codes.count(1)} of {len(codes)} runs when it was made"
            )
            others = len(codes) - codes.count(0) - codes.count(1)
            rate += f"; {others} ended in another way." if others else "."
        life = (
            "\n\nThe ranks shut RPC down once and initialise it again first." if self.reinit else ""
        )
        sentences = (
            "It needs torch and the standard library, and runs in real time, for about "
            f"{10 + self.seconds:.0f} s or more. It exits 1 when the failure shows "
            f"({_WORDS[self.kind]}), 0 when it does not, and 2 when something else goes wrong. "
            f"{rate} The failure was recorded with {recorded}.{life}"
        )
        title = f"Shows a failure of torch.distributed.rpc: {self.violation}"
        doc = [*wrapped(title), "", *wrapped(sentences)]
        return "\n".join(["#!/usr/bin/env python3", MARK, '"""' + doc[0], *doc[1:], '"""'])

    def _imports(self, code: str) -> str:
        used = [name for name in _MODULES if re.search(rf"\b{name}\.", code)]
        torch = list(self.writer.imports)
        return "\n".join(
            [
                *(f"import {name}" for name in sorted({*used, "os", "sys", "traceback"})),
                "",
                "",
                "def end_in_trouble(*error):",
                '    """Python would exit with 1."""',
                "    traceback.print_exception(*error)",
                "    os._exit(2)",
                "",
                "",
                "sys.excepthook = end_in_trouble",
                "",
                "import torch",
                *sorted(line for line in torch if line.startswith("import")),
                "import torch.distributed.rpc as rpc",
                "import torch.distributed.rpc._testing  # registers FAULTY_TENSORPIPE",
                *sorted(line for line in torch if line.startswith("from")),
            ]
        )

    def _constants(self) -> str:
        lines = [
            f"WORLD_SIZE = {self.size}",
            "",
            "# What each rank fails to send, how often each, and what it sends late, by how many",
            "# seconds: arguments of torch's FaultyTensorPipeRpcBackendOptions.",
        ]
        tables = [self.plan.table(rank) for rank in range(self.size)]
        if len(set(tables)) == 1:
            lines += ["FAULTS = [", *_fault_lines(tables[0]), "] * WORLD_SIZE"]
        else:
            lines += ["FAULTS = [", *(line for t in tables for line in _fault_lines(t)), "]"]
        lines += [
            "",
            "# Seconds after which a process that starts, or anything else, has hung.",
            f"START_SECONDS = {_START_SECONDS}",
            f"PATIENCE = {self.patience}",
        ]
        if self.shuts_down:
            lines += [
                "# At shutdown an owner waits for deletes that do not come.",
                f"SHUTDOWN_SECONDS = {self.patience + OWNER_WAITS:g}",
            ]
        lines += ["", "# What lives in a rank, by name.", "handles = {}"]
        if any(getattr(leaf, "wait", "") == "later" for leaf in self.leaves):
            lines.append("futures = {}")
        if self._has_contexts:
            lines.append("contexts = {}")
        if self._flags()["settle"]:
            counted = [name for name in _TORCH_NAMES.values() if "agent" not in name]
            if self.violation.promise == "CallLeak":
                counted = list(_TORCH_NAMES.values())
            quoted = [f'    "{name}",' for name in counted]
            lines += [
                "# What is held must stay so for so many seconds: nothing is on its way any more.",
                f"STEADY = {self._longest_delay() + 0.3:g}",
            ]
            lines += ["", "# What of torch's debug information is looked at.", "COUNTED = ["]
            lines += [*quoted, "]"]
        if self.counts:
            lines += ["# How often each call ran in a rank.", "ran = collections.Counter()"]
        return "\n".join(lines)

    def _longest_delay(self) -> float:
        tables = [self.plan.table(rank) for rank in range(self.size)]
        return max(delay for t in tables for delay in (0.0, *t.messages_to_delay.values()))

    @property
    def _has_contexts(self) -> bool:
        return any("contexts" in line for body in self.bodies for line in body)

    def _functions(self) -> list[str]:
        found = self.writer.code_of_functions()
        if found:
            found[0] = "# What the ranks call on each other, or use.\n\n\n" + found[0]
        return found

    def _steps(self) -> list[str]:
        """The steps as functions, and the settles between them, in order."""
        texts: list[str] = []
        self.bodies: list[list[str]] = []
        number, together = 0, 0
        last = self.violation.step
        for step in self.program.steps:
            if last is not None and number > last:
                break
            branches: Sequence[Sequence[Leaf]] = (
                ((step,),) if not isinstance(step, Parallel) else ()
            )
            if isinstance(step, Parallel):
                branches = step.branches
                together += 1
            for branch in branches:
                for leaf in branch:
                    group = together if isinstance(step, Parallel) else 0
                    texts.append(self._step(number, leaf, group))
                    number += 1
        if self.settles_at_end:
            texts.append(_settle(self.prediction.counters, self.size))
        return texts

    def _step(self, number: int, leaf: Leaf, together: int) -> str:
        expected = self.prediction.steps[number]
        if isinstance(leaf, Settle):
            return _settle(expected.counters, self.size)
        words = [str(leaf.at)]
        if together:
            words.append(f"together={together}")
        if expected.error == "unknown":
            words.append("raises=None")
        elif expected.error:
            words.append(f'raises="{_ERRORS[expected.error]}"')
        elif expected.value is not None:
            value = {"refused": expected.value["refused"]} if isinstance(leaf, Refused) else None
            words.append(f"gives={value or expected.value!r}".replace("'", '"'))
        body = self.writer.body(number, leaf)
        self.bodies.append(body)
        lines = [f"@step({', '.join(words)})", f"def step{number}():"]
        return "\n".join([*lines, *(f"    {line}" for line in body)])

    def _flags(self) -> dict[str, bool]:
        """Which lines of the templates are needed."""
        settles = self.settles_at_end or any(isinstance(leaf, Settle) for leaf in self.leaves)
        return {
            "reinit": self.reinit,
            "settle": settles,
            "contexts": self._has_contexts,
            "calls": self.counts,
            "shutdown": self.shuts_down,
            "leaking": self.shuts_down and bool(self._may_leak),
            "agent": self.violation.promise == "CallLeak",
            "raises": any(step.error not in ("", "unknown") for step in self.prediction.steps),
            "decodes": any(step.error == "injected" for step in self.prediction.steps),
            "unclear": self.kind == "unclear",
            "floats": any(isinstance(leaf, Context) for leaf in self.leaves),
            "together": any(isinstance(step, Parallel) for step in self.program.steps),
        }

    @property
    def _may_leak(self) -> frozenset[int]:
        return self.prediction.leaking | self.prediction.perhaps_leaking

    def _driver(self) -> list[str]:
        """What runs the steps, with the checks that are needed."""
        broken = [f'BROKEN = "{self.kind}"  # {_WORDS[self.kind]}']
        flags = self._flags()
        if self.counts:
            calls = [dict(by_name) for by_name in self.prediction.calls]
            calls += [{}] * (self.size - len(calls))
            lines = [f"CALLS = {pprint.pformat(calls, width=90)}".replace("'", '"')]
            broken += ["", "# How often each call must run, by rank.", *lines]
        if flags["leaking"]:
            broken += [
                "# Ranks whose shutdown must report a leak, and those where it may.",
                f"LEAKING = {sorted(self.prediction.leaking)!r}",
                f"MAY_LEAK = {sorted(self._may_leak)!r}",
            ]
        return ["\n".join(broken), *(_kept(part, flags) for part in _DRIVER)]


def wrapped(text: str) -> list[str]:
    """Lines of a docstring, whatever `text` holds."""
    plain = text.replace("\\", "/").replace('"', "'")
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in plain)
    return [
        line for paragraph in plain.split("\n\n") for line in [*textwrap.wrap(paragraph, 96), ""]
    ][:-1]


def _fault_lines(table: FaultTable) -> list[str]:
    failing = json.dumps([str(m) for m in table.failing])
    delays = json.dumps({str(m): delay for m, delay in table.messages_to_delay.items()})
    return [
        "    {",
        f'        "messages_to_fail": {failing},',
        f'        "num_fail_sends": {table.num_fail_sends if table.failing else 0},',
        f'        "messages_to_delay": {delays},',
        "    },",
    ]


def _settle(counters: Sequence[Counters], size: int) -> str:
    held: dict[int, Mapping[str, int]] = {}
    for rank, wanted in enumerate(counters[:size]):
        names = {
            _TORCH_NAMES[item.name]: getattr(wanted, item.name)
            for item in fields(wanted)
            if getattr(wanted, item.name)
        }
        if names:
            held[rank] = names
    return f"settle({held!r})".replace("'", '"')


def _kept(text: str, flags: Mapping[str, bool]) -> str:
    """`text` without the lines that are marked with a flag that is off: ``#?flag``."""
    kept: list[str] = []
    for line in textwrap.dedent(text).splitlines():
        code, *marks = line.split("#?")
        wanted = [mark.strip() for mark in marks]
        if all(flags[flag.removeprefix("not ")] is not flag.startswith("not ") for flag in wanted):
            kept.append(code.rstrip())
    return "\n".join(kept)


_STEPS = '''
# The steps, in the order in which they run, each in the process of its own rank.

STEPS = []


def step(rank, gives=None, raises=False, together=0):  #?together
def step(rank, gives=None, raises=False):  #?not together
    """A step at `rank`: what it gives, or what it raises (None: it may).  #?together
  #?together
    Those of one number in `together` run at once; of those, one rank's in their order.  #?together
    """  #?together
    """A step at `rank`: what it gives, or what it raises (None: it may)."""  #?not together

    def add_step(function):
        it = {"rank": rank, "run": function, "gives": gives, "raises": raises}
        STEPS.append(it | {"together": together})  #?together
        STEPS.append(it)  #?not together
        return function

    return add_step
  #?settle
  #?settle
def settle(held):  #?settle
    """Wait until every rank holds exactly this (nothing, where it is not named)."""  #?settle
    STEPS.append({"held": held, "together": 0})  #?settle #?together
    STEPS.append({"held": held})  #?settle #?not together
'''

_DRIVER = (
    '''
    class Found(Exception):
        """What went wrong: its kind, and a sentence."""
    ''',
    '''
    # What a rank does.


    def held():  #?settle
        """What this rank holds, as torch counts it, without the zeros."""  #?settle
        gc.collect()  #?settle
        counts = torch._C._distributed_rpc._rref_context_get_debug_info()  #?settle
        counts |= torch.distributed.autograd._get_debug_info()  #?settle
        counts |= torch._C._distributed_rpc._get_current_rpc_agent().get_debug_info()  #?agent
        return {name: int(counts[name]) for name in COUNTED if int(counts[name])}  #?settle
      #?settle
      #?settle
    def join(rank, store):
        options = rpc.backend_registry.construct_rpc_backend_options(
            rpc.backend_registry.BackendType.FAULTY_TENSORPIPE,
            init_method=f"file://{store}",
            num_worker_threads=8,
            rpc_timeout=86400.0,
            **FAULTS[rank],
        )
        rpc.init_rpc(
            f"worker{rank}",
            backend=rpc.backend_registry.BackendType.FAULTY_TENSORPIPE,
            rank=rank,
            world_size=WORLD_SIZE,
            rpc_backend_options=options,
        )


    def run_rank(rank, folder, pipe):
        """Join the others, then do what comes through the pipe."""
        os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
        rpc.api._ignore_rref_leak = False  #?shutdown
        join(rank, f"{folder}/first")  #?reinit
        rpc.shutdown()  #?reinit
        join(rank, f"{folder}/store")
        pipe.send((None, None))
        while True:
            what, argument = pipe.recv()
            value = error = None
            try:
                if what == "step":
                    number, known = argument  #?contexts
                    contexts.update(known)  #?contexts
                    value = STEPS[number]["run"]()  #?contexts
                    value = STEPS[argument]["run"]()  #?not contexts
                elif what == "held":  #?settle
                    value = held()  #?settle
                elif what == "ran":  #?calls
                    value = dict(ran)  #?calls
                elif what == "shutdown":  #?shutdown
                    rpc.shutdown()  #?shutdown
                elif what == "exit":  #?shutdown
                    os._exit(0)  #?shutdown
            except BaseException as raised:
                error = f"{type(raised).__name__}: {raised}"
                if isinstance(raised, UnicodeDecodeError):  #?decodes
                    # torch put the bytes of a message into the text of its error.  #?decodes
                    error += raised.object.decode(errors="backslashreplace")  #?decodes
                # Its frames hold RRefs, which would stay alive.
                traceback.clear_frames(raised.__traceback__)
            pipe.send((value, error, contexts))  #?contexts
            pipe.send((value, error))  #?not contexts
    ''',
    '''
    # What the first process does: it starts the ranks, tells each what to do, and looks.


    class Rank:
        def __init__(self, rank, folder):
            context = multiprocessing.get_context("spawn")
            self.name = f"worker{rank}"
            self.pipe, theirs = context.Pipe()
            args = (rank, folder, theirs)
            self.process = context.Process(target=run_rank, args=args, daemon=True)
            self.process.start()
            theirs.close()

        def tell(self, what, argument=None):
            try:
                self.pipe.send((what, argument))
            except OSError:
                self.must_live("")

        def must_live(self, what):
            self.process.join(1)
            code = self.process.exitcode
            if code is not None:
                end = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
                raise Found("died", f"{self.name} {end} {what}")

        def answer(self, seconds, what):
            """What it answers: a value and an error."""
            deadline = time.monotonic() + seconds
            while not self.pipe.poll(0.05):
                for rank in RANKS:
                    if not rank.process.is_alive() and not self.pipe.poll(0.5):
                        rank.must_live(f"while {self.name} ran {what}")
                if time.monotonic() > deadline:
                    raise Found("hung", f"{what} at {self.name} did not end in {seconds} s")
            try:
                return self.pipe.recv()
            except EOFError:
                self.must_live(f"while it ran {what}")
                raise
    ''',
    '''
    RANKS = []
    contexts_known = {}  #?contexts


    def same(seen, wanted):  #?floats
        """Whether two values are equal, apart from rounding."""  #?floats
        if isinstance(wanted, dict):  #?floats
            return all(same(seen.get(key), value) for key, value in wanted.items())  #?floats
        if isinstance(wanted, list):  #?floats
            return len(seen or []) == len(wanted) and all(map(same, seen, wanted))  #?floats
        if isinstance(wanted, float) and isinstance(seen, float):  #?floats
            return abs(seen - wanted) <= 1e-12 * abs(wanted)  #?floats
        return seen == wanted  #?floats
      #?floats
      #?floats
    def start(number):
        argument = (number, contexts_known)  #?contexts
        RANKS[STEPS[number]["rank"]].tell("step", argument)  #?contexts
        RANKS[STEPS[number]["rank"]].tell("step", number)  #?not contexts


    def end(number):
        """Wait for a step, and compare what it gave."""
        step = STEPS[number]
        name = f"step{number}"
        value, error, made = RANKS[step["rank"]].answer(PATIENCE, name)  #?contexts
        contexts_known.update(made)  #?contexts
        value, error = RANKS[step["rank"]].answer(PATIENCE, name)  #?not contexts
        if error and step["raises"] is False:
            # A rank that died explains what others raise.
            for rank in RANKS:
                rank.must_live(f"while {name} raised {error}")
            raise Found("error", f"{name} raised {error}")
        if not error and step["raises"]:  #?raises
            raise Found("no error", f"{name} gave {value}, and had to raise")  #?raises
        if error and step["raises"] and not re.search(step["raises"], error):  #?raises
            raise Found("error", f"{name} raised {error}, not {step['raises']}")  #?raises
        if error and error.startswith("UnicodeDecodeError"):  #?unclear
            raise Found("unclear", f"{name} raised {error}")  #?unclear
        if not error and step["gives"] is not None and not same(value, step["gives"]):  #?floats
        if not error and step["gives"] is not None and value != step["gives"]:  #?not floats
            raise Found("value", f"{name} gave {value}, and had to give {step['gives']}")


    def wait_until(wanted):  #?settle
        """Wait until every rank holds what it must, and goes on to."""  #?settle
        began = steady = time.monotonic()  #?settle
        while True:  #?settle
            for rank in RANKS:  #?settle
                rank.tell("held")  #?settle
            seen = [rank.answer(PATIENCE, "a look at its counters")[0] for rank in RANKS]  #?settle
            now = time.monotonic()  #?settle
            if any(seen[rank] != wanted.get(rank, {}) for rank in range(WORLD_SIZE)):  #?settle
                steady = now  #?settle
            elif now - steady > STEADY:  #?settle
                return  #?settle
            if now - began > PATIENCE:  #?settle
                raise Found("held", f"ranks hold {seen}, and must hold {wanted}")  #?settle
            time.sleep(0.1)  #?settle
      #?settle
      #?settle
    def run():
        for rank in RANKS:
            _, error, *_ = rank.answer(START_SECONDS, "init_rpc")
            if error:
                raise Found("error", f"init_rpc raised {error}")
        for number, step in enumerate(STEPS):  #?not together
            if "held" in step:  #?settle #?not together
                wait_until(step["held"])  #?settle #?not together
                continue  #?settle #?not together
            start(number)  #?not together
            end(number)  #?not together
        number = 0  #?together
        while number < len(STEPS):  #?together
            if "held" in STEPS[number]:  #?settle #?together
                wait_until(STEPS[number]["held"])  #?settle #?together
                number += 1  #?settle #?together
                continue  #?settle #?together
            group = [number]  #?together
            for other in range(number + 1, len(STEPS)):  #?together
                if not STEPS[number]["together"] == STEPS[other]["together"] > 0:  #?together
                    break  #?together
                group.append(other)  #?together
            # A rank takes what it is told one after the other.  #?together
            for other in group:  #?together
                start(other)  #?together
            for other in group:  #?together
                end(other)  #?together
            number += len(group)  #?together
        for rank, wanted in zip(RANKS, CALLS):  #?calls
            rank.tell("ran")  #?calls
            seen, *_ = rank.answer(PATIENCE, "a look at its calls")  #?calls
            if seen != wanted:  #?calls
                raise Found("calls", f"{rank.name} ran {seen}, and had to run {wanted}")  #?calls
        for rank in RANKS:  #?shutdown
            rank.tell("shutdown")  #?shutdown
        for number, rank in enumerate(RANKS):  #?shutdown
            _, error, *_ = rank.answer(SHUTDOWN_SECONDS, "rpc.shutdown()")  #?shutdown
            if number in LEAKING and not error:  #?leaking
                raise Found("no error", f"{rank.name} had to report a leak at shutdown")  #?leaking
            if number in MAY_LEAK and error and "Leak" in error:  #?leaking
                continue  #?leaking
            if error:  #?shutdown
                raise Found("shutdown", f"rpc.shutdown() of {rank.name} raised {error}")  #?shutdown
        for rank in RANKS:  #?shutdown
            rank.tell("exit")  #?shutdown
            rank.process.join(PATIENCE)  #?shutdown
            if rank.process.exitcode != 0:  #?shutdown
                kind = "died" if (rank.process.exitcode or 0) < 0 else "shutdown"  #?shutdown
                raise Found(kind, f"{rank.name} left with {rank.process.exitcode}")  #?shutdown


    def main():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                RANKS.extend(Rank(rank, folder) for rank in range(WORLD_SIZE))
                run()
            except Found as found:
                kind, sentence = found.args
                print("the failure shows:" if kind == BROKEN else "something else:", sentence)
                return 1 if kind == BROKEN else 2
            except Exception:
                traceback.print_exc()
                return 2
            finally:
                for rank in RANKS:
                    rank.process.kill()
                    rank.process.join()
        print("the failure does not show")
        return 0


    if __name__ == "__main__":
        sys.exit(main())
    ''',
)
