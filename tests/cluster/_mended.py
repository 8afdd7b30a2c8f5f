"""What mends torch in a real rank: proxies of RRefs and remote modules as torch describes them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import rpc
from torch.distributed.nn.api import remote_module
from torch.distributed.rpc import rref_proxy

_proxies: Any = rref_proxy
_modules: Any = remote_module


def mend() -> None:
    """Mend both in the rank that runs this. C++ keeps the class of proxies, so that one stays."""
    _proxies.RRefProxy.__init__ = _keep
    _proxies.RRefProxy.__getattr__ = _method
    _modules._RemoteModule.train = _train
    _modules._RemoteModule.eval = lambda self: self.train(False)
    _mend_rebuilding()


def _keep(self: Any, rref: Any, api: Any, timeout: float) -> None:
    vars(self)["_kept"] = (rref, api, timeout)


def _method(self: Any, name: str) -> Any:
    return lambda *args, **kwargs: _call(vars(self)["_kept"], name, args, kwargs)


def _call(kept: tuple[Any, Any, float], name: str, *given: Any) -> Any:
    """Ask for the class, as torch does, and then call what the object has under a name."""
    rref, api, timeout = kept
    result = _proxies.Future()

    def go_on(kind: Any) -> Any:
        function = getattr(kind.value(), name, None)
        is_async = hasattr(function, "_wrapped_async_rpc_function")
        run = _proxies._local_invoke_async_execution if is_async else _proxies._local_invoke
        return api(rref.owner(), run, args=(rref, name, *given), timeout=timeout)

    def complete(done: Any) -> None:
        result.set_result(done.value())

    kind = rref._get_type(timeout=timeout, blocking=False)
    if api is not rpc.rpc_async:
        kind.wait()
        return go_on(kind)
    kind.then(lambda known: go_on(known).then(complete))
    return result


def _train(self: Any, mode: bool = True) -> Any:
    self.module_rref.rpc_sync().train(mode)
    return self


def _mend_rebuilding() -> None:
    """Let what is received, or made of an RRef, be a whole module."""
    receive, make = (
        _modules._remote_module_receiver,
        _modules._RemoteModule.init_from_module_rref,
    )

    def received(*attributes: Any) -> Any:
        return _whole(receive(*attributes))

    # A pickle holds the name of the function.
    received.__module__, received.__qualname__ = receive.__module__, receive.__qualname__
    _modules._remote_module_receiver = received
    _modules._RemoteModule.init_from_module_rref = staticmethod(lambda *args: _whole(make(*args)))


def _whole(module: Any) -> Any:
    own = {**vars(module)}
    nn.Module.__init__(module)
    vars(module).update(own)
    return module
