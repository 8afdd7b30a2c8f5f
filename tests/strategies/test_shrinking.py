"""What Hypothesis shrinks to, for each finding and each kind of step: the fewest steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, find, settings
from hypothesis import strategies as st

from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import Program
from rpcprops.strategies import fault_tables, programs, programs_under_faults
from rpcprops.strategies.drawing import KINDS
from rpcprops.torch_facts import UNKNOWN
from tests._draws import QUIET

pytestmark = pytest.mark.nightly
SEARCH = settings(
    QUIET, max_examples=20_000, derandomize=False, phases=[Phase.generate, Phase.shrink]
)
TABLES = st.one_of(
    fault_tables(),
    fault_tables(messages=tuple(MessageType), max_fail_sends=2),
    fault_tables(messages=RETRYABLE_MESSAGE_TYPES, max_fail_sends=7),
)
#: The fewest steps with which a drawn program meets a finding, of those of the simplest kinds where
#: :data:`FEWER` names one that does the work of two.
FEWEST = {
    "fork-request-given-up": 2,
    "second-failed-remote": 2,
    "timed-out-remote-dropped": 2,
    "shutdown-overtakes-creation": 1,
    "shutdown-deletes-argument": 2,
    "failed-async-proxy": 1,
    "failed-backward-revisits-rank": 1,
    "freed-context-used": 1,
    "early-owner-fork": 3,
    "readable-injected-error": 1,
    "late-remote-to-self": 1,
    "timed-out-type-query": 3,
}
#: The kinds among which the search looks for a finding, where a search among all takes too long.
#: `through` is one in a hundred of the steps that are drawn, and this finding needs two that use
#: one handle, each with a timeout shorter than a delay.
AMONG = {"timed-out-type-query": ("remote", "through")}
#: Findings of which one step, perhaps at more ranks, shows as much as two simpler ones: the fewest
#: steps then, and the kinds to look among. No small change leads from two remotes to an Optimize of
#: two parameters, or from a remote and a share to a Nest. So Hypothesis may end at either, and a
#: search among programs with fewer steps finds the other.
FEWER: dict[str, tuple[int, tuple[str, ...] | None]] = {
    "second-failed-remote": (1, None),
    "fork-request-given-up": (1, None),
    "early-owner-fork": (2, ("nest", "share", "bump")),
}
SEEDS = range(5)
#: The kinds that need an earlier step, or two.
NEEDS: dict[str, int] = {
    **dict.fromkeys(("fetch", "share", "drop", "local", "wait", "through", "bump", "ask"), 1),
    "refused": 2,
}


def smallest(
    name: str, strategy: st.SearchStrategy[Any], holds: Callable[[Any], bool], seed: int = 0
) -> Any:
    """What the search ends at; prints the seconds of the processor that it took."""
    began = time.process_time()
    found = find(strategy, holds, settings=SEARCH, random=Random(seed))
    print(f"{name:32} {time.process_time() - began:5.1f} s  {found!r}")
    return found


def drawn_for(
    most: int, kinds: tuple[str, ...] | None = None
) -> st.SearchStrategy[tuple[Program, FaultPlan]]:
    """Programs of up to so many steps, with plans, on a torch of which nothing is avoided."""
    return programs_under_faults(
        max_world_size=4,
        max_steps=most,
        tables=TABLES,
        kinds=kinds,
        facts=UNKNOWN.as_if_mended(),
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("finding", FEWEST)
def test_a_finding_ends_at_its_fewest_steps(finding: str, seed: int) -> None:
    """A program that the oracle says meets a finding shrinks to as few steps as are known."""
    among = drawn_for(12, AMONG.get(finding))
    program, _ = smallest(finding, among, partial(_meets, finding), seed)
    assert len(program.leaves) <= FEWEST[finding]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("finding", FEWER)
def test_another_search_finds_fewer_steps(finding: str, seed: int) -> None:
    """Where a step of another kind does the work of two, a search for fewer steps shows it."""
    most, kinds = FEWER[finding]
    program, _ = smallest(finding, drawn_for(most, kinds), partial(_meets, finding), seed)
    assert len(program.leaves) == most < FEWEST[finding]


def _meets(finding: str, drawn: tuple[Program, FaultPlan]) -> bool:
    return finding in predict(*drawn).known_bugs


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_ends_at_its_fewest_steps(kind: str) -> None:
    """A program that must have one kind of step shrinks to that step and what it needs."""
    program = smallest(kind, programs(), lambda p: any(leaf.op == kind for leaf in p.leaves))
    assert len(program.leaves) == 1 + NEEDS.get(kind, 0)
