"""What the test process and its servers tell each other. Torch-free: both sides import it."""

from __future__ import annotations

from dataclasses import dataclass

from rpcprops.cluster.finder import ModuleMap
from rpcprops.cluster.options import WorldOptions

#: How the line begins with which a clock's probe says, in the server's log, why it cannot answer.
PROBE_SAYS = "the probe of the clock: "


@dataclass(frozen=True)
class WorldSpec(WorldOptions):
    """A world to fork: its options, and what is known once it is forked.

    Attributes:
        origin_ns: the real instant from which time passes at the clock's rate, the same in all
            ranks, so that they agree on the time: nanoseconds of the real monotonic clock.
        networks: how many descriptors name the network that the ranks enter; 0 leaves them in the
            machine's.
        import_in_ranks: modules that ranks find, and import first, by themselves; None when their
            server has imported them.
    """

    origin_ns: int
    networks: int
    import_in_ranks: ModuleMap | None


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
