"""The file of a hunt: what is kept, what is gone on with, and what is refused. No process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rpcprops._hunt import (
    FAULTLESS,
    GROUPS,
    UNDER_FAULTS,
    UNDER_MESSAGE_FAULTS,
    Batch,
    Found,
    Hunt,
    Order,
    Wanted,
    digest,
    hunted,
    summary,
)
from rpcprops.agents.wire import NAME as WIRE
from rpcprops.errors import UsageError
from rpcprops.oracle import DOCUMENTED
from rpcprops.programs import Pause, Program
from rpcprops.properties import WITHOUT_FAULTS, Case
from tests._draws import draws

#: The property whose programs have no faults.
ALONE = WITHOUT_FAULTS.name


def batch(seed: int, *cases: str, transport: str = "tcp", name: str = UNDER_FAULTS[0]) -> Batch:
    """A batch with so many different examples."""
    return Batch(name, seed, transport, 400.0, "2.13.0", "holds", list(cases), faults_fired=2)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    """A hunt that was written and read again is the same."""
    hunt = Hunt(tmp_path / "deep" / "hunt.jsonl")
    hunt.append(batch(0, "a", "b"))
    hunt.append(batch(0, "c", transport="shm"))
    assert Hunt.read(hunt.path) == hunt


def test_no_file_is_an_empty_hunt(tmp_path: Path) -> None:
    """A hunt begins where there is no file."""
    assert Hunt.read(tmp_path / "none").examples == 0


def test_a_batch_that_cannot_be_written_goes_with_the_next(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """A full disk ends no hunt: it is said, and what was not written is once there is room."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(batch(0, "a"))
    with full_disk():
        hunt.append(batch(1, "b"))
    assert str(hunt.unwritten) == f"could not be written: {hunt.path}: File too large"
    assert hunt.examples == 2
    assert Hunt.read(hunt.path).examples == 1
    hunt.append(batch(2, "c"))
    assert hunt.unwritten is None
    assert Hunt.read(hunt.path) == hunt
    in_the_way = Hunt(hunt.path / "hunt.jsonl")
    in_the_way.append(batch(0, "a"))
    assert "Not a directory" in str(in_the_way.unwritten) or "exists" in str(in_the_way.unwritten)


def test_an_example_that_two_batches_drew_counts_once(tmp_path: Path) -> None:
    """Examples are counted by what was run, apart for each transport."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(batch(0, "a", "b"))
    hunt.append(batch(1, "b", "c"))
    hunt.append(batch(1, "b", transport="shm"))
    assert hunt.examples == 4
    assert summary(hunt)["examples_by_property"][UNDER_FAULTS[0]] == 4


def test_what_was_accepted_is_summed_up(tmp_path: Path) -> None:
    """Each kind over all batches, with its sentence and its shortest example."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    for seed, count, example in ((0, 2, "a longer one"), (1, 3, "a short one")):
        one = batch(seed, f"case{seed}")
        one.accepted = {"leak-at-owner": count}
        one.accepted_times = {"leak-at-owner": 2 * count}
        one.accepted_examples = {"leak-at-owner": example}
        hunt.append(one)
    assert summary(Hunt.read(hunt.path))["accepted"] == [
        {
            "kind": "leak-at-owner",
            "examples": 5,
            "times": 10,
            "sentence": DOCUMENTED["leak-at-owner"].sentence,
            "allowed_by": DOCUMENTED["leak-at-owner"].allowed_by,
            "is_defect": True,
            "example": "a short one",
        }
    ]


def test_an_example_that_a_file_lacks_is_not_missed(tmp_path: Path) -> None:
    """A file that somebody edited may count an effect of which it holds no example."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    one = batch(0, "a")
    one.accepted = {"leak-at-owner": 1}
    hunt.append(one)
    (accepted,) = summary(hunt)["accepted"]
    assert accepted["example"] == "one that the file does not hold"


def test_a_hunt_goes_on_with_what_is_not_in_its_file(tmp_path: Path) -> None:
    """No property is drawn from again with a seed and over a transport that it was drawn with."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    first = hunt.next_batch()
    hunt.append(batch(first[1], "a", transport=first[2], name=first[0]))
    following = hunt.next_batch()
    assert following != first
    assert following[1] == 0


def without(seed: int, *cases: str, transport: str = "tcp") -> Batch:
    """A batch of examples without faults."""
    one = batch(seed, *cases, transport=transport, name=ALONE)
    one.without_faults = list(cases)
    return one


def test_half_of_the_examples_are_without_faults(tmp_path: Path) -> None:
    """Batches without faults come as long as they are no more than the share that is asked for."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    assert hunt.next_batch() == (ALONE, 0, "tcp")
    assert hunt.next_batch(0.0)[0] == UNDER_FAULTS[0]
    hunt.append(without(0, "a", "b"))
    assert hunt.next_batch() == (UNDER_FAULTS[0], 0, "tcp")
    assert hunt.next_batch(1.0) == (GROUPS, 0, "tcp")
    hunt.append(batch(0, "c", "d"))
    assert hunt.next_batch() == (GROUPS, 0, "tcp")
    assert (hunt.examples, hunt.without_faults) == (4, 2)
    data = summary(Hunt.read(hunt.path))
    assert (data["examples_without_faults"], data["examples_with_faults"]) == (2, 2)


def test_a_batch_has_as_many_draws_as_its_sort_still_needs(tmp_path: Path) -> None:
    """Of ten examples half are without faults; what one sort has too many the other lacks."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    assert [hunt.missing(name, 10, 0.5) for name in (ALONE, UNDER_FAULTS[0])] == [5, 5]
    hunt.append(without(0, "a", "b", "c"))
    assert [hunt.missing(name, 10, 0.5) for name in (ALONE, UNDER_FAULTS[0])] == [2, 5]
    hunt.append(batch(0, *"defghi"))
    assert [hunt.missing(name, 10, 0.5) for name in (ALONE, UNDER_FAULTS[0])] == [2, 0]


def test_an_example_that_drew_no_fault_counts_as_one_without() -> None:
    """What the property without faults draws has none, and proves something all the same."""
    cases = draws(hunted()[ALONE].cases(), 20)
    assert all(not case.plan.faulty_ranks(case.program.world_size) for case in cases)
    assert not hunted()[ALONE].needs_faults


def test_the_time_to_each_finding_is_told(tmp_path: Path) -> None:
    """In seconds from the first batch on, the first time only; a doubt is no finding."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    first, second = batch(0, "a"), batch(1, "b")
    first.found_after = {"early-owner-fork": 7.0, "RRefLeak": 3.0}
    first.explained = {"early-owner-fork": 2}
    second.found_after = {"early-owner-fork": 1.0, "WrongValue": 2.5}
    second.explained = {"early-owner-fork": 1}
    second.failure = ["WrongValue", "x.json"]
    for one in (first, second):
        one.seconds = 10.0
        hunt.append(one)
    found = Hunt.read(hunt.path).found
    # One example in each batch, and an older file does not say when it ended: so with the batch.
    assert found == [Found("early-owner-fork", 7.0, True), Found("WrongValue", 12.5, False, 1)]
    said = {"name": "WrongValue", "seconds": 12.5, "examples": 1, "known": False}
    assert summary(hunt)["found"][1] == said


def timed(seed: int, began: float, after: list[float], **found: int) -> Batch:
    """A batch that says when each example ended, and in which of them it met something."""
    one = batch(seed, *(f"{seed}-{number}" for number in range(len(after))))
    one.began, one.after, one.seconds = began, after, after[-1]
    one.found_at = {name.replace("_", "-"): number for name, number in found.items()}
    one.found_after = {name: after[n - 1] - 0.1 for name, n in one.found_at.items()}
    one.explained = dict.fromkeys(one.found_at, 1)
    return one


def test_examples_until_a_finding_are_those_of_all_processes(tmp_path: Path) -> None:
    """Of batches at the same time, what both had run by then counts; and the example itself."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(timed(1, 0.0, [2.0, 4.0, 6.0], early_owner_fork=3))
    hunt.append(timed(0, 1.0, [2.0, 4.0, 8.0], early_owner_fork=2, failed_async_proxy=1))
    again = Hunt.read(hunt.path)
    assert again.found == [
        Found("failed-async-proxy", 3.0, True, 2),
        Found("early-owner-fork", 5.0, True, 4),
    ]
    assert again.seconds == 9.0
    assert summary(again)["seconds_of_all_jobs"] == 14.0
    assert 9.0 <= again.clock()() < 99.0


def test_hunts_with_other_seeds_have_other_draws(tmp_path: Path) -> None:
    """A seed names a range of draws, is kept in the file, and cannot be changed there."""
    first, second = (Hunt.read(tmp_path / name, seed) for name, seed in (("a", None), ("b", 3)))
    assert [hunt.next_batch()[1] for hunt in (first, second)] == [0, 3_000_000]
    second.append(batch(3_000_000, "a"))
    assert Hunt.read(second.path).seed == Hunt.read(second.path, 3).seed == 3
    with pytest.raises(UsageError, match=r"is of seed 3, not 4; hunt in another --file, or leave"):
        Hunt.read(second.path, 4)


def test_orders_that_are_under_way_are_not_given_again(tmp_path: Path) -> None:
    """Each of several processes gets other draws, half of them without faults, and not too many."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    given: list[Order] = []
    while order := hunt.order(Wanted(2000), under_way=given, jobs=8):
        given.append(order)
    assert len({order.key for order in given}) == len(given)
    alone = sum(order.draws for order in given if order.property in FAULTLESS)
    assert 2000 <= sum(order.draws for order in given) < 2400
    assert 900 <= alone <= 1100
    assert {order.property for order in given} == set(hunted())
    # The first eight are of one size, so that no process waits for another one.
    assert max(order.draws for order in given[:8]) < 2 * min(order.draws for order in given[:8])


def test_real_time_has_a_share_of_a_hunt(tmp_path: Path) -> None:
    """What passing cases took in real time is taken off a tenth of the time of all."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    assert _real_seconds(hunt) == 0.0
    one = batch(0, "a")
    one.seconds, one.real_seconds = 100.0, 4.0
    hunt.append(one)
    assert _real_seconds(hunt) == pytest.approx(6.0)
    assert _real_seconds(hunt, jobs=2) == pytest.approx(3.0)
    one = batch(1, "a")
    one.seconds, one.real_seconds = 10.0, 8.0
    hunt.append(one)
    assert _real_seconds(hunt) == 0.0


def test_a_hunt_for_what_is_known_keeps_to_itself(tmp_path: Path) -> None:
    """Its file says so, and is gone on with in the same way or not at all; so is another one."""
    hunt = Hunt(tmp_path)
    for known in (False, True):
        hunt = Hunt.read(tmp_path / str(known), known=known)
        order = hunt.order(Wanted(2000))
        assert order is not None
        assert order.known is hunt.known is known
        one = batch(0, "a")
        one.known = known
        hunt.append(one)
        assert Hunt.read(hunt.path) == Hunt.read(hunt.path, known=known) == hunt
        assert summary(hunt)["draws_known"] is known
        with pytest.raises(UsageError, match=r"--known; (leave it out|add it), or hunt in another"):
            Hunt.read(hunt.path, known=not known)
    hunt.append(batch(1, "b"))
    with pytest.raises(UsageError, match="mixes batches"):
        Hunt.read(hunt.path)


@pytest.mark.parametrize("known", [False, True])
def test_a_hunt_also_draws_groups(tmp_path: Path, *, known: bool) -> None:
    """In smaller batches, which count as without faults."""
    hunt = Hunt(tmp_path / "hunt.jsonl", known=known)
    given: list[Order] = []
    while order := hunt.order(Wanted(4000), under_way=given, jobs=8):
        given.append(order)
    assert {order.property for order in given} == set(hunted(known=known))
    assert set(FAULTLESS) == {ALONE, GROUPS} < set(hunted(known=known))
    assert all(order.draws <= 100 for order in given if order.property == GROUPS)
    alone = sum(order.draws for order in given if order.property in FAULTLESS)
    assert 1800 <= alone <= 2300


@pytest.mark.parametrize(("known", "examples"), [(True, 300), (False, 300), (False, 30)])
def test_a_short_hunt_has_all_properties(tmp_path: Path, *, known: bool, examples: int) -> None:
    """Also if the hunt is no longer than a usual batch; and it runs few more than are asked for."""
    hunt = Hunt(tmp_path / "hunt.jsonl", known=known)
    names: list[str] = []
    while order := hunt.order(Wanted(examples)):
        names.append(order.property)
        cases = [f"{len(names)}-{number}" for number in range(order.draws)]
        one = batch(order.seed, *cases, transport=order.transport, name=order.property)
        one.without_faults = cases if order.property in FAULTLESS else []
        one.known = known
        hunt.append(one)
    assert set(names) == set(hunted(known=known))
    assert examples <= hunt.examples <= 1.2 * examples


@pytest.mark.parametrize("known", [False, True])
def test_a_hunt_with_wire_also_draws_message_faults(tmp_path: Path, *, known: bool) -> None:
    """As it draws the other properties under faults; with no other agent it does."""
    drawn: dict[str, set[str]] = {}
    for agent in ("FAULTY_TENSORPIPE", WIRE):
        hunt = Hunt.read(tmp_path / agent, known=known)
        hunt.draw_for("2.13.0", agent)
        given: list[Order] = []
        while order := hunt.order(Wanted(3000), under_way=given, jobs=8):
            given.append(order)
        assert {order.property for order in given} == set(hunted(known=known, agent=hunt.agent))
        drawn[agent] = {order.property for order in given}
    assert drawn[WIRE] - drawn["FAULTY_TENSORPIPE"] == {UNDER_MESSAGE_FAULTS}
    assert set(UNDER_FAULTS) < drawn["FAULTY_TENSORPIPE"] < drawn[WIRE]


def test_message_faults_come_in_turn_and_are_counted(tmp_path: Path) -> None:
    """Every second time under faults; the summary has them, also of a file read again."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.draw_for("2.13.0", WIRE)
    names: list[str] = []
    for number in range(6):
        name, seed, transport = hunt.next_batch(0.0)
        names.append(name)
        one = batch(seed, f"case{number}", transport=transport, name=name)
        one.agent = WIRE
        hunt.append(one)
    assert names[::2] == list(UNDER_FAULTS)
    assert names[1::2] == [UNDER_MESSAGE_FAULTS] * 3
    again = Hunt.read(hunt.path)
    assert again == hunt
    assert summary(again)["examples_by_property"] == {
        **dict.fromkeys(FAULTLESS, 0),
        **Counter(names),
    }
    assert again.next_batch(0.0) == (UNDER_FAULTS[0], 0, "shm")


def test_a_hunt_keeps_to_its_agent(tmp_path: Path) -> None:
    """What is drawn depends on it, so another one needs another file; an empty hunt takes any."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    assert UNDER_MESSAGE_FAULTS not in summary(hunt)["examples_by_property"]
    hunt.draw_for("2.13.0", WIRE)
    one = batch(0, "a")
    one.agent = WIRE
    hunt.append(one)
    with pytest.raises(UsageError, match="the agent WIRE, not FAULTY_TENSORPIPE; give --agent"):
        Hunt.read(hunt.path).draw_for("2.13.0", "FAULTY_TENSORPIPE")


def _real_seconds(hunt: Hunt, jobs: int = 1) -> float:
    order = hunt.order(Wanted(100), jobs=jobs)
    assert order is not None
    return order.real_seconds


def test_an_older_file_is_read(tmp_path: Path) -> None:
    """A batch that says nothing of what is counted since has none of it."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(batch(0, "a"))
    data = json.loads(hunt.path.read_bytes())
    newer = ("without_faults", "accepted_times", "found_after", "found_at", "after", "began")
    for name in (*newer, "real_seconds", "draws"):
        del data[name]
    hunt.path.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    again = Hunt.read(hunt.path)
    assert (again.examples, again.without_faults, again.found) == (1, 0, [])


def test_a_line_cut_short_is_left_out_and_written_over(tmp_path: Path) -> None:
    """A hunt that was killed while it wrote loses that line only."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(batch(0, "a"))
    with hunt.path.open("ab") as file:
        file.write(b'{"property": "drawn')
    again = Hunt.read(hunt.path)
    assert again.examples == 1
    again.append(batch(1, "b"))
    assert Hunt.read(hunt.path).examples == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json\n", "line 1: no batch"),
        ("[]\n", "line 1: no batch"),
        ('{"property": "x"}\n', "line 1: no batch"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """The error names the line."""
    path = tmp_path / "hunt.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        Hunt.read(path)


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"property": 1}', '["x"]'])
def test_a_file_of_something_else_keeps_every_byte(tmp_path: Path, text: str) -> None:
    """Neither read nor written: `--file notes.txt` never costs anybody their notes."""
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 1: no batch of a hunt; name a file that"):
        Hunt.read(path)
    with pytest.raises(UsageError, match="line 1: no batch of a hunt"):
        Hunt(path).append(batch(0, "a"))
    assert path.read_bytes() == before


def test_a_first_batch_cut_short_is_written_over(tmp_path: Path) -> None:
    """A hunt that was killed while it wrote its first batch begins anew in the same file."""
    whole = Hunt(tmp_path / "whole.jsonl")
    whole.append(batch(0, "a"))
    cut = tmp_path / "hunt.jsonl"
    cut.write_bytes(whole.path.read_bytes()[:30])
    hunt = Hunt.read(cut)
    assert hunt.examples == 0
    hunt.append(batch(0, "a"))
    assert cut.read_bytes() == whole.path.read_bytes()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A file of another format is not gone on with."""
    hunt = Hunt(tmp_path / "hunt.jsonl")
    hunt.append(Batch("p", 0, "tcp", 1.0, "2.13.0", format=99))
    with pytest.raises(UsageError, match="format 1"):
        Hunt.read(hunt.path)


def test_a_digest_is_of_the_case_alone() -> None:
    """The same case has the same digest, another has another."""
    one, same, other = (Case(Program(1, (Pause(0, s),))) for s in (1.0, 1.0, 2.0))
    assert digest(one) == digest(same) != digest(other)
