"""Chooses Hypothesis's profile and the place of its example database."""

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

#: For the tests of this repository, where CI runs them: as rpcprops-ci, but the draws are the same
#: in every run, so that a run that fails has failed because of what was changed.
SAME_DRAWS = "tests-ci"

set_hypothesis_home_dir(Path(__file__).parent / ".hypothesis")
settings.register_profile(
    SAME_DRAWS, settings.get_profile("rpcprops-ci"), derandomize=True, database=None
)
settings.load_profile(SAME_DRAWS if os.environ.get("CI") else "rpcprops-dev")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the garbage collector, and keep what was collected out of its sight.

    Thousands of tests stay as long as the process, and to look through them again and again took a
    third of the collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
