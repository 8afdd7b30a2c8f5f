"""The driver of a script: starts the ranks, tells each what to do, and checks for the failure.

Nobody imports this module. Its text from the first class on is part of every script, word for
word. The lines before that are part of it too, with the values of the failure (see `script.py`);
the values below belong to no program.
"""

# ruff: noqa: EM101  (the first argument of Found is no message)

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch._C._distributed_autograd import _get_debug_info
from torch._C._distributed_rpc import _get_current_rpc_agent, _rref_context_get_debug_info
from torch.distributed import rpc

from rpcprops.steps.in_rank.ends import end_rank
from rpcprops.steps.in_rank.state import contexts, init_again, meets_at, ran

# The kind of finding that shows this failure, and not another one.
BROKEN: str = ""

# The names of the ranks.
WORLD: tuple[str, ...] = ()

# The agent that fails and delays messages, and the torch module that registers it.
BACKEND: str = ""
BACKEND_MODULE: str = ""

# What each rank fails to send and how often, and what it sends late and by how many seconds:
# arguments of torch's FaultyTensorPipeRpcBackendOptions.
FAULTS: list[dict[str, Any]] = []

# Whether the ranks shut RPC down once, and initialise it again, before the steps.
REINIT: bool = False

# The threads of each rank's agent.
THREADS: int = 8

# Whether the ranks begin without RPC, and join and leave a group in the steps.
GROUP: bool = False

# The default timeout of all that the ranks send, once they have joined: a day stands for none.
RPC_TIMEOUT: float = 86400.0

# The parts of torch's debug information that a settle reads. They must not change for some
# seconds, as long as a message may be on its way.
COUNTED: list[str] = []
STEADY: float = 0.3

# How often each call must have run at the end, by rank; None if that is not checked.
CALLS: list[dict[str, int]] | None = None

# How each rank shuts down, and after how many seconds by rank.
HOW: str = "graceful"
IGNORES_LEAKS: bool = False
WAITS: list[float] = []

# Whether the ranks shut down at the end; ranks whose shutdown must report a leak; ranks whose may.
SHUTS_DOWN: bool = False
LEAKING: list[int] = []
MAY_LEAK: list[int] = []

# Seconds after which it counts as hung: a process that starts, a shutdown (where an owner waits for
# deletes that do not come), or anything else.
START_SECONDS: float = 180.0
SHUTDOWN_SECONDS: float = 120.0
PATIENCE: float = 20.0


class Found(Exception):
    """What the run found: its kind, and a sentence."""


# The steps, in the order in which they run, each in the process of its own rank.

STEPS: list[dict[str, Any]] = []


def step(
    rank: int, gives: Any = None, raises: Any = False, together: int = 0, thread: int = 0
) -> Any:
    """A step at `rank`: its value, or text in the error that it raises (None: it may raise).

    Steps with the same number in `together` run at the same time; those of one rank and one thread
    in order.
    """

    def add_step(function: Callable[[], Any]) -> Callable[[], Any]:
        it = {"rank": rank, "run": function, "gives": gives, "raises": raises}
        STEPS.append(it | {"together": together, "thread": thread})
        return function

    return add_step


def settle(held: dict[int, dict[str, int]]) -> None:
    """Wait until every rank holds exactly this (nothing, if it is not in `held`)."""
    STEPS.append({"held": held, "together": 0})


# What a rank does.


def run_rank(rank: int, folder: str, pipe: Any) -> None:
    """Join the other ranks, then obey the commands from the pipe."""
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    rpc.api._ignore_rref_leak = IGNORES_LEAKS
    if REINIT:
        join(rank, f"{folder}/first")
        rpc.shutdown()
    meets_at.append((rank, f"file://{folder}/group"))
    if not GROUP:
        join(rank, f"{folder}/store")
    init_again.append(lambda which, **given: join(rank, f"{folder}/{which}", **given))
    pipe.send((None, None, {}))
    while True:
        what, argument = pipe.recv()
        value, error = attempt(obey, what, argument)
        pipe.send((value, error, contexts))


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """What a function returns, and the text of the error that it raises."""
    try:
        return function(*args), None
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        if isinstance(raised, UnicodeDecodeError):
            # torch put the bytes of a message into the text of its error.
            error += raised.object.decode(errors="backslashreplace")
        # The frames of the traceback hold RRefs, which would stay alive.
        traceback.clear_frames(raised.__traceback__)
        return None, error


def join(rank: int, store: str, **given: Any) -> None:
    """Initialise RPC with this rank's faults, and with what is given in place of the usual."""
    importlib.import_module(BACKEND_MODULE)
    registry: Any = rpc.backend_registry
    backend = registry.BackendType[BACKEND]
    options = registry.construct_rpc_backend_options(
        backend,
        init_method=given.get("init_method", f"file://{store}"),
        num_worker_threads=THREADS,
        rpc_timeout=given.get("rpc_timeout", 86400.0),
        **FAULTS[rank],
    )
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        given.get("name", WORLD[rank]),
        backend=backend,
        rank=given.get("rank", rank),
        world_size=given.get("world_size", len(WORLD)),
        rpc_backend_options=options,
    )
    rpc._set_rpc_timeout(RPC_TIMEOUT)  # type: ignore[attr-defined]


def obey(what: str, argument: Any) -> Any:
    """Obey a command of the first process; returns the answer."""
    if what == "steps":
        numbers, known = argument
        contexts.update(known)
        return run_steps(numbers)
    if what == "held":
        return held_here()
    if what == "ran":
        return dict(ran)
    if what == "shutdown":
        end_rank(HOW, argument)
    if what == "exit":
        os._exit(0)
    return None


def run_steps(numbers: list[int]) -> dict[int, tuple[Any, str | None]]:
    """Run steps of this rank, each thread's in order; what each returned, and its error."""
    ended: dict[int, tuple[Any, str | None]] = {}

    def run_thread(thread: int) -> None:
        for number in numbers:
            if STEPS[number]["thread"] == thread:
                ended[number] = attempt(STEPS[number]["run"])

    first, *others = sorted({STEPS[number]["thread"] for number in numbers})
    threads = [threading.Thread(target=run_thread, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    run_thread(first)
    for thread in threads:
        thread.join()
    return ended


def held_here() -> dict[str, int]:
    """What this rank holds by torch's counters, without zeros."""
    gc.collect()
    agent = _get_current_rpc_agent().get_debug_info()
    counts = {**_rref_context_get_debug_info(), **_get_debug_info(), **agent}
    return {name: int(counts[name]) for name in COUNTED if int(counts[name])}


# What the first process does.


class Rank:
    """The process of a rank, and the pipe to it."""

    def __init__(self, rank: int, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = WORLD[rank]
        self.pipe, theirs = context.Pipe()
        args = (rank, folder, theirs)
        self.process = context.Process(target=run_rank, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, what: str, argument: Any = None) -> None:
        """Send it a command; :meth:`answer` waits for the answer."""
        try:
            self.pipe.send((what, argument))
        except OSError:
            self.must_live("")

    def must_live(self, what: str) -> None:
        """Raise if its process has died."""
        self.process.join(1)
        code = self.process.exitcode
        if code is not None:
            end = f"was killed by signal {-code}" if code < 0 else f"left with exit code {code}"
            raise Found("died", f"{self.name} {end} {what}")

    def answer(self, seconds: float, what: str) -> Any:
        """Its answer: a value, an error, and the contexts that it knows."""
        deadline = time.monotonic() + seconds
        while not self.pipe.poll(0.05):
            for rank in RANKS:
                if not rank.process.is_alive() and not self.pipe.poll(0.5):
                    rank.must_live(f"while {self.name} ran {what}")
            if time.monotonic() > deadline:
                raise Found("hung", f"{what} at {self.name} did not end in {seconds} s")
        try:
            return self.pipe.recv()
        except EOFError:
            self.must_live(f"while it ran {what}")
            raise


RANKS: list[Rank] = []


def run() -> None:
    """Run the whole program; raises what it finds."""
    for rank in RANKS:
        _, error, _ = rank.answer(START_SECONDS, "init_rpc")
        if error:
            raise Found("error", f"init_rpc raised {error}")
    number = 0
    while number < len(STEPS):
        if "held" in STEPS[number]:
            wait_until(STEPS[number]["held"])
            number += 1
            continue
        group = together_with(number)
        ended = run_together(group)
        for other in group:
            end_step(other, *ended[other])
        number += len(group)
    if CALLS is not None:
        compare_calls(CALLS)
    if SHUTS_DOWN:
        shut_down()


def run_together(group: list[int]) -> dict[int, tuple[Any, str | None]]:
    """Run steps at the same time; what each returned, and its error."""
    by_rank: dict[int, list[int]] = {}
    for number in group:
        by_rank.setdefault(STEPS[number]["rank"], []).append(number)
    for rank, numbers in by_rank.items():
        RANKS[rank].tell("steps", (numbers, contexts))
    ended: dict[int, tuple[Any, str | None]] = {}
    for rank, numbers in by_rank.items():
        name = " and ".join(f"step{number}" for number in numbers)
        answered, _, made = RANKS[rank].answer(PATIENCE, name)
        ended.update(answered)
        contexts.update(made)
    return ended


def together_with(number: int) -> list[int]:
    """A step, and the steps after it that run at the same time."""
    group = [number]
    for other in range(number + 1, len(STEPS)):
        if not STEPS[number]["together"] == STEPS[other]["together"] > 0:
            break
        group.append(other)
    return group


def end_step(number: int, value: Any, error: str | None) -> None:
    """Compare the value or error of a step."""
    step = STEPS[number]
    name = f"step{number}"
    if error and step["raises"] is False:
        # If a rank died, that explains what others raise.
        for rank in RANKS:
            rank.must_live(f"while {name} raised {error}")
        raise Found("error", f"{name} raised {error}")
    if not error and step["raises"]:
        raise Found("no error", f"{name} gave {value}, and had to raise")
    if error and step["raises"] and not re.search(step["raises"], error):
        raise Found("error", f"{name} raised {error}, not {step['raises']}")
    if error and error.startswith("UnicodeDecodeError") and BROKEN == "unclear":
        raise Found("unclear", f"{name} raised {error}")
    if not error and step["gives"] is not None and not same(value, step["gives"]):
        raise Found("value", f"{name} gave {value}, and had to give {step['gives']}")


def same(seen: Any, wanted: Any) -> bool:
    """Whether two values are equal; numbers in a dict may differ by rounding."""
    if isinstance(wanted, dict):
        return all(close(seen.get(key), value) for key, value in wanted.items())
    return bool(seen == wanted)


def close(seen: Any, wanted: Any) -> bool:
    """Whether two numbers, or lists of numbers, are equal except for rounding."""
    if isinstance(wanted, list):
        return len(seen or []) == len(wanted) and all(map(close, seen, wanted))
    if isinstance(wanted, float) and isinstance(seen, float):
        return seen == wanted or abs(seen - wanted) <= 1e-12 * abs(wanted)
    # True stands for any text.
    return bool(seen) if wanted is True else bool(seen == wanted)


def wait_until(wanted: dict[int, dict[str, int]]) -> None:
    """Wait until every rank holds what it must, and still does after a while."""
    began = steady = time.monotonic()
    while True:
        for rank in RANKS:
            rank.tell("held")
        seen = [rank.answer(PATIENCE, "a look at its counters")[0] for rank in RANKS]
        now = time.monotonic()
        if any(held != wanted.get(rank, {}) for rank, held in enumerate(seen)):
            steady = now
        elif now - steady > STEADY:
            return
        if now - began > PATIENCE:
            raise Found("held", f"ranks hold {seen}, and must hold {wanted}")
        time.sleep(0.1)


def compare_calls(calls: list[dict[str, int]]) -> None:
    """Check that each call ran as often as it must."""
    for rank, wanted in zip(RANKS, calls, strict=True):
        rank.tell("ran")
        seen, _, _ = rank.answer(PATIENCE, "a look at its calls")
        if seen != wanted:
            raise Found("calls", f"{rank.name} ran {seen}, and had to run {wanted}")


def shut_down() -> None:
    """Let all ranks shut down, and exit."""
    for rank, wait in zip(RANKS, WAITS, strict=True):
        rank.tell("shutdown", wait)
    for number, rank in enumerate(RANKS):
        _, error, _ = rank.answer(SHUTDOWN_SECONDS, "rpc.shutdown()")
        if number in LEAKING and not error:
            raise Found("no error", f"{rank.name} had to report a leak at shutdown")
        if number in MAY_LEAK and error and "Leak" in error:
            continue
        if error:
            raise Found("shutdown", f"rpc.shutdown() of {rank.name} raised {error}")
    for rank in RANKS:
        rank.tell("exit")
        rank.process.join(PATIENCE)
        if rank.process.exitcode != 0:
            kind = "died" if (rank.process.exitcode or 0) < 0 else "shutdown"
            raise Found(kind, f"{rank.name} left with {rank.process.exitcode}")


def main() -> int:
    """Run everything; returns the exit code."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            RANKS.extend(Rank(rank, folder) for rank in range(len(WORLD)))
            run()
        except Found as found:
            kind, sentence = found.args
            print("the failure shows:" if kind == BROKEN else "something else:", sentence)
            return 1 if kind == BROKEN else 2
        except Exception:
            traceback.print_exc()
            return 2
        finally:
            for rank in RANKS:
                rank.process.kill()
                rank.process.join()
    print("the failure does not show")
    return 0
