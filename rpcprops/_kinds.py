"""The kinds of artefact: one protocol, and the module in which each kind is defined.

Files name a kind by its tag (``Artefact.kind``, ``Case.kind``). Code that depends on the kind asks
the kind's object. A new kind is a class, and a line in the table here. Some modules that ask for
kinds are in lower layers than the kinds, so each kind is loaded on first use.
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
    "unpredicted": "rpcprops.properties._unpredicted:OfUnpredicted",
    "upstream": "rpcprops.upstream._ranks:OfPyTorch",
    "pytest": "rpcprops._users_test:OfUser",
}


@dataclass(frozen=True)
class Again:
    """How to replay an artefact.

    Attributes:
        file: the artefact's file.
        clock: as for ``--clock``.
        runner: returns a runner with that clock, always the same one.
        agent: the name of an agent of the user's choice; None is that of the artefact.
    """

    file: Path
    times: int
    clock: str
    runner: Callable[[], Runner]
    agent: str | None = None


class Kind:
    """One kind of artefact. By default it has a program.

    Kinds that run on our ranks derive from :class:`rpcprops._replay.OfRanks`.

    Attributes:
        tag: its name in files.
        by_pytest: whether pytest runs it: then an example may make any number of clusters, and
            paths are relative to where pytest ran.
        reinit: whether its ranks have shut RPC down once and initialised it again.
        is_predicted: whether a run is compared with a prediction.
        findings: the known findings that it meets, whatever its program is.
        foreword: lines that come before all others about its failure.
        test: the body of a regression test, with the test's {name} and the {transport} as an
            argument; empty if the artefact is of a test, which is code already.
        test_imports: the import lines of that body.
    """

    tag: str
    by_pytest: ClassVar[bool] = False
    reinit: ClassVar[bool] = False
    is_predicted: ClassVar[bool] = True
    findings: ClassVar[frozenset[str]] = frozenset()
    foreword: ClassVar[tuple[str, ...]] = ()
    test: ClassVar[str] = ""
    test_imports: ClassVar[tuple[str, ...]] = ()

    # A case of this kind, and a cluster.

    def run(self, runner: Runner, case: Case, *, anew: bool, **options: Any) -> Outcome:
        """The outcome of a case's program; a remembered one unless `anew`."""
        run = runner.run_anew if anew else runner.run
        return run(case.program, case.plan, **options)

    def describe(self, name: str, program: Program | None) -> list[str]:
        """Lines that say what ran."""
        head, *rest = repr(program).splitlines()
        return [f"program  {head}", *(f"         {line}" for line in rest)]

    def in_cluster(self, *, init: bool) -> Kind:
        """The kind for a cluster, by whether its ranks begin with ``init_rpc``."""
        return self

    # An artefact of this kind.

    def may_break(self, promise: str) -> bool:
        """Whether an artefact of this kind can name that promise."""
        return is_promise(promise)

    def check(self, artefact: Artefact) -> None:
        """Raises:
        UsageError: an artefact of this kind cannot have that content.
        """
        if artefact.program is None or len(artefact.plans) != 1:
            msg = "a program's artefact holds one program and one plan"
            raise UsageError(msg)
        if artefact.after and artefact.kind != "program":
            msg = f"only a program runs after others in one world, not {artefact.kind!r}"
            raise UsageError(msg)

    # A replay of this kind.

    def notes(self, artefact: Artefact, again: Again) -> list[str]:
        """Lines that a reader must know before the replay.

        Raises:
            UsageError: the artefact cannot be replayed here.
        """
        return []

    def observer(
        self, runner: Runner, artefact: Artefact, plan: FaultPlan
    ) -> Callable[..., Observation]:
        """A function that runs it once more under a plan and judges it; takes options of a run."""
        raise NotImplementedError

    def replay(
        self,
        artefact: Artefact,
        again: Again,
        without: Sequence[str] = (),
        on_run: Callable[[int, tuple[str, ...]], None] | None = None,
    ) -> Replay:
        """Run it again, without the faults of those names; calls `on_run` for each run."""
        raise NotImplementedError

    def usual_times(self, artefact: Artefact) -> int:
        """How often it is replayed if nobody says how often."""
        return 3

    def told(self, result: Replay) -> str:
        """One line about what a replay showed."""
        return str(result)


@functools.cache
def kind_of(tag: str) -> Kind:
    """The kind with that tag.

    Raises:
        UsageError: there is no such kind.
    """
    if tag not in _HOMES:
        msg = f"unknown kind {tag!r}"
        raise UsageError(msg)
    kind: Kind = pkgutil.resolve_name(_HOMES[tag])()
    kind.tag = tag
    return kind
