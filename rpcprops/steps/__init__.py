"""The kinds of step: each is one class, which contains all that is specific to the kind.

To add one, write its class in the module of its family, and the function that runs it in a rank.
You may also put both into a module of your own, where the function is named like the class's
``op``. The function may import ``in_rank.state`` at the top of its module, and torch inside itself.
:mod:`rpcprops.steps.base` says what a class must contain.
"""

from rpcprops.steps.autograd import Context, FailTwice, Outlast, Refused
from rpcprops.steps.base import STEP_TYPES, Argument, Flavour, Leaf, Step, StepFails, Value
from rpcprops.steps.calls import Call, Chain, Count, Wait
from rpcprops.steps.control import Parallel, Pause, Settle
from rpcprops.steps.functions import Deferred, Invoke, Raising, Recurse, Scripted
from rpcprops.steps.graphs import Graph, Unreached
from rpcprops.steps.groups import Member
from rpcprops.steps.life import Profile, Rejoin
from rpcprops.steps.nested import Onward
from rpcprops.steps.retries import Retry
from rpcprops.steps.rrefs import Bump, Drop, Fetch, Local, Nest, Own, Remote, Share, Through
from rpcprops.steps.training import Linear, Module, Optimize, Train
from rpcprops.steps.values import Carry
from rpcprops.steps.ways import After, Ask, Default, Gather, Method, Reach

__all__ = [
    "STEP_TYPES",
    "After",
    "Argument",
    "Ask",
    "Bump",
    "Call",
    "Carry",
    "Chain",
    "Context",
    "Count",
    "Default",
    "Deferred",
    "Drop",
    "FailTwice",
    "Fetch",
    "Flavour",
    "Gather",
    "Graph",
    "Invoke",
    "Leaf",
    "Linear",
    "Local",
    "Member",
    "Method",
    "Module",
    "Nest",
    "Onward",
    "Optimize",
    "Outlast",
    "Own",
    "Parallel",
    "Pause",
    "Profile",
    "Raising",
    "Reach",
    "Recurse",
    "Refused",
    "Rejoin",
    "Remote",
    "Retry",
    "Scripted",
    "Settle",
    "Share",
    "Step",
    "StepFails",
    "Through",
    "Train",
    "Unreached",
    "Value",
    "Wait",
]
