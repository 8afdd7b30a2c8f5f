"""Texts that torch writes and rpcprops reads: errors, and lines of logs.

They are the same in every release so far. If a later release changes one, it goes into
:data:`CHANGES`, and nothing else has to change. Next to each text is its source. Files without a
folder are in ``torch/csrc/distributed/rpc``, and line numbers are of the Python files in the wheel
of 2.13.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rpcprops.torch_facts._versions import release


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one version of torch. They are plain text unless noted otherwise.

    Attributes:
        remote: the beginning of an error that a function raised at another rank.
        uncompiled: what an optimizer that TorchScript runs says of an option that it cannot use.
        creation: the error when an RRef is used whose creation failed or timed out.
        injected: a send that the faulty agent made fail.
        timeout: an RPC took longer than its timeout.
        timed_out: other timeouts, of stores and of waits in C++: a regular expression.
        unreadable: the class of the exception that Python raises where torch's own text of an error
            is no UTF-8.
        lost_connection: the end of every error of TensorPipe's, including that of a peer that is
            gone.
        gone: what torch's own tests accept as the error of a call whose peer is gone.
        not_picklable: the error when an RRef is pickled by anything but RPC.
        failed_send: the text before and after the number of the try, in the line of a failed send
            of a retryable message.
        given_up: the error of a retryable message whose last try has failed.
        leaks: an RRef is left at shutdown.
        context_kept: a context that a rank could not release at another.
        assertion: an assertion inside torch has failed.
        owner_assertion_file: the file that the assertion about an RRef without an owner names.
        owner_expected: what that assertion says of an RRef that must be there.
        fork_unknown: the text before the ids of an RRef and its fork, when the owner is to delete
            a fork that it does not know.
        heap_damaged: how the C library begins to say that the heap of the process is damaged.
        owners_waited: a shutdown has waited in vain for owners to be left by their users.
        users_waited: the same for users that wait for their owner or their parent.
        log_line: the beginning of each line of torch's log: a regular expression.
        profiler_key: what refuses a profiled call, because one of that thread is not over.
        proxy_keyword: what refuses a keyword of a call through an RRef, before its name.
        without_hooks: the error of a remote module that lacks what every module has.
        stopped: what refuses a message of an agent that has been shut down.
        uninitialised: what refuses a call in a process where no agent runs.
        not_a_number: the error of C++ where it reads a number that is none.
        terminated: the first words of the C++ runtime when it ends the process.
    """

    # torch/distributed/rpc/internal.py:213, `_run_function`.
    remote: str = "On WorkerInfo"
    # torch/optim/sgd.py:295, `sgd`, and the same functions of the other optimizers.
    uncompiled: str = "torch.jit.script not supported with"
    # rref_impl.cpp, `UserRRef::toHere`, and rref_context.cpp, `RRefContext::prepareChildFork`.
    creation: str = "RRef creation via rpc.remote"
    # testing/faulty_tensorpipe_agent.cpp, `FaultyTensorPipeAgent::send`.
    injected: str = "Send attempt failed intentionally"
    # rpc_agent.h, `kRpcTimeoutErrorStr`, which tensorpipe_agent.cpp,
    # `TensorPipeAgent::pollTimeoutRpcs`, puts into futures.
    timeout: str = "RPC ran for more than"
    # torch/csrc/distributed/c10d: stores and sockets.
    timed_out: str = "timed? ?out"
    # CPython, of the text that testing/faulty_tensorpipe_agent.cpp, `FaultyTensorPipeAgent::send`,
    # puts the payload into.
    unreadable: str = "UnicodeDecodeError"
    # third_party/tensorpipe: tensorpipe/common/error.cc, `Error::what`.
    lost_connection: str = "(this error originated at tensorpipe/"
    # torch/testing/_internal/distributed/rpc/faulty_rpc_agent_test_fixture.py:57 to 59,
    # `get_shutdown_error_regex`; written by c10/core/thread_pool.cpp, the C library and gloo.
    gone: tuple[str, ...] = (
        "Exception in thread pool task",
        "Connection reset by peer",
        "Connection closed by peer",
    )
    # init.cpp, `__getstate__` of `PyRRef`.
    not_picklable: str = "rref can only be pickled when using RPC"
    # rpc_agent.cpp, `RpcAgent::rpcRetryCallback`, at INFO.
    failed_send: tuple[str, str] = ("] Send try ", " failed")
    # rpc_agent.cpp, `RpcAgent::rpcRetryCallback`.
    given_up: str = "The RPC has not succeeded after the specified number of max retries"
    # rref_context.cpp, `RRefContext::checkRRefLeaks`.
    leaks: tuple[str, ...] = ("Leaking RRef", "Detected RRef Leaks")
    # torch/csrc/distributed/autograd/context/container.cpp,
    # `DistAutogradContainer::sendReleaseContextRpc`.
    context_kept: str = "Could not release Dist Autograd Context"
    # c10/util/Exception.h, `TORCH_INTERNAL_ASSERT`.
    assertion: str = "INTERNAL ASSERT FAILED"
    # rref_context.cpp, `RRefContext::getOwnerRRef`.
    owner_assertion_file: str = "rref_context.cpp"
    owner_expected: str = "Expected OwnerRRef with id "
    # rref_context.cpp, `RRefContext::delForkOfOwner`, at INFO.
    fork_unknown: str = "Could not find UserRRef instance, RRefId = "
    # glibc, malloc/malloc.c: `malloc_printerr` writes one of these and calls abort.
    heap_damaged: tuple[str, ...] = (
        "double free or corruption",
        "corrupted size vs. prev_size",
        "corrupted double-linked list",
        "malloc(): ",
        "free(): ",
        "realloc(): ",
        "malloc_consolidate(): ",
        "munmap_chunk(): ",
    )
    # rref_context.cpp, `RRefContext::delAllUsersAndUnforkedOwners` logs both waits.
    owners_waited: str = "Timed out waiting for pending OwnerRRefs"
    users_waited: str = "Timed out waiting for pending UserRRefs"
    # torch/csrc/distributed/rpc/profiler/remote_profiler_manager.cpp,
    # `RemoteProfilerManager::setCurrentKey`.
    profiler_key: str = "Cannot call RemoteProfilerManager::setCurrentKey"
    # CPython, of the function that torch/distributed/rpc/rref_proxy.py:78, `RRefProxy.__getattr__`,
    # calls.
    proxy_keyword: str = "_invoke_rpc() got multiple values for argument "
    # torch/nn/modules/module.py:1963, `Module.__getattr__`.
    without_hooks: str = "'RemoteModule' object has no attribute '_backward_hooks'"
    # tensorpipe_agent.cpp, `TensorPipeAgent::send`.
    stopped: str = "RPC is no longer running"
    # torch/distributed/rpc/api.py:91, `_require_initialized`.
    uninitialised: str = "RPC has not been initialized"
    # libstdc++, `std::stoi`.
    not_a_number: str = "stoi"
    # libstdc++, `__gnu_cxx::__verbose_terminate_handler`.
    terminated: str = "terminate called"
    # c10/util/Logging.cpp, `MessageLogger`: level, month and day, time.
    log_line: str = r"\[[IWEF]\d{4,8} \d\d:\d\d:\d\d\."


#: What a release of torch words otherwise than the one before it: by the release (``2.16``) from
#: which on it does, the fields of :class:`Texts`.
CHANGES: Mapping[str, Mapping[str, Any]] = {}


def texts_of(version: str) -> Texts:
    """The texts of a version of torch; those of the oldest where the version is no version."""
    found = Texts()
    for since in sorted(CHANGES, key=release):
        if release(since) <= release(version):
            found = replace(found, **CHANGES[since])
    return found
