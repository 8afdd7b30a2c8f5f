"""The shipped programs, and some that use what those do not: every kind and field of a step."""

from __future__ import annotations

import itertools
from typing import Any, get_args

from rpcprops.programs import (
    After,
    Ask,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Default,
    Deferred,
    Drop,
    End,
    FailTwice,
    Fetch,
    Flavour,
    Gather,
    Graph,
    Invoke,
    Linear,
    Local,
    Member,
    Method,
    Module,
    Nest,
    Onward,
    Optimize,
    Outlast,
    Own,
    Parallel,
    Pause,
    Profile,
    Program,
    Raising,
    Reach,
    Recurse,
    Refused,
    Rejoin,
    Remote,
    Retry,
    Scripted,
    Settle,
    Share,
    Shutdown,
    Step,
    Through,
    Train,
    Unreached,
    Wait,
)
from rpcprops.properties import _programs as shipped
from rpcprops.steps.functions import RaisedIn, ScriptedBy, ScriptedForm
from rpcprops.steps.groups import OUTSIDE
from rpcprops.steps.life import AMID, BETWEEN, FAILING, WORK, Amid, Failing, Leaving
from rpcprops.steps.timeouts import LONGEST
from rpcprops.steps.values import SORTS
from rpcprops.steps.values import WAYS as WAYS_OF_VALUES
from rpcprops.steps.ways import ANYWHERE, CONFIRMED, OF_USERS, Of
from rpcprops.steps.ways import FORMS as EVERY_FORM

#: The ways to use a future that stock torch does right: not the finding refused-exception-kept.
FORMS = tuple(form for form in EVERY_FORM if form != "exception late")

FUTURES = Program(
    3,
    (
        Call(0, 1, (1.0, 2.0), (3.0, 4.0), wait="later", out="f"),
        Count(0, 1),
        Call(0, 1, flavour="script", raises=True, wait="later", out="g"),
        Count(2, 1),
        Chain(0, 1, 2),
        Chain(0, 0, 0, (1.0, 2.0), (3.0, 4.0)),
        Wait(0, "g"),
        Wait(0, "f"),
        Call(1, 2, raises=True),
    ),
    "futures",
)
PROXIES = Program(
    3,
    (
        Own(1, "o", (1.0, 2.0)),
        Local(1, "o"),
        Share(1, "o", 0, "a", inside="list"),
        Through(0, "a"),
        Through(0, "a", "async", 2.5),
        Through(0, "a", "remote", 3.0, "made"),
        Through(1, "o"),
        Fetch(0, "made"),
        Share(0, "made", 2, "b", inside="dict"),
        Drop(0, "a", by="scope"),
        Pause(2, 0.5),
        Settle(),
        Fetch(2, "b"),
        Drop(2, "b"),
        Drop(0, "made"),
        Drop(1, "o"),
    ),
    "proxies",
)
RAISING = Program(
    2,
    (
        Remote(0, 1, "a", raises=True),
        Fetch(0, "a"),
        Call(0, 1, right="a"),
        Through(0, "a"),
        Through(0, "a"),
        Call(0, 1, raises=True),
        Drop(0, "a"),
    ),
    "raising",
)
TRAINING = Program(
    3,
    (
        Module(0, 1, (1.0, 2.0, 3.0)),
        Optimize(0, "x", (1, 2), (2.0, 4.0)),
        Module(2, 2, refused="to"),
        Module(0, 2, mode="eval"),
        Module(1, 0, mode="train", again=True),
        Module(0, 1, called=True),
        Module(1, 2, mode="eval", again=True, sent=True),
        Optimize(1, "y", (1,)),
        Context(2, "z", (1,)),
        Settle(),
        Refused(1, "z"),
    ),
    "training",
)
CONTEXTS = Program(
    3,
    (
        Context(0, "x", (1, 2), retain=True),
        Context(0, "y", (1, 2), nested=True, rrefs=True, retain=True, raises=True),
        Context(2, "z", (0, 1), value=(3.0,), breaks=1),
        Context(1, "w", (2,), root=0),
        Context(1, "v", (2, 0), late=1, timeout=700.0),
        Settle(),
        Refused(1, "x"),
        Refused(2, "y"),
        Refused(0, "z"),
    ),
    "contexts",
)
#: Backward passes that never end, one of them at a rank that calls itself.
UNREACHED = Program(
    3,
    (
        Unreached(0, 1, "x"),
        Call(1, 0),
        Unreached(2, 2, "y", (3.0,)),
        Unreached(1, 0, "z", by="timeout"),
        Settle(),
        Refused(1, "x"),
        Refused(0, "z"),
    ),
    "unreached",
)
#: Calls in contexts that end by their timeouts, and backward passes of the rest.
LATE = Program(
    3,
    (
        Graph(
            0,
            "x",
            ((0, "plain"), (1, "hooked")),
            (("mul", (0, 1), 2, "async"),),
            ((2,),),
            late=(1, "remote"),
            late_timeout=2.0,
            out="a",
        ),
        Graph(1, "y", ((1, "plain"),), (("hook", (0,), 0, "sync"),), ((1,),), late=(0, "proxy")),
        Graph(2, "z", ((2, "plain"),), late=(2, "async")),
        Settle(),
        Fetch(0, "a"),
        Drop(0, "a"),
        Settle(),
        Refused(1, "x"),
        Refused(0, "y"),
    ),
    "late in contexts",
)
GRAPHS = Program(
    3,
    (
        Graph(
            0,
            "x",
            ((0, "plain"), (1, "hooked"), (2, "fixed")),
            (
                ("add", (0, 1), 1, "sync"),
                ("mul", (3, 2), 2, "async"),
                ("inplace", (4,), 2, "remote"),
                ("custom", (5,), 1, "proxy"),
                ("hook", (6,), 1, "relay"),
                ("hook", (7,), 0, ""),
                ("mul", (0, 0), 0, ""),
            ),
            ((8,), (8, 9)),
            (3.0, -1.0),
            beside=True,
            inside=1,
        ),
        Linear(1, "y", 2, (1.0, 2.0, 3.0), "proxy"),
        Linear(2, "z", 2, by="async"),
        Linear(0, "w", 1, by="call", layer="norm"),
        Linear(1, "v", 0, layer="sparse"),
        Linear(2, "s", 1, by="async", layer="keywords"),
        Train(0, "t", (1, 2), "Adam", 3),
        Train(2, "r", (1, 1, 0), "AdamW", options=("betas", "eps"), left_out=((1, 1),)),
        Train(0, "q", (1, 2), "Adamax", refused="betas"),
        Train(1, "u", (1, 0), value=(3.0,)),
        Settle(),
        Refused(1, "x"),
        Refused(2, "y"),
    ),
    "graphs",
)
#: Every way to call inside a context, and slow functions there and elsewhere.
WAYS_IN_CONTEXTS = Program(
    3,
    (
        Context(0, "x", (1, 2), flavour="builtin", named="id", wait="async"),
        Context(1, "y", (2, 0), flavour="script", named="info", rrefs=True),
        Context(2, "z", (0, 1), flavour="python", nested=True, wait="async", seconds=0.5),
        Graph(
            0,
            "u",
            ((0, "plain"),),
            (
                ("add", (0, 0), 1, "builtin"),
                ("mul", (0, 1), 2, "builtin async"),
                ("add", (2, 1), 1, "builtin remote"),
                ("mul", (3, 0), 2, "script"),
                ("inplace", (4,), 1, "script async"),
                ("add", (5, 0), 2, "script remote"),
                ("add", (6, 0), 0, "proxy async"),
                ("hook", (7,), 1, "proxy remote"),
                ("custom", (8,), 2, "id"),
                ("add", (9, 0), 1, "info"),
            ),
            ((10,),),
            seconds=0.5,
        ),
        Graph(
            1,
            "s",
            ((1, "plain"), (0, "hooked")),
            (
                ("mul", (0, 1), 0, "proxy before async"),
                ("hook", (2,), 0, "proxy before"),
                ("add", (3, 0), 2, "proxy again"),
                ("inplace", (4,), 2, "proxy again async"),
                ("custom", (5,), 2, "proxy again remote"),
                ("add", (6, 1), 0, "async then"),
                ("mul", (0, 0), 2, "async done"),
                ("add", (7, 8), 0, "async collect_all"),
                ("hook", (8,), 1, "async collect_all"),
                ("add", (1, 0), 2, "async wait_all"),
                ("add", (9, 10), 1, ""),
                ("add", (11, 12), 1, ""),
            ),
            ((13,), (13,)),
        ),
        Settle(),
        Outlast(0, 1, "v", by="timeout", through="future", named="id"),
        Outlast(1, 2, "w", "gradient", "timeout", through="remote", named="info"),
        Outlast(2, 0, "t", "call", "timeout", 1, through="proxy"),
        Settle(),
        Refused(0, "u"),
        Refused(2, "w"),
    ),
    "ways in contexts",
)
SLOW_EVERYWHERE = Program(
    3,
    (
        Module(0, 1, seconds=0.5),
        Linear(0, "x", 1, seconds=0.5),
        Optimize(1, "y", (0, 1), seconds=0.5),
        Train(2, "z", (0, 1), seconds=0.5),
        Profile(0, 2, seconds=0.5),
        Profile(1, 2, "nested", 0, seconds=0.5),
        Remote(0, 1, "a"),
        Fetch(0, "a"),
        Through(0, "a"),
        Through(0, "a", seconds=12.0, timeout=3.0),
        Through(0, "a", "async", seconds=0.5, timeout=900.0),
        Settle(),
        Drop(0, "a"),
    ),
    "slow everywhere",
)
BRANCHES = Program(
    3,
    (
        Remote(0, 1, "a", flavour="builtin"),
        Own(2, "c", (7.0,)),
        Parallel(
            (
                (Bump(0, "a"), Fetch(0, "a"), Share(0, "a", 1, "b"), Count(0, 1)),
                (Nest(1, 0, 2, "n", flavour="script"), Context(1, "x", (2, 0)), Fetch(1, "n")),
                (Share(2, "c", 0, "d"), Call(2, 0, wait="later", out="f"), Wait(2, "f")),
            )
        ),
        Settle(),
        Fetch(0, "d"),
        Local(1, "b"),
        Refused(0, "x"),
    ),
    "branches",
)
TIMED = Program(
    3,
    (
        Remote(0, 1, "a", timeout=900.0),
        Fetch(0, "a", timeout=900.0),
        Share(0, "a", 2, "b", timeout=900.0),
        Call(0, 2, timeout=900.0),
        Through(0, "a", timeout=900.0),
        Settle(),
        Fetch(2, "b"),
        Drop(2, "b"),
        Drop(0, "a"),
    ),
    "timed",
)
IMPATIENT = Program(
    3,
    (
        Call(0, 1, timeout=0.5),
        Call(0, 1, flavour="script", timeout=0.5, wait="later", out="f"),
        Wait(0, "f"),
        Own(1, "o"),
        Share(1, "o", 0, "a"),
        Fetch(0, "a", timeout=0.5),
        Through(0, "a"),
        Through(0, "a", timeout=0.5),
        Share(0, "a", 2, "b", timeout=0.5),
        Settle(),
        Fetch(2, "b"),
        Drop(2, "b"),
        Drop(0, "a"),
        Drop(1, "o"),
    ),
    "impatient",
)
RAISED = Program(
    3,
    (
        Raising(0, 1),
        Raising(0, 1, "value", ": {text}", how="async"),
        Raising(0, 1, "code", "\n", 30, "remote"),
        Raising(1, 1, "local", how="remote"),
        Raising(2, 0, "exit", how="deferred"),
        Raising(2, 1, "rref"),
        Parallel(((Raising(0, 1, "type"),), (Raising(1, 2, "key", how="then"),))),
        Recurse(0, (1, 0, 2), 0.5),
        Recurse(1, (1, 1), spins=True),
    ),
    "raised",
)
CALLABLES = Program(
    3,
    (
        Invoke(0, 1),
        Invoke(0, 1, "keywords", (1.0, 2.0), (3.0, 4.0), "async"),
        Invoke(0, 1, "constructor", how="remote"),
        Invoke(2, 1, "method", how="proxy"),
        Invoke(0, 1, "operator"),
        Invoke(0, 1, "operator"),
        Invoke(0, 1, "generator"),
        Invoke(0, 1, "lambda", how="remote"),
        Invoke(0, 1, "script", how="proxy"),
        Invoke(0, 1, "script"),
        Deferred(0, 1, 2),
        Deferred(0, 1, 2, "thens", (1.0, 2.0), (3.0, 4.0), "remote"),
        Deferred(0, 1, 1, "again", how="proxy"),
        Deferred(0, 0, 0, "thread", how="proxy_remote"),
        Deferred(2, 1, 0, "nothing", how="class"),
        Deferred(2, 1, 0, "raises", how="async"),
        Deferred(0, 1, 2, how="proxy_async"),
        Deferred(1, 2, 0, "thens", how="static_proxy_async"),
        Deferred(2, 0, 1, "raises", how="class_proxy"),
        Deferred(0, 2, 1, "call", how="class_remote"),
        Scripted(0, 1, 2),
        Scripted(0, 1, 1, "sync", (1.0, 2.0), (3.0, 4.0), "async"),
        Scripted(2, 0, 1, "remote", how="remote"),
        Scripted(0, 1, 2, "future"),
        Scripted(1, 1, 1, "fork"),
    ),
    "callables",
)

VALUES = Program(
    3,
    (
        Carry(0, 1),
        Carry(1, 0, "bfloat16", "echo"),
        Carry(0, 2, "str", "async"),
        Carry(2, 0, "module", "remote"),
        Carry(0, 1, "sparse_coo", "own"),
        Carry(1, 1, "set", "own"),
        Carry(0, 1, "rref-pair", "echo"),
        Carry(0, 1, "rref-list", "remote"),
        Carry(1, 2, "rref"),
        Carry(2, 1, "rref", "own"),
        Carry(1, 0, "rref-exception", "echo"),
        Carry(0, 2, "rref-partial", "async"),
        Carry(0, 1, "slow-unpickled", "async"),
        Carry(1, 2, "counted", "echo"),
        Carry(2, 1, "dict", "remote-echo"),
        Carry(0, 0, "counted", "remote-echo"),
    ),
    "values",
)

WAYS = Program(
    3,
    (
        Reach(0, 1),
        Reach(0, 1, "id", "async", flavour="builtin"),
        Reach(0, 2, "info", "remote", (1.0, 2.0), (3.0, 4.0), flavour="script"),
        Reach(1, 1, "myself", "remote"),
        Reach(2, 0, timeout=LONGEST),
        *(Reach(0, 1, named) for named in ("no name", "no id", "no type")),
        *(After(0, 1, form) for form in FORMS),
        After(2, 0, "chain", (1.0, 2.0), (3.0, 4.0)),
        After(0, 1, raises=True),
        Gather(0, (1, 2)),
        Gather(0, (1, 0, 1), "collect_all", (1.0, 2.0), (3.0, 4.0)),
        Gather(1, (2, 2), "threads"),
        Gather(2, (0, 1), "collect_all", breaks=0),
        Gather(2, (0, 1), "done"),
        Onward(0, 1, 2),
        Onward(1, 2, 0, 3, (1.0, 2.0), (3.0, 4.0), 3.0, 12.0, 600.0),
        Own(1, "o"),
        Share(1, "o", 0, "u"),
        *(Ask(1, "o", what) for what in (*ANYWHERE, CONFIRMED)),
        *(Ask(0, "u", what) for what in (*ANYWHERE, *OF_USERS)),
        Method(0, 1),
        Method(0, 2, "remote", "kwargs", 5.0),
        Method(2, 2, "async"),
        Method(1, 0, form="missing"),
        Method(2, 0, "async", "property"),
        Method(1, 2, "remote", "static"),
        Method(0, 1, form="call"),
        Settle(),
        Default(0, 1),
        Default(0, 1, 40000.0, endless=True, left=(3.0,), right=(-1.0,)),
        Drop(0, "u"),
        Drop(1, "o"),
    ),
    "ways",
)

PROFILES = Program(
    4,
    (
        Profile(0, 1),
        Profile(0, 2, "async", flavour="builtin"),
        Profile(3, 0, "nested", 1, left=(1.0, 2.0), right=(3.0, 4.0)),
        Profile(1, 3, "deferred", 0),
        Profile(0, 1, "late", flavour="script"),
        Profile(0, 1, "remote", flavour="script"),
        Profile(0, 2, "remote", left=(3.0,), right=(-1.0,)),
        Profile(2, 1, raises=True),
        Profile(2, 1, "async", flavour="script", raises=True),
        Parallel(((Profile(0, 1),), (Profile(2, 3, "async"), Call(2, 1)))),
    ),
    "profiles",
)


def profiled_again(at: int, to: int) -> Program:
    """Profiled calls that are made several times, or after one that cannot be pickled."""
    steps = (
        Profile(at, to, times=2),
        Profile(at, to, "async", flavour="builtin", times=9),
        Profile(to, at, unpicklable=True),
        Profile(at, at, "async", left=(3.0,), right=(-1.0,), times=2, unpicklable=True),
    )
    return Program(4, steps, "profiled again")


PROFILED_AGAIN = tuple(profiled_again(*ranks) for ranks in itertools.permutations(range(4), 2))


def lives(at: int, *first: int) -> Program:
    """Ranks that leave and come back in each way; `first` says in which order they leave."""
    return Program(
        3,
        (
            Call(0, 1),
            Context(1, "x", (2,)),
            Settle(),
            Rejoin(at, "at once", first, OUTSIDE),
            Count(0, 2),
            Profile(2, 1),
            Settle(),
            Refused(0, "x"),
            Rejoin(0, outside=("shutdown",), failing=FAILING[at]),
            Count(1, 2),
            Settle(),
            Rejoin(
                2,
                "timeout",
                first,
                failing=FAILING[3 + len(first) % 2],
                between=BETWEEN[1 + at % 2],
            ),
            Chain(0, 1, 2),
        ),
        f"lives[{at},{','.join(map(str, first))}]",
    )


LIVES = tuple(lives(at, *first) for at in range(3) for first in ((), (2,), (1, 0), (2, 0, 1)))


def alone(at: int, gone: int, amid: Amid, how: Leaving) -> Program:
    """A rank that leaves before the others, which go on without it; then all come back."""
    work = WORK if amid else WORK[:1]
    steps = (
        Call(0, 1),
        Settle(),
        Rejoin(at, how, (2, 0), ("shutdown",), alone=gone, amid=amid, work=work),
        Count(1, 2),
    )
    return Program(3, steps, f"alone[{at},{gone},{amid},{how}]", end=End("at once"))


ALONE = tuple(
    alone(at, gone, amid, "at once" if number % 2 else "timeout")
    for at, gone in itertools.permutations(range(3), 2)
    for number, amid in enumerate(AMID)
)


def profiled_life(at: int, other: int, how: Leaving) -> Program:
    """A profiler around a context, around the delete of an RRef, and around ranks that leave."""
    steps = (
        Context(at, "x", (other, 3 - at - other), profiled=True),
        Profile(other, at, "remote", rests=True),
        Settle(),
        Rejoin(at, how, profiled=True),
        Context(at, "y", (other,), nested=True, profiled=True),
    )
    return Program(3, steps, f"profiled_life[{at},{other},{how}]")


PROFILED_LIVES = tuple(
    profiled_life(at, other, how)
    for at, other in itertools.permutations(range(3), 2)
    for how in get_args(Leaving)
)


def wrong_at_one(at: int, failing: Failing, how: Leaving) -> Program:
    """An init that goes wrong at one rank before all ranks come back."""
    steps = (Call(0, 1), Settle(), Rejoin(at, how, failing=failing), Count(1, 2))
    return Program(3, steps, f"wrong_at_one[{at},{failing},{how}]")


WRONG_AT_ONE = tuple(
    wrong_at_one(at, failing, how)
    for at in range(3)
    for how in get_args(Leaving)
    for failing in FAILING[FAILING.index("one no store") :]
    if "unreachable" not in failing
)


def refused_init(at: int, how: Leaving) -> Program:
    """A rank whose ``init_rpc`` is refused, because RPC is running, before all ranks leave."""
    steps = (Call(0, 1), Settle(), Rejoin(at, how, failing="running"), Count(1, at))
    return Program(4, steps, f"refused_init[{at},{how}]")


REFUSED_INITS = tuple(
    refused_init(at, how) for at in range(4) for how in ("graceful", "timeout", "at once")
)


def retries(at: int, via: int, to: int) -> Program:
    """RRefs whose owner is too busy to answer the first fork request."""
    steps = (Call(at, to), Settle(), Retry(at, via, to, (1.0, 2.0), 900.0), Count(at, via))
    return Program(4, (*steps, Settle(), Retry(to, via, to)), "retries")


RETRIES = tuple(retries(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]


#: Dynamic groups, which no fault can reach; the last two meet what stock torch gets wrong in them.
GROUPS = (
    Program(
        3,
        (
            Member(2),
            Member(0),
            Call(0, 2),
            Member(1),
            Count(1, 0),
            Chain(0, 1, 2),
            Remote(0, 2, "a"),
            Fetch(0, "a"),
            Member(2, "look"),
            Member(1, "leave"),
            Member(0, "look"),
            Call(2, 0),
            Drop(0, "a"),
            Member(2, "look"),
        ),
        "group",
        settles=False,
    ),
    Program(
        3,
        (
            Member(1, "outside"),
            Member(0, profiled=True),
            Member(1, "outside", what="shutdown"),
            Member(1, profiled=True),
            Member(2),
            Call(1, 0),
            Member(0, "leave", profiled=True),
            Member(0, "outside", what="get_rpc_timeout"),
            Member(1, "look"),
            Member(2, "leave at once", profiled=True),
        ),
        "profiled group",
        settles=False,
    ),
    Program(2, (Member(0), Member(1, "refused"), Member(0, "look")), "refused join", settles=False),
    Program(
        2,
        (Member(1), Member(0), Member(0, "leave"), Member(0), Member(0, "look")),
        "rejoined",
        settles=False,
    ),
    Program(
        2,
        (
            Member(0),
            Member(1),
            Remote(1, 0, "a"),
            Fetch(1, "a"),
            Remote(1, 0, "b"),
            Fetch(1, "b"),
            Member(0, "look"),
            Member(1, "leave"),
            Member(0, "look"),
        ),
        "left with RRefs",
        settles=False,
    ),
)


def refusing(founder: int, user: int, other: int) -> Program:
    """A member uses a value of another one, and other ranks are refused in the order of ranks."""
    steps = (Member(founder), Member(user), Remote(user, founder, "a"), Fetch(user, "a"))
    (last,) = {0, 1, 2, 3} - {founder, user, other}
    refusals = (
        Member(other, "refused", why="static"),
        Member(last, "refused", why="taken name" if user % 2 else "taken rank", taken=user),
    )
    return Program(4, (*steps, *refusals, Member(founder, "look")), "refusing", settles=False)


def left_at_once(stays: int, other: int, goes: int) -> Program:
    """A member leaves without telling those that stay; its name has a dash, and it joined last."""
    (refused,) = {0, 1, 2, 3} - {stays, other, goes}
    steps = (
        Member(stays),
        Member(refused, "refused", why="static"),
        Member(other),
        Member(goes, dash=True),
        Call(goes, stays),
        Call(other, goes),
        Member(goes, "leave at once"),
        Member(stays, "look"),
        Call(stays, other),
    )
    return Program(4, steps, f"left_at_once[{stays},{other},{goes}]", settles=False)


LEFT_AT_ONCE = tuple(left_at_once(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]
REFUSING = tuple(refusing(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]


def ending(how: Shutdown, *waits: float) -> Program:
    """Ranks that hold RRefs of each other when they shut down in some way."""
    steps = (Remote(0, 1, "a"), Share(0, "a", 2, "b"), Own(2, "o"), Context(1, "x", (2,)))
    late = ",".join(f"{wait:g}" for wait in waits)
    return Program(3, steps, f"ending[{how}: {late}]", end=End(how, waits))


ENDS = (
    ending("timeout"),
    ending("twice", 0.0, 0.0, 30.0),
    ending("at once", 30.0),
    ending("graceful", 30.0, 30.0),
    ending("timed out", 0.0, 30.0),
    ending("timed out", 30.0, 0.0, 30.0),
)


def slow(at: int, to: int, other: int) -> Program:
    """Functions that sleep, with timeouts that end before them and with timeouts that do not."""
    return Program(
        4,
        (
            Remote(at, to, "a", (1.0, 2.0), (3.0, 4.0), seconds=130.0),
            Fetch(at, "a", timeout=32.5),
            Call(at, other, right="a", left=(1.0, 1.0), wait="later", out="f", seconds=2.0),
            Share(at, "a", other, "b", seconds=0.5),
            Fetch(other, "b"),
            Drop(other, "b"),
            Wait(at, "f"),
            Call(at, to, timeout=0.5, seconds=2.0),
            Call(at, other, raises=True, timeout=900.0, seconds=0.5),
            Share(at, "a", to, "c", timeout=0.5, seconds=2.0),
            Settle(),
            Local(to, "c"),
            Remote(at, other, "late", timeout=32.5, seconds=130.0),
            Settle(),
            Fetch(at, "late"),
            Remote(at, at, "own", raises=True, seconds=0.5),
            Local(at, "own"),
            Call(at, to, seconds=130.0),
        ),
        f"slow[{at},{to},{other}]",
    )


SLOW = tuple(slow(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]


def under_way(at: int, to: int, other: int) -> Program:
    """Handles that are called through, sent on and dropped before their values are made."""
    late: dict[str, Any] = {"timeout": 3.0, "seconds": 12.0}
    steps = (
        Remote(at, to, "a", (1.0, 2.0), (3.0, 4.0), seconds=2.0),
        Share(at, "a", to, "b"),
        Share(at, "a", other, "c"),
        Through(at, "a"),
        Local(to, "b"),
        Drop(at, "a"),
        Fetch(other, "c"),
        Settle(),
        Remote(at, to, "d", **late),
        Share(at, "d", other, "e"),
        Through(at, "d"),
        Settle(),
        Fetch(other, "e"),
        Drop(at, "d"),
        Drop(other, "e"),
        Remote(to, other, "i", **late),
        Call(to, at, right="i"),
        Settle(),
        Call(to, at, right="i"),
        Drop(to, "i"),
        Remote(other, to, "f", **late),
        Share(other, "f", to, "g"),
        Local(to, "g"),
        Drop(other, "f"),
        Settle(),
        Drop(to, "g"),
        Remote(at, other, "h", seconds=2.0),
        Drop(at, "h"),
        Settle(),
    )
    return Program(4, steps, f"under way[{at},{to},{other}]")


def outlived(at: int, to: int, then: int) -> Program:
    """Contexts that end before the calls which were made in them."""
    steps = (
        Outlast(at, to, "x"),
        Outlast(at, to, "y", "gradient", left=(1.0, 2.0), right=(3.0, 4.0)),
        Outlast(to, then, "z", "call", then=at),
        Settle(),
        Outlast(at, then, "u", "gradient", "timeout"),
        Parallel(((Outlast(at, to, "v", "call", "timeout", then),), (Outlast(then, to, "w"),))),
        Settle(),
        Refused(to, "x"),
        Refused(to, "y"),
        Refused(at, "z"),
        Refused(then, "u"),
        Outlast(then, at, "t", seconds=50.0),
        FailTwice(at, to, then, "s", value=(3.0,), seconds=8.0),
    )
    return Program(4, steps, f"outlived[{at},{to},{then}]")


OUTLIVED = tuple(outlived(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]
UNDER_WAY = tuple(under_way(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]


def impatient_ways(at: int, to: int, then: int) -> Program:
    """Slow functions and timeouts of the other ways of calling, alone and in threads of a rank."""
    late: dict[str, Any] = {"timeout": 3.0, "seconds": 12.0}
    in_time: dict[str, Any] = {"timeout": 900.0, "seconds": 2.0}
    steps = (
        After(at, to, "callback", **late),
        After(at, to, "chain", raises=True, **in_time),
        Reach(at, to, "id", "async", **late),
        Reach(at, to, "info", "remote", seconds=2.0),
        Gather(at, (to, then), "collect_all", **late),
        Gather(at, (to, to), "threads", **in_time),
        Recurse(at, (to, then, to), 12.0, timeout=3.0),
        Settle(),
        Invoke(at, to, "bound", how="async", **late),
        Deferred(at, to, then, "again", **late),
        Settle(),
        Scripted(at, to, then, **late),
        Scripted(at, to, then, "sync", **late),
        Scripted(at, to, then, "future", how="async", **in_time),
        Settle(),
        Chain(at, to, then, **late),
        Settle(),
        Raising(at, to, "value", **late),
        Raising(at, then, how="then", **late),
        Carry(at, then, "list", "echo", **late),
        Settle(),
        Method(at, to, timeout=70.0, seconds=140.0),
        Invoke(at, to, "constructor", how="remote", seconds=2.0),
        Deferred(at, then, to, "thens", how="class", **in_time),
        Raising(at, to, "key", how="deferred", **in_time),
        Carry(at, to, "str", **in_time),
        Chain(at, then, to, **in_time),
        Method(at, then, **in_time),
        Count(at, then),
        Count(at, to, **late),
        Count(at, then, **in_time),
        Remote(at, to, "b", flavour="script"),
        Bump(at, "b", 900.0),
        Nest(at, to, then, "n", **in_time),
        Fetch(at, "b"),
        Fetch(at, "n"),
        Settle(),
        Count(then, to),
        Default(at, to, 3.0, sleeps=12.0),
        Settle(),
        Default(at, then, 3.0, sleeps=12.0, how="async"),
        Default(then, at, 900.0, sleeps=2.0, how="remote"),
        Settle(),
        Default(at, to, 3.0, sleeps=12.0, how="fetch"),
        Settle(),
        Default(to, at, 3.0, sleeps=12.0, how="proxy"),
        Settle(),
        Default(then, to, 3.0, endless=True, sleeps=2.0),
        Onward(at, to, then, 2, (1.0,), (2.0,), 3.0, 12.0, 600.0),
        Settle(),
        Parallel(
            (
                (Invoke(at, to, "operator"), Carry(at, to, "rref"), Gather(at, (to, then))),
                (Recurse(at, (to, then), 2.0, timeout=900.0), Method(at, to, "async")),
                (
                    Deferred(at, then, to, "again"),
                    Scripted(at, to, then, "fork"),
                    Reach(at, to),
                    After(at, then, "own result"),
                ),
            )
        ),
    )
    return Program(4, steps, "impatient ways")


def unread(at: int, via: int, to: int) -> Program:
    """Answers that bring handles after the timeouts of their calls."""
    late: dict[str, Any] = {"timeout": 3.0, "seconds": 12.0}
    steps = (
        Nest(at, via, to, "a", **late),
        Nest(at, via, via, "b", flavour="builtin", **late),
        Nest(via, to, via, "c", (2.0,), (1.0,), **late),
        Fetch(at, "b"),
        Count(at, via),
        Settle(),
        Fetch(at, "a"),
        Drop(via, "c"),
        Parallel(((Nest(at, at, to, "d", **late),), (Nest(to, via, to, "e", timeout=900.0),))),
        Fetch(to, "e"),
        Settle(),
    )
    return Program(4, steps, f"unread[{at},{via},{to}]")


UNREAD = tuple(unread(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]
IMPATIENT_WAYS = tuple(impatient_ways(*r) for r in itertools.permutations(range(4), 3))[::2]


def outlasting(at: int, to: int, then: int) -> Program:
    """Functions that outlast the default timeout of the program, and timeouts that exceed it."""
    steps = (
        Call(at, to, seconds=130.0),
        Call(at, to, timeout=800.0, seconds=145.0),
        Remote(at, to, "a", timeout=800.0, seconds=145.0),
        Fetch(at, "a"),
        Settle(),
        Fetch(at, "a"),
        Share(at, "a", then, "b", seconds=130.0),
        Fetch(then, "b"),
        Remote(at, then, "c", seconds=130.0),
        Settle(),
        Fetch(at, "c"),
        Count(at, to),
    )
    return Program(4, steps, "outlasting", rpc_timeout=100.0)


OUTLASTING = tuple(outlasting(*ranks) for ranks in itertools.permutations(range(4), 3))[::2]
THREADS = Program(
    3,
    (
        Own(0, "o", (1.0, 2.0)),
        Remote(0, 1, "b", flavour="script"),
        Parallel(
            (
                (Remote(0, 1, "a", seconds=2.0), Fetch(0, "a"), Share(0, "a", 2, "c")),
                (Call(0, 1, timeout=0.5, seconds=2.0), Count(0, 2), Chain(0, 1, 2)),
                (Bump(0, "b"), Context(0, "x", (1, 2)), Through(0, "b"), Drop(0, "b")),
                (Call(1, 0, flavour="builtin"), Nest(1, 2, 0, "n"), Fetch(1, "n")),
                (Own(1, "p"), Local(1, "p"), Call(1, 2, wait="later", out="f"), Wait(1, "f")),
            )
        ),
        Settle(),
        Fetch(2, "c"),
        Refused(2, "x"),
    ),
    "threads",
)

#: Programs that hold every kind of step between them, and every field of one off its default.
EVERY_KIND = (
    FUTURES,
    PROXIES,
    RAISING,
    TRAINING,
    CONTEXTS,
    GRAPHS,
    WAYS_IN_CONTEXTS,
    SLOW_EVERYWHERE,
    UNREACHED,
    LATE,
    BRANCHES,
    TIMED,
    IMPATIENT,
    RAISED,
    CALLABLES,
    VALUES,
    WAYS,
    PROFILES,
    PROFILED_AGAIN[0],
    SLOW[0],
    OUTLASTING[0],
    IMPATIENT_WAYS[0],
    UNDER_WAY[0],
    UNREAD[0],
    OUTLIVED[0],
    THREADS,
)


def shipped_programs() -> list[Program]:
    """What every maker of programs makes, with each of its variants."""
    found = [
        *(shipped.create_and_fetch(flavour) for flavour in shipped.FLAVOURS),
        shipped.create_on_self(),
        shipped.fork_user_to_user(),
        shipped.fork_user_to_owner(),
        shipped.fork_back_to_creator(),
        shipped.fork_to_self(),
        *(shipped.fork_chain(size) for size in (2, 3, 4)),
        *(shipped.owner_shares(size) for size in (2, 3, 4)),
        *shipped.drop_orders(),
        *(shipped.nested_remote(flavour) for flavour in shipped.FLAVOURS),
        shipped.handle_as_argument(),
        shipped.calls_of_each_kind(),
        shipped.bump_from_everywhere(),
        shipped.two_contexts(),
        *(shipped.unsettled_exit(size) for size in (3, 4)),
        shipped.just_dropped(),
        *(shipped.timed_call(flavour, 601.5) for flavour in shipped.FLAVOURS),
        shipped.create_and_drop(),
    ]
    paths: dict[int, list[tuple[int, ...]]] = {
        2: [(), (0,), (1,), (1, 0)],
        3: [(1, 2)],
        4: [(1, 2, 3), (3, 2, 1, 0)],
    }
    flags = list(itertools.product((False, True), repeat=4))
    for size, choices in paths.items():
        for path, (nested, rrefs, backward, raises) in itertools.product(choices, flags):
            found.append(
                shipped.context_over(
                    size, path, nested=nested, rrefs=rrefs, backward=backward, raises=raises
                )
            )
    found.append(shipped.context_over(4, (3, 2, 1, 0), nested=True, at=2))
    return found


def rooted() -> list[Program]:
    """Contexts whose loss belongs to another rank, which is asked for the passes; some break."""
    forms: tuple[dict[str, Any], ...] = (
        {},
        {"retain": True},
        {"nested": True, "rrefs": True},
        {"breaks": 1},
    )
    return [
        Program(4, (Context(0, "x", (1, 2), root=root, **form), Settle()), f"rooted[{root},{form}]")
        for root in (1, 2, 3)
        for form in forms
        if root == 3 or "breaks" not in form
    ] + [
        Program(2, (Context(at, "x", path, root=1 - at),), f"rooted[{at},{path}]")
        for at in (0, 1)
        for path in ((), (at,), (1 - at,))
    ]


def refusals() -> list[Program]:
    """A value of each sort that torch refuses as an argument, and some that it refuses later."""
    refused = [sort for sort, fate in SORTS.items() if fate.argument and "echo" not in fate.bugs]
    sent = [
        *(Carry(0, 1, sort, "echo") for sort in refused),
        *(Carry(1, 0, "lock", way) for way in SORTS["lock"].ways if way not in ("echo", "async")),
    ]
    return [Program(2, (step, Settle()), f"refused[{step.sort},{step.way}]") for step in sent]


def held_and_counted() -> list[Program]:
    """Values that count how often they are pickled, RRefs of RRefs, and exceptions with an RRef."""
    pairs = ((0, 1), (1, 0), (1, 1), (2, 0))
    holding = [sort for sort, fate in SORTS.items() if fate.rrefs and "own" in fate.ways]
    sent = [
        *(Carry(at, to, "counted", way) for at, to in pairs for way in WAYS_OF_VALUES),
        *(Carry(at, to, sort, "own") for at, to in pairs for sort in holding),
        *(Raising(at, to, "rref", how=how) for at, to in pairs for how in get_args(RaisedIn)),
    ]
    return [Program(3, (step, Settle()), f"held_and_counted[{step!r}]") for step in sent]


def onwards() -> list[Program]:
    """One to three functions at once that call on, along each path of three ranks."""
    return [
        Program(3, (Onward(at, to, then, calls),), f"onwards[{at}-{to}-{then},{calls}]")
        for at, to, then in itertools.permutations(range(3))
        for calls in (1, 3)
    ]


def bumps() -> list[Program]:
    """One value that creator, user and owner hold; two of them bump it, and all of them read it."""
    homes = {"a": 0, "b": 2, "o": 1}
    flavours: tuple[Flavour, ...] = ("builtin", "script")
    found: list[Program] = []
    for flavour, bumpers in itertools.product(flavours, itertools.permutations(homes, 2)):
        steps: list[Step] = [
            Remote(0, 1, "a", flavour=flavour),
            Share(0, "a", 2, "b"),
            Share(2, "b", 1, "o"),
        ]
        for name in bumpers:
            steps.append(Bump(homes[name], name))
            steps += [Fetch(home, held) for held, home in homes.items()]
        steps += [Drop(home, held) for held, home in homes.items()]
        found.append(Program(3, tuple(steps), f"bumps[{flavour},{'-'.join(bumpers)}]"))
    return found


def shared_late() -> list[Program]:
    """An RRef is used at its receiver while the call that shares it, which timed out, still runs.

    Its sender, who owns it or not, has dropped it by then, or drops it at last.
    """
    makers: tuple[tuple[Step, ...], ...] = (
        (Remote(0, 1, "a"), Fetch(0, "a")),
        (Own(0, "a"),),
        (Remote(0, 0, "a", flavour="script"), Fetch(0, "a")),
    )
    found: list[Program] = []
    for making, to, first in itertools.product(makers, (1, 2), (True, False)):
        use = (Pause(to, 90.0, "b"), Fetch(to, "b"), Share(to, "b", 0, "c"), Drop(to, "b"))
        sharing = Share(0, "a", to, "b", timeout=3.0, seconds=12.0)
        dropped = (Drop(0, "a"), *use) if first else (*use, Drop(0, "a"))
        kept = (Share(0, "c", 2, "d"),)
        found.append(Program(3, (*making, sharing, *dropped, Fetch(0, "c"), *kept), "shared late"))
    return found


def running_out() -> list[Program]:
    """Recursion that needs more threads than a rank has, from another rank, which gets a timeout.

    Along the last paths all functions run, and the end of one of their calls finds no thread.
    """
    paths: tuple[tuple[tuple[int, ...], int], ...] = (
        ((1, 1), 1),
        ((1, 2, 1), 1),
        ((2, 1, 2, 1), 1),
        ((2, 2, 2), 2),
        ((1, 2, 1, 0, 1), 2),
        ((1, 1, 1, 1, 1), 4),
        ((1, 0), 1),
        ((2, 2, 0), 2),
    )
    steps: tuple[Step, ...] = (Own(0, "a"), Pause(0, 0.5), Settle())
    return [
        Program(
            3,
            (*before, Recurse(0, path, timeout=3.0)),
            "running out",
            num_worker_threads=number,
        )
        for path, number in paths
        for before in ((), steps)
    ]


def beside() -> list[Program]:
    """Values that are slow, or whose pickling is counted, and functions that hold the GIL.

    Other steps run at the same time, at another rank or in another thread.
    """
    ways = WAYS_OF_VALUES[:3]
    found: list[Program] = []
    for sort, way in itertools.product(("slow", "slow-unpickled", "counted"), ways):
        for other, to in itertools.product((0, 2), (0, 1)):
            first = (Carry(0, 1, sort, way), Call(0, 1, spins=True))
            second = (Count(other, 2), Call(other, to, (1.0, 2.0), (3.0, 4.0), spins=True))
            found.append(Program(3, (Parallel((first, second)),), "beside"))
    return found


def callables() -> list[Program]:
    """Programs that call what must be refused, go a path, and answer by a callback."""
    refused: tuple[Any, ...] = ("lambda", "generator")
    paths = [(1, 2), (1, 0), (0, 1, 2), (2, 1, 0), (1, 2, 1, 0)]
    found: list[Program] = []
    for form, path in itertools.product(refused, paths):
        steps = (Invoke(0, 1, form), Recurse(0, path), Deferred(0, path[0], path[1]))
        found.append(Program(3, steps, f"callables[{form},{'-'.join(map(str, path))}]"))
    return found


def scripts() -> list[Program]:
    """Each form of a function in TorchScript that calls on, by each way and over three ranks."""
    paths = itertools.cycle(itertools.permutations(range(3)))
    calls = itertools.product(get_args(ScriptedForm), get_args(ScriptedBy))
    return [
        Program(3, (Scripted(at, to, then, form, how=how),), f"scripts[{form},{how}]")
        for (at, to, then), (form, how) in zip(paths, calls, strict=False)
    ]


def asks() -> list[Program]:
    """Each question that a user may ask or that torch refuses it, asked of two owners' RRefs."""
    return [
        Program(2, (Own(owner, "o"), Share(owner, "o", 1 - owner, "u"), Ask(1 - owner, "u", what)))
        for owner in (0, 1)
        for what in (*OF_USERS, *ANYWHERE)
    ]


def futures() -> list[Program]:
    """Each way to use a future of each kind, and then a call under another default timeout."""
    kinds = itertools.cycle(get_args(Of))
    return [
        Program(2, (After(0, 1, form, of=of), Settle(), Default(0, 1)), f"futures[{form},{of}]")
        for form, of in [
            *((form, get_args(Of)[0]) for form in FORMS),
            *zip(FORMS, kinds, strict=False),
        ]
    ]


def gathers() -> list[Program]:
    """Calls of each kind at once, gathered in each way; these must lose nothing."""
    hows: tuple[Any, ...] = ("wait_all", "collect_all", "threads", "done")
    kinds: tuple[Any, ...] = ("proxy", "script", "builtin", "mixed")
    return [
        Program(3, (Gather(0, (1, 2, 1), how, of=of), Settle()), f"gathers[{how},{of}]")
        for how in hows
        for of in kinds
    ]
