"""Where torch's C++ does what drawn programs make it do: the functions, by file.

docs/coverage.md shows it. Files without a folder are in ``torch/csrc/distributed/rpc``, and those
of ``autograd/`` in ``torch/csrc/distributed/autograd``. The places of texts stand beside the texts
(``_texts.py``): :func:`places_of_texts` reads them there.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from rpcprops.torch_facts import _texts


@dataclass(frozen=True, slots=True)
class Place:
    """Where torch makes something, and where it serves it or takes it back."""

    makes: str
    serves: str


_CALLBACK = "request_callback_no_python.cpp: RequestCallbackNoPython::"
_PYTHON = "request_callback_impl.cpp: RequestCallbackImpl::"
_FETCH = "rref_impl.cpp: UserRRef::toHere"

#: Each request: the function that sends it, and the one that its receiver serves it by.
REQUESTS: Mapping[str, Place] = {
    "SCRIPT_CALL": Place(
        "python_functions.cpp: pyRpcBuiltin; torchscript_functions.cpp: rpcTorchscript",
        f"{_PYTHON}processScriptCall",
    ),
    "PYTHON_CALL": Place("python_functions.cpp: pyRpcPythonUdf", f"{_PYTHON}processPythonCall"),
    "SCRIPT_REMOTE_CALL": Place(
        "python_functions.cpp: pyRemoteBuiltin; torchscript_functions.cpp: remoteTorchscript",
        f"{_PYTHON}processScriptRemoteCall",
    ),
    "PYTHON_REMOTE_CALL": Place(
        "python_functions.cpp: pyRemotePythonUdf", f"{_PYTHON}processPythonRemoteCall"
    ),
    "SCRIPT_RREF_FETCH_CALL": Place(_FETCH, f"{_CALLBACK}processScriptRRefFetchCall"),
    "PYTHON_RREF_FETCH_CALL": Place(_FETCH, f"{_PYTHON}processPythonRRefFetchCall"),
    "RREF_USER_DELETE": Place(
        "rref_context.cpp: RRefContext::delUser", f"{_CALLBACK}processRRefUserDelete"
    ),
    "RREF_FORK_REQUEST": Place(
        "rref_context.cpp: RRefContext::notifyOwnerAndParentOfFork",
        f"{_CALLBACK}processRRefForkRequest",
    ),
    "RREF_CHILD_ACCEPT": Place(
        "rref_context.cpp: RRefContext::notifyOwnerAndParentOfFork, finishForkRequest",
        f"{_CALLBACK}processRRefChildAccept",
    ),
    "FORWARD_AUTOGRAD_REQ": Place(
        "autograd/utils.cpp: getMessageWithAutograd", f"{_CALLBACK}processForwardAutogradReq"
    ),
    "BACKWARD_AUTOGRAD_REQ": Place(
        "autograd/functions/recvrpc_backward.cpp: RecvRpcBackward::apply",
        f"{_CALLBACK}processBackwardAutogradReq",
    ),
    "CLEANUP_AUTOGRAD_CONTEXT_REQ": Place(
        "autograd/context/container.cpp: DistAutogradContainer::sendReleaseContextRpc",
        f"{_CALLBACK}processCleanupAutogradContextReq",
    ),
    "RUN_WITH_PROFILING_REQ": Place(
        "autograd/utils.cpp: getMessageWithProfiling", f"{_CALLBACK}processRunWithProfilingReq"
    ),
    "RREF_BACKWARD_REQ": Place("py_rref.cpp: PyRRef::backward", f"{_PYTHON}processRRefBackward"),
}

_RREFS = "rref_context.cpp: RRefContext::"
_CONTEXTS = "autograd/context/container.cpp: DistAutogradContainer::"
_ENGINE = "autograd/engine/dist_engine.cpp: DistEngine::"
_AGENT = "tensorpipe_agent.cpp: TensorPipeAgent::"

#: Each counter, by its field in :class:`rpcprops.Counters`: the functions that add to it, and those
#: that take from it.
COUNTERS: Mapping[str, Place] = {
    "owners": Place(
        f"{_RREFS}getOrCreateOwnerRRef, prepareChildFork, addSelfAsFork",
        f"{_RREFS}delForkOfOwner, delAllUsersAndUnforkedOwners",
    ),
    "forks": Place(
        f"{_RREFS}addForkOfOwner, addForkOfOwnerIfNotPresent, addSelfAsFork",
        f"{_RREFS}delForkOfOwner",
    ),
    "pending_users": Place(f"{_RREFS}addPendingUser", f"{_RREFS}delPendingUser"),
    "pending_futures": Place(
        f"{_RREFS}delUser, notifyOwnerAndParentOfFork, finishForkRequest",
        f"{_RREFS}delUser, notifyOwnerAndParentOfFork, finishForkRequest (in callbacks)",
    ),
    "contexts": Place(
        f"{_CONTEXTS}newContext, getOrCreateContext",
        f"{_CONTEXTS}releaseContext, releaseContextIfPresent",
    ),
    "backward_passes": Place(
        f"{_ENGINE}execute, executeSendFunctionAsync", f"{_ENGINE}cleanupBackwardPass"
    ),
    "server_calls": Place(f"{_AGENT}respond", f"{_AGENT}respond (in a callback)"),
    "server_async_calls": Place(f"{_AGENT}respond", f"{_AGENT}respond (in a callback)"),
    "client_calls": Place(f"{_AGENT}send", f"{_AGENT}markFutureAsComplete, markFutureWithError"),
}


def places_of_texts() -> dict[str, str]:
    """For each field of :class:`Texts`, the place in its source that the comment above it names.

    A field without a comment comes from the place of the one before it.
    """
    source = inspect.getsource(_texts)
    lines = source.splitlines()
    (texts,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Texts"
    )
    found: dict[str, str] = {}
    before = ""
    for node in texts.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            before = _comment_above(lines, node.lineno - 1) or before
            found[node.target.id] = before
    return found


def _comment_above(lines: list[str], number: int) -> str:
    said: list[str] = []
    while lines[number - 1].strip().startswith("#"):
        number -= 1
        said.insert(0, lines[number].strip().removeprefix("#").strip())
    return " ".join(said)
