"""What is known of a test of PyTorch's, and what running it showed: data, for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Which agent a suite is written for. "generic": any; "tensorpipe": the options of the plain agent;
#: "faulty": the faulty agent, with tables of its own; "cuda": needs devices.
Agent = Literal["generic", "tensorpipe", "faulty", "cuda"]
Verdict = Literal["passed", "failed", "skipped", "not_applicable"]


@dataclass(frozen=True, slots=True)
class UpstreamTest:
    """One test of PyTorch's RPC suites, as in the installed torch.

    Attributes:
        suite: the class, under torch's name for it.
        agent: which agent the class is for.
        world_size: number of ranks; 0 where it is not known because the test cannot run here.
        real_time: why it runs in real time; empty when it need not.
        no_delays: why no message of it may come late; empty when they may.
        no_faults: why faults would mean nothing to it; empty when they do.
        not_applicable: why it cannot run in ranks of ours; empty when it can.
    """

    suite: str
    name: str
    agent: Agent
    world_size: int
    real_time: str = ""
    no_delays: str = ""
    no_faults: str = ""
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
