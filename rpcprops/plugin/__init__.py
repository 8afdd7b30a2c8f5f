"""What :mod:`rpcprops.pytest_plugin` does, a module for each idea; the hooks are there."""
