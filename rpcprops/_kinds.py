"""What can fail and be run again: one protocol, and where each kind that keeps it lives.

Files name a kind by its tag (``Artefact.kind``, ``Case.kind``). Whoever must know how kinds differ
asks the kind. Another kind is a class, and a line in the table here. Kinds stand higher than some
who ask for them, so each is loaded when it is first asked for.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rpcprops.errors import UsageError, is_promise

if TYPE_CHECKING:
    from pathlib import Path

    from rpcprops._replay import Replay
    from rpcprops.faults import FaultPlan
    from rpcprops.outcomes import Outcome
    from rpcprops.programs import Program
    from rpcprops.properties import Case, Observation
    from rpcprops.report.artefact import Artefact
    from rpcprops.runner import Runner

_HOMES = {
    "program": "rpcprops.properties._base:OfProgram",
    "reinit": "rpcprops.properties._reinit:OfReinitialised",
    "upstream": "rpcprops.upstream._ranks:OfPyTorch",
    "pytest": "rpcprops._users_test:OfUser",
}


@dataclass(frozen=True)
class Again:
    """How an artefact is to be replayed.

    Attributes:
        file: where it lies.
        clock: as for ``--clock``.
        runner: gives a runner by that clock, always the same one.
    """

    file: Path
    times: int
    clock: str
    runner: Callable[[], Runner]


class Kind:
    """What an artefact is of. Unless it says otherwise, it has a program.

    What our ranks run derives from :class:`rpcprops._replay.OfRanks`.

    Attributes:
        tag: its name in files.
        by_pytest: pytest runs it: an example makes as many clusters as it likes, and paths resolve
            where pytest ran.
        reinit: its ranks have shut RPC down once and initialised it again.
        findings: the known findings that it meets, whatever its program is.
        foreword: lines before all others about its failure.
        test: the body of a regression test, with the test's {name} and the {transport} as an
            argument; empty where what fails is a test, which is code already.
        test_imports: what that body needs.
    """

    tag: str
    by_pytest: ClassVar[bool] = False
    reinit: ClassVar[bool] = False
    findings: ClassVar[frozenset[str]] = frozenset()
    foreword: ClassVar[tuple[str, ...]] = ()
    test: ClassVar[str] = ""
    test_imports: ClassVar[tuple[str, ...]] = ()

    # A case of it, and a cluster.

    def run(self, runner: Runner, case: Case, *, anew: bool, **options: Any) -> Outcome:
        """The outcome of a case's program; a remembered one unless `anew`."""
        run = runner.run_anew if anew else runner.run
        return run(case.program, case.plan, **options)

    def describe(self, name: str, program: Program | None) -> list[str]:
        """What ran, in lines."""
        head, *rest = repr(program).splitlines()
        return [f"program  {head}", *(f"         {line}" for line in rest)]

    def in_cluster(self, *, init: bool) -> Kind:
        """The kind of what a cluster runs whose ranks begin with ``init_rpc``, or do not."""
        return self

    # Its artefact.

    def may_break(self, promise: str) -> bool:
        """Whether an artefact of it can hold that promise."""
        return is_promise(promise)

    def check(self, artefact: Artefact) -> None:
        """Raises:
        UsageError: an artefact of it cannot hold that.
        """
        if artefact.program is None or len(artefact.plans) != 1:
            msg = "a program's artefact holds one program and one plan"
            raise UsageError(msg)

    # Its replay.

    def notes(self, artefact: Artefact, again: Again) -> list[str]:
        """What a reader must know before it is replayed.

        Raises:
            UsageError: it cannot be replayed here.
        """
        return []

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """What runs it once more under a plan and judges it; called with options of a run."""
        raise NotImplementedError

    def replay(
        self,
        artefact: Artefact,
        again: Again,
        without: Sequence[str] = (),
        on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    ) -> Replay:
        """Run it again, without the faults of those names; `on_run` is told of each run."""
        raise NotImplementedError

    def told(self, result: Replay) -> str:
        """What a replay showed, on a line."""
        return str(result)


@functools.cache
def kind_of(tag: str) -> Kind:
    """The kind of that tag.

    Raises:
        UsageError: there is none.
    """
    if tag not in _HOMES:
        msg = f"unknown kind {tag!r}"
        raise UsageError(msg)
    kind: Kind = pkgutil.resolve_name(_HOMES[tag])()
    kind.tag = tag
    return kind
