"""The work of :mod:`rpcprops.pytest_plugin`, one module for each task; the hooks are there."""
