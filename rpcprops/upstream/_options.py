"""The options of ``pytest --rpc-upstream``; cheap to import, since every run of pytest does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpcprops._files import why_not_writable


def add_options(group: Any) -> None:
    """The options of ``--rpc-upstream``."""
    group.addoption(
        "--rpc-upstream",
        action="store_true",
        help="run PyTorch's own RPC suites, from the installed torch, instead of the tests here",
    )
    group.addoption(
        "--rpc-upstream-faults",
        default="none",
        choices=("none", "sampled"),
        help="sampled: each test that faults mean something to runs under drawn tables as well",
    )
    group.addoption(
        "--rpc-upstream-examples",
        type=int,
        default=5,
        metavar="N",
        help="with sampled faults: tables for each test",
    )
    group.addoption(
        "--rpc-upstream-seed",
        type=int,
        default=None,
        metavar="N",
        help="with sampled faults: draw the same tables again",
    )
    group.addoption(
        "--rpc-upstream-report",
        default=None,
        metavar="FILE",
        help="write what each of PyTorch's tests came to to FILE, as JSON",
    )


def check_options(config: pytest.Config) -> None:
    """Raises:
    UsageError: an option has a value that means nothing.
    """
    examples: Any = config.getoption("--rpc-upstream-examples")
    if examples < 1:
        msg = f"--rpc-upstream-examples={examples} must be 1 or more"
        raise pytest.UsageError(msg)
    path = config.getoption("--rpc-upstream-report")
    if path is not None and not hasattr(config, "workerinput"):
        problem = why_not_writable(Path(path))
        if problem:
            msg = f"--rpc-upstream-report={path!r} cannot be written: {problem}"
            raise pytest.UsageError(msg)
    if config.getoption("--rpc-upstream"):
        for option in ("--rpc-replay", "--rpc-report", "--rpc-without-fault"):
            if config.getoption(option):
                msg = f"{option} is for tests of rpc_cluster, not for --rpc-upstream"
                raise pytest.UsageError(msg)
