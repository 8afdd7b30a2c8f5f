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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType, WireMessageType
from rpcprops.outcomes import Violation
from rpcprops.steps.arguments import (
    FLAVOURS,
    PAIRS,
    check_arguments,
    check_raises,
    check_seconds,
    sum_of,
)
from rpcprops.steps.base import Flavour, OwnerOf, Sort, Step, StepFails, Value
from rpcprops.steps.control import Settle
from rpcprops.steps.groups import OUTSIDE, Outside

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    {"form": "remote", "rests": True},
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

    `to` sleeps for `seconds` (virtual) and computes ``left + right``, or lets `beyond` compute that
    ("nested": by ``rpc_sync``; "deferred": by an ``async_execution`` function). With "late" the
    future is waited for after the profiler has ended; "remote" is ``rpc.remote`` and ``to_here``.
    With `raises` the function raises.

    The call is made `times` times, each inside a profiler of its own. With `unpicklable` the thread
    that makes it has first made such a call of an argument that cannot be pickled. With `rests`
    the RRef of "remote" is dropped inside the profiler, which ends once torch has deleted it.

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
    seconds: float = 0.0
    rests: bool = False

    def enter(self, scope: Scope) -> None:
        if self.rests and self.form != "remote":
            msg = f"rests=True needs form 'remote', not {shown(self.form)}: only that has an RRef."
            raise UsageError(msg)
        check_arguments(scope, self.at, self.left, self.right)
        check_seconds(self.seconds, self.flavour)
        check_seconds(self.lasts)
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
    def lasts(self) -> float:
        return self.seconds * self.times

    @property
    def counted_at(self) -> tuple[int, ...]:
        """Where its requests run: two branches must not race for the first one of a rank."""
        return (self.to,) if self.beyond is None else (self.to, self.beyond)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The nested call."""
        return (self.to,) if self.form == "nested" else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.times.check_in_time(self, self.lasts)
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
            says = f"^{re.escape(self._no_events)}$"
            model.findings.meets_here("profiled-events-lost", self.at, says)
        if self.unpicklable:
            says = f"^expected no error, got .*{re.escape(model.facts.texts.profiler_key)}"
            model.findings.meets_here("profiling-key-kept", self.at, says)
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
        python = given["flavour"] == "python"
        (left, right), seconds = drawer.with_sleep(PAIRS, given.get("times", 1) * python)
        return cls(at, to, left=left, right=right, seconds=seconds, **given)


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
#:
#: Further ones go wrong at one rank. A store that cannot be opened there: the others make no other
#: init than the one by which all come back, and wait in it until that rank opens the store. Or they
#: wait in vain, in an init that they have counted then (``rpc/__init__.py``: _init_counter), and
#: that rank has not, so it makes one more that fails ("counted"; with a name that torch does not
#: allow). The same with a store whose server nobody can reach: torch tries for half an hour
#: (``distributed/rendezvous.py``: _tcp_rendezvous_handler has default_pg_timeout). A world of one
#: rank more: that rank waits for the name of one that there is not, and never starts, so the others
#: wait for its address (``tensorpipe_agent.cpp``: TensorPipeAgent::startImpl). Their agents stay,
#: half started (``backend_registry.py`` has a TODO that says so), so all ranks then shut down at
#: once before they come back. A world of one rank fewer: in the source nobody looks at that, and no
#: document says what is to come of it; so it is only predicted that the ranks can then shut down
#: and come back.
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
    "one no store",
    "one no store, counted",
    "one unreachable, counted",
    "one too many",
    "one too few",
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
#: What goes on between `at` and the rank that leaves alone: nothing; a call of `at` that it serves;
#: a call of its own that `at` serves; a context in which `at` has called it; an RRef to a value of
#: its own that `at` holds; one to a value of `at` that it holds.
Amid = Literal["", "serving", "calling", "backward", "owning", "using"]
AMID: tuple[Amid, ...] = get_args(Amid)
#: Those with an RRef, and those with what stays when that rank has left.
_OF_RREFS: tuple[Amid, ...] = ("owning", "using")
_STAYING: tuple[Amid, ...] = ("backward", *_OF_RREFS)
#: What the others then try with the one that is gone: two calls of it; a call of another rank that
#: calls it; to ask for its name, which the tables of a static world keep.
Work = Literal["sync", "async", "through", "info"]
WORK: tuple[Work, ...] = get_args(Work)
_REFUSED: Mapping[Work, str] = {**dict.fromkeys(WORK, "RuntimeError"), "info": ""}
#: Virtual seconds after which the first rank gives up the one that is gone.
_BRIEF = 5.0
_WORKS: tuple[tuple[Work, ...], ...] = (*((one,) for one in WORK), WORK)
#: Those in which ranks wait in the store, for so many virtual seconds.
_WAITING: tuple[Failing, ...] = (
    "one bad name",
    "too many",
    "one no store, counted",
    "one too many",
)
_STORE_WAITS = 30.0
#: Milliseconds between two looks of a rank that waits in the store.
_POLLS = 10
_UNREACHABLE: Failing = "one unreachable, counted"
_UNREACHABLE_WAITS = 1800.0
#: Those in which the others make no init that fails.
_AT_ONE: tuple[Failing, ...] = ("running", "one no store")
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

    With `alone` that rank leaves before all others, by a shutdown that waits for nobody, `amid` a
    call or a context of `at`. The others call each other, and then it, as `work` says. ``api.py``:
    shutdown documents that such a shutdown "is a local shutdown", so it must not fail, and the
    others go on. What they send to it must fail and not hang: an agent that shuts down closes its
    pipes (``tensorpipe_agent.cpp``: TensorPipeAgent::shutdownImpl), and whoever reads or writes
    such a pipe gives each of its calls that error (TensorPipeAgent::handleClientError). It has
    served what it had accepted when its shutdown returns (shutdownImpl: waitWorkComplete). A
    backward pass that needs it fails, for a gradient that cannot be sent fails the pass
    (``functions/recvrpc_backward.cpp``: RecvRpcBackward::apply).

    An RRef stays at its owner for ever where a user leaves so ("using"), or the owner itself
    ("owning"): nobody deletes any fork (``rref_context.cpp``: RRefContext::delUser does not after
    RRefContext::destroyInstance), so the shutdown of the owner raises (checkRRefLeaks, before it
    forgets the value), whenever it comes. The owner can still use its value; ``to_here`` of a user
    fails as its calls do.

    Then the others leave. A graceful shutdown meets by calls of the first rank (``api.py``:
    _all_gather). If that one is gone, each raises, and is shut down all the same. If another one
    is gone, the first rank waits for it as long as `timeout` says, and raises, because it cannot
    answer that one; without a timeout it would wait for ever, as ``shutdown`` documents. So
    "timeout" is then for the first rank only, and the rest leave at once. (They would go on to wait
    in the store for the rank that is gone: TensorPipeAgent::join ignores its timeout.)

    With `profiled` each rank does all of that inside ``torch.autograd.profiler_legacy.profile()``.
    Then the calls by which the ranks meet in a graceful shutdown travel in another message
    (``autograd/utils.cpp``: sendMessageWithAutograd), and each has one event by its name
    (``internal.py``: _build_rpc_profiling_key). Nothing else is to change.

    The value has a list for each rank: the class of the error of shutdown, and of each call
    outside, or ""; how many RRefs and contexts the rank then holds, as text; the class of the
    error of each ``init_rpc``, or "". Before the last one, with `between`: the numbers of the
    members and the sum that the call returned, as text. Last of all, with `alone`, at the others:
    the sums of calls of each other, as text; the class of the error of each of `work`, or ""; and
    at `at` that of what it was amid (with an RRef: that of a use of it). With `profiled`: how many
    such events there are, as text.

    The ranks must hold nothing, and be at rest; but a graceful shutdown of them all may come while
    torch still tries to delete what they have dropped, for which it waits (``api.py``: shutdown).
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
    alone: int | None = None
    amid: Amid = ""
    work: tuple[Work, ...] = ()
    profiled: bool = False

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
        self._check_alone(scope)
        left = [*scope.handles, *scope.futures]
        if left:
            msg = (
                f"{shown(left[0])} would not outlive a Rejoin; drop each handle before it, and "
                f"wait for each future."
            )
            raise UsageError(msg)

    def _check_alone(self, scope: Scope) -> None:
        """Raises:
        UsageError: no rank can leave alone in that way.
        """
        if self.alone is None:
            if self.amid or self.work:
                msg = f"amid={shown(self.amid)} and work={shown(self.work)} need alone=RANK."
                raise UsageError(msg)
            return
        if self.profiled:
            msg = f"profiled=True and alone={self.alone}: give one of them."
            raise UsageError(msg)
        if self.amid in _OF_RREFS and self.between:
            msg = (
                f"amid={shown(self.amid)} and between={shown(self.between)}: the shutdown of the "
                f"group would report the RRef as well; give one of them."
            )
            raise UsageError(msg)
        scope.check_rank("alone", self.alone)
        if self.alone == self.at:
            msg = (
                f"alone={self.alone} must be another rank than at, which tells the ranks to leave."
            )
            raise UsageError(msg)
        if self.how == "graceful" and self.alone:
            msg = (
                f"how='graceful': the first rank would wait for rank {self.alone}, which is gone, "
                f"for ever; give how='timeout' or 'at once'{', or alone=0' if self.at else ''}."
            )
            raise UsageError(msg)

    def _check_plan(self, model: Model) -> None:
        """Raises:
        UsageError: nobody can tell what comes of it under that plan, or after these steps.
        """
        tables = [model.plan.table(rank) for rank in range(model.world_size)]
        if any(MessageType.PYTHON_CALL in table.failing for table in tables):
            msg = f"{self!r}: the plan fails PYTHON_CALL, and with it shutdown's own calls."
            raise UsageError(msg)
        if any(_POLLS in table.delaying.values() for table in tables):
            msg = (
                f"{self!r}: the store sleeps {_POLLS} ms between two looks (FileStore.cpp: "
                f"FileStore::get), so nobody can tell how often a delay of {_POLLS} ms came."
            )
            raise UsageError(msg)
        for message in self._asks:
            if any(message in table.failing for table in tables):
                msg = f"{self!r}: the plan fails {message}, so nobody can tell what is left."
                raise UsageError(msg)
        rests = model.now.settled == len(model.sends)
        waits = self.alone is None and self.how != "at once" and model.only_deletes_wait
        if not (rests or waits) or any(map(bool, map(_held, model.counters()))):
            msg = f"{self!r}: the ranks may not be at rest, or hold something; put a Settle before."
            raise UsageError(msg)

    @property
    def _asks(self) -> tuple[MessageType, ...]:
        """What `at` sends for an RRef of the rank that leaves alone."""
        asks = (MessageType.PYTHON_REMOTE_CALL, MessageType.PYTHON_RREF_FETCH_CALL)
        return asks if self.amid == "owning" else ()

    @property
    def _keeps(self) -> int | None:
        """The rank that keeps a value for ever."""
        return {"owning": self.alone, "using": self.at}.get(self.amid)

    def predict(self, model: Model, call: str) -> StepPrediction:
        self._check_plan(model)
        others = [rank for rank in range(model.world_size) if rank != self.at]
        for rank in others:
            model.call(self.at, rank, MessageType.PYTHON_CALL, f"{call}/{rank}")
        worked = self._predict_alone(model, call)
        self._meets_others(model)
        model.rejoin(self._gathering(model.world_size), profiled=self.profiled)
        for rank in others:
            model.call(self.at, rank, MessageType.PYTHON_CALL, f"{call}/{rank}/ended")
        return model.shows([self._shown(model, *one) for one in enumerate(worked)])

    def _shown(self, model: Model, rank: int, worked: Sequence[str]) -> list[str | None]:
        """What a rank shows."""
        # api.py: shutdown deletes what is left; rref_context.cpp: RRefContext::destroyInstance.
        refused = ["RuntimeError" for _ in self.outside]
        held = f"{int(rank == self._keeps)} {len(model.leaked_contexts[rank])}"
        wrong: list[str | None] = ["RuntimeError"] if self.failing else []
        if self.failing == "one too few":
            wrong = [None]
        elif self.failing in _AT_ONE and rank != self.at:
            wrong = [""]
        members = " ".join(map(str, range(model.world_size)))
        group = [f"members {members}, sum 3.0"] if self.between else []
        calls = [at for at, _ in self._gathering(model.world_size)].count(rank)
        events = [f"{calls} profiled"] if self.profiled else []
        return [self._leaves_by(rank), *refused, held, *wrong, *group, "", *worked, *events]

    def _meets_others(self, model: Model) -> None:
        """Note the findings by which the ranks wait for each other in vain."""
        here = len(model.steps)
        meets: dict[str, str] = {}
        if self.alone is None and self.how != "at once" and model.gathers_apart:
            # The timeout of such a shutdown is longer than anybody waits.
            meets["gathering-count-kept"] = rf"does not end step {here}, "
        if self.failing == "running":
            # rpc/__init__.py: init_rpc has raised _init_counter before it refuses. So the next init
            # of that rank looks for the others under another prefix of the store.
            # Which of the ranks that hang are blamed depends on where each of them waits.
            meets["refused-init-counted"] = rf"\bworker{self.at} does not end step {here}, "
        for finding, says in meets.items():
            for rank in range(model.world_size):
                model.findings.meets_here(finding, rank, says)
            model.findings.never_ends(finding)

    def _leaves_by(self, rank: int) -> str:
        """The class of the error of a rank's shutdown, or ""."""
        if rank == self._keeps:
            return "RuntimeError"
        if self.alone is None or rank == self.alone or self.how == "at once":
            return ""
        return "RuntimeError" if 0 in (rank, self.alone) else ""

    def _gathering(self, world_size: int) -> list[tuple[int, int]]:
        """The calls by which the ranks meet in their shutdown (``api.py``: _all_gather)."""
        if self.how == "at once":
            return []
        followers = range(1, world_size)
        to_first = [(rank, 0) for rank in followers]
        if self.alone == 0:
            return to_first
        from_first = [(0, rank) for rank in followers]
        return from_first if self.alone else [*to_first, *from_first]

    def _predict_alone(self, model: Model, call: str) -> list[list[str]]:
        """What each rank shows of the one that has left alone."""
        shown: list[list[str]] = [[] for _ in range(model.world_size)]
        if self.alone is None:
            return shown
        others = [rank for rank in range(model.world_size) if rank != self.alone]
        sends = self._predict_amid(model, call)
        for rank in others:
            sends += [(rank, to, f"{call}/work") for to in others]
            shown[rank] = [" ".join("3.0" for _ in others), *map(_REFUSED.__getitem__, self.work)]
            for work in self.work:
                by = others[(others.index(rank) + 1) % len(others)]
                if work == "through":
                    sends += [(rank, by, f"{call}/through"), (by, self.alone, "")]
                elif work != "info":
                    sends.append((rank, self.alone, ""))
        for at, to, name in sends:
            model.call(at, to, MessageType.PYTHON_CALL)
            if name:
                model.calls[to][name] += 1
        if self.amid in ("serving", "backward", "owning"):
            shown[self.at].append("RuntimeError")
        elif self.amid == "using":
            shown[self.at].append("")
        return shown

    def _predict_amid(self, model: Model, call: str) -> list[tuple[int, int, str]]:
        """What is sent by what that rank leaves amid: who calls whom, and by what name."""
        assert self.alone is not None
        held = f"{call}/held"
        if self.amid == "serving":
            return [(self.at, self.alone, held)]
        if self.amid == "calling":
            return [(self.alone, self.at, held)]
        if self.amid == "backward":
            model.calls[self.alone][held] += 1
            model.in_contexts.call(self.at, self.alone, graded=1)
            model.in_contexts.gradient(self.at, self.alone)
            model.gives_up_cleanup(self.at, self.alone)
            # Nobody is left to tell it (autograd/context/container.cpp: eraseContextIdAndReset).
            model.leaked_contexts[self.alone].add(call)
        if self.amid == "owning":
            model.calls[self.alone][held] += 1
            handle = model.created(self.at, self.alone, (3.0,), typed=False)
            handle.rref.is_made()
            for message in (*self._asks, MessageType.PYTHON_RREF_FETCH_CALL):
                model.send(self.at, message, to=self.alone)
            model.never_deleted(handle)
        elif self.amid == "using":
            own = model.owned(self.at, (3.0,), typed=True)
            model.never_deleted(model.give(own, self.at, self.alone))
            return [(self.at, self.alone, held)]
        return []

    @property
    def calls_gone(self) -> bool:
        return "through" in self.work

    @property
    def lasts(self) -> float:
        waits = _STORE_WAITS if self.failing in _WAITING else 0.0
        waits = _UNREACHABLE_WAITS if self.failing == _UNREACHABLE else waits
        return 0.5 * len(self.first) + waits + (_BRIEF if self.alone is not None else 0.0)

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if not isinstance(seen, list) or [*map(len, seen)] != [*map(len, expected)]:
            return Step.judge(self, expected, seen)
        # What nobody predicts is at the most an error of torch's.
        wanted = [
            [
                now if want is None and now in ("", "RuntimeError") else want
                for want, now in zip(*both, strict=True)
            ]
            for both in zip(expected, seen, strict=True)
        ]
        return Step.judge(self, wanted, seen)

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Rejoin | None:
        rests = not drawer.steps or isinstance(drawer.steps[-1], Settle)
        waits = drawer.only_deletes and drawer.may_gather(apart=False)
        if not (_may_leave(drawer) and (rests or waits)):
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
        if not drawer.takes_minutes:
            known.remove(_UNREACHABLE)
        # What torch once got wrong comes more often where it has been mended.
        known += () if counted else ("running",) * 3
        failing = drawer.pick(known if len(drawer.ranks) > 1 else known[:1])
        between = drawer.pick(BETWEEN)
        alone = drawer.pick((None, *(rank for rank in drawer.ranks if rank != at)))
        if not rests:
            # Only a graceful shutdown of all waits for what is under way.
            alone, how = None, ("graceful" if how == "at once" else how)
        elif (alone and how == "graceful") or not (drawer.may_gather(apart=alone is not None)):
            how = "at once"
        if alone is None:
            profiled = drawer.pick((False, False, True))
            return cls(at, how, turned[:first], sets, failing, between, profiled=profiled)
        cleanup = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
        struck = drawer.may_fail(at, [cleanup]) or drawer.delay_milliseconds(at, cleanup)
        able = drawer.may_make_rrefs and not between and not drawer.loses
        out = (*_OF_RREFS * (not able), *("backward",) * bool(struck))
        rest = (alone, drawer.pick([x for x in AMID if x not in out]), drawer.pick(_WORKS))
        return cls(at, how, turned[:first], sets, failing, between, *rest)

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
        drawer.gathered_apart |= self.alone is not None and self.how != "at once"
        # A context or an RRef stays, so the ranks never hold nothing again.
        drawer.may_rejoin &= self.amid not in _STAYING


def _may_leave(drawer: StepDrawer) -> bool:
    """Whether ranks may leave there: a failed init waits too long for most default timeouts.

    Where the plan may lose messages, only calls may have been made: they leave nothing behind. The
    calls of the shutdown itself must not be lost.
    """
    able = drawer.has_plan and drawer.rpc_timeout is None and drawer.may_rejoin
    able = able and not drawer.delays_for(_POLLS)
    safe = not drawer.loses or (
        drawer.only_calls
        and not any(drawer.may_fail(rank, (MessageType.PYTHON_CALL,)) for rank in drawer.ranks)
    )
    return able and safe and not drawer.in_parallel and not drawer.may_keep


def _held(counters: Counters) -> int:
    return counters.owners + counters.forks + counters.contexts
