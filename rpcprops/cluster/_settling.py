"""Settling: waits until ranks hold what they should, or nothing can change what they hold.

Each wait here has a reason in torch:

* One look at each rank does not show that all are at rest. The ranks are not read at the same
  moment, and ``rref_context.cpp: RRefContext::getDebugInfo`` does not count the children that an
  RRef still waits for, nor what a function started by ``remote`` will make. So two looks in a row
  must show what is expected, unless the agent's own state and its ledger prove that all ranks were
  at rest (:attr:`rpcprops.cluster._ranks.Ranks.were_at_rest`).
* A retry of a context's cleanup has no counter. ``container.cpp:
  DistAutogradContainer::sendReleaseContextRpc`` sends by ``rpc_agent.cpp:
    RpcAgent::sendWithRetries``. Between two tries the message is in a map of the agent
    (``rpcRetryMap_``) that no debug info shows. The sender no longer has the context, so a rank
    that still has one looks like a leak. Only the sender's log shows each failed try; where the
    agent writes a ledger, that shows each try and its end.
  * Shutdown does not wait for such a retry (see :mod:`rpcprops.cluster._shutdown`); this must.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rpcprops._given import shown
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import check_counts
from rpcprops.errors import UsageError
from rpcprops.oracle.ranks import unsettled
from rpcprops.outcomes import Counters

#: With fewer real seconds left than this, a settle reports what is held instead of looking again.
_LAST_LOOK_SECONDS = 1.0
#: Real seconds between two looks at the most: at ranks that hold something else than expected, and
#: at those that only wait for a retry.
_LOOKS_SECONDS = 0.02
_RETRY_LOOKS_SECONDS = 0.002

_IsKept: TypeAlias = Callable[[Sequence[Counters]], bool]


class Settling:
    """Lets the ranks of one world settle."""

    def __init__(
        self, ranks: Ranks, phases: Phases, diagnosis: Diagnosis, deadlines: Deadlines
    ) -> None:
        self._ranks = ranks
        self._phases = phases
        self._diagnosis = diagnosis
        self._deadlines = deadlines
        self._log_sizes: tuple[int, ...] = ()
        self._logs_changed = 0.0

    def settle_to(
        self,
        expect: Sequence[Counters] | None,
        failures: Sequence[int] | None = None,
        calls: Sequence[Mapping[str, int]] = (),
        is_kept: _IsKept | None = None,
    ) -> tuple[Counters, ...]:
        """See :meth:`rpcprops.Cluster.settle_to`."""
        channels = self._ranks.channels
        wanted = _check_expected(expect, len(channels))
        with self._phases.open("settle", self._deadlines.settle) as phase:
            held: tuple[Counters, ...] = ()
            ran: list[Mapping[str, int]] = []
            since, wait = time.monotonic(), 0.0005
            matched = 0
            while True:
                # A look meanwhile would show nothing that counts, and cost each rank some work.
                self._ranks.wait_for_retries(min(_LOOKS_SECONDS, phase.left()))
                # What a fault delays or holds may be of no call that anybody waits for any more, so
                # only the ledger shows that it is on its way. It changes what is held when it
                # comes, so two looks must follow that.
                is_late = self._ranks.awaits_message
                if not self._diagnosis.look(phase):
                    return self._ranks.counters()
                now = (self._ranks.counters(), [c.calls for c in channels])
                is_late = is_late or self._ranks.awaits_message
                if is_late or now != (held, ran):
                    held, ran = now
                    since = time.monotonic()
                awaits_calls = _lacks(ran, calls)
                matched = matched + 1 if held == wanted and not awaits_calls else 0
                quiet = time.monotonic() - since
                awaits_message = bool(calls) and is_late
                if awaits_message:
                    matched = min(matched, 1)
                if matched and not awaits_message and self._retries_ended(failures, quiet):
                    if matched >= 2 or self._ranks.were_at_rest:
                        break
                if not matched and (
                    quiet > self._patience(held, wanted, is_kept, awaits_calls=awaits_calls)
                    or phase.left() < _LAST_LOOK_SECONDS
                ):
                    if held != wanted:
                        names = [channel.name for channel in channels]
                        self._diagnosis.found.violations += unsettled(held, wanted, names)
                        self._diagnosis.ask_what_holds()
                        self._diagnosis.find_remedy()
                        phase.fail("the ranks did not settle")
                    break
                time.sleep(wait)
                if matched != 1:
                    wait = min(wait * 1.5, _RETRY_LOOKS_SECONDS if matched else _LOOKS_SECONDS)
            return held

    def come_to_rest(self) -> tuple[Counters, ...]:
        """See :meth:`rpcprops.Cluster.come_to_rest`."""
        channels = self._ranks.channels
        nothing = (Counters(),) * len(channels)
        with self._phases.open("settle", self._deadlines.settle) as phase:
            before: object = None
            since = time.monotonic()
            while True:
                self._ranks.wait_for_retries(min(_LOOKS_SECONDS, phase.left()))
                is_late = self._ranks.awaits_message
                if not self._diagnosis.look(phase):
                    return self._ranks.counters()
                held = self._ranks.counters()
                now = (held, [dict(c.calls) for c in channels], self._ranks.messages_given)
                is_late = is_late or self._ranks.awaits_message
                if is_late or now != before:
                    before, since = now, time.monotonic()
                quiet = time.monotonic() - since
                patience = self._patience(held, nothing, None, awaits_calls=False)
                at_rest = self._ranks.were_at_rest and not is_late
                if at_rest or quiet > patience or phase.left() < _LAST_LOOK_SECONDS:
                    return held
                time.sleep(_LOOKS_SECONDS)

    def _patience(
        self,
        held: Sequence[Counters],
        wanted: Sequence[Counters],
        is_kept: _IsKept | None,
        *,
        awaits_calls: bool,
    ) -> float:
        """Real seconds without a change after which what is still held counts as stuck."""
        idle = all(counters.is_idle for counters in held)
        if idle and not awaits_calls and is_kept is not None and is_kept(held):
            return self._deadlines.kept
        contexts = any(h.contexts > w.contexts for h, w in zip(held, wanted, strict=True))
        patience = self._deadlines.quiet_cleanup if contexts else self._deadlines.quiet
        if awaits_calls:
            patience = max(patience, self._deadlines.unseen)
        return patience if idle else self._deadlines.stalled + patience

    def _retries_ended(self, failures: Sequence[int] | None, quiet: float) -> bool:
        """Whether no retry of a context cleanup can still be waiting."""
        if self._deadlines.quiet_cleanup == self._deadlines.quiet:
            return True
        if failures is not None:
            if not any(failures):
                return True
            seen = [channel.log.failed_sends() for channel in self._ranks.channels]
            if all(now >= then for now, then in zip(seen, failures, strict=True)):
                # After the last failed send comes one more send, which must have arrived.
                return self._is_known_or_quiet(self._deadlines.last_cleanup)
            return quiet > self._deadlines.quiet_cleanup
        return self._is_known_or_quiet(self._deadlines.between_cleanups)

    def _is_known_or_quiet(self, seconds: float) -> bool:
        """Whether no retry is left, by the ledger; or no log has grown for so many real seconds."""
        return self._ranks.know_of_no_retry or self._logs_quiet() > seconds

    def _logs_quiet(self) -> float:
        """Real seconds since the log of any rank was seen to grow."""
        sizes = tuple(channel.log.size() for channel in self._ranks.channels)
        if sizes != self._log_sizes:
            self._log_sizes, self._logs_changed = sizes, time.monotonic()
        return time.monotonic() - self._logs_changed


def _check_expected(expect: Sequence[Counters] | None, world_size: int) -> tuple[Counters, ...]:
    given: Any = (Counters(),) * world_size if expect is None else expect
    if (
        not isinstance(given, Sequence)
        or len(given) != world_size
        or not all(isinstance(counters, Counters) for counters in given)
    ):
        msg = f"expect={shown(expect)} must be {world_size} Counters, one for each rank."
        raise UsageError(msg)
    check_counts("expect", given)
    return tuple(given)


def _lacks(ran: Sequence[Mapping[str, int]], calls: Sequence[Mapping[str, int]]) -> bool:
    """Whether some call has not yet run as often as it must."""
    return any(
        seen.get(call, 0) < times
        for seen, wanted in zip(ran, calls, strict=False)
        for call, times in wanted.items()
    )
