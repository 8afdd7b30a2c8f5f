"""The computation of a context step in one process, in plain Python: loss and gradient."""

from __future__ import annotations

from typing import Any

from rpcprops.programs import Context


def run_context(step: Context) -> dict[str, Any]:
    """What a context step yields: x squared, then (r + 2) * y + 1 at each rank r of the path.

    The loss is the sum over elements. Elements do not mix, so the gradient is elementwise: 2x times
    the product of the factors; a second backward adds the same again.
    """
    loss = 0.0
    gradient: list[float] = []
    for x in step.value:
        y, slope = x * x, 2.0 * x
        for rank in step.path:
            factor = float(rank + 2)
            y, slope = factor * y + 1.0, factor * slope
        loss += y
        gradient.append(slope)
    result: dict[str, Any] = {"loss": loss}
    if step.breaks is not None:
        result["broke"] = True
    elif step.backward:
        result["gradient"] = [2.0 * g for g in gradient] if step.retain else gradient
    if step.raises:
        result["raised"] = True
    return result
