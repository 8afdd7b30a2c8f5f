"""The shipped properties, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypothesis import strategies as st

from rpcprops.agents.wire import NAME as WIRE
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import predict
from rpcprops.programs import Member, Program, Rejoin
from rpcprops.properties import _messages as m
from rpcprops.properties import _programs as p
from rpcprops.properties._base import Case, Property
from rpcprops.properties._drawn_messages import drawn_under_message_faults
from rpcprops.properties._findings import finding_properties
from rpcprops.strategies import (
    fault_plans,
    fault_tables,
    group_programs,
    programs,
    programs_under_faults,
)
from rpcprops.strategies.drawing import KINDS
from rpcprops.torch_facts import TorchFacts, installed


@dataclass(frozen=True)
class _UnderFaults:
    """Each program under plans within the retry budget; shrinks to the first, without faults."""

    programs: Sequence[Program]

    def __call__(self) -> st.SearchStrategy[Case]:
        @st.composite
        def cases(draw: st.DrawFn) -> Case:
            program = draw(st.sampled_from(self.programs))
            return Case(program, draw(fault_plans(world_size=program.world_size)))

        return cases()


#: The retried types whose budget is so small that one example can use it up.
_RREF_MESSAGES = tuple(m for m in MessageType if m.max_retries == 5)
#: A timeout leaves a busy machine some seconds of real time, in which a usual case runs many times.
_FOR_A_TIMEOUT = 4
#: The same where about half of the cases wait for one.
_FOR_SOME_TIMEOUTS = 2
#: Delays of all calls of a rank, or of all fetches, in virtual seconds. Half of one is a timeout,
#: also on a busy machine.
_LATE: tuple[Mapping[MessageType, float], ...] = tuple(
    dict.fromkeys(messages, late)
    for late in (4.0, 20.0)
    for messages in (
        [MessageType.PYTHON_CALL],
        [MessageType.PYTHON_RREF_FETCH_CALL, MessageType.SCRIPT_RREF_FETCH_CALL],
    )
)
#: What a use of an RRef meets that comes after one which has timed out.
_LATE_FINDINGS = ("timed-out-type-query", "fetch-after-delete")
#: The kinds of step that make and use RRefs, with calls through them.
_OF_RREFS = ("remote", "own", "share", "through", "fetch", "drop", "settle")
_NOT_CREATING = tuple(m for m in MessageType if not m.endswith("_REMOTE_CALL"))


#: Makes tables to draw from, for a torch of which that is known.
_Tables = Callable[[TorchFacts], st.SearchStrategy[FaultTable]]


def _drawn(tables: _Tables, facts: TorchFacts | None) -> st.SearchStrategy[Case]:
    """Drawn programs, each for a drawn plan."""
    known = facts or installed()
    usual = programs_under_faults(
        max_world_size=4,
        max_steps=12,
        tables=tables(known),
        facts=known,
        kinds=(*KINDS, Rejoin.op),
    )
    drawn = [usual]
    if not any(map(known.has_bug, _LATE_FINDINGS)):
        # Few drawn programs use an RRef again after a use of it has timed out, and few plans delay
        # messages for long. So every third program has few kinds of step, under such a plan.
        late = programs_under_faults(
            min_world_size=2,
            max_world_size=4,
            max_steps=12,
            tables=st.tuples(tables(known), st.sampled_from(_LATE)).map(_with_late),
            kinds=_OF_RREFS,
            branches=False,
            facts=known,
        )
        drawn = [usual, usual, late]
    return st.one_of(*drawn).map(lambda pair: Case(*pair))


def _with_late(pair: tuple[FaultTable, Mapping[MessageType, float]]) -> FaultTable:
    """A table with further delays."""
    table, late = pair
    return replace(table, messages_to_delay={**table.messages_to_delay, **late})


def _within_budget(_: TorchFacts) -> st.SearchStrategy[FaultTable]:
    """Tables that torch retries away."""
    return fault_tables()


def _beyond_budget(_: TorchFacts) -> st.SearchStrategy[FaultTable]:
    """Tables that may use up retries."""
    return fault_tables(messages=_RREF_MESSAGES, max_fail_sends=7)


def _losing(facts: TorchFacts) -> st.SearchStrategy[FaultTable]:
    """Tables that lose calls."""
    tables = fault_tables(messages=tuple(MessageType), max_fail_sends=2)
    if not facts.has_bug("second-failed-remote"):
        return tables
    # Creations are lost less often: the second loss in a process meets the known finding, which
    # takes seconds to show.
    return st.one_of(*[fault_tables(messages=_NOT_CREATING, max_fail_sends=2)] * 9, tables)


def _timed(*, in_time: bool) -> Callable[[], st.SearchStrategy[Case]]:
    """A call whose timeout is clearly shorter, or clearly longer, than the delay of its message."""

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        flavour = draw(st.sampled_from(p.FLAVOURS))
        message = MessageType.PYTHON_CALL if flavour == "python" else MessageType.SCRIPT_CALL
        delay = draw(st.integers(1000, 2000)) / 1000
        # Far above: a fast clock also multiplies the time that the real work takes.
        timeout = delay + 600.0 if in_time else draw(st.integers(100, 500)) / 1000
        table = FaultTable(messages_to_delay={message: delay})
        return Case(p.timed_call(flavour, timeout), FaultPlan(by_rank={0: table}))

    return cases


def _of_groups(facts: TorchFacts | None) -> st.SearchStrategy[Case]:
    """Drawn programs of dynamic groups, which no fault can reach."""
    drawn = group_programs(facts=facts)
    return (drawn if facts is None else drawn.map(_as_far_as_it_goes)).map(Case)


def _as_far_as_it_goes(program: Program) -> Program:
    """The first steps of a program of a group, up to where a finding leaves nothing to predict.

    On a torch with failed-join-keeps-token, a join after a refused one waits for a day. On one with
    rejoins-alone, who came back and the others do not know each other, so only Member steps follow.
    """
    steps = program.steps
    while steps:
        program = replace(program, steps=steps)
        try:
            met = predict(program, FaultPlan(), installed()).met
        except UsageError:
            steps = steps[:-1]
            continue
        alone = [one.step for one in met if one.finding == "rejoins-alone"]
        first = min((step for step in alone if step is not None), default=len(steps))
        last = next((n for n, x in enumerate(steps) if n > first and x.op != Member.op), len(steps))
        if last == len(steps):
            return program
        steps = steps[:last]
    msg = "a group without members can be predicted"
    raise AssertionError(msg)


def _undisturbed(facts: TorchFacts | None) -> st.SearchStrategy[Case]:
    """Drawn programs without any fault."""
    # For a plan without faults, steps are drawn too that some fault would disturb.
    kinds = _kinds(facts or installed())
    drawn = programs(max_world_size=4, max_steps=12, facts=facts, plan=FaultPlan(), kinds=kinds)
    return drawn.map(Case)


def _kinds(facts: TorchFacts) -> Sequence[str]:
    """All kinds of step that are drawn where there is no fault.

    Two kinds show nothing but a finding where torch has it.
    """
    findings = {"retry": "retried-without-payload", "fail_twice": "freed-context-used"}
    shown = (kind for kind, name in findings.items() if not facts.has_bug(name))
    return (*KINDS, Rejoin.op, *shown)


def _of_messages(facts: TorchFacts | None) -> st.SearchStrategy[Case]:
    """Drawn programs under faults of messages that they send."""
    return drawn_under_message_faults(facts or installed())


def drawn_properties(facts: TorchFacts | None = None) -> Mapping[str, Property]:
    """The properties whose programs are drawn, by name.

    Args:
        facts: what is known of the torch that they are drawn for (None: the installed one, when
            they are examined). Which findings explain what a run shows does not depend on it.
    """
    found = (
        Property(
            "drawn-without-faults",
            "Whatever program is drawn shows what it must where no fault is injected.",
            partial(_undisturbed, facts),
            needs_faults=False,
            injects=False,
        ),
        Property(
            "drawn-within-budget",
            "Whatever program is drawn shows what it must, under any faults that torch retries "
            "away.",
            partial(_drawn, _within_budget, facts),
        ),
        Property(
            "drawn-lost-calls",
            "Where calls are lost, their callers are told, and everything else settles but the "
            "forks that the lost calls carried.",
            partial(_drawn, _losing, facts),
        ),
        Property(
            "drawn-beyond-budget",
            "Where retries are used up, what stays is what docs/faults.md says, and shutdown "
            "tells.",
            partial(_drawn, _beyond_budget, facts),
        ),
        Property(
            "drawn-groups",
            "Members of a dynamic group join, call each other, leave and are refused as "
            "documented.",
            partial(_of_groups, facts),
            needs_faults=False,
            injects=False,
        ),
        Property(
            "drawn-message-faults",
            "Whatever program is drawn shows what it must where single messages fail, are lost, "
            "late or held, or come twice.",
            partial(_of_messages, facts),
            agent=WIRE,
        ),
    )
    return {item.name: item for item in found}


_DRAWN = drawn_properties()
#: Many bugs need no fault.
WITHOUT_FAULTS = _DRAWN["drawn-without-faults"]

_ALL = (
    Property(
        "rref-values",
        "Every fetch, on every rank, at any time that a handle is alive, gives the value.",
        _UnderFaults(
            [
                *(p.create_and_fetch(flavour) for flavour in p.FLAVOURS),
                p.create_on_self(),
                p.fork_user_to_user(),
                p.fork_to_self(),
                p.fork_chain(4),
                p.owner_shares(4),
                p.handle_as_argument(),
                *(p.nested_remote(flavour) for flavour in p.FLAVOURS),
            ]
        ),
    ),
    Property(
        "rref-lifetime",
        "An owner stays while any user lives; nothing stays anywhere after the last is gone.",
        _UnderFaults(
            [
                p.fork_user_to_user(),
                p.fork_user_to_owner(),
                p.fork_back_to_creator(),
                p.fork_to_self(),
                p.fork_chain(3),
                p.fork_chain(4),
                p.owner_shares(3),
                *p.drop_orders(),
            ]
        ),
    ),
    Property(
        "calls-run-once",
        "Each user-visible call runs exactly once on its target, however often messages fail.",
        _UnderFaults(
            [
                p.bump_from_everywhere(),
                p.calls_of_each_kind(),
                p.handle_as_argument(),
                *(p.nested_remote(flavour) for flavour in p.FLAVOURS),
            ]
        ),
    ),
    Property(
        "autograd-gradients",
        "Gradients through a context equal those of the same computation in one process.",
        _UnderFaults(
            [
                p.context_over(2, (1,)),
                p.context_over(2, (1, 0), nested=True),
                p.context_over(3, (1, 2)),
                p.context_over(3, (1, 2), nested=True),
                p.context_over(3, (1, 2), rrefs=True),
                p.context_over(4, (1, 2, 3)),
                p.context_over(4, (3, 2, 1, 0), nested=True, at=2),
                p.two_contexts(),
            ]
        ),
    ),
    Property(
        "autograd-cleanup",
        "After a context ends, no rank that it touched keeps it or a backward pass, and its id is "
        "refused everywhere.",
        _UnderFaults(
            [
                p.context_over(2, (0,)),
                p.context_over(2, (1,)),
                p.context_over(2, (1,), backward=False),
                p.context_over(3, (1, 2), raises=True),
                p.context_over(3, (1, 2), rrefs=True, backward=False, raises=True),
                p.context_over(4, (1, 2, 3), nested=True),
                p.context_over(4, (1, 2, 3), rrefs=True),
                p.two_contexts(),
            ]
        ),
    ),
    Property(
        "graceful-shutdown",
        "Graceful shutdown right after the last step ends in bounded time, with exit code 0 and no "
        "leak, whatever handles are alive or just dropped.",
        _UnderFaults([p.just_dropped(), p.unsettled_exit(3), p.unsettled_exit(4)]),
    ),
    Property(
        "timeout-passes",
        "A call whose timeout is clearly shorter than its delay raises torch's timeout, and "
        "everything still settles.",
        _timed(in_time=False),
    ),
    Property(
        "timeout-holds",
        "A call whose timeout is clearly longer than its delay gives its value.",
        _timed(in_time=True),
    ),
    *_DRAWN.values(),
    Property(
        "executed-twice",
        "A message that torch may try again, executed twice, changes nothing: it came twice, or "
        "its answer was lost or late, and torch tried it again.",
        m.EXECUTED_TWICE,
        agent=WIRE,
        costs=_FOR_SOME_TIMEOUTS,
    ),
    Property(
        "any-order",
        "Whatever messages are late, or wait until another one has passed, nothing changes.",
        m.ANY_ORDER,
        agent=WIRE,
    ),
    Property(
        "unanswered-calls",
        "A call whose answer is lost, or comes after the timeout, runs once, and its caller gets "
        "torch's timeout.",
        m.UNANSWERED_CALLS,
        compares=False,
        agent=WIRE,
        costs=_FOR_A_TIMEOUT,
    ),
    Property(
        "unanswered-in-context",
        "Where an answer in forward or backward is lost or too late, the caller gets torch's "
        "timeout, and no rank keeps the context.",
        m.UNANSWERED_IN_CONTEXT,
        compares=False,
        agent=WIRE,
        costs=_FOR_A_TIMEOUT,
    ),
    *finding_properties(),
)

#: The shipped properties by name, in the order in which they are checked.
PROPERTIES: dict[str, Property] = {item.name: item for item in _ALL}


def shipped_programs() -> dict[str, Program]:
    """The programs of the properties that run under sampled plans, by name."""
    found: dict[str, Program] = {}
    for item in _ALL:
        if isinstance(item.cases, _UnderFaults):
            found.update({program.name: program for program in item.cases.programs})
    return found
