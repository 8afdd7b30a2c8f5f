"""In a rank: the handles of RRefs and the contexts of the user's code, and where it made them.

The bookkeeping keeps no handle alive: it has weak references, and text. A note costs about a
microsecond, and each message of a handle costs hundreds (``tests/cluster/test_handles.py``).
"""

from __future__ import annotations

import gc
import sys
import threading
import types
import weakref
from typing import Any, NamedTuple

from rpcprops.cluster import stacks
from rpcprops.cluster._holders import holders_of
from rpcprops.torch_facts import symbols

#: The most handles that are described.
_MOST_HANDLES = 20


class _Origin(NamedTuple):
    """How a handle came to be: by which function, and at which line of the user's code.

    Attributes:
        value: what makes the value of the RRef: the name of the function that was given to
            ``rpc.remote``, such as a class.
    """

    how: str
    file: str = ""
    line: int = 0
    function: str = ""
    value: str = ""

    def text(self) -> str:
        if not self.file:
            return self.how
        return f"{self.how} at {stacks.shown_file(self.file)}:{self.line} in {self.function}"


#: The fields of an `_Origin`. Nearly all handles are gone before anybody asks for one.
_Fields = tuple[str, str, int, str, str]
#: Where each handle that lives was made, by the id of its weak reference, which removes it.
_made: dict[int, tuple[weakref.ref[Any], _Fields]] = {}
#: The same for each context that was made here and not released, by its id.
_contexts: dict[int, _Fields] = {}
#: The handles that this thread has read from a message which is not read to its end.
_reading = threading.local()
_IN_AN_ANSWER: _Fields = ("received in an answer", "", 0, "", "")


def watch() -> None:
    """Begin the bookkeeping in this process."""
    symbols.watch_rrefs(_note, _note_call)
    symbols.watch_contexts(_note_context, _forget_context)


def _note(rref: Any, how: str) -> None:
    ref = weakref.ref(rref, _forget)
    _made[id(ref)] = (ref, _origin(how) if how else _IN_AN_ANSWER)
    if not how:
        _reading.__dict__.setdefault("handles", []).append(id(ref))


def _forget(ref: weakref.ref[Any]) -> None:
    _made.pop(id(ref), None)


def _note_call(function: Any, args: tuple[Any, ...]) -> None:
    """A message was read to its end: the handles in it came with a call of `function`."""
    handles: list[int] = _reading.__dict__.pop("handles", [])
    if not handles or function is None:
        return
    code = getattr(function, "__code__", None)
    if code is not None and stacks.is_theirs(code.co_filename):
        origin = ("received", code.co_filename, code.co_firstlineno, code.co_name, "")
    else:
        # The proxies of an RRef send the name of a method, as the second argument of a function of
        # torch's (``rref_proxy.py: _invoke_rpc``).
        named = args[1] if len(args) > 1 and isinstance(args[1], str) else ""
        name = named or getattr(function, "__name__", "")
        origin = (f"received by a call of {name}", "", 0, "", "")
    for number in handles:
        if number in _made:
            _made[number] = (_made[number][0], origin)


def _note_context(number: int) -> None:
    _contexts[number] = _origin("entered")


def _forget_context(number: int) -> None:
    _contexts.pop(number, None)


def _origin(how: str) -> _Fields:
    """The innermost frame of the user's code."""
    frame: types.FrameType | None = sys._getframe(2)
    value = ""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "remote":
            value = getattr(frame.f_locals.get("func"), "__qualname__", "")
        elif stacks.is_theirs(code.co_filename):
            return (how, code.co_filename, frame.f_lineno, code.co_qualname, value)
        frame = frame.f_back
    return (how, "", 0, "", value)


# What is held, in words.


def held_here() -> list[str]:
    """The handles and contexts that this rank holds, one line each, and one for each holder."""
    gc.collect()
    made = list(_made.values())
    handles = [rref for ref, _ in made if (rref := ref()) is not None]
    origins = [_Origin(*fields) for ref, fields in made if ref() is not None]
    lines: list[str] = []
    holders = holders_of(handles, but={id(handles), id(made)})
    for rref, origin in zip(handles[:_MOST_HANDLES], origins, strict=False):
        lines.append(f"{_kind(rref, origin)}, {_made_by(origin)}")
        lines += [f"    held by {holder}" for holder in holders.get(id(rref), [])[:2]]
    if len(handles) > _MOST_HANDLES:
        lines.append(f"{len(handles) - _MOST_HANDLES} more handles")
    lines += [
        f"a distributed autograd context, {_Origin(*fields).text()}"
        for fields in list(_contexts.values())
    ]
    return lines


def _made_by(origin: _Origin) -> str:
    return origin.text() if origin.how.startswith("received") else f"made by {origin.text()}"


def _kind(rref: Any, origin: _Origin) -> str:
    """What an RRef is to this rank, and the type of its value where that is known here."""
    value = origin.value
    if origin.how == "rpc.RRef":
        # It was made with its value. Asking others for their value might wait.
        value = type(rref.local_value()).__qualname__
    of = f" ({value})" if value else ""
    return f"an RRef to a value of {'its own' if rref.is_owner() else rref.owner_name()}{of}"
