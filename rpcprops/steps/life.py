"""Steps about the life of RPC in a rank: a profiler around calls; a shutdown and a new init.

Each `predict` tells the model what these files of torch do: ``torch/distributed/rpc/api.py`` and
``internal.py``, and in ``torch/csrc`` ``distributed/autograd/utils.cpp``,
``distributed/rpc/request_callback_no_python.cpp``, ``distributed/rpc/utils.cpp`` and
``autograd/profiler_legacy.cpp``.

Stock torch breaks two promises of its profiler, which are findings (docs/findings.md):

* ``profiler_legacy.cpp``: disableProfilerLegacy lets go of the callback that records events
  without removing it, when RequestCallbackNoPython::processRunWithProfilingReq ends a request
  whose function has returned at once. So the callback stays in that thread of the agent, and the
  next profiled request there records each event twice. ``profiler_legacy.py``:
  _parse_legacy_records drops what comes twice. So only the first profiled request that a rank
  serves certainly shows what ran there (:attr:`Model.profiled`).
* ``api.py``: _enable_rpc_profiler sets the key of a call before its arguments are pickled, and only
  ``utils.cpp``: getMessageWithProfiling takes it away again. So after one call whose arguments
  cannot be pickled, each further profiled call of that thread raises.

Only torch's legacy profiler is drawn. Kineto's profiles no call (``api.py``: _get_should_profile),
and its first start in a process takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, WireMessageType
from rpcprops.outcomes import Violation
from rpcprops.steps.arguments import FLAVOURS, PAIRS, check_arguments, check_raises, sum_of
from rpcprops.steps.base import Flavour, Sort, Step, StepFails, Value
from rpcprops.steps.control import Settle

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.outcomes import Counters
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

ProfiledForm = Literal["sync", "async", "late", "remote", "nested", "deferred"]
#: Forms whose call the profiler has seen the end of when the step reads the events. The comment in
#: ``api.py``: _invoke_rpc says that ``wait`` of the future completes the profiling.
_ENDED: tuple[ProfiledForm, ...] = ("sync", "async", "nested", "deferred")
#: Forms in which `to` itself calls `beyond`.
_THROUGH: tuple[ProfiledForm, ...] = ("nested", "deferred")
_RAISING: tuple[ProfiledForm, ...] = ("sync", "async")
#: More times than an agent of ours has threads.
_MOST_TIMES = 100
_FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"form": "async"},
    {"form": "remote"},
    {"form": "nested"},
    {"form": "deferred"},
    {"form": "late"},
    {"raises": True},
    {"form": "async", "raises": True},
)
#: Forms that meet a finding: the name of that finding, and the fields.
_MEETING: tuple[tuple[str, dict[str, Any]], ...] = (
    ("profiled-events-lost", {"times": 2}),
    ("profiled-events-lost", {"form": "async", "times": 9}),
    ("profiling-key-kept", {"unpicklable": True}),
    ("profiling-key-kept", {"form": "async", "unpicklable": True}),
)


@dataclass(frozen=True, slots=True, repr=False)
class Profile(Step):
    """A call of `at` inside ``torch.autograd.profiler_legacy.profile()``: its value, its events.

    `to` computes ``left + right``, or lets `beyond` do that ("nested": by ``rpc_sync``; "deferred":
    by an ``async_execution`` function). With "late" the future is waited for after the profiler has
    ended; "remote" is ``rpc.remote`` and ``to_here``. With `raises` the function raises.

    The call is made `times` times, each inside a profiler of its own. With `unpicklable` the thread
    that makes it has first made such a call of an argument that cannot be pickled.

    The value has these parts: the sum; whether exactly one event has the name of the call, as
    ``internal.py``: _build_rpc_profiling_key builds it; whether some event tells what ran at
    `to`, under that name (``rpc/utils.cpp``: processRemoteProfiledEvents), each time; and the
    class of the error of the call that cannot be pickled. None: not predicted.
    """

    op: ClassVar[str] = "profile"
    after_rejoin: ClassVar[bool] = True
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 80
    makes: ClassVar[Mapping[str, Sort]] = {}
    gives: ClassVar[type] = dict
    at: int
    to: int
    form: ProfiledForm = "sync"
    beyond: int | None = None
    flavour: Flavour = "python"
    left: Value = (1.0,)
    right: Value = (2.0,)
    raises: bool = False
    times: int = 1
    unpicklable: bool = False

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        self._check_repeated()
        if self.beyond is not None:
            scope.check_rank("beyond", self.beyond)
        if (self.form in _THROUGH) != (self.beyond is not None):
            msg = (
                f"form={shown(self.form)} and beyond={shown(self.beyond)}: 'nested' and 'deferred' "
                f"need a rank that is called from there, and others none."
            )
            raise UsageError(msg)
        if self.form in _THROUGH and self.flavour != "python":
            msg = f"form={shown(self.form)} needs flavour 'python', not {shown(self.flavour)}."
            raise UsageError(msg)
        if self.raises:
            check_raises(self.flavour, ("python", "script"))
            if self.form not in _RAISING:
                msg = f"raises=True needs form 'sync' or 'async', not {shown(self.form)}."
                raise UsageError(msg)

    def _check_repeated(self) -> None:
        """Check that only such a call is made several times, or after another, as is predicted."""
        if not 1 <= self.times <= _MOST_TIMES:
            msg = f"times={shown(self.times)} must lie in 1 to {_MOST_TIMES}."
            raise UsageError(msg)
        is_plain = self.form in _RAISING and not self.raises
        if (self.times > 1 or self.unpicklable) and not is_plain:
            msg = (
                f"times={shown(self.times)} and unpicklable={self.unpicklable} need form 'sync' or "
                f"'async', and raises=False."
            )
            raise UsageError(msg)

    @property
    def counted_at(self) -> tuple[int, ...]:
        """Where its requests run: two branches must not race for the first one of a rank."""
        return (self.to,) if self.beyond is None else (self.to, self.beyond)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # Every call travels as RUN_WITH_PROFILING_REQ (autograd/utils.cpp: sendMessageWithAutograd,
        # also for what a called function sends from its thread), which the agent neither fails nor
        # delays. Not so a fetch (rref_impl.cpp: UserRRef::toHere, forceDisableProfiling).
        if self.flavour == "python":
            model.calls[self.to][call] += self.times
        if self.beyond is not None:
            model.calls[self.beyond][f"{call}/then"] += 1
        first = self.to not in model.profiled
        model.profiled.update(self.counted_at)
        model.in_contexts.profiled(self.at, self.to, self.times)
        if self.beyond is not None:
            model.in_contexts.profiled(self.to, self.beyond)
        if self.raises:
            if self.flavour != "python":
                model.answers.error(self.at, self.to, WireMessageType.RUN_WITH_PROFILING_REQ)
            raise StepFails(error="remote")
        total = sum_of(self.left, self.right)
        if self.form == "remote":
            handle = model.created(self.at, self.to, total, typed=self.flavour != "python")
            try:
                model.value(handle, self.at)
            finally:
                model.drop(handle)
        ended = True if self.form in _ENDED else None
        if ended and (self.times > 1 or not first):
            model.meets_here("profiled-events-lost", self.at, f"^{re.escape(self._no_events)}$")
        if self.unpicklable:
            says = re.escape(model.facts.texts.profiler_key)
            model.meets_here("profiling-key-kept", self.at, f"^expected no error, got .*{says}")
        refused = "TypeError" if self.unpicklable else ""
        return model.shows({"sum": total, "named": ended, "there": ended, "refused": refused})

    @property
    def _no_events(self) -> str:
        return f"the profiler shows nothing of what ran at rank {self.to}"

    @property
    def raises_there(self) -> bool:
        return self.raises

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []
        if seen.get("sum") != expected["sum"]:
            message = f"expected the sum {expected['sum']!r}, got {seen.get('sum')!r}"
            found.append(Violation("WrongValue", message))
        if expected["named"] and seen.get("named") is not True:
            message = "the profiler does not show its call once, by its name"
            found.append(Violation("WrongValue", message))
        if expected["there"] and seen.get("there") is not True:
            found.append(Violation("WrongValue", self._no_events))
        if expected["refused"] != seen.get("refused"):
            message = (
                f"a call that cannot be pickled raised {seen.get('refused')!r} instead of "
                f"{expected['refused']!r}"
            )
            found.append(Violation("MissingError", message))
        return found

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Profile | None:
        able = [rank for rank in drawer.ranks if drawer.countable(rank)]
        if not able:
            return None
        at = drawer.pick(able)
        to = drawer.pick(drawer.countable(at))
        may_remote = drawer.may_make_rrefs
        forms = _FORMS if may_remote else [x for x in _FORMS if x.get("form") != "remote"]
        meeting = [fields for name, fields in _MEETING if not drawer.facts.has_bug(name)]
        form = drawer.pick([*forms, *meeting])
        through = form.get("form") in _THROUGH
        # A branch that took the counters of two ranks could leave another one without any.
        beyond = drawer.pick([to] if drawer.in_parallel else drawer.countable(at))
        flavours = ("python", "script") if form.get("raises") else FLAVOURS
        flavour = drawer.pick(flavours[:1] if through else flavours)
        given: dict[str, Any] = {**form, "beyond": beyond if through else None, "flavour": flavour}
        left, right = drawer.pick(PAIRS)
        return cls(at, to, left=left, right=right, **given)


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
#: How the ranks leave: by a graceful shutdown; by one with a timeout that nothing reaches; by one
#: that waits for nobody.
Leaving = Literal["graceful", "timeout", "at once"]
#: What makes an ``init_rpc`` of all ranks fail before the one that they come back by: one name for
#: all (``tensorpipe_agent.cpp`` and ``agent_utils.cpp``: collectNames); a name that torch does not
#: allow, at all ranks or at one (``rpc_agent.cpp``: WorkerInfo; the others then wait in the store
#: until the RPC timeout, which ``rpc/__init__.py``: init_rpc gives it); another rank than before
#: (``autograd/context/container.cpp``: DistAutogradContainer::init); an agent that still runs
#: (``rpc/__init__.py``: _init_rpc_backend); at one rank, the name of another one; at all, a world
#: of one rank more, for which they wait in the store; at all, a store that cannot be opened
#: (``FileStore.cpp``: File). All are RuntimeErrors.
Failing = Literal[
    "",
    "bad name",
    "same name",
    "other rank",
    "one bad name",
    "running",
    "taken name",
    "too many",
    "no store",
]
#: What the ranks do between their static worlds: nothing; found a dynamic group, which all of them
#: join, and leave it by a graceful shutdown; or leave it by one that tells nobody. Torch's own
#: agent serves the group, since the faulty one needs a world size, and under every agent: who tells
#: whom depends on who gets the token first (``_utils.py``: _group_membership_management), so what
#: they send is not predicted one by one. Each init gets another prefix of
#: the store (``rpc/__init__.py``: init_rpc), so that what one group has written there is not in the
#: way of the next (``tensorpipe_agent.cpp``: TensorPipeAgent::checkAndSetStaticGroup).
Between = Literal["", "group", "group left at once"]
BETWEEN: tuple[Between, ...] = get_args(Between)
#: Those in which ranks wait in the store, for so many virtual seconds.
_WAITING: tuple[Failing, ...] = ("one bad name", "too many")
_STORE_WAITS = 30.0
FAILING: tuple[Failing, ...] = get_args(Failing)
_SETS: tuple[tuple[Outside, ...], ...] = ((), *((one,) for one in OUTSIDE), OUTSIDE)


@dataclass(frozen=True, slots=True, repr=False)
class Rejoin(Step):
    """All ranks shut RPC down, and then initialise it again, with the same names and ranks.

    `at` tells the others to by a call of each; each then does it in a thread of its own. They leave
    in the order of `first`, half a second (virtual) after each other; the ranks that it does not
    name leave at once. Before a rank initialises RPC again, it makes the calls of `outside`, which
    torch must refuse (``rpc.shutdown()`` a second time, for example). With `failing` it first
    calls ``init_rpc`` so that it must fail; with "running" only `at` does, before it leaves. With
    `between` all ranks then are members of a dynamic group for a moment: each looks who is in it,
    and makes a call of the next rank.

    The value has a list for each rank: the class of the error of shutdown, and of each call
    outside, or ""; how many RRefs and contexts the rank then holds, as text; the class of the
    error of each ``init_rpc``, or "". Before the last one, with `between`: the numbers of the
    members and the sum that the call returned, as text. The ranks must be at rest, and hold
    nothing.
    """

    op: ClassVar[str] = "rejoin"
    often: ClassVar[int] = 4  # because the ranks seldom hold nothing
    in_branch: ClassVar[bool] = False
    after_rejoin: ClassVar[bool] = True
    makes: ClassVar[Mapping[str, Sort]] = {}
    at: int
    how: Leaving = "graceful"
    first: tuple[int, ...] = ()
    outside: tuple[Outside, ...] = ()
    failing: Failing = ""
    between: Between = ""

    def enter(self, scope: Scope) -> None:
        if scope.members is not None:
            msg = "the members of a dynamic group come back one by one, by Member steps."
            raise UsageError(msg)
        for rank in self.first:
            scope.check_rank("first", rank)
        if len(set(self.first)) != len(self.first):
            msg = f"first={shown(self.first)} names a rank twice; each leaves once."
            raise UsageError(msg)
        if self.failing and scope.world_size < 2:
            msg = f"failing={shown(self.failing)} needs two ranks."
            raise UsageError(msg)
        left = [*scope.handles, *scope.futures]
        if left:
            msg = (
                f"{shown(left[0])} would not outlive a Rejoin; drop each handle before it, and "
                f"wait for each future."
            )
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        tables = [model.plan.table(rank) for rank in range(model.world_size)]
        if any(MessageType.PYTHON_CALL in table.failing for table in tables):
            msg = f"{self!r}: the plan fails PYTHON_CALL, and with it shutdown's own calls."
            raise UsageError(msg)
        if model.settled != len(model.sends) or any(map(bool, map(_held, model.counters()))):
            msg = f"{self!r}: the ranks may not be at rest, or hold something; put a Settle before."
            raise UsageError(msg)
        others = [rank for rank in range(model.world_size) if rank != self.at]
        for rank in others:
            model.call(self.at, rank, MessageType.PYTHON_CALL, f"{call}/{rank}")
        model.rejoin(graceful=self.how != "at once")
        for rank in others:
            model.call(self.at, rank, MessageType.PYTHON_CALL, f"{call}/{rank}/ended")
        # api.py: shutdown deletes what is left; rref_context.cpp: RRefContext::destroyInstance.
        refused = ["RuntimeError" for _ in self.outside]
        wrong = ["RuntimeError"] if self.failing else []
        members = " ".join(map(str, range(model.world_size)))
        group = [f"members {members}, sum 3.0"] if self.between else []
        seen = [["", *refused, "0 0", *wrong, *group, ""] for _ in range(model.world_size)]
        if self.failing == "running":
            for rank in others:
                seen[rank][len(refused) + 2] = ""
            # rpc/__init__.py: init_rpc has raised _init_counter before it refuses. So the next init
            # of that rank looks for the others under another prefix of the store.
            # Which of the ranks that hang are blamed depends on where each of them waits.
            says = rf"\bworker{self.at} does not end step {len(model.steps)}, "
            for rank in range(model.world_size):
                model.meets_here("refused-init-counted", rank, says)
            model.never_ends("refused-init-counted")
        return model.shows(seen)

    @property
    def lasts(self) -> float:
        return 0.5 * len(self.first) + (_STORE_WAITS if self.failing in _WAITING else 0.0)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Rejoin | None:
        rests = not drawer.steps or isinstance(drawer.steps[-1], Settle)
        if not _may_leave(drawer) or not rests:
            return None
        if drawer.scope.handles or drawer.scope.futures or not drawer.goes_on_without_rrefs:
            return None
        at = drawer.rank()
        how: Any = drawer.pick(("graceful", "at once", "timeout"))
        first = drawer.pick(range(1 + len(drawer.ranks)))
        turned = (*drawer.ranks[drawer.rank() :], *drawer.ranks)[: len(drawer.ranks)]
        sets = drawer.pick(_SETS)
        counted = drawer.facts.has_bug("refused-init-counted")
        known: list[Failing] = [x for x in FAILING if not (counted and x == "running")]
        # What torch once got wrong comes more often where it has been mended.
        known += () if counted else ("running",) * 3
        failing = drawer.pick(known if len(drawer.ranks) > 1 else known[:1])
        return cls(at, how, turned[:first], sets, failing, drawer.pick(BETWEEN))

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        if (
            not _may_leave(drawer)
            or drawer.scope.handles
            or drawer.scope.futures
            or Settle.op not in drawer.on
        ):
            return None
        return Settle.draw(drawer)

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.rejoined = True


def _may_leave(drawer: StepDrawer) -> bool:
    """Whether ranks may leave there: a failed init waits too long for most default timeouts."""
    undisturbed = drawer.has_plan and not drawer.loses and drawer.rpc_timeout is None
    return undisturbed and not drawer.in_parallel and not drawer.may_keep


def _held(counters: Counters) -> int:
    return counters.owners + counters.forks + counters.contexts
