"""A distributed autograd context that computes a graph, and the same graph in one process."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.distributed import rpc

from rpcprops.steps.in_rank.constants import LATE_TIMEOUT, TIMES_LATE
from rpcprops.steps.in_rank.shared import dist_autograd, target_of, tensor
from rpcprops.steps.in_rank.state import (
    contexts,
    handles,
    note_call,
    note_slowly,
    until_ran,
)
from rpcprops.steps.in_rank.sums import script_add, torchscript

#: What an operation does, the results that it takes, its rank, and how it gets there.
Operations = Sequence[tuple[str, tuple[int, ...], int, str]]
#: The home of a leaf, and what sort of leaf it is.
Leaves = Sequence[tuple[int, str]]


class Task(NamedTuple):
    """What is computed in a context: leaf n has `numbers[n]`, and is in `mine` if it is here.

    `before` has the RRefs that were made and used before the context, by their ranks.
    """

    call: str
    world: tuple[str, ...]
    leaves: Leaves
    numbers: Sequence[Sequence[float]]
    mine: Mapping[int, torch.Tensor]
    operations: Operations
    backwards: Sequence[Sequence[int]]
    seconds: float = 0.0
    before: Mapping[int, Any] = {}


class Together(NamedTuple):
    """A future that is waited for together with all others of its kind: by `wait_all`, or so."""

    by: str
    future: Any


class Late(NamedTuple):
    """A call that times out: its rank, how it is made, when it does, and the handle it makes."""

    rank: int
    how: str
    timeout: float
    out: str


class OwnGradient(torch.autograd.Function):
    """Doubles a tensor, and says that its gradient is five times that of the result."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Double the tensor."""
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        """Five times the gradient, which no other derivative would be."""
        return 5.0 * grad_outputs[0]


def doubling(ran: Callable[[], None]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that doubles a gradient, and tells `ran`."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        ran()
        return 2.0 * gradient

    return hook


def apply(what: str, inputs: Sequence[torch.Tensor], ran: Callable[[], None]) -> torch.Tensor:
    """The result of one operation; `ran` is told whenever a hook of it runs."""
    x, y = inputs[0], inputs[-1]
    if what == "add":
        return x + y
    if what == "mul":
        return x * y
    if what == "inplace":
        return x.mul_(2.0).add_(1.0)
    if what == "custom":
        doubled: torch.Tensor = OwnGradient.apply(x)  # type: ignore[no-untyped-call]
        return doubled
    copy = 1.0 * x
    if copy.requires_grad:
        copy.register_hook(doubling(ran))  # type: ignore[no-untyped-call]
    return copy


def negates(how: str) -> bool:
    """Whether a callback of a future negates what an operation gives that gets there so."""
    return how in ("async then", "async done")


def apply_here(what: str, inputs: Sequence[torch.Tensor], ran: Callable[[], None]) -> torch.Tensor:
    """As :func:`apply`, on tensors that others use too: what changes one gets a copy of it."""
    return apply(what, [inputs[0].clone()] if what == "inplace" else inputs, ran)


def hook_ran(call: str) -> None:
    """Count one more run of a hook in this rank."""
    note_call(f"{call}/hook")


def unreached(
    call: str,
    world: tuple[str, ...],
    *,
    to: int,
    name: str,
    value: Sequence[float],
    seconds: float,
    by: str,
) -> dict[str, Any]:
    """Run a backward pass that does not reach what was sent, and leave it alone after a while."""
    leaf = tensor(value).requires_grad_()
    result: dict[str, Any] = {}
    with dist_autograd.context() as context_id:
        contexts[name] = result["id"] = context_id
        if by == "timeout":
            args = (call, TIMES_LATE * LATE_TIMEOUT, leaf)
            options: dict[str, Any] = {"args": args, "timeout": LATE_TIMEOUT}
            slow = functools.partial(rpc.rpc_sync, world[to], sleep_there, **options)
            result["late"] = times_out(call, world, Late(to, "sync", LATE_TIMEOUT, ""), slow)
        else:
            rpc.rpc_sync(world[to], double_there, args=(call, leaf))
        loss = (leaf * leaf).sum()
        backward = functools.partial(dist_autograd.backward, context_id, [loss])
        # A daemon: it must not keep the rank from leaving.
        one_pass = threading.Thread(target=backward, daemon=True)
        before = passes_here()
        one_pass.start()
        # On a busy machine the thread may come to it later than this one leaves the block.
        while one_pass.is_alive() and passes_here() <= before:
            time.sleep(0.5)
        one_pass.join(seconds)
        return {**result, "loss": loss.item(), "ended": not one_pass.is_alive()}


def passes_here() -> int:
    """How many backward passes this rank has begun and not ended."""
    debug: Any = dist_autograd
    return int(debug._get_debug_info()["num_current_backward_passes"])


def double_there(call: str, x: torch.Tensor) -> torch.Tensor:
    """Twice a tensor, whose gradient goes back to the caller."""
    note_call(call)
    return 2.0 * x


def apply_there(call: str, seconds: float, what: str, *inputs: torch.Tensor) -> torch.Tensor:
    """One operation at a rank that was asked for it, which first sleeps for `seconds`."""
    note_slowly(call, seconds)
    return apply(what, inputs, functools.partial(hook_ran, call))


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def relay(call: str, seconds: float, to: str, what: str, *inputs: torch.Tensor) -> Any:
    """Let another rank do the operation; the answer is sent when that rank has answered."""
    note_call(call)
    return rpc.rpc_async(to, apply_there, args=(call, seconds, what, *inputs))


class Applier:
    """What a proxy stands for: it does operations at the rank of its RRef."""

    def is_there(self) -> bool:
        """Answer at once."""
        return True

    def apply(self, call: str, seconds: float, what: str, *inputs: torch.Tensor) -> torch.Tensor:
        """One operation."""
        return apply_there(call, seconds, what, *inputs)


@torchscript
def script_mul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply two tensors, in TorchScript."""
    return left * right


@torchscript
def script_inplace(x: torch.Tensor) -> torch.Tensor:
    """Change a tensor, in TorchScript."""
    return x.mul_(2.0).add_(1.0)


#: What does an operation where no Python function does, by how it gets there.
COMPUTES: dict[str, dict[str, Any]] = {
    "builtin": {"add": torch.add, "mul": torch.mul},
    "script": {"add": script_add, "mul": script_mul, "inplace": script_inplace},
}


def make_leaf(call: str, numbers: Sequence[float], sort: str) -> torch.Tensor:
    """A leaf, kept by the step or by the RRef of the ``rpc.remote`` that called this."""
    leaf = tensor(numbers).requires_grad_(sort != "fixed")
    if sort == "hooked":
        hook = doubling(functools.partial(hook_ran, call))
        leaf.register_hook(hook)  # type: ignore[no-untyped-call]
    return leaf


def gradient_there(context_id: int, rref: Any) -> list[float] | None:
    """The gradient of a leaf that this rank owns, in a context; None if there is none."""
    return gradient_of(context_id, rref.local_value())


def gradient_of(context_id: int, leaf: torch.Tensor) -> list[float] | None:
    """The gradient of a leaf of this rank."""
    gradient = dist_autograd.get_gradients(context_id).get(leaf)
    return None if gradient is None else gradient.flatten().tolist()


def enter_another() -> str | None:
    """Enter a context inside one; the error that this raises."""
    try:
        with dist_autograd.context():
            return None
    except RuntimeError as error:
        return str(error).splitlines()[0]


def graph(
    call: str,
    world: tuple[str, ...],
    *,
    name: str,
    inputs: Leaves,
    operations: Operations,
    backwards: tuple[tuple[int, ...], ...],
    value: tuple[float, ...],
    beside: bool,
    inside: int | None,
    seconds: float,
    late: tuple[int, str] | None,
    late_timeout: float,
    out: str,
) -> dict[str, Any]:
    """Compute a graph in a context and run backward, and do the same in this process alone.

    Leaf number n is `value` plus n. With `beside`, a second thread computes the graph at the same
    time, in a context of its own, from the same leaves of this rank. At the rank `inside`, another
    context is entered inside the first one. The rank of `late` is called by a call that times out.
    """
    here = world.index(rpc.get_worker_info().name)
    numbers = [[x + number for x in value] for number in range(len(inputs))]
    mine = {
        number: make_leaf(call, numbers[number], sort)
        for number, (home, sort) in enumerate(inputs)
        if home == here
    }
    ranks = dict.fromkeys(rank for _, _, rank, how in operations if how.startswith(BEFORE))
    before = {rank: used_proxy(world[rank]) for rank in ranks}
    task = Task(call, world, inputs, numbers, mine, operations, backwards, seconds, before)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(in_context, task) if beside else None
        slow = None if late is None else Late(*late, late_timeout, out)
        result = in_context(task, name, inside, slow)
        if other is not None:
            result["beside"] = other.result()["gradients"]
    return result | alone(inputs, numbers, operations, backwards)


def in_context(
    task: Task, name: str = "", inside: int | None = None, late: Late | None = None
) -> dict[str, Any]:
    """The id of a context, the results of the operations in it, and the gradients of the leaves."""
    call, world, leaves, numbers, mine, _, backwards, _, before = task
    result: dict[str, Any] = {}
    with dist_autograd.context() as context_id:
        if name:
            result["id"] = contexts[name] = context_id
        rrefs: dict[int, Any] = {
            number: rpc.remote(world[home], make_leaf, args=(call, numbers[number], sort))
            for number, (home, sort) in enumerate(leaves)
            if number not in mine
        }
        if inside is not None:
            to = world[inside]
            is_here = to == rpc.get_worker_info().name
            result["refused"] = enter_another() if is_here else rpc.rpc_sync(to, enter_another)
        x = tensor(numbers[0])
        slow = None if late is None else start_late(call, world, late, x)
        # What each number stands for: a tensor, a call of which nothing has come back yet, or None
        # for a leaf of another rank that has not been fetched.
        found: list[Any] = [mine.get(number) for number in range(len(leaves))]
        operate(task, found, rrefs, dict(before))
        results = [arrived(found, rrefs, n) for n in range(len(leaves), len(found))]
        result["results"] = [one.tolist() for one in results]
        if late is not None and slow is not None:
            result["late"] = times_out(call, world, late, slow)
        for index, roots in enumerate(backwards):
            losses = [found[number].sum() for number in roots]
            again = index + 1 < len(backwards)
            dist_autograd.backward(context_id, losses, retain_graph=again)
        result["gradients"] = [
            gradient_of(context_id, mine[number])
            if number in mine
            else rpc.rpc_sync(world[home], gradient_there, args=(context_id, rrefs[number]))
            for number, (home, _) in enumerate(leaves)
        ]
    return result


#: The ways that take an RRef which was used before: before the context, or earlier in it.
BEFORE = "proxy before"
AGAIN = "proxy again"


def used_proxy(to: str) -> Any:
    """The RRef of a new object, which has been used, so that the type of its value is known."""
    rref: Any = rpc.remote(to, Applier)
    rref.rpc_sync().is_there()
    return rref


def operate(
    task: Task, found: list[Any], rrefs: Mapping[int, Any], before: Mapping[int, Any]
) -> None:
    """Do the operations of a graph in order, and add to `found` what each gives."""
    call, world = task.call, task.world
    again: dict[int, Any] = {}
    for what, operands, rank, how in task.operations:
        inputs = [arrived(found, rrefs, number) for number in operands]
        args = (call, task.seconds, what, *inputs)
        form = how.rpartition(" ")[2]
        if how.startswith(BEFORE):
            found.append(through_proxy(before[rank], form, args))
        elif how.startswith(AGAIN):
            if rank not in again:
                again[rank] = used_proxy(world[rank])
            found.append(through_proxy(again[rank], form, args))
        elif how:
            then = world[(rank + 1) % len(world)]
            found.append(start(target_of(world, rank, how), then, how, args))
        else:
            found.append(apply_here(what, inputs, functools.partial(hook_ran, call)))


def arrived(found: list[Any], rrefs: Mapping[int, Any], number: int) -> torch.Tensor:
    """The tensor of that number, fetched or waited for when it is first needed."""
    if found[number] is None:
        found[number] = rrefs[number].to_here()
    elif isinstance(found[number], Together):
        await_together(found, found[number].by)
    elif not isinstance(found[number], torch.Tensor):
        found[number] = found[number].wait()
    one: torch.Tensor = found[number]
    return one


def await_together(found: list[Any], by: str) -> None:
    """Wait for all futures of that kind at once, and put their values into their places."""
    numbers = [n for n, one in enumerate(found) if isinstance(one, Together) and one.by == by]
    futures = [found[number].future for number in numbers]
    if by == "wait_all":
        values = torch.futures.wait_all(futures)
    else:
        values = [one.wait() for one in torch.futures.collect_all(futures).wait()]
    for number, value in zip(numbers, values, strict=True):
        found[number] = value


def handed_on(future: Any, form: str) -> Any:
    """A future, or what it becomes by a callback, or by waiting for others with it."""
    if form == "then":
        return future.then(lambda done: -done.wait())
    if form == "done":
        made: Any = torch.futures.Future()

        def complete(done: Any) -> None:
            try:
                made.set_result(-done.wait())
            except Exception as error:
                made.set_exception(error.with_traceback(None))

        future.add_done_callback(complete)
        return made
    return Together(form, future) if form in ("wait_all", "collect_all") else future


def start(to: Any, then: str, how: str, args: tuple[Any, ...]) -> Any:
    """The result of an operation at another rank, or a future for it.

    `args` are the name of the call, the seconds that it sleeps, and the operation.
    """
    if how == "relay":
        return rpc.rpc_sync(to, relay, args=(*args[:2], then, *args[2:]))
    kind, _, form = how.partition(" ")
    if kind == "proxy":
        return through_proxy(rpc.remote(to, Applier), form, args)
    function: Any = apply_there
    if kind in COMPUTES:
        _, _, what, *inputs = args
        function, args = COMPUTES[kind][what], tuple(inputs)
    if kind == "async":
        return handed_on(rpc.rpc_async(to, function, args=args), form)
    form = form or kind
    if form == "async":
        return rpc.rpc_async(to, function, args=args)
    if form == "remote":
        return rpc.remote(to, function, args=args).to_here()
    return rpc.rpc_sync(to, function, args=args)


def through_proxy(rref: Any, form: str, args: tuple[Any, ...]) -> Any:
    """What an :class:`Applier` gives that another rank calls through its RRef, or a future."""
    if form == "async":
        return rref.rpc_async().apply(*args)
    if form == "remote":
        return rref.remote().apply(*args).to_here()
    return rref.rpc_sync().apply(*args)


def sleep_there(call: str, seconds: float, x: torch.Tensor) -> torch.Tensor:
    """Double a tensor after a while, without a gradient."""
    note_slowly(f"{call}/late", seconds)
    note_call(f"{call}/slept")
    return 2.0 * x.detach()


class Sleeper:
    """What a proxy stands for: it sleeps at the rank of its RRef."""

    def is_there(self) -> bool:
        """Answer at once."""
        return True

    def sleep(self, call: str, seconds: float, x: torch.Tensor) -> torch.Tensor:
        """Double a tensor, after a while."""
        return sleep_there(call, seconds, x)


#: What torch says of a call that has timed out, and of an RRef whose creation has.
TIMED_OUT = ("timeout", "timed out")


def start_late(call: str, world: tuple[str, ...], late: Late, x: torch.Tensor) -> Callable[[], Any]:
    """Begin a call that is slower than its timeout; what waits for it, and makes it by `rpc_sync`.

    Before a proxy is called in that way, it has learnt the type of its value.
    """
    to, timeout = target_of(world, late.rank, late.how), late.timeout
    args = (call, TIMES_LATE * timeout, x)
    if late.how == "remote":
        made: Any = rpc.remote(to, sleep_there, args=args, timeout=timeout)
    elif late.how == "async":
        future: Any = rpc.rpc_async(to, sleep_there, args=args, timeout=timeout)
        return functools.partial(future.wait)
    elif not late.how.startswith("proxy"):
        return functools.partial(rpc.rpc_sync, to, sleep_there, args=args, timeout=timeout)
    else:
        rref: Any = rpc.remote(to, Sleeper)
        rref.rpc_sync().is_there()
        if late.how == "proxy":
            return functools.partial(rref.rpc_sync(timeout).sleep, *args)
        if late.how == "proxy async":
            return functools.partial(rref.rpc_async(timeout).sleep(*args).wait)
        made = rref.remote(timeout).sleep(*args)
    handles[late.out] = made
    return functools.partial(made.to_here)


def times_out(call: str, world: tuple[str, ...], late: Late, slow: Callable[[], Any]) -> bool:
    """Whether the call has timed out, whose function has begun when this returns."""
    to = world[late.rank]
    if late.out:
        # By then torch has surely marked the RRef.
        rpc.rpc_sync(to, until_ran, args=(f"{call}/slept",))
    try:
        slow()
    except RuntimeError as error:
        if not any(words in str(error) for words in TIMED_OUT):
            raise
        # The frames of a traceback hold RRefs. A future that a proxy gives holds the error itself
        # (rref_proxy.py: _invoke_rpc), and so this frame, which has not ended.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
    else:
        return False
    if not late.out:
        rpc.rpc_sync(to, until_ran, args=(f"{call}/late",))
    return True


def alone(
    leaves: Leaves,
    numbers: Sequence[Sequence[float]],
    operations: Operations,
    backwards: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The gradients of the leaves when one process computes the graph, and how often hooks run."""
    ran: list[None] = []
    hook = functools.partial(ran.append, None)
    found: list[torch.Tensor] = []
    for values, (_, sort) in zip(numbers, leaves, strict=True):
        leaf = tensor(values).requires_grad_(sort != "fixed")
        if sort == "hooked":
            leaf.register_hook(doubling(hook))  # type: ignore[no-untyped-call]
        found.append(leaf)
    for what, operands, _, how in operations:
        one = apply_here(what, [found[number] for number in operands], hook)
        found.append(-one if negates(how) else one)
    for index, roots in enumerate(backwards):
        losses = [found[number].sum() for number in roots]
        torch.autograd.backward(losses, retain_graph=index + 1 < len(backwards))
    gradients = [leaf.grad for leaf in found[: len(leaves)]]
    return {
        "alone": [None if gradient is None else gradient.tolist() for gradient in gradients],
        "hooks": len(ran),
    }
