"""Examples of Hypothesis tests, run again by what Hypothesis chose for them; no ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.errors import DidNotReproduce

from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, RankOutcome
from rpcprops.plugin.drawn import EXPLICIT, Drawn
from rpcprops.plugin.records import summary_lines
from rpcprops.plugin.timeouts import rate_for, shortest_in

once = settings(max_examples=1, database=None, phases=[hypothesis.Phase.generate])


def watch(test: Any, look: Callable[[Drawn], None]) -> None:
    """Run a test, and look at each of its examples once its body has passed."""
    inner = test.hypothesis.inner_test

    def watched(*args: Any, **kwargs: Any) -> None:
        drawn = Drawn(inner, args, kwargs)
        inner(*args, **kwargs)
        look(drawn)

    test.hypothesis.inner_test = watched
    try:
        test()
    finally:
        test.hypothesis.inner_test = inner


def test_an_example_that_draws_inside_its_body_runs_again() -> None:
    """The second run of an example draws what the first one drew, in the arguments and inside."""
    runs: list[Any] = []

    @settings(max_examples=20, database=None)
    @given(first=st.integers(), data=st.data())
    def test(first: int, data: st.DataObject) -> None:
        runs.append((first, data.draw(st.lists(st.floats(allow_nan=False), max_size=first % 5))))

    def look(drawn: Drawn) -> None:
        drawn.body()()
        assert runs[-1] == runs[-2]

    watch(test, look)
    assert len({repr(run) for run in runs}) > 5


def test_arguments_are_drawn_anew_for_each_run() -> None:
    """A body that changes its arguments gets the original ones when it runs again."""
    seen: list[int] = []

    @settings(max_examples=20, database=None)
    @given(items=st.lists(st.integers(), min_size=1))
    def test(items: list[int]) -> None:
        seen.append(len(items))
        items.append(0)

    def look(drawn: Drawn) -> None:
        drawn.body()()
        assert seen[-1] == seen[-2]

    watch(test, look)


def test_an_explicit_example_is_known_by_its_number() -> None:
    """Explicit examples draw nothing: each has its number as its key, and runs again as given."""
    found: list[tuple[Any, Any]] = []
    seen: list[str] = []

    @example("one")
    @example("two")
    @settings(phases=[hypothesis.Phase.explicit], database=None)
    @given(text=st.just("three"))
    def test(text: str) -> None:
        seen.append(text)

    def look(drawn: Drawn) -> None:
        drawn.body()()
        found.append((drawn.key, drawn.reproduction()))

    watch(test, look)
    keys = [(EXPLICIT, 0), (EXPLICIT, 1)]
    assert sorted(key for key, _ in found) == keys
    blobs = {reproduction[1] for _, reproduction in found if reproduction}
    assert blobs == {f"{EXPLICIT} 0", f"{EXPLICIT} 1"}
    assert sorted(seen) == ["one", "one", "two", "two"]


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (lambda data: data.draw(st.integers(0, 9)), "it draws 1 values, and 2 were drawn"),
        (lambda data: (data.draw(st.text()), data.draw(st.text())), "draw number 1 is of another"),
        (lambda data: (data.draw(st.integers(0, 9)), data.draw(st.booleans())), ""),
    ],
)
def test_a_test_that_draws_differently_is_told(now: Callable[[Any], Any], says: str) -> None:
    """Fewer draws, or draws of another kind, are told from the choices that a blob holds."""
    kept: list[tuple[str, str] | None] = []

    @once
    @given(data=st.data())
    def before(data: st.DataObject) -> None:
        data.draw(st.integers(0, 9))
        data.draw(st.booleans())

    watch(before, lambda drawn: kept.append(drawn.reproduction()))
    blob = kept[0]
    assert blob is not None

    @once
    @given(data=st.data())
    def after(data: st.DataObject) -> None:
        now(data)

    again = hypothesis.reproduce_failure(blob[0], eval(blob[1]))(after)
    differs: list[str] = []
    with pytest.raises(DidNotReproduce):
        watch(again, lambda drawn: differs.append(drawn.differs(blob, passes=True)))
    assert says in differs[0] if says else not differs[0]


def test_a_timeout_chooses_a_rate_that_leaves_it_a_tenth_of_a_second() -> None:
    """2 s choose rate 20, 5 s rate 50, and a timeout below 0.2 s real time."""
    assert [rate_for(timeout) for timeout in (60, 5, 2, 1.9, 0.2, 0.1)] == [200, 50, 20, 10, 2, 1]


def test_the_shortest_timeout_of_all_ranks_counts() -> None:
    """Ranks that have passed none do not count, nor do clusters whose rate was chosen."""
    ranks = [RankOutcome(n, f"worker{n}", shortest_timeout=t) for n, t in enumerate((None, 5.0))]
    more = RankOutcome(0, "worker0", shortest_timeout=2.0)
    recorded = [
        (FaultPlan(), Outcome(2, 400.0, ranks=tuple(ranks))),
        (FaultPlan(), Outcome(1, 400.0, ranks=(more,))),
    ]
    assert shortest_in(recorded, 400.0) == 2.0
    assert shortest_in(recorded[:1], 400.0) == 5.0
    assert shortest_in(recorded, 100.0) is None


def test_failures_that_do_not_count_are_one_line_for_each_test() -> None:
    """Eleven undecided failures are one line, with their number and what to do."""
    summary = {
        "nodeid": "x.py::test",
        "unconfirmed": [],
        "undecided": [f"AssertionError: {number}" for number in range(11)],
        "remedy": "a slower clock helps",
        "clock": "",
    }
    assert list(summary_lines(summary)) == [
        "undecided, the machine was too loaded: x.py::test: AssertionError: 0 (and 10 more like "
        "it); a slower clock helps"
    ]
