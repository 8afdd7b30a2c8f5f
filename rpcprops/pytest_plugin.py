"""The pytest plugin: its hooks, and the fixtures ``rpc_cluster`` and ``rpc_shard``.

The work of the hooks is in :mod:`rpcprops.plugin`.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest

from rpcprops import agents
from rpcprops._printable import printable
from rpcprops.cluster import RpcCluster
from rpcprops.errors import MachineCannot
from rpcprops.plugin import counting, examples, probing, replay, reports, shards, styles
from rpcprops.plugin.drawn import is_drawn
from rpcprops.plugin.options import Options, declare, is_worker
from rpcprops.plugin.records import ITEM, ItemRecord
from rpcprops.plugin.session import SESSION, Session

FIXTURE = "rpc_cluster"
_SUMMARY = pytest.StashKey[reports.Summary]()


#: The name of :class:`rpcprops.RpcCluster` here.
ClusterFactory = RpcCluster


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ``--rpc-`` options."""
    declare(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, and make what lives as long as this process; starts no server yet.

    Raises:
        pytest.UsageError: an option has an invalid value.
    """
    options = Options.read(config)
    session = config.stash[SESSION] = Session(config, options)
    agents.show_progress_by(agents.lines_by(session.say_of_agent))
    if not is_worker(config):
        summary = config.stash[_SUMMARY] = reports.Summary(config, session)
        config.pluginmanager.register(summary, "rpcprops-summary")
    if options.upstream is not None:
        from rpcprops.upstream.plugin import UpstreamPlugin

        plugin = UpstreamPlugin(config, options.upstream, session.server, session.in_flight)
        config.pluginmanager.register(plugin, "rpcprops-upstream")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """If a file has a test of ours, its server imports torch while this process imports the file.

    That saves the time of one import of torch, which tests mostly import as well.
    """
    if not parent.config.option.collectonly and _has_test_of_ours(module_path):
        parent.config.stash[SESSION].server.begin()


def _has_test_of_ours(path: Path) -> bool:
    try:
        return (
            re.search(rb"^ *def test\w*\([^)]*\brpc_cluster\b", path.read_bytes(), re.M) is not None
        )
    except OSError:
        return False  # pytest says so


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the fork server, if one was started, and all its ranks."""
    session = config.stash.get(SESSION, None)
    if session is not None:
        session.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The torch and the clock of the tests, and what an earlier run here left in flight."""
    lines = reports.header(config.stash[SESSION])
    summary = config.stash.get(_SUMMARY, None)
    died = summary.take_died() if summary is not None else ""
    return [*lines, f"rpcprops: {printable(died)}"] if died else lines


@pytest.fixture(scope="session")
def rpc_cluster(request: pytest.FixtureRequest) -> RpcCluster:
    """Makes clusters of ranks: ``with rpc_cluster(world_size=2, faults=table) as cluster:``."""
    session = request.config.stash[SESSION]
    try:
        session.started()
    except MachineCannot as error:
        pytest.fail(f"rpc_cluster: {error}", pytrace=False)
    return RpcCluster(
        session.started,
        transport=session.options.transport,
        without_faults=lambda: session.without_fault,
        on_timeout=session.limits.learn_timeout,
    )


@pytest.fixture(autouse=False)
def rpc_shard(request: pytest.FixtureRequest) -> int:
    """The number of this shard, from 1 (see ``--rpc-shards``)."""
    return int(getattr(request, "param", 1))


def _uses_us(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and FIXTURE in item.fixturenames


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--rpc-shards``, split each drawn test of ``rpc_cluster`` into that many tests."""
    options = metafunc.config.stash[SESSION].options
    if options.shards.count == 1 or options.replay is not None:
        return
    if is_drawn(metafunc.function) and FIXTURE in metafunc.fixturenames:
        shards.split(metafunc, options.shards)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep only the tests of this shard, and with ``--rpc-replay`` that of the artefact.

    An xdist worker that has tests of ours begins to watch its controller.
    """
    session = config.stash[SESSION]
    if any(map(_uses_us, items)):
        session.watch_controller()
    if session.options.replay is not None:
        replay.choose(items, session.options.replay)
    else:
        shards.choose(config, items, session.options.shards)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """While a test runs, keep its name on disk, in case this process is killed."""
    in_flight = item.config.stash[SESSION].in_flight
    in_flight.begin(shards.without_shard(item.nodeid))
    try:
        return (yield)
    finally:
        in_flight.clear()


# Inside the wrapper of Hypothesis's plugin, which sets the key of a test with parameters.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Watch each example of a test of ``rpc_cluster``, or replay the artefact's example.

    Of other tests it is only counted what their clusters show.
    """
    session = item.config.stash[SESSION]
    if not _uses_us(item):
        if not isinstance(item, pytest.Function):
            return (yield)
        return (yield from counting.call(item, session))
    record = item.stash[ITEM] = ItemRecord()
    call = examples.call if session.options.replay is None else replay.call_again
    with session.recording(record), probing.hinted(item, session):
        return (yield from call(item, session, record))


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Watch the examples of this test from now on.

    Plugins that run an event loop have put it around the body by now, and pytest's own
    implementation of this hook, which calls the test, comes last.
    """
    styles.about_to_call(pyfuncitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a test what its clusters showed, and show its own frames alone."""
    reports.show_the_test_first(item, call)
    report = yield
    reports.show_misuse_alone(report, item, call)
    reports.add_to(report, item, call, item.config.stash[SESSION])
    return report
