"""Which ranks come late to the end of a drawn program."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

#: Who comes late: nobody, one rank, all but one, or some.
Late: TypeAlias = Literal["", "one", "others", "some"]
#: Virtual seconds by which a rank comes late.
SECONDS = 30.0


def waits_of(late: Late, number: int, world_size: int) -> tuple[float, ...]:
    """For how long each rank waits before it shuts down.

    The number says which rank is late, or in time, or which of some are. With 0 that is the last.
    """
    ranks = range(world_size)
    special = world_size - 1 - number % world_size
    # Of some, neither nobody nor everybody is late. The lowest bit is of the last rank.
    bits = 1 + number % max(1, 2**world_size - 2)
    who: Mapping[Late, Collection[int]] = {
        "": (),
        "one": (special,),
        "others": {*ranks} - {special},
        "some": [rank for rank in ranks if bits >> (world_size - 1 - rank) & 1],
    }
    waits = [SECONDS if rank in who[late] else 0.0 for rank in ranks]
    while waits and not waits[-1]:
        waits.pop()
    return tuple(waits)
