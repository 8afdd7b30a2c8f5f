"""Clean worlds: what happens as it has to is reported as nothing, in no time, every time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from rpcprops.oracle import judge, predict
from rpcprops.outcomes import Violation
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import Runner
from tests.seeded._corpus import WIDE_TABLES, World, drawn

Record = Callable[[str, object], None]
CLEAN = 500
#: Processor seconds that judging all of them may take, predictions included: a tenth is usual.
_SECONDS = 10.0


def judged(world: World) -> tuple[Violation, ...]:
    """What the judge says of a world in which everything is as predicted."""
    return judge(world.program, world.plan, world.outcome)


def test_clean_outcomes_give_no_report(record_property: Record) -> None:
    """Drawn programs under drawn plans, within the budget and beyond: nothing is said of any.

    Judging is a function: it changes nothing, and says the same again, without what it remembers.
    """
    worlds = [*drawn(CLEAN // 2), *drawn(CLEAN // 2, tables=WIDE_TABLES)]
    before = [repr(world.outcome) for world in worlds]
    predict.cache_clear()
    began = time.process_time()
    reports = {index: said for index, world in enumerate(worlds) if (said := judged(world))}
    seconds = time.process_time() - began
    record_property("clean outcomes", [len(worlds) - len(reports), len(worlds)])
    assert not reports, [(worlds[i].program, worlds[i].plan, said) for i, said in reports.items()]
    assert seconds < _SECONDS
    predict.cache_clear()
    assert [judged(world) for world in worlds] == [()] * CLEAN
    assert [repr(world.outcome) for world in worlds] == before


@pytest.mark.parametrize("number", [30, pytest.param(500, marks=pytest.mark.nightly)])
def test_clean_ranks_give_no_report(
    number: int, rpc_cluster: ClusterFactory, record_property: Record
) -> None:
    """Drawn programs within the retry budget, on real ranks of stock torch: nothing to say of any.

    What a fast clock shows counts once real time shows it too. Programs that meet a known finding
    of stock torch are left out.
    """
    runner = Runner(rpc_cluster.server)
    worlds = [world for world in drawn(number + number // 5) if not world.prediction.known_bugs]
    worlds = worlds[:number]
    reports: list[tuple[World, tuple[Violation, ...]]] = []
    for world in worlds:
        for clock in (None, "real"):
            outcome = runner.run_anew(world.program, world.plan, clock=clock)
            said = judge(world.program, world.plan, outcome)
            if not said:
                break
        else:
            reports.append((world, said))
    record_property("clean runs", [len(worlds) - len(reports), len(worlds)])
    assert not reports
    assert len(worlds) == number
