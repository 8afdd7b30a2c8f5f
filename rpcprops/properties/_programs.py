"""Hand-written programs: the ways in which RRefs and contexts are used."""

from __future__ import annotations

from itertools import permutations

from rpcprops.programs import (
    Bump,
    Call,
    Context,
    Drop,
    Fetch,
    Flavour,
    Nest,
    Own,
    Program,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
)

FLAVOURS: tuple[Flavour, ...] = ("python", "builtin", "script")


def create_and_fetch(flavour: Flavour, size: int = 2) -> Program:
    """The creator fetches a remote value, before and after everything has settled."""
    return Program(
        size,
        (
            Remote(0, 1, "a", flavour=flavour),
            Fetch(0, "a"),
            Settle(),
            Fetch(0, "a"),
            Drop(0, "a"),
        ),
        f"create_and_fetch[{flavour}]",
    )


def create_on_self() -> Program:
    """``remote`` to the calling rank itself; the RRef is shared with a user."""
    return Program(
        2,
        (
            Remote(0, 0, "a"),
            Fetch(0, "a"),
            Share(0, "a", 1, "b"),
            Drop(0, "a"),
            Fetch(1, "b"),
            Settle(),
            Fetch(1, "b"),
            Drop(1, "b"),
        ),
        "create_on_self",
    )


def fork_user_to_user() -> Program:
    """A user forks to another user and drops its own fork; the new fork keeps the value alive."""
    return Program(
        3,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 2, "b"),
            Drop(0, "a"),
            Fetch(2, "b"),
            Settle(),
            Fetch(2, "b"),
            Drop(2, "b"),
        ),
        "fork_user_to_user",
    )


def fork_user_to_owner() -> Program:
    """A user sends the RRef to its owner, which still has it after the user has dropped it."""
    return Program(
        2,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 1, "b"),
            Drop(0, "a"),
            Settle(),
            Fetch(1, "b"),
            Drop(1, "b"),
        ),
        "fork_user_to_owner",
    )


def fork_back_to_creator() -> Program:
    """Creator to user and back: the creator holds two forks of one value."""
    return Program(
        3,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 2, "b"),
            Share(2, "b", 0, "c"),
            Drop(0, "a"),
            Drop(2, "b"),
            Settle(),
            Fetch(0, "c"),
            Drop(0, "c"),
        ),
        "fork_back_to_creator",
    )


def fork_to_self() -> Program:
    """A user sends the RRef to itself."""
    return Program(
        2,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 0, "b"),
            Drop(0, "a"),
            Fetch(0, "b"),
            Settle(),
            Drop(0, "b"),
        ),
        "fork_to_self",
    )


def fork_chain(size: int) -> Program:
    """Along a chain of all ranks; each drops its handle once the next one has it."""
    steps: list[Step] = [Remote(0, size - 1, "h0")]
    for rank in range(1, size):
        steps += [
            Share(rank - 1, f"h{rank - 1}", rank, f"h{rank}"),
            Drop(rank - 1, f"h{rank - 1}"),
            Fetch(rank, f"h{rank}"),
        ]
    steps += [Settle(), Fetch(size - 1, f"h{size - 1}"), Drop(size - 1, f"h{size - 1}")]
    return Program(size, tuple(steps), f"fork_chain[{size}]")


def owner_shares(size: int) -> Program:
    """An owner makes the RRef itself and shares it with every other rank."""
    steps: list[Step] = [Own(0, "mine", (5.0, 6.0))]
    steps += [Share(0, "mine", rank, f"h{rank}") for rank in range(1, size)]
    steps += [Drop(0, "mine"), Settle()]
    steps += [Fetch(rank, f"h{rank}") for rank in range(1, size)]
    steps += [Drop(rank, f"h{rank}") for rank in range(1, size)]
    return Program(size, tuple(steps), f"owner_shares[{size}]")


def drop_order(order: tuple[str, ...]) -> Program:
    """Creator, user and owner hold one value and drop it in a given order."""
    homes = {"creator": 0, "user": 2, "owner": 1}
    steps: list[Step] = [
        Remote(0, 1, "creator"),
        Share(0, "creator", 2, "user"),
        Share(2, "user", 1, "owner"),
    ]
    alive = list(order)
    for name in order:
        steps.append(Drop(homes[name], name))
        alive.remove(name)
        steps += [Fetch(homes[other], other) for other in alive]
    return Program(3, tuple(steps), f"drop_order[{'-'.join(order)}]")


def drop_orders() -> list[Program]:
    """Every order in which the three can drop."""
    return [drop_order(order) for order in permutations(("creator", "user", "owner"))]


def nested_remote(flavour: Flavour) -> Program:
    """A function that itself calls ``remote``: on a third rank, on its caller, and on itself."""
    return Program(
        3,
        (
            Nest(0, 1, 2, "third", flavour=flavour),
            Nest(0, 1, 0, "caller", flavour=flavour),
            Nest(0, 1, 1, "itself", flavour=flavour),
            Fetch(0, "third"),
            Fetch(0, "caller"),
            Fetch(0, "itself"),
            Settle(),
            Drop(0, "third"),
            Drop(0, "caller"),
            Drop(0, "itself"),
        ),
        f"nested_remote[{flavour}]",
    )


def handle_as_argument() -> Program:
    """Handles as arguments of calls that fetch them: at a third rank, the owner, the caller."""
    return Program(
        3,
        (
            Remote(0, 1, "a"),
            Remote(0, 2, "sum", right="a"),
            Fetch(0, "sum"),
            Call(0, 1, right="a"),
            Call(0, 0, right="a"),
            Call(0, 2, right="a", wait="async"),
            Drop(0, "a"),
            Fetch(0, "sum"),
            Drop(0, "sum"),
        ),
        "handle_as_argument",
    )


def calls_of_each_kind() -> Program:
    """Python, builtin and TorchScript functions, called and waited for in both ways."""
    steps: list[Step] = []
    for flavour in FLAVOURS:
        steps += [
            Call(0, 1, flavour=flavour),
            Call(1, 0, flavour=flavour, wait="async"),
            Call(0, 0, flavour=flavour),
        ]
    return Program(2, tuple(steps), "calls_of_each_kind")


def bump_from_everywhere() -> Program:
    """A non-idempotent TorchScript call from creator, user and owner; each must count once."""
    return Program(
        3,
        (
            Remote(0, 1, "a", flavour="builtin"),
            Bump(0, "a"),
            Share(0, "a", 2, "b"),
            Bump(2, "b"),
            Share(2, "b", 1, "o"),
            Bump(1, "o"),
            Fetch(0, "a"),
            Fetch(2, "b"),
            Drop(0, "a"),
            Drop(1, "o"),
            Drop(2, "b"),
        ),
        "bump_from_everywhere",
    )


def context_over(
    size: int,
    path: tuple[int, ...],
    *,
    nested: bool = False,
    rrefs: bool = False,
    backward: bool = True,
    raises: bool = False,
    at: int = 0,
) -> Program:
    """A context over a path of ranks; afterwards every rank refuses its id."""
    words = [
        word
        for word, on in (
            ("nested", nested),
            ("rrefs", rrefs),
            ("forward", not backward),
            ("raises", raises),
        )
        if on
    ]
    inner = ",".join([str(size), "".join(str(r) for r in path) or "alone", *words])
    return Program(
        size,
        (
            Context(at, "x", path, nested=nested, rrefs=rrefs, backward=backward, raises=raises),
            Settle(),
            *(Refused(rank, "x") for rank in range(size)),
        ),
        f"context[{inner}]",
    )


def two_contexts() -> Program:
    """Contexts of two ranks, one after the other, with an RRef alive across both."""
    return Program(
        3,
        (
            Remote(0, 2, "a"),
            Context(0, "x", (1, 2)),
            Context(1, "y", (0, 2), rrefs=True),
            Fetch(0, "a"),
            Settle(),
            Refused(2, "x"),
            Refused(0, "y"),
            Drop(0, "a"),
        ),
        "two_contexts",
    )


def unsettled_exit(size: int = 3) -> Program:
    """Shutdown right after the last step, with handles of every kind still alive."""
    return Program(
        size,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 2, "b"),
            Share(2, "b", 1, "o"),
            Own(0, "mine"),
            Share(0, "mine", 1, "c"),
            Fetch(2, "b"),
        ),
        f"unsettled_exit[{size}]",
        settles=False,
    )


def just_dropped() -> Program:
    """Shutdown right after dropping everything, while deletes are on their way."""
    return Program(
        3,
        (
            Remote(0, 1, "a"),
            Share(0, "a", 2, "b"),
            Drop(0, "a"),
            Drop(2, "b"),
        ),
        "just_dropped",
        settles=False,
    )


def timed_call(flavour: Flavour, timeout: float) -> Program:
    """A call with its own timeout, then one without, then a settle."""
    return Program(
        2,
        (
            Remote(0, 1, "a"),
            Call(0, 1, (1.0,), (2.0,), flavour=flavour, timeout=timeout),
            Call(0, 1, (3.0,), (4.0,), flavour=flavour),
            Fetch(0, "a"),
            Drop(0, "a"),
        ),
        f"timed_call[{flavour}]",
    )


def create_and_drop() -> Program:
    """The smallest life of an RRef."""
    return Program(2, (Remote(0, 1, "a"), Fetch(0, "a"), Drop(0, "a")), "create_and_drop")
