"""The command line: ``rpcprops check``, ``replay``, ``sweep``, ``hunt``, ``upstream`` and the rest.

Exit codes: 0 every promise holds (or fails as documented), 1 one does not, 2 misuse, 3 this machine
cannot, 128 and its number where a signal ended the command (130 for Ctrl-C).
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NoReturn

import typer

from rpcprops.commands import stop
from rpcprops.commands.bench import bench
from rpcprops.commands.check import check
from rpcprops.commands.doctor import doctor
from rpcprops.commands.hunt import hunt
from rpcprops.commands.live import err, plain
from rpcprops.commands.replay import replay
from rpcprops.commands.shared import CANNOT, HOLDS, INTERRUPTED, MISUSE
from rpcprops.commands.sweep import sweep
from rpcprops.commands.upstream import upstream
from rpcprops.errors import MachineCannot, UsageError

app = typer.Typer(
    name="rpcprops",
    help="Property tests for torch.distributed.rpc under sampled faults, on real ranks.",
    epilog="Exit codes: 0 holds, 1 violated, 2 misuse, 3 this machine cannot, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Importing them costs 20 ms in all, beside 300 ms for rpcprops, typer and rich.
for _command in (check, replay, sweep, hunt, upstream, doctor, bench):
    app.command()(_command)


def main() -> NoReturn:
    """Entry point of the ``rpcprops`` command."""
    with stop.listening():
        code = _run()
        stopped = stop.exit_code()
        if stopped is not None:
            code = stopped
            with contextlib.suppress(OSError):
                err.print(stop.reason())
    sys.exit(code)


def _run() -> Any:
    """Run the command; its exit code."""
    try:
        app()
    except SystemExit as left:
        return left.code
    except KeyboardInterrupt:
        stop.ending()
        return INTERRUPTED
    except UsageError as error:
        return _complain(error, MISUSE)
    except MachineCannot as error:
        return _complain(error, CANNOT)
    except Exception as error:
        # After a SIGHUP there is no terminal to print to.
        if stop.exit_code() is None or not isinstance(error, OSError):
            err.print_exception()
            err.print("[bold red]rpcprops is at fault[/bold red]; please report the lines above.")
        # Not 1: that would say that a promise was broken.
        return CANNOT
    return HOLDS


def _complain(error: Exception, code: int) -> int:
    err.print(f"[bold red]rpcprops:[/bold red] {plain(error)}")
    return code
