"""Steps about dynamic groups: ``init_rpc`` without a world size, whose members join and leave.

Each `predict` tells the model what these files of torch do, all in ``torch/distributed/rpc``:
``__init__.py`` (init_rpc), ``api.py`` (shutdown), ``_utils.py`` (_group_membership_management) and
``backend_registry.py`` (_tensorpipe_init_backend_handler); and ``agent_utils.cpp``
(collectCurrentNames, removeCurrentName) and ``tensorpipe_agent.cpp`` (checkAndSetStaticGroup,
updateGroupMembership) in ``torch/csrc/distributed/rpc``.

Torch's faulty agent has no dynamic groups (its handler of init_rpc needs a world size), so their
members run torch's own agent, and no fault acts on what they send. Where the ranks have the agent
``wire``, so have the members, and all that they send is recorded and compared.

Of a member that leaves without a graceful shutdown, torch documents only that this "is a local
shutdown, and it does not wait for other RPC processes" (``api.py``: shutdown). So that must not
fail, and the others must know and call each other as before. Nothing is predicted of what they know
of the one that is gone. In the source nobody tells them (shutdown calls _update_group_membership
only if it is graceful), and its name stays in the store (removeCurrentName is called by
TensorPipeAgent::leaveGroup alone). So who joins or leaves after that calls a rank that is gone
(_set_devices_and_reverse_device_map, shutdown), and no document says what then comes: the oracle
refuses such a program. It also refuses an owner that leaves while others use its values.
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

#: What torch refuses while no agent runs, each by ``api.py``: _require_initialized, but the last
#: one by ``rpc_agent.cpp``: RpcAgent::getCurrentRpcAgent. All are RuntimeErrors.
Outside = Literal[
    "rpc_sync",
    "rpc_async",
    "remote",
    "get_worker_info",
    "shutdown",
    "shutdown at once",
    "get_rpc_timeout",
]
OUTSIDE: tuple[Outside, ...] = get_args(Outside)
#: The text of all but the last one, by its name in ``torch_facts/_texts.py``.
_UNINITIALISED = "uninitialised"
#: What a rank does: it joins; it tries to, in a way that torch must refuse; it leaves by a graceful
#: shutdown; as a member, it looks at what it knows and holds; it leaves by a shutdown that tells
#: nobody; as no member, it does what torch refuses then.
Does = Literal["join", "refused", "leave", "look", "leave at once", "outside"]
_OF_NO_MEMBER: tuple[Does, ...] = ("join", "refused", "outside")
#: What may stand inside a profiler.
_PROFILED: tuple[Does, ...] = ("join", "leave", "leave at once")
#: Why torch must refuse a join: the name is not allowed (``rpc_agent.cpp``: WorkerInfo); a member
#: has that name, or that rank (``agent_utils.cpp``: collectCurrentNames); it names a world size
#: (``tensorpipe_agent.cpp``: TensorPipeAgent::checkAndSetStaticGroup). All are RuntimeErrors.
Refusal = Literal["bad name", "taken name", "taken rank", "static"]
REFUSALS: tuple[Refusal, ...] = get_args(Refusal)
_OF_A_MEMBER: tuple[Refusal, ...] = ("taken name", "taken rank")
#: Virtual seconds that a rank that leaves waits for the token, which nobody else may have by then.
_TOKEN_WAITS = 1.0
DOES: tuple[Does, ...] = get_args(Does)
#: The name under which a member shows that it knows another one, without the number.
_KNOWS = "knows "


@dataclass(frozen=True, slots=True, repr=False)
class Member(Step):
    """A rank joins a dynamic group, leaves it, or looks at it.

    With `dash` the rank joins under a name that has a dash, and keeps that name in the whole
    program. `why` is what a "refused" join does wrong; `taken` is the member whose name or rank it
    takes. `what` is what a rank "outside" calls: before it has joined, or once it has left. A rank
    that has called ``init_rpc`` with another rank than its own cannot join later
    (``autograd/context/container.cpp``: DistAutogradContainer::init).

    A program that begins with such a step has no static world: its ranks begin without RPC, and
    only members can take part in steps. It has ``settles=False``, since not all ranks hold
    something; what a member holds is seen by "look". Nothing waits at its end for what ``remote``
    has started, so a Fetch must. Who is still a member at the end stays one
    until its process exits.

    The value is a dict. "join" has the numbers of the members that the rank knows then
    (``members``). "look" also has ``knows`` with the number of each of them, which is predicted in
    place of ``members`` once somebody has left at once; and how many values it owns and how many
    forks of them it counts (``held``; not predicted while a creation or a delete may be under way,
    or may have been lost). "refused" and "outside" have the class of the error (``refused``),
    "RuntimeError" for what derives from it.

    With `profiled` the rank joins or leaves inside ``torch.autograd.profiler_legacy.profile()``,
    and the value has as ``profiled`` how many events have the name of a call by which it tells the
    members of that, as ``internal.py``: _build_rpc_profiling_key builds it.
    """

    op: ClassVar[str] = "member"
    in_branch: ClassVar[bool] = False
    outside_group: ClassVar[bool] = True
    makes: ClassVar[Mapping[str, Sort]] = {}
    gives: ClassVar[type] = dict
    at: int
    does: Does = "join"
    dash: bool = False
    why: Refusal = "bad name"
    taken: int | None = None
    what: Outside = "rpc_sync"
    profiled: bool = False

    def enter(self, scope: Scope) -> None:
        members = scope.members
        if members is None and scope.begun:
            msg = "a dynamic group is founded by the first step of a program, or not at all."
            raise UsageError(msg)
        members = members or frozenset()
        is_in = self.at in members
        if is_in == (self.does in _OF_NO_MEMBER):
            msg = f"does={shown(self.does)}: rank {self.at} is {'a' if is_in else 'no'} member."
            raise UsageError(msg)
        self._check_refusal(members)
        self._check_others()
        if self.does in ("join", "refused") and self.at in scope.foreign:
            msg = (
                f"rank {self.at} has called init_rpc with another rank, and torch allows its "
                f"process no second one (container.cpp: DistAutogradContainer::init)."
            )
            raise UsageError(msg)
        if self.does in ("leave", "leave at once"):
            self._enter_leave(scope)
            members -= {self.at}
        elif self.does == "join":
            if scope.dashed.setdefault(self.at, self.dash) != self.dash:
                msg = f"dash={self.dash}: rank {self.at} has joined under another name."
                raise UsageError(msg)
            members |= {self.at}
        if self.given_rank != self.at:
            scope.foreign |= {self.at}
        scope.members = members

    @property
    def given_rank(self) -> int:
        """The rank that it gives init_rpc."""
        if self.does != "refused" or self.why not in ("taken rank", "static"):
            return self.at
        # The process group of a world of one rank waits for nobody.
        return 0 if self.taken is None else self.taken

    def _check_refusal(self, members: frozenset[int]) -> None:
        """Raises:
        UsageError: its fields do not fit each other, or the members.
        """
        if self.dash and self.does != "join":
            msg = f"dash=True needs does='join', not {shown(self.does)}."
            raise UsageError(msg)
        is_refused = self.does == "refused"
        if self.why != "bad name" and not is_refused:
            msg = f"why={shown(self.why)} needs does='refused', not {shown(self.does)}."
            raise UsageError(msg)
        if (self.taken is not None) != (is_refused and self.why in _OF_A_MEMBER):
            msg = f"taken={shown(self.taken)}: it is a member if why is one of {_OF_A_MEMBER}."
            raise UsageError(msg)
        if self.taken is not None and self.taken not in members:
            msg = f"taken={shown(self.taken)} is no member."
            raise UsageError(msg)
        if self.why == "static" and not members:
            msg = "why='static' needs a group that has members."
            raise UsageError(msg)

    def _check_others(self) -> None:
        """Raises:
        UsageError: its fields do not fit what it does.
        """
        if self.what != "rpc_sync" and self.does != "outside":
            msg = f"what={shown(self.what)} needs does='outside', not {shown(self.does)}."
            raise UsageError(msg)
        if self.profiled and self.does not in _PROFILED:
            msg = f"profiled=True needs one of {_PROFILED}, not does={shown(self.does)}."
            raise UsageError(msg)

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
            if self.does == "leave at once":
                msg = f"{shown(name)} is at rank {self.at}, which leaves at once; drop it first."
                raise UsageError(msg)
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
            "leave at once": self._leave_at_once,
            "outside": self._outside,
        }[self.does](model)

    def _join(self, model: Model) -> StepPrediction:
        group = model.group
        if group.inits[self.at]:
            # rref_context.cpp: RRefContext::destroyInstance, as after any second init_rpc.
            model.rejoined = True
        if self.dash:
            group.dashed.add(self.at)
        self._begin(model)
        wanted, known = group.members, group.known_to(self.at)
        told = self._tells(model, group.called_to_join(self.at))
        if known != wanted:
            # __init__.py: init_rpc puts _init_counter into the prefix of the store.
            says = f"^{re.escape(_knows(known, wanted))}$"
            model.findings.meets_here("rejoins-alone", self.at, says)
        if group.dashed & {*known} - {self.at}:
            says = (
                f"^expected no error, got ValueError: {re.escape(model.facts.texts.not_a_number)}"
            )
            model.findings.meets_here("dash-in-member-name", self.at, says)
        return model.shows({"members": wanted, **told})

    def _tells(self, model: Model, called: Sequence[int]) -> Mapping[str, int]:
        """It calls these members, perhaps inside a profiler; what it shows of that."""
        if not self.profiled:
            model.group.told.update((self.at, one) for one in called)
            return {}
        for one in called:
            # autograd/utils.cpp: sendMessageWithAutograd.
            model.in_contexts.profiled(self.at, one)
        model.profiled.update(called)
        return {"profiled": len(called)}

    def _outside(self, model: Model) -> StepPrediction:
        # api.py: _require_initialized.
        return model.shows({"refused": "RuntimeError"})

    def _refused(self, model: Model) -> StepPrediction:
        # All are checked in the constructor of the agent. That is within _utils.py:
        # _group_membership_management, which has taken the token by then, unless the world is
        # static (backend_registry.py: _tensorpipe_init_backend_handler).
        group = model.group
        if self.given_rank != self.at and group.inits[self.at]:
            msg = (
                f"{self!r}: its process has called init_rpc with its own rank before, so "
                f"container.cpp (DistAutogradContainer::init) refuses it for that."
            )
            raise UsageError(msg)
        number = self._begin(model, refused=True)
        known = [one for one in group.members if group.joined[one] == number]
        wanted = [self.taken] if self.taken is not None else group.members
        if self.why != "bad name" and not {*wanted} & {*known}:
            msg = f"{self!r}: this torch looks for other members, so what it does is not known."
            raise UsageError(msg)
        if self.why == "taken name" and group.dashed & {*known}:
            says = "a way that torch must refuse .*: ValueError$"
            model.findings.meets_here("dash-in-member-name", self.at, says)
        return model.shows({"refused": "RuntimeError"})

    def _begin(self, model: Model, *, refused: bool = False) -> int:
        """``init_rpc`` begins; the number by which it looks for others.

        Raises:
            UsageError: this torch would wait for a token that nobody gives back, or would call
                members that are gone.
        """
        group = model.group
        self._check_gone(model)
        number = group.inits[self.at] if model.facts.has_bug("rejoins-alone") else 0
        group.inits[self.at] += 1
        takes_token = not (refused and self.why == "static")
        if takes_token and number in group.stuck and model.facts.has_bug("failed-join-keeps-token"):
            msg = (
                f"{self!r}: after a join that was refused, this torch lets nobody join any more, "
                f"and waits for a day."
            )
            raise UsageError(msg)
        if not refused:
            group.joined[self.at] = number
        elif takes_token:
            group.stuck.add(number)
        return number

    def _check_gone(self, model: Model) -> None:
        """Raises:
        UsageError: members have left without telling, and nobody says what comes then.
        """
        gone = model.group.gone
        if gone:
            msg = (
                f"{self!r}: rank {min(gone)} has left at once, and torch does not say "
                f"whether others can join or leave after that."
            )
            raise UsageError(msg)

    def _leave_at_once(self, model: Model) -> StepPrediction:
        # api.py: shutdown.
        self._check_owned(model)
        model.group.gone.add(self.at)
        del model.group.joined[self.at]
        return model.shows(self._tells(model, ()))

    def _check_owned(self, model: Model) -> None:
        """Raises:
        UsageError: it owns values.
        """
        if any(rref.owner == self.at for rref in model.rrefs):
            msg = (
                f"{self!r}: rank {self.at} owns values; whether the last deletes of their users "
                f"have come when it leaves is not known."
            )
            raise UsageError(msg)

    def _leave(self, model: Model) -> StepPrediction:
        group = model.group
        self._check_gone(model)
        self._check_owned(model)
        # api.py: shutdown says that it deletes the UserRRefs, and waits for all that is under way.
        # So it does for a static group, by _delete_all_user_and_unforked_owner_rrefs.
        for user in [user for user in model.users if user.rank == self.at]:
            user.rref.made |= user.fork == user.rref.first
            group.kept.append((user.rref, user.fork))
            model.drop(user)
        if group.joined[self.at] in group.stuck:
            says = f"got \\w+: .*(?i:{model.facts.texts.timed_out})|does not end"
            model.findings.meets_here("failed-join-keeps-token", self.at, says)
        told = self._tells(model, group.called_to_leave(self.at))
        del group.joined[self.at]
        return model.shows(told)

    def _look(self, model: Model) -> StepPrediction:
        group = model.group
        wanted, known = group.members, group.known_to(self.at)
        shown: dict[str, Any] = {"members": wanted}
        if group.gone:
            shown = {f"{_KNOWS}{one}": True for one in wanted}
            for one in {*wanted} - {*known}:
                says = f"^{re.escape(_knows_not(one))}$"
                model.findings.meets_here("rejoins-alone", self.at, says)
        elif known != wanted:
            says = f"^{re.escape(_knows(known, wanted))}$"
            model.findings.meets_here("rejoins-alone", self.at, says)
        deletes = {s.rank for s in model.sends if s.message is MessageType.RREF_USER_DELETE}
        coming = any(rref.owner == self.at and not rref.made for rref in model.rrefs)
        if coming or deletes & {*wanted, *group.gone}:
            # Only one that has left has certainly waited until its messages had come
            # (tensorpipe_agent.cpp: TensorPipeAgent::join).
            return model.shows(shown)
        owned = model.counters()[self.at]
        held = [owned.owners, owned.forks]
        kept = group.with_kept(self.at, model.rrefs)
        if kept != held:
            says = f"^{re.escape(_holds(kept, held))}$"
            model.findings.meets_here("leaving-keeps-values", self.at, says)
        return model.shows({**shown, "held": held})

    @property
    def lasts(self) -> float:
        return _TOKEN_WAITS if self.does == "leave" else 0.0

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []
        if "members" in expected and seen.get("members") != expected["members"]:
            message = _knows(seen.get("members"), expected["members"])
            found.append(Violation("WrongValue", message))
        for name in expected:
            if name.startswith(_KNOWS) and seen.get(name) is not True:
                message = _knows_not(int(name.removeprefix(_KNOWS)))
                found.append(Violation("WrongValue", message))
        if expected.get("held") is not None and seen.get("held") != expected["held"]:
            found.append(_wrongly_held(seen.get("held"), expected["held"]))
        if seen.get("refused") != expected.get("refused"):
            error = seen.get("refused") or "no error"
            what = f"a join in a way that torch must refuse ({self.why})"
            if self.does == "outside":
                what = f"{self.what} at a rank that is no member"
            found.append(Violation("MissingError", f"{what} ended by: {error}"))
        if seen.get("profiled") != expected.get("profiled"):
            message = (
                f"the profiler shows {seen.get('profiled')} of the {expected.get('profiled')} "
                f"calls by which a rank joins or leaves"
            )
            found.append(Violation("WrongValue", message))
        return found

    def texts_behind(self, value: Any) -> tuple[str, ...]:
        is_initialised = self.does != "outside" or self.what == OUTSIDE[-1]
        return () if is_initialised else (_UNINITIALISED,)


def _knows(seen: Any, wanted: Sequence[int]) -> str:
    return f"a member knows the members {seen!r}, expected {list(wanted)!r}"


def _knows_not(one: int) -> str:
    return f"a member does not know the member {one}"


def _wrongly_held(seen: Any, wanted: Sequence[int]) -> Violation:
    message = _holds(seen, wanted)
    less = isinstance(seen, list) and any(map(operator.lt, seen, wanted))
    return Violation("OwnerGone" if less else "RRefLeak", message)


def _holds(seen: Any, wanted: Sequence[int]) -> str:
    if not isinstance(seen, list) or len(seen) != len(wanted):
        return f"a member shows {seen!r} as what it holds"
    now, want = (Counters(owners=one[0], forks=one[1]).describe() for one in (seen, wanted))
    return f"a member holds {now}; expected {want}"
