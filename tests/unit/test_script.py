"""Scripts and tests that replay writes, without running them: what they hold and refuse."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Violation
from rpcprops.programs import (
    STEP_TYPES,
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Parallel,
    Pause,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Through,
    Wait,
)
from rpcprops.report._artefact import Artefact
from rpcprops.report._as_test import regression_test
from rpcprops.report._script import MARK, is_ours, script_of

EVERY = Program(
    3,
    (
        Remote(0, 1, "a"),
        Remote(0, 1, "sum", right="a"),
        Remote(0, 1, "b", flavour="builtin"),
        Remote(0, 2, "s", flavour="script"),
        Remote(0, 1, "bad", raises=True),
        Own(0, "mine", (5.0, 6.0)),
        Local(0, "mine"),
        Share(0, "a", 2, "c"),
        Share(0, "a", 2, "in_list", inside="list"),
        Share(0, "a", 1, "in_dict", inside="dict", timeout=700.0),
        Settle(),
        Fetch(0, "bad"),
        Fetch(2, "c", timeout=700.0),
        Fetch(0, "sum"),
        Local(1, "in_dict"),
        Call(0, 1),
        Call(0, 1, right="a"),
        Call(0, 2, flavour="script", wait="async"),
        Call(0, 2, flavour="builtin", timeout=700.0),
        Call(0, 1, raises=True),
        Call(0, 1, flavour="script", raises=True),
        Call(0, 1, wait="later", out="f"),
        Wait(0, "f"),
        Count(0, 1),
        Chain(0, 1, 2),
        Through(0, "a"),
        Through(0, "a", how="async", addend=2.0, timeout=700.0),
        Through(0, "a", how="remote", out="t"),
        Bump(0, "b"),
        Nest(0, 1, 2, "n1"),
        Nest(0, 1, 2, "n2", flavour="builtin"),
        Nest(0, 1, 2, "n3", flavour="script"),
        Drop(0, "sum"),
        Drop(0, "t", by="scope"),
        Context(0, "plain", (1, 2)),
        Context(0, "nested", (1, 2), nested=True, retain=True),
        Context(0, "rrefs", (1, 2), rrefs=True, raises=True),
        Context(0, "breaks", (1, 2), breaks=2),
        Context(1, "both", (2,), breaks=2, nested=True, raises=True),
        Context(0, "alone", backward=False),
        Optimize(0, "optimized", (1, 2)),
        Module(0, 1),
        Pause(1, 0.1),
        Settle(),
        Refused(1, "plain"),
        Parallel(
            (
                (Remote(0, 1, "p"), Fetch(0, "p")),
                (Call(1, 2), Call(1, 2)),
                (Remote(2, 0, "q"),),
            )
        ),
        *(Drop(0, name) for name in ("a", "b", "s", "bad", "mine", "n1", "n2", "n3", "p")),
        *(Drop(2, name) for name in ("c", "in_list", "q")),
        Drop(1, "in_dict"),
    ),
    "every_kind",
)
SMALL = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")), "small")
PLAN = FaultPlan(by_rank={0: FaultTable(["RREF_USER_DELETE"], 1, {"PYTHON_CALL": 0.25})})


def artefact(
    promise: str, program: Program | None = SMALL, message: str = "planted", **changes: Any
) -> Artefact:
    """An artefact of a planted failure."""
    step = changes.pop("step", None)
    made = Artefact(
        "program",
        "planted",
        promise,
        program=program,
        plans=(PLAN,),
        violations=(Violation(promise, message, step=step),),
        versions={"torch": "2.13.0", "python": "3.11"},
    )
    return replace(made, **changes)


def names(text: str) -> set[str]:
    """What a source defines at its top."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(text).body if isinstance(node, kinds)}


def modules(text: str) -> set[str]:
    """The top-level packages that a source imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_the_program_has_every_kind_of_step() -> None:
    """What the other tests use leaves no kind of step out."""
    kinds = {type(step) for step in (*EVERY.steps, *EVERY.leaves)}
    assert kinds == set(STEP_TYPES.values())


@pytest.mark.parametrize(
    "promise",
    [
        "WrongValue",
        "WrongGradient",
        "UnexpectedError",
        "MissingError",
        "UnclearError",
        "NotRunOnce",
        "OwnerGone",
        "RRefLeak",
        "ContextLeak",
        "CallLeak",
        "UngracefulShutdown",
        "RankDied",
        "RankHung",
    ],
)
@pytest.mark.parametrize("program", [EVERY, SMALL], ids=["every", "small"])
def test_scripts_of_every_promise_are_python(promise: str, program: Program) -> None:
    """Each is valid source with a docstring, needs torch only, and leaves no mark of a template."""
    text = script_of(artefact(promise, program)).text
    compile(text, "script.py", "exec", dont_inherit=True)
    assert ast.get_docstring(ast.parse(text))
    assert modules(text) <= {
        "torch", "collections", "gc", "itertools", "multiprocessing",
        "os", "re", "sys", "tempfile", "time", "traceback",
    }  # fmt: skip
    assert not any(mark in text for mark in ("#?", "«", "»"))


def test_a_script_holds_only_what_its_program_needs() -> None:
    """A small program's script has none of the functions of other steps, nor unused checks."""
    text = script_of(artefact("WrongValue", step=1)).text
    assert {"tensor", "add", "step0", "step1"} <= names(text)
    assert not names(text) & {"keep", "hop", "bump", "settle", "held", "wait_until", "step2"}
    assert "gives=[3.0]" in text
    assert "rpc.shutdown" not in text


def test_faults_are_those_of_each_rank() -> None:
    """The tables are in the script by rank, and a plan with less replaces the artefact's."""
    text = script_of(artefact("RRefLeak")).text
    assert '"messages_to_fail": ["RREF_USER_DELETE"]' in text
    assert '"messages_to_delay": {"PYTHON_CALL": 0.25}' in text
    text = script_of(artefact("RRefLeak"), FaultPlan()).text
    assert "RREF_USER_DELETE" not in text
    assert "] * WORLD_SIZE" in text


def test_calls_have_names_where_bytes_matter() -> None:
    """Where calls are counted or may fail, equal calls differ in an argument, as in our ranks."""
    twice = Program(2, (Call(0, 1), Call(0, 1)))
    plain = script_of(artefact("RankDied", twice)).text
    assert '"step0", tensor' not in plain
    counted = script_of(artefact("NotRunOnce", twice)).text
    assert '"step0", tensor' in counted
    assert "ran[call] += 1" in counted
    failing = FaultPlan(FaultTable(["PYTHON_CALL"], 1))
    named = script_of(artefact("RankDied", twice), failing).text
    assert '"step1", tensor' in named
    assert "ran[call]" not in named


@pytest.mark.parametrize("kind", ["script", "test"])
@pytest.mark.parametrize(
    "words", ['"""; import os; os.abort(); """', "\\", "a\nb", "'\x00\x1b[31m", "{x}", "²"]
)
def test_nothing_of_an_artefact_becomes_code(kind: str, words: str) -> None:
    """Text of an artefact stays text in what is written, whatever it holds."""
    program = Program(2, (Remote(0, 1, words), Fetch(0, words)), words)
    hostile = artefact(
        "RRefLeak",
        program,
        words,
        subject=words,
        versions={"torch": words, "python": words},
        repeats=(words,),
    )
    text = script_of(hostile).text if kind == "script" else regression_test(hostile, None)
    tree = ast.parse(text)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "os.abort" not in called
    assert "abort" not in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (artefact("FaultsDiffer"), "FaultsDiffer is a matter of rpcprops's own model"),
        (artefact("RRefLeak", kind="pytest", program=None), "which is code already"),
        (artefact("", underway=True), "shows no failure"),
        (artefact("RRefLeak", step=7), "damaged: its failure is at step 7 of 3"),
        (
            artefact("RRefLeak", plans=(FaultPlan(FaultTable(["RREF_USER_DELETE"], 5)),)),
            "",
        ),
        (
            artefact("ContextLeak", Program(2, (Context(0, "x", (1,)),), settles=False)),
            "only a line in the log",
        ),
    ],
)
def test_what_no_script_can_show_is_refused(made: Artefact, words: str) -> None:
    """A UsageError says why; a plan within the budget is no reason."""
    if not words:
        assert script_of(made).seconds > 5
        return
    with pytest.raises(UsageError, match=words):
        script_of(made)


def test_too_slow_a_script_is_refused() -> None:
    """Twenty retries of a cleanup take hours of real time."""
    plan = FaultPlan(FaultTable(["CLEANUP_AUTOGRAD_CONTEXT_REQ"], 20))
    program = Program(2, (Context(0, "x", (1,)),))
    with pytest.raises(UsageError, match="in real time its faults take"):
        script_of(artefact("ContextLeak", program), plan)


def test_a_test_holds_program_and_plan_as_python() -> None:
    """The test's literals are the artefact's program and plan, and it says what was recorded."""
    text = regression_test(artefact("RRefLeak", EVERY, repeats=("3 of 3 at rate 400",)), None)
    found: dict[str, Any] = {}
    exec(compile(text, "test_it.py", "exec", dont_inherit=True), found)  # our own text
    assert found["PROGRAM"] == EVERY
    assert found["PLAN"] == PLAN
    assert "RRefLeak: planted (torch 2.13.0, 3 of 3 at rate 400)" in found["RECORDED"]
    assert callable(found["test_planted"])


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    """A file is ours if its first or second line says so."""
    file = tmp_path / "it.py"
    for text, ours in ((f"#!\n{MARK}\n", True), (f"{MARK}\n", True), (f"\n\n{MARK}\n", False)):
        file.write_text(text, encoding="utf-8")
        assert is_ours(file) is ours
    assert not is_ours(tmp_path)
