"""Chooses Hypothesis's profile and the place of its example database."""

import os
from pathlib import Path

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
