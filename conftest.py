"""Chooses Hypothesis's profile and example database."""

import os
from pathlib import Path

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

_PROFILE = "rpcprops-ci" if os.environ.get("CI") else "rpcprops-dev"
_DATABASE = DirectoryBasedExampleDatabase(Path(__file__).parent / ".hypothesis" / "examples")

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", _PROFILE))
settings.register_profile("rpcprops-here", settings.default, database=_DATABASE)
