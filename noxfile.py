"""The matrix of torch versions, by hand: ``nox -s matrix`` (all), or ``nox -s "matrix(2.9.1)"``.

Each session installs one version of torch from the registry (gigabytes, for the builds bring CUDA
along), runs ``check``, a short hunt and PyTorch's own tests on it, puts what they showed into
``rpcprops/torch_facts/matrix.json`` and docs/findings.md, and deletes its environment, unless nox
was told to reuse environments (``-r`` or ``-R``). Commit the two files.

``nox -s "matrix(2.9.1)" -- check`` runs that part alone; the parts are check, slow (the finding
that takes minutes), hunt and upstream. What a run leaves out stays in the file as it was.
"""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import nox

#: By its path: in the process of nox there may be no rpcprops.
_FILE = Path(__file__).with_name("rpcprops") / "torch_facts" / "_versions.py"
TORCH = runpy.run_path(str(_FILE))["VERSIONS"]
HUNTED = "300"

#: What each part runs. A verdict that is no good is what the matrix is to show, so 1 is no error.
PARTS = {
    "check": ("rpcprops", "check", "--json", "check.json"),
    "slow": ("rpcprops", "check", "shutdown-deletes-argument", "--json", "check-slow.json"),
    "hunt": ("rpcprops", "hunt", "-n", HUNTED, "--batch", "100", "--json", "hunt.json"),
    "upstream": ("rpcprops", "upstream", "-n", "2", "--json", "upstream.json"),
}

nox.options.sessions = ["matrix"]


@nox.session
@nox.parametrize("torch", TORCH, ids=TORCH)
def matrix(session: nox.Session, torch: str) -> None:
    """Measure one version of torch."""
    chosen = session.posargs or list(PARTS)
    unknown = set(chosen) - set(PARTS)
    if unknown:
        session.error(f"there is no part {sorted(unknown)}; there are: {', '.join(PARTS)}.")
    checkout = Path.cwd()
    session.install("--no-cache-dir", f"torch=={torch}", "-e", ".[xdist]")
    folder = Path(session.create_tmp())
    # Not what an earlier run left; a hunt would go on where it stopped.
    shutil.rmtree(folder)
    folder.mkdir()
    with session.chdir(folder):
        for part in chosen:
            session.run(*PARTS[part], success_codes=[0, 1])
    session.run("python", "-m", "rpcprops.torch_facts", str(folder))
    # nox is asked for this by -r and -R.
    if not session.virtualenv._reused:
        session.log(f"deleting {session.virtualenv.location}")
        with session.chdir(checkout):
            shutil.rmtree(session.virtualenv.location)
