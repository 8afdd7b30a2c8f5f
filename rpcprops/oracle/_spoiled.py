"""Which later steps show what a finding has done to an RRef or a future.

A step may leave behind an RRef that is never made, or a future that fails. Only a step that uses
it can show that, and what such a step makes of it is no better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rpcprops.oracle.prediction import Met
from rpcprops.steps import Leaf


@dataclass(frozen=True, slots=True)
class Sign:
    """What shows it: a finding, and the violation of a step that uses the RRef or the future.

    Attributes:
        says: a regular expression for the message of the violation.
        breaks: the promises that may be broken.
    """

    finding: str
    says: str
    breaks: tuple[str, ...] = ("UnexpectedError",)


@dataclass(slots=True)
class Spoiled:
    """The handles and futures of a program that such a thing has happened to.

    Attributes:
        signs: by the name of each handle and future.
        now: what the present step has inherited from what it uses, or has met itself.
    """

    signs: dict[str, set[Sign]] = field(default_factory=dict)
    now: set[Sign] = field(default_factory=set)

    def begins(self, step: Leaf) -> None:
        """A step begins to use what earlier ones have made."""
        names = (*step.used, getattr(step, "future", ""))
        self.now = {sign for name in names for sign in self.signs.get(name, ())}

    def ends(self, step: Leaf, number: int) -> Iterator[Met]:
        """A step has made what it makes; what it may show itself."""
        for sign in self.now:
            rank = getattr(step, "at", None)
            yield Met(sign.finding, rank, number, sign.says, sign.breaks)
        for sort, name in step.made if self.now else ():
            if sort != "context":
                self.signs[name] = {*self.now}
