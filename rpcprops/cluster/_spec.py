"""The messages between the test process and its servers. Imports no torch: both sides use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpcprops.cluster.finder import ModuleMap
from rpcprops.cluster.options import WorldOptions

#: The first words of the line in the server's log by which a clock probe says why it failed.
PROBE_SAYS = "the probe of the clock: "


@dataclass(frozen=True)
class WorldSpec(WorldOptions):
    """A world to fork: its options, and values that are known only when it is forked.

    Attributes:
        origin_ns: the real instant from which time runs at the clock's rate, in nanoseconds of the
            real monotonic clock. It is the same in all ranks, so that they agree on the time.
        networks: how many descriptors name the network that the ranks enter; with 0 they stay in
            the machine's.
        ledgers: how many descriptors name a ledger of messages: 1 if the agent has one, else 0.
        import_in_ranks: modules that ranks themselves find and import first; None if their server
            has imported them.
        runs_users_code: whether the code is the user's, not a program of ours. Then ranks note
            where handles of RRefs are made, and which timeouts are passed to torch.
        may_stay: whether the ranks may run another program afterwards. Then they note what they
            were at the beginning.
    """

    origin_ns: int
    networks: int
    ledgers: int
    import_in_ranks: ModuleMap | None
    runs_users_code: bool = False
    may_stay: bool = False


@dataclass(frozen=True)
class Hello:
    """The message that says that a server is ready.

    Attributes:
        unsafe: why forking from this process is unsafe, empty if it is safe.
        error: why importing the modules failed, empty if it did not.
        arming_problem: why no fault can be armed while ranks run, with the remedy; empty if it can.
    """

    pid: int
    torch_version: str
    unsafe: str
    error: str = ""
    arming_problem: str = ""


@dataclass(frozen=True)
class RpcNews:
    """What a rank says of the program's own use of RPC (``init="adopt"``).

    Attributes:
        event: the program calls ``init_rpc`` ("init", with an :class:`Asked`) or ``rpc.shutdown``
            ("shutdown", with whether gracefully), and waits to be let go on; it is done with either
            ("joined"; "left", with the dumped error and a last look); or torch's ``init_rpc``
            raised ("not joined", with the dumped error).
    """

    event: str = ""
    what: Any = None


@dataclass(frozen=True)
class Asked:
    """What a program asks of ``init_rpc``.

    Attributes:
        rpc_timeout: virtual seconds, 0 for none.
        refused: why it cannot have it; empty if it can.
    """

    name: str = ""
    rank: int = -1
    world_size: int = 0
    num_worker_threads: int = 0
    rpc_timeout: float = 0.0
    refused: str = ""
