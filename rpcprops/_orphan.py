"""A worker of xdist's leaves soon after the process that controls it was killed.

execnet, which runs the workers, lets one go on for 5 real seconds when its controller is gone, then
interrupts it, and ends it 10 seconds later. All that time its ranks take processors and memory.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

#: Real seconds between two looks at the parent.
_LOOK_SECONDS = 0.25
#: Real seconds that an interrupted worker has for its fixtures to end.
_GRACE_SECONDS = 1.0


def leave_with_parent(parent: int, on_death: Callable[[], None]) -> None:
    """End this process when `parent` is no longer its parent, from a thread that looks for it.

    It is interrupted, as execnet does later, so that fixtures are torn down; what is left of it
    after a real second is killed.

    Args:
        on_death: called first.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        on_death()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="rpcprops-parent", daemon=True).start()
