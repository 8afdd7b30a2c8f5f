"""Sends functions and values between the test process and the ranks.

A function that can be imported goes by reference. One that cannot (a closure, a lambda) goes by
value, but uses the live globals of its module in the rank instead of copies of them, so that a
counter in the module exists once. Exceptions carry their traceback as text.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

import cloudpickle

from rpcprops._given import shown
from rpcprops.cluster import _wire, finder, stacks
from rpcprops.errors import RemoteError, RemoteTraceback, UsageError, first_line_of, text_of
from rpcprops.torch_facts import installed

#: Values that stay in this rank, by number (see `KeptValue`).
_kept: dict[int, Any] = {}

#: The user's script: its module name here, and in ranks, where its `if __name__` part must not run.
_MAIN = ("__main__", "__mp_main__")

_PYTEST_OUTCOMES = "_pytest.outcomes"


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.cells: dict[int, _SharedCell] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType) and obj.__module__ in _MAIN:
            main = sys.modules.get("__main__")
            if main is None or not finder.is_user_file(getattr(main, "__file__", None)):
                # A notebook, or python -c: ranks cannot import it, so by value, with its globals.
                return super().reducer_override(obj)
            if _find(main, obj.__qualname__) is obj:
                return _import_member, ("__main__", obj.__qualname__)
        outcomes = sys.modules.get(_PYTEST_OUTCOMES)
        if isinstance(obj, type) and outcomes and _find(outcomes, obj.__qualname__) is obj:
            # Skipped, Failed and Exit name `builtins` as their module, where nobody finds them.
            return _import_member, (_PYTEST_OUTCOMES, obj.__qualname__)
        if isinstance(obj, types.FunctionType):
            module = sys.modules.get(obj.__module__ or "")
            if module is not None and obj.__globals__ is module.__dict__:
                if _find(module, obj.__qualname__) is obj:
                    return NotImplemented  # pickle's own way: by reference
                cells = obj.__closure__ or ()
                # One object for each cell, so that functions that share a variable still share it.
                shared = tuple(self.cells.setdefault(id(cell), _SharedCell(cell)) for cell in cells)
                return _reduce_nested(obj, shared)
        return super().reducer_override(obj)


def _find(module: types.ModuleType, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _import_member(module: str, qualname: str) -> Any:
    found = _find(importlib.import_module(module), qualname)
    if found is None:
        msg = (
            f"the module {module} of a rank has no {qualname}: ranks import the script, and do not "
            f'run what stands under if __name__ == "__main__". Define {qualname} above that line, '
            f"at the top of the script, or in a module of its own."
        )
        raise UsageError(msg)
    return found


class _SharedCell:
    """Becomes a closure cell in the process that unpickles it."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __reduce__(self) -> Any:
        return _make_cell, (), _cell_contents(self.cell), None, None, _fill_cell


def _reduce_nested(function: types.FunctionType, closure: tuple[_SharedCell, ...]) -> Any:
    state = {
        "defaults": function.__defaults__,
        "kwdefaults": function.__kwdefaults__,
        "qualname": function.__qualname__,
        "annotations": function.__annotations__,
        "dict": function.__dict__,
    }
    arguments = (function.__code__, function.__module__, function.__name__, closure)
    return _make_nested, arguments, state, None, None, _fill_nested


def _cell_contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _make_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    # The cell is filled after it was made, because a closure may refer to itself.
    if contents:
        cell.cell_contents = contents[0]


def _make_nested(
    code: types.CodeType, module: str, name: str, closure: tuple[types.CellType, ...]
) -> types.FunctionType:
    namespace = importlib.import_module(module).__dict__
    return types.FunctionType(code, namespace, name, None, closure)


def _fill_nested(function: types.FunctionType, state: dict[str, Any]) -> None:
    function.__defaults__ = state["defaults"]
    function.__kwdefaults__ = state["kwdefaults"]
    function.__qualname__ = state["qualname"]
    function.__annotations__ = state["annotations"]
    function.__dict__.update(state["dict"])


def loads(blob: bytes) -> Any:
    """Read what :func:`dumps` made in a process of ours."""
    return pickle.loads(blob)


#: Signals whose handlers may raise KeyboardInterrupt in the test process.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Unreadable(Exception):
    """A pickle cannot be read here; the cause of this exception says why."""


def _read(blob: bytes) -> Any:
    """As :func:`loads`, for data from a rank: reading it runs user code, which may do anything.

    Raises:
        _Unreadable: reading it raised.
        KeyboardInterrupt: this process was interrupted meanwhile.
    """
    interrupted = False
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _INTERRUPTS}

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        handlers[number](number, frame)

    try:
        # Otherwise a KeyboardInterrupt of that code looks like a Ctrl-C.
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, note)
        return loads(blob)
    except BaseException as error:
        if interrupted:
            raise
        raise _Unreadable from error
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


def load_result(blob: bytes, rank: int) -> Any:
    """What a call in that rank returned.

    Raises:
        UsageError: the value cannot be read in this process.
    """
    try:
        return _read(blob)
    except _Unreadable as problem:
        error = problem.__cause__
        assert error is not None
        msg = (
            f"what rank {rank} returned cannot be read in this process: {type(error).__name__}: "
            f"{text_of(error)}. Return what the test can import and unpickle, or keep the value "
            f"in the rank with keep=True."
        )
        raise UsageError(msg) from error


def dumps(value: Any) -> bytes:
    """`value` for another process. Raises whatever its pickling raises."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _sendable(blob: bytes) -> bytes:
    if len(blob) > _wire.MAX_PAYLOAD:
        msg = f"it takes {len(blob)} bytes, and a message holds {_wire.MAX_PAYLOAD}"
        raise ValueError(msg)
    return blob


def dump_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """A call for a rank.

    Raises:
        UsageError: the function, or an argument, cannot be pickled.
    """
    given: object = fn
    if not callable(given):
        msg = f"a rank can only call a function, got {shown(fn)} (type {type(fn).__name__})."
        raise UsageError(msg)
    try:
        return _sendable(dumps((fn, args, kwargs)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        msg = (
            f"the call of {shown(getattr(fn, '__qualname__', fn))} cannot be sent to a rank: "
            f"{text_of(error)}. "
            f"A function, its closure and its arguments must be picklable by cloudpickle."
        )
        raise UsageError(msg) from error


def run_call(blob: bytes) -> Any:
    """Run in a rank what :func:`dump_call` made; of a coroutine function, run the coroutine."""
    fn, args, kwargs = pickle.loads(blob)
    result = fn(*args, **kwargs)
    if not isinstance(result, types.CoroutineType):
        return result
    import asyncio

    return asyncio.run(result)


def dump_result(value: Any, rank: int) -> tuple[str, bytes]:
    """The result of a call, as the kind and the pickle of an answer."""
    try:
        return "ok", _sendable(dumps(value))
    except BaseException as error:
        if installed().texts.not_picklable in text_of(error):
            msg = (
                f"rank {rank} returned an RRef (or a value that holds one), and an RRef has no "
                f"meaning outside its rank. Fetch its value there, or call with keep=True and pass "
                f"the handle to later calls on that rank."
            )
        else:
            msg = (
                f"rank {rank} returned {type(value).__name__}, which cannot be pickled: "
                f"{text_of(error)}"
            )
        return dump_error(UsageError(msg), rank)


def dump_error(error: BaseException, rank: int) -> tuple[str, bytes]:
    """An exception, as the kind and the pickle of an answer.

    The user's code makes its text and its pickle, and may do anything. If its text cannot be
    made, it is not raised in the test process, where pytest would show it.
    """
    name = type(error).__name__
    said = f"rank {rank} raised {name}"
    text = "".join(traceback.format_tb(error.__traceback__)) + name
    blob = b""
    try:
        said += f": {text_of(error)}"
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(Exception):
            str(error)  # One that exits would end the test process.
        blob = dumps(error)
        pickle.loads(blob)
    except BaseException:
        blob = b""
    return "error", pickle.dumps((blob, said, text, remedies(said, rank)))


def load_error(blob: bytes, rank: int) -> BaseException:
    """The exception of an answer, with the rank's traceback as its cause.

    It is the exception itself, if raising it here has the same meaning as there. An exception
    that would end this process or its event loop (an exit, an interrupt) concerns the rank alone:
    it comes as a :class:`RemoteError` that names it.
    """
    # The exception is a pickle inside the answer: its description survives where it does not.
    pickled, said, text, notes = pickle.loads(blob)
    error: BaseException = RemoteError(said)
    if pickled:
        try:
            found = _read(pickled)
            # A user's __reduce__ may return anything.
            if isinstance(found, BaseException) and _says_the_same_here(found):
                error = found
        except _Unreadable as problem:
            why = problem.__cause__
            assert why is not None
            error.add_note(
                f"rpcprops: the exception itself cannot be read here: {type(why).__name__}: "
                f"{text_of(why)}"
            )
    if isinstance(error, UsageError) and "Traceback" not in text:
        return error  # ours: it was made where the call ended, and its text says all
    error.__cause__ = RemoteTraceback(rank, _without_text_of(error, stacks.short_traceback(text)))
    for note in notes:
        error.add_note(note)
    return error


def _without_text_of(error: BaseException, text: str) -> str:
    """A traceback that ends in `error`, without all but the first line of the text of `error`.

    The error itself is shown next to it. Where it came from a third rank, its text is long.
    """
    lines = stacks.without_ours(text_of(error).strip().splitlines())
    rest = "\n".join(lines[1:]).rstrip()
    short = text.rstrip()
    return short.removesuffix(rest).rstrip() if rest and short.endswith(rest) else text


def said_of(error: BaseException) -> str:
    """The type and the first line of an exception that came from a rank."""
    if isinstance(error, RemoteError):
        return first_line_of(error)
    return f"{type(error).__name__}: {first_line_of(error)}"


def _says_the_same_here(error: BaseException) -> bool:
    """Whether an exception that a rank raised may be raised in the test process."""
    # If this is an exception of pytest's, pytest is imported already. Do not import it here.
    pytest_outcomes: Any = sys.modules.get(_PYTEST_OUTCOMES)
    if pytest_outcomes is not None:
        if isinstance(error, pytest_outcomes.Exit):
            return False
        if isinstance(error, pytest_outcomes.OutcomeException):
            # pytest.fail, skip and xfail concern the test, wherever they are called.
            return True
    return isinstance(error, Exception)


def remedies(text: str, rank: int) -> list[str]:
    """What to do about an error of this rank whose cause is the way in which ranks run."""
    unsendable = ("Can't pickle", "Can't get local object", "not found as", "Can't get attribute")
    if any(part in text for part in unsendable) or "No module named" in text:
        return [
            "rpcprops: torch's RPC sends a function as its module and name, so the target of "
            "rpc_sync, rpc_async or remote must be a plain function at the top of a module that "
            f"ranks can import (seen in rank {rank}; entry functions may be closures)."
        ]
    if f"rank {rank} raised BdbQuit" in text:
        return [f"rpcprops: {_no_debugger(f'pdb in rank {rank}')}"]
    if _has_own_network and any(part in text for part in _UNREACHED):
        return [
            "rpcprops: the ranks of a world have a network of their own, with loopback alone. Code "
            "that talks to a service of the machine, or to others, needs network='host' "
            "(rpc_cluster(..., network='host') or --rpc-network=host)."
        ]
    if not _has_own_network and _PORT_TAKEN in text.lower():
        return [
            "rpcprops: the ranks are in the network of the machine, where another program or world "
            "uses this port. Give each world a network of its own (network='private' "
            "says why this machine cannot), run one world at a time, or choose a free port."
        ]
    return []


def _no_debugger(where: str) -> str:
    return (
        f"{where}: a rank has no terminal for a debugger, and is killed at the deadline of its "
        f"call. Let it print what you want to see (--hypothesis-profile=rpcprops-debug with -s "
        f"shows what ranks write), or call the function in the test process, where breakpoint() "
        f"works."
    )


def _refuse_breakpoint(*_: Any, **__: Any) -> None:
    """The ``sys.breakpointhook`` of a rank."""
    frame = sys._getframe(1)
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    raise UsageError(_no_debugger(f"breakpoint() in rank {_this_rank} at {place}"))


class KeptValue:
    """Stands for a value that stays in a rank; in that rank it turns back into the value."""

    def __init__(self, rank: int, number: int) -> None:
        self.rank = rank
        self.number = number

    def __reduce__(self) -> Any:
        return _kept_value, (self.rank, self.number)

    def __repr__(self) -> str:
        return f"<value {self.number} kept in rank {self.rank}>"


_this_rank = -1
_has_own_network = False
#: What the kernel says when a network cannot reach the address that it was asked for.
_UNREACHED = (
    *("Network is unreachable", "Connection refused", "No route to host"),
    *("Temporary failure in name resolution", "Name or service not known"),
)
#: What the kernel says of a port that is open already.
_PORT_TAKEN = "address already in use"


def enter_rank(rank: int, *, own_network: bool) -> None:
    """Called once in a rank, so that kept values of other ranks are refused.

    Args:
        own_network: whether the world has a network of its own; errors then mention it.
    """
    global _this_rank, _has_own_network
    _this_rank, _has_own_network = rank, own_network
    # Where the user has chosen a hook, or none (PYTHONBREAKPOINT=0), that is used.
    if sys.breakpointhook is sys.__breakpointhook__ and "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _refuse_breakpoint


def keep(number: int, value: Any) -> None:
    """Keep a value in this rank."""
    _kept[number] = value


def kept_values() -> dict[int, Any]:
    """The values that are kept in this rank, by number."""
    return dict(_kept)


def release(number: int) -> None:
    """Let go of a kept value."""
    _kept.pop(number, None)


def release_all() -> None:
    """Let go of all kept values."""
    _kept.clear()


def _kept_value(rank: int, number: int) -> Any:
    if rank != _this_rank:
        msg = (
            f"a value kept in rank {rank} was passed to rank {_this_rank}; pass it where it lives."
        )
        raise UsageError(msg)
    if number not in _kept:
        msg = f"the value kept in rank {rank} was released before."
        raise UsageError(msg)
    return _kept[number]
