"""The calls and gradients that ranks send each other inside distributed autograd contexts.

Both are types of message that torch's faulty agent neither fails nor delays, so they are no
:class:`Send`. Only a record of all messages shows them.

*Calls.* In a context ``getMessageWithAutograd`` (``autograd/utils.cpp``) wraps a request into a
FORWARD_AUTOGRAD_REQ if one of its tensors requires a gradient, or if `forceGradRecording` says so.
It does for each request of a user: calls and creations of Python functions (``pyRpcPythonUdf`` and
``sendPythonRemoteCall`` in ``rpc/python_functions.cpp``) and of TorchScript functions
(``rpcTorchscript`` in ``rpc/torchscript_functions.cpp``), and fetches (``UserRRef::toHere`` in
``rpc/rref_impl.cpp``; the owner itself fetches without a message). It does not force that for a
builtin operator (``pyRpcBuiltin``, ``pyRemoteBuiltin``), whose request is plain if it requires no
gradient: steps call operators in contexts only with tensors that require one. What torch sends by
itself, such as fork requests and deletes, does not go that way. A function that is called in a
context is in it
(``RequestCallbackNoPython::processForwardAutogradReq`` in ``rpc/request_callback_no_python.cpp``),
so its calls are wrapped as well.

*Gradients.* ``addRecvRpcBackward`` (``autograd/utils.cpp``) gives a request or an answer with a
tensor that requires a gradient one recv function where it arrives. In each backward pass that
reaches it, that function sends one BACKWARD_AUTOGRAD_REQ to the rank that the message came from
(``functions/recvrpc_backward.cpp``: ``RecvRpcBackward::apply``). A pass reaches them all: otherwise
it would not end (``engine/dist_engine.cpp``: ``DistEngine::computeDependencies`` waits for all send
functions). An answer without such a tensor is not wrapped, and gets none.

*Answers.* An answer with such a tensor is a FORWARD_AUTOGRAD_RESP. For any other, and for that of a
creation, ``getMessageWithAutograd`` hands on the answer of the request that was wrapped, because
``processForwardAutogradReq`` does not force it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rpcprops.faults import WireMessageType
from rpcprops.oracle.prediction import WireKind


@dataclass(slots=True)
class ContextMessages:
    """How many such messages go from rank to rank, in all contexts and profilers of a program.

    Attributes:
        sent: how many there are, by sender, receiver and type.
        more: those of which there may be more.
        graded: to how many calls the answer holds a tensor that requires a gradient, by sender and
            receiver of the call.
        more_graded: those of which there may be more or fewer.
    """

    sent: Counter[WireKind] = field(default_factory=Counter)
    more: set[WireKind] = field(default_factory=set)
    graded: Counter[tuple[int, int]] = field(default_factory=Counter)
    more_graded: set[tuple[int, int]] = field(default_factory=set)

    def call(self, at: int, to: int, times: int = 1, *, graded: int) -> None:
        """`at` asks `to` for something in a context, so often.

        Args:
            graded: how many of the answers hold a tensor that requires a gradient.
        """
        self.sent[at, to, WireMessageType.FORWARD_AUTOGRAD_REQ] += times
        self.graded[at, to] += graded

    def profiled(self, at: int, to: int, times: int = 1) -> None:
        """`at` calls `to` inside a profiler, so often.

        ``autograd/utils.cpp``: sendMessageWithAutograd wraps such a call, but no fetch
        (``rref_impl.cpp``: UserRRef::toHere, by forceDisableProfiling).
        """
        self.sent[at, to, WireMessageType.RUN_WITH_PROFILING_REQ] += times

    def pass_of_owner(self, at: int, to: int, times: int = 1) -> None:
        """`at` asks `to`, the owner of an RRef, to run a backward pass from its value.

        ``py_rref.cpp``: PyRRef::backward, which an owner does without a message.
        """
        self.sent[at, to, WireMessageType.RREF_BACKWARD_REQ] += times

    def gradient(self, at: int, to: int, times: int = 1) -> None:
        """`at` sends `to` the gradient of what has come from there, so often."""
        self.sent[at, to, WireMessageType.BACKWARD_AUTOGRAD_REQ] += times

    def perhaps_calls(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Senders and receivers between whom there may be more calls than are known."""
        pairs = [*pairs]
        self.perhaps_plain_calls(pairs)
        self.perhaps_graded(pairs)

    def perhaps_plain_calls(self, pairs: Iterable[tuple[int, int]]) -> None:
        """The same for calls whose answers hold no tensor that requires a gradient."""
        self.more |= {(at, to, WireMessageType.FORWARD_AUTOGRAD_REQ) for at, to in pairs}

    def perhaps_graded(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Senders and receivers of calls of which nobody can tell what their answers hold."""
        self.more_graded.update(pairs)

    def perhaps_gradients(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Senders and receivers between whom there may be more gradients than are known."""
        self.more |= {(at, to, WireMessageType.BACKWARD_AUTOGRAD_REQ) for at, to in pairs}
