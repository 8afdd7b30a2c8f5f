"""Which violations of a run are explained by the known findings of stock torch.

The model marks each program and plan that meets a finding (:attr:`Prediction.met`). Its
predictions stay what torch promises, so a torch with the bug mended agrees with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from rpcprops.oracle.errors import WORDS, patterns
from rpcprops.oracle.prediction import Met
from rpcprops.oracle.ranks import unsettled
from rpcprops.outcomes import Counters, Outcome, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import FINDINGS, NEWEST, Finding, TorchFacts, facts_of


def can_cause(
    finding: Finding, violation: Violation, facts: TorchFacts = NEWEST, log: str = ""
) -> bool:
    """Whether a finding can cause `violation` in a program that meets it.

    `log` is what the rank wrote that the violation names.
    """
    if violation.promise == "ErrorInLog":
        texts = facts.texts
        logs = {
            "": "(?!)",
            "unreadable": re.escape(texts.unreadable),
            "owner_assertion": (
                f"{re.escape(texts.assertion)}.*{re.escape(texts.owner_assertion_file)}"
            ),
            # The C++ runtime writes this, and then asks the exception for its text, which takes a
            # while (libstdc++, `__gnu_cxx::__verbose_terminate_handler`). If the run ends meanwhile
            # for another reason, nobody sees the rank die.
            "terminated": re.escape(texts.terminated),
            "waited": f"{re.escape(texts.users_waited)}|{re.escape(texts.owners_waited)}",
        }
        return bool(re.search(logs[finding.logs], violation.message))
    if violation.promise not in {*finding.shows_as, finding.promise}:
        return False
    needed = _needed_log(finding, violation, facts)
    if needed:
        return bool(re.search(needed, log, re.MULTILINE))
    if not finding.says or violation.promise not in ("UnexpectedError", "MissingError"):
        return True
    if finding.says == "placed":
        # The program meets it in certain steps, and a Met for each says what that step shows.
        return False
    said = {name: f"{re.escape(WORDS[name])}|{text}" for name, text in patterns(facts).items()}
    return bool(re.search(said[finding.says], violation.message))


def _needed_log(finding: Finding, violation: Violation, facts: TorchFacts) -> str:
    """What the rank must have written, as a regular expression; empty if that does not matter."""
    texts = facts.texts
    if violation.promise == "RRefLeak" and finding.leak_logs == "own_fork_unknown":
        return rf"{re.escape(texts.fork_unknown)}(GloballyUniqueId\(.*?\)), ForkId = \1"
    if violation.promise == "RankDied" and finding.abort_logs and "SIGABRT" in violation.message:
        return f"^(?:{'|'.join(map(re.escape, texts.heap_damaged))})"
    return ""


def _is_there(met: Met, violation: Violation, last: range) -> bool:
    """Whether a violation is where the program meets a finding, and says what that causes.

    `last` are the steps that were under way when the run ended; a rank that died or hung did so in
    one of them. A finding that lasts may also show in a step after the one that met it.
    """
    says = bool(re.search(met.says, violation.message))
    step = violation.step
    if met.rank is None:
        return says and (met.step is None or step is None or step >= met.step)
    ends = violation.promise in ("RankDied", "RankHung") and step is None
    if ends and met.step is not None and met.step in (range(last.stop) if met.lasts else last):
        step = met.step
    return (met.rank, met.step) == (violation.rank, step) and says


def explanations(
    met: Iterable[str | Met],
    violation: Violation,
    facts: TorchFacts,
    log: str = "",
    last: range = range(0),
) -> tuple[str, ...]:
    """The findings in `met`, which a program meets, that can have caused `violation`.

    A finding also explains on a torch version on which nobody has seen it yet: a newer version
    counts as having the bug until it is known to be mended.
    """
    places = [one if isinstance(one, Met) else Met(one) for one in met]
    names = {
        one.finding
        for one in places
        if facts.has_bug(one.finding)
        and _is_there(one, violation, last)
        and (
            violation.promise in one.breaks
            if one.breaks
            else can_cause(FINDINGS[one.finding], violation, facts, log)
        )
    }
    return tuple(sorted(names))


def are_kept(
    met: Iterable[Met],
    step: int | None,
    held: Sequence[Counters],
    wanted: Sequence[Counters],
    names: Sequence[str],
) -> bool:
    """Whether ranks that settle hold just what findings make them keep, and something of it.

    Only what a finding says exactly counts.

    Args:
        step: the settle; None at the end of the run.
        wanted: what the ranks must hold.
    """
    exact = [one for one in met if one.breaks]
    found = unsettled(held, wanted, names)
    return bool(found) and all(
        any(
            violation.promise in one.breaks
            and _is_there(one, replace(violation, step=step), range(0))
            for one in exact
        )
        for violation in found
    )


def seconds_in_vain(program: Program, met: Iterable[Met]) -> float:
    """Virtual seconds for which steps wait whose end a finding keeps from coming.

    Steps wait as long as they can; where threads ran out, ranks with a thread left until the
    default timeout comes as well.
    """
    steps = {one.step: one.finding for one in met if one.finding in _IN_VAIN}
    waits = [getattr(program.leaves[step], "in_vain", 0.0) for step in steps if step is not None]
    ran_out = "timeout-needs-thread" in steps.values()
    return sum(waits) + (program.rpc_timeout or 0.0 if ran_out else 0.0)


#: Findings by which a step waits as long as it can, and then says so.
_IN_VAIN = frozenset({"timeout-needs-thread", "unreadable-remote"})


def set_apart(
    program: Program,
    met: Iterable[str | Met],
    outcome: Outcome,
    violations: Sequence[Violation],
    facts: TorchFacts | None = None,
) -> tuple[tuple[str, ...], tuple[Violation, ...]]:
    """The known findings that can have caused some of `violations`, and the violations left over.

    `met` are the findings that the program meets (:attr:`Prediction.met`); one that is given by
    its name alone may show in every step, at every rank. `facts` defaults to what is known of the
    outcome's torch.

    A rank that dies or hangs cuts its run short. Of the steps that ran then, only the values that
    they returned are judged separately. Another rank may then die of what it sends to a dead one.
    """
    met = tuple(met)
    found: set[str] = set()
    left: list[Violation] = []
    cut: set[str] = set()
    known = facts or facts_of(outcome.torch_version)
    last = _last_under_way(program, outcome)
    for violation in violations:
        names = explanations(met, violation, known, _log_of(outcome, violation), last)
        found.update(names)
        if not names:
            left.append(violation)
        elif violation.promise in ("RankDied", "RankHung") and names != (_AFTER_THE_STEPS,):
            cut.add(violation.promise)
    if cut:
        left = [
            violation
            for violation in left
            if violation.step is None
            or violation.step < last.start
            or violation.promise in ("WrongValue", "WrongGradient")
        ]
    if "RankDied" in cut:
        followers = [one for one in left if _gave_up_a_fork_request(one, outcome, known)]
        left = [one for one in left if one not in followers]
        found |= {_GIVEN_UP} if followers else set()
    return tuple(sorted(found)), tuple(left)


_GIVEN_UP = "fork-request-given-up"
#: A rank that dies of it has run all its steps.
_AFTER_THE_STEPS = "shutdown-races-delete"


def _gave_up_a_fork_request(violation: Violation, outcome: Outcome, facts: TorchFacts) -> bool:
    """Whether a rank died because its fork request was never answered; its log says so.

    The owner may be dead, so this needs no fault.
    """
    log = _log_of(outcome, violation)
    ended = facts.texts.terminated in log and facts.texts.given_up in log
    return violation.promise == "RankDied" and ended and facts.has_bug(_GIVEN_UP)


def _log_of(outcome: Outcome, violation: Violation) -> str:
    """What the rank wrote that a violation names."""
    rank = violation.rank
    return outcome.ranks[rank].log if rank is not None and rank < len(outcome.ranks) else ""


def _last_under_way(program: Program, outcome: Outcome) -> range:
    """The leaves of the step that ran last."""
    last = max((step.index for step in outcome.steps), default=0)
    started = [range(n, n + len(step.leaves)) for n, step in program.numbered if n <= last]
    return started[-1] if started else range(0)
