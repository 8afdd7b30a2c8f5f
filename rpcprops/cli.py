"""The command line: ``rpcprops check``, ``replay``, ``sweep``, ``hunt``, ``upstream`` and the rest.

Exit codes: 0 every promise holds (or fails as documented), 1 one does not, 2 misuse, 3 this machine
cannot, 128 and its number where a signal ended the command (130 for Ctrl-C).
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NoReturn

from rpcprops.commands import stop


def main() -> NoReturn:
    """Entry point of the ``rpcprops`` command."""
    with stop.listening():
        code = _run()
        stopped = stop.exit_code()
        if stopped is not None:
            code = stopped
            with contextlib.suppress(OSError):
                print(stop.reason(), file=sys.stderr)
    sys.exit(code)


def _run() -> Any:
    """Run the command; its exit code."""
    try:
        # Only now, because this takes a while, in which there may be a Ctrl-C.
        from rpcprops.commands.app import run

        return run()
    except KeyboardInterrupt:
        stop.ending()
        return None  # the signal says which code it is
