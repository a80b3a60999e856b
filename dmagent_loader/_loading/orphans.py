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
        arguments = (parent.pid, parent.sentinel)
        threading.Thread(target=_exit_after, args=arguments, name="dmagent-parent", daemon=True).start()


def _exit_after(main: int | None, sentinel: int) -> None:
    """Ends the process when its main process is gone.

    Args:
        main: Id of the main process, which may have ended before this looks for the first time.
        sentinel: Ready when the main process has ended, unless later workers hold the other end, too.
    """
    parent = os.getppid()  # the main process, or the server that forks for it
    while not wait([sentinel], _LOOK_SECONDS) and os.getppid() == parent and _exists(main):
        pass
    os._exit(1)


def _exists(process: int | None) -> bool:
    """Whether there is a process; True where nobody can say."""
    if process is None or os.name != "posix":  # elsewhere, signal 0 is one that arrives
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
