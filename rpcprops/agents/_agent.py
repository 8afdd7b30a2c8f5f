"""The interface of an agent for the rest of the package."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar

from rpcprops._frozen import FrozenMap
from rpcprops._printable import printable
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageAction, MessageFault, MessageType
from rpcprops.torch_facts import TorchFacts

_INIT_METHOD = "env://"

#: Shows, as long as its block lasts, that work goes on. It is called with a line that says what is
#: done, and with what is said, with the seconds, once that is done.
Progress = Callable[[str, str], AbstractContextManager[object]]


def lines_by(say: Callable[[str], object]) -> Progress:
    """The progress that says one line at the start and one at the end, unless an error ends it."""

    @contextmanager
    def shown(what: str, end: str) -> Iterator[None]:
        began = time.monotonic()
        say(what)
        yield
        say(f"{end}, after {time.monotonic() - began:.0f} s")

    return shown


def to_stderr(line: str) -> None:
    """Write a line to stderr, as it is where this process writes it."""
    with suppress(OSError):
        print(f"rpcprops: {printable(line)}", file=sys.stderr, flush=True)


_shows: Progress = lines_by(to_stderr)


def show_progress_by(progress: Progress) -> None:
    """How this process shows what :meth:`Agent.prepare` does where its caller does not say it.

    What is written to stderr is captured while pytest runs a test.
    """
    global _shows
    _shows = progress


def usual_progress() -> Progress:
    """What :func:`show_progress_by` was given last; lines on stderr unless it was called."""
    return _shows


class Agent:
    """An RPC agent: its backend, its options, which faults it can inject, and what it writes.

    A subclass names its backend, and puts it into torch's registry in :meth:`make_known`. If it
    derives from another agent's class, it overrides only what differs.

    Attributes:
        name: the name of its backend in ``torch.distributed.rpc.backend_registry``.
        can_fail: the message types whose sends it can make fail.
        can_delay: the message types whose sends it can delay.
        can_act: what it can do to any message: the actions of a :class:`rpcprops.MessageFault`.
        retries: how often it retries each type after a failed send, if at all.
        module: the torch module that makes the backend known when it is imported; empty if
            ``torch.distributed.rpc`` itself does.
        has_ledger: whether it takes the option ``ledger_fd``, and writes each message there.
    """

    name: ClassVar[str] = ""
    can_fail: ClassVar[tuple[MessageType, ...]] = ()
    can_delay: ClassVar[tuple[MessageType, ...]] = ()
    can_act: ClassVar[tuple[MessageAction, ...]] = ()
    #: RpcAgent::sendWithRetries (rpc_agent.cpp), which all agents of torch's inherit.
    retries: ClassVar[Mapping[MessageType, int]] = FrozenMap(
        {message: message.max_retries for message in MessageType if message.is_retryable}
    )
    module: ClassVar[str] = ""
    has_ledger: ClassVar[bool] = False

    @property
    def can_inject(self) -> bool:
        """Whether it can inject any fault."""
        return bool(self.can_fail or self.can_delay or self.can_act)

    def facts(self, facts: TorchFacts) -> TorchFacts:
        """What is known of a version of torch when ranks run this agent.

        An agent that logs other texts, or counts differently, replaces these parts: ``injected``,
        ``failed_send`` and ``lost_connection`` of the texts, ``agent`` of the counters.
        """
        return facts

    def check(self, table: FaultTable) -> None:
        """Refuse a table that this agent cannot carry out.

        Raises:
            UsageError: it fails or delays a message type that this agent does not.
        """
        if not self.can_inject and (table.failing or table.delaying):
            msg = (
                f"the agent {self.name} injects no faults, so it cannot carry out {table!r}; take "
                f"the faults out, or choose another agent: wire, or none for torch's faulty one."
            )
            raise UsageError(msg)
        for verb, able, wanted in (
            ("fail", self.can_fail, table.failing),
            ("delay", self.can_delay, tuple(table.delaying)),
        ):
            lacking = [str(message) for message in wanted if message not in able]
            if lacking:
                can = ", ".join(able) or "none"
                msg = (
                    f"the agent {self.name} cannot {verb} {', '.join(lacking)} (it can {verb}: "
                    f"{can}); take that out of {table!r}, or choose another agent."
                )
                raise UsageError(msg)

    def check_plan(self, plan: FaultPlan, world_size: int) -> None:
        """Refuse a plan that this agent cannot carry out in a world of that size.

        Raises:
            UsageError: it has a table that :meth:`check` refuses, or a fault of single messages
                whose action is not in `can_act`.
        """
        for rank in range(world_size):
            self.check(plan.table(rank))
        for fault in plan.others:
            if isinstance(fault, MessageFault) and fault.action not in self.can_act:
                can = ", ".join(self.can_act) or "none of fail, delay, hold, duplicate and lose"
                msg = (
                    f"the agent {self.name} cannot carry out {fault!r} (to any message it can do: "
                    f"{can}). Write agent='wire' for the agent that can, or take the fault out of "
                    f"the plan's others."
                )
                raise UsageError(msg)

    def arguments(self, table: FaultTable) -> dict[str, Any]:
        """The options that say which faults it injects, as plain data for a script."""
        self.check(table)
        return {}

    def prepare(self, progress: Progress | None = None) -> None:
        """Called in the test process before ranks that run this agent are forked.

        Args:
            progress: see :data:`rpcprops.agents.Progress`; unless given, :func:`usual_progress`.

        Raises:
            MachineCannot: it cannot be had here.
        """

    # These methods run in a process that has torch.

    def make_known(self) -> None:
        """Put the backend into torch's registry; a second call changes nothing."""

    def backend(self) -> Any:
        """Its member of torch's ``BackendType``.

        Raises:
            MachineCannot: this torch has no such backend.
        """
        from torch.distributed.rpc import backend_registry

        self.make_known()
        try:
            return backend_registry.BackendType[self.name]
        except KeyError:
            msg = (
                f"this build of torch has no {self.name} backend, so faults cannot be "
                f"injected; install a Linux wheel of torch."
            )
            raise MachineCannot(msg) from None

    def options(self, table: FaultTable, *, init_method: str = _INIT_METHOD, **others: Any) -> Any:
        """New options for ``rpc.init_rpc``.

        Args:
            table: the faults of this rank.
            init_method: where the ranks find each other.
            others: further options of torch's: ``num_worker_threads``, ``rpc_timeout``.

        Raises:
            MachineCannot: this torch has no such backend.
            UsageError: it cannot inject these faults.
        """
        from torch.distributed.rpc import backend_registry

        construct: Any = backend_registry.construct_rpc_backend_options
        given = {**others, **self.arguments(table)}
        return construct(self.backend(), init_method=init_method, **given)
