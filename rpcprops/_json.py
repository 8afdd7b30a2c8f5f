"""JSON both ways for the project's data: faults, programs, outcomes and violations."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import msgspec

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import Fault, FaultPlan, fault_class
from rpcprops.outcomes import Outcome
from rpcprops.programs import STEP_TYPES, End, Parallel, Program, Step

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """`value` as what JSON can hold (dicts, lists, strings, numbers, booleans, None)."""
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return _builtins(value)
    return _record_json(value)


def _record_json(value: Any) -> dict[str, Any]:
    if isinstance(value, Program):
        # Most programs end as they always did.
        end = {} if value.end == End() else {"end": _builtins(value.end)}
        return {
            "world_size": value.world_size,
            "name": value.name,
            "settles": value.settles,
            "rpc_timeout": value.rpc_timeout,
            "num_worker_threads": value.num_worker_threads,
            **end,
            "steps": [_step_json(step) for step in value.steps],
        }
    if isinstance(value, Step):
        return _step_json(value)
    data = {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Fault):
        return {"kind": value.kind, **data}
    left_out = _LEFT_OUT.get(type(value), ())
    return {name: one for name, one in data.items() if one or name not in left_out}


#: Fields that are left out where they are empty. Only one agent has a ledger.
_LEFT_OUT: dict[type, tuple[str, ...]] = {
    FaultPlan: ("others",),
    Outcome: ("agent", "messages", "messages_dropped"),
}


def _step_json(step: Step) -> dict[str, Any]:
    if isinstance(step, Parallel):
        branches = [[_step_json(leaf) for leaf in branch] for branch in step.branches]
        return {"op": step.op, "branches": branches}
    return {"op": step.op, **_builtins(step)}


def from_json(data: Any, cls: type[T]) -> T:
    """The `cls` that `data` holds.

    Raises:
        UsageError: `data` does not hold one; the message says where.
    """
    try:
        if cls == Program | None and data is None:
            return cast("T", None)
        if cls in (Program, Program | None):
            return cast("T", Program(**_program_fields(data)))
        return msgspec.convert(data, cls, str_keys=True, dec_hook=_decode)
    except (msgspec.ValidationError, UnicodeEncodeError, RecursionError) as error:
        # JSON can hold half of a surrogate pair, which msgspec cannot encode where it wants a
        # number, and programs that are nested more deeply than Python can follow.
        name = cls.__name__ if isinstance(cls, type) else cls
        msg = f"this is no {name}: {error}"
        raise UsageError(msg) from None


def _program_fields(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
        msg = "Expected an object with a list of `steps`"
        raise msgspec.ValidationError(msg)
    _check_names(data, {item.name for item in fields(Program)})
    if "world_size" not in data:
        msg = "Object missing required field `world_size`"
        raise msgspec.ValidationError(msg)
    return {
        "world_size": _field(data["world_size"], int, "world_size"),
        "steps": tuple(_step(item, f"step {n}") for n, item in enumerate(data["steps"])),
        "name": _field(data.get("name", ""), str, "name"),
        "settles": _field(data.get("settles", True), bool, "settles"),
        "rpc_timeout": _field(data.get("rpc_timeout"), float | None, "rpc_timeout"),
        "num_worker_threads": _field(
            data.get("num_worker_threads"), int | None, "num_worker_threads"
        ),
        "end": _field(data.get("end", {}), End, "end"),
    }


def _step(item: Any, where: str) -> Any:
    cls = STEP_TYPES.get(str(item.get("op"))) if isinstance(item, dict) else None
    if cls is None:
        msg = (
            f"{where}: Unknown step {shown(item)}; its `op` must be one of {', '.join(STEP_TYPES)}"
        )
        raise msgspec.ValidationError(msg)
    try:
        _check_names(item, {"op", *(one.name for one in fields(cls))})
        if cls is Parallel:
            branches = msgspec.convert(item.get("branches"), list[list[Any]])
            return Parallel(tuple(tuple(_step(leaf, "") for leaf in one) for one in branches))
        return msgspec.convert(item, cls)
    except msgspec.ValidationError as error:
        msg = f"{where}, {item['op']}: {error}" if where else f"{item['op']}: {error}"
        raise msgspec.ValidationError(msg) from None


def _check_names(data: Mapping[str, Any], known: Set[str]) -> None:
    unknown = [name for name in data if name not in known]
    if unknown:
        listed = ", ".join(sorted(known))
        msg = f"Object has the unknown field {shown(unknown[0])}; its fields are {listed}"
        raise msgspec.ValidationError(msg)


def _field(value: Any, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        msg = f"{name}: {error}"
        raise msgspec.ValidationError(msg) from None


def _builtins(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=_encode, str_keys=True)


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    msg = f"{type(value).__name__} is not data"
    raise NotImplementedError(msg)


def _decode(cls: type, data: Any) -> Any:
    found = fault_class(data.get("kind")) if cls is Fault and isinstance(data, dict) else None
    if found is None:
        msg = f"Unknown fault {data!r}"
        raise msgspec.ValidationError(msg)
    return msgspec.convert({k: v for k, v in data.items() if k != "kind"}, found)
