"""What is known of torch by version: another text is one change, and stands in one place."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from rpcprops.cluster.logs import END, LogScan
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.oracle import FINDINGS, ErrorClass, error_class, is_expected, judge, set_apart
from rpcprops.oracle._findings import can_cause
from rpcprops.oracle._log_errors import log_errors
from rpcprops.oracle.ranks import could_not_release, reports_leak, shutdown_violations
from rpcprops.outcomes import Counters, Outcome, RaisedError, RankOutcome, Violation
from rpcprops.programs import Call, Program
from rpcprops.torch_facts import (
    NEWEST,
    UNKNOWN,
    VERSIONS,
    CounterKeys,
    Texts,
    TorchFacts,
    _texts,
    facts_of,
    release,
)
from tests.seeded._ideal import ideal
from tests.unit.test_imports import MODULES, strings

OTHER = "torch words it (so) now."


def worded(**changed: Any) -> TorchFacts:
    """A torch that writes something else."""
    return replace(NEWEST, texts=replace(NEWEST.texts, **changed))


@pytest.mark.parametrize("kind", ["remote", "creation", "injected", "timeout"])
def test_another_text_of_an_error_is_understood(kind: ErrorClass) -> None:
    """The class of an error follows the text of that torch, and no other."""
    error = RaisedError("RuntimeError", f"x {OTHER} y")
    assert error_class(error, worded(**{kind: OTHER})) == kind
    assert is_expected(kind, error, worded(**{kind: OTHER}))
    assert error_class(error, NEWEST) == "unknown"
    stock = RaisedError("RuntimeError", getattr(NEWEST.texts, kind))
    assert error_class(stock, worded(**{kind: OTHER})) == "unknown"


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("assertion", "assertion"),
        ("owners_waited", "owners"),
        ("users_waited", "users"),
        ("terminated", "terminate"),
    ],
)
def test_another_line_of_a_log_is_understood(field: str, kind: str) -> None:
    """What a log tells of an error inside torch follows the text of that torch."""
    facts = worded(**{field: OTHER})
    assert [error.kind for error in log_errors(f"a\n{OTHER} b\n", facts)] == [kind]
    assert list(log_errors(f"a\n{OTHER} b\n")) == []
    assert list(log_errors(getattr(NEWEST.texts, field), facts)) == []


def test_another_text_of_a_leak_is_understood() -> None:
    """What a shutdown tells of RRefs and contexts follows the texts of that torch."""
    rank = RankOutcome(0, "worker0", exit_code=0, log=f"a\n[W] {OTHER} b\nc")
    assert reports_leak(rank, worded(leaks=(OTHER,))) and not reports_leak(rank)
    assert could_not_release(rank, worded(context_kept=OTHER)) and not could_not_release(rank)
    for facts, promises in (
        (worded(leaks=(OTHER,)), ["RRefLeak"]),
        (worded(context_kept=OTHER), ["ContextLeak"]),
        (NEWEST, []),
    ):
        found = shutdown_violations([rank], leaks_allowed=False, rate=1.0, facts=facts)
        assert [violation.promise for violation in found] == promises
        assert all(f"[W] {OTHER} b" in violation.message for violation in found)


def test_another_line_of_a_failed_send_is_counted() -> None:
    """What is counted in a log while it is read, and what is kept of it, follows that torch."""
    facts = worded(failed_send=("try (", ") was in vain"), assertion=OTHER)
    scan = LogScan(facts=facts)
    scan.feed(b"[I] try (3) was in vain\n[I] try (x) was in vain\n] Send try 1 failed\n")
    noise = b"nothing\n" * (END // 8 + 1)
    for piece in (noise, OTHER.encode() + b"\n", noise, noise):
        scan.feed(piece)
    assert scan.failed_sends() == 1
    assert OTHER in scan.text()
    stock = LogScan(facts=NEWEST)
    stock.feed(b"[I] try (3) was in vain\n] Send try 1 failed\n")
    assert stock.failed_sends() == 1


@pytest.mark.parametrize(
    ("name", "violation", "facts"),
    [
        (
            "late-remote-to-self",
            Violation("ErrorInLog", f"worker0 wrote: {OTHER} at rref_context.cpp"),
            worded(assertion=OTHER),
        ),
        (
            "late-remote-to-self",
            Violation("ErrorInLog", "worker0 wrote: INTERNAL ASSERT FAILED at owners.cpp"),
            worded(owner_assertion_file="owners.cpp"),
        ),
        (
            "readable-injected-error",
            Violation("ErrorInLog", f"worker0 wrote: {OTHER}"),
            worded(unreadable=OTHER),
        ),
        (
            "second-failed-remote",
            Violation("UnexpectedError", f"expected no error, got {OTHER}"),
            worded(creation=OTHER),
        ),
    ],
)
def test_a_finding_explains_another_text(
    name: str, violation: Violation, facts: TorchFacts
) -> None:
    """A violation that a known finding causes is known by the text of that torch."""
    assert can_cause(FINDINGS[name], violation, facts)
    assert not can_cause(FINDINGS[name], violation)


CALL = Program(2, (Call(0, 1),))
LOST = FaultPlan(by_rank={0: FaultTable(["PYTHON_CALL"], 1)})


def shown(text: str, version: str, kind: str = "RuntimeError") -> Outcome:
    """What a call that is lost shows, in the words of a torch."""
    outcome = ideal(CALL, LOST)
    (step,) = outcome.steps
    step = replace(step, error=RaisedError(kind, text))
    return replace(outcome, torch_version=version, steps=(step,))


def promises(outcome: Outcome, facts: TorchFacts | None = None) -> list[str]:
    return [violation.promise for violation in judge(CALL, LOST, outcome, facts=facts)]


def test_a_torch_that_words_one_thing_otherwise_is_one_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the change noted, runs on either torch are judged right, by the version they name."""
    stock = NEWEST.texts.injected
    assert promises(shown(stock, "2.99.0")) == []
    monkeypatch.setattr(_texts, "CHANGES", {"2.99": {"injected": OTHER}, "3.1": {"timeout": "t"}})
    assert promises(shown(stock, "2.98.4+cpu")) == promises(shown(stock, "")) == []
    assert promises(shown(OTHER, "2.99.0a0+git1")) == promises(shown(OTHER, "3.0.1")) == []
    assert promises(shown(stock, "2.99.0")) == ["UnexpectedError"]
    assert promises(shown(OTHER, "2.98.4")) == ["UnexpectedError"]
    assert facts_of("3.1.0").texts == replace(Texts(), injected=OTHER, timeout="t")


def test_facts_that_are_given_go_before_those_of_the_version() -> None:
    """A torch that was patched is judged by what is said of it."""
    assert promises(shown(OTHER, VERSIONS[-1])) == ["UnexpectedError"]
    assert promises(shown(OTHER, VERSIONS[-1]), worded(injected=OTHER)) == []
    unreadable = shown(NEWEST.texts.injected, VERSIONS[-1], "Unreadable")
    assert promises(unreadable) == []
    assert promises(unreadable, worded(unreadable="Unreadable")) == ["UnclearError"]


def test_a_bug_is_there_until_it_is_mended() -> None:
    """Also in a version that nobody has measured, and in one that does not name itself."""
    for version in ("", "no version", *VERSIONS, "2.99.0", "3.0.0a0+git1"):
        facts = facts_of(version)
        has = {name for name in FINDINGS if facts.has_bug(name)}
        since = {"second-failed-remote": (2, 15), "rounded-rprop-factor": (2, 14)}
        mended = {name for name, first in since.items() if release(version) >= first}
        # A version that does not name itself may have each.
        is_before = (0, 0) < release(version) < (2, 13)
        assert facts.is_before("unreadable-tensor") == is_before
        new = {"unreadable-tensor"} if is_before else set()
        assert has == set(FINDINGS) - mended - new, version
        hung = Violation("RankHung", "")
        names, left = set_apart(CALL, ["second-failed-remote"], ideal(CALL, LOST), [hung], facts)
        is_mended = "second-failed-remote" in mended
        assert (names, left) == ((), (hung,)) if is_mended else (("second-failed-remote",), ())
    with pytest.raises(KeyError):
        NEWEST.has_bug("no-finding")


def test_each_counter_has_one_key() -> None:
    """The table of torch's counters is whole: every field of Counters, once."""
    keys = CounterKeys()
    assert list(keys.all) == [item.name for item in fields(Counters)]
    assert len(set(keys.all.values())) == len(keys.rrefs) + len(keys.autograd) + len(keys.agent)


#: Their texts are the source of a script that runs without rpcprops.
SCRIPT = (
    "rpcprops.report._script_driver",
    "rpcprops.steps.in_rank.graphs",
    "rpcprops.steps.in_rank.groups",
    "rpcprops.steps.in_rank.life",
    "rpcprops.steps.in_rank.retries",
)
OTHERS = [name for name in MODULES if not name.startswith("rpcprops.torch_facts")]


def sought() -> list[str]:
    """All that is matched, in one list."""
    texts: list[str] = []
    for item in fields(Texts):
        value = getattr(NEWEST.texts, item.name)
        texts += [value] if isinstance(value, str) else value
    # A part of the line of a failed send that stands in many sentences.
    texts.remove(NEWEST.texts.failed_send[1])
    return [text.strip("] ") for text in texts] + list(CounterKeys().all.values())


def test_what_torch_writes_stands_nowhere_else() -> None:
    """No other module holds a text of torch's, or a key of its counters."""
    texts = sought()
    for name in set(OTHERS) - set(SCRIPT):
        found = "\0".join(strings(MODULES[name]))
        assert [text for text in texts if text in found] == [], name


def test_no_other_module_names_a_version_of_torch() -> None:
    """What depends on the version is asked of its facts."""
    for name in OTHERS:
        source = MODULES[name].read_text(encoding="utf-8")
        assert not re.findall(r"\b2\.1[0-9]\b.*", source), name


def test_the_scan_sees_what_it_looks_for(tmp_path: Path) -> None:
    """It reads plain, quoted and byte strings, and leaves docstrings alone."""
    file = tmp_path / "module.py"
    file.write_text('"""Leaking RRef"""\nA = r"remote[.]x"\nB = rb"\\] Send try"\n', "utf-8")
    assert list(strings(file)) == ["remote.x", "] Send try"]
    assert {"Send try", "UnicodeDecodeError", "num_forks"} <= set(sought())


def test_dtypes_that_came_later_are_known() -> None:
    """A torch has a later dtype from its first release on; an unknown torch has none of them."""
    assert facts_of("2.6.0+cpu").has_dtype("int1")
    assert not facts_of("2.5.1").has_dtype("int1")
    assert not facts_of("2.7.1").has_dtype("float4_e2m1fn_x2")
    assert NEWEST.has_dtype("float4_e2m1fn_x2")
    assert facts_of("2.14.1").has_dtype("bcomplex32")
    assert not facts_of("2.13.0").has_dtype("bcomplex32")
    assert not UNKNOWN.has_dtype("float8_e8m0fnu")
    assert UNKNOWN.has_dtype("float32")
