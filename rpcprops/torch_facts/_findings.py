"""The known bugs of stock torch: how each shows, its place in the source, and what mended it.

The oracle decides what a finding explains in a run (``oracle/_findings.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rpcprops.torch_facts._matrix import seen_on
from rpcprops.torch_facts._versions import release

#: Whether a version of torch has a finding: it was seen there ("listed"), nobody has seen it there
#: yet ("unlisted"), or torch has mended it, or had not broken it yet ("fixed").
Status = Literal["listed", "unlisted", "fixed"]
#: The errors that are recognised by their text.
ErrorWords = Literal["", "remote", "creation", "injected", "timeout", "placed"]
#: The signs of a finding in a log: an error whose text cannot be read, a failed assertion about an
#: RRef without an owner, or a shutdown that has waited in vain for RRefs.
LogWords = Literal["", "unreadable", "owner_assertion", "waited", "terminated"]
#: What the log of a rank must show before a finding explains its leak: that the rank could not
#: delete the fork that it holds of an RRef of its own.
LeakLogWords = Literal["", "own_fork_unknown"]
#: What the log of a rank must show before a finding explains that it died by SIGABRT: that the C
#: library found its heap damaged.
AbortLogWords = Literal["", "heap_damaged"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that stock torch breaks.

    Attributes:
        name: the name of its property.
        promise: the exception class that its smallest case raises.
        why: what torch does, in a sentence or two.
        source: its place in torch's source.
        shows_as: every exception class by which it may show in another program.
        says: the class of error in its UnexpectedError or MissingError, if it is always the same
            class; "placed" if the program says what comes in which step.
        logs: the kind of its ErrorInLog; empty if it shows in no log.
        leak_logs: what the log of the leaking rank must show before the finding explains the leak;
            empty if it explains every RRefLeak.
        abort_logs: the same for a rank that died by SIGABRT; empty if it explains each.
        changes_answers: why a request may be answered by an EXCEPTION where torch promises a
            value, or the other way round; empty if it does not change that.
        broken_in: the first release of torch that breaks the promise, empty where the oldest one
            that rpcprops supports does.
        broken_by: the change that broke it.
        fixed_in: the first release of torch that keeps the promise, empty where none does.
        fixed_by: the change that mended it.
        not_drawn: why no drawn program meets it, not even one drawn as if torch had mended it;
            empty if some do.
    """

    name: str
    promise: str
    why: str
    source: str
    shows_as: frozenset[str] = frozenset()
    says: ErrorWords = ""
    logs: LogWords = ""
    leak_logs: LeakLogWords = ""
    abort_logs: AbortLogWords = ""
    changes_answers: str = ""
    broken_in: str = ""
    broken_by: str = ""
    fixed_in: str = ""
    fixed_by: str = ""
    not_drawn: str = ""

    def status(self, torch_version: str) -> Status:
        """Whether this torch is known to have it, by the measured matrix."""
        if self.is_kept(torch_version):
            return "fixed"
        return "listed" if release(torch_version) in seen_on(self.name) else "unlisted"

    def is_kept(self, torch_version: str) -> bool:
        """Whether this torch is a release that is known to keep the promise."""
        return self.is_before(torch_version) or self.is_mended(torch_version)

    def is_before(self, torch_version: str) -> bool:
        """Whether this torch is a release from before the promise was broken."""
        # A version that is not readable is no release.
        return (0, 0) < release(torch_version) < release(self.broken_in)

    def is_mended(self, torch_version: str) -> bool:
        """Whether this torch is a release in which the promise is kept again."""
        return bool(self.fixed_in) and release(torch_version) >= release(self.fixed_in)


_ALL = (
    Finding(
        name="rref-lifetime-after-reinit",
        promise="RRefLeak",
        why=(
            "The RRef context is a singleton that shutdown marks as destroyed and init_rpc never "
            "makes anew, so after a second init_rpc a dropped user RRef sends no delete and its "
            "owner keeps the value for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::destroyInstance sets "
            "destroyed_, which RRefContext::delUser tests"
        ),
    ),
    Finding(
        name="fork-request-given-up",
        promise="RankDied",
        why=(
            "When a fork request has failed six times, its callback throws in the thread that "
            "retries messages. Nothing catches it there, so the rank that received the RRef aborts."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: "
            "RRefContext::notifyOwnerAndParentOfFork, whose callback calls handleException "
            "(rref_context.cpp:111), under RpcAgent::retryExpiredRpcs in rpc_agent.cpp"
        ),
        shows_as=frozenset({"RankDied", "UnexpectedError"}),
        logs="terminated",
    ),
    Finding(
        name="second-failed-remote",
        promise="RankHung",
        why=(
            "The handlers of a failed creation are a static table whose functions captured the "
            "first RRef that failed in the process. When a second one fails (or times out), the "
            "first is marked again, or what its memory now holds: another RRef, which then says "
            "that it was never created, or something whose change ends the process, or makes the "
            "owner forget the fork that it is about to delete. The second is never marked: "
            "to_here() on it waits until its own timeout."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_impl.cpp: RRef::handleError, "
            "static errorHandlers with lambdas that capture this; its caller "
            "finishCreatingOwnerRRef (rref_context.cpp) deletes the owner's own fork right after it"
        ),
        shows_as=frozenset({"RankHung", "UnexpectedError", "MissingError", "RankDied", "RRefLeak"}),
        leak_logs="own_fork_unknown",
        fixed_in="2.15",
        fixed_by="PyTorch PR 192960",
        # An RRef does not report that it was never created, or reports that though it was.
        says="creation",
    ),
    Finding(
        name="timed-out-remote-dropped",
        promise="RRefLeak",
        why=(
            "A user whose remote timed out may drop the RRef while the creation is still on its "
            "way. Its delete overtakes the creation, the owner ignores it, and then creates a "
            "value that nobody will delete."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::delForkOfOwner ignores a "
            "fork that it does not know"
        ),
        shows_as=frozenset({"RRefLeak", "UngracefulShutdown"}),
    ),
    Finding(
        name="shutdown-overtakes-creation",
        promise="RRefLeak",
        why=(
            "Graceful shutdown does not wait for functions that remote() started. An owner that "
            "has no RRef yet goes on at once; when its last one is made, nobody waits for a "
            "delete that is to be tried again, for meanwhile it counts as no call."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: "
            "RRefContext::delAllUsersAndUnforkedOwners waits until owners_ is empty; "
            "tensorpipe_agent.cpp: TensorPipeAgent::join waits for clientActiveCalls_ alone"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="shutdown-deletes-argument",
        promise="RankHung",
        why=(
            "Graceful shutdown deletes every user RRef of a rank, also one that a running function "
            "still uses: that of a remote(), or of a call that nobody waits for. What it then "
            "fetches is gone at its owner, which waits for it to be made; the function ends with "
            "the RPC timeout, and the shutdown of both ranks with it."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: "
            "RRefContext::delAllUsersAndUnforkedOwners deletes confirmed users of running functions"
        ),
        shows_as=frozenset({"RankHung"}),
    ),
    Finding(
        name="timed-out-type-query",
        promise="UnexpectedError",
        why=(
            "The first call through an RRef asks the owner for the type of its value and keeps the "
            "future. When that times out, every later call through the RRef raises the old "
            "timeout, whatever its own, and sends nothing."
        ),
        source="torch/csrc/distributed/rpc/py_rref.cpp: PyRRef::getRRefType keeps type_",
        shows_as=frozenset({"UnexpectedError", "FaultsDiffer", "RRefLeak"}),
    ),
    Finding(
        name="failed-async-proxy",
        promise="RRefLeak",
        why=(
            "rref.rpc_async() first asks the owner for the type of the value. When that fails, the "
            "error is put into the future that the caller gets, and its traceback holds the frame "
            "in which both the future and the RRef are variables. The cycle goes through a C++ "
            "object that Python's garbage collector does not look into, so the RRef is never "
            "dropped, and its owner keeps the value."
        ),
        source=(
            "torch/distributed/rpc/rref_proxy.py: _invoke_rpc, whose _wrap_rref_type_cont calls "
            "result.set_exception(ex); torch/futures/__init__.py: Future.set_exception"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="async-proxy-leaves-context",
        promise="WrongGradient",
        why=(
            "The first rref.rpc_async() of a user asks the owner for the type of the value, and "
            "makes the call in a callback, which runs in a thread of the agent. The distributed "
            "autograd context belongs to the thread of the caller, so the call is made outside of "
            "it, and no gradient comes back. No error says so."
        ),
        source=(
            "torch/distributed/rpc/rref_proxy.py: _invoke_rpc, whose _wrap_rref_type_cont calls in "
            "rref_fut.then; torch/csrc/distributed/autograd/context/container.cpp: "
            "current_context_id_ is thread_local"
        ),
        shows_as=frozenset({"WrongGradient", "RankHung"}),
        changes_answers="A backward pass may do without the gradient, or fail for want of it.",
    ),
    Finding(
        name="failed-backward-revisits-rank",
        promise="CallLeak",
        why=(
            "When a rank takes part in a backward pass more than once, gradients that come back "
            "to it are answered before they are used. If using them raises, a rank that waits for "
            "what should have followed is never told: its pass and the call that began it stay."
        ),
        source=(
            "torch/csrc/distributed/autograd/engine/dist_engine.cpp: "
            "DistEngine::executeSendFunctionAsync returns a completed future when the context is "
            "already running"
        ),
        shows_as=frozenset({"ContextLeak", "CallLeak"}),
        changes_answers="A gradient is answered before it is used.",
    ),
    Finding(
        name="context-after-cleanup",
        promise="ContextLeak",
        why=(
            "A rank makes an autograd context when it has read a request, or an answer, that "
            "belongs to it. If the cleanup of the context has come before that, the rank makes the "
            "context anew, and nobody cleans it up again."
        ),
        source=(
            "torch/csrc/distributed/autograd/utils.cpp: addRecvRpcBackward calls "
            "DistAutogradContainer::getOrCreateContext (context/container.cpp); "
            "DistAutogradContainer::releaseContextIfPresent keeps no note of what it was asked for"
        ),
        shows_as=frozenset({"ContextLeak"}),
    ),
    Finding(
        name="freed-context-used",
        promise="RankDied",
        why=(
            "A backward pass that ends with an error does not wait for the gradients that it has "
            "sent. Each of these holds a bare pointer to the autograd context. If one of them "
            "fails after the context was cleaned up, torch locks and reads memory that was freed. "
            "The rank dies; or the lock raises, and then its shutdown waits for that call for ever."
        ),
        source=(
            "torch/csrc/distributed/autograd/context/context.cpp: "
            "DistAutogradContext::addOutstandingRpc adds a callback that captures this; "
            "engine/dist_engine.cpp: DistEngine::execute waits for outstanding RPCs only where "
            "the pass has not failed"
        ),
        shows_as=frozenset({"RankDied", "RankHung", "CallLeak"}),
    ),
    Finding(
        name="early-owner-fork",
        promise="RankHung",
        why=(
            "An owner can be sent its own RRef before the message that creates its value arrives. "
            "If it sends that on to itself, deleting the fork that it made for the message leaves "
            "none, so it forgets the RRef. So does a graceful shutdown. The creation then makes "
            "another, and who holds the first waits for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::delForkOfOwner erases from "
            "owners_ an RRef that has no other fork yet; delAllUsersAndUnforkedOwners erases each "
            "that has none"
        ),
        shows_as=frozenset({"RankHung", "RRefLeak", "CallLeak", "UnexpectedError"}),
    ),
    Finding(
        name="readable-injected-error",
        promise="UnclearError",
        why=(
            "The faulty agent puts the payload into the text of its error. A payload that is no "
            "UTF-8, such as a fetch's, makes Python raise UnicodeDecodeError instead."
        ),
        source=(
            "torch/csrc/distributed/rpc/testing/faulty_tensorpipe_agent.cpp: "
            "FaultyTensorPipeAgent::send"
        ),
        shows_as=frozenset({"UnclearError"}),
        # A function that another rank runs can meet it too, and torch prints what it raised.
        logs="unreadable",
    ),
    Finding(
        name="late-remote-to-self",
        promise="ErrorInLog",
        why=(
            "When a remote() to its own rank times out before its message is sent, or before its "
            "function has returned, torch forgets the RRef. When the function then returns, torch "
            "fails an internal assertion, which asks for a bug report, since it has no such RRef. "
            "What the function made is thrown away, and who waits for it already waits for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/request_callback_no_python.cpp: "
            "RequestCallbackNoPython::assignOwnerRRef asks RRefContext::getOwnerRRef "
            "(rref_context.cpp) with forceCreated for an RRef that "
            "RRefContext::delForkOfOwner has erased; OwnerRRef::getValue (rref_impl.cpp) waits"
        ),
        shows_as=frozenset({"ErrorInLog", "RankHung"}),
        logs="owner_assertion",
        changes_answers="The creation that fails the assertion is answered by that error.",
    ),
    Finding(
        name="garbled-exception-text",
        promise="UnclearError",
        why=(
            "The caller decodes the text of an exception with unicode_escape, which is meant for "
            "ASCII. A character outside ASCII comes as several others. Where the traceback has a "
            "backslash before an x, u, U or N, the decoding fails, and the caller gets a "
            "UnicodeDecodeError and never learns what was raised."
        ),
        source=(
            "torch/distributed/rpc/internal.py: _handle_exception calls "
            'result.msg.encode("utf-8").decode("unicode_escape")'
        ),
        shows_as=frozenset({"UnclearError", "UnexpectedError"}),
    ),
    Finding(
        name="future-exception-as-value",
        promise="MissingError",
        why=(
            "Future.set_exception stores the exception as the result of the future, and makes "
            "Python's wait() raise it. The code in C++ that waits for the future of an "
            "async_execution function sends the result, so the caller gets the exception as a "
            "value."
        ),
        source=(
            "torch/futures/__init__.py: Future.set_exception calls set_result; "
            "torch/csrc/distributed/rpc/request_callback_impl.cpp: "
            "RequestCallbackImpl::runPythonFunction takes the value of the inner future"
        ),
        shows_as=frozenset({"MissingError"}),
        changes_answers="The exception of the future travels as a value.",
    ),
    Finding(
        name="unpicklable-after-rref",
        promise="RRefLeak",
        why=(
            "An RRef is forked while it is pickled. When a later part of the same message cannot "
            "be pickled, the message is not sent and nobody takes the fork back, so the owner "
            "keeps the value for ever."
        ),
        source=(
            "torch/distributed/rpc/internal.py: _InternalRPCPickler._py_rref_reducer calls "
            "PyRRef::pickle (torch/csrc/distributed/rpc/py_rref.cpp), which forks by "
            "RRefContext::prepareChildFork (rref_context.cpp)"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="unwritable-tensor",
        promise="RankDied",
        why=(
            "A tensor whose layout the pickler of TorchScript does not know makes it throw. That "
            "happens while the message is written in a function that must not throw, so the "
            "process ends."
        ),
        source=(
            "torch/csrc/jit/serialization/pickler.cpp: Pickler::pushLiteralTensor, called by "
            "tensorpipeSerialize (torch/csrc/distributed/rpc/tensorpipe_utils.cpp) in "
            "TensorPipeAgent::pipeWrite (tensorpipe_agent.cpp), which is noexcept"
        ),
        shows_as=frozenset({"RankDied"}),
    ),
    Finding(
        name="guessed-rref-type",
        promise="WrongValue",
        why=(
            "RRef(value) guesses a type of TorchScript for the value, and keeps the value in that "
            "type. Some values change for that, and of others the RRef cannot be sent or fetched."
        ),
        source=(
            "torch/csrc/distributed/rpc/py_rref.cpp: tryInferTypeWithTypeHint calls "
            "tryToInferType (torch/csrc/jit/python/pybind_utils.h)"
        ),
        shows_as=frozenset({"WrongValue", "UnexpectedError"}),
        changes_answers="What the owner cannot write is answered by that error.",
    ),
    Finding(
        name="attribute-error-as-value",
        promise="MissingError",
        why=(
            "An AttributeError while a message is unpickled becomes the object that was unpickled. "
            "The code that runs a function looks for that; the code that takes an answer, or what "
            "to_here() fetches, does not, so the caller gets the error as a value."
        ),
        source=(
            "torch/distributed/rpc/internal.py: _InternalRPCPickler.deserialize; _run_function "
            "looks for it, _handle_exception does not"
        ),
        shows_as=frozenset({"MissingError"}),
    ),
    Finding(
        name="unconfirmed-user",
        promise="WrongValue",
        why=(
            "A user that gets an RRef from its owner is known to the owner at once. Torch stores "
            "that user and does not mark it, so its confirmed_by_owner() is False for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: "
            "RRefContext::notifyOwnerAndParentOfFork calls addConfirmedUser, which does not call "
            "UserRRef::confirm as delPendingUser does"
        ),
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="rounded-rprop-factor",
        promise="WrongValue",
        why=(
            "DistributedOptimizer runs Rprop as TorchScript, where the assignment of a number to "
            "a part of a tensor rounds the number to float32. The factor 1.2 becomes "
            "1.2000000476837158 also for parameters of float64."
        ),
        source=(
            "torch/optim/rprop.py: _single_tensor_rprop, sign[sign.gt(0)] = etaplus, as "
            "_FunctionalRprop (torch/distributed/optim/functional_rprop.py) compiles it"
        ),
        shows_as=frozenset({"WrongValue"}),
        fixed_in="2.14",
        fixed_by="its DistributedOptimizer does without TorchScript",
    ),
    Finding(
        name="functional-default-rate",
        promise="WrongValue",
        why=(
            "DistributedOptimizer puts a functional version in the place of most optimizers. That "
            "of SGD has the default rate 0.01 where torch.optim.SGD has 0.001, and that of Adamax "
            "has 0.001 where torch.optim.Adamax has 0.002."
        ),
        source=(
            "torch/distributed/optim/functional_sgd.py and functional_adamax.py: `lr` in "
            "__init__ of _FunctionalSGD and _FunctionalAdamax; torch/optim/sgd.py and adamax.py"
        ),
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="adagrad-wrong-parameter",
        promise="WrongValue",
        why=(
            "The functional Adagrad passes all parameters of an owner on, but gradients and state "
            "of those alone that have a gradient. So where a parameter has none, those that "
            "follow get each other's gradients, and one gets none. From torch 2.14 on it is not "
            "compiled, and raises instead, also where no parameter follows."
        ),
        source=(
            "torch/distributed/optim/functional_adagrad.py: _FunctionalAdagrad.step gives "
            "F.adagrad `params` in place of `params_with_grad`; torch/optim/adagrad.py: "
            "_single_tensor_adagrad, zip(..., strict=True)"
        ),
        shows_as=frozenset({"WrongValue", "UnexpectedError"}),
        says="remote",
    ),
    Finding(
        name="stale-gradients",
        promise="WrongValue",
        why=(
            "An optimizer without a functional version reads `param.grad`, which "
            "DistributedOptimizer sets for the parameters of the context and never takes away. "
            "So a parameter that is not in a context is stepped with the gradient of an earlier "
            "one."
        ),
        source="torch/distributed/optim/optimizer.py: _LocalOptimizer.step",
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="unchecked-optimizer-options",
        promise="MissingError",
        why=(
            "The functional versions of SGD, Adagrad, Adadelta, RMSprop and Rprop check none of "
            "the values that the optimizers refuse, such as a negative rate. They train with them."
        ),
        source=(
            "torch/distributed/optim/functional_sgd.py, functional_adagrad.py, "
            "functional_adadelta.py, functional_rmsprop.py and functional_rprop.py: __init__"
        ),
        shows_as=frozenset({"MissingError"}),
    ),
    Finding(
        name="remote-module-skips-hooks",
        promise="WrongValue",
        why=(
            "A RemoteModule calls the forward of the module at the owner, and not the module, so "
            "none of the hooks of that module run: those of a user, nor those by which torch "
            "computes a normed or pruned weight."
        ),
        source=(
            "torch/distributed/nn/jit/templates/remote_module_template.py: _remote_forward returns "
            "module.forward(...)"
        ),
        shows_as=frozenset({"WrongValue", "WrongGradient"}),
    ),
    Finding(
        name="remote-module-takes-names",
        promise="UnexpectedError",
        why=(
            "A RemoteModule passes its own RRef, device and device map to a function in front of "
            "the arguments of forward. So a keyword of forward that is named device, module_rref "
            "or is_device_map_set is refused as given twice."
        ),
        source=(
            "torch/distributed/nn/jit/templates/remote_module_template.py: the parameters of "
            "_remote_forward"
        ),
        shows_as=frozenset({"UnexpectedError"}),
        says="remote",
    ),
    Finding(
        name="remote-module-drops-mode",
        promise="WrongValue",
        why=(
            "RemoteModule.train(mode) calls train() at the owner without the mode. So train(False) "
            "puts the module into training mode, and so does the eval() of a module that has it as "
            "a submodule, which is train(False) of each."
        ),
        source="torch/distributed/nn/api/remote_module.py: _RemoteModule.train",
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="remote-module-mode-copies",
        promise="UnexpectedError",
        why=(
            "RemoteModule.train() and eval() return what the module at the owner returns, itself, "
            "which is pickled on its way. So they give a copy of that module at the calling rank, "
            "with copies of its parameters, where a module returns itself."
        ),
        source="torch/distributed/nn/api/remote_module.py: _RemoteModule.train and eval",
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="rebuilt-module-not-callable",
        promise="UnexpectedError",
        why=(
            "A RemoteModule that was sent to a rank, or that init_from_module_rref has made, is "
            "made without the __init__ of nn.Module, so that it has no dictionaries of hooks. A "
            "call of it raises an AttributeError; only its forward can be called."
        ),
        source=(
            "torch/distributed/nn/api/remote_module.py: _remote_module_receiver and "
            "_RemoteModule.init_from_module_rref call object.__new__(RemoteModule); "
            "torch/nn/modules/module.py: Module._call_impl reads _backward_hooks"
        ),
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="proxy-takes-keywords",
        promise="UnexpectedError",
        why=(
            "A proxy of an RRef passes its own RRef, function, name of the method and timeout to a "
            "function in front of the arguments of the method. So a keyword of the method that is "
            "named rref, rpc_api, func_name or timeout is refused as given twice."
        ),
        source=(
            "torch/distributed/rpc/rref_proxy.py: the parameters of _invoke_rpc, of which "
            "RRefProxy.__getattr__ gives the first four by position"
        ),
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="proxy-hides-methods",
        promise="UnexpectedError",
        why=(
            "A proxy of an RRef keeps its RRef, its function and its timeout in attributes without "
            "an underscore. So a method that is named rref, rpc_api or rpc_timeout cannot be "
            "called through it: Python finds the attribute of the proxy."
        ),
        source="torch/distributed/rpc/rref_proxy.py: RRefProxy.__init__",
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="proxy-asks-class",
        promise="UnexpectedError",
        why=(
            "A proxy of an RRef looks for a method in the class of the value before it calls it. "
            "So what only the object has, such as a submodule of a module, cannot be called, "
            "though the function at the owner would find it."
        ),
        source=(
            "torch/distributed/rpc/rref_proxy.py: _invoke_rpc, whose _rref_type_cont calls "
            "getattr(rref_type, func_name)"
        ),
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="retried-without-payload",
        promise="UnexpectedError",
        why=(
            "Writing a message takes its payload away, and torch keeps that very message for the "
            "next try. So after a fork request that timed out, because the owner was slow for a "
            "moment, each further try is empty, and the function that was sent the RRef never "
            "runs."
        ),
        source=(
            "torch/csrc/distributed/rpc/tensorpipe_utils.cpp: tensorpipeSerialize moves "
            "rpcMessage->payload(); rpc_agent.cpp: RpcAgent::sendWithRetries keeps the message"
        ),
        shows_as=frozenset({"UnexpectedError"}),
        says="timeout",
        changes_answers="A fork request without a payload cannot be read.",
    ),
    Finding(
        name="profiled-events-lost",
        promise="WrongValue",
        why=(
            "A rank that ends a profiled request leaves the callback that records events in that "
            "thread of its agent. The next profiled request there records each event twice, and "
            "the caller's profiler drops what comes twice."
        ),
        source=(
            "torch/csrc/distributed/rpc/request_callback_no_python.cpp: "
            "RequestCallbackNoPython::processRunWithProfilingReq calls disableProfilerLegacy "
            "(torch/csrc/autograd/profiler_legacy.cpp); torch/autograd/profiler_legacy.py: "
            "_parse_legacy_records"
        ),
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="profiling-key-kept",
        promise="UnexpectedError",
        why=(
            "A profiled call sets a key in its thread before its arguments are pickled, and only "
            "a message that is sent takes the key away. So after a call whose arguments cannot be "
            "pickled, every further profiled call of that thread raises."
        ),
        source=(
            "torch/distributed/rpc/api.py: _enable_rpc_profiler calls "
            "RemoteProfilerManager.set_current_profiling_key; torch/csrc/distributed/autograd/"
            "utils.cpp: getMessageWithProfiling takes the key away"
        ),
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="refused-init-counted",
        promise="RankHung",
        why=(
            "An init_rpc that torch refuses, because RPC is running, has been counted before. The "
            "next init_rpc of that rank looks for the others under another prefix of the store "
            "than they do, so all ranks wait for each other in vain."
        ),
        source=(
            "torch/distributed/rpc/__init__.py: init_rpc raises _init_counter before it calls "
            "_init_rpc_backend, which refuses"
        ),
        shows_as=frozenset({"RankHung"}),
    ),
    Finding(
        name="gathering-count-kept",
        promise="RankHung",
        why=(
            "A graceful shutdown numbers the meetings of the ranks in a table of the process, by "
            "their names, which neither a shutdown nor init_rpc empties. If one rank has shut down "
            "gracefully (and got an error, for another was gone) and another one at once, their "
            "numbers differ for ever. In the next world of the same names each graceful shutdown "
            "waits for a meeting that nobody else comes to."
        ),
        source=(
            "torch/distributed/rpc/api.py: _all_gather counts in _all_gather_sequence_id; no "
            "function resets it, and the wait of proceed_signal has no timeout"
        ),
        shows_as=frozenset({"RankHung"}),
    ),
    Finding(
        name="timeout-needs-thread",
        promise="MissingError",
        why=(
            "The agent hands the end of each call, a timeout as well as an answer, to one of the "
            "threads that run what other ranks ask for. Where functions keep all of these threads "
            "waiting for calls of their own, no timeout ends those calls."
        ),
        source=(
            "torch/csrc/distributed/rpc/tensorpipe_agent.cpp: TensorPipeAgent::pollTimeoutRpcs "
            "calls TensorPipeAgent::markFutureWithError, which runs in threadPool_, as does "
            "TensorPipeAgent::markFutureAsComplete"
        ),
        shows_as=frozenset({"MissingError"}),
    ),
    Finding(
        name="failed-join-keeps-token",
        promise="UnexpectedError",
        why=(
            "Who joins or leaves a dynamic group first takes the token of the group. A join that "
            "torch refuses does not give it back, so from then on nobody can join, and no member "
            "can leave: both wait for the token until their timeout, and raise."
        ),
        source=(
            "torch/distributed/rpc/_utils.py: _group_membership_management yields without a "
            "finally; what it wraps in _tensorpipe_init_backend_handler (backend_registry.py) "
            "can raise"
        ),
        shows_as=frozenset({"UnexpectedError", "RankHung"}),
    ),
    Finding(
        name="rejoins-alone",
        promise="WrongValue",
        why=(
            "A process that leaves a dynamic group and joins it again, or joins it after it was "
            "refused, is alone in a group of its own, without an error. Torch counts the calls of "
            "init_rpc in a process, and looks for the others under a prefix that contains that "
            "number."
        ),
        source="torch/distributed/rpc/__init__.py: init_rpc, _init_counter in the PrefixStore",
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="leaving-keeps-values",
        promise="RRefLeak",
        why=(
            "A graceful shutdown of a member of a dynamic group does not delete the RRefs that it "
            "uses, as that of a static group does. Their owners, which go on, keep the values."
        ),
        source=(
            "torch/distributed/rpc/api.py: shutdown calls _wait_all_workers and "
            "_delete_all_user_and_unforked_owner_rrefs for static groups only"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="dash-in-member-name",
        promise="UnexpectedError",
        why=(
            "Members of a dynamic group write their names and ranks into the store, with a dash "
            "between the two, and who joins takes what follows the first dash for the rank. So "
            "after a member whose name has a dash, nobody can join."
        ),
        source=(
            "torch/csrc/distributed/rpc/agent_utils.cpp: collectCurrentNames splits NAME-RANK at "
            "each dash, and calls std::stoi on the second part"
        ),
        shows_as=frozenset({"UnexpectedError", "MissingError"}),
    ),
    Finding(
        name="late-answer-keeps-rref",
        promise="RRefLeak",
        why=(
            "The rank that answers a call has noted a fork of each RRef in the answer. An answer "
            "that comes after the timeout of the call is dropped unread, so nobody ever announces "
            "or deletes that fork, and the owner keeps the value for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/tensorpipe_agent.cpp: "
            "TensorPipeAgent::markFutureAsComplete drops the answer of a call that has ended; "
            "py_rref.cpp: PyRRef::pickle has forked the RRef by RRefContext::prepareChildFork "
            "(rref_context.cpp)"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="rref-sent-after-reinit",
        promise="UnexpectedError",
        why=(
            "The RRef context is a singleton that keeps the agent of the first init_rpc. After a "
            "second one it still sends by that agent, which has been shut down. So a rank that "
            "does not own an RRef cannot send it: the receiver raises, and nothing runs."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::getInstance takes the agent "
            "once; RRefContext::notifyOwnerAndParentOfFork sends by it, and "
            "TensorPipeAgent::send (tensorpipe_agent.cpp) refuses"
        ),
        # What was to run does not, and what was to be made is not.
        shows_as=frozenset(
            {"UnexpectedError", "NotRunOnce", "OwnerGone", "RRefLeak", "CallLeak", "RankHung"}
        ),
        says="placed",
        logs="waited",
        changes_answers="The receiver raises while it reads the request.",
    ),
    Finding(
        name="fetch-after-delete",
        promise="CallLeak",
        why=(
            "A user whose to_here() times out may drop its RRef, and its delete may come before "
            "the request of that to_here(). The owner has deleted the RRef then, takes it for one "
            "that is still to be made, and serves that request for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::getOwnerRRef puts a future "
            "into pendingOwners_ for an RRef that it does not know, also for one that was deleted; "
            "RequestCallbackNoPython::retrieveOwnerRRef (request_callback_no_python.cpp) waits "
            "for it"
        ),
        shows_as=frozenset({"CallLeak"}),
    ),
    Finding(
        name="owner-ignores-timeout",
        promise="MissingError",
        why=(
            "to_here() promises an exception after its timeout. At the owner of the RRef it waits "
            "for the value as local_value() does, which has no timeout, however long that takes."
        ),
        source=(
            "torch/csrc/distributed/rpc/py_rref.cpp: PyRRef::toHere calls localValue at the owner, "
            "and passes the timeout to UserRRef::toHere alone"
        ),
        shows_as=frozenset({"MissingError"}),
        not_drawn=(
            "It is certain only for a function that sleeps for minutes at the rank that fetches "
            "next, and programs with such functions are one in twenty: none of 1600 met it."
        ),
    ),
    Finding(
        name="unreadable-remote",
        promise="MissingError",
        why=(
            "A remote whose owner cannot unpickle the call is answered with an error, and its "
            "handler raises in a thread of the agent. So the RRef never gets the error, and the "
            "pending user and the call stay for ever; every rank waits for that call when it shuts "
            "down."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: callback::confirmPendingUser and "
            "callback::finishCreatingOwnerRRef call RRef::handleError (rref_impl.cpp), which calls "
            "RRefContext::handleException for UNKNOWN_ERROR; tensorpipe_agent.cpp: "
            "TensorPipeAgent::markFutureWithError does not come to decreaseCallCount"
        ),
        shows_as=frozenset({"MissingError", "RRefLeak", "CallLeak", "RankHung"}),
        logs="waited",
    ),
    Finding(
        name="unreadable-tensor",
        promise="RankDied",
        why=(
            "Of a quantized tensor whose elements share a byte the unpickler of TorchScript finds "
            "the storage too small, and throws. That happens in a thread of TensorPipe's where "
            "nothing catches it, so the process that receives the tensor ends."
        ),
        source=(
            "torch/csrc/jit/serialization/unpickler.cpp: Unpickler::readInstruction (BINPERSID), "
            "called by tensorpipeDeserialize (tensorpipe_utils.cpp) in TensorPipeAgent::pipeRead "
            "(tensorpipe_agent.cpp)"
        ),
        shows_as=frozenset({"RankDied"}),
        logs="terminated",
        broken_in="2.13",
        broken_by="PyTorch PR 183381",
    ),
    Finding(
        name="failed-pickle-keeps-tensors",
        promise="WrongValue",
        why=(
            "The pickler of RPC collects the tensors of a message in a table of its thread, and "
            "takes the table away once all is pickled. Where something cannot be pickled it does "
            "not, so the tensors of that message stay in memory."
        ),
        source=(
            "torch/distributed/rpc/internal.py: _InternalRPCPickler.serialize has no finally: what "
            "follows p.dump(obj) does not run where that raises"
        ),
        shows_as=frozenset({"WrongValue"}),
    ),
    Finding(
        name="refused-remote-to-self",
        promise="RRefLeak",
        why=(
            "A remote to the own rank counts the owner as a fork of itself before it sends the "
            "call. Where the agent refuses to send that, remote raises, and nobody takes the fork "
            "back: the owner keeps an RRef that nobody has, for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/python_functions.cpp: pyRemotePythonUdf calls "
            "RRefContext::addSelfAsFork before sendPythonRemoteCall, which raises where "
            "TensorPipeAgent::send (tensorpipe_agent.cpp) does"
        ),
        shows_as=frozenset({"RRefLeak"}),
    ),
    Finding(
        name="shutdown-races-delete",
        promise="RankDied",
        why=(
            "A shutdown walks through the RRefs that the rank owns, and forgets them, without the "
            "lock under which the threads of the agent serve deletes, fetches and creations until "
            "the agent stops. So a request that comes meanwhile reads memory that was freed."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::destroyInstance walks "
            "through owners_ and clears it, and RRefContext::checkRRefLeaks walks through forks_, "
            "without mutex_; RRefContext::delForkOfOwner erases from both under mutex_"
        ),
        shows_as=frozenset({"RankDied"}),
        logs="owner_assertion",
        abort_logs="heap_damaged",
    ),
    Finding(
        name="long-timeout-ends-at-once",
        promise="UnexpectedError",
        why=(
            "A timeout in seconds becomes a number of milliseconds in an int. From 2147484 s on "
            "that number does not fit, becomes the smallest of all, and the call ends at once by "
            "its timeout. A default timeout does the same."
        ),
        source=(
            "torch/csrc/distributed/rpc/tensorpipe_agent.cpp: TensorPipeAgent::send, "
            "static_cast<int>(rpcTimeoutSeconds * kSecToMsConversion); init.cpp: _set_rpc_timeout "
            "does the same"
        ),
        shows_as=frozenset({"UnexpectedError"}),
    ),
    Finding(
        name="short-timeout-never-comes",
        promise="MissingError",
        why=(
            "A timeout in seconds becomes a whole number of milliseconds. One of less than a "
            "millisecond becomes 0, which stands for no timeout, so that the call waits for its "
            "function however long that takes."
        ),
        source=(
            "torch/csrc/distributed/rpc/tensorpipe_agent.cpp: TensorPipeAgent::send, "
            "static_cast<int>(rpcTimeoutSeconds * kSecToMsConversion), and timeout.count() != 0; "
            "init.cpp: _set_rpc_timeout does the same"
        ),
        shows_as=frozenset({"MissingError"}),
    ),
    Finding(
        name="refused-exception-kept",
        promise="WrongValue",
        why=(
            "A future that has its result refuses an exception, but it has kept by then what "
            "raises one. From then on wait() and value() try to raise the result, and end with a "
            "TypeError."
        ),
        source=(
            "torch/futures/__init__.py: Future.set_exception calls _set_unwrap_func before "
            "set_result, which refuses"
        ),
        # If the call itself fails, the step shows that in place of its error.
        shows_as=frozenset({"WrongValue", "MissingError"}),
    ),
    Finding(
        name="collect-all-ends-early",
        promise="MissingError",
        why=(
            "The future of collect_all has to be completed when all of its futures are. It is "
            "completed when the first of them has failed, while others are still under way."
        ),
        source="aten/src/ATen/core/ivalue.cpp: collectAll calls setErrorIfNeeded for the first",
        shows_as=frozenset({"MissingError"}),
    ),
    Finding(
        name="optimizer-options-by-place",
        promise="WrongValue",
        why=(
            "DistributedOptimizer hands its arguments on to another class than it was given, whose "
            "parameters come in another order. By place the eps of Adagrad becomes a "
            "warmup_lr_multiplier, which nothing uses, and the maximize of RMSprop is lost as well."
        ),
        source=(
            "torch/distributed/optim/utils.py: functional_optim_map; functional_adagrad.py and "
            "functional_rmsprop.py: __init__"
        ),
        shows_as=frozenset({"WrongValue"}),
    ),
)

#: The known findings, by the name of their property.
FINDINGS: Mapping[str, Finding] = {finding.name: finding for finding in _ALL}
