"""How the smallest case of a known finding is examined: tried until it shows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rpcprops.agents.wire import NAME as WIRE
from rpcprops.agents.wire import build
from rpcprops.commands.check import _is_left_to_chance
from rpcprops.errors import MachineCannot, UsageError
from rpcprops.faults import MessageFault
from rpcprops.oracle import predict
from rpcprops.outcomes import Outcome, RankOutcome, Violation
from rpcprops.programs import Drop, Own, Share
from rpcprops.properties import PROPERTIES, Case, Examination, Observation, examine, held_case
from rpcprops.properties._engine import REAL_TRIES

NAME = "second-failed-remote"
RATE = 400.0
HUNG = Violation("RankHung", "worker0 hung", 0)
WRONG = Violation("WrongValue", "expected [3.0], got [4.0]", 0, 2)


class Torch:
    """A torch on which the case of the finding shows in chosen runs.

    Args:
        shows: for each rate, the numbers of the runs there that show the finding.
        breaks: the same for runs that break another promise.
    """

    def __init__(
        self,
        version: str,
        shows: dict[float, set[int]],
        breaks: dict[float, set[int]] | None = None,
    ) -> None:
        self.version = version
        self.shows, self.breaks = shows, breaks or {}
        self.runs: list[tuple[float, Case]] = []

    def observe(self, _: Any, case: Case, *, clock: float, **__: Any) -> Observation:
        number = sum(rate == clock for rate, _ in self.runs)
        self.runs.append((clock, case))
        outcome = Outcome(
            2,
            clock_rate=clock,
            torch_version=self.version,
            ranks=(RankOutcome(0, "worker0", exit_code=0), RankOutcome(1, "worker1", exit_code=0)),
        )
        violations = (WRONG,) if number in self.breaks.get(clock, ()) else ()
        explained = (NAME,) if number in self.shows.get(clock, ()) else ()
        if explained:
            first, second = outcome.ranks
            outcome = replace(outcome, ranks=(replace(first, exit_code=None, signal=6), second))
        return Observation(case, outcome, violations, (), explained)

    def examine(self, tries: int = 20) -> Examination:
        server = SimpleNamespace(torch_version=self.version, rate_of=lambda _: RATE)
        runner: Any = SimpleNamespace(server=server, failed_in_use=[])
        prop = replace(PROPERTIES[NAME], observe=self.observe)
        return examine(prop, runner, max_examples=tries)


def tries_of(result: Examination) -> list[str]:
    return [str(tries) for tries in result.tries]


@pytest.mark.parametrize(("version", "status"), [("2.13.0", "listed"), ("2.14.9", "listed")])
def test_a_finding_that_shows_at_once_is_known(version: str, status: str) -> None:
    """One run under the fast clock and one in real time are enough."""
    result = Torch(version, {RATE: {0}, 1.0: {0}}).examine()
    assert (result.verdict, result.status, result.reason) == ("known", status, "")
    assert result.is_good()
    assert tries_of(result) == ["1 of 1 at rate 400", "1 of 1 at rate 1"]
    assert result.failure is not None
    assert list(result.found_after) == [NAME]
    assert 0 <= result.found_after[NAME] <= result.seconds


def test_a_finding_that_shows_seldom_is_tried_until_it_does() -> None:
    """It is known after the first run that shows it, with how many it took."""
    result = Torch("2.13.0", {RATE: {6}, 1.0: {2}}).examine()
    assert result.verdict == "known"
    assert tries_of(result) == ["1 of 7 at rate 400", "1 of 3 at rate 1"]


def test_every_try_is_another_case() -> None:
    """Runs are remembered by what is run, so a try of the same case would show the same."""
    torch = Torch("2.13.0", {RATE: {9}, 1.0: {4}})
    torch.examine()
    assert len({case for _, case in torch.runs}) == len(torch.runs) == 15


def test_a_finding_that_never_shows_is_not_seen_and_no_failure() -> None:
    """Chance decides which of two threads comes first, so a run that is right proves nothing."""
    result = Torch("2.13.0", {}).examine(tries=20)
    assert result.verdict == "not_seen"
    assert result.is_good()
    assert tries_of(result) == ["0 of 20 at rate 400", f"0 of {REAL_TRIES} at rate 1"]
    assert result.reason == "not seen: 0 of 20 at rate 400, 0 of 15 at rate 1"


def test_what_only_the_fast_clock_shows_is_not_seen() -> None:
    """Real time decides; how often the fast clock showed it is said."""
    result = Torch("2.13.0", {RATE: {0}}).examine()
    assert result.verdict == "not_seen"
    assert "1 of 1 at rate 400, 0 of 15 at rate 1" in result.reason


def test_a_torch_that_nobody_has_measured_is_known_and_not_yet_listed() -> None:
    """What breaks there exactly as the finding says is no violation."""
    result = Torch("2.4.1", {RATE: {0}, 1.0: {0}}).examine()
    assert (result.verdict, result.status) == ("known", "unlisted")
    assert result.reason == "not yet listed for torch 2.4.1"


def test_a_torch_that_has_mended_it_holds() -> None:
    """The verdict says which release mended it, and by what change."""
    result = Torch("2.15.0", {}).examine()
    assert (result.verdict, result.status) == ("holds", "fixed")
    assert result.reason == "fixed in torch 2.15 (PyTorch PR 192960)"


def test_another_broken_promise_is_violated() -> None:
    """What the finding cannot have caused is a failure, once slower clocks have shown it too."""
    everywhere = {RATE: {0}, RATE / 10: {0}, 1.0: {0}}
    result = Torch("2.13.0", {}, breaks=everywhere).examine()
    assert result.verdict == "violated"
    assert not result.is_good()
    assert result.failure is not None
    assert result.failure.promise == "WrongValue"


def test_another_failure_that_real_time_does_not_show_is_named() -> None:
    """It is unconfirmed, and the finding is tried on."""
    result = Torch("2.13.0", {RATE: {1}, 1.0: {0}}, breaks={RATE: {0}}).examine()
    assert result.verdict == "known"
    assert len(result.unconfirmed) == 1
    assert "WrongValue" in result.unconfirmed[0]


#: Findings that show only if two messages come in a certain order.
HELD = sorted(name for name in PROPERTIES if held_case(name, 0, 1.0))


def test_which_findings_have_a_case_with_a_certain_order() -> None:
    """The ones that today's case shows in some runs only."""
    assert HELD == [
        "early-owner-fork",
        "fetch-after-delete",
        "shutdown-deletes-argument",
        "shutdown-overtakes-creation",
        "timed-out-remote-dropped",
    ]


@pytest.mark.parametrize("rate", [1.0, 400.0, 1000.0])
@pytest.mark.parametrize("name", HELD)
def test_a_case_that_holds_meets_its_finding(name: str, rate: float) -> None:
    """Without the hold or with it, the model says that the program may meet it, and no other."""
    case = held_case(name, 3, rate)
    assert case is not None
    assert predict(case.program, case.plan).known_bugs >= {name}
    (hold,) = case.plan.others
    assert isinstance(hold, MessageFault)
    if name == "fetch-after-delete":
        # A settle waits for what is delayed, and a held fetch leaves no sign that it has come.
        assert (hold.action, hold.delay) == ("delay", max(2.0, rate))
    else:
        assert (hold.action, hold.delay) == ("hold", 3.0 * rate)


@pytest.mark.parametrize("built", [True, False])
def test_such_a_case_runs_where_the_agent_can_be_built(
    monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    """With a compiler each try is the case that holds, under WIRE; without one, today's case."""
    name, agents = "early-owner-fork", set()

    def prepare(*_: Any, **__: Any) -> None:
        if not built:
            msg = "no compiler"
            raise MachineCannot(msg)

    def observe(_: Any, case: Case, **options: Any) -> Observation:
        agents.add((options.get("agent"), bool(case.plan.others)))
        ranks = (RankOutcome(0, "a", signal=6), RankOutcome(1, "b", exit_code=0))
        outcome = Outcome(2, torch_version="2.13.0", ranks=ranks)
        return Observation(case, outcome, (), (), (name,))

    monkeypatch.setattr(build, "built", prepare)
    server = SimpleNamespace(torch_version="2.13.0", rate_of=lambda _: RATE)
    prop = replace(PROPERTIES[name], observe=observe)
    runner: Any = SimpleNamespace(server=server, failed_in_use=[])
    result = examine(prop, runner, max_examples=2)
    assert agents == ({(WIRE, True)} if built else {(None, False)})
    assert result.agent == (WIRE if built else "")
    chance = examine(prop, runner, max_examples=2, by_chance=True)
    assert chance.agent == ""


def test_a_creation_that_is_held_for_something_else_is_refused() -> None:
    """Only a hold until its own delete says for certain that a creation times out."""
    case = held_case("timed-out-remote-dropped", 0, 1.0)
    assert case is not None
    first, drop = case.program.steps
    more = replace(
        case.program, steps=(Own(1, "o"), Share(1, "o", 0, "p"), Drop(0, "p"), first, drop)
    )
    with pytest.raises(UsageError, match="nobody can tell how long it is held"):
        predict(more, case.plan)


@pytest.mark.parametrize(
    ("agent", "by_chance"), [(None, False), ("wire", False), ("FAULTY_TENSORPIPE", True)]
)
def test_only_an_agent_that_holds_no_messages_leaves_findings_to_chance(
    agent: str | None, by_chance: bool
) -> None:
    """`check --agent wire` runs the cases in which a message is held, as `check` does."""
    assert _is_left_to_chance(agent) is by_chance
