"""The sum that calls and remote calls compute: in Python, by a builtin of torch, in TorchScript."""

from __future__ import annotations

import time
import warnings
from typing import Any, get_type_hints

import torch

from rpcprops.steps.in_rank.shared import tensor
from rpcprops.steps.in_rank.state import handle_of, hold_gil, note_call, note_slowly


class RaisedOnPurposeError(Exception):
    """Raised by functions that a step asks to raise."""


def add(
    call: str, left: torch.Tensor, right: Any, seconds: float = 0.0, spins: bool = False
) -> torch.Tensor:
    """Add two tensors; if the second is an RRef, it is fetched here. Then sleep for `seconds`.

    With `spins` hold the GIL first.
    """
    note_call(call)
    if spins:
        hold_gil()
    try:
        return left + (right if isinstance(right, torch.Tensor) else right.to_here())
    finally:
        if seconds:
            time.sleep(seconds)


def raise_on_purpose(
    call: str, left: torch.Tensor, right: Any, seconds: float = 0.0
) -> torch.Tensor:
    """Sleep for `seconds`, and raise, whatever the arguments."""
    note_slowly(call, seconds)
    raise RaisedOnPurposeError(call)


def torchscript(function: Any) -> Any:
    """Compile a function by TorchScript, without torch's warning that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


def called_by_script(function: Any) -> Any:
    """Let TorchScript call a function of Python, as what it is. Its annotations must be types."""
    function.__annotations__ = get_type_hints(function)
    return torch.jit.ignore(function)  # type: ignore[no-untyped-call]


@torchscript
def script_add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add two tensors, in TorchScript."""
    return left + right


@torchscript
def script_add_large(left: torch.Tensor, right: torch.Tensor, megabytes: int) -> torch.Tensor:
    """Add two tensors, in TorchScript; the sum is the beginning of so many megabytes of ones."""
    whole = torch.ones([megabytes * 131072 + left.numel()], dtype=torch.float64)
    return whole.narrow(0, 0, left.numel()).copy_(left + right)


@torchscript
def script_raise(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Raise in TorchScript, which requires that the function also returns a value."""
    if left.numel() >= 0:
        raise RuntimeError("raised on purpose")  # noqa: EM101  (TorchScript)
    return left + right


def operand(value: tuple[float, ...] | str) -> Any:
    """An operand of a call: a tensor for a value, or the RRef with that name."""
    return handle_of(value) if isinstance(value, str) else tensor(value)


def sum_call(
    call: str,
    flavour: str,
    left: Any,
    right: Any,
    *,
    raises: bool = False,
    seconds: float = 0.0,
    spins: bool = False,
    megabytes: int = 0,
) -> tuple[Any, tuple[Any, ...]]:
    """The function that adds, or raises, and its arguments.

    Only a Python function can be given the name of its call, the seconds that it sleeps, and
    whether it holds the GIL; only a TorchScript function how large its value is.
    """
    if megabytes:
        return script_add_large, (left, right, megabytes)
    if raises:
        function = raise_on_purpose if flavour == "python" else script_raise
    else:
        function = {"python": add, "builtin": torch.add, "script": script_add}[flavour]
    if flavour != "python":
        return function, (left, right)
    if spins:
        return function, (call, left, right, seconds, spins)
    return function, (call, left, right, seconds) if seconds else (call, left, right)
