"""The benchmark: what it runs really runs, and its figures are of what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rpcprops import agents
from rpcprops._bench import (
    Bench,
    Figures,
    Kind,
    Spread,
    failing,
    growth_with_ranks,
    long_program,
    small_program,
)
from rpcprops.errors import MachineCannot
from rpcprops.oracle import predict
from rpcprops.outcomes import Outcome
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests._wire import needs_wire


def test_the_small_program_meets_every_failing_type() -> None:
    """All four retryable types fire in the program that the headline figures are about."""
    prediction = predict(small_program(), failing(3))
    struck = {message for by_type in prediction.failures() for message in by_type}
    assert struck == set(failing(3).default.messages_to_fail)


def test_long_programs_have_their_length() -> None:
    """Growth with length is growth with that many steps."""
    assert [len(long_program(n).steps) for n in (1, 4, 16, 64)] == [1, 4, 16, 64]


def test_samples_and_the_floors(rpc_cluster: ClusterFactory) -> None:
    """An example is right, and dearer than bare ranks that were prepared as its own were.

    Bare ranks without our preparations may cost more than the whole example.
    """
    with Bench(Runner(rpc_cluster.server), 2, lambda _: None) as bench:
        ours = bench.example("faultless", small_program(), failing(0))
        short = bench.example("short", long_program(1), failing(0))
        floors = [bench.floor(4), bench.floor(4, prepared=True)]
        sample, shortest, bare, prepared = bench.alternate([ours, short, *floors])
    assert sample.wrong == shortest.wrong == 0
    assert [bare.name, prepared.name] == ["bare floor, 4 ranks", "bare floor, prepared, 4 ranks"]
    for floor in (bare, prepared):
        assert floor.seconds.least > 0
        assert floor.processor.least > 0
    assert prepared.processor.least < sample.processor.greatest


@needs_wire
def test_the_ledger_is_measured_in_pairs(
    rpc_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair is one example with a ledger and one without, in turn; afterwards all have one."""
    counts: list[bool] = []
    runner = Runner(rpc_cluster.server)
    run = runner.run_anew

    def counted(*args: Any, **options: Any) -> Outcome:
        outcome = run(*args, **options)
        counts.append(bool(outcome.messages))
        return outcome

    monkeypatch.setattr(runner, "run_anew", counted)
    with Bench(runner, 1, lambda _: None) as bench:
        (row,) = bench.ledger([small_program(2)])
    assert counts == [False, True, True, False]
    assert (row["program"], row["pairs"]) == ("small[2]", 1)
    assert row["processor_ratio"]["median"] > 0
    assert agents.named("wire").has_ledger


def test_bare_ranks_that_fail_are_named(rpc_cluster: ClusterFactory) -> None:
    """Where bare ranks cannot run, the error says what they wrote last, and nothing hangs."""
    with Bench(Runner(rpc_cluster.server), 1, lambda _: None) as bench:
        with pytest.raises(MachineCannot, match=r"the bare ranks failed: .*TypeError"):
            bench.alternate([Kind("many", lambda: bench._bare[False].once("many"))])  # type: ignore[arg-type]


def test_kinds_run_in_turn(rpc_cluster: ClusterFactory) -> None:
    """A B C, A B C: each kind once a round; a dear one in fewer rounds, spread over all."""
    ran: list[str] = []

    def kind(name: str, rounds: int | None = None) -> Kind:
        def once() -> Figures:
            ran.append(name)
            return Figures(float(len(ran)), 1.0)

        return Kind(name, once, rounds)

    bench = Bench(Runner(rpc_cluster.server), 4, lambda _: None)
    dear, cheap, other = bench.alternate([kind("A", 2), kind("b"), kind("c")])
    # The round that warms goes first, without the dear one.
    assert "".join(ran) == "bc" + "bc" + "Abc" + "bc" + "Abc"
    assert (dear.seconds.least, dear.seconds.greatest) == (5, 10)
    assert cheap.seconds.least == 3
    assert other.seconds.greatest == len(ran)


@pytest.mark.parametrize(("rounds", "of"), [(3, 9), (3, 7), (3, 1), (1, 5), (5, 5)])
def test_dear_kinds_keep_their_number_of_rounds(rounds: int, of: int) -> None:
    """A kind of so many rounds takes part in that many, or in all where there are fewer."""
    kind = Kind("dear", lambda: Figures(0, 0), rounds)
    assert sum(kind.takes_part(number, of) for number in range(of + 1)) == min(rounds, of)


def test_growth_rows_stand_beside_the_floor_of_their_world(rpc_cluster: ClusterFactory) -> None:
    """A row of growth has both floors of its own world size, and the ratio to each.

    One process of bare ranks for each kind of floor serves all world sizes, and is gone when the
    bench is closed.
    """
    with Bench(Runner(rpc_cluster.server), 1, lambda _: None) as bench:
        sizes = (2, 3)
        kinds = [(n, bench.example("", small_program(n), failing(0))) for n in sizes]
        rows = bench._grow("world_size", kinds, sizes)
        (alone,) = bench._grow("steps", [(1, kinds[0][1])], (2,))
        children = psutil.Process().children(recursive=True)
        bare = [child for child in children if "rpcprops._bare_ranks" in child.cmdline()]
        assert len(bare) == 2
    assert not any(child.is_running() for child in bare)
    for row, size in zip(rows, sizes, strict=True):
        assert row["world_size"] == size
        assert row["floor"]["name"] == f"bare floor, {size} ranks"
        assert row["prepared_floor"]["name"] == f"bare floor, prepared, {size} ranks"
        for floor in ("floor", "prepared_floor"):
            ratio = row["seconds"]["median"] / row[floor]["seconds"]["median"]
            assert row[f"against_{floor}"] == pytest.approx(ratio, abs=0.01)
    assert alone["floor"]["name"] == "bare floor, 2 ranks"


def test_a_ratio_has_the_spread_of_its_parts() -> None:
    """The least is the best of one over the worst of the other; growth is by medians."""
    ratio = Spread(10.0, 8.0, 15.0).against(Spread(2.0, 1.0, 4.0))
    assert ratio == Spread(5.0, 2.0, 15.0)

    def row(ours: float, bare: float) -> dict[str, Any]:
        floors = {key: {"seconds": {"median": bare}} for key in ("floor", "prepared_floor")}
        return {"seconds": {"median": ours}, **floors}

    grown = growth_with_ranks([row(1.0, 2.0), row(2.0, 3.0), row(3.0, 8.0)])
    assert grown == {"ours": 3.0, "floor": 4.0, "prepared_floor": 4.0}


@pytest.mark.nightly
def test_the_command_writes_its_figures(tmp_path: Path) -> None:
    """`rpcprops bench` without PyTorch's harness ends with 0, prints ratios, and writes JSON."""
    command = [sys.executable, "-m", "rpcprops", "bench", "--repeats", "1", "--harness", "0"]
    ran = subprocess.run(
        [*command, "--json", "figures.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "fast against real time" in ran.stdout
    data = json.loads((tmp_path / "figures.json").read_text())
    names = {sample["name"] for sample in data["comparison"]["samples"]}
    assert "ours, real time" in names
    assert {"bare floor, 4 ranks", "bare floor, prepared, 4 ranks"} < names
    ratios = data["comparison"]["ratios"]
    # Without a run of the harness there is nothing to compare a faulted example with.
    assert set(data["ratios"]) <= {"used_world"}
    for name, ratio in data["ratios"].items():
        assert f"(ratios.{name}): " in ran.stdout
        assert ratio == data["ratio_spreads"][name]["median"] > 1
        assert data["ratios_of"][name] == [f"WIRE, {w} world, no faults" for w in ("new", "used")]
    assert ratios["fast against real time"] > 5
    for floor in ("the bare floor", "the bare floor, prepared"):
        assert f"faultless against {floor}: " in ran.stdout
        assert ratios[f"faultless against {floor}"] > 0


def test_the_ledger_needs_a_compiler_before_anything_is_measured(tmp_path: Path) -> None:
    """Else all figures would be lost: the command ends with exit code 3 before it starts a rank."""
    file = tmp_path / "figures.json"
    ran = subprocess.run(
        [sys.executable, "-m", "rpcprops", "bench", "--ledger", "--json", str(file)],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-compiler"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ran.returncode == 3, ran.stderr
    assert "no-compiler" in ran.stderr + ran.stdout
    assert "measuring" not in ran.stdout + ran.stderr
    assert not file.exists()
