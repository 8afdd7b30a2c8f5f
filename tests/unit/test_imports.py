"""What imports what: no torch before a rank needs it, no Hypothesis in one, and one direction."""

from __future__ import annotations

import ast
import graphlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rpcprops
from rpcprops import outcomes
from rpcprops.agents import Agent, FaultyTensorPipe, TensorPipe, Wire
from rpcprops.steps import STEP_TYPES, Step
from rpcprops.torch_facts.symbols import SYMBOLS

PACKAGE = Path(rpcprops.__file__).parent
TESTS = Path(__file__).parents[1]

#: The data: it stands on nothing else of ours.
DATA = (
    *("errors", "_given", "_frozen", "_printable", "_json"),
    *("faults", "steps", "programs", "outcomes"),
)
#: Who may import torch: what runs in ranks (our own, and those that the benchmarks compare with),
#: the server that forks them, and the fixture.
WITH_TORCH = (
    "rpcprops._bare_ranks",
    "rpcprops._rank_fixture",
    "rpcprops._torch_fixture",
    "rpcprops._torch_harness",
    "rpcprops.cluster.adoption",
    "rpcprops.cluster.rank_process",
    "rpcprops.cluster._server",
    "rpcprops.cluster._warm",
    "rpcprops.fixture",
    "rpcprops.report._script_driver",
    *(f"rpcprops.steps.in_rank.{name}" for name in ("alone", "shared", "sums")),
    *(f"rpcprops.steps.in_rank.{name}" for name in ("autograd", "calls")),
    *(f"rpcprops.steps.in_rank.{name}" for name in ("control", "ends", "functions", "graphs")),
    *(f"rpcprops.steps.in_rank.{name}" for name in ("groups", "life", "nested", "retries")),
    "rpcprops.steps.in_rank.layers",
    "rpcprops.steps.in_rank.optimizers",
    *(f"rpcprops.steps.in_rank.{name}" for name in ("rrefs", "training", "values", "ways")),
    "rpcprops.upstream._pytorch_harness",
    "rpcprops.upstream._rank_side",
)


def source_files() -> dict[str, Path]:
    """Every module of the package, by name (``strategies`` is a link, and followed)."""
    found: dict[str, Path] = {}
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = ["rpcprops", *path.relative_to(PACKAGE).with_suffix("").parts]
                found[".".join(parts).removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


MODULES = source_files()


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _runs_later(node: ast.AST) -> bool:
    return _is_for_types(node) or isinstance(
        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    )


def statements(
    tree: ast.AST, *, leave_out: Callable[[ast.AST], bool] | None = None
) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a file, but for those inside what is to be left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif leave_out is None or not leave_out(node):
            yield from statements(node, leave_out=leave_out)


def module_of(node: ast.ImportFrom, path: Path) -> str:
    """The full name of the module that something is imported from."""
    if not node.level:
        return str(node.module)
    # No package of ours imports from further up than its own folder.
    assert node.level == 1
    return f"rpcprops.{path.parent.name}.{node.module}"


def imported(path: Path, *, top_only: bool = True) -> set[str]:
    """The modules that a file imports, and the names that it takes from each.

    With `top_only`, those of the statements that run when it is imported.
    """
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in statements(tree, leave_out=_runs_later if top_only else None):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        module = module_of(node, path)
        found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def strings(path: Path) -> Iterator[str]:
    """Every string of a source but its docstrings; of bytes what they say."""
    docs: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr):
            # A docstring, or a string that does nothing.
            docs.append(node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            value = node.value
            text = value if isinstance(value, str) else value.decode("utf-8", "replace")
            if not any(node is doc for doc in docs):
                # Of a regular expression, what it is about.
                yield re.sub(r"\\(?=\W)", "", re.sub(r"\[(\W)\]", r"\1", text))


def roots(names: set[str]) -> set[str]:
    """The top-level packages of some names."""
    return {name.partition(".")[0] for name in names}


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh process has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return roots(set(json.loads(done.stdout)))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import rpcprops", {"torch", "numpy", "hypothesis", "pytest", "_pytest", "rich", "typer"}),
        ("import rpcprops.strategies", {"torch", "numpy", "pytest", "_pytest", "rich"}),
        ("import rpcprops.properties, rpcprops.report.text, rpcprops._replay", {"torch", "numpy"}),
        ("import rpcprops.cli", {"torch", "numpy", "hypothesis", "pytest", "_pytest"}),
        ("import rpcprops.pytest_plugin", {"torch", "numpy"}),
        ("import rpcprops.oracle", {"torch", "numpy", "hypothesis", "pytest"}),
        ("import rpcprops.confirmation", {"torch", "numpy", "hypothesis", "pytest", "_pytest"}),
        # What the fork server of a command imports: no test module of torch's, which bring these.
        ("import rpcprops.cluster._server", {"hypothesis", "pytest", "_pytest", "expecttest"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str, absent: set[str]) -> None:
    """torch takes seconds to import and a fork needs a process without it: only ranks load it."""
    assert not loaded_by(statement) & absent


def test_every_public_name_exists_and_is_described() -> None:
    """What `__all__` promises is there, sorted as ruff sorts it, and documents itself."""
    assert len(set(rpcprops.__all__)) == len(rpcprops.__all__)
    for name in rpcprops.__all__:
        value = getattr(rpcprops, name)
        assert inspect.getdoc(value), name
        assert not name.startswith("_")


@pytest.mark.parametrize("name", ["run", "judge", "Cluster", "ClusterServer", "FaultTable"])
def test_the_promised_names_are_public(name: str) -> None:
    """What the documentation builds on is in the package itself."""
    assert name in rpcprops.__all__


@pytest.mark.parametrize("package", ["faults", "oracle", "properties", "strategies", "cluster"])
def test_every_name_of_a_subpackage_exists(package: str) -> None:
    """The lists of names of the subpackages hold nothing that is not there."""
    code = (
        f"import rpcprops.{package} as it\n"
        f"assert it.__all__ and all(hasattr(it, name) for name in it.__all__)"
    )
    loaded_by(code)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name: str) -> None:
    """Each module begins with a docstring, whose first line is a sentence."""
    doc = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert doc
    assert doc.splitlines()[0].rstrip().endswith((".", ":"))


@pytest.mark.parametrize("kind", STEP_TYPES.values(), ids=lambda kind: kind.__name__)
def test_every_method_of_a_kind_of_step_is_described(kind: type[Step]) -> None:
    """What a kind overrides is described in Step, which ruff cannot tell; what it adds, in it."""
    for name in vars(kind):
        value = inspect.getattr_static(kind, name)
        if inspect.isfunction(value) or isinstance(value, classmethod | staticmethod | property):
            said = [inspect.getdoc(vars(base)[name]) for base in kind.__mro__ if name in vars(base)]
            assert name.startswith("_") or any(said), name


@pytest.mark.parametrize(
    "name", [n for n in MODULES if f"{n}.".split(".")[1] in set(DATA) - {"steps"}]
)
def test_data_stands_on_nothing_but_data(name: str) -> None:
    """Faults, programs and outcomes import neither torch nor anything that runs or judges them."""
    found = imported(MODULES[name], top_only=False)
    ours = {module for module in found if module.startswith("rpcprops")}
    allowed = {f"rpcprops.{data}" for data in DATA}
    assert all(any(f"{module}.".startswith(f"{a}.") for a in allowed) for module in ours), ours
    others = roots(found - ours) - set(sys.stdlib_module_names)
    assert others <= {"msgspec"}


@pytest.mark.parametrize(
    "name",
    [n for n in MODULES if n.startswith("rpcprops.steps.") and ".in_rank" not in n],
)
def test_a_kind_of_step_is_given_what_walks_over_programs(name: str) -> None:
    """Steps stand below programs, oracle and strategies, of which they know the types only."""
    found = imported(MODULES[name])
    ours = {module.split(".")[1] for module in found if module.startswith("rpcprops.")}
    assert ours <= {"errors", "_given", "faults", "outcomes", "steps"}
    assert roots(found) <= {"rpcprops", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("rpcprops.steps.in_rank.")])
def test_what_a_step_does_in_a_rank_is_plain_torch(name: str) -> None:
    """Scripts hold its source, so it knows torch and nothing else of ours."""
    found = imported(MODULES[name], top_only=False)
    ours = {module for module in found if module.startswith("rpcprops")}
    assert all(module.startswith("rpcprops.steps.in_rank.") for module in ours)
    assert roots(found) <= {"rpcprops", "torch", *sys.stdlib_module_names}


def test_the_watcher_is_small() -> None:
    """What stays beside each fork server for its whole life imports the standard library only."""
    found = roots(imported(MODULES["rpcprops.cluster._watcher"], top_only=False))
    assert found <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("rpcprops.oracle")])
def test_the_oracle_is_pure(name: str) -> None:
    """Judging needs data and nothing else: no torch, no Hypothesis, no clock, no files."""
    found = imported(MODULES[name], top_only=False)
    ours = {module.split(".")[1] for module in found if module.startswith("rpcprops.")}
    assert ours <= {*DATA, "oracle", "torch_facts"}
    others = roots({module for module in found if not module.startswith("rpcprops")})
    assert others <= {"msgspec", *sys.stdlib_module_names}
    assert not others & {"os", "time", "random", "subprocess", "socket", "pathlib", "io"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("rpcprops.strategies")])
def test_strategies_draw_data_and_run_nothing(name: str) -> None:
    """What draws faults knows neither a cluster nor torch."""
    found = imported(MODULES[name], top_only=False)
    ours = {module.split(".")[1] for module in found if module.startswith("rpcprops.")}
    assert ours <= {*DATA, "strategies", "torch_facts"}
    assert roots(found) <= {"rpcprops", "hypothesis", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", [n for n in MODULES if n not in WITH_TORCH])
def test_only_ranks_and_the_fixture_import_torch(name: str) -> None:
    """Every other module can be imported where there is no torch."""
    found = imported(MODULES[name])
    assert "torch" not in roots(found)
    assert not found & {f"rpcprops.torch_facts.symbols.{symbol}" for symbol in SYMBOLS}


#: Where the symbols stand, and what runs without rpcprops.
MAY_BE_PRIVATE = (
    "rpcprops.torch_facts.symbols",
    "rpcprops.upstream._pytorch_harness",
    "rpcprops.report._script_driver",
)


@pytest.mark.parametrize("name", [n for n in MODULES if n not in MAY_BE_PRIVATE])
def test_what_torch_does_not_promise_is_imported_in_one_place(name: str) -> None:
    """Only torch_facts/symbols.py imports from torch._C, torch.testing, or a name with a _."""
    found = {one for one in imported(MODULES[name], top_only=False) if one.startswith("torch.")}
    assert not {
        one
        for one in found
        if one.startswith("torch.testing") or any(part.startswith("_") for part in one.split("."))
    }


@pytest.mark.parametrize("agent", [FaultyTensorPipe(), TensorPipe()], ids=lambda one: one.name)
def test_one_module_names_the_backend_of_an_agent(agent: Agent) -> None:
    """Everybody else asks the agent; a script that runs without rpcprops is written out."""
    naming = {
        name
        for name, path in MODULES.items()
        if any(re.search(rf"\b{agent.name}\b", text) for text in strings(path))
    }
    scripts = {name for name in naming if name.startswith("rpcprops.report.script")}
    assert naming - scripts == {type(agent).__module__}


def test_what_is_said_of_agents_needs_no_torch() -> None:
    """Agents stand on data and on what is known of torch; torch is imported where it is used."""
    assert not loaded_by("import rpcprops.agents") & {"torch", "numpy"}
    for name in (n for n in MODULES if n.startswith("rpcprops.agents")):
        found = imported(MODULES[name], top_only=False)
        ours = {module.split(".")[1] for module in found if module.startswith("rpcprops.")}
        assert ours <= {*DATA, "agents", "torch_facts"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("rpcprops.cluster")])
def test_the_cluster_knows_no_test_framework(name: str) -> None:
    """What runs ranks imports no pytest and no Hypothesis, which would cost every rank."""
    found = imported(MODULES[name], top_only=False)
    assert not roots(found) & {"pytest", "_pytest", "hypothesis", "rich", "typer"}
    ours = {module.split(".")[1] for module in found if module.startswith("rpcprops.")}
    above = {"properties", "strategies", "report", "confirmation", "runner"}
    assert not ours & {*above, "cli", "commands", "pytest_plugin", "plugin"}


def private_imports() -> Iterator[str]:
    """Each import of a private module or name of a package from outside that package."""
    for name, path in MODULES.items():
        for taken in imported(path, top_only=False):
            parts = taken.split(".")
            hidden = [number for number, part in enumerate(parts) if part.startswith("_")]
            if parts[0] == "rpcprops" and hidden:
                package = ".".join(parts[: hidden[0]])
                if not f"{name}.".startswith(f"{package}."):
                    yield f"{name} imports {taken}"


def test_what_other_packages_import_is_public() -> None:
    """A module or name with an underscore is used in its own package only."""
    assert list(private_imports()) == []


#: By design they name types of what stands above them, for type checkers only: a kind of step those
#: of what walks over programs (scope, model, drawer), a fault that of the plan which carries it, a
#: kind of failure those of its case, its artefact and its replay.
NAMES_TYPES_ABOVE = ("rpcprops.steps.", "rpcprops.faults._", "rpcprops._kinds")


def needed_by(name: str) -> set[str]:
    """The modules of ours that one imports, also inside its functions.

    Who takes a module from a package needs that module, not the package that re-exports others.
    """
    names_above = name.startswith(NAMES_TYPES_ABOVE)
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in statements(tree, leave_out=_is_for_types if names_above else None):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        module = module_of(node, MODULES[name])
        for alias in node.names:
            taken = f"{module}.{alias.name}"
            found.add(taken if taken in MODULES else module)
    return found.intersection(MODULES) - {name}


def test_no_two_modules_need_each_other() -> None:
    """Imports between our modules make no circle, those in functions and for type checkers too."""
    needs = {name: needed_by(name) for name in MODULES}
    assert set(graphlib.TopologicalSorter(needs).static_order()) == set(MODULES)


def test_nobody_imports_the_folder_by_its_bare_name() -> None:
    """`import strategies` works in a checkout and in no wheel, so nothing may do it."""
    files = [*MODULES.values(), *TESTS.rglob("*.py"), PACKAGE.parent / "conftest.py"]
    for path in files:
        if path.exists():
            assert "strategies" not in roots(imported(path, top_only=False)), path


def test_the_package_begins_with_re_exports_only() -> None:
    """The package's own file holds imports and the list of names, and nothing that runs."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kinds = {type(node) for node in tree.body}
    assert kinds == {ast.Expr, ast.ImportFrom, ast.Assign}


def test_the_name_of_the_agent_has_one_home() -> None:
    """No module but that of outcomes writes it down; they are data, and agents may import them."""
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "strategies").rglob("*.py")]
    homes = [
        str(file.relative_to(PACKAGE))
        for file in files
        if '"WIRE"' in file.read_text(encoding="utf-8")
    ]
    assert homes == ["outcomes.py"]
    assert Wire.name == outcomes.WIRE
