"""In a rank: the shortest timeout that code gives to torch, because a fast clock shortens it.

A timeout of T virtual seconds ends after T / rate real seconds. The test process chooses a slower
clock where that is too short for honest work (:mod:`rpcprops.plugin.timeouts`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rpcprops.torch_facts import symbols

#: The functions of torch's rpc.api through which every call with a timeout goes, and the position
#: of the timeout in its own calls of them. `rpc_sync`, `rpc_async` and the proxies of an RRef end
#: in the first one, and `remote` in the others.
_SENDERS = {
    "_invoke_rpc": 5,
    "_invoke_remote_builtin": 2,
    "_invoke_remote_torchscript": 2,
    "_invoke_remote_python_udf": 3,
}


class Timeouts:
    """The timeouts that are passed in this process.

    Attributes:
        shortest: the shortest one so far, in virtual seconds; None if there was none.
    """

    def __init__(self) -> None:
        self.shortest: float | None = None
        self._watches = False

    def watch(self) -> None:
        """Note the timeouts that are passed to torch from now on."""
        self._watches = True
        api = symbols.rpc_api
        for name, position in _SENDERS.items():
            function = getattr(api, name, None)
            if function is not None:
                setattr(api, name, self._watched(function, position))
        symbols.PyRRef.to_here = self._watched(symbols.PyRRef.to_here, 1, "timeout")

    def begin_again(self) -> None:
        """Forget those of an earlier program."""
        self.shortest = None

    def look(self) -> float | None:
        """The shortest one so far, that of the agent's options included."""
        if self._watches and symbols.is_agent_set():
            self._note(symbols.rpc_api.get_rpc_timeout())
        return self.shortest

    def _note(self, timeout: Any) -> None:
        # 0 means no timeout, and -1 that of the agent (torch's UNSET_RPC_TIMEOUT).
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if is_number and timeout > 0:
            self.shortest = min(float(timeout), self.shortest or float(timeout))

    def _watched(
        self, function: Callable[..., Any], position: int, name: str = ""
    ) -> Callable[..., Any]:
        """`function`, which notes the argument at that position, or of that name."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._note(args[position] if position < len(args) else kwargs.get(name))
            return function(*args, **kwargs)

        return watched
