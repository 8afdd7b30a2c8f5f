"""The options of a cluster: as a user gives them, and checked and complete for its ranks.

Imports no torch: the test process and its ranks import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Required, TypedDict, cast

from rpcprops import agents
from rpcprops._given import argument, is_one_of, items, shown
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.cluster import _limits
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import MAX_CLOCK_RATE, Counters
from rpcprops.programs import ENOUGH_THREADS, MAX_WORLD_SIZE, check_world_size

Transport = Literal["tcp", "shm"]
#: What ranks may hold at the end: nothing, anything, or exactly this, by rank.
Leaks = Literal["raise", "allow"] | Sequence[Counters]
ClockChoice = Literal["auto", "real"] | float
#: Who calls ``init_rpc``: we do (True), the user's code with our options (False), or a program with
#: its own options, which we take over ("adopt").
Init = bool | Literal["adopt"]
#: The network of the ranks of a world: its own where this machine allows that ("auto"), its own or
#: an error ("private"), or the machine's ("host").
Network = Literal["auto", "private", "host"]

#: Virtual seconds that stand for no timeout: nothing that ranks do takes so long.
A_DAY = 86_400.0

#: The options that a program chooses itself with ``init="adopt"``.
_PROGRAMS_OWN = ("names", "rpc_timeout", "num_worker_threads")


class ClusterOptions(TypedDict, total=False):
    """The options of :meth:`rpcprops.ClusterServer.cluster`, and of the ``rpc_cluster`` fixture.

    Attributes:
        world_size: number of ranks, 1 to 16.
        faults: a table for every rank, or a plan.
        names: the ranks' names, "worker0", "worker1", … unless given.
        clock: overrides the server's for this cluster.
        transport: "tcp" on loopback, or "shm", shared memory as between processes of one host.
        rpc_timeout: virtual seconds before a call that names no timeout fails; by default a day,
            which no run reaches at any rate.
        num_worker_threads: threads of each agent, 8 unless given.
        leaks: "raise" reports what the ranks still hold at the end; "allow" is for code that holds
            RRefs until it exits. Counters, one for each rank, are for a leak that is known: each
            rank must hold exactly these at the end, and more or less is a failure.
        init: "adopt" is for a program that calls ``init_rpc`` and ``rpc.shutdown`` itself: it gets
            the faults, and its names, leaks and shutdown are judged as ours are. Then the
            program's names, timeout and threads count, and `names`, `rpc_timeout` and
            `num_worker_threads` are refused. False leaves ``init_rpc`` to code that knows
            ``rpcprops.fixture``, and judges none of that.
        deadline: real seconds that a phase may take on top of what its faults need, 30 unless
            given.
        network: overrides the server's for this cluster.
        shutdown_faults: False keeps faults away from the messages by which ``rpc.shutdown()`` lets
            all ranks meet: who calls it cannot try them again. True lets torch's agent alone decide
            what fails, and it does not spare them; then :meth:`Cluster.faults` cannot be used.
        agent: the RPC agent of the ranks, by its name in :mod:`rpcprops.agents`: torch's faulty one
            unless given.
        reuse: True lets the ranks be ones that earlier clusters of this server with the same
            options have used, and lets later ones use them. That needs ``agent="wire"``, which can
            tell that a rank is at rest: no counter, no RRef, no context, no thread, and no message
            is left. Ranks of which that is not true, or whose block has raised, are not used
            again, nor those in which the creation of an RRef has failed or a profiler has run
            around a call: torch keeps something of both in the process. What your functions change
            besides RPC stays in such ranks: globals of your modules, random generators, the working
            directory, the environment, ``sys.path``, open files. ``Cluster.is_used`` says
            whether ranks were used before; examples that confirm a failure have fresh ones.
    """

    world_size: Required[int]
    faults: FaultTable | FaultPlan | None
    names: Sequence[str] | None
    clock: ClockChoice | None
    transport: Transport
    rpc_timeout: float
    num_worker_threads: int
    leaks: Leaks
    init: Init
    deadline: float
    network: Network | None
    shutdown_faults: bool
    agent: str
    reuse: bool


@dataclass(frozen=True)
class WorldOptions:
    """All options of one world. Times are virtual seconds, except `deadline` (real seconds).

    Attributes:
        rate: virtual seconds for each real second.
    """

    names: tuple[str, ...]
    plan: FaultPlan
    rate: float
    transport: Transport
    rpc_timeout: float
    num_worker_threads: int
    leaks: Leaks
    init: Init
    deadline: float
    network: Network
    shutdown_faults: bool
    agent: str
    reuse: bool

    @property
    def ignore_leaks(self) -> bool:
        """Whether code may hold RRefs until it exits, so that torch may report them at shutdown."""
        return self.leaks != "raise"

    @property
    def held_at_end(self) -> Sequence[Counters] | None:
        """What each rank must hold before shutdown; None if that is not checked."""
        if not self.init or self.leaks == "allow":
            return None
        return (Counters(),) * len(self.names) if self.leaks == "raise" else self.leaks


def complete(
    options: ClusterOptions, *, rate_of: Callable[[ClockChoice | None], float], network: Network
) -> WorldOptions:
    """Check the options, and add what was not given.

    Args:
        rate_of: gives the rate for a choice of clock, or raises.
        network: the network of ranks if `options` names none.

    Raises:
        UsageError: an option is unknown, the size of the world is missing, or a value is out of
            its range; the message says which.
        MachineCannot: the machine's limits do not allow such a world, or it cannot have the rate.
    """
    _check_keywords(options)
    size = options["world_size"]
    check_world_size(size)
    plan = FaultPlan.of(options.get("faults"))
    plan.check(size)
    transport = options.get("transport", "tcp")
    check_transport(transport)
    rpc_timeout = options.get("rpc_timeout", A_DAY)
    _check_number("rpc_timeout", rpc_timeout, 1e6)
    threads = options.get("num_worker_threads", ENOUGH_THREADS)
    _check_number("num_worker_threads", threads, 1024, whole=True)
    deadline = options.get("deadline", 30.0)
    _check_number("deadline", deadline, A_DAY)
    init = _check_init(options)
    leaks = _check_leaks(options.get("leaks", "raise"), size, init=bool(init))
    _limits.check(size, transport, threads)
    chosen = options.get("network")
    # If a rank found out by itself what its agent cannot do, the start of its world would break.
    agent = agents.named(options.get("agent", agents.default_name()))
    agent.check_plan(plan, size)
    return WorldOptions(
        names=_check_names(options.get("names"), size),
        plan=plan,
        rate=rate_of(options.get("clock")),
        transport=transport,
        rpc_timeout=float(rpc_timeout),
        num_worker_threads=threads,
        leaks=leaks,
        init=init,
        deadline=float(deadline),
        network=network if chosen is None else check_network(chosen),
        shutdown_faults=check_bool("shutdown_faults", options.get("shutdown_faults", False)),
        agent=agent.name,
        reuse=_check_worlds_reuse(options, agent.name, init=init, leaks=leaks),
    )


def check_reuse(reuse: object, agent: str) -> bool:
    """`reuse`, if ranks with that agent may have it.

    Raises:
        UsageError: it is no bool, or it is true and the agent another one than WIRE.
    """
    if check_bool("reuse", reuse) and agent != WIRE:
        msg = (
            f"reuse=True needs agent='wire', not {agent}: no other agent can be given other "
            f"faults while ranks run, or says all that it still holds."
        )
        raise UsageError(msg)
    return reuse is True


def _check_worlds_reuse(options: ClusterOptions, agent: str, *, init: Init, leaks: Leaks) -> bool:
    reuse = check_reuse(options.get("reuse", False), agent)
    if reuse and init is not True:
        msg = (
            f"reuse=True needs init=True, not init={shown(init)}: code that calls init_rpc itself "
            f"needs ranks in which RPC does not run."
        )
        raise UsageError(msg)
    if reuse and leaks != "raise":
        msg = (
            f"reuse=True needs leaks='raise', not leaks={shown(leaks)}: ranks that still hold "
            f"something cannot be used again."
        )
        raise UsageError(msg)
    return reuse


def _check_leaks(leaks: object, world_size: int, *, init: bool) -> Leaks:
    """`leaks`, with a sequence as a tuple.

    Raises:
        UsageError: it is none of the three kinds.
    """
    if is_one_of(leaks, ("raise", "allow")):
        return cast("Leaks", leaks)
    must_be = f"'raise' or 'allow', or {world_size} Counters, one for each rank"
    if isinstance(leaks, str) or not isinstance(leaks, Sequence):
        msg = f"leaks={shown(leaks)} must be {must_be}."
        raise UsageError(msg)
    given = items("leaks", leaks, MAX_WORLD_SIZE + 1, must_be)
    if len(given) != world_size or not all(isinstance(one, Counters) for one in given):
        msg = f"leaks={shown(leaks)} must be {must_be}."
        raise UsageError(msg)
    check_counts("leaks", given)
    if not all(one.is_idle for one in given):
        msg = (
            f"leaks={shown(leaks)} may name owners, forks and contexts only: the others count what "
            f"is still on its way, and no rank is at rest before that is 0."
        )
        raise UsageError(msg)
    if not init:
        msg = (
            f"leaks={shown(leaks)} needs init=True: with init=False, what ranks hold at the end is "
            f"not checked. Call cluster.settle(expect=...) before the block ends."
        )
        raise UsageError(msg)
    return tuple(given)


def check_counts(name: str, given: Sequence[Counters]) -> None:
    """Check the numbers in the counters of an argument, which its caller has made.

    Raises:
        UsageError: one of them is no int from 0 up.
    """
    for rank, counters in enumerate(given):
        for item in fields(counters):
            count: object = getattr(counters, item.name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                where = f"{name}[{rank}]: {argument(item.name, count)}"
                msg = f"{where} must be an int from 0 up: how many a rank holds."
                raise UsageError(msg)


def check_transport(transport: object) -> None:
    """Raises:
    UsageError: `transport` is neither "tcp" nor "shm".
    """
    if not is_one_of(transport, ("tcp", "shm")):
        msg = f"transport={shown(transport)} must be 'tcp' or 'shm'."
        raise UsageError(msg)


def check_clock(clock: object) -> ClockChoice:
    """`clock` if it is "auto", "real" or a rate.

    Raises:
        UsageError: it is none of these.
    """
    if is_one_of(clock, ("auto", "real")):
        return cast("ClockChoice", clock)
    is_number = isinstance(clock, int | float) and not isinstance(clock, bool)
    if not is_number or not 1 <= cast("float", clock) <= MAX_CLOCK_RATE:
        msg = (
            f"clock={shown(clock)} must be 'auto', 'real', or a rate from 1 to {MAX_CLOCK_RATE} "
            f"(virtual seconds for each real second)."
        )
        raise UsageError(msg)
    return "real" if clock == 1 else float(cast("float", clock))


def parse_clock(text: str) -> ClockChoice:
    """The clock that the text of an option names.

    Raises:
        UsageError: the text names no clock.
    """
    try:
        rate = float(text)
    except ValueError:
        return check_clock(text)
    return check_clock(rate)


def check_network(network: object) -> Network:
    """`network` if it is "auto", "private" or "host".

    Raises:
        UsageError: it is none of these.
    """
    if is_one_of(network, ("auto", "private", "host")):
        return cast("Network", network)
    msg = f"network={shown(network)} must be 'auto', 'private' or 'host'."
    raise UsageError(msg)


def _check_init(options: ClusterOptions) -> Init:
    init = options.get("init", True)
    if not isinstance(init, bool) and not is_one_of(init, ("adopt",)):
        msg = f"init={shown(init)} must be True or False, or 'adopt'."
        raise UsageError(msg)
    given = [name for name in _PROGRAMS_OWN if name in options]
    if init == "adopt" and given:
        msg = (
            f"{given[0]}={shown(dict(options)[given[0]])} has no effect with init='adopt': the "
            f"program says it when it calls init_rpc. Leave it out."
        )
        raise UsageError(msg)
    return init


def _check_keywords(options: Mapping[str, object]) -> None:
    """Raise for unknown or missing options; `Unpack` checks nothing."""
    known = ClusterOptions.__annotations__
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}."
            msg = f"a cluster has no option {name!r}; {hint}"
            raise UsageError(msg)
    if "world_size" not in options:
        msg = "a cluster needs its number of ranks; give it world_size=."
        raise UsageError(msg)


def _check_number(name: str, value: object, top: float, *, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= top:
        kind = "an int" if whole else "a number"
        msg = f"{name}={shown(value)} must be {kind} above 0 and at most {top:g}."
        raise UsageError(msg)


def check_bool(name: str, value: object) -> bool:
    """`value` if it is a bool.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, bool):
        msg = f"{name}={shown(value)} must be True or False."
        raise UsageError(msg)
    return value


def _check_names(names: Sequence[str] | None, world_size: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"worker{rank}" for rank in range(world_size))
    must_be = f"{world_size} different names, one for each rank"
    given: tuple[Any, ...] = tuple(items("names", names, MAX_WORLD_SIZE + 1, must_be))
    for name in given:
        if not isinstance(name, str) or not name or len(name) >= 128:
            msg = f"names={shown(names)}: {shown(name)} must be a string of 1 to 127 characters."
            raise UsageError(msg)
        if not all(c.isascii() and (c.isalnum() or c in "_:-") for c in name):
            msg = (
                f"the name {shown(name)} may hold letters, digits, and any of _ : - only "
                "(torch's rule)."
            )
            raise UsageError(msg)
    if len(given) != world_size or len(set(given)) != world_size:
        msg = f"{argument('names', names)} must be {must_be}."
        raise UsageError(msg)
    return cast("tuple[str, ...]", given)
