"""Does once, in the fork server, what every rank would otherwise have to do for the first time.

The first time, Python imports modules and specialises code, and torch looks up its operators. All
of that writes to memory that a rank shares with its server until then. Nothing here starts a
thread, an agent or the autograd engine: none of these survives a fork.
"""

from __future__ import annotations

import importlib
import pickle
from typing import Any

from rpcprops._rank_fixture import RankFixture
from rpcprops.clock import sends
from rpcprops.cluster import _wire, finder
from rpcprops.faults import FaultTable
from rpcprops.outcomes import StepOutcome
from rpcprops.programs import STEP_TYPES, Fetch
from rpcprops.steps.in_rank import autograd, shared, state, sums
from rpcprops.steps.in_rank.lookup import arguments_of, function_of, place_of
from rpcprops.torch_facts import symbols

#: Runs after which Python has specialised code.
_REPEATS = 20


def warm_up() -> None:
    """Run the code that a rank runs, as far as it needs no world."""
    _ = symbols.rref_proxy  # init_rpc imports it
    for kind in STEP_TYPES.values():
        if kind.runs and place_of(kind)[0] != finder.TRAINING:
            importlib.import_module(place_of(kind)[0])
    for _ in range(_REPEATS):
        _ = _make_fixture().rpc_backend_options
        _call()
        _differentiate()
        _wire.pack((1, "ok", StepOutcome(0, [1.0], None, 0.1)))
        sent: tuple[Any, ...] = ("steps", 1, [(0, Fetch(0, "a"))], {}, 0)
        _, _, ((_, fetch),), _, _ = pickle.loads(pickle.dumps(sent))
        _ = function_of(fetch), arguments_of(fetch)
        sends.counts()
    state.ran.clear()


def _make_fixture() -> RankFixture:
    return RankFixture(
        rank=0,
        name="worker0",
        world_size=1,
        init_method="file:///proc/self/fd/0",
        table=FaultTable(),
        rpc_timeout=1.0,
        num_worker_threads=1,
    )


def _call() -> None:
    """Both ends of an RPC, without sending it."""
    x = shared.tensor([1.0, 2.0])
    internal = symbols.rpc_internal
    call = _pass_on(internal.PythonUDF(sums.add, ("warm", x, x), {}))
    _pass_on(internal._run_function(call)).tolist()


def _pass_on(value: Any) -> Any:
    internal = symbols.rpc_internal
    return internal.deserialize(*internal.serialize(value))


def _differentiate() -> None:
    """Run the forward pass only: the first backward pass starts threads."""
    leaf = shared.tensor([1.0, 2.0]).requires_grad_()
    autograd.hop("warm", 2.0, False, 0.0, leaf * leaf).sum().item()
