"""The application of the command line: every command, with its help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rpcprops import __version__
from rpcprops.commands import stop
from rpcprops.commands.agent import agent
from rpcprops.commands.bench import bench
from rpcprops.commands.check import check
from rpcprops.commands.doctor import doctor
from rpcprops.commands.hunt import hunt
from rpcprops.commands.live import err, out, plain
from rpcprops.commands.replay import replay
from rpcprops.commands.shared import CANNOT, HOLDS, INTERRUPTED, MISUSE
from rpcprops.commands.sweep import sweep
from rpcprops.commands.upstream import upstream
from rpcprops.errors import MachineCannot, UsageError

_CODES = "Exit codes: 0 holds, 1 violated, 2 misuse, 3 this machine cannot, 130 interrupted."

app = typer.Typer(
    name="rpcprops",
    help="Property tests for torch.distributed.rpc under sampled faults, on real ranks.",
    epilog=_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Each command, and how it is used most.
_COMMANDS: dict[Callable[..., Any], str] = {
    check: "rpcprops check rref-values autograd-cleanup -n 200 --seed 7",
    replay: "rpcprops replay .rpcprops/failures/NAME.json --script",
    sweep: "rpcprops sweep create_on_self --ranks each --json map.json",
    hunt: "rpcprops hunt -n 2000 --json summary.json",
    upstream: 'rpcprops upstream -k "RpcTest and rref" -n 2',
    doctor: "rpcprops doctor",
    bench: "rpcprops bench --repeats 3 --harness 0",
}


def _help(command: Callable[..., Any]) -> str:
    """The docstring of a command; typer would keep its line ends, and break the lines again."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _command, _example in _COMMANDS.items():
    app.command(help=_help(_command), epilog=f"Example: {_example}\n\n{_CODES}")(_command)


app.add_typer(agent)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"rpcprops {__version__}")
        raise typer.Exit(HOLDS)


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """The options that stand before a command."""


def run() -> Any:
    """Run the command that the arguments of this process name; its exit code."""
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
