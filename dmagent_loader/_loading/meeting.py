"""Work of a start that all ranks share, however long it takes: no rank waits for another inside a collective.

A collective ends the run after the timeout of the process group, which rank 0 would exceed while it indexes terabytes.
So the work runs in a thread, and the main threads of all ranks meet about once a second and tell each other their
states: still working, waiting for the values of the others, or done. Values are exchanged when all ranks wait for them.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from dmagent_loader import _distributed as distributed
from dmagent_loader.shards.index.peers import Alone, Peers

_HEARTBEAT_SECONDS = 1.0
"""Longest time between two meetings; far below any timeout of a process group."""
_BYTES_PER_BROADCAST = 32 << 20
_LONGEST_END_SECONDS = 5.0
"""Longest wait for the work to end after another rank has failed."""

_WORKING, _DONE = "working", "done"

T = TypeVar("T")


def work_together(step: str, work: Callable[[Peers], T]) -> T:
    """Runs `work` on all ranks at the same time.

    Args:
        step: Description of the step, for messages; the same on all ranks.
        work: The work of this rank. It calls no collective; `Peers.gather` exchanges values, which are pickled. All
            ranks must gather equally often.

    Returns:
        The result of this rank.

    Raises:
        RankError: Another rank failed, is at another step, or does not answer. A rank whose work failed raises its own
            error.
    """
    if not distributed.is_active():
        return work(Alone())
    meeting: _Meeting[T] = _Meeting()
    thread = threading.Thread(target=meeting.run, args=(work,), name="dmagent-start", daemon=True)
    thread.start()
    try:
        while True:
            states = distributed.report(step, *meeting.state())
            if all(state == _DONE for state in states):
                return meeting.result
            if _WORKING not in states:
                assert _DONE not in states, "a rank has gathered less often than the others"
                meeting.deliver([_from_rank(step, rank, int(size), meeting.sent) for rank, size in enumerate(states)])
    finally:
        meeting.stop.set()
        meeting.wake()
        thread.join(_LONGEST_END_SECONDS)


class _Meeting(Generic[T]):
    """The work of this rank, and what it has to say to the others; the `Peers` that the work sees."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.stop = threading.Event()
        self.result: T
        self.sent: bytes | None = None
        """The value to be exchanged, until those of all ranks are there."""
        self._received: list[bytes] | None = None
        self._fault: BaseException | None = None
        self._is_done = False
        self._changed = threading.Condition()

    def run(self, work: Callable[[Peers], T]) -> None:
        """Does the work; in a thread of its own."""
        try:
            self.result = work(self)
        except BaseException as error:
            self._fault = error
        self._is_done = True
        self.wake()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        with self._changed:
            self.sent = b"" if value is None else pickle.dumps(value)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._received is not None or self.stop.is_set())
            received, self._received = self._received, None
        if received is None:
            raise RuntimeError("another rank has failed")
        return [pickle.loads(data) if data else None for data in received]

    def state(self) -> tuple[str, BaseException | None]:
        """The state of this rank, and its error; waits until there is news, but no longer than a heartbeat."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_done or self.sent is not None, _HEARTBEAT_SECONDS)
            if self._is_done:
                return _DONE, self._fault
            return _WORKING if self.sent is None else str(len(self.sent)), None

    def deliver(self, received: list[bytes]) -> None:
        """Hands over the values of all ranks to the work."""
        with self._changed:
            self._received, self.sent = received, None
            self._changed.notify_all()

    def wake(self) -> None:
        """Has both threads look again."""
        with self._changed:
            self._changed.notify_all()


def _from_rank(step: str, rank: int, size: int, sent: bytes | None) -> bytes:
    """The value of one rank, on all ranks."""
    own = sent if rank == distributed.get_rank() else None
    return b"".join(
        distributed.broadcast_bytes(
            None if own is None else own[start : start + _BYTES_PER_BROADCAST],
            min(_BYTES_PER_BROADCAST, size - start),
            step,
            rank,
        )
        for start in range(0, size, _BYTES_PER_BROADCAST)
    )
