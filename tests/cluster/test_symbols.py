"""What rpcprops uses of torch that torch does not promise: it is there, or its lack is told."""

from __future__ import annotations

import pytest

from rpcprops.errors import MachineCannot
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.torch_facts import VERSIONS, installed, symbols
from rpcprops.torch_facts.symbols import Symbol

GONE = Symbol("torch._C._distributed_rpc", "_no_such_function", "look")
GONE_MODULE = Symbol("torch.distributed.rpc._no_such_module", "", "look")


def load_all() -> list[str]:
    return sorted(name for name in symbols.SYMBOLS if getattr(symbols, name) is not None)


def set_leaks() -> list[bool]:
    from torch.distributed.rpc import api

    seen: list[bool] = []
    for ignore in (True, False):
        symbols.ignore_rref_leaks(ignore)
        seen.append(vars(api)["_ignore_rref_leak"])
    return seen


def set_leaks_of_a_torch_without_them() -> None:
    from torch.distributed.rpc import api

    switch = "_ignore_rref_leak"
    delattr(api, switch)
    symbols.ignore_rref_leaks(True)


def test_each_is_in_this_torch(rpc_cluster: ClusterFactory) -> None:
    """Every symbol of the list can be had from the torch of the ranks."""
    with rpc_cluster(world_size=1, init=False) as cluster:
        assert cluster.on(0).call(load_all) == sorted(symbols.SYMBOLS)
        assert cluster.on(0).call(set_leaks) == [True, False]


def test_a_torch_that_lacks_one_is_told_of(rpc_cluster: ClusterFactory) -> None:
    """The error names the symbol, the torch, what cannot be done, and which torch has it."""
    span = f"torch {VERSIONS[0]} to {VERSIONS[-1]}"
    version = rpc_cluster.server.torch_version
    with rpc_cluster(world_size=1, init=False) as cluster:
        for symbol, name in ((GONE, "_rpc._no_such_function"), (GONE_MODULE, "._no_such_module")):
            with pytest.raises(MachineCannot, match=name) as caught:
                cluster.on(0).call(symbols._load, symbol)
            for part in (f"torch {version} has no", "cannot look", span):
                assert part in str(caught.value)
        with pytest.raises(MachineCannot, match=r"no torch.distributed.rpc.api._ignore_rref_leak"):
            cluster.on(0).call(set_leaks_of_a_torch_without_them)


def test_the_version_of_torch_is_known_without_it(rpc_cluster: ClusterFactory) -> None:
    """What this process takes for the version of its torch is what its ranks run."""
    with rpc_cluster(world_size=1, init=False):
        assert installed().version == rpc_cluster.server.torch_version
