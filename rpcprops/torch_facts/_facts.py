"""What is known of one version of torch, in one value."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from rpcprops.torch_facts._counters import CounterKeys
from rpcprops.torch_facts._findings import FINDINGS
from rpcprops.torch_facts._texts import Texts, texts_of
from rpcprops.torch_facts._versions import VERSIONS


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What is known of one version of torch.

    Attributes:
        version: as torch itself names it, ``2.13.0+cpu``; may be empty.
        texts: what it writes and rpcprops reads.
        counters: what it calls its counters.
    """

    version: str
    texts: Texts = field(default_factory=Texts)
    counters: CounterKeys = field(default_factory=CounterKeys)

    def has_bug(self, name: str) -> bool:
        """Whether this version has the known finding of that name.

        It has it until a release that is known to have mended it, so a version that nobody has
        measured has it as well.

        Raises:
            KeyError: there is no such finding.
        """
        return not FINDINGS[name].is_mended(self.version)


def facts_of(version: str) -> TorchFacts:
    """The facts of a version of torch; those of the oldest where the version is no version."""
    return TorchFacts(version, texts_of(version))


#: The facts of the newest torch that is supported: what is taken where no version is known.
NEWEST = facts_of(VERSIONS[-1])

#: Those of a torch of which nothing is known: it may have every known finding.
UNKNOWN = facts_of("")


@functools.cache
def installed() -> TorchFacts:
    """The facts of the torch that this Python would import, which is not imported for that.

    :data:`NEWEST` where it is none that was installed, such as a checkout on the path.
    """
    from importlib import metadata

    try:
        return facts_of(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return NEWEST
