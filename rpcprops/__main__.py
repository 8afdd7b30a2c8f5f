"""``python -m rpcprops`` is the ``rpcprops`` command."""

from rpcprops.cli import main

main()
