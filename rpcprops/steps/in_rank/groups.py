"""Steps about dynamic groups, in a rank that begins without RPC."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.distributed import rpc

from rpcprops.steps.in_rank.alone import CALLS_OUTSIDE, class_of_error
from rpcprops.steps.in_rank.state import handles, joins_by, meets_at, starts_in

#: Seconds that a member that leaves waits for the token of the group, which nobody else has.
TOKEN_WAITS = 1.0
#: Seconds; nothing takes so long.
A_DAY = 86400.0
#: How the events of the calls are named by which a rank joins or leaves (backend_registry.py:
#: _set_devices_and_reverse_device_map; api.py: shutdown).
TELLING = ("rpc_sync#_get_device_infos(", "rpc_sync#_update_group_membership(")

T = TypeVar("T")


def member(
    call: str,
    world: tuple[str, ...],
    *,
    does: str,
    dash: bool,
    why: str,
    taken: int | None,
    what: str,
    profiled: bool,
) -> dict[str, Any]:
    """Join a dynamic group, try to, leave it, or look at it; what this rank knows then.

    With `profiled` also how many calls a profiler has seen by which it joins or leaves.
    """
    if profiled:
        shown, calls = in_profiler(lambda: act(world, does, why, taken), TELLING)
        return {**shown, "profiled": calls}
    if does == "outside":
        return {"refused": class_of_error(CALLS_OUTSIDE[what])}
    return act(world, does, why, taken)


def in_profiler(function: Callable[[], T], names: tuple[str, ...]) -> tuple[T, int]:
    """What a function returns inside torch's legacy profiler, and how many calls it shows.

    They are events of this rank whose name begins with one of `names`.
    """
    profiler: Any = legacy_profile()  # type: ignore[no-untyped-call]
    with profiler:
        shown = function()
    found = [event.name for event in profiler.function_events if not event.is_remote]
    return shown, sum(name.startswith(names) for name in found)


def act(world: tuple[str, ...], does: str, why: str, taken: int | None) -> dict[str, Any]:
    """Join, try to, leave or look."""
    rank, _ = meets_at[0]
    if does == "refused":
        return {"refused": class_of_refusal(why, world, rank, taken)}
    if does in ("leave", "leave at once"):
        leave_group(graceful=does == "leave")
        return {}
    if does == "join":
        join_group(world[rank], **agent_of_the_run())
        return {"members": members_known()}
    gc.collect()
    counts = rpc._rref_context_get_debug_info()  # type: ignore[attr-defined]
    held = [int(counts[name]) for name in ("num_owner_rrefs", "num_forks")]
    known = members_known()
    return {"members": known, "held": held, **{f"knows {one}": True for one in known}}


def join_group(name: str, **given: Any) -> None:
    """``init_rpc``, by torch's own agent and without a world size, unless they are given."""
    rank, url = meets_at[0]
    init_rpc: Any = rpc.init_rpc
    options: Any = rpc.TensorPipeRpcBackendOptions
    registry: Any = rpc.backend_registry
    usual = {
        # Not rpc.BackendType, which is another enum once one more backend is registered.
        "backend": registry.BackendType.TENSORPIPE,
        "rpc_backend_options": options(init_method=url, num_worker_threads=8, rpc_timeout=A_DAY),
        "rank": rank,
    }
    with starts_in[0]() if starts_in else contextlib.nullcontext():
        init_rpc(name, **{**usual, **given})


def agent_of_the_run() -> dict[str, Any]:
    """What makes this rank join by the agent of the run, if that can join a dynamic group."""
    _, url = meets_at[0]
    return joins_by[0](url) if joins_by else {}


def class_of_refusal(why: str, world: tuple[str, ...], rank: int, taken: int | None) -> str:
    """The class of the error of a join in a way that torch must refuse; "" without one."""
    other = rank if taken is None else taken
    names = {"bad name": "no name!", "taken name": world[other]}
    name = names.get(why, world[rank])
    given = agent_of_the_run()
    if why == "taken rank":
        given["rank"] = other
    if why == "static":
        given |= {"rank": 0, "world_size": 1}
    try:
        join_group(name, **given)
    except RuntimeError:
        return "RuntimeError"
    except Exception as error:
        return type(error).__name__
    return ""


def leave_group(*, graceful: bool) -> None:
    """Leave by a shutdown, with the handles that this rank still has."""
    agent: Any = rpc.api._get_current_rpc_agent()  # type: ignore[attr-defined]
    agent.store.set_timeout(timedelta(seconds=TOKEN_WAITS))
    rpc.shutdown(graceful=graceful)
    handles.clear()


def members_known() -> list[int]:
    """The numbers of the members that this one knows."""
    agent: Any = rpc.api._get_current_rpc_agent()  # type: ignore[attr-defined]
    return sorted(info.id for info in agent.get_worker_infos())
