"""Which class of message answers a request: the answer of its type, or an EXCEPTION.

An EXCEPTION comes where C++ raises while it handles the request, or where the future of the answer
has an error (``rpc/request_callback_no_python.cpp``: ``RequestCallbackNoPython::processMessage``
and ``handleError``; ``tensorpipe_agent.cpp``: ``TensorPipeAgent::sendCompletedResponseMessage``).
For each type of request that means:

* *A Python call.* What its function raises is no error there: ``_run_function`` (``internal.py``)
  catches each :class:`Exception` and returns a ``RemoteException``, which travels as a value. These
  are errors: an exception that is no :class:`Exception`, or whose ``repr`` raises; an
  `async_execution` function that returns no future, or a future that fails; a value that cannot be
  pickled, such as a ``RemoteException`` with a class that nobody can import
  (``rpc/request_callback_impl.cpp``: ``runPythonFunction``, ``serializePyObject``); an argument
  that cannot be unpickled. An argument of a class that the callee lacks is none: ``deserialize``
  (``internal.py``) returns the AttributeError, and ``_run_function`` raises it.
* *A TorchScript or a builtin call.* Each error that it raises (``runJitFunction``,
  ``runJitOperator``).
* *A creation.* The owner keeps the error, and answers all the same (``assignOwnerRRef``).
* *A fetch.* What the owner keeps is an error, or a value that cannot be written.
* *A call or a fetch in a context, or in a profiler.* As without (``processForwardAutogradReq``,
  ``processRunWithProfilingReq``). But in a context the answer is an error too if its sender has
  given the context up (``autograd/context/container.cpp``:
  ``DistAutogradContainer::currentContext``).
* *A gradient, or a pass that a user asks an owner to run.* The pass raises there, or a gradient
  that the rank has sent on for it fails (``autograd/engine/dist_engine.cpp``:
  ``DistEngine::executeSendFunctionAsync``).
* *What ranks tell each other of RRefs and contexts.* Never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rpcprops.faults import MessageType, WireMessageType
from rpcprops.oracle.prediction import WireKind


@dataclass(slots=True)
class Answers:
    """How many requests are answered by an EXCEPTION.

    Attributes:
        errors: how many there are, by sender and receiver of the request, and its type.
        more: those of which there may be more.
    """

    errors: Counter[WireKind] = field(default_factory=Counter)
    more: set[WireKind] = field(default_factory=set)

    def error(self, at: int, to: int, message: MessageType | WireMessageType) -> None:
        """`to` answers such a request of `at` by an EXCEPTION, if it answers it at all."""
        self.errors[at, to, WireMessageType(message)] += 1

    def perhaps_errors(
        self, pairs: Iterable[tuple[int, int]], message: MessageType | WireMessageType
    ) -> None:
        """Senders and receivers of such requests, of which more may be answered so."""
        self.more |= {(at, to, WireMessageType(message)) for at, to in pairs}
