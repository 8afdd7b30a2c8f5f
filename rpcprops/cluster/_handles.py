"""In a rank: the handles of RRefs and the contexts that the user's code holds, and what holds them.

The bookkeeping holds no handle: it has weak references, and text. It costs a rank less than a
microsecond for each handle more than torch's own work of tens (measured: see
``tests/cluster/test_handles.py``). The search for what holds a handle runs only when one has leaked.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from rpcprops.cluster import _functions, finder, stacks
from rpcprops.torch_facts import symbols

#: The most handles that are described.
_MOST_HANDLES = 20
#: The most objects that the search for holders looks at.
_MOST_OBJECTS = 300_000
#: The most characters of a name or a key.
_MOST_NAME = 40
#: How many containers the search follows from a handle, such as dict, object, list, module.
_MOST_HOPS = 4
#: Types that hold one another in any program, and no handle of the user's.
_SKIPPED = (types.CodeType, str, bytes, int, float, weakref.ref)


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
    symbols.watch_contexts(_note_context, lambda number: _contexts.pop(number, None))


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
    holders = _holders(handles)
    for rref, origin in zip(handles[:_MOST_HANDLES], origins, strict=False):
        lines.append(f"{_kind(rref, origin)}, {_made_by(origin)}")
        lines += [f"    held by {holder}" for holder in holders.get(id(rref), [])[:2]]
    if len(handles) > _MOST_HANDLES:
        lines.append(f"{len(handles) - _MOST_HANDLES} more handles")
    # One that a user has entered and never left is gone from here when its rank was asked to
    # release it by another.
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


def _holders(targets: list[Any]) -> dict[int, list[str]]:
    """What holds each of some objects, in words, by the id of the object.

    ``gc.get_referrers`` does not do: it sees no dict that holds handles alone (CPython does not
    track it, because a handle is not tracked), and nothing that the server made before it forked
    this rank (it has frozen that).
    """
    found: dict[int, list[str]] = {}
    ids = {id(target) for target in targets}
    budget = itertools.count()
    seen: set[int] = set()
    mine = {id(targets), id(found), id(ids), id(seen), id(_made)}
    for label, root in _roots():
        if id(root) in mine or id(root) in seen:
            continue
        trail: list[tuple[str, Any, int]] = [(label, root, 0)]
        while trail:
            path, holder, hops = trail.pop()
            if next(budget) > _MOST_OBJECTS:
                return found
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for step, value in _parts(holder):
                if id(value) in ids:
                    texts = found.setdefault(id(value), [])
                    text = _joined(path, step)
                    if len(texts) < 2 and text not in texts:
                        texts.append(text)
                elif hops < _MOST_HOPS and _is_followed(value) and id(value) not in mine:
                    trail.append((_joined(path, step), value, hops + 1))
    return found


def _joined(path: str, step: str) -> str:
    """The words that lead to a part of what `path` leads to."""
    if step.startswith("[") and path[-1:].isalnum():
        return f"{path}, item {step}"
    return f"{path}{step}" if path and not path.endswith(": ") else f"{path}{step.lstrip(', ')}"


def _roots() -> Iterator[tuple[str, Any]]:
    """Where the search begins: the user's modules, kept values, running functions, new objects."""
    for name, module in list(sys.modules.items()):
        if finder.is_user_file(getattr(module, "__file__", None)) and name != "__main__":
            yield f"module {name}: ", module
    for number, value in _functions.kept_values().items():
        yield f"the value {number} that was kept with keep=True: ", [value]
    for frame in sys._current_frames().values():
        at: types.FrameType | None = frame
        while at is not None:
            if stacks.is_theirs(at.f_code.co_filename):
                place = f"{stacks.shown_file(at.f_code.co_filename)}:{at.f_lineno}"
                yield f"the running {at.f_code.co_name} ({place}): ", dict(at.f_locals)
            at = at.f_back
    # What the user's code has made in this rank: instances of the user's classes first.
    new = gc.get_objects()
    for thing in new:
        if _is_of_user(thing):
            yield "", thing
    for thing in new:
        # A cell or a frame has been found with the function that it belongs to.
        if isinstance(thing, types.FunctionType | list | tuple | dict | set):
            yield f"a {type(thing).__name__}", thing


def _is_of_user(thing: Any) -> bool:
    module = sys.modules.get(getattr(type(thing), "__module__", "") or "")
    return finder.is_user_file(getattr(module, "__file__", None))


def _is_followed(value: Any) -> bool:
    if isinstance(value, dict | list | tuple | set | frozenset):
        return True
    if isinstance(value, types.FunctionType | types.MethodType | types.CellType):
        return True
    if isinstance(value, type):
        module = sys.modules.get(value.__module__)
        return finder.is_user_file(getattr(module, "__file__", None))
    return not isinstance(value, (*_SKIPPED, types.ModuleType)) and (
        _is_of_user(value) or type(value).__module__ == "collections"
    )


def _parts(holder: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with the words that lead to it."""
    if isinstance(holder, dict):
        for key, value in list(holder.items()):
            yield f"[{_shown(key)}]", value
    elif isinstance(holder, list | tuple):
        for index, value in enumerate(holder):
            yield f"[{index}]", value
    elif isinstance(holder, set | frozenset):
        for value in list(holder):
            yield " (a set)", value
    elif isinstance(holder, types.ModuleType):
        for name, value in list(vars(holder).items()):
            kind = type(value).__name__
            yield f"{kind} '{name}'" if _is_followed(value) else f"'{name}'", value
    elif isinstance(holder, types.FunctionType):
        for name, cell in zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=False):
            yield from ((f", closure variable '{name}'", part) for _, part in _parts(cell))
        for value in holder.__defaults__ or ():
            yield ", default argument", value
    elif isinstance(holder, types.CellType):
        try:
            yield "", holder.cell_contents
        except ValueError:
            return
    elif isinstance(holder, types.MethodType):
        yield ", bound object", holder.__self__
    else:
        yield from _attributes(holder)


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    found = getattr(holder, "__dict__", None)
    named = dict(found) if isinstance(found, types.MappingProxyType | dict) else {}
    for name, value in named.items():
        yield f", attribute '{name}' of {_named(holder)}", value
    for referred in gc.get_referents(holder):
        if referred is not found and not any(referred is value for value in named.values()):
            yield f", part of {_named(holder)}", referred


def _named(holder: Any) -> str:
    return holder.__qualname__ if isinstance(holder, type) else type(holder).__qualname__


def _shown(key: Any) -> str:
    text = repr(key) if isinstance(key, str | int | float | bool | None) else type(key).__name__
    return text if len(text) <= _MOST_NAME else f"{text[: _MOST_NAME - 1]}…"
