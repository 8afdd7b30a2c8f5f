"""The end of a world: RPC is shut down in every rank, and each rank exits.

Each wait of a graceful shutdown has a reason in torch's ``api.py: shutdown``:

* ``_wait_all_workers``, by ``_all_gather``, calls two Python functions with ``rpc_sync`` and
  ``rpc_async``: the other ranks send to the rank with the smallest name, which answers each. These
    are PYTHON_CALL messages, so in a program a table that fails or delays that type affects
    shutdown too; :mod:`rpcprops.cluster._injection` keeps faults away from them elsewhere. They
    have no timeout (``constants.py: DEFAULT_SHUTDOWN_TIMEOUT`` is 0), and the wait for the signal
    between them has no end. So if the shutdown of one rank raises, the others wait for it for ever.
* ``_delete_all_user_and_unforked_owner_rrefs`` is ``rref_context.cpp:
  RRefContext::delAllUsersAndUnforkedOwners``: a user waits 100 s for what it has sent on to be
  accepted, and an owner 100 s for the deletes of its forks. All these are virtual seconds.
* ``agent.join`` waits for calls of this rank that have no answer (``tensorpipe_agent.cpp:
  TensorPipeAgent::join``). It ignores the agent's map of messages that wait to be sent again,
    so what remains of a context's cleanup is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rpcprops.cluster import _functions
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import WorldOptions
from rpcprops.errors import text_of
from rpcprops.faults import MessageType
from rpcprops.oracle.ranks import shutdown_violations
from rpcprops.outcomes import RaisedError, Violation
from rpcprops.programs import End
from rpcprops.torch_facts import installed


def shut_down(
    ranks: Ranks,
    phases: Phases,
    diagnosis: Diagnosis,
    deadlines: Deadlines,
    options: WorldOptions,
    problem: str,
    *,
    end: End | None,
) -> None:
    """Shut RPC down in all ranks, unless `end` is None, and wait for their exits.

    Violations are recorded, not raised.

    Args:
        problem: why faults cannot be kept away from the handshake, empty if they can.
    """

    def violations(channels: Iterable[Channel]) -> list[Violation]:
        outcomes = [channel.outcome() for channel in channels]
        return shutdown_violations(
            outcomes, leaks_allowed=options.ignore_leaks, rate=options.rate, facts=installed()
        )

    found = diagnosis.found
    later = 0.0 if end is None else end.lasts / options.rate
    with phases.open("shutdown", deadlines.shutdown + later) as phase:
        number = ranks.send_to_all("exit", end)
        for channel in ranks.channels:
            channel.exit_number = number
        answers = diagnosis.gather(phase, number, f"does not shut down{_why(options, problem)}")
        if answers is None:
            # Ranks that wait for one whose shutdown has raised are not to blame.
            left = [c for c in ranks.channels if number in c.answers]
            for channel in left:
                note_shutdown(channel, options, *channel.answers.pop(number)[1])
            found.violations[:0] = violations(c for c in left if c.shutdown_error is not None)
            return
        ranks.ask_for_preforked()
        for channel, (_, answer) in zip(ranks.channels, answers, strict=True):
            note_shutdown(channel, options, *answer)
        while ranks.alive():
            ranks.pump(min(phase.left(), 0.5))
            ranks.must_be_connected()
            if phase.left() <= 0:
                diagnosis.hung(phase, ranks.alive(), "does not exit")
                return
        found.violations += violations(ranks.channels)


def _why(options: WorldOptions, problem: str) -> str:
    """What may be the reason if faults act on the messages of the handshake."""
    ranks = range(len(options.names))
    may_act = any(
        MessageType.PYTHON_CALL in f.targets for r in ranks for f in options.plan.faults_at(r)
    )
    if not may_act or not problem or options.shutdown_faults:
        return ""
    return f" (faults also act on what rpc.shutdown() itself sends, because {problem})"


def note_shutdown(
    channel: Channel, options: WorldOptions, error: bytes, seen: Mapping[str, Any]
) -> None:
    """Record what a rank answered after it had shut RPC down."""
    channel.calls = seen["calls"]
    counted = seen["sends"]
    if counted is not None and options.shutdown_faults:
        # The delays that are predicted do not include those of shutdown's own messages.
        counted = counted._replace(delayed=channel.sends.delayed if channel.sends else {})
    channel.note_sends(counted, seen["struck"])
    channel.late_seconds = max(channel.late_seconds, seen["late"])
    channel.counters_after_shutdown = seen.get("after", channel.counters_after_shutdown)
    channel.shortest_timeout = seen["timeout"]
    if error:
        raised = _functions.load_error(error, channel.rank)
        channel.shutdown_error = RaisedError(type(raised).__name__, text_of(raised))
