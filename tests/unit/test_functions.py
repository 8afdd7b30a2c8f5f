"""Functions, values and exceptions on their way between the test process and the ranks.

Everything here is packed and unpacked in one process: what comes out must do what went in did, and
where the module's globals are concerned it must be the same globals.
"""

from __future__ import annotations

import asyncio
import functools
import pickle
import signal
import sys
import threading
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis.errors import StopTest, UnsatisfiedAssumption

from rpcprops.cluster import _functions, _wire
from rpcprops.cluster._functions import KeptValue
from rpcprops.errors import RemoteError, RemoteTraceback, UsageError

COUNTER = {"calls": 0}
LIMIT = 10


def top(x: int, y: int = 1) -> int:
    """A function that another process can import."""
    COUNTER["calls"] += 1
    return x + y


def bump_limit() -> Callable[[], int]:
    """A nested function that changes a global of this module."""

    def bump() -> int:
        global LIMIT
        LIMIT += 1
        return LIMIT

    return bump


class Adder:
    """A callable object, with methods of each kind."""

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __call__(self, x: int) -> int:
        return x + self.amount

    def add(self, x: int) -> int:
        """A bound method adds."""
        return x + self.amount

    @staticmethod
    def double(x: int) -> int:
        """A static method doubles."""
        return 2 * x

    @classmethod
    def name(cls) -> str:
        """A class method names its class."""
        return cls.__name__


def there(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call gives when it has been sent and is run from what arrived."""
    got, got_args, got_kwargs = _functions.loads(_functions.dump_call(fn, args, kwargs))
    return got(*got_args, **got_kwargs)


def arrived(fn: Any) -> Any:
    """The function that arrives when this one is sent."""
    return _functions.loads(_functions.dumps(fn))


@pytest.fixture(autouse=True)
def _globals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTER, "calls", 0)
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 10)


def test_a_function_that_can_be_imported_goes_by_reference() -> None:
    """A module's function arrives as itself, so that torch's RPC can send it on by its name."""
    assert arrived(top) is top
    assert b"COUNTER" not in _functions.dumps(top)
    assert there(top, 1, y=5) == 6
    assert COUNTER["calls"] == 1


def test_a_closure_shares_its_modules_globals() -> None:
    """A counter in the module is one counter, whether a closure or the module counts."""
    step = 5

    def count() -> int:
        COUNTER["calls"] += step
        return COUNTER["calls"]

    assert arrived(count) is not count
    assert there(count) == 5
    assert there(count) == 10
    assert COUNTER["calls"] == 10
    assert arrived(count).__globals__ is globals()


def test_a_nested_function_may_rebind_a_global() -> None:
    """`global` in a closure rebinds the module's own name."""
    assert there(bump_limit()) == 11
    assert LIMIT == 11


def test_a_recursive_closure_arrives() -> None:
    """A closure that refers to itself by its own cell is no endless pickle."""

    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert there(factorial, 6) == 720


def test_closures_that_call_each_other_arrive() -> None:
    """Two closures that refer to one another keep doing so."""

    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert [there(even, n) for n in range(4)] == [True, False, True, False]


def test_a_closure_over_what_is_not_there_yet() -> None:
    """An empty cell stays empty: it is an error only when it is read."""

    def early() -> Any:
        return late

    function = arrived(early)
    with pytest.raises(NameError):
        function()
    late = 1
    assert there(early) == late


def test_closures_that_share_a_variable_still_share_it() -> None:
    """What one closure does to a variable shows in the others that came with it, and not here."""
    total = 0

    def add(n: int) -> None:
        nonlocal total
        total += n

    def run() -> int:
        add(2)
        add(3)
        return total

    assert there(run) == 5
    assert there(run) == 5  # each call gets the variable as it is here
    assert there(lambda first, second: (first(7), second())[1], add, lambda: total) == 7
    assert total == 0


def test_functions_of_no_module_arrive() -> None:
    """What was made by exec, in a namespace of its own, is sent whole, recursion included."""
    namespace: dict[str, Any] = {"__name__": "nowhere_to_be_found", "offset": 1}
    code = """
def make():
    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)
    def entry(n):
        return factorial(n) + offset
    return entry
"""
    exec(code, namespace)
    assert there(namespace["make"](), 5) == 121


@pytest.mark.parametrize("factor", [2, 3])
def test_a_lambda_arrives(factor: int) -> None:
    """A lambda goes by value, with what it closes over."""
    assert there(lambda x: factor * x, 4) == 4 * factor


def test_defaults_and_keyword_only_parameters_arrive() -> None:
    """Defaults of both kinds, star arguments and attributes of a nested function survive."""

    def nested(a: int, b: int = 2, *rest: int, c: int, d: int = 4, **more: int) -> list[Any]:
        """Nested doc."""
        return [a, b, rest, c, d, more]

    nested.mark = "marked"  # type: ignore[attr-defined]
    again = arrived(nested)
    assert again(1, c=3) == [1, 2, (), 3, 4, {}]
    assert again(1, 5, 6, 7, c=8, d=9, e=10) == [1, 5, (6, 7), 8, 9, {"e": 10}]
    assert (again.mark, again.__doc__) == ("marked", "Nested doc.")
    assert (again.__name__, again.__qualname__) == (nested.__name__, nested.__qualname__)
    assert again.__module__ == __name__
    with pytest.raises(TypeError, match="keyword-only"):
        again(1)


def test_generators_and_coroutines_arrive() -> None:
    """A nested function of any kind is what it was."""

    def numbers(n: int) -> Iterator[int]:
        yield from range(n)

    assert list(there(numbers, 3)) == [0, 1, 2]


def test_a_decorated_function_arrives() -> None:
    """A wrapper made in a test keeps the function that it wraps."""

    def twice(fn: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(fn)
        def wrapper(*args: int) -> int:
            return 2 * fn(*args)

        return wrapper

    assert there(twice(top), 1, 2) == 6
    assert there(twice(lambda x: x + 1), 1) == 4
    assert COUNTER["calls"] == 1


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (Adder(3), 5),
        (Adder(3).add, 5),
        (Adder.double, 4),
        (functools.partial(top, 3), 5),
        (abs, 2),
    ],
)
def test_other_callables_arrive(fn: Callable[[int], int], expected: int) -> None:
    """Objects, methods, partials and builtins can all be called in a rank."""
    assert there(fn, 2) == expected
    assert there(Adder.name) == "Adder"


def test_a_class_made_in_a_test_arrives() -> None:
    """A local class goes by value, with ``super()``, methods that see globals, and its base."""
    offset = 100

    class Base:
        def value(self) -> int:
            return LIMIT + offset

    class Derived(Base):
        def value(self) -> int:
            return super().value() + 1

    assert there(lambda: Derived().value()) == 111
    assert there(Derived().value) == 111


def test_a_function_may_be_an_argument() -> None:
    """Closures travel inside lists and dicts too."""
    base = 7
    value = there(lambda fns: [fn(1) for fn in fns["list"]], {"list": [top, lambda x: x + base]})
    assert value == [2, 8]


MAIN = """
COUNT = 0

def top(x):
    global COUNT
    COUNT += 1
    return x + COUNT

def make():
    def nested(x):
        return top(x) * 10
    return nested
"""


def test_functions_of_a_script_find_the_script_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lives in ``__main__`` is looked up in the other process's ``__main__``, not copied."""
    here, over_there = types.ModuleType("__main__"), types.ModuleType("__main__")
    for module in (here, over_there):
        module.__file__ = __file__  # A script; what has no file goes by value.
        exec(MAIN, module.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", here)
    blobs = [_functions.dumps(here.top), _functions.dumps(here.make())]
    monkeypatch.setitem(sys.modules, "__main__", over_there)
    sent, nested = (_functions.loads(blob) for blob in blobs)
    assert sent is over_there.top
    assert nested(1) == 20
    assert nested(1) == 30
    assert (here.COUNT, over_there.COUNT) == (0, 2)


def test_what_is_no_function_cannot_be_called() -> None:
    """Something that cannot be called is refused with its value and its type."""
    with pytest.raises(UsageError, match=r"can only call a function, got 5 \(type int\)"):
        _functions.dump_call(5, (), {})  # type: ignore[arg-type]


def closure_over_a_lock() -> Callable[[], None]:
    """A closure that cannot be pickled."""
    lock = threading.Lock()

    def hold() -> None:
        lock.acquire()

    return hold


@pytest.mark.parametrize(
    ("fn", "args", "kwargs"),
    [
        (top, (threading.Lock(),), {}),
        (top, (1,), {"y": threading.Lock()}),
        (closure_over_a_lock(), (), {}),
        (top, ([{"deep": (sys._getframe(),)}],), {}),
    ],
)
def test_what_cannot_be_sent_is_refused(fn: Any, args: Any, kwargs: Any) -> None:
    """An argument or a closure that cannot be pickled names the call, the reason and the rule."""
    with pytest.raises(UsageError) as caught:
        _functions.dump_call(fn, args, kwargs)
    message = str(caught.value)
    assert repr(fn.__qualname__) in message
    assert "annot pickle" in message
    assert "must be picklable" in message
    assert caught.value.__cause__ is not None


class LikeAnRRef:
    """Refuses to be pickled in the words of torch's RRef."""

    def __reduce__(self) -> Any:
        msg = "Can not pickle rref in python pickler, rref can only be pickled when using RPC"
        raise RuntimeError(msg)


@pytest.mark.parametrize("value", [LikeAnRRef(), [1, {"a": LikeAnRRef()}]])
def test_an_rref_as_a_result_says_what_to_do(value: Any) -> None:
    """An RRef has no meaning outside its rank: the error names the two ways out."""
    kind, blob = _functions.dump_result(value, 2)
    assert kind == "error"
    error = _functions.load_error(blob, 2)
    assert type(error) is UsageError
    assert "rank 2 returned an RRef" in str(error)
    assert "Fetch its value there" in str(error)
    assert "keep=True" in str(error)


def test_a_result_that_cannot_be_pickled_names_its_type() -> None:
    """Any other result that cannot travel is the caller's to change."""
    kind, blob = _functions.dump_result(threading.Lock(), 1)
    assert kind == "error"
    error = _functions.load_error(blob, 1)
    assert type(error) is UsageError
    assert "rank 1 returned lock, which cannot be pickled" in str(error)


def test_what_no_message_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call or a result of gigabytes is the caller's to change, and is not cut off on its way."""
    monkeypatch.setattr(_wire, "MAX_PAYLOAD", 1000)
    with pytest.raises(UsageError, match=r"'top' cannot be sent .* a message holds 1000"):
        _functions.dump_call(top, (b"x" * 1001,), {})
    kind, blob = _functions.dump_result(b"x" * 1001, 1)
    assert kind == "error"
    assert "a message holds 1000" in str(_functions.load_error(blob, 1))


@pytest.mark.parametrize("value", [None, [1, (2.5, "x")], {"a": b"b"}, top])
def test_a_result_arrives(value: Any) -> None:
    """Data, and functions, come back as they were."""
    kind, blob = _functions.dump_result(value, 0)
    assert kind == "ok"
    assert _functions.loads(blob) == value


def raised(error: BaseException, rank: int = 1) -> BaseException:
    """The exception that the test process raises for one that a rank raised."""
    try:
        raise error
    except BaseException as caught:
        kind, blob = _functions.dump_error(caught, rank)
    assert kind == "error"
    return _functions.load_error(blob, rank)


class OwnError(Exception):
    """A user's exception with a field."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@pytest.mark.parametrize("error", [ValueError("no"), OwnError(3), KeyError("k"), StopIteration(2)])
def test_an_exception_arrives_as_itself(error: BaseException) -> None:
    """Type, arguments and fields survive, and the rank's traceback is the cause."""
    again = raised(error)
    assert type(again) is type(error)
    assert again.args == error.args
    assert getattr(again, "code", None) == getattr(error, "code", None)
    assert isinstance(again.__cause__, RemoteTraceback)
    assert again.__cause__.rank == 1
    assert "test_functions.py" in again.__cause__.text


class OwnBaseError(BaseException):
    """A user's exception that is no Exception."""


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(0),
        SystemExit("words"),
        GeneratorExit(),
        asyncio.CancelledError("cancelled"),
        OwnBaseError("mine"),
        BaseExceptionGroup("several", [KeyboardInterrupt()]),
        pytest.exit.Exception("enough"),
        StopTest(1),
    ],
    ids=repr,
)
def test_what_would_end_this_process_is_named_instead(error: BaseException) -> None:
    """An exit, an interrupt or a cancellation of a rank is an ordinary error here."""
    again = raised(error, 2)
    assert type(again) is RemoteError
    assert str(again).startswith(f"rank 2 raised {type(error).__name__}")
    assert str(error) in str(again)
    assert isinstance(again.__cause__, RemoteTraceback)
    assert "test_functions.py" in again.__cause__.text


@pytest.mark.parametrize(
    "error",
    [
        pytest.fail.Exception("it fails"),
        pytest.skip.Exception("not here"),
        pytest.xfail.Exception("known"),
        unittest.SkipTest("not here"),
        UnsatisfiedAssumption("another example"),
    ],
    ids=repr,
)
def test_what_is_said_of_the_test_is_said_of_it_here(error: BaseException) -> None:
    """pytest.fail, skip, xfail and a false assume mean in a rank what they mean in the test."""
    again = raised(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert isinstance(again.__cause__, RemoteTraceback)
    assert "in raised" in again.__cause__.text
    assert not getattr(again, "__notes__", [])


def test_an_exception_keeps_its_notes_and_its_causes_text() -> None:
    """Notes travel with the exception, and the text shows what it came from."""
    error = ValueError("outer")
    error.add_note("look here")
    error.__cause__ = KeyError("inner")
    again = raised(error)
    assert again.__notes__ == ["look here"]
    assert "KeyError: 'inner'" in str(again.__cause__)


class Unpicklable(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text, threading.Lock())
        self.text = text

    def __str__(self) -> str:
        return self.text


class TwoArguments(Exception):
    """Pickles, and then cannot be made again: the classic mistake."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")


class Mute(Exception):
    """Cannot even say what it is, and cannot be pickled."""

    def __str__(self) -> str:
        msg = "no words"
        raise RuntimeError(msg)

    def __reduce__(self) -> Any:
        raise TypeError


class Disguised(Exception):
    """Turns into something that is no exception."""

    def __reduce__(self) -> Any:
        return str, ("just text",)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Unpicklable("the text"), "rank 1 raised Unpicklable: the text"),
        (TwoArguments("one", "two"), "rank 1 raised TwoArguments: one and two"),
        (Mute(), "rank 1 raised Mute"),
        (Disguised("really"), "rank 1 raised Disguised: really"),
    ],
)
def test_an_exception_that_cannot_travel_has_a_stand_in(error: Exception, said: str) -> None:
    """Its type, its text and the rank's traceback are in the RemoteError that comes instead."""
    again = raised(error)
    assert type(again) is RemoteError
    assert str(again).startswith(said)
    assert isinstance(again.__cause__, RemoteTraceback)
    assert type(error).__name__ in again.__cause__.text


def test_an_exception_that_only_the_rank_knows_has_a_stand_in() -> None:
    """A type that the test process cannot import loses nothing but the type."""
    module = types.ModuleType("only_in_the_rank")
    exec("class RanksOwn(Exception): pass", module.__dict__)
    sys.modules["only_in_the_rank"] = module
    try:
        _, blob = _functions.dump_error(module.RanksOwn("some words"), 3)
    finally:
        del sys.modules["only_in_the_rank"]
    again = _functions.load_error(blob, 3)
    assert type(again) is RemoteError
    assert str(again) == "rank 3 raised RanksOwn: some words"
    assert any("only_in_the_rank" in note for note in again.__notes__)


def test_an_exception_made_in_a_test_arrives() -> None:
    """A local exception class goes by value, and still has its name and its text."""

    class LocalError(Exception):
        pass

    again = raised(LocalError("mine"))
    assert type(again).__name__ == "LocalError"
    assert str(again) == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "Can't pickle <function <lambda> at 0x7f>: attribute lookup <lambda> on tests failed",
        "Can't get local object 'test_it.<locals>.work'",
        "Can't pickle <function f>: it's not found as tests.f",
        "On WorkerInfo(id=1, name=worker1):\nAttributeError(\"Can't get attribute 'f' on m\")",
        "On WorkerInfo(id=1, name=worker1):\nModuleNotFoundError(\"No module named 'mine'\")",
    ],
)
def test_a_function_that_torch_cannot_send_says_what_torch_can(text: str) -> None:
    """torch's own words for a closure as an RPC target get a note with the rule and the rank."""
    (note,) = raised(RuntimeError(text), 2).__notes__
    assert "plain function at the top of a module" in note
    assert "rank 2" in note


def test_an_ordinary_error_gets_no_advice() -> None:
    """Errors of the user's own code are left alone."""
    for text in ("division by zero", "RPC ran for more than set timeout", ""):
        assert not getattr(raised(RuntimeError(text)), "__notes__", [])


@pytest.fixture(name="rank_one")
def _rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_functions, "_this_rank", -1)
    monkeypatch.setattr(_functions, "_kept", {})
    _functions.enter_rank(1, own_network=False)


@pytest.mark.usefixtures("rank_one")
def test_a_kept_value_turns_back_into_the_value_where_it_lives() -> None:
    """In its rank a handle is the very object that was kept, inside other arguments too."""
    value = object()
    _functions.keep(7, value)
    assert arrived(KeptValue(1, 7)) is value
    assert there(lambda x: x["in"][0], {"in": [KeptValue(1, 7)]}) is value


@pytest.mark.usefixtures("rank_one")
def test_a_kept_value_is_refused_elsewhere() -> None:
    """A handle that is passed to another rank says where it lives."""
    blob = pickle.dumps(KeptValue(3, 7))
    with pytest.raises(UsageError, match=r"kept in rank 3 was passed to rank 1"):
        _functions.loads(blob)


@pytest.mark.usefixtures("rank_one")
def test_a_released_value_is_refused() -> None:
    """A handle whose value was let go of says so; releasing twice is no error."""
    _functions.keep(7, "value")
    blob = pickle.dumps(KeptValue(1, 7))
    _functions.release(7)
    _functions.release(7)
    with pytest.raises(UsageError, match="released before"):
        _functions.loads(blob)


def test_a_handle_says_what_it_stands_for() -> None:
    """Printing a handle shows the rank and the number, not an address."""
    assert repr(KeptValue(2, 5)) == "<value 5 kept in rank 2>"


class Reads:
    """Raises what it is given wherever it is read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [LookupError("on purpose"), SystemExit("on purpose"), KeyboardInterrupt("on purpose")]
)
def test_a_result_that_cannot_be_read_names_its_rank(error: BaseException) -> None:
    """Whatever the code of a result raises when it is read is told as the result's fault."""
    blob = _functions.dumps(Reads(error))
    with pytest.raises(UsageError, match=rf"rank 3 .*{type(error).__name__}: on purpose") as caught:
        _functions.load_result(blob, 3)
    assert isinstance(caught.value.__cause__, type(error))


def test_a_real_interrupt_while_a_result_is_read() -> None:
    """A Ctrl-C that comes while a result is read interrupts, and the handler is as before."""
    before = signal.getsignal(signal.SIGINT)
    blob = pickle.dumps(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        _functions.load_result(blob, 3)
    assert signal.getsignal(signal.SIGINT) is before


class Interrupts:
    """Has the process interrupted as it is read."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGINT,)


class Exits(Exception):
    def __str__(self) -> str:
        raise SystemExit


def odd_syntax_error() -> SyntaxError:
    error = SyntaxError("on purpose")
    error.filename, error.lineno, error.offset, error.text = "f", 1, "x", 3  # type: ignore[assignment]
    return error


@pytest.mark.parametrize("error", [Exits(), odd_syntax_error(), Reads(SystemExit())])
def test_what_cannot_be_shown_is_told_by_its_name(error: Any) -> None:
    """An exception that exits when shown, or that no traceback shows, comes as a RemoteError."""
    raised = ValueError("on purpose", error) if isinstance(error, Reads) else error
    kind, blob = _functions.dump_error(raised, 2)
    found = _functions.load_error(blob, 2)
    assert kind == "error"
    assert type(found) is RemoteError
    assert str(found).startswith(f"rank 2 raised {type(raised).__name__}")
