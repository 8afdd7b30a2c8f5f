"""The smallest case of each known finding of stock torch, as a property that torch breaks.

A case is a function of a number, which changes a value and nothing else, if the case has a value.
Where a finding shows only if two messages come in a certain order, there is a second case, for the
agent ``wire``: it holds one message until the other has passed, so every run shows the finding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from hypothesis import strategies as st

from rpcprops.faults import MAX_DELAY, FaultPlan, FaultTable, MessageFault, NthMessage
from rpcprops.oracle import FINDINGS
from rpcprops.programs import (
    After,
    Ask,
    Carry,
    Context,
    Deferred,
    Drop,
    End,
    FailTwice,
    Fetch,
    Gather,
    Graph,
    Linear,
    Member,
    Method,
    Module,
    Nest,
    Onward,
    Outlast,
    Own,
    Profile,
    Program,
    Raising,
    Reach,
    Rejoin,
    Remote,
    Retry,
    Settle,
    Share,
    Step,
    Through,
    Train,
    Value,
)
from rpcprops.properties._base import Case, Property
from rpcprops.steps.graphs import Operation

#: How many different cases each finding has.
CASES = 1000


def _case(world_size: int, *steps: Step, settles: bool = True, **tables: FaultTable) -> Case:
    """A case without faults, or with a table for some ranks: ``rank1=table``."""
    plan = FaultPlan(
        by_rank={int(name.removeprefix("rank")): table for name, table in tables.items()}
    )
    return Case(Program(world_size, steps, settles=settles), plan)


def _value(number: int) -> Value:
    return (float(number),)


def _reinitialised(number: int) -> Case:
    case = _case(2, Remote(0, 1, "a", left=_value(number)), Drop(0, "a"))
    return Case(case.program, case.plan, kind="reinit")


def _given_up_fork_request(number: int) -> Case:
    """Rank 1 makes an RRef at rank 2, and answers with it."""
    return _case(
        3,
        Nest(0, 1, 2, "a", left=_value(number)),
        rank0=FaultTable(["RREF_FORK_REQUEST"], 6),
    )


def _second_failed_remote(number: int) -> Case:
    return _case(
        2,
        Remote(0, 1, "a", left=_value(number)),
        Remote(0, 1, "b"),
        Fetch(0, "b"),
        rank0=FaultTable(["PYTHON_REMOTE_CALL"], 1),
    )


def _dropped_while_made(number: int) -> Case:
    """The function takes 9 s longer than the timeout. The shutdown drops the RRef meanwhile."""
    made = Remote(0, 1, "a", left=_value(number), timeout=3.0, seconds=12.0)
    return _case(2, made, settles=False)


def _overtaken_creation(number: int) -> Case:
    return _case(
        2,
        Own(0, "a", _value(number)),
        Remote(0, 1, "b", right="a"),
        settles=False,
        rank0=FaultTable(["RREF_USER_DELETE"], 3),
        rank1=FaultTable(["RREF_USER_DELETE"], 3, {"SCRIPT_RREF_FETCH_CALL": 2.0}),
    )


def _deleted_argument(number: int) -> Case:
    return _case(
        2,
        Own(0, "a", _value(number)),
        Remote(0, 1, "b", right="a"),
        settles=False,
        rank0=FaultTable(["RREF_USER_DELETE"], 1),
        rank1=FaultTable(messages_to_delay={"SCRIPT_RREF_FETCH_CALL": 2.0}),
    )


def _timed_out_type_query(number: int) -> Case:
    return _case(
        2,
        Remote(0, 1, "a", left=_value(number)),
        Through(0, "a", timeout=0.5),
        Through(0, "a"),
        rank0=FaultTable(messages_to_delay={"PYTHON_CALL": 1.0}),
    )


def _failed_async_proxy(number: int) -> Case:
    """The value has no method of that name."""
    return _case(2, Method(0, 1, "async", "missing", float(number)))


def _asynchronous_proxy(number: int) -> Case:
    """A pass through an operation that is called by ``rref.rpc_async()``, inside a context."""
    operation: Operation = ("add", (0, 0), 1, "proxy async")
    return _case(2, Graph(0, "x", ((0, "plain"),), (operation,), ((1,),), _value(number)))


def _failed_backward(number: int) -> Case:
    return _case(2, Context(0, "x", (1, 0), value=_value(number), nested=True, breaks=0))


def _outlasted(number: int) -> Case:
    return _case(2, Outlast(0, 1, "x", "argument", left=_value(number), seconds=4.0))


def _failed_twice(number: int) -> Case:
    return _case(3, FailTwice(0, 1, 2, "x", value=_value(number), seconds=8.0))


def _early_fork(number: int) -> Case:
    """The owner gets its own RRef 1 s before the value, because the function's argument is late."""
    return _case(
        2,
        Own(1, "o", _value(number)),
        Remote(1, 0, "a", right="o"),
        Share(1, "a", 0, "b"),
        Share(0, "b", 0, "c"),
        Fetch(0, "b"),
        rank0=FaultTable(messages_to_delay={"SCRIPT_RREF_FETCH_CALL": 1.0}),
    )


def _lost_fetch(number: int) -> Case:
    return _case(
        2,
        Remote(0, 1, "a", left=_value(number)),
        Fetch(0, "a"),
        rank0=FaultTable(["PYTHON_RREF_FETCH_CALL"], 1),
    )


def _late_remote_to_self(number: int) -> Case:
    return _case(
        1,
        Remote(0, 0, "a", left=_value(number), timeout=0.5),
        rank0=FaultTable(messages_to_delay={"PYTHON_REMOTE_CALL": 1.0}),
    )


def _garbled_text(number: int) -> Case:
    return _case(2, Raising(0, 1, text=": caf\u00e9", more=number))


def _set_exception(number: int) -> Case:
    return _case(2, Deferred(0, 1, 0, "exception", _value(number)))


def _unpicklable(_: int) -> Case:
    return _case(2, Carry(0, 1, "rref-and-lock", "echo"))


def _unwritable(_: int) -> Case:
    return _case(2, Carry(0, 1, "sparse_csc", "echo"))


def _guessed(_: int) -> Case:
    return _case(2, Carry(0, 1, "dtype", "own"))


def _attribute_error(_: int) -> Case:
    return _case(2, Carry(0, 1, "missing-unpickled"))


def _unconfirmed(number: int) -> Case:
    """Rank 1 answers with an RRef of its own."""
    made = Nest(0, 1, 1, "a", left=_value(number))
    return _case(2, made, Settle(), Ask(0, "a", "confirmed_by_owner"))


def _rounded(number: int) -> Case:
    """The second step takes the gradient of the first one, of the same sign, for its factor."""
    return _case(2, Train(0, "x", (1,), "Rprop", value=_value(number + 1)))


def _default_rate(number: int) -> Case:
    """With the loss x ** 2, a step of SGD takes away twice the rate times x."""
    return _case(2, Train(0, "x", (1,), "SGD", 1, _value(number + 1), options=("default_lr",)))


def _wrong_parameter(number: int) -> Case:
    """The second of two parameters of one rank is in the loss."""
    return _case(2, Train(0, "x", (1, 1), "Adagrad", 1, _value(number), left_out=((0, 0),)))


def _stale(number: int) -> Case:
    """The second parameter is in the loss of the first step alone."""
    return _case(2, Train(0, "x", (1, 1), "NAdam", 2, _value(number + 1), left_out=((1, 1),)))


def _unchecked(_: int) -> Case:
    """A negative rate."""
    return _case(2, Train(0, "x", (1,), "SGD", 1, refused="lr"))


def _skipped_hooks(number: int) -> Case:
    """One hook doubles the input, the other one adds to the outputs."""
    return _case(2, Linear(0, "x", 1, _value(number), layer="hooked"))


def _taken_name(number: int) -> Case:
    """The module at the owner accepts the keyword."""
    return _case(2, Linear(0, "x", 1, _value(number), layer="device"))


def _retried(number: int) -> Case:
    """The second try comes after about a second; without the finding, the value comes with it."""
    return _case(2, Retry(0, 1, 0, _value(number), timeout=8.0))


def _lost_events(number: int) -> Case:
    """An agent has eight threads, so one of them serves a second call."""
    return _case(2, Profile(0, 1, left=_value(number), times=9))


def _kept_key(number: int) -> Case:
    return _case(2, Profile(0, 1, left=_value(number), unpicklable=True))


def _counted_refusal(_: int) -> Case:
    return _case(2, Rejoin(0, failing="running"))


def _gathered_apart(_: int) -> Case:
    """Rank 1 leaves gracefully, without rank 0, which has left at once; then both come back.

    They leave in a step and not in the shutdown that ends a run, because a step that hangs is seen
    after seconds, and a shutdown may take minutes.
    """
    return _case(2, Rejoin(1, alone=0), Rejoin(1))


def _no_thread(number: int) -> Case:
    """The only thread of rank 1 waits for 4 s, for a call that has a timeout of 1 s."""
    program = Program(
        2,
        (Onward(0, 1, 0, left=_value(number), within=1.0, seconds=2.0, patience=4.0),),
        num_worker_threads=1,
    )
    return Case(program, FaultPlan())


def _refused_join(_: int) -> Case:
    steps = (Member(0), Member(1, "refused"), Member(0, "leave"))
    return _case(2, *steps, settles=False)


def _rejoined(_: int) -> Case:
    """The refused join is the first ``init_rpc`` of rank 1."""
    return _case(2, Member(0), Member(1, "refused"), Member(1), settles=False)


def _left_with_an_rref(number: int) -> Case:
    steps = (Remote(1, 0, "a", left=_value(number)), Member(1, "leave"))
    return _case(2, Member(0), Member(1), *steps, Member(0, "look"), settles=False)


def _dashed(_: int) -> Case:
    return _case(2, Member(0, dash=True), Member(1), settles=False)


def _late_answer(number: int) -> Case:
    """The answer comes 9 s after the timeout."""
    return _case(2, Nest(0, 1, 1, "a", left=_value(number), timeout=3.0, seconds=12.0))


def _sent_after_reinit(number: int) -> Case:
    """Rank 1 sends an RRef of rank 0 back to it."""
    return _case(2, Rejoin(0), Nest(0, 1, 0, "a", left=_value(number)))


def _fetch_after_delete(number: int) -> Case:
    """The fetch leaves when its timeout has come, and the delete follows it at once."""
    return _case(
        2,
        Remote(0, 1, "a", left=_value(number)),
        Settle(),
        Fetch(0, "a", timeout=1.0),
        Drop(0, "a"),
        rank0=FaultTable(messages_to_delay={"PYTHON_RREF_FETCH_CALL": 2.0}),
    )


def _dropped_in_shutdown(_: int) -> Case:
    """A thread of rank 1 drops 150 RRefs while their owner, rank 0, shuts down at once.

    The values are large, so that the owner needs some milliseconds to forget them. Rank 1 leaves a
    little later.
    """
    steps = (
        Remote(1, 0, "a", flavour="script", megabytes=2, beside=149),
        Settle(),
        Drop(1, "a", "thread"),
    )
    end = End("at once", (0.0, 4.0), ignores_leaks=True)
    return Case(Program(2, steps, settles=False, end=end), FaultPlan())


#: What torch promises, and the smallest case in which it breaks that promise.
_CASES: dict[str, tuple[str, Callable[[int], Case]]] = {
    "rref-lifetime-after-reinit": (
        "In a process that shut RPC down and initialised it again, RRefs are deleted as before.",
        _reinitialised,
    ),
    "fork-request-given-up": (
        "A rank whose fork request is lost for good says so, and lives on.",
        _given_up_fork_request,
    ),
    "second-failed-remote": (
        "Every RRef whose creation failed says so, however many have failed before.",
        _second_failed_remote,
    ),
    "timed-out-remote-dropped": (
        "An RRef whose creation timed out is deleted at its owner once its user has dropped it.",
        _dropped_while_made,
    ),
    "shutdown-overtakes-creation": (
        "A graceful shutdown straight after a remote() leaves no RRef behind.",
        _overtaken_creation,
    ),
    "shutdown-deletes-argument": (
        "A function that another rank has started can use its arguments until it ends.",
        _deleted_argument,
    ),
    "timed-out-type-query": (
        "A call through an RRef after one that timed out is made anew.",
        _timed_out_type_query,
    ),
    "failed-async-proxy": (
        "An RRef through which a call failed is dropped like any other.",
        _failed_async_proxy,
    ),
    "async-proxy-leaves-context": (
        "A call inside an autograd context is part of it, in whatever way it is made.",
        _asynchronous_proxy,
    ),
    "failed-backward-revisits-rank": (
        "A backward pass that fails ends on every rank.",
        _failed_backward,
    ),
    "context-after-cleanup": (
        "An autograd context whose calls have all ended, and which was left, is kept by no rank.",
        _outlasted,
    ),
    "freed-context-used": (
        "A backward pass that fails at two ranks harms nothing but itself.",
        _failed_twice,
    ),
    "early-owner-fork": (
        "An owner that is sent its own RRef may send it on to itself, whenever its value comes.",
        _early_fork,
    ),
    "readable-injected-error": (
        "A call whose message is lost raises an error that says so.",
        _lost_fetch,
    ),
    "late-remote-to-self": (
        "A remote() to the own rank that times out fails without an internal error of torch.",
        _late_remote_to_self,
    ),
    "garbled-exception-text": (
        "The text of an exception reaches the caller as it was.",
        _garbled_text,
    ),
    "future-exception-as-value": (
        "An exception that an async_execution function sets on its future is raised at the caller.",
        _set_exception,
    ),
    "unpicklable-after-rref": (
        "A message that cannot be pickled keeps no RRef alive.",
        _unpicklable,
    ),
    "unwritable-tensor": (
        "A tensor that torch cannot send raises an error at its sender.",
        _unwritable,
    ),
    "guessed-rref-type": (
        "RRef(value) gives the value that it was made of.",
        _guessed,
    ),
    "attribute-error-as-value": (
        "An AttributeError while an answer is unpickled is raised at the caller.",
        _attribute_error,
    ),
    "unconfirmed-user": (
        "A user's RRef says that it is confirmed once its owner knows of it.",
        _unconfirmed,
    ),
    "rounded-rprop-factor": (
        "DistributedOptimizer computes in float64 what the optimizer computes in one process.",
        _rounded,
    ),
    "functional-default-rate": (
        "DistributedOptimizer has the default rate of the optimizer that it is given.",
        _default_rate,
    ),
    "adagrad-wrong-parameter": (
        "DistributedOptimizer steps each parameter with its own gradient.",
        _wrong_parameter,
    ),
    "stale-gradients": (
        "DistributedOptimizer steps with the gradients of the context that it is given.",
        _stale,
    ),
    "unchecked-optimizer-options": (
        "DistributedOptimizer refuses what the optimizer that it is given refuses.",
        _unchecked,
    ),
    "remote-module-skips-hooks": (
        "A RemoteModule gives what its module gives when it is called.",
        _skipped_hooks,
    ),
    "remote-module-takes-names": (
        "A RemoteModule takes the arguments that the forward of its module takes.",
        _taken_name,
    ),
    "remote-module-drops-mode": (
        "train(False) puts a RemoteModule into evaluation mode.",
        lambda number: _case(2, Module(0, 1, _value(number), mode="train(False)")),
    ),
    "remote-module-mode-copies": (
        "eval() of a RemoteModule returns the RemoteModule.",
        lambda number: _case(2, Module(0, 1, _value(number), mode="returned")),
    ),
    "rebuilt-module-not-callable": (
        "A RemoteModule can be called, whoever has made it.",
        lambda number: _case(2, Module(0, 1, _value(number), again=True, called=True)),
    ),
    "proxy-takes-keywords": (
        "A proxy takes the arguments that the method takes.",
        lambda number: _case(2, Method(0, 1, form="keyword timeout", start=float(number))),
    ),
    "proxy-hides-methods": (
        "A proxy calls the method of the object, whatever its name.",
        lambda number: _case(2, Method(0, 1, form="named rref", start=float(number))),
    ),
    "proxy-asks-class": (
        "A proxy calls what the object has under a name.",
        lambda number: _case(2, Method(0, 1, form="attribute", start=float(number))),
    ),
    "retried-without-payload": (
        "A message that torch tries again does what its first try could not.",
        _retried,
    ),
    "profiled-events-lost": (
        "A profiler shows what ran remotely, however often it was used before.",
        _lost_events,
    ),
    "profiling-key-kept": (
        "After a call that could not be pickled, a profiler shows further calls as before.",
        _kept_key,
    ),
    "refused-init-counted": (
        "After an init_rpc that was refused, the ranks can leave and come back as before.",
        _counted_refusal,
    ),
    "gathering-count-kept": (
        "After a graceful shutdown that one rank missed, ranks come back and can shut down.",
        _gathered_apart,
    ),
    "timeout-needs-thread": (
        "A call ends by its timeout, whatever the threads of its rank do.",
        _no_thread,
    ),
    "failed-join-keeps-token": (
        "A join of a dynamic group that torch refuses keeps no member from leaving.",
        _refused_join,
    ),
    "rejoins-alone": (
        "Who joins a dynamic group finds its members, however often it has called init_rpc before.",
        _rejoined,
    ),
    "leaving-keeps-values": (
        "A member that leaves a dynamic group gracefully deletes the RRefs that it uses.",
        _left_with_an_rref,
    ),
    "dash-in-member-name": (
        "A member of a dynamic group may have any name that torch allows.",
        _dashed,
    ),
    "late-answer-keeps-rref": (
        "An RRef in an answer that comes after the timeout of its call is deleted at its owner.",
        _late_answer,
    ),
    "rref-sent-after-reinit": (
        "In a process that shut RPC down and initialised it again, RRefs can be sent as before.",
        _sent_after_reinit,
    ),
    "fetch-after-delete": (
        "An owner answers each request for an RRef, also one that comes after the RRef's delete.",
        _fetch_after_delete,
    ),
    "owner-ignores-timeout": (
        "Where a value is not made in time, to_here() raises a timeout, at its owner too.",
        lambda number: _case(
            1, Remote(0, 0, "a", left=_value(number), seconds=40.0), Fetch(0, "a", timeout=1.0)
        ),
    ),
    "unreadable-remote": (
        "An RRef whose owner could not read the call that should make it raises, and is forgotten.",
        lambda number: _case(2, Carry(0, 1, "raises-unpickled", "remote-echo")),
    ),
    "unreadable-tensor": (
        "A tensor that cannot be read is refused with an error.",
        lambda number: _case(2, Carry(0, 1, "quint4x2", "echo")),
    ),
    "failed-pickle-keeps-tensors": (
        "The tensors of a message that cannot be pickled do not stay in memory.",
        lambda number: _case(2, Carry(0, 1, "tensor-and-lock", "echo")),
    ),
    "refused-remote-to-self": (
        "A remote to the own rank that torch refuses to send leaves no RRef.",
        lambda number: _case(1, Carry(0, 0, "meta", "remote-echo")),
    ),
    "shutdown-races-delete": (
        "A shutdown that waits for nobody ends, whatever other ranks still delete.",
        _dropped_in_shutdown,
    ),
    "long-timeout-ends-at-once": (
        "A call whose timeout is long ends with its value.",
        lambda number: _case(2, Reach(0, 1, left=_value(number), timeout=3e6, seconds=2.0)),
    ),
    "short-timeout-never-comes": (
        "A call that takes longer than its timeout raises a timeout, however short that is.",
        lambda number: _case(2, Reach(0, 1, left=_value(number), timeout=0.0005, seconds=2.0)),
    ),
    "refused-exception-kept": (
        "A future that refuses an exception keeps its result.",
        lambda number: _case(2, After(0, 1, "exception late", _value(number))),
    ),
    "collect-all-ends-early": (
        "The future of collect_all is completed when all of its futures are.",
        lambda number: _case(2, Gather(0, (1, 1), "done", _value(number), breaks=0, seconds=6.0)),
    ),
    "optimizer-options-by-place": (
        "DistributedOptimizer gives the optimizer its arguments, by place or by name.",
        lambda number: _case(
            2,
            Train(*(0, "x", (1,), "Adagrad", 1, _value(number + 1)), options=("eps",), placed=True),
        ),
    ),
}


#: Real seconds for which a message is held at most. What it waits for comes much sooner.
_HELD_SECONDS = 3.0


def _holding(case: Case, held: MessageFault) -> Case:
    return replace(case, plan=replace(case.plan, others=(held,)))


def _held_creation(number: int, seconds: float) -> Case:
    """The creation is held until its owner has sent the RRef to itself."""
    case = _case(
        2,
        Remote(1, 0, "a", left=_value(number)),
        Share(1, "a", 0, "b"),
        Share(0, "b", 0, "c"),
        Fetch(0, "b"),
    )
    until = NthMessage(0, "PYTHON_CALL")
    return _holding(case, MessageFault(1, "hold", "PYTHON_REMOTE_CALL", delay=seconds, until=until))


def _held_behind_its_delete(number: int, seconds: float) -> Case:
    """The creation is held until the delete of its fork, which follows its timeout."""
    case = _case(2, Remote(0, 1, "a", left=_value(number), timeout=1.0), Drop(0, "a"))
    until = NthMessage(0, "RREF_USER_DELETE")
    return _holding(case, MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=seconds, until=until))


def _held_in_shutdown(number: int, seconds: float) -> Case:
    """The creation is held until its owner has deleted what it uses, at last in its shutdown.

    An owner looks whether it owns anything right after it has begun to delete what it uses. Its
    delete fails once here, so it has looked long before that delete arrives. The delete of the RRef
    itself fails five times, which takes longer than all ranks need to leave.
    """
    case = _case(
        2,
        Own(0, "o", _value(number)),
        Share(0, "o", 1, "p"),
        Remote(0, 1, "a"),
        settles=False,
        rank0=FaultTable(["RREF_USER_DELETE"], 5),
        rank1=FaultTable(["RREF_USER_DELETE"], 1),
    )
    until = NthMessage(1, "RREF_USER_DELETE", n=2)
    return _holding(case, MessageFault(0, "hold", "PYTHON_REMOTE_CALL", delay=seconds, until=until))


def _held_fetch(number: int, seconds: float) -> Case:
    """A function fetches its argument once the shutdown of its rank has deleted that."""
    case = _case(2, Own(0, "a", _value(number)), Remote(0, 1, "b", right="a"), settles=False)
    until = NthMessage(1, "RREF_USER_DELETE")
    return _holding(
        case, MessageFault(1, "hold", "SCRIPT_RREF_FETCH_CALL", delay=seconds, until=until)
    )


def _late_fetch(number: int, seconds: float) -> Case:
    """The fetch comes long after its timeout, which the delete of its RRef follows at once."""
    steps = (Remote(0, 1, "a", left=_value(number)), Fetch(0, "a", timeout=1.0), Drop(0, "a"))
    case = _case(2, *steps)
    # A settle waits for what is delayed. A fetch that is held leaves no sign that it has come.
    late = max(2.0, seconds / 3)
    return _holding(case, MessageFault(0, "delay", "PYTHON_RREF_FETCH_CALL", delay=late))


#: Cases for an agent that can hold messages, by a number and the longest hold in virtual seconds.
_HELD: dict[str, Callable[[int, float], Case]] = {
    "timed-out-remote-dropped": _held_behind_its_delete,
    "shutdown-overtakes-creation": _held_in_shutdown,
    "shutdown-deletes-argument": _held_fetch,
    "early-owner-fork": _held_creation,
    "fetch-after-delete": _late_fetch,
}

#: Findings that take minutes of real time: shutdowns that wait for what never comes.
_SLOW = frozenset({"shutdown-deletes-argument"})


def finding_case(name: str, number: int) -> Case:
    """The smallest case of a finding, by a number from 0 to :data:`CASES` - 1."""
    return _CASES[name][1](number)


def held_case(name: str, number: int, rate: float) -> Case | None:
    """The case of a finding for an agent that can hold messages; None if there is none.

    Args:
        rate: the clock rate at which it will run: a hold ends after some real seconds.
    """
    make = _HELD.get(name)
    return None if make is None else make(number, min(_HELD_SECONDS * rate, MAX_DELAY))


def _drawn(make: Callable[[int], Case]) -> st.SearchStrategy[Case]:
    return st.integers(0, CASES - 1).map(make)


def finding_properties() -> Iterator[Property]:
    """One property for each known finding; its only cases are the finding's smallest one."""
    for name, finding in FINDINGS.items():
        promise, make = _CASES[name]
        yield Property(
            name,
            promise,
            functools.partial(_drawn, make),
            needs_faults=False,
            injects=make(0).plan != FaultPlan(),
            finding=finding,
            only_named=name in _SLOW,
        )
