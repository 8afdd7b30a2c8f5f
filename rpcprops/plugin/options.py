"""Our options for pytest: declared here, and read once into typed values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from rpcprops import agents
from rpcprops._files import why_not_writable
from rpcprops.cluster.options import ClockChoice, Network, Transport, parse_clock
from rpcprops.errors import UsageError
from rpcprops.outcomes import MAX_CLOCK_RATE
from rpcprops.plugin.shards import Shards

#: What pytest is told about each option, by its name.
DECLARED: dict[str, dict[str, Any]] = {
    "--rpc-clock": {
        "default": "auto",
        "metavar": "CLOCK",
        "help": "clock of the ranks: auto (fast where it can be), real, or a rate from 1 to "
        f"{MAX_CLOCK_RATE}",
    },
    "--rpc-transport": {
        "default": "tcp",
        "choices": ("tcp", "shm"),
        "help": "how ranks talk: tcp on loopback, or shm (shared memory)",
    },
    "--rpc-agent": {
        "metavar": "AGENT",
        "help": "the RPC agent of the ranks, such as wire; torch's faulty one unless given. A "
        "cluster that names an agent itself has that one",
    },
    "--rpc-network": {
        "default": "auto",
        "choices": ("auto", "private", "host"),
        "help": "network of the ranks: one of their own, which nobody else can reach, where this "
        "machine allows that (auto) or else no ranks (private); or the machine's (host)",
    },
    "--rpc-shards": {
        "default": "1",
        "metavar": "N|K/N",
        "help": "split each Hypothesis test of rpc_cluster into N items, each with its own seed "
        "and 1/N of the examples, so that xdist can run them side by side; K/N, such as 2/4: run "
        "the K-th of these items alone, and a part of all other tests, for one of N machines",
    },
    "--rpc-report": {
        "metavar": "FILE",
        "help": "write what each test of rpc_cluster ran and which faults fired to FILE, as JSON",
    },
    "--rpc-replay": {
        "metavar": "FILE",
        "help": "run the example of a failure artefact only (`rpcprops replay` does this)",
    },
    "--rpc-replay-times": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "with --rpc-replay: run the example N times, where it can be run again",
    },
    "--rpc-replay-answer": {
        "metavar": "FILE",
        "help": "with --rpc-replay: write what each run raised to FILE, as JSON",
    },
    "--rpc-without-fault": {
        "action": "append",
        "default": [],
        "metavar": "FAULT",
        "help": "leave this fault out of every cluster's plan, such as 1:RREF_USER_DELETE or "
        "1:delay:PYTHON_CALL; may be given several times",
    },
    "--rpc-upstream": {
        "action": "store_true",
        "help": "run PyTorch's own RPC suites, from the installed torch, instead of the tests here",
    },
    "--rpc-upstream-agent": {
        "metavar": "AGENT",
        "help": "the agent of all ranks, such as wire; unless given, each suite runs the agent for "
        "which it is written. Tests that ask for another agent are left out, with the reason",
    },
    "--rpc-upstream-faults": {
        "default": "none",
        "choices": ("none", "sampled"),
        "help": "sampled: tests that faults can affect also run under drawn tables",
    },
    "--rpc-upstream-examples": {
        "type": int,
        "default": 5,
        "metavar": "N",
        "help": "with sampled faults: tables for each test",
    },
    "--rpc-upstream-seed": {
        "type": int,
        "metavar": "N",
        "help": "with sampled faults: draw the same tables again",
    },
    "--rpc-upstream-report": {
        "metavar": "FILE",
        "help": "write the verdict of each of PyTorch's tests to FILE, as JSON",
    },
}


def declare(parser: pytest.Parser) -> None:
    """Declare the options to pytest."""
    group = parser.getgroup("rpcprops", "torch RPC under sampled faults")
    for name, how in DECLARED.items():
        group.addoption(name, **how)


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """The options of ``--rpc-upstream``.

    Attributes:
        agent: the name of the agent of all ranks; None leaves it to each suite.
        sampled: whether tests also run under drawn tables, `examples` of them, drawn by `seed`.
        report: the file for the report; None in an xdist worker, whose controller writes it.
    """

    agent: str | None
    sampled: bool
    examples: int
    seed: int | None
    report: Path | None


@dataclass(frozen=True, slots=True)
class Options:
    """The values of the options of this run of pytest.

    Attributes:
        clock_text: the clock as it was written.
        agent: the name of the agent of clusters that name none; None is torch's faulty one.
        report: the file for the report; None in an xdist worker, whose controller writes it.
        replay: the artefact that is replayed, `replay_times` times.
        replay_answer: the file for what the replay raised.
        upstream: None if this run has the user's tests, not PyTorch's.
    """

    clock: ClockChoice
    clock_text: str
    transport: Transport
    agent: str | None
    network: Network
    shards: Shards
    report: Path | None
    replay: Path | None
    replay_times: int
    replay_answer: Path | None
    without_fault: tuple[str, ...]
    upstream: UpstreamOptions | None

    @classmethod
    def read(cls, config: pytest.Config) -> Self:
        """The options of a run of pytest.

        Raises:
            UsageError: (pytest's) an option has an invalid value, or two contradict each other.
        """
        option = partial(_option, config)
        upstream = _read_upstream(config)
        return cls(
            clock_text=option("--rpc-clock"),
            transport=option("--rpc-transport"),
            agent=_agent(config, "--rpc-agent"),
            network=option("--rpc-network"),
            shards=_shards(option("--rpc-shards")),
            report=_written(config, "--rpc-report"),
            clock=_clock(option("--rpc-clock")),
            replay=_path(option("--rpc-replay")),
            replay_times=option("--rpc-replay-times"),
            replay_answer=_path(option("--rpc-replay-answer")),
            without_fault=tuple(option("--rpc-without-fault")),
            upstream=upstream,
        )


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is an xdist worker."""
    return hasattr(config, "workerinput")


def _option(config: pytest.Config, name: str) -> Any:
    """The value of an option. argparse makes a list of ``--rpc-clock=--``, whose value it loses."""
    value: Any = config.getoption(name)
    is_lost = [] in value if DECLARED[name].get("action") == "append" else value == []
    if is_lost:
        msg = f"{name} needs a value, which -- is not"
        raise pytest.UsageError(msg)
    return value


def _read_upstream(config: pytest.Config) -> UpstreamOptions | None:
    option = partial(_option, config)
    read = UpstreamOptions(
        agent=_agent(config, "--rpc-upstream-agent"),
        examples=_positive(config, "--rpc-upstream-examples"),
        report=_written(config, "--rpc-upstream-report"),
        sampled=option("--rpc-upstream-faults") == "sampled",
        seed=option("--rpc-upstream-seed"),
    )
    if not option("--rpc-upstream"):
        return None
    for other in ("--rpc-replay", "--rpc-report", "--rpc-without-fault", "--rpc-agent"):
        if option(other):
            msg = f"{other} is for tests of rpc_cluster, not for --rpc-upstream"
            raise pytest.UsageError(msg)
    if read.sampled and read.agent is not None and not agents.named(read.agent).can_inject:
        msg = (
            f"--rpc-upstream-agent={read.agent} injects no faults, and "
            f"--rpc-upstream-faults=sampled asks for some; leave it out, or name wire"
        )
        raise pytest.UsageError(msg)
    return read


def _agent(config: pytest.Config, name: str) -> str | None:
    """The name of the agent that an option names, if it does."""
    text = _option(config, name)
    try:
        return None if text is None else agents.named(text).name
    except UsageError as error:
        msg = f"{name}: {error}"
        raise pytest.UsageError(msg) from None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _positive(config: pytest.Config, name: str) -> int:
    value = _option(config, name)
    if value < 1:
        msg = f"{name}={value} must be 1 or more"
        raise pytest.UsageError(msg)
    return int(value)


def _written(config: pytest.Config, name: str) -> Path | None:
    """The file of an option, if this process must write it at its end; else None."""
    text = _option(config, name)
    if text is None or is_worker(config):
        return None
    path = Path(text).absolute()
    problem = why_not_writable(path)
    if problem:
        msg = f"{name}={text!r} cannot be written: {problem}"
        raise pytest.UsageError(msg)
    return path


def _shards(text: str) -> Shards:
    try:
        return Shards.parse(text)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def _clock(text: str) -> ClockChoice:
    try:
        return parse_clock(text)
    except UsageError as error:
        msg = f"--rpc-clock: {error}"
        raise pytest.UsageError(msg) from None
