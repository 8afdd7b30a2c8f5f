"""What rpcprops registers with Hypothesis: profiles, and how to draw a fault table.

Hypothesis calls :func:`register` through its entry point. Every profile has a name of ours, so that
none of a user's is overwritten; choose one with ``settings.load_profile`` in conftest.py, or with
``--hypothesis-profile``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

#: Profile name to settings. The deadline is off because an example starts processes.
PROFILES: dict[str, dict[str, Any]] = {
    "rpcprops-dev": {"max_examples": 20},
    "rpcprops-ci": {"max_examples": 25, "print_blob": True, "derandomize": False},
    "rpcprops-nightly": {"max_examples": 1000, "print_blob": True, "derandomize": False},
    "rpcprops-debug": {"max_examples": 5, "print_blob": True, "verbosity": "verbose"},
}

NIGHTLY = "rpcprops-nightly"
DEBUG = "rpcprops-debug"


def register() -> None:
    """Register the profiles, and the strategy that draws a ``FaultTable`` from its type."""
    from hypothesis import Verbosity, settings

    from rpcprops.strategies import register

    for name, values in PROFILES.items():
        chosen = dict(values)
        if "verbosity" in chosen:
            chosen["verbosity"] = Verbosity[chosen["verbosity"]]
        # From Hypothesis's default, not from what happens to be loaded: under CI=true that is
        # Hypothesis's own `ci`, which is derandomized and has no database.
        settings.register_profile(name, settings.get_profile("default"), deadline=None, **chosen)
    register.register()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Undo what an import inside does to Hypothesis's profiles."""
    from hypothesis import settings

    loaded = settings.get_current_profile_name()
    registered: dict[str, Any] = settings._profiles  # noqa: SLF001 - they are listed nowhere else
    before = dict(registered)
    try:
        yield
    finally:
        registered.clear()
        registered.update(before)
        settings.load_profile(loaded)


def current() -> str:
    """The name of the profile that is loaded."""
    from hypothesis import settings

    return str(settings.get_current_profile_name())
