"""Values of many sorts travel between real ranks as predicted, or are refused as predicted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rpcprops.cluster.options import Transport
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan, FaultTable, MessageType
from rpcprops.oracle import judge, predict, predict_for, set_apart
from rpcprops.programs import Carry, Program, Settle, Step
from rpcprops.pytest_plugin import ClusterFactory
from rpcprops.runner import run
from rpcprops.steps.values import DTYPES, LEFT_OUT, PACKED, QUANTIZED, SORTS, WAYS, Way
from rpcprops.strategies import programs
from rpcprops.torch_facts import installed
from tests._draws import draws

#: What torch has under another name: its dtypes by the attributes that name them.
ALIASES = {
    "float": "float32",
    "double": "float64",
    "half": "float16",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "cfloat": "complex64",
    "cdouble": "complex128",
    "chalf": "complex32",
    "bit": "uint1",
}
#: Sorts that differ from each other in one thing that a comparison could miss.
ALIKE = (
    ("int", "int-lowest"),
    ("float", "float-list"),
    ("list-int", "list-mixed"),
    ("dict", "dict-ordered"),
    ("set", "frozenset"),
    ("tuple", "namedtuple"),
    ("class", "function"),
    ("float32", "zero-dim"),
    ("uint3", "uint4"),
    ("requires-grad", "zero-dim"),
    ("requires-grad", "parameter"),
    ("conjugated", "complex64"),
    ("sparse_csr", "sparse_csc"),
    ("qint8", "per-channel"),
    ("two-views", "same-twice"),
    ("transposed", "expanded"),
    ("rref-list", "rref-pair"),
    ("exception", "rref-exception"),
    ("slow", "slow-unpickled"),
    ("rref-partial", "rref-closure"),
)
#: Sorts that hold RRefs, or that are slow or counted.
OF_RREFS = ("rref", "rref-dataclass", "rref-exception", "rref-partial", "rref-closure")
OTHERS = ("lock-and-rref", "slow-unpickled", "counted")


def sorts_made() -> list[str]:
    from rpcprops.steps.in_rank.values import VALUE_MAKERS

    return list(VALUE_MAKERS)


def refusals() -> list[str]:
    from rpcprops.steps.in_rank.values import VALUE_REFUSALS

    return list(VALUE_REFUSALS)


def slow_seconds() -> float:
    from rpcprops.steps.in_rank.values import SLOW_PICKLE_SECONDS

    return SLOW_PICKLE_SECONDS


def names_of(kind: str) -> dict[str, str]:
    """The attributes of torch that are of a type of torch's, and what torch calls each."""
    import torch

    values = vars(torch).items()
    return {
        name: str(value).removeprefix("torch.")
        for name, value in values
        if isinstance(value, getattr(torch, kind))
    }


def unlike_itself() -> dict[str, str]:
    """The sorts of which two values differ, and how."""
    from rpcprops.steps.in_rank.values import new_value, value_difference

    sorts = [sort for sort in sorts_made() if installed().has_dtype(sort)]
    found = {sort: value_difference(new_value(sort), new_value(sort)) for sort in sorts}
    return {sort: differs for sort, differs in found.items() if differs}


def differences(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    from rpcprops.steps.in_rank.values import new_value, value_difference

    return [value_difference(new_value(one), new_value(other)) for one, other in pairs]


def elements_apart() -> dict[str, str]:
    """How tensors of each dtype compare to others with one bit flipped."""
    import torch

    from rpcprops.steps.in_rank.values import element_bytes, new_value, value_difference

    found: dict[str, str] = {}
    for name in filter(installed().has_dtype, DTYPES):
        other: Any = new_value(name).clone() if name in ("bool", "float32") else new_value(name)
        element_bytes(other)[-1] ^= 1
        assert isinstance(other, torch.Tensor)
        found[name] = value_difference(new_value(name), other)
    return found


def test_both_tables_list_the_same_sorts(rpc_cluster: ClusterFactory) -> None:
    """Ranks can make a value of each sort that a program may name, and of no other."""
    with rpc_cluster(world_size=1, init=False) as cluster:
        assert cluster.on(0).call(sorts_made) == list(SORTS)
        refused = {
            sort
            for sort, fate in SORTS.items()
            if fate.argument or fate.result or fate.fetched or fate.owned == "refused"
        }
        assert set(cluster.on(0).call(refusals)) == refused
        assert cluster.on(0).call(slow_seconds) == 0.5 * Carry(0, 1, "slow").lasts


def test_every_dtype_and_layout_of_torch_is_listed(rpc_cluster: ClusterFactory) -> None:
    """Each public dtype and layout is a sort that travels, or is left out for a reason."""
    with rpc_cluster(world_size=1, init=False) as cluster:
        dtypes: Mapping[str, str] = cluster.on(0).call(names_of, "dtype")
        layouts: Mapping[str, str] = cluster.on(0).call(names_of, "layout")
    others = {name: called for name, called in dtypes.items() if name != called}
    assert others == ALIASES
    sent = {name for name in (*DTYPES, *QUANTIZED, *PACKED) if installed().has_dtype(name)}
    assert set(dtypes.values()) == sent
    assert set(layouts) - {"strided"} <= set(SORTS) | set(LEFT_OUT)
    assert not set(SORTS) & set(LEFT_OUT)


def test_values_are_compared_bit_by_bit(rpc_cluster: ClusterFactory) -> None:
    """A value equals a second one of its sort, no other sort's, and none with another bit."""
    with rpc_cluster(world_size=1) as cluster:
        assert cluster.on(0).call(unlike_itself) == {}
        assert all(cluster.on(0).call(differences, ALIKE))
        assert set(cluster.on(0).call(elements_apart).values()) == {"other elements"}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Carry(0, 1, "strings"), "sort='strings' is no sort of value; use one of none, int"),
        (Carry(0, 1, "jagged"), "sort='jagged' is never sent: the first nested tensor of that"),
        (Carry(0, 1, "nested", "remote-echo"), "does not travel by way='remote-echo'; use"),
        (Carry(0, 1, "bytes", "own"), "does not travel by way='own'; use 'result' or 'echo'"),
        (Carry(0, 2), "to=2 is no rank of a world of 2"),
    ],
)
def test_what_cannot_be_sent_is_refused(step: Carry, message: str) -> None:
    """A program cannot name a sort that there is not, or a way that ends a rank."""
    with pytest.raises(UsageError) as caught:
        Program(2, (step,))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("sort", "way", "value", "ran"),
    [
        ("lock", "echo", "TypeError", 0),
        ("lock", "result", "RuntimeError", 1),
        ("meta", "echo", "RuntimeError", 0),
        ("meta", "remote-echo", "RuntimeError", 0),
        ("raises-unpickled", "echo", "RuntimeError", 0),
        ("raises-unpickled", "remote", "RaisedOnPurposeError", 1),
        ("raises-unpickled", "remote-echo", "RuntimeError", 0),
        ("nested", "result", "RuntimeError", 1),
        ("quint4x2", "own", "RuntimeError", 1),
        ("sparse_csr", "echo", "RuntimeError", 1),
        ("int-big", "own", "RuntimeError", 0),
    ],
)
def test_a_refusal_is_predicted(sort: str, way: Way, value: str, ran: int) -> None:
    """The oracle knows the error's type, whether the function ran, and that nothing is left."""
    predicted = predict(Program(2, (Carry(0, 1, sort, way), Settle())), FaultPlan())
    assert predicted.steps[0].value == {"refused": value}
    assert predicted.calls[1] == ({"step0": 1} if ran else {})
    assert not any(held.owners or held.forks for held in predicted.counters)
    calls = [s for s in predicted.sends if s.message.endswith("_CALL") and s.rank == 0]
    is_sent = ran or sort == "raises-unpickled"
    assert bool(calls) == bool(is_sent)


def test_a_lost_call_comes_before_the_refusal() -> None:
    """The faulty agent fails a message before TensorPipe's agent looks at its tensors."""
    lost = FaultPlan(FaultTable([MessageType.PYTHON_CALL], 1))
    predicted = predict(Program(2, (Carry(0, 1, "meta", "echo"),)), lost)
    assert predicted.steps[0].error == "injected"
    predicted = predict(Program(2, (Carry(0, 1, "lock", "echo"),)), lost)
    assert predicted.steps[0].value == {"refused": "TypeError"}


def test_sorts_and_ways_are_drawn() -> None:
    """What is drawn has every way, many sorts, and never one that ends a rank."""
    drawn = programs(kinds=("carry",), min_steps=8)
    found = [leaf for p in draws(drawn, 40) for leaf in p.leaves if isinstance(leaf, Carry)]
    assert {step.way for step in found} == set(WAYS)
    assert len({step.sort for step in found}) > 20
    # For such a program nobody knows what a plan delays.
    assert not any(SORTS[step.sort].large for step in found)


def test_a_large_value_is_seldom_drawn_and_only_where_no_time_counts() -> None:
    """It takes seconds of real time, so it is alone, without faults and without a timeout."""
    drawn = programs(kinds=("carry",), min_steps=1, max_steps=2, plan=FaultPlan())
    found = itertools.chain.from_iterable(draws(drawn, 200, start) for start in range(20))
    seldom = [*itertools.islice((program for program in found if _is_large(program.leaves)), 5)]
    assert len(seldom) == 5
    for program in seldom:
        assert program.rpc_timeout is None
        assert all(len(step.leaves) == 1 for step in program.steps if _is_large(step.leaves))
    faulty = programs(kinds=("carry",), plan=FaultTable([MessageType.PYTHON_CALL], 1))
    assert not any(_is_large(program.leaves) for program in draws(faulty, 60))


def _is_large(steps: Sequence[Step]) -> bool:
    return any(isinstance(step, Carry) and SORTS[step.sort].large for step in steps)


def every_carry(*, large: bool = False, broken: bool = False) -> list[Carry]:
    """Each sort by each of its ways, to another rank and to the rank itself.

    `broken` asks for those that meet a known finding of this torch, and only for them.
    """
    return [
        Carry(0, to, sort, way)
        for to in (1, 0)
        for sort, fate in SORTS.items()
        for way in fate.ways
        if fate.large == large and installed().has_dtype(sort)
        if broken == (way in fate.bugs and installed().has_bug(fate.bugs[way]))
    ]


def check(steps: list[Carry], plan: FaultPlan, at_once: int) -> None:
    """Run so many steps in one world, and so on."""
    for start in range(0, len(steps), at_once):
        program = Program(2, (*steps[start : start + at_once], Settle()))
        assert judge(program, plan, run(program, plan)) == ()


@pytest.mark.usefixtures("rpc_cluster")
def test_values_travel_as_predicted() -> None:
    """Some values of many sorts arrive equal in real ranks, others are refused as they must be."""
    check(every_carry()[::7], FaultPlan(), 45)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(
    "plan",
    [
        FaultPlan(),
        FaultPlan(FaultTable(["RREF_USER_DELETE", "RREF_CHILD_ACCEPT"], 2)),
        FaultPlan(FaultTable(["PYTHON_CALL"], 1)),
        FaultPlan(by_rank={1: FaultTable(["SCRIPT_RREF_FETCH_CALL"], 1)}),
    ],
    ids=["none", "retried", "lost call", "lost fetch"],
)
def test_what_holds_rrefs_is_slow_or_counted_travels_as_predicted(plan: FaultPlan) -> None:
    """Each such sort by each of its ways, also where calls and fetches are lost."""
    steps = [
        Carry(0, to, sort, way)
        for to in (1, 0)
        for sort in (*OF_RREFS, *OTHERS)
        for way in SORTS[sort].ways
    ]
    check(steps, plan, 40)


@pytest.mark.nightly
@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize(
    "plan",
    [
        FaultPlan(),
        FaultPlan(FaultTable(["RREF_USER_DELETE", "RREF_CHILD_ACCEPT"], 2)),
        FaultPlan(FaultTable((), 0, {"PYTHON_CALL": 0.3, "SCRIPT_RREF_FETCH_CALL": 0.2})),
    ],
)
def test_every_sort_travels_by_every_way(plan: FaultPlan) -> None:
    """Each sort by each way arrives or is refused as predicted, also within the retry budget."""
    check(every_carry(), plan, 20)


@pytest.mark.nightly
@pytest.mark.usefixtures("rpc_cluster")
def test_what_torch_breaks_is_explained_and_nothing_else_is_wrong() -> None:
    """Each sort that meets a known finding shows it, as it is described, in a world of its own."""
    shown = 0
    for step in every_carry(broken=True):
        program = Program(2, (step, Settle()))
        outcome = run(program)
        violations = judge(program, None, outcome)
        met = predict_for(program, FaultPlan(), outcome).met
        names, left = set_apart(program, met, outcome, violations)
        assert not left, program
        shown += bool(names)
    assert shown > 20


LARGE = every_carry(large=True)


@pytest.mark.usefixtures("rpc_cluster")
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_large_tensor_travels(transport: Transport) -> None:
    """A tensor of 64 MiB arrives with every element, and comes back with every element."""
    program = Program(2, (Carry(0, 1, "large", "echo"), Settle()))
    assert program.steps[0] in LARGE
    assert judge(program, FaultPlan(), run(program, transport=transport)) == ()


@pytest.mark.nightly
@pytest.mark.usefixtures("rpc_cluster")
def test_a_large_tensor_travels_by_every_way() -> None:
    """As every other sort, also from a rank to itself."""
    assert {step.way for step in LARGE} == set(WAYS)
    check(LARGE, FaultPlan(), 2)
