"""The kinds of artefacts: every tag has one, and only what is a program becomes code."""

from __future__ import annotations

import pytest

from rpcprops._kinds import _HOMES, Kind, kind_of
from rpcprops.errors import UsageError
from rpcprops.programs import Program


@pytest.mark.parametrize("tag", _HOMES)
def test_each_tag_has_a_kind(tag: str) -> None:
    """It is found under its own tag, always the same one, and says what ran."""
    kind = kind_of(tag)
    assert isinstance(kind, Kind)
    assert kind.tag == tag
    assert kind_of(tag) is kind
    program = Program(2, name="small")
    said = kind.describe("a name", program)
    of_programs = ("program", "reinit", "unpredicted")
    shows = {**dict.fromkeys(of_programs, "'small'"), "upstream": "a name", "pytest": ""}
    assert shows[tag] in "\n".join(said)
    assert bool(kind.test) == (tag in of_programs)
    assert bool(kind.test) == bool(kind.test_imports)


def test_another_tag_is_refused() -> None:
    """The message names it."""
    with pytest.raises(UsageError, match="unknown kind 'shell'"):
        kind_of("shell")


def test_a_program_in_ranks_that_join_later_is_reinitialised() -> None:
    """The cluster tells, for what is under way; of the other kinds it changes nothing."""
    assert kind_of("program").in_cluster(init=False) is kind_of("reinit")
    for tag in _HOMES:
        assert kind_of(tag).in_cluster(init=True) is kind_of(tag)
        assert tag == "program" or kind_of(tag).in_cluster(init=False) is kind_of(tag)
