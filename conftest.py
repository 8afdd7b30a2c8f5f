"""Chooses Hypothesis's profile and the place of its example database."""

import os
from pathlib import Path

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(__file__).parent / ".hypothesis")
settings.load_profile("rpcprops-ci" if os.environ.get("CI") else "rpcprops-dev")
