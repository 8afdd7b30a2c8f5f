"""What ranks printed, as a report and the terminal show it."""

from __future__ import annotations

from rpcprops.outcomes import RankOutcome
from rpcprops.report.output import Echo, printed, sections

LOG = """\
theirs
[I1126 22:30:00.123456789 rpc_agent.cpp:155] Send try 1 failed
[W1126 22:30:00.123456789 socket.cpp:99] [c10d] slow
Thread 0x1 (most recent call first):
  File "/x.py", line 3 in f
also theirs
"""


def test_torchs_log_and_stacks_are_left_out() -> None:
    """What the user's code printed stays, line by line."""
    assert printed(LOG) == ["theirs", "also theirs"]


def test_an_error_of_another_rank_is_not_shown_twice() -> None:
    """torch prints the error of a call where it was raised; the report shows that error anyway."""
    error = "ValueError: On WorkerInfo(id=0, name=worker0):\nValueError('no')\nValueError: no"
    log = "mine\nOn WorkerInfo(id=0, name=worker0):\nValueError('no')\nValueError: no\n"
    assert printed(log, error) == ["mine"]
    assert len(printed(log, "AssertionError: other")) == 4


def test_a_section_for_each_rank_that_printed() -> None:
    """Its title has the words of pytest's options; only the last lines are shown, and a count."""
    many = "".join(f"line {number}\n" for number in range(100))
    ranks = [
        RankOutcome(0, "a", log=many),
        RankOutcome(1, "b", log=""),
        RankOutcome(2, "c", log="x"),
    ]
    (first, text), (second, x) = sections(ranks)
    assert (first, second, x) == (
        "Captured stdout/stderr rank a",
        "Captured stdout/stderr rank c",
        "x",
    )
    lines = text.splitlines()
    assert lines[0] == "(94 lines before these: see the log in the artefact)"
    assert lines[1:] == [f"line {number}" for number in range(94, 100)]


def test_lines_are_passed_on_when_they_are_complete() -> None:
    """However the log is cut into pieces; the last line is passed on at the end."""
    seen: list[str] = []
    echo = Echo(seen.append)
    for byte in LOG.encode() + b"open":
        echo(bytes([byte]))
    assert seen == ["theirs", "also theirs"]
    echo(b"")
    echo(b"")
    assert seen == ["theirs", "also theirs", "open"]
