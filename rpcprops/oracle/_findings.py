"""Which violations of a run the known findings of stock torch explain.

The model marks each program and plan that meets one (:attr:`Prediction.known_bugs`). Its
predictions stay what torch promises, so that a torch that is mended shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rpcprops.oracle.errors import WORDS, patterns
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import FINDINGS, NEWEST, Finding, TorchFacts, facts_of


def can_cause(finding: Finding, violation: Violation, facts: TorchFacts = NEWEST) -> bool:
    """Whether a finding may show so in a program that meets it."""
    if violation.promise == "ErrorInLog":
        texts = facts.texts
        logs = {
            "": "(?!)",
            "unreadable": re.escape(texts.unreadable),
            "owner_assertion": (
                f"{re.escape(texts.assertion)}.*{re.escape(texts.owner_assertion_file)}"
            ),
        }
        return bool(re.search(logs[finding.logs], violation.message))
    if violation.promise not in {*finding.shows_as, finding.promise}:
        return False
    if not finding.says or violation.promise not in ("UnexpectedError", "MissingError"):
        return True
    said = {name: f"{re.escape(WORDS[name])}|{text}" for name, text in patterns(facts).items()}
    return bool(re.search(said[finding.says], violation.message))


def explanations(met: Iterable[str], violation: Violation, facts: TorchFacts) -> tuple[str, ...]:
    """Those of the findings that a program meets that can have caused `violation` on this torch.

    One explains on a torch on which nobody has seen it yet as well: a newer one has it until it is
    known to be mended.
    """
    return tuple(
        name
        for name in sorted(met)
        if facts.has_bug(name) and can_cause(FINDINGS[name], violation, facts)
    )


def set_apart(
    program: Program,
    met: Iterable[str],
    outcome: Outcome,
    violations: Sequence[Violation],
    facts: TorchFacts | None = None,
) -> tuple[tuple[str, ...], tuple[Violation, ...]]:
    """The known findings that can have caused some of `violations`, and those that none can have.

    `met` are the findings that the program meets (:attr:`Prediction.known_bugs`). `facts` are those
    of the outcome's torch where they are not given.

    A rank that dies or hangs cuts its run short: of the steps that were under way then, only the
    values that they gave are judged for themselves.
    """
    found: set[str] = set()
    left: list[Violation] = []
    cut = False
    known = facts or facts_of(outcome.torch_version)
    for violation in violations:
        names = explanations(met, violation, known)
        found.update(names)
        if names:
            cut = cut or violation.promise in ("RankDied", "RankHung")
        else:
            left.append(violation)
    if cut:
        start = _last_under_way(program, outcome)
        left = [
            violation
            for violation in left
            if violation.step is None
            or violation.step < start
            or violation.promise in ("WrongValue", "WrongGradient")
        ]
    return tuple(sorted(found)), tuple(left)


def _last_under_way(program: Program, outcome: Outcome) -> int:
    """The first leaf of the step that was run last."""
    last = max((step.index for step in outcome.steps), default=0)
    return max(first for first, _ in program.numbered if first <= last)
