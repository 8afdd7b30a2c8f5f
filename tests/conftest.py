"""Skips the long tests unless the profile asks, hands tests out, prints counts; fixes draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from rpcprops.profiles import NIGHTLY, current
from tests._commands import Commands, commands

#: Where tests share a fixture that takes seconds to make, or take no time at all: one worker of
#: xdist's runs all the tests of such a module.
_BY_MODULE = (
    *(f"tests/plugin/test_{name}.py" for name in ("errors_of_ours", "failures", "in_flight")),
    *(f"tests/plugin/test_{name}.py" for name in ("lateness", "long_runs", "machines", "options")),
    *(f"tests/plugin/test_{name}.py" for name in ("replay", "unwritable", "workers_that_die")),
    # The first that needs the agent WIRE compiles it.
    *(f"tests/cluster/test_{name}.py" for name in ("preforked", "servers", "wire_messages")),
    *("tests/upstream/test_suites.py", "tests/stress/test_bad_input_pytest.py"),
    *("tests/seeded/test_falsified.py", "tests/strategies/test_programs.py"),
    "tests/unit/",
)


@pytest.fixture(scope="session", autouse=True)
def draws_without_constants_of_modules() -> Iterator[None]:
    """A seed draws the same whatever tests ran before it, alone and under xdist.

    Hypothesis takes one number in twenty from the constants that it reads in the modules imported
    so far, unless they are installed in site-packages. So tests draw as an installed rpcprops does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", Constants)
        providers.CONSTANTS_CACHE.cache.clear()
        yield


@pytest.fixture(scope="session")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands that end before they start anything."""
    with commands(tmp_path_factory.mktemp("commands")) as made:
        yield made


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out the tests of some modules together, and all others one by one."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return module if module.startswith(_BY_MODULE) else nodeid

    return ByModule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Short ones last: then no worker waits long for another at the end.
    items.sort(key=lambda item: item.nodeid.startswith("tests/strategies/"))
    if current() == NIGHTLY:
        return
    skip = pytest.mark.skip(reason=f"long: runs with --hypothesis-profile={NIGHTLY}")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have recorded, wherever they ran: the reports come from every worker."""
    recorded: list[tuple[str, Any, bool]] = [
        (name, value, outcome == "passed")
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", ())
    ]
    for line in (*_worlds(recorded), *_stress(recorded)):
        terminalreporter.write_line(line)


def _worlds(recorded: list[tuple[str, Any, bool]]) -> Iterator[str]:
    """How many seeded defects were reported, and how many clean examples were not."""
    good: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, value, passed in recorded:
        if name == "seeded defect":
            good[name] += passed
            total[name] += 1
            total[value] += 1
        elif name in ("clean outcomes", "clean runs"):
            good[name] += value[0]
            total[name] += value[1]
    words = {
        "seeded defect": f"seeded defects reported as what they are ({total['false']} falsified "
        f"outcomes, {total['live']} ranks that are wrong)",
        "clean outcomes": "clean outcomes without a report",
        "clean runs": "clean runs of real ranks without a report",
    }
    parts = [f"{good[name]} of {total[name]} {said}" for name, said in words.items() if total[name]]
    if parts:
        yield f"worlds: {'; '.join(parts)}"


def _stress(recorded: list[tuple[str, Any, bool]]) -> Iterator[str]:
    """How many processes were killed, what ran on a loaded machine, and what a long run cost."""
    for title, name in (("deaths", "death"), ("load", "load")):
        counts: Counter[str] = Counter()
        for value in (value for key, value, _ in recorded if key == name):
            counts.update(value if isinstance(value, dict) else [value])
        if counts:
            said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            yield f"{title}: {said}"
    yield from (value for name, value, _ in recorded if name == "soak")
