"""Steps about the life of RPC in a rank: a profiler around calls; a shutdown and a new init."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.distributed import rpc

from rpcprops.steps.in_rank.groups import join_group, members_known
from rpcprops.steps.in_rank.shared import dist_autograd, tensor
from rpcprops.steps.in_rank.state import init_again, meets_at, note_slowly
from rpcprops.steps.in_rank.sums import add, sum_call


def profile(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    form: str,
    beyond: int | None,
    flavour: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    raises: bool,
    times: int,
    unpicklable: bool,
    seconds: float,
) -> dict[str, Any]:
    """Make a call inside torch's legacy profiler; its value, and what the events tell of it."""
    how: dict[str, Any] = {"raises": raises, "seconds": seconds}
    function, args = sum_call(call, flavour, tensor(left), tensor(right), **how)
    if beyond is not None:
        function = profiled_nested if form == "nested" else profiled_deferred
        args = (call, world[beyond], *args[1:])
    send: Any = rpc.rpc_sync if form in ("sync", "nested", "deferred") else rpc.rpc_async
    if form == "remote":
        send = rpc.remote
    way = {rpc.rpc_async: "async", rpc.remote: "remote"}.get(send, "sync")
    named = f"rpc_{way}#", f"({world[rpc.get_worker_info().id]} -> {world[to]})"

    def profile_once() -> dict[str, Any]:
        profiler: Any = legacy_profile()  # type: ignore[no-untyped-call]
        with profiler:
            result = send(world[to], function, args=args)
            if form == "async":
                result = result.wait()
            elif form == "remote":
                result = result.to_here()
        if form == "late":
            result = result.wait()
        events = profiler.function_events
        return {"sum": result.tolist(), **told(events, *named, to, beyond is None)}

    def profile_each() -> dict[str, Any]:
        refused = profile_unpicklable(world[to], send) if unpicklable else ""
        each = [profile_once() for _ in range(times)]
        every = {part: all(one[part] for one in each) for part in ("named", "there")}
        return {**each[-1], **every, "refused": refused}

    # torch may keep something of a refused call in its thread, so that one is not used again.
    return in_own_thread(profile_each) if unpicklable else profile_each()


def profile_unpicklable(to: str, send: Any) -> str:
    """Make a profiled call of something that cannot be pickled; the class of its error."""
    try:
        with legacy_profile():  # type: ignore[no-untyped-call]
            send(to, repr, args=(threading.Lock(),))
    except Exception as error:
        return type(error).__name__
    return ""


def in_own_thread(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns in a thread of its own, or raises there."""
    values: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            values.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error
    return values[0]


def told(events: Any, begins: str, ends: str, to: int, adds_there: bool) -> dict[str, bool]:
    """Whether one event has the name of the call, and whether one tells what ran at `to`."""
    ran = "aten::add" if adds_there else "rpc_"
    here = [event.name for event in events if not event.is_remote]
    there = [event.name.split("#remote_op: ", 1) for event in events if event.is_remote]
    return {
        "named": [x.startswith(begins) and x.endswith(ends) for x in here].count(True) == 1,
        "there": any(
            x[0].startswith(begins) and x[0].endswith(ends) and x[1].startswith(ran) for x in there
        ),
    }


def profiled_nested(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float = 0.0
) -> torch.Tensor:
    """Let another rank add, and wait for it."""
    note_slowly(call, seconds)
    total: torch.Tensor = rpc.rpc_sync(then, add, args=(call + "/then", left, right))
    return total


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def profiled_deferred(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float = 0.0
) -> Any:
    """Let another rank add; the answer is sent when that rank has answered."""
    note_slowly(call, seconds)
    return rpc.rpc_async(then, add, args=(call + "/then", left, right))


#: Virtual seconds between two ranks that leave one after the other.
APART = 0.5
#: A timeout of shutdown that nothing reaches.
LONG = 36000.0
#: Virtual seconds that a rank waits in the store for another one, whose init has failed.
STORE_WAITS = 30.0
#: What each rank showed when it left and came back, by the name of the call that told it to.
showed: dict[str, list[str]] = {}
came_back = threading.Condition()


def rejoin(
    call: str,
    world: tuple[str, ...],
    *,
    how: str,
    first: tuple[int, ...],
    outside: tuple[str, ...],
    failing: str,
    between: str,
) -> list[list[str]]:
    """Let all ranks shut RPC down and initialise it again; what each showed."""
    here = rpc.get_worker_info().id
    others = [rank for rank in range(len(world)) if rank != here]
    turns = {rank: (first.index(rank) if rank in first else 0) for rank in range(len(world))}
    wrong = [wrong_init(failing, rank, here, world) for rank in range(len(world))]
    told_others = [
        rpc.rpc_async(
            world[rank],
            begin_to_leave,
            args=(call, how, turns[rank], outside, wrong[rank], (between, world)),
        )
        for rank in others
    ]
    for future in told_others:
        # A rank that leaves at once may do so before its answer has been read.
        with contextlib.suppress(RuntimeError):
            future.wait()
    given = (call, how, turns[here], outside, wrong[here], (between, world))
    shown = {here: leave_and_return(*given)}
    for rank in others:
        shown[rank] = rpc.rpc_sync(world[rank], what_it_showed, args=(call,))
    return [shown[rank] for rank in range(len(world))]


def wrong_init(failing: str, rank: int, here: int, world: tuple[str, ...]) -> dict[str, Any]:
    """What that rank gives init_rpc instead, so that it fails; nothing if it is not to fail."""
    waits = {"rpc_timeout": STORE_WAITS}
    at_all: dict[str, dict[str, Any]] = {
        "same name": {"name": "same"},
        "bad name": {"name": "no name!"},
        "other rank": {"rank": (rank + 1) % len(world)},
        "too many": {"world_size": len(world) + 1, **waits},
        # A file below what is no folder.
        "no store": {"init_method": "file:///dev/null/store"},
    }
    if failing == "running":
        return {"while_running": rank == here}
    at_one = {"one bad name": "no name!", "taken name": world[here - 1]}
    if failing in at_one:
        return {"name": at_one[failing]} if rank == here else waits
    return at_all.get(failing, {})


def begin_to_leave(*args: Any) -> None:
    """Leave in a thread of its own: a thread of the agent cannot end the agent."""
    threading.Thread(target=leave_in_thread, args=args, daemon=True).start()


def leave_in_thread(*args: Any) -> None:
    """Leave once this rank has sent its answers, and keep what it showed."""
    debug_info: Any = rpc._get_debug_info
    while int(debug_info()["agent.server_active_calls"]):
        time.sleep(APART)
    shown = leave_and_return(*args)
    with came_back:
        showed[args[0]] = shown
        came_back.notify_all()


def what_it_showed(call: str) -> list[str]:
    """What this rank showed when it left and came back."""
    with came_back:
        came_back.wait_for(lambda: call in showed)
        return showed[call]


def leave_and_return(
    call: str,
    how: str,
    turn: int,
    outside: tuple[str, ...],
    wrong: dict[str, Any],
    group: tuple[str, tuple[str, ...]],
) -> list[str]:
    """Shut RPC down, make calls that must be refused, and initialise RPC again.

    With something in `wrong`, it is first initialised by that, which must fail: after the shutdown,
    or, as it was before, while RPC is still running here. `group` says which dynamic group the rank
    then joins and leaves, and has the names of the ranks.
    """
    time.sleep(APART * turn)
    refused = ""
    if wrong.get("while_running"):
        refused = class_of_error(lambda: init_again[0](f"{call}_refused"))
    ways: dict[str, dict[str, Any]] = {
        "graceful": {},
        "timeout": {"timeout": LONG},
        "at once": {"graceful": False},
    }
    given = ways[how]
    shown = [class_of_error(lambda: rpc.shutdown(**given))]
    shown += [class_of_error(CALLS_OUTSIDE[name]) for name in outside]
    gc.collect()
    rrefs = rpc._rref_context_get_debug_info()["num_owner_rrefs"]  # type: ignore[attr-defined]
    held = dist_autograd._get_debug_info()["num_autograd_contexts"]
    shown.append(f"{rrefs} {held}")
    if "while_running" in wrong:
        shown.append(refused)
    elif wrong:
        shown.append(class_of_error(lambda: init_again[0](f"{call}_wrong", **wrong)))
    if group[0]:
        shown.append(be_member(*group))
    shown.append(class_of_error(lambda: init_again[0](call)))
    return shown


def be_member(between: str, world: tuple[str, ...]) -> str:
    """Join a group of all ranks, and leave it once each has made a call; what this rank saw.

    The class of an error, if there was one.
    """
    seen: list[str] = []

    def join_and_leave() -> None:
        rank, _ = meets_at[0]
        join_group(world[rank])
        agent: Any = rpc.api._get_current_rpc_agent()  # type: ignore[attr-defined]
        wait_for_all(agent.store, "joined", rank, len(world))
        members = " ".join(map(str, members_known()))
        to = world[(rank + 1) % len(world)]
        total: torch.Tensor = rpc.rpc_sync(to, torch.add, args=(torch.tensor([1.0]), 2.0))
        wait_for_all(agent.store, "called", rank, len(world))
        rpc.shutdown(graceful=between == "group")
        seen.append(f"members {members}, sum {total.item()}")

    return class_of_error(join_and_leave) or seen[0]


def wait_for_all(store: Any, point: str, rank: int, number: int) -> None:
    """Wait until so many ranks have come to a point, by a store that they share."""
    keys = [f"{point}/{one}" for one in range(number)]
    store.set(keys[rank], "there")
    store.wait(keys)


def class_of_error(function: Callable[[], Any]) -> str:
    """The class of a function's error, "RuntimeError" for what derives from it; or ""."""
    try:
        function()
    except RuntimeError:
        return "RuntimeError"
    except Exception as error:
        return type(error).__name__
    return ""


#: Calls that torch must refuse while no agent runs.
CALLS_OUTSIDE: dict[str, Callable[[], Any]] = {
    "rpc_sync": lambda: rpc.rpc_sync("worker0", torch.add, args=(1, 1)),
    "rpc_async": lambda: rpc.rpc_async("worker0", torch.add, args=(1, 1)),
    "remote": lambda: rpc.remote("worker0", torch.add, args=(1, 1)),
    "get_worker_info": rpc.get_worker_info,
    "shutdown": rpc.shutdown,
    "shutdown at once": lambda: rpc.shutdown(graceful=False),
    "get_rpc_timeout": rpc.get_rpc_timeout,  # type: ignore[attr-defined]
}
