"""A test of PyTorch's and the result of running it, as data for test process and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: The agent for which a suite is written. "generic": any; "tensorpipe": the options of the plain
#: agent; "faulty": the faulty agent, with the suite's own tables; "cuda": needs devices.
Agent = Literal["generic", "tensorpipe", "faulty", "cuda"]
Verdict = Literal["passed", "failed", "skipped", "not_applicable"]


@dataclass(frozen=True, slots=True)
class UpstreamTest:
    """One test of PyTorch's RPC suites, as in the installed torch.

    Attributes:
        suite: the class, under torch's name for it.
        agent: the agent that the class is for.
        world_size: number of ranks; 0 if it is unknown because the test cannot run here.
        real_time: why it runs in real time; empty if it need not.
        no_delays: why no message of it may be late; empty if messages may.
        no_faults: why faults would prove nothing about it; empty if they prove something.
        asks_for: the agent for which its source asks by name; empty if it takes the fixture's.
        asks_because: the function and the name in it.
        not_applicable: why it cannot run in our ranks; empty if it can.
    """

    suite: str
    name: str
    agent: Agent
    world_size: int
    real_time: str = ""
    no_delays: str = ""
    no_faults: str = ""
    asks_for: str = ""
    asks_because: str = ""
    not_applicable: str = ""

    @property
    def id(self) -> str:
        """``Suite::test``."""
        return f"{self.suite}::{self.name}"


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """How a test ended in one rank; `reason` is a traceback, or why it was skipped."""

    verdict: Literal["passed", "failed", "skipped"]
    reason: str = ""
