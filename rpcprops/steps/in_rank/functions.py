"""Steps about what is called: what it raises, what it is, on whom it calls, when it answers."""

from __future__ import annotations

import functools
import math
import operator
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor, timeout_of
from rpcprops.steps.in_rank.state import hold_gil, note_call, note_slowly
from rpcprops.steps.in_rank.sums import RaisedOnPurposeError, add, called_by_script, torchscript

#: Every text that is raised begins with it. By it the caller knows an error that a function raised
#: from one of torch's: an error of torch's does not contain it.
MARK = "raised on purpose"
#: The same for names of classes.
MARK_OF_NAMES = "RaisedOnPurpose"


class CodeRaisedOnPurposeError(Exception):
    """An exception whose constructor takes more than a text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class HoldingRaisedOnPurposeError(Exception):
    """An exception that holds something."""

    def __init__(self, text: str, held: Any = None) -> None:
        super().__init__(text)
        self.held = held


class UnprintableRaisedOnPurposeError(Exception):
    """An exception whose repr raises."""

    def __repr__(self) -> str:
        """Raise the same text."""
        raise RaisedOnPurposeError(*self.args)


#: The kinds of exception that are made of a text alone.
OF_TEXT: dict[str, type[BaseException]] = {
    "own": RaisedOnPurposeError,
    "cause": RaisedOnPurposeError,
    "value": ValueError,
    "type": TypeError,
    "unicode": UnicodeError,
    "key": KeyError,
    "stop": StopIteration,
    "unprintable": UnprintableRaisedOnPurposeError,
    "keyboard": KeyboardInterrupt,
    "exit": SystemExit,
    "close": GeneratorExit,
}


def exception_of(kind: str, text: str, held: Any = None) -> BaseException:
    """An exception of some kind, with a text; one kind holds what is given."""
    if kind in OF_TEXT:
        return OF_TEXT[kind](text)
    made: dict[str, Callable[[], BaseException]] = {
        "empty": RaisedOnPurposeError,
        "file": lambda: FileNotFoundError(2, text),
        "code": lambda: CodeRaisedOnPurposeError(text, 3),
        "decode": lambda: UnicodeDecodeError("utf-8", b"?", 0, 1, text),
        "rref": lambda: HoldingRaisedOnPurposeError(text, held),
        "group": lambda: ExceptionGroup(text, [ValueError(MARK)]),
        "local": lambda: local_exception(text),
    }
    return made[kind]()


def local_exception(text: str) -> Exception:
    """An exception of a class that nobody can import, so it cannot be pickled."""

    class LocalRaisedOnPurposeError(Exception):
        pass

    return LocalRaisedOnPurposeError(text)


def text_that_stays(kind: str, text: str) -> str:
    """What the text of the error must contain at the caller."""
    if kind == "key":
        # The text of a KeyError is the repr of what it was given, and torch gives it a whole text.
        return MARK
    if kind == "empty":
        return "RaisedOnPurposeError"
    if kind == "local":
        return "LocalRaisedOnPurposeError"
    return text


def raise_there(call: str, kind: str, text: str, seconds: float, held: Any = None) -> None:
    """Sleep, and raise an exception of some kind, which no variable holds.

    A variable would hold it together with its own frame: nobody frees that but the collector.
    """
    note_slowly(call, seconds)
    if kind == "cause":
        raise exception_of(kind, text) from ValueError(f"{MARK}: the cause")
    raise exception_of(kind, text, held)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def raise_at_once(call: str, kind: str, text: str, seconds: float, held: Any = None) -> None:
    """Raise instead of returning a future."""
    raise_there(call, kind, text, seconds, held)


def raised_by(send: Callable[[], Any], kept: Callable[[str], bool]) -> dict[str, Any] | Any:
    """What a call gives, or the class of what its function raised, and whether its text stayed.

    An error that is no function's is raised.
    """
    try:
        return send()
    except BaseException as error:
        text = str(error)
        if MARK not in text and MARK_OF_NAMES not in text:
            raise
        # The frames hold RRefs, which would stay alive.
        traceback.clear_frames(error.__traceback__)
        return {"raised": type(error).__name__, "kept": kept(text)}


def raising(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    kind: str,
    text: str,
    more: int,
    how: str,
    timeout: float | None,
    seconds: float,
) -> dict[str, Any]:
    """Let a function at another rank, or a callback here, raise; what reached this rank."""
    text = MARK + text + "." * more
    held = [rpc.RRef(tensor([1.0]))] if kind == "rref" else []
    args = (call, kind, text, seconds, *held)
    limit = timeout_of(timeout)

    def send() -> Any:
        if how == "sync":
            return rpc.rpc_sync(world[to], raise_there, args=args, timeout=limit)
        if how == "async":
            return rpc.rpc_async(world[to], raise_there, args=args, timeout=limit).wait()
        if how == "remote":
            return rpc.remote(world[to], raise_there, args=args).to_here()
        if how == "deferred":
            return rpc.rpc_sync(world[to], raise_at_once, args=args, timeout=limit)
        future: Any = rpc.rpc_async(world[to], note_slowly, args=(call, seconds), timeout=limit)

        def raise_in_callback(done: Any) -> None:
            raise exception_of(kind, text, *held)

        return future.then(raise_in_callback).wait()

    value: dict[str, Any] | None = raised_by(send, lambda seen: text_that_stays(kind, text) in seen)
    return value if isinstance(value, dict) else {"raised": "", "kept": False}


class Adder:
    """An object that travels, with callables of every sort; `more` may say how long they sleep."""

    def __init__(self, call: str) -> None:
        self.call = call

    def __call__(self, left: torch.Tensor, right: torch.Tensor, **more: Any) -> torch.Tensor:
        """Add."""
        return add(self.call, left, right, **more)

    def method(self, left: torch.Tensor, right: torch.Tensor, **more: Any) -> torch.Tensor:
        """Add."""
        return add(self.call, left, right, **more)

    @staticmethod
    def static(call: str, left: torch.Tensor, right: torch.Tensor, **more: Any) -> torch.Tensor:
        """Add."""
        return add(call, left, right, **more)

    @classmethod
    def of_class(
        cls, call: str, left: torch.Tensor, right: torch.Tensor, **more: Any
    ) -> torch.Tensor:
        """Add."""
        return cls.static(call, left, right, **more)


class Summed:
    """An object that adds when it is made."""

    def __init__(self, call: str, left: torch.Tensor, right: torch.Tensor, **more: Any) -> None:
        self.value = add(call, left, right, **more)

    def tolist(self) -> list[float]:
        """The sum."""
        value: list[float] = self.value.tolist()
        return value


def add_all(
    call: str,
    *terms: torch.Tensor,
    factor: float = 1.0,
    seconds: float = 0.0,
    **more: torch.Tensor,
) -> Any:
    """Add any number of terms, with and without names, and multiply by a factor; then sleep."""
    note_slowly(call, seconds)
    return factor * sum((*terms, *more.values()))


def add_each(call: str, left: torch.Tensor, right: torch.Tensor) -> Iterator[torch.Tensor]:
    """Add element by element; nobody asks for the first, so this does not begin."""
    note_call(call)
    yield from left + right


class AddModule(torch.nn.Module):
    """A module that adds."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add."""
        return left + right


#: Its methods are those of TorchScript.
add_module = torchscript(AddModule())


def scripted_module() -> Any:
    """The scripted module of this rank."""
    return add_module


nameless_add = lambda call, left, right: add(call, left, right)  # noqa: E731, PLW0108


def callable_of(
    call: str, form: str, left: tuple[float, ...], right: tuple[float, ...]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A callable of some form, and its arguments."""
    terms = (tensor(left), tensor(right))

    def local_add(call: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return add(call, left, right)

    if form == "operator":
        return operator.add, (left, right), {}
    if form == "math":
        return math.fsum, (left,), {}
    if form == "keywords":
        return add_all, (call,), {"left": terms[0], "right": terms[1], "factor": 2.0}
    if form == "bound":
        return functools.partial(add, call, terms[0]), terms[1:], {}
    of_object = {"method": Adder(call).method, "object": Adder(call)}
    if form in of_object:
        return of_object[form], terms, {}
    function = {
        "function": add,
        "variadic": add_all,
        "static": Adder.static,
        "class": Adder.of_class,
        "constructor": Summed,
        "generator": add_each,
        "lambda": nameless_add,
        "local": local_add,
        "script": add_module.forward,
    }[form]
    return function, (call, *terms), {}


#: What cannot be pickled as a result, or cannot be pickled itself; the last can be called by proxy.
REFUSED = ("generator", "lambda", "local", "script")


def invoke(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    form: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    how: str,
    timeout: float | None,
    seconds: float,
) -> list[float] | bool:
    """Call a callable of some form at another rank; True if it was refused, as it must be."""
    refused = form in REFUSED and how != "proxy"
    slow = {"seconds": seconds} if seconds else {}
    try:
        if how == "proxy":
            result = invoked_by_proxy(call, world[to], form, left, right, slow)
        else:
            function, args, kwargs = callable_of(call, form, left, right)
            kwargs |= slow
            limit = timeout_of(timeout)
            result = invoked(world[to], how, function, args, kwargs, limit)
    except Exception as error:
        if not refused or "pickle" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return True
    if refused:
        return False
    if isinstance(result, float):
        return [result]
    return list(result) if isinstance(result, tuple) else list(result.tolist())


def invoked_by_proxy(
    call: str,
    to: str,
    form: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    slow: dict[str, float],
) -> Any:
    """What such a callable of an object at another rank gives, through an RRef."""
    terms = (tensor(left), tensor(right))
    if form == "script":
        return rpc.remote(to, scripted_module).rpc_sync().forward(*terms)
    proxy = rpc.remote(to, Adder, args=(call,)).rpc_sync()
    if form == "method":
        return proxy.method(*terms, **slow)
    return (proxy.static if form == "static" else proxy.of_class)(call, *terms, **slow)


def invoked(
    to: str,
    how: str,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float,
) -> Any:
    """What a function gives that another rank runs."""
    if how == "sync":
        return rpc.rpc_sync(to, function, args=args, kwargs=kwargs, timeout=timeout)
    if how == "async":
        return rpc.rpc_async(to, function, args=args, kwargs=kwargs, timeout=timeout).wait()
    return rpc.remote(to, function, args=args, kwargs=kwargs).to_here()


def recurse(
    call: str,
    world: tuple[str, ...],
    *,
    path: tuple[int, ...],
    seconds: float,
    spins: bool,
    timeout: float | None,
) -> list[int]:
    """Let each rank of the path call the next one, and wait for it; the ranks as they say."""
    hops = [(rank, world[rank]) for rank in path]
    args = (call, hops, seconds, spins)
    first = hops[0][1]
    ranks: list[int] = rpc.rpc_sync(first, call_on, args=args, timeout=timeout_of(timeout))
    return ranks


def call_on(call: str, hops: list[tuple[int, str]], seconds: float, spins: bool) -> list[int]:
    """Call the next rank; the last one waits (virtual seconds), or holds the GIL."""
    note_call(call)
    (here, _), *rest = hops
    if rest:
        found: list[int] = rpc.rpc_sync(rest[0][1], call_on, args=(call, rest, seconds, spins))
        return [here, *found]
    if seconds:
        time.sleep(seconds)
    if spins:
        hold_gil()
    return [here]


class NotAFuture:
    """What a function with `async_execution` must not return."""


def future_of(
    call: str, form: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> Any:
    """Sleep; then a future of a sum, made in some way, or what is none."""
    note_slowly(call, seconds)
    if form == "nothing":
        return NotAFuture()
    if form in ("done", "thread", "exception"):
        future: Any = torch.futures.Future()
        if form == "done":
            future.set_result(left + right)
        elif form == "exception":
            future.set_exception(RaisedOnPurposeError(MARK))
        else:
            threading.Thread(target=complete, args=(future, left + right), daemon=True).start()
        return future
    asked: Any = rpc.rpc_async(then, add, args=(call + "/then", left, right))

    def raise_in_callback(done: Any) -> None:
        raise RaisedOnPurposeError(MARK)

    def ask_again(done: Any) -> Any:
        return rpc.rpc_sync(then, add, args=(call + "/again", done.wait(), right))

    if form == "then":
        return asked.then(lambda done: done.wait() + 1.0)
    if form == "thens":
        return asked.then(lambda done: done.wait() + 1.0).then(lambda done: 2.0 * done.wait())
    if form == "raises":
        return asked.then(raise_in_callback)
    return asked.then(ask_again) if form == "again" else asked


def complete(future: Any, value: torch.Tensor) -> None:
    """Complete a future a little later, from a thread of its own."""
    time.sleep(0.05)
    future.set_result(value)


class Deferring:
    """The decorator is the inner one, as torch's documentation of it says."""

    @staticmethod
    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def static(*args: Any) -> Any:
        """A future of a sum."""
        return future_of(*args)

    @classmethod
    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def of_class(cls, *args: Any) -> Any:
        """A future of a sum."""
        return future_of(*args)

    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def method(self, *args: Any) -> Any:
        """A future of a sum."""
        return future_of(*args)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def deferred_add(*args: Any) -> Any:
    """A future of a sum."""
    return future_of(*args)


def deferred_by_proxy(to: str, of: str, by: str, args: tuple[Any, ...]) -> Any:
    """What such a method of an object at another rank gives, through an RRef."""
    name = {"static_proxy": "static", "class_proxy": "of_class"}.get(of, "method")
    rref: Any = rpc.remote(to, Deferring)
    if by == "async":
        return getattr(rref.rpc_async(), name)(*args).wait()
    if by == "remote":
        return getattr(rref.remote(), name)(*args).to_here()
    return getattr(rref.rpc_sync(), name)(*args)


def deferred(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    then: int,
    form: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    how: str,
    timeout: float | None,
    seconds: float,
) -> list[float] | dict[str, Any]:
    """Call a function with `async_execution`; its value, or what it raised."""
    args = (call, form, world[then], tensor(left), tensor(right), seconds)
    there, limit = world[to], timeout_of(timeout)
    of, _, by = how.rpartition("_") if how.endswith(("async", "remote")) else (how, "", "sync")

    def send() -> Any:
        if "proxy" in of:
            return deferred_by_proxy(there, of, by, args)
        function = {"static": Deferring.static, "class": Deferring.of_class}.get(of, deferred_add)
        return invoked(there, by, function, args, {}, limit)

    def is_kept(text: str) -> bool:
        return MARK in text

    try:
        value = raised_by(send, is_kept)
    except RuntimeError as error:
        # torch names the type of what was returned instead of a future.
        if form != "nothing" or NotAFuture.__name__ not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return {"raised": type(error).__name__, "kept": True}
    if isinstance(value, torch.Tensor):
        numbers: list[float] = value.tolist()
        return numbers
    return value if isinstance(value, dict) else {"raised": "", "kept": False, "gave": repr(value)}


@called_by_script
def note_in_script(call: str, seconds: float) -> None:
    """Count one more run of a call, and sleep."""
    note_slowly(call, seconds)


@torchscript
def noted_add(call: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add, in TorchScript."""
    note_in_script(call, 0.0)
    return left + right


@torchscript
def script_waits(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> torch.Tensor:
    """Sleep, let another rank add, wait for the future, and add once more."""
    note_in_script(call, seconds)
    asked = rpc.rpc_async(then, noted_add, (call + "/then", left, right))
    return asked.wait() + right  # type: ignore[no-any-return]


@torchscript
def script_calls(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> torch.Tensor:
    """Sleep, let another rank add, and add once more."""
    note_in_script(call, seconds)
    return rpc.rpc_sync(then, noted_add, (call + "/then", left, right)) + right  # type: ignore[no-any-return]


@torchscript
def script_fetches(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> torch.Tensor:
    """Sleep, let another rank add and own the sum, fetch that, and add once more."""
    note_in_script(call, seconds)
    rref = rpc.remote(then, noted_add, (call + "/then", left, right))
    # Without an argument, to_here in TorchScript waits for 60 s at most, whatever timeout init_rpc
    # was given; -1 asks for the timeout of init_rpc.
    return rref.to_here(-1.0) + right  # type: ignore[no-any-return]


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
@torchscript
def script_future(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> torch.futures.Future[torch.Tensor]:
    """Sleep, and let another rank add; a future of the sum."""
    note_in_script(call, seconds)
    return rpc.rpc_async(then, noted_add, (call + "/then", left, right))  # type: ignore[no-any-return]


@torchscript
def add_when_done(asked: torch.futures.Future[torch.Tensor], right: torch.Tensor) -> torch.Tensor:
    """Wait for a future, and add."""
    return asked.wait() + right


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
@torchscript
def script_fork(
    call: str, then: str, left: torch.Tensor, right: torch.Tensor, seconds: float
) -> torch.futures.Future[torch.Tensor]:
    """Sleep, let another rank add, and let a function add once more when that is done."""
    note_in_script(call, seconds)
    asked = rpc.rpc_async(then, noted_add, (call + "/then", left, right))
    more: torch.futures.Future[torch.Tensor] = torch.jit.fork(  # type: ignore[no-untyped-call]
        add_when_done, asked, right
    )
    return more


def scripted(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    then: int,
    form: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    how: str,
    timeout: float | None,
    seconds: float,
) -> list[float]:
    """Call a function in TorchScript, which calls another one."""
    function = {
        "wait": script_waits,
        "sync": script_calls,
        "remote": script_fetches,
        "future": script_future,
        "fork": script_fork,
    }[form]
    args = (call, world[then], tensor(left), tensor(right), seconds)
    value: list[float] = invoked(world[to], how, function, args, {}, timeout_of(timeout)).tolist()
    return value
