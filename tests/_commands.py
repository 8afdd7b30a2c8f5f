"""Commands of rpcprops's for tests of what they refuse: each is a process, forked from one.

Such a command ends before it starts anything, and takes half a second to import what it needs.
Here that is imported once for all of them.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Real seconds: far above what a refusal takes.
SECONDS = 100

_SERVER = """
import json, os, sys

import rpcprops.commands.app
import rpcprops._bench, rpcprops._hunt, rpcprops._replay, rpcprops._sweep, rpcprops.properties
from rpcprops.cli import main

for line in sys.stdin:
    folder, words, *files = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["rpcprops", *words]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Commands:
    """The process that forks them."""

    process: subprocess.Popen[str]
    #: Where their output goes.
    scratch: Path

    def run(self, folder: Path, *words: str) -> Ended:
        """How `rpcprops WORDS` ends in a folder."""
        out, err = self.scratch / "out", self.scratch / "err"
        for file in (out, err):
            file.unlink(missing_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        line = json.dumps([str(folder), words, os.devnull, str(out), str(err)])
        print(line, file=self.process.stdin, flush=True)
        assert select.select([self.process.stdout], [], [], SECONDS)[0], f"{words} did not end"
        code = int(self.process.stdout.readline())
        return Ended(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


@contextmanager
def commands(scratch: Path) -> Iterator[Commands]:
    """Start the process that forks commands, and end it."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=os.environ | {"COLUMNS": "160", "NO_COLOR": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Commands(process, scratch)
        finally:
            process.kill()
