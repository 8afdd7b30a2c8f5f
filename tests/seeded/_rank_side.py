"""What makes a real rank wrong: functions that run in it before the program, and patch it.

A function here is called in one rank. What it replaces are the functions that the steps of that
rank run, and that other ranks call there, so the agent, the wire and every other rank stay stock
torch's.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_rpc import _delete_all_user_and_unforked_owner_rrefs
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc.internal import _InternalRPCPickler

from rpcprops.steps.in_rank import autograd, calls, functions, graphs, rrefs, state, sums

#: What wrong ranks hold on to.
_held: list[Any] = []
#: torch's names that are no part of its types.
_torch: Any = torch


def _replace(module: Any, name: str, function: Any) -> None:
    """Let a function run in place of one that a step names, or that an RPC names as its target."""
    getattr(module, name)
    setattr(module, name, function)


def _replace_add(around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Let `around` run in place of the function that programs call, with it and its arguments."""
    honest = sums.add

    def add(*args: Any) -> Any:
        return around(honest, args)

    _replace(sums, "add", add)


def run_twice() -> None:
    """Run what is called here twice."""
    _replace_add(lambda add, args: (add(*args), add(*args))[1])


def run_never() -> None:
    """Answer for what is called here without running it."""
    _replace_add(lambda _, args: args[1])


def _add(*args: Any) -> Any:
    return sums.add(*args)


def run_at(other: str) -> None:
    """Let another rank run what is called here."""
    _replace_add(lambda _, args: rpc.rpc_sync(other, _add, args=args))


def answer_first_value() -> None:
    """Give the first value ever computed here again and again."""

    def cached(add: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        value = add(*args)
        _held.append(value)
        return _held[0]

    _replace_add(cached)


def never_leave_a_context() -> None:
    """Enter a distributed autograd context, and stay in it."""
    context = dist_autograd.context()
    # In a thread of its own: what this rank calls later is not called inside it.
    thread = threading.Thread(target=context.__enter__)
    thread.start()
    thread.join()
    _held.append(context)


def raise_in_a_thread() -> None:
    """Let a thread end by an exception, which Python writes to the log."""
    thread = threading.Thread(target=int, args=("no number",))
    thread.start()
    thread.join()


def count_once() -> None:
    """Count no further than one."""

    def next_number(call: str) -> int:
        state.note_call(call)
        return 1

    _replace(calls, "next_number", next_number)


def change_values() -> None:
    """Change what was computed here while nobody looks."""

    def changing(add: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        for value in _held:
            value.add_(1.0)
        _held.append(add(*args))
        return _held[-1]

    _replace_add(changing)


def raise_in_calls() -> None:
    """Raise in what is called here."""

    def raising(_: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        state.note_call(args[0])
        msg = "out of memory"
        raise RuntimeError(msg)

    _replace_add(raising)


def swallow_exceptions() -> None:
    """Answer with a value where the function raises."""

    def harmless(call: str, left: Any, *_: Any) -> Any:
        state.note_call(call)
        return left

    _replace(sums, "raise_on_purpose", harmless)


def hide_lost_calls() -> None:
    """Make up a value where a call could not be sent."""
    honest = calls.call

    def call(*args: Any, **fields: Any) -> Any:
        try:
            return honest(*args, **fields)
        except RuntimeError:
            return [3.0]

    _replace(calls, "call", call)


def sleep_in_calls(seconds: float) -> None:
    """Answer late, by virtual seconds."""

    def late(add: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        time.sleep(seconds)
        return add(*args)

    _replace_add(late)


def keep_dropped_handles() -> None:
    """Hold on to every handle that the program drops: its delete is never sent."""
    honest = rrefs.drop

    def drop(*args: Any, **fields: Any) -> None:
        _held.append(state.handles[fields["handle"]])
        honest(*args, **fields)

    _replace(rrefs, "drop", drop)


def keep_arguments() -> None:
    """Hold on to the handles that calls bring here."""

    def keeping(add: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        _held.append(args)
        return add(*args)

    _replace_add(keeping)


def keep_contexts() -> None:
    """Enter contexts, and never leave them."""
    _torch.distributed.autograd.context.__exit__ = lambda *_: None


def swallow_what_leaves_contexts() -> None:
    """Leave contexts as ever, and let no exception out of them."""
    context = _torch.distributed.autograd.context
    honest = context.__exit__

    def leave(*args: Any) -> bool:
        honest(*args)
        return True

    context.__exit__ = leave


def _replace_hop(change: Callable[[Any], Any]) -> None:
    honest = autograd.hop

    def hop(*args: Any) -> Any:
        return change(honest(*args))

    _replace(autograd, "hop", hop)


def lose_gradients() -> None:
    """Send back zeros for the gradients that come by here."""

    def hooked(y: Any) -> Any:
        y.register_hook(torch.zeros_like)
        return y

    _replace_hop(hooked)


def lose_gradients_of_proxies() -> None:
    """Send back zeros for the gradients of what is called here through an RRef."""
    honest = graphs.Applier.apply

    def apply(self: Any, *args: Any) -> Any:
        y: Any = honest(self, *args)
        y.register_hook(torch.zeros_like)
        return y

    _replace(graphs.Applier, "apply", apply)


def lose_gradients_of_futures() -> None:
    """Send back zeros for the gradients of what futures give here in a context."""
    honest = graphs.handed_on

    def hooked(done: Any) -> Any:
        y = done.wait()
        y.register_hook(torch.zeros_like)
        return y

    def handed_on(future: Any, form: str) -> Any:
        return honest(future.then(hooked), form)

    _replace(graphs, "handed_on", handed_on)


def hide_timeouts_in_contexts() -> None:
    """Say nothing of a call of this rank in a context that its timeout has ended."""
    honest = autograd.time_out

    def time_out(*args: Any) -> dict[str, Any]:
        honest(*args)
        return {}

    _replace(autograd, "time_out", time_out)


def keep_the_default_timeout() -> None:
    """Let nobody change the default timeout of this rank."""
    _replace(rpc, "_set_rpc_timeout", lambda _: None)


def leave_contexts_for_calls() -> None:
    """Make the calls of a context, but for those that end at once, in a thread of their own."""
    honest = autograd.call_async

    def call_elsewhere(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(honest(*args, **kwargs)))
        thread.start()
        thread.join()
        return found[0]

    _replace(autograd, "call_async", call_elsewhere)


def ask_owners_for_one_pass() -> None:
    """Let an owner run only the last of several passes that it is asked for."""
    honest = autograd.pass_back

    def pass_back(context_id: int, loss: Any, *, retain: bool) -> None:
        if not retain or isinstance(loss, torch.Tensor):
            honest(context_id, loss, retain=retain)

    _replace(autograd, "pass_back", pass_back)


def stay_in_training() -> None:
    """Make the remote modules of this rank ignore that they are put into evaluation mode."""
    from rpcprops.steps.in_rank import training

    _replace(training.Affine, "eval", lambda self: self)


def give_state() -> None:
    """Make the remote modules of this rank accept a method that they have to refuse."""
    from torch.distributed.nn.api.remote_module import RemoteModule

    _replace(RemoteModule, "state_dict", lambda *_: {})


def compute_otherwise() -> None:
    """Add a little to what a context computes here."""
    _replace_hop(lambda y: y + 0.5)


def break_silently() -> None:
    """Let a backward pass through that has to break."""
    _replace(
        autograd.BreaksInBackward, "backward", staticmethod(lambda _ctx, gradient: (gradient, None))
    )


def step_without_moving() -> None:
    """Make the optimizers of this rank do nothing."""
    from rpcprops.steps.in_rank import training

    _replace(training.PlainSGD, "step", lambda *_: None)


def _wait_for_ever() -> None:
    threading.Event().wait()


def never_finish_a_call(to: str) -> None:
    """Start a call from here whose function never returns."""
    _held.append(rpc.rpc_async(to, _wait_for_ever))


def block_in_calls() -> None:
    """Never return from what is called here."""
    _replace_add(lambda *_: _wait_for_ever())


def die_in_calls() -> None:
    """Be killed by what is called here."""
    _replace_add(lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def leave_in_calls() -> None:
    """Leave, without an error, when called."""
    _replace_add(lambda *_: os._exit(0))


def stop_in_calls() -> None:
    """Stop, as a debugger does, when called."""

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        # It takes a moment until every thread has stopped.
        _wait_for_ever()

    _replace_add(stop)


def raise_in_shutdown() -> None:
    """Shut down as ever, and raise then."""
    module: Any = rpc
    honest = module.shutdown

    def shutdown(**options: Any) -> None:
        honest(**options)
        msg = "shutdown has failed"
        raise RuntimeError(msg)

    module.shutdown = shutdown


def exit_with_an_error() -> None:
    """Leave with an exit code that says that something went wrong."""
    system: Any = os
    honest = system._exit
    system._exit = lambda _code: honest(9)


def die_in_shutdown() -> None:
    """Be killed when it is time to shut down."""
    module: Any = rpc
    module.shutdown = lambda **_: os.kill(os.getpid(), signal.SIGKILL)


def _after_each(name: str, act: Callable[[str], Any]) -> None:
    """Let `act` follow every step of a kind that makes an RRef here, with the RRef's name."""
    honest = getattr(rrefs, name)

    def run(*args: Any, **fields: Any) -> Any:
        value = honest(*args, **fields)
        act(fields["out"])
        return value

    _replace(rrefs, name, run)


def delete_what_lives() -> None:
    """Delete an RRef as soon as it is made, while the program still has its handle."""
    # Virtual; it waits no longer than until the RRef is confirmed.
    patience = datetime.timedelta(seconds=10_000)
    _after_each("remote", lambda _: _delete_all_user_and_unforked_owner_rrefs(patience))


def delete_twice() -> None:
    """Make two RRefs of every fork that comes here: each will delete it, the first at once."""
    receive: Any = _torch._C._distributed_rpc.PyRRef._deserialize

    def twice(_cls: type, data: Any) -> Any:
        first = receive(data)
        second = receive(data)
        del first
        return second

    pickler: Any = _InternalRPCPickler
    pickler._py_rref_receiver = classmethod(twice)


def pickle_twice() -> None:
    """Pickle each message twice, and send the second result."""
    pickler: Any = _InternalRPCPickler
    honest = pickler.serialize

    def twice(self: Any, message: Any) -> Any:
        honest(self, message)
        return honest(self, message)

    pickler.serialize = twice


def keep_what_is_raised() -> None:
    """Hold on to the exceptions that functions raise here."""
    honest = functions.raise_there

    def raise_there(*args: Any) -> None:
        try:
            honest(*args)
        except Exception as error:
            _held.append(error)
            raise

    _replace(functions, "raise_there", raise_there)


def fork_for_nobody() -> None:
    """Count a fork of what is owned here, and send it to nobody."""
    _after_each("own", lambda out: _held.append(state.handles[out]._serialize()))
