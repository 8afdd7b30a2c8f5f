"""A step that sends a value of some sort, and compares what came with what was sent."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import gc
import math
import os
import re
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.shared import timeout_of
from rpcprops.steps.in_rank.state import note_call, note_slowly
from rpcprops.steps.in_rank.sums import RaisedOnPurposeError

#: Virtual seconds that a slow object takes to be pickled, or to be unpickled.
SLOW_PICKLE_SECONDS = 0.5
#: The longest wait, in virtual seconds, until an RRef knows that its creation failed; and the
#: timeout of a use of it.
UNMADE_SECONDS = 4.0
USE_SECONDS = 2.0
#: Texts of errors of a request to an owner, which come instead of an error of the RRef: a timeout,
#: and an injected failure, whose text Python may not be able to read.
ERRORS_OF_REQUESTS = ("ran for more than", "failed intentionally", "codec can't decode")


class PointValue(NamedTuple):
    """A named tuple."""

    x: int
    y: float


@dataclasses.dataclass
class RecordValue:
    """A dataclass."""

    name: str
    held: Any


class ColourValue(enum.Enum):
    """An enumeration."""

    RED = "red"


class SlotsValue:
    """A class without a ``__dict__``."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlotsValue) and other.held == self.held

    __hash__ = None  # type: ignore[assignment]  # it can be changed


class TextValue(str):
    """A string of another class."""

    __slots__ = ()


class TensorOfSubclass(torch.Tensor):
    """A tensor of another class."""


class ModuleValue(torch.nn.Module):
    """A module with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("seen", torch.tensor(3))


class SlowPickle:
    """Takes some time to be pickled."""

    def __reduce__(self) -> Any:
        time.sleep(SLOW_PICKLE_SECONDS)
        return SlowPickle, ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlowPickle)

    __hash__ = None  # type: ignore[assignment]


class SlowUnpickle(SlowPickle):
    """Takes some time to be unpickled."""

    def __reduce__(self) -> Any:
        return unpickle_slowly, ()


def unpickle_slowly() -> SlowUnpickle:
    """Take some time."""
    time.sleep(SLOW_PICKLE_SECONDS)
    return SlowUnpickle()


class CountedPickle:
    """Counts how often it is pickled and unpickled, as runs of calls that its call names."""

    def __init__(self, call: str = "") -> None:
        self.call = call

    def __reduce__(self) -> Any:
        note_call(f"{self.call}/pickled")
        return unpickle_counted, (self.call,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CountedPickle)

    __hash__ = None  # type: ignore[assignment]


def unpickle_counted(call: str) -> CountedPickle:
    """Count it."""
    note_call(f"{call}/unpickled")
    return CountedPickle(call)


class RaisesWhenPickled:
    """Cannot be pickled: it raises."""

    def __reduce__(self) -> Any:
        raise RaisedOnPurposeError


class RaisesWhenUnpickled:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return raise_while_unpickling, ()


def raise_while_unpickling() -> None:
    """Raise."""
    raise RaisedOnPurposeError


class MissingWhenUnpickled:
    """Can be pickled; unpickling it raises an AttributeError."""

    def __reduce__(self) -> Any:
        return raise_attribute_error, ()


def raise_attribute_error() -> None:
    """Raise what Python raises for a name that a module lacks."""
    message = "RaisedOnPurpose"
    raise AttributeError(message)


def counted_tensor(dtype: torch.dtype) -> torch.Tensor:
    """A small tensor of any dtype: the bytes 0 to 47, or for many small numbers."""
    if dtype is torch.bool:
        return torch.tensor([[True, False, True], [False, False, True]])
    # Made of bytes: torch converts nothing to bcomplex32 on every device.
    if dtype.is_complex and "bcomplex" not in str(dtype):
        real = torch.arange(6.0).reshape(2, 3)
        return torch.complex(real, -real).to(dtype)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.tensor([[0.0, -0.0, 1.5], [math.inf, -math.inf, math.nan]]).to(dtype)
    return torch.arange(48, dtype=torch.uint8).view(dtype)


def of_dtype(name: str) -> Callable[[], torch.Tensor]:
    """What makes a tensor of the dtype with that name."""
    return lambda: counted_tensor(getattr(torch, name))


def quantized_tensor(dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is quantized with one scale."""
    return torch.quantize_per_tensor(torch.tensor([0.0, 0.5, 1.0]), 0.25, 1, dtype)


def compressed_tensor(layout: torch.layout) -> torch.Tensor:
    """A matrix in a compressed sparse layout."""
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    blocks = (1, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    return dense.to_sparse(layout=layout, blocksize=blocks)


def row_quantized_tensor(dtype: torch.dtype) -> torch.Tensor:
    """A matrix that is quantized with a scale for each row."""
    scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
    return torch.quantize_per_channel(torch.ones(2, 4), scales, zeros, 0, dtype)


def packed_tensor(dtype: torch.dtype) -> torch.Tensor:
    """A matrix of which some elements share a byte."""
    scales, zeros = torch.ones(2), torch.zeros(2)
    return torch.quantize_per_channel(torch.arange(8.0).reshape(2, 4), scales, zeros, 0, dtype)


def nested_tensor() -> torch.Tensor:
    """Two vectors of two lengths, in one tensor of layout strided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layout is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)])


def sparse_tensor(indices: list[int], values: list[Any], shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in coordinate format, sparse in its first dimension."""
    return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values), shape)


def tensor_in_loop() -> list[Any]:
    """A list that contains itself, beside a tensor."""
    loop: list[Any] = [torch.tensor([1.0])]
    loop.append(loop)
    return loop


def same_tensor_twice() -> list[torch.Tensor]:
    """One tensor, twice."""
    one = torch.tensor([1.0, 2.0])
    return [one, one]


def two_views_of_one() -> list[torch.Tensor]:
    """Two views of one storage that overlap."""
    base = torch.arange(6.0)
    return [base[:4], base[2:]]


def rref_to_value(value: float) -> Any:
    """An RRef that is owned here."""
    return rpc.RRef(torch.tensor([value], dtype=torch.float64))


def fetched(rref: Any) -> Any:
    """The value of an RRef."""
    return rref.to_here()


def closure_over(rref: Any) -> Any:
    """A function inside another one, which uses an RRef of that one."""

    def fetch() -> Any:
        return rref.to_here()

    return fetch


def local_class_value() -> Any:
    """An object whose class only this function knows."""

    class Local:
        pass

    return Local()


#: What makes a value of each sort.
VALUE_MAKERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "int": lambda: 7,
    "bool": lambda: True,
    "float": lambda: 0.1,
    "float-list": lambda: [math.nan, math.inf, -0.0],
    "complex": lambda: 1.5 - 2.0j,
    "int-lowest": lambda: -(2**63),
    "int-big": lambda: 2**200 + 1,
    "str": lambda: "a\u00e4\u4e2d\U0001f600\0\n",
    "str-empty": str,
    "str-surrogate": lambda: "a\ud800",
    "str-subclass": lambda: TextValue("text"),
    "bytes": lambda: bytes(range(256)),
    "bytes-text": lambda: b"text",
    "bytearray": lambda: bytearray(b"\x00\xff"),
    "list": lambda: [1, [2, [3, []]], "x", None],
    "list-empty": list,
    "list-int": lambda: [1, 2, 3],
    "list-mixed": lambda: [1, 2.0, True],
    "list-loop": tensor_in_loop,
    "tuple": lambda: (1, (2.0, ("x",)), ()),
    "tuple-empty": tuple,
    "dict": lambda: {"b": 1, "a": 2},
    "dict-nested": lambda: {"a": {1: (2, 3)}, (1, 2): [b"x"]},
    "dict-empty": dict,
    "dict-ordered": lambda: collections.OrderedDict([("b", 1), ("a", 2)]),
    "set": lambda: {1, 2, 3},
    "frozenset": lambda: frozenset({"a", 1}),
    "range": lambda: range(2, 9, 3),
    "slice": lambda: slice(1, None, 2),
    "ellipsis": lambda: ...,
    "enum": lambda: ColourValue.RED,
    "namedtuple": lambda: PointValue(1, 2.0),
    "dataclass": lambda: RecordValue("r", [torch.tensor([1.0]), PointValue(1, 2.0)]),
    "slots": lambda: SlotsValue(3),
    "class": lambda: RecordValue,
    "function": lambda: raise_while_unpickling,
    "dtype": lambda: torch.float32,
    "device": lambda: torch.device("cpu"),
    "size": lambda: torch.Size([2, 3]),
    "exception": lambda: ValueError("an error that is a value"),
    **{
        name: of_dtype(name)
        for name in [
            *("float32", "bool", "int64", "float64", "bfloat16", "float16"),
            *("complex64", "complex128", "complex32", "bcomplex32", "uint8", "int8"),
            *("int16", "int32"),
            *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
            *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
            *(f"uint{bits}" for bits in range(1, 8)),
            *(f"int{bits}" for bits in range(1, 8)),
            *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
        ]
    },
    "qint8": lambda: quantized_tensor(torch.qint8),
    "quint8": lambda: quantized_tensor(torch.quint8),
    "qint32": lambda: quantized_tensor(torch.qint32),
    "per-channel": lambda: row_quantized_tensor(torch.qint8),
    "quint4x2": lambda: packed_tensor(torch.quint4x2),
    "quint2x4": lambda: packed_tensor(torch.quint2x4),
    "sparse_coo": lambda: torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse(),
    "sparse_coo-uncoalesced": lambda: sparse_tensor([0, 0], [1.0, 2.0], (3,)),
    "sparse_coo-hybrid": lambda: sparse_tensor([0, 2], [[1.0], [3.0]], (3, 1)),
    "sparse_coo-empty": lambda: torch.zeros(2, 3).to_sparse(),
    "sparse_csr": lambda: compressed_tensor(torch.sparse_csr),
    "sparse_csc": lambda: compressed_tensor(torch.sparse_csc),
    "sparse_bsr": lambda: compressed_tensor(torch.sparse_bsr),
    "sparse_bsc": lambda: compressed_tensor(torch.sparse_bsc),
    "_mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "nested": nested_tensor,
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "zero-size": lambda: torch.empty(0, 3),
    "zero-dim": lambda: torch.tensor(1.5),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "strided-by-3": lambda: torch.arange(12.0)[1::3],
    "channels-last": lambda: (
        torch.arange(8.0).reshape(1, 2, 2, 2).to(memory_format=torch.channels_last)
    ),
    "expanded": lambda: torch.tensor([1.0, 2.0]).expand(3, 2),
    "conjugated": lambda: torch.tensor([1.0 + 2.0j]).conj(),
    "negated": lambda: torch.tensor([1.0 + 2.0j]).conj().imag,
    "small-view": lambda: torch.arange(10_000.0)[5_000:5_003],
    "two-views": two_views_of_one,
    "same-twice": same_tensor_twice,
    "many-tensors": lambda: [torch.full((2,), float(number)) for number in range(50)],
    "requires-grad": lambda: torch.tensor([1.0, 2.0], requires_grad=True),
    "non-leaf": lambda: torch.tensor([1.0, 2.0], requires_grad=True) * 2.0,
    "parameter": lambda: torch.nn.Parameter(torch.tensor([1.0, 2.0])),
    "subclass": lambda: torch.tensor([1.0, 2.0]).as_subclass(TensorOfSubclass),
    "module": ModuleValue,
    "slow": SlowPickle,
    "slow-unpickled": SlowUnpickle,
    "counted": CountedPickle,
    "rref": lambda: rref_to_value(1.0),
    "rref-list": lambda: [rref_to_value(1.0)],
    "rref-dataclass": lambda: RecordValue("r", rref_to_value(1.0)),
    "rref-exception": lambda: RaisedOnPurposeError("held", rref_to_value(1.0)),
    "rref-partial": lambda: functools.partial(fetched, rref_to_value(1.0)),
    "rref-pair": lambda: (rref_to_value(1.0), [rref_to_value(2.0)]),
    "lock": threading.Lock,
    "generator": lambda: (number for number in range(3)),
    "file": lambda: os.fdopen(os.open(os.devnull, os.O_RDONLY)),
    "lambda": lambda: lambda: None,
    "local-class": local_class_value,
    "future": torch.futures.Future,
    "raises-pickled": RaisesWhenPickled,
    "tensor-and-lock": lambda: [torch.tensor([1.0]), threading.Lock()],
    "rref-closure": lambda: closure_over(rref_to_value(1.0)),
    "lock-and-rref": lambda: [threading.Lock(), rref_to_value(1.0)],
    "rref-and-lock": lambda: [rref_to_value(1.0), threading.Lock()],
    "raises-unpickled": RaisesWhenUnpickled,
    "missing-unpickled": MissingWhenUnpickled,
    "large": lambda: torch.arange(2.0**23, dtype=torch.float64),
}

#: What the error says that refuses a sort: a regular expression for its type and its text.
VALUE_REFUSALS: dict[str, str] = {
    "int-big": "Unable to cast Python instance",
    "str-surrogate": "Unable to cast Python instance",
    **dict.fromkeys(
        ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "_mkldnn"),
        "Cannot access storage of",
    ),
    "nested": "NestedTensorImpl doesn't support sizes",
    **dict.fromkeys(("quint4x2", "quint2x4"), "require a storage of at least"),
    "meta": "only supports CPU tensors by default",
    "lock": "cannot pickle '_thread.lock' object",
    "tensor-and-lock": "cannot pickle '_thread.lock' object",
    "lock-and-rref": "cannot pickle '_thread.lock' object",
    "rref-and-lock": "cannot pickle '_thread.lock' object",
    "generator": "cannot pickle 'generator' object",
    # As Python 3.11 says it, and as later ones do.
    "file": "cannot pickle '(_io.)?TextIOWrapper' (object|instances)",
    "lambda": "Can't (get|pickle) local object",
    "rref-closure": "Can't (get|pickle) local object",
    "local-class": "Can't (get|pickle) local object",
    "future": "Can not pickle torch.futures.Future",
    "raises-pickled": "RaisedOnPurposeError",
    "raises-unpickled": "RaisedOnPurposeError",
    "missing-unpickled": "RaisedOnPurpose Default RPC pickler",
}


def carry(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    sort: str,
    way: str,
    timeout: float | None,
    seconds: float,
) -> dict[str, str]:
    """Send a value by a way; how what came differs from it, or the type of what refused it.

    Of some it also says whether a tensor stays that is nobody's any more.
    """
    sent: list[weakref.ref[torch.Tensor]] = []
    shown: dict[str, str] = {}
    try:
        return carry_by(call, world[to], sort, way, timeout_of(timeout), seconds, sent=sent)
    except Exception as error:
        if not is_refusal(sort, error):
            raise
        shown["refused"] = type(error).__name__
    finally:
        gc.collect()
    # The error is gone now, and the frames that it held.
    gc.collect()
    if sent:
        shown["stays"] = "a tensor" if any(tensor() is not None for tensor in sent) else ""
    return shown


def carry_by(
    call: str,
    to: str,
    sort: str,
    way: str,
    timeout: float,
    seconds: float,
    *,
    sent: list[weakref.ref[torch.Tensor]],
) -> dict[str, str]:
    """Send a value by a way, and compare what came; note a tensor in `sent` that must go."""
    how = (call, sort, seconds)
    if way == "own":
        rref: Any = rpc.RRef(new_value(sort, call))
        found: dict[str, str] = rpc.rpc_sync(to, compare_value_there, args=(*how, rref))
        return found
    there = ""
    if way == "result":
        value = rpc.rpc_sync(to, make_value, args=how, timeout=timeout)
    elif way == "remote":
        value = rpc.remote(to, make_value, args=how).to_here()
    elif way == "remote-echo":
        rref = rpc.remote(to, give_value_back, args=(*how, argument(sort, call, sent)))
        if sort == "raises-unpickled":
            return use_unmade(rref)
        there, value = rref.to_here()
    else:
        args = (*how, argument(sort, call, sent))
        if way == "async":
            there, value = rpc.rpc_async(to, give_value_back, args=args, timeout=timeout).wait()
        else:
            there, value = rpc.rpc_sync(to, give_value_back, args=args, timeout=timeout)
    return {"differs": there or value_difference(new_value(sort), value)}


def use_unmade(rref: Any) -> dict[str, str]:
    """The error of an RRef whose owner could not read the call that should make it.

    The documentation of ``rpc.remote`` says that the error is set on the RRef after some time, and
    that uses of the RRef raise from then on. A user is confirmed after that; an owner always is,
    and its future ends.
    """
    ended = rref._get_future().done if rref.is_owner() else rref.confirmed_by_owner
    until = time.monotonic() + UNMADE_SECONDS
    while not ended() and time.monotonic() < until:
        time.sleep(UNMADE_SECONDS / 100)
    if rref.is_owner():
        # While its creation has not ended, a use of it would never end.
        return error_of_creation(rref) if ended() else {"differs": "a creation that has not ended"}
    try:
        rref.to_here(timeout=USE_SECONDS)
    except Exception as error:
        if any(text in str(error) for text in ERRORS_OF_REQUESTS):
            return {"differs": "a request for its value"}
        return {"refused": type(error).__name__}
    return {"differs": "a value"}


def error_of_creation(rref: Any) -> dict[str, str]:
    """The error with which the creation of an RRef has ended."""
    try:
        rref._get_future().wait()
    except UnicodeDecodeError:
        # What the faulty agent raises: an error of torch's whose text Python cannot read.
        return {"refused": RuntimeError.__name__}
    except Exception as error:
        return {"refused": type(error).__name__}
    return {"differs": "a value"}


def new_value(sort: str, call: str = "") -> Any:
    """A new value of a sort, which a call sends if it is named."""
    value = VALUE_MAKERS[sort]()
    if isinstance(value, CountedPickle):
        value.call = call
    return value


def argument(sort: str, call: str, sent: list[weakref.ref[torch.Tensor]]) -> Any:
    """A new value that a call sends; notes its tensor, if it cannot be pickled beside that."""
    value = new_value(sort, call)
    if sort == "tensor-and-lock":
        sent.append(weakref.ref(value[0]))
    return value


def make_value(call: str, sort: str, seconds: float) -> Any:
    """Make a value and return it."""
    note_slowly(call, seconds)
    return new_value(sort, call)


def give_value_back(call: str, sort: str, seconds: float, value: Any) -> tuple[str, Any]:
    """How a value that came differs from what was sent; and the value."""
    note_slowly(call, seconds)
    return value_difference(new_value(sort), value), value


def compare_value_there(call: str, sort: str, seconds: float, rref: Any) -> dict[str, str]:
    """Fetch the value of an RRef, and compare it."""
    note_slowly(call, seconds)
    try:
        return {"differs": value_difference(new_value(sort), rref.to_here())}
    except Exception as error:
        if not is_refusal(sort, error):
            raise
        return {"refused": type(error).__name__}


def is_refusal(sort: str, error: Exception) -> bool:
    """Whether an error says that this sort of value cannot be sent."""
    says = VALUE_REFUSALS.get(sort)
    return says is not None and bool(re.search(says, f"{type(error).__name__}: {error}"))


def value_difference(sent: Any, got: Any) -> str:
    """How two values differ, or "" if they do not."""
    if hasattr(sent, "to_here") and hasattr(got, "to_here"):
        return value_difference(sent.to_here(), got.to_here())
    kinds = [f"{type(value).__module__}.{type(value).__qualname__}" for value in (sent, got)]
    if kinds[0] != kinds[1]:
        return f"type {kinds[1]} instead of {kinds[0]}"
    if isinstance(sent, torch.Tensor):
        return tensor_difference(sent, got)
    if isinstance(sent, (list, tuple)):
        return sequence_difference(sent, got)
    if plain_view(sent) is not None:
        return value_difference(plain_view(sent), plain_view(got))
    # Values without an equality of their own are equal if they are of one class.
    equality: Any = type(sent).__eq__
    return "" if equality is object.__eq__ or sent == got else f"{got!a} instead of {sent!a}"


#: Of what values of some classes consist, as a list or a string.
PLAIN_VIEWS: list[tuple[Any, Callable[[Any], Any]]] = [
    (dict, lambda value: [*value.items()]),
    (torch.nn.Module, lambda value: [*value.state_dict().items()]),
    (RecordValue, lambda value: [*vars(value).items()]),
    ((type, types.FunctionType), lambda value: value.__qualname__),
    (functools.partial, lambda value: [value.func.__qualname__, value()]),
    (BaseException, lambda value: [*value.args]),
    # A NaN differs from itself, -0.0 equals 0.0, and the others have no equality.
    ((float, complex, enum.Enum, torch.dtype), repr),
]


def plain_view(value: Any) -> Any:
    """What a value consists of, as a list or a string; None if ``==`` compares it."""
    views = (view(value) for classes, view in PLAIN_VIEWS if isinstance(value, classes))
    return next(views, None)


def sequence_difference(sent: Sequence[Any], got: Sequence[Any]) -> str:
    """How two lists or tuples differ, where a list may contain itself."""
    if len(sent) != len(got):
        return f"length {len(got)} instead of {len(sent)}"
    for index, (one, other) in enumerate(zip(sent, got, strict=True)):
        if (one is sent) != (other is got):
            return f"[{index}] not the same list"
        if isinstance(one, torch.Tensor) and (one is sent[0]) != (other is got[0]):
            return f"[{index}] not the same tensor"
        differs = "" if one is sent else value_difference(one, other)
        if differs:
            return f"[{index}] {differs}"
    return ""


def tensor_difference(sent: torch.Tensor, got: torch.Tensor) -> str:
    """How two tensors of one class differ; their elements are compared bit by bit."""
    for name in ("dtype", "layout", "device", "requires_grad", "is_quantized"):
        one, other = getattr(sent, name), getattr(got, name)
        if one != other:
            return f"{name} {other} instead of {one}"
    if sent.is_nested:
        return value_difference(list(sent.unbind()), list(got.unbind()))
    if sent.shape != got.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(sent.shape)}"
    if sent.device.type == "meta":
        return ""
    for one, other in zip(dense_parts(sent), dense_parts(got), strict=True):
        if one.shape != other.shape or not torch.equal(element_bytes(one), element_bytes(other)):
            return "other elements"
    return ""


def dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a tensor consists of."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        if tensor.qscheme() == torch.per_tensor_affine:
            scheme = torch.tensor([tensor.q_scale(), float(tensor.q_zero_point())])
            return [tensor.int_repr(), scheme]
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [tensor.int_repr(), *scales, torch.tensor(tensor.q_per_channel_axis())]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense() if tensor.is_mkldnn else tensor]


def element_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor's elements."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    # A single element may have any stride, which view() refuses.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)
