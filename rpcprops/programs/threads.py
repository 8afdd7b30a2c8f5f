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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpcprops.programs.scope import Scope
from rpcprops.steps import Settle, Step

if TYPE_CHECKING:
    from rpcprops.programs._program import Program

#: The threads of each rank where a program asks for none. They suffice for every step of ours, and
#: where there are so many, the steps of a program do not have to wait for a free one.
ENOUGH_THREADS = 8


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
            sleeping.update(leaf.sleeps_at)
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
    return leaf.lasts * max(1, len(leaf.sleeps_at)) if leaf.lasts else 0.0


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
    if not any(leaf.is_patient for leaf in leaves):
        return 1
    waiting = _waiting(world_size, steps, timed=timed)
    most = [ranks[x.to] for x, ranks in zip(leaves, waiting, strict=True) if x.is_patient]
    return 1 + max(most, default=0)


def runs_out(leaf: Step, number: int) -> bool:
    """Whether a step needs more threads of a rank than so many, and the oracle says what follows.

    With 0 it does not.
    """
    return bool(number) and leaf.runs_out(number)


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
                counts = also_patient or not leaf.is_patient
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
    waits = leaf.waits_at(lambda name: scope.handles[name].owner)
    if waits is None:
        # Nobody has counted.
        return Counter(dict.fromkeys(range(scope.world_size), ENOUGH_THREADS - 1))
    return Counter(waits)


def _may_stay(leaf: Step) -> bool:
    """Whether its functions may still wait when the step has ended."""
    is_timed = getattr(leaf, "timeout", None) is not None
    return is_timed or leaf.op == "remote" or bool(getattr(leaf, "out", ""))
