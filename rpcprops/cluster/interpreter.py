"""Runs one step of a :class:`rpcprops.Program` in a rank: times it, and turns errors into data.

What each kind of step does is in :mod:`rpcprops.steps.in_rank`.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

from rpcprops.errors import text_of
from rpcprops.outcomes import RaisedError, StepOutcome
from rpcprops.programs import Leaf
from rpcprops.steps.in_rank import state
from rpcprops.steps.in_rank.lookup import arguments_of, function_of


def run_step(
    index: int, step: Leaf, world: tuple[str, ...], contexts: dict[str, int]
) -> StepOutcome:
    """Run one step here. `world` holds the names of the ranks, `contexts` ids by name.

    Where it raises, its value is None, or the id of the context that it has made.
    """
    started = time.monotonic()
    value: Any = None
    error: RaisedError | None = None
    makes = {getattr(step, field, "") for field, sort in step.makes.items() if sort == "context"}
    try:
        state.contexts.update(contexts)
        for name in makes:
            state.contexts.pop(name, None)
        value = function_of(step)(f"step{index}", world, **arguments_of(step))
    except BaseException as raised:
        error = RaisedError(type(raised).__name__, _message(raised), traceback.format_exc())
        value = next(({"id": state.contexts[x]} for x in makes if x in state.contexts), None)
        # Frames of the traceback hold RRefs, which would then never be deleted.
        traceback.clear_frames(raised.__traceback__)
        del raised
    return StepOutcome(index, value, error, time.monotonic() - started)


def _message(error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        # In the text of an injected failure the agent quotes the payload, which is binary.
        return error.object.decode(errors="backslashreplace")
    return text_of(error)
