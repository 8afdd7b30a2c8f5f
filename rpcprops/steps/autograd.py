"""Steps of distributed autograd: contexts, a call that outlasts one, a request for an ended one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY, MessageType, WireMessageType, retry_wait
from rpcprops.outcomes import Counters, Violation
from rpcprops.steps.arguments import PAIRS, TENSORS, check_arguments, check_seconds, sum_of
from rpcprops.steps.base import (
    CLEARLY_IN_TIME,
    Flavour,
    OwnerOf,
    Sort,
    Step,
    StepFails,
    Value,
    Way,
    waits_nowhere,
)
from rpcprops.steps.control import Settle
from rpcprops.steps.in_rank.constants import LATE_LASTS, LATE_TIMEOUT

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import ErrorClass, StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

_LONGEST_PATH = 5
#: How a call names its rank: by its name, its id or its ``WorkerInfo``.
Naming = Literal["name", "id", "info"]
#: Options of a context: how it walks its path, and how it ends; a `root` is the number of another
#: rank there, and 0 the rank itself. A `timeout` is one that nothing reaches. The `late` hop counts
#: from the first or from the last one.
_WALKS: tuple[dict[str, Any], ...] = (
    {},
    {"nested": True},
    {"rrefs": True},
    {"nested": True, "rrefs": True},
    {"wait": "async"},
    {"wait": "async", "nested": True},
    {"named": "id"},
    {"named": "info", "rrefs": True},
    {"flavour": "builtin"},
    {"flavour": "builtin", "wait": "async", "named": "id"},
    {"flavour": "builtin", "rrefs": True},
    {"flavour": "script"},
    {"flavour": "script", "wait": "async"},
    {"flavour": "script", "rrefs": True, "named": "info"},
    {"timeout": 0.0},
    {"timeout": 0.0, "nested": True},
    {"timeout": 0.0, "rrefs": True},
    {"timeout": 0.0, "wait": "async"},
)
_ENDS: tuple[dict[str, Any], ...] = (
    {},
    {"raises": True},
    {"backward": False},
    {"retain": True},
    {"raises": True, "backward": False},
    {"raises": True, "retain": True},
    {"root": 1, "retain": True},
    {"root": 0},
    {"root": 1},
    {"root": 1, "raises": True},
    {"late": -1},
    {"late": 0},
)


@dataclass(frozen=True, slots=True, repr=False)
class Context(Step):
    """A ``dist_autograd.context()`` at `at`, sending a tensor through the ranks of `path`.

    The tensor starts as `value` (a leaf that requires a gradient), is squared at `at`, and each
    rank ``r`` of the path maps it to ``(r + 2) * x + 1``. The step's value is the loss (the sum)
    and, with `backward`, the gradient of the leaf.

    Args:
        name: names the context for :class:`Refused`.
        nested: each rank calls the next one itself, instead of `at` calling them in turn.
        rrefs: each hop is ``rpc.remote`` and a fetch instead of ``rpc_sync``.
        backward: run ``dist_autograd.backward`` and read the gradients.
        raises: leave the ``with`` block by an exception, after all of that.
        retain: run backward twice, the first time with ``retain_graph=True``; gradients add up.
        breaks: a rank of the path whose backward raises; the step then shows its error.
        flavour: what runs at a rank: a Python function, ``torch.add`` or a TorchScript function.
        wait: "async" for ``rpc_async`` and a wait instead of ``rpc_sync``, in the calls of `at`.
        named: how `at` names the ranks.
        seconds: virtual seconds for which each Python function of the path sleeps.
        profiled: do all of that inside ``torch.autograd.profiler_legacy.profile()``. The value then
            also says how many events have the name of a call (``rpc/internal.py``:
            _build_rpc_profiling_key).
        root: a rank that owns the loss. ``rref.backward(context_id)`` runs the pass from there, and
            the step reads the loss by a call that is sent the RRef.
        timeout: the timeout of each call that `at` makes along the path (with `rrefs` of each
            fetch), in virtual seconds; None for the program's. What ranks call from there, and
            backward, whose gradients have no other (``functions/recvrpc_backward.cpp``:
            RecvRpcBackward::apply), have the program's.
        late: the number of a hop, from 0, whose call times out after four virtual seconds, because
            its function returns only once its rank has given the context up. The error leaves the
            block, through the functions that wait for the call if it is `nested`.

    A call that times out ends at its caller alone (``tensorpipe_agent.cpp``:
    TensorPipeAgent::pollTimeoutRpcs). The caller has noted the rank before it sent
    (``autograd/utils.cpp``: getMessageWithAutograd), so the cleanup goes there too. The error
    leaves the block once the function has begun, so that its rank has the context when the cleanup
    comes. Its answer would hold a tensor that requires a gradient, and so asks for the context,
    which has gone: it becomes an error (``container.cpp``: DistAutogradContainer::currentContext),
    as does a call that it makes on. The send function of the call stays in the context at the
    caller, and nothing takes it out: :class:`Unreached` shows a backward pass after that.

    Of ``RRef.backward`` torch's documentation says that it starts a distributed pass at the owner,
    and that get_gradients() then has the gradients, as after ``dist_autograd.backward``.
    """

    op: ClassVar[str] = "context"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 13
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    name: str
    path: tuple[int, ...] = ()
    value: Value = (1.0, 2.0)
    nested: bool = False
    rrefs: bool = False
    backward: bool = True
    raises: bool = False
    retain: bool = False
    breaks: int | None = None
    flavour: Flavour = "python"
    wait: Literal["sync", "async"] = "sync"
    named: Naming = "name"
    seconds: float = 0.0
    profiled: bool = False
    root: int | None = None
    timeout: float | None = None
    late: int | None = None

    def enter(self, scope: Scope) -> None:
        for rank in self.path:
            scope.check_rank("path", rank)
        self._check_way()
        self._check_late()
        if self.profiled and (self.rrefs, self.flavour, self.wait) != (False, "python", "sync"):
            msg = "profiled=True is about calls of Python functions by rpc_sync."
            raise UsageError(msg)
        self._check_root(scope)
        if self.retain and not self.backward:
            msg = "retain=True runs backward twice, so it needs backward=True."
            raise UsageError(msg)
        if self.breaks is not None and (self.breaks not in self.path or not self.backward):
            msg = (
                f"breaks={shown(self.breaks)} must be a rank of path={shown(self.path)}, with "
                "backward=True."
            )
            raise UsageError(msg)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    def _check_root(self, scope: Scope) -> None:
        """Raises:
        UsageError: no pass can begin there.
        """
        if self.root is None:
            return
        scope.check_rank("root", self.root)
        if not self.backward:
            msg = f"root={shown(self.root)} is where backward begins, so it needs backward=True."
            raise UsageError(msg)
        if self.profiled:
            msg = f"root={shown(self.root)} asks by RRefs, and profiled=True is about calls."
            raise UsageError(msg)

    def _check_way(self) -> None:
        """Raises:
        UsageError: its path cannot be walked in that way.
        """
        check_seconds(self.seconds, self.flavour)
        check_seconds(self.lasts)
        if self.flavour != "python" and (self.nested or self.breaks is not None):
            msg = f"nested=True and breaks need flavour 'python', not {shown(self.flavour)}."
            raise UsageError(msg)
        if self.wait == "async" and self.rrefs:
            msg = "wait='async' waits for a future, and rrefs=True fetches RRefs; take one of them."
            raise UsageError(msg)

    def _check_late(self) -> None:
        """Raises:
        UsageError: no call can time out there.
        """
        if self.late is None:
            return
        if not 0 <= self.late < len(self.path):
            msg = f"late={shown(self.late)} must be the number of a hop of path={shown(self.path)}."
            raise UsageError(msg)
        plain = (self.flavour, self.rrefs, self.breaks, self.root, self.profiled)
        if plain != ("python", False, None, None, False):
            msg = (
                f"late={shown(self.late)} needs calls of Python functions, and an error that "
                f"leaves the block: no flavour, rrefs, breaks, root or profiled."
            )
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds * len(self.path) + LATE_TIMEOUT * (self.late is not None)

    def _runs(self, model: Model, rank: int, call: str) -> None:
        """Its function runs at a rank; only one of Python notes that."""
        model.calls[rank][call] += self.flavour == "python"

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The owner of the root runs the whole pass (``processRRefBackward``) in one thread."""
        root = (self.root,) if self.root is not None and self.backward else ()
        # A call that times out, and the one that waits until its function has begun.
        late = () if self.late is None else (self.path[self.late],) * 2
        return (*(self.path[:-1] if self.nested else ()), *root, *late)

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.times.check_in_time(self, self.lasts)
        # Inside a context every message travels as FORWARD_AUTOGRAD_REQ (autograd/utils.cpp:
        # sendMessageWithAutograd), which torch's agents neither fail nor delay. That is so for a
        # builtin operator as well, because what it is given requires a gradient.
        if self.profiled and model.disturbed:
            msg = f"{self!r}: what faults of single messages do to profiled calls is not predicted."
            raise UsageError(msg)
        self._check_timeout(model)
        if self.late is not None:
            self._time_out(model, call, self.late)
        made = self._walk(model, call) if model.disturbed else []
        self._note_calls(model, call)
        for to in self._owners[len(made) :]:
            # Created and fetched inside the context; only its delete is sent outside.
            made.append(model.created(self.at, to, typed=False))
            made[-1].rref.made = True
        for handle in made:
            model.drop(handle)
        if self._is_rooted_there:
            self._ask_owner(model, call)
        broke = self._passes_back(model)
        if self._revisits and (self.breaks is not None or broke):
            self._answers_before_use(model)
        model.release(self.name, self.at, self._acquaintances())
        return model.shows(self._computed() if not broke else self._broken(broke))

    def _check_timeout(self, model: Model) -> None:
        """Check that the timeout of its calls ends none that comes and is answered.

        Raises:
            UsageError: it may end one.
        """
        calls = len(self.path) if self.nested else 1
        waits = self.seconds * calls + model.disturbed.seconds + model.times.queues()
        if self.timeout is not None and waits + CLEARLY_IN_TIME > self.timeout:
            msg = (
                f"{self!r}: a call of it may take {waits:g} s (virtual) under this plan, and its "
                f"timeout may end it; let it be {CLEARLY_IN_TIME:g} s above that, or None, or "
                f"name the call that is to time out by late=NUMBER."
            )
            raise UsageError(msg)

    def _time_out(self, model: Model, call: str, late: int) -> None:
        """The call of a hop times out while its function runs.

        Raises:
            StepFails: always, with what leaves the block.
            UsageError: that is not predicted.
        """
        model.check_gives_up(self, may_be_late=True)
        model.disturbed.check_late_forward(self, self.path[: late + 1])
        rank = self.path[late]
        for one in self.path[:late]:
            self._runs(model, one, call)
        for name in (f"{call}/late", f"{call}/slept"):
            model.calls[rank][name] += 1
            model.abandoned_calls[rank].add(name)
        model.unread = True
        is_inner = self.nested and late > 0
        known: dict[int, set[int]] = {}
        caller = self.at
        for number, to in enumerate(self.path[: late + 1]):
            known.setdefault(caller, set()).add(to)
            known.setdefault(to, set())
            # An exception of a function is a plain answer, which notes nobody.
            is_graded = not self.nested and number < late
            known[to].update({caller} if is_graded else ())
            model.in_contexts.call(caller, to, graded=int(is_graded))
            if number == late:
                # Its caller asks whether the function has begun.
                model.in_contexts.call(caller, to, graded=0)
                message = WireMessageType.FORWARD_AUTOGRAD_REQ
                model.answers.perhaps_errors([(caller, to)], message)
            caller = to if self.nested else caller
        model.release(self.name, self.at, known)
        raise StepFails("remote" if is_inner else "timeout", LATE_LASTS - LATE_TIMEOUT)

    def _walk(self, model: Model, call: str) -> list[Handle]:
        """Walk the path where faults act on messages; the RRefs that it makes, if all is well.

        Raises:
            StepFails: a call of the path fails, or is lost, or its answer is.
        """
        made: list[Handle] = []
        way = (self.at, *self.path)
        for number, rank in enumerate(self.path):
            model.disturbed.check_forward(self)
            if self.rrefs and not self.nested:
                made.append(model.creates_inside(self.at, rank))
                self._fetch_there(model, call, made)
                continue
            is_own = not (self.nested and number)
            timeout = self.timeout if is_own else None
            ended = model.forward(way[number] if self.nested else self.at, rank, timeout)
            if ended:
                model.disturbed.check_lost_forward(self, ended, number, nested=self.nested)
                self._lose(model, call, number, ended)
                if ended == "injected":
                    # A function whose own call fails raises that (rpc/internal.py: _run_function).
                    is_inner = self.nested and number
                    raise StepFails(error="remote" if is_inner else "injected")
                raise StepFails(error="timeout")
        return made

    @property
    def _owners(self) -> tuple[int, ...]:
        """The ranks of its path that own an RRef."""
        if not self.rrefs:
            return ()
        return self.path[:1] if self.nested else self.path

    def _fetch_there(self, model: Model, call: str, made: Sequence[Handle]) -> None:
        """Fetch the RRef of a hop, where faults act on messages.

        Args:
            made: the RRefs of the path so far.

        Raises:
            StepFails: the fetch fails, and leaves the context.
        """
        handle, number = made[-1], len(made) - 1
        rank, ended = handle.rref.owner, ""
        try:
            ended = model.fetches_inside(self.at, handle, self.timeout)
        except StepFails as failed:
            error: ErrorClass = failed.error
            asked = 1
        else:
            if not ended:
                return
            error = "injected" if ended == "injected" else "timeout"
            asked = 2
        # A rank notes its caller when it answers with a gradient (autograd/utils.cpp:
        # getMessageWithAutograd).
        known: dict[int, set[int]] = {self.at: {*self.path[: number + 1]}}
        answered = self.path[: number + (ended == "timeout")]
        for one in (*answered, rank):
            known.setdefault(one, set()).update({self.at} if one in answered else ())
        has_run = not handle.rref.absent and (handle.unanswered or not handle.broken)
        for one in self.path[: number + has_run]:
            self._runs(model, one, call)
        for hop in range(number):
            self._count_hop(model, hop)
        model.in_contexts.perhaps_graded([(self.at, rank)])
        model.in_contexts.call(self.at, rank, asked, graded=0)
        for rref in made:
            model.drop(rref)
        model.release(self.name, self.at, known)
        if ended == "injected":
            # That comes at once, and so the cleanup may come before the creation.
            model.abandoned_calls[rank].add(call)
            model.findings.keeps_perhaps("context-after-cleanup", rank, Counters(contexts=1))
        raise StepFails(error=error)

    def _note_calls(self, model: Model, call: str) -> None:
        """The calls of its path run, and their messages are sent."""
        for number, rank in enumerate(self.path):
            self._runs(model, rank, call)
            # Inside a profiler RUN_WITH_PROFILING_REQ wraps it once more (sendMessageWithAutograd).
            for pair in self.requests(number) if self.profiled else ():
                model.in_contexts.profiled(*pair)
            if not self.profiled:
                self._count_hop(model, number)
        model.profiled.update(self.counted_at)

    def _count_hop(self, model: Model, number: int) -> None:
        """Count what a hop of the path asks, and whether its result comes with an answer."""
        at, to = self.requests(number)[0]
        is_graded = at != to or not self._by_rref(number)
        model.in_contexts.call(at, to, len(self.requests(number)), graded=int(is_graded))

    @property
    def counted_at(self) -> tuple[int, ...]:
        """Where profiled requests run: two branches must not race for the first one of a rank."""
        return tuple(dict.fromkeys(self.path)) if self.profiled else ()

    def _passes_back(self, model: Model) -> str:
        """What backward raises because a gradient, or its answer, is lost; "" if it does not."""
        if not self.backward:
            return ""
        model.disturbed.check_backward(self, self._ranks)
        if self.breaks is not None and self._revisits:
            return ""
        self._fail_gradients(model)
        for pairs in self.passes:
            is_told = ""
            for number, (at, to) in enumerate(pairs, 1):
                ended = model.gradient(at, to)
                if ended == "injected":
                    # The error ends the pass at its sender, which answers at once with it, and so
                    # does each rank that waits for that (context.cpp:
                    # DistAutogradContext::addOutstandingRpc).
                    return ended
                is_told = is_told or ("timeout" if ended else "")
                if ended == "late":
                    # Whether its receiver still has the context when it comes is not certain.
                    model.in_contexts.perhaps_gradients(pairs[number:])
                if ended in ("lost", "late"):
                    # Without this gradient the pass goes no further.
                    break
            if is_told:
                return is_told
        return ""

    def _answers_before_use(self, model: Model) -> None:
        """A pass fails that comes by a rank twice, which has answered some gradient before."""
        finding = "failed-backward-revisits-rank"
        message = WireMessageType.BACKWARD_AUTOGRAD_REQ
        model.findings.meets(finding)
        # The call that is never answered keeps its rank from leaving (tensorpipe_agent.cpp:
        # TensorPipeAgent::join waits for clientActiveCalls_).
        model.findings.meets_at_shutdown(finding)
        # A rank that is never answered has given the context up when its gradient fails: by the
        # timeout, or by its own shutdown.
        for rank in {*self._ranks}:
            model.findings.frees_context(rank, keeps=False)
        # What ranks send once one has raised is the finding's.
        model.in_contexts.perhaps_gradients(self.gradients)
        model.answers.perhaps_errors(self.gradients, message)

    def _fail_gradients(self, model: Model) -> None:
        """Note which gradients are answered by an error: the one whose rank raises in the pass.

        So are those on which that one depends, unless the rank in between has answered before it
        knows: what it waits for are the gradients that it has sent by then
        (``autograd/context/context.cpp``: clearAndWaitForOutstandingRpcsAsync). A gradient that
        torch fails, or whose answer it loses, is such an error too.
        """
        message = WireMessageType.BACKWARD_AUTOGRAD_REQ
        if self.breaks is not None or model.disturbed:
            model.answers.perhaps_errors(self.gradients, message)
        if self.breaks is not None and not model.disturbed:
            *before, (at, to) = self.passes[0]
            # A rank that was in the pass before has answered by then, without an error
            # (dist_engine.cpp: executeSendFunctionAsync completes that future at once).
            if to not in {self.at, *(receiver for _, receiver in before)}:
                model.answers.error(at, to, message)

    @property
    def gradients(self) -> list[tuple[int, int]]:
        """Sender and receiver of each gradient that a backward pass sends, in their order.

        Those of what came back from a rank go to it first; it sends those of what came with the
        request (``autograd/utils.cpp``: addSendRpcBackward, addRecvRpcBackward).
        """
        # The loss has come to its owner with a request.
        first = [(self.root or 0, self.at)] if self._is_rooted_there else []
        return [*first, *self._gradients_of_path()]

    def _gradients_of_path(self) -> list[tuple[int, int]]:
        hops = list(itertools.pairwise((self.at, *self.path)))
        if not self.nested:
            hops = [(self.at, rank) for rank in self.path]
        # The value of an RRef of its own comes to a rank without a message: see requests().
        answers = [hop for n, hop in enumerate(hops) if len({*hop}) > 1 or not self._by_rref(n)]
        if self.nested:
            return [*answers, *((to, at) for at, to in reversed(hops))]
        found: list[tuple[int, int]] = []
        for number in reversed(range(len(hops))):
            at, to = hops[number]
            found += [(at, to)] * (at != to or not self._by_rref(number))
            found.append((to, at))
        return found

    @property
    def _is_rooted_there(self) -> bool:
        """Whether another rank owns the loss."""
        return self.root is not None and self.root != self.at

    @property
    def _ranks(self) -> tuple[int, ...]:
        """The ranks that take part in a pass, one for each time."""
        return (self.at, *self.path, *((self.root or 0,) if self._is_rooted_there else ()))

    @property
    def _revisits(self) -> bool:
        """Whether a pass comes by a rank twice."""
        return len({*self._ranks}) < len(self._ranks)

    def _ask_owner(self, model: Model, call: str) -> None:
        """Make the RRef to the loss, and ask its owner for the passes, and for the loss.

        The RRef is created in the context, and sent in it. The owner has its value before it runs
        a pass (``request_callback_impl.cpp``: RequestCallbackImpl::processRRefBackward). A user
        asks for it without a context or a profiler (``py_rref.cpp``: PyRRef::backward, which gives
        the message to the agent).
        """
        root = self.root
        assert root is not None
        model.calls[root][f"{call}/root"] += 1
        model.in_contexts.call(self.at, root, 2, graded=0)
        model.in_contexts.pass_of_owner(self.at, root, len(self.passes))
        if self.breaks is not None:
            message = WireMessageType.RREF_BACKWARD_REQ
            if self._revisits:
                model.answers.perhaps_errors([(self.at, root)], message)
            else:
                model.answers.error(self.at, root, message)
        handle = model.created(self.at, root, typed=False)
        handle.rref.made = True
        model.drop(model.give(handle, self.at, root))
        model.drop(handle)

    @property
    def passes(self) -> list[list[tuple[int, int]]]:
        """The gradients of each backward pass; one that raises ends at the rank that it breaks."""
        if not self.backward:
            return []
        if self.breaks is None:
            return [self.gradients] * (2 if self.retain else 1)
        pairs = self.gradients
        # A rank passes the gradient of a nested call's answer on, and computes nothing.
        first = len(self.path) - 1 if self.nested else 0
        first += self._is_rooted_there
        arrives = (n for n, (_, to) in enumerate(pairs, 1) if n > first and to == self.breaks)
        return [pairs[: next(arrives, len(pairs))]]

    def _by_rref(self, number: int) -> bool:
        """Whether a hop of the path is ``rpc.remote`` and a fetch."""
        return self.rrefs and (not number or not self.nested)

    def requests(self, number: int) -> list[tuple[int, int]]:
        """Sender and receiver of each message that a hop of the path asks something by.

        The value of an RRef of its own comes to a rank without a message (``rpc/py_rref.cpp``:
        ``PyRRef::toHere``).
        """
        at, to = self.path[number - 1] if self.nested and number else self.at, self.path[number]
        return [(at, to)] * (2 if self._by_rref(number) and at != to else 1)

    def _lose(self, model: Model, call: str, number: int, ended: str) -> None:
        """A call of its path ends with an error, which leaves the context: it is cleaned up.

        ``autograd/utils.cpp``: getMessageWithAutograd notes the other rank before it sends. A call
        whose answer is lost was executed, and so was what it calls. One that comes only after its
        timeout comes after the cleanup, too; addRecvRpcBackward then makes the context by
        DistAutogradContainer::getOrCreateContext, there and wherever the function calls on, and
        nobody cleans it up again (the finding context-after-cleanup).
        """
        further = self.path[number:] if self.nested else self.path[number : number + 1]
        before = self.path[:number]
        is_executed = ended == "timeout"
        executed = (*before, *further) if is_executed else before
        for rank in (*executed, *(further if ended == "late" else ())):
            self._runs(model, rank, call)
        known: dict[int, set[int]] = {}
        caller = self.at
        # Of a call that was not executed only its caller knows the other rank. A function that
        # raises is answered for without a gradient, which notes nobody (autograd/utils.cpp:
        # getMessageWithAutograd).
        raises = self.nested and ended == "injected"
        for rank in executed if is_executed else (*before, *further[:1]):
            known.setdefault(caller, set()).add(rank)
            if rank in executed and not raises:
                known.setdefault(rank, set()).add(caller)
            caller = rank if self.nested else caller
        self._count_until(model, number, ended)
        since = len(model.sends)
        model.release(self.name, self.at, known)
        if ended != "late":
            return
        delay = model.times.delay(self.at, MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ)
        model.disturbed.check_cleanup(model.sends[since:], delay)
        for rank in further:
            model.abandoned_calls[rank].add(call)
        for rank in {*further}:
            model.findings.keeps("context-after-cleanup", rank, Counters(contexts=1))

    def _count_until(self, model: Model, number: int, ended: str) -> None:
        """Count the calls where one of them ends with an error: that one is recorded as well."""
        whole = len(self.path) if self.nested and ended == "timeout" else number
        # A function that raises answers without a gradient.
        raises = self.nested and ended == "injected"
        for one in range(whole):
            if raises:
                model.in_contexts.call(*self.requests(one)[0], graded=0)
            else:
                self._count_hop(model, one)
        if whole == number:
            pair = self.requests(number)[0]
            # Whether it is answered in the end, and by what, depends on the cleanup.
            model.in_contexts.perhaps_graded([pair])
            model.in_contexts.call(*pair, graded=0)
        if self.nested and ended == "late":
            # Calls of a function that has begun after the cleanup: a finding, as in _lose().
            later = map(self.requests, range(number + 1, len(self.path)))
            model.in_contexts.perhaps_calls(itertools.chain.from_iterable(later))

    def _acquaintances(self) -> dict[int, set[int]]:
        """The ranks that each rank exchanged messages with inside the context.

        ``autograd/context/context.cpp``: DistAutogradContext::addKnownWorkerId.
        """
        known: dict[int, set[int]] = {}
        caller = self.at
        for rank in self.path:
            known.setdefault(caller, set()).add(rank)
            known.setdefault(rank, set()).add(caller)
            if self.nested:
                caller = rank
        if self.root is not None and self.root != self.at:
            known.setdefault(self.at, set()).add(self.root)
            # It answers without a gradient, and so notes nobody (autograd/utils.cpp:
            # getMessageWithAutograd).
            known.setdefault(self.root, set())
        return known

    def _computed(self) -> dict[str, Any]:
        """Its value: x squared, then (r + 2) * y + 1 at each rank r of the path.

        The loss is the sum over elements. Elements do not mix, so the gradient is elementwise: 2x
        times the product of the factors; a second backward adds the same again.
        """
        loss = 0.0
        gradient: list[float] = []
        for x in self.value:
            y, slope = x * x, 2.0 * x
            for rank in self.path:
                factor = float(rank + 2)
                y, slope = factor * y + 1.0, factor * slope
            loss += y
            gradient.append(slope)
        result: dict[str, Any] = {"loss": loss}
        if self.breaks is not None:
            result["broke"] = True
        elif self.backward:
            result["gradient"] = [2.0 * g for g in gradient] if self.retain else gradient
        if self.raises:
            result["raised"] = True
        if self.profiled:
            result["profiled"] = min(1, len(self.path)) if self.nested else len(self.path)
        return result

    def _broken(self, broke: str) -> dict[str, Any]:
        """Its value where backward raises torch's timeout, or the injected failure."""
        result = self._computed()
        result.pop("gradient", None)
        return {**result, "broke": broke}

    @property
    def raises_there(self) -> bool:
        return self.raises or self.breaks is not None

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []
        if not _is_close(seen.get("loss"), expected["loss"]):
            message = f"expected the loss {expected['loss']!r}, got {seen.get('loss')!r}"
            found.append(Violation("WrongValue", message))
        gradient, wanted = seen.get("gradient"), expected.get("gradient")
        if seen.get("broke"):
            wanted = None
        if wanted is not None and not (
            isinstance(gradient, list | tuple)
            and len(gradient) == len(wanted)
            and all(_is_close(a, b) for a, b in zip(gradient, wanted, strict=True))
        ):
            message = f"expected the gradient {wanted!r}, got {gradient!r}"
            found.append(Violation("WrongGradient", message))
        found += self._judge_backward(expected.get("broke"), seen.get("broke"))
        if bool(seen.get("raised")) != self.raises:
            message = "the exception that left the context did not reach its caller"
            found.append(Violation("MissingError", message))
        wanted = expected.get("profiled")
        if seen.get("profiled") != wanted:
            message = f"the profiler shows {seen.get('profiled')!r} calls by name, and not {wanted}"
            found.append(Violation("WrongValue", message))
        return found

    def _judge_backward(self, expected: object, broke: str | None) -> list[Violation]:
        """Whether backward raised, and the timeout where that had to be."""
        if broke and expected is None:
            return [Violation("UnexpectedError", f"backward raised {broke!r}")]
        words = {"timeout": "torch's timeout", "injected": "the injected failure"}
        wanted = words.get(str(expected), f"at rank {self.breaks}")
        if expected and not broke:
            message = f"backward had to raise {wanted}, and showed {broke!r}"
            return [Violation("MissingError", message)]
        signs = {"timeout": "timeout", "injected": "failed intentionally"}
        if signs.get(str(expected), "") not in str(broke):
            message = f"backward had to raise {wanted}, and raised {broke!r}"
            return [Violation("UnexpectedError", message)]
        return []

    @classmethod
    def draw(
        cls, drawer: StepDrawer, *, at: int | None = None, first: Sequence[int] = ()
    ) -> Context:
        at = drawer.rank() if at is None else at
        path = [drawer.pick(first)] if first else []
        length = drawer.pick(range(_LONGEST_PATH + 1 - len(path)))
        path += _hops(drawer, path[-1] if path else at, length)
        form = {**drawer.pick(_WALKS), **drawer.pick(_ENDS)}
        if "late" in form:
            # Only a Python function can wait until its call has timed out.
            form = {key: form[key] for key in form if key not in ("flavour", "rrefs")}
        python = "flavour" not in form
        value, form["seconds"] = drawer.with_sleep(TENSORS, len(path) * python)
        if "timeout" in form:
            form["timeout"] = drawer.in_time(form["seconds"] * len(path))
        if "late" in form and not _times_out(drawer, path, form):
            del form["late"]
        if "root" in form:
            form["root"] = _other_than(drawer, path, at) if form["root"] else at
        way = [at, *path, *([form["root"]] if form.get("root", at) != at else [])]
        # Mostly no rank breaks; if torch has the finding, no path that visits a rank twice breaks.
        once = len({*way}) == len(way)
        revisits = not drawer.facts.has_bug("failed-backward-revisits-rank")
        passes = python and form.get("backward", True) and "late" not in form
        able = path if passes and (once or revisits) else []
        breaks = drawer.pick((*(None,) * (1 + (1 if revisits else 3) * len(path)), *able))
        if breaks is not None:
            form["breaks"] = breaks
        plain = form.keys().isdisjoint({"rrefs", "flavour", "wait", "root", "late"})
        if plain and drawer.undisturbed and not drawer.in_parallel:
            form["profiled"] = drawer.pick((False, False, True))
        return cls(at, drawer.name("context"), tuple(path), value, **form)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        others = drawer.others[rank]
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not others:
            return []
        return [
            (cls.op, lambda: cls.draw(drawer, at=rank, first=others)),
            (cls.op, lambda: cls.draw(drawer, at=drawer.pick(others), first=(rank,))),
        ]

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended[self.name] = False
        drawer.may_keep |= self.breaks is not None and self._revisits


def _is_close(seen: object, expected: float) -> bool:
    return isinstance(seen, int | float) and math.isclose(seen, expected, rel_tol=1e-12)


def _other_than(drawer: StepDrawer, path: Sequence[int], at: int) -> int:
    """A rank that is not in a path, if there is one; else another one than `at`, or `at`."""
    others = drawer.others[at]
    return next((rank for rank in others if rank not in path), others[0] if others else at)


def _times_out(drawer: StepDrawer, path: Sequence[int], form: dict[str, Any]) -> bool:
    """Whether the call of a hop may time out in a context of that form; which hop is put in."""
    lasts = LATE_TIMEOUT + form["seconds"] * len(path)
    if not path or not drawer.may_end_late() or not drawer.may_take(lasts):
        return False
    form["late"] %= len(path)
    drawer.slow_functions += 1
    return True


def _hops(drawer: StepDrawer, start: int, length: int) -> list[int]:
    """`length` ranks, each different from the one before it."""
    width = len(drawer.ranks) - 1
    number = drawer.pick(range(max(1, width**length)))
    hops: list[int] = []
    for _ in range(length if width else 0):
        number, index = divmod(number, width)
        start = drawer.others[start][index]
        hops.append(start)
    return hops


#: What a call that outlasts its context does: it answers with a value, or with one that requires a
#: gradient, or first calls a further rank; or it has an argument that takes long to be unpickled.
Outlasting = Literal["value", "gradient", "call", "argument"]
#: What of such a call has a timeout.
Through = Literal["call", "future", "remote", "proxy"]
_NAMINGS: tuple[Naming, ...] = get_args(Naming)
_THROUGH: tuple[tuple[Through, Naming], ...] = tuple(itertools.product(get_args(Through), _NAMINGS))
#: Virtual seconds for which such a call waits, at most, until its rank has given the context up:
#: far more than a busy machine needs. The second number is for a default timeout, which must be
#: longer and slows the clock; the third for an argument that takes so long to be unpickled.
_LASTS, _LASTS_LESS, _UNPICKLES = 400.0, 100.0, 40.0
#: Virtual seconds by which the end of that wait and the cleanup must differ.
_CLEAR = 10.0
#: The fewest virtual seconds where the cleanup needs more, and where it does not.
_SHORT, _SHORTEST = 40.0, 4.0


@dataclass(frozen=True, slots=True, repr=False)
class Outlast(Step):
    """A call in a ``dist_autograd.context()`` at `at` for which the block does not wait.

    `to` computes ``left + right`` once it has given the context up, or after `seconds` (virtual).
    So the call ends after the block, however slow the machine is. `by` says how the block ends: by
    "async" the future is waited for after it; by "timeout" ``rpc_sync`` has a short timeout, and
    raises in the block. What `to` does is `what`. Before the block ends the function runs, so `to`
    has the context; but with an "argument" that takes `seconds` to be unpickled, `to` has not. Then
    it makes the context after the cleanup, which is the finding context-after-cleanup. `named` says
    how `at` names `to`. What times out is `through`: the "call" by ``rpc_sync``, the wait for its
    "future", the fetch of a "remote", or a method of an object at `to` by a "proxy" that has been
    used before.

    torch's documentation says nothing of such calls. Its comments say that a context is cleaned up
    on all ranks once the pass is done (``autograd/context/container.h``:
    DistAutogradContainer::releaseContext), so no rank may keep it. A rank that has given it up
    refuses to send what belongs to it (``container.cpp``: DistAutogradContainer::currentContext);
    of an answer without a gradient it asks for no context (``autograd/utils.cpp``:
    getMessageWithAutograd).
    """

    op: ClassVar[str] = "outlast"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 13.5
    comes_first: ClassVar[bool] = False  # because it needs a second rank, and a thread for a while
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    to: int
    name: str
    what: Outlasting = "value"
    by: Literal["async", "timeout"] = "async"
    then: int = 0
    left: Value = (1.0,)
    right: Value = (2.0,)
    seconds: float = _LASTS
    through: Through = "call"
    named: Naming = "name"

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        if self.through != "call" and (self.by == "async" or self.what == "argument"):
            msg = (
                f"through={shown(self.through)} needs by='timeout', and another what than "
                f"'argument'."
            )
            raise UsageError(msg)
        least = _SHORT if self._asks_for_context else _SHORTEST
        if not least <= self.seconds <= MAX_DELAY:
            msg = f"seconds={shown(self.seconds)} must lie in {least:g} to {MAX_DELAY:g} (virtual)."
            raise UsageError(msg)
        if self.to == self.at:
            msg = f"to={shown(self.to)} must be another rank: a rank has a context once."
            raise UsageError(msg)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    @property
    def _asks_for_context(self) -> bool:
        """Whether `to` asks for the context when it has waited."""
        return self.what in ("gradient", "call")

    @property
    def lasts(self) -> float:
        return self.seconds

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.times.check_in_time(self, self.seconds)
        model.calls[self.to][call] += 1
        if self.by == "timeout":
            model.abandoned_calls[self.to].add(call)
        # The callee has sent nothing in the context when it is cleaned up, so it knows no rank.
        before = len(model.sends) + self._uses_rref(model)
        model.release(self.name, self.at, {self.at: {self.to}, self.to: set()})
        cleanup = model.sends[before]
        waits = retry_wait(cleanup.failures) + model.times.delay(self.at, cleanup.message)
        # How long `to` still waits, at the least, once the block has ended.
        left = 0.75 * self.seconds
        if cleanup.delivered and self.what == "argument":
            # autograd/utils.cpp: addRecvRpcBackward makes the context when the request has been
            # read, which is after its cleanup.
            model.findings.keeps("context-after-cleanup", self.to, Counters(contexts=1))
        self._count(model, is_gone=cleanup.delivered)
        if not cleanup.delivered:
            self._leak(model)
        elif self._asks_for_context and waits > left - _CLEAR:
            # Whether the rank had the context when it answered is not known. It passes the cleanup
            # on to whom it sent something, so nothing is left in either case.
            model.certain = False
            return model.shows(error="unknown")
        if self.by == "timeout":
            return model.shows({"timed out": True})
        lost = cleanup.delivered and self._asks_for_context
        return model.shows({"lost": True} if lost else {"sum": sum_of(self.left, self.right)})

    def _uses_rref(self, model: Model) -> int:
        """The RRef that the call goes through, which ends with the step; how many messages that is.

        Its owner answers the creation when the function has ended, so the user's delete is sent
        then (``rref_context.cpp``: RRefContext::addPendingUser, confirmPendingUser).
        """
        if self.through not in ("remote", "proxy"):
            return 0
        before = len(model.sends)
        model.unread = True
        made = model.created(self.at, self.to, typed=False)
        # rref_proxy.py: _invoke_rpc sends the RRef to ask for its type, and then with each call.
        for _ in range(3 if self.through == "proxy" else 0):
            model.drop(model.give(made, self.at, self.to))
        model.drop(made)
        return len(model.sends) - before

    def _count(self, model: Model, *, is_gone: bool) -> None:
        """Count its calls; `is_gone` says whether `to` has given the context up by its end."""
        # An RRef is created and fetched; or created, asked for its type, and called twice.
        model.in_contexts.call(
            self.at, self.to, {"remote": 2, "proxy": 4}.get(self.through, 1), graded=0
        )
        if not is_gone and self.what == "gradient":
            model.in_contexts.perhaps_graded([(self.at, self.to)])
        if is_gone and self.what == "gradient":
            # The answer belongs to a context that its sender has not (container.cpp:
            # DistAutogradContainer::currentContext).
            model.answers.error(self.at, self.to, WireMessageType.FORWARD_AUTOGRAD_REQ)
        if self.what != "argument":
            # `at` asks whether the function has begun, until it has.
            model.in_contexts.call(self.at, self.to, graded=0)
            model.in_contexts.perhaps_plain_calls([(self.at, self.to)])
        if self.what != "call":
            return
        # With the context it calls on. Without, DistAutogradContainer::currentContext raises before
        # anything is sent (container.cpp).
        if self.by == "timeout":
            # Nothing that the step shows would tell that the cleanup came too late.
            model.in_contexts.perhaps_plain_calls([(self.to, self.then)])
        elif not is_gone:
            model.in_contexts.call(self.to, self.then, graded=0)

    def _leak(self, model: Model) -> None:
        """Note where the context stays besides at `to`, whose cleanup was lost."""
        if self.what == "call":
            model.leaked_contexts[self.then].add(self.name)
        if self.what == "gradient" and self.by == "async":
            # The answer makes the context at the caller again.
            model.leaked_contexts[self.at].add(self.name)

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        shows = {key: value for key, value in seen.items() if key != "id"}
        if expected is None or shows == expected:
            return []
        kind = "UnexpectedError" if shows.keys() & {"lost", "timed out"} else "MissingError"
        if "sum" in expected:
            kind = "WrongValue" if "sum" in shows else "UnexpectedError"
        message = f"a call that outlasts its context had to show {expected}, and showed {shows}"
        return [Violation(kind, message, timing_sensitive=True, slack=self.seconds - _CLEAR)]

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return len(drawer.ranks) > 1 and drawer.may_leave() and drawer.may_take(_LASTS_LESS)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Outlast | None:
        if not cls.may_come(drawer):
            return None
        at = drawer.rank() if at is None else at
        to = drawer.pick(drawer.others[at])
        kinds = get_args(Outlasting)
        what: Any = drawer.pick(
            kinds[:-1] if drawer.facts.has_bug("context-after-cleanup") else kinds
        )
        by: Any = drawer.pick(("async", "timeout") if drawer.settles else ("async",))
        then = drawer.pick(drawer.ranks)
        drawer.slow_functions += 1
        lasts = _LASTS if drawer.rpc_timeout is None else _LASTS_LESS
        seconds = _UNPICKLES if what == "argument" else lasts
        name, pair = drawer.name("context"), drawer.pick(PAIRS)
        through, named = drawer.pick(
            _THROUGH if by == "timeout" and what != "argument" else _THROUGH[: len(_NAMINGS)]
        )
        return cls(at, to, name, what, by, then, *pair, seconds, through, named)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not cls.may_come(drawer):
            return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank))]

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended[self.name] = False


#: Virtual seconds after which the second rank of a :class:`FailTwice` raises; the fewest.
_FAILS, _FAILS_SOONEST = 20.0, 4.0
#: The text of the exceptions there.
_ON_PURPOSE = "raised on purpose"


@dataclass(frozen=True, slots=True, repr=False)
class FailTwice(Step):
    """A ``dist_autograd.context()`` at `at` whose backward raises at one rank, then at another.

    A tensor goes to `to` and to `then`, which double it, and the loss is the sum of both answers.
    In backward, `to` raises after a quarter of `seconds` (virtual), which ends the pass at `at`,
    and so the block. `then` raises after `seconds`. By that time `at` has given the context up, and
    has used memory that became free for something else. Then torch runs the callback of the
    gradient that `at` had sent to `then`, which uses the context: the finding freed-context-used.
    The step takes twice `seconds`.
    """

    op: ClassVar[str] = "fail_twice"
    waits_at = waits_nowhere
    comes_first: ClassVar[bool] = False  # because it needs two other ranks, and time
    makes: ClassVar[Mapping[str, Sort]] = {"name": "context"}
    gives: ClassVar[type] = dict
    at: int
    to: int
    then: int
    name: str
    value: Value = (1.0, 2.0)
    seconds: float = _FAILS

    def enter(self, scope: Scope) -> None:
        if len({self.at, self.to, self.then}) < 3:
            msg = (
                f"to={shown(self.to)} and then={shown(self.then)} must be two ranks beside "
                f"at={shown(self.at)}."
            )
            raise UsageError(msg)
        if not _FAILS_SOONEST <= self.seconds <= MAX_DELAY:
            msg = (
                f"seconds={shown(self.seconds)} must lie in {_FAILS_SOONEST:g} to {MAX_DELAY:g} "
                f"(virtual)."
            )
            raise UsageError(msg)
        scope.new_context(self.name)
        scope.ids.add(self.name)

    @property
    def lasts(self) -> float:
        return 2.0 * self.seconds

    def predict(self, model: Model, call: str) -> StepPrediction:
        model.times.check_in_time(self, self.lasts)
        for rank in (self.to, self.then):
            model.calls[rank][call] += 1
            model.in_contexts.call(self.at, rank, graded=1)
            # Where the error of one rank comes before the gradient for the other one is sent, that
            # is not sent (dist_engine.cpp: execute_graph_task_until_ready_queue_empty looks at
            # has_error_). Neither rank sends one on: its function has raised before.
            model.in_contexts.perhaps_gradients([(self.at, rank)])
            gradient = WireMessageType.BACKWARD_AUTOGRAD_REQ
            model.answers.perhaps_errors([(self.at, rank)], gradient)
        # Whichever raises first: its error ends the pass (context.cpp:
        # DistAutogradContext::addOutstandingRpc), and leaves the block.
        known = {self.at: {self.to, self.then}, self.to: {self.at}, self.then: {self.at}}
        # The error is there when the step ends, but a busy machine may use it only later.
        model.findings.frees_context(self.at)
        model.release(self.name, self.at, known)
        return model.shows({"loss": 4.0 * math.fsum(self.value), "broke": True})

    def context_ids(self, value: Any) -> Mapping[str, int]:
        return {self.name: value["id"]} if isinstance(value, dict) else {}

    @property
    def raises_there(self) -> bool:
        return True

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        found: list[Violation] = []
        if not _is_close(seen.get("loss"), expected["loss"]):
            message = f"expected the loss {expected['loss']!r}, got {seen.get('loss')!r}"
            found.append(Violation("WrongValue", message))
        broke = seen.get("broke")
        if not broke:
            message = f"backward had to raise at rank {self.to} or {self.then}, and did not"
            found.append(Violation("MissingError", message))
        elif _ON_PURPOSE not in str(broke):
            message = f"backward had to raise {_ON_PURPOSE!r}, and raised {broke!r}"
            found.append(Violation("UnexpectedError", message))
        return found

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return (
            len(drawer.ranks) > 2
            and not drawer.facts.has_bug("freed-context-used")
            and drawer.may_take(2.0 * _FAILS)
        )

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> FailTwice | None:
        if not cls.may_come(drawer):
            return None
        at = drawer.rank() if at is None else at
        to = drawer.pick(drawer.others[at])
        then = drawer.pick([rank for rank in drawer.others[at] if rank != to])
        return cls(at, to, then, drawer.name("context"), drawer.pick(TENSORS))

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ or not cls.may_come(drawer):
            return []
        return [(cls.op, lambda: cls.draw(drawer, at=rank))]

    def drawn(self, drawer: StepDrawer) -> None:
        drawer.ended[self.name] = False


@dataclass(frozen=True, slots=True, repr=False)
class Refused(Step):
    """Ask `at` for a context that has ended: it must refuse the id. Settle first."""

    op: ClassVar[str] = "refused"
    waits_at = waits_nowhere
    order: ClassVar[float | None] = 15
    often: ClassVar[int] = 1  # because a settle seldom follows the end of a context
    comes_first: ClassVar[bool] = False
    in_branch: ClassVar[bool] = False
    gives: ClassVar[type] = dict
    at: int
    context: str

    def enter(self, scope: Scope) -> None:
        if self.context not in scope.contexts:
            msg = f"there is no context {shown(self.context)} before this step; make it first."
            raise UsageError(msg)
        if self.context not in scope.ids:
            msg = (
                f"the context {shown(self.context)} is an optimizer's, which gives no id; use that "
                f"of a Context."
            )
            raise UsageError(msg)
        if self.context not in scope.settled:
            msg = f"the context {shown(self.context)} may not be gone yet; put a Settle before."
            raise UsageError(msg)

    def predict(self, model: Model, call: str) -> StepPrediction:
        # autograd/context/container.cpp: DistAutogradContainer::retrieveContext.
        if self.context in model.missing_contexts:
            raise StepFails(error="missing")
        return model.shows({"refused": self.context not in model.leaked_contexts[self.at]})

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        refused = bool(expected and expected["refused"])
        if bool(seen.get("refused")) == refused:
            return []
        message = f"context {self.context!r} has ended, and its id is still accepted"
        if not refused:
            message = f"context {self.context!r} cannot have been cleaned up, and its id is refused"
        return [Violation("ContextLeak", message, timing_sensitive=True)]

    @classmethod
    def may_come(cls, drawer: StepDrawer) -> bool:
        return any(drawer.ended.values())

    @classmethod
    def draw(cls, drawer: StepDrawer) -> Refused | None:
        ended = [name for name, settled in drawer.ended.items() if settled]
        if not ended:
            return None
        context = drawer.recall(ended)
        return cls(drawer.rank(), context)

    @classmethod
    def instead(cls, drawer: StepDrawer) -> Step | None:
        if drawer.in_parallel:
            return None
        missing: type[Step] = Settle if drawer.ended else Context
        return missing.draw(drawer) if missing.op in drawer.on else None
