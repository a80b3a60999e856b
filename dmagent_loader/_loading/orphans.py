"""Data workers end with the process that reads their batches.

torch's workers look for their parent only while they wait for an order. One that has ended its last batch after a kill
waits for its queue to be emptied, for ever if that is full: the workers hold both of its ends. It would keep its
memory, and the blocks of remote shards that it needs could not be evicted from the folder of the node.
"""

from __future__ import annotations

import os
import threading
from multiprocessing.connection import wait
from multiprocessing.process import parent_process

_LOOK_SECONDS = 2.0
"""Between two looks at the parent."""

_watching = 0
"""Id of the process that has a thread for this: a forked child has the number, but not the thread."""


def end_with_parent() -> None:
    """Has this data worker end soon after its main process has; nothing in a process without a parent of Python's."""
    global _watching
    parent = parent_process()
    if parent is not None and _watching != os.getpid():
        _watching = os.getpid()
        threading.Thread(target=_exit_after, args=(parent.sentinel,), name="dmagent-parent", daemon=True).start()


def _exit_after(sentinel: int) -> None:
    """Ends the process when its parent is gone.

    Args:
        sentinel: Ready when the parent has ended. Later workers may hold the other end, too, so the number of the
            parent is looked at as well.
    """
    parent = os.getppid()
    while not wait([sentinel], _LOOK_SECONDS) and os.getppid() == parent:
        pass
    os._exit(1)
