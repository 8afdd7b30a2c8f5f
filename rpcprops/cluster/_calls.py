"""Calls of a user's functions: in one rank, in each rank, and as the last work of each rank."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, overload

from rpcprops._given import argument, shown
from rpcprops.cluster import _functions, stacks
from rpcprops.cluster._adopted import Adopted
from rpcprops.cluster._channel import Channel
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._phases import Phase, Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

#: Real seconds between the first error of :meth:`Calls.each` and the look at the other ranks.
_MOMENT = 0.05
#: The numbers of kept values: a rank that is used again must not take an old handle for a new one.
_kept_numbers = itertools.count(1)


class Calls:
    """The calls in the ranks of one world.

    Attributes:
        ran_to_exit: whether the ranks have been sent their last call, after which they exit.
    """

    def __init__(
        self,
        ranks: Ranks,
        phases: Phases,
        diagnosis: Diagnosis,
        deadlines: Deadlines,
        adopted: Adopted,
    ) -> None:
        self.ran_to_exit = False
        self._ranks = ranks
        self._phases = phases
        self._diagnosis = diagnosis
        self._deadlines = deadlines
        self._adopted = adopted

    def must_run(self) -> None:
        """Raise if the ranks take no calls now.

        Raises:
            UsageError: they take none; the message says why.
        """
        if self._phases.over or not self._ranks.channels:
            msg = "the cluster is not running; calls belong inside its with block."
            raise UsageError(msg)
        if self.ran_to_exit:
            msg = "the ranks have run to their exit; make another cluster for more calls."
            raise UsageError(msg)

    def submit(
        self,
        rank: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: int = 0,
    ) -> RankFuture[Any]:
        """Have a rank run ``fn(*args, **kwargs)``; a `keep` above 0 makes the value stay there."""
        self.must_run()
        blob = _functions.dump_call(fn, args, kwargs)
        channel = self._ranks.channels[rank]
        # Start the phase now, so that it exists even if this answer arrives during another wait.
        with self._phases.open("run", self._deadlines.run):
            channel.ran_users_code = True
            number = self._ranks.send(channel, "call", blob, keep)
            channel.open_calls.add(number)
        return RankFuture(self, channel, number)

    def keep(
        self, rank: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _functions.KeptValue:
        """As :meth:`submit`, but the value stays in the rank until its handle is released."""
        __tracebackhide__ = True
        number = next(_kept_numbers)
        self.submit(rank, fn, args, kwargs, keep=number).result()
        kept = _functions.KeptValue(rank, number)
        # A handle may be collected at any moment in any thread, even during a send. So its release
        # is only noted here, and goes out with the next message of the cluster.
        released = weakref.finalize(kept, self._ranks.released.append, (rank, number))
        released.atexit = False
        return kept

    def take(self, channel: Channel, number: int) -> tuple[str, Any] | None:
        """An answer, if it has arrived."""
        self._ranks.pump(0.0)
        self._adopted.attend(nobody_calls=False)
        return channel.answers.pop(number, None)

    def wait(self, channel: Channel, number: int) -> tuple[str, Any]:
        """Wait for an answer. A failure that is found meanwhile is raised."""
        __tracebackhide__ = True
        while number not in channel.answers:
            with self._phases.open("run", self._deadlines.run) as phase:
                while number not in channel.answers and not self._adopted.is_due:
                    self._ranks.pump(min(phase.left(), 1.0))
                    if number in channel.answers:
                        break
                    if self._diagnosis.dead(phase):
                        break
                    if phase.left() <= 0:
                        who = self._adopted.not_waiting(channel)
                        self._diagnosis.hung(phase, who, "does not answer a call")
                        break
            if number not in channel.answers:
                self._diagnosis.found.raise_first()
                self._adopted.attend(nobody_calls=True)
        return channel.answers.pop(number)

    def wait_for_all(self) -> None:
        """Wait until the ranks have answered every call; their answers are dropped."""
        __tracebackhide__ = True
        for channel in list(self._ranks.channels):
            for number in sorted(channel.open_calls):
                self.wait(channel, number)

    def each(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        rank_first: bool = False,
    ) -> list[Any]:
        """See :meth:`rpcprops.Cluster.each`, and with `rank_first` ``each_rank``."""
        __tracebackhide__ = True
        self.must_run()
        futures = [
            self.submit(rank, fn, (rank, *args) if rank_first else args, kwargs)
            for rank in range(len(self._ranks.channels))
        ]
        while True:
            # All are asked, because only those that have been asked know their answer.
            are_open = [future for future in futures if not future.done()]
            for future in futures:
                if future.has_failed():
                    self._fail_first(future, futures)
            if not are_open:
                return [future.result() for future in futures]
            self._wait_for_one_of(are_open)

    def _wait_for_one_of(self, futures: Sequence[RankFuture[Any]]) -> None:
        """Wait until one is answered, or ranks wait for this process."""
        __tracebackhide__ = True
        with self._phases.open("run", self._deadlines.run) as phase:
            while not self._adopted.is_due and not any(one.has_arrived for one in futures):
                if self._diagnosis.dead(phase):
                    break
                if phase.left() <= 0:
                    who = [c for one in futures for c in self._adopted.not_waiting(one.channel)]
                    blamed = [c for c in self._ranks.channels if c in who]
                    self._diagnosis.hung(phase, blamed, "does not answer a call")
                    break
                self._ranks.pump(min(phase.left(), 1.0))
        self._diagnosis.found.raise_first()
        self._adopted.attend(nobody_calls=True)

    def _fail_first(self, first: RankFuture[Any], futures: Sequence[RankFuture[Any]]) -> None:
        """Raise the error of one rank, with a note that says what the other ranks did then."""
        __tracebackhide__ = True
        error = first.error()
        others = [future for future in futures if future is not first]
        if others:
            # Another rank may be on its way to the line at which it waits.
            self._ranks.pump(_MOMENT)
            waiting = [future.channel for future in others if not future.done()]
            self._diagnosis.ask_where(waiting)
            lines = [f"{first.channel.name} raised this first. The other ranks:"]
            for future in others:
                lines += [f"  {line}" for line in future.state()]
            error.add_note("\n".join(lines))
        for future in others:
            future.give_up()
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Raise what a function raised in a rank, or the death of a rank that caused it."""
        __tracebackhide__ = True
        self._diagnosis.blame_death(error)
        raise error

    # The last call.

    def run_to_exit(
        self, fn: Callable[..., R], args: tuple[Any, ...], is_last: Callable[[R], bool]
    ) -> dict[int, R]:
        """See :meth:`rpcprops.Cluster.run_to_exit`."""
        self.must_run()
        given: object = is_last
        if not callable(given):
            msg = f"{argument('is_last', is_last)} must be a function."
            raise UsageError(msg)
        blob = _functions.dump_call(fn, args, {})
        results: dict[int, R] = {}
        with self._phases.open("run", self._deadlines.run) as phase:
            self.ran_to_exit = True
            number = self._ranks.send_to_all("last", blob)
            has_asked = False
            while True:
                self._ranks.pump(min(phase.left(), 0.5))
                self._ranks.must_be_connected()
                if self._take_results(number, results, is_last):
                    self._diagnosis.wait_for_bad_exits(phase, results, number)
                    return results
                if len(results) == len(self._ranks.channels) and not has_asked:
                    has_asked = True
                    self._ranks.ask_for_preforked()
                if self._have_ended(phase, number, results):
                    return results
                if phase.left() <= 0:
                    who = self._ranks.alive() or self._ranks.channels
                    self._diagnosis.hung(phase, who, "does not end")
                    return results

    def _take_results(
        self, number: int, results: dict[int, R], is_last: Callable[[R], bool]
    ) -> bool:
        """Take in results that have arrived; whether one of them makes the others unnecessary."""
        for channel in self._ranks.channels:
            if number not in channel.answers:
                continue
            kind, (payload, seen) = channel.answers.pop(number)
            if seen is not None:
                channel.note_look(seen)
            if kind == "error":
                raise _functions.load_error(payload, channel.rank)
            results[channel.rank] = cast("R", _functions.load_result(payload, channel.rank))
            if is_last(results[channel.rank]):
                return True
        return False

    def _have_ended(self, phase: Phase, number: int, results: dict[int, R]) -> bool:
        """Whether the wait is over: all ranks have ended, or one ended that should not have."""
        channels = self._ranks.channels
        if all(
            c.status is not None and (c.rank in results or c.has_left_without(number))
            for c in channels
        ):
            self._diagnosis.bad_exits(phase, results, number)
            return True
        if any(c.lost and c.rank not in results for c in channels):
            # The server reports its exit a moment later. The next look finds it.
            self._ranks.pump(0.2)
            return self._diagnosis.bad_exits(phase, results, number)
        return False


class RankFuture(Generic[R]):
    """The value that a call in a rank will return."""

    def __init__(self, calls: Calls, channel: Channel, number: int) -> None:
        self._calls = calls
        self.channel = channel
        self._number = number
        self._answer: tuple[str, Any] | None = None

    def done(self) -> bool:
        """Whether the answer has arrived (looks, and does not wait)."""
        if self._answer is None:
            self._answer = self._calls.take(self.channel, self._number)
        return self._answer is not None

    @property
    def has_arrived(self) -> bool:
        """Whether the answer is here; unlike :meth:`done`, this does nothing else."""
        return self._answer is not None or self._number in self.channel.answers

    def has_failed(self) -> bool:
        """Whether the answer has arrived, and is an exception."""
        return self.done() and self._answer is not None and self._answer[0] == "error"

    def error(self) -> BaseException:
        """The exception of a call that :meth:`has_failed`."""
        assert self._answer is not None
        return _functions.load_error(self._answer[1], self.channel.rank)

    def state(self) -> list[str]:
        """What is known of the call, in sentences."""
        if self.has_failed():
            return [f"{self.channel.name} raised {_functions.said_of(self.error())}"]
        if self.done():
            return [f"{self.channel.name} returned"]
        at = stacks.where(self.channel.name, self.channel.stack)
        return at or [f"{self.channel.name} has not answered, and is in none of your code"]

    def give_up(self) -> None:
        """Drop the answer: nobody waits for it any more."""
        if self._answer is None:
            self.channel.give_up(self._number)

    def result(self) -> R:
        """Wait for the value, and return it.

        Raises:
            RankDied, RankHung: the rank died, or did not answer.
            RemoteError: the function raised an exception that would end this process (such as
                SystemExit), or one that cannot be pickled.
            Exception: any other exception that the function raised in the rank.
        """
        __tracebackhide__ = True
        if not self.done():
            self._answer = self._calls.wait(self.channel, self._number)
        kind, payload = cast("tuple[str, bytes]", self._answer)
        if kind == "error":
            self._calls.fail(_functions.load_error(payload, self.channel.rank))
        return cast("R", _functions.load_result(payload, self.channel.rank))


class RankProxy:
    """One rank of a running cluster (:meth:`rpcprops.Cluster.on`)."""

    def __init__(self, calls: Calls, rank: int, world: str) -> None:
        self.rank = rank
        self._calls = calls
        self._world = world

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self._world}>"

    @overload
    def call(
        self, fn: Callable[..., Any], /, *args: Any, keep: Literal[True], **kwargs: Any
    ) -> Any: ...
    @overload
    def call(
        self, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    def call(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(*args, **kwargs)`` in this rank's main thread and return what it returns.

        Calls to one rank run one after the other. `fn` may be a closure, or a coroutine function,
        which runs by ``asyncio.run`` in the rank. With ``keep=True`` the
        value stays in the rank, and this returns a handle, which stands for the value in later
        calls there (an RRef must stay: it has no meaning outside its rank). If a function has a
        `keep` of its own, pass that by ``functools.partial(fn, keep=...)``.

        Raises:
            Exception: what `fn` raised, with the rank's traceback as its cause.
            RemoteError: `fn` raised an exception that would end this process (such as SystemExit),
                or one that cannot be pickled.
            RankDied, RankHung: the rank died, or did not answer.
        """
        __tracebackhide__ = True
        if "keep" in kwargs:
            _check_keep(fn, kwargs["keep"])
        if kwargs.pop("keep", False):
            return self._calls.keep(self.rank, fn, args, kwargs)
        return self.submit(fn, *args, **kwargs).result()

    @overload
    def submit(
        self, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> RankFuture[R]: ...
    @overload
    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> RankFuture[R]: ...
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> RankFuture[Any]:
        """As :meth:`call`, but return a future at once."""
        return self._calls.submit(self.rank, fn, args, kwargs)


def _check_keep(fn: object, keep: object) -> None:
    """Raises:
    UsageError: `keep` is not a bool, or it could also be an argument for `fn`.
    """
    if not isinstance(keep, bool):
        msg = (
            f"{argument('keep', keep)} must be True or False: it says whether "
            f"the value stays in the rank. To pass a keep to the function, call "
            f"functools.partial(fn, keep=...)."
        )
        raise UsageError(msg)
    if isinstance(fn, functools.partial) and "keep" in fn.keywords:
        return
    try:
        parameter = inspect.signature(cast("Callable[..., Any]", fn)).parameters.get("keep")
    except (TypeError, ValueError):
        return  # not callable, which is reported later, or a builtin that has no signature
    if parameter is not None and parameter.kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    ):
        msg = (
            f"keep={shown(keep)} is ambiguous: {getattr(fn, '__qualname__', fn)!r} has a parameter "
            f"keep, and so has call, where it says whether the value stays in the rank. Call "
            f"functools.partial(fn, keep=...) to pass one to the function."
        )
        raise UsageError(msg)
