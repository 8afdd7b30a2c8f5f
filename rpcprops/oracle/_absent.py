"""What comes of ranks that leave a static world while others are still in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rpcprops.faults import MessageType


@dataclass(slots=True)
class Absent:
    """What the ranks of a program remember of those that have left before them.

    Attributes:
        gatherings: how often each rank has begun to meet the others, in a shutdown after which it
            came back.
        tries_in_vain: ranks, and the messages that they have tried to send to one that is gone:
            nobody can tell how often.
    """

    gatherings: Counter[int] = field(default_factory=Counter)
    tries_in_vain: set[tuple[int, MessageType]] = field(default_factory=set)

    def apart(self, ranks: Iterable[int]) -> bool:
        """Whether the ranks have begun to meet differently often.

        ``torch/distributed/rpc/api.py``: ``_all_gather`` counts that in
        ``_all_gather_sequence_id``, by the names of the ranks, and neither a shutdown nor an init
        begins anew. So who has counted further than the others waits for calls that never come, and
        so do they.
        """
        return len({self.gatherings[rank] for rank in ranks}) > 1
