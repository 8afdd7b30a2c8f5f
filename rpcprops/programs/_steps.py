"""The steps of a program: what one rank does at a time, as data.

A *handle* is an RRef under a name. It lives at one rank: the rank that created it, or the rank that
it was shared with. A *future* is a call under way under a name. Values are tuples of floats; in the
ranks they are float64 tensors. Timeouts and pauses are virtual seconds.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

Value: TypeAlias = tuple[float, ...]
#: An argument of a call: a value, or the name of a handle that lives at the calling rank.
Argument: TypeAlias = Value | str
Flavour: TypeAlias = Literal["python", "builtin", "script"]


class _Shown:
    """Prints as the Python that makes it, without what has its default."""

    __slots__ = ()

    def __repr__(self) -> str:
        given: list[str] = []
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if item.default is MISSING or value != item.default:
                given.append(f"{item.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, slots=True, repr=False)
class Remote(_Shown):
    """``rpc.remote``: `to` computes ``left + right`` and owns it; `at` gets the handle `out`.

    `flavour` says what runs there: a Python function, the builtin ``torch.add``, or a TorchScript
    function. A handle as `right` is fetched at `to` (Python only). With `raises` the function
    raises instead (Python only), which shows when the handle is used. `timeout` is the creation's.
    """

    op: ClassVar[str] = "remote"
    at: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"
    raises: bool = False
    timeout: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Own(_Shown):
    """``RRef(value)``: `at` owns the value itself and keeps the handle `out`."""

    op: ClassVar[str] = "own"
    at: int
    out: str
    value: Value = (1.0,)


@dataclass(frozen=True, slots=True, repr=False)
class Share(_Shown):
    """Send a handle of `at` as an argument to `to`, which keeps it under the name `out`.

    `inside` nests it in a list or in a dict. After a share with a `timeout` the handle may arrive
    later than the step ends, so a settle must come before its first use.
    """

    op: ClassVar[str] = "share"
    at: int
    handle: str
    to: int
    out: str
    inside: Literal["", "list", "dict"] = ""
    timeout: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Fetch(_Shown):
    """``to_here``: copy the value of a handle to the rank where the handle lives."""

    op: ClassVar[str] = "fetch"
    at: int
    handle: str
    timeout: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Local(_Shown):
    """``local_value``: the value of a handle at the rank that owns it."""

    op: ClassVar[str] = "local"
    at: int
    handle: str


@dataclass(frozen=True, slots=True, repr=False)
class Call(_Shown):
    """``rpc_sync`` (or ``rpc_async`` and ``wait``): `to` computes ``left + right`` for `at`.

    With ``wait="later"`` the future is kept under the name `out` for a :class:`Wait`. With `raises`
    the function raises (Python and TorchScript). `timeout` is the call's RPC timeout in virtual
    seconds; None leaves the cluster's, far away.
    """

    op: ClassVar[str] = "call"
    at: int
    to: int
    left: Value = (1.0,)
    right: Argument = (2.0,)
    flavour: Flavour = "python"
    wait: Literal["sync", "async", "later"] = "sync"
    timeout: float | None = None
    out: str = ""
    raises: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Wait(_Shown):
    """Wait for the future of a :class:`Call` made with ``wait="later"``."""

    op: ClassVar[str] = "wait"
    at: int
    future: str


@dataclass(frozen=True, slots=True, repr=False)
class Count(_Shown):
    """Add one to a counter that `to` keeps, and give the new count. Not idempotent."""

    op: ClassVar[str] = "count"
    at: int
    to: int


@dataclass(frozen=True, slots=True, repr=False)
class Chain(_Shown):
    """Call an ``async_execution`` function of `to`, which calls `then` for ``left + right``."""

    op: ClassVar[str] = "chain"
    at: int
    to: int
    then: int
    left: Value = (1.0,)
    right: Value = (2.0,)


@dataclass(frozen=True, slots=True, repr=False)
class Through(_Shown):
    """A method through an RRef: ``rref.rpc_sync().add(addend)``, ``rpc_async`` or ``remote``.

    `how` says which; "remote" makes the handle `out` at `at`. The first such call asks the owner
    for the type of the value. `timeout` is for each of the messages.
    """

    op: ClassVar[str] = "through"
    at: int
    handle: str
    how: Literal["sync", "async", "remote"] = "sync"
    addend: float = 1.0
    out: str = ""
    timeout: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Bump(_Shown):
    """Add one to a handle's tensor in place, by a TorchScript function on its owner.

    Not idempotent: a call that ran twice shows in the next fetch. TorchScript must know the type of
    the handle's value, so a handle that a Python function's ``remote`` made cannot be bumped.
    """

    op: ClassVar[str] = "bump"
    at: int
    handle: str


@dataclass(frozen=True, slots=True, repr=False)
class Nest(_Shown):
    """`at` asks `via`, which itself calls ``rpc.remote`` on `to` and returns the handle to `at`."""

    op: ClassVar[str] = "nest"
    at: int
    via: int
    to: int
    out: str
    left: Value = (1.0,)
    right: Value = (2.0,)
    flavour: Flavour = "python"


@dataclass(frozen=True, slots=True, repr=False)
class Drop(_Shown):
    """Let go of a handle and collect garbage at its rank: by ``del``, or as a scope ends."""

    op: ClassVar[str] = "drop"
    at: int
    handle: str
    by: Literal["del", "scope"] = "del"


@dataclass(frozen=True, slots=True, repr=False)
class Context(_Shown):
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
        retain: run backward twice, the first time with ``retain_graph=True``; gradients add up.
        breaks: a rank of the path whose backward raises; the step then shows its error.
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
    retain: bool = False
    breaks: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Optimize(_Shown):
    """One step of a ``DistributedOptimizer`` (SGD, rate 0.25) on a parameter at each of `owners`.

    The loss is the sum of squares, so each element of `value` is halved. The step's value is a list
    with each owner's parameter, as its owner then holds it. `name` names the context.
    """

    op: ClassVar[str] = "optimize"
    at: int
    name: str
    owners: tuple[int, ...]
    value: Value = (1.0, 2.0)


@dataclass(frozen=True, slots=True, repr=False)
class Module(_Shown):
    """A ``RemoteModule`` at `to` that maps x to ``2 * x + 1``; called once with `value`."""

    op: ClassVar[str] = "module"
    at: int
    to: int
    value: Value = (1.0, 2.0)


@dataclass(frozen=True, slots=True, repr=False)
class Pause(_Shown):
    """Let `seconds` (virtual) pass at a rank."""

    op: ClassVar[str] = "pause"
    at: int
    seconds: float = 1.0


@dataclass(frozen=True, slots=True, repr=False)
class Refused(_Shown):
    """Ask `at` for a context that has ended: its id must be refused. Settle first."""

    op: ClassVar[str] = "refused"
    at: int
    context: str


@dataclass(frozen=True, slots=True, repr=False)
class Settle(_Shown):
    """Wait until every rank holds exactly what the handles that are alive account for."""

    op: ClassVar[str] = "settle"


#: A step that one rank runs, or a settle.
Leaf: TypeAlias = (
    Remote
    | Own
    | Share
    | Fetch
    | Local
    | Call
    | Wait
    | Count
    | Chain
    | Through
    | Bump
    | Nest
    | Drop
    | Context
    | Refused
    | Optimize
    | Module
    | Pause
    | Settle
)


@dataclass(frozen=True, slots=True, repr=False)
class Parallel(_Shown):
    """Branches that run at once, the steps of each in order and all at one rank of its own.

    Branches must not meet: what one makes the others cannot use; a counter, an RRef whose value a
    branch changes, and an RRef that a called function fetches belong to one branch.
    """

    op: ClassVar[str] = "parallel"
    branches: tuple[tuple[Leaf, ...], ...]

    def __post_init__(self) -> None:
        given: Any = self.branches
        if all(isinstance(part, list | tuple) for part in (given, *_parts(given))):
            given = tuple(tuple(branch) for branch in given)
        # What is no tuple of tuples is refused by the program, as every argument is.
        object.__setattr__(self, "branches", given)


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()


Step: TypeAlias = Leaf | Parallel
STEP_TYPES: dict[str, type[Any]] = {
    cls.op: cls
    for cls in (
        Remote,
        Own,
        Share,
        Fetch,
        Local,
        Call,
        Wait,
        Count,
        Chain,
        Through,
        Bump,
        Nest,
        Drop,
        Context,
        Refused,
        Optimize,
        Module,
        Pause,
        Settle,
        Parallel,
    )
}
