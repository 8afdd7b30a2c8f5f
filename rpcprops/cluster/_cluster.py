"""A cluster: the ranks of one world, from their start to their end. This is what users see."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from rpcprops import agents, errors
from rpcprops._given import shown
from rpcprops.cluster import _shutdown, _staying
from rpcprops.cluster._adopted import Adopted
from rpcprops.cluster._arming import Arming
from rpcprops.cluster._calls import Calls, RankProxy
from rpcprops.cluster._diagnosis import Diagnosis
from rpcprops.cluster._driver import Branch, Driver
from rpcprops.cluster._phases import Phases
from rpcprops.cluster._ranks import Ranks
from rpcprops.cluster._settling import Settling
from rpcprops.cluster.deadlines import Deadlines
from rpcprops.cluster.options import WorldOptions
from rpcprops.cluster.reuse import can_be_set, left_in_statics
from rpcprops.cluster.servers import Servers
from rpcprops.errors import HarnessError, UsageError
from rpcprops.faults import FaultPlan, FaultTable
from rpcprops.outcomes import Counters, Outcome, StepOutcome
from rpcprops.programs import End, Program

P = ParamSpec("P")
R = TypeVar("R")


class Cluster:
    """A world of ranks for one example; made by :meth:`ClusterServer.cluster`.

    Leaving the ``with`` block settles the ranks (unless leaks are allowed), shuts them down
    gracefully, and raises the first violation. If the block raises, the ranks are killed.

    Attributes:
        outcome: what the run showed, complete once the block has been left.
        program: the program that runs in it, if there is one.
        ranks: the processes of the ranks and their channels.
        arming: the faults that are armed for parts of the run.
    """

    def __init__(
        self,
        servers: Servers,
        options: WorldOptions,
        first: Sequence[str],
        *,
        on_start: Callable[[Cluster], None],
        on_end: Callable[[FaultPlan, Outcome], None],
        on_output: Callable[[str], Callable[[bytes], None]] | None = None,
    ) -> None:
        self.options = options
        self.plan = options.plan
        self.rate = options.rate
        self.transport = options.transport
        self.init = options.init is not False
        self.program: Program | None = None
        #: Whether its world may be a kept one, and may be left for the next program or cluster.
        self.may_reuse = options.reuse and can_be_set(options.plan)
        #: Whether its world is kept for the next program.
        self.stays = False
        self.deadlines = Deadlines.of(
            options.plan, len(options.names), options.rate, options.deadline
        )
        self._servers = servers
        self._first = first
        self._on_start = on_start
        self._on_end = on_end
        self._outcome: Outcome | None = None
        self.ranks = Ranks(servers, send_seconds=self.deadlines.look, on_output=on_output)
        self._phases = Phases(options.rate)
        self._diagnosis = Diagnosis(
            self.ranks,
            self._phases,
            self.deadlines,
            joins=self.init,
            rpc_timeout=options.rpc_timeout if options.init is True else None,
        )
        below = (self.ranks, self._phases, self._diagnosis, self.deadlines)
        self._settling = Settling(*below)
        self._adopted = Adopted(*below, options, self._settling.settle_to)
        self._calls = Calls(*below, self._adopted)
        self._driver = Driver(*below)
        self.arming = Arming(*below, options)

    def __repr__(self) -> str:
        return f"<cluster of {self.world_size}, {self.plan!r}>"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.options.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the ranks; with ``init="adopt"`` the program's, once it has joined."""
        return tuple(c.name for c in self.ranks.channels) or self.options.names

    @property
    def outcome(self) -> Outcome:
        """What the run has shown so far; complete once the ``with`` block has been left."""
        return self._outcome or self._make_outcome()

    @property
    def torch_version(self) -> str:
        """The version of torch in its ranks."""
        return self._servers.root.torch_version

    def _make_outcome(self) -> Outcome:
        ledger = self.ranks.ledger
        agent = self.options.agent
        return Outcome(
            world_size=self.world_size,
            clock_rate=self.rate,
            transport=self.transport,
            torch_version=self.torch_version,
            phases=tuple(self._phases.outcomes),
            ranks=tuple(channel.outcome() for channel in self.ranks.channels),
            armed=self.arming.parts,
            agent="" if agent == agents.default_name() else agent,
            messages=self.ranks.messages(),
            messages_dropped=0 if ledger is None else ledger.dropped,
            ran_before=0 if self.ranks.kept is None else self.ranks.kept.programs,
        )

    # Life.

    def __enter__(self) -> Cluster:
        __tracebackhide__ = True
        self._must_be_new()
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        if self.has_found:
            self.kill()
            self._diagnosis.found.raise_first()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        try:
            if error is None and not self.has_found:
                self.finish()
            elif not isinstance(error, KeyboardInterrupt | SystemExit) and not self.has_found:
                # Whether the error means anything depends on how late the ranks were.
                with contextlib.suppress(errors.HarnessError):
                    self._diagnosis.look(wait=0.2)
        finally:
            self.kill()
        try:
            if error is None:
                self._diagnosis.found.raise_first()
        except errors.BrokenPromise as found:
            error = found
            raise
        finally:
            if error is not None and self.ranks.kept is not None:
                count = self.ranks.kept.programs
                error.add_note(
                    f"These ranks had run {count} cluster{'s' * (count > 1)} before this one "
                    f"(reuse=True). Only what also fails in fresh ranks, which the next such "
                    f"cluster has, says something of the code under test."
                )

    def finish(self) -> None:
        """Settle (unless leaks are allowed), then shut down; violations are kept, not raised."""
        if self._calls.ran_to_exit:
            return
        if self.options.init == "adopt" and not self._finish_program():
            return
        held = self.options.held_at_end
        if self._runs_rpc and held is not None and not self.has_found:
            self.settle_to(held)
        if self.has_found:
            return
        # What was armed for a part of the run cannot be taken back from its counts.
        if self.may_reuse and not self.arming.parts and not self.stay():
            return
        self.shutdown()

    def _finish_program(self) -> bool:
        """Let a program end that shuts RPC down itself; whether there is anything left to do."""
        try:
            self._calls.wait_for_all()
        except errors.BrokenPromise:
            return False
        self._adopted.must_have_joined()
        return True

    @property
    def _runs_rpc(self) -> bool:
        """Whether it is for us to shut RPC down."""
        return self.init and (self.options.init is True or self._adopted.runs_everywhere)

    def start(self) -> None:
        """Fork the ranks and wait until each has joined the world."""
        self._must_be_new()
        self._on_start(self)
        self.arming.start()
        self.arming.problem = self._servers.root.arming_problem
        try:
            self._fork_and_join()
        except HarnessError:
            if not self.ranks.has_lost_server():
                raise
            # It died before a call was sent, maybe before this cluster was made: the socket of a
            # killed process closes only some milliseconds later. The ranks die with their server.
            self.ranks.forget()
            self._servers.replace_if_dead(self.rate)
            self._fork_and_join()

    def _fork_and_join(self) -> None:
        runs_users_code = self.program is None
        if self.may_reuse and self.ranks.resume(
            self.options, self._first, self._phases, runs_users_code=runs_users_code
        ):
            return
        try:
            self.ranks.fork(
                self.options,
                self._first,
                self._phases,
                self.deadlines.start,
                runs_users_code=runs_users_code,
                may_stay=self.may_reuse,
            )
        except errors.MachineCannot:
            # Close what was opened: it may be what this machine is short of.
            self.kill()
            raise
        self._diagnosis.wait_until_joined()

    def _must_be_new(self) -> None:
        if self.ranks.peer is not None or self.is_over:
            msg = "a cluster runs once; make another with server.cluster(...)."
            raise UsageError(msg)

    def shutdown(self) -> None:
        """Shut all ranks down, gracefully unless the program says otherwise, and wait for their
        exits; keep violations, raise none.
        """
        below = (self.ranks, self._phases, self._diagnosis, self.deadlines)
        end = End() if self.program is None else self.program.end
        ends = end if self._runs_rpc else None
        _shutdown.shut_down(*below, self.options, self.arming.problem, end=ends)

    def stay(self) -> str:
        """Instead of :meth:`shutdown`: let the ranks meet as there, and come to rest.

        Then `stays` is true, and the ranks live on in their servers. Else the result says why the
        world cannot be used again; no violation was recorded, and the ranks can still shut down.
        """
        why = _staying.stay(self.ranks, self._phases, self.deadlines, self.options)
        if not why and not self.ranks.are_silent:
            why = "a message of a rank is left"
        # Nothing can change any more if this is empty, and to read the ledger takes a millisecond.
        outcome = None if why else self._make_outcome()
        if outcome is not None and self.program is None:
            # Of a program it is predicted.
            why = left_in_statics(outcome.messages, outcome.messages_dropped)
        self.stays = not why
        if self.stays:
            self._outcome = outcome
        return why

    @property
    def is_used(self) -> bool:
        """Whether its ranks have run other programs or clusters before."""
        return self.ranks.kept is not None

    @property
    def ran_before(self) -> tuple[tuple[Program, FaultPlan], ...]:
        """The programs that its ranks ran before this one, with their plans, the oldest first."""
        return () if self.ranks.kept is None else tuple(self.ranks.kept.ran)

    def kill(self) -> None:
        """Kill every rank that still lives, and let go of everything."""
        if self.is_over:
            return
        if self.stays:
            self._phases.over = True
            self.ranks.keep(self.options, self._first, self.program)
        else:
            self.ranks.kill()
            self._phases.over = True
            self._outcome = self._make_outcome()
            self.ranks.let_go()
        if self.ranks.channels:
            self._on_end(self.plan, self.outcome)

    # What users do with it.

    def on(self, rank: int | str) -> RankProxy:
        """The rank with that number or name.

        Raises:
            UsageError: there is no such rank.
        """
        __tracebackhide__ = True
        number: object = rank
        if isinstance(rank, str) and rank in self.names:
            number = self.names.index(rank)
        if isinstance(number, bool) or not isinstance(number, int):
            msg = (
                f"rank={shown(rank)} must be an int from 0 to {self.world_size - 1}, or a rank's "
                f"name ({', '.join(self.names)})."
            )
            raise UsageError(msg)
        if not 0 <= number < self.world_size:
            msg = f"rank={shown(rank)} is no rank of a world of {self.world_size}."
            raise UsageError(msg)
        return RankProxy(self._calls, number, repr(self))

    @overload
    def each(
        self, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[R]: ...
    @overload
    def each(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[R]: ...
    def each(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``fn(*args, **kwargs)`` in all ranks at the same time; the results, by rank.

        Raises:
            Exception: the exception that arrived first, at once, whatever the other ranks still do;
                a note says what each of them did then.
            RankDied, RankHung: a rank died, or did not answer.
        """
        __tracebackhide__ = True
        return self._calls.each(fn, args, kwargs)

    @contextlib.contextmanager
    def faults(self, faults: FaultTable | FaultPlan) -> Iterator[None]:
        """Have the ranks' agents fail and delay sends as long as the block lasts::

            with cluster.faults(FaultTable(["PYTHON_CALL"], num_fail_sends=1)):
                cluster.on(0).call(push_gradients)  # the first try of each call is lost
            cluster.on(0).call(pull_parameters)  # nothing is

        A table means what it means as ``faults=`` of the cluster, with counts from 0: the first
        `num_fail_sends` sends of each payload fail. It acts in every rank before the block begins,
        whatever the ranks do then, and no longer when the block has ended. What torch tries again
        after that succeeds.

        Blocks may be nested, and the cluster may have ``faults=`` of its own: all of them act, each
        with counts of its own. The one armed first fails a send that it may still fail, and the
        others do not count that send. Of several delays of a type the longest applies.

        What was armed, and what it did, is in ``outcome.armed``.

        Args:
            faults: a table for every rank, or a plan.

        Raises:
            UsageError: `faults` is neither, names a rank outside the world, or holds faults that no
                table has; the cluster is not running, runs a program, or has
                ``shutdown_faults=True``; or a rank's agent injects no faults.
            MachineCannot: the preload library is not there, or does not know this build of torch.
            RankDied, RankHung: a rank cannot answer.
        """
        __tracebackhide__ = True
        self._calls.must_run()
        with self.arming.during(faults):
            yield

    def each_rank(
        self, fn: Callable[Concatenate[int, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Run ``fn(rank, *args, **kwargs)`` in all ranks at the same time; the results, by rank.

        ``torch.multiprocessing.spawn(fn, args, nprocs=world_size)`` calls `fn` in this way.

        Raises:
            Exception: as from :meth:`each`.
        """
        __tracebackhide__ = True
        return self._calls.each(fn, args, kwargs, rank_first=True)

    def run_to_exit(
        self, fn: Callable[..., R], *args: Any, is_last: Callable[[R], bool]
    ) -> dict[int, R]:
        """Run ``fn(*args)`` in every rank as the last work of that rank; the results, by rank.

        A rank exits when its call has returned, whatever the others still do, as a process of its
        own would. A failure (a rank that dies or does not end) is kept, and raised when the block
        is left.

        Args:
            is_last: tells whether a result makes those of the other ranks unnecessary. Then the
                other ranks are killed when the block is left, and the results lack them.
        """
        if self.options.init == "adopt":
            msg = "run_to_exit adopts no program; call it by cluster.each_rank(fn, ...)."
            raise UsageError(msg)
        return self._calls.run_to_exit(fn, args, is_last)

    def snapshot(self) -> tuple[Counters, ...]:
        """What each rank holds now, after a garbage collection in each; zeros before init_rpc.

        Raises:
            RankDied, RankHung: a rank cannot answer.
        """
        self._calls.must_run()
        if not self._diagnosis.look():
            self._diagnosis.found.raise_first()
        return self.ranks.counters()

    def settle(self, *, expect: Sequence[Counters] | None = None) -> tuple[Counters, ...]:
        """Wait until every rank holds exactly what is expected, and return what they hold.

        Args:
            expect: counters by rank; with None, no rank must hold anything.

        Raises:
            RRefLeak, ContextLeak, CallLeak, OwnerGone: a rank holds something else, and no message
                is on its way that could change it; the message says which rank holds what.
            RankDied, RankHung: a rank cannot answer.
        """
        __tracebackhide__ = True
        self._calls.must_run()
        counters = self.settle_to(expect)
        self._diagnosis.found.raise_first()
        return counters

    # What runs programs.

    def take_time(self, seconds: float) -> None:
        """Wait longer by the virtual seconds that functions of a program take by themselves."""
        size, options = self.world_size, self.options
        self.deadlines.become(Deadlines.of(self.plan, size, self.rate, options.deadline, seconds))

    @property
    def is_over(self) -> bool:
        """Whether the cluster has ended and its ranks are closed."""
        return self._phases.over

    @property
    def has_found(self) -> bool:
        """Whether a violation has been found so far."""
        return bool(self._diagnosis.found)

    def look(self) -> None:
        """Read what each rank holds, for the outcome. A rank that cannot answer is a violation."""
        with self._phases.open("run", self.deadlines.look) as phase:
            self._diagnosis.look(phase)

    def settle_to(
        self,
        expect: Sequence[Counters] | None,
        failures: Sequence[int] | None = None,
        calls: Sequence[Mapping[str, int]] = (),
        is_kept: Callable[[Sequence[Counters]], bool] | None = None,
    ) -> tuple[Counters, ...]:
        """As :meth:`settle`, but keeps violations instead of raising them.

        `failures` is how many sends must have failed by then at each rank, if that is known:
        cleanup retries have no counter, and shutdown does not wait for them.

        `calls` is how often each call must have run at each rank, if that is known. After its
        caller has given a call up, the caller no longer counts it, and its callee does not count
        it before it arrives; shutdown drops it. If a call never comes, :func:`judge` reports it.

        `is_kept` says whether known findings make the ranks keep what they hold. Then that needs no
        long look.
        """
        return self._settling.settle_to(expect, failures, calls, is_kept)

    def come_to_rest(self) -> tuple[Counters, ...]:
        """Wait until nothing changes any more, whatever the ranks hold then; return that.

        For a program of which nothing is predicted. It ends at the latest when a settle would.
        """
        return self._settling.come_to_rest()

    def run_branches(
        self,
        branches: Sequence[Branch],
        contexts: Mapping[str, int],
        goes_on: Callable[[StepOutcome], bool],
        *,
        together: bool = False,
        stuck: Collection[int] = (),
    ) -> list[StepOutcome]:
        """Run branches of numbered steps at the same time, each branch at a rank of its own.

        A branch ends early after a step whose `goes_on` is false. It is a hang when nothing has
        changed for long enough; the steps that still run then count as not ended.

        Args:
            together: send the steps of a branch, which is then the only one, to its rank at once.
                None but the last may have to raise: the rank runs the next one before `goes_on` is
                asked, unless a step has raised.
            stuck: the numbers of steps that a known finding keeps from ending. Where no other step
                runs, it is a hang sooner.
        """
        return self._driver.run_branches(
            branches, contexts, goes_on, together=together, stuck=stuck
        )
