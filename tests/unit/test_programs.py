"""Programs as data: which ones are refused and with what words, and what a program is equal to."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from typing import Any

import pytest
from hypothesis.vendor.pretty import pretty

from rpcprops import programs as language
from rpcprops.errors import UsageError
from rpcprops.programs import (
    MAX_WORLD_SIZE,
    STEP_TYPES,
    Bump,
    Call,
    Chain,
    Context,
    Count,
    Drop,
    FailTwice,
    Fetch,
    HandleInfo,
    Leaf,
    Local,
    Module,
    Nest,
    Optimize,
    Own,
    Parallel,
    Pause,
    Program,
    Refused,
    Remote,
    Scope,
    Settle,
    Share,
    Step,
    Through,
    Wait,
    check_world_size,
)
from rpcprops.properties import _programs as shipped
from tests.seeded._programs import EVERY_KIND

NAMES = {
    name: getattr(language, name)
    for name in ("Program", *(c.__name__ for c in STEP_TYPES.values()))
}


def shipped_programs() -> list[Program]:
    """Every shipped program, and contexts with every combination of flags."""
    flags = itertools.product((False, True), repeat=4)
    return [
        *(shipped.create_and_fetch(flavour) for flavour in shipped.FLAVOURS),
        shipped.create_on_self(),
        shipped.fork_user_to_user(),
        shipped.fork_user_to_owner(),
        shipped.fork_back_to_creator(),
        shipped.fork_to_self(),
        shipped.fork_chain(4),
        shipped.owner_shares(4),
        *shipped.drop_orders(),
        *(shipped.nested_remote(flavour) for flavour in shipped.FLAVOURS),
        shipped.handle_as_argument(),
        shipped.calls_of_each_kind(),
        shipped.bump_from_everywhere(),
        *(
            shipped.context_over(3, (1, 2), nested=n, rrefs=r, backward=b, raises=x)
            for n, r, b, x in flags
        ),
        shipped.two_contexts(),
        shipped.unsettled_exit(4),
        shipped.just_dropped(),
        *(shipped.timed_call(flavour, 0.25) for flavour in shipped.FLAVOURS),
        shipped.create_and_drop(),
        *EVERY_KIND,
    ]


SHIPPED = shipped_programs()
HANDLE = Remote(0, 1, "a")
TYPED = Remote(0, 1, "a", flavour="builtin")
OTHER = (Own(2, "c"), Drop(2, "c"))


def refusal(*steps: Step, world_size: int = 2) -> str:
    """The message with which the last of some steps is refused."""
    with pytest.raises(UsageError) as caught:
        Program(world_size, steps)
    message = str(caught.value)
    last = len(steps) - 1
    assert message.startswith(f"step {last}, {steps[-1]!r}: "), message
    assert "\n" not in message
    return message.removeprefix(f"step {last}, {steps[-1]!r}: ")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("at", Remote(9, 1, "a")),
        ("to", Remote(0, 9, "a")),
        ("at", Own(9, "a")),
        ("at", Call(9, 1)),
        ("to", Call(0, 9)),
        ("at", Nest(9, 1, 0, "a")),
        ("via", Nest(0, 9, 1, "a")),
        ("to", Nest(0, 1, 9, "a")),
        ("at", Context(9, "x")),
        ("path", Context(0, "x", (1, 9))),
        ("at", Fetch(9, "a")),
        ("at", Drop(9, "a")),
        ("at", Bump(9, "a")),
        ("at", Share(9, "a", 1, "b")),
        ("to", Share(0, "a", 9, "b")),
        ("at", Refused(9, "x")),
        ("at", Local(9, "a")),
        ("at", Wait(9, "f")),
        ("at", Count(9, 1)),
        ("to", Count(0, 9)),
        ("at", Chain(9, 1, 0)),
        ("to", Chain(0, 9, 1)),
        ("then", Chain(0, 1, 9)),
        ("at", Through(9, "a")),
        ("at", Module(9, 1)),
        ("to", Module(0, 9)),
        ("at", Optimize(9, "x", (1,))),
        ("owners", Optimize(0, "x", (1, 9))),
        ("at", Pause(9)),
    ],
)
def test_a_rank_outside_the_world_is_refused(name: str, step: Step) -> None:
    """Every place that names a rank is checked; the message gives the place and the ranks."""
    assert refusal(step) == f"{name}=9 is no rank of a world of 2 (0 to 1)."


@pytest.mark.parametrize("rank", [-1, 2, True, "0", 1.0, None])
def test_what_is_no_rank_is_refused(rank: Any) -> None:
    """A rank is an int from 0 up to the world's size, and nothing that only looks like one."""
    assert refusal(Own(rank, "a")) == f"at={rank!r} is no rank of a world of 2 (0 to 1)."


@pytest.mark.parametrize(
    "step",
    [
        Fetch(0, "z"),
        Drop(0, "z"),
        Bump(0, "z"),
        Share(0, "z", 1, "b"),
        Call(0, 1, right="z"),
        Remote(0, 1, "b", right="z"),
        Local(0, "z"),
        Through(0, "z"),
    ],
)
def test_an_unknown_handle_is_refused(step: Step) -> None:
    """Every step that uses a handle needs one that was made before it."""
    assert refusal(HANDLE, step) == "there is no handle 'z' before this step; make it first."


@pytest.mark.parametrize(
    "step",
    [
        Fetch(0, "a"),
        Drop(0, "a"),
        Bump(0, "a"),
        Share(0, "a", 1, "b"),
        Call(0, 1, right="a"),
        Remote(0, 1, "b", right="a"),
        Local(0, "a"),
        Through(0, "a"),
    ],
)
def test_a_dropped_handle_is_refused(step: Step) -> None:
    """A handle that was let go of cannot be used again, not even to be dropped again."""
    message = refusal(TYPED, Drop(0, "a"), step)
    assert message == "handle 'a' was dropped before; drop it after its last use."


@pytest.mark.parametrize(
    "step",
    [
        Fetch(1, "a"),
        Drop(1, "a"),
        Bump(1, "a"),
        Share(1, "a", 0, "b"),
        Call(1, 0, right="a"),
        Remote(1, 0, "b", right="a"),
        Local(1, "a"),
        Through(1, "a"),
    ],
)
def test_a_handle_of_another_rank_is_refused(step: Step) -> None:
    """A handle lives at one rank; the message says where, and what to do to have it elsewhere."""
    assert refusal(TYPED, step) == "handle 'a' lives at rank 0, not at 1; share it first."


@pytest.mark.parametrize(
    "step",
    [
        Remote(0, 1, "a"),
        Own(1, "a"),
        Share(0, "a", 1, "a"),
        Nest(0, 1, 0, "a"),
        Through(0, "a", "remote", out="a"),
        Call(0, 1, wait="later", out="a"),
    ],
)
def test_a_handle_name_is_used_once(step: Step) -> None:
    """Every step that makes a handle needs a new name for it."""
    assert refusal(HANDLE, step) == "the handle name 'a' is taken; names are used once."


def test_the_name_of_a_dropped_handle_stays_taken() -> None:
    """A name means one handle in a whole program, so that a failure reads one way."""
    message = refusal(HANDLE, Drop(0, "a"), Own(0, "a"))
    assert message == "the handle name 'a' is taken; names are used once."


@pytest.mark.parametrize("flavour", ["builtin", "script"])
@pytest.mark.parametrize("kind", [Call, Remote])
def test_only_python_functions_take_handles(flavour: Any, kind: Any) -> None:
    """A builtin or TorchScript function cannot fetch what it is given."""
    names: dict[str, Any] = {} if kind is Call else {"out": "b"}
    message = refusal(HANDLE, kind(0, 1, right="a", flavour=flavour, **names))
    expected = f"only a Python function takes a handle as an argument, not a {flavour} one."
    assert message == expected


@pytest.mark.parametrize(
    "before",
    [
        (HANDLE,),
        (Nest(0, 1, 1, "a"),),
        (Remote(1, 0, "z"), Share(1, "z", 0, "a")),
    ],
)
def test_a_python_functions_handle_cannot_be_bumped(before: tuple[Step, ...]) -> None:
    """TorchScript must know the value's type, and the message says which flavours tell it."""
    message = refusal(*before, Bump(0, "a"))
    assert message.startswith("handle 'a' was made by a Python function")
    assert "flavour='builtin' or 'script'" in message


@pytest.mark.parametrize(
    "before",
    [
        (TYPED,),
        (Remote(0, 1, "a", flavour="script"),),
        (Own(0, "a"),),
        (Nest(0, 1, 1, "a", flavour="script"),),
        (Own(1, "z"), Share(1, "z", 0, "a")),
    ],
)
def test_a_handle_of_known_type_can_be_bumped(before: tuple[Step, ...]) -> None:
    """What TorchScript knows the type of stays known when it is shared."""
    assert Program(2, (*before, Bump(0, "a"))).steps[-1] == Bump(0, "a")


@pytest.mark.parametrize("step", [Context(1, "x"), Optimize(1, "x", (0,))])
@pytest.mark.parametrize("first", [Context(0, "x"), Optimize(0, "x", (1,))])
def test_a_context_name_is_used_once(first: Step, step: Step) -> None:
    """Two contexts cannot share a name, wherever they are, an optimizer's context among them."""
    message = refusal(first, step)
    assert message == "the context name 'x' is taken; names are used once."


@pytest.mark.parametrize("before", [(), (Context(0, "y"),), (Own(0, "x"),)])
def test_only_a_context_that_was_there_can_be_refused(before: tuple[Step, ...]) -> None:
    """The name in a refusal must be that of a context before it, not of a handle."""
    message = refusal(*before, Refused(0, "x"))
    assert message == "there is no context 'x' before this step; make it first."


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -0.5, math.nan, math.inf, True, "1", (1.0,)])
def test_a_timeout_is_a_positive_finite_number(timeout: Any) -> None:
    """A timeout that is no number of seconds above zero is refused with what to write instead."""
    assert refusal(Call(0, 1, timeout=timeout)) == (
        f"timeout={timeout!r} must be a positive, finite number of virtual seconds, or None for "
        f"the cluster's."
    )


@pytest.mark.parametrize("timeout", [None, 1, 0.001, 1e6])
def test_any_positive_timeout_is_kept(timeout: float | None) -> None:
    """Ints, small and large timeouts, and none at all are accepted."""
    assert Program(2, (Call(0, 1, timeout=timeout),)).steps == (Call(0, 1, timeout=timeout),)


@pytest.mark.parametrize(
    ("before", "step", "sizes"),
    [
        ((), Call(0, 1, (1.0,), (1.0, 2.0)), "1 and 2"),
        ((), Remote(0, 1, "b", (1.0, 2.0, 3.0), (1.0,)), "3 and 1"),
        ((), Nest(0, 1, 1, "b", (), (1.0,)), "0 and 1"),
        ((Own(0, "a", (1.0, 2.0)),), Call(0, 1, (1.0,), "a"), "1 and 2"),
        ((Own(1, "z", (1.0, 2.0)), Share(1, "z", 0, "a")), Call(0, 1, (1.0,), "a"), "1 and 2"),
        ((Remote(0, 1, "a", (1.0,) * 4, (2.0,) * 4),), Remote(0, 1, "b", right="a"), "1 and 4"),
    ],
)
def test_what_is_added_has_one_length(before: tuple[Step, ...], step: Step, sizes: str) -> None:
    """The oracle adds element by element, so other shapes are refused before anything runs."""
    message = refusal(*before, step)
    assert message.endswith(f"hold {sizes} numbers; give both the same length.")


def test_equal_lengths_are_accepted_through_handles() -> None:
    """A handle's length is that of what made it, along every share."""
    steps = (
        Own(1, "a", (1.0, 2.0)),
        Share(1, "a", 0, "b"),
        Remote(0, 1, "c", (3.0, 4.0), "b"),
        Call(0, 1, (5.0, 6.0), "c"),
    )
    assert Program(2, steps).steps == steps


@pytest.mark.parametrize("world_size", [0, -1, 17, 10**9])
def test_a_world_has_one_to_sixteen_ranks(world_size: int) -> None:
    """A size outside is refused with the size and both bounds."""
    with pytest.raises(UsageError, match=rf"^world_size={world_size} must lie in 1 to 16\.$"):
        Program(world_size)


@pytest.mark.parametrize("world_size", [True, "2", 2.0, None])
def test_a_world_size_is_an_int(world_size: Any) -> None:
    """Anything else is refused with its value and its type."""
    shown = f"world_size={world_size!r} (type {type(world_size).__name__}) must be an int."
    with pytest.raises(UsageError, match=f"^{re.escape(shown)}$"):
        Program(world_size)
    with pytest.raises(UsageError, match=f"^{re.escape(shown)}$"):
        check_world_size(world_size)


@pytest.mark.parametrize("world_size", [1, 2, MAX_WORLD_SIZE])
def test_both_bounds_of_a_world_are_accepted(world_size: int) -> None:
    """One rank is a world, and so are sixteen; the last rank of each can be named."""
    assert check_world_size(world_size) == world_size
    assert Program(world_size, (Own(world_size - 1, "a"),)).world_size == world_size


def test_the_first_wrong_step_is_the_one_that_is_named() -> None:
    """Of several mistakes the message is about the first, with its number."""
    with pytest.raises(UsageError, match=r"^step 1, Fetch\(at=0, handle='z'\): "):
        Program(2, (Own(0, "a"), Fetch(0, "z"), Own(5, "b")))


@pytest.mark.parametrize("program", SHIPPED, ids=lambda p: p.name)
def test_the_repr_rebuilds_a_program(program: Program) -> None:
    """What a report prints is Python that makes the same program again."""
    again = eval(repr(program), NAMES)
    assert again == program
    assert hash(again) == hash(program)
    assert repr(again) == repr(program)


def test_the_repr_of_an_empty_program_is_one_line() -> None:
    """A program without steps prints what it was given and no more."""
    assert repr(Program(2)) == "Program(2)"
    assert repr(Program(3, name="n", settles=False)) == "Program(3, name='n', settles=False)"
    assert eval(repr(Program(3, name="n", settles=False)), NAMES) == Program(3, (), "n", False)


@pytest.mark.parametrize("program", SHIPPED, ids=lambda p: p.name)
def test_copies_of_a_program_are_equal(program: Program) -> None:
    """Pickled and copied programs are equal and hash alike, so that they can cross processes."""
    for again in (copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert again == program
        assert hash(again) == hash(program)


def test_shipped_programs_are_distinct() -> None:
    """No two shipped programs are equal, and each has a name of its own."""
    assert len(set(SHIPPED)) == len(SHIPPED)
    assert len({program.name for program in SHIPPED}) == len(SHIPPED)


def test_steps_may_come_in_any_sequence_and_are_kept_as_a_tuple() -> None:
    """A list of steps makes the same program as a tuple of them, and nothing of it is shared."""
    steps: Any = [Own(0, "a"), Settle()]
    program = Program(2, steps)
    steps.append(Drop(0, "a"))
    assert program == Program(2, (Own(0, "a"), Settle()))


def test_a_program_never_changes() -> None:
    """Neither a program nor a step lets an attribute be set."""
    program: Any = Program(2, (Own(0, "a"),))
    with pytest.raises(AttributeError):
        program.world_size = 3
    with pytest.raises(AttributeError):
        program.steps[0].at = 1


def test_programs_differ_in_each_part() -> None:
    """Size, steps, name and whether it settles all tell programs apart."""
    ways = [
        Program(2),
        Program(3),
        Program(2, (Settle(),)),
        Program(2, name="n"),
        Program(2, settles=False),
    ]
    assert len(set(ways)) == len(ways)


def test_every_step_has_a_name_of_its_own() -> None:
    """The names under which steps are written to a file are distinct and lead back to them."""
    assert len(STEP_TYPES) == 43
    for name, step in STEP_TYPES.items():
        assert step.op == name
        assert step.__doc__


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (HANDLE, Local(0, "a")),
            "handle 'a' is owned by rank 1; only its owner has the local value. Use Fetch here.",
        ),
        (
            (Call(0, 1, wait="later"),),
            "wait='later' and out='': wait='later' needs a name, others none.",
        ),
        (
            (Call(0, 1, out="f"),),
            "wait='sync' and out='f': wait='later' needs a name, others none.",
        ),
        ((Wait(0, "f"),), "there is no future 'f' before this step; make it first."),
        (
            (Call(0, 1, wait="later", out="f"), Wait(1, "f")),
            "the future 'f' is at rank 0, not 1.",
        ),
        (
            (Call(0, 1, wait="later", out="f"), Wait(0, "f"), Wait(0, "f")),
            "the future 'f' was waited for before; wait once.",
        ),
        (
            (HANDLE, Through(0, "a", "remote")),
            "how='remote' and out='': how='remote' needs a name, others none.",
        ),
        (
            (HANDLE, Through(0, "a", out="b")),
            "how='sync' and out='b': how='remote' needs a name, others none.",
        ),
        (
            (HANDLE, Through(0, "a", "remote", out="b", timeout=1.0)),
            "a timeout of how='remote' is not modelled; use how='sync' or 'async'.",
        ),
        (
            (HANDLE, Share(0, "a", 1, "b", timeout=9.0), Local(1, "b")),
            "handle 'b' was shared under a timeout; put a Settle before its first use, or a "
            "Pause with handle='b', which waits for it.",
        ),
        (
            (Context(0, "x", (1,), backward=False, retain=True),),
            "retain=True runs backward twice, so it needs backward=True.",
        ),
        (
            (Context(0, "x", (1,), breaks=0),),
            "breaks=0 must be a rank of path=(1,), with backward=True.",
        ),
        (
            (Context(0, "x", (1,), breaks=1, backward=False),),
            "breaks=1 must be a rank of path=(1,), with backward=True.",
        ),
        ((Optimize(0, "x", ()),), "owners=() must be ranks, at least one."),
        ((Optimize(0, "x", (1, 1)),), "owners=(1, 1) must be ranks, each once."),
        (
            (Context(0, "x", (1,)), Refused(0, "x")),
            "the context 'x' may not be gone yet; put a Settle before.",
        ),
        (
            (Optimize(0, "x", (1,)), Settle(), Refused(0, "x")),
            "the context 'x' is an optimizer's, which gives no id; use that of a Context.",
        ),
        ((Pause(0, -1.0),), "seconds=-1.0 must lie in 0 to 3600 (virtual)."),
        ((Pause(0, math.inf),), "seconds=inf must lie in 0 to 3600 (virtual)."),
        ((Call(0, 1, seconds=-1.0),), "seconds=-1.0 must lie in 0 to 3600 (virtual)."),
        ((Remote(0, 1, "a", seconds=4e3),), "seconds=4000.0 must lie in 0 to 3600 (virtual)."),
        (
            (Call(0, 1, flavour="script", seconds=2.0),),
            "seconds=2.0 needs flavour 'python', not 'script'.",
        ),
        (
            (Chain(0, 1, 0, (1.0,), (1.0, 2.0)),),
            "left=(1.0,) and right=(1.0, 2.0) hold 1 and 2 numbers; give both the same length.",
        ),
        (
            (Remote(0, 1, "a", flavour="script", raises=True),),
            "raises=True needs flavour 'python', not 'script'.",
        ),
        (
            (Call(0, 1, flavour="builtin", raises=True),),
            "raises=True needs flavour 'python' or 'script', not 'builtin'.",
        ),
    ],
)
def test_what_cannot_follow_is_refused(steps: tuple[Step, ...], message: str) -> None:
    """Each rule of the scope says what is wrong and what would be right."""
    assert refusal(*steps) == message


def branched(*branches: tuple[Leaf, ...], before: tuple[Step, ...] = ()) -> str:
    """The message with which branches are refused after some steps, in a world of three."""
    return refusal(*before, Parallel(branches), world_size=3)


@pytest.mark.parametrize("step", [Settle(), Refused(0, "x"), Parallel(((Own(0, "z"),),))])
def test_some_steps_cannot_stand_in_a_branch(step: Any) -> None:
    """A settle is every rank's, a refusal needs one before it, and branches do not nest."""
    message = branched((step,), (Own(1, "b"),), before=(Context(0, "x"),))
    assert message == f"{type(step).__name__} cannot stand in a branch of Parallel."


def test_a_branch_is_at_one_rank() -> None:
    """Steps of two ranks in one branch, and a branch without steps, are both refused."""
    strays = (Own(0, "a"), Own(1, "b"))
    assert branched(strays) == f"{strays[1]!r} is at rank 1 in a branch of rank 0; one rank each."
    assert branched(()) == "a branch of Parallel is empty; give it steps, or leave it out."


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (Fetch(0, "a"), Drop(0, "a"), "use one RRef at rank 0"),
        (Fetch(0, "a"), Fetch(0, "a"), "use one RRef at rank 0"),
        (
            Call(0, 1, flavour="script"),
            Call(0, 2, flavour="script"),
            "at rank 0 send messages with equal payloads",
        ),
        (
            Own(0, "b"),
            FailTwice(0, 1, 2, "x"),
            "FailTwice cannot stand in one of two branches of Parallel",
        ),
        (Count(0, 1), Count(0, 1), "count at one rank"),
    ],
)
def test_branches_at_one_rank_are_told_apart(one: Leaf, other: Leaf, message: str) -> None:
    """Threads of a rank use no common RRef, and nothing says which of two equal messages fails."""
    made = Own(0, "a")
    assert message in refusal(made, Parallel(((one,), (other,))), world_size=3)
    assert refusal(made, Parallel(((other,), (one,))), world_size=3)
    Program(3, (made, Parallel(((one,), (Own(0, "x"),) if one.in_thread else (Own(1, "x"),)))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((Bump(0, "a"),), (Fetch(2, "b"),)),  # a change that another reads
        ((Bump(0, "a"),), (Bump(2, "b"),)),
        ((Bump(0, "a"),), (Through(2, "b"),)),
        ((Bump(0, "a"),), (Share(2, "b", 1, "c"),)),
        ((Bump(0, "a"),), (Drop(2, "b"),)),
        # Fetches at one rank have one payload, so whose are lost would depend on who is first.
        ((Call(0, 1, right="a"),), (Call(2, 1, right="b"),)),
        ((Remote(0, 1, "c", right="a"),), (Call(2, 1, right="b"),)),
    ],
)
def test_branches_do_not_meet_at_a_value(one: tuple[Leaf, ...], other: tuple[Leaf, ...]) -> None:
    """What one branch changes, or a function fetches for it, the others leave alone."""
    before = (TYPED, Share(0, "a", 2, "b"), Settle())
    expected = "two branches of Parallel meet at one RRef; use it in one of them only."
    assert branched(one, other, before=before) == expected
    assert branched(other, one, before=before) == expected


def test_branches_do_not_meet_at_a_counter() -> None:
    """Two branches that count at one rank would not know whose count is whose."""
    message = branched((Count(0, 1),), (Count(2, 1),))
    assert message == "two branches of Parallel count at one rank; count in one of them only."


def test_branches_know_only_what_was_there_before_them() -> None:
    """What one makes, another cannot use, whatever order they are written in."""
    assert branched((Remote(0, 1, "a"), Share(0, "a", 1, "b")), (Fetch(1, "b"),)) == (
        "there is no handle 'b' before this step; make it first."
    )


def test_branches_may_read_one_value_and_use_what_they_make() -> None:
    """Reads do not disturb each other, and a branch goes on with its own handles and futures."""
    branches: tuple[tuple[Leaf, ...], ...] = (
        (Fetch(0, "a"), Remote(0, 1, "c", flavour="builtin"), Bump(0, "c"), Count(0, 1)),
        (Fetch(2, "b"), Call(2, 0, wait="later", out="f"), Wait(2, "f"), Count(2, 0)),
        (Nest(1, 0, 2, "n", flavour="script"), Bump(1, "n"), Context(1, "x", (0,))),
    )
    program = Program(3, (TYPED, Share(0, "a", 2, "b"), Settle(), Parallel(branches)))
    assert len(program.leaves) == 3 + sum(map(len, branches))


def test_a_scope_that_refuses_is_as_it_was() -> None:
    """Nothing of a step that cannot follow stays, and asking whether one fits adds nothing."""
    scope = Scope(3)
    scope.add(TYPED)
    before = (dict(scope.handles), set(scope.taken))
    refused: list[Step] = [
        Parallel(((Own(0, "b"),), (Fetch(2, "b"),))),
        Call(0, 9, wait="later", out="f"),
        Fetch(2, "a"),
    ]
    for step in refused:
        assert not scope.fits(step)
        assert not scope.accepts(step)
        with pytest.raises(UsageError):
            scope.add(step)
    assert scope.fits(Own(0, "b"))
    assert (dict(scope.handles), set(scope.taken)) == before
    assert scope.accepts(Own(0, "b"))


def test_a_copy_of_a_scope_knows_all_that_it_knows() -> None:
    """What may follow a scope may follow its copy, and what is added to that stays there."""
    scope = Scope(2)
    steps: list[Step] = [TYPED, Call(0, 1, wait="later", out="f"), Context(0, "x", (1,)), Settle()]
    for step in (*steps, Own(0, "b"), Drop(0, "b"), Parallel(((Own(0, "c"),), (Own(1, "d"),)))):
        scope.add(step)
    other = scope.copy()
    assert vars(other) == vars(scope)
    after: list[Step] = [Refused(1, "x"), Wait(0, "f"), Bump(0, "a"), Own(0, "e"), Context(0, "y")]
    for step in after:
        assert scope.fits(step)
        other.add(step)
    assert all(scope.fits(step) for step in after)


def test_a_scope_says_what_a_handle_is() -> None:
    """Home, owner, type and size of each, and which are of one value."""
    scope = Scope(3)
    for step in (TYPED, Share(0, "a", 2, "b", timeout=9.0), Own(0, "c", (1.0, 2.0))):
        scope.add(step)
    assert scope.handles == {
        "a": HandleInfo(0, 0, 1, typed=True, size=1),
        "b": HandleInfo(2, 0, 1, typed=True, size=1, late=True),
        "c": HandleInfo(0, 1, 0, typed=True, size=2),
    }
    scope.add(Settle())
    assert not scope.handles["b"].late


@pytest.mark.parametrize(
    ("index", "left"),
    [
        (0, OTHER),  # the handle, and all that was done with it
        (1, (HANDLE, Drop(0, "a"), *OTHER)),
        (2, (HANDLE, Share(0, "a", 1, "b"), Drop(0, "a"), *OTHER)),
        (3, (HANDLE, Share(0, "a", 1, "b"), Fetch(1, "b"), *OTHER)),
        (4, (HANDLE, Share(0, "a", 1, "b"), Fetch(1, "b"), Drop(0, "a"))),
        (9, (HANDLE, Share(0, "a", 1, "b"), Fetch(1, "b"), Drop(0, "a"), *OTHER)),
    ],
)
def test_a_program_without_a_step_is_without_what_needs_it(
    index: int, left: tuple[Step, ...]
) -> None:
    """The rest stays in order, with its name and its end; an index beyond takes nothing out."""
    steps = (HANDLE, Share(0, "a", 1, "b"), Fetch(1, "b"), Drop(0, "a"), *OTHER)
    program = Program(3, steps, "n", settles=False)
    assert program.without(index) == Program(3, left, "n", settles=False)


def test_a_program_without_a_leaf_of_a_branch() -> None:
    """Leaves of branches count; a branch without any goes, and so do branches without any."""
    one: tuple[Leaf, ...] = (Own(0, "a"), Fetch(0, "a"))
    other: tuple[Leaf, ...] = (Own(1, "b"),)
    program = Program(2, (Parallel((one, other)), Own(0, "z"), Fetch(0, "z")))
    rest = (Own(0, "z"), Fetch(0, "z"))
    assert program.without(0) == Program(2, (Parallel((other,)), *rest))
    assert program.without(1) == Program(2, (Parallel((one[:1], other)), *rest))
    assert program.without(2) == Program(2, (Parallel((one,)), *rest))
    assert program.without(3) == Program(2, (Parallel((one, other)),))
    assert Program(2, (Parallel((other,)), *rest)).without(0) == Program(2, rest)


@pytest.mark.parametrize("program", SHIPPED, ids=lambda p: p.name)
def test_every_step_can_be_taken_out(program: Program) -> None:
    """Whatever is taken out, what is left is a valid program, and shorter."""
    for index in range(len(program.leaves)):
        assert len(program.without(index).leaves) < len(program.leaves)


def test_branches_that_each_change_what_they_made_do_not_meet() -> None:
    """An RRef that a branch makes is its own, however the others count theirs."""
    branches = tuple(
        (Own(rank, f"h{rank}"), Bump(rank, f"h{rank}"), Fetch(rank, f"h{rank}"))
        for rank in range(3)
    )
    assert len(Program(3, (Parallel(branches),)).leaves) == 9


@pytest.mark.parametrize("program", EVERY_KIND, ids=lambda program: program.name)
def test_what_hypothesis_prints_can_be_pasted(program: Program) -> None:
    """A failing example that Hypothesis prints is Python that makes the same program."""
    assert eval(pretty(program), dict(vars(language))) == program
    for step in program.steps:
        assert pretty(step) == repr(step)
