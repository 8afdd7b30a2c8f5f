"""Steps about dynamic groups: ``init_rpc`` without a world size, whose members join and leave.

Each `predict` tells the model what these files of torch do, all in ``torch/distributed/rpc``:
``__init__.py`` (init_rpc), ``api.py`` (shutdown), ``_utils.py`` (_group_membership_management) and
``backend_registry.py`` (_tensorpipe_init_backend_handler); and ``agent_utils.cpp``
(collectCurrentNames, removeCurrentName) in ``torch/csrc/distributed/rpc``.

Torch's faulty agent has no dynamic groups (its handler of init_rpc needs a world size), so their
members run torch's own agent, and no fault acts on what they send.

Two things are not drawn, because torch documents nothing of them: what a group knows of a member
that left without a graceful shutdown, and an owner that leaves while others use its values. A name
with a dash is not used either: torch documents it as allowed, and collectCurrentNames takes it
apart at the first dash, so the next member looks for another name.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import Counters, Violation
from rpcprops.steps.base import Sort, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.programs.scope import Scope

#: What a rank does: it joins; it tries to, under a name that torch does not allow; it leaves by a
#: graceful shutdown; as a member, it looks at what it knows and holds.
Does = Literal["join", "refused", "leave", "look"]
#: Virtual seconds that a rank that leaves waits for the token, which nobody else may have by then.
_TOKEN_WAITS = 1.0
DOES: tuple[Does, ...] = get_args(Does)


@dataclass(frozen=True, slots=True, repr=False)
class Member(Step):
    """A rank joins a dynamic group, leaves it, or looks at it.

    A program that begins with such a step has no static world: its ranks begin without RPC, and
    only members can take part in steps. It has ``settles=False``, since not all ranks hold
    something; what a member holds is seen by "look". Nothing waits at its end for what ``remote``
    has started, so a Fetch must. Who is still a member at the end stays one
    until its process exits.

    The value is a dict. "join" has the numbers of the members that the rank knows then
    (``members``); "look" also has how many values it owns and how many forks of them it counts
    (``held``; not predicted while a creation or a delete may be under way); "refused" has the class
    of the error (``refused``), "RuntimeError" for what derives from it.
    """

    op: ClassVar[str] = "member"
    in_branch: ClassVar[bool] = False
    outside_group: ClassVar[bool] = True
    makes: ClassVar[Mapping[str, Sort]] = {}
    gives: ClassVar[type] = dict
    at: int
    does: Does = "join"

    def enter(self, scope: Scope) -> None:
        members = scope.members
        if members is None and scope.begun:
            msg = "a dynamic group is founded by the first step of a program, or not at all."
            raise UsageError(msg)
        members = members or frozenset()
        is_in = self.at in members
        if is_in != (self.does in ("leave", "look")):
            msg = f"does={shown(self.does)}: rank {self.at} is {'a' if is_in else 'no'} member."
            raise UsageError(msg)
        if self.does == "leave":
            self._enter_leave(scope)
            members -= {self.at}
        elif self.does == "join":
            members |= {self.at}
        scope.members = members

    def _enter_leave(self, scope: Scope) -> None:
        """A member may hold RRefs when it leaves, but nobody may hold one of its values."""
        for name, handle in scope.handles.items():
            if handle.owner == self.at:
                msg = f"{shown(name)} is a handle of a value of rank {self.at}, which leaves."
                raise UsageError(msg)
        if scope.futures:
            msg = f"wait for {shown(next(iter(scope.futures)))} before a member leaves."
            raise UsageError(msg)
        for name in [name for name, handle in scope.handles.items() if handle.home == self.at]:
            del scope.handles[name]
            scope.gone.add(name)

    def predict(self, model: Model, call: str) -> StepPrediction:
        if model.plan.faults(model.world_size):
            msg = (
                f"{self!r}: torch's faulty agent has no dynamic groups, so the plan of such a "
                f"program must have no faults."
            )
            raise UsageError(msg)
        return {
            "join": self._join,
            "refused": self._refused,
            "leave": self._leave,
            "look": self._look,
        }[self.does](model)

    def _join(self, model: Model) -> StepPrediction:
        group = model.group
        if group.inits[self.at]:
            # rref_context.cpp: RRefContext::destroyInstance, as after any second init_rpc.
            model.rejoined = True
        self._begin(model)
        wanted, known = group.members, group.known_to(self.at)
        if known != wanted:
            # __init__.py: init_rpc puts _init_counter into the prefix of the store.
            model.meets_here("rejoins-alone", self.at, f"^{re.escape(_knows(known, wanted))}$")
        return model.shows({"members": wanted})

    def _refused(self, model: Model) -> StepPrediction:
        # rpc_agent.cpp: WorkerInfo checks the name, in the constructor of the agent. That is within
        # _utils.py: _group_membership_management, which has taken the token by then.
        self._begin(model, refused=True)
        return model.shows({"refused": "RuntimeError"})

    def _begin(self, model: Model, *, refused: bool = False) -> None:
        """``init_rpc`` begins.

        Raises:
            UsageError: this torch would wait for a token that nobody gives back.
        """
        group = model.group
        number = group.inits[self.at] if model.facts.has_bug("rejoins-alone") else 0
        group.inits[self.at] += 1
        if number in group.stuck and model.facts.has_bug("failed-join-keeps-token"):
            msg = (
                f"{self!r}: after a join that was refused, this torch lets nobody join any more, "
                f"and waits for a day."
            )
            raise UsageError(msg)
        if refused:
            group.stuck.add(number)
        else:
            group.joined[self.at] = number

    def _leave(self, model: Model) -> StepPrediction:
        group = model.group
        if any(rref.owner == self.at for rref in model.rrefs):
            msg = (
                f"{self!r}: rank {self.at} owns values; whether the last deletes of their users "
                f"have come when it leaves is not known."
            )
            raise UsageError(msg)
        # api.py: shutdown says that it deletes the UserRRefs, and waits for all that is under way.
        # So it does for a static group, by _delete_all_user_and_unforked_owner_rrefs.
        for user in [user for user in model.users if user.rank == self.at]:
            user.rref.made |= user.fork == user.rref.first
            group.kept.append((user.rref, user.fork))
            model.drop(user)
        if group.joined[self.at] in group.stuck:
            says = f"got \\w+: .*(?i:{model.facts.texts.timed_out})"
            model.meets_here("failed-join-keeps-token", self.at, says)
        del group.joined[self.at]
        return model.shows({})

    def _look(self, model: Model) -> StepPrediction:
        group = model.group
        wanted, known = group.members, group.known_to(self.at)
        if known != wanted:
            model.meets_here("rejoins-alone", self.at, f"^{re.escape(_knows(known, wanted))}$")
        deletes = {s.rank for s in model.sends if s.message is MessageType.RREF_USER_DELETE}
        coming = any(rref.owner == self.at and not rref.made for rref in model.rrefs)
        if coming or deletes & set(wanted):
            # Only one that has left has certainly waited until its messages had come
            # (tensorpipe_agent.cpp: TensorPipeAgent::join).
            return model.shows({"members": wanted})
        owned = model.counters()[self.at]
        held = [owned.owners, owned.forks]
        kept = group.with_kept(self.at, model.rrefs)
        if kept != held:
            says = f"^{re.escape(_holds(kept, held))}$"
            model.meets_here("leaving-keeps-values", self.at, says)
        return model.shows({"members": wanted, "held": held})

    @property
    def lasts(self) -> float:
        return _TOKEN_WAITS if self.does == "leave" else 0.0

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []
        if "members" in expected and seen.get("members") != expected["members"]:
            message = _knows(seen.get("members"), expected["members"])
            found.append(Violation("WrongValue", message))
        if expected.get("held") is not None and seen.get("held") != expected["held"]:
            found.append(_wrongly_held(seen.get("held"), expected["held"]))
        if seen.get("refused") != expected.get("refused"):
            error = seen.get("refused") or "no error"
            message = f"a join under a name that torch does not allow had to be refused: {error}"
            found.append(Violation("MissingError", message))
        return found


def _knows(seen: Any, wanted: Sequence[int]) -> str:
    return f"a member knows the members {seen!r}, expected {list(wanted)!r}"


def _wrongly_held(seen: Any, wanted: Sequence[int]) -> Violation:
    message = _holds(seen, wanted)
    less = isinstance(seen, list) and any(map(operator.lt, seen, wanted))
    return Violation("OwnerGone" if less else "RRefLeak", message)


def _holds(seen: Any, wanted: Sequence[int]) -> str:
    if not isinstance(seen, list) or len(seen) != len(wanted):
        return f"a member shows {seen!r} as what it holds"
    now, want = (Counters(owners=one[0], forks=one[1]).describe() for one in (seen, wanted))
    return f"a member holds {now}; expected {want}"
