"""The lines that a run of pytest prints about tests of ``rpc_cluster``: header, reports, summary.

The summary of a test travels in the properties of its report, because with xdist the process that
prints is the controller, and the workers send it their reports.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from types import TracebackType
from typing import Any

import pytest
from _pytest._code.code import ExceptionChainRepr, ReprEntry, Traceback

from rpcprops import clock as clocks
from rpcprops._files import Unwritten, write_whole
from rpcprops._printable import printable
from rpcprops.cluster import namespaces as networks
from rpcprops.cluster.rates import unasked_real_time
from rpcprops.cluster.servers import shared_network
from rpcprops.cluster.stacks import is_theirs, without_ours
from rpcprops.errors import UsageError, text_of
from rpcprops.plugin.drawn import NOT_THE_TESTS, TARGET, function_of, is_drawn
from rpcprops.plugin.failures import failure_lines
from rpcprops.plugin.records import (
    ITEM,
    NOT_SHOWN,
    UNDECIDED,
    UNWRITTEN,
    ItemRecord,
    summary_lines,
)
from rpcprops.plugin.session import Session
from rpcprops.plugin.shards import without_shard
from rpcprops.report.in_flight import Died, collect, died_line
from rpcprops.report.output import sections
from rpcprops.report.text import counted

#: The report property that holds the summary of a test.
_TEST = "rpcprops"
#: The report property that says why ranks run in real time though nobody asked for it.
_CLOCK = "rpcprops-clock"
#: The most lines that a report shows of the text of an error.
_MOST_SAID = 24
#: The report property that says what faults cannot do on this machine.
_FAULTS = "rpcprops-faults"


def header(session: Session) -> list[str]:
    """The clock, the transport and the network of the ranks, as far as they are known yet."""
    options, server = session.options, session.server
    problem = "" if server.clock == "real" else clocks.library_problem()
    if server.clock == "real":
        note = "real time, as asked for"
    elif problem and server.clock == "auto":
        note = unasked_real_time(problem).removeprefix("clock: ")
    elif problem:
        note = f"{options.clock_text} cannot be had: {problem}"
    else:
        note = f"{options.clock_text} (the rate is measured when the first cluster starts)"
    agent = "" if options.agent is None else f"; agent {options.agent}"
    lines = [f"rpcprops: clock {note}; transport {options.transport}{agent}"]
    if options.shards.only is not None:
        lines.append(f"rpcprops: shard {options.shards.only} of {options.shards.count}")
    if server.network == "auto" and networks.problem():
        lines.append(f"rpcprops: {shared_network(networks.problem())}")
    return lines


def add_to(
    report: pytest.TestReport, item: pytest.Item, call: pytest.CallInfo[None], session: Session
) -> None:
    """Add to a test's report what its clusters showed, and the description of its failure."""
    problem = session.take_clock_problem()
    if problem:
        report.user_properties.append((_CLOCK, problem))
    unconfirmed = session.take_unconfirmed()
    record = item.stash.get(ITEM, None)
    if record is None or call.when != "call":
        report.user_properties += [
            (UNDECIDED if late else NOT_SHOWN, line) for line, late in unconfirmed
        ]
        return
    for line, late in unconfirmed:
        record.doubt(line, is_undecided=late)
    error = None if call.excinfo is None else call.excinfo.value
    if report.failed and record.smallest is not None and error is not None:
        shorten(report.longrepr)
        # An error of the caller's, of the machine's or of ours is no failure of the code under
        # test: there is nothing to replay.
        if not isinstance(error, (*NOT_THE_TESTS, UsageError)):
            if record.smallest.recorded:
                _, outcome = record.smallest.recorded[-1]
                report.sections += sections(outcome.ranks, text_of(error))
            lines = failure_lines(item, error, record, session)
            report.sections.append(("rpcprops", "\n".join(lines)))
    problem = session.take_arming_problem() if record.clusters else ""
    if problem:
        report.user_properties.append((_FAULTS, problem))
    report.user_properties.append((_TEST, _summary_of(report, item, call, record)))
    # Its failing examples are described now. The item stays until pytest ends, so free them.
    del item.stash[ITEM]


def show_the_test_first(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Take the frames that lead to the test out of a failure: those of pytest, Hypothesis and us.

    Hypothesis takes its own out of what it raises, but we may report another example's error. A
    misuse ends at the line of the user's that has caused it.
    """
    raised = call.excinfo or _told_by_unittest(item)
    if raised is None or item.config.getoption("fulltrace", False):
        return
    is_misuse = isinstance(raised.value, UsageError)
    if not is_misuse and ITEM not in item.stash:
        return
    calls = _calls(raised.tb)
    theirs = [number for number, one in enumerate(calls) if _is_the_users(one)]
    if theirs:
        end = theirs[-1] + 1 if is_misuse else len(calls)
        shown: TracebackType | None = None
        for one in reversed(calls[theirs[0] : end]):
            shown = TracebackType(shown, one.tb_frame, one.tb_lasti, one.tb_lineno)
        assert shown is not None
        raised.traceback = Traceback(shown)


def _told_by_unittest(item: pytest.Item) -> pytest.ExceptionInfo[BaseException] | None:
    """What a test of unittest has raised: pytest takes it from its item, later than we look."""
    told: list[pytest.ExceptionInfo[BaseException]] = getattr(item, "_excinfo", None) or []
    return next(iter(told), None)


def show_misuse_alone(
    report: pytest.TestReport, item: pytest.Item, call: pytest.CallInfo[None]
) -> None:
    """Take all frames out of a misuse that no line of the user's has caused.

    Such are the attributes of a state machine, which our own code reads.
    """
    if call.excinfo is None or item.config.getoption("fulltrace", False):
        return
    is_misuse = isinstance(call.excinfo.value, UsageError)
    chain = report.longrepr
    if not is_misuse or not isinstance(chain, ExceptionChainRepr):
        return
    if any(map(_is_the_users, _calls(call.excinfo.tb))):
        return
    for traceback, _, _ in chain.chain:
        entry = traceback.reprentries[-1]
        if isinstance(entry, ReprEntry):
            entry.lines = [line for line in entry.lines if line.startswith("E")]
            entry.reprfuncargs = entry.reprlocals = entry.reprfileloc = None
            traceback.reprentries = [entry]


def _calls(traceback: TracebackType | None) -> list[TracebackType]:
    found: list[TracebackType] = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _is_the_users(call: TracebackType) -> bool:
    # Hypothesis puts functions of its own at the place of the test's, and marks them by this name.
    is_wrapper = "__hypothesistracebackhide__" in call.tb_frame.f_globals
    return is_theirs(call.tb_frame.f_code.co_filename) and not is_wrapper


def shorten(longrepr: object) -> None:
    """Take the frames of torch and rpcprops, and the middle of a long text, out of what is shown.

    An error that a call raised at another rank has the traceback of that rank in its text.
    """
    if not isinstance(longrepr, ExceptionChainRepr):
        return
    for traceback, _, _ in longrepr.chain:
        for entry in traceback.reprentries:
            # Each line of the text of an error begins with this mark of pytest's.
            source = [line for line in entry.lines if not line.startswith("E")]
            said = without_ours((ln for ln in entry.lines if ln.startswith("E")), "E")
            said = [line for line in said if f"label={TARGET!r}" not in line]
            if len(said) > _MOST_SAID:
                half = _MOST_SAID // 2
                gap = f"E       … {counted(len(said) - 2 * half, 'line')} …"
                said = [*said[:half], gap, *said[-half:]]
            entry.lines = [*source, *said]


def _summary_of(
    report: pytest.TestReport, item: pytest.Item, call: pytest.CallInfo[None], record: ItemRecord
) -> dict[str, Any]:
    """The summary of a test, as ``--rpc-report`` writes it."""
    return {
        "nodeid": item.nodeid,
        "outcome": report.outcome,
        "examples": record.examples,
        "clusters": record.clusters,
        "armed": record.armed,
        "drawn": record.drawn or is_drawn(function_of(item)),
        "faults_fired": record.fired.total(),
        "fired_by_type": dict(sorted(record.fired.items())),
        "unconfirmed": record.unconfirmed,
        "undecided": record.undecided,
        "in_used_ranks": record.in_use,
        "remedy": record.remedy if record.undecided else "",
        "clock": record.clock_note,
        "seconds": round(call.duration, 3),
    }


class Summary:
    """The summary of the tests of this run, for the terminal and for ``--rpc-report``.

    There is one for each run of pytest, in the process that prints. With xdist that is the
    controller, and the workers send it their reports.
    """

    def __init__(self, config: pytest.Config, session: Session) -> None:
        self.config = config
        self.session = session
        self.report_file = session.options.report
        self.tests: list[dict[str, Any]] = []
        #: Failures of state machines that were not confirmed: the word for each, its test, and its
        #: line.
        self.of_machines: list[tuple[str, str, str]] = []
        #: The clock problems of each process that ran tests.
        self.clock_problems: list[str] = []
        #: What faults cannot do here, without repeats: workers share a machine.
        self.arming_problems: dict[str, None] = {}
        #: Lines about files that could not be written, without repeats.
        self.unwritten: dict[str, None] = {}
        #: The line about what earlier runs left in flight, until it is printed.
        self.died: list[Died] = []
        #: Tests whose worker died.
        self.crashed: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Look for what earlier runs left in flight, before this run starts a test."""
        # A replay reads such a file in place, and a list of tests need not show these lines.
        if self.session.options.replay is None and not self.config.option.collectonly:
            self.died = collect(self.config.rootpath)

    def take_died(self) -> str:
        """The line about what earlier runs left in flight; empty after the first time."""
        died, self.died = self.died, []
        return died_line(died)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the properties of a report."""
        if report.when not in ("setup", "call", "teardown"):
            self.crashed.append(report.nodeid)
        for name, value in report.user_properties:
            if name == _TEST and isinstance(value, dict):
                self.tests.append(value)
            elif name in (NOT_SHOWN, UNDECIDED):
                self.of_machines.append((name, report.nodeid, str(value)))
            elif name == _CLOCK:
                self.clock_problems.append(str(value))
            elif name == _FAULTS:
                self.arming_problems[str(value)] = None
            elif name == UNWRITTEN:
                self.unwritten[str(value)] = None

    def pytest_sessionfinish(self) -> None:
        """Write the report file, if one was asked for; also after an interrupt."""
        if self.report_file is None:
            return
        data = {"tests": sorted(self.tests, key=lambda summary: summary["nodeid"])}
        try:
            write_whole(self.report_file, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            self.unwritten[str(Unwritten.because(error, self.report_file))] = None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what was run, and what a reader must know about it."""
        for line, markup in self._lines():
            terminalreporter.write_line(f"rpcprops: {printable(line)}", **markup)

    def _lines(self) -> Generator[tuple[str, dict[str, bool]], None, None]:
        yellow = {"yellow": True}
        if self.tests:
            fired: int = sum(summary["faults_fired"] for summary in self.tests)
            clusters = sum(summary["clusters"] for summary in self.tests)
            yield (
                f"{counted(clusters, 'cluster')} in {counted(len(self.tests), 'test')}, "
                f"{counted(fired, 'injected fault')} fired",
                {},
            )
        for line in self._machine_lines():
            yield line, yellow
        for summary in self.tests:
            passed = summary["drawn"] and summary["outcome"] == "passed"
            if passed and summary["armed"] and not summary["faults_fired"]:
                yield (
                    f"vacuous: no injected fault fired in {summary['nodeid']} "
                    f"({counted(summary['examples'], 'example')})",
                    yellow,
                )
            for line in summary_lines(summary):
                yield line, yellow
        for words, nodeid, line in self.of_machines:
            yield f"{words}: {nodeid}: {line}", yellow
        for line in self.unwritten:
            yield line, {"red": True}
        for line in self._died_lines():
            yield line, yellow

    def _machine_lines(self) -> list[str]:
        """What this machine cannot do, though nobody asked for less."""
        # It was not printed yet if no test ended after the server was started.
        problems = [*self.clock_problems, self.session.take_clock_problem()]
        # Workers share a machine, so one line is enough for all of them.
        return [*list(filter(None, problems))[:1], *self.arming_problems]

    def _died_lines(self) -> list[str]:
        """What earlier runs left, if no header said it, and what workers of this run have left."""
        lines = [self.take_died()]
        if self.crashed:
            # The next run says it too: few people read all the parts of a long CI job.
            died = collect(self.config.rootpath, removes=False)
            ours = [one for one in died if any(_is_named(n, one.subject) for n in self.crashed)]
            lines.append(died_line(ours, "a worker of this run"))
        return [line for line in lines if line]


def _is_named(nodeid: str, subject: str) -> bool:
    """Whether a node id belongs to the test that an artefact calls `subject`."""
    return f"::{without_shard(nodeid)}".endswith(f"::{subject}")
