"""What stock torch is known to get wrong: where it shows, as what, and where in torch's source.

The model marks each program and plan that meets one (:attr:`Prediction.hazards`); its predictions
stay what torch promises, so that a torch that is mended shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpcprops.oracle._errors import TEXTS, WORDS
from rpcprops.oracle._model import Prediction
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import Program


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise that stock torch breaks.

    Attributes:
        promise: the exception class that its smallest case raises.
        versions: torch versions (their major and minor parts) on which it was seen to fail.
        why: what torch does, in a sentence or two.
        source: where in torch's source.
        shows_as: every exception class as which it may show in another program.
        says: what an UnexpectedError or a MissingError of it says, as a regular expression.
        sometimes: whether its smallest case fails in some runs only.
    """

    promise: str
    versions: tuple[str, ...]
    why: str
    source: str
    shows_as: frozenset[str] = frozenset()
    says: str = ""
    sometimes: bool = False

    def expects(self, torch_version: str) -> bool:
        """Whether it is documented to fail on this torch."""
        return ".".join(torch_version.split(".")[:2]) in self.versions

    def can_cause(self, violation: Violation) -> bool:
        """Whether it may show so in a program that meets it."""
        if violation.promise not in self.shows_as:
            return False
        errors = ("UnexpectedError", "MissingError")
        return violation.promise not in errors or bool(re.search(self.says, violation.message))


#: The known findings, by the name of their property.
FINDINGS: Mapping[str, Finding] = {
    "rref-lifetime-after-reinit": Finding(
        promise="RRefLeak",
        versions=("2.13",),
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
    "fork-request-given-up": Finding(
        promise="RankDied",
        versions=("2.13",),
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
    "second-failed-remote": Finding(
        promise="RankHung",
        versions=("2.13",),
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
        # An RRef does not say that it was never created, or says so and was.
        says=f"{re.escape(WORDS['creation'])}|{TEXTS['creation']}",
    ),
    "timed-out-remote-dropped": Finding(
        promise="RRefLeak",
        versions=("2.13",),
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
        sometimes=True,
    ),
    "shutdown-overtakes-creation": Finding(
        promise="RRefLeak",
        versions=("2.13",),
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
    "shutdown-deletes-argument": Finding(
        promise="RankHung",
        versions=("2.13",),
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
        sometimes=True,
    ),
    "timed-out-type-query": Finding(
        promise="UnexpectedError",
        versions=("2.13",),
        why=(
            "The first call through an RRef asks the owner for the type of its value and keeps the "
            "future. When that times out, every later call through the RRef raises the old "
            "timeout, whatever its own, and sends nothing."
        ),
        source="torch/csrc/distributed/rpc/py_rref.cpp: PyRRef::getRRefType keeps type_",
        shows_as=frozenset({"UnexpectedError", "FaultsDiffer", "RRefLeak"}),
    ),
    "failed-backward-revisits-rank": Finding(
        promise="CallLeak",
        versions=("2.13",),
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
    "early-owner-fork": Finding(
        promise="RankHung",
        versions=("2.13",),
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
        sometimes=True,
    ),
    "readable-injected-error": Finding(
        promise="UnclearError",
        versions=("2.13",),
        why=(
            "The faulty agent puts the payload into the text of its error. A payload that is no "
            "UTF-8, such as a fetch's, makes Python raise UnicodeDecodeError instead."
        ),
        source=(
            "torch/csrc/distributed/rpc/testing/faulty_tensorpipe_agent.cpp: "
            "FaultyTensorPipeAgent::send"
        ),
        shows_as=frozenset({"UnclearError"}),
    ),
}


def explanations(
    prediction: Prediction, violation: Violation, torch_version: str
) -> tuple[str, ...]:
    """The known findings that the program meets and that can have caused `violation`."""
    return tuple(
        name
        for name in sorted(prediction.hazards)
        if FINDINGS[name].expects(torch_version) and FINDINGS[name].can_cause(violation)
    )


def set_apart(
    program: Program, prediction: Prediction, outcome: Outcome, violations: Sequence[Violation]
) -> tuple[tuple[str, ...], tuple[Violation, ...]]:
    """The known findings that can have caused some of `violations`, and those that none can have.

    A rank that dies or hangs cuts its run short: of the steps that were under way then, only the
    values that they gave are judged for themselves.
    """
    found: set[str] = set()
    left: list[Violation] = []
    cut = False
    for violation in violations:
        names = explanations(prediction, violation, outcome.torch_version)
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
