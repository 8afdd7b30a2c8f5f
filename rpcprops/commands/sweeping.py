"""What a sweep of tables and a sweep of points print while they run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from rpcprops.commands.live import live, out, plain

if TYPE_CHECKING:
    from rpcprops._sweep import Record
    from rpcprops.properties import Failure


def follow(
    name: str,
    results: Iterable[tuple[Record, Failure | None]],
    *,
    known: int,
    total: int,
    good: Collection[str],
) -> None:
    """Run through the results of a sweep as they come; print what did not hold.

    Args:
        name: what is swept.
        known: how many results there were before.
        total: how many there are at the end.
        good: the verdicts that do not fail it.
    """
    from rpcprops.report.text import failure_lines

    with live(name, total, known) as shown:
        bad = 0
        for done, (record, failure) in enumerate(results, known + 1):
            bad += record.verdict not in good
            shown.update(done, f"{bad} did not hold" if bad else "")
            if record.verdict == "undecided":
                line = f"undecided {record.broken} under {record.plan!r}"
                out.print(f"[yellow]{plain(line)}[/yellow]")
            if failure is not None:
                out.print("[bold red]violated[/bold red]")
                for line in failure_lines(failure, record.artefact):
                    out.print(f"    {plain(line)}")
