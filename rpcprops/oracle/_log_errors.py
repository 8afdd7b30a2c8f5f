"""Finds errors inside torch in a rank's log, and says which of them the prediction explains.

It looks for failed internal assertions, waits that torch gave up, ``terminate called``, and
Python tracebacks. When a function raises, torch prints that at the rank where it ran
(``torch/distributed/rpc/internal.py``: ``_run_function``), so such a traceback is expected if
the program has such a function.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rpcprops.faults import CUT_OFF, WireMessageType
from rpcprops.oracle.errors import error_class
from rpcprops.oracle.prediction import ErrorClass, Prediction
from rpcprops.oracle.ranks import owner_slack
from rpcprops.outcomes import UNLIMITED_SLACK, Outcome, RaisedError, RankOutcome, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import NEWEST, TorchFacts, facts_of

Kind = Literal["assertion", "owners", "users", "terminate", "traceback"]


class LogError(NamedTuple):
    """One error in a log: its kind, and the line that shows it."""

    kind: Kind
    line: str

    @property
    def summary(self) -> str:
        """The first line of its text."""
        return self.line.partition("\n")[0]


_TRACEBACK = "Traceback (most recent call last):"
#: What Python writes between the traceback of an exception and that of the one that followed it
#: (``traceback.py``: ``_cause_message``, ``_context_message``).
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
#: The last line of a traceback: the type of the exception, and its message. A class that is local
#: to a function has ``<locals>`` in its name.
_RAISED = re.compile(r"^(?P<type>[A-Za-z_](?:[\w.]|<locals>)*)(?:: (?P<message>.*))?$")


def log_errors(log: str, facts: TorchFacts = NEWEST) -> Iterator[LogError]:
    """Each error in `log`, in order; a traceback is given as its last line.

    Of exceptions that were raised one from another it is the last one that was not caught.
    """
    texts = facts.texts
    told: tuple[tuple[Kind, str], ...] = (
        ("assertion", texts.assertion),
        ("owners", texts.owners_waited),
        ("users", texts.users_waited),
    )
    lines = log.splitlines()
    for number, line in enumerate(lines):
        for kind, text in told:
            if text in line:
                yield LogError(kind, line.strip())
        if line.startswith(texts.terminated):
            yield LogError("terminate", line.strip())
        if line == _TRACEBACK and not _is_chained(lines, number + 1):
            yield LogError("traceback", _end_of_traceback(lines, number + 1))


def _is_chained(lines: list[str], start: int) -> bool:
    """Whether the exception of the traceback from `start` on led to another one."""
    here = itertools.takewhile(lambda line: line != _TRACEBACK, lines[start:])
    return any(line in _CHAINED for line in here)


def _end_of_traceback(lines: list[str], start: int) -> str:
    """The line from `start` on that names the exception, with the rest of its message."""
    for number in range(start, len(lines)):
        line = lines[number]
        if line and not line[0].isspace():
            rest = [more for more in lines[number + 1 : number + 4] if more]
            return "\n".join([line, *rest])
    return "the log ends in it"


def log_violations(
    program: Program,
    prediction: Prediction,
    outcome: Outcome,
    found: list[Violation],
    facts: TorchFacts | None = None,
) -> list[Violation]:
    """The errors in the ranks' logs that neither the prediction nor `found` explains.

    `facts` defaults to what is known of the outcome's torch.
    """
    facts = facts or facts_of(outcome.torch_version)
    died = any(violation.promise in ("RankDied", "RankHung") for violation in found)
    left: list[Violation] = []
    told = [step.error.message for step in outcome.steps if step.error is not None]
    for rank in outcome.ranks:
        said: set[str] = set()
        leaks = any(
            v.rank == rank.rank and v.promise in ("RRefLeak", "UngracefulShutdown") for v in found
        )
        for error in log_errors(rank.log, facts):
            if _accounted(error, program, prediction, rank, facts, leaks=leaks, died=died):
                continue
            if error.kind == "traceback" and any(error.summary in message for message in told):
                # The error reached the caller, and the judgement of its step covers it.
                continue
            message = f"{rank.name} wrote: {error.summary}"
            if message not in said:
                said.add(message)
                waited = error.kind in ("owners", "users")
                slack = owner_slack(outcome.clock_rate) if waited else UNLIMITED_SLACK
                left.append(
                    Violation("ErrorInLog", message, rank.rank, timing_sensitive=True, slack=slack)
                )
    return left


def _accounted(
    error: LogError,
    program: Program,
    prediction: Prediction,
    rank: RankOutcome,
    facts: TorchFacts,
    *,
    leaks: bool,
    died: bool,
) -> bool:
    number = rank.rank
    if error.kind in ("owners", "users") and died:
        # Waits of other ranks then fail because of the death or hang, which is judged separately.
        return True
    if error.kind == "owners":
        waits = program.end.how != "at once"
        return leaks or (waits and number in prediction.leaking | prediction.may_leak)
    if error.kind == "users":
        return leaks or number in prediction.waiting
    if error.kind == "terminate":
        # How a rank ended is judged separately.
        return bool(rank.signal) or died
    if error.kind == "traceback":
        return died or _is_expected_traceback(error, program, prediction, rank, facts)
    return False


def _is_expected_traceback(
    error: LogError,
    program: Program,
    prediction: Prediction,
    rank: RankOutcome,
    facts: TorchFacts,
) -> bool:
    shutdown = rank.shutdown_error
    told = "" if shutdown is None else shutdown.first_line().rpartition(":")[2].strip()
    if told and told in error.line:
        # The rank prints the error of its shutdown, which is judged separately.
        return True
    if facts.texts.lost_connection in error.line and any(x.calls_gone for x in program.leaves):
        return True
    cut_off = (facts.texts.lost_connection, facts.texts.stopped, CUT_OFF)
    if any(text in error.line for text in cut_off) and _may_be_cut_off(prediction, rank.rank):
        # Functions that are under way cannot call any more: see oracle/_hasty.py.
        return True
    raised = _RAISED.match(error.summary)
    if raised is None:
        # A traceback inside another one: the outer one is examined at its end.
        return error.line.startswith((_TRACEBACK, facts.texts.remote))
    kind = error_class(RaisedError(raised["type"], error.line), facts)
    return kind in _raised_in_ranks(program, prediction)


def _may_be_cut_off(prediction: Prediction, rank: int) -> bool:
    """Whether a function may still run at a rank when the ranks shut down at once.

    Then somebody has called it, by a message that may lack, too.
    """
    asked = prediction.may_lack.items()
    return any(to == rank and times and name in _RUNNING for (_, to, name), times in asked)


#: Requests that let a function run.
_RUNNING = frozenset(
    {
        WireMessageType.PYTHON_CALL,
        WireMessageType.SCRIPT_CALL,
        WireMessageType.PYTHON_REMOTE_CALL,
        WireMessageType.SCRIPT_REMOTE_CALL,
        WireMessageType.FORWARD_AUTOGRAD_REQ,
        WireMessageType.RUN_WITH_PROFILING_REQ,
    }
)


def _raised_in_ranks(program: Program, prediction: Prediction) -> frozenset[ErrorClass]:
    """The classes of error that functions called by the program's steps may raise.

    A function that another rank runs can fail in a way that its caller sees as "remote": by its
    own exception, or by a message that it sends (a fetch of its argument, a call of its own).
    """
    classes: set[ErrorClass] = {step.error for step in prediction.steps if step.error}
    if any(leaf.raises_there for leaf in program.leaves):
        classes.add("remote")
    if "unknown" in classes:
        # torch or the callee may return a value or raise an error here, but not another class.
        classes.discard("unknown")
        classes.add("remote")
    if "remote" in classes or prediction.has_failed_function:
        classes |= {"remote", "injected", "creation", "timeout"}
    return frozenset(classes)
