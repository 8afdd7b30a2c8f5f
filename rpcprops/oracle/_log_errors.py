"""Reads what a rank wrote for errors inside torch, and says which of them the prediction explains.

What is looked for: failed internal assertions, waits that torch gave up, ``terminate called``, and
Python tracebacks. A function that raises is printed by torch at the rank where it ran
(``torch/distributed/rpc/internal.py``: ``_run_function``), so such a traceback is expected where
the program has such a function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rpcprops.oracle.errors import error_class
from rpcprops.oracle.prediction import ErrorClass, Prediction
from rpcprops.oracle.ranks import owner_slack
from rpcprops.outcomes import UNLIMITED_SLACK, Outcome, RaisedError, RankOutcome, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import NEWEST, TorchFacts, facts_of

Kind = Literal["assertion", "owners", "users", "terminate", "traceback"]


class LogError(NamedTuple):
    """One such place in a log: its kind, and its telling line."""

    kind: Kind
    line: str

    @property
    def summary(self) -> str:
        """The first line of it."""
        return self.line.partition("\n")[0]


_TRACEBACK = "Traceback (most recent call last):"
#: The last line of a traceback: the type of the exception, and what it says.
_RAISED = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?$")


def log_errors(log: str, facts: TorchFacts = NEWEST) -> Iterator[LogError]:
    """Each such place in `log`, in order; a traceback by the line that ends it."""
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
        if line == _TRACEBACK:
            yield LogError("traceback", _end_of_traceback(lines, number + 1))


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
    """The errors in the ranks' logs that neither the prediction nor `found` accounts for.

    `facts` are those of the outcome's torch, where they are not given.
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
                # It reached the caller, whose step is judged by it.
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
        # What others wait for then follows from the death or the hang, which is judged by itself.
        return True
    if error.kind == "owners":
        return leaks or number in prediction.leaking | prediction.may_leak
    if error.kind == "users":
        return leaks or number in prediction.waiting
    if error.kind == "terminate":
        # How a rank ended is judged by itself.
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
        # The rank prints what its shutdown raised, which is judged by itself.
        return True
    raised = _RAISED.match(error.summary)
    if raised is None:
        # One traceback inside another: the outer one is looked at where it ends.
        return error.line.startswith((_TRACEBACK, facts.texts.remote))
    kind = error_class(RaisedError(raised["type"], error.line), facts)
    return kind in _raised_in_ranks(program, prediction)


def _raised_in_ranks(program: Program, prediction: Prediction) -> frozenset[ErrorClass]:
    """The classes of error that functions called by the program's steps may raise.

    A function that another rank runs can fail for what its caller sees as "remote": by what it
    raises itself, or by a message that it sends (a fetch of its argument, a call of its own).
    """
    classes: set[ErrorClass] = {step.error for step in prediction.steps if step.error}
    if any(leaf.raises_there for leaf in program.leaves):
        classes.add("remote")
    if "unknown" in classes:
        # A value or an error that torch or the callee may raise, but never one of another kind.
        classes.discard("unknown")
        classes.add("remote")
    if "remote" in classes or prediction.has_failed_function:
        classes |= {"remote", "injected", "creation", "timeout"}
    return frozenset(classes)
