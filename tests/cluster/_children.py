"""What a rank may leave behind: processes that a function of its user has started."""

from __future__ import annotations

import subprocess
import sys


def start_children() -> list[int]:
    """A child in the rank's group, one in a session of its own, one of that one, and an orphan."""
    code = (
        "import subprocess, sys, time\n"
        "below = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print(below.pid, flush=True)\n"
        "time.sleep(1000)"
    )
    near = subprocess.Popen(["sleep", "1000"])
    far = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert far.stdout is not None
    # Forked twice: the shell has left, and what it started is in a session of its own.
    orphan = subprocess.run(
        ["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=True,
    )
    return [near.pid, far.pid, int(far.stdout.readline()), int(orphan.stdout)]
