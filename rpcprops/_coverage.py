"""``python -m rpcprops._coverage``: writes docs/coverage.md, what drawn programs use of torch.

The names come from torch, and the uses from the source of the functions that run steps in ranks.
The messages and errors come from programs that are drawn, always the same, and predicted. No rank
runs for it.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings

from rpcprops._hunt import hunted
from rpcprops._uses import Uses, methods_used, uses_of
from rpcprops.clock.sends import REQUEST_NUMBERS
from rpcprops.faults import FaultPlan, MessageType
from rpcprops.oracle import Model, Prediction, predict
from rpcprops.outcomes import Counters
from rpcprops.programs import Program
from rpcprops.properties import Case
from rpcprops.steps import STEP_TYPES, Parallel, Settle, Step
from rpcprops.steps.in_rank.lookup import place_of
from rpcprops.torch_facts import FINDINGS, NEWEST, CounterKeys, Finding, Texts
from rpcprops.torch_facts.places import COUNTERS, REQUESTS, places_of_texts
from rpcprops.torch_facts.public import (
    CLASSES,
    NEEDS,
    NEEDS_ITS_CLASS,
    NOT_YET,
    OUT_OF_SCOPE,
    PACKAGES,
    RECEIVERS,
    UNCOUNTED_REQUESTS,
    PublicNames,
    public_names,
    reason_against,
    use_of_harness,
)

#: Exists in a checkout only; an installed package has no such document.
DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
#: The modules that take ranks through init_rpc and shutdown.
HARNESS_MODULES = (
    "rpcprops.agents._agent",
    "rpcprops.agents.tensorpipe",
    "rpcprops.cluster.adoption",
    "rpcprops.cluster.rank_process",
    "rpcprops._rank_fixture",
)
#: How many programs are drawn from each property.
_DRAWS = 600

Class = Literal["drawn", "harness", "not yet", "out of scope"]
_TITLES: Mapping[Class, str] = {
    "drawn": "drawn",
    "harness": "used by the harness",
    "not yet": "not drawn yet",
    "out of scope": "out of scope",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One public name of torch: its class, and the kinds of step or the reason."""

    name: str
    category: Class
    says: str


# Which kinds of step use which names.


def kinds_using() -> dict[type[Step], Uses]:
    """What the function uses that runs each kind of step in a rank; those of ours alone."""
    found: dict[type[Step], Uses] = {}
    for cls in STEP_TYPES.values():
        if cls.runs and cls.__module__.startswith("rpcprops."):
            found[cls] = uses_of(*place_of(cls))
    return found


def names_of_torch(kinds: Mapping[type[Step], Uses]) -> PublicNames:
    """The public names of the installed torch; imports it."""
    return public_names({name for uses in kinds.values() for name in uses.dotted})


def drawn_names(
    kinds: Mapping[type[Step], Uses], public: PublicNames
) -> dict[str, list[type[Step]]]:
    """The public names that kinds of step use, each with those kinds."""
    members = [name for name in public.names if name.rpartition(".")[0] in CLASSES]
    found: defaultdict[str, list[type[Step]]] = defaultdict(list)
    for cls, uses in kinds.items():
        names = {name for dotted in uses.dotted if (name := public.named(dotted))}
        needs = dict(NEEDS)
        for member in members:
            if member.startswith(f"{NEEDS_ITS_CLASS}."):
                needs[member] = (NEEDS_ITS_CLASS,)
        # Twice, because a member may need another one.
        for _ in range(2):
            names |= methods_used(uses, names, members, needs, RECEIVERS)
        for name in names:
            found[name].append(cls)
    return dict(found)


def rows(public: PublicNames, drawn: Mapping[str, Sequence[type[Step]]]) -> list[Row]:
    """Every public name with its class.

    Raises:
        KeyError: a name is in no class.
    """
    found: list[Row] = []
    for name in public.names:
        if name in drawn:
            found.append(Row(name, "drawn", _kinds(drawn[name])))
        elif use := use_of_harness(name):
            found.append(Row(name, "harness", use))
        elif name in NOT_YET:
            found.append(Row(name, "not yet", ""))
        elif reason := reason_against(name):
            found.append(Row(name, "out of scope", reason))
        else:
            raise KeyError(name)
    return found


def needless(drawn: Iterable[str]) -> list[str]:
    """The names that are listed as not drawn, although some kind of step uses them."""
    return sorted(name for name in drawn if name in NOT_YET or name in OUT_OF_SCOPE)


def _kinds(kinds: Iterable[type[Step]]) -> str:
    ordered = sorted(kinds, key=lambda cls: (cls.order is None, cls.order or 0.0, cls.__name__))
    return ", ".join(
        f"`{cls.__name__}`" + ("" if _comes(cls) else " (asked for)") for cls in ordered
    )


def _comes(cls: type[Step]) -> bool:
    """Whether programs that name no kinds contain it."""
    return cls.order is not None or cls is Parallel


# What drawn programs make ranks send, and what they meet.


@dataclass
class Reached:
    """What drawn programs reach, by their predictions.

    Attributes:
        programs: how many were predicted.
        senders: for each message type, the kinds of step that make a rank send it.
        beside: the same for the types that the faulty agent neither fails nor delays, by name.
        at_shutdown: the types that a graceful shutdown sends.
        kinds: how many steps of each kind there were.
        errors: for each class of error, the kinds of step that must raise it.
        texts: the texts of torch's, by their names in :class:`Texts`, that some prediction expects.
        behind: for each such text, the kinds of step that show the class of an error that has it.
        counters: for each counter, the kinds of step after which the prediction has more of it.
        kept: the counters that some prediction has other than 0 at the end of its program.
    """

    programs: int = 0
    senders: defaultdict[MessageType, set[type[Step]]] = field(
        default_factory=lambda: defaultdict(set)
    )
    beside: defaultdict[str, set[type[Step]]] = field(default_factory=lambda: defaultdict(set))
    at_shutdown: set[MessageType] = field(default_factory=set)
    kinds: Counter[type[Step]] = field(default_factory=Counter)
    errors: defaultdict[str, set[type[Step]]] = field(default_factory=lambda: defaultdict(set))
    texts: set[str] = field(default_factory=set)
    behind: defaultdict[str, set[type[Step]]] = field(default_factory=lambda: defaultdict(set))
    counters: defaultdict[str, set[type[Step]]] = field(default_factory=lambda: defaultdict(set))
    kept: set[str] = field(default_factory=set)

    def add(self, program: Program, plan: FaultPlan) -> None:
        """Predict a program step by step, and count what each step does."""
        self.programs += 1
        model = Model(program.world_size, plan, facts=NEWEST)
        for leaf in program.leaves:
            before, sent = len(model.sends), Counter(model.in_contexts.sent)
            held = model.counters()
            shown = model.add(leaf)
            self.kinds[type(leaf)] += 1
            for send in model.sends[before:]:
                self.senders[send.message].add(type(leaf))
            for _, _, message in model.in_contexts.sent - sent:
                self.beside[message].add(type(leaf))
            if shown.error:
                self.errors[shown.error].add(type(leaf))
            else:
                self._add_shown(leaf, shown.value, held, model.counters())
        whole = predict(program, plan, NEWEST)
        self.kept |= {name for one in whole.counters for name in _more(Counters(), one)}
        self.at_shutdown |= {send.message for send in whole.last_sends}
        self.texts.update(_texts(whole))

    def _add_shown(
        self, leaf: Step, value: Any, held: Sequence[Counters], holds: Sequence[Counters]
    ) -> None:
        """Count the texts behind what the value shows, and what the ranks hold more than before."""
        for text in leaf.texts_behind(value):
            self.texts.add(text)
            self.behind[text].add(type(leaf))
        for before, after in zip(held, holds, strict=True):
            for name in _more(before, after):
                self.counters[name].add(type(leaf))


def _more(before: Counters, after: Counters) -> list[str]:
    names = (item.name for item in fields(Counters))
    return [name for name in names if getattr(after, name) > getattr(before, name)]


#: The text by which each class of error is known (oracle/errors.py).
_TEXT_OF: Mapping[str, str] = {
    "remote": "remote",
    "creation": "creation",
    "injected": "injected",
    "timeout": "timeout",
}


def _texts(prediction: Prediction) -> Iterator[str]:
    """The texts of torch's that a run which agrees with the prediction contains, or may."""
    for step in prediction.steps:
        if step.error in _TEXT_OF:
            yield _TEXT_OF[step.error]
    if any(send.failures for send in prediction.sends if send.message.is_retryable):
        yield "failed_send"
    if prediction.leaking | prediction.may_leak:
        yield from ("leaks", "owners_waited")
    if prediction.waiting:
        yield "users_waited"
    if prediction.may_warn_unreleased_context:
        yield "context_kept"
    for met in prediction.met:
        yield from _texts_in(met.says)
    for finding in FINDINGS.values():
        if finding.name in prediction.known_bugs:
            yield from _texts_of(finding)


def _texts_in(pattern: str) -> Iterator[str]:
    """The texts that a regular expression for a violation asks for."""
    for name, _ in _shown_texts():
        value = getattr(NEWEST.texts, name)
        if any(
            re.escape(part) in pattern for part in ((value,) if isinstance(value, str) else value)
        ):
            yield name


def _texts_of(finding: Finding) -> Iterator[str]:
    """The texts that a log must show before a finding explains it (oracle/_findings.py)."""
    logs: Mapping[str, tuple[str, ...]] = {
        "unreadable": ("unreadable",),
        "owner_assertion": ("assertion", "owner_assertion_file"),
        "terminated": ("terminated",),
        "waited": ("users_waited", "owners_waited"),
    }
    yield from logs.get(finding.logs, ())
    if finding.leak_logs:
        yield "fork_unknown"
    if finding.abort_logs:
        yield "heap_damaged"


def reached(draws: int = _DRAWS) -> Reached:
    """What a hunt reaches: so many drawn cases of each property that it draws from."""
    found = Reached()
    for prop in hunted().values():

        @seed(0)
        @settings(
            max_examples=draws,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(prop.cases())
        def run(case: Case) -> None:
            found.add(case.program, case.plan)

        run()
    return found


# The page.


def page(public: PublicNames, kinds: Mapping[type[Step], Uses], seen: Reached) -> str:
    """The text of docs/coverage.md."""
    drawn = drawn_names(kinds, public)
    found = rows(public, drawn)
    counts = Counter(row.category for row in found)
    meant = len(found) - counts["out of scope"]
    lines = [
        "# Coverage: what drawn programs use of torch",
        "",
        f"`python -m rpcprops._coverage` has made this page with torch {public.version}. Do not "
        "edit it: run that again when the code has changed.",
        "",
        "A kind of step with *(asked for)* is drawn only where `kinds=` names it.",
        "",
        f"**{counts['drawn']} of the {len(found)} public names of torch's RPC are drawn**: some "
        "kind of step uses them, and an oracle predicts and checks what the step shows. "
        f"{counts['harness']} more are used around every program. {counts['not yet']} are not "
        f"drawn yet, and {counts['out of scope']} are out of scope, each for the reason that "
        f"stands beside it. Without those, {counts['drawn'] + counts['harness']} of {meant} are "
        "used.",
        "",
        "A name counts as drawn if it stands in the source of a function that runs a kind of step "
        "in a rank (`rpcprops/steps/in_rank`), or in a function which that one uses. A method "
        "counts by its name; where other objects have a method of that name, a table in "
        "`rpcprops/torch_facts/public.py` says what else must be there. So the table says what a "
        "program can use. It does not say with which arguments: see the docstring of the kind.",
        "",
    ]
    for package in PACKAGES:
        part = [row for row in found if _package_of(row.name) == package]
        if part:
            lines += [f"## {package}", "", *_name_table(package, part), ""]
    lines += ["## Messages", "", *_message_lines(kinds, public, drawn, seen), ""]
    lines += ["## Counters", "", *_counter_lines(seen), ""]
    lines += ["## Errors and lines of logs", "", *_error_lines(seen), ""]
    return "\n".join(map(_wrapped, lines))


def _wrapped(line: str) -> str:
    """The line, broken as the other documents are; not a row of a table."""
    if line.startswith("|"):
        return line
    return textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)


def _package_of(name: str) -> str:
    return max((p for p in PACKAGES if name.startswith(f"{p}.")), key=len)


def _name_table(package: str, part: Sequence[Row]) -> Iterator[str]:
    yield "| name | class | by which kinds of step, or why |"
    yield "| --- | --- | --- |"
    order = {name: number for number, name in enumerate(_TITLES)}
    together: dict[tuple[Class, str], list[str]] = defaultdict(list)
    for row in part:
        short = row.name.removeprefix(f"{package}.")
        # Names that are out of scope for one reason stand together.
        key = row.says if row.category == "out of scope" else f"{row.says}\0{short}"
        together[row.category, key].append(short)
    for (category, key), names in sorted(
        together.items(), key=lambda item: (order[item[0][0]], sorted(item[1])[0].lower())
    ):
        listed = ", ".join(f"`{name}`" for name in sorted(names, key=str.lower))
        yield f"| {listed} | {_TITLES[category]} | {key.partition(chr(0))[0]} |"


def _message_lines(
    kinds: Mapping[type[Step], Uses],
    public: PublicNames,
    drawn: Mapping[str, Sequence[type[Step]]],
    seen: Reached,
) -> Iterator[str]:
    counted = [name for name in REQUEST_NUMBERS.values() if name in MessageType.__members__]
    sent = [name for name in counted if seen.senders[MessageType(name)]]
    using = {
        name: drawn.get(used) or [cls for cls, uses in kinds.items() if used in uses.dotted]
        for name, used in UNCOUNTED_REQUESTS.items()
    }
    # What uses the name and came in these programs counts if it sent one.
    others = {
        name: [cls for cls in by if cls in seen.beside[name] or not seen.kinds[cls]]
        for name, by in using.items()
    }
    reached_too = [name for name, by in others.items() if by]
    yield (
        f"torch's agent sends {len(REQUEST_NUMBERS)} types of request (`enum MessageType` in "
        f"message.h); drawn programs make ranks send {len(sent) + len(reached_too)} of them. "
        f"{len(counted)} can be failed or delayed, and the oracle predicts each such send. The "
        f"kinds of step beside them are those that sent one in {seen.programs} drawn programs "
        "of a hunt, by their predictions; a kind that does so very rarely may be missing. In a "
        "run, the failed and the late sends of each rank are compared with the prediction; where "
        "there is a record of all messages, so are all requests, and how many were answered by an "
        "EXCEPTION."
    )
    yield ""
    yield (
        "Beside each stand the functions of torch's C++ that send it and that serve it. "
        f"{_FILES} So a hunt reaches these functions."
    )
    yield ""
    yield "| request | fails or comes late | sent by these kinds of step | sent in | served in |"
    yield "| --- | --- | --- | --- | --- |"
    for name in REQUEST_NUMBERS.values():
        place = f"{_code(REQUESTS[name].makes)} | {_code(REQUESTS[name].serves)}"
        if name in counted:
            message = MessageType(name)
            by = [_kinds(seen.senders[message])] if seen.senders[message] else []
            by += ["shutdown, for what is still held"] if message in seen.at_shutdown else []
            yield f"| `{name}` | yes | {'; '.join(by) or 'no step'} | {place} |"
        else:
            used = UNCOUNTED_REQUESTS[name]
            by_name = _kinds(others[name]) or f"no step (none uses `{used}`)"
            yield f"| `{name}` | no | {by_name} | {place} |"
    silent = [cls for cls in kinds if not any(cls in by for by in seen.senders.values())]
    silent = [cls for cls in silent if not any(cls in by for by in others.values())]
    if silent:
        yield ""
        yield f"These kinds of step made no rank send a request: {_kinds(silent)}."
    missing = [cls for cls in kinds if not seen.kinds[cls] and cls is not Settle and _comes(cls)]
    if missing:
        yield ""
        yield f"These kinds of step did not come in the programs drawn for this: {_kinds(missing)}."


#: Where the files are that the page names.
_FILES = (
    "Files without a folder are in `torch/csrc/distributed/rpc`, those of `autograd/` in "
    "`torch/csrc/distributed/autograd`."
)


def _code(places: str) -> str:
    """Places as Markdown."""
    return "; ".join(f"`{one}`" for one in places.split("; "))


def _counter_lines(seen: Reached) -> Iterator[str]:
    yield (
        "torch counts what a rank holds and what is on its way. The ranks read all these counters "
        "at each settle and at the end, and they must be as predicted. *Held* are those which the "
        "prediction of one of the same drawn programs has other than 0 at its end; *met* are those "
        "which it has other than 0 after some step; the kinds of step beside them are those after "
        "which it has more. The others must be 0 whenever the ranks are at rest. What a rank holds "
        "because of a known finding is not counted here."
    )
    yield ""
    yield _FILES
    yield ""
    yield (
        "| counter of torch's | drawn programs | kinds of step that add to it | added to in | "
        "taken from in |"
    )
    yield "| --- | --- | --- | --- | --- |"
    for name, key in CounterKeys().all.items():
        met = "held" if name in seen.kept else "met" if seen.counters[name] else "0 at rest"
        place = COUNTERS[name]
        by = _kinds(seen.counters[name])
        yield f"| `{key}` | {met} | {by} | {_code(place.makes)} | {_code(place.serves)} |"


def _error_lines(seen: Reached) -> Iterator[str]:
    yield (
        "What torch writes is in `rpcprops/torch_facts/_texts.py`, with its place in torch's "
        "source. A text is *met* if the prediction of one of the same drawn programs is that it "
        "comes, or that it may come: also if a step shows only the class of the error that has it, "
        "or a known finding brings it. The others mean that something is wrong, or come in tests "
        "of the user's own. Files without a folder are in `torch/csrc/distributed/rpc`."
    )
    yield ""
    yield (
        "| text of torch's | drawn programs | kinds of step that must raise it, or show its class "
        "| its place |"
    )
    yield "| --- | --- | --- | --- |"
    places = places_of_texts()
    for name, text in _shown_texts():
        met = "met" if name in seen.texts else "not met"
        raised = seen.errors.get(next((c for c, t in _TEXT_OF.items() if t == name), ""), set())
        by = _kinds(raised | seen.behind[name])
        yield f"| {text} (`{name}`) | {met} | {by} | {places[name].removesuffix('.')} |"


def _shown_texts() -> Iterator[tuple[str, str]]:
    """The plain texts by name, as Markdown; not the expressions."""
    texts = Texts()
    for name in Texts.__dataclass_fields__:
        value = getattr(texts, name)
        if name in ("timed_out", "log_line"):
            continue
        parts = [value] if isinstance(value, str) else value
        yield name, ", ".join(f"`{part.strip()}`" for part in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make docs/coverage.md anew, and say what its data says needlessly.

    Raises:
        SystemExit: there are arguments: 0 if they ask for help, else 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rpcprops._coverage",
        description="Writes docs/coverage.md of this checkout anew. It takes no arguments.",
    )
    parser.parse_args(arguments)
    kinds = kinds_using()
    public = names_of_torch(kinds)
    DOCUMENT.write_text(page(public, kinds, reached()), encoding="utf-8")
    for name in needless(drawn_names(kinds, public)):
        print(f"{name} is drawn; take it out of rpcprops/torch_facts/public.py")


if __name__ == "__main__":
    main()
