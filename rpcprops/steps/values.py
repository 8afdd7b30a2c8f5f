"""A step that sends a value: of many sorts, by each of the ways by which a value travels.

What a sort does is predicted from torch's source. A tensor is not pickled by Python: it goes into a
table (``torch/distributed/rpc/internal.py``: ``_InternalRPCPickler._tensor_reducer``), which
``tensorpipe_utils.cpp``: ``tensorpipeSerialize`` writes by the pickler of TorchScript. That one
(``jit/serialization/pickler.cpp``: ``Pickler::pushLiteralTensor``) writes dtype, sizes and
``requires_grad``. Of subclasses, parameters and modules Python's pickle is used.

``rpc.RRef(value)`` first looks for a type that TorchScript knows (``py_rref.cpp``:
``tryInferTypeWithTypeHint``); a value with such a type is stored and sent by TorchScript.

Torch promises neither the strides of a tensor nor that two views still share their storage, so
both are not checked: ``distributed/rpc/utils.cpp``: ``cloneSparseTensors`` copies a view of a small
part of a large storage. Nor is it checked whether a tensor is a leaf, or a sparse one coalesced:
nothing of that is sent.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rpcprops._given import shown
from rpcprops.errors import UsageError
from rpcprops.faults import MessageType
from rpcprops.outcomes import Counters, Violation
from rpcprops.steps.arguments import check_seconds
from rpcprops.steps.base import OwnerOf, Step, StepFails
from rpcprops.steps.base import Way as Aim

if TYPE_CHECKING:
    from rpcprops.oracle.model import Model
    from rpcprops.oracle.prediction import StepPrediction
    from rpcprops.oracle.rrefs import Handle
    from rpcprops.programs.scope import Scope
    from rpcprops.strategies.drawing import StepDrawer
    from rpcprops.torch_facts import TorchFacts

#: How a value travels, the simplest first. "result": a function returns it. "echo" and "async": it
#: is the argument of a function that returns it, by ``rpc_sync`` or ``rpc_async``. "remote":
#: ``rpc.remote`` makes it and ``to_here`` fetches it. "remote-echo": it is the argument of a
#: function that ``rpc.remote`` runs and that returns it; ``to_here`` fetches it. "own": its owner
#: makes ``rpc.RRef(value)``, and a function that is sent the RRef fetches it.
Way = Literal["result", "echo", "async", "remote", "remote-echo", "own"]
WAYS: tuple[Way, ...] = ("result", "echo", "async", "remote", "remote-echo", "own")
_ECHOES: tuple[Way, ...] = ("echo", "async")
#: The ways of what is refused nobody knows when: a creation that is not sent leaves no RRef, and
#: one that ends with an error leaves one that raises.
_PLAIN: tuple[Way, ...] = ("result", "echo", "async", "remote", "own")


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a sort of value. An error is given by its type, "" means that there is none.

    Attributes:
        argument: the error where it is an argument that its function returns.
        refused_by: what refuses the argument: the pickler of the caller, so that nothing is sent;
            its agent, before it sends; the callee, which reads it before it calls the function; or
            the callee that writes it into the answer.
        result: the error where a function returns it.
        fetched: the error where ``to_here`` fetches it from another rank.
        unmade: the error of a use of the RRef where it is an argument that the owner refuses to
            read, by ``rpc.remote``.
        owned: what holds it in ``rpc.RRef(value)``: TorchScript ("typed"), Python ("object"), or
            nothing, because its type cannot hold this value ("refused").
        ways: the ways by which a program may send it.
        rrefs: how many RRefs it contains.
        large: whether it takes a while of real time to travel. Under a fast clock that is minutes
            or hours, so such a step has no timeout, and is drawn only where nothing else is under
            way, without faults, and where no default timeout is.
        bugs: the known finding that it meets, for each way by which it meets one. It is drawn by
            such a way only for a torch that has mended the finding.
        comes: a regular expression for how it then differs.
        far: whether it meets that only where it goes to another rank, if it goes by an RRef.
        counted: whether the ranks count how often they pickle and unpickle it.
        slow: what takes it :data:`SLOW_SECONDS`, each time.
    """

    argument: str = ""
    refused_by: Literal["pickler", "agent", "reader", "answer"] = "pickler"
    result: str = ""
    fetched: str = ""
    unmade: str = ""
    owned: Literal["typed", "object", "refused"] = "object"
    ways: tuple[Way, ...] = WAYS
    rrefs: int = 0
    large: bool = False
    bugs: Mapping[Way, str] = field(default_factory=dict)
    comes: str = ""
    far: bool = False
    counted: bool = False
    slow: Literal["", "pickled", "unpickled"] = ""


#: A creation whose owner cannot read it; and one that the agent of its own rank refuses.
UNREADABLE = "unreadable-remote"
REFUSED_TO_SELF = "refused-remote-to-self"
#: Tensors that end the process which writes them into a message, or reads them from one.
UNWRITABLE = "unwritable-tensor"
UNREADABLE_TENSOR = "unreadable-tensor"
#: A message that cannot be pickled, with a tensor in a part that was.
KEEPS_TENSORS = "failed-pickle-keeps-tensors"

_TYPED = Fate(owned="typed")
_OBJECT = Fate()


def _guessed(comes: str, *, far: bool = False) -> Fate:
    """``rpc.RRef(value)`` takes it for a value of another type, as which it then comes."""
    return Fate(owned="typed", bugs={"own": "guessed-rref-type"}, comes=f"{comes}$", far=far)


#: An RRef of it cannot be sent, or not always.
_NOT_OWNED = Fate(ways=WAYS[:-1])
#: What holds RRefs is no argument of ``rpc.remote`` here: :class:`Remote` sends RRefs so.
_HOLDING: tuple[Way, ...] = ("result", "echo", "async", "remote")
_RREFS = {number: Fate(ways=_HOLDING, rrefs=number) for number in (1, 2)}
#: Of these ``rpc.RRef`` knows no type of TorchScript's, so it keeps the object. The class of an
#: RRef made by ``rpc.RRef`` could be compiled, and for such a class `tryInferTypeWithTypeHint` does
#: not look further (``py_rref.cpp``; ``torch/_jit_internal.py``: can_compile_class).
_RREF_ANYWHERE = Fate(ways=(*_HOLDING, "own"), rrefs=1)
#: TorchScript's integers have 64 bits, and its strings are UTF-8 (``jit/python/pybind_utils.cpp``:
#: ``toIValue``), so ``rpc.RRef`` raises for values beyond that.
_BEYOND_SCRIPT = Fate(owned="refused")


def _unpicklable(error: str) -> Fate:
    """Python's pickle raises `error`: at the caller for an argument; at the callee for a result.

    The callee answers with the error's text (``request_callback_impl.cpp``: ``serializePyObject``).
    """
    return Fate(error, result="RuntimeError", fetched="RuntimeError")


#: The answer looks for the storages of its tensors (``distributed/rpc/message.h``:
#: ``withStorages``), which these layouts do not have.
_NO_STORAGE = "RuntimeError"
#: ``Pickler::pushLiteralTensor`` knows the layout, so it arrives as an argument.
_ONLY_THERE = Fate(_NO_STORAGE, "answer", result=_NO_STORAGE, fetched=_NO_STORAGE, owned="typed")
#: As an argument ``Pickler::pushLiteralTensor`` refuses it, for it does not know the layout. Torch
#: raises that where nothing catches it (unwritable-tensor).
_NOWHERE = Fate(
    _NO_STORAGE,
    "agent",
    result=_NO_STORAGE,
    fetched=_NO_STORAGE,
    owned="typed",
    ways=_PLAIN,
    bugs=dict.fromkeys(_ECHOES, UNWRITABLE),
)
#: ``Pickler::pushLiteralTensor`` asks it for its sizes, which ``NestedTensorImpl`` refuses. It has
#: a storage, so the answer is written as well (unwritable-tensor).
_NESTED = replace(_NOWHERE, bugs=dict.fromkeys(_PLAIN, UNWRITABLE), far=True)
#: Some elements share a byte, and the tensor that ``Unpickler::readInstruction`` (unpickler.cpp)
#: makes around the storage needs a byte for each, which torch checks. It raises that where nothing
#: catches it (unreadable-tensor).
_PACKED = replace(_NESTED, refused_by="reader", bugs=dict.fromkeys(_PLAIN, UNREADABLE_TENSOR))

#: The dtypes of torch by what :data:`SORTS` says of them; tests compare the list with torch's own.
#: The pickler writes the name of a dtype, and the unpickler knows each that ScalarType.h lists
#: (``jit/serialization/pickler.cpp``: ``Pickler::pushStorageOfTensor``; ``unpickler.cpp``:
#: ``Unpickler::readGlobal``; ``core/ScalarType.h``: AT_FORALL_SCALAR_TYPES_WITH_COMPLEX_AND_QINTS).
#: Of `bcomplex32`, which torch calls experimental, nothing else is used, not even a conversion.
DTYPES: tuple[str, ...] = (
    "float32",
    "bool",
    "int64",
    "float64",
    "bfloat16",
    "float16",
    "complex64",
    "complex128",
    "complex32",
    "bcomplex32",
    "uint8",
    "int8",
    "int16",
    "int32",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    *(f"uint{bits}" for bits in range(1, 8)),
    *(f"int{bits}" for bits in range(1, 8)),
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bits16",
)
QUANTIZED: tuple[str, ...] = ("qint8", "quint8", "qint32")
#: Those of which two elements or four share a byte.
PACKED: tuple[str, ...] = ("quint4x2", "quint2x4")
#: What is not sent, and why.
LEFT_OUT: Mapping[str, str] = {
    "jagged": (
        "the first nested tensor of that layout in a process imports modules for seconds; it is a "
        "Python class, which Python pickles as the sort 'subclass'"
    ),
}

#: What becomes of each sort, the simplest first. ``steps/in_rank/values.py`` makes the values.
SORTS: Mapping[str, Fate] = {
    "none": _TYPED,
    "int": _TYPED,
    "bool": _TYPED,
    "float": _TYPED,
    "float-list": _TYPED,
    "complex": _TYPED,
    "int-lowest": _TYPED,
    "int-big": _BEYOND_SCRIPT,
    "str": _TYPED,
    "str-empty": _TYPED,
    "str-surrogate": _BEYOND_SCRIPT,
    "str-subclass": _OBJECT,
    # An RRef of bytes that are no UTF-8 cannot be fetched.
    "bytes": _NOT_OWNED,
    "bytes-text": _guessed("type builtins.str instead of builtins.bytes"),
    "bytearray": _OBJECT,
    "list": _OBJECT,
    "list-empty": _OBJECT,
    "list-int": _TYPED,
    "list-mixed": _OBJECT,
    # RRef(loop) never ends: jit::tryToInferType follows the list into itself.
    "list-loop": _NOT_OWNED,
    # An RRef of a tuple cannot be sent: the type in its fork cannot be read.
    "tuple": _NOT_OWNED,
    "tuple-empty": _NOT_OWNED,
    "dict": _TYPED,
    "dict-nested": _OBJECT,
    "dict-empty": _OBJECT,
    "dict-ordered": _guessed("type builtins.dict instead of collections.OrderedDict"),
    "set": _OBJECT,
    "frozenset": _OBJECT,
    "range": _OBJECT,
    "slice": _OBJECT,
    "ellipsis": _OBJECT,
    # An RRef of a member of an enumeration cannot be sent: the receiver does not know its type.
    "enum": _NOT_OWNED,
    "namedtuple": _NOT_OWNED,
    "dataclass": _OBJECT,
    "slots": _OBJECT,
    "class": _OBJECT,
    "function": _OBJECT,
    "dtype": _guessed("type builtins.int instead of torch.dtype"),
    "device": _TYPED,
    "size": _NOT_OWNED,
    "exception": _OBJECT,
    **dict.fromkeys((*DTYPES, *QUANTIZED), _TYPED),
    "per-channel": _TYPED,
    **dict.fromkeys(PACKED, _PACKED),
    "sparse_coo": _TYPED,
    "sparse_coo-uncoalesced": _TYPED,
    "sparse_coo-hybrid": _TYPED,
    "sparse_coo-empty": _TYPED,
    "sparse_csr": _ONLY_THERE,
    "sparse_csc": _NOWHERE,
    "sparse_bsr": _NOWHERE,
    "sparse_bsc": _NOWHERE,
    "_mkldnn": _NOWHERE,
    "nested": _NESTED,
    # tensorpipe_agent.cpp: getDevicesForTensors, which TensorPipeAgent::send calls first.
    "meta": Fate(
        "RuntimeError",
        "agent",
        "RuntimeError",
        "RuntimeError",
        owned="typed",
        bugs={"remote-echo": REFUSED_TO_SELF},
    ),
    "zero-size": _TYPED,
    "zero-dim": _TYPED,
    "transposed": _TYPED,
    "strided-by-3": _TYPED,
    "channels-last": _TYPED,
    "expanded": _TYPED,
    "conjugated": _TYPED,
    "negated": _TYPED,
    "small-view": _TYPED,
    "two-views": _TYPED,
    # Python's pickle keeps two names of one object; TorchScript makes two tensors.
    "same-twice": _NOT_OWNED,
    "many-tensors": _TYPED,
    "requires-grad": _TYPED,
    "non-leaf": _TYPED,
    "parameter": _guessed("type torch.Tensor instead of torch.nn.parameter.Parameter", far=True),
    "subclass": _OBJECT,
    "module": _OBJECT,
    "slow": Fate(slow="pickled"),
    "slow-unpickled": Fate(slow="unpickled"),
    # internal.py: serialize pickles what a message carries once, and deserialize reads it once.
    "counted": Fate(counted=True),
    "rref": _RREF_ANYWHERE,
    # RRef(a list of RRefs) ends the process that uses it: jit::tryToInferType compiles the class
    # rpc.RRef, and jit::toPyObject makes objects of that class around nothing. From then on the
    # process takes each rpc.RRef for one of these (`tryInferTypeWithTypeHint`).
    "rref-list": _RREFS[1],
    "rref-dataclass": _RREF_ANYWHERE,
    "rref-exception": _RREF_ANYWHERE,
    "rref-partial": _RREF_ANYWHERE,
    "rref-pair": _RREFS[2],
    "lock": _unpicklable("TypeError"),
    "generator": _unpicklable("TypeError"),
    "file": _unpicklable("TypeError"),
    "lambda": _unpicklable("AttributeError"),
    "local-class": _unpicklable("AttributeError"),
    # torch/futures: Future cannot be pickled.
    "future": _unpicklable("RuntimeError"),
    "raises-pickled": _unpicklable("RaisedOnPurposeError"),
    # internal.py: serialize says that it cleans up its table of tensors.
    "tensor-and-lock": replace(
        _unpicklable("TypeError"),
        bugs=dict.fromkeys((*_ECHOES, "remote-echo"), KEEPS_TENSORS),
        comes="a tensor of it stays",
    ),
    # Python pickles a function by its name, before it looks at what the function closes over; and
    # the items of a list in order (pickle.py: save_global, _batch_appends). So nobody forks these.
    "rref-closure": _unpicklable("AttributeError"),
    "lock-and-rref": _unpicklable("TypeError"),
    "rref-and-lock": replace(
        _unpicklable("TypeError"),
        ways=_HOLDING,
        rrefs=1,
        bugs=dict.fromkeys(_HOLDING, "unpicklable-after-rref"),
    ),
    # As an argument it is read before the function is called (request_callback_no_python.cpp:
    # RequestCallbackNoPython::processMessage); as a result in a thread that keeps the error's text
    # (python_functions.cpp: toPyJitFuture); by to_here in the thread of the caller.
    "raises-unpickled": Fate(
        "RuntimeError",
        "reader",
        "RuntimeError",
        "RaisedOnPurposeError",
        "RuntimeError",
        bugs={"remote-echo": UNREADABLE},
    ),
    # internal.py: deserialize makes it the error that _run_function raises. As a result such an
    # error comes as if it were the value.
    "missing-unpickled": Fate(
        "RuntimeError",
        "reader",
        "RuntimeError",
        "AttributeError",
        "AttributeError",
        bugs=dict.fromkeys(("result", "remote", "own"), "attribute-error-as-value"),
        comes="type builtins.AttributeError instead of ",
    ),
    "large": Fate(owned="typed", large=True),
}

#: Virtual seconds that a slow value takes each time, at most twice for one step.
SLOW_SECONDS = 0.5
#: Virtual seconds for which a step waits, at most, for the error of an RRef that is never made, and
#: then for a use of it (``steps/in_rank/values.py``: UNMADE_SECONDS, USE_SECONDS).
UNMADE_SECONDS = 4.0 + 2.0


@dataclass(frozen=True, slots=True, repr=False)
class Carry(Step):
    """Send a value of the sort `sort` (:data:`SORTS`) between `at` and `to`, by `way`.

    The step's value says how what came differs from what was sent ({"differs": ""} if it does
    not), or the type of the error that refused it ({"refused": "TypeError"}), and of one sort what
    stays in memory of what was refused ({"stays": ""} if nothing does). An RRef in the value must
    give its own value where it arrives. How often a value of the sort `counted` is pickled and
    unpickled counts as the calls "stepN/pickled" and "stepN/unpickled". The function at `to` sleeps
    for `seconds` (virtual) before it makes the value, compares it or gives it back. `timeout` is
    that of the call which carries a value without RRefs that is neither counted nor large.
    """

    op: ClassVar[str] = "carry"
    in_thread: ClassVar[bool] = True
    order: ClassVar[float | None] = 30
    often: ClassVar[int] = 2  # because it has a hundred sorts of value
    gives: ClassVar[type] = dict
    at: int
    to: int
    sort: str = "none"
    way: Way = "result"
    timeout: float | None = None
    seconds: float = 0.0

    def enter(self, scope: Scope) -> None:
        check_seconds(self.seconds)
        if self.sort in LEFT_OUT:
            msg = f"sort={shown(self.sort)} is never sent: {LEFT_OUT[self.sort]}."
            raise UsageError(msg)
        if self.sort not in SORTS:
            msg = f"sort={shown(self.sort)} is no sort of value; use one of {', '.join(SORTS)}."
            raise UsageError(msg)
        if self.way not in SORTS[self.sort].ways:
            listed = " or ".join(map(repr, SORTS[self.sort].ways))
            msg = (
                f"a value of sort={shown(self.sort)} does not travel by way={shown(self.way)}; use "
                f"{listed}."
            )
            raise UsageError(msg)
        if self.timeout is not None and not _may_time_out(SORTS[self.sort], self.way):
            msg = (
                f"a timeout of sort={shown(self.sort)} and way={shown(self.way)} is not modelled; "
                f"use a value without RRefs that is neither counted nor large and ends no process, "
                f"and way={' or '.join(map(repr, _TIMED))}."
            )
            raise UsageError(msg)

    @property
    def sleeps_at(self) -> tuple[int, ...]:
        """Also at the caller, if a thread of it is slow to unpickle the answer.

        ``python_functions.cpp``: ``toPyJitFuture``.
        """
        return (self.to, self.at) if SORTS[self.sort].slow == "unpickled" else (self.to,)

    def waits_at(self, owner_of: OwnerOf) -> Iterable[int]:
        """The function fetches the value through its RRef, or an RRef that is in its argument."""
        holds_rref = SORTS[self.sort].rrefs and self.way in ("echo", "async")
        return (self.to,) if self.way == "own" or holds_rref else ()

    def predict(self, model: Model, call: str) -> StepPrediction:
        before = len(model.sends)
        match self.way:
            case "result":
                refused = self._result(model, call)
            case "echo" | "async":
                refused = self._echo(model, call)
            case "remote":
                refused = self._remote(model, call)
            case "remote-echo":
                refused = self._remote_echo(model, call)
            case "own":
                refused = self._own(model, call)
        fate = self._fate(model)
        if len(model.sends) > before and _may_time_out(fate, self.way):
            # A callee that cannot read its argument answers at once.
            is_called = self.way == "result" or fate.refused_by != "reader"
            surely = self.seconds if is_called else 0.0
            perhaps = self.lasts - self.seconds
            late, slack = model.gives_up(self.at, self.to, call, self.timeout, surely, perhaps)
            if late:
                raise StepFails(late, slack)
        self._meet(model, refused)
        if not refused:
            return model.shows({"differs": ""})
        goes = {"stays": ""} if self._shows_what_stays else {}
        return model.shows({"refused": refused, **goes})

    @property
    def _shows_what_stays(self) -> bool:
        """Whether its caller pickles a tensor, and then something that cannot be pickled."""
        return SORTS[self.sort].bugs.get(self.way) == KEEPS_TENSORS

    def _fate(self, model: Model) -> Fate:
        return fate_of(self.sort, model.facts)

    def _meet(self, model: Model, refused: str) -> None:
        """Note the known finding that the value meets."""
        fate = self._fate(model)
        bug = fate.bugs.get(self.way)
        if bug in (UNREADABLE, REFUSED_TO_SELF):
            # Noted where the creation is refused, if it is sent at all.
            return
        # An owner that fetches its own value refuses nothing.
        is_own = self.at == self.to and self.way in ("remote", "own")
        if bug is None or (fate.argument and not refused) or (fate.far and is_own):
            return
        if bug in (UNWRITABLE, UNREADABLE_TENSOR):
            model.findings.meets_here(bug, self._ends(bug))
        elif fate.rrefs:
            # The rank that pickled it has forked the RRefs before it met what it cannot pickle.
            held = Counters(owners=fate.rrefs, forks=fate.rrefs)
            model.findings.keeps(bug, self.at if self.way in _ECHOES else self.to, held)
        else:
            model.findings.meets_here(bug, self.at, fate.comes)

    def _ends(self, bug: str) -> int:
        """The rank that writes the value, or the one that reads it: the bug ends its process."""
        writes_first = self.way in (*_ECHOES, "own")
        return self.at if writes_first == (bug == UNWRITABLE) else self.to

    def _result(self, model: Model, call: str) -> str:
        model.call(self.at, self.to, MessageType.PYTHON_CALL, call)
        model.calls[self.to][call] += 1
        refused = self._fate(model).result
        if refused and not self._is_misread:
            # The callee cannot write it (request_callback_impl.cpp: serializePyObject), or its
            # agent (message.h: withStorages; tensorpipe_agent.cpp: sendCompletedResponseMessage).
            model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
        made = [] if refused else self._made(model, self.to)
        self._count(model, call, self.to, self.at)
        self._fetch(model, self._given(model, made, self.to, self.at), self.at)
        return refused

    def _echo(self, model: Model, call: str) -> str:
        fate = self._fate(model)
        if fate.argument and fate.refused_by == "pickler":
            return fate.argument
        made = self._made(model, self.at)
        first: Handle | None = made[0] if made else None
        others = made[1:]
        self._count(model, call, self.at, None)
        try:
            there = [model.call(self.at, self.to, MessageType.PYTHON_CALL, call, first)]
        except StepFails:
            for number, lost in enumerate(others):
                # It was forked too, when the call was written (RRefContext::prepareChildFork).
                lost.rref.forks.add(f"lost {call} {number}")
            raise
        if fate.argument and fate.refused_by == "agent":
            # The faulty agent fails a call first (testing/faulty_tensorpipe_agent.cpp:
            # FaultyTensorPipeAgent::send), and TensorPipe's refuses it before it writes.
            del model.sends[-1]
            return fate.argument
        if fate.argument and self.sort != _RAISED_THERE:
            # Its reader raises (request_callback_no_python.cpp: processMessage), or what writes
            # the answer.
            model.answers.error(self.at, self.to, MessageType.PYTHON_CALL)
        there += self._given(model, others, self.at, self.to)
        self._count(model, call, None, self.to)
        if fate.refused_by != "reader":
            model.calls[self.to][call] += 1
        arrived = [handle for handle in there if handle is not None]
        try:
            self._fetch(model, arrived, self.to, drop=False)
        except StepFails:
            for handle in arrived:
                model.drop(handle)
            raise StepFails(error="remote") from None
        back = self._given(model, arrived, self.to, self.at)
        self._count(model, call, self.to, self.at)
        for handle in arrived:
            model.drop(handle)
        self._fetch(model, back, self.at)
        return fate.argument

    def _remote(self, model: Model, call: str) -> str:
        handle, _ = model.remote(self.at, self.to, typed=False)
        try:
            if not handle.broken:
                model.calls[self.to][call] += 1
            # The owner cannot write it into the answer.
            handle.rref.unsendable = bool(self._fate(model).fetched) and not self._is_misread
            model.value(handle, self.at)
            if self.at == self.to:
                # The owner gets the value itself (py_rref.cpp: PyRRef::localValue).
                return ""
            refused = self._fate(model).fetched
            made = [] if refused else self._made(model, self.to)
            self._count(model, call, self.to, self.at)
            self._fetch(model, self._given(model, made, self.to, self.at), self.at)
            return refused
        finally:
            model.drop(handle)

    def _remote_echo(self, model: Model, call: str) -> str:
        fate = self._fate(model)
        if fate.argument and fate.refused_by == "pickler":
            # api.py: remote pickles the arguments before it makes an RRef.
            return fate.argument
        self._count(model, call, self.at, None)
        handle, _ = model.remote(self.at, self.to, typed=False)
        try:
            if fate.argument and fate.refused_by == "agent":
                return self._refused(model, handle)
            if fate.argument and fate.refused_by == "reader":
                return self._unmade(model, handle)
            if not handle.broken:
                model.calls[self.to][call] += 1
                self._count(model, call, None, self.to)
            model.value(handle, self.at)
            if self.at == self.to:
                return ""
            self._count(model, call, self.to, self.at)
            return fate.fetched
        finally:
            model.drop(handle)

    def _refused(self, model: Model, handle: Handle) -> str:
        """The agent refuses to send the creation, so nobody ever has the RRef.

        The faulty agent fails it first (testing/faulty_tensorpipe_agent.cpp:
        FaultyTensorPipeAgent::send), and TensorPipe's refuses it before it writes
        (tensorpipe_agent.cpp: TensorPipeAgent::send). The user that pyRemotePythonUdf
        (python_functions.cpp) has made by then is deleted like any other (rref_impl.cpp:
        UserRRef::tryDel). An owner has been counted as a fork of itself, which nobody takes back.
        """
        if not handle.broken:
            del model.sends[-1]
            handle.rref.forks.clear()
            handle.rref.made = True
            if self.at == self.to:
                model.findings.keeps(REFUSED_TO_SELF, self.at, Counters(owners=1, forks=1))
            return self._fate(model).argument
        model.creations.use(handle)
        return ""

    def _unmade(self, model: Model, handle: Handle) -> str:
        """The owner refuses to read the creation, and the caller uses the RRef after that.

        ``request_callback_no_python.cpp``: ``RequestCallbackNoPython::processMessage`` answers with
        the error. The documentation of ``rpc.remote`` says that errors are set on the RRef, and
        that a use of it raises once they are.
        """
        fate = self._fate(model)
        if self.raises_there:
            # The function that runs in place of the unread one raises (internal.py: _run_function).
            model.value(handle, self.at)
            return fate.unmade
        if not handle.broken:
            model.unreadable(handle)
        elif handle.second and handle.fork:
            # torch marks the first one again, and so this one never.
            model.findings.asks_for_nothing("second-failed-remote", handle)
        return fate.unmade

    def _own(self, model: Model, call: str) -> str:
        fate = self._fate(model)
        if fate.owned == "refused":
            return "RuntimeError"
        handle = model.owned(self.at, typed=fate.owned == "typed")
        handle.rref.unsendable = bool(fate.fetched) and not self._is_misread
        there = model.call(self.at, self.to, MessageType.PYTHON_CALL, call, handle)
        model.calls[self.to][call] += 1
        held = [there] if there else []
        try:
            self._fetch(model, held, self.to, drop=False)
            if self.at != self.to:
                # The owner gets the value itself (py_rref.cpp: PyRRef::localValue).
                self._count(model, call, self.at, self.to)
                held += self._given(model, self._made(model, self.at), self.at, self.to)
                self._fetch(model, held[1:], self.to, drop=False)
        except StepFails:
            raise StepFails(error="remote") from None
        finally:
            for handle in held:
                model.drop(handle)
        return "" if self.at == self.to else fate.fetched

    def _count(self, model: Model, call: str, pickled: int | None, unpickled: int | None) -> None:
        """Count the value where one rank pickles it, and another one unpickles it."""
        if not self._fate(model).counted:
            return
        if pickled is not None:
            model.calls[pickled][f"{call}/pickled"] += 1
        if unpickled is not None:
            model.calls[unpickled][f"{call}/unpickled"] += 1

    def _made(self, model: Model, owner: int) -> list[Handle]:
        """The RRefs that a new value contains, at the rank that makes it."""
        number = self._fate(model).rrefs
        return [model.owned(owner, (1.0,), typed=True) for _ in range(number)]

    def _given(
        self, model: Model, handles: Sequence[Handle], sender: int, receiver: int
    ) -> list[Handle]:
        return [model.give(handle, sender, receiver) for handle in handles]

    def _fetch(
        self, model: Model, handles: Sequence[Handle], at: int, *, drop: bool = True
    ) -> None:
        """Fetch the values of some RRefs, one after the other, and drop the RRefs."""
        try:
            for handle in handles:
                model.value(handle, at)
        finally:
            for handle in handles if drop else ():
                model.drop(handle)

    @property
    def lasts(self) -> float:
        return self.seconds + (2 * SLOW_SECONDS if SORTS[self.sort].slow else 0.0)

    @property
    def in_vain(self) -> float:
        """Virtual seconds for which it waits if torch never sets the error of its RRef."""
        unmade = self.way == "remote-echo" and bool(SORTS[self.sort].unmade)
        return UNMADE_SECONDS if unmade and not self.raises_there else 0.0

    @property
    def raises_there(self) -> bool:
        return self.sort == _RAISED_THERE

    @property
    def _is_misread(self) -> bool:
        """Whether it is whoever gets the value that cannot read it."""
        return self.sort.endswith("-unpickled")

    def judge(self, expected: Any, seen: Any) -> list[Violation]:
        if seen == expected:
            return []
        refused, wanted = seen.get("refused"), expected.get("refused")
        if wanted is None and refused is not None:
            message = f"a value of the sort {self.sort!r} was refused by {refused}"
            return [Violation("UnexpectedError", message)]
        if wanted is not None and refused is None:
            came = f"came with {differs}" if (differs := seen.get("differs")) else "came"
            message = f"a value of the sort {self.sort!r} had to be refused by {wanted}, and {came}"
            return [Violation("MissingError", message)]
        if wanted is not None:
            message = f"the value had to be refused by {wanted}, and was refused by {refused}"
            if wanted == refused:
                message = f"the value was refused, and {seen.get('stays')} of it stays"
                return [Violation("WrongValue", message)]
            return [Violation("UnexpectedError", message)]
        differs = seen.get("differs")
        return [Violation("WrongValue", f"a value of the sort {self.sort!r} came with {differs}")]

    @classmethod
    def draw(
        cls,
        drawer: StepDrawer,
        *,
        at: Sequence[int] = (),
        to: Sequence[int] = (),
        fits: Callable[[Fate, Way], bool] | None = None,
    ) -> Carry:
        """One between these ranks, of a sort and by a way that fit."""
        caller = drawer.pick(at or drawer.ranks)
        target = drawer.pick(to or drawer.peers[caller])
        able = _able(fits, drawer.facts)
        may_be_slow = drawer.may_take(2 * SLOW_SECONDS)
        may_be_large = drawer.may_take_real_time
        place = {"slow": may_be_slow, "large": may_be_large, "in_parallel": drawer.in_parallel}
        weights = _weights(fits, drawer.facts, **place)
        sort = drawer.pick(tuple(weights), tuple(weights.values()))
        ways = able[sort]
        meeting = [way for way in ways if way in SORTS[sort].bugs]
        way: Any = drawer.pick([*ways, *meeting * len(ways)])
        timed = _may_time_out(SORTS[sort], way)
        timeout, seconds = drawer.timing(
            caller,
            MessageType.PYTHON_CALL,
            late=timed,
            slow=not SORTS[sort].slow,
            slow_late=timed and drawer.settles,
        )
        return cls(caller, target, sort, way, timeout if timed else None, seconds)

    def drawn(self, drawer: StepDrawer) -> None:
        fate = SORTS[self.sort]
        drawer.may_keep |= bool(fate.rrefs) and self.way in fate.bugs

    @classmethod
    def ways(cls, drawer: StepDrawer, rank: int, message: MessageType) -> list[Aim]:
        others = drawer.others[rank]
        aim: dict[str, Any]
        match message:
            case MessageType.PYTHON_CALL:
                aim = {"at": (rank,), "fits": _calls}
            case (
                MessageType.PYTHON_REMOTE_CALL
                | MessageType.PYTHON_RREF_FETCH_CALL
                | MessageType.RREF_USER_DELETE
            ) if others:
                aim = {"at": (rank,), "to": others, "fits": _fetches}
            case MessageType.SCRIPT_RREF_FETCH_CALL if others:
                aim = {"at": others, "to": (rank,), "fits": _fetches_by_script}
            case MessageType.RREF_CHILD_ACCEPT if others:
                aim = {"at": (rank,), "to": others, "fits": _gets_rref_back}
            case _:
                return []
        return [(cls.op, lambda: cls.draw(drawer, **aim))]


#: Of so many values that may be large, one is.
_SELDOM = 20
#: Of this a callee makes the error that its function raises (internal.py: _run_function).
_RAISED_THERE = "missing-unpickled"
#: The ways by which one call carries the value.
_TIMED: tuple[Way, ...] = ("result", "echo", "async")


def _may_time_out(fate: Fate, way: Way) -> bool:
    """Whether such a step may have a timeout.

    An RRef in an answer that comes too late was forked, and nobody takes the fork back. Nor does
    anybody unpickle that answer. A value that ends a process of stock torch does so late or early.
    How long a large one travels, by a fast clock, nobody can tell.
    """
    ends_process = fate.bugs.get(way) in (UNWRITABLE, UNREADABLE_TENSOR)
    untimed = fate.rrefs or fate.counted or fate.large or ends_process
    return way in _TIMED and not untimed


def fate_of(sort: str, facts: TorchFacts) -> Fate:
    """What becomes of a sort of value on a torch.

    Before torch checked the storage of packed tensors, they travelled as other quantized ones do.
    """
    is_read = sort in PACKED and facts.is_before(UNREADABLE_TENSOR)
    return SORTS["per-channel" if is_read else sort]


@functools.cache
def _able(
    fits: Callable[[Fate, Way], bool] | None, facts: TorchFacts
) -> Mapping[str, tuple[Way, ...]]:
    """The sorts that are drawn for a torch, with the ways that fit."""
    found: dict[str, tuple[Way, ...]] = {}
    for sort in SORTS:
        fate = fate_of(sort, facts)
        met = {way for way, bug in fate.bugs.items() if facts.has_bug(bug)}
        ways: list[Way] = [
            way
            for way in fate.ways
            # A step is checked without a torch, so by what holds for every one.
            if way in SORTS[sort].ways and way not in met and (fits is None or fits(fate, way))
        ]
        if ways and facts.has_dtype(sort):
            found[sort] = tuple(ways)
    return found


@functools.cache
def _weights(
    fits: Callable[[Fate, Way], bool] | None,
    facts: TorchFacts,
    *,
    slow: bool,
    large: bool,
    in_parallel: bool,
) -> Mapping[str, float]:
    """The sorts that are drawn, and how often each of them is.

    What torch once got wrong comes more often where it has been mended: it is half of all. Of these
    a reason comes not as often as it has sorts, but as the square root of that, so that one with a
    single sort is no rarity. And what is slow comes more often, or whose pickling is counted, above
    all beside other steps. A large one may come at few places, and of all that are drawn it is to
    be one of hundreds.

    Args:
        slow: whether there is time for one that is slow.
        large: whether there is real time for one that is large.
    """
    able = _able(fits, facts)
    sorts = [sort for sort in able if slow or not SORTS[sort].slow]
    sorts = [sort for sort in sorts if large or not SORTS[sort].large]
    reasons: dict[str, tuple[str, ...]] = {}
    for sort in sorts:
        bugs = sorted({SORTS[sort].bugs[way] for way in able[sort] if way in SORTS[sort].bugs})
        if bugs:
            reasons[sort] = tuple(bugs)
    alike = Counter(reasons.values())
    total = sum(map(math.sqrt, alike.values()))
    busy = [sort for sort in sorts if SORTS[sort].slow or SORTS[sort].counted]
    part = len(sorts) / (4 if in_parallel else 16) / max(1, len(busy))
    weights = dict.fromkeys(sorts, 1.0)
    for sort, reason in reasons.items():
        weights[sort] += len(sorts) / total / math.sqrt(alike[reason])
    for sort in busy:
        weights[sort] += part
    for sort in sorts:
        if SORTS[sort].large:
            weights[sort] = len(sorts) / _SELDOM
    return weights


def of_one_call(facts: TorchFacts) -> Sequence[tuple[str, Way]]:
    """The sorts and ways that are drawn for a torch by which one call does it all.

    Nothing is under way when the step has ended, and no RRef has been made.
    """

    def is_simple(fate: Fate, way: Way) -> bool:
        return way in _TIMED and not (fate.rrefs or fate.slow or fate.large)

    return tuple((sort, way) for sort, ways in _able(is_simple, facts).items() for way in ways)


def _fetches(fate: Fate, way: Way) -> bool:
    return way == "remote" or (way == "remote-echo" and not fate.argument)


def _calls(fate: Fate, way: Way) -> bool:
    """Whether such a step sends a PYTHON_CALL."""
    if way in _ECHOES:
        return not fate.argument or fate.refused_by in ("reader", "answer")
    return way == "result" or (way == "own" and fate.owned != "refused")


def _fetches_by_script(fate: Fate, way: Way) -> bool:
    return way == "own" and fate.owned == "typed"


def _gets_rref_back(fate: Fate, way: Way) -> bool:
    return way in _ECHOES and fate.rrefs > 0
