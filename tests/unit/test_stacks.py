"""Stacks and tracebacks of ranks, reduced to the user's code."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch.distributed.rpc

import rpcprops
from rpcprops.cluster import stacks

TORCH = os.path.join(os.path.dirname(torch.distributed.rpc.__file__), "internal.py")
OURS = os.path.join(os.path.dirname(rpcprops.__file__), "cluster", "_functions.py")

STACKS = f"""\
Thread 0x00007f3910ff96c0 (most recent call first):
  File "{OURS}", line 98 in listen
  File "{os.__file__}", line 982 in run

Current thread 0x00007f395c430240 (most recent call first):
  File "{TORCH}", line 209 in wait
  File "{{mine}}", line 2 in waits
  File "{{mine}}", line 4 in <lambda>
  File "{OURS}", line 302 in run_call
"""


def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text("def waits():\n    fut.wait()\n\nlambda: waits()\n", encoding="utf-8")
    return str(path)


def test_only_the_users_frames_are_told(tmp_path: Path) -> None:
    """A rank is where the innermost frame of the user's is, with the line of the source."""
    file = mine(tmp_path)
    assert stacks.where("worker1", STACKS.format(mine=file)) == [
        f"worker1 is at {file}:2 in waits: fut.wait()",
        f"    called at {file}:4 in <lambda>: lambda: waits()",
    ]
    assert stacks.where("worker1", "") == []


def test_a_call_for_another_rank_and_an_import_are_told_apart(tmp_path: Path) -> None:
    """torch's function that serves a call, and the frame of a module, say what the thread does."""
    file = mine(tmp_path)
    head = "Thread 0x1 (most recent call first):\n"
    serves = (
        f'{head}  File "{file}", line 2 in waits\n  File "{TORCH}", line 209 in _run_function\n'
    )
    assert stacks.where("w", serves)[0].startswith("w runs a call for another rank, at ")
    imports = f'{head}  File "{file}", line 4 in <module>\n  File "{OURS}", line 9 in run\n'
    assert stacks.where("w", imports)[0].startswith("w imports a module, at ")


def test_a_call_of_a_function_of_torchs_is_named() -> None:
    """Where no frame is the user's, the function that the rank was told to call is named."""
    text = (
        "Thread 0x1 (most recent call first):\n"
        f'  File "{TORCH}", line 8 in wait\n  File "{TORCH}", line 9 in rpc_sync\n'
        f'  File "{TORCH}", line 3 in wrapper\n  File "{OURS}", line 302 in run_call\n'
    )
    assert stacks.where("worker0", text) == ["worker0 is in rpc_sync"]


def test_a_traceback_keeps_the_users_frames(tmp_path: Path) -> None:
    """Frames of torch and of ours are gone, with the lines below them and pybind11's list."""
    file = mine(tmp_path)
    text = (
        "Traceback (most recent call last):\n"
        f'  File "{OURS}", line 302, in run_call\n    return fn(*args)\n           ^^^^\n'
        f'  File "{file}", line 2, in waits\n    fut.wait()\n'
        f'  File "{TORCH}", line 209, in _run_function\n    result = 1\n'
        f"ValueError: no\n\nAt:\n  {TORCH}(236): _handle_exception\n"
    )
    assert stacks.short_traceback(text).rstrip().splitlines() == [
        "Traceback (most recent call last):",
        f'  File "{file}", line 2, in waits',
        "    fut.wait()",
        "ValueError: no",
    ]
    marked = [f"E   {line}" for line in text.splitlines()]
    assert len(stacks.without_ours(marked, "E")) == 5


def test_a_traceback_without_the_users_frames_stays() -> None:
    """There the frames of torch are all that a reader has."""
    text = f'Traceback (most recent call last):\n  File "{TORCH}", line 2, in f\n    g()\nE: x\n'
    assert stacks.short_traceback(text) == text


def test_the_stacks_of_this_process_are_read_back() -> None:
    """What a rank says of its threads has the form that is read, with this very line in it."""
    line = traceback.extract_stack(limit=1)[0].lineno
    (here,) = [
        frame
        for frames in stacks.threads(stacks.stacks_here())
        for frame in frames
        if frame.function == "test_the_stacks_of_this_process_are_read_back"
    ]
    assert line is not None
    assert (here.file, line < here.line < line + 5) == (__file__, True)
