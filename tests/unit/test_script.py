"""Scripts and tests that replay writes, without running them: what they hold and refuse."""

from __future__ import annotations

import ast
import builtins
import py_compile
import symtable
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rpcprops
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Outcome, RaisedError, StepOutcome, Violation
from rpcprops.programs import (
    STEP_TYPES,
    After,
    Ask,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Default,
    Deferred,
    Drop,
    FailTwice,
    Fetch,
    Gather,
    Graph,
    Invoke,
    Linear,
    Local,
    Member,
    Method,
    Module,
    Nest,
    Onward,
    Optimize,
    Outlast,
    Own,
    Parallel,
    Pause,
    Profile,
    Program,
    Raising,
    Reach,
    Recurse,
    Refused,
    Rejoin,
    Remote,
    Retry,
    Scripted,
    Settle,
    Share,
    Through,
    Train,
    Unreached,
    Wait,
)
from rpcprops.report._sources import Sources
from rpcprops.report.artefact import Artefact
from rpcprops.report.as_test import regression_test
from rpcprops.report.script import MARK, is_ours, literal, script_of, step_function

_WAYS: Any = (
    ("hook", (0,), 1, "proxy before async"),
    ("mul", (1, 0), 2, "proxy again"),
    ("add", (2, 0), 1, "async then"),
    ("inplace", (3,), 2, "async done"),
    ("add", (4, 0), 2, "async collect_all"),
)
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
        Context(0, "late", (1, 2), late=1, nested=True),
        Context(0, "in time", (1, 2), late=1, wait="async", timeout=700.0),
        Outlast(0, 1, "outlast"),
        FailTwice(0, 1, 2, "fails", seconds=4.0),
        Graph(0, "graph", ((0, "plain"), (1, "hooked")), (("add", (0, 1), 2, "relay"),), ((2,),)),
        Graph(1, "twice", ((2, "fixed"),), (("custom", (0,), 0, "proxy"),), beside=True, inside=2),
        Graph(0, "ways", ((0, "plain"),), _WAYS, ((5,),)),
        Unreached(0, 2, "unreached"),
        Optimize(0, "optimized", (1, 2)),
        Train(0, "trained", (1, 2), "Adam", options=("betas",)),
        Linear(0, "linear", 1, by="async"),
        Module(0, 1),
        Raising(0, 1, "value", ": 'quoted'", how="remote"),
        Raising(0, 1, "rref"),
        Invoke(0, 1, "keywords"),
        Recurse(0, (1, 0), 0.1, spins=True),
        Deferred(0, 1, 2),
        Deferred(0, 1, 2, "raises", how="proxy"),
        Deferred(0, 1, 2, how="class_proxy_async"),
        Scripted(0, 1, 2),
        Scripted(0, 1, 2, "fork", how="remote"),
        Carry(0, 1, "dataclass", "echo"),
        Carry(0, 1, "rref-list", "remote"),
        Carry(0, 1, "lock", "own"),
        Carry(0, 1, "rref-partial", "echo"),
        Carry(0, 1, "rref-closure", "own"),
        Carry(0, 1, "slow-unpickled"),
        Carry(0, 1, "counted", "async"),
        Carry(0, 1, "counted", "remote-echo"),
        Pause(1, 0.1),
        Reach(0, 1, "info"),
        After(0, 1, "chain"),
        Gather(0, (1, 2), "threads"),
        Gather(0, (1, 2, 1, 2), of="mixed"),
        After(0, 1, of="proxy"),
        Onward(0, 1, 2, 2),
        Ask(0, "mine"),
        Method(0, 1, "remote"),
        Default(0, 1),
        Profile(0, 1, "nested", 2),
        Settle(),
        Retry(0, 1, 2),
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
        Settle(),
        Rejoin(0, first=(1, 0), outside=("shutdown",)),
    ),
    "every_kind",
)
SMALL = Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")), "small")
GROUP = Program(
    2,
    (
        Member(1, "outside"),
        Member(0, profiled=True),
        Member(1, "refused"),
        Call(0, 0),
        Member(0, "leave"),
    ),
    "group",
    settles=False,
)
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


def undefined(text: str) -> set[str]:
    """The names that a source uses and nowhere defines."""

    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        yield table
        for child in table.get_children():
            yield from tables(child)

    top = symtable.symtable(text, "script.py", "exec")
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}
    known |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_imported()}
    used = {s.get_name() for t in tables(top) for s in t.get_symbols() if s.is_global() or t is top}
    return used - known - set(dir(builtins))


def test_the_program_has_every_kind_of_step() -> None:
    """What the other tests use leaves no kind of step out."""
    kinds = {type(step) for step in (*EVERY.steps, *EVERY.leaves, *GROUP.steps)}
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
    assert modules(text) <= sys.stdlib_module_names | {"torch"}
    assert not undefined(text)


@pytest.mark.parametrize("promise", ["UnclearError", "MissingError", "UnexpectedError"])
def test_an_error_that_a_step_tells_as_its_value_is_checked_as_a_value(promise: str) -> None:
    """The step does not raise, so the script compares what it gives."""
    program = Program(2, (Raising(0, 1),))
    gave = Outcome(2, steps=(StepOutcome(0, value={"raised": "", "kept": False}),))
    told = artefact(promise, program, step=0, outcomes=(gave,))
    assert 'BROKEN = "value"' in script_of(told).text
    raised = replace(gave, steps=(StepOutcome(0, error=RaisedError("ValueError", "no")),))
    assert 'BROKEN = "value"' not in script_of(replace(told, outcomes=(raised,))).text


@pytest.mark.parametrize("program", [EVERY, SMALL], ids=["every", "small"])
def test_a_script_runs_what_ranks_run_word_for_word(program: Program) -> None:
    """Each function and class is, as text, in the module that ranks import, or in the driver."""
    text = script_of(artefact("RRefLeak", program)).text
    package = Path(rpcprops.__file__).parent
    driver = (package / "report" / "_script_driver.py").read_text(encoding="utf-8")
    ours = [path.read_text(encoding="utf-8") for path in package.glob("steps/in_rank/*.py")]
    lines = text.splitlines()
    found = 0
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name == "end_in_trouble":
            continue
        if node.name.startswith("step") and node.name != "step":
            continue
        first = min(part.lineno for part in (node, *node.decorator_list)) - 1
        source = "\n".join(lines[first : node.end_lineno])
        assert sum(f"\n{source}\n" in module for module in (driver, *ours)) == 1, source
        found += 1
    assert found > 30
    _, mark, rest = driver.partition("# torch's faulty agent")
    assert f"{mark}{rest}" in text


def test_a_script_holds_only_what_its_program_needs() -> None:
    """A small program's script has none of the functions of other steps, and skips other checks."""
    text = script_of(artefact("WrongValue", step=1)).text
    assert {"tensor", "add", "step0", "step1"} <= names(text)
    assert not names(text) & {"store_handle", "hop", "add_one", "step2"}
    assert "gives=[3.0]" in text
    assert "\nSHUTS_DOWN = False\n" in text
    assert "\nCALLS = None\n" in text
    assert "\nsettle(" not in text


@pytest.fixture
def scripted_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are run by a function of a test."""
    monkeypatch.setattr(Pause, "runs", "tests.unit._scripted:toy", raising=False)


@pytest.mark.usefixtures("scripted_pauses")
def test_a_function_of_a_test_is_scripted_with_what_it_needs() -> None:
    """A step names its function by its class alone; the script holds it, and it runs there."""
    sources = Sources()
    step = step_function(7, Pause(0, 0.5), sources)
    assert step == 'def step7():\n    return toy("step7", WORLD, seconds=0.5, handle="")'
    text = sources.definitions()
    own = Path(__file__).with_name("_scripted.py").read_text(encoding="utf-8")
    first, last = own.index("#: A table"), own.index("def uses_an_alias")
    assert text.endswith(own[first:last].strip())
    assert names(text) == {"note_call", "doubled", "toy"}
    assert sources.import_lines(of_torch=True) == []
    imports = sources.import_lines(of_torch=False)
    assert imports == [
        "import threading",
        "from collections import Counter",
        "from itertools import repeat as again",
    ]
    found: dict[str, Any] = {"WORLD": ("worker0",)}
    code = "\n".join(["from __future__ import annotations", *imports, text, step])
    exec(compile(code, "script.py", "exec", dont_inherit=True), found)  # our own text
    assert found["step7"]() == [1.0, 1.0]
    assert found["ran"] == {"step7": 1}


@pytest.mark.usefixtures("scripted_pauses")
def test_the_function_of_a_test_is_in_a_whole_script() -> None:
    """What a class names as its function is in the script of a program that has such a step."""
    text = script_of(artefact("RankDied", Program(2, (Pause(1, 0.5),)))).text
    assert {"toy", "doubled", "note_call", "step0"} <= names(text)
    assert 'return toy("step0", WORLD, seconds=0.5, handle="")' in text
    assert not undefined(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uses_an_alias", "must be imported by its own name, not 'from rpcprops.errors import"),
        ("uses_a_module", "must be imported by its own name, not 'import hypothesis'"),
        ("imports_inside", "must have 'from rpcprops.errors import text_of' at the top of its"),
        ("uses_what_is_nowhere", "'nowhere' of tests.unit._scripted cannot stand in a script"),
    ],
)
def test_what_cannot_stand_in_a_script_is_an_error_of_ours(name: str, words: str) -> None:
    """A function that needs more than its text, torch and the standard library is named."""
    sources = Sources()
    with pytest.raises(HarnessError, match=words):
        sources.take("tests.unit._scripted", name)


def test_two_functions_of_one_name_are_an_error_of_ours() -> None:
    """A script has one name for one thing, so what would replace another is refused."""
    sources = Sources()
    sources.take("rpcprops.steps.in_rank.state", "handle_of")
    with pytest.raises(HarnessError, match=r"also a name of rpcprops[.]steps[.]in_rank[.]state"):
        sources.take("tests.unit._scripted", "handle_of")


def test_sources_that_are_not_there_are_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources in a zip file are read; a module without its source says what to do."""
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped_steps.py", "def zipped(call, world):\n    return call\n")
    (tmp_path / "bare_steps.py").write_text("def bare(call, world): ...\n", encoding="utf-8")
    py_compile.compile(str(tmp_path / "bare_steps.py"), str(tmp_path / "bare_steps.pyc"))
    (tmp_path / "bare_steps.py").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    sources = Sources()
    sources.take("zipped_steps", "zipped")
    assert sources.definitions() == "def zipped(call, world):\n    return call"
    with pytest.raises(HarnessError, match="source of bare_steps, which cannot be read"):
        sources.take("bare_steps", "bare")


@pytest.mark.parametrize(
    "value",
    [
        ("a", 'b"\\\n\x00', "²", "\U0001f600", "\ud800"),
        {"x": [1.0, (2,), (), None, True]},
        float("inf"),
        [float("-inf")],
    ],
)
def test_values_are_written_as_python_that_yields_them(value: Any) -> None:
    """Whatever a step holds comes back as it was, from plain characters."""
    text = literal(value)
    assert text.isascii()
    assert eval(text) == value  # our own text


def test_faults_are_those_of_each_rank() -> None:
    """The tables are in the script by rank, and a plan with less replaces the artefact's."""
    text = script_of(artefact("RRefLeak")).text
    assert '"messages_to_fail": ["RREF_USER_DELETE"]' in text
    assert '"messages_to_delay": {"PYTHON_CALL": 0.25}' in text
    text = script_of(artefact("RRefLeak"), FaultPlan()).text
    assert "RREF_USER_DELETE" not in text
    assert "] * len(WORLD)" in text


def test_calls_have_names_and_are_counted() -> None:
    """Equal calls differ in an argument, as in our ranks; where it matters their runs are told."""
    twice = Program(2, (Call(0, 1), Call(0, 1)))
    plain = script_of(artefact("RankDied", twice)).text
    for text in (plain, script_of(artefact("NotRunOnce", twice)).text):
        assert '"step0",\n' in text
        assert '"step1",\n' in text
        assert "ran[call] += 1" in text
    assert "CALLS = None" in plain
    assert 'CALLS = [\n    {},\n    {"step0": 1, "step1": 1},\n]' in text


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
