"""Stand-alone scripts: a program's failure in plain torch and real time, without rpcprops.

A script contains, in this order: what it checks for, as data; the functions that ranks run for its
steps (:mod:`rpcprops.steps.in_rank`) with all that they use, word for word; the driver that starts
the ranks and checks (``_script_driver.py``), word for word; the steps. It exits with 1 if the
failure shows, with 0 if it does not, and with 2 if something else goes wrong.
"""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rpcprops import _guard, agents
from rpcprops._kinds import kind_of
from rpcprops.cluster.options import A_DAY
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import predict
from rpcprops.oracle.errors import patterns
from rpcprops.oracle.prediction import Prediction
from rpcprops.oracle.ranks import OWNER_WAITS
from rpcprops.outcomes import Counters, Violation
from rpcprops.programs import ENOUGH_THREADS, Leaf, Program
from rpcprops.report._sources import Sources
from rpcprops.report.artefact import Artefact
from rpcprops.steps.in_rank.lookup import arguments_of, place_of
from rpcprops.torch_facts import FINDINGS, NEWEST, facts_of

#: The first or second line of every file that replay generates.
MARK = "# Made by rpcprops replay."

#: What a script says it checks for, by the kind that its checks raise.
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

#: A regular expression for the error of a step that must raise, by class.
_ERRORS = {**patterns(NEWEST), "missing": "MissingHandleError"}

#: torch's key for each of our counters.
_COUNTERS = NEWEST.counters.all

#: The lines of a script before it imports torch.
_BEFORE_TORCH = """def end_in_trouble(*error):
    \"\"\"Exit with 2: Python would exit with 1.\"\"\"
    traceback.print_exception(*error)
    os._exit(2)


sys.excepthook = end_in_trouble"""
_MAIN = """if __name__ == "__main__":
    sys.exit(main())"""

#: The file that drives the ranks of a script.
_DRIVER = "rpcprops.report._script_driver"

#: Real seconds that a busy machine may add to anything; the first is for the imports of torch.
_START_SECONDS = 180
_MARGIN_SECONDS = 20
#: A longer line is wrapped.
_LINE = 100
#: If retries and delays take more real seconds than this, a script is of no use.
_LONGEST_SECONDS = 600.0


@dataclass(frozen=True)
class Script:
    """A script of a failure.

    Attributes:
        text: its source, which says in how many of how many runs it showed the failure.
        seconds: real seconds that its faults take at most, on top of starting its processes.
        patience: real seconds after which it gives up waiting for any one thing.
    """

    artefact: Artefact
    plan: FaultPlan
    text: str
    seconds: float
    patience: float
    codes: tuple[int, ...] = ()


def script_of(artefact: Artefact, plan: FaultPlan | None = None) -> Script:
    """The script of a program's failure, not yet run.

    Args:
        plan: other faults to use instead of those of the artefact.

    Raises:
        UsageError: the artefact is of a test, or of something that torch alone cannot show.
    """
    return _Writer(artefact, artefact.plans[0] if plan is None else plan).script(())


def tried(script: Script, folder: Path, times: int) -> Script:
    """Run a script `times` times; returns it with a sentence on how often it showed its failure.

    Args:
        folder: an empty folder for the script while it runs.
    """
    path = folder / "script.py"
    path.write_text(script.text, encoding="utf-8")
    codes: list[int] = []
    for _ in range(times):
        try:
            done = _guard.run(
                [sys.executable, str(path)],
                cwd=folder,
                # What the script leaves there is deleted with the folder.
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
    """Whether rpcprops generated a file, so that it may be replaced."""
    try:
        with path.open(encoding="utf-8") as file:
            return any(line.strip() == MARK for line in (file.readline(), file.readline()))
    except (OSError, UnicodeDecodeError):
        return False


def refuse(artefact: Artefact) -> tuple[Program, Violation]:
    """The program of an artefact, and its first violation of the promise.

    Raises:
        UsageError: the artefact holds no program, or no failure.
    """
    if artefact.program is None or not kind_of(artefact.kind).test:
        msg = (
            f"the artefact is of the test {artefact.subject}, which is code already; only a "
            f"program's failure is written as a script or a test."
        )
        raise UsageError(msg)
    if artefact.after:
        msg = (
            f"the artefact's failure showed only in ranks that had run {len(artefact.after)} other "
            f"programs before, and neither a script nor a test has such ranks; replay it."
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


def _other_case(subject: str) -> str:
    """A sentence that says how to get a case of a finding that torch's own agent makes, if any."""
    from rpcprops.properties import finding_case

    if subject not in FINDINGS or finding_case(subject, 0).plan.others:
        return ""
    return (
        f" For a case that torch's agent makes, in some runs, run `rpcprops check {subject} "
        f"--agent {agents.default_name()}` and replay what it names."
    )


class _Writer:
    def __init__(self, artefact: Artefact, plan: FaultPlan) -> None:
        self.artefact = artefact
        self.plan = plan
        self.program, self.violation = refuse(artefact)
        self.size = artefact.sizes[0]
        if plan.others:
            msg = (
                f"no agent of torch's makes the fault {plan.others[0].name}; a script cannot, for "
                f"it runs on plain torch.{_other_case(artefact.subject)}"
            )
            raise UsageError(msg)
        facts = facts_of(artefact.versions.get("torch", ""))
        self.prediction: Prediction = predict(self.program, plan, facts)
        self.leaves = self.program.leaves
        self.kind: Kind = self._kind()
        self.names = self.program.names(self.size)
        self.seconds = self.prediction.fault_seconds(plan) + sum(s.lasts for s in self.leaves)
        if self.seconds > _LONGEST_SECONDS:
            msg = f"in real time its faults take {self.seconds:.0f} s, which is no use as a script."
            raise UsageError(msg)
        # A message that is given up waits once more than one that arrives at last.
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
        if kind == "held" and step is not None and not self.prediction.steps[step].counters:
            # The value of a rank's step shows what is still held.
            return "value"
        if kind in ("error", "no error", "unclear") and step is not None and self._gave(step):
            # The step's value says what became of an error.
            return "value"
        at_shutdown = "shut down" in self.violation.message or not self.program.settles
        if promise == "ContextLeak" and at_shutdown and step is None:
            msg = "at shutdown only a line in the log shows a kept context; a script cannot."
            raise UsageError(msg)
        if kind == "held" and at_shutdown and step is None:
            return "shutdown"
        return kind

    def _gave(self, step: int) -> bool:
        """Whether a step returned a value, as it had to."""
        outcomes = self.artefact.outcomes[0].steps if self.artefact.outcomes else ()
        seen = [outcome for outcome in outcomes if outcome.index == step]
        expected = self.prediction.steps[step]
        return bool(seen) and seen[0].error is None and not expected.error

    @property
    def reinit(self) -> bool:
        """Whether the ranks have shut RPC down once before."""
        return kind_of(self.artefact.kind).reinit

    @property
    def settles_at_end(self) -> bool:
        """Whether to check what ranks hold after the last step."""
        return self.program.settles and self.violation.step is None

    @property
    def shuts_down(self) -> bool:
        """Whether the failure may show in a graceful shutdown."""
        if self.violation.step is not None or self.reinit or not self.prediction.graceful:
            return False
        if self.program.founds_group:
            return False
        last = self.artefact.outcomes[0].phases if self.artefact.outcomes else ()
        reached = not last or any(phase.name == "shutdown" for phase in last)
        return self.kind in ("shutdown", "no error") or (self.kind in ("died", "hung") and reached)

    def script(self, codes: tuple[int, ...]) -> Script:
        """The whole script; `codes` are its exit codes so far."""
        sources = Sources()
        steps = self._steps(sources)
        data, driver = self._driver(sources)
        imports = [
            "from __future__ import annotations",
            "\n".join(sources.import_lines(of_torch=False)),
            f"\n{_BEFORE_TORCH}",
            "\n".join(sources.import_lines(of_torch=True)),
        ]
        parts = [
            "\n\n".join([self._head(codes), *imports, data]),
            "# What the steps run in a rank, and what ranks call on each other.",
            sources.definitions(),
            driver,
            "# The steps, in the order in which they run.",
            *steps,
            _MAIN,
        ]
        text = "\n\n\n".join(parts) + "\n"
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

    def _driver(self, sources: Sources) -> tuple[str, str]:
        """The driver's data for this failure, and the rest of the driver unchanged."""
        module = sources.module(_DRIVER)
        for name in ("os", "sys", "traceback"):
            sources.imports.add(f"import {name}")
        values = self._values()
        data = ""
        end = 0
        for statement in module.statements:
            match statement:
                case ast.Import() | ast.ImportFrom():
                    sources.take_import(module, statement)
                case ast.AnnAssign(target=ast.Name(id=name)) if name in values:
                    comment, _, _ = module.source(statement).partition(f"{name}: ")
                    data += "\n" * bool(comment) + f"{comment}{name} = {values.pop(name)}\n"
                    end = statement.end_lineno or 0
                case _:
                    for name in module.defined_by(statement):
                        sources.claim(_DRIVER, name)
        if values:
            msg = f"the driver of scripts does not declare {', '.join(values)}."
            raise HarnessError(msg)
        return data.strip("\n"), "\n".join(module.lines[end:]).strip("\n")

    def _values(self) -> dict[str, str]:
        """The driver's data for this failure as Python source, by variable name."""
        agent = agents.named(agents.default_name())
        tables = [self.plan.table(rank) for rank in range(self.size)]
        if len(set(tables)) == 1:
            faults = "\n".join(["[", *_fault_lines(tables[0]), "] * len(WORLD)"])
        else:
            faults = "\n".join(["[", *(line for t in tables for line in _fault_lines(t)), "]"])
        calls: list[dict[str, int]] | None = None
        if self.kind == "calls":
            calls = [dict(by_name) for by_name in self.prediction.calls]
            calls += [{}] * (self.size - len(calls))
        leaking, perhaps = self.prediction.leaking, self.prediction.may_leak
        end = self.program.end
        return {
            "BROKEN": f"{literal(self.kind)}  # {_WORDS[self.kind]}",
            "WORLD": literal(self.names),
            "BACKEND": literal(agent.name),
            "BACKEND_MODULE": literal(agent.module),
            "FAULTS": faults,
            "REINIT": literal(self.reinit),
            "GROUP": literal(self.program.founds_group),
            "THREADS": literal(self.program.num_worker_threads or ENOUGH_THREADS),
            "RPC_TIMEOUT": literal(self.program.rpc_timeout or A_DAY),
            "COUNTED": _spread(self._counted),
            "STEADY": f"{self._longest_delay() + self._given_up() + 0.3:g}",
            "CALLS": "None" if calls is None else _spread(calls),
            "HOW": literal(end.how),
            "IGNORES_LEAKS": literal(end.ignores_leaks),
            "WAITS": literal([end.wait_of(rank) for rank in range(self.size)]),
            "SHUTS_DOWN": literal(self.shuts_down),
            "LEAKING": literal(sorted(leaking)),
            "MAY_LEAK": literal(sorted(leaking | perhaps)),
            "START_SECONDS": literal(_START_SECONDS),
            "SHUTDOWN_SECONDS": f"{self.patience + end.lasts + OWNER_WAITS:g}",
            "PATIENCE": literal(self.patience),
        }

    def _longest_delay(self) -> float:
        faults = self.plan.faults(self.size)
        return max((fault.seconds for fault in faults if fault.blocks_sender), default=0.0)

    def _given_up(self) -> float:
        """How long a function may still run whose caller no longer waits for it."""
        default = self.program.rpc_timeout
        timed = (x for x in self.leaves if getattr(x, "timeout", default) is not None)
        return max((leaf.lasts for leaf in timed), default=0.0)

    def _steps(self, sources: Sources) -> list[str]:
        """The steps as functions and the settles between them, in order; copies what they need."""
        texts: list[str] = []
        number, together = 0, 0
        last = self.violation.step
        for step in self.program.steps:
            if last is not None and number > last:
                break
            is_alone = len(step.leaves) == 1
            together += not is_alone
            before: Counter[int] = Counter()
            for branch in step.at_once:
                for leaf in branch:
                    words = "" if is_alone else f", together={together}"
                    if not is_alone and (thread := before[leaf.at]):
                        words += f", thread={thread}"
                    texts.append(self._step(number, leaf, words, sources))
                    number += 1
                before[getattr(branch[0], "at", -1)] += 1
        if self.settles_at_end:
            texts.append(_settle(self.prediction.counters, self.size, self._counted))
        return texts

    @property
    def _counted(self) -> list[str]:
        """torch's names of what the script counts: calls only if one of them is the failure."""
        counted = _COUNTERS.values()
        return [x for x in counted if self.violation.promise == "CallLeak" or "agent" not in x]

    def _step(self, number: int, leaf: Leaf, place: str, sources: Sources) -> str:
        expected = self.prediction.steps[number]
        if expected.counters:
            return _settle(expected.counters, self.size, self._counted)
        words = [f"{leaf.at}{place}"]
        if expected.error == "unknown":
            words.append("raises=None")
        elif expected.error:
            words.append(f'raises="{_ERRORS[expected.error]}"')
        elif expected.value is not None:
            words.append(f"gives={literal(expected.value)}")
        return f"@step({', '.join(words)})\n{step_function(number, leaf, sources)}"


def step_function(number: int, leaf: Leaf, sources: Sources) -> str:
    """The function of a step that runs it in its rank; copies what it needs."""
    module, function = place_of(leaf)
    sources.take(module, function)
    sources.claim("the steps", f"step{number}")
    given = [f'"step{number}"', "WORLD"]
    given += [f"{name}={literal(value)}" for name, value in arguments_of(leaf).items()]
    body = f"    return {function}({', '.join(given)})"
    if len(body) > _LINE:
        lines = [f"    return {function}(", *(f"        {item}," for item in given), "    )"]
        body = "\n".join(lines)
    return f"def step{number}():\n{body}"


def literal(value: Any) -> str:
    """`value` as Python source, whatever it contains."""
    match value:
        case str():
            # JSON's escapes are also Python's, for the first 65536 characters.
            return json.dumps(value) if max(value, default="") <= "\uffff" else ascii(value)
        case float() if not math.isfinite(value):
            return f'float("{value}")'
        case dict():
            items = [f"{literal(key)}: {literal(item)}" for key, item in value.items()]
            return f"{{{', '.join(items)}}}"
        case list():
            return f"[{', '.join(map(literal, value))}]"
        case tuple():
            return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
        case _:
            return repr(value)


def _spread(items: Sequence[Any]) -> str:
    """A list with one item on each line."""
    return "\n".join(["[", *(f"    {literal(item)}," for item in items), "]"])


def wrapped(text: str) -> list[str]:
    """Lines of a docstring, whatever `text` contains."""
    plain = text.replace("\\", "/").replace('"', "'")
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in plain)
    return [
        line for paragraph in plain.split("\n\n") for line in [*textwrap.wrap(paragraph, 96), ""]
    ][:-1]


def _fault_lines(table: FaultTable) -> list[str]:
    failing = literal([str(m) for m in table.failing])
    delays = literal({str(m): delay for m, delay in table.messages_to_delay.items()})
    return [
        "    {",
        f'        "messages_to_fail": {failing},',
        f'        "num_fail_sends": {table.num_fail_sends if table.failing else 0},',
        f'        "messages_to_delay": {delays},',
        "    },",
    ]


def _settle(counters: Sequence[Counters], size: int, counted: Sequence[str]) -> str:
    held: dict[int, Mapping[str, int]] = {}
    for rank, wanted in enumerate(counters[:size]):
        names = {
            _COUNTERS[item.name]: getattr(wanted, item.name)
            for item in fields(wanted)
            if getattr(wanted, item.name) and _COUNTERS[item.name] in counted
        }
        if names:
            held[rank] = names
    return f"settle({literal(held)})"
