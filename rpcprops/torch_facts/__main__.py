"""``python -m rpcprops.torch_facts FOLDER``: put a version's reports into the matrix and the docs.

FOLDER holds the ``--json`` reports of ``rpcprops check``, ``hunt`` and ``upstream`` on one version.
Without FOLDER, it only makes the tables of the document again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rpcprops.errors import UsageError
from rpcprops.torch_facts._findings import FINDINGS
from rpcprops.torch_facts._matrix import FILE, read
from rpcprops.torch_facts._measured import add, column_of, put_into, tables

#: Exists in a checkout only; an installed package has no such document.
DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"


def kept_in() -> dict[str, str]:
    """The findings that some releases of torch do not have, each with what says which."""
    since = {name: f"from {one.broken_in} on" for name, one in FINDINGS.items() if one.broken_in}
    until = {name: f"fixed in {one.fixed_in}" for name, one in FINDINGS.items() if one.fixed_in}
    return since | until


def main() -> None:
    """See the docstring of this module.

    Raises:
        SystemExit: 2 if the reports or the document cannot be used.
    """
    try:
        for folder in sys.argv[1:]:
            add(FILE, column_of(Path(folder)))
        if DOCUMENT.exists():
            text = DOCUMENT.read_text(encoding="utf-8")
            made = put_into(text, tables(read(FILE), kept_in()))
            DOCUMENT.write_text(made, encoding="utf-8")
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
