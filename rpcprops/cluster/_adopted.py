"""Programs that call ``init_rpc`` and ``rpc.shutdown`` themselves, as the test process sees them.

A rank that comes to one of the two calls says so and waits (:mod:`rpcprops.cluster.adoption`).
Once all ranks wait at the same call, this module lets them go on: at ``init_rpc``, after it has
compared what they ask for; at a graceful shutdown, after it has looked at what they hold, as it is
done before a shutdown of ours. If the ranks that do not wait run nothing any more, the others would
wait for ever, and that is reported at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from msgspec.structs import replace

from rpcprops._given import shown
from rpcprops.cluster import _functions
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster._shutdown import note_shutdown
from rpcprops.cluster._spec import Asked, RpcNews
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import WorldOptions
from rpcprops.errors import UsageError
from rpcprops.oracle.ranks import shutdown_violations, unsettled
from rpcprops.outcomes import Counters, Violation
from rpcprops.torch_facts import installed

#: The events of a rank that waits to be let go on.
_WAITS = ("init", "shutdown")
#: Real seconds between two looks at a rank that shuts down alone.
_LOOK_SECONDS = 0.005


class Adopted:
    """The use of RPC by the program of one world.

    Args:
        settle: waits until the ranks hold what is given, and keeps what they hold otherwise as
            violations.
    """

    def __init__(
        self,
        ranks: Ranks,
        phases: Phases,
        diagnosis: Diagnosis,
        deadlines: Deadlines,
        options: WorldOptions,
        settle: Callable[[Sequence[Counters]], object],
    ) -> None:
        self._ranks = ranks
        self._phases = phases
        self._diagnosis = diagnosis
        self._deadlines = deadlines
        self._options = options
        self._settle = settle
        self._is_on = options.init == "adopt"

    # What others ask.

    @property
    def is_due(self) -> bool:
        """Whether :meth:`attend` has something to do, if nobody but the ranks does anything."""
        return self._is_on and (
            any(channel.rpc_news for channel in self._ranks.channels)
            or self._all_wait_at() != ""
            or self._is_stuck()
        )

    @property
    def runs_everywhere(self) -> bool:
        """Whether all ranks have joined, and none has shut RPC down."""
        return all(channel.rpc.event == "joined" for channel in self._ranks.channels)

    def must_have_joined(self) -> None:
        """Raise if no rank has called ``init_rpc``: such a run shows nothing.

        Raises:
            UsageError: none has.
        """
        if self._is_on and not any(c.rpc.event for c in self._ranks.channels):
            msg = (
                "no rank has called init_rpc, which init='adopt' is for: call the program in all "
                "ranks, such as cluster.each_rank(run, world_size), or leave init out."
            )
            raise UsageError(msg)

    def not_waiting(self, channel: Channel) -> list[Channel]:
        """Whom a rank waits for: itself, or the ranks that have not come to the same call."""
        if channel.rpc.event not in _WAITS:
            return [channel]
        return [c for c in self._ranks.channels if c.rpc.event != channel.rpc.event] or [channel]

    def attend(self, *, nobody_calls: bool) -> None:
        """Do what the ranks wait for.

        Args:
            nobody_calls: whether this process waits itself, so that no rank is given another call.

        Raises:
            UsageError: the program asks for what it cannot have.
            BrokenPromise: what the ranks hold, or how they shut down, breaks a promise.
            Exception: what a rank raised that the others wait for.
        """
        __tracebackhide__ = True
        if not self._is_on:
            return
        self._read_news()
        call = self._all_wait_at()
        if call == "init":
            self._let_join()
        elif call == "shutdown":
            self._let_leave()
        elif nobody_calls and self._is_stuck():
            self._raise_stuck()

    def _all_wait_at(self) -> str:
        """The call at which all ranks wait; empty if there is none."""
        events = {c.rpc.event for c in self._ranks.channels}
        return events.pop() if len(events) == 1 and events <= set(_WAITS) else ""

    def _waiting(self) -> list[Channel]:
        return [c for c in self._ranks.channels if c.rpc.event in _WAITS]

    def _read_news(self) -> None:
        __tracebackhide__ = True
        for channel in list(self._ranks.channels):
            while channel.rpc_news:
                before, channel.rpc = channel.rpc.event, channel.rpc_news.popleft()
                news = channel.rpc
                if news.event == "init" and news.what.refused:
                    raise UsageError(news.what.refused)
                if news.event == "not joined":
                    self._diagnosis.blame_death(error := _functions.load_error(news.what, -1))
                    raise error
                if news.event == "shutdown" and not news.what:
                    self._let_leave_alone(channel)
                if news.event == "left":
                    note_shutdown(channel, self._options, *news.what)
                    if before == "leaving alone":
                        self._judge([channel])

    def _go(self, channels: Sequence[Channel], event: str) -> None:
        for channel in channels:
            channel.rpc = RpcNews(event)
            channel.send(("rpc",), self._deadlines.look)

    # Joining.

    def _let_join(self) -> None:
        channels = list(self._ranks.channels)
        _check([channel.rpc.what for channel in channels])
        for channel in channels:
            channel.rank, channel.name = channel.rpc.what.rank, channel.rpc.what.name
        # From here on, the number of a rank is the one that torch knows.
        self._ranks.channels.sort(key=lambda channel: channel.rank)
        self._go(channels, "joining")

    # Leaving.

    def _let_leave(self) -> None:
        """Look at what all ranks hold, and let them shut down."""
        __tracebackhide__ = True
        held = self._options.held_at_end
        if held is None:
            self._look()
        else:
            before = len(self._diagnosis.found.violations)
            self._settle(held)
            found = self._diagnosis.found.violations
            found[before:] = [_with_remedy(violation) for violation in found[before:]]
        self._diagnosis.found.raise_first()
        channels = list(self._ranks.channels)
        self._go(channels, "leaving")
        with self._phases.open("shutdown", self._deadlines.shutdown) as phase:
            while missing := [c for c in channels if c.rpc.event == "leaving"]:
                self._ranks.pump(min(phase.left(), 0.5))
                self._read_news()
                if self._diagnosis.dead(phase):
                    break
                if phase.left() <= 0:
                    self._diagnosis.hung(phase, missing, "does not shut down")
                    break
        self._judge(channels)

    def _let_leave_alone(self, channel: Channel) -> None:
        """Let a rank shut down that waits for no other: torch reports RRefs, we look at contexts.

        Torch does so in ``RRefContext::destroyInstance``, which any shutdown calls.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + self._deadlines.quiet_cleanup
        while True:
            self._look()
            now = channel.counters or Counters()
            if not now.contexts or time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        if now.contexts and not self._options.ignore_leaks:
            held = (Counters(contexts=now.contexts),)
            (leak,) = unsettled(held, (Counters(),), [channel.name])
            self._diagnosis.found.violations.append(replace(leak, rank=channel.rank))
        self._diagnosis.found.raise_first()
        self._go([channel], "leaving alone")

    def _look(self) -> None:
        with self._phases.open("run", self._deadlines.look) as phase:
            self._diagnosis.look(phase)

    def _judge(self, channels: Sequence[Channel]) -> None:
        """Raise what the shutdown of the program has shown."""
        __tracebackhide__ = True
        if not self._diagnosis.found:
            self._diagnosis.found.violations += shutdown_violations(
                [channel.outcome() for channel in channels],
                leaks_allowed=self._options.ignore_leaks,
                rate=self._options.rate,
                facts=installed(),
            )
        self._diagnosis.found.raise_first()

    # Ranks that others wait for in vain.

    def _is_stuck(self) -> bool:
        """Whether some ranks wait for others, which run nothing that could still come there."""
        channels = self._ranks.channels
        waiting = self._waiting()
        if not waiting or self._all_wait_at():
            return False
        return all(c in waiting or not (c.open_calls or c.rpc_news or c.lost) for c in channels)

    def _raise_stuck(self) -> NoReturn:
        __tracebackhide__ = True
        waiting = self._waiting()
        missing = [c for c in self._ranks.channels if c not in waiting] or waiting[1:]
        for channel in missing:
            for kind, payload in channel.answers.values():
                if kind == "error":
                    error = _functions.load_error(payload, channel.rank)
                    self._diagnosis.blame_death(error)
                    raise error
        first = waiting[0].rpc
        who = ", ".join(_described(c) for c in missing)
        if first.event == "init":
            msg = (
                f"{first.what.name} waits in init_rpc for the {len(self._ranks.channels)} ranks of "
                f"this cluster, and {who} will not call it: what was called there has returned, or "
                f"nothing was. Call the program in all ranks, such as "
                f"cluster.each_rank(run, world_size), or make the cluster smaller."
            )
            raise UsageError(msg)
        msg = (
            f"{waiting[0].name} waits in rpc.shutdown() for {who}, which has returned without "
            f"a graceful rpc.shutdown(): torch waits without end (api.py: _all_gather)"
        )
        self._diagnosis.found.add("UngracefulShutdown", msg, missing[0].rank)
        self._diagnosis.found.raise_first()
        raise AssertionError(msg)


def _described(channel: Channel) -> str:
    return channel.name if channel.rpc.event else f"rank {channel.rank}"


def _with_remedy(leak: Violation) -> Violation:
    if leak.promise != "RRefLeak":
        return leak
    remedy = (
        "when its program called rpc.shutdown(). Let go of RRefs before that (a variable of a "
        "function that still runs holds one), or say leaks='allow' if they are meant to stay"
    )
    return replace(leak, message=f"{leak.message}, {remedy}")


def _check(asked: Sequence[Asked]) -> None:
    """Refuse what torch would wait for without end.

    Raises:
        UsageError: the program's ranks are no world, or not one of this size.
    """
    size = len(asked)
    for number, one in enumerate(asked):
        call = f"init_rpc({shown(one.name)}, rank={one.rank}, world_size={one.world_size})"
        if one.world_size != size:
            msg = (
                f"{call} was called in a cluster of {size} ranks; make it "
                f"rpc_cluster(world_size={one.world_size}, ...), or give the program {size}."
            )
            raise UsageError(msg)
        if one.rank >= size:
            msg = (
                f"{call}: the rank must be below {size}; cluster.each_rank passes 0 to {size - 1}."
            )
            raise UsageError(msg)
        for other in asked[:number]:
            same = "rank" if other.rank == one.rank else "name" if other.name == one.name else ""
            if same:
                msg = (
                    f"{call} has the {same} of init_rpc({shown(other.name)}, rank={other.rank}), "
                    f"which another process called; cluster.each_rank(run, ...) gives each process "
                    f"a rank of its own as the first argument of run."
                )
                raise UsageError(msg)
