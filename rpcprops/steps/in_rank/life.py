"""Steps about the life of RPC in a rank: a profiler around calls; a shutdown and a new init."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.distributed import rpc

from rpcprops.steps.in_rank.alone import (
    CALLS_OUTSIDE,
    Departure,
    begin_amid,
    class_of_error,
    has_left,
    leave_amid,
    work_on,
)
from rpcprops.steps.in_rank.groups import in_profiler, join_group, members_known
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
    rests: bool,
) -> dict[str, Any]:
    """Make a call inside torch's legacy profiler; its value, and what the events tell of it.

    With `rests` the profiler ends only once the delete of the RRef has been answered.
    """
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
                if rests:
                    wait_for_rest()
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


def wait_for_rest() -> None:
    """Wait until torch has the answer to each delete that this rank has sent."""
    while int(rpc._rref_context_get_debug_info()["num_pending_futures"]):  # type: ignore[attr-defined]
        time.sleep(APART)


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
#: A timeout of shutdown that nothing reaches, and one that ends it where a rank is missing.
LONG = 36000.0
BRIEF = 5.0
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
    alone: int | None,
    amid: str,
    work: tuple[str, ...],
    profiled: bool,
) -> list[list[str]]:
    """Let all ranks shut RPC down and initialise it again; what each showed."""
    here = rpc.get_worker_info().id
    others = [rank for rank in range(len(world)) if rank != here]
    told = None if alone is None else Departure(call, world, here, alone, amid, work)
    given = [
        LeavingRank(
            call,
            way_of(how, rank, alone),
            first.index(rank) if rank in first else 0,
            outside,
            wrong_init(failing, rank, here, world),
            (between, world),
            told,
            profiled,
        )
        for rank in range(len(world))
    ]
    end_amid = nothing if told is None else begin_amid(told)
    told_others = [
        rpc.rpc_async(world[rank], begin_to_leave, args=(rank, given[rank])) for rank in others
    ]
    for future in told_others:
        # A rank that leaves at once may do so before its answer has been read.
        with contextlib.suppress(RuntimeError):
            future.wait()
    shown = {here: leave_and_return(here, given[here], end_amid)}
    for rank in others:
        shown[rank] = rpc.rpc_sync(world[rank], what_it_showed, args=(call,))
    return [shown[rank] for rank in range(len(world))]


@dataclass(frozen=True)
class LeavingRank:
    """How one rank leaves and comes back; `turn` says after how many others."""

    call: str
    how: str
    turn: int
    outside: tuple[str, ...]
    wrong: dict[str, Any]
    group: tuple[str, tuple[str, ...]]
    departure: Departure | None
    profiled: bool


def nothing() -> str:
    """What was going on when a rank left alone, if nothing was."""
    return ""


def way_of(how: str, rank: int, alone: int | None) -> str:
    """How a rank shuts RPC down, where perhaps another one leaves alone before."""
    if rank == alone:
        return "at once"
    if alone and how == "timeout":
        # Without the one that is gone, only the first rank is sure to end by its timeout.
        return "at once" if rank else "brief"
    return how


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
    # After these, all ranks shut down what may still run of their agents.
    ends = {**waits, "ends": True}
    counted = {"again": {"name": "no name!"}}
    at_one: dict[str, dict[str, Any]] = {
        "one bad name": {"name": "no name!"},
        "taken name": {"name": world[here - 1]},
        "one no store": at_all["no store"],
        "one no store, counted": {**at_all["no store"], **counted},
        # A port that nobody listens on; the first rank would listen there itself.
        "one unreachable, counted": {
            "init_method": "tcp://127.0.0.1:9",
            "rank": max(1, rank),
            **counted,
        },
        "one too many": {"world_size": len(world) + 1, **ends},
        "one too few": {"world_size": len(world) - 1, **ends},
    }
    if failing == "one no store" and rank != here:
        return {"none": True}
    if failing in at_one:
        return at_one[failing] if rank == here else (ends if "too" in failing else waits)
    return at_all.get(failing, {})


def begin_to_leave(here: int, given: LeavingRank) -> None:
    """Leave in a thread of its own: a thread of the agent cannot end the agent."""
    threading.Thread(target=leave_in_thread, args=(here, given), daemon=True).start()


def leave_in_thread(here: int, given: LeavingRank) -> None:
    """Leave once this rank has sent its answers, and keep what it showed."""
    debug_info: Any = rpc._get_debug_info
    told = given.departure
    serves = int(told is not None and (told.amid, told.alone) == ("serving", here))
    while int(debug_info()["agent.server_active_calls"]) > serves:
        time.sleep(APART)
    shown = leave_and_return(here, given, nothing)
    with came_back:
        showed[given.call] = shown
        came_back.notify_all()


def what_it_showed(call: str) -> list[str]:
    """What this rank showed when it left and came back."""
    with came_back:
        came_back.wait_for(lambda: call in showed)
        return showed[call]


def leave_and_return(here: int, given: LeavingRank, end_amid: Callable[[], str]) -> list[str]:
    """Leave and come back, perhaps all inside torch's legacy profiler; what this rank showed.

    With the profiler last of all how many events have the name of a call by which ranks meet.
    """
    if not given.profiled:
        return go_and_return(here, given, end_amid)
    # The names are of api.py: _all_gather.
    meeting = ("rpc_sync#_gather_to_leader(", "rpc_async#_broadcast_to_followers(")
    shown, calls = in_profiler(lambda: go_and_return(here, given, end_amid), meeting)
    return [*shown, f"{calls} profiled"]


def go_and_return(here: int, given: LeavingRank, end_amid: Callable[[], str]) -> list[str]:
    """Shut RPC down, make calls that must be refused, and initialise RPC again.

    With something in `wrong`, it is first initialised by that, which must fail: after the shutdown,
    or, as it was before, while RPC is still running here. `group` says which dynamic group the rank
    then joins and leaves, and has the names of the ranks. With `departure` one rank leaves first,
    and the others do so only once they have worked without it.
    """
    told, wrong, call = given.departure, given.wrong, given.call
    is_alone = told is not None and told.alone == here
    worked: list[str] = []
    if is_alone and told:
        leave_amid(told)
    elif told:
        worked = work_on(told, here, end_amid)
    time.sleep(0.0 if is_alone else APART * given.turn)
    refused = ""
    if wrong.get("while_running"):
        refused = class_of_error(lambda: init_again[0](f"{call}_refused"))
    shown = [class_of_error(lambda: shut_down_by(given.how))]
    if is_alone and told:
        has_left(told)
    shown += [class_of_error(CALLS_OUTSIDE[name]) for name in given.outside]
    gc.collect()
    rrefs = rpc._rref_context_get_debug_info()["num_owner_rrefs"]  # type: ignore[attr-defined]
    held = dist_autograd._get_debug_info()["num_autograd_contexts"]
    shown.append(f"{rrefs} {held}")
    if wrong.keys() & {"while_running", "none"}:
        shown.append(refused)
    elif wrong:
        shown.append(fail_to_begin(f"{call}_wrong", **wrong))
    if given.group[0]:
        shown.append(be_member(*given.group))
    shown.append(class_of_error(lambda: init_again[0](call)))
    return [*shown, *worked]


def fail_to_begin(
    which: str, *, again: dict[str, Any] | None = None, ends: bool = False, **wrong: Any
) -> str:
    """Initialise RPC so that it fails, perhaps `again` in another way; the class of the error.

    With `ends` what may still run of it is shut down.
    """
    seen = class_of_error(lambda: init_again[0](which, **wrong))
    if again is not None and seen:
        seen = class_of_error(lambda: init_again[0](which, **again))
    if ends:
        with contextlib.suppress(RuntimeError):
            rpc.shutdown(graceful=False)
    return seen


def shut_down_by(how: str) -> None:
    """Shut RPC down in that way."""
    ways: dict[str, dict[str, Any]] = {
        "graceful": {},
        "timeout": {"timeout": LONG},
        "brief": {"timeout": BRIEF},
        "at once": {"graceful": False},
    }
    logger: Any = rpc.api.logger
    # When a shutdown fails, api.py (_wait_all_workers) logs that, and the first line that torch
    # logs in a process imports its compiler, which takes seconds of real time.
    before, logger.disabled = logger.disabled, True
    try:
        rpc.shutdown(**ways[how])
    finally:
        logger.disabled = before


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
