"""Ranks have a network of their own: nobody else can connect to them, and ports do not collide."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rpcprops import ClusterServer
from rpcprops.cluster import namespaces
from rpcprops.cluster.options import Network
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.pytest_plugin import ClusterFactory
from tests.cluster.conftest import RunScript

needs_namespaces = pytest.mark.skipif(
    bool(namespaces.problem()),
    reason=f"no network namespaces on this machine: {namespaces.problem()}",
)
_LISTENS = "0A"
_HERE = "127.0.0.1"


def listening_ports() -> list[int]:
    """The TCP ports of this rank's agent."""
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    found = [line.split() for line in lines]
    return [int(words[1].partition(":")[2], 16) for words in found if words[3] == _LISTENS]


def can_connect(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(5)
        return sock.connect_ex((_HERE, port)) == 0


def listen() -> int:
    """Listen in this rank until it exits; the port. (An agent does not survive a stranger.)"""
    globals()["listener"] = sock = socket.create_server((_HERE, 0))
    port: int = sock.getsockname()[1]
    return port


@needs_namespaces
def test_nobody_outside_can_connect_to_a_rank(rpc_cluster: ClusterFactory) -> None:
    """The ports of a rank, its agent's among them, are open to the ranks of its world only."""
    with rpc_cluster(world_size=2, network="private") as cluster:
        port = cluster.on(0).call(listen)
        ports = cluster.on(0).call(listening_ports)
        assert len(ports) > 1
        assert not any(can_connect(port) for port in ports)
        assert cluster.on(1).call(can_connect, port)


def test_on_the_network_of_the_machine_anybody_can(rpc_cluster: ClusterFactory) -> None:
    """Without a network of their own the ports of ranks are open: the test above can fail."""
    with rpc_cluster(world_size=2, network="host") as cluster:
        port = cluster.on(0).call(listen)
        assert set(cluster.on(0).call(listening_ports)) <= set(listening_ports())
        assert can_connect(port)


@needs_namespaces
def test_two_worlds_use_one_port(rpc_cluster: ClusterFactory) -> None:
    """Code that listens on a fixed port runs in two worlds at once."""

    def listen() -> Any:
        sock = socket.create_server((_HERE, 29500))
        return sock.getsockname()[1], globals().setdefault("kept", sock) is sock

    with rpc_cluster(world_size=1) as one, rpc_cluster(world_size=1) as other:
        assert one.on(0).call(listen) == (29500, True)
        assert other.on(0).call(listen) == (29500, True)


@needs_namespaces
def test_the_addresses_of_the_machine_are_there(rpc_cluster: ClusterFactory) -> None:
    """A rank can listen on the addresses that the machine has, as its own host name may be one."""
    addresses = [
        one.address
        for found in psutil.net_if_addrs().values()
        for one in found
        if one.family is socket.AF_INET
    ]

    def reach(address: str) -> bool:
        with socket.create_server((address, 0)) as listener:
            with socket.create_connection(listener.getsockname(), timeout=5):
                return True

    with rpc_cluster(world_size=1) as cluster:
        assert all(cluster.on(0).call(reach, address) for address in addresses)


def connect_to_port_one() -> None:
    socket.create_connection((_HERE, 1), timeout=5)


@needs_namespaces
def test_an_error_of_the_network_says_what_to_do(rpc_cluster: ClusterFactory) -> None:
    """Code that finds no service is told of network="host", unless it runs there."""
    choices: tuple[tuple[Network, int], ...] = (("private", 1), ("host", 0))
    for network, notes in choices:
        with rpc_cluster(world_size=1, network=network) as cluster:
            with pytest.raises(ConnectionRefusedError) as refused:
                cluster.on(0).call(connect_to_port_one)
        told = (
            [note for note in refused.value.__notes__ if "network='host'" in note] if notes else []
        )
        assert len(told) == notes
        assert notes or not getattr(refused.value, "__notes__", [])


@needs_namespaces
def test_a_killed_maker_is_replaced(rpc_cluster: ClusterFactory) -> None:
    """Networks are still made after the process that makes them was killed."""
    with rpc_cluster(world_size=1, network="private"):
        pass
    process = rpc_cluster.server.servers.networks._process
    assert process is not None
    process.kill()
    process.wait(timeout=10)
    with rpc_cluster(world_size=1, network="private") as cluster:
        assert not any(can_connect(port) for port in cluster.on(0).call(listening_ports))


#: A process enters a user namespace of its own user's, and a network of that.
ENTERS = """
import os
import socket

from rpcprops.cluster import namespaces

ours, theirs = socket.socketpair()
maker = os.fork()
if maker == 0:
    namespaces._enter_user_namespace()
    namespaces._checked(namespaces._libc.unshare(namespaces._CLONE_NEWNET))
    spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("user", "net")]
    socket.send_fds(theirs, [b"+"], spaces)
    os._exit(0)
_, spaces, _, _ = socket.recv_fds(ours, 1, 2)
before = os.getuid(), os.getgid()
namespaces.enter(spaces)
os.waitpid(maker, 0)
with open("/proc/self/status") as status:
    print([line.split()[1] for line in status if line.startswith("CapEff")], before, os.getuid())
"""


def test_a_rank_has_no_capabilities_from_a_user_namespace(run_script: RunScript) -> None:
    """A user namespace gives all capabilities in it; a process that enters one lets go of them."""
    if not may_make_user_namespaces():
        pytest.skip("this machine makes no user namespaces")
    said = run_script(ENTERS).out.strip()
    user, group = os.getuid(), os.getgid()
    assert said == f"['0000000000000000'] ({user}, {group}) {user}"


FALLS_BACK = """
from rpcprops import ClusterServer
from rpcprops.cluster import namespaces
from rpcprops.errors import MachineCannot

if __name__ == "__main__":
    # The limit is one of the user namespace, so that nobody else's changes.
    namespaces._enter_user_namespace()
    with open("/proc/sys/user/max_net_namespaces", "w") as file:
        file.write("0")
    with ClusterServer(clock="real") as server:
        with server.cluster(world_size=2) as cluster:
            assert cluster.each(int) == [0, 0]
        print(server.network_problem)
        try:
            with server.cluster(world_size=2, network="private"):
                pass
        except MachineCannot as error:
            print(error)
"""


def may_make_user_namespaces() -> bool:
    """Tried in a process of its own."""
    code = "from rpcprops.cluster import namespaces; namespaces._enter_user_namespace()"
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_without_namespaces_ranks_share_the_network(run_script: RunScript) -> None:
    """Where no network namespace can be made, "auto" goes on and says so; "private" refuses."""
    if not may_make_user_namespaces():
        pytest.skip("this machine makes no user namespace, in which to forbid network namespaces")
    shared, refused = run_script(FALLS_BACK).out.splitlines()
    assert shared.startswith(
        "network: shared with this machine, so that any local user can connect"
    )
    assert "No space left on device" in shared
    assert refused.startswith("network='private' cannot be had: ")


@pytest.mark.parametrize("network", ["other", None, 1, ["host"]])
def test_another_network_is_refused(network: Network) -> None:
    """The choices are "auto", "private" and "host"."""
    with pytest.raises(UsageError, match="must be 'auto', 'private' or 'host'"):
        ClusterServer(network=network)


def test_a_maker_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the process can be started, the problem is in words."""
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    maker = namespaces.Maker()
    assert maker.take() == []
    assert "No such file" in maker.problem
    server = ClusterServer(network="private")
    with pytest.raises(MachineCannot, match="No such file"), server.servers.new_network("private"):
        pass
