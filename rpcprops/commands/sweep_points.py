"""``rpcprops sweep PROGRAM --points``: each message of a program with each fault, as a map."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from rpcprops.commands import stop
from rpcprops.commands.live import out, plain
from rpcprops.commands.shared import COLOURS, write_json
from rpcprops.commands.sweeping import follow

if TYPE_CHECKING:
    from rpcprops._sweep import State
    from rpcprops._sweep_points import Point
    from rpcprops.programs import Program
    from rpcprops.runner import Runner

#: What does not fail a sweep.
_GOOD = ("holds", "known", "documented", "overdue", "unmet", "ran", "waits")
#: Of these, what is not said by one word of a finding, or of torch's documentation.
_SHOWN = ("holds", "documented", "overdue", "ran", "waits")
_COLOURS = {
    **COLOURS,
    "documented": "cyan",
    "overdue": "yellow",
    "ran": "cyan",
    "waits": "magenta",
    "unmet": "dim",
    "not tried": "bold red",
}
_WORDS = {"holds": "held", "unmet": "not sent any more"}
#: The mark of a message of the shutdown.
_OF_SHUTDOWN = "shutdown"
#: What a verdict of the map means that does not say it by itself.
_MEANINGS = {
    "documented": "torch documents what came (docs/faults.md)",
    "overdue": "nothing could pass while the message was held, so it was only late; else as held",
    "ran": "nothing is predicted; no rank died, and no wait was longer than torch's timeouts",
    "waits": "a rank waited for what torch gives no timeout, and was ended; else as ran or as held",
    "unmet": "a fault that another one left without its message",
}
#: The columns of a terminal in which the map has room; in others it is a list.
_WIDE = 100
#: The most points that were not tried, or that wait, of which each has a line of its own.
_MOST_NAMED = 5
_ACTIONS = ("fail", "delay", "hold", "duplicate", "lose")


def sweep_points(
    program: Program,
    runner: Runner,
    *,
    pairs: bool,
    transport: str,
    restart: bool,
    json_file: Path | None,
    name: str,
) -> bool:
    """Try each point that has no result yet, and print the map; whether the sweep succeeded."""
    from rpcprops._sweep import State
    from rpcprops._sweep_points import PointSweep, has, points_of, with_timeout

    timed = with_timeout(program)
    if timed != program:
        out.print(
            f"the program runs with rpc_timeout={timed.rpc_timeout:g}, to notice what is lost"
        )
    state = State(
        timed,
        torch_version=runner.server.torch_version,
        rate=runner.server.rate,
        transport=transport,
        agent="WIRE, all points",
        root=Path(),
        restart=restart,
    )
    trial = PointSweep(timed, runner, state, transport=transport)
    messages = trial.record_messages().messages
    single = points_of(messages, timed)
    places = _places(single, state, pairs=pairs)
    known = sum(has(state, point) for point in places)
    out.print(_to_try(len(single), len(places) - len(single)))
    if known:
        out.print(f"{known} of {len(places)} are known from {plain(state.path)}")
    report: dict[str, Any] = {}
    try:
        results = trial.try_all(single, pairs=pairs)
        follow(name, results, known=known, total=len(places), good=_GOOD)
    finally:
        # Report after an interrupt too: what was found is not lost.
        stop.ending()
        places = _places(single, state, pairs=pairs)
        report = _report(name, state, single, places, messages, runner.server.clock_note)
        write_json(json_file, report)
        _show(report)
        out.print(plain(state.unwritten or f"kept in {state.path}"))
    return report["verdict"] in ("holds", "known")


def _places(single: tuple[Point, ...], state: State, *, pairs: bool) -> tuple[Point, ...]:
    """All points as they were run, if they were, with their pairs if these are asked for."""
    from rpcprops._sweep_points import as_recorded, pairs_of

    places = as_recorded(single, state)
    return (*places, *(pairs_of(places) if pairs else ()))


def _report(
    name: str,
    state: State,
    single: tuple[Point, ...],
    places: tuple[Point, ...],
    messages: Any,
    clock_note: str,
) -> dict[str, Any]:
    from rpcprops._json import to_json
    from rpcprops._sweep_points import rows
    from rpcprops.report.artefact import versions

    found = rows(messages, state, single)
    both = [(point, state.records.get(point.plan)) for point in places[len(single) :]]
    verdicts = Counter(row["verdict"] for row in found)
    verdicts.update("not tried" if record is None else record.verdict for _, record in both)
    records = [state.records[point.plan] for point in places if point.plan in state.records]
    return {
        "versions": versions(),
        "clock": clock_note,
        "program": name,
        "verdict": _verdict(verdicts),
        "messages": len(
            {(row["type"], row["sender"], row["receiver"], row["number"]) for row in found}
        ),
        "verdicts": dict(sorted(verdicts.items())),
        "run": {
            "predicted": sum(record.predicted for record in records),
            "unpredicted": sum(not record.predicted for record in records),
            "not_tried": verdicts["not tried"],
        },
        "findings": dict(sorted(Counter(f for r in records for f in r.findings).items())),
        "in_used_ranks": sum(record.used for record in records),
        "kept_in": str(state.path),
        "points": found,
        "pairs": [
            {
                "faults": [fault.name for fault in point.faults],
                "verdict": "not tried" if record is None else record.verdict,
                **({} if record is None else to_json(record)),
            }
            for point, record in both
        ],
    }


def _verdict(verdicts: Counter[str]) -> str:
    for verdict, said in (
        ("violated", "violated"),
        ("undecided", "undecided"),
        ("not tried", "unfinished"),
        ("known", "known"),
    ):
        if verdicts[verdict]:
            return said
    return "holds" if any(verdicts[verdict] for verdict in _SHOWN) else "vacuous"


def _to_try(points: int, pairs: int) -> str:
    """How much there is to run."""
    return f"{points} points" + (f" and {pairs} pairs of them" if pairs else "") + " to try"


def _legend(report: dict[str, Any]) -> list[str]:
    """A line that says what the words of the map mean that occur and do not say it themselves."""
    occurs = set(report["verdicts"])
    if any(row["overdue"] for row in report["points"]):
        occurs.add("overdue")
    said = [
        f"{_WORDS.get(word, word)}: {meaning}"
        for word, meaning in _MEANINGS.items()
        if word in occurs
    ]
    if any(row["in_shutdown"] for row in report["points"]):
        said.insert(
            0,
            f"({_OF_SHUTDOWN}): a request that a rank sends while it shuts down, or its "
            "answer, such as the calls by which all ranks meet then",
        )
    return ["; ".join(said)] if said else []


def _not_tried(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each point that was not tried; one line for all, if there are many."""
    left = [row for row in rows if row["verdict"] == "not tried"]
    if len(left) > _MOST_NAMED:
        counts = Counter(row["action"] for row in left)
        said = ", ".join(f"{action} {counts[action]}" for action in _ACTIONS if counts[action])
        where = "the map shows which, and an interrupted sweep goes on with them"
        return [f"not tried: {len(left)} points ({said}); {where}"]
    return [
        f"not tried: {row['action']} of {row['type']} {row['sender']}:{row['receiver']}:"
        f"{row['number']}"
        for row in left
    ]


def _waiting(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each point under which a rank waits without end; one line for all, if many do."""
    found = [row for row in rows if row["verdict"] == "waits"]
    if len(found) > _MOST_NAMED:
        counts = Counter(row["action"] for row in found)
        said = ", ".join(f"{action} {counts[action]}" for action in _ACTIONS if counts[action])
        return [f"waits without end, and was ended: {len(found)} points ({said}); --json says why"]
    return [
        f"waits without end, and was ended: {row['action']} of {row['type']} {row['sender']}:"
        f"{row['receiver']}:{row['number']}: {row['said']}"
        for row in found
    ]


def _unpredicted(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each reason why points have no prediction, with the points or their number.

    The reason that most points have comes first.
    """
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["unpredicted"]:
            by_reason.setdefault(row["unpredicted"], []).append(row)
    lines: list[str] = []
    for why, found in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        counts = Counter(row["action"] for row in found)
        said = ", ".join(f"{action} {counts[action]}" for action in _ACTIONS if counts[action])
        kinds = " and ".join(dict.fromkeys(row["type"] for row in found))
        first = found[0]
        which = f"{first['sender']}:{first['receiver']}:{first['number']}"
        where = (
            f"{first['action']} of {first['type']} {which}"
            if len(found) == 1
            else f"{len(found)} points of {kinds} ({said})"
        )
        lines.append(f"no prediction: {where}: {why}")
    return lines


def _cell(row: dict[str, Any]) -> str:
    """What a row of the map says: its findings or its verdict, and whether a hold ran out."""
    text = ", ".join(row["findings"]) or _WORDS.get(row["verdict"], row["verdict"])
    return f"{text}, overdue" if row["overdue"] and row["verdict"] != "overdue" else text


def _show_map(rows: list[dict[str, Any]]) -> None:
    """Print what each message showed with each action, one line for each message."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("message", no_wrap=True)
    for action in _ACTIONS:
        table.add_column(action, overflow="fold")
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        which = f"{row['type']} {row['sender']} to {row['receiver']}, {row['number']}"
        if row["in_shutdown"]:
            which += f" ({_OF_SHUTDOWN})"
        colour = _COLOURS[row["verdict"]]
        lines.setdefault(which, {})[row["action"]] = f"[{colour}]{plain(_cell(row))}[/]"
    for which, cells in lines.items():
        table.add_row(which, *(cells.get(action, "") for action in _ACTIONS))
        if out.width < _WIDE:
            said = ", ".join(f"{action} {text}" for action, text in cells.items())
            out.print(f"{plain(which)}: {said}")
    if out.width >= _WIDE:
        out.print(table)


def _show(report: dict[str, Any]) -> None:
    """Print the map and a summary."""
    _show_map(report["points"])
    for line in _legend(report):
        out.print(f"[dim]{plain(line)}[/dim]")
    for line in _not_tried(report["points"]):
        out.print(f"[bold red]{plain(line)}[/bold red]")
    for line in _waiting(report["points"]):
        out.print(f"[magenta]{plain(line)}[/magenta]")
    for line in _unpredicted(report["points"]):
        out.print(f"[dim]{plain(line)}[/dim]")
    for pair in report["pairs"]:
        # Those that were not tried are counted: a sweep may end long before them.
        if pair["verdict"] not in (*_GOOD, "not tried"):
            said = f"{pair['verdict']}: {' and '.join(pair['faults'])}"
            line = f"{said}: {pair['broken']}" if pair.get("broken") else said
            out.print(f"[{_COLOURS[pair['verdict']]}]{plain(line)}[/]")
    counts = ", ".join(
        f"{number} {_WORDS.get(word, word)}" for word, number in report["verdicts"].items()
    )
    colour = COLOURS.get(report["verdict"], "yellow")
    tried = f"{report['messages']} messages, {len(report['points'])} points"
    if report["pairs"]:
        tried += f", {len(report['pairs'])} pairs"
    run = report["run"]
    share = f"{run['predicted']} run with a prediction, {run['unpredicted']} without"
    said = f"{tried} ({share}): {counts}"
    for name, count in report["findings"].items():
        said += f", {count} met the known finding {name}"
    out.print(f"[{colour}]{report['verdict']}[/{colour}] {plain(said)}")
