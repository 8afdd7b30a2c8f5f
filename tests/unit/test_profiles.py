"""Hypothesis profiles: ours are there under names of ours, and nobody else's are touched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import Verbosity, find, settings
from hypothesis import strategies as st

from rpcprops import profiles
from rpcprops.faults import FaultTable
from rpcprops.profiles import NIGHTLY


@pytest.mark.parametrize("name", ["dev", "ci", "nightly", "debug"])
def test_our_profiles_are_registered(name: str) -> None:
    """Each profile can be loaded by its name, and sets no deadline on an example."""
    profile = settings.get_profile(f"rpcprops-{name}")
    assert profile.deadline is None


def test_there_are_no_other_profiles_of_ours() -> None:
    """Every profile has a name that begins with the package's, so that none is anybody else's."""
    assert list(profiles.PROFILES) == [f"rpcprops-{n}" for n in ("dev", "ci", "nightly", "debug")]
    assert profiles.NIGHTLY in profiles.PROFILES
    assert profiles.DEBUG in profiles.PROFILES


def test_profiles_differ_as_their_names_say() -> None:
    """A night runs far more examples than a build, a build more than a debugging session."""
    dev, ci, nightly, debug = (settings.get_profile(name) for name in profiles.PROFILES)
    assert debug.max_examples < dev.max_examples <= ci.max_examples < nightly.max_examples
    assert debug.verbosity == Verbosity.verbose
    assert dev.verbosity == Verbosity.normal
    assert all(p.print_blob for p in (ci, nightly, debug))


def test_builds_draw_anew_each_time() -> None:
    """Ours are not derandomized, or every shard of a build would draw the same examples."""
    for name in profiles.PROFILES:
        assert not settings.get_profile(name).derandomize


def test_one_of_them_is_loaded_here() -> None:
    """conftest.py chose one, and `current` names it."""
    assert profiles.current() == settings.get_current_profile_name()


def test_ci_draws_the_same_for_the_tests_of_this_repository() -> None:
    """Under CI=true they run with rpcprops-ci, but derandomized, unless it is a night's run."""
    ours, ci = settings.get_profile("tests-ci"), settings.get_profile("rpcprops-ci")
    assert repr(ours) == repr(settings(ci, derandomize=True, database=None))
    assert profiles.current() in ("tests-ci" if os.environ.get("CI") else "rpcprops-dev", NIGHTLY)


def test_a_table_can_be_drawn_from_its_type() -> None:
    """Registering also teaches Hypothesis what a FaultTable is."""
    assert find(st.from_type(FaultTable), lambda _: True) == FaultTable()


USERS = """
    import sys
    from hypothesis import settings
    before = {name: settings.get_profile(name) for name in ("default", "ci")}
    mine = settings(max_examples=7, deadline=123)
    settings.register_profile("dev", mine)
    settings.register_profile("ci", mine)
    settings.load_profile("dev")
    from rpcprops import profiles
    profiles.register()
    profiles.register()
    assert settings.get_profile("default") == before["default"]
    for name in ("dev", "ci"):
        found = settings.get_profile(name)
        assert (found.max_examples, found.deadline.total_seconds()) == (7, 0.123), name
    assert settings.get_current_profile_name() == "dev"
    assert settings().max_examples == 7
    ours = settings.get_profile("rpcprops-dev")
    assert (ours.max_examples, ours.deadline) == (20, None)
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("ci", ["", "true"])
def test_a_users_profiles_stay_as_they_are(ci: str) -> None:
    """Profiles named dev, ci and default, and the one that is loaded, survive ours; so under CI."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USERS)],
        env={"CI": ci} if ci else {},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_fixture_leaves_profiles_alone() -> None:
    """Importing torch.testing through our fixture keeps the user's profiles and choice."""
    code = """
from hypothesis import settings
settings.register_profile("dev", max_examples=7)
settings.register_profile("mine", max_examples=9)
settings.load_profile("mine")
from rpcprops.fixture import FaultyRpcAgentTestFixture
import torch.testing._internal.common_utils
assert settings.get_current_profile_name() == "mine"
assert settings().max_examples == 9
assert settings.get_profile("dev").max_examples == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
