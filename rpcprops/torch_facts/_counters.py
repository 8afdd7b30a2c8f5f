"""torch's names of the counters in :class:`rpcprops.Counters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from rpcprops._frozen import FrozenMap
from rpcprops.outcomes import Counters

_RREFS = FrozenMap(
    {
        "owners": "num_owner_rrefs",
        "forks": "num_forks",
        "pending_users": "num_pending_users",
        "pending_futures": "num_pending_futures",
    }
)
_AUTOGRAD = FrozenMap(
    {
        "contexts": "num_autograd_contexts",
        "backward_passes": "num_current_backward_passes",
    }
)
_AGENT = FrozenMap(
    {
        "server_calls": "agent.server_active_calls",
        "server_async_calls": "agent.server_active_async_calls",
        "client_calls": "agent.client_active_calls",
    }
)


@dataclass(frozen=True, slots=True)
class CounterKeys:
    """torch's key for each field of :class:`rpcprops.Counters`, by the part of torch that counts.

    Attributes:
        rrefs: rref_context.cpp, ``RRefContext::getDebugInfo``.
        autograd: container.cpp and dist_engine.cpp of dist_autograd, ``DistEngine::getDebugInfo``.
        agent: tensorpipe_agent.cpp, ``TensorPipeAgent::getDebugInfo``.
    """

    rrefs: Mapping[str, str] = field(default=_RREFS)
    autograd: Mapping[str, str] = field(default=_AUTOGRAD)
    agent: Mapping[str, str] = field(default=_AGENT)

    @property
    def all(self) -> dict[str, str]:
        """The keys of all three, in the order of the fields."""
        keys = {**self.rrefs, **self.autograd, **self.agent}
        return {item.name: keys[item.name] for item in fields(Counters)}
