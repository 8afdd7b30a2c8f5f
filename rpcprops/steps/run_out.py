"""Calls that each wait for the next one, until a rank has no thread left for them.

``tensorpipe_agent.cpp``: a request takes a thread of the rank that gets it
(``TensorPipeAgent::respond``), and so does the end of each call
(``TensorPipeAgent::markFutureAsComplete``, ``markFutureWithError``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOut:
    """Calls along a path, each made by the function before it, where a rank runs out of threads.

    The function of a rank starts if a thread is free there. It keeps that thread until its own call
    has ended, and that needs another thread of its rank. So where all threads of a rank wait, they
    wait for ever, and so does every function before them.

    Attributes:
        started: how many of the functions run, from the first one on.
        sent: how many of the calls are sent: the last one may never get a thread.
        stuck: the ranks all of whose threads wait.
        held: for each rank of the path, how many of these calls it serves for ever, and for how
            many it waits.
    """

    started: int
    sent: int
    stuck: frozenset[int]
    held: Mapping[int, tuple[int, int]]


def run_out(path: Sequence[int], number: int) -> RunOut | None:
    """What becomes of calls along a path of ranks with so many threads; None if all of them end."""
    waiting: Counter[int] = Counter()
    started = 0
    for place, rank in enumerate(path, 1):
        if waiting[rank] >= number:
            break
        started = place
        waiting[rank] += place < len(path)
    stuck = frozenset(rank for rank, threads in waiting.items() if threads >= number)
    if not stuck:
        return None
    last = served = started
    if started < len(path):
        served += 1
    else:
        # The last function has answered, and so have those before it whose rank has a thread left.
        last -= 1
        while path[last - 1] not in stuck:
            last -= 1
        served = last
    serves, waits = Counter(path[:served]), Counter(path[:last])
    held = {rank: (serves[rank], waits[rank]) for rank in path}
    return RunOut(started, min(started + 1, len(path)), stuck, held)
