"""Drives the steps of programs: each step at its rank, branches at the same time.

Of several branches at one rank, the first runs in the main thread of the rank, and each other one
in a thread of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import LOOK_SECONDS, Diagnosis
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.errors import HarnessError
from rpcprops.outcomes import StepOutcome
from rpcprops.programs import Leaf, Settle

#: Numbered steps that run one after another.
Branch = Sequence[tuple[int, Leaf]]


class Driver:
    """Drives the ranks of one world."""

    def __init__(
        self, ranks: Ranks, phases: Phases, diagnosis: Diagnosis, deadlines: Deadlines
    ) -> None:
        self._ranks = ranks
        self._phases = phases
        self._diagnosis = diagnosis
        self._deadlines = deadlines

    def run_branches(
        self,
        branches: Sequence[Branch],
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool],
        *,
        together: bool = False,
        stuck: Collection[int] = (),
    ) -> list[StepOutcome]:
        """See :meth:`rpcprops.Cluster.run_branches`."""
        with self._phases.open("run", self._deadlines.run) as phase:
            under_way = _UnderWay(self._ranks, contexts, goes_on, together=together)
            at: Counter[int] = Counter()
            for branch in branches:
                rank = branch[0][1].at
                under_way.send(branch, self._channel_of(branch[0][1]), at[rank])
                at[rank] += 1
            awaited = under_way.awaited
            before: object = None
            since = time.monotonic()
            while awaited:
                self._ranks.pump(min(phase.left(), 0.25))
                if under_way.take():
                    since = time.monotonic()
                    continue
                channel, _, ((index, step), *_) = next(iter(awaited.values()))
                if self._diagnosis.dead(phase):
                    break
                known = under_way.numbers() <= {*stuck}
                patience = self._deadlines.stuck if known else self._deadlines.stalled
                look_seconds = min(LOOK_SECONDS, patience)
                if not self._diagnosis.look(phase, look_seconds) and self._diagnosis.found:
                    break
                moved = [
                    (c.counters, [*c.calls.items()], c.log.size()) for c in self._ranks.channels
                ]
                if moved != before:
                    before, since = moved, time.monotonic()
                stalled = time.monotonic() - since > patience
                if stalled or phase.left() <= 0:
                    complaint = f"does not end step {index}, {step!r}"
                    self._diagnosis.hung(phase, [channel], complaint)
                    break
        return under_way.outcomes()

    def _channel_of(self, step: Leaf) -> Channel:
        if isinstance(step, Settle):
            msg = "a Settle is no rank's step; call settle_to."
            raise HarnessError(msg)
        return self._ranks.channels[step.at]


class _UnderWay:
    """The steps of branches that ranks run, and the outcomes of those that have ended.

    Attributes:
        awaited: by the number of the next answer, the rank, its thread, and what is left of the
            branch, from the step of that answer on.
    """

    def __init__(
        self,
        ranks: Ranks,
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool],
        *,
        together: bool,
    ) -> None:
        self.awaited: dict[int, tuple[Channel, int, Branch]] = {}
        self._done: list[StepOutcome] = []
        self._ranks = ranks
        self._contexts = dict(contexts)
        self._goes_on = goes_on
        self._together = together

    def send(self, branch: Branch, channel: Channel, thread: int) -> None:
        """Send the first step of a branch to its rank; with `together` all of them."""
        steps = branch if self._together else branch[:1]
        numbers = self._ranks.send_many(channel, "steps", steps, self._contexts, thread)
        for index, number in enumerate(numbers):
            self.awaited[number] = (channel, thread, branch[index:])

    def take(self) -> bool:
        """Take in the steps that have ended, and send what follows them; whether there were any."""
        arrived = [number for number, (at, _, _) in self.awaited.items() if number in at.answers]
        for number in arrived:
            channel, thread, branch = self.awaited.pop(number)
            outcome = channel.answers.pop(number)[1]
            self._done.append(outcome)
            if self._together:
                if outcome.error is None:
                    # The rank goes on by itself.
                    continue
                self.awaited.clear()
            if branch[1:] and self._goes_on(outcome):
                self.send(branch[1:], channel, thread)
        return bool(arrived)

    def numbers(self) -> set[int]:
        """The numbers of the steps that ranks run now, or will run without being asked again."""
        sent = slice(None if self._together else 1)
        return {index for _, _, branch in self.awaited.values() for index, _ in branch[sent]}

    def outcomes(self) -> list[StepOutcome]:
        """Those of all steps that were begun, in order."""
        left = [branch[0][0] for _, _, branch in self.awaited.values()]
        if self._together:
            # The rank has begun only the first of them.
            left = left[:1]
        done = [*self._done, *(StepOutcome(index, ended=False) for index in left)]
        return sorted(done, key=lambda outcome: outcome.index)
