"""Drives the steps of programs: each step at its rank, branches at the same time.

Of several branches at one rank, the first runs in the main thread of the rank, and each other one
in a thread of its own.
"""

from __future__ import annotations

import time
from collections import Counter
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
        *,
        together: bool = False,
    ) -> list[StepOutcome]:
        """See :meth:`rpcprops.Cluster.run_branches`."""
        done: list[StepOutcome] = []
        with self._phases.open("run", self._deadlines.run) as phase:
            at: Counter[int] = Counter()
            awaited: dict[int, tuple[int, Branch]] = {}

            def send(branch: Branch, thread: int) -> None:
                steps = branch if together else branch[:1]
                for index, number in enumerate(self._send_steps(steps, contexts, thread)):
                    awaited[number] = (thread, branch[index:])

            for branch in branches:
                rank = branch[0][1].at
                send(branch, at[rank])
                at[rank] += 1
            before: object = None
            since = time.monotonic()
            while awaited:
                arrived = self._take_steps(awaited, phase)
                for thread, branch, outcome in arrived:
                    done.append(outcome)
                    if together and outcome.error is not None:
                        # Its rank runs no further step by itself.
                        awaited.clear()
                    if branch[1:] and (not together or outcome.error) and goes_on(outcome):
                        send(branch[1:], thread)
                if arrived:
                    since = time.monotonic()
                    continue
                number, (_, ((index, step), *_)) = next(iter(awaited.items()))
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
        left = [branch[0][0] for _, branch in awaited.values()]
        # Of steps that were sent together, only the first that is left had begun.
        done += [StepOutcome(index, ended=False) for index in (left[:1] if together else left)]
        return sorted(done, key=lambda outcome: outcome.index)

    def _send_steps(
        self, steps: Branch, contexts: Mapping[str, int], thread: int
    ) -> Sequence[int]:
        """Send a rank steps to run one after another; return the numbers of the answers.

        After a step that raises it runs no further one.
        """
        channel = self._channel_of(steps[0][1])
        return self._ranks.send_many(channel, "steps", steps, dict(contexts), thread)

    def _channel_of(self, step: Leaf) -> Channel:
        if isinstance(step, Settle):
            msg = "a Settle is no rank's step; call settle_to."
            raise HarnessError(msg)
        return self._ranks.channels[step.at]

    def _take_steps(
        self, awaited: dict[int, tuple[int, Branch]], phase: Phase
    ) -> list[tuple[int, Branch, StepOutcome]]:
        """Wait a little; take branches whose first step ended from `awaited`, with its outcome."""
        self._ranks.pump(min(phase.left(), 0.25))
        arrived: list[tuple[int, Branch, StepOutcome]] = []
        for number, (thread, branch) in list(awaited.items()):
            answers = self._channel_of(branch[0][1]).answers
            if number in answers:
                del awaited[number]
                arrived.append((thread, branch, answers.pop(number)[1]))
        return arrived
