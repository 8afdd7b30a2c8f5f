"""What Hypothesis shrinks to, for each finding and each kind of step: the fewest steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from rpcprops._hunt import hunted
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.faults import RETRYABLE_MESSAGE_TYPES, FaultPlan, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import FailTwice, Rejoin, Retry
from rpcprops.properties import Case
from rpcprops.properties._drawn_messages import disturbed
from rpcprops.strategies import fault_tables, programs, programs_under_faults
from rpcprops.strategies.drawing import KINDS
from rpcprops.torch_facts import FINDINGS, UNKNOWN
from tests._draws import QUIET

pytestmark = pytest.mark.nightly
SEARCH = settings(
    QUIET, max_examples=20_000, derandomize=False, phases=[Phase.generate, Phase.shrink]
)
MENDED = UNKNOWN.as_if_mended()
#: The kinds of step that hunts draw where there is no fault.
ALL = (*KINDS, Rejoin.op, Retry.op, FailTwice.op)
TABLES = st.one_of(
    fault_tables(),
    fault_tables(messages=tuple(MessageType), max_fail_sends=2),
    fault_tables(messages=RETRYABLE_MESSAGE_TYPES, max_fail_sends=7),
)
#: For each property that a hunt draws from: the findings that are searched for among its programs,
#: with the steps at which each search ends. It is the property whose programs meet it most often.
ENDS: dict[str, dict[str, int]] = {
    "drawn-without-faults": {
        "rref-lifetime-after-reinit": 2,
        "failed-async-proxy": 1,
        "failed-backward-revisits-rank": 1,
        "freed-context-used": 1,
        "garbled-exception-text": 1,
        "functional-default-rate": 1,
        "adagrad-wrong-parameter": 1,
        "stale-gradients": 1,
        "retried-without-payload": 1,
        "profiled-events-lost": 2,
        "profiling-key-kept": 1,
        "refused-init-counted": 1,
        "gathering-count-kept": 1,
        "timeout-needs-thread": 3,
        "unreadable-remote": 1,
        "failed-pickle-keeps-tensors": 1,
        "refused-remote-to-self": 1,
        "remote-module-drops-mode": 1,
        "remote-module-mode-copies": 1,
        "rebuilt-module-not-callable": 1,
        "proxy-takes-keywords": 1,
        "proxy-hides-methods": 1,
        "proxy-asks-class": 1,
        "long-timeout-ends-at-once": 1,
        "short-timeout-never-comes": 1,
        "refused-exception-kept": 1,
        "collect-all-ends-early": 1,
        "optimizer-options-by-place": 1,
    },
    "drawn-within-budget": {
        "timed-out-type-query": 3,
        "early-owner-fork": 3,
        "late-remote-to-self": 1,
        "remote-module-skips-hooks": 1,
        "remote-module-takes-names": 1,
    },
    "drawn-lost-calls": {
        "second-failed-remote": 2,
        "async-proxy-leaves-context": 1,
        "readable-injected-error": 2,
        "rref-sent-after-reinit": 2,
    },
    "drawn-beyond-budget": {
        "fork-request-given-up": 2,
        "shutdown-overtakes-creation": 1,
        "context-after-cleanup": 1,
        "future-exception-as-value": 1,
        "unpicklable-after-rref": 1,
        "unwritable-tensor": 1,
        "guessed-rref-type": 1,
        "attribute-error-as-value": 1,
        "unconfirmed-user": 4,
        "rounded-rprop-factor": 1,
        "unchecked-optimizer-options": 1,
        "late-answer-keeps-rref": 1,
        "unreadable-tensor": 1,
    },
    "drawn-message-faults": {
        "timed-out-remote-dropped": 2,
        "shutdown-deletes-argument": 2,
        "fetch-after-delete": 3,
        "shutdown-races-delete": 1,
    },
    "drawn-groups": {
        "failed-join-keeps-token": 3,
        "rejoins-alone": 4,
        "leaving-keeps-values": 5,
        "dash-in-member-name": 2,
    },
}
CASES = [(name, finding, most) for name, ends in ENDS.items() for finding, most in ends.items()]
#: The kinds among which the search looks for a finding that one in some thousands of drawn programs
#: meets: each needs one of many forms of a step whose family is on in a part of the programs.
AMONG = {
    "adagrad-wrong-parameter": ("train",),
    "stale-gradients": ("train",),
    "refused-remote-to-self": ("carry",),
}
#: Findings that fewer steps of other kinds show too: how many, and the kinds to look among; None
#: for the programs of the property with no more steps. No small change leads from two remotes to an
#: Optimize of two parameters, from a remote and a share to a Nest or to one call, from two profiled
#: calls to one step that makes both, from a member that leaves and comes back to one whose join is
#: refused, from an Own and a Share to a Nest, or from a Drop to an end without a settle. So
#: Hypothesis may end at either, and a search among programs with fewer steps finds the other.
FEWER: dict[str, tuple[int, tuple[str, ...] | None]] = {
    "second-failed-remote": (1, KINDS),
    "readable-injected-error": (1, KINDS),
    "fork-request-given-up": (1, KINDS),
    "early-owner-fork": (2, ("nest", "share", "bump")),
    "profiled-events-lost": (1, ("profile",)),
    "unconfirmed-user": (3, ("nest", "settle", "ask")),
    # In ranks of one thread. Eight threads are the simplest choice, and several steps take those.
    "timeout-needs-thread": (1, ("onward",)),
    "timed-out-remote-dropped": (1, None),
    "rejoins-alone": (3, None),
}
#: Those that end at more than one step, in whichever kinds.
LONG = [one for one in CASES if (FEWER[one[1]][0] if one[1] in FEWER else one[2]) > 1]
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


@cache
def hunts(name: str) -> st.SearchStrategy[Case]:
    """The cases that a hunt for what is known draws for a property."""
    return hunted(known=True, agent=WIRE)[name].cases()


def without_faults(most: int, kinds: tuple[str, ...]) -> st.SearchStrategy[Case]:
    """Programs of up to so many steps without faults, on a torch of which nothing is avoided."""
    plan = FaultPlan()
    drawn = programs(max_world_size=4, max_steps=most, kinds=kinds, plan=plan, facts=MENDED)
    return drawn.map(Case)


def under_tables(most: int, kinds: tuple[str, ...]) -> st.SearchStrategy[Case]:
    """The same with plans that have tables."""
    drawn = programs_under_faults(
        max_world_size=4, max_steps=most, tables=TABLES, kinds=kinds, facts=MENDED
    )
    return drawn.map(lambda pair: Case(*pair))


def shorter(name: str, most: int) -> st.SearchStrategy[Case]:
    """Programs of all kinds as hunts draw them for a property; mostly of up to so many steps."""
    if name == "drawn-groups":
        return hunts(name)
    if name == "drawn-message-faults":
        drawn = programs_under_faults(
            min_world_size=2, max_world_size=4, max_steps=most, tables=TABLES, facts=MENDED
        )
        return disturbed(drawn, MENDED, ("delay", "hold", "lose", "fail"))
    return st.one_of(without_faults(most, ALL), under_tables(most, (*KINDS, Rejoin.op)))


def test_each_finding_that_is_drawn_is_searched_for() -> None:
    """Once, unless data beside it say why no drawn program meets it."""
    drawn = sorted(name for name, finding in FINDINGS.items() if not finding.not_drawn)
    assert sorted(finding for _, finding, _ in CASES) == drawn


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "finding", "steps"), CASES, ids=[one[1] for one in CASES])
def test_a_finding_ends_at_its_fewest_steps(name: str, finding: str, steps: int, seed: int) -> None:
    """A program that the oracle says meets a finding shrinks to as few steps as are known."""
    among = without_faults(12, AMONG[finding]) if finding in AMONG else hunts(name)
    case = smallest(finding, among, partial(_meets, finding), seed)
    fewest = FEWER[finding][0] if finding in FEWER else steps
    assert fewest <= len(case.program.leaves) <= steps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("finding", FEWER)
def test_another_search_finds_fewer_steps(finding: str, seed: int) -> None:
    """Where a step of another kind does the work of two, a search for fewer steps shows it."""
    most, kinds = FEWER[finding]
    name, steps = next((name, steps) for name, one, steps in CASES if one == finding)

    def shows(case: Case) -> bool:
        return len(case.program.leaves) <= most and _meets(finding, case)

    among = shorter(name, most) if kinds is None else under_tables(most, kinds)
    assert len(smallest(finding, among, shows, seed).program.leaves) == most < steps


@pytest.mark.parametrize(("name", "finding", "steps"), LONG, ids=[one[1] for one in LONG])
def test_no_search_finds_fewer_steps_than_are_known(name: str, finding: str, steps: int) -> None:
    """None of a thousand programs with fewer steps, of all kinds, meets the finding."""
    fewest = FEWER[finding][0] if finding in FEWER else steps
    began = time.process_time()
    with pytest.raises(NoSuchExample):
        find(
            shorter(name, fewest - 1),
            # Some faults add a step to a drawn program, and those of groups are of any length.
            lambda case: len(case.program.leaves) < fewest and _meets(finding, case),
            settings=settings(SEARCH, max_examples=1000),
            random=Random(0),
        )
    print(f"{finding:32} {time.process_time() - began:5.1f} s  none below {fewest}")


def _meets(finding: str, case: Case) -> bool:
    return finding in predict(case.program, case.plan).known_bugs


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_ends_at_its_fewest_steps(kind: str) -> None:
    """A program that must have one kind of step shrinks to that step and what it needs."""
    program = smallest(kind, programs(), lambda p: any(leaf.op == kind for leaf in p.leaves))
    assert len(program.leaves) == 1 + NEEDS.get(kind, 0)
