"""Scripts: `__main__` in ranks, without pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RunScript = Callable[..., Any]


def test_main_script(run_script: RunScript) -> None:
    """Functions, classes and state of a script work as entry functions and RPC targets."""
    done = run_script(
        """
        import sys

        import torch.distributed.rpc as rpc

        from rpcprops import ClusterServer, FaultTable
        from rpcprops.errors import UsageError

        print("top", sys.argv[1:])
        total = 0


        class Point:
            def __init__(self, x):
                self.x = x

            def __eq__(self, other):
                return type(self) is type(other) and self.x == other.x


        class OwnError(Exception):
            pass


        def add(point):
            global total
            total += point.x
            return Point(total)


        def fail():
            raise OwnError("own")


        def ask(to, fn, *args):
            return rpc.rpc_sync(to, fn, args=args)


        if __name__ == "__main__":
            def late():
                return 1

            three = Point(3)
            faults = FaultTable(["RREF_USER_DELETE"], 1)
            with ClusterServer() as server, server.cluster(world_size=2, faults=faults) as cluster:
                assert cluster.on(0).call(ask, "worker1", add, three) == Point(3)
                assert cluster.on(1).call(lambda point: add(point), three) == Point(6)
                assert cluster.on(0).call(ask, "worker1", add, three) == Point(9)
                try:
                    cluster.on(0).call(fail)
                except OwnError as error:
                    print("raised", error)
                assert total == 0
                try:
                    cluster.on(0).call(late)
                except UsageError as error:
                    print(str(error)[:45])
            print([rank.exit_code for rank in cluster.outcome.ranks])
        """,
        "an argument",
    )
    lacks = "the module __main__ of a rank has no late: ra"
    # The script's own lines appear once: in ranks they go to the ranks' logs.
    assert done.out.splitlines() == ["top ['an argument']", "raised own", lacks, "[0, 0]"]


def test_script_without_guard(run_script: RunScript) -> None:
    """A script without `if __name__ == "__main__"` does not start servers without end."""
    done = run_script(
        """
        from rpcprops import ClusterServer
        from rpcprops.errors import UsageError

        try:
            with ClusterServer(clock="real") as server, server.cluster(world_size=1) as cluster:
                print(cluster.on(0).call(abs, -1))
        except UsageError as error:
            print(str(error).splitlines()[0][:60])
        """,
        seconds=60,
    )
    assert "1" in done.out or "__main__" in done.out


def test_code_without_a_file() -> None:
    """`python -c` code has no module that ranks could import, and still runs closures."""
    import subprocess
    import sys

    code = (
        "from rpcprops import ClusterServer\n"
        "step = 2\n"
        "def entry(value): return value + step\n"
        "with ClusterServer(clock='real') as server, server.cluster(world_size=1) as cluster:\n"
        "    print(cluster.on(0).call(lambda: 40 + step), cluster.on(0).call(entry, 1))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["42", "3"]
