"""How many threads of their agents the ranks need for the steps of a program.

An agent of torch has ``num_worker_threads`` threads (``tensorpipe_agent.cpp``: ``threadPool_``).
They run each request that comes to the rank, of whatever type (``TensorPipeAgent::respond``), and
the end of each call that the rank has made: its answer, its failure and its timeout
(``TensorPipeAgent::markFutureAsComplete``, ``markFutureWithError``), with the callbacks of its
future. A send that torch's faulty agent fails ends in the thread that sends
(``testing/faulty_tensorpipe_agent.cpp``: ``FaultyTensorPipeAgent::send``).

Most of that waits for nothing. A request whose RRefs are not confirmed, a fetch of a value that is
not made, an `async_execution` function and a part of a backward pass give their thread back, and
answer by a callback (``request_callback_no_python.cpp``: ``processMessage``, ``retrieveOwnerRRef``,
``processBackwardAutogradReq``; ``request_callback_impl.cpp``: ``runPythonFunction``). A thread
waits only where a called function waits itself: for a nested call, or for the value of an RRef
(``to_here``, ``local_value``). While one thread of each rank does not wait, all that waits comes to
its end. So a rank needs one thread more than may wait there at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpcprops.programs.scope import Scope
from rpcprops.steps import Settle, Step
from rpcprops.steps.run_out import run_out
from rpcprops.steps.values import SORTS

if TYPE_CHECKING:
    from rpcprops.programs._program import Program

#: The threads of each rank where a program asks for none. They suffice for every step of ours, and
#: where there are so many, the steps of a program do not have to wait for a free one.
ENOUGH_THREADS = 8
#: Fields of a step that name ranks where its functions run.
_RANKS = ("to", "via", "then", "path", "targets")

#: The owner of a handle, by the handle's name.
_OwnerOf = Callable[[str], int]


def _none(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """Its functions wait for nothing."""
    return ()


def _argument(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The function fetches its argument if that is an RRef."""
    return (step.to,) if isinstance(step.right, str) else ()


def _value(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The owner's function asks for the value of the handle, which may still be made."""
    return (owner_of(step.handle),)


def _there(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """One function after the other asks at `to` for a value that was made there."""
    return (step.to,)


def _path(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """Each rank of the path but the last waits for the next one."""
    return tuple(step.path[:-1])


def _context(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The owner of the root runs the whole pass (``processRRefBackward``) in one thread."""
    root = (step.root,) if step.root is not None and step.backward else ()
    # A call that times out, and the one that waits until its function has begun.
    late = () if step.late is None else (step.path[step.late],) * 2
    return (*(_path(step, owner_of) if step.nested else ()), *root, *late)


def _proxy(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """``rref.rpc_sync()`` asks for the type of the value, and then calls its method."""
    return (step.to,) if "proxy" in step.how else ()


def _after(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The method of a proxy asks for its object."""
    return (step.to,) if step.of == "proxy" else ()


def _gather(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    return [target for target, of in step.calls if of == "proxy"]


def _deferred(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """With `again` the callback of a call makes a further one, and waits for it."""
    return (step.to,) if step.form == "again" else _proxy(step, owner_of)


def _scripted(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """A future gives the thread back (``interpreter.cpp``: WAIT); the other calls wait."""
    return (step.to,) if step.form in ("sync", "remote") else ()


def _carry(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The function fetches the value through its RRef, or an RRef that is in its argument."""
    holds_rref = SORTS[step.sort].rrefs and step.way in ("echo", "async")
    return (step.to,) if step.way == "own" or holds_rref else ()


def _graph(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The homes of leaves give their gradients, and a proxy its method, one after the other.

    A function that is late sleeps, and another one waits for that.
    """
    homes = [home for home, _ in step.inputs if home != step.at]
    proxies = [rank for _, _, rank, how in step.operations if how.startswith("proxy")]
    late = () if step.late is None else (step.late[0],) * 2
    return [*sorted({*homes, *proxies}) * (2 if step.beside else 1), *late]


def _unreached(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """As a function of a graph that is late."""
    return (step.to,) * 2 if step.by == "timeout" else ()


def _profile(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    return (step.to,) if step.form == "nested" else ()


def _owners(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    """The optimizer of each owner asks for its parameters, one after the other."""
    return tuple(dict.fromkeys(step.owners))


def _onward(step: Any, owner_of: _OwnerOf) -> Iterable[int]:
    to: int = step.to
    return [to] * int(step.calls)


#: For each kind of step the ranks where a thread may wait for it, named once for each thread that
#: may wait there at the same time. A kind that is not named here may need any number.
_WAITING: Mapping[str, Callable[[Any, _OwnerOf], Iterable[int]]] = {
    **dict.fromkeys(("wait", "count", "chain", "own", "share", "fetch", "local", "nest"), _none),
    **dict.fromkeys(("drop", "refused", "pause", "settle", "raising", "reach"), _none),
    **dict.fromkeys(("ask", "fail_twice"), _none),
    **dict.fromkeys(("call", "remote"), _argument),
    **dict.fromkeys(("through", "bump"), _value),
    **dict.fromkeys(("module", "linear", "method"), _there),
    **dict.fromkeys(("optimize", "train"), _owners),
    "after": _after,
    "gather": _gather,
    "recurse": _path,
    "context": _context,
    "invoke": _proxy,
    "default": _proxy,
    "deferred": _deferred,
    "scripted": _scripted,
    "carry": _carry,
    "graph": _graph,
    "unreached": _unreached,
    "profile": _profile,
    "onward": _onward,
}
#: Kinds whose threads wait no longer than the step says, so that a program may do without.
_PATIENT = ("onward",)


#: Kinds of which it is predicted what becomes of their calls where a rank has too few threads.
_RUNS_OUT = ("recurse",)


@dataclass(frozen=True, slots=True)
class Threads:
    """The threads of a program's ranks, and what may keep them busy.

    Attributes:
        number: the threads of each rank.
        waiting: for each leaf of the program, the threads that may wait at each rank while it runs.
        beside: for each leaf, how many run at the same time, with itself.
        sleeping: for each rank, how many functions of the program sleep there.
        lasts: virtual seconds that these sleep at most, one after the other.
    """

    number: int
    waiting: tuple[Mapping[int, int], ...]
    beside: tuple[int, ...]
    sleeping: Mapping[int, int]
    lasts: float

    @property
    def are_few(self) -> bool:
        """Whether something may have to wait for a free thread."""
        return self.number < ENOUGH_THREADS

    def left(self, leaf: int, rank: int) -> int:
        """The threads of a rank that wait for nothing while that leaf runs."""
        return self.number - self.waiting[leaf].get(rank, 0)


def threads_of(program: Program) -> Threads:
    """The threads of the program's ranks, and what may keep them busy."""
    sleeping: Counter[int] = Counter()
    for leaf in program.leaves:
        if leaf.lasts:
            sleeping.update(_ranks_of(leaf))
    lasts = sum(map(busy_seconds, program.leaves))
    return Threads(
        program.num_worker_threads or ENOUGH_THREADS,
        tuple(_waiting(program.world_size, program.steps, timed=program.rpc_timeout is not None)),
        tuple(len(step.leaves) for step in program.steps for _ in step.leaves),
        sleeping,
        lasts,
    )


def busy_seconds(leaf: Step) -> float:
    """Virtual seconds for which its functions sleep, one after the other."""
    return leaf.lasts * max(1, len(_ranks_of(leaf))) if leaf.lasts else 0.0


def _ranks_of(leaf: Step) -> list[int]:
    ranks = [rank for name in _RANKS for rank in _ranks(leaf, name)]
    if leaf.op == "carry" and SORTS[getattr(leaf, "sort", "")].slow == "unpickled":
        # A thread of the caller's unpickles the answer (python_functions.cpp: toPyJitFuture).
        ranks += _ranks(leaf, "at")
    return ranks


def needed_threads(
    world_size: int,
    steps: Iterable[Step],
    *,
    timed: bool,
    also_patient: bool = True,
    runs_out_at: int = 0,
) -> int:
    """The fewest threads of each rank with which all steps of a program come to their end.

    Args:
        world_size: the ranks of the program.
        steps: its steps.
        timed: whether it has a default timeout.
        also_patient: whether steps count whose threads wait for a given time only.
        runs_out_at: a number of threads with which steps do not count that have too few of them
            all alone, if it is known what becomes of their calls.
    """
    waiting = _waiting(
        world_size, steps, timed=timed, also_patient=also_patient, runs_out_at=runs_out_at
    )
    return 1 + max((number for ranks in waiting for number in ranks.values()), default=0)


def patient_threads(world_size: int, steps: Iterable[Step], *, timed: bool) -> int:
    """The fewest threads of each rank with which no step waits in vain that waits for a given time.

    The arguments are those of :func:`needed_threads`.
    """
    steps = tuple(steps)
    leaves: list[Any] = [leaf for step in steps for branch in step.at_once for leaf in branch]
    if all(leaf.op not in _PATIENT for leaf in leaves):
        return 1
    waiting = _waiting(world_size, steps, timed=timed)
    most = [ranks[x.to] for x, ranks in zip(leaves, waiting, strict=True) if x.op in _PATIENT]
    return 1 + max(most, default=0)


def runs_out(leaf: Step, number: int) -> bool:
    """Whether a step needs more threads of a rank than so many, and the oracle says what follows.

    With 0 it does not.
    """
    if not number or leaf.op not in _RUNS_OUT:
        return False
    return run_out(_ranks(leaf, "path"), number) is not None


def _ranks(leaf: Step, name: str) -> tuple[int, ...]:
    value = getattr(leaf, name, ())
    return (value,) if isinstance(value, int) else value


def _waiting(
    world_size: int,
    steps: Iterable[Step],
    *,
    timed: bool,
    also_patient: bool = True,
    runs_out_at: int = 0,
) -> list[Mapping[int, int]]:
    """For each leaf, the threads that may wait at each rank while it runs."""
    scope = Scope(world_size)
    #: Threads whose calls nobody waits for any more, until a settle.
    left: Counter[int] = Counter()
    found: list[Mapping[int, int]] = []
    for step in steps:
        if isinstance(step, Settle):
            left.clear()
        most = Counter(left)
        after = Counter(left)
        for branch in step.at_once:
            stays: Counter[int] = Counter()
            own: Counter[int] = Counter()
            for leaf in branch:
                counts = also_patient or leaf.op not in _PATIENT
                counts = counts and not runs_out(leaf, runs_out_at)
                waits = _of_step(leaf, scope) if counts else Counter[int]()
                own |= stays + waits
                if timed or _may_stay(leaf):
                    stays += waits
                scope.add(leaf)
            most += own
            after += stays
        left = after
        found += [most] * len(step.leaves)
    return found


def _of_step(leaf: Step, scope: Scope) -> Counter[int]:
    waits = _WAITING.get(leaf.op)
    if waits is None:
        # Nobody has counted.
        return Counter(dict.fromkeys(range(scope.world_size), ENOUGH_THREADS - 1))
    return Counter(waits(leaf, lambda name: scope.handles[name].owner))


def _may_stay(leaf: Step) -> bool:
    """Whether its functions may still wait when the step has ended."""
    is_timed = getattr(leaf, "timeout", None) is not None
    return is_timed or leaf.op == "remote" or bool(getattr(leaf, "out", ""))
