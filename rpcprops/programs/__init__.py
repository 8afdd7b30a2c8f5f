"""Programs as data: what the ranks do, step by step, over named handles.

A :class:`Program` runs on real ranks (:func:`rpcprops.run`) and is understood by the oracle, which
predicts each step's value, the messages it sends, and what every rank holds once settled. Steps
run one after the other, each at the rank it names; the branches of a :class:`Parallel` run at once.
"""

from rpcprops.programs._program import MAX_WORLD_SIZE, Program, check_world_size
from rpcprops.programs.scope import HandleInfo, Scope
from rpcprops.steps import (
    STEP_TYPES,
    Argument,
    Bump,
    Call,
    Carry,
    Chain,
    Context,
    Count,
    Drop,
    Fetch,
    Flavour,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Parallel,
    Pause,
    Refused,
    Remote,
    Settle,
    Share,
    Step,
    Through,
    Value,
    Wait,
)

__all__ = [
    "MAX_WORLD_SIZE",
    "STEP_TYPES",
    "Argument",
    "Bump",
    "Call",
    "Carry",
    "Chain",
    "Context",
    "Count",
    "Drop",
    "Fetch",
    "Flavour",
    "HandleInfo",
    "Leaf",
    "Local",
    "Module",
    "Nest",
    "Optimize",
    "Own",
    "Parallel",
    "Pause",
    "Program",
    "Refused",
    "Remote",
    "Scope",
    "Settle",
    "Share",
    "Step",
    "Through",
    "Value",
    "Wait",
    "check_world_size",
]
