"""The application of the command line: every command, with its help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rpcprops import __version__
from rpcprops.commands import narrow, stop
from rpcprops.commands.agent import build, show
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

#: The exit codes that all commands share.
_CODES = "2 misuse; 3 this machine cannot; 130 interrupted (128 and the number of the signal)."

app = typer.Typer(
    name="rpcprops",
    cls=narrow.Group,
    help="Property tests for torch.distributed.rpc under sampled faults, on real ranks.",
    epilog=f"Exit codes: 0 holds; 1 violated; {_CODES} The help of a command says more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Each command, how it is used most, and what its own exit codes mean.
_COMMANDS: dict[Callable[..., Any], tuple[str, str]] = {
    check: (
        "check rref-values autograd-cleanup -n 200 --seed 7",
        "0 all hold (known findings are no failure); 1 one is violated, vacuous or undecided",
    ),
    replay: (
        "replay .rpcprops/failures/NAME.json --script",
        "0 it does not fail any more; 1 it fails",
    ),
    sweep: (
        "sweep create_on_self --ranks each --json map.json",
        "0 all held or met a known finding; 1 one is violated, undecided or not tried, or no fault "
        "fired",
    ),
    hunt: (
        "hunt -n 2000 --json summary.json",
        "0 the file holds no failure; 1 it holds one that real time has confirmed",
    ),
    upstream: ('upstream -k "RpcTest and rref" -n 2', "0 all pass; 1 a test fails"),
    doctor: ("doctor", "0 a fault was injected and retried over both transports; 1 it was not"),
    bench: ("bench --repeats 3 --harness 0", "0 it was measured"),
}


def _help(command: Callable[..., Any]) -> str:
    """The docstring of a command; typer would keep its line ends, and break the lines again."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _epilog(example: str, codes: str) -> str:
    return f"Example: rpcprops {example}\n\nExit codes: {codes}; {_CODES}"


for _command, (_example, _own) in _COMMANDS.items():
    app.command(cls=narrow.Command, help=_help(_command), epilog=_epilog(_example, _own))(_command)

_agent = typer.Typer(
    name="agent",
    cls=narrow.Group,
    help="The agent WIRE (--agent wire), which records every message: compile it, or show it.",
    epilog=_epilog("agent build", "0 done"),
    no_args_is_help=True,
)
for _command, _example in ((build, "agent build --force"), (show, "agent show")):
    _agent.command(cls=narrow.Command, help=_help(_command), epilog=_epilog(_example, "0 done"))(
        _command
    )
app.add_typer(_agent)


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
