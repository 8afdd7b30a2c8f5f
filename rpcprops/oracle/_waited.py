"""Which steps somebody has waited for, so that nothing of what they let run is under way.

A step that ends with its value has waited for each function that it let run, and for each request
that it or such a function has sent: the value is made of their answers. Three sorts of step end
before what they have started (``torch/distributed/rpc/api.py``: rpc_async and remote return at
once):

* *One that makes a future or an RRef.* It is waited for where a later step gets the value: by the
  future, or of the RRef, whatever handle it uses (``rref_impl.cpp``: UserRRef::toHere asks the
  owner, which answers once the value is made, and OwnerRRef::getValue waits for that).
* *One of whose calls a timeout ends*, though the step gives a value. Its name is among the calls
  that nobody waits for any more (``Model.abandoned_calls``).
* *A rank that leaves alone*, amid a call.

Where the value is the exception of a function, only that function has certainly ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rpcprops.oracle.prediction import StepPrediction
from rpcprops.steps import Leaf

#: Kinds of step whose handle is to an RRef that no function makes, or that another step has made.
_STARTS_NOTHING = frozenset({"own", "share"})
#: Kinds of step that may go on while their functions run, though they make nothing.
_GOES_ON = frozenset({"rejoin"})
#: Kinds of step whose value needs that of each future or RRef that they use.
_NEEDS_VALUES = frozenset({"wait", "fetch", "local", "through", "bump", "call"})
#: Those of them which show the exception of the function that makes it.
_SHOWS_ERROR = frozenset({"wait", "fetch", "local"})


@dataclass(frozen=True, slots=True)
class Waited:
    """What somebody has waited for.

    Attributes:
        steps: the numbers of the steps that have let nothing run that may not have ended.
        first: those of which that is known of the function alone that the step itself calls.
    """

    steps: frozenset[int]
    first: frozenset[int]

    @classmethod
    def by(cls, leaves: Sequence[Leaf], steps: Sequence[StepPrediction]) -> Waited:
        """What these steps have waited for, by what they must show."""
        #: For each future and handle the steps that must have ended once its value is there: first
        #: the one that makes it.
        makers: dict[str, tuple[int, ...]] = {}
        found: set[int] = set()
        first: set[int] = set()
        for number, (leaf, step) in enumerate(zip(leaves, steps, strict=True)):
            behind = tuple(one for name in _used(leaf) for one in makers.get(name, ()))
            made = [name for sort, name in leaf.made if sort != "context"]
            starts = bool(made) and leaf.op not in _STARTS_NOTHING
            makers.update(dict.fromkeys(made, (number, *behind) if starts else behind))
            if step.error == "" and leaf.op not in _GOES_ON:
                found.update((number,) if not starts else ())
                found.update(behind if leaf.op in _NEEDS_VALUES and not _is_later(leaf) else ())
                first.update((number,) if leaf.op == "nest" else ())
            elif step.error == "remote":
                first.update((number,) if leaf.op == "call" else ())
                first.update(behind[:1] if leaf.op in _SHOWS_ERROR else ())
        return cls(frozenset(found), frozenset(first))

    def has_run(self, call: str) -> bool:
        """Whether a function has certainly run, by the name of its call."""
        number = step_of(call)
        return number in self.steps or ("/" not in call and number in self.first)


def step_of(call: str) -> int:
    """The number of the step that lets a function run, by the name of its call."""
    return int(call.partition("/")[0].removeprefix("step"))


def _used(leaf: Leaf) -> Iterator[str]:
    """The handles and the future that a step uses."""
    yield from leaf.used
    if future := getattr(leaf, "future", ""):
        yield future


def _is_later(leaf: Leaf) -> bool:
    """Whether a call ends before its function."""
    return getattr(leaf, "wait", "") == "later"
