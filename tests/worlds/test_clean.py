"""Clean worlds: what happens as it has to is reported as nothing, in no time, every time."""

from __future__ import annotations

import time
from collections.abc import Callable

from rpcprops.oracle import judge
from rpcprops.oracle._model import predict
from rpcprops.outcomes import Violation
from tests.worlds._corpus import World, drawn

CLEAN = 500
#: Processor seconds that judging all of them may take, predictions included: a tenth is usual.
_SECONDS = 10.0


def judged(world: World) -> tuple[Violation, ...]:
    """What the judge says of a world in which everything is as predicted."""
    return judge(world.program, world.plan, world.outcome)


def test_clean_outcomes_give_no_report(record_property: Callable[[str, object], None]) -> None:
    """Drawn programs under drawn plans, within the budget and beyond: nothing is said of any.

    Judging is a function: it changes nothing, and says the same again, without what it remembers.
    """
    worlds = list(drawn(CLEAN))
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
