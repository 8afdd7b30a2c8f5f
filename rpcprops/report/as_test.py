"""Regression tests: a failing program as a pytest file that holds program and plan as Python."""

from __future__ import annotations

import re

from rpcprops._kinds import kind_of
from rpcprops.errors import UsageError
from rpcprops.faults import FaultPlan
from rpcprops.programs import STEP_TYPES
from rpcprops.report.artefact import Artefact
from rpcprops.report.script import MARK, refuse, wrapped


def regression_test(artefact: Artefact, plan: FaultPlan | None = None) -> str:
    """The source of a test that fails as the artefact does, and passes once the bug is mended.

    Args:
        plan: other faults to use instead of those of the artefact.

    Raises:
        UsageError: the artefact is already of a test, or shows no failure.
    """
    program, violation = refuse(artefact)
    plan = artefact.plans[0] if plan is None else plan
    if artefact.sizes[0] != program.world_size:
        msg = f"the program ran in a world of {artefact.sizes[0]} ranks, which a test cannot say."
        raise UsageError(msg)
    versions = artefact.versions
    said = f"torch {versions.get('torch', 'unknown')}, {', '.join(artefact.repeats) or 'once'}"
    recorded = " ".join(wrapped(f"recorded {violation} ({said})"))
    used = [
        cls.__name__
        for cls in STEP_TYPES.values()
        if re.search(rf"\b{cls.__name__}\(", repr(program))
    ]
    names = ("FaultPlan", "FaultTable", "MessageFault", "MessageType", "NthMessage")
    faults = [name for name in names if re.search(rf"\b{name}[.(]", repr(plan))]
    others = {type(fault) for fault in plan.others if type(fault).__name__ not in faults}
    kind = kind_of(artefact.kind)
    imports = [
        *kind.test_imports,
        f"from rpcprops import {', '.join(faults)}",
        *(f"from {cls.__module__} import {cls.__qualname__}" for cls in others),
        f"from rpcprops.programs import {', '.join(sorted({'Program', *used}))}",
    ]
    imports.sort(key=lambda line: (line.startswith("from"), line))
    transport = "" if artefact.transport == "tcp" else f", transport={artefact.transport!r}"
    # Python's \w matches some characters that a name must not contain, such as "²".
    name = re.sub(r"\W+", "_", artefact.subject, flags=re.ASCII).strip("_").lower() or "regression"
    body = kind.test.format(name=name, transport=transport)
    doc = wrapped(f"A regression test, made from a failure: {violation}")
    lines = [MARK, '"""' + doc[0], *doc[1:], '"""' if len(doc) > 1 else "", "", *imports, ""]
    if len(doc) == 1:
        lines[1] += '"""'
    lines += [f"PROGRAM = {program!r}", "", f"PLAN = {plan!r}", ""]
    lines += ["# What it showed when it was recorded.", f"RECORDED = {recorded!r}", "", body]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines).rstrip("\n")) + "\n"
