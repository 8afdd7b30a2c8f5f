"""Programs as data: what the ranks do, step by step, over named handles.

A :class:`Program` runs on real ranks (:func:`rpcprops.run`) and is understood by the oracle, which
predicts each step's value, the messages it sends, and what every rank holds once settled. Steps
run one after the other, each at the rank it names.

A *handle* is an RRef under a name. It lives at one rank: the rank that created it, or the rank that
it was shared with. Values are tuples of floats; in the ranks they are float64 tensors.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

from rpcprops.errors import UsageError

Value: TypeAlias = tuple[float, ...]
#: An argument of a call: a value, or the name of a handle that lives at the calling rank.
Argument: TypeAlias = Value | str
Flavour: TypeAlias = Literal["python", "builtin", "script"]

MAX_WORLD_SIZE = 16


@dataclass(frozen=True, slots=True)
class Remote:
    """``rpc.remote``: `to` computes ``left + right`` and owns it; `at` gets the handle `out`.

    `flavour` says what runs there: a Python function, the builtin ``torch.add``, or a TorchScript
    function. A handle as `right` is fetched at `to` (Python only).
    """

    op: ClassVar[str] = "remote"
    at: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"


@dataclass(frozen=True, slots=True)
class Own:
    """``RRef(value)``: `at` owns the value itself and keeps the handle `out`."""

    op: ClassVar[str] = "own"
    at: int
    out: str
    value: Value = (1.0,)


@dataclass(frozen=True, slots=True)
class Share:
    """Send a handle of `at` as an argument to `to`, which keeps it under the name `out`."""

    op: ClassVar[str] = "share"
    at: int
    handle: str
    to: int
    out: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """``to_here``: copy the value of a handle to the rank where the handle lives."""

    op: ClassVar[str] = "fetch"
    at: int
    handle: str


@dataclass(frozen=True, slots=True)
class Call:
    """``rpc_sync`` (or ``rpc_async`` and ``wait``): `to` computes ``left + right`` for `at`.

    `timeout` is the call's RPC timeout in virtual seconds; None leaves the cluster's, far away.
    """

    op: ClassVar[str] = "call"
    at: int
    to: int
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"
    wait: Literal["sync", "async"] = "sync"
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Bump:
    """Add one to a handle's tensor in place, by a TorchScript function on its owner.

    Not idempotent: a call that ran twice shows in the next fetch. TorchScript must know the type of
    the handle's value, so a handle that a Python function's ``remote`` made cannot be bumped.
    """

    op: ClassVar[str] = "bump"
    at: int
    handle: str


@dataclass(frozen=True, slots=True)
class Nest:
    """`at` asks `via`, which itself calls ``rpc.remote`` on `to` and returns the handle to `at`."""

    op: ClassVar[str] = "nest"
    at: int
    via: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Value = (2.0,)
    flavour: Flavour = "python"


@dataclass(frozen=True, slots=True)
class Drop:
    """Let go of a handle and collect garbage at its rank."""

    op: ClassVar[str] = "drop"
    at: int
    handle: str


@dataclass(frozen=True, slots=True)
class Context:
    """A ``dist_autograd.context()`` at `at`, sending a tensor through the ranks of `path`.

    The tensor starts as `value` (a leaf that requires a gradient), is squared at `at`, and each
    rank ``r`` of the path maps it to ``(r + 2) * x + 1``. The step's value is the loss (the sum)
    and, with `backward`, the gradient of the leaf.

    Args:
        name: names the context for :class:`Refused`.
        nested: each rank calls the next one itself, instead of `at` calling them in turn.
        rrefs: each hop is ``rpc.remote`` and a fetch instead of ``rpc_sync``.
        backward: run ``dist_autograd.backward`` and read the gradients.
        raises: leave the ``with`` block by an exception, after all of that.
    """

    op: ClassVar[str] = "context"
    at: int
    name: str
    path: tuple[int, ...] = ()
    value: Value = (1.0, 2.0)
    nested: bool = False
    rrefs: bool = False
    backward: bool = True
    raises: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Ask `at` for a context that has ended: its id must be refused. Settle first."""

    op: ClassVar[str] = "refused"
    at: int
    context: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until every rank holds exactly what the handles that are alive account for."""

    op: ClassVar[str] = "settle"


Step: TypeAlias = (
    Remote | Own | Share | Fetch | Call | Bump | Nest | Drop | Context | Refused | Settle
)
STEP_TYPES: dict[str, type[Any]] = {
    cls.op: cls
    for cls in (Remote, Own, Share, Fetch, Call, Bump, Nest, Drop, Context, Refused, Settle)
}


@dataclass(frozen=True, slots=True)
class Program:
    """Steps over `world_size` ranks. The last step is followed by a settle and a graceful shutdown,
    unless `settles` is false: then shutdown comes straight after the last step, and must itself
    clean up what is left.

    Raises:
        UsageError: a step names a rank outside the world, or a handle or context that does not
            exist (any more) at its rank.
    """

    world_size: int
    steps: tuple[Step, ...] = ()
    name: str = ""
    settles: bool = True

    def __post_init__(self) -> None:
        check_world_size(self.world_size)
        object.__setattr__(self, "steps", tuple(self.steps))
        _Checker(self).check()

    def __repr__(self) -> str:
        rest: list[str] = []
        if self.name:
            rest.append(f"name={self.name!r}")
        if not self.settles:
            rest.append("settles=False")
        if not self.steps:
            return f"Program({', '.join([str(self.world_size), *rest])})"
        steps = ["(", *(f"    {step!r}," for step in self.steps), "),"]
        lines = [f"{self.world_size},", *steps, *(f"{item}," for item in rest)]
        return "\n".join(["Program(", *(f"    {line}" for line in lines), ")"])


def check_world_size(world_size: object) -> int:
    """`world_size` if it is an int in 1 to 16.

    Raises:
        UsageError: it is not.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        msg = f"world_size={world_size!r} (type {type(world_size).__name__}) must be an int."
        raise UsageError(msg)
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        msg = f"world_size={world_size!r} must lie in 1 to {MAX_WORLD_SIZE}."
        raise UsageError(msg)
    return world_size


class _Checker:
    """Walks the steps once and refuses the first that cannot be."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.homes: dict[str, int] = {}
        self.gone: set[str] = set()
        self.typed: dict[str, bool] = {}
        self.sizes: dict[str, int] = {}
        self.contexts: set[str] = set()

    def check(self) -> None:
        for index, step in enumerate(self.program.steps):
            try:
                self._step(step)
            except UsageError as error:
                msg = f"step {index}, {step!r}: {error}"
                raise UsageError(msg) from None

    def _step(self, step: Step) -> None:
        for item in fields(step):
            if item.name in ("at", "to", "via"):
                self._rank(item.name, getattr(step, item.name))
        match step:
            case Remote() | Nest():
                self._arguments(step)
                self._new(step.out, step.at, len(step.left), typed=step.flavour != "python")
            case Own():
                self._new(step.out, step.at, len(step.value), typed=True)
            case Share():
                self._alive(step.at, step.handle)
                size = self.sizes[step.handle]
                self._new(step.out, step.to, size, typed=self.typed[step.handle])
            case Fetch():
                self._alive(step.at, step.handle)
            case Call():
                self._arguments(step)
                _check_timeout(step.timeout)
            case Bump():
                self._alive(step.at, step.handle)
                if not self.typed[step.handle]:
                    msg = (
                        f"handle {step.handle!r} was made by a Python function, so TorchScript "
                        f"does not know its type; make it with flavour='builtin' or 'script'."
                    )
                    raise UsageError(msg)
            case Drop():
                self._alive(step.at, step.handle)
                self.gone.add(step.handle)
            case Context():
                for rank in step.path:
                    self._rank("path", rank)
                if step.name in self.contexts:
                    msg = f"the context name {step.name!r} is taken; names are used once."
                    raise UsageError(msg)
                self.contexts.add(step.name)
            case Refused():
                if step.context not in self.contexts:
                    msg = f"there is no context {step.context!r} before this step; make it first."
                    raise UsageError(msg)
            case Settle():
                pass

    def _rank(self, name: str, rank: object) -> None:
        size = self.program.world_size
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < size:
            msg = f"{name}={rank!r} is no rank of a world of {size} (0 to {size - 1})."
            raise UsageError(msg)

    def _new(self, name: str, home: int, size: int, *, typed: bool) -> None:
        if name in self.homes:
            msg = f"the handle name {name!r} is taken; names are used once."
            raise UsageError(msg)
        self.homes[name] = home
        self.typed[name] = typed
        self.sizes[name] = size

    def _alive(self, at: int, name: str) -> None:
        if name in self.gone:
            msg = f"handle {name!r} was dropped before; drop it after its last use."
            raise UsageError(msg)
        if name not in self.homes:
            msg = f"there is no handle {name!r} before this step; make it first."
            raise UsageError(msg)
        if self.homes[name] != at:
            msg = f"handle {name!r} lives at rank {self.homes[name]}, not at {at}; share it first."
            raise UsageError(msg)

    def _arguments(self, step: Remote | Call | Nest) -> None:
        if isinstance(step.right, str):
            self._alive(step.at, step.right)
            if step.flavour != "python":
                msg = (
                    f"only a Python function takes a handle as an argument, "
                    f"not a {step.flavour} one."
                )
                raise UsageError(msg)
        size = self.sizes[step.right] if isinstance(step.right, str) else len(step.right)
        if len(step.left) != size:
            msg = (
                f"left={step.left!r} and right={step.right!r} hold {len(step.left)} and {size} "
                f"numbers; give both the same length."
            )
            raise UsageError(msg)


def _check_timeout(timeout: object) -> None:
    if timeout is None:
        return
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:  # type: ignore[operator]
        msg = (
            f"timeout={timeout!r} must be a positive, finite number of virtual seconds, or None "
            f"for the cluster's."
        )
        raise UsageError(msg)
