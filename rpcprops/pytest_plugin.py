"""The pytest plugin: the ``rpc_cluster`` fixture, options, and reports of failures.

A failure found under a fast clock counts once real time has shown it: the plugin runs the body of
the example again with the same arguments at rate 1, for the first failure of each kind and for the
smallest one. A test that draws inside its body (``st.data()``) cannot be run again so; its failures
are reported as unconfirmed.

Where the waits of ranks ended so late that a failure may come from the machine, it means nothing:
slower rates are asked, and what they do not show is undecided.

An error of rpcprops itself, or of the machine, is not a failure of the code under test: it fails
the test as what it is, at once.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import pytest

from rpcprops import clock as clocks
from rpcprops import profiles
from rpcprops import runner as runners
from rpcprops._files import Unwritten, why_not_writable, write_whole
from rpcprops._orphan import leave_with_parent
from rpcprops._printable import printable
from rpcprops.cluster import Cluster, ClusterOptions, ClusterServer
from rpcprops.cluster import _network as networks
from rpcprops.cluster._rates import unasked_real_time
from rpcprops.cluster._servers import shared_network
from rpcprops.errors import (
    BrokenPromise,
    HarnessError,
    MachineCannot,
    UsageError,
    first_line_of,
    text_of,
)
from rpcprops.faults import FaultPlan
from rpcprops.outcomes import Outcome, Violation
from rpcprops.programs import check_world_size
from rpcprops.report._underway import Died, Underway, collect, died_line
from rpcprops.upstream._options import add_options, check_options

if TYPE_CHECKING:
    from rpcprops.report._artefact import Artefact

FIXTURE = "rpc_cluster"
_SHARD = "rpc_shard"
_SESSION = pytest.StashKey["_Session"]()
_ITEM = pytest.StashKey["_ItemRecord"]()
_SUMMARY = pytest.StashKey["_Summary"]()
#: How many clusters of an example are kept for the report of its failure, about 8 KB each.
_MOST_KEPT = 256
#: How often the smallest failing example is run again, fast, to tell how often it repeats.
_REPEATS = 3
#: How many failing examples, from the smallest up, are tried at rate 1.
_CONFIRMATIONS = 3
#: A test that draws inside its body cannot be run again by us.
_UNREPEATED = "not tried: the test draws inside its body, so an example cannot be run again"
_UNCONFIRMED = (
    "unconfirmed: the test draws inside its body, so an example cannot be run again in real time; "
    "--rpc-clock=real finds it there"
)
_UNDECIDED = "undecided, the machine was too loaded"
_NOT_SHOWN = "not confirmed in real time"
#: The name under which a report carries why ranks run in real time though nobody asked for it.
_CLOCK = "rpcprops-clock"
#: The name under which a report carries the line about a file that could not be written.
_UNWRITTEN = "rpcprops-unwritten"
#: Errors that are no failure of the code under test: nothing is confirmed, shrunk or written.
_NOT_THE_TESTS = (HarnessError, MachineCannot)
#: What says that a test failed. pytest.fail() and pytest.raises() raise no Exception.
_FAILURES = (Exception, pytest.fail.Exception)
_BLOB = re.compile(r"@reproduce_failure\('([^']+)', (b'[^']*')\)")


@dataclass
class _Failing:
    """A failing example: how to run it again, and what it raised."""

    body: Callable[[], Any]
    error: BaseException
    recorded: list[tuple[FaultPlan, Outcome]]
    draws_inside: bool = False


@dataclass(frozen=True)
class _Again:
    """One more run of an example: what it raised, if it did, and what its clusters showed."""

    error: BaseException | None
    recorded: list[tuple[FaultPlan, Outcome]]


@dataclass
class _ItemRecord:
    """What was seen while a test ran.

    Attributes:
        armed: examples that were given a fault to inject.
        confirmed: kinds of failure that real time has shown.
        replayed: for a replay, the type of what each run raised, empty where it held.
        unconfirmed: failures that slower rates, down to real time, did not show again.
        undecided: the same, where the ranks had been too late for the failure to mean anything.
        not_the_tests: examples that met an error which is none of the code under test.
        left_out: clusters that are counted, but were too many for one example to be kept.
    """

    examples: int = 0
    clusters: int = 0
    armed: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    confirmed: set[type[BaseException]] = field(default_factory=set)
    first_ones: list[_Failing] = field(default_factory=list)
    failing: dict[Any, _Failing] = field(default_factory=dict)
    unconfirmed: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    not_the_tests: dict[Any, HarnessError | MachineCannot] = field(default_factory=dict)
    smallest: _Failing | None = None
    is_last: bool = True
    repeats: list[str] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    left_out: int = 0
    armed_left_out: bool = False


class ClusterFactory:
    """What the ``rpc_cluster`` fixture gives: call it to make a cluster, enter that to start it.

    The options are :class:`rpcprops.cluster.ClusterOptions`, as of
    :meth:`rpcprops.ClusterServer.cluster`; the transport is the one of ``--rpc-transport`` unless
    given.
    """

    def __init__(self, session: _Session) -> None:
        self._session = session

    def __call__(self, **options: Unpack[ClusterOptions]) -> Cluster:
        module = sys._getframe(1).f_globals.get("__name__", "")
        options.setdefault("transport", self._session.transport)
        without = _option(self._session.config, "--rpc-without-fault")
        if without:
            plan = FaultPlan.of(options.get("faults"))
            options["faults"] = plan.without(without, check_world_size(options.get("world_size")))
        return self._session.started().make_cluster(module, **options)

    @property
    def server(self) -> ClusterServer:
        """The fork server of this test process, started."""
        return self._session.started()


class _Session:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.transport = _option(config, "--rpc-transport")
        self.server = ClusterServer(
            clock=_clock_option(config), network=_option(config, "--rpc-network")
        )
        runners.use_server(self.server)
        self.underway = Underway(config.rootpath, "pytest")
        #: The process that controls this one, if this is a worker of xdist's that is not watched.
        self._controller = os.getppid() if _is_worker(config) else None
        self.server.on_start = self._on_start
        self.server.on_unconfirmed = self.keep_unconfirmed
        self._recorded: deque[tuple[FaultPlan, Outcome]] = deque()
        #: What state machines did not see confirmed, and whether it is undecided, since it was
        #: taken.
        self.unconfirmed: list[tuple[str, bool]] = []
        self.told_clock_problem = ""

    def started(self) -> ClusterServer:
        self.watch_controller()
        self.server.start()
        return self.server

    def _on_start(self, cluster: Cluster) -> None:
        self.watch_controller()
        if not _replays(self.config):
            self.underway(cluster)

    def watch_controller(self) -> None:
        """In a worker of xdist's: leave soon after the process that controls it was killed."""
        if self._controller is not None:
            leave_with_parent(self._controller, self._on_orphaned)
            self._controller = None

    def _on_orphaned(self) -> None:
        # This run was killed, whatever this process does now.
        self.underway.stays = True

    @contextmanager
    def recording(self, record: _ItemRecord) -> Generator[None, None, None]:
        """Keep what the clusters show that end in the block, to be taken; afterwards, nothing."""

        def keep(plan: FaultPlan, outcome: Outcome) -> None:
            self._recorded.append((plan, outcome))
            if len(self._recorded) > _MOST_KEPT:
                _leave_out(record, *self._recorded.popleft())

        self.server.on_end = keep
        try:
            yield
        finally:
            self.server.on_end = None
            self._recorded.clear()

    def take_recorded(self) -> list[tuple[FaultPlan, Outcome]]:
        recorded = list(self._recorded)
        self._recorded.clear()
        return recorded

    def keep_unconfirmed(self, line: str, is_undecided: bool) -> None:
        self.unconfirmed.append((line, is_undecided))

    def take_unconfirmed(self) -> list[tuple[str, bool]]:
        taken, self.unconfirmed = self.unconfirmed, []
        return taken

    def take_clock_problem(self) -> str:
        """Why ranks run in real time though nobody asked for it, once for each server started."""
        problem = self.server.clock_problem
        if problem == self.told_clock_problem:
            return ""
        self.told_clock_problem = problem
        return problem


def _option(config: pytest.Config, name: str) -> Any:
    value: Any = config.getoption(name)
    return value


def _replays(config: pytest.Config) -> bool:
    return _option(config, "--rpc-replay") is not None


def _is_worker(config: pytest.Config) -> bool:
    """Whether this process is a worker of xdist's."""
    return hasattr(config, "workerinput")


def _clock_option(config: pytest.Config) -> Any:
    from rpcprops.cluster._options import check_clock

    text = _option(config, "--rpc-clock")
    try:
        return check_clock(float(text))
    except UsageError as error:
        msg = f"--rpc-clock: {error}"
        raise pytest.UsageError(msg) from None
    except ValueError:
        pass
    try:
        return check_clock(text)
    except UsageError as error:
        msg = f"--rpc-clock: {error}"
        raise pytest.UsageError(msg) from None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpcprops", "torch RPC under sampled faults")
    group.addoption(
        "--rpc-clock",
        default="auto",
        metavar="CLOCK",
        help="clock of the ranks: auto (fast where it can be), real, or a rate from 1 to 1000",
    )
    group.addoption(
        "--rpc-transport",
        default="tcp",
        choices=("tcp", "shm"),
        help="how ranks talk: tcp on loopback, or shm (shared memory)",
    )
    group.addoption(
        "--rpc-network",
        default="auto",
        choices=("auto", "private", "host"),
        help="network of the ranks: one of their own, which nobody else can reach, where this "
        "machine allows that (auto) or else no ranks (private); or the machine's (host)",
    )
    group.addoption(
        "--rpc-shards",
        type=int,
        default=1,
        metavar="N",
        help="split each Hypothesis test of rpc_cluster into N items, each with its own seed and "
        "1/N of the examples, so that xdist can run them side by side",
    )
    group.addoption(
        "--rpc-report",
        default=None,
        metavar="FILE",
        help="write what each test of rpc_cluster ran and which faults fired to FILE, as JSON",
    )
    group.addoption(
        "--rpc-replay",
        default=None,
        metavar="FILE",
        help="run the example of a failure artefact only (`rpcprops replay` does this)",
    )
    group.addoption(
        "--rpc-replay-times",
        type=int,
        default=1,
        metavar="N",
        help="with --rpc-replay: run the example N times, where it can be run again",
    )
    group.addoption(
        "--rpc-replay-answer",
        default=None,
        metavar="FILE",
        help="with --rpc-replay: write what each run raised to FILE, as JSON",
    )
    group.addoption(
        "--rpc-without-fault",
        action="append",
        default=[],
        metavar="FAULT",
        help="leave this fault out of every cluster's plan, such as 1:RREF_USER_DELETE or "
        "1:delay:PYTHON_CALL; may be given several times",
    )
    add_options(group)


def pytest_configure(config: pytest.Config) -> None:
    check_options(config)
    shards = _option(config, "--rpc-shards")
    if shards < 1:
        msg = f"--rpc-shards={shards} must be 1 or more"
        raise pytest.UsageError(msg)
    if not _is_worker(config):
        summary = config.stash[_SUMMARY] = _Summary(config)
        config.pluginmanager.register(summary, "rpcprops-summary")
    session = config.stash[_SESSION] = _Session(config)
    if _option(config, "--rpc-upstream"):
        from rpcprops.upstream._plugin import UpstreamPlugin

        plugin = UpstreamPlugin(config, session.server, session.underway)
        config.pluginmanager.register(plugin, "rpcprops-upstream")


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.underway.clear()
        session.server.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    session = config.stash[_SESSION]
    choice = _option(config, "--rpc-clock")
    problem = "" if session.server.clock == "real" else clocks.library_problem()
    if session.server.clock == "real":
        note = "real time, as asked for"
    elif problem and session.server.clock == "auto":
        note = unasked_real_time(problem).removeprefix("clock: ")
    elif problem:
        note = f"{choice} cannot be had: {problem}"
    else:
        note = f"{choice} (the rate is measured when the first cluster starts)"
    lines = [f"rpcprops: clock {note}; transport {session.transport}"]
    if session.server.network == "auto" and networks.problem():
        lines.append(f"rpcprops: {shared_network(networks.problem())}")
    summary = config.stash.get(_SUMMARY, None)
    died = summary.take_died() if summary is not None else ""
    return [*lines, f"rpcprops: {printable(died)}"] if died else lines


@pytest.fixture(scope="session")
def rpc_cluster(request: pytest.FixtureRequest) -> ClusterFactory:
    """Makes clusters of ranks: ``with rpc_cluster(world_size=2, faults=table) as cluster:``."""
    session = request.config.stash[_SESSION]
    try:
        session.started()
    except MachineCannot as error:
        pytest.fail(f"rpc_cluster: {error}", pytrace=False)
    return ClusterFactory(session)


# Hypothesis.


def _uses_us(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and FIXTURE in item.fixturenames


def _function(item: pytest.Item) -> Any:
    function = getattr(item, "obj", None)
    return getattr(function, "__func__", function)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shards = _option(metafunc.config, "--rpc-shards")
    drawn = getattr(metafunc.function, "is_hypothesis_test", False)
    if shards > 1 and drawn and FIXTURE in metafunc.fixturenames:
        metafunc.fixturenames.append(_SHARD)
        metafunc.parametrize(_SHARD, range(shards), ids=[f"shard{n}" for n in range(shards)])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(map(_uses_us, items)):
        config.stash[_SESSION].watch_controller()
    path = _option(config, "--rpc-replay")
    if path is None:
        return
    from rpcprops.report._artefact import read

    try:
        artefact = read(Path(path))
    except UsageError as error:
        raise pytest.UsageError(printable(error)) from None
    found = [item for item in items if item.nodeid == artefact.subject]
    if not found:
        msg = f"the test of the artefact, {artefact.subject}, is not among those collected."
        raise pytest.UsageError(printable(msg))
    for item in found:
        if artefact.reproduction is not None:
            _reproduce(item, artefact)


def _without_shard(nodeid: str) -> str:
    """The id of the test that a shard is part of: a replay does not split tests."""
    return re.sub(r"\[shard\d+\]$|-shard\d+(?=\]$)|(?<=\[)shard\d+-", "", nodeid)


def _reproduce(item: pytest.Item, artefact: Artefact) -> None:
    import ast

    import hypothesis

    version, blob = artefact.reproduction or ("", "b''")
    if version != hypothesis.__version__:
        msg = (
            f"the example was drawn by hypothesis {version}, and this is "
            f"{hypothesis.__version__}; install that version to replay it."
        )
        raise pytest.UsageError(msg)
    try:
        data = ast.literal_eval(blob)
    except (ValueError, SyntaxError):
        data = None
    if not isinstance(data, bytes):
        msg = "the artefact's reproduction blob is damaged."
        raise pytest.UsageError(msg)
    hypothesis.reproduce_failure(version, data)(_function(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    underway = item.config.stash[_SESSION].underway
    underway.begin(_without_shard(item.nodeid))
    try:
        return (yield)
    finally:
        underway.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    if not _uses_us(item):
        return (yield)
    session = item.config.stash[_SESSION]
    record = item.stash[_ITEM] = _ItemRecord()
    run = _replay_call if _replays(item.config) else _call
    with session.recording(record):
        return (yield from run(item, session, record))


def _call(item: pytest.Item, session: _Session, record: _ItemRecord) -> Generator[None, None, None]:
    function = _function(item)
    if not getattr(function, "is_hypothesis_test", False):
        record.examples = 1
        try:
            return (yield)
        except _FAILURES as error:
            recorded = session.take_recorded()
            _account(record, recorded)
            if not isinstance(error, _NOT_THE_TESTS):
                record.smallest = _Failing(lambda: None, error, recorded)
            raise
        finally:
            _account(record, session.take_recorded())
    with _prepared(item, function, session, record):
        try:
            return (yield)
        except _FAILURES as error:
            if _is_fixed(item, error):
                return None
            if not record.replayed and not isinstance(error, _NOT_THE_TESTS):
                _confirm_smallest(session, record)
            raise


def _replay_call(
    item: pytest.Item, session: _Session, record: _ItemRecord
) -> Generator[None, None, None]:
    """Run the test of an artefact, and write what its runs raised."""
    try:
        yield from _call(item, session, record)
        if not record.replayed:
            record.replayed.append("")
    except _FAILURES as error:
        if not record.replayed:
            record.replayed.append(type(error).__name__)
        raise
    finally:
        answer = _option(item.config, "--rpc-replay-answer")
        if answer is not None and record.replayed:
            data = {
                "raised": record.replayed,
                "rate": session.server.rate,
                "clock_problem": session.server.clock_problem,
            }
            try:
                write_whole(Path(answer), json.dumps(data) + "\n")
            except OSError as error:
                line = str(Unwritten.because(error, Path(answer)))
                item.user_properties.append((_UNWRITTEN, line))


def _is_fixed(item: pytest.Item, error: BaseException) -> bool:
    """Whether a replayed example passes now; ends the run if it cannot be drawn any more."""
    from hypothesis.errors import DidNotReproduce

    if not _replays(item.config) or not isinstance(error, DidNotReproduce):
        return False
    if "completed successfully" in text_of(error):
        return True
    pytest.exit(f"rpcprops: the test has changed, its example cannot be drawn: {text_of(error)}", 4)


class _prepared:  # noqa: N801  (used as a function)
    """While a Hypothesis test runs: settings that suit it, and a body that we can run again."""

    def __init__(
        self, item: pytest.Item, function: Any, session: _Session, record: _ItemRecord
    ) -> None:
        self.item, self.function = item, function
        self.handle = function.hypothesis
        self.inner = self.handle.inner_test
        self.session, self.record = session, record
        self.settings = getattr(function, "_hypothesis_internal_use_settings", None)
        self.seed = getattr(function, "_hypothesis_internal_use_seed", None)

    def __enter__(self) -> None:
        import hypothesis

        _example_runner()
        default: Any = hypothesis.settings.default
        ours = self.settings or default
        # One failure, so that its notes and its artefact are of the same example.
        changes: dict[str, Any] = {"print_blob": True, "report_multiple_bugs": False}
        if ours.phases == default.phases:
            # It traces lines of this process, and what fails runs in others: slow, and no help.
            changes["phases"] = [phase for phase in ours.phases if phase.name != "explain"]
        if ours.deadline == default.deadline:
            changes["deadline"] = None
        callspec = getattr(self.item, "callspec", None)
        shard = callspec.params.get(_SHARD) if callspec is not None else None
        if shard is not None:
            shards = _option(self.item.config, "--rpc-shards")
            changes["max_examples"] = max(1, -(-ours.max_examples // shards))
            if ours.derandomize or self.seed is not None:
                # Unseeded, derandomized shards would all draw the same examples.
                changes["derandomize"] = False
                self.function._hypothesis_internal_use_seed = f"{self.seed}/{shard}"
        self.function._hypothesis_internal_use_settings = hypothesis.settings(ours, **changes)
        repeats_one = getattr(self.function, "_hypothesis_internal_use_reproduce_failure", None)
        watch = _replayed if repeats_one is not None and _replays(self.item.config) else _watched
        self.handle.inner_test = watch(self.inner, self.session, self.record)

    def __exit__(self, *_: object) -> None:
        self.handle.inner_test = self.inner
        self.function._hypothesis_internal_use_settings = self.settings
        self.function._hypothesis_internal_use_seed = self.seed


def _watched(inner: Callable[..., Any], session: _Session, record: _ItemRecord) -> Any:
    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        if _draws_inside(args, kwargs):
            session.underway.example(_blob_so_far)
        else:
            blob = _blob_so_far()
            session.underway.example(lambda: blob)
        key = _example_key(args, kwargs)
        known = record.failing.get(key)
        result, error = None, None
        try:
            result = inner(*args, **kwargs)
        except _FAILURES as raised:
            if not _is_failure(raised):
                raise
            error = raised
        recorded = session.take_recorded()
        _show_logs(recorded)
        if known is None:
            _account(record, recorded)
            record.examples += 1
        if key in record.not_the_tests:
            # It failed so before: an example must not change its mind.
            raise record.not_the_tests[key]
        if isinstance(error, _NOT_THE_TESTS):
            if not _draws_inside(args, kwargs):
                record.not_the_tests[key] = error
            raise error
        if error is None:
            if known is not None:
                # It failed before: an example must not change its mind.
                raise known.error
            _tell_hypothesis(recorded)
            return result
        if recorded:
            body = functools.partial(inner, *args, **kwargs)
            failing = _Failing(body, error, recorded, _draws_inside(args, kwargs))
            try:
                if known is None and not _counts(session, record, failing):
                    return None
            except _NOT_THE_TESTS as own:
                record.not_the_tests[key] = own
                raise
            # The order is the one in which they last failed: Hypothesis ends with the smallest.
            record.failing.pop(key, None)
            record.failing[key] = failing
        raise error

    return example


def _replayed(inner: Callable[..., Any], session: _Session, record: _ItemRecord) -> Any:
    """Runs the one example of an artefact as often as was asked for, and confirms nothing."""

    @functools.wraps(inner)
    def example(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        session.take_recorded()
        result: Any = None
        error: BaseException | None = None
        try:
            result = inner(*args, **kwargs)
        except _FAILURES as raised:
            if not _is_failure(raised):
                raise
            error = raised
        recorded = session.take_recorded()
        _show_logs(recorded)
        _account(record, recorded)
        record.examples += 1
        if isinstance(error, _NOT_THE_TESTS):
            raise error
        body = functools.partial(inner, *args, **kwargs)
        failing = _Failing(body, error or AssertionError(), recorded)
        seen = [error]
        if not _draws_inside(args, kwargs):
            times = _option(session.config, "--rpc-replay-times")
            seen += [_again(session, failing, rate=None).error for _ in range(times - 1)]
        record.replayed = [type(raised).__name__ if raised else "" for raised in seen]
        errors = [raised for raised in seen if raised is not None]
        rate = recorded[0][1].clock_rate if recorded else 1.0
        record.repeats.append(f"{len(errors)} of {len(seen)} at rate {rate:g}")
        if not errors:
            return result
        failing.error = errors[0]
        record.smallest = failing
        raise errors[0]

    return example


def _show_logs(recorded: list[tuple[FaultPlan, Outcome]]) -> None:
    """Under the debug profile, print what each rank wrote (shown with -s, or on failure)."""
    if profiles.current() != profiles.DEBUG:
        return
    from rpcprops.report._text import describe_logs, describe_plan

    for plan, outcome in recorded:
        print("\n".join([*describe_plan(plan, outcome.world_size), *describe_logs(outcome)]))


def _blob_so_far() -> tuple[str, str] | None:
    """Hypothesis's version, and the blob of what it has drawn for this example up to now."""
    try:
        import hypothesis
        from hypothesis.control import current_build_context
        from hypothesis.core import encode_failure

        choices = current_build_context().data.choices
        return hypothesis.__version__, repr(encode_failure(choices))
    except Exception:
        # Hypothesis's own affair, and an example without a blob still runs.
        return None


def _example_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from hypothesis.control import current_build_context, currently_in_test_context

    if currently_in_test_context():
        choices = getattr(current_build_context().data, "choices", None)
        if choices is not None:
            return tuple(repr(choice) for choice in choices)
    return repr((args, sorted(kwargs.items(), key=lambda item: item[0])))


def _is_failure(error: BaseException) -> bool:
    """Whether an exception says that the test failed, rather than steers Hypothesis or pytest."""
    from hypothesis.errors import Frozen, StopTest, UnsatisfiedAssumption

    return not isinstance(
        error, StopTest | UnsatisfiedAssumption | Frozen | pytest.skip.Exception | UsageError
    )


def _draws_inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from hypothesis.strategies import DataObject

    return any(isinstance(value, DataObject) for value in (*args, *kwargs.values()))


def _counts(session: _Session, record: _ItemRecord, failing: _Failing) -> bool:
    """Whether a failure is one: it repeats in real time if its kind is new, else fast.

    A run that failed while its ranks were too late says nothing, neither for nor against: slower
    rates are asked on.
    """
    if failing.draws_inside:
        return True
    from rpcprops.oracle import rungs

    kind = type(failing.error)
    if kind in record.confirmed:
        return isinstance(_again(session, failing, rate=None).error, kind)
    line = f"{kind.__name__}: {first_line_of(failing.error)}"
    fastest = max(outcome.clock_rate for _, outcome in failing.recorded)
    believed = _is_decided(failing.error, failing.recorded)
    again = _Again(None, [])
    for rate in rungs(fastest) or (None,):
        again = _again(session, failing, rate)
        if isinstance(again.error, kind):
            believed = believed or _is_decided(again.error, again.recorded)
        elif believed:
            record.unconfirmed.append(line)
            return False
    if not _shows(again, kind):
        record.undecided.append(line)
        return False
    record.confirmed.add(kind)
    record.first_ones.append(failing)
    return True


def _is_decided(error: BaseException, recorded: list[tuple[FaultPlan, Outcome]]) -> bool:
    """Whether the ranks were scheduled in time enough for a failure to mean what it says."""
    from rpcprops.oracle import OWN_CODE_SLACK, is_decided, judge

    promise = type(error).__name__
    if isinstance(error, BrokenPromise):
        broken = [
            (violation, outcome)
            for plan, outcome in recorded
            for violation in judge(None, plan, outcome)
            if violation.promise == promise
        ]
        # What is not among them was held after everything had come to rest: no time would help.
        return not broken or any(is_decided(*one) for one in broken)
    own = Violation(promise, text_of(error), needs_time=True, slack=OWN_CODE_SLACK)
    return all(is_decided(own, outcome) for _, outcome in recorded)


def _shows(again: _Again, kind: type[BaseException]) -> bool:
    """Whether a run in real time shows a failure of this kind.

    A failure of the test's own code counts there, however late the ranks were: it is what any run
    without us would report.
    """
    if not isinstance(again.error, kind):
        return False
    return not isinstance(again.error, BrokenPromise) or _is_decided(again.error, again.recorded)


@functools.cache
def _example_runner() -> Callable[[Callable[[], None]], None]:
    """Runs a body in a Hypothesis test of its own, which must be made outside of any other.

    A body may use ``note`` and ``event``, which need a test, and ``target``, which accepts each
    label once only in an example.
    """
    import hypothesis
    from hypothesis import strategies as st

    bodies: list[Callable[[], None]] = []
    no_health_checks: Any = list(hypothesis.HealthCheck)

    @hypothesis.settings(
        max_examples=1,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=no_health_checks,
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(st.none())
    def once(_: None) -> None:
        bodies[-1]()

    def run(body: Callable[[], None]) -> None:
        bodies.append(body)
        try:
            once()
        finally:
            bodies.pop()

    return run


def _again(session: _Session, failing: _Failing, rate: float | None) -> _Again:
    """What the example shows when its body runs once more.

    Raises:
        HarnessError: the run failed for a reason of ours, and shows nothing of the example.
        MachineCannot: the same, for one of this machine.
    """
    raised: list[BaseException] = []
    recorded: list[tuple[FaultPlan, Outcome]] = []

    def body() -> None:
        try:
            failing.body()
        except _FAILURES as error:
            raised.append(error)

    session.server.override_rate = rate
    session.underway.again()
    try:
        _example_runner()(body)
    finally:
        session.server.override_rate = None
        recorded += session.take_recorded()
    if raised and isinstance(raised[0], _NOT_THE_TESTS):
        # Raised here, for Hypothesis would run the body once more to see whether it repeats.
        raise raised[0]
    return _Again(raised[0] if raised else None, recorded)


def _confirm_smallest(session: _Session, record: _ItemRecord) -> None:
    """Settle on the smallest failing example that real time shows; tell how often it repeats."""
    # Hypothesis runs the smallest last.
    candidates = list(reversed(record.failing.values()))
    tried = candidates[:_CONFIRMATIONS]
    # The first failure of each kind was confirmed when it was found.
    tried += [failing for failing in record.first_ones if failing not in tried]
    loaded = False
    for failing in tried:
        kind = type(failing.error)
        fast = any(outcome.clock_rate != 1.0 for _, outcome in failing.recorded)
        if failing.draws_inside:
            record.smallest = failing
            record.repeats.append(_UNCONFIRMED if fast else _UNREPEATED)
            return
        if fast:
            real = _again(session, failing, rate=1.0)
            if not _shows(real, kind):
                failed_late = isinstance(real.error, kind)
                loaded |= failed_late or not _is_decided(failing.error, failing.recorded)
                continue
        failed = sum(
            isinstance(_again(session, failing, None).error, kind) for _ in range(_REPEATS)
        )
        rate = failing.recorded[0][1].clock_rate if failing.recorded else 1.0
        record.repeats.append(f"{failed} of {_REPEATS} at rate {rate:g}")
        if fast:
            record.repeats.append("1 of 1 at rate 1")
        record.smallest = failing
        record.is_last = failing is candidates[0]
        return
    if record.failing:
        record.smallest = list(record.failing.values())[-1]
        record.repeats.append(_UNDECIDED if loaded else "not in real time")


def _is_armed(plan: FaultPlan, outcome: Outcome) -> bool:
    """Whether a fault was asked for whose firing can be seen."""
    for rank in outcome.ranks:
        table = plan.table(rank.rank)
        if any(message.is_retryable for message in table.failing):
            return True
        if table.delaying and rank.delayed_sends is not None:
            return True
    return False


def _account(record: _ItemRecord, recorded: list[tuple[FaultPlan, Outcome]]) -> None:
    """Count what an example's clusters showed."""
    if record.armed_left_out or any(_is_armed(plan, outcome) for plan, outcome in recorded):
        record.armed += 1
    record.armed_left_out = False
    for plan, outcome in recorded:
        _count(record, plan, outcome)


def _count(record: _ItemRecord, plan: FaultPlan, outcome: Outcome) -> None:
    from rpcprops.oracle import account, fired_by_type

    record.clusters += 1
    record.fired.update(fired_by_type(account(None, plan, outcome)))


def _leave_out(record: _ItemRecord, plan: FaultPlan, outcome: Outcome) -> None:
    """Count a cluster of the example that runs, and keep it no longer."""
    record.left_out += 1
    record.armed_left_out |= _is_armed(plan, outcome)
    _count(record, plan, outcome)


def _tell_hypothesis(recorded: list[tuple[FaultPlan, Outcome]]) -> None:
    import hypothesis
    from hypothesis.control import currently_in_test_context

    from rpcprops.oracle import account, fired_by_type

    if not recorded or not currently_in_test_context():
        return
    fired: Counter[str] = Counter()
    for plan, outcome in recorded:
        fired.update(fired_by_type(account(None, plan, outcome)))
    for name in sorted(fired):
        hypothesis.event(f"fired {name}")
    hypothesis.target(float(fired.total()), label="rpcprops: faults fired")


# Reports.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    session = item.config.stash[_SESSION]
    problem = session.take_clock_problem()
    if problem:
        report.user_properties.append((_CLOCK, problem))
    unconfirmed = session.take_unconfirmed()
    record = item.stash.get(_ITEM, None)
    if record is None or call.when != "call":
        report.user_properties += [
            (_UNDECIDED if late else _NOT_SHOWN, x) for x, late in unconfirmed
        ]
        return report
    for line, is_undecided in unconfirmed:
        (record.undecided if is_undecided else record.unconfirmed).append(line)
    if report.failed and record.smallest is not None and call.excinfo is not None:
        lines = _failure_lines(item, call.excinfo.value, record, session)
        report.sections.append(("rpcprops", "\n".join(lines)))
    summary = {
        "nodeid": item.nodeid,
        "outcome": report.outcome,
        "examples": record.examples,
        "clusters": record.clusters,
        "armed": record.armed,
        "drawn": getattr(_function(item), "is_hypothesis_test", False),
        "faults_fired": record.fired.total(),
        "fired_by_type": dict(sorted(record.fired.items())),
        "unconfirmed": record.unconfirmed,
        "undecided": record.undecided,
        "seconds": round(call.duration, 3),
    }
    report.user_properties.append(("rpcprops", summary))
    # What it keeps of failing examples is told; the item stays until pytest ends.
    del item.stash[_ITEM]
    return report


def _failure_lines(
    item: pytest.Item, error: BaseException, record: _ItemRecord, session: _Session
) -> list[str]:
    from rpcprops.oracle import account, judge
    from rpcprops.report import _artefact as artefacts
    from rpcprops.report import _text as text

    smallest = record.smallest
    if smallest is None:
        return []
    lines: list[str] = []
    if record.left_out:
        lines.append(f"cluster  the first {record.left_out} are left out")
    for number, (plan, outcome) in enumerate(smallest.recorded, record.left_out):
        if len(smallest.recorded) > 1:
            lines.append(f"cluster  {number}")
        lines += text.describe_plan(plan, outcome.world_size)
        lines += text.describe_faults(account(None, plan, outcome))
        lines += text.describe_violations(judge(None, plan, outcome))
        lines += text.describe_end(outcome)
    if record.repeats:
        lines.append(f"repeats  {', '.join(record.repeats)}")
    blob = next((m for note in _notes(error) for m in _BLOB.finditer(note)), None)
    if not record.is_last or not getattr(_function(item), "is_hypothesis_test", False):
        # Hypothesis's line is for its last example; without it, a replay runs the whole test.
        blob = None
    if _replays(item.config):
        return lines  # the artefact is there, and knows more than this run
    if blob is not None:
        lines.append(f"redraw   {blob.group()}")
    outcomes = tuple(outcome for _, outcome in smallest.recorded)
    path = artefacts.write_or_say(
        artefacts.Artefact(
            kind="pytest",
            subject=_without_shard(item.nodeid),
            promise=type(smallest.error).__name__,
            head=(f"broken   {type(error).__name__}: {first_line_of(error)}", *lines),
            plans=tuple(plan for plan, _ in smallest.recorded),
            outcomes=outcomes,
            clock_rate=session.server.rate,
            transport=session.transport,
            repeats=tuple(record.repeats),
            reproduction=None if blob is None else (blob.group(1), blob.group(2)),
            rootdir=str(item.config.rootpath),
        ),
        item.config.rootpath / artefacts.DIRECTORY,
    )
    lines.append(f"replay   {text.replay_line(path)}")
    return lines


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception; its own code may have put anything there."""
    notes = getattr(error, "__notes__", ())
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


class _Summary:
    """What the tests of this run came to, for the terminal and for ``--rpc-report``.

    One for each run of pytest, in the process that prints: with xdist that is the controller, to
    which the workers send their reports.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tests: list[dict[str, Any]] = []
        #: What state machines did not see confirmed: what it is called, of which test, and the
        #: line.
        self.of_machines: list[tuple[str, str, str]] = []
        #: Of each process that ran tests.
        self.clock_problems: list[str] = []
        #: Lines about files that could not be written, each once.
        self.unwritten: dict[str, None] = {}
        #: What earlier runs left under way, until it is told.
        self.died: list[Died] = []
        #: Tests whose worker died.
        self.crashed: list[str] = []
        path = _option(config, "--rpc-report")
        self.report_file = None if path is None else Path(path).absolute()
        if self.report_file is not None:
            problem = why_not_writable(self.report_file)
            if problem:
                msg = f"--rpc-report={path!r} cannot be written: {problem}"
                raise pytest.UsageError(msg)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Look for what earlier runs left, before a test of this one is under way."""
        # A replay reads such a file where it lies, and a list of tests need not show its lines.
        if not _replays(self.config) and not self.config.option.collectonly:
            self.died = collect(self.config.rootpath)

    def take_died(self) -> str:
        """The line about what earlier runs left under way, once."""
        died, self.died = self.died, []
        return died_line(died)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a report carries."""
        if report.when not in ("setup", "call", "teardown"):
            self.crashed.append(report.nodeid)
        for name, value in report.user_properties:
            if name == "rpcprops" and isinstance(value, dict):
                self.tests.append(value)
            elif name in (_NOT_SHOWN, _UNDECIDED):
                self.of_machines.append((name, report.nodeid, str(value)))
            elif name == _CLOCK:
                self.clock_problems.append(str(value))
            elif name == _UNWRITTEN:
                self.unwritten[str(value)] = None

    def pytest_sessionfinish(self) -> None:
        """Write the report that was asked for; also when interrupted."""
        if self.report_file is None:
            return
        data = {"tests": sorted(self.tests, key=lambda summary: summary["nodeid"])}
        try:
            write_whole(self.report_file, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            self.unwritten[str(Unwritten.because(error, self.report_file))] = None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was run, and what a reader must know of it."""
        for line, markup in self._lines():
            terminalreporter.write_line(f"rpcprops: {printable(line)}", **markup)

    def _lines(self) -> Generator[tuple[str, dict[str, bool]], None, None]:
        yellow = {"yellow": True}
        if self.tests:
            fired: int = sum(summary["faults_fired"] for summary in self.tests)
            clusters = sum(summary["clusters"] for summary in self.tests)
            yield (
                f"{clusters} clusters in {len(self.tests)} tests, {fired} injected faults fired",
                {},
            )
        # Not yet told where no test ended after the server was started.
        problems = [*self.clock_problems, self.config.stash[_SESSION].take_clock_problem()]
        if any(problems):
            # Workers share a machine, so that one line is enough for all that it says.
            yield next(filter(None, problems)), yellow
        for summary in self.tests:
            passed = summary["drawn"] and summary["outcome"] == "passed"
            if passed and summary["armed"] and not summary["faults_fired"]:
                yield (
                    f"vacuous: no injected fault fired in {summary['nodeid']} "
                    f"({summary['examples']} examples)",
                    yellow,
                )
            for words, lines in (
                (_NOT_SHOWN, summary["unconfirmed"]),
                (_UNDECIDED, summary["undecided"]),
            ):
                for line in lines:
                    yield f"{words}: {summary['nodeid']}: {line}", yellow
        for words, nodeid, line in self.of_machines:
            yield f"{words}: {nodeid}: {line}", yellow
        for line in self.unwritten:
            yield line, {"red": True}
        for line in self._died_lines():
            yield line, yellow

    def _died_lines(self) -> list[str]:
        """What earlier runs left if no header said it, and what workers of this one have left."""
        lines = [self.take_died()]
        if self.crashed:
            # The next run says it too: this one may be a part of many that nobody reads to the end.
            died = collect(self.config.rootpath, removes=False)
            ours = [one for one in died if any(_is_named(n, one.subject) for n in self.crashed)]
            lines.append(died_line(ours, "a worker of this run"))
        return [line for line in lines if line]


def _is_named(nodeid: str, subject: str) -> bool:
    """Whether a node id is of the test that an artefact calls `subject`."""
    return f"::{_without_shard(nodeid)}".endswith(f"::{subject}")


@pytest.fixture(autouse=False)
def rpc_shard(request: pytest.FixtureRequest) -> int:
    """The number of this shard (see ``--rpc-shards``)."""
    return int(getattr(request, "param", 0))
