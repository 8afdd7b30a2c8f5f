"""Steps that call in the other ways that torch has, and that use futures and RRefs by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import tensor, timeout_of
from rpcprops.steps.in_rank.state import handle_of, note_call
from rpcprops.steps.in_rank.sums import add, sum_call

#: Seconds after which a callback that did not run counts as one that never will.
CALLBACK_SECONDS = 600.0


def reach(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    named: str,
    how: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    flavour: str,
    timeout: float | None,
    seconds: float,
) -> list[Any]:
    """Let a rank that is named in some way compute a sum; the class of the error if none has it."""
    function, args = sum_call(call, flavour, tensor(left), tensor(right), seconds=seconds)
    send: Any = {"sync": rpc.rpc_sync, "async": rpc.rpc_async, "remote": rpc.remote}[how]
    if named.startswith("no "):
        wrong: Any = {"no name": "nobody", "no id": len(world), "no type": 0.5}[named]
        return [error_of(lambda: send(wrong, function, args=args))]
    target: Any = world[to]
    if named == "id":
        target = to
    elif named == "info":
        target = rpc.get_worker_info(world[to])
    elif named == "myself":
        target = rpc.get_worker_info()
    result = send(target, function, args=args, timeout=timeout_of(timeout))
    if how == "async":
        result = result.wait()
    elif how == "remote":
        result = result.to_here()
    numbers: list[Any] = result.tolist()
    return numbers


def error_of(function: Callable[[], Any]) -> str:
    """The class of the error that a function raises, and "" if it raises none."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return ""


def default(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    seconds: float,
    endless: bool,
    left: tuple[float, ...],
    right: tuple[float, ...],
    sleeps: float,
    how: str,
) -> list[Any]:
    """Call under another default timeout of this rank, or in spite of it without a timeout."""
    # An RRef that is used below is made under the default of the world.
    rref: Any = None
    args = (call, tensor(left), tensor(right), sleeps)
    if how == "fetch":
        rref = rpc.remote(world[to], add, args=args)
    elif how == "proxy":
        rref = rpc.remote(world[to], Tally, args=(call, left[0]))
    before = rpc.get_rpc_timeout()  # type: ignore[attr-defined]
    # The docstrings of rpc_sync, rpc_async and remote name this function.
    rpc._set_rpc_timeout(seconds)  # type: ignore[attr-defined]
    try:
        result = under_default(world[to], how, args, rref, 0.0 if endless else None)
    finally:
        rpc._set_rpc_timeout(before)  # type: ignore[attr-defined]
        del rref
    if how == "async":
        result = result.wait()
    elif how == "remote":
        result = result.to_here()
    numbers: list[Any] = result if how == "proxy" else result.tolist()
    return numbers


def under_default(
    to: str, how: str, args: tuple[Any, ...], rref: Any, timeout: float | None
) -> Any:
    """Send what is sent under the default timeout of the moment, or with a timeout."""
    limit = timeout_of(timeout)
    if how == "fetch":
        return rref.to_here(limit)
    if how == "proxy":
        slow = {"seconds": args[-1]} if args[-1] else {}
        first = call_through(rref, "sync", "add", (2.0,), slow, timeout)
        return [first, call_through(rref, "sync", "add", (2.0,), {}, timeout)]
    send: Any = {"sync": rpc.rpc_sync, "async": rpc.rpc_async, "remote": rpc.remote}[how]
    return send(to, add, args=args, timeout=limit)


def after(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    form: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    raises: bool,
    timeout: float | None,
    seconds: float,
    of: str,
) -> list[Any]:
    """Use the future of a call in some way; its value, and what the callbacks saw.

    An error of the call is raised only if the callbacks ran as they must; otherwise the step shows
    what they saw.
    """
    how: dict[str, Any] = {"raises": raises, "seconds": seconds}
    ask = caller(of, world[to], call, (tensor(left), tensor(right)), how, timeout)
    try:
        return after_use(ask(rpc.rpc_async), form)
    finally:
        if of == "proxy":
            # The future of a proxy is in a cycle with the frames that complete it.
            del ask
            gc.collect()


def after_use(future: Any, form: str) -> list[Any]:
    """Use a future in some way; its value, and what the callbacks saw."""
    seen: list[float] = FORMS[form](future)
    expected = SEEN[form]
    try:
        value: list[Any] = future.wait().tolist()
    except Exception:
        if seen != expected:
            return seen
        raise
    return [*value, *seen]


class Summing:
    """An object whose method computes the sum of a call, or raises."""

    def is_there(self) -> bool:
        """Answer at once."""
        return True

    def total(
        self, call: str, left: torch.Tensor, right: torch.Tensor, how: dict[str, Any]
    ) -> torch.Tensor:
        """Do what a call of a Python function would do."""
        function, args = sum_call(call, "python", left, right, **how)
        found: torch.Tensor = function(*args)
        return found


def caller(
    of: str,
    to: str,
    call: str,
    terms: tuple[torch.Tensor, torch.Tensor],
    how: dict[str, Any],
    timeout: float | None,
) -> Callable[[Any], Any]:
    """What calls a rank by ``rpc_sync`` or ``rpc_async``, whichever it is given.

    Of the kind "proxy" it makes an object there, and calls the method through the RRef.
    """
    limit = timeout_of(timeout)
    if of == "proxy":
        rref: Any = rpc.remote(to, Summing)
        if timeout is not None:
            # From here on the type of its value is known here, so only the call may time out.
            rref.rpc_sync().is_there()

        def by_proxy(send: Any) -> Any:
            is_async = send is rpc.rpc_async
            proxy = rref.rpc_async(limit) if is_async else rref.rpc_sync(limit)
            return proxy.total(call, *terms, how)

        return by_proxy
    function, args = sum_call(call, {"call": "python"}.get(of, of), *terms, **how)
    return lambda send: send(to, function, args=args, timeout=limit)


def note_in(seen: list[float], number: float) -> Callable[[Any], float]:
    """A callback that notes a number, plus one half if its future is not done, and returns it."""

    def callback(future: Any) -> float:
        seen.append(number + (0.0 if future.done() else 0.5))
        return number

    return callback


def one_then(future: Any) -> list[float]:
    """``then``: what the callback noted, and what it returned."""
    seen: list[float] = []
    child = future.then(note_in(seen, 1.0))
    returned = child.wait()
    return [*seen, returned]


def chained_then(future: Any) -> list[float]:
    """Two callbacks in a chain: the second runs after the first and gets what that returned."""
    seen: list[float] = []

    def second(child: Any) -> float:
        seen.append(child.value() + 1.0)
        return 3.0

    last = future.then(note_in(seen, 1.0)).then(second).wait()
    return [*seen, last]


def late_then(future: Any) -> list[float]:
    """A callback for a future that is done runs at once, in this thread."""
    error_of(future.wait)
    threads: list[int] = []
    child = future.then(lambda _: threads.append(threading.get_ident()))
    ran_here = threads == [threading.get_ident()]
    return [float(ran_here), float(child.done())]


def done_callback(future: Any) -> list[float]:
    """``add_done_callback``: what the callback noted."""
    seen: list[float] = []
    ran = threading.Event()
    note = note_in(seen, 1.0)

    def callback(done: Any) -> None:
        note(done)
        ran.set()

    future.add_done_callback(callback)
    ran.wait(CALLBACK_SECONDS)
    return list(seen)


def raising_then(future: Any) -> list[float]:
    """A callback of ``then`` that raises: whether the future of ``then`` tells its error."""

    def callback(_: Any) -> None:
        raise ZeroDivisionError

    try:
        future.then(callback).wait()
    except Exception as error:
        return [float("ZeroDivisionError" in str(error))]
    return []


def raising_callback(future: Any) -> list[float]:
    """A callback of ``add_done_callback`` raises, and the one that was added after it runs too."""

    def callback(_: Any) -> None:
        raise ZeroDivisionError

    future.add_done_callback(callback)
    return done_callback(future)


def waited_twice(future: Any) -> list[float]:
    """A second wait, and ``value()``, give what the first gave, or raise what it raised."""
    try:
        first = future.wait().tolist()
        return [float(first == future.wait().tolist() == future.value().tolist())]
    except Exception as error:
        kind = type(error).__name__
        return [float(error_of(future.wait) == kind == error_of(future.value))]


def result_of_own(future: Any) -> list[float]:
    """A future of one's own that a callback sets, and that another thread waits for."""
    mine: Any = torch.futures.Future()
    seen: list[float] = [float(mine.done())]
    waiter = threading.Thread(target=lambda: seen.append(mine.wait()))
    waiter.start()
    future.add_done_callback(lambda _: mine.set_result(2.0))
    waiter.join(CALLBACK_SECONDS)
    return [*seen, float(mine.done())]


def exception_of_own(future: Any) -> list[float]:
    """A future of one's own that a callback gives an exception, which each wait raises."""
    mine: Any = torch.futures.Future()
    future.add_done_callback(lambda _: mine.set_exception(LookupError("planned")))
    first, again = error_of(mine.wait), error_of(mine.value)
    return [float(first == again == "LookupError"), float(mine.done())]


def result_set_twice(future: Any) -> list[float]:
    """A future cannot be completed twice; it keeps its first value."""
    error_of(future.wait)
    mine: Any = torch.futures.Future()
    mine.set_result(1.0)
    refused = error_of(lambda: mine.set_result(2.0)) != ""
    return [float(refused), mine.wait()]


def exception_set_twice(future: Any) -> list[float]:
    """A future that has an exception takes neither another one nor a result."""
    error_of(future.wait)
    mine: Any = torch.futures.Future()
    mine.set_exception(LookupError("planned"))
    refused = error_of(lambda: mine.set_exception(ValueError("too late")))
    refused = refused and error_of(lambda: mine.set_result(2.0))
    return [float(refused != ""), float(error_of(mine.wait) == "LookupError")]


def exception_set_late(future: Any) -> list[float]:
    """A future that has a result takes no exception; its result, or -1 if it raises."""
    error_of(future.wait)
    mine: Any = torch.futures.Future()
    mine.set_result(1.0)
    refused = error_of(lambda: mine.set_exception(LookupError("too late"))) != ""
    return [float(refused), -1.0 if error_of(mine.wait) else mine.wait()]


FORMS: dict[str, Callable[[Any], list[float]]] = {
    "then": one_then,
    "chain": chained_then,
    "late": late_then,
    "callback": done_callback,
    "then raises": raising_then,
    "callback raises": raising_callback,
    "wait twice": waited_twice,
    "own result": result_of_own,
    "own exception": exception_of_own,
    "set twice": result_set_twice,
    "exception twice": exception_set_twice,
    "exception late": exception_set_late,
}
#: What each form shows, whatever becomes of the call.
SEEN: dict[str, list[float]] = {
    "then": [1.0, 1.0],
    "chain": [1.0, 2.0, 3.0],
    "late": [1.0, 1.0],
    "callback": [1.0],
    "then raises": [1.0],
    "callback raises": [1.0],
    "wait twice": [1.0],
    "own result": [0.0, 2.0, 1.0],
    "own exception": [1.0, 1.0],
    "set twice": [1.0, 1.0],
    "exception twice": [1.0, 1.0],
    "exception late": [1.0, 1.0],
}


def gather(
    call: str,
    world: tuple[str, ...],
    *,
    targets: tuple[int, ...],
    how: str,
    left: tuple[float, ...],
    right: tuple[float, ...],
    breaks: int | None,
    timeout: float | None,
    seconds: float,
    of: str,
) -> list[Any]:
    """Make several calls at once, and gather their values in order."""
    kinds = MIXED if of == "mixed" else (of,)
    calls: list[Callable[[Any], Any]] = []
    try:
        for number, target in enumerate(targets):
            breaks_now = how == "done" and number == breaks
            sleeps = 0.0 if breaks_now else seconds
            form: dict[str, Any] = {"raises": number == breaks, "seconds": sleeps}
            terms = (tensor(left) + number, tensor(right))
            name, kind = f"{call}/{number}", kinds[number % len(kinds)]
            calls.append(caller(kind, world[target], name, terms, form, timeout))
        return gathered(calls, how)
    finally:
        if of in ("proxy", "mixed"):
            # As in after().
            calls.clear()
            gc.collect()


#: The kinds of the calls of a mixed gather, in their order.
MIXED = ("call", "builtin", "proxy", "script")


def gathered(calls: Sequence[Callable[[Any], Any]], how: str) -> list[Any]:
    """The values of calls that are made at once, in their order."""
    if how == "threads":
        return from_threads(calls)
    futures: list[Any] = [ask(rpc.rpc_async) for ask in calls]
    if how == "done":
        return all_done(futures)
    if how == "wait_all":
        return [value.tolist() for value in torch.futures.wait_all(futures)]
    return [future.wait().tolist() for future in torch.futures.collect_all(futures).wait()]


def all_done(futures: Sequence[Any]) -> list[Any]:
    """The values of futures, if all are done once the future of all of them is; else which are."""
    error_of(torch.futures.collect_all([*futures]).wait)
    done = [float(future.done()) for future in futures]
    failed: list[Exception] = []
    values: list[Any] = []
    for future in futures:
        try:
            values.append(future.wait().tolist())
        except Exception as error:
            failed.append(error)
    if not all(done):
        return done
    if failed:
        raise failed[0]
    return values


def from_threads(calls: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """Make each call in a thread of its own, all at once; raise the first error by their order."""
    start = threading.Barrier(len(calls))
    values: list[Any] = [None] * len(calls)
    errors: list[Exception | None] = [None] * len(calls)

    def make(number: int, ask: Callable[[Any], Any]) -> None:
        start.wait()
        try:
            values[number] = ask(rpc.rpc_sync).tolist()
        except Exception as error:
            errors[number] = error

    threads = [
        threading.Thread(target=make, args=(number, ask)) for number, ask in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return values


def ask(call: str, world: tuple[str, ...], *, handle: str, what: str) -> list[Any]:
    """Ask an RRef for something that it knows without a message."""
    rref = handle_of(handle)
    if what == "owner":
        return [rref.owner().id, rref.owner().name]
    if what == "owner_name":
        return [rref.owner_name()]
    if what == "is_owner":
        return [rref.is_owner()]
    if what == "confirmed_by_owner":
        return [rref.confirmed_by_owner()]
    if what == "str":
        return [str(rref).partition("(")[0]]
    return [error_of(REFUSED_ASKS[what](rref))]


#: What an RRef must refuse.
REFUSED_ASKS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "local_value": lambda rref: rref.local_value,
    "backward": lambda rref: rref.backward,
    "pickle": lambda rref: lambda: pickle.dumps(rref),
    "deepcopy": lambda rref: lambda: copy.deepcopy(rref),
    "type_hint": lambda _: lambda: rpc.RRef(0.0, type_hint=float),
}


class Tally:
    """An object of a user's class, which other ranks call through an RRef."""

    def __init__(self, call: str, start: float) -> None:
        note_call(call)
        self.total = start
        #: An attribute of the object, and of no class.
        self.own_add = self.add

    def add(self, number: float, *, times: int = 1, seconds: float = 0.0) -> float:
        """Sleep for `seconds`, add a number some times; the new total."""
        if seconds:
            time.sleep(seconds)
        self.total += number * times
        return self.total

    __call__ = add

    @property
    def adder(self) -> Callable[..., float]:
        """The method ``add``, as a value."""
        return self.add

    @staticmethod
    def treble(number: float, *, seconds: float = 0.0) -> float:
        """Sleep for `seconds`; three times a number."""
        time.sleep(seconds)
        return 3.0 * number

    def add_named(
        self,
        number: float,
        *,
        timeout: int = 1,
        rref: int = 1,
        rpc_api: int = 1,
        func_name: int = 1,
        seconds: float = 0.0,
    ) -> float:
        """As ``add``, as often as the product of these says."""
        return self.add(number, times=timeout * rref * rpc_api * func_name, seconds=seconds)

    #: Methods whose names a proxy has for itself.
    rref = rpc_api = rpc_timeout = add

    def __getattr__(self, name: str) -> Any:
        """The method ``add`` under another name, as a module of torch has its submodules."""
        if name == "late_add":
            return self.add
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)


#: By the form of a step: the method that is called, and the keywords that it is given.
CALLED: dict[str, tuple[str, dict[str, Any]]] = {
    "args": ("add", {}),
    "kwargs": ("add", {"times": 3}),
    "call": ("__call__", {}),
    "property": ("adder", {}),
    "static": ("treble", {}),
    "attribute": ("own_add", {}),
    "getattr": ("late_add", {}),
    **{f"named {name}": (name, {}) for name in ("rref", "rpc_api", "rpc_timeout")},
    **{
        f"keyword {name}": ("add_named", {name: 3})
        for name in ("timeout", "rref", "rpc_api", "func_name")
    },
}


def method(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    how: str,
    form: str,
    start: float,
    timeout: float | None,
    seconds: float,
) -> list[Any]:
    """Make an object at a rank, and call a method of it twice through its RRef."""
    try:
        rref = rpc.remote(world[to], Tally, args=(call, start))
        if form == "missing":
            return [error_of_attribute(rref, how, timeout)]
        name, kwargs = CALLED[form]
        slow = {"seconds": seconds} if seconds else {}
        first = call_through(rref, how, name, (2.0,), {**kwargs, **slow}, timeout)
        return [first, call_through(rref, how, name, (2.0,), kwargs, timeout)]
    finally:
        gc.collect()


def call_through(
    rref: Any,
    how: str,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout: float | None,
) -> Any:
    """Call a method of an RRef's value at its owner, and wait for what it returns."""
    if how == "sync":
        return getattr(rref.rpc_sync(timeout_of(timeout)), name)(*args, **kwargs)
    if how == "async":
        return getattr(rref.rpc_async(timeout_of(timeout)), name)(*args, **kwargs).wait()
    return getattr(rref.remote(), name)(*args, **kwargs).to_here()


def error_of_attribute(rref: Any, how: str, timeout: float | None) -> str:
    """The class of the error for a method that the class lacks; other errors are raised."""
    try:
        call_through(rref, how, "subtract", (1.0,), {}, timeout)
    except AttributeError as error:
        return type(error).__name__
    return ""
