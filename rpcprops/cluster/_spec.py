"""What the test process and its servers tell each other. Torch-free: both sides import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rpcprops import agents
from rpcprops._given import is_one_of, shown
from rpcprops.cluster._finder import ModuleMap
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan

Transport = Literal["tcp", "shm"]
Leaks = Literal["raise", "allow"]
ClockChoice = Literal["auto", "real"] | float
#: The network of the ranks of a world: one of their own where this machine allows it ("auto"), one
#: of their own or none at all ("private"), or the machine's ("host").
Network = Literal["auto", "private", "host"]


def check_transport(transport: object) -> None:
    """Raises:
    UsageError: it is neither "tcp" nor "shm".
    """
    if not is_one_of(transport, ("tcp", "shm")):
        msg = f"transport={shown(transport)} must be 'tcp' or 'shm'."
        raise UsageError(msg)


#: How the line begins with which a clock's probe says, in the server's log, why it cannot answer.
PROBE_SAYS = "the probe of the clock: "


@dataclass(frozen=True)
class WorldSpec:
    """A world to fork. Times are virtual seconds.

    Attributes:
        rate: virtual seconds for each real second.
        origin_ns: the real instant from which time passes at that rate, the same in all ranks, so
            that they agree on the time: nanoseconds of the real monotonic clock.
        networks: how many descriptors name the network that the ranks enter; 0 leaves them in the
            machine's.
        import_in_ranks: modules that ranks find, and import first, by themselves; None when their
            server has imported them.
        agent: the agent of its ranks, by its name in :mod:`rpcprops.agents`.
    """

    names: tuple[str, ...]
    plan: FaultPlan
    rate: float
    origin_ns: int
    transport: str
    rpc_timeout: float
    num_worker_threads: int
    ignore_leaks: bool
    init: bool
    networks: int = 0
    import_in_ranks: ModuleMap | None = None
    agent: str = field(default_factory=agents.default_name)

    def __post_init__(self) -> None:
        # A rank that finds out by itself breaks the start of its world.
        agents.named(self.agent)


@dataclass(frozen=True)
class Hello:
    """What a server says when it is ready.

    Attributes:
        unsafe: what makes forking from this process unsafe, empty when nothing does.
        error: why importing the modules failed, empty when it did not.
    """

    pid: int
    torch_version: str
    unsafe: str
    error: str = ""
