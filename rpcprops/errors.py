"""Every exception of rpcprops, by whose fault it is.

* :class:`UsageError`: the caller asked for something that cannot be.
* :class:`BrokenPromise` and its subclasses: the code under test (torch, or yours) broke a promise
  under an injected fault. There is one class for each promise, so that Hypothesis keeps two
  promises apart and shrinks each by itself.
* :class:`MachineCannot`: this machine cannot do what was asked (no torch RPC, no fork).
* :class:`HarnessError`: rpcprops itself is at fault.

An exception that a function raised in a rank is none of these: it is raised again as itself, with
the rank's own traceback as its cause (:class:`RemoteTraceback`). So are ``pytest.fail``, ``skip``
and ``xfail``, ``unittest.SkipTest`` and a false ``hypothesis.assume``: they speak of the test,
wherever they are called. What would end the test process is an error of the rank's alone
(:class:`RemoteError`): ``sys.exit``, ``pytest.exit``, KeyboardInterrupt, and every other exception
that is no :class:`Exception`.
"""

from __future__ import annotations

from collections.abc import Iterable


class RpcPropsError(Exception):
    """Base of everything that rpcprops raises of its own."""


class UsageError(RpcPropsError, ValueError):
    """The caller asked for something that cannot be; the message names the value and the remedy.

    Attributes:
        why: where nothing is predicted of a program under a plan, the reason alone; else empty.
    """

    def __init__(self, message: str = "", why: str = "") -> None:
        super().__init__(message)
        self.why = why


class MachineCannot(RpcPropsError, RuntimeError):
    """This machine cannot do it; the message says what is missing."""


class HarnessError(RpcPropsError, RuntimeError):
    """rpcprops itself is at fault; please report it with the message."""


class RemoteTraceback(Exception):
    """The traceback of an exception as it was in the rank that raised it (its cause)."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(rank, text)
        self.rank = rank
        self.text = text

    def __str__(self) -> str:
        return f"in rank {self.rank}:\n{self.text}"


class RemoteError(RpcPropsError):
    """A rank raised an exception that cannot be raised here: one that cannot be pickled, or that
    would end the test process, such as SystemExit. Its type and text are in the message.
    """


class BrokenPromise(RpcPropsError, AssertionError):
    """A promise of torch RPC, or of the code under test, did not hold; subclasses name which."""


class WrongValue(BrokenPromise):
    """A fetch or a call gave another value than the same computation in one process."""


class UnexpectedError(BrokenPromise):
    """A step raised although every injected fault was within its retry budget."""


class MissingError(BrokenPromise):
    """A step had to raise (a timeout shorter than the delay, say) and did not."""


class UnclearError(BrokenPromise):
    """A step raised, as it had to, but its error does not say what happened."""


class NotRunOnce(BrokenPromise):
    """A user-visible call ran another number of times on its target than once."""


class OwnerGone(BrokenPromise):
    """An owner dropped a value while a user of it was alive."""


class RRefLeak(BrokenPromise):
    """RRefs were left over: an owner, a fork, a pending user or a pending future stayed."""


class ContextLeak(BrokenPromise):
    """A distributed autograd context, or a backward pass, outlived its ``with`` block."""


class WrongGradient(BrokenPromise):
    """A gradient differs from the one that the same computation gives in one process."""


class CallLeak(BrokenPromise):
    """An RPC never finished: an agent still counts it as active although nothing is on its way."""


class UngracefulShutdown(BrokenPromise):
    """``rpc.shutdown()`` raised, warned of a leak, or left with a non-zero exit code."""


class RankDied(BrokenPromise):
    """A rank was killed by a signal, or exited before it was told to."""


class RankHung(BrokenPromise):
    """A phase of the cluster (start, run, settle, shutdown) did not end before its deadline."""


class ErrorInLog(BrokenPromise):
    """A rank wrote of an error inside torch (a failed internal assertion, a wait that was given up,
    a traceback) that nothing in the program and its faults explains.
    """


class UpstreamTestFails(BrokenPromise):
    """A test of PyTorch's own suites failed in a rank."""


class FaultsDiffer(BrokenPromise):
    """The injected failures that fired are not the ones that the message model predicts."""


class MessagesDiffer(BrokenPromise):
    """The record of all messages is not what the message model predicts."""


def text_of(error: BaseException) -> str:
    """The message of an exception; where its own ``__str__`` fails, a text that says so."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise  # may be the user's own Ctrl-C
    except BaseException as own:
        name = type(error).__name__
        return f"<no text: {name}.__str__ raised {type(own).__name__}>"


def first_line_of(error: BaseException) -> str:
    """The first line of :func:`text_of`, and the next while one ends in a colon; may be empty.

    The first line of what torch brings from another rank names only the rank.
    """
    first, *others = text_of(error).splitlines() or [""]
    while first.endswith(":") and others:
        first += f" {others.pop(0).strip()}"
    return first


def note_own(error: BaseException, own: HarnessError) -> None:
    """Say in a note of another failure that rpcprops is at fault as well, once."""
    note = f"rpcprops itself is at fault too, please report it: {own}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def note_shown(own: HarnessError, what: Iterable[object]) -> None:
    """Say in notes of an error of ours what was shown besides, so that it hides nothing."""
    for one in what:
        own.add_note(f"Before rpcprops failed, this was shown, and may be right: {one}")


def is_promise(name: str) -> bool:
    """Whether a class of that name stands for a promise."""
    cls = globals().get(name)
    return isinstance(cls, type) and issubclass(cls, BrokenPromise) and cls is not BrokenPromise
