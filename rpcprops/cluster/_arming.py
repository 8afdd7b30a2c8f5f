"""Faults for a part of a run: armed in the ranks of one world while they run, and disarmed again.

The control thread of each rank answers, so a change takes effect in a rank that runs a call, and
needs no RPC. It has taken effect in every rank before :meth:`Arming.during` goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rpcprops import agents
from rpcprops._given import argument
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import WorldOptions
from rpcprops.errors import BrokenPromise, MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import ArmedFaults

_COMPLAINT = "does not answer the control channel, which arms faults"
_GIVE_THEM = "give them to the cluster as faults=, which act as long as it lives"


class Arming:
    """The faults that are armed for parts of the run of one world.

    Attributes:
        problem: why faults cannot be armed here, with the remedy; empty if they can.
        left_out: names of faults that a replay leaves out (see :meth:`FaultPlan.without`).
    """

    def __init__(
        self,
        ranks: Ranks,
        phases: Phases,
        diagnosis: Diagnosis,
        deadlines: Deadlines,
        options: WorldOptions,
    ) -> None:
        self.problem = ""
        self.left_out: tuple[str, ...] = ()
        self._ranks = ranks
        self._phases = phases
        self._diagnosis = diagnosis
        self._deadlines = deadlines
        self._options = options
        self._began = time.monotonic()
        self._parts: list[ArmedFaults] = []
        #: The tables of each rank that may have struck a message so far.
        self._all = options.plan

    def start(self) -> None:
        """Count time from now on."""
        self._began = time.monotonic()

    @property
    def parts(self) -> tuple[ArmedFaults, ...]:
        """What was armed so far, and what that has done as far as the ranks have said."""
        return tuple(
            replace(
                armed,
                failed=tuple(_struck(channel, part)[0] for channel in self._ranks.channels),
                delayed=tuple(_struck(channel, part)[1] for channel in self._ranks.channels),
            )
            for part, armed in enumerate(self._parts)
        )

    @contextlib.contextmanager
    def during(self, faults: FaultTable | FaultPlan) -> Iterator[None]:
        """Arm faults as long as the block lasts; see :meth:`rpcprops.Cluster.faults`."""
        __tracebackhide__ = True
        plan = self._checked(faults)
        part = len(self._parts)
        self._parts.append(ArmedFaults(plan, self._now()))
        self._all = self._all.joined(plan)
        options = self._options
        size = len(options.names)
        self._deadlines.become(Deadlines.of(self._all, size, options.rate, options.deadline))
        self._change("arm", part, plan)
        try:
            yield
        except BaseException:
            # What the block has raised is what counts, and not that a rank died of it.
            with contextlib.suppress(BrokenPromise, UsageError):
                self._end(part, plan)
            raise
        self._end(part, plan)

    def _end(self, part: int, plan: FaultPlan) -> None:
        __tracebackhide__ = True
        if not self._phases.over and not self._diagnosis.found:
            self._change("disarm", part, plan)
            self._parts[part] = replace(self._parts[part], ends=self._now())

    def _now(self) -> float:
        """Virtual seconds since the cluster was started."""
        return (time.monotonic() - self._began) * self._options.rate

    def _checked(self, faults: FaultTable | FaultPlan) -> FaultPlan:
        options = self._options
        size = len(options.names)
        given: object = faults
        if not isinstance(given, FaultTable | FaultPlan):
            must_be = "a FaultTable (for every rank) or a FaultPlan"
            msg = f"{argument('faults', given)} must be {must_be}."
            raise UsageError(msg)
        plan = FaultPlan.of(faults)
        plan.check(size)
        if plan.others:
            msg = (
                f"others={plan.others!r} cannot be armed for a part of a run: such faults are "
                f"armed before their rank joins the world; {_GIVE_THEM}."
            )
            raise UsageError(msg)
        if options.shutdown_faults:
            msg = (
                "faults cannot be armed where the cluster runs a program that is judged, or has "
                f"shutdown_faults=True: there torch's agent alone decides what fails; {_GIVE_THEM}."
            )
            raise UsageError(msg)
        for rank in range(size):
            agents.named(options.agent).check(plan.table(rank))
        if self.problem:
            msg = f"faults cannot be armed while ranks run: {self.problem}; or {_GIVE_THEM}."
            raise MachineCannot(msg)
        return plan.without(self.left_out, size)

    def _change(self, kind: str, part: int, plan: FaultPlan) -> None:
        """Arm or disarm a part in every rank.

        Raises:
            RankDied, RankHung: a rank cannot answer.
            UsageError: the agent of a rank injects no faults.
        """
        __tracebackhide__ = True
        with self._phases.open("run", self._deadlines.look) as phase:
            number = self._ranks.send_to_all(kind, part, plan)
            answers = self._diagnosis.gather(phase, number, _COMPLAINT)
        if answers is None:
            self._diagnosis.found.raise_first()
        lacking: list[str] = []
        for channel, (_, (agent, *counts)) in zip(self._ranks.channels, answers or [], strict=True):
            channel.note_sends(*counts)
            if agent:
                lacking.append(f"{channel.name} runs the agent {agent}")
        if lacking:
            msg = (
                f"faults cannot act here: {', '.join(lacking)}, which injects none. Make the "
                f"options of init_rpc with rpcprops.fixture.for_this_rank().rpc_backend_options."
            )
            raise UsageError(msg)


def _struck(channel: Channel, part: int) -> tuple[Any, Any]:
    return channel.struck.get(part, ({}, {}))
