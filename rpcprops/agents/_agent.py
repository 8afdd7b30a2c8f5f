"""What an agent is to the rest of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rpcprops._frozen import FrozenMap
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import FaultTable, MessageType
from rpcprops.torch_facts import TorchFacts

_INIT_METHOD = "env://"


class Agent:
    """An RPC agent: its backend, its options, which faults it can inject, and what it writes.

    A subclass names its backend, and says in :meth:`make_known` how that gets into torch's
    registry. A subclass of another agent overrides what differs.

    Attributes:
        name: of its backend, in ``torch.distributed.rpc.backend_registry``.
        can_fail: the message types whose sends it can make fail.
        can_delay: those that it can hold up.
        retries: how often it sends each type again after a failed send, where it does at all.
        module: the module of torch's that makes the backend known when it is imported; empty where
            ``torch.distributed.rpc`` itself does.
    """

    name: ClassVar[str] = ""
    can_fail: ClassVar[tuple[MessageType, ...]] = ()
    can_delay: ClassVar[tuple[MessageType, ...]] = ()
    #: RpcAgent::sendWithRetries (rpc_agent.cpp), which all agents of torch's inherit.
    retries: ClassVar[Mapping[MessageType, int]] = FrozenMap(
        {message: message.max_retries for message in MessageType if message.is_retryable}
    )
    module: ClassVar[str] = ""

    def facts(self, facts: TorchFacts) -> TorchFacts:
        """What is known of a torch when ranks run this agent.

        An agent that writes something else, or counts otherwise, replaces that: ``injected``,
        ``failed_send`` and ``lost_connection`` of the texts, ``agent`` of the counters.
        """
        return facts

    def check(self, table: FaultTable) -> None:
        """Refuse a table that this agent cannot carry out.

        Raises:
            UsageError: it fails or delays a message type that this agent does not.
        """
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

    def arguments(self, table: FaultTable) -> dict[str, Any]:
        """Those of its options that say which faults it injects; plain data, as in a script."""
        self.check(table)
        return {}

    # What follows runs in a process that has torch.

    def make_known(self) -> None:
        """Have the backend in torch's registry; a second time changes nothing."""

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
        """Options for ``rpc.init_rpc``, made anew.

        Args:
            table: the faults of this rank.
            init_method: where the ranks meet.
            others: what else torch's options take: ``num_worker_threads``, ``rpc_timeout``.

        Raises:
            MachineCannot: this torch has no such backend.
            UsageError: it cannot inject these faults.
        """
        from torch.distributed.rpc import backend_registry

        construct: Any = backend_registry.construct_rpc_backend_options
        given = {**others, **self.arguments(table)}
        return construct(self.backend(), init_method=init_method, **given)
