"""The sum that calls and remote calls compute: in Python, by a builtin of torch, in TorchScript."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from rpcprops.steps.in_rank._shared import handle_of, note_call, tensor


class RaisedOnPurposeError(Exception):
    """Raised by functions that a step asks to raise."""


def add(call: str, left: torch.Tensor, right: Any) -> torch.Tensor:
    """Add two tensors; the second may come as an RRef, and is fetched here."""
    note_call(call)
    return left + (right if isinstance(right, torch.Tensor) else right.to_here())


def raise_on_purpose(call: str, left: torch.Tensor, right: Any) -> torch.Tensor:
    """Raise, whatever the arguments."""
    note_call(call)
    raise RaisedOnPurposeError(call)


def torchscript(function: Any) -> Any:
    """Compile a function by TorchScript, without torch's warning that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


@torchscript
def script_add(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add two tensors, in TorchScript."""
    return left + right


@torchscript
def script_raise(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Raise in TorchScript, which wants to see a value returned as well."""
    if left.numel() >= 0:
        raise RuntimeError("raised on purpose")  # noqa: EM101  (TorchScript)
    return left + right


def sum_call(
    call: str, flavour: str, left: Any, right: Any, *, raises: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """The function that adds `left` and `right`, or raises, and its arguments.

    `right` may be the name of an RRef. Only a Python function can be told the name of its call.
    """
    if raises:
        function = raise_on_purpose if flavour == "python" else script_raise
    else:
        function = {"python": add, "builtin": torch.add, "script": script_add}[flavour]
    args = (tensor(left), handle_of(right) if isinstance(right, str) else tensor(right))
    return function, (call, *args) if flavour == "python" else args
