"""Steps about what is called: what it raises, what it is, on whom it calls, when it answers.

Each `predict` tells the model what these files of torch do: ``torch/distributed/rpc/internal.py``,
``api.py``, ``functions.py`` and ``rref_proxy.py``, and in ``torch/csrc/distributed/rpc``
``request_callback_impl.cpp``, ``python_functions.cpp`` and ``py_rref.cpp``. What TorchScript calls
is in ``torchscript_functions.cpp`` there, and in ``torch/csrc/jit/runtime``
``register_distributed_ops.cpp`` and ``interpreter.cpp``.

Two things are not drawn for a torch that breaks what is predicted for them:

* ``internal.py``: _handle_exception decodes the text of an exception by ``unicode_escape``, though
  it was encoded as UTF-8. So each character outside ASCII comes as several others, and where the
  text has a backslash before an x, u, U or N, the caller gets a UnicodeDecodeError and never
  learns what was raised (garbled-exception-text).
* ``request_callback_impl.cpp``: RequestCallbackImpl::runPythonFunction takes the inner future of
  what an `async_execution` function returned. ``torch/futures/__init__.py``: Future.set_exception
  makes the exception the value of that future, and raises it in Python alone. So the caller gets
  the exception as a value (future-exception-as-value).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MAX_DELAY, MessageType
from rpcprops.outcomes import UNLIMITED_SLACK, Violation
from rpcprops.steps.arguments import PAIRS, check_arguments, check_seconds, sum_of
from rpcprops.steps.base import CLEARLY_LATE, OwnerOf, Step, StepFails, Value, Way, waits_nowhere
from rpcprops.steps.rrefs import ask_type
from rpcprops.steps.run_out import RunOut, run_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer

Raised = Literal[
    "own",
    "value",
    "type",
    "key",
    "empty",
    "cause",
    "file",
    "unicode",
    "stop",
    "code",
    "group",
    "decode",
    "rref",
    "unprintable",
    "local",
    "keyboard",
    "exit",
    "close",
]
RaisedIn = Literal["sync", "async", "remote", "deferred", "then"]
CallableForm = Literal[
    "function",
    "keywords",
    "variadic",
    "bound",
    "method",
    "static",
    "class",
    "object",
    "constructor",
    "operator",
    "math",
    "generator",
    "lambda",
    "local",
    "script",
]
CalledBy = Literal["sync", "async", "remote", "proxy"]
DeferredForm = Literal[
    "then", "thens", "again", "call", "done", "thread", "nothing", "raises", "exception"
]
DeferredBy = Literal[
    "sync",
    "async",
    "remote",
    "static",
    "static_async",
    "static_remote",
    "class",
    "class_async",
    "class_remote",
    "proxy",
    "proxy_async",
    "proxy_remote",
    "static_proxy",
    "static_proxy_async",
    "static_proxy_remote",
    "class_proxy",
    "class_proxy_async",
    "class_proxy_remote",
]
ScriptedForm = Literal["wait", "sync", "remote", "future", "fork"]
ScriptedBy = Literal["sync", "async", "remote"]

#: The class of each kind of exception where torch makes it anew from its text alone.
_REBUILT: dict[Raised, str] = {
    "own": "RaisedOnPurposeError",
    "cause": "RaisedOnPurposeError",
    "empty": "RaisedOnPurposeError",
    "value": "ValueError",
    "type": "TypeError",
    "unicode": "UnicodeError",
    "key": "KeyError",
    "stop": "StopIteration",
    "file": "FileNotFoundError",
    "rref": "HoldingRaisedOnPurposeError",
}
#: Classes that a future keeps; every other error of a future is a RuntimeError.
_KEPT_BY_FUTURES = {"ValueError": "ValueError", "UnicodeError": "ValueError"} | {
    "TypeError": "TypeError"
}
#: Kinds whose text goes the way of other errors of C++, because `_run_function` does not catch
#: them, or raises while it does.
_UNCAUGHT = ("unprintable", "keyboard", "exit", "close")
#: What is added to the text "raised on purpose". Torch keeps each of them.
_TEXTS = (
    "",
    ": 100 % of {braces} %s %(d)d {0}",
    "\non a second line\n\tand a third\r\n",
    """: "it's" `quoted`""",
    r": \d+\.\w \\ \[",
    "\\",
    " " * 3,
)
#: These only for a torch that keeps them too: see the top of this module.
_GARBLED_TEXTS = (": caf\u00e9", r" in C:\users\me")
#: What ``unicode_escape`` changes in a text, and what it may be unable to read.
_CHANGED = re.compile(r"[^\x00-\x7f]")
_UNREAD = re.compile(r"\\[xuUN]")
#: Kinds of which the caller gets no text, or the repr, where each backslash is doubled.
_TEXTLESS = ("empty", "key")
_LONG = 100_000
#: Of the code points, those that are characters; a zero ends the text of an error of C++.
_CHARACTERS = 0x110000
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True, slots=True, repr=False)
class Raising(Step):
    """A function at `to` raises, and `at` sees which class with which text.

    `kind` says what is raised: exceptions of Python and of one's own, with and without further
    arguments (`code`, `decode`, `group`), a `cause`, no text (`empty`), an errno (`file`), a class
    that cannot be pickled (`local`), a repr that raises (`unprintable`), and the exceptions that
    are no :class:`Exception`. One of the kind `rref` holds an RRef, which `at` owns and sends with
    the call (for `then` it keeps it); the call then has no timeout. The text is "raised on
    purpose", then `text`, then `more` dots. `how` says where: in a call (`sync`, `async`, `remote`
    with ``to_here``), in an `async_execution` function before it has a future (`deferred`), or at
    `at` in the callback of a call (`then`).
    The function sleeps for `seconds` (virtual) before it raises, or before it answers (`then`);
    `timeout` is that of the call. A callback raises, whether its call has timed out or not.

    torch's documentation promises neither class nor text. The class is what its source says; that
    the text reaches the caller is what we ask.
    """

    op: ClassVar[str] = "raising"
    waits_at = waits_nowhere
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 40
    gives: ClassVar[type] = dict
    at: int
    to: int
    kind: Raised = "own"
    text: str = ""
    more: int = 0
    how: RaisedIn = "sync"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        _check_timing(self, timed=self.how != "remote")
        if self.kind == "rref" and self.timeout is not None:
            msg = f"a timeout of kind={shown(self.kind)} is not modelled; use None, or Call."
            raise UsageError(msg)
        if "\0" in self.text or any(ord(letter) in _SURROGATES for letter in self.text):
            msg = f"text={shown(self.text)} must have no zero and no surrogate."
            raise UsageError(msg)
        if not 0 <= self.more <= 10 * _LONG:
            msg = f"more={shown(self.more)} must lie in 0 to {10 * _LONG}."
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def raises_there(self) -> bool:
        return True

    def predict(self, model: Model, call: str) -> StepPrediction:
        held = self._held(model)
        # What _run_function lets through, or the RemoteException that cannot be pickled.
        is_error = self.kind in (*_UNCAUGHT, "local") and self.how != "then"
        if self.how == "remote":
            _fetch(model, self.at, self.to, call, argument=held, is_error=is_error)
        else:
            try:
                self._call(model, call, held, is_error=is_error)
            except StepFails:
                # The callback runs however the call has ended.
                if self.how != "then":
                    raise
        if self._is_decoded():
            if _CHANGED.search(self.text):
                says = "came without the text"
                model.findings.meets_here("garbled-exception-text", self.at, says)
            if _UNREAD.search(self.text):
                # to_here raises what Python does, with the whole text that could not be read.
                texts = model.facts.texts
                says = f"'unicodeescape' codec can't decode bytes|{re.escape(texts.remote)}"
                says = f"{re.escape(texts.unreadable)}: ({says})"
                model.findings.meets_here("garbled-exception-text", self.at, says)
        return model.shows({"raised": self._shown_as(), "kept": True})

    def _held(self, model: Model) -> Handle | None:
        """The RRef that its function is sent and whose exception then holds it.

        The exception itself goes nowhere: `_run_function` (internal.py) answers with its text and
        its class, and forgets it. So no RRef is forked for the answer, and when the function has
        ended nothing at `to` holds the one that came.
        """
        if self.kind != "rref" or self.how == "then":
            return None
        return model.owned(self.at, typed=True)

    def _call(self, model: Model, call: str, held: Handle | None, *, is_error: bool) -> None:
        there = model.call(self.at, self.to, MessageType.PYTHON_CALL, call, held)
        model.calls[self.to][call] += 1
        if is_error:
            model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
        if there is not None:
            model.drop(there)
        late, slack = model.gives_up(self.at, self.to, call, self.timeout, self.seconds)
        if late:
            raise StepFails(late, slack)

    def _is_decoded(self) -> bool:
        """Whether the text comes to the caller through internal.py: _handle_exception."""
        if self.how == "then" or self.kind in (*_UNCAUGHT, *_TEXTLESS):
            return False
        return self.kind != "local" or (self.how == "remote" and self.at == self.to)

    def _shown_as(self) -> str:
        """The class of what the caller sees.

        An exception becomes one of its class with another text (internal.py: _handle_exception),
        or a RuntimeError if it cannot be made of a text, or cannot be pickled
        (request_callback_impl.cpp: serializePyObject). A future keeps two classes of these
        (python_functions.cpp: toPyJitFuture), and none of a callback (pybind_utils.h:
        PythonFutureWrapper::then). What `_run_function` does not catch is a RuntimeError
        (request_callback_impl.cpp: RequestCallbackImpl::runPythonFunction). An owner that fetches
        its own value pickles nothing (py_rref.cpp: PyRRef::localValue).
        """
        if self.how == "then":
            return "RuntimeError"
        if self.how == "remote":
            if self.kind == "local" and self.at == self.to:
                return "LocalRaisedOnPurposeError"
            return _REBUILT.get(self.kind, "RuntimeError")
        return _KEPT_BY_FUTURES.get(_REBUILT.get(self.kind, ""), "RuntimeError")

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        return _judge_raised(expected, seen)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Raising:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        kind: Any = drawer.pick(get_args(Raised))
        how: Any = drawer.pick(get_args(RaisedIn))
        garbles = drawer.facts.has_bug("garbled-exception-text")
        # What torch once got wrong comes more often where it has been mended.
        texts = _TEXTS if garbles else _TEXTS + _GARBLED_TEXTS * 2
        index = drawer.pick(range(len(texts) + 3))
        letter = drawer.pick(range(_CHARACTERS))
        timed = _timing(drawer, at, timed=how != "remote" and kind != "rref")
        if index < len(texts):
            return cls(at, to, kind, texts[index], 0, how, *timed)
        if index == len(texts):
            return cls(at, to, kind, "", _LONG, how, *timed)
        if garbles and kind not in _UNCAUGHT and how != "then":
            letter %= 0x80
        is_character = letter and letter not in _SURROGATES
        return cls(at, to, kind, chr(letter) if is_character else "", 0, how, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_call(cls, drawer, rank, message)


@dataclass(frozen=True, slots=True, repr=False)
class Invoke(Step):
    """`to` runs a callable of some `form`, which adds `left` and `right`.

    A function with positional arguments, with ``keywords``, or with any number (`variadic`); a
    ``functools.partial`` (`bound`); a method, a static and a class method; a callable `object`; a
    class (`constructor`); two builtin functions of Python: ``operator.add``, which joins two
    tuples, and ``math.fsum`` of `left`. A generator cannot be pickled as a result; a lambda, a
    local function and the method of a scripted module (`script`) cannot be pickled at all, so
    nothing is sent. These must be refused. `how` says by what: "proxy" is ``rref.rpc_sync()`` of a
    new RRef to an object, which may be a scripted module. `timeout` is that of ``rpc_sync`` or
    ``rpc_async``. What can say that it ran can sleep for `seconds` (virtual), too.
    """

    op: ClassVar[str] = "invoke"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 41
    at: int
    to: int
    form: CallableForm = "function"
    left: Value = (1.0,)
    right: Value = (2.0,)
    how: CalledBy = "sync"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        if not _may_be_called(self.form, self.how):
            msg = f"form={shown(self.form)} cannot be called by how={shown(self.how)}; use 'sync'."
            raise UsageError(msg)
        _check_timing(self, timed=self.how in ("sync", "async"))
        if self.seconds and self.form in (*_NAMELESS, *_NEVER_PICKLED):
            msg = f"seconds={shown(self.seconds)}: form={shown(self.form)} cannot sleep; write 0."
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """``rref.rpc_sync()`` asks for the type of the value, and then calls its method."""
        return (self.to,) if "proxy" in self.how else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        if self.form in _NEVER_PICKLED and self.how != "proxy":
            # api.py: _invoke_rpc and remote pickle the function before they send anything.
            return model.shows(True)
        name = "" if self.form in _NAMELESS else call
        if self.how == "proxy":
            _through(model, self.at, self.to, name, by_remote=False)
        elif self.how == "remote":
            _fetch(model, self.at, self.to, name)
        else:
            payload = self._payload if self.form in _WITHOUT_CALL else call
            model.call(self.at, self.to, MessageType.PYTHON_CALL, payload)
            _count(model, self.to, name)
            if self.form == "generator":
                # request_callback_impl.cpp: serializePyObject.
                model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
            late, slack = model.gives_up(self.at, self.to, name, self.timeout, self.seconds)
            if late:
                raise StepFails(late, slack)
        if self.form == "generator":
            return model.shows(True)
        return model.shows(self._computed())

    @property
    def _payload(self) -> str:
        """Without the name of the call, two such calls can have equal payloads."""
        return f"math {self.left}" if self.form == "math" else f"operator {self.left} {self.right}"

    @property
    def alike(self) -> tuple[str, ...]:
        return (self._payload,) if self.form in _WITHOUT_CALL else ()

    def _computed(self) -> list[float]:
        match self.form:
            case "operator":
                return [*self.left, *self.right]
            case "math":
                return [math.fsum(self.left)]
            case "keywords":
                return [2.0 * x for x in sum_of(self.left, self.right)]
            case _:
                return sum_of(self.left, self.right)

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if expected is True and seen is not True:
            return [Violation("MissingError", f"a {self.form} was not refused, but gave {seen!r}")]
        return Step.judge(self, expected, seen)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Invoke:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        # Two threads could send the same.
        left_out = _WITHOUT_CALL if drawer.in_threads else ()
        form: Any = drawer.pick([x for x in get_args(CallableForm) if x not in left_out])
        how: Any = drawer.pick([x for x in get_args(CalledBy) if _may_be_called(form, x)])
        left, right = drawer.pick(PAIRS)
        slow = form not in (*_NAMELESS, *_NEVER_PICKLED)
        timed = _timing(drawer, at, timed=how in ("sync", "async"), slow=slow)
        return cls(at, to, form, left, right, how, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_call(cls, drawer, rank, message)


#: Callables that cannot be pickled, and those that cannot say that they ran.
_NEVER_PICKLED = ("lambda", "local", "script")
_NAMELESS = ("operator", "math", "generator", "script")
#: Functions of Python's own, which cannot be given the name of the call.
_WITHOUT_CALL = ("operator", "math")


def _may_be_called(form: CallableForm, how: CalledBy) -> bool:
    if how == "proxy":
        return form in ("method", "static", "class", "script")
    # The owner of a generator can use it.
    return form != "generator" or how != "remote"


#: The most calls of a path; each keeps one thread of its rank busy until the last has ended. The
#: scripts of failures have 8 threads a rank, and one must be free to handle answers.
_LONGEST_PATH = 5
#: The timeout, in virtual seconds, of a call that nothing else ends.
_SHORT = 3.0
#: The finding that no timeout ends a call where all threads wait.
_NEEDS_THREAD = "timeout-needs-thread"
#: The threads of each rank that may all be busy. A program's clusters have one more.
_THREADS = 7


@dataclass(frozen=True, slots=True, repr=False)
class Recurse(Step):
    """Each rank of `path` calls the next one from within the call, and waits for it.

    A path may come back to a rank, and to the caller. The function of the last rank waits `seconds`
    (virtual); with `spins` it then holds the GIL for some 10 ms of real time. Its value is the
    ranks as they answered. `timeout` is that of the first call: the others go on without it.

    A rank that waits for an answer keeps a thread of its agent busy (``num_worker_threads`` of
    TensorPipeRpcBackendOptions, and of a program; :mod:`rpcprops.programs.threads` counts them). So
    a path has at most 5 ranks, and one that is drawn for a branch of Parallel visits no rank twice.
    Nor does one that is drawn with a `timeout`, after which its threads stay busy.

    Where all the threads of a rank wait for answers, none is left to hand over the end of a call,
    be it an answer or a timeout (``tensorpipe_agent.cpp``: TensorPipeAgent::markFutureAsComplete,
    markFutureWithError). So they wait for ever, the rank runs nothing any more, and nor does it
    shut RPC down. `timeout`, or the program's default, ends the first call: its rank must have a
    thread left, or it waits for ever, too (timeout-needs-thread). Functions for which there was no
    thread never run. The calls along the path have no timeout but the default: without one the
    functions wait at each rank of the path, and with one only where the threads all wait. It must
    stand alone between settles, and only steps of other ranks may follow. Such a step comes last in
    programs that are drawn, and only without a default.
    """

    op: ClassVar[str] = "recurse"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 42
    at: int
    path: tuple[int, ...]
    seconds: float = 0.0
    spins: bool = False
    timeout: float | None = None

    def enter(self, scope: Scope) -> None:
        if not 1 <= len(self.path) <= _LONGEST_PATH:
            msg = f"path={shown(self.path)} must have 1 to {_LONGEST_PATH} ranks."
            raise UsageError(msg)
        for rank in self.path:
            scope.check_rank("path", rank)
        if not 0 <= self.seconds <= MAX_DELAY:
            msg = f"seconds={shown(self.seconds)} must lie in 0 to {MAX_DELAY:g} (virtual)."
            raise UsageError(msg)

    @property
    def lasts(self) -> float:
        return self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """Each rank of the path but the last waits for the next one."""
        return self.path[:-1]

    def runs_out(self, number: int) -> bool:
        """Whether a rank of the path gets so many calls that it has no thread left for an end."""
        return run_out(self.path, number) is not None

    def predict(self, model: Model, call: str) -> StepPrediction:
        threads = model.times.threads
        out = run_out(self.path, threads.number) if threads is not None else None
        if out is not None:
            return self._predict_out(model, call, out)
        self._must_find_threads(model)
        caller = self.at
        message = MessageType.PYTHON_CALL
        waits = self.seconds + sum(model.times.delay(rank, message) for rank in self.path[:-1])
        for number, rank in enumerate(self.path):
            try:
                model.call(caller, rank, MessageType.PYTHON_CALL, f"{call} {number}")
            except StepFails as failed:
                if not number:
                    raise StepFails(failed.error) from None
                # The caller of the rank that could not send sees what its function raised, if that
                # comes before the timeout.
                waits = sum(model.times.delay(rank, message) for rank in self.path[: number - 1])
                late, slack = model.times.timed(self.at, message, self.timeout, waits)
                for ran in self.path[:number] if late else ():
                    model.abandoned_calls[ran].add(call)
                raise StepFails(late or "remote", slack) from None
            model.calls[rank][call] += 1
            caller = rank
        if self.timeout is None:
            return model.shows(list(self.path))
        model.times.check_in_time(self, waits)
        late, slack = model.times.timed(self.at, message, self.timeout, waits)
        for rank in self.path if late else ():
            model.abandoned_calls[rank].add(call)
            model.busy[rank] += 1
        return model.shows(None if late == "timeout" else list(self.path), late, slack)

    def _predict_out(self, model: Model, call: str, out: RunOut) -> StepPrediction:
        """What it shows where some rank has too few threads."""
        limit = model.times.limit(self.timeout)
        if limit is None:
            msg = (
                f"{self!r}: all threads of a rank wait for each other, and nothing ends the call "
                f"of rank {self.at} (TensorPipeAgent::markFutureAsComplete needs a thread); give "
                f"it a timeout, or more threads."
            )
            raise UsageError(msg)
        slack = UNLIMITED_SLACK
        if model.times.rpc_timeout is not None and self.path[0] not in out.stuck:
            # The function of the first rank raises when the default timeout has ended its call.
            slack = model.times.rpc_timeout - limit
        if slack < CLEARLY_LATE:
            msg = (
                f"{self!r}: the default timeout ends its call and that of its first function at "
                f"almost the same time (TensorPipeAgent::pollTimeoutRpcs of two ranks); let its "
                f"own be {CLEARLY_LATE:g} s shorter."
            )
            raise UsageError(msg)
        model.check_alone(self, (self.at, *self.path))
        for number, (caller, rank) in enumerate(itertools.pairwise((self.at, *self.path))):
            if number < out.sent:
                model.call(caller, rank, MessageType.PYTHON_CALL, f"{call} {number}")
            if number < out.started:
                model.calls[rank][call] += 1
        model.runs_out(self, self.path, out)
        if self.at in out.stuck:
            model.findings.never_ends(_NEEDS_THREAD)
            model.findings.meets_here(_NEEDS_THREAD, self.at, breaks=("RankHung",))
        return model.shows(error="timeout", slack=slack)

    def _must_find_threads(self, model: Model) -> None:
        """Raises:
        UsageError: all threads of a rank may come to wait for each other.
        """
        if model.times.threads is not None and model.times.threads.are_few:
            # The oracle has counted for the whole program.
            return
        for rank in self.path:
            if model.busy[rank] + self.path.count(rank) > _THREADS:
                msg = (
                    f"{self!r}: with the calls that have timed out before it may keep all "
                    f"{_THREADS} threads of rank {rank} busy; put a Settle() before it."
                )
                raise UsageError(msg)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Recurse:
        at = drawer.rank() if at is None else at
        first = drawer.peer(at)
        length = drawer.pick(range(1, _LONGEST_PATH + 1))
        # Back and forth between two ranks, mostly; or on to the next rank each time.
        step = drawer.pick((0, 0, 1))
        size = len(drawer.ranks)
        if step:
            path = [(first + number) % size for number in range(length)]
        else:
            path = [(first, at)[number % 2] for number in range(length)]
        if drawer.in_parallel:
            path = list(dict.fromkeys(path))
        forms = ((0.0, False), (0.5, False), (0.0, True), (3.0, True))
        seconds, spins = drawer.pick([form for form in forms if drawer.may_take(form[0])])
        may_leave = drawer.settles and drawer.may_leave()
        message = MessageType.PYTHON_CALL
        timeout, longer = drawer.timing(at, message, late=may_leave, slow_late=may_leave)
        if not drawer.may_take(longer):
            # The default timeout would also end the calls along the path.
            return cls(at, tuple(path), seconds, spins)
        if timeout is not None:
            path = list(dict.fromkeys(path))
            drawer.slow_functions += not longer
        return cls(at, tuple(path), longer or seconds, spins, timeout)

    @classmethod
    def draw_beyond(cls, drawer: StepDrawer, number: int) -> Recurse | None:
        """One that needs more than so many threads of a rank; None if there is none.

        Its own rank has a thread left for the timeout.
        """
        message = MessageType.PYTHON_CALL
        able = [rank for rank in drawer.ranks if not drawer.may_fail(rank, [message])]
        if len(able) < 2 or number >= _LONGEST_PATH:
            return None
        at = drawer.pick(able)
        others = [rank for rank in able if rank != at][:2]
        path = drawer.pick(_paths_beyond(number, at, tuple(others)))
        return cls(at, path, spins=drawer.pick((False, True)), timeout=_SHORT)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_call(cls, drawer, rank, message)


@functools.lru_cache(maxsize=64)
def _paths_beyond(number: int, at: int, others: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Paths over these ranks that need more than so many threads of one that is not `at`.

    The shortest come first. Those along which all functions run are as many as the others.
    """
    ranks = (*others, at)
    lengths = range(number + 1, _LONGEST_PATH + 1)
    found = [path for length in lengths for path in itertools.product(ranks, repeat=length)]
    outs = [(path, out) for path in found if (out := run_out(path, number)) is not None]
    able = [(path, out.started == len(path)) for path, out in outs if at not in out.stuck]
    whole = [path for path, is_whole in able if is_whole]
    rest = [path for path, is_whole in able if not is_whole]
    return tuple(itertools.chain(*zip(rest, itertools.cycle(whole), strict=False)))


#: The ways by which ``rpc_sync`` or ``rpc_async`` calls a function with `async_execution`.
_BY_CALL = [by for by in get_args(DeferredBy) if "proxy" not in by and not by.endswith("remote")]
#: The exception that a function sets on its future, as Python writes it.
_SET_EXCEPTION = "RaisedOnPurposeError('raised on purpose')"


@dataclass(frozen=True, slots=True, repr=False)
class Deferred(Step):
    """`to` runs an `async_execution` function, which returns a future of ``left + right``.

    `form` says which: a call of `then` (`call`), with one callback that adds 1 (`then`), and one
    more that doubles that (`thens`), or with a callback that calls `then` again and adds `right`
    (`again`); one that is `done`, or that a `thread` completes. `nothing` returns no future, in
    `raises` the callback raises, and an `exception` is set on the future: these three must raise.
    `how` says by what: ``rpc_sync``, or ``rpc_async`` (`async`), or ``remote`` and ``to_here``
    (`remote`). `static` and `class` are such methods. `proxy` calls a method through a new RRef, as
    in ``rref.rpc_async()`` (`proxy_async`). The function sleeps for `seconds` (virtual) first;
    `timeout` is that of ``rpc_sync`` or ``rpc_async`` without a proxy.

    torch's documentation (functions.py: async_execution) promises that the value of the future is
    sent, and names each of these ways.
    """

    op: ClassVar[str] = "deferred"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 43
    at: int
    to: int
    then: int
    form: DeferredForm = "then"
    left: Value = (1.0,)
    right: Value = (2.0,)
    how: DeferredBy = "sync"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        _check_timing(self, timed=self.how in _BY_CALL)

    @property
    def lasts(self) -> float:
        return self.seconds

    @property
    def raises_there(self) -> bool:
        return self.form in ("nothing", "raises", "exception")

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """With `again` the callback of a call makes a further one, and waits for it.

        A proxy asks for the type of the value, and then calls its method.
        """
        return (self.to,) if self.form == "again" or "proxy" in self.how else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        failed: list[StepFails] = []

        def run() -> bool:
            try:
                self._run(model, call)
            except StepFails as failure:
                failed.append(failure)
            return bool(failed) or self.raises_there

        if "proxy" in self.how:
            # It takes the same messages for each sort of method (rref_proxy.py: _invoke_rpc looks
            # for the decorator in the class).
            by_remote = self.how.endswith("remote")
            handle = _through(model, self.at, self.to, call, run, by_remote=by_remote)
            if failed and self.how.endswith("proxy_async"):
                # If the answer comes before _invoke_rpc has added the callback that hands it on,
                # that runs in the frame which has the RRef: see Through.
                model.findings.meets_in_proxy(handle, self.at)
        elif self.how.endswith("remote"):
            _fetch(model, self.at, self.to, call, run)
        else:
            model.call(self.at, self.to, MessageType.PYTHON_CALL, call)
            model.calls[self.to][call] += 1
            since = len(model.sends)
            if run():
                model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
            self._give_up(model, call, since)
        if failed:
            raise failed[0]
        if self.form == "exception":
            says = f"got the value {re.escape(_SET_EXCEPTION)}$"
            model.findings.meets_here("future-exception-as-value", self.at, says)
            # Nothing says of which class it is at the caller.
            return model.shows({"raised": True, "kept": True})
        if self.raises_there:
            return model.shows({"raised": "RuntimeError", "kept": True})
        return model.shows(self._computed())

    def _give_up(self, model: Model, call: str, since: int) -> None:
        """Raises:
        StepFails: the timeout ends the call. What its function sends, it sends all the same.
        """
        asked = [send for send in model.sends[since:] if send.delivered]
        waits = self.seconds + sum(model.times.delay(send.rank, send.message) for send in asked)
        late, slack = model.gives_up(self.at, self.to, call, self.timeout, waits)
        if late:
            model.abandoned_calls[self.then] |= {f"{call}/then", f"{call}/again"}
            raise StepFails(late, slack)

    def _run(self, model: Model, call: str) -> None:
        """What the function sends; raises how its future fails, if a message is lost."""
        if self.form in ("done", "thread", "nothing", "exception"):
            return
        try:
            model.call(self.to, self.then, MessageType.PYTHON_CALL, f"{call}/then")
            model.calls[self.then][f"{call}/then"] += 1
            if self.form == "again":
                model.call(self.to, self.then, MessageType.PYTHON_CALL, f"{call}/again")
                model.calls[self.then][f"{call}/again"] += 1
        except StepFails:
            # That callback does not ask how the call ended.
            if self.form != "raises":
                raise

    def _computed(self) -> list[float]:
        total = sum_of(self.left, self.right)
        match self.form:
            case "then":
                return [x + 1.0 for x in total]
            case "thens":
                return [2.0 * (x + 1.0) for x in total]
            case "again":
                return sum_of(total, self.right)
            case _:
                return total

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if not self.raises_there:
            return Step.judge(self, expected, seen)
        if self.form == "exception":
            raised = isinstance(seen, dict) and seen["raised"]
            expected = {**expected, "raised": raised or "the exception of the future"}
        return _judge_raised(expected, seen)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None) -> Deferred:
        at = drawer.rank() if at is None else at
        to = drawer.peer(at)
        # The text of a lost call is perhaps unreadable, and then a callback that waits for the call
        # raises something else (readable-injected-error).
        may_fail = drawer.may_fail(to, [MessageType.PYTHON_CALL])
        is_plain = not may_fail or not drawer.facts.has_bug("readable-injected-error")
        as_value = drawer.facts.has_bug("future-exception-as-value")
        waiting = ("then", "thens", "again")
        forms = [
            form
            for form in get_args(DeferredForm)
            if (form != "exception" or not as_value) and (is_plain or form not in waiting)
        ]
        # What torch once got wrong comes more often where it has been mended.
        form: Any = drawer.pick(forms if as_value else [*forms, *["exception"] * 2])
        kept = may_fail and drawer.facts.has_bug("failed-async-proxy")
        hows = get_args(DeferredBy)
        how: Any = drawer.pick([by for by in hows if not (kept and by.endswith("proxy_async"))])
        then = drawer.peer(to)
        left, right = drawer.pick(PAIRS)
        timed = _timing(drawer, at, timed=how in _BY_CALL)
        return cls(at, to, then, form, left, right, how, *timed)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        return _ways_to_call(cls, drawer, rank, message)


@dataclass(frozen=True, slots=True, repr=False)
class Scripted(Step):
    """`to` runs a TorchScript function, which itself calls a TorchScript function of `then`.

    That one gives ``left + right``. The function at `to` adds `right` once more, where its `form`
    lets it: it calls by ``rpc_async``, and waits for the future (`wait`), by ``rpc_sync`` (`sync`),
    or by ``remote`` and ``to_here`` (`remote`). The others are `async_execution` functions: one
    returns the future of ``rpc_async`` (`future`), and one that of ``torch.jit.fork``, in which a
    function waits for the former (`fork`). `how` says by what `at` calls. The function sleeps for
    `seconds` (virtual) first; `timeout` is that of ``rpc_sync`` or ``rpc_async``.

    Both functions note that they ran, by a function of Python that TorchScript may call
    (``torch.jit.ignore``). torch's documentation (functions.py: async_execution) shows the form
    `future`, and its guide to TorchScript says that scripts may make such calls.
    """

    op: ClassVar[str] = "scripted"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 44
    at: int
    to: int
    then: int
    form: ScriptedForm = "wait"
    left: Value = (1.0,)
    right: Value = (2.0,)
    how: ScriptedBy = "sync"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_arguments(scope, self.at, self.left, self.right)
        _check_timing(self, timed=self.how != "remote")

    @property
    def lasts(self) -> float:
        return self.seconds

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """A future gives the thread back (``interpreter.cpp``: WAIT); the other calls wait."""
        return (self.to,) if self.form in ("sync", "remote") else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        failed: list[StepFails] = []

        def run() -> bool:
            try:
                self._run(model, f"{call}/then")
            except StepFails as failure:
                failed.append(failure)
            return bool(failed)

        if self.how == "remote":
            # The RRef has the type that the function returns (torchscript_functions.cpp:
            # remoteTorchscript). So its fetch is typed, also where that type is a future.
            _fetch(model, self.at, self.to, call, run, typed=True)
        else:
            model.call(self.at, self.to, MessageType.SCRIPT_CALL, call)
            model.calls[self.to][call] += 1
            since, had_one = len(model.sends), self.to in model.creations.broke_one
            if run():
                model.answers.error(self.at, self.to, MessageType.SCRIPT_CALL)
            self._give_up(model, call, since, second=had_one, breaks=bool(failed))
        if failed:
            # What ends the call at `to` is the error of its future there. Or the function raises
            # it, and then its text is a part of what the interpreter says of it (interpreter.cpp:
            # InterpreterStateImpl::handleError). No Python comes between, which could add a name.
            raise failed[0]
        total = sum_of(self.left, self.right)
        return model.shows(total if self.form == "future" else sum_of(total, self.right))

    def _run(self, model: Model, name: str) -> None:
        """What the function at `to` sends; raises how it ends, if a message is lost.

        A payload holds the name, which is an argument, so it differs from all others.
        """
        if self.form == "remote":
            # The RRef is dropped once its value is there: the interpreter keeps nothing that no
            # later instruction reads.
            _fetch(model, self.to, self.then, name, typed=True)
            return
        # register_distributed_ops.cpp: prepare_and_call_rpc_op.
        model.call(self.to, self.then, MessageType.SCRIPT_CALL, name)
        model.calls[self.then][name] += 1

    def _give_up(self, model: Model, call: str, since: int, *, second: bool, breaks: bool) -> None:
        """End the call by its timeout, if that comes.

        Args:
            since: how many messages there were before its function ran.
            second: whether a creation of its rank had failed by then.
            breaks: whether the function fails.

        Raises:
            StepFails: the timeout ends it. What its function sends, it sends all the same.
            UsageError: see :meth:`Creations.abandons`.
        """
        surely, perhaps = self.seconds, 0.0
        for send in model.sends[since:]:
            delay = model.times.delay(send.rank, send.message) if send.delivered else 0.0
            if send.message is MessageType.RREF_USER_DELETE:
                # The thread that drops the RRef sends it, or the one that hears of its creation.
                perhaps += delay
            else:
                surely += delay
        limits = (self.timeout, surely, perhaps)
        late, slack = model.times.timed(self.at, MessageType.SCRIPT_CALL, *limits)
        if late:
            model.abandoned_calls[self.to].add(call)
            model.abandoned_calls[self.then].add(f"{call}/then")
            if self.form == "remote":
                # The function may make its RRef only when others shut down.
                model.unread = True
                if breaks:
                    model.creations.abandons(self.to, second=second)
            raise StepFails(late, slack)

    @classmethod
    def draw(cls, drawer: StepDrawer, *, at: int | None = None, to: int | None = None) -> Scripted:
        if to is None:
            at = drawer.rank() if at is None else at
            to = drawer.peer(at)
        else:
            at = drawer.peer(to)
        # A rank whose second creation fails waits for it for ever (second-failed-remote).
        waits = drawer.facts.has_bug("second-failed-remote")
        lost = {rank for rank in (at, to) if drawer.may_fail(rank, [_SCRIPT_REMOTE])}
        forms = get_args(ScriptedForm)
        form: Any = drawer.pick([x for x in forms if x != "remote" or not waits or to not in lost])
        ways = get_args(ScriptedBy)
        how: Any = drawer.pick([x for x in ways if x != "remote" or not waits or at not in lost])
        then = drawer.peer(to)
        left, right = drawer.pick(PAIRS)
        message = MessageType.SCRIPT_CALL
        timed = how != "remote"
        # A creation that fails when nobody waits may be the second one of its rank that does so:
        # Creations.abandons.
        late = timed and (form != "remote" or (drawer.settles and to not in lost))
        timing = _timing(drawer, at, timed=timed, late=late, message=message)
        return cls(at, to, then, form, left, right, how, *timing)

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Way]:
        if message is not MessageType.SCRIPT_CALL:
            return []
        return [
            (cls.op, lambda: cls.draw(drawer, at=rank)),
            (cls.op, lambda: cls.draw(drawer, to=rank)),
        ]


_SCRIPT_REMOTE = MessageType.SCRIPT_REMOTE_CALL


def _check_timing(step: Raising | Invoke | Deferred | Scripted, *, timed: bool) -> None:
    """Raises:
    UsageError: the function cannot sleep so long, or the step has a timeout and is not `timed`.
    """
    check_seconds(step.seconds)
    if step.timeout is not None and not timed:
        msg = f"a timeout of how={shown(step.how)} is not modelled here; use Remote or Through."
        raise UsageError(msg)


def _timing(
    drawer: StepDrawer,
    at: int,
    *,
    timed: bool,
    late: bool = True,
    slow: bool = True,
    message: MessageType = MessageType.PYTHON_CALL,
) -> tuple[float | None, float]:
    """A timeout, if the step may have one, and how long its function sleeps.

    Args:
        late: whether that timeout may be too short for a delay of the message.
    """
    late = late and timed
    slow_late = late and drawer.settles
    timeout, seconds = drawer.timing(at, message, late=late, slow=slow, slow_late=slow_late)
    return (timeout if timed else None), seconds


def _judge_raised(expected: Any, seen: Any) -> list[Violation]:
    """What is wrong with a ``{"raised": class, "kept": whether its text stayed}``."""
    raised = seen.get("raised") if isinstance(seen, dict) else ""
    if not raised:
        gave = seen.get("gave") if isinstance(seen, dict) else None
        got = "no error" if gave is None else f"the value {gave}"
        return [Violation("MissingError", f"expected {expected['raised']}, got {got}")]
    if raised != expected["raised"]:
        message = f"what was raised came as {raised}, expected {expected['raised']}"
        return [Violation("UnexpectedError", message)]
    if not seen.get("kept"):
        return [Violation("UnclearError", f"{raised} came without the text that was raised")]
    return []


def _nothing() -> bool:
    """Run nothing further."""
    return False


def _fetch(
    model: Model,
    at: int,
    to: int,
    call: str,
    run: Callable[[], bool] = _nothing,
    *,
    typed: bool = False,
    argument: Handle | None = None,
    is_error: bool = False,
) -> None:
    """``rpc.remote`` and ``to_here``; then the RRef is dropped. `run` is what its function does.

    It says whether its future fails. With `is_error` the owner has an error in place of a value.
    The function drops its `argument`, an RRef of `at`'s.

    Raises:
        StepFails: a message is lost.
    """
    handle, there = model.remote(at, to, typed=typed, argument=argument)
    if there is not None:
        model.drop(there)
    if not handle.broken:
        _count(model, to, call)
        handle.rref.unsendable = run() or is_error
    _use_up(model, handle, at)


def _use_up(model: Model, handle: Handle, at: int) -> None:
    try:
        model.value(handle, at)
    finally:
        model.drop(handle)


def _count(model: Model, rank: int, call: str) -> None:
    if call:
        model.calls[rank][call] += 1


def _through(
    model: Model,
    at: int,
    to: int,
    call: str,
    run: Callable[[], bool] = _nothing,
    *,
    by_remote: bool,
) -> Handle:
    """A method through the RRef of a new object, which is dropped: rref_proxy.py: _invoke_rpc.

    Raises:
        StepFails: a message is lost.
    """
    handle, _ = model.remote(at, to, typed=False)
    try:
        model.creations.use(handle)
        ask_type(model, handle, at, "", UNLIMITED_SLACK)
        handle.rref.made = True
        if by_remote:
            made, there = model.remote(at, to, typed=False, argument=handle)
            if there is not None:
                model.drop(there)
            if not made.broken:
                _count(model, to, call)
                made.rref.unsendable = run()
            _use_up(model, made, at)
        else:
            model.ask(at, to, MessageType.PYTHON_CALL, handle)
            _count(model, to, call)
            if run():
                model.answers.error(at, to, MessageType.PYTHON_CALL)
        return handle
    finally:
        model.drop(handle)


def _ways_to_call(
    cls: type[Raising | Invoke | Recurse | Deferred],
    drawer: StepDrawer,
    rank: int,
    message: MessageType,
) -> list[Way]:
    if message is not MessageType.PYTHON_CALL:
        return []
    return [(cls.op, lambda: cls.draw(drawer, at=rank))]
