"""Drives the steps of programs: each step at its rank, branches at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import LOOK_SECONDS, Diagnosis
from rpcprops.cluster._phases import Phase, Phases
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
    ) -> list[StepOutcome]:
        """See :meth:`rpcprops.Cluster.run_branches`."""
        done: list[StepOutcome] = []
        with self._phases.open("run", self._deadlines.run) as phase:
            awaited = {self._send_first(branch, contexts): branch for branch in branches}
            before: object = None
            since = time.monotonic()
            while awaited:
                arrived = self._take_steps(awaited, phase)
                for branch, outcome in arrived:
                    done.append(outcome)
                    if branch[1:] and goes_on(outcome):
                        awaited[self._send_first(branch[1:], contexts)] = branch[1:]
                if arrived:
                    since = time.monotonic()
                    continue
                number, ((index, step), *_) = next(iter(awaited.items()))
                if self._diagnosis.dead(phase, number):
                    break
                if not self._diagnosis.look(phase, LOOK_SECONDS) and self._diagnosis.found:
                    break
                moved = [
                    (c.counters, [*c.calls.items()], c.log.size()) for c in self._ranks.channels
                ]
                if moved != before:
                    before, since = moved, time.monotonic()
                stalled = time.monotonic() - since > self._deadlines.stalled
                if stalled or phase.left() <= 0:
                    complaint = f"does not end step {index}, {step!r}"
                    self._diagnosis.hung(phase, [self._channel_of(step)], complaint)
                    break
        done += [StepOutcome(branch[0][0], ended=False) for branch in awaited.values()]
        return sorted(done, key=lambda outcome: outcome.index)

    def _send_first(self, branch: Branch, contexts: Mapping[str, int]) -> int:
        """Send the first step of a branch to its rank; return the number of the answer."""
        index, step = branch[0]
        return self._ranks.send(self._channel_of(step), "step", index, step, dict(contexts))

    def _channel_of(self, step: Leaf) -> Channel:
        if isinstance(step, Settle):
            msg = "a Settle is no rank's step; call settle_to."
            raise HarnessError(msg)
        return self._ranks.channels[step.at]

    def _take_steps(
        self, awaited: dict[int, Branch], phase: Phase
    ) -> list[tuple[Branch, StepOutcome]]:
        """Wait a little; take branches whose first step ended from `awaited`, with its outcome."""
        self._ranks.pump(min(phase.left(), 0.25))
        arrived: list[tuple[Branch, StepOutcome]] = []
        for number, branch in list(awaited.items()):
            answers = self._channel_of(branch[0][1]).answers
            if number in answers:
                arrived.append((awaited.pop(number), answers.pop(number)[1]))
        return arrived
