"""What is known of one version of torch, as one value."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from rpcprops.torch_facts._counters import CounterKeys
from rpcprops.torch_facts._findings import FINDINGS
from rpcprops.torch_facts._texts import Texts, texts_of
from rpcprops.torch_facts._versions import VERSIONS, release

#: The first release whose module `torch` has these dtypes; the others are in all that we support.
DTYPES_SINCE = {
    **dict.fromkeys((f"int{bits}" for bits in range(1, 8)), "2.6"),
    "float8_e8m0fnu": "2.7",
    "float4_e2m1fn_x2": "2.8",
    "bcomplex32": "2.14",
}

#: The first release whose DistributedOptimizer does without TorchScript.
_IN_PYTHON = (2, 14)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What is known of one version of torch.

    Attributes:
        version: as torch itself names it, ``2.13.0+cpu``; may be empty.
        texts: the texts that it writes and rpcprops reads.
        counters: its names of the counters.
        mended: findings that it is taken not to have, whatever its version.
    """

    version: str
    texts: Texts = field(default_factory=Texts)
    counters: CounterKeys = field(default_factory=CounterKeys)
    mended: frozenset[str] = frozenset()

    def has_bug(self, name: str) -> bool:
        """Whether this version has the known finding of that name.

        Every version has it from the first release that broke the promise on, up to the first one
        that is known to have mended it, including a version that nobody has measured.

        Raises:
            KeyError: there is no such finding.
        """
        return name not in self.mended and not FINDINGS[name].is_kept(self.version)

    def is_before(self, name: str) -> bool:
        """Whether this version is a release from before that finding.

        Raises:
            KeyError: there is no such finding.
        """
        return FINDINGS[name].is_before(self.version)

    @property
    def compiles_optimizers(self) -> bool:
        """Whether DistributedOptimizer compiles its functional optimizers as TorchScript.

        ``torch/distributed/optim/optimizer.py`` has _ScriptLocalOptimizer up to 2.13, and from 2.14
        on _FunctionalLocalOptimizer, which runs them in Python.
        """
        return release(self.version) < _IN_PYTHON

    def as_if_mended(self) -> TorchFacts:
        """The same torch without any known finding: what draws for it avoids nothing."""
        return replace(self, mended=frozenset(FINDINGS))

    def has_dtype(self, name: str) -> bool:
        """Whether this version has ``torch.NAME``, if that is a dtype of some release.

        A version that is not readable has only what all supported releases have.
        """
        return release(self.version) >= release(DTYPES_SINCE.get(name, ""))


def facts_of(version: str) -> TorchFacts:
    """The facts of a version of torch; those of the oldest if `version` is not readable."""
    return TorchFacts(version, texts_of(version))


#: The facts of the newest supported torch, which are used if no version is known.
NEWEST = facts_of(VERSIONS[-1])

#: The facts of an unknown torch: it may have every known finding.
UNKNOWN = facts_of("")


@functools.cache
def installed() -> TorchFacts:
    """The facts of the torch that this Python would import; does not import it.

    :data:`NEWEST` if that torch was not installed, such as a checkout on the path.
    """
    from importlib import metadata

    try:
        return facts_of(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return NEWEST
