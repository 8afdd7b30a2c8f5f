"""What stock torch is known to get wrong: where it shows, as what, and where in torch's source.

The model marks each program and plan that meets one (:attr:`Prediction.hazards`); its predictions
stay what torch promises, so that a torch that is mended shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rpcprops.oracle._errors import TEXTS, WORDS
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Program
from rpcprops.torch_facts import release, seen_on

#: Whether a version of torch is known to have a finding: it was seen there ("listed"), nobody has
#: seen it there yet ("unlisted"), or torch has mended it ("fixed").
Status = Literal["listed", "unlisted", "fixed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that stock torch breaks.

    Attributes:
        name: of its property.
        promise: the exception class that its smallest case raises.
        why: what torch does, in a sentence or two.
        source: where in torch's source.
        shows_as: every exception class as which it may show in another program.
        says: what an UnexpectedError or a MissingError of it says, as a regular expression.
        logs: the same for an ErrorInLog.
        fixed_in: the first release of torch that keeps the promise, empty where none does.
        fixed_by: the change that mended it.
    """

    name: str
    promise: str
    why: str
    source: str
    shows_as: frozenset[str] = frozenset()
    says: str = ""
    logs: str = ""
    fixed_in: str = ""
    fixed_by: str = ""

    def status(self, torch_version: str) -> Status:
        """Whether this torch is known to have it, by the matrix of what was measured."""
        now = release(torch_version)
        if self.fixed_in and now >= release(self.fixed_in):
            return "fixed"
        return "listed" if now in seen_on(self.name) else "unlisted"

    def can_cause(self, violation: Violation) -> bool:
        """Whether it may show so in a program that meets it."""
        if violation.promise == "ErrorInLog":
            return bool(self.logs and re.search(self.logs, violation.message))
        if violation.promise not in {*self.shows_as, self.promise}:
            return False
        errors = ("UnexpectedError", "MissingError")
        return violation.promise not in errors or bool(re.search(self.says, violation.message))


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
    ),
    Finding(
        name="second-failed-remote",
        promise="RankHung",
        why=(
            "The handlers of a failed creation are a static table whose functions captured the "
            "first RRef that failed in the process. When a second one fails (or times out), the "
            "first is marked again, or what its memory now holds: another RRef, which then says "
            "that it was never created, or something whose change ends the process. The second is "
            "never marked: to_here() on it waits until its own timeout."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_impl.cpp: RRef::handleError, "
            "static errorHandlers with lambdas that capture this"
        ),
        shows_as=frozenset({"RankHung", "UnexpectedError", "MissingError", "RankDied"}),
        fixed_in="2.15",
        fixed_by="PyTorch PR 192960",
        # An RRef does not say that it was never created, or says so and was.
        says=f"{re.escape(WORDS['creation'])}|{TEXTS['creation']}",
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
            "Graceful shutdown deletes every user RRef of a rank, also those that a function "
            "which remote() started still uses. What that function then fetches is gone at its "
            "owner, which waits for it to be made; the function ends with the RPC timeout, and the "
            "shutdown of both ranks with it."
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
    ),
    Finding(
        name="early-owner-fork",
        promise="RankHung",
        why=(
            "An owner can be sent its own RRef before the message that creates its value arrives. "
            "If it sends that on to itself, deleting the fork that it made for the message leaves "
            "none, so it forgets the RRef. The creation then makes another, and who holds the "
            "first waits for ever."
        ),
        source=(
            "torch/csrc/distributed/rpc/rref_context.cpp: RRefContext::delForkOfOwner erases from "
            "owners_ an RRef that has no other fork yet"
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
        logs="UnicodeDecodeError",
    ),
    Finding(
        name="late-remote-to-self",
        promise="ErrorInLog",
        why=(
            "When a remote() to its own rank times out before its message is sent, torch forgets "
            "the RRef. The message then comes, and torch fails an internal assertion, which asks "
            "for a bug report, since it has no such RRef. What the function made is thrown away."
        ),
        source=(
            "torch/csrc/distributed/rpc/request_callback_no_python.cpp: "
            "RequestCallbackNoPython::assignOwnerRRef asks RRefContext::getOwnerRRef "
            "(rref_context.cpp) with forceCreated for an RRef that "
            "RRefContext::delForkOfOwner has erased"
        ),
        shows_as=frozenset({"ErrorInLog"}),
        logs="INTERNAL ASSERT FAILED.*rref_context[.]cpp",
    ),
)

#: The known findings, by the name of their property.
FINDINGS: Mapping[str, Finding] = {finding.name: finding for finding in _ALL}


def explanations(met: Iterable[str], violation: Violation, torch_version: str) -> tuple[str, ...]:
    """Those of the findings that a program meets that can have caused `violation` on this torch.

    One explains on a torch on which nobody has seen it yet as well: a newer one has it until it is
    known to be mended.
    """
    return tuple(
        name
        for name in sorted(met)
        if FINDINGS[name].status(torch_version) != "fixed" and FINDINGS[name].can_cause(violation)
    )


def set_apart(
    program: Program,
    met: Iterable[str],
    outcome: Outcome,
    violations: Sequence[Violation],
) -> tuple[tuple[str, ...], tuple[Violation, ...]]:
    """The known findings that can have caused some of `violations`, and those that none can have.

    `met` are the findings that the program meets (:attr:`Prediction.hazards`).

    A rank that dies or hangs cuts its run short: of the steps that were under way then, only the
    values that they gave are judged for themselves.
    """
    found: set[str] = set()
    left: list[Violation] = []
    cut = False
    for violation in violations:
        names = explanations(met, violation, outcome.torch_version)
        found.update(names)
        if names:
            cut = cut or violation.promise in ("RankDied", "RankHung")
        else:
            left.append(violation)
    if cut:
        start = _last_under_way(program, outcome)
        left = [
            violation
            for violation in left
            if violation.step is None
            or violation.step < start
            or violation.promise in ("WrongValue", "WrongGradient")
        ]
    return tuple(sorted(found)), tuple(left)


def _last_under_way(program: Program, outcome: Outcome) -> int:
    """The first leaf of the step that was run last."""
    last = max((step.index for step in outcome.steps), default=0)
    return max(first for first, _ in program.numbered if first <= last)
