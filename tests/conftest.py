"""Skips the long tests unless the profile asks for them, and prints the score of the worlds."""

from __future__ import annotations

from collections import Counter

import pytest

from rpcprops.profiles import NIGHTLY, current


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if current() == NIGHTLY:
        return
    skip = pytest.mark.skip(reason=f"long: runs with --hypothesis-profile={NIGHTLY}")
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many seeded defects were reported, and how many clean examples were not.

    The tests of tests/worlds record what they planted; the reports come from every worker.
    """
    good: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", ()):
                if name == "seeded defect":
                    good[name] += outcome == "passed"
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
        terminalreporter.write_line(f"worlds: {'; '.join(parts)}")
