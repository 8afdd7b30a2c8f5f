"""``pytest --rpc-upstream``: each test of PyTorch's RPC suites is a pytest item.

So ``-k``, ``-n``, ``-x`` and ``--junitxml`` work as they do for any test.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from rpcprops._files import Unwritten
from rpcprops._printable import printable
from rpcprops.cluster import ClusterServer
from rpcprops.errors import HarnessError, MachineCannot
from rpcprops.plugin.options import UpstreamOptions
from rpcprops.report.artefact import DIRECTORY, write_or_say
from rpcprops.report.text import artefact_of, failure_lines
from rpcprops.runner import Runner
from rpcprops.upstream import _report
from rpcprops.upstream._examine import (
    UpstreamResult,
    failures_of,
    run_under_faults,
    run_without_faults,
)
from rpcprops.upstream._ranks import DEFAULT_RATE, UpstreamRanks
from rpcprops.upstream.data import UpstreamTest

if TYPE_CHECKING:
    from rpcprops.report.in_flight import InFlight

#: The report property that holds the result of a test, as JSON.
PROPERTY = "rpcprops-upstream"
_FOLDER = "upstream"


class UpstreamPlugin:
    """Collects the suites instead of files, runs them, and reports on them."""

    def __init__(
        self,
        config: pytest.Config,
        options: UpstreamOptions,
        server: ClusterServer,
        in_flight: InFlight,
    ) -> None:
        self.config = config
        self.options = options
        self.in_flight = in_flight
        self.ranks = UpstreamRanks(server, options.agent)
        self.runner = Runner(server)
        self.rows: list[dict[str, Any]] = []
        #: Sentences about requested files that could not be written.
        self.unwritten: list[str] = []

    def pytest_report_header(self) -> str:
        """The header lines that apply to these tests only."""
        agent = f", all on the agent {self.options.agent}" if self.options.agent else ""
        return (
            f"rpcprops: PyTorch's own RPC suites, at rate {DEFAULT_RATE:g} by default, over shm"
            f"{agent}"
        )

    def pytest_collection(self, session: pytest.Session) -> bool | None:
        """Collect the suites; the controller of xdist leaves this to its workers."""
        if self.config.pluginmanager.hasplugin("dsession"):
            return None
        try:
            self.ranks.agent.prepare()
            self.ranks.server.start()
            tests = self.ranks.tests()
        except (MachineCannot, HarnessError) as error:
            pytest.exit(f"--rpc-upstream: {error}", returncode=3)
        suites: dict[str, UpstreamSuite] = {}
        items: list[pytest.Item] = []
        for test in tests:
            if test.suite not in suites:
                suites[test.suite] = UpstreamSuite.from_parent(
                    session, name=test.suite, nodeid=f"{_FOLDER}::{test.suite}"
                )
            items.append(
                UpstreamItem.from_parent(suites[test.suite], name=test.name, test=test, plugin=self)
            )
        if self.config.args_source is pytest.Config.ArgsSource.ARGS:
            items = _named(items, self.config.args)
        report = pytest.CollectReport(_FOLDER, "passed", None, cast("Any", list(items)))
        self.config.hook.pytest_collectreport(report=report)
        session.items = items
        self.config.hook.pytest_collection_modifyitems(
            session=session, config=self.config, items=session.items
        )
        self.config.hook.pytest_collection_finish(session=session)
        session.testscollected = len(session.items)
        return True

    # Inside the wrapper that names the running test by its node id.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Name the running test as a replay finds it."""
        if isinstance(item, UpstreamItem):
            self.in_flight.begin(item.test.id, kind="upstream")
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test's result; in the controller too, to which workers send their reports."""
        found = [value for name, value in report.user_properties if name == PROPERTY]
        if found and report.when == "call":
            self.rows.append(json.loads(cast("str", found[0])))
        elif report.failed and not found:
            # Its process has died, or could not run it.
            self.rows.append(_report.lost_row(report.nodeid, str(report.longrepr)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a table of the classes, and lines about single tests."""
        if self.rows:
            width = terminalreporter._tw.fullwidth  # noqa: SLF001 - pytest shows it nowhere else
            for line in _report.summary_lines(self.rows, width=width):
                terminalreporter.write_line(line)
        for line in self.unwritten:
            terminalreporter.write_line(printable(line), red=True)

    # Around the plugin that writes the JUnit XML, and inside the one that prints the summary.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Write the report files, also after an interrupt.

        If a file cannot be written, a line says so; the exit code is still that of the tests.
        """
        result: object = None
        xml = self.config.getoption("xmlpath", None)
        try:
            result = yield
        except OSError as error:
            if xml is None:
                raise
            self.unwritten.append(f"rpcprops: {Unwritten.because(error, Path(xml))}")
        path = self.options.report
        if path is not None and self.rows:
            try:
                _report.write_report(path, self.rows, self.options.agent)
            except OSError as error:
                self.unwritten.append(f"rpcprops: {Unwritten.because(error, path)}")
        return result


def _named(items: list[pytest.Item], names: list[str]) -> list[pytest.Item]:
    """The items with these ids or of these classes.

    Raises:
        UsageError: a name belongs to no item and no class.
    """
    found: dict[pytest.Item, None] = {}
    for name in names:
        fitting = [item for item in items if f"{item.nodeid}::".startswith(f"{name}::")]
        if not fitting:
            msg = (
                f"--rpc-upstream takes ids of its own tests, such as {items[0].nodeid}, "
                f"and there is no {name!r}"
            )
            raise pytest.UsageError(msg)
        found.update(dict.fromkeys(fitting))
    return list(found)


class UpstreamSuite(pytest.Collector):
    """One class of PyTorch's test code."""

    def collect(self) -> list[pytest.Item]:
        """Nothing: its tests are made together with it."""
        return []


class UpstreamFailed(Exception):
    """A test of PyTorch's failed, perhaps only under faults; the text describes the failure."""


class UpstreamItem(pytest.Item):
    """One test of PyTorch's."""

    def __init__(self, *, test: UpstreamTest, plugin: UpstreamPlugin, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.test = test
        self.plugin = plugin

    def runtest(self) -> None:
        """Run the test; skip or raise according to the result."""
        server = self.plugin.ranks.server
        server.start()
        try:
            result = self._result()
        except HarnessError:
            # The fork server has died; only this test fails because of that.
            server.close()
            raise
        lines = self._failure_lines(result)
        row = _report.row_of(result, server.torch_version, lines)
        self.user_properties.append((PROPERTY, json.dumps(row)))
        parity, under = row["parity"], result.under_faults
        if result.verdict == "failed":
            raise UpstreamFailed("\n".join(lines))
        if parity["agreement"] == "differs" and not parity["cause"]:
            msg = f"{result.verdict}, where PyTorch's harness says {parity['harness_verdict']}"
            raise UpstreamFailed(msg)
        if result.verdict in ("skipped", "not_applicable"):
            word = "not applicable: " if result.verdict == "not_applicable" else ""
            pytest.skip(word + result.reason)
        if under is not None and under.verdict in ("violated", "undecided"):
            raise UpstreamFailed("\n".join(lines))

    def _result(self) -> UpstreamResult:
        plugin = self.plugin
        result = run_without_faults(plugin.ranks, self.test)
        options = plugin.options
        if options.sampled:
            run_under_faults(
                plugin.ranks, plugin.runner, result, examples=options.examples, seed=options.seed
            )
        return result

    def _failure_lines(self, result: UpstreamResult) -> list[str]:
        """The description of a failure; its artefact is written first."""
        lines: list[str] = []
        if result.under_faults is not None and result.under_faults.examination is not None:
            unconfirmed = result.under_faults.examination.unconfirmed
            lines += [f"undecided under faults: {line}" for line in unconfirmed]
        for failure in failures_of(result):
            path = write_or_say(artefact_of(failure), self.config.rootpath / DIRECTORY)
            lines += failure_lines(failure, path)
        return lines

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The lines of a failure, without the traceback of this process."""
        if isinstance(excinfo.value, UpstreamFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """The place that pytest shows for the test: one folder, one file for each class."""
        return self.config.rootpath / _FOLDER / self.test.suite, None, self.test.id
