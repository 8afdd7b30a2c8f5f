"""In a rank: what holds an object, in words that a reader of the user's code understands.

``gc.get_referrers`` does not do for handles of RRefs. It sees no dict that holds handles alone:
CPython does not track that, because a handle is not tracked. And it sees nothing that the fork
server made, such as the user's modules, because the server has frozen all that. So this searches
forward: from the user's modules, kept values and running functions, then from the objects that
were made in this rank. The number of objects that it looks at is bounded.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from rpcprops.cluster import _functions, finder, stacks

#: The most objects that a search looks at, and the most holders of one object that it tells.
_MOST_OBJECTS = 300_000
_MOST_HOLDERS = 2
#: How many containers the search follows, such as a dict, an object in it, a list of that.
_MOST_HOPS = 4
#: The most characters of a key.
_MOST_KEY = 40
#: Types that hold one another in any program, and no handle of the user's.
_SKIPPED = (types.CodeType, types.ModuleType, str, bytes, int, float, weakref.ref)


def holders_of(targets: Sequence[Any], but: Container[int]) -> dict[int, list[str]]:
    """What holds each of some objects, in words, by the id of the object.

    Args:
        but: the ids of objects that do not count as holders.
    """
    found: dict[int, list[str]] = {}
    ids = {id(target) for target in targets}
    seen: set[int] = set()
    for label, root in _roots():
        trail: list[tuple[str, Any, int]] = [(label, root, 0)]
        while trail and len(seen) < _MOST_OBJECTS:
            path, holder, hops = trail.pop()
            if id(holder) in seen or id(holder) in but:
                continue
            seen.add(id(holder))
            for step, value in _parts(holder):
                if id(value) in ids:
                    texts = found.setdefault(id(value), [])
                    text = _joined(path, step)
                    if len(texts) < _MOST_HOLDERS and text not in texts:
                        texts.append(text)
                elif hops < _MOST_HOPS and _is_followed(value):
                    trail.append((_joined(path, step), value, hops + 1))
    return found


def _joined(path: str, step: str) -> str:
    """The words that lead to a part of what `path` leads to."""
    if step.startswith("[") and path[-1:].isalnum():
        return f"{path}, item {step}"
    return f"{path}{step}" if path and not path.endswith(": ") else f"{path}{step.lstrip(', ')}"


def _roots() -> Iterator[tuple[str, Any]]:
    """Where a search begins, each with the words for it."""
    for name, module in list(sys.modules.items()):
        if finder.is_user_file(getattr(module, "__file__", None)) and name != "__main__":
            yield f"module {name}: ", module
    for number, value in _functions.kept_values().items():
        yield f"the value {number} that was kept with keep=True: ", [value]
    for frame in sys._current_frames().values():  # noqa: SLF001  (documented in `sys`)
        yield from _variables(frame)
    # What was made in this rank: instances of the user's classes first.
    new = gc.get_objects()
    yield from (("", thing) for thing in new if _is_of_user(thing))
    # A cell or a frame was found with the function that it belongs to.
    for thing in new:
        if isinstance(thing, types.FunctionType | list | tuple | dict | set):
            yield f"a {type(thing).__name__}", thing


def _variables(frame: types.FrameType | None) -> Iterator[tuple[str, Any]]:
    """The variables of the user's functions that a thread runs."""
    while frame is not None:
        code = frame.f_code
        if stacks.is_theirs(code.co_filename):
            place = f"{stacks.shown_file(code.co_filename)}:{frame.f_lineno}"
            yield f"the running {code.co_name} ({place}): ", dict(frame.f_locals)
        frame = frame.f_back


def _is_of_user(thing: Any) -> bool:
    """Whether an object is an instance of a class of the user's."""
    return _is_users_class(type(thing))


def _is_users_class(cls: type) -> bool:
    module = sys.modules.get(str(getattr(cls, "__module__", "")))
    return finder.is_user_file(getattr(module, "__file__", None))


def _is_followed(value: Any) -> bool:
    """Whether a search goes on into a value."""
    if type(value) in _PARTS:
        return not isinstance(value, types.ModuleType)
    if isinstance(value, type):
        return _is_users_class(value)
    return not isinstance(value, _SKIPPED) and (
        isinstance(value, dict | list) or _is_of_user(value)
    )


def _parts(holder: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with the words that lead to it."""
    kind = next((base for base in type(holder).__mro__ if base in _PARTS), None)
    if kind is not None:
        yield from _PARTS[kind](holder)
    if kind is None or _is_of_user(holder):
        yield from _attributes(holder)


def _of_dict(holder: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in list(holder.items()):
        plain = isinstance(key, str | int | float | bool | None)
        text = repr(key) if plain else type(key).__name__
        yield f"[{text if len(text) <= _MOST_KEY else text[:_MOST_KEY] + '…'}]", value


def _of_list(holder: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(holder):
        yield f"[{index}]", value


def _of_set(holder: set[Any]) -> Iterator[tuple[str, Any]]:
    for value in list(holder):
        yield ", part of the set", value


def _of_module(holder: types.ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(holder).items()):
        yield f"{type(value).__name__} '{name}'" if _is_followed(value) else f"'{name}'", value


def _of_function(holder: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=False):
        for _, value in _of_cell(cell):
            yield f", closure variable '{name}'", value
    for value in holder.__defaults__ or ():
        yield ", default argument", value


def _of_cell(holder: types.CellType) -> Iterator[tuple[str, Any]]:
    try:
        yield "", holder.cell_contents
    except ValueError:
        return  # it is empty


def _of_method(holder: types.MethodType) -> Iterator[tuple[str, Any]]:
    yield ", bound object", holder.__self__


#: What objects of these types hold.
_PARTS: dict[type, Callable[[Any], Iterator[tuple[str, Any]]]] = {
    dict: _of_dict,
    list: _of_list,
    tuple: _of_list,
    set: _of_set,
    frozenset: _of_set,
    types.ModuleType: _of_module,
    types.FunctionType: _of_function,
    types.MethodType: _of_method,
    types.CellType: _of_cell,
}


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    found = getattr(holder, "__dict__", None)
    named = dict(found) if isinstance(found, types.MappingProxyType | dict) else {}
    who = holder.__qualname__ if isinstance(holder, type) else type(holder).__qualname__
    for name, value in named.items():
        yield f", attribute '{name}' of {who}", value
    for value in gc.get_referents(holder):
        if value is not found and not any(value is other for other in named.values()):
            yield f", part of {who}", value
