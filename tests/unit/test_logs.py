"""Logs of processes: what is kept of them, what is counted in them, and what they take."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from rpcprops.cluster import logs
from rpcprops.cluster.logs import END, LogScan, RankLog
from rpcprops.oracle._log_errors import log_errors

FAILED = b"[I1124 rpc_agent.cpp:217] Send try 12 failed\n"
NO_FAILURE = b"[I1124 rpc_agent.cpp:217] Send try 12 failed later\n"
LEAK = b"[W1124 rref_context.cpp:85] Leaking RRef GloballyUniqueId(1, 2)\n"
ASSERTION = b"RuntimeError: x INTERNAL ASSERT FAILED at y\n"
TRACEBACK = b"Traceback (most recent call last):\n  File x\n"
NOISE = b"a line of no meaning, but with a ] and a Send in it\n"


@pytest.fixture(name="log")
def _log() -> Iterator[RankLog]:
    log = RankLog("log")
    yield log
    log.close()


def scanned(data: bytes, size: int) -> LogScan:
    scan = LogScan()
    for start in range(0, len(data), size):
        scan.feed(data[start : start + size])
    return scan


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_pieces_are_read_as_the_whole(size: int) -> None:
    """Where a log is cut when it is read changes neither its text nor what is found in it."""
    lines = [FAILED, NO_FAILURE, LEAK, ASSERTION, NOISE, "ä\n".encode(), b"\n"] * 20
    random.Random(0).shuffle(lines)
    scan = scanned(b"".join(lines), size)
    assert scan.failed_sends() == 20
    assert scan.text() == b"".join(lines).decode()
    assert [line for _, line in scan._told] == [
        line[:-1] for line in lines if line in (LEAK, ASSERTION)
    ]
    assert all(b"".join(lines)[at:].startswith(line) for at, line in scan._told)


def test_a_line_that_has_not_ended_counts() -> None:
    """As it does when the process was killed; it counts once."""
    scan = LogScan()
    scan.feed(FAILED[:-1])
    assert scan.failed_sends() == 1
    scan.feed(b"\n")
    assert scan.failed_sends() == 1


def test_both_ends_of_a_long_log_are_kept_and_what_tells_between_them() -> None:
    """What is left out is counted; no kept line comes twice, and none is cut."""
    end = NOISE * (END // len(NOISE) + 1)
    parts = [b"first\n", LEAK, end, b"lost\n", ASSERTION, end * 2, FAILED, end, LEAK, b"last\n"]
    scan = scanned(b"".join(parts), 1 << 20)
    text = scan.text()
    lines = text.splitlines()
    assert lines[:2] == ["first", LEAK.decode().rstrip()]
    assert lines[-2:] == [LEAK.decode().rstrip(), "last"]
    assert "lost" not in lines
    (place,) = (number for number, line in enumerate(lines) if "bytes left out" in line)
    assert lines[place + 1] == ASSERTION.decode().rstrip()
    assert {*lines[2:place], *lines[place + 2 : -2]} == {NOISE.decode().rstrip()}
    kept = len(text.encode()) - len(f"{lines[place]}\n{lines[place + 1]}\n".encode())
    assert lines[place] == f"… {len(b''.join(parts)) - kept} bytes left out …"
    assert [error.kind for error in log_errors(text)] == ["assertion"]
    assert scan.failed_sends() == 1


def test_a_traceback_that_is_cut_off_is_left_out() -> None:
    """Its last line, the exception, is missing: the judge would take what follows for that."""
    before = (NOISE * (END // len(NOISE)))[: END - END % len(NOISE) - 2 * len(NOISE)]
    data = before + TRACEBACK + b"  more\n" * 100_000 + b"KeyError: 3\n" + NOISE * 50_000
    assert [error.kind for error in log_errors(scanned(data, 1 << 20).text())] == []


def test_a_line_without_end_takes_no_memory() -> None:
    """A line of megabytes is searched too, and of it only what tells is kept."""
    scan = LogScan()
    told = b"terminate called after throwing"
    for piece in (b"x" * 5_000_000, told[:10], told[10:], *[b"y" * 100_000] * 50):
        scan.feed(piece)
        assert len(scan._line) <= 64 << 10
    assert [told in line for _, line in scan._told] == [True]
    assert len(scan._told[0][1]) <= 4 << 10
    assert told.decode() in scan.text()
    scan.feed(b"] Send try 3 failed\n")
    assert scan.failed_sends() == 1


def test_what_tells_takes_no_memory_without_end() -> None:
    """A process that repeats the worst line for ever."""
    scan = scanned(LEAK * 100_000, 1 << 20)
    assert len(scan.text()) < 3 * END


def test_a_small_log_is_its_text(log: RankLog) -> None:
    """Also after something was read of it, and once it is closed."""
    os.write(log.fd, b"one\ntwo")
    assert (log.text(), log.size(), log.failed_sends()) == ("one\ntwo", 7, 0)
    os.write(log.fd, b" three\n" + FAILED)
    for _ in range(2):
        assert log.text() == "one\ntwo three\n" + FAILED.decode()
        assert (log.failed_sends(), log.size()) == (1, 14 + len(FAILED))
        log.close()


def test_a_long_log_is_read_once_and_given_back(
    log: RankLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look reads on from the last one, and what was read takes no memory any more."""
    taken = 0
    pread = os.pread

    def counting(fd: int, length: int, offset: int) -> bytes:
        nonlocal taken
        piece = pread(fd, length, offset)
        taken += len(piece)
        return piece

    monkeypatch.setattr(os, "pread", counting)
    block = NOISE * 20_000
    for number in range(20):
        os.write(log.fd, block)
        position = os.lseek(log.fd, 0, os.SEEK_CUR)
        log.take()
        assert (log.failed_sends(), "left out" in log.text()) == (0, number > 1)
        assert os.lseek(log.fd, 0, os.SEEK_CUR) == position == log.size()
    os.write(log.fd, FAILED)
    assert log.failed_sends() == 1
    # The first two looks at the text of a log that is still small read it anew.
    assert taken <= log.size() + 4 * len(block)
    assert os.fstat(log.fd).st_blocks * 512 < 4 << 20
    text = log.text()
    assert text.endswith(FAILED.decode())
    log.close()
    assert log.text() == text


def test_a_hole_of_a_terabyte_is_nothing(log: RankLog) -> None:
    """A process that seeks in its output writes on where it is, and both parts are kept."""
    os.write(log.fd, b"before")
    os.lseek(log.fd, 1 << 40, os.SEEK_SET)
    os.write(log.fd, b"between\n" + FAILED)
    assert log.failed_sends() == 1
    os.lseek(log.fd, (1 << 41) + 12345, os.SEEK_SET)
    os.write(log.fd, LEAK)
    assert log.size() > 1 << 41
    words = log.text().replace("\0", "").split("\n")
    assert [word for word in words if word] == [
        "before",
        "between",
        FAILED.decode().rstrip(),
        LEAK.decode().rstrip(),
    ]


def test_a_file_that_is_cut_is_read_on(log: RankLog) -> None:
    """Whoever opens /dev/stdout anew empties the file; what comes then is read."""
    for _ in range(3):
        os.write(log.fd, NOISE * 30_000)
        log.take()
    os.ftruncate(log.fd, 0)
    os.lseek(log.fd, 0, os.SEEK_SET)
    log.take()
    os.write(log.fd, FAILED + b"after\n")
    assert log.failed_sends() == 1
    assert log.text().endswith("after\n")


def test_stacks_are_found_in_the_noise(log: RankLog) -> None:
    """The stack of a process that prints for ever is kept, and not given back before."""
    stack = b'Current thread 0x00007f (most recent call first):\n  File "x", line 3 in loud\n'
    os.write(log.fd, NOISE * 100_000)
    start = log.mark()
    for _ in range(3):
        os.write(log.fd, NOISE * 30_000)
    os.write(log.fd, stack + NOISE * 100_000)
    log.take()
    assert log.text_from(start).startswith(stack.decode())
    assert len(log.text_from(start)) <= 64 << 10
    assert log.text_from(log.mark()) == ""


def test_the_search_of_the_c_library() -> None:
    """It finds what Python finds, up to where it was told to look."""
    sought = LogScan()._words
    for words in (*sought.telling, sought.failed_send_begins):
        for text in (words, b"x" + words, words[:-1], words + b"\0x", b"\0" + words, b""):
            for length in {0, len(text) - 1, len(text)} - {-1}:
                assert logs._holds(text, length, words) == (words in text[:length])
