"""docs/coverage.md: which names of torch drawn programs use, and that none is passed over."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from rpcprops._coverage import (
    DOCUMENT,
    HARNESS_MODULES,
    Reached,
    drawn_names,
    kinds_using,
    main,
    needless,
    page,
    reached,
    rows,
)
from rpcprops._hunt import hunted
from rpcprops._uses import Uses, methods_used, uses_of, uses_of_modules
from rpcprops.clock.sends import REQUEST_NUMBERS
from rpcprops.faults import FaultPlan, MessageType
from rpcprops.programs import Ask, Program, Remote
from rpcprops.steps import STEP_TYPES, Pause, Step
from rpcprops.torch_facts import CounterKeys, Texts, release
from rpcprops.torch_facts.places import COUNTERS, REQUESTS, places_of_texts
from rpcprops.torch_facts.public import (
    HARNESS,
    NEEDS,
    NOT_YET,
    OUT_OF_SCOPE,
    RECEIVERS,
    UNCOUNTED_REQUESTS,
    PublicNames,
)

#: The release of torch with which the committed page was made: the one that CI uses.
MADE_WITH = (2, 13)
SECONDS = 100
REMOTE_MODULE = "torch.distributed.nn.RemoteModule"
_ASK = """
import json
from rpcprops._coverage import kinds_using, names_of_torch
found = names_of_torch(kinds_using())
print(json.dumps([found.version, found.names, found.aliases]))
"""


@pytest.fixture(scope="module", name="public")
def _public() -> PublicNames:
    """The public names of the installed torch, which another process imports."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    version, names, aliases = json.loads(done.stdout.splitlines()[-1])
    return PublicNames(version, tuple(names), aliases)


def made_with_this(public: PublicNames) -> None:
    """Skip where the page was made with another torch."""
    if release(public.version) != MADE_WITH:
        pytest.skip(
            f"the committed page is of torch {'.'.join(map(str, MADE_WITH))}, and this is torch "
            f"{public.version}, whose public names may differ"
        )


def test_every_public_name_of_torch_has_a_class(public: PublicNames) -> None:
    """Each is drawn, used by the harness, not drawn yet, or out of scope for a reason."""
    found = rows(public, drawn_names(kinds_using(), public))
    assert [row.name for row in found] == list(public.names)
    assert all(row.says for row in found if row.category != "not yet")
    assert {row.category for row in found} >= {"drawn", "harness", "out of scope"}


def test_no_name_is_listed_that_torch_lacks(public: PublicNames) -> None:
    """The tables name what exists; a pattern fits something."""
    listed = (*HARNESS, *NOT_YET, *NEEDS, *RECEIVERS, *OUT_OF_SCOPE)
    missing = [one for one in listed if not fnmatch.filter(public.names, one)]
    assert not missing
    assert not set(HARNESS) & {*NOT_YET, *OUT_OF_SCOPE}
    assert not set(NOT_YET) & set(OUT_OF_SCOPE)


def test_the_page_shows_every_name(public: PublicNames) -> None:
    """Up to its part on messages, docs/coverage.md is what the script makes."""
    made_with_this(public)
    made = page(public, kinds_using(), reached(1))
    text = DOCUMENT.read_text(encoding="utf-8")
    assert _names(text) == _names(made), "run python -m rpcprops._coverage"


def _names(text: str) -> list[str]:
    # The build (+cpu) is that of whoever made the page.
    found = text.partition("## Messages")[0].splitlines()
    return [line for line in found if "has made this page with" not in line]


@pytest.mark.nightly
def test_the_page_is_what_the_script_makes(public: PublicNames) -> None:
    """The whole of docs/coverage.md, with the messages and errors of the programs drawn for it."""
    made_with_this(public)
    made = page(public, kinds_using(), reached())
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.partition("## Messages")[2] == made.partition("## Messages")[2]


def test_a_name_in_no_class_is_refused() -> None:
    """A torch that has a public name more makes the script, and so the tests, fail."""
    name = "torch.futures.brand_new"
    with pytest.raises(KeyError, match="brand_new"):
        rows(PublicNames("", (name,), {}), {})
    (row,) = rows(PublicNames("", (name,), {}), {name: [Pause]})
    assert (row.category, row.says) == ("drawn", "`Pause`")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Toy(Step):
    """A kind of step that nobody runs."""

    op: ClassVar[str]
    at: int = 0


def test_a_new_kind_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its function uses decides, also under another name of torch's; a stale entry shows."""
    future, alias = "torch.futures.Future", "torch.futures.collect_all"
    for module in ("_coverage", "torch_facts.public"):
        not_yet = (f"{future}.then", alias, future)
        monkeypatch.setattr(f"rpcprops.{module}.NOT_YET", not_yet)
    public = PublicNames("", (f"{future}.then", alias, future), {"torch._x.collect": alias})
    uses = Uses(
        frozenset({"torch._x.collect", "torch.nobody"}),
        frozenset({("then", "rpc.rpc_async(to, add)")}),
    )
    found = drawn_names({_Toy: uses}, public)
    assert found == {alias: [_Toy], f"{future}.then": [_Toy]}
    assert needless(found) == [f"{future}.then", alias]
    says = {row.name: (row.category, row.says) for row in rows(public, found)}
    assert says[alias] == ("drawn", "`_Toy` (asked for)")
    assert says[future] == ("not yet", "")


def test_uses_are_read_through_helpers() -> None:
    """Decorators and functions that are passed on count; parameters and annotations do not."""
    uses = {op: uses_of("rpcprops.steps.in_rank.calls", op) for op in ("chain", "count")}
    assert "torch.distributed.rpc.functions.async_execution" in uses["chain"].dotted
    assert "torch.distributed.rpc.rpc_async" in uses["chain"].dotted
    # Its parameter is called `call`, as a function of that module is, which uses rpc_async.
    assert "torch.distributed.rpc.rpc_async" not in uses["count"].dotted
    bump = uses_of("rpcprops.steps.in_rank.rrefs", "bump")
    assert ("local_value", "rref") in bump.attributes
    assert "torch.distributed.rpc.RRef" not in bump.dotted
    context = uses_of("rpcprops.steps.in_rank.autograd", "context")
    assert "torch.distributed.autograd.get_gradients" in context.dotted
    assert uses_of("rpcprops.steps.in_rank.calls", "no_such_function") == Uses()
    assert uses_of("somebody.elses", "function") == Uses()


@pytest.mark.parametrize(
    ("attribute", "receiver", "names", "member", "counts"),
    [
        ("to_here", "rref", (), "torch.distributed.rpc.RRef.to_here", True),
        ("backward", "loss", (), "torch.distributed.rpc.RRef.backward", False),
        ("backward", "handle_of(handle)", (), "torch.distributed.rpc.RRef.backward", True),
        ("wait", "started_event", (), "torch.futures.Future.wait", False),
        ("wait", "futures.pop(name)", (), "torch.futures.Future.wait", True),
        ("requires_grad_", "tensor(x)", (), f"{REMOTE_MODULE}.requires_grad_", False),
        ("train", "remote", (), f"{REMOTE_MODULE}.train", True),
        ("step", "optimizer", (), "torch.distributed.optim.DistributedOptimizer.step", False),
        (
            "step",
            "optimizer",
            ("torch.distributed.optim.DistributedOptimizer",),
            "torch.distributed.optim.DistributedOptimizer.step",
            True,
        ),
    ],
)
def test_a_method_counts_where_its_name_is_clear(
    attribute: str, receiver: str, names: tuple[str, ...], member: str, *, counts: bool
) -> None:
    """A name that other objects have too needs more than the name."""
    uses = Uses(attributes=frozenset({(attribute, receiver)}))
    assert methods_used(uses, names, [member], NEEDS, RECEIVERS) == ({member} if counts else set())


@pytest.mark.parametrize("name", HARNESS)
def test_the_harness_uses_what_the_page_says(name: str) -> None:
    """Each such name stands in the source of what takes ranks through init_rpc and shutdown."""
    uses = uses_of_modules(HARNESS_MODULES)
    name = name.removesuffix(".*")
    last = name.rpartition(".")[2]
    held = {attribute for attribute, _ in uses.attributes} | uses.keywords
    assert name in uses.dotted or last in held


def test_every_request_of_torchs_is_told_of() -> None:
    """The oracle counts the ten that can fail; of each other one a name of torch is known."""
    assert set(REQUEST_NUMBERS.values()) == {*map(str, MessageType), *UNCOUNTED_REQUESTS}


def test_what_programs_reach_is_read_from_predictions() -> None:
    """A few drawn programs of each property send messages and meet texts; nothing runs."""
    seen = reached(6)
    assert seen.programs == len(hunted()) * 6
    assert MessageType.PYTHON_CALL in seen.senders
    assert seen.texts
    assert Remote in seen.counters["owners"]
    assert {"owners", "forks"} <= seen.kept
    assert set(seen.kinds) <= set(STEP_TYPES.values())


def test_a_text_behind_a_shown_class_is_met() -> None:
    """A step that shows the class of an error names the text that this error has."""
    program = Program(2, (Remote(0, 1, "a"), Ask(0, "a", "pickle"), Ask(0, "a", "owner")))
    seen = Reached()
    seen.add(program, FaultPlan())
    assert seen.behind == {"not_picklable": {Ask}}
    assert "not_picklable" in seen.texts


def test_each_message_counter_and_text_has_a_place_in_torchs_source() -> None:
    """The page names a file and a function beside each."""
    assert set(REQUESTS) == set(REQUEST_NUMBERS.values())
    assert set(COUNTERS) == set(CounterKeys().all)
    places = places_of_texts()
    assert set(places) == set(Texts.__dataclass_fields__)
    assert all(places.values())
    assert "PyRRef" in places["not_picklable"]


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("other", 2)])
def test_the_command_takes_no_arguments(
    argument: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one it says how it is used, and leaves the page alone."""
    page_of_none = tmp_path / "coverage.md"
    monkeypatch.setattr("rpcprops._coverage.DOCUMENT", page_of_none)
    with pytest.raises(SystemExit) as caught:
        main([argument])
    assert caught.value.code == code
    assert not page_of_none.exists()
